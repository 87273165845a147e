"""The one layout that kernels see: rows of n classes, as views of shape batch + (n,), for NumPy and CuPy alike.

`arrange` checks every argument of a call, and raises before anything is computed. Calls come from the public functions,
from the losses of klcore.compat, and from adapters that ask for products of cotangents and Jacobians. cpu.py and cuda/
pass their array library as `xp`; adapters that only want a call checked pass stand-ins with a shape and no memory. The
only arithmetic here is on weights before a kernel runs, and on results after it.
"""

import math
import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from klcore import _cpu
from klcore.backends import labels
from klcore.operations import Call, Operation
from klcore.parameters import check_divides, number, refuse_traced, shown

FLOATS = tuple(_cpu.DTYPES)  # the names, in the order of their codes
SPACES, CODES = _cpu.SPACES, _cpu.DTYPES
LOGITS = SPACES["logits"]
PER_ROW, TERMS, TOTAL = (_cpu.OUTPUTS[name] for name in ("row", "none", "total"))
REDUCTIONS = ("row", "sum", "rowmean", "none", "batchmean", "mean")
TAILS = _cpu.TAILS
_MEANINGS = (
    "tail='bucket' (merge the other classes into one, with the remaining mass of x), tail='zero' (x is 0 there), "
    "tail='renorm' (renormalise x and y over the listed classes), or rel_entr with tail='zero' (the truncated sum of "
    "x*log(x/y), which can be negative)"
)
GRADIENTS: dict[Any, tuple[str, ...]] = {
    None: (),
    "x": ("x",),
    "y": ("y",),
    ("x",): ("x",),
    ("y",): ("y",),
    ("x", "y"): ("x", "y"),
}


@dataclass(slots=True)
class Gradient:
    """One gradient to compute: `array` has the shape of the operand, `view` that of the kernel."""

    of: str
    array: Any
    view: Any
    inner: tuple[int, ...] = ()  # batch axes over which the operand is broadcast: the gradient is summed over them
    spread: tuple[int, Any] | None = None  # (class axis, operand) if the operand is broadcast over the classes
    out: Any = None  # where the sum over the classes goes, if not to a new array

    @property
    def order(self) -> tuple[int, ...]:
        """The batch axes: first those of the operand, then those to sum the gradient over."""
        return (*(d for d in range(self.view.ndim - 1) if d not in self.inner), *self.inner)


@dataclass(slots=True)
class Task:
    """A call, checked and laid out in rows. Views have shape batch + (n,) or batch."""

    operation: Operation
    x: Any
    y: Any
    spaces: tuple[int, int]
    weights: Any  # one per row, of any dtype that the backend's kernels read; or None
    factors: Any  # one per term, float64 or float32; or None
    output: int
    value: Any  # the array of the result, allocated or given; None if the result is a scalar made from the total
    value_view: Any
    out: Any  # where to write a scalar result, if anywhere
    signed: bool  # whether weights may be any numbers, not only >= 0
    given: bool  # whether the caller passed `out`, so that results are arrays
    scalar_dtype: Any
    wide: bool  # compute in float64
    temperature: Any  # a float, or an array with one per row, of any dtype that the backend's kernels read
    rows: int
    n: int
    denominator: float | None  # divides a total and all gradients; None: the sum of the weights
    gradients: list[Gradient] = field(default_factory=list)
    parameter: float = 0.0
    factor: float = 1.0  # multiplies the value and all gradients
    cotangent: Any = None  # a scalar that multiplies the gradients
    value_wanted: bool = True  # else only the gradients
    over_y: bool = False  # whether the gradient for y may be written over y
    divisor: Any = None  # replaces a denominator of 1: a denominator known only on the device, or later
    counted: Any = None  # the weights whose sum divides a mean, if other weights multiply the rows

    @property
    def temperatures(self) -> Any:
        """One temperature per row, or None if all rows share one."""
        return None if isinstance(self.temperature, float) else self.temperature

    @property
    def by_weights(self) -> bool:
        """Whether the sum of the weights must be known: to divide by it, or to rescale weights that could overflow."""
        if self.denominator is None:
            return True
        divided = self.divisor is not None or self.denominator != 1
        mean = self.output == TOTAL and divided and not self.signed
        return mean and self.weights is not None and self.weights.dtype == np.float64


def arrange(xp: Any, asarray: Any, call: Call) -> Task:
    """Check the arguments of a call and lay its arrays out in rows.

    Parameters
    ----------
    xp : module
        numpy, cupy, or a stand-in for them.
    asarray : callable
        ``asarray(a, name)`` returns an array of `xp` of dtype float64, float32, float16 or bfloat16, in native byte
        order, or raises TypeError.
    call : Call
        If it has a cotangent, the value of the task has no meaning, and `out` holds only the gradients.
    """
    if call.cotangent is not None:
        return _arrange_gradient(xp, asarray, call)
    return (_arrange_loss if call.operation.is_loss else _arrange)(xp, asarray, call)


class Laid(NamedTuple):
    """x and y as rows, and the resulting shapes."""

    operands: dict[str, Any]  # x and y as arrays, in their own shapes
    x: Any  # of shape batch + (n,)
    y: Any
    batch: tuple[int, ...]
    n: int
    last: int  # the class axis, counted from the end
    scalar: bool  # x and y are 0-d: one class
    terms: tuple[
        int, ...
    ]  # the shape of the terms, with the classes on the caller's axis; with indices, the shape with all classes of y
    alone: bool = False  # every number is a row of one class

    def classes_last(self, a: Any) -> Any:
        """An array of the shape of the terms, with the class axis last, as kernels see it."""
        return a[..., None] if self.alone else classes_last(a.reshape(1) if self.scalar else a, self.last)


