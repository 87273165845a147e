"""The one shape that kernels see: rows of n classes, batch + (n,), as views; for NumPy and CuPy alike.

Checks every argument and raises before anything is computed: the four public functions (`arrange`), the losses of
klcore.compat (`arrange_loss`) and the products of cotangents and Jacobians that adapters ask for (`arrange_gradient`).
Called by cpu.py and cuda.py with their array library as `xp`, and by adapters that only want a call checked, with
arrays that have a shape and no memory. Of arithmetic there is here what is done to weights before a kernel runs, and to
results after it.
"""

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from klcore.backends import labels

FLOATS = ("float64", "float32", "float16", "bfloat16")  # their codes in kl_store.h
SPACES = {"probs": 0, "log_probs": 1, "logits": 2}
REDUCTIONS = ("row", "sum", "rowmean", "none", "batchmean", "mean")
GRADIENTS: dict[Any, tuple[str, ...]] = {
    None: (),
    "x": ("x",),
    "y": ("y",),
    ("x",): ("x",),
    ("y",): ("y",),
    ("x", "y"): ("x", "y"),
}
KL_DIV, REL_ENTR, CROSS_ENTROPY, ENTROPY, PYTORCH, KERAS, MXNET, PUZZLELIB = range(8)  # as in kl_math.h
OPERATIONS = {"kl_div": KL_DIV, "rel_entr": REL_ENTR, "cross_entropy": CROSS_ENTROPY, "entropy": ENTROPY}
LOSSES = {  # other systems' terms, with the pairs of spaces that each is for
    "pytorch": (PYTORCH, ((0, 1), (1, 1))),
    "keras": (KERAS, ((0, 0),)),
    "mxnet": (MXNET, ((0, 1), (0, 2))),
    "puzzlelib": (PUZZLELIB, ((0, 2), (2, 2))),
}
PER_ROW, TERMS, TOTAL = range(3)  # as in kl_plan.h


@dataclass(slots=True)
class Gradient:
    """One gradient to compute: `array` has the operand's shape, `view` the kernel's."""

    of: str
    array: Any
    view: Any
    inner: tuple[int, ...] = ()  # batch axes over which the operand is broadcast: their gradients are summed
    spread: tuple[int, Any] | None = None  # the class axis and the operand, if that is broadcast over it
    out: Any = None  # where the sum over that axis goes, if not to a new array


@dataclass(slots=True)
class Task:
    """A call, checked and arranged. Views have the shape batch + (n,), or batch."""

    operation: int
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
    temperature: float
    rows: int
    n: int
    denominator: float | None  # of a total, and of all gradients; None: the sum of the weights
    gradients: list[Gradient] = field(default_factory=list)
    epsilon: float = 0.0
    cotangent: Any = None  # a scalar that multiplies the gradients
    value_wanted: bool = True  # else the gradients only

    @property
    def by_weights(self) -> bool:
        """Whether the sum of the weights must be known: a mean divides by it, or may be in range where it is not."""
        if self.denominator is None:
            return True
        mean = self.output == TOTAL and self.denominator != 1 and not self.signed
        return mean and self.weights is not None and self.weights.dtype == np.float64


