"""The Kullback-Leibler divergence and its relatives, value and gradient, for arrays of any library.

:func:`kl_div` explains the options that all functions share. `klcore.compat` has the losses of other systems,
`klcore.typing` the types for annotations, and ``python -m klcore`` prints what belongs in a bug report.
Documentation: https://github.com/klcore/klcore/tree/main/docs
"""

try:
    __import__("klcore._cpu")  # what is missing is said here, not by the first module that needs it
except ModuleNotFoundError as error:
    if error.name != "klcore._cpu":
        raise
    raise ImportError(
        f"klcore is not compiled for this Python in {__path__[0]}, which Python found before the installed package: "
        'change to another folder, or run "pip install -e ." in the clone'
    ) from error

from klcore.backends import BackendUnavailableError, list_backends, register_backend
from klcore.backends.threads import get_num_threads, set_num_threads, threads
from klcore.config import show_config
from klcore.divergence import cross_entropy, entropy, kl_div, rel_entr
from klcore.estimate import kl_estimate
from klcore.family import alpha_div, chi2_div, js_div, mixed_kl_div, renyi_div, skew_kl_div, sq_hellinger, tv_dist
from klcore.shard import Shard
from klcore.summary import Summary
from klcore.version import __version__

__all__ = [
    "BackendUnavailableError",
    "Shard",
    "Summary",
    "__version__",
    "alpha_div",
    "chi2_div",
    "cross_entropy",
    "entropy",
    "get_num_threads",
    "js_div",
    "kl_div",
    "kl_estimate",
    "list_backends",
    "mixed_kl_div",
    "register_backend",
    "rel_entr",
    "renyi_div",
    "set_num_threads",
    "show_config",
    "skew_kl_div",
    "sq_hellinger",
    "threads",
    "tv_dist",
]