def _lay_alone(xp: Any, asarray: Any, call: Call) -> Laid:
    """Lay out every number as a row of one class."""
    x, y = asarray(call.x, "x"), asarray(call.y, "y")
    batch = estimate_shape(x, y)
    xs, ys = (broadcast(xp, a[..., None], (*batch, 1)) for a in (x, y))
    return Laid({"x": x, "y": y}, xs, ys, batch, 1, -1, False, batch, True)


def _lay(xp: Any, asarray: Any, call: Call) -> Laid:
    if call.operation.is_estimator:
        return _lay_alone(xp, asarray, call)
    x = asarray(call.x, "x")
    y = x if call.operation.single else asarray(call.y, "y")
    scalar = x.ndim == 0 and y.ndim == 0
    xs, ys = (x.reshape(1), y.reshape(1)) if scalar else (x, y)
    ndim = max(xs.ndim, ys.ndim)
    last = _class_axis(call, x, y)
    xs, ys = classes_last(xs, last), classes_last(ys, last)
    n = xs.shape[-1]
    batch = xs.shape[:-1]
    if batch != ys.shape[:-1]:
        try:
            batch = broadcast_shapes(batch, ys.shape[:-1])
        except ValueError:
            raise batches_differ(x, y, call.axis) from None
    y_rows = None if call.operation.single else broadcast(xp, ys, (*batch, n))
    terms = () if scalar else _insert(batch, ndim + last, n)
    return Laid({"x": x, "y": y}, broadcast(xp, xs, (*batch, n)), y_rows, batch, n, last, scalar, terms)


def _arrange(xp: Any, asarray: Any, call: Call, factors: Any = None, signed: bool = False) -> Task:
    """`factors` broadcast to the shape of the terms; `signed`: weights may be any numbers."""
    spaces, temperature, wanted = words(call)
    laid = _lay(xp, asarray, call)
    weights = by = read_weights(xp, asarray, call.weights, laid.batch, signed)
    double = max(a.dtype.itemsize for a in laid.operands.values()) == 8
    if not isinstance(temperature, float):
        temperature = read_temperatures(xp, asarray, temperature, laid.batch, weights, double)
    if call.ratio is not None:
        by = times_ratio(xp, weights, over_rows(xp, multiplier(asarray, call.ratio, "ratio"), laid.batch, "ratio"))
    given = call.x, call.y, call.weights, call.ratio, call.temperature
    if labels.are_there(*given):
        labels.check(0 if laid.alone else laid.last, *given)
    if factors is not None:
        factors = laid.classes_last(broadcast(xp, multiplier(asarray, factors, "factors"), laid.terms))
    dtype = call.dtype or ("float64" if double else "float32")
    wide = (
        double
        or is_wide(call.operation, spaces, temperature if isinstance(temperature, float) else 1.0, call.parameter)
        or (factors is not None and LOGITS in spaces)
    )
    rows = math.prod(laid.batch)
    divisor = denominator(call, laid.terms, laid.batch, weights)
    task = Task(
        operation=call.operation,
        x=laid.x,
        y=laid.y,
        spaces=spaces,
        weights=by,
        factors=factors,
        output=PER_ROW if call.reduction == "row" else TERMS if call.reduction == "none" else TOTAL,
        value=None,
        value_view=None,
        out=None,
        signed=signed,
        given=call.out is not None,
        scalar_dtype=xp.dtype(dtype),
        wide=wide,
        temperature=temperature,
        rows=rows,
        n=laid.n,
        denominator=divisor,
        parameter=call.parameter,
        factor=call.factor,
        counted=weights if divisor is None and by is not weights else None,
    )
    _arrange_results(xp, task, laid, call.out, wanted)
    return task


def _arrange_results(xp: Any, task: Task, laid: Laid, out: Any, wanted: tuple[str, ...]) -> None:
    """Where the value and the gradients go: to `out`, after checking it, or to new arrays."""
    shape = laid.batch if task.output == PER_ROW else laid.terms if task.output == TERMS else ()
    value, *gradients = results_in(out, wanted)
    if out is not None:
        whole = all(laid.operands[name].shape == laid.terms for name in wanted)
        task.over_y = "y" in wanted and task.spaces[1] == LOGITS and whole
        read = task.weights, task.temperature
        check_results(
            xp, laid, shape, task.scalar_dtype, value, dict(zip(wanted, gradients, strict=True)), read, task.over_y
        )

    if task.output == TOTAL:
        task.out = value
    else:
        task.value = task.value_view = xp.empty(shape, task.scalar_dtype) if value is None else value
        if task.output == TERMS:
            task.value_view = laid.classes_last(task.value)
    for name, result in zip(wanted, gradients, strict=True):
        array = xp.empty_like(laid.operands[name]) if result is None else result
        task.gradients.append(gradient_of(laid, name, array))


def check_results(
    xp: Any, laid: Laid, shape: tuple[int, ...], dtype: Any, value: Any, gradients: dict[str, Any],
    read: tuple[Any, ...], over_y: bool,
) -> None:  # fmt: skip
    """Check the caller's output arrays: shapes and dtypes, and that none overlaps an operand or an array in `read`.
    With `over_y`, the gradient for y may be y itself."""
    if value is not None:
        _check_out(xp, value, "the value", shape, dtype)
    for name, result in gradients.items():
        if result is not None:
            operand = laid.operands[name]
            _check_out(xp, result, f"the gradient with respect to {name}", operand.shape, operand.dtype)
    inputs = [a for a in (*laid.operands.values(), *read) if a is not None and not isinstance(a, float)]
    outs = [a for a in (value, *gradients.values()) if a is not None]
    check_overlap(outs, inputs, gradients["y"] if over_y else None)