def arrange(
    xp: Any,
    asarray: Any,
    operation: int,
    x: Any,
    y: Any,
    space: Any,
    axis: int,
    reduction: str,
    weights: Any,
    temperature: float,
    return_grad: Any,
    out: Any,
    *,
    factors: Any = None,
    signed: bool = False,
    dtype: Any = None,
) -> Task:
    """Check the arguments of a call and lay its arrays out in rows.

    Parameters
    ----------
    xp : module
        numpy or cupy, or what stands in for them.
    asarray : callable
        ``asarray(a, name)`` gives a native array of float64, float32, float16 or bfloat16, or raises TypeError.
    operation : int
        One of those above; for ENTROPY, `y` is None.
    factors : array, optional
        Of every term: broadcasts to their shape.
    signed : bool
        Whether weights may be any numbers.
    dtype : dtype, optional
        Of the value, if it is not to follow from the arguments'.
    """
    single = operation == ENTROPY
    spaces, temperature, wanted = words(space, reduction, temperature, return_grad, single)

    arguments = x, y, weights
    x = asarray(x, "x")
    y = x if single else asarray(y, "y")
    scalar = x.ndim == 0 and y.ndim == 0  # one class
    xs, ys = (x.reshape(1), y.reshape(1)) if scalar else (x, y)
    ndim = max(xs.ndim, ys.ndim)
    last = class_axis(x, y, axis)
    xs, ys = _classes_last(xp, xs, last), _classes_last(xp, ys, last)
    n = xs.shape[-1]
    batch = xs.shape[:-1]
    if batch != ys.shape[:-1]:
        try:
            batch = broadcast_shapes(batch, ys.shape[:-1])
        except ValueError:
            raise batches_differ(x, y, axis) from None
    rows = math.prod(batch)
    weights = _weights(xp, asarray, weights, batch, signed)
    if labels.are_there(*arguments):
        labels.check(last, *arguments)
    terms_shape = () if scalar else _insert(batch, ndim + last, n)
    if factors is not None:
        factors = _broadcast(xp, _multiplier(asarray, factors, "factors"), terms_shape)
        factors = _classes_last(xp, factors.reshape(1) if scalar else factors, last)

    double = max(x.dtype.itemsize, y.dtype.itemsize) == 8
    if dtype is None:
        dtype = xp.dtype("float64") if double else xp.dtype("float32")
    results = results_in(out, wanted)

    task = Task(
        operation=operation,
        x=_broadcast(xp, xs, (*batch, n)),
        y=None if single else _broadcast(xp, ys, (*batch, n)),
        spaces=spaces,
        weights=weights,
        factors=factors,
        output=PER_ROW if reduction == "row" else TERMS if reduction == "none" else TOTAL,
        value=None,
        value_view=None,
        out=None,
        signed=signed,
        given=out is not None,
        scalar_dtype=dtype,
        wide=double or is_wide(operation, spaces, temperature) or (factors is not None and 2 in spaces),
        temperature=temperature,
        rows=rows,
        n=n,
        denominator=_denominator(reduction, terms_shape, rows, n, weights),
    )
    shape = batch if reduction == "row" else terms_shape if reduction == "none" else ()
    operands = {"x": x, "y": y}
    if out is not None:
        if results[0] is not None:
            _check_out(xp, results[0], "the value", shape, dtype)
        for name, result in zip(wanted, results[1:], strict=True):
            if result is not None:
                operand = operands[name]
                _check_out(xp, result, f"the gradient with respect to {name}", operand.shape, operand.dtype)
        given = [result for result in results if result is not None]
        check_overlap(given, [x, y] if weights is None else [x, y, weights])

    if task.output == TOTAL:
        task.out = results[0]
    else:
        task.value = xp.empty(shape, dtype) if results[0] is None else results[0]
        task.value_view = task.value
        if reduction == "none":
            task.value_view = _classes_last(xp, task.value.reshape(1) if scalar else task.value, last)
    for name, result in zip(wanted, results[1:], strict=True):
        operand = operands[name]
        array = xp.empty_like(operand) if result is None else result
        view = _classes_last(xp, array.reshape(1) if scalar else array, last)
        lead = len(batch) - (view.ndim - 1)
        view = view[(None,) * lead] if lead else view
        inner = () if view.shape[:-1] == batch else tuple(d for d in range(len(batch)) if view.shape[d] != batch[d])
        task.gradients.append(Gradient(name, array, view, inner))
    return task


