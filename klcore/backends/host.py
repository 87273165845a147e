"""Copy arrays of any library to the host, as NumPy arrays, for cheap computations such as klcore.Summary."""

import importlib
from typing import Any

import numpy as np

from klcore.backends import library


def to_numpy(a: Any, name: str) -> "np.ndarray[Any, Any]":
    """A NumPy array of a dtype that klcore supports; TypeError, naming the argument, for other dtypes."""
    of = library(a, name)
    if of == "torch":
        a = importlib.import_module("klcore.backends.torch.memory").lend(a.detach().cpu())
    elif of == "cupy":
        a = a.get()
    elif of == "dlpack":
        a = importlib.import_module("klcore.backends.dlpack").lend(a, name)
        a = a.get() if hasattr(a, "get") else a
    arguments = importlib.import_module("klcore.backends.arguments")  # imported with the first array, as backends are
    a = arguments.as_numpy(a, name)
    arguments.refuse(a, name)
    return a
