"""CuPy arrays on NVIDIA GPUs: arguments arranged by rows.py, kernels of src/kl_cuda.cu planned and launched here.

A call becomes a few launches on the caller's current stream. All of them, and their working memory, are prepared before
the first one starts. So nothing synchronises with the GPU, and what fails, fails before anything is written. Which
launches there are, and how they group numbers, depends only on the shapes; how many blocks run them never changes a
bit.

Launches are prepared without the addresses of the arrays, and cached. The next call with the same options, shapes,
strides and dtypes only fills in its addresses.

This file has the main path of a call. Each of the other files imports only those before it: nvrtc.py, devices.py,
kernels.py, plans.py, launches.py, preparation.py, parts.py, listed.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from klcore.backends import destinations, options, rows, sparse
from klcore.backends.cuda import devices, kernels, parts
from klcore.backends.cuda.devices import missing, on_stream, ready
from klcore.backends.cuda.launches import CHUNK, MAX_STATS, Launch
from klcore.backends.cuda.listed import Listed
from klcore.backends.cuda.plans import READ
from klcore.backends.cuda.preparation import Prepared, prepare
from klcore.operations import Call

__all__ = ["arrange", "block", "compute", "merge", "missing", "on_stream", "outputs", "ready", "states"]

_CHECKED = 4  # out= must not overlap this many of the first arrays of READ
_MOST_KEPT = 1024  # prepared calls, of 2.4 KB per launch
_kept: dict[Any, Prepared] = {}  # the cache, with keys from _key


def _key(cupy: Any, words: tuple[Any, ...], arrays: tuple[Any, ...]) -> Any:
    """The cache key: everything about a call except addresses. None for a call that cannot be cached."""
    key: list[Any] = [words]
    for a in arrays:
        if a is None:
            key.append(None)
        elif type(a) is cupy.ndarray:
            key.append((a.shape, a.strides, a.dtype, a.data.device_id))
        else:
            return None
    return tuple(key)


# Values that are equal must mean the same, now and later: 1.0 == 1 but is not a valid axis, and objects are mutable.
_WORDS_OF = frozenset((str, int, float, tuple, type(None)))


def _integer(axis: Any) -> Any:
    try:
        return options.integer(axis, "axis")
    except TypeError:
        return axis  # rows.py will raise


def _number(temperature: Any) -> Any:
    try:
        numbers = options.has_numbers(temperature) or not hasattr(temperature, "__float__")
        return temperature if numbers else float(temperature)
    except (TypeError, ValueError, OverflowError):
        return temperature


def compute(call: Call) -> Any:
    """The value, or (value, *gradients); with a cotangent, only the gradients."""
    cupy = ready()
    if call.indices is not None:
        return _of_listed(cupy, call, compute)
    total = call.cotangent is not None and call.reduction not in ("row", "none")
    weights = devices.as_read(cupy, call.weights)
    divisor = None
    if hasattr(call.denominator, "__cuda_array_interface__"):
        options.check_denominator(call)
        divisor = _divisor(cupy, call.denominator)
        call = call._replace(denominator=None)
    cotangent = devices.as_read(cupy, call.cotangent, devices.FLOAT64 if total else None)
    number, temperatures = _number(call.temperature), None
    if options.has_numbers(number):
        number, temperatures = None, devices.as_read(cupy, number, name="temperature")
    call = call._replace(
        weights=weights, cotangent=cotangent, axis=_integer(call.axis),
        temperature=number if temperatures is None else temperatures,
    )  # fmt: skip
    # the arrays that kernels read, in the order of READ
    read: tuple[Any, ...] = (call.x, call.y, weights, temperatures, None, cotangent, divisor, None)
    if cotangent is not None and weights is None and not total:  # the cotangent multiplies each row, or each term
        by_row = call.reduction == "row"
        read = (call.x, call.y, cotangent, temperatures, None, None, None, None)
        read = read if by_row else (call.x, call.y, None, temperatures, cotangent, None, None, None)
    elif call.operation.is_loss:
        read = (call.x, call.y, None, None, weights, cotangent, None, None)
    words = (
        call.operation.code, call.space, call.axis, call.reduction, number, call.return_grad, call.denominator,
        call.parameter, call.factor, call.dtype,
    )  # fmt: skip
    out = call.out if cotangent is None or call.out is None else (None, *call.out)
    given = out if isinstance(out, tuple) else (out,)
    types = tuple(map(type, words))
    key = None
    if _WORDS_OF.issuperset(types) and call.ratio is None:  # the product of ratio and weights is a new array each time
        key = _key(cupy, (call.device, given is out, cotangent is None, words, types), (*read, *given))
    try:
        prepared = _kept.get(key)
    except TypeError:  # a tuple with an unhashable element
        key = prepared = None
    if prepared is not None:
        if cupy.cuda.runtime.getDevice() == prepared.device:
            return _again(cupy, prepared, read, given, cotangent is None)
        with cupy.cuda.Device(prepared.device):
            return _again(cupy, prepared, read, given, cotangent is None)

    device = devices.choose(cupy, call.device, {**dict(zip(READ, read, strict=True)), "ratio": call.ratio}, given)
    with cupy.cuda.Device(device):
        task = rows.arrange(cupy, partial(devices.asarray, cupy, device), call)
        task.divisor = divisor if divisor is None or divisor.device.id == device else cupy.array(divisor)
        value, prepared, arrays = _compute(cupy, device, task)
        if key is not None and prepared is not None and _can_be_kept(task, arrays, read):
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            _kept[key] = prepared
        return rows.result(task, value) if task.value_wanted else rows.gradients(task)


def _of_listed(cupy: Any, call: Call, dense: Callable[[Call], Any], shared: tuple[str, ...] = ()) -> Any:
    """A call in which x lists classes of y. Only the dense call that it makes is cached."""
    out = call.out if isinstance(call.out, tuple) else (call.out,)
    read = {
        "x": call.x, "y": call.y, "indices": call.indices, "weights": call.weights, "temperature": call.temperature,
        "tail_mass": call.tail_mass, "cotangent": call.cotangent, "denominator": call.denominator,
    }  # fmt: skip
    device = devices.choose(cupy, call.device, read, out)
    with cupy.cuda.Device(device):
        listed = partial(Listed, cupy, _start)
        return sparse.compute(cupy, partial(devices.asarray, cupy, device), listed, dense, call, shared)


def _divisor(cupy: Any, denominator: Any) -> Any:
    """The denominator as kernels read it, followed by the factor of the weights; without synchronisation."""
    denominator = cupy.asarray(denominator)
    with denominator.device:
        pair = cupy.ones(2)
        pair[0] = denominator
    return pair


def _can_be_kept(task: rows.Task, arrays: list[Any], read: tuple[Any, ...]) -> bool:
    """Whether the kernels read the caller's arrays, unconverted and in place, and nothing follows after the kernels."""
    pairs = zip(arrays, read, strict=True)
    return (
        all(a is b if a is None or b is None else a.data.ptr == b.data.ptr for a, b in pairs)
        and all(g.spread is None for g in task.gradients)
        and (task.output == rows.TOTAL or task.denominator == 1)
    )


