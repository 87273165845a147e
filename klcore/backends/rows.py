"""The one layout that kernels see: rows of n classes, as views of shape batch + (n,), for NumPy and CuPy alike.

`arrange` checks every argument of a call, with arguments.py, options.py and destinations.py, and raises before anything
is computed. Calls come from the public functions, from the losses of klcore.compat, and from adapters that ask for
products of cotangents and Jacobians. cpu.py and cuda/ pass their array library as `xp`; adapters that only want a call
checked pass stand-ins with a shape and no memory. The only arithmetic here is on weights before a kernel runs, and on
results after it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from klcore import _cpu
from klcore.backends import arguments, destinations, labels, options
from klcore.operations import Call, Operation
from klcore.parameters import shown

CODES = _cpu.DTYPES

PER_ROW, TERMS, TOTAL = (_cpu.OUTPUTS[name] for name in ("row", "none", "total"))


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
    # the shape of the terms, with the classes on the caller's axis; with indices, of all classes of y
    terms: tuple[int, ...]
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
    spaces, temperature, wanted = options.check(call)
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
        or (factors is not None and options.LOGITS in spaces)
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
    value, *gradients = destinations.results_in(out, wanted)
    if out is not None:
        whole = all(laid.operands[name].shape == laid.terms for name in wanted)
        task.over_y = "y" in wanted and task.spaces[1] == options.LOGITS and whole
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
        destinations.check(xp, value, "the value", shape, dtype)
    for name, result in gradients.items():
        if result is not None:
            operand = laid.operands[name]
            destinations.check(xp, result, f"the gradient with respect to {name}", operand.shape, operand.dtype)
    inputs = [a for a in (*laid.operands.values(), *read) if a is not None and not isinstance(a, float)]
    outs = [a for a in (value, *gradients.values()) if a is not None]
    destinations.check_overlap(outs, inputs, gradients["y"] if over_y else None)


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
    _, _, wanted = options.check(call)
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
                with np.errstate(over="ignore", invalid="ignore", under="ignore"):
                    product = cotangent * weights
                weights = xp.where(weights == 0, 0, product)  # rows of weight 0 give 0 even if the cotangent is inf
        elif call.reduction == "none":
            factors = cotangent
        task = _arrange(xp, asarray, summed._replace(weights=weights), factors, signed=call.reduction == "row")
    if total:
        task.cotangent = cotangent
    task.value_wanted = False
    return task


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
    with np.errstate(
        invalid="ignore", over="ignore", under="ignore"
    ):  # infinities of both signs, or overflow of the dtype
        sums = g.array.sum(axis, dtype="float64", keepdims=True).astype(operand.dtype).reshape(operand.shape)
    if g.out is None:
        return sums
    g.out[...] = sums
    return g.out


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


def _axis(axis: Any, ndim: int, scalar: bool) -> int:
    a = options.integer(axis, "axis")
    if not -ndim <= a < ndim:
        what = "0-dimensional arrays, taken as one class" if scalar else f"arrays of {ndim} dimensions"
        raise ValueError(f"axis {shown(a)} is out of range for {what}")
    return a - ndim if a >= 0 else a


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
    host = arguments.on_host(w, weights)  # on a GPU, an invalid weight makes its row NaN
    if host is not None and w.size and not (np.min(host) >= 0 and np.max(host) < math.inf):  # NaN fails both
        host = np.asarray(host)
        bad = arguments.bad_ones(host, ~((host >= 0) & (host < math.inf)))
        raise ValueError(f"weights must be finite and >= 0; found {bad}")
    return view


def read_temperatures(
    xp: Any, asarray: Any, temperature: Any, batch: tuple[int, ...], weights: Any, double: bool
) -> Any:
    """One temperature per row; or a float for a 0-d array on the host."""
    t = asarray(temperature, "temperature")
    if t.ndim == 0 and isinstance(arguments.on_host(t), np.ndarray):
        return options.temperature_of(t, (options.LOGITS, options.LOGITS))
    view = over_rows(xp, t, batch, "temperature")
    host = arguments.on_host(t, temperature)  # on a GPU, an invalid temperature makes its row NaN
    if host is not None:
        options.check_temperatures(broadcast(np, np.asarray(host), batch), weights, double)
    return view


def over_rows(xp: Any, a: Any, batch: tuple[int, ...], name: str) -> Any:
    try:
        return broadcast(xp, a, batch)
    except ValueError:
        do = "do" if name == "weights" else "does"
        raise ValueError(f"{name} of shape {a.shape} {do} not broadcast to the batch shape {batch}") from None


def times_ratio(xp: Any, weights: Any, ratio: Any) -> Any:
    """What multiplies the rows of an estimator: NaN for an invalid ratio, because raising would synchronise a GPU. Rows
    of weight 0 are left out, whatever their ratio."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        product = xp.where((ratio >= 0) & (ratio < math.inf), ratio, math.nan).astype("float64")
        return product if weights is None else xp.where(weights == 0, 0, product * weights)


def denominator(call: Call, terms: tuple[int, ...], batch: tuple[int, ...], weights: Any) -> float | None:
    """What divides a total and all gradients; None: the sum of the weights. `terms` and `batch` are shapes."""
    if call.denominator is not None:
        return float(call.denominator) if call.operation.is_loss else options.denominator_of(call)
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
    with np.errstate(under="ignore"):
        scaled = weights * factor
    return np.where((scaled == 0) & (weights != 0), 2.0**-1074, scaled)
