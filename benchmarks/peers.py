"""How the libraries beside which klcore is measured are asked for its divergence, in each space: what the benchmarks of
speed and of accuracy, on the CPU and on the GPU, have in common.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def to_probs(space: str) -> Callable[[Any], Any]:
    """SciPy's functions take probabilities."""
    from scipy.special import softmax

    return {"probs": np.asarray, "log_probs": np.exp, "logits": lambda a: softmax(a, axis=-1)}[space]


def torch_loss(space: str, kl: Callable[[Any, Any, bool], Any]) -> Callable[[Any, Any], Any]:
    """The loss of x and y, by PyTorch's function, or Liger's: of log y, x, and whether that is a logarithm as well."""
    import torch.nn.functional as F

    return {
        "probs": lambda x, y: kl(y.log(), x, False),
        "log_probs": lambda x, y: kl(y, x, True),
        "logits": lambda x, y: kl(F.log_softmax(y, -1), F.log_softmax(x, -1), True),
    }[space]


def jax_terms(space: str, x: Any, y: Any) -> Any:
    """Not yet summed."""
    import jax
    import jax.numpy as jnp

    if space == "probs":
        return x * jnp.log(x / y)
    if space == "logits":
        x, y = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    return jnp.exp(x) * (x - y)