def gradient_of(laid: Laid, name: str, array: Any) -> Gradient:
    batch, view = laid.batch, laid.classes_last(array)
    lead = len(batch) - (view.ndim - 1)
    view = view[(None,) * lead] if lead else view
    inner = () if view.shape[:-1] == batch else tuple(d for d in range(len(batch)) if view.shape[d] != batch[d])
    return Gradient(name, array, view, inner)


def share(xp: Any, gradients: list[Gradient], shared: tuple[str, ...]) -> None:
    """Let the gradients of operands that blocks share be written as float64, as parts of a sum."""
    for g in gradients:
        if g.of in shared:
            g.array = g.view = xp.zeros(g.view.shape, np.float64)


def _arrange_loss(xp: Any, asarray: Any, call: Call) -> Task:
    """The arguments of ``klcore.divergence.loss``, where x and y broadcast over the classes, too."""
    _, _, wanted = words(call)
    operands = {"x": asarray(call.x, "x"), "y": asarray(call.y, "y")}
    ndim = max(a.ndim for a in operands.values())
    last = -1 if ndim == 0 else _axis(call.axis, ndim, False)
    x, y = operands.values()
    if ndim:
        sizes = {a.shape[last] for a in (x, y) if a.ndim >= -last}
        n = max(sizes - {1}, default=1)
        x, y = (_over_classes(xp, a, last, n) for a in (x, y))
    weights, factors = None, call.weights
    if factors is not None:
        factors = asarray(factors, "factors")
        if factors.ndim == 0 or factors.ndim < -last or factors.shape[last] == 1:  # one factor per row
            weights = factors if factors.ndim < -last else xp.squeeze(factors, last)
            factors = None
    spread = [name for name in wanted if {"x": x, "y": y}[name].shape != operands[name].shape]
    outs = {} if call.out is None else dict(zip(("value", *wanted), call.out, strict=True))
    into = tuple(None if name in spread else a for name, a in outs.items()) or None
    task = _arrange(xp, asarray, call._replace(x=x, y=y, axis=last, weights=weights, out=into), factors, signed=True)
    for g in task.gradients:
        if g.of in spread:
            g.spread, g.out = (last, operands[g.of]), outs.get(g.of)
    return task


def _over_classes(xp: Any, a: Any, last: int, n: int) -> Any:
    """`a` broadcast along the class axis only; 16 bits become float32, so that its summed gradient is rounded once."""
    shape = [1] * (-last - a.ndim) + list(a.shape)
    if shape[last] == 1:
        shape[last] = n
    if tuple(shape) == a.shape:
        return a
    return xp.broadcast_to(a.astype("float32") if a.dtype.itemsize == 2 else a, tuple(shape))


def _arrange_gradient(xp: Any, asarray: Any, call: Call) -> Task:
    """A cotangent-Jacobian product: the cotangent of rows or terms becomes the weights or factors of a sum."""
    out = None if call.out is None else (None, *call.out)
    total = call.reduction not in ("row", "none")
    cotangent, weights, factors = call.cotangent, call.weights, None
    summed = call._replace(cotangent=None, out=out, reduction=call.reduction if total else "sum")
    if call.operation.is_loss:
        weights = None if weights is None else multiplier(asarray, weights, "factors")
        if not total:
            c = multiplier(asarray, cotangent, "cotangent")
            c = xp.expand_dims(c, call.axis) if call.reduction == "row" and c.ndim else c
            weights = c if weights is None else c * weights
        task = _arrange_loss(xp, asarray, summed._replace(weights=weights, reduction="sum", dtype=None))
    else:
        if call.reduction == "row":
            cotangent = multiplier(asarray, cotangent, "cotangent")
            if weights is None:
                weights = cotangent
            else:
                weights = multiplier(asarray, weights, "weights")
                with np.errstate(over="ignore", invalid="ignore"):
                    product = cotangent * weights
                weights = xp.where(weights == 0, 0, product)  # rows of weight 0 give 0 even if the cotangent is inf
        elif call.reduction == "none":
            factors = cotangent
        task = _arrange(xp, asarray, summed._replace(weights=weights), factors, signed=call.reduction == "row")
    if total:
        task.cotangent = cotangent
    task.value_wanted = False
    return task


_OWN = np.ndarray.__array_ufunc__
TABLES = ("pandas", "polars", "xarray")  # NumPy's functions have their usual meaning for these, except for labels
_PLAIN_NUMBERS = (  # how to get the plain numbers of an array with a unit or the like: the attribute, the expression
    ("compute", "compute()"), ("value", "value"), ("magnitude", "magnitude"),
)  # fmt: skip


def refuse(a: Any, name: str) -> None:
    """Raise TypeError for arrays that no backend accepts, because of their type or their dtype."""
    _refuse_kind(a, name)
    dtype = getattr(a, "dtype", None)
    if dtype is not None and dtype.kind not in "iub" and dtype.name not in FLOATS:
        columns = f"pass its columns as one array: numpy.lib.recfunctions.structured_to_unstructured({name})"
        numbers = f"pass {name}.astype({'int' if name == 'indices' else 'float'})"
        hint = columns if dtype.names else "" if dtype.kind == "c" else numbers
        if dtype.kind == "O" and a.size and isinstance(np.ravel(a)[0], (list, tuple, np.ndarray)):
            hint = _of_rows(name)
        raise TypeError(
            f"{name} has dtype {dtype}; klcore supports {', '.join(FLOATS)}, and converts integers and booleans to "
            f"float64{'; ' + hint if hint else ''}"
        )