def _again(cupy: Any, prepared: Prepared, read: tuple[Any, ...], given: tuple[Any, ...], value_wanted: bool) -> Any:
    """Run a cached call with new addresses."""
    arrays = list(read)
    for k, (shape, dtype, like) in enumerate(prepared.results):
        a = given[k] if k < len(given) else None
        if a is None:
            a = cupy.empty(shape, dtype) if like is None else cupy.empty_like(read[like])
        arrays.append(a)
    addresses = [0 if a is None else a.data.ptr for a in arrays]
    if len(given) > 1 or given[0] is not None:
        _check_overlap(prepared, arrays, addresses, given)
    _execute(cupy, prepared, addresses)
    results = tuple(arrays[len(read) :])
    return results[1:] if not value_wanted else results if len(results) > 1 else results[0]


def _check_overlap(prepared: Prepared, arrays: list[Any], addresses: list[int], given: tuple[Any, ...]) -> None:
    """The same check as in rows.arrange; here, address ranges that are known already rule out most pairs of arrays."""
    starts, ends = [], []
    for at, (low, high) in zip(addresses, prepared.spans, strict=True):
        starts.append(at + low)
        ends.append(at + high)
    first = len(READ)
    for k, a in enumerate(given, first):
        if a is not None:
            start, end = starts[k], ends[k]
            for j in (*range(_CHECKED), *range(first, k)):
                if start < ends[j] and starts[j] < end:
                    inputs = [b for b in arrays[:_CHECKED] if b is not None]
                    destinations.check_overlap(arrays[first : k + 1], inputs, arrays[-1] if prepared.over_y else None)