def arrange_loss(
    xp: Any,
    asarray: Any,
    term: str,
    x: Any,
    y: Any,
    space: Any,
    axis: int,
    reduction: str,
    factors: Any,
    denominator: float,
    epsilon: float,
    dtype: str | None,
    return_grad: Any,
    out: Any = None,
) -> Task:
    """The same for the arguments of ``klcore.divergence.loss``: x and y broadcast over the classes as well."""
    operation, _ = coded(term, space, return_grad)
    x, y = asarray(x, "x"), asarray(y, "y")
    ndim = max(x.ndim, y.ndim)
    last = -1 if ndim == 0 else _axis(axis, ndim, False)
    operands = {"x": x, "y": y}
    if ndim:
        sizes = {a.shape[last] for a in (x, y) if a.ndim >= -last}
        n = max(sizes - {1}, default=1)
        x, y = (_over_classes(xp, a, last, n) for a in (x, y))
    weights = None
    if factors is not None:
        factors = asarray(factors, "factors")
        if factors.ndim == 0 or factors.ndim < -last or factors.shape[last] == 1:  # one factor a row
            weights = factors if factors.ndim < -last else xp.squeeze(factors, last)
            factors = None
    wanted = _wanted(return_grad, False)
    spread = [name for name in wanted if {"x": x, "y": y}[name].shape != operands[name].shape]
    outs = {} if out is None else dict(zip(("value", *wanted), out, strict=True))
    into = tuple(None if name in spread else a for name, a in outs.items()) or None
    task = arrange(
        xp, asarray, operation, x, y, space, last, reduction, weights, 1.0, return_grad, into,
        factors=factors, signed=True, dtype=dtype and xp.dtype(dtype),
    )  # fmt: skip
    task.denominator, task.epsilon = denominator, epsilon
    for g in task.gradients:
        if g.of in spread:
            g.spread, g.out = (last, operands[g.of]), outs.get(g.of)
    return task


def coded(operation: str, space: Any, return_grad: Any) -> tuple[int, tuple[int, int]]:
    """The codes of a public function, or a loss's term, and of its spaces."""
    spaces = space_pair(space, operation == "entropy")
    if operation in OPERATIONS:
        return OPERATIONS[operation], spaces
    code, pairs = LOSSES[operation]
    if spaces not in pairs:
        raise ValueError(f"the term of {operation!r} is not for the spaces {space!r}")
    if code == PUZZLELIB and return_grad not in (None, "y", ("y",)):
        raise ValueError(f"PuzzleLib's loss has a gradient with respect to y only; found return_grad={return_grad!r}")
    return code, spaces


def _over_classes(xp: Any, a: Any, last: int, n: int) -> Any:
    """`a`, broadcast along the class axis only; of 32 bits at least then: its gradient is summed, and rounded once."""
    shape = [1] * (-last - a.ndim) + list(a.shape)
    if shape[last] == 1:
        shape[last] = n
    if tuple(shape) == a.shape:
        return a
    return xp.broadcast_to(a.astype("float32") if a.dtype.itemsize == 2 else a, tuple(shape))