def refuse_others(dtype: Any, are_integers: bool) -> None:
    """Raise TypeError for indices of another dtype than integer."""
    if not are_integers:
        raise TypeError(f"indices must be integers, the numbers of classes; found dtype {dtype}")


def _refuse_kind(a: Any, name: str) -> None:
    """Raise TypeError for masked and sparse arrays, and those with a meaning beyond their numbers, such as units."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, but klcore would ignore the mask; pass {name}.filled(value), or weights=0 for "
            "the rows to leave out"
        )
    cls = type(a)
    _refuse_tensorflow(cls, name)
    dense = next((f"{name}.{method}()" for method in ("toarray", "todense") if hasattr(cls, method)), None)
    if dense is not None:
        raise TypeError(f"{name} is a sparse {cls.__name__}, but klcore takes dense arrays; pass {dense}")
    unit = None if isinstance(a, np.ndarray) or _is_known(cls) else getattr(a, "unit", None)
    if unit is not None or _has_meaning(cls):
        raise TypeError(
            f"{name} is of type {_type_name(cls)}, which redefines NumPy's functions, for example for units, but "
            f"klcore would ignore that; pass the plain numbers, {_plain_numbers(a, name)}"
        )


def _refuse_tensorflow(cls: type, name: str) -> None:
    if "tensorflow" in _roots(cls):
        raise TypeError(
            f"{name} is of type {_type_name(cls)}, but klcore has no adapter for TensorFlow; train with the losses "
            f"of klcore.compat.keras, or, if you need no gradient, pass the NumPy array that its numpy() returns"
        )


def _has_meaning(cls: type) -> bool:
    """Whether arrays of this type redefine NumPy's functions."""
    return getattr(cls, "__array_ufunc__", _OWN) is not _OWN and not _is_known(cls)


def _refuse_parts(a: Any, name: str) -> None:
    """Raise TypeError for lists of objects that NumPy would convert to plain numbers, losing their meaning."""
    lists, seen = [a], set()  # a list may contain itself
    while lists:
        part = lists.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        for cls in set(map(type, part)) - {int, float, np.ndarray}:
            if cls in (list, tuple):
                lists += [b for b in part if type(b) is cls]
                continue
            _refuse_tensorflow(cls, f"an element of {name}")
            one = next(b for b in part if type(b) is cls)
            if isinstance(one, np.ma.MaskedArray) or _has_meaning(cls) or labels.are_there(one) or _is_tensor(one):
                make = "torch.stack" if _is_tensor(one) else "numpy.stack"
                raise TypeError(
                    f"{name} is a {type(part).__name__} of {_type_name(cls)}, whose labels, mask, unit or history "
                    f"klcore would ignore; pass one array, such as {make}({name})"
                )


def _is_tensor(a: Any) -> bool:
    return type(a).__module__.partition(".")[0] == "torch" and hasattr(a, "ndim") and a.ndim > 0


def _of_rows(name: str) -> str:
    return f"its elements are lists or arrays; pass numpy.stack({name}) to make them the rows of one array"


def _type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _is_known(cls: type) -> bool:
    return not _roots(cls).isdisjoint(("cupy", *TABLES))


def _roots(cls: type) -> set[str]:
    return {base.__module__.partition(".")[0] for base in cls.__mro__}


def _plain_numbers(a: Any, name: str) -> str:
    attribute = next((f" or {name}.{text}" for word, text in _PLAIN_NUMBERS if hasattr(a, word)), "")
    if isinstance(a, np.ndarray):
        return f"{name}.view(numpy.ndarray){attribute}"
    return attribute.removeprefix(" or ") or f"as a NumPy array made from {name}"


def as_numpy(a: Any, name: str) -> Any:
    """Convert `a` with NumPy; TypeError or ValueError, naming the argument, if NumPy cannot or would misread it."""
    if type(a) is np.ndarray:
        return a
    _refuse_kind(a, name)
    cls = type(a)
    if isinstance(a, (str, bytes, bytearray)):
        raise TypeError(f"{name} is of type {_type_name(cls)}; klcore takes arrays and sequences of numbers")
    if isinstance(a, (list, tuple)):
        _refuse_parts(a, name)
    try:
        lends = hasattr(a, "__dlpack__") and not hasattr(a, "__array__")
        found = np.from_dlpack(a) if lends else np.asarray(a)
    except Exception as error:  # whatever the container raises
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name}, of type {_type_name(cls)}, cannot be converted to a NumPy array: {error}") from error
    if found.dtype == object and not isinstance(a, np.ndarray):
        if not found.ndim and not isinstance(a, (int, np.generic)):
            raise TypeError(f"{name} is of type {_type_name(cls)}, which NumPy cannot convert to an array of numbers")
        if found.size and isinstance(np.ravel(found)[0], (list, tuple, np.ndarray)):
            hint = _of_rows(name)
        elif hasattr(cls, "iloc"):
            hint = f"select the numeric columns, or pass {name}.to_numpy(dtype=float), which makes missing values NaN"
        else:
            hint = f"pass numpy.asarray({name}, dtype=float)"
        raise TypeError(
            f"{name}, of type {_type_name(cls)}, becomes an array of dtype object, not {', '.join(FLOATS)}; {hint}"
        )
    return found


