"""Keras's Kullback-Leibler divergence: functions, loss and metric, with the reductions and weights of Keras 3.

Keras itself is not imported. If the process has loaded it, its epsilon and float type are used, and the classes become
Keras losses and metrics, so that a model accepts them.
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

for _name in __all__:  # the module that users import them from, and in which pickles and saved models look for them
    globals()[_name].__module__ = __name__

if _keras := registration.loaded():
    for _known in (kullback_leibler_divergence, kl_divergence):
        registration.registered(_keras, _known)
    KLDivergence(), KLDivergenceMetric()
