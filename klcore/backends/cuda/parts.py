"""The launches for rows in parts: states of a shard, stats from states, outputs from stats (src/kl_partial.h).

A state has the same layout as in klcore.backends.cpu: the rows in C order, then the numbers, then the chunks.
"""

import math
from typing import Any

from klcore.backends import rows
from klcore.backends.cuda import kernels, plans
from klcore.backends.cuda.launches import CHUNK, Kind, Planned, folds, units
from klcore.backends.cuda.preparation import (
    Prepared,
    fields_of,
    inverse_of,
    kind_of,
    launched,
    outputs_of,
    summed,
    views_of,
)


def _places(arrays: dict[str, Any]) -> dict[str, plans.Place]:
    return {name: plans.Place(k) for k, name in enumerate(arrays)}


def states(device: int, task: rows.Task, outputs: int, number: int, arrays: dict[str, Any]) -> Prepared:
    """Sweep `number`, into arrays["states"], given arrays["stats"] of the rows; `outputs` will be asked for later."""
    places, scratch = _places(arrays), plans.Scratch()
    views = views_of(task, places)
    kind = kind_of(device, task, views, outputs)
    layout = plans.layout_of(task.x.shape[:-1], task.n, views, keep_order=True)
    plan = plans.plan_of(layout, task.n, states=places["states"], stats=places["stats"], **fields_of(task))
    return launched(device, [units(kind, plan, layout, number, number + 1)], scratch)


def merge(device: int, task: rows.Task, number: int, fold: bool, arrays: dict[str, Any]) -> Prepared:
    """Merge arrays["states"] into arrays["merged"]: the stats of the rows, or with `fold` one state per row."""
    places, scratch = _places(arrays), plans.Scratch()
    *batch, _, count = arrays["states"].shape
    by_row = {name: arrays[name] for name in ("weights", "temperatures") if arrays[name] is not None}
    views = {name: plans.view_of(a, places[name], False) for name, a in by_row.items()}
    if not fold:  # the first number of a row's stats becomes its value, times its weight
        views["value"] = plans.view_of(arrays["merged"][..., 0], places["merged"], False)
    dtype = rows.CODES["float64" if task.wide else "float32"]
    tempered = kernels.tempered_by(task.temperature)
    kind = Kind(device, task.operation, task.spaces, (dtype, dtype), task.wide, 0, tempered, False, 1)
    layout = plans.layout_of(tuple(batch), 1, views, keep_order=True)
    plan = plans.plan_of(
        layout, 1, stats=None if fold else places["merged"], parameter=task.parameter, factor=task.factor,
        inverse_temperature=inverse_of(task.temperature), output=rows.PER_ROW,
    )  # fmt: skip
    into = places["merged"] if fold else None
    return launched(
        device, folds(kind, plan, number, math.prod(batch), count, places["states"], scratch, into), scratch
    )


def outputs(device: int, task: rows.Task, number: int, scale: float, arrays: dict[str, Any]) -> Prepared:
    """What sweep `number` writes: the terms, arrays["value"], and the gradients, arrays["dx"] and arrays["dy"]. For a
    gradient that is summed over rows, arrays["stats dx"] or ["stats dy"] has the stats in the order of its rows."""
    places, scratch = _places(arrays), plans.Scratch()
    views = views_of(task, places)
    fields = {**fields_of(task), "gradient_scale": scale}
    kind = kind_of(device, task, views, outputs_of(task))
    launches: list[Planned] = []
    if kind.outputs:
        direct = {"d" + g.of: g.view for g in task.gradients if not g.inner}
        if task.output == rows.TERMS:
            direct["value"] = task.value_view
        written = {name: plans.view_of(a, places[name], True) for name, a in direct.items()}
        layout = plans.layout_of(task.x.shape[:-1], task.n, {**views, **written}, keep_order=True)
        chunks = -(-task.n // CHUNK)
        own = scratch.doubles(task.rows * max(kind.states) * chunks)
        plan = plans.plan_of(layout, task.n, states=own, stats=places["stats"], **fields)
        if kind.of_logits:  # the slopes depend on the state of each chunk
            launches.append(units(kind, plan, layout, 0, 1))
        launches.append(units(kind, plan, layout, number, number + 1))
    for g in task.gradients:
        if g.inner:
            to, known = plans.view_of(g.view, places["d" + g.of], True), places.get("stats d" + g.of)
            launches += summed(kind, task, g, to, views, fields, scratch, known)
    return launched(device, launches, scratch)
