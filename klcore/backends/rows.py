"""The one shape that kernels see: rows of n classes, batch + (n,), as views; for NumPy and CuPy alike.

`arrange` checks every argument of a call, and raises before anything is computed: of the public functions, of the
losses of klcore.compat, and of the products of cotangents and Jacobians that adapters ask for. Called by cpu.py and
cuda/ with their array library as `xp`, and by adapters that only want a call checked, with arrays that have a shape
and no memory. Of arithmetic there is here what is done to weights before a kernel runs, and to results after it.
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

FLOATS = tuple(_cpu.DTYPES)  # by name, in the order of their codes
SPACES, CODES = _cpu.SPACES, _cpu.DTYPES
LOGITS = SPACES["logits"]
PER_ROW, TERMS, TOTAL = (_cpu.OUTPUTS[name] for name in ("row", "none", "total"))
REDUCTIONS = ("row", "sum", "rowmean", "none", "batchmean", "mean")
TAILS = _cpu.TAILS
_MEANINGS = (
    "tail='bucket' (all other classes are one, of the mass that x has left), tail='zero' (x has nothing there), "
    "tail='renorm' (both are renormalised on the classes listed), or rel_entr with tail='zero' (the truncated sum of "
    "x*log(x/y), which may be negative)"
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
    """One gradient to compute: `array` has the operand's shape, `view` the kernel's."""

    of: str
    array: Any
    view: Any
    inner: tuple[int, ...] = ()  # batch axes over which the operand is broadcast: their gradients are summed
    spread: tuple[int, Any] | None = None  # the class axis and the operand, if that is broadcast over it
    out: Any = None  # where the sum over that axis goes, if not to a new array

    @property
    def order(self) -> tuple[int, ...]:
        """The batch axes: a broadcast operand's own in front, those to sum its gradient over behind."""
        return (*(d for d in range(self.view.ndim - 1) if d not in self.inner), *self.inner)


@dataclass(slots=True)
class Task:
    """A call, checked and arranged. Views have the shape batch + (n,), or batch."""

    operation: Operation
    x: Any
    y: Any
    spaces: tuple[int, int]
    weights: Any  # one a row, of any dtype that the backend's kernels read them in; or None
    factors: Any  # one a term; float64 or float32, or None
    output: int
    value: Any  # the result's array, allocated or given; None where it is a scalar made from the total
    value_view: Any
    out: Any  # where a scalar result is to be written, if anywhere
    signed: bool  # whether weights may be any numbers
    given: bool  # whether the caller gave `out`, and so wants arrays
    scalar_dtype: Any
    wide: bool  # compute in float64
    temperature: Any  # a float, or an array, one a row, of any dtype that the backend's kernels read them in
    rows: int
    n: int
    denominator: float | None  # of a total, and of all gradients; None: the sum of the weights
    gradients: list[Gradient] = field(default_factory=list)
    parameter: float = 0.0
    factor: float = 1.0  # of the value, and of all gradients
    cotangent: Any = None  # a scalar that multiplies the gradients
    value_wanted: bool = True  # else the gradients only
    over_y: bool = False  # whether the gradient for y may be written where y is
    divisor: Any = None  # instead of a denominator of 1: one that is known where the arrays are, or later
    counted: Any = None  # the weights that a mean is divided by, where others multiply the rows

    @property
    def temperatures(self) -> Any:
        """Those of the rows, where they have their own; or None."""
        return None if isinstance(self.temperature, float) else self.temperature

    @property
    def by_weights(self) -> bool:
        """Whether the sum of the weights must be known: a mean divides by it, or may be in range where it is not."""
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
        numpy or cupy, or what stands in for them.
    asarray : callable
        ``asarray(a, name)`` gives a native array of float64, float32, float16 or bfloat16, or raises TypeError.
    call : Call
        With a cotangent, the task's own value means nothing, and `out` is for the gradients alone.
    """
    if call.cotangent is not None:
        return _arrange_gradient(xp, asarray, call)
    return (_arrange_loss if call.operation.is_loss else _arrange)(xp, asarray, call)


class Laid(NamedTuple):
    """x and y as rows, and what shape that gives."""

    operands: dict[str, Any]  # as arrays, in their own shapes
    x: Any  # of shape batch + (n,)
    y: Any
    batch: tuple[int, ...]
    n: int
    last: int  # the class axis, counted from the end
    scalar: bool  # one class: neither has a dimension
    terms: tuple[
        int, ...
    ]  # the shape of the terms, or where x lists classes of y; the classes where the caller has them
    alone: bool = False  # every number is a row

    def classes_last(self, a: Any) -> Any:
        """An array of the terms' shape, as kernels see it."""
        return a[..., None] if self.alone else classes_last(a.reshape(1) if self.scalar else a, self.last)


