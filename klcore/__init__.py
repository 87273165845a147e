"""klcore: the Kullback-Leibler divergence, value and gradient, for arrays wherever they live."""

from klcore.backends import BackendUnavailableError, list_backends, register_backend
from klcore.backends.threads import get_num_threads, set_num_threads, threads
from klcore.config import show_config
from klcore.divergence import cross_entropy, entropy, kl_div, rel_entr
from klcore.version import __version__

__all__ = [
    "BackendUnavailableError",
    "__version__",
    "cross_entropy",
    "entropy",
    "get_num_threads",
    "kl_div",
    "list_backends",
    "register_backend",
    "rel_entr",
    "set_num_threads",
    "show_config",
    "threads",
]
