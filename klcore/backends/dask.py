"""Dask arrays: lazy in, lazy out; every block is computed by backends/cpu.py or cuda/, where it lies.

Arguments are checked at once, by rows.py, on arrays that have a shape and no memory. The rest is lazy:

* If the class axis is in one chunk, each block is computed by itself, with the same bits as the whole array. So are
  calls with a list of classes, where the class axis of y must be in one chunk.
* If the class axis is in several chunks, the kernels sweep over a row block by block. A block leaves one state for
  every 1024 of its classes; the states are merged into the statistics of the rows, and the outputs of a block follow
  from these (src/kl_partial.h).
* Totals are float64 sums of 1024 rows each, which are added up in the order of the blocks when all are there.

Which worker computes what, and when, never changes a bit. How the arrays are chunked can: see docs/dask.md.
"""

import importlib
import itertools
import math
import operator
import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import dask.array as da
import numpy as np
from dask import delayed
from dask.array.utils import meta_from_array

from klcore.backends import arguments, cpu, labels, options, rows, sparse
from klcore.backends.threads import threads
from klcore.operations import Call

# ---- arguments -------------------------------------------------------------------------------------------------------

# An array library for rows.py, whose arrays have a shape and a dtype, but no memory.
_SHAPES = SimpleNamespace(
    broadcast_to=np.broadcast_to,
    dtype=np.dtype,
    empty=lambda shape, dtype: np.broadcast_to(np.zeros((), dtype), shape),
    empty_like=lambda a: a,
    minimum=np.minimum,
    moveaxis=np.moveaxis,
)
_LISTED = -1  # the label of the class axis of x and indices, if it is not that of y


def _array(a: Any, name: str) -> Any:
    """`a` as a Dask array of a dtype that klcore supports."""
    if isinstance(a, da.Array):
        if _library(a) not in ("numpy", "cupy"):
            raise TypeError(
                f"{name} is a dask array with chunks of type {type(a._meta).__module__}.{type(a._meta).__qualname__}, "
                f"but klcore takes chunks of numpy or cupy; convert them with {name}.map_blocks"
            )
        arguments.refuse(a._meta, name)
    elif type(a).__module__.partition(".")[0] == "dask":
        raise TypeError(
            f"{name} is a {type(a).__module__}.{type(a).__qualname__}, but klcore takes dask arrays; make one with "
            "DataFrame.to_dask_array(lengths=True), dask.array.from_delayed or dask.array.from_array"
        )
    else:
        of = type(a).__module__.partition(".")[0]
        lazy = hasattr(a, "__dask_graph__") and a.__dask_graph__() is not None  # NumPy would compute it right here
        if lazy or (hasattr(type(a), "__dlpack__") and of not in ("numpy", "cupy")):
            library, plain = of.replace("jaxlib", "jax"), f"{name}.data" if lazy else f"numpy.asarray({name})"
            raise TypeError(
                f"{name} is a {library} array, which cannot be combined with dask arrays; pass an array of dask, NumPy "
                f"or CuPy, for example {plain}"
            )
        a = a if of == "cupy" else arguments.as_numpy(a, name)  # CuPy arrays stay where they are
        arguments.refuse(a, name)
        a = da.from_array(a, chunks=-1)
    return a.astype(np.float64) if a.dtype.kind in "iub" and name != "indices" else a


def _library(a: Any) -> str:
    """The library of a Dask array's chunks."""
    return type(a._meta).__module__.partition(".")[0]


def _like(a: Any, b: Any) -> Any:
    """`a`, with its chunks moved to the library of those of `b`."""
    if _library(b) == "numpy":
        return a
    meta = meta_from_array(b._meta, a.ndim, a.dtype)
    return a.map_blocks(importlib.import_module("cupy").asarray, dtype=a.dtype, meta=meta)


