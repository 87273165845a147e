"""PyTorch tensors that are a shard of the classes: lent to the kernels' library, whose arrays become tensors again."""

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
                "klcore.Shard takes tensors with memory, and none that torch.compile or torch.func is tracing; found a "
                f"{type(x).__name__}: call it within torch.compiler.disable"
            )
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y)):
            raise TypeError(
                "an argument requires a gradient, and klcore.Shard keeps no history for autograd: call it within "
                "torch.no_grad(), or in the forward of a torch.autograd.Function, whose backward returns "
                "shard.gradient(...)"
            )
        super().__init__(cpu if x.is_cpu else memory.cuda(), kernels.lent(call._replace(x=x, y=y, weights=weights)))
        self._x = x

    def here(self) -> Any:
        return contextlib.nullcontext() if self._x.is_cpu else memory.as_pytorch(self._x)

    def lend(self, a: Any) -> Any:
        return memory.lend(a)

    def give(self, a: Any) -> Any:
        return memory.as_tensor(a)