def is_wide(operation: Operation, spaces: tuple[int, int], temperature: float = 1.0, parameter: float = 0.0) -> bool:
    """Whether float32 arguments are computed in float64."""
    return _cpu.is_wide(operation.code, *spaces, temperature, parameter)


def scale(denominator: Any, cotangent: Any = None) -> float:
    """What multiplies the gradients of a sum divided by the denominator; NaN if it is 0."""
    found = 1.0 / denominator if denominator else math.nan
    return found if cotangent is None else found * float(cotangent)


def result(task: Task, value: Any) -> Any:
    """What the caller gets: the value, followed by the gradients in the order in which they were asked for."""
    if task.output != TOTAL and task.denominator != 1:
        if task.given:
            value /= task.denominator
        else:
            value = (value / task.denominator).astype(value.dtype, copy=False)
    return (value, *gradients(task)) if task.gradients else value


def gradients(task: Task) -> tuple[Any, ...]:
    """The gradients, in the order in which they were asked for."""
    return tuple(_collected(g) for g in task.gradients)


def _collected(g: Gradient) -> Any:
    """A gradient in the shape of its operand."""
    if g.spread is None:
        return g.array
    axis, operand = g.spread
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs, or overflow of the dtype
        sums = g.array.sum(axis, dtype="float64", keepdims=True).astype(operand.dtype).reshape(operand.shape)
    if g.out is None:
        return sums
    g.out[...] = sums
    return g.out


def _list(options: Any) -> str:
    return ", ".join(map(repr, options))


def words(call: Call) -> tuple[tuple[int, int], Any, tuple[str, ...]]:
    """The checked options of a call: the codes of both spaces, the temperature, the names of the gradients. An array of
    temperatures is returned as given; its values are checked later."""
    operation = call.operation
    spaces = space_pair(call.space, operation)
    check_list(call, spaces)
    temperature = _temperature(call.temperature, spaces)
    check_reduction(call.reduction, operation)
    check_denominator(call)
    return spaces, temperature, _wanted(call.return_grad, operation)


def check_list(call: Call, spaces: tuple[int, int]) -> None:
    """Check the options of a call whose x lists some classes (sparse.py), or raise if they do not fit together."""
    if call.indices is None:
        if call.tail is not None or call.tail_mass is not None:
            option = "tail" if call.tail is not None else "tail_mass"
            raise TypeError(f"{option}= describes the classes that indices= does not list; pass indices, too")
        return
    if call.tail is None:
        raise TypeError(f"indices= needs tail=, which says what x has in the other classes: {_MEANINGS}")
    if not isinstance(call.tail, str) or call.tail not in TAILS:
        raise ValueError(f"tail must be one of {_list(TAILS)}; found {shown(call.tail)}")
    if call.tail_mass is not None and call.tail != "bucket":
        raise ValueError(f"tail_mass needs tail='bucket'; found tail={call.tail!r}")
    if spaces[0] in (LOGITS, SPACES["counts"]) and call.tail != "renorm":
        numbers = "logits" if spaces[0] == LOGITS else "counts"
        raise ValueError(
            f"x is {numbers} of the listed classes only, which can only be normalised over the list, with "
            f"tail='renorm'; with tail={call.tail!r}, pass x as probabilities or log-probabilities"
        )


def check_reduction(reduction: Any, operation: Operation) -> None:
    known = tuple(r for r in REDUCTIONS if operation.has_terms or r != "none")
    if isinstance(reduction, str) and reduction in known:
        return
    if isinstance(reduction, str) and reduction in REDUCTIONS:
        raise ValueError(
            f"{operation.name} is not a sum over classes, so it has no terms for reduction='none'; "
            f"use one of {_list(known)}"
        )
    raise ValueError(f"reduction must be one of {_list(known)}; found {shown(reduction)}")


def check_denominator(call: Call) -> None:
    """Check everything about the denominator except its value."""
    if not call.operation.is_loss:
        check_divides(call.denominator, call.reduction)


def denominator_of(call: Call) -> float:
    """The value of the denominator."""
    d = number(call.denominator, "denominator")
    if not 0 <= d < math.inf:
        raise ValueError(f"denominator must be finite and >= 0; found {d!r}")
    return d


def _class_axis(call: Call, x: Any, y: Any) -> int:
    """The class axis, counted from the end; ValueError if x and y do not have the same number of classes along it."""
    shapes = tuple(x.shape), tuple(x.shape if y is None else y.shape)
    ndim = max(map(len, shapes))
    last = _axis(call.axis, ndim or 1, ndim == 0)
    xs, ys = (shape if ndim else (1,) for shape in shapes)
    if min(len(xs), len(ys)) < -last or xs[last] != ys[last]:
        n, m = (shape[last] if len(shape) >= -last else 1 for shape in (xs, ys))
        raise ValueError(
            f"x and y must have the same number of classes along axis {call.axis} of the shape to which they "
            f"broadcast; found {n} and {m} (shapes {shapes[0]} and {shapes[1]}){_what_may_help(call, xs, ys, last)}"
        )
    return last


