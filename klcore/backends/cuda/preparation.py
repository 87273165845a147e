"""A call with all its launches, without addresses: this is cached, and reused by the next call of the same kind."""

import math
from typing import Any, NamedTuple

import numpy as np

from klcore.backends import arguments, rows
from klcore.backends.cuda import kernels, plans
from klcore.backends.cuda.launches import CHUNK, MAX_STATS, Kind, Launch, Planned, added_up, launch_of, sweep


class Prepared(NamedTuple):
    """The launches of a call, without addresses, and what else the next such call needs."""

    device: int
    launches: tuple[Launch, ...]
    plans: np.ndarray  # one element per launch, with the memory layout of kl::Plan
    addresses: tuple[tuple[int, int, int], ...]  # (word of `plans`, number of the address, bytes to add)
    scratch: int  # bytes of working memory
    results: tuple[tuple[Any, Any, int | None], ...] = ()  # (shape, dtype, number of the argument with the same layout)
    spans: tuple[tuple[int, int], ...] = ()  # from _span, of the arguments and results
    over_y: bool = False  # as in rows.Task


def launched(device: int, launches: list[Planned], scratch: plans.Scratch, *more: Any) -> Prepared:
    """Prepare these launches; `more` are the remaining fields of Prepared."""
    planned, filled = zip(*launches, strict=True)
    places = ((k * plans.WORDS + at, place) for k, plan in enumerate(filled) for at, place in plan.places.items())
    return Prepared(
        device,
        planned,
        np.concatenate([plan.words for plan in filled]).view(f"V{8 * plans.WORDS}"),
        tuple((at, place.of, place.offset) for at, place in places),
        scratch.nbytes,
        *more,
    )


