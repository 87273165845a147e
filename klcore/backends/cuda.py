"""CuPy arrays on NVIDIA GPUs. The kernels are not written yet: every call says what is missing, and does no more."""

import importlib
from typing import Any, NoReturn

from klcore.backends import BackendUnavailableError


def missing() -> str:
    """What keeps this machine from computing on a GPU, as a sentence."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); install it with: pip install cupy-cuda13x"
    if not cupy.is_available():
        return "CuPy finds no CUDA driver or no device; install NVIDIA's driver and check with: nvidia-smi"
    return "this version of klcore has no CUDA kernels; compute with device='cpu'"


def _refuse(*args: Any) -> NoReturn:
    raise BackendUnavailableError(f"device='cuda' cannot be used: {missing()}")


def kl_div(
    x: Any, y: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float, return_grad: Any, out: Any,
    device: str | None,
) -> Any:  # fmt: skip
    """See klcore.kl_div."""
    _refuse()


rel_entr = cross_entropy = kl_div


def entropy(
    x: Any, space: Any, axis: int, reduction: str, weights: Any, temperature: float, return_grad: Any, out: Any,
    device: str | None,
) -> Any:  # fmt: skip
    """See klcore.entropy."""
    _refuse()
