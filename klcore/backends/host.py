"""Arrays of any library copied to the host, as NumPy's: for what is computed of few numbers, as klcore.Summary."""

import importlib
from typing import Any

import numpy as np

from klcore.backends import library
from klcore.backends.rows import as_numpy, refuse


def to_numpy(a: Any, name: str) -> "np.ndarray[Any, Any]":
    """The array's numbers, in a NumPy array of a dtype that klcore computes with; TypeError, by name, for others."""
    of = library(a, name)
    if of == "torch":
        a = importlib.import_module("klcore.backends.torch.memory").lend(a.detach().cpu())
    elif of == "cupy":
        a = a.get()
    elif of == "dlpack":
        a = importlib.import_module("klcore.backends.dlpack").lend(a, name)
        a = a.get() if hasattr(a, "get") else a
    a = as_numpy(a, name)
    refuse(a, name)
    return a