def arrange_gradient(
    xp: Any,
    asarray: Any,
    operation: str,
    x: Any,
    y: Any,
    space: Any,
    axis: int,
    reduction: str,
    weights: Any,
    temperature: float,
    cotangent: Any,
    return_grad: Any,
    denominator: float = 1.0,
    epsilon: float = 0.0,
    out: Any = None,
) -> Task:
    """The same for a product of cotangent and Jacobian: the gradients of sum(cotangent * value).

    `operation` is the name of a public function, or of a loss's term, and `weights` its factors then; `cotangent` is of
    the value's shape, any numbers. The task's own value means nothing. `out` is for the gradients alone.
    """
    out = None if out is None else (None, *out)
    total = reduction not in ("row", "none")
    if operation in LOSSES:
        factors = None if weights is None else _multiplier(asarray, weights, "factors")
        if not total:
            c = _multiplier(asarray, cotangent, "cotangent")
            c = xp.expand_dims(c, axis) if reduction == "row" and c.ndim else c
            factors = c if factors is None else c * factors
        task = arrange_loss(
            xp, asarray, operation, x, y, space, axis, "sum", factors, denominator, epsilon, None, return_grad, out
        )
    else:
        factors = None
        if reduction == "row":
            cotangent = _multiplier(asarray, cotangent, "cotangent")
            if weights is None:
                weights = cotangent
            else:
                weights = _multiplier(asarray, weights, "weights")
                with np.errstate(over="ignore", invalid="ignore"):
                    product = cotangent * weights
                weights = xp.where(weights == 0, 0, product)  # such a row yields 0, whatever the cotangent: inf as well
        elif reduction == "none":
            factors = cotangent
        task = arrange(
            xp, asarray, OPERATIONS[operation], x, y, space, axis, reduction if total else "sum", weights, temperature,
            return_grad, out, factors=factors, signed=reduction == "row",
        )  # fmt: skip
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
        raise TypeError(
            f"{name} has dtype {dtype}; klcore computes with {', '.join(FLOATS)}, and with integers and booleans as "
            "float64" + (f": pass {name}.astype(float)" if dtype.kind == "O" else "")
        )


def _refuse_kind(a: Any, name: str) -> None:
    """The same for those that are masked, sparse, or of a meaning that their numbers alone do not have."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, and klcore would ignore the mask; pass {name}.filled(value), or weights=0 for "
            "rows to leave out"
        )
    cls = type(a)
    dense = next((f"{name}.{method}()" for method in ("toarray", "todense") if hasattr(cls, method)), None)
    if dense is not None:
        raise TypeError(f"{name} is a sparse {cls.__name__}; klcore takes dense arrays: pass {dense}")
    if getattr(cls, "__array_ufunc__", _OWN) is not _OWN and not _is_known(cls):
        raise TypeError(
            f"{name} is of the type {_type_name(cls)}, to which NumPy's functions mean something of its own "
            f"(units, say), which klcore would ignore; pass the plain numbers, {_plain_numbers(a, name)}"
        )


def _type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _is_known(cls: type) -> bool:
    roots = {base.__module__.partition(".")[0] for base in cls.__mro__}
    return "cupy" in roots or not roots.isdisjoint(TABLES)


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
    try:
        lends = hasattr(a, "__dlpack__") and not hasattr(a, "__array__")
        found = np.from_dlpack(a) if lends else np.asarray(a)
    except Exception as error:  # of the container's own making
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name}, of the type {_type_name(cls)}, cannot be made a NumPy array: {error}") from error
    if found.dtype == object and not isinstance(a, np.ndarray):
        if not found.ndim and not isinstance(a, (int, np.generic)):
            raise TypeError(f"{name} is of the type {_type_name(cls)}, of which NumPy makes no array of numbers")
        if hasattr(cls, "iloc"):
            hint = f"select the columns of numbers, or pass {name}.to_numpy(dtype=float), where what is missing is NaN"
        else:
            hint = f"pass numpy.asarray({name}, dtype=float)"
        raise TypeError(
            f"{name}, of the type {_type_name(cls)}, becomes an array of dtype object, not one of {', '.join(FLOATS)}; "
            f"{hint}"
        )
    return found


def is_wide(operation: int, spaces: tuple[int, int], temperature: float = 1.0) -> bool:
    """Whether float32 is computed in float64: the terms of other systems from logits, in the order of their operations;
    and temperatures at which float32 has no room for a logarithm, for the temperature or for its inverse."""
    return 2 in spaces and (operation > ENTROPY or not 2.0**-20 <= temperature <= 2.0**100)


def result(task: Task, value: Any) -> Any:
    """What the caller gets: the value, or the value and the gradients in the order they were asked for."""
    if task.output != TOTAL and task.denominator != 1:
        if task.given:
            value /= task.denominator
        else:
            value = (value / task.denominator).astype(value.dtype, copy=False)
    return (value, *(_collected(g) for g in task.gradients)) if task.gradients else value


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


def words(
    space: Any, reduction: Any, temperature: Any, return_grad: Any, single: bool
) -> tuple[tuple[int, int], float, tuple[str, ...]]:
    """Those of a call, checked: the codes of both spaces, the temperature, the names of the gradients."""
    spaces = space_pair(space, single)
    temperature = _temperature(temperature, spaces)
    check_reduction(reduction)
    return spaces, temperature, _wanted(return_grad, single)


def shown(value: Any) -> str:
    """What was found, for a message: its repr, unless that is long, or fails, as that of a huge integer does."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def check_reduction(reduction: Any) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {_list(REDUCTIONS)}; found {shown(reduction)}")