def _what_may_help(call: Call, xs: tuple[int, ...], ys: tuple[int, ...], last: int) -> str:
    """The end of the message about different numbers of classes."""
    for name, shape in (("x", xs), ("y", ys)):
        if len(shape) == 1 < -last:
            new = ", None" * (-last - 1)
            return (
                f"; {name} has one axis, which broadcasting makes the last: pass {name}[:{new}], or {name}.to_frame() "
                "of a Series"
            )
    if labels.are_there(call.x, call.y):
        missing = labels.missing_classes(call.x, call.y, last)
        return missing and f"; {missing}"
    fewer = min(len(xs), len(ys)) >= -last and xs[last] < ys[last]
    return "; if x has only some of the classes, say which with indices=" if fewer else ""


def class_axis_of(call: Call, x: Any, y: Any) -> int:
    """The class axis of a call, with x and y as arrays, counted from the end; 0 if every number is a row."""
    if call.indices is not None:
        return lay_list(x, y, call.indices, call.axis)[0]
    if not call.operation.is_estimator:
        return _class_axis(call, x, y)
    estimate_shape(x, y)
    return 0


def lay_list(x: Any, y: Any, indices: Any, axis: Any) -> tuple[int, tuple[int, ...]]:
    """For an x that lists classes of y: the class axis, counted from the end, and the shape of y in the full batch."""
    of_x, of_indices, of_y = shapes = tuple(x.shape), tuple(indices.shape), tuple(y.shape)
    ndims = [len(shape) for shape in shapes]
    last = _axis(axis, max(ndims) or 1, max(ndims) == 0)
    if min(ndims) < -last or of_x[last] != of_indices[last]:
        raise ValueError(
            f"x and indices must have the same number of classes along axis {axis}, along which y has all classes; "
            f"found shapes {of_x}, {of_indices} and {of_y} of x, indices and y"
        )
    try:
        batch = broadcast_shapes(with_classes(of_x, last, 1), with_classes(of_indices, last, 1))
        return last, broadcast_shapes(batch, of_y)
    except ValueError:
        raise ValueError(
            f"x, indices and y must have batch shapes (all axes except axis {axis}) that broadcast; found shapes "
            f"{of_x}, {of_indices} and {of_y}"
        ) from None


def with_classes(shape: tuple[int, ...], last: int, n: int) -> tuple[int, ...]:
    """The shape with n classes on its class axis."""
    return (*shape[:last], n, *shape[last:][1:])


def estimate_shape(x: Any, y: Any) -> tuple[int, ...]:
    """The shape of the values of an estimator."""
    try:
        return broadcast_shapes(x.shape, y.shape)
    except ValueError:
        raise ValueError(
            f"log_x and log_y must have shapes that broadcast; found {tuple(x.shape)} and {tuple(y.shape)}"
        ) from None


def batches_differ(x: Any, y: Any, axis: Any) -> ValueError:
    """The error for batch shapes that do not broadcast."""
    return ValueError(
        f"x and y must have batch shapes (all axes except axis {axis}) that broadcast; found shapes {tuple(x.shape)} "
        f"and {tuple(y.shape)}"
    )


def space_pair(space: Any, operation: Operation) -> tuple[int, int]:
    """The codes of the spaces of x and y, or ValueError."""
    pair = (space, space) if isinstance(space, str) else space
    known = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(s, str) and s in SPACES for s in pair)
    if not known or (operation.single and not isinstance(space, str)):
        or_a_pair = "" if operation.single else ", or a pair (space of x, space of y)"
        raise ValueError(f"space must be one of {_list(SPACES)}{or_a_pair}; found {shown(space)}")
    if operation.is_loss and tuple(pair) not in operation.pairs:
        raise ValueError(f"the term {operation.name!r} does not support the spaces {space!r}")
    return SPACES[pair[0]], SPACES[pair[1]]


def has_numbers(temperature: Any) -> bool:
    """Whether a temperature is an array; a 0-d NumPy array counts as a number."""
    if isinstance(temperature, (int, float)):
        return False
    if isinstance(temperature, (np.ndarray, np.generic)) and on_host(temperature) is not None:
        return temperature.ndim > 0
    return hasattr(temperature, "shape") or isinstance(temperature, (list, tuple))


def _temperature(temperature: Any, spaces: tuple[int, int]) -> Any:
    if has_numbers(temperature):
        if LOGITS not in spaces:
            raise ValueError("temperature divides logits, so it needs space='logits' for x or y; found an array")
        return temperature
    try:
        t = float(temperature)
    except OverflowError:  # an integer too large for a float
        t = math.inf
    except (TypeError, ValueError):
        t = None
    if t is None or isinstance(temperature, (str, bytes)):
        raise TypeError(f"temperature must be a number, found {shown(temperature)} ({type(temperature).__name__})")
    if not (t > 0 and _POSITIVE[0] <= t <= _POSITIVE[1]):
        raise ValueError(f"temperature must {_BE_POSITIVE}; found {shown(temperature)}")
    if t != 1 and LOGITS not in spaces:
        raise ValueError(f"temperature divides logits, so it needs space='logits' for x or y; found temperature={t!r}")
    return t


def _wanted(return_grad: Any, operation: Operation) -> tuple[str, ...]:
    key = tuple(return_grad) if isinstance(return_grad, list) else return_grad
    try:
        wanted = GRADIENTS.get(key)
    except TypeError:  # not hashable
        wanted = None
    if wanted is None or (len(operation.gradients) < 2 and wanted not in ((), operation.gradients)):
        known = (None, *operation.gradients, *([("x", "y")] if len(operation.gradients) > 1 else []))
        raise ValueError(
            f"return_grad must be one of {_list(known)}{' for ' + repr(operation.name) if operation.is_loss else ''}; "
            f"found {shown(return_grad)}"
        )
    return wanted


