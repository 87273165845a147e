"""Shards as arrays of the kernels' library, and its results as arrays of the caller's; for klcore.Shard."""

import contextlib
import importlib
from typing import Any

from klcore.backends import find
from klcore.operations import Call

_BY_THEMSELVES = {  # whose arrays know how they are spread
    "jax": "; shard them over a mesh, and klcore's functions exchange states by themselves under jax.jit",
    "dask": "; chunk the class axis, and klcore's functions exchange states by themselves",
}


class Lender:
    """Of arrays that are the kernels' library's own: `backend` has states, merge and outputs for those of `call`."""

    def __init__(self, backend: Any, call: Call) -> None:
        self.backend, self.call = backend, call

    def here(self) -> Any:
        """Within this the backend is called: on the device of CuPy's arrays."""
        there = (a.device for a in (self.call.x, self.call.y) if hasattr(a, "__cuda_array_interface__"))
        return next(there, contextlib.nullcontext())

    def lend(self, a: Any) -> Any:
        """An argument as an array of the kernels' library."""
        return a

    def give(self, a: Any) -> Any:
        """A result as an array of the caller's."""
        return a


def lender_of(call: Call) -> Lender:
    """For the library of the call's arrays."""
    backend = find(call.x, call.x if call.y is None else call.y, None)
    name = backend.__name__.rpartition(".")[2]
    if name == "torch":
        lender: Lender = importlib.import_module("klcore.backends.torch.parts").Lender(call)
        return lender
    if not hasattr(backend, "merge"):
        hint = _BY_THEMSELVES.get(name, "")
        raise TypeError(f"klcore.Shard takes arrays of NumPy, CuPy and PyTorch; found one of {name}{hint}")
    return Lender(backend, call)
