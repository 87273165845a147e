"""What PyTorch is doing while klcore is called. Whatever klcore asks of PyTorch's private interfaces, it asks here.

``torch._C._is_tracing()``
    Within torch.jit.trace; ``torch.jit.is_tracing`` asks it as well.
``torch._C._are_functorch_transforms_active()``
    Within torch.func's vmap, grad, vjp, jvp, functionalize.
``torch._C._len_torch_dispatch_stack()``
    How many TorchDispatchModes have been entered. FakeTensorMode is one.
``torch.autograd.forward_ad._current_level``
    0 or more within ``dual_level()``, and so in torch.func.jvp; else -1.
``torch._C._functorch.is_legacy_batchedtensor(t)``
    Whether it is a batch of the vmap that was there before torch.func's. Its type is torch.Tensor, and no transform is
    active then.
``torch.fx.experimental.symbolic_shapes.has_static_value(number)``
    False for a number that changes from one call of a compiled function to the next.

All six are in PyTorch 2.10, the oldest that klcore takes, and in 2.13. A call of a few rows takes ten microseconds,
and asks twice on its way: so none of these functions calls another.
"""

from typing import Any

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work, which torch.compile sees to itself.

    torch.func differentiates a Function, but no operator (torch 2.13), and only a Function notices a tangent."""
    transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    return transformed or forward_ad._current_level >= 0


def is_batched(cotangent: Any) -> bool:
    """Several at once, as torch.autograd.grad(is_grads_batched=True) hands them over."""
    return torch._C._functorch.is_legacy_batchedtensor(cotangent)


def stands_in(a: Any) -> bool:
    """Whether it is no tensor, but wants to know itself of what is called with it, as the proxies of torch.fx do."""
    return hasattr(a, "__torch_function__") and not isinstance(a, torch.Tensor)


def is_distributed(*tensors: Any) -> bool:
    """Whether one is a DTensor: by name, since importing them takes a while."""
    return any(type(t).__name__ == "DTensor" for t in tensors)


def is_known(number: float) -> bool:
    """Whether the compiler may take it for a constant."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import; the compiler has it already

    return has_static_value(number)


def is_eager(*tensors: Any) -> bool:
    """Whether these are tensors with memory, and nobody is tracing or transforming what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()  # torch.jit.trace, which would keep the numbers
        and all(t is None or type(t) in PLAIN for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not tensors[0].is_meta
        and forward_ad._current_level < 0
    )