def _lay_alone(xp: Any, asarray: Any, call: Call) -> Laid:
    """Every number as a row of one class."""
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
    last = class_axis(x, y, call.axis)
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
    """`factors`, of every term, broadcast to their shape; `signed`: weights may be any numbers."""
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
    """Where the value and the gradients go: to `out`, if that is fit for it, or to new arrays."""
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
    """Whether results that the caller gave are fit for it: the value of this shape and dtype, gradients of their
    operands', none of which lies over these or over what is `read` besides, but perhaps that for y over y."""
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
    """Have those of operands that blocks share written as parts of a sum."""
    for g in gradients:
        if g.of in shared:
            g.array = g.view = xp.zeros(g.view.shape, np.float64)


def _arrange_loss(xp: Any, asarray: Any, call: Call) -> Task:
    """The arguments of ``klcore.divergence.loss``: x and y broadcast over the classes as well."""
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
        if factors.ndim == 0 or factors.ndim < -last or factors.shape[last] == 1:  # one factor a row
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
    """`a`, broadcast along the class axis only; of 32 bits at least then: its gradient is summed, and rounded once."""
    shape = [1] * (-last - a.ndim) + list(a.shape)
    if shape[last] == 1:
        shape[last] = n
    if tuple(shape) == a.shape:
        return a
    return xp.broadcast_to(a.astype("float32") if a.dtype.itemsize == 2 else a, tuple(shape))


def _arrange_gradient(xp: Any, asarray: Any, call: Call) -> Task:
    """A product of cotangent and Jacobian: the cotangent of rows or terms goes into the weights or factors of a sum."""
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
                weights = xp.where(weights == 0, 0, product)  # such a row yields 0, whatever the cotangent: inf as well
        elif call.reduction == "none":
            factors = cotangent
        task = _arrange(xp, asarray, summed._replace(weights=weights), factors, signed=call.reduction == "row")
    if total:
        task.cotangent = cotangent
    task.value_wanted = False
    return task


_OWN = np.ndarray.__array_ufunc__
TABLES = ("pandas", "polars", "xarray")  # to them NumPy's functions mean what they mean to arrays, labels apart
_PLAIN_NUMBERS = (  # what stands for what in an array of another meaning: an attribute, and how to write it
    ("compute", "compute()"), ("value", "value"), ("magnitude", "magnitude"),
)  # fmt: skip


def refuse(a: Any, name: str) -> None:
    """Raise TypeError for arrays that no backend takes: by what they are, or of no known dtype."""
    _refuse_kind(a, name)
    dtype = getattr(a, "dtype", None)
    if dtype is not None and dtype.kind not in "iub" and dtype.name not in FLOATS:
        columns = f"pass its columns as one array, as numpy.lib.recfunctions.structured_to_unstructured({name})"
        numbers = f"pass {name}.astype({'int' if name == 'indices' else 'float'})"
        hint = columns if dtype.names else "" if dtype.kind == "c" else numbers
        if dtype.kind == "O" and a.size and isinstance(np.ravel(a)[0], (list, tuple, np.ndarray)):
            hint = _of_rows(name)
        raise TypeError(
            f"{name} has dtype {dtype}; klcore computes with {', '.join(FLOATS)}, and with integers and booleans as "
            f"float64{': ' + hint if hint else ''}"
        )


def refuse_others(dtype: Any, are_integers: bool) -> None:
    """Raise TypeError for indices that are none."""
    if not are_integers:
        raise TypeError(f"indices must be integers, the numbers of classes; found the dtype {dtype}")