def _execute(cupy: Any, prepared: Prepared, addresses: list[int]) -> None:
    """Launch everything; `addresses` are those of the arguments and results, in the order of READ."""
    # CuPy frees the memory at the end of this function, and reuses it in stream order
    memory = cupy.cuda.alloc(prepared.scratch) if prepared.scratch else None
    addresses.append(0 if memory is None else memory.ptr)
    plans = prepared.plans.copy()
    words = plans.view(np.int64)
    for word, of, offset in prepared.addresses:
        words[word] = addresses[of] + offset
    _start(prepared.launches, plans)


def _start(launches: Sequence[Launch], plans: np.ndarray) -> None:
    """All launches of a call go through this function; wrap it to see what is launched."""
    for k, launch in enumerate(launches):
        launch.function(launch.grid, launch.block, (plans[k : k + 1],), launch.shared)


def _compute(cupy: Any, device: int, task: rows.Task) -> tuple[Any, Prepared | None, list[Any]]:
    """The array of the value, the prepared launches, and the arrays that they read, in the order of READ."""
    value = task.value if task.out is None else task.out
    if value is None:
        value = cupy.empty((), task.scalar_dtype)

    if task.rows == 0 or task.n == 0:  # no launches; CuPy fills the results that are not empty
        of = task.denominator
        if task.output != rows.TOTAL:
            value[...] = 0
        elif task.divisor is not None:
            value[...] = cupy.where(task.divisor[0] == 0, math.nan, 0.0)
        elif of is not None:
            value[...] = 0 if of else math.nan
        else:
            value[...] = 0.0 / (task.weights if task.counted is None else task.counted).sum()
        for g in task.gradients:
            g.array[...] = 0
        return value, None, []

    cotangent = task.cotangent
    if cotangent is not None and (task.by_weights or devices.is_here(cotangent, cupy)):
        cotangent = task.cotangent = cupy.asarray(cotangent, np.float64)  # multiplied on the device
    here = cotangent if devices.is_here(cotangent, cupy) else None
    arrays = [task.x, task.y, task.weights, task.temperatures, task.factors, here, task.divisor, task.counted]
    results = [value, *(g.array for g in task.gradients)]
    prepared = prepare(device, task, arrays, results)
    _execute(cupy, prepared, [0 if a is None else a.data.ptr for a in (*arrays, *results)])
    return value, prepared, arrays


# ---- blocks of arrays that are never in one place: the functions of these names in cpu.py ----------------------------


def block(call: Call, denominator: float, shared: tuple[str, ...]) -> tuple[Any, ...]:
    """As cpu.block, for backends/dask.py."""
    if call.indices is not None:
        found = _of_listed(ready(), call, lambda dense: block(dense, denominator, ()), shared)
        return found if isinstance(found, tuple) else (found,)
    with _there(call) as (cupy, device):
        task = _laid_out(cupy, device, call, shared)
        task.cotangent = rows.scale(denominator)
        _compute(cupy, device, task)
        return task.value, *_parts_of_sums(task, shared)


def arrange(call: Call) -> rows.Task:
    """Check a call and lay it out in rows."""
    with _there(call) as (cupy, device):
        return _laid_out(cupy, device, call)