def _axis(axis: Any, ndim: int, scalar: bool) -> int:
    a = integer(axis, "axis")
    if not -ndim <= a < ndim:
        what = "0-dimensional arrays, taken as one class" if scalar else f"arrays of {ndim} dimensions"
        raise ValueError(f"axis {shown(a)} is out of range for {what}")
    return a - ndim if a >= 0 else a


def integer(axis: Any, name: str) -> int:
    """A plain int from anything with ``__index__``."""
    try:
        if isinstance(axis, (float, str, tuple, list, type(None))):  # torch.compile 2.11 fails in index() of these
            raise TypeError
        return int(operator.index(axis))
    except TypeError:
        refuse_traced(axis, name)
        raise TypeError(f"{name} must be an integer, found {type(axis).__name__}") from None


def classes_last(a: Any, last: int) -> Any:
    if last == -1:
        return a
    axis = a.ndim + last
    return a.transpose(*range(axis), *range(axis + 1, a.ndim), axis)  # ten times as fast as moveaxis


def broadcast_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which two shapes broadcast, or ValueError. NumPy's function stops at 32 of the 64 dimensions."""
    ndim = max(len(a), len(b))
    shape = []
    for m, n in zip((1,) * (ndim - len(a)) + tuple(a), (1,) * (ndim - len(b)) + tuple(b), strict=True):
        if m != n and m != 1 and n != 1:
            raise ValueError(f"{a} and {b} do not broadcast")
        shape.append(n if m == 1 else m)
    return tuple(shape)


def broadcast(xp: Any, a: Any, shape: tuple[int, ...]) -> Any:
    return a if a.shape == shape else xp.broadcast_to(a, shape)


def _insert(batch: tuple[int, ...], position: int, n: int) -> tuple[int, ...]:
    return (*batch[:position], n, *batch[position:])


def multiplier(asarray: Any, a: Any, name: str) -> Any:
    """Factors, a cotangent, or weights that multiply it, in a dtype that kernels read."""
    a = asarray(a, name)
    if a.dtype.kind in "iub":
        return a.astype("float64")
    return a.astype("float32") if a.dtype.itemsize < 4 else a


def read_weights(xp: Any, asarray: Any, weights: Any, batch: tuple[int, ...], signed: bool) -> Any:
    if weights is None:
        return None
    w = asarray(weights, "weights")
    view = over_rows(xp, w, batch, "weights")
    if signed:
        return view
    host = on_host(w, weights)  # on a GPU, an invalid weight makes its row NaN
    if host is not None and w.size and not (np.min(host) >= 0 and np.max(host) < math.inf):  # NaN fails both
        host = np.asarray(host)
        raise ValueError(f"weights must be finite and >= 0; found {bad_ones(host, ~((host >= 0) & (host < math.inf)))}")
    return view


# The range of temperatures, in double and in float32; outside of the latter, the logarithms of a row overflow float32.
# The sign is checked, too, because the threads of XLA flush the lower limit, a subnormal number, to 0.
_POSITIVE, _NARROW = _cpu.TEMPERATURES, _cpu.NARROW_TEMPERATURES
_BE_POSITIVE = "be positive and finite, and so must 1 / temperature"


def read_temperatures(
    xp: Any, asarray: Any, temperature: Any, batch: tuple[int, ...], weights: Any, double: bool
) -> Any:
    """One temperature per row; or a float for a 0-d array on the host."""
    t = asarray(temperature, "temperature")
    if t.ndim == 0 and isinstance(on_host(t), np.ndarray):
        return _temperature(t, (LOGITS, LOGITS))
    view = over_rows(xp, t, batch, "temperature")
    host = on_host(t, temperature)  # on a GPU, an invalid temperature makes its row NaN
    if host is not None:
        check_temperatures(broadcast(np, np.asarray(host), batch), weights, double)
    return view


def check_temperatures(t: Any, weights: Any, double: bool) -> None:
    """Raise ValueError for an invalid temperature of a row whose weight is not 0. `double`: an argument is float64."""
    t = t.astype(np.float64)
    narrow = "be between 2**-20 and 2**100 if it is an array and no argument is float64; pass x or y as float64"
    for (low, high), must in ((_POSITIVE, _BE_POSITIVE), (_NARROW, narrow))[: 1 if double else 2]:
        good = (t > 0) & (t >= low) & (t <= high)
        if weights is not None and on_host(weights) is not None:
            good |= weights == 0
        if not good.all():
            raise ValueError(f"temperature must {must}; found {bad_ones(t, ~good)}")


def on_host(*same: Any) -> Any:
    """The first of these equivalent arrays that is on the host, or None: reading from a GPU would synchronise."""
    return next((a for a in same if not hasattr(a, "__cuda_array_interface__")), None)


def bad_ones(a: Any, bad: Any) -> str:
    """The first bad element, its index, and how many more there are, for a message."""
    where = np.argwhere(bad)
    at = tuple(where[0].tolist())
    return f"{a[at]!s}{f' at index {at}' if at else ''}{f', and {len(where) - 1} more' if len(where) > 1 else ''}"


def over_rows(xp: Any, a: Any, batch: tuple[int, ...], name: str) -> Any:
    try:
        return broadcast(xp, a, batch)
    except ValueError:
        do = "do" if name == "weights" else "does"
        raise ValueError(f"{name} of shape {a.shape} {do} not broadcast to the batch shape {batch}") from None