def _refuse_kind(a: Any, name: str) -> None:
    """The same for those that are masked, sparse, or of a meaning that their numbers alone do not have."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, and klcore would ignore the mask; pass {name}.filled(value), or weights=0 for "
            "rows to leave out"
        )
    cls = type(a)
    _refuse_tensorflow(cls, name)
    dense = next((f"{name}.{method}()" for method in ("toarray", "todense") if hasattr(cls, method)), None)
    if dense is not None:
        raise TypeError(f"{name} is a sparse {cls.__name__}; klcore takes dense arrays: pass {dense}")
    unit = None if isinstance(a, np.ndarray) or _is_known(cls) else getattr(a, "unit", None)
    if unit is not None or _has_meaning(cls):
        raise TypeError(
            f"{name} is of the type {_type_name(cls)}, to which NumPy's functions mean something of its own "
            f"(units, say), which klcore would ignore; pass the plain numbers, {_plain_numbers(a, name)}"
        )


def _refuse_tensorflow(cls: type, name: str) -> None:
    if "tensorflow" in _roots(cls):
        raise TypeError(
            f"{name} is of the type {_type_name(cls)}, and klcore has no adapter for TensorFlow: train with the losses "
            "of klcore.compat.keras, or where no gradient is needed, pass what the tensor's numpy() returns"
        )


def _has_meaning(cls: type) -> bool:
    """Whether NumPy's functions mean something of their own to such arrays."""
    return getattr(cls, "__array_ufunc__", _OWN) is not _OWN and not _is_known(cls)


def _refuse_parts(a: Any, name: str) -> None:
    """What lists hold, and NumPy would take for numbers alone."""
    lists, seen = [a], set()  # a list may hold itself
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
                    f"klcore would not see; pass one array, as {make}({name}) makes it where that means the same"
                )


def _is_tensor(a: Any) -> bool:
    return type(a).__module__.partition(".")[0] == "torch" and hasattr(a, "ndim") and a.ndim > 0


def _of_rows(name: str) -> str:
    return f"it holds lists or arrays, one an element; pass numpy.stack({name}) to make rows of them"


def _type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _is_known(cls: type) -> bool:
    return not _roots(cls).isdisjoint(("cupy", *TABLES))


def _roots(cls: type) -> set[str]:
    return {base.__module__.partition(".")[0] for base in cls.__mro__}


def _plain_numbers(a: Any, name: str) -> str:
    attribute = next((f" or {name}.{text}" for word, text in _PLAIN_NUMBERS if hasattr(a, word)), "")
    if isinstance(a, np.ndarray):
        return f"as {name}.view(numpy.ndarray){attribute}"
    return attribute.replace(" or ", "as ") or f"as a NumPy array made of {name}"


def as_numpy(a: Any, name: str) -> Any:
    """Whatever NumPy makes an array of, as that; TypeError or ValueError, by name, for what it cannot or misreads."""
    if type(a) is np.ndarray:
        return a
    _refuse_kind(a, name)
    cls = type(a)
    if isinstance(a, (str, bytes, bytearray)):
        raise TypeError(f"{name} is of the type {_type_name(cls)}; klcore takes arrays and sequences of numbers")
    if isinstance(a, (list, tuple)):
        _refuse_parts(a, name)
    try:
        lends = hasattr(a, "__dlpack__") and not hasattr(a, "__array__")
        found = np.from_dlpack(a) if lends else np.asarray(a)
    except Exception as error:  # of the container's own making
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name}, of the type {_type_name(cls)}, cannot be made a NumPy array: {error}") from error
    if found.dtype == object and not isinstance(a, np.ndarray):
        if not found.ndim and not isinstance(a, (int, np.generic)):
            raise TypeError(f"{name} is of the type {_type_name(cls)}, of which NumPy makes no array of numbers")
        if found.size and isinstance(np.ravel(found)[0], (list, tuple, np.ndarray)):
            hint = _of_rows(name)
        elif hasattr(cls, "iloc"):
            hint = f"select the columns of numbers, or pass {name}.to_numpy(dtype=float), where what is missing is NaN"
        else:
            hint = f"pass numpy.asarray({name}, dtype=float)"
        raise TypeError(
            f"{name}, of the type {_type_name(cls)}, becomes an array of dtype object, not one of {', '.join(FLOATS)}; "
            f"{hint}"
        )
    return found


