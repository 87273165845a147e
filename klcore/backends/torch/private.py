"""The state of PyTorch during a call. All uses of PyTorch's private interfaces are in this file.

``torch._C._is_tracing()``
    Whether torch.jit.trace is running; the public ``torch.jit.is_tracing`` calls it.
``torch._C._are_functorch_transforms_active()``
    Whether torch.func's vmap, grad, vjp, jvp or functionalize is running.
``torch._C._len_torch_dispatch_stack()``
    The number of active TorchDispatchModes. FakeTensorMode is one.
``torch.autograd.forward_ad._current_level``
    0 or more within ``dual_level()``, and so in torch.func.jvp; otherwise -1.
``torch._C._functorch.is_legacy_batchedtensor(t)``
    Whether it is a batch of the vmap that preceded torch.func. Its type is torch.Tensor, and no transform is active.
``torch.fx.experimental.symbolic_shapes.has_static_value(number)``
    False for a number that changes between calls of a compiled function.

All six exist in PyTorch 2.10, the oldest supported version, and in 2.13. A call with a few rows takes ten microseconds
and checks this state twice, so none of these functions calls another.
"""

from typing import Any

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_transformed() -> bool:
    """Whether torch.func or forward mode is active outside of torch.compile, which handles them itself.

    torch.func can differentiate a Function, but not an operator (torch 2.13), and only a Function notices a tangent.
    """
    transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    return transformed or forward_ad._current_level >= 0


def is_batched(cotangent: Any) -> bool:
    """Whether a cotangent is a batch, from torch.autograd.grad(is_grads_batched=True)."""
    return torch._C._functorch.is_legacy_batchedtensor(cotangent)


def stands_in(a: Any) -> bool:
    """Whether it is not a tensor, but overrides functions that are called with it, like the proxies of torch.fx."""
    return hasattr(a, "__torch_function__") and not isinstance(a, torch.Tensor)


def is_distributed(*tensors: Any) -> bool:
    """Whether one of them is a DTensor; found by name, because importing DTensor is slow."""
    return any(type(t).__name__ == "DTensor" for t in tensors)


def is_known(number: float) -> bool:
    """Whether the compiler can treat the number as a constant."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow, but the compiler has imported it already

    return has_static_value(number)


def is_eager(*tensors: Any) -> bool:
    """Whether these are tensors with memory, and nothing traces or transforms the call."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()  # torch.jit.trace would record the numbers as constants
        and all(t is None or type(t) in PLAIN for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not tensors[0].is_meta
        and forward_ad._current_level < 0
    )