def states(call: Call, number: int, stats: Any) -> Any:
    """As cpu.states: the states of all chunks, even if there is only one."""
    with _there(call) as (cupy, device):
        spaces, _, wanted = options.check(call)
        task = _laid_out(cupy, device, call._replace(return_grad=None))
        outputs = sum(kernels.OUTPUTS[of] for of in wanted) if number else 0
        numbers = kernels.states(call.operation.code, spaces, outputs, False)[number]
        left = cupy.zeros((*task.x.shape[:-1], numbers, -(-task.n // CHUNK)))
        if left.size:
            arrays = {**_read(task), "stats": stats, "states": left}
            _launch(cupy, parts.states(device, task, outputs, number, arrays), arrays)
        return left


def merge(task: rows.Task, number: int, states: Any, stats: Any, fold: bool = False) -> Any:
    """As cpu.merge: the states of all blocks into the stats of the rows, or with `fold` into one state per row."""
    cupy = ready()
    with states.device:
        if fold:
            merged = cupy.zeros((*states.shape[:-1], 1))
        else:
            merged = cupy.zeros((*states.shape[:-2], MAX_STATS)) if stats is None else cupy.array(stats, order="C")

        def by_row(a: Any, name: str) -> Any:
            if a is None or isinstance(a, float):  # a number applies to all rows
                return None
            return cupy.broadcast_to(devices.asarray(cupy, states.device.id, a, name), states.shape[:-2])

        if states.size:
            arrays = {
                "states": cupy.asarray(states, order="C"),
                "weights": by_row(task.weights, "weights"),
                "temperatures": by_row(task.temperature, "temperature"),
                "merged": merged,
            }
            _launch(cupy, parts.merge(states.device.id, task, number, fold, arrays), arrays)
        return merged


def outputs(call: Call, number: int, stats: Any, denominator: float, shared: tuple[str, ...]) -> tuple[Any, ...]:
    """What sweep `number` writes for a block of the classes: the terms for reduction="none", or the gradients."""
    with _there(call) as (cupy, device):
        task = _laid_out(cupy, device, call, shared)
        arrays = {**_read(task), "stats": stats, "value": task.value}
        for g in task.gradients:
            arrays["d" + g.of] = g.array
            if g.inner and stats is not None:
                order = g.order
                arrays["stats d" + g.of] = cupy.array(stats.transpose(*order, len(order)), order="C")
        if task.rows and task.n:
            scale = rows.scale(denominator, task.cotangent)
            _launch(cupy, parts.outputs(device, task, number, scale, arrays), arrays)
        else:
            for g in task.gradients:
                g.array[...] = 0
        return (task.value,) if call.reduction == "none" else _parts_of_sums(task, shared)


@contextlib.contextmanager
def _there(call: Call) -> Iterator[tuple[Any, int]]:
    """CuPy with the device of a block's arrays as the current one, and the number of that device."""
    cupy = ready()
    given = {"x": call.x, "y": call.y, "weights": call.weights, "temperature": call.temperature}
    device = devices.choose(cupy, None, given, ())
    with cupy.cuda.Device(device):
        yield cupy, device


def _laid_out(cupy: Any, device: int, call: Call, shared: tuple[str, ...] = ()) -> rows.Task:
    # the kernels write a gradient in the dtype of its operand, but parts of a sum should not be rounded to 16 bits
    x, y = (
        a.astype(np.float32) if name in shared and a.dtype.itemsize == 2 else a
        for name, a in (("x", call.x), ("y", call.y))
    )
    return rows.arrange(cupy, partial(devices.asarray, cupy, device), call._replace(x=x, y=y))


def _parts_of_sums(task: rows.Task, shared: tuple[str, ...]) -> tuple[Any, ...]:
    """The gradients of a block; in float64 for operands of which other blocks hold copies, to be added up."""
    return tuple(g.view.astype(np.float64) if g.of in shared else g.array for g in task.gradients)


def _read(task: rows.Task) -> dict[str, Any]:
    return {"x": task.x, "y": task.y, "weights": task.weights, "temperatures": task.temperatures}


def _launch(cupy: Any, prepared: Prepared, arrays: dict[str, Any]) -> None:
    _execute(cupy, prepared, [0 if a is None else a.data.ptr for a in arrays.values()])