def is_wide(operation: Operation, spaces: tuple[int, int], temperature: float = 1.0, parameter: float = 0.0) -> bool:
    """Whether float32 is computed in float64."""
    return _cpu.is_wide(operation.code, *spaces, temperature, parameter)


def scale(denominator: Any, cotangent: Any = None) -> float:
    """What multiplies the gradients of a sum that is divided; NaN for the mean of nothing."""
    found = 1.0 / denominator if denominator else math.nan
    return found if cotangent is None else found * float(cotangent)


def result(task: Task, value: Any) -> Any:
    """What the caller gets: the value, or the value and the gradients in the order they were asked for."""
    if task.output != TOTAL and task.denominator != 1:
        if task.given:
            value /= task.denominator
        else:
            value = (value / task.denominator).astype(value.dtype, copy=False)
    return (value, *gradients(task)) if task.gradients else value


def gradients(task: Task) -> tuple[Any, ...]:
    """In the order they were asked for."""
    return tuple(_collected(g) for g in task.gradients)


def _collected(g: Gradient) -> Any:
    """A gradient in its operand's own shape."""
    if g.spread is None:
        return g.array
    axis, operand = g.spread
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs; more than the dtype holds
        sums = g.array.sum(axis, dtype="float64", keepdims=True).astype(operand.dtype).reshape(operand.shape)
    if g.out is None:
        return sums
    g.out[...] = sums
    return g.out


def _list(words: Any) -> str:
    return ", ".join(repr(w) for w in words)


def words(call: Call) -> tuple[tuple[int, int], Any, tuple[str, ...]]:
    """Those of a call, checked: the codes of both spaces, the temperature, the names of the gradients. An array of
    temperatures comes as it was given; its numbers are looked at later."""
    operation = call.operation
    spaces = space_pair(call.space, operation)
    check_list(call, spaces)
    temperature = _temperature(call.temperature, spaces)
    check_reduction(call.reduction, operation)
    check_denominator(call)
    return spaces, temperature, _wanted(call.return_grad, operation)


def check_list(call: Call, spaces: tuple[int, int]) -> None:
    """The words of a call whose x lists some classes (sparse.py), or of one that should be one."""
    if call.indices is None:
        if call.tail is not None or call.tail_mass is not None:
            word = "tail" if call.tail is not None else "tail_mass"
            raise TypeError(f"{word}= says what x has beside the classes that indices= lists; pass indices as well")
        return
    if call.tail is None:
        raise TypeError(f"indices= lists the classes that x is of; say by tail= what x has beside them: {_MEANINGS}")
    if not isinstance(call.tail, str) or call.tail not in TAILS:
        raise ValueError(f"tail must be one of {_list(TAILS)}; found {shown(call.tail)}")
    if call.tail_mass is not None and call.tail != "bucket":
        raise ValueError(f"tail_mass goes with tail='bucket'; found it with tail={call.tail!r}")
    if spaces[0] in (LOGITS, SPACES["counts"]) and call.tail != "renorm":
        numbers = "logits" if spaces[0] == LOGITS else "counts"
        raise ValueError(
            f"x, which has the classes listed, is {numbers} here: these are normalised on the list, which goes with "
            f"tail='renorm' only; pass its probabilities or log-probabilities with tail={call.tail!r}"
        )


def check_reduction(reduction: Any, operation: Operation) -> None:
    known = tuple(r for r in REDUCTIONS if operation.has_terms or r != "none")
    if isinstance(reduction, str) and reduction in known:
        return
    if isinstance(reduction, str) and reduction in REDUCTIONS:
        raise ValueError(
            f"{operation.name} is no sum over classes, so it has no terms for reduction='none'; "
            f"take one of {_list(known)}"
        )
    raise ValueError(f"reduction must be one of {_list(known)}; found {shown(reduction)}")


def check_denominator(call: Call) -> None:
    """All but its value."""
    if not call.operation.is_loss:
        check_divides(call.denominator, call.reduction)


def denominator_of(call: Call) -> float:
    """Its value."""
    d = number(call.denominator, "denominator")
    if not 0 <= d < math.inf:
        raise ValueError(f"denominator must be finite and >= 0; found {d!r}")
    return d