def _stand_in(a: Any, name: str, sizes: list[Any]) -> Any:
    """An array without memory in place of a Dask array; unknown sizes come from `sizes`. All ones, which pass every
    check, but zeros for weights and indices, so that no row is checked."""
    shape = tuple(sizes[k - a.ndim] if math.isnan(n) else n for k, n in enumerate(a.shape))
    dtype = np.int64 if a.dtype.kind in "iu" else a.dtype.newbyteorder("=")
    return np.broadcast_to(np.array(name not in ("weights", "indices"), dtype), shape)


def _axes(of_classes: dict[str, Any], by_row: dict[str, Any], axis: int) -> list[tuple[str, Any, tuple[int, ...]]]:
    """The operands, each with its axes in the broadcast shape. `by_row`: those with one number per row."""
    whole = tuple(range(_ndim(of_classes)))
    classes = axis % max(len(whole), 1)
    batch = tuple(d for d in whole if d != classes)
    listed = tuple(_LISTED if d == classes else d for d in whole) if "indices" in of_classes else whole
    axes = {"x": listed, "indices": listed, "y": whole} | dict.fromkeys(by_row, batch)
    return [(name, a, axes[name][len(axes[name]) - a.ndim :]) for name, a in (of_classes | by_row).items()]


def _ndim(of_classes: dict[str, Any]) -> int:
    return max(a.ndim for a in of_classes.values())


def _arrange(call: Call, of_classes: dict[str, Any], by_row: dict[str, Any], given: dict[str, Any]) -> rows.Task:
    """The call as rows.py sees it, with all its errors; `given`: the arguments as the caller gave them."""
    axis, reduction, ndim = call.axis, call.reduction, _ndim(of_classes)
    # along the axes of the broadcast shape; for an unknown size, anything except 1 will do
    sizes = [
        max((a.shape[d] for a in of_classes.values() if a.ndim >= -d and a.shape[d] > 1), default=2)
        for d in range(-ndim, 0)
    ]
    unknown = any(math.isnan(n) for a in (of_classes | by_row).values() for n in a.shape)

    def asarray(a: Any, name: str) -> Any:
        if name in ("x", "y"):
            return _stand_in(a, name, sizes)
        if name in by_row and unknown and a.ndim < ndim:
            _check_sizes(_axes(of_classes, {name: a}, axis), axis % ndim, reduction)
        if isinstance(given[name], da.Array) or hasattr(given[name], "__cuda_array_interface__"):
            of_axes = sizes if name == "indices" else [n for d, n in enumerate(sizes) if d != axis % ndim]
            return _stand_in(a, name, of_axes)
        return np.asarray(given[name], a.dtype.newbyteorder("="))  # its values are checked

    arrange = rows.arrange if call.indices is None else sparse.outcome
    task = arrange(_SHAPES, asarray, call._replace(**of_classes, **by_row))
    if unknown:
        _check_sizes(_axes(of_classes, by_row, axis), axis % ndim, reduction)
    return task


def _check_whole(of_classes: dict[str, Any], axis: int) -> None:
    """Raise ValueError if the classes are in several chunks."""
    for name, a in of_classes.items():
        if a.numblocks[axis] > 1:
            raise ValueError(
                f"{name} has its classes in {a.numblocks[axis]} chunks, but with indices every block must hold whole "
                f"rows; pass {name}.rechunk({{{axis}: -1}})"
            )


def _check_sizes(operands: list[tuple[str, Any, tuple[int, ...]]], classes: int, reduction: str) -> None:
    """Raise ValueError for an unknown size that must be known."""
    for name, a, axes in operands:
        for k in range(a.ndim):
            if not math.isnan(a.shape[k]):
                continue
            others = [b.shape[of_b.index(axes[k])] for _, b, of_b in operands if axes[k] in of_b]
            if axes[k] in (classes, _LISTED):
                what = "the number of classes must be known"
            elif any(n > 1 for n in others):
                what = "the size of another argument is known, which might not match"
            elif reduction in ("rowmean", "batchmean", "mean"):
                what = f"reduction={reduction!r} divides by it"
            else:
                continue
            raise ValueError(
                f"{name} has an unknown size along axis {k} (chunks {a.chunks[k]}), and {what}; call "
                f"{name}.compute_chunk_sizes() first"
            )


