"""For klcore.Shard: shards as arrays of the library of the kernels, and results as arrays of the caller's library."""

import contextlib
import importlib
from typing import Any

from klcore.backends import find
from klcore.operations import Call

_BY_THEMSELVES = {  # libraries whose arrays know how they are spread
    "jax": "; shard the arrays over a mesh instead: under jax.jit, klcore's functions exchange the states",
    "dask": "; chunk the class axis instead: klcore's functions exchange the states",
}


class Lender:
    """For NumPy's and CuPy's arrays, which need no conversion. `backend` has states, merge and outputs for `call`."""

    def __init__(self, backend: Any, call: Call) -> None:
        self.backend, self.call = backend, call

    def here(self) -> Any:
        """The context in which the backend is called: the device of CuPy's arrays."""
        there = (a.device for a in (self.call.x, self.call.y) if hasattr(a, "__cuda_array_interface__"))
        return next(there, contextlib.nullcontext())

    def lend(self, a: Any) -> Any:
        """An argument as an array of the library of the kernels."""
        return a

    def give(self, a: Any) -> Any:
        """A result as an array of the caller's library."""
        return a


def lender_of(call: Call) -> Lender:
    """The lender for the library of the call's arrays."""
    backend = find(call.x, call.x if call.y is None else call.y, None)
    name = backend.__name__.rpartition(".")[2]
    if name == "torch":
        lender: Lender = importlib.import_module("klcore.backends.torch.parts").Lender(call)
        return lender
    if not hasattr(backend, "merge"):
        hint = _BY_THEMSELVES.get(name, "")
        raise TypeError(f"klcore.Shard takes arrays of NumPy, CuPy and PyTorch; found a {name} array{hint}")
    return Lender(backend, call)