def class_axis(x: Any, y: Any, axis: Any) -> int:
    """Counted from the end; x and y have the same number of classes along it."""
    shapes = tuple(x.shape), tuple(x.shape if y is None else y.shape)
    ndim = max(map(len, shapes))
    last = _axis(axis, ndim or 1, ndim == 0)
    xs, ys = (shape if ndim else (1,) for shape in shapes)
    if min(len(xs), len(ys)) < -last or xs[last] != ys[last]:
        raise ValueError(
            f"x and y must have the same number of classes along axis {axis}; found shapes {shapes[0]} and {shapes[1]}"
        )
    return last


def batches_differ(x: Any, y: Any, axis: Any) -> ValueError:
    """What to raise for batch shapes that do not broadcast."""
    return ValueError(
        f"x and y must have batch shapes (all axes but axis {axis}) that broadcast; found shapes {tuple(x.shape)} and "
        f"{tuple(y.shape)}"
    )


def space_pair(space: Any, single: bool) -> tuple[int, int]:
    """The codes of both arguments' spaces, or ValueError."""
    pair = (space, space) if isinstance(space, str) else space
    if single and not isinstance(space, str):
        raise ValueError(f"space must be one of {_list(SPACES)}; found {shown(space)}")
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(s, str) and s in SPACES for s in pair)
    ):
        raise ValueError(
            f"space must be one of {_list(SPACES)}, or a pair (space of x, space of y); found {shown(space)}"
        )
    return SPACES[pair[0]], SPACES[pair[1]]


def _temperature(temperature: Any, spaces: tuple[int, int]) -> float:
    try:
        t = float(temperature)
    except OverflowError:  # an integer that no float holds
        t = math.inf
    except (TypeError, ValueError):
        t = None
    if t is None or isinstance(temperature, (str, bytes)):
        raise TypeError(f"temperature must be a number, found {shown(temperature)} ({type(temperature).__name__})")
    if not (0 < t < math.inf and 1 / t < math.inf):
        raise ValueError(f"temperature must be positive and finite, found {shown(temperature)}")
    if t != 1 and 2 not in spaces:
        raise ValueError(f"temperature divides logits: it needs space='logits' for x or y; found temperature={t!r}")
    return t


def _wanted(return_grad: Any, single: bool) -> tuple[str, ...]:
    key = tuple(return_grad) if isinstance(return_grad, list) else return_grad
    known = (None, "x") if single else (None, "x", "y", ("x", "y"))
    try:
        wanted = GRADIENTS[key]
    except (KeyError, TypeError):
        wanted = ("y",) if single else ("?",)
    if wanted == ("?",) or (single and "y" in wanted):
        raise ValueError(f"return_grad must be one of {_list(known)}; found {shown(return_grad)}")
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
        raise TypeError(f"{name} must be an integer, found {type(axis).__name__}") from None


def _classes_last(xp: Any, a: Any, last: int) -> Any:
    return a if last == -1 else xp.moveaxis(a, last, -1)


