"""Keras' Kullback-Leibler divergence: the functions, the loss and the metric, with Keras 3's reductions and weights.

Keras itself is not imported. Where the process has loaded it, its epsilon and float type are used, and the classes are
made Keras' own kind, so that a model takes them.
"""

from klcore.compat.keras import registration
from klcore.compat.keras.functions import (
    KLD,
    epsilon,
    kl_divergence,
    kld,
    kullback_leibler_divergence,
    set_epsilon,
)
from klcore.compat.keras.loss import KLDivergence
from klcore.compat.keras.metric import KLDivergenceMetric

__all__ = [
    "KLD",
    "KLDivergence",
    "KLDivergenceMetric",
    "epsilon",
    "kl_divergence",
    "kld",
    "kullback_leibler_divergence",
    "set_epsilon",
]

for _name in __all__:  # where users import them from, and where pickles and saved models look for them
    globals()[_name].__module__ = __name__

if _keras := registration.loaded():
    for _known in (kullback_leibler_divergence, kl_divergence):
        registration.registered(_keras, _known)
    KLDivergence(), KLDivergenceMetric()