def class_axis(x: Any, y: Any, axis: Any) -> int:
    """Counted from the end; x and y have the same number of classes along it."""
    shapes = tuple(x.shape), tuple(x.shape if y is None else y.shape)
    ndim = max(map(len, shapes))
    last = _axis(axis, ndim or 1, ndim == 0)
    xs, ys = (shape if ndim else (1,) for shape in shapes)
    if min(len(xs), len(ys)) < -last or xs[last] != ys[last]:
        n, m = (shape[last] if len(shape) >= -last else 1 for shape in (xs, ys))
        hint = "; where x has some of them, indices= says which" if n < m else ""
        raise ValueError(
            f"x and y must have the same number of classes along axis {axis} of the shape to which they broadcast; "
            f"found {n} and {m} (shapes {shapes[0]} and {shapes[1]}){hint}"
        )
    return last


def class_axis_of(call: Call, x: Any, y: Any) -> int:
    """That of a call, of whose arguments adapters have made arrays; 0 where every number is a row."""
    if call.indices is not None:
        return lay_list(x, y, call.indices, call.axis)[0]
    if not call.operation.is_estimator:
        return class_axis(x, y, call.axis)
    estimate_shape(x, y)
    return 0


def lay_list(x: Any, y: Any, indices: Any, axis: Any) -> tuple[int, tuple[int, ...]]:
    """Where x lists classes of y: the class axis, counted from the end, and y's shape in the batch of all three."""
    of_x, of_indices, of_y = shapes = tuple(x.shape), tuple(indices.shape), tuple(y.shape)
    ndims = [len(shape) for shape in shapes]
    last = _axis(axis, max(ndims) or 1, max(ndims) == 0)
    if min(ndims) < -last or of_x[last] != of_indices[last]:
        raise ValueError(
            f"x and indices must have the same number of classes along axis {axis}, on which y has all of them; found "
            f"the shapes {of_x}, {of_indices} and {of_y} of x, indices and y"
        )
    try:
        batch = broadcast_shapes(with_classes(of_x, last, 1), with_classes(of_indices, last, 1))
        return last, broadcast_shapes(batch, of_y)
    except ValueError:
        raise ValueError(
            f"x, indices and y must have batch shapes (all axes but axis {axis}) that broadcast; found the shapes "
            f"{of_x}, {of_indices} and {of_y}"
        ) from None


def with_classes(shape: tuple[int, ...], last: int, n: int) -> tuple[int, ...]:
    """The shape with n classes."""
    return (*shape[:last], n, *shape[last:][1:])


def estimate_shape(x: Any, y: Any) -> tuple[int, ...]:
    """That of an estimator's values."""
    try:
        return broadcast_shapes(x.shape, y.shape)
    except ValueError:
        raise ValueError(
            f"log_x and log_y must have shapes that broadcast; found {tuple(x.shape)} and {tuple(y.shape)}"
        ) from None


def batches_differ(x: Any, y: Any, axis: Any) -> ValueError:
    """What to raise for batch shapes that do not broadcast."""
    return ValueError(
        f"x and y must have batch shapes (all axes but axis {axis}) that broadcast; found shapes {tuple(x.shape)} and "
        f"{tuple(y.shape)}"
    )


def space_pair(space: Any, operation: Operation) -> tuple[int, int]:
    """The codes of both arguments' spaces, or ValueError."""
    pair = (space, space) if isinstance(space, str) else space
    known = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(s, str) and s in SPACES for s in pair)
    if not known or (operation.single and not isinstance(space, str)):
        or_a_pair = "" if operation.single else ", or a pair (space of x, space of y)"
        raise ValueError(f"space must be one of {_list(SPACES)}{or_a_pair}; found {shown(space)}")
    if operation.is_loss and tuple(pair) not in operation.pairs:
        raise ValueError(f"the term of {operation.name!r} is not for the spaces {space!r}")
    return SPACES[pair[0]], SPACES[pair[1]]


def has_numbers(temperature: Any) -> bool:
    """Whether a temperature is an array to read from: not NumPy's of no dimensions, which is a number."""
    if isinstance(temperature, (int, float)):
        return False
    if isinstance(temperature, (np.ndarray, np.generic)) and on_host(temperature) is not None:
        return temperature.ndim > 0
    return hasattr(temperature, "shape") or isinstance(temperature, (list, tuple))