def broadcast_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which two broadcast, or ValueError. NumPy's own function knows 32 dimensions, its arrays have 64."""
    ndim = max(len(a), len(b))
    shape = []
    for m, n in zip((1,) * (ndim - len(a)) + tuple(a), (1,) * (ndim - len(b)) + tuple(b), strict=True):
        if m != n and m != 1 and n != 1:
            raise ValueError(f"{a} and {b} do not broadcast")
        shape.append(n if m == 1 else m)
    return tuple(shape)


def _broadcast(xp: Any, a: Any, shape: tuple[int, ...]) -> Any:
    return a if a.shape == shape else xp.broadcast_to(a, shape)


def _insert(batch: tuple[int, ...], position: int, n: int) -> tuple[int, ...]:
    return (*batch[:position], n, *batch[position:])


def _multiplier(asarray: Any, a: Any, name: str) -> Any:
    """Factors, a cotangent, or weights to multiply it with, of a dtype that kernels read them in."""
    a = asarray(a, name)
    if a.dtype.kind in "iub":
        return a.astype("float64")
    return a.astype("float32") if a.dtype.itemsize < 4 else a


def _weights(xp: Any, asarray: Any, weights: Any, batch: tuple[int, ...], signed: bool) -> Any:
    if weights is None:
        return None
    w = asarray(weights, "weights")
    try:
        view = xp.broadcast_to(w, batch)
    except ValueError:
        raise ValueError(f"weights of shape {w.shape} do not broadcast to the batch shape {batch}") from None
    if signed:
        return view
    # On a GPU they are not looked at, which would mean to wait for it: a bad weight makes its row NaN there.
    host = next((a for a in (w, weights) if not hasattr(a, "__cuda_array_interface__")), None)
    if host is not None and w.size and not (np.min(host) >= 0 and np.max(host) < math.inf):  # NaN fails both
        raise ValueError("weights must be finite and >= 0; found a negative, infinite or NaN weight")
    return view


def _denominator(reduction: str, shape: tuple[int, ...], rows: int, n: int, weights: Any) -> float | None:
    if reduction == "rowmean":
        return float(rows) if weights is None else None
    if reduction == "batchmean":
        return float(shape[0]) if shape else 1.0
    return float(rows * n) if reduction == "mean" else 1.0


# A mean does not depend on a common factor of weight and denominator: far from the ends of the range nothing overflows,
# and nothing is rounded.
WEIGHT_FACTORS = (1.0, 2.0**-600, 2.0**600)


def weight_factor(total: float) -> float:
    """Of weights with this sum."""
    return WEIGHT_FACTORS[1 if total > 2.0**500 else 2 if 0 < total < 2.0**-500 else 0]


def scaled_weights(weights: Any, factor: float) -> Any:
    """Times a power of two; a row that counts goes on to do so, however small its weight is."""
    scaled = weights * factor
    return np.where((scaled == 0) & (weights != 0), 2.0**-1074, scaled)


def results_in(out: Any, wanted: tuple[str, ...]) -> tuple[Any, ...]:
    """Where the value and the gradients go; None for those to allocate."""
    results = out if isinstance(out, tuple) else (out, *[None] * len(wanted))
    if len(results) != 1 + len(wanted):
        raise ValueError(
            f"out must be an array for the value, or a tuple of {1 + len(wanted)} (value, then gradients; None to "
            f"allocate); found a tuple of {len(results)}"
        )
    return results


def _check_out(xp: Any, out: Any, what: str, shape: tuple[int, ...], dtype: Any) -> None:
    if not isinstance(out, xp.ndarray) or hasattr(out, "mask"):
        raise TypeError(f"out for {what} must be a {xp.__name__}.ndarray, found {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out for {what} must have the shape {shape}, found {out.shape}")
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


def check_overlap(outs: list[Any], inputs: list[Any]) -> None:
    """Raise ValueError if results would be written over an input, or over each other."""
    for i, out in enumerate(outs):
        if any(_overlap(out, a) for a in inputs):
            raise ValueError("out overlaps the memory of an input; pass an array of its own")
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