def _span(a: Any) -> tuple[int, int]:
    """The range of bytes that an array covers, relative to the address of its first element."""
    steps = [(n - 1) * step for n, step in zip(a.shape, a.strides, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + a.dtype.itemsize


def prepare(device: int, task: rows.Task, arrays: list[Any], results: list[Any]) -> Prepared:
    """All launches of a task that reads `arrays`, in the order of plans.READ, and writes `results`."""
    names = (*plans.READ, "value", *("d" + g.of for g in task.gradients))
    places = {name: plans.Place(k) for k, name in enumerate(names)}
    cotangent = arrays[plans.READ.index("cotangent")] is not None
    scratch = plans.Scratch()
    views = views_of(task, places)
    totals = None
    if task.value_wanted and task.output == rows.TOTAL:  # one number per row, contiguous
        totals = scratch.doubles(task.rows)
        batch = task.x.shape[:-1]
        strides = tuple(8 * math.prod(batch[d + 1 :]) for d in range(len(batch)))
        views["value"] = plans.View(totals, 0, strides, arguments.FLOATS.index("float64"), 8)
    elif task.value_wanted:
        views["value"] = plans.view_of(task.value_view, places["value"], task.output == rows.TERMS)
    gradients = {g.of: plans.view_of(g.view, places["d" + g.of], True) for g in task.gradients}
    views.update({"d" + g.of: gradients[g.of] for g in task.gradients if not g.inner})
    kind = kind_of(device, task, views, outputs_of(task))

    launches: list[Planned] = []
    divisor = math.nan if task.denominator is None else task.denominator  # NaN: the sum of the weights
    denominator = None if task.divisor is None else places["divisor"]
    if task.by_weights:  # their sum is known only on the device
        known, denominator = denominator, scratch.doubles(2)
        counted = views["weights"]
        if task.counted is not None:
            counted = plans.view_of(task.counted, places["counted"], False)
        over = plans.layout_of(task.x.shape[:-1], 1, {"weights": counted})
        plan = plans.plan_of(over, 1, sums=denominator, scale=divisor, denominator=known, factor=1.0)
        launches += added_up(kind, "kl_weights", len(rows.WEIGHT_FACTORS), None, task.rows, plan, scratch)
    fields = {
        **fields_of(task),
        "gradient_scale": rows.scale(divisor, None if cotangent else task.cotangent),
        "scale": divisor,
        "denominator": denominator,
        "cotangent": places["cotangent"] if cotangent else None,
    }

    layout = plans.layout_of(task.x.shape[:-1], task.n, views)
    launches += sweep(kind, plans.plan_of(layout, task.n, **fields), layout, kind.sweeps, scratch)
    for g in task.gradients:
        if g.inner:
            launches += summed(kind, task, g, gradients[g.of], views, fields, scratch)
    if totals is not None:
        plan = plans.plan_of(
            plans.Layout((), {"value": plans.view_of(results[0], places["value"], False)}, False, False), 1, **fields
        )
        launches += added_up(kind, "kl_sum", 1, totals, task.rows, plan, scratch)
    like = (None, *(plans.READ.index(g.of) for g in task.gradients))
    return launched(
        device,
        launches,
        scratch,
        tuple((a.shape, a.dtype, of) for a, of in zip(results, like, strict=True)),
        tuple((0, 0) if a is None else _span(a) for a in (*arrays, *results)),
        task.over_y,
    )


def views_of(task: rows.Task, places: dict[str, plans.Place]) -> dict[str, plans.View]:
    """The arrays that all sweeps of a task read."""
    classes = {"x": task.x, "y": task.y, "factors": task.factors}
    by_row = {"weights": task.weights, "temperatures": task.temperatures}
    read = {**classes, **by_row}
    return {k: plans.view_of(a, places[k], k in classes) for k, a in read.items() if a is not None}


def inverse_of(temperature: Any) -> float:
    """The inverse temperature of all rows; 1 if there is one temperature per row."""
    return 1.0 / temperature if isinstance(temperature, float) else 1.0


def outputs_of(task: rows.Task) -> int:
    """The flags of the outputs: the terms, and the gradients that are not summed over rows."""
    direct = sum(kernels.OUTPUTS[g.of] for g in task.gradients if not g.inner)
    return direct + (kernels.TERMS if task.output == rows.TERMS else 0)


def kind_of(device: int, task: rows.Task, views: dict[str, plans.View], outputs: int) -> Kind:
    return Kind(
        device, task.operation, task.spaces, (views["x"].dtype, views.get("y", views["x"]).dtype), task.wide, outputs,
        kernels.tempered_by(task.temperature), task.factors is not None, task.n,
    )  # fmt: skip


def fields_of(task: rows.Task) -> dict[str, Any]:
    """The fields that all plans of a task have in common."""
    return {
        "output": task.output,
        "any_weights": task.signed,
        "parameter": task.parameter,
        "factor": task.factor,
        "inverse_temperature": inverse_of(task.temperature),
    }


def summed(
    kind: Kind, task: rows.Task, g: rows.Gradient, to: plans.View, views: dict[str, plans.View], fields: dict[str, Any],
    scratch: plans.Scratch, stats: plans.Place | None = None,
) -> list[Planned]:  # fmt: skip
    """The gradient of a broadcast operand, 1024 rows at a time. `stats`, if known, are in the order of its rows."""
    batch = task.x.shape[:-1]
    order = g.order
    shape = tuple(batch[d] for d in order)
    inner = math.prod(batch[d] for d in g.inner)
    turned = {
        name: v._replace(batch=tuple(v.batch[d] for d in order)) for name, v in views.items() if name in plans.READ
    }
    turned["d" + g.of] = to._replace(batch=tuple(to.batch[d] for d in order))
    layout = plans.layout_of(shape, kind.n, turned, keep_order=True)
    launches: list[Planned] = []
    kind = kind._replace(outputs=kernels.OUTPUTS[g.of])
    if kind.sweeps > 1 and stats is None:
        stats = scratch.doubles(task.rows * MAX_STATS)
        known = plans.layout_of(shape, kind.n, {k: v for k, v in turned.items() if k[0] != "d"}, keep_order=True)
        plan = plans.plan_of(known, kind.n, stats=stats, **{**fields, "output": rows.PER_ROW})
        launches += sweep(kind, plan, known, kind.sweeps - 1, scratch)
    groups = -(-inner // CHUNK)
    sums = scratch.doubles(task.rows // inner * groups * kind.n)
    plan = plans.plan_of(
        layout, kind.n, stats=stats, sums=sums, inner=inner, groups=groups, first=kind.sweeps - 1,
        **{**fields, "output": rows.PER_ROW},
    )  # fmt: skip
    bytes_a_warp = CHUNK * (8 + kind.bytes_a_class() + kind.number())
    items = task.rows // inner * groups * -(-kind.n // CHUNK)
    warps = kind.warps(bytes_a_warp)
    launches.append(launch_of(kind, "kl_summed", plan, -(-items // warps), warps, warps * bytes_a_warp))
    elements = task.rows // inner * kind.n
    launches.append(launch_of(kind, "kl_summed_fold", plan, -(-elements // 256), 8, 0))
    return launches