def times_ratio(xp: Any, weights: Any, ratio: Any) -> Any:
    """What multiplies the rows of an estimator: NaN for an invalid ratio, because raising would synchronise a GPU. Rows
    of weight 0 are left out, whatever their ratio."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = xp.where((ratio >= 0) & (ratio < math.inf), ratio, math.nan).astype("float64")
        return product if weights is None else xp.where(weights == 0, 0, product * weights)


def denominator(call: Call, terms: tuple[int, ...], batch: tuple[int, ...], weights: Any) -> float | None:
    """What divides a total and all gradients; None: the sum of the weights. `terms` and `batch` are shapes."""
    if call.denominator is not None:
        return float(call.denominator) if call.operation.is_loss else denominator_of(call)
    if call.reduction == "rowmean" and weights is not None:
        return None
    counts = {"rowmean": math.prod(batch), "batchmean": math.prod(terms[:1]), "mean": math.prod(terms)}
    return float(counts.get(call.reduction, 1))


# A weighted mean does not depend on a common factor of the weights. These powers of two move very large or very small
# weights to the middle of the range, where nothing overflows or is rounded.
WEIGHT_FACTORS = (1.0, 2.0**-600, 2.0**600)


def weight_factor(total: Any) -> Any:
    """The factor for weights with this sum, or for each of several sums."""
    one, small, large = WEIGHT_FACTORS
    return np.where(total > 2.0**500, small, np.where((0 < total) & (total < 2.0**-500), large, one))[()]


def scaled_weights(weights: Any, factor: Any) -> Any:
    """The weights times a power of two; a weight that is not 0 stays above 0, however small it is."""
    scaled = weights * factor
    return np.where((scaled == 0) & (weights != 0), 2.0**-1074, scaled)


def results_in(out: Any, wanted: tuple[str, ...]) -> tuple[Any, ...]:
    """The output arrays of the value and the gradients; None for those to allocate."""
    results = out if isinstance(out, tuple) else (out, *[None] * len(wanted))
    if len(results) != 1 + len(wanted):
        count = len(wanted)
        asked = f"asks for {count} gradient{'s' * (count > 1)}" if wanted else "is None"
        raise ValueError(
            f"out must be an array for the value, or a tuple of {1 + count} (value, then gradients; None to allocate), "
            f"since return_grad {asked}; found a tuple of {len(results)}"
        )
    return results


def _check_out(xp: Any, out: Any, what: str, shape: tuple[int, ...], dtype: Any) -> None:
    hint = "; to write a gradient, pass a tuple, for example out=(None, array)" if what == "the value" else ""
    if not isinstance(out, xp.ndarray) or hasattr(out, "mask") or _has_meaning(type(out)):
        raise TypeError(f"out for {what} must be a plain {xp.__name__}.ndarray, found {type(out).__name__}{hint}")
    if out.shape != shape:
        raise ValueError(f"out for {what} must have shape {shape}, found {out.shape}{hint}")
    if out.dtype != dtype:
        raise ValueError(f"out for {what} must have dtype {dtype}, found {out.dtype}")
    flags = getattr(out.flags, "writeable", True)
    if not flags:
        raise ValueError(f"out for {what} is read-only")
    if shares_with_itself(out.shape, out.strides, out.dtype.itemsize):
        raise ValueError(f"out for {what} is a view whose elements share memory; pass a new array")


def shares_with_itself(shape: Any, strides: Any, size: int) -> bool:
    """Whether elements of `size` bytes may share memory. They do not if each axis steps over everything that the axes
    of smaller steps cover, as in slices, transposes and reversals of ordinary arrays. Anything else counts as
    shared."""
    if 0 in shape:
        return False
    covered = size
    for step, n in sorted((abs(step), n) for step, n in zip(strides, shape, strict=True) if n > 1):
        if step < covered:
            return True
        covered += step * (n - 1)
    return False


def check_overlap(outs: list[Any], inputs: list[Any], over_y: Any = None) -> None:
    """Raise ValueError if an output overlaps an input or another output. `over_y`: the output that may be the second
    input itself, whose shape and dtype it has."""
    for i, out in enumerate(outs):
        if any(_overlap(out, a) and not (k == 1 and out is over_y and _is_same(out, a)) for k, a in enumerate(inputs)):
            raise ValueError(
                "out overlaps the memory of an input; pass a separate array (only the gradient for y can be written "
                "over y, if y is logits and no argument with a gradient is broadcast)"
            )
        if any(_overlap(out, other) for other in outs[:i]):
            raise ValueError("two arrays of out overlap; pass separate ones")


def _overlap(a: Any, b: Any) -> bool:
    a, b = _memory(a), _memory(b)
    if not np.may_share_memory(a, b):  # cheap: compares two address ranges
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]  # any integer will do
    except Exception:  # too expensive to decide exactly
        return True


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arrays of equal shape and dtype are the same memory."""
    a, b = _memory(a).__array_interface__, _memory(b).__array_interface__
    return a["data"][0] == b["data"][0] and a["strides"] == b["strides"]


class _memory_of:
    """The address of an array on another device, for NumPy to compare; the memory is never read."""

    def __init__(self, a: Any) -> None:
        interface = a.__cuda_array_interface__
        self.__array_interface__ = {
            "shape": interface["shape"],
            "strides": a.strides,
            "typestr": f"|V{a.dtype.itemsize}",
            "data": (interface["data"][0], True),
            "version": 3,
        }


def _memory(a: Any) -> Any:
    return np.asarray(_memory_of(a)) if hasattr(a, "__cuda_array_interface__") else a