def _temperature(temperature: Any, spaces: tuple[int, int]) -> Any:
    if has_numbers(temperature):
        if LOGITS not in spaces:
            raise ValueError("temperature divides logits: it needs space='logits' for x or y; found an array")
        return temperature
    try:
        t = float(temperature)
    except OverflowError:  # an integer that no float holds
        t = math.inf
    except (TypeError, ValueError):
        t = None
    if t is None or isinstance(temperature, (str, bytes)):
        raise TypeError(f"temperature must be a number, found {shown(temperature)} ({type(temperature).__name__})")
    if not (t > 0 and _POSITIVE[0] <= t <= _POSITIVE[1]):
        raise ValueError(f"temperature must {_BE_POSITIVE}; found {shown(temperature)}")
    if t != 1 and LOGITS not in spaces:
        raise ValueError(f"temperature divides logits: it needs space='logits' for x or y; found temperature={t!r}")
    return t


def _wanted(return_grad: Any, operation: Operation) -> tuple[str, ...]:
    key = tuple(return_grad) if isinstance(return_grad, list) else return_grad
    try:
        wanted = GRADIENTS.get(key)
    except TypeError:  # something in it that is no key
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
    """A plain int, of whatever may index."""
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
    return a.transpose(*range(axis), *range(axis + 1, a.ndim), axis)  # moveaxis takes ten times as long


def broadcast_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which two broadcast, or ValueError. NumPy's own function knows 32 dimensions, its arrays have 64."""
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
    """Factors, a cotangent, or weights to multiply it with, of a dtype that kernels read them in."""
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
    host = on_host(w, weights)  # on a GPU a bad weight makes its row NaN
    if host is not None and w.size and not (np.min(host) >= 0 and np.max(host) < math.inf):  # NaN fails both
        host = np.asarray(host)
        raise ValueError(f"weights must be finite and >= 0; found {bad_ones(host, ~((host >= 0) & (host < math.inf)))}")
    return view


# Between which temperatures lie: of double, and of float32, which at others has no room for the logarithms of a row.
# They are asked for their sign as well: threads of XLA's take the least one, a subnormal number, for 0.
_POSITIVE, _NARROW = _cpu.TEMPERATURES, _cpu.NARROW_TEMPERATURES
_BE_POSITIVE = "be positive and finite, and so must be 1 / temperature"


def read_temperatures(
    xp: Any, asarray: Any, temperature: Any, batch: tuple[int, ...], weights: Any, double: bool
) -> Any:
    """One a row; or a float, where NumPy makes a number of it."""
    t = asarray(temperature, "temperature")
    if t.ndim == 0 and isinstance(on_host(t), np.ndarray):
        return _temperature(t, (LOGITS, LOGITS))
    view = over_rows(xp, t, batch, "temperature")
    host = on_host(t, temperature)  # on a GPU a bad one makes its row NaN
    if host is not None:
        check_temperatures(broadcast(np, np.asarray(host), batch), weights, double)
    return view


def check_temperatures(t: Any, weights: Any, double: bool) -> None:
    """Raise ValueError if one of them is bad, of a row that has a weight. `double`: an argument is float64."""
    t = t.astype(np.float64)
    narrow = "lie between 2**-20 and 2**100 where it is an array and no argument is float64; pass one as float64"
    for (low, high), must in ((_POSITIVE, _BE_POSITIVE), (_NARROW, narrow))[: 1 if double else 2]:
        good = (t > 0) & (t >= low) & (t <= high)
        if weights is not None and on_host(weights) is not None:
            good |= weights == 0
        if not good.all():
            raise ValueError(f"temperature must {must}; found {bad_ones(t, ~good)}")


def on_host(*same: Any) -> Any:
    """One of these, that NumPy can look at. On a GPU nobody does, which would mean to wait for it."""
    return next((a for a in same if not hasattr(a, "__cuda_array_interface__")), None)


