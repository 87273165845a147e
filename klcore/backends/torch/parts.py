"""For klcore.Shard: tensors that are a shard of the classes, lent to the library of the kernels and back."""

import contextlib
from typing import Any

import torch

from klcore.backends import cpu, parts
from klcore.backends.torch import kernels, memory, private
from klcore.operations import Call


class Lender(parts.Lender):
    def __init__(self, call: Call) -> None:
        x, y = memory.operands(call.x, call.y, None)
        weights = memory.weights_beside(call.weights, x, None, "weights")
        if not private.is_eager(x, y, weights):
            raise TypeError(
                f"klcore.Shard takes plain tensors with memory; found a {type(x).__name__}. Exclude the call from "
                "torch.compile with torch.compiler.disable, do not use it in torch.func, and pass DTensors to klcore's "
                "functions, which exchange the states"
            )
        temperature = call.temperature
        if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (x, y, temperature)):
            raise TypeError(
                "an argument requires a gradient, but klcore.Shard does not support autograd; use torch.no_grad(), or "
                "call it in the forward of a torch.autograd.Function whose backward returns shard.gradient(...)"
            )
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.detach()
        call = call._replace(x=x, y=y, weights=weights, temperature=temperature)
        super().__init__(cpu if x.is_cpu else memory.cuda(), kernels.lent(call))
        self._x = x

    def here(self) -> Any:
        return contextlib.nullcontext() if self._x.is_cpu else memory.as_pytorch(self._x)

    def lend(self, a: Any) -> Any:
        return memory.lend(a)

    def give(self, a: Any) -> Any:
        return memory.as_tensor(a)