# ---- computing blocks, called by Dask's workers ----------------------------------------------------------------------


def _threads() -> Any:
    """One thread per block in the threads of Dask's schedulers and workers, which run several blocks at a time."""
    alone = threading.current_thread() is threading.main_thread()
    return nullcontext() if alone else threads(1)


def _backend(a: Any) -> Any:
    """The backend of a block."""
    return importlib.import_module("klcore.backends.cuda") if hasattr(a, "__cuda_array_interface__") else cpu


def _of_block(call: Call, x: Any, y: Any, weights: Any, temperature: Any, **listed: Any) -> Call:
    temperature = call.temperature if temperature is None else temperature
    return call._replace(x=x, y=y, weights=weights, temperature=temperature, **listed)


def _rows(
    x: Any, y: Any, weights: Any, temperature: Any, indices: Any, tail_mass: Any, denominator: Any, call: Call,
    totals: bool, shared: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """A block of whole rows: the value, or the sums of 1024 rows each, and the gradients."""
    with _threads():
        call = _of_block(call, x, y, weights, temperature, indices=indices, tail_mass=tail_mass)
        value, *gradients = _backend(x).block(call, float(denominator), shared)
    return cpu.chunk_sums(_host(value)) if totals else value, *gradients


def _states(x: Any, y: Any, weights: Any, temperature: Any, stats: Any, call: Call, number: int) -> Any:
    with _threads():
        return _backend(x).states(_of_block(call, x, y, weights, temperature), number, stats)


def _merge(states: Any, weights: Any, temperature: Any, stats: Any, number: int, words: dict[str, Any]) -> Any:
    by_row = {"weights": weights} | ({} if temperature is None else {"temperature": temperature})
    with _threads():
        return _backend(states).merge(SimpleNamespace(**words | by_row), number, states, stats)


def _outputs(
    x: Any, y: Any, weights: Any, temperature: Any, stats: Any, denominator: Any, call: Call, number: int, shared: Any
) -> tuple[Any, ...]:
    with _threads():
        block = _of_block(call, x, y, weights, temperature)
        return _backend(x).outputs(block, number, stats, float(denominator), shared)


def _matching(function: Any, alike: tuple[Any, ...], *blocks: Any, **more: Any) -> Any:
    """Call the function with blocks whose sizes were unknown so far; `alike` says which sizes must be equal."""
    for sides in alike:
        sizes = [blocks[block].shape[k] for _, block, k in sides]
        if len(set(sizes)) > 1:
            found = ", ".join(
                f"{name} of size {n} along axis {k}" for (name, _, k), n in zip(sides, sizes, strict=True)
            )
            raise ValueError(
                f"chunks of unknown sizes must match, block by block; found {found}. "
                "Call compute_chunk_sizes() on each argument first, and klcore can compare and rechunk the arrays"
            )
    return function(*blocks, **more)


def _checked(temperature: Any, double: bool) -> Any:
    """Check a 0-d temperature: blocks would take it for a number, and might compute float32 in double."""
    options.check_temperatures(_host(temperature), None, double)
    return temperature


def _factor(total: Any) -> Any:
    return np.float64(rows.weight_factor(float(total)))


def _pick(packed: Any, k: int) -> Any:
    """Result k of a block; along axes that the result does not have, there is only one block."""
    while isinstance(packed, list):
        packed = packed[0]
    return packed[k]


def _value(stats: Any, dtype: Any) -> Any:
    return _round(stats[..., 0], dtype)


def _sums(values: Any) -> Any:
    return cpu.chunk_sums(_host(values))


def _sums_of_stats(stats: Any) -> Any:
    return cpu.chunk_sums(_host(stats[..., 0]))


def _total(sums: Any, denominator: Any, dtype: Any, library: str) -> Any:
    """Add up the sums of all blocks, which come in lists nested in C order, and divide."""
    parts: list[Any] = []

    def gather(nested: Any) -> None:
        if isinstance(nested, list):
            for part in nested:
                gather(part)
        else:
            parts.append(nested)

    gather(sums)
    total, denominator = cpu.add_up(np.concatenate(parts)), float(denominator)
    value = _round(np.float64(total / denominator if denominator else np.nan), dtype)
    return value if library == "numpy" else importlib.import_module(library).asarray(value)


def _add(a: Any, axis: Any, keepdims: bool) -> Any:
    with np.errstate(all="ignore"):  # infinities of both signs
        return a.sum(axis=axis, keepdims=keepdims)


def _round(a: Any, dtype: Any) -> Any:
    with np.errstate(all="ignore"):  # a finite float64 can be infinite as float32
        return a.astype(dtype)


def _host(a: Any) -> Any:
    return a.get() if hasattr(a, "__cuda_array_interface__") else a


# ---- the graph -------------------------------------------------------------------------------------------------------


# the operands of a block, in the order of the functions' parameters
_READ = ("x", "y", "weights", "temperature")
_ARGUMENTS = (*_READ, "indices", "tail_mass")


class _Graph:
    """The layers of one call. The labels of axes are numbers: the axes of the broadcast shape, and two more."""

    def __init__(self, task: rows.Task, of_classes: dict[str, Any], by_row: dict[str, Any], axis: int) -> None:
        self.task, self.axis = task, axis
        self.chunk_library = _library(of_classes["x"])
        self._unify(of_classes, by_row)
        ndim = _ndim(of_classes)
        self.all = tuple(range(ndim))
        self.classes = axis % ndim
        self.batch = tuple(d for d in self.all if d != self.classes)
        self.states, self.stats = ndim, ndim + 1

    def _unify(self, of_classes: dict[str, Any], by_row: dict[str, Any]) -> None:
        """Give all operands the same chunks."""
        operands = _axes(of_classes, by_row, self.axis)
        self.chunks, unified = da.unify_chunks(*(word for _, a, axes in operands for word in (a, axes)))
        self.arrays = {name: a for (name, _, _), a in zip(operands, unified, strict=True)}
        self.axes = {name: axes for name, _, axes in operands}

    def operands(self, *names: str) -> list[tuple[Any, Any]]:
        """Arguments of :meth:`layer`; None for an operand that is absent."""
        return [(self.arrays.get(name), self.axes.get(name)) for name in names]

    def layer(self, function: Any, out: tuple[int, ...], *pairs: tuple[Any, Any], dtype: Any, **more: Any) -> Any:
        """One task per block; arguments are pairs of an array and its axes, or of a constant and None."""
        like = np.empty(0) if np.dtype(dtype) == object else self.arrays["x"]._meta
        arguments = [word for pair in pairs for word in pair]
        if alike := self._alike(pairs):
            function = partial(_matching, function, alike)
        return da.blockwise(function, out, *arguments, dtype=dtype, meta=meta_from_array(like, len(out), dtype), **more)

    def _alike(self, pairs: tuple[tuple[Any, Any], ...]) -> tuple[tuple[tuple[str, int, int], ...], ...]:
        """For each axis along which several operands have an unknown size: their names, positions and axes."""
        names = {id(a): name for name, a in self.arrays.items()}
        sides = [
            [(names[id(a)], at, axes.index(d)) for at, (a, axes) in enumerate(pairs)
             if id(a) in names and d in axes and math.isnan(a.shape[axes.index(d)])]
            for d in self.batch
        ]  # fmt: skip
        return tuple(tuple(side) for side in sides if len(side) > 1)

    def sums(
        self, function: Any, *pairs: tuple[Any, Any], over: tuple[int, ...] | None = None, **more: Any
    ) -> tuple[Any, Any]:
        """Sums over the batch axes, or some of them: one vector per block, as an argument of :meth:`layer`."""
        over = self.batch if over is None else over
        adjust = dict.fromkeys(over, 1)
        return self.layer(function, over, *pairs, dtype=object, adjust_chunks=adjust, **more), over

    def sum_of_weights(self) -> Any:
        """The sum over all rows; if their number is unknown, over the weights as given, enough to find their range."""
        w, axes = self.arrays["weights"], self.axes["weights"]
        chunks = tuple(self.chunks[d] for d in self.batch)
        shape = tuple(map(sum, chunks))
        if not any(map(math.isnan, shape)):
            w, axes = da.broadcast_to(w, shape, chunks=chunks), self.batch
        wide = np.dtype(np.float64)
        sums = self.sums(_sums, (w, axes), over=axes)
        return self.layer(_total, (), sums, (1.0, None), (wide, None), ("numpy", None), dtype=wide)

    def move_weights(self) -> Any:
        """Move very large or small weights to the middle of the range; returns the factor, a 0-d array."""
        w, axes = self.arrays["weights"], self.axes["weights"]
        factor = self.layer(_factor, (), (self.sum_of_weights(), ()), dtype=np.float64)
        self.arrays["weights"] = da.blockwise(
            rows.scaled_weights, axes, w, axes, factor, (), dtype=w.dtype, meta=w._meta
        )
        return factor

    def classes_of(self, a: Any) -> dict[int, int]:
        """The number of classes of an array whose chunks are not those of y."""
        return {self.classes: a.shape[self.classes - len(self.all)]} if "indices" in self.arrays else {}

    def gradient(self, packed: Any, k: int, g: rows.Gradient) -> Any:
        """Result k of packed blocks: a gradient, or the parts of one that are summed over blocks."""
        operand = self.arrays[g.of]
        pick = ((packed, self.all), (k, None))
        listed = self.classes_of(operand)
        if not g.inner:
            axes = tuple(self.classes if d == _LISTED else d for d in self.axes[g.of])
            return self.layer(_pick, axes, *pick, dtype=g.array.dtype, adjust_chunks=listed)
        inner = tuple(self.batch[d] for d in g.inner)
        adjust = dict.fromkeys(inner, 1) | listed
        parts = self.layer(_pick, (*self.batch, self.classes), *pick, dtype=np.float64, adjust_chunks=adjust)
        meta = meta_from_array(operand._meta, parts.ndim, np.float64)
        whole = da.reduction(parts, _add, _add, axis=g.inner, keepdims=True, dtype=np.float64, meta=meta)
        whole = da.moveaxis(whole, -1, self.classes)[(0,) * (len(self.all) - operand.ndim)]
        return whole.map_blocks(_round, g.array.dtype, dtype=g.array.dtype, meta=operand._meta)


def compute(call: Call) -> Any:
    if call.operation.is_loss:
        raise TypeError(
            "klcore.compat takes arrays of NumPy, CuPy, PyTorch and JAX, but not of dask; map its functions over the "
            "chunks with dask.array.map_blocks, or use klcore.kl_div"
        )
    if call.operation.is_estimator:
        raise TypeError(
            "klcore.kl_estimate takes arrays of NumPy, CuPy, PyTorch and JAX, but not of dask; map it over the chunks, "
            "dask.array.map_blocks(klcore.kl_estimate, log_x, log_y, dtype='float32'), and let dask sum the result"
        )
    if call.out is not None:
        raise TypeError(
            "out= is not supported with dask arrays, which have no memory to write to yet; use the result, or "
            "dask.array.store"
        )
    if call.device is not None:
        raise ValueError(
            f"device={call.device!r}, but the chunks of dask arrays are computed where they are; move them first, for "
            "example with x.map_blocks(cupy.asarray)"
        )
    given = {name: getattr(call, name) for name in _ARGUMENTS}
    if not options.has_numbers(call.temperature):
        del given["temperature"]
    arrays = {name: _array(a, name) for name, a in given.items() if a is not None}
    like = next(arrays[name] for name in ("x", "y") if isinstance(given[name], da.Array))
    of_classes = {  # a list is moved to the library of the other's chunks
        name: a if isinstance(given[name], da.Array) else _like(a, like)
        for name, a in arrays.items()
        if name in ("x", "y", "indices")
    }
    by_row = {name: a for name, a in arrays.items() if name not in of_classes}
    if len({_library(a) for a in of_classes.values()}) > 1:
        found = " and ".join(f"{name} of {_library(a)}" for name, a in of_classes.items())
        raise TypeError(
            f"all chunks must be of one library, found {found}; move them, for example with x.map_blocks(cupy.asarray)"
        )
    options.check_reduction(call.reduction, call.operation)
    options.check_denominator(call)
    divisor = call.denominator if isinstance(call.denominator, da.Array) else None
    if divisor is not None:
        call = call._replace(denominator=None)
    task = _arrange(call, of_classes, by_row, given)
    task.divisor = divisor
    axis = operator.index(call.axis)
    last = axis if axis < 0 else axis - _ndim(of_classes)
    if labels.are_there(*given.values()):
        labels.check(last, **given)
    if "indices" in of_classes:
        _check_whole(of_classes, last)
    scalar = task.x.ndim == 1 and all(a.ndim == 0 for a in of_classes.values())
    if scalar:  # 0-d arrays: one class
        of_classes = {name: a.reshape(1) for name, a in of_classes.items()}
    if "temperature" in by_row and by_row["temperature"].ndim == 0:
        double = any(a.dtype.itemsize == 8 for name, a in of_classes.items() if name in ("x", "y"))
        by_row["temperature"] = by_row["temperature"].map_blocks(_checked, double, dtype=by_row["temperature"].dtype)
    graph = _Graph(task, of_classes, by_row, axis)
    denominator = task.denominator if divisor is None else divisor
    if task.by_weights:
        factor = graph.move_weights() if task.weights.dtype.itemsize == 8 else 1.0
        denominator = graph.sum_of_weights() if denominator is None else denominator * factor
    scale = (denominator, () if isinstance(denominator, da.Array) else None)
    by = _by_rows if len(graph.chunks[graph.classes]) == 1 else _by_parts
    last = graph.classes - len(graph.all)
    # the call of a block, without arrays, and with Python numbers, so that equal calls have equal Dask keys
    block = call._replace(
        x=None,
        y=None,
        weights=None,
        indices=None,
        tail_mass=None,
        axis=last,
        temperature=1.0 if "temperature" in by_row else task.temperature,
        return_grad=_wanted(task),
        denominator=None,
    )
    value, gradients = by(graph, block, scale)
    if task.output == rows.TOTAL:  # `value` holds sums so far
        dtype = task.scalar_dtype
        value = graph.layer(_total, (), value, scale, (dtype, None), (graph.chunk_library, None), dtype=dtype)
    if scalar:
        value, *gradients = (a.reshape(()) for a in (value, *gradients))
    return (value, *gradients) if gradients else value


def _by_rows(graph: _Graph, call: Call, scale: Any) -> tuple[Any, list[Any]]:
    """The value, or sums of rows, and the gradients, if the class axis is in one chunk."""
    task, totals = graph.task, graph.task.output == rows.TOTAL
    block = call._replace(reduction="row", dtype="float64") if totals else call
    packed = graph.layer(
        _rows, graph.all, *graph.operands(*_ARGUMENTS), scale, dtype=object, concatenate=True, call=block,
        totals=totals, shared=_shared(task),
    )  # fmt: skip
    first = (packed, graph.all), (0, None)
    if totals:
        value = graph.sums(_pick, *first)
    else:
        axes, terms = (graph.all, graph.classes_of(task.value)) if call.reduction == "none" else (graph.batch, {})
        value = graph.layer(_pick, axes, *first, dtype=task.scalar_dtype, adjust_chunks=terms)
    return value, [graph.gradient(packed, k, g) for k, g in enumerate(task.gradients, 1)]


def _by_parts(graph: _Graph, call: Call, scale: Any) -> tuple[Any, list[Any]]:
    """The value, or sums of rows, and the gradients, if the class axis is in several chunks."""
    task, operation = graph.task, call.operation
    operands = graph.operands(*_READ)
    of_stats, of_states = (*graph.batch, graph.stats), (*graph.batch, graph.states, graph.classes)
    stats: list[tuple[Any, Any]] = [(None, None)]  # before each sweep, and after the last one that the value needs
    by_row = call._replace(reduction="row")
    words = {name: getattr(task, name) for name in ("operation", "spaces", "wide", "parameter", "factor")}
    words["temperature"] = call.temperature
    for number, size in enumerate(cpu.sweeps(operation, task.spaces)):
        states = graph.layer(
            _states, of_states, *operands, stats[-1], dtype=np.float64, number=number, call=by_row, concatenate=True,
            new_axes={graph.states: size}, adjust_chunks={graph.classes: cpu.chunks},
        )  # fmt: skip
        merged = graph.layer(
            _merge, of_stats, (states, of_states), *operands[2:], stats[-1], dtype=np.float64, concatenate=True,
            number=number, words=words, new_axes={graph.stats: cpu.STATS},
        )  # fmt: skip
        stats.append((merged, of_stats))

    def outputs(block: Call, terms: bool, shared: tuple[str, ...]) -> Any:
        """What the last of the sweeps that these outputs need writes."""
        number = len(cpu.sweeps(operation, task.spaces, terms, not terms)) - 1
        return graph.layer(
            _outputs, graph.all, *operands, stats[number], scale, dtype=object, number=number, call=block,
            concatenate=True, shared=shared,
        )  # fmt: skip

    value: Any
    if call.reduction == "none":
        packed = outputs(call._replace(return_grad=None), True, ())
        value = graph.layer(_pick, graph.all, (packed, graph.all), (0, None), dtype=task.scalar_dtype)
    elif task.output == rows.TOTAL:
        value = graph.sums(_sums_of_stats, stats[-1], concatenate=True)
    else:
        dtype = task.scalar_dtype
        value = graph.layer(_value, graph.batch, stats[-1], (dtype, None), dtype=dtype, concatenate=True)
    if not task.gradients:
        return value, []
    packed = outputs(by_row, False, _shared(task))
    return value, [graph.gradient(packed, k, g) for k, g in enumerate(task.gradients)]


def _wanted(task: rows.Task) -> tuple[str, ...] | None:
    return tuple(g.of for g in task.gradients) or None


def _shared(task: rows.Task) -> tuple[str, ...]:
    return tuple(g.of for g in task.gradients if g.inner)


# ---- summaries -------------------------------------------------------------------------------------------------------

_BRANCHES = 8  # how many summaries are merged at a time


def reduced(values: Any, beside: dict[str, Any], leaf: Any, join: Any) -> Any:
    """Reduce `values` in a tree: a dask.delayed.Delayed.

    ``leaf(chunk, *beside, origin=, shape=)`` gets a chunk of `values`, the corresponding parts of the other arrays (or
    None), and the position of the chunk; ``join`` gets a list of results of ``leaf`` or ``join``.
    """
    values = _array(values, "values")
    if any(math.isnan(n) for n in values.shape):
        raise ValueError(
            "values has chunks of unknown sizes, which positions depend on; call compute_chunk_sizes() first"
        )
    arrays: list[Any] = [values]
    for name, a in beside.items():
        if a is not None:
            a = a if isinstance(a, da.Array) else da.from_array(arguments.as_numpy(a, name), chunks=-1)
            try:
                a = da.broadcast_to(a, values.shape).rechunk(values.chunks)
            except ValueError:
                raise ValueError(
                    f"{name} of shape {a.shape} do not broadcast to the shape of values, {values.shape}"
                ) from None
        arrays.append(a)
    parts = [None if a is None else a.to_delayed().ravel() for a in arrays]
    origins = itertools.product(*([0, *itertools.accumulate(sizes[:-1])] for sizes in values.chunks))
    level = [
        delayed(leaf)(*(None if p is None else p[k] for p in parts), origin=origin, shape=values.shape)
        for k, origin in enumerate(origins)
    ]
    while len(level) > 1:
        level = [delayed(join)(level[k : k + _BRANCHES]) for k in range(0, len(level), _BRANCHES)]
    return level[0]