def bad_ones(a: Any, bad: Any) -> str:
    """The first, where it is, and how many more there are."""
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
    """What multiplies an estimator's rows: NaN where the ratio is none, which a GPU need not be waited for to find out.
    A row of weight 0 is left out, whatever its ratio."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = xp.where((ratio >= 0) & (ratio < math.inf), ratio, math.nan).astype("float64")
        return product if weights is None else xp.where(weights == 0, 0, product * weights)


def denominator(call: Call, terms: tuple[int, ...], batch: tuple[int, ...], weights: Any) -> float | None:
    """What divides a total, and all gradients; None: the sum of the weights. `terms`, `batch`: the shapes of these."""
    if call.denominator is not None:
        return float(call.denominator) if call.operation.is_loss else denominator_of(call)
    if call.reduction == "rowmean" and weights is not None:
        return None
    counts = {"rowmean": math.prod(batch), "batchmean": math.prod(terms[:1]), "mean": math.prod(terms)}
    return float(counts.get(call.reduction, 1))


# A mean does not depend on a common factor of weight and denominator: far from the ends of the range nothing overflows,
# and nothing is rounded.
WEIGHT_FACTORS = (1.0, 2.0**-600, 2.0**600)


def weight_factor(total: Any) -> Any:
    """Of weights with this sum, or these."""
    one, small, large = WEIGHT_FACTORS
    return np.where(total > 2.0**500, small, np.where((0 < total) & (total < 2.0**-500), large, one))[()]


def scaled_weights(weights: Any, factor: Any) -> Any:
    """Times a power of two; a row that counts goes on to do so, however small its weight is."""
    scaled = weights * factor
    return np.where((scaled == 0) & (weights != 0), 2.0**-1074, scaled)


def results_in(out: Any, wanted: tuple[str, ...]) -> tuple[Any, ...]:
    """Where the value and the gradients go; None for those to allocate."""
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
    hint = "; where a gradient goes is said by a tuple, as out=(None, array)" if what == "the value" else ""
    if not isinstance(out, xp.ndarray) or hasattr(out, "mask") or _has_meaning(type(out)):
        raise TypeError(f"out for {what} must be a plain {xp.__name__}.ndarray, found {type(out).__name__}{hint}")
    if out.shape != shape:
        raise ValueError(f"out for {what} must have the shape {shape}, found {out.shape}{hint}")
    if out.dtype != dtype:
        raise ValueError(f"out for {what} must have the dtype {dtype}, found {out.dtype}")
    flags = getattr(out.flags, "writeable", True)
    if not flags:
        raise ValueError(f"out for {what} is read-only")
    if shares_with_itself(out.shape, out.strides, out.dtype.itemsize):
        raise ValueError(f"out for {what} is a view whose elements share memory; pass an array of its own")


def shares_with_itself(shape: Any, strides: Any, size: int) -> bool:
    """Whether elements of `size` may share memory. Each axis has to step over all that the ones of smaller steps cover:
    so it is in slices, transposes and reversals of ordinary arrays. What interleaves otherwise counts as shared."""
    if 0 in shape:
        return False
    covered = size
    for step, n in sorted((abs(step), n) for step, n in zip(strides, shape, strict=True) if n > 1):
        if step < covered:
            return True
        covered += step * (n - 1)
    return False


def check_overlap(outs: list[Any], inputs: list[Any], over_y: Any = None) -> None:
    """Raise ValueError if results would be written over an input, or over each other. `over_y`: one of the results that
    may be the second input, whose shape and dtype it has."""
    for i, out in enumerate(outs):
        if any(_overlap(out, a) and not (k == 1 and out is over_y and _is_same(out, a)) for k, a in enumerate(inputs)):
            raise ValueError(
                "out overlaps the memory of an input; pass an array of its own (only the gradient for y from logits "
                "may be y itself, where neither is broadcast over the other's batch)"
            )
        if any(_overlap(out, other) for other in outs[:i]):
            raise ValueError("two arrays of out overlap; pass separate ones")


def _overlap(a: Any, b: Any) -> bool:
    a, b = _memory(a), _memory(b)
    if not np.may_share_memory(a, b):  # two integer intervals
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]  # any integer will do
    except Exception:  # too hard to decide exactly
        return True


def _is_same(a: Any, b: Any) -> bool:
    """Of two arrays of one shape and dtype."""
    a, b = _memory(a).__array_interface__, _memory(b).__array_interface__
    return a["data"][0] == b["data"][0] and a["strides"] == b["strides"]


class _memory_of:
    """Where an array of another device lies, for NumPy to compare; nobody reads what is there."""

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
