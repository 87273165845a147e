"""The operators ``torch.ops.klcore.value`` and ``gradients``, which torch.compile, torch.export and torch.func see.

A call becomes the arguments of an operator, and these become a call again. Shapes and dtypes are known without memory.
"""

from collections.abc import Sequence
from typing import Any

import torch

from klcore.backends.torch import kernels
from klcore.operations import Call, named

ARGUMENTS = (
    "str operation, Tensor x, Tensor? y, str space_x, str space_y, int axis, str reduction, Tensor? weights, "
    "Tensor? ratio, float temperature, Tensor? temperatures, Scalar? denominator, Tensor? divisor, float parameter, "
    "float factor, int examples, Tensor? indices, str? tail, Tensor? tail_mass"
)
LIBRARY = torch.library.Library("klcore", "DEF")
LIBRARY.define(f"value({ARGUMENTS}, ScalarType? dtype) -> Tensor")
LIBRARY.define(f"gradients({ARGUMENTS}, Tensor cotangent, bool of_x, bool of_y) -> (Tensor, Tensor)")


def call_of(
    operation: str, x: Any, y: Any, space_x: str, space_y: str, axis: int, reduction: str, weights: Any,
    ratio: Any, temperature: float, temperatures: Any, denominator: float | None, divisor: Any, parameter: float,
    factor: float, examples: int, indices: Any, tail: str | None, tail_mass: Any,
) -> Call:  # fmt: skip
    """The call that these arguments of the operator describe."""
    space = space_x if space_x == space_y else (space_x, space_y)
    found = named(operation)
    space = (space_x, space_y) if found.is_loss else space
    return Call(
        found, x, y, space, axis, reduction, weights, temperature if temperatures is None else temperatures,
        denominator=denominator if divisor is None else divisor, parameter=parameter, factor=factor, ratio=ratio,
        examples=examples, indices=indices, tail=tail, tail_mass=tail_mass,
    )  # fmt: skip


def arguments_of(call: Call) -> tuple[Any, ...]:
    """The operator's arguments for a call."""
    by, of = call.temperature, call.denominator
    temperature, temperatures = (1.0, by) if isinstance(by, torch.Tensor) else (by, None)
    number, divisor = (None, of) if isinstance(of, torch.Tensor) else (of, None)
    return (
        call.operation.name, call.x, call.y, *pair_of(call), call.axis, call.reduction, call.weights,
        call.ratio, temperature, temperatures, number, divisor, call.parameter, call.factor, call.examples,
        call.indices, call.tail, call.tail_mass,
    )  # fmt: skip


# the fields of a call that may be tensors, and their positions among the arguments of the operators
TENSORS = {
    "x": 1, "y": 2, "weights": 7, "ratio": 8, "temperature": 10, "denominator": 12, "indices": 16, "tail_mass": 18,
}  # fmt: skip


def tensors_of(call: Call) -> dict[str, Any]:
    return {name: t for name in TENSORS if isinstance(t := getattr(call, name), torch.Tensor)}


def pair_of(call: Call) -> tuple[str, str]:
    """The spaces of x and y."""
    return (call.space, call.space) if isinstance(call.space, str) else call.space


def value(call: Call) -> Any:
    dtype = None if call.dtype is None else getattr(torch, call.dtype)
    return torch.ops.klcore.value.default(*arguments_of(call), dtype)


def gradients(call: Call, cotangent: Any, of_x: bool, of_y: bool) -> Any:
    return torch.ops.klcore.gradients.default(*arguments_of(call), cotangent, of_x, of_y)


def _value(*arguments: Any) -> Any:
    *rest, dtype = arguments
    return kernels.compute(call_of(*rest)._replace(dtype=dtype_name(dtype)))


def dtype_name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _both_gradients(*arguments: Any) -> tuple[Any, Any]:
    *rest, cotangent, of_x, of_y = arguments
    call = call_of(*rest)._replace(cotangent=cotangent, return_grad=names(of_x, of_y))
    return both_of(call.x, call.y, kernels.compute(call), of_x, of_y)


def both_of(x: Any, y: Any, found: Sequence[Any], of_x: bool, of_y: bool) -> tuple[Any, Any]:
    """The two gradients that an operator returns; an empty tensor for one that is not wanted."""
    return (
        _laid_out_like(x, found[0]) if of_x else x.new_empty(0),
        _laid_out_like(y, found[-1]) if of_y else x.new_empty(0),
    )


def _laid_out_like(t: Any, found: Any) -> Any:
    """Give a gradient the strides that the compiler expects: for views with gaps or broadcasting, NumPy's differ."""
    promised = kernels.gradient_like(t)
    return found if found.stride() == promised.stride() else promised.copy_(found)


def names(of_x: bool, of_y: bool) -> tuple[str, ...]:
    return ("x",) * of_x + ("y",) * of_y


LIBRARY.impl("value", _value, "CompositeExplicitAutograd")
LIBRARY.impl("gradients", _both_gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("klcore::value", lib=LIBRARY)
def _fake_value(*arguments: Any) -> Any:
    *rest, dtype = arguments
    call = call_of(*rest)._replace(dtype=dtype_name(dtype))
    shape, of_value = kernels.value_like(call)
    return call.x.new_empty(shape, dtype=of_value)


@torch.library.register_fake("klcore::gradients", lib=LIBRARY)
def fake_gradients(*arguments: Any) -> tuple[Any, Any]:
    _, x, y, *_, of_x, of_y = arguments
    return kernels.gradient_like(x) if of_x else x.new_empty(0), kernels.gradient_like(y) if of_y else x.new_empty(0)
