"""Calls in which x lists some classes of y: the steps of klcore/backends/sparse.py, by the kernels of src/kl_sparse.cu.

What the CPU would refuse, an index or a mass that is none, makes its row NaN: nothing is read from the device.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import rows
from klcore.backends.cuda import devices, kernels, plans
from klcore.backends.cuda.launches import CHUNK, Launch
from klcore.backends.cuda.preparation import inverse_of

_RENORM = rows.TAILS["renorm"]
_NUMBERS = 5  # kl::ROW_NUMBERS of src/kl_sparse.h
_STATES = 3  # kl::NORM_STATES of src/kl_logits.h
_WARPS = 4  # in a block
_SORTING = 1024  # threads of a block that sorts many keys
_MOST_BLOCKS = 32  # a multiprocessor in one launch; those share what there is to do

Start = Callable[[list[Launch], np.ndarray], None]


class Listed:
    """The K + 1 classes of each row, and their derivatives: what `_cpu.Listed` does, of arrays on the current device."""

    def __init__(
        self,
        cupy: Any,
        start: Start,
        x: Any,
        indices: Any,
        y: Any,
        weights: Any,
        temperature: Any,
        mass: Any,
        space_x: int,
        space_y: int,
        tail: int,
    ) -> None:
        self._cupy, self._start = cupy, start
        self._device = devices.properties(cupy.cuda.runtime.getDevice())
        batch, count = x.shape[:-1], x.shape[-1]
        self._rows, self._y = math.prod(batch), y.dtype.name
        self._zeros = cupy.empty if weights is None else cupy.zeros  # rows of weight 0 are not looked at
        self.keys = self._zeros((*batch, count), np.uint64)
        self.known = self._zeros((*batch, _NUMBERS))
        self.xs, self.ys = self._zeros((*batch, count + 1)), self._zeros((*batch, count + 1))
        self._fields = {
            "count": count, "tail": tail, "space_x": space_x, "space_y": space_y, "keys": self.keys.data.ptr,
            "inner": 1, "groups": 1,
        }  # fmt: skip
        classes = {"x": x, "y": y, "indices": indices.view(np.float64), "known": self.known}
        self._plan = self._planned(batch, classes, y, weights, temperature, tail_mass=mass).with_fields(
            xs=self.xs.data.ptr, ys=self.ys.data.ptr
        )
        self._read = x, indices, y, weights, temperature, mass  # whose addresses are in the plan

        many = count > CHUNK
        self._launch("kl_keys", self._plan, self._rows * (_WARPS if many else 1), _SORTING // 32 if many else _WARPS)
        if tail != _RENORM:
            self._sum_others()
        self._launch("kl_classes", self._plan, self._rows)

    def by_x(self, dxs: Any) -> Any:
        """The derivatives by x, as float64 of the shape batch + (K,), from those by `xs`."""
        dx = self._zeros((*self.xs.shape[:-1], self.keys.shape[-1]))
        self._launch("kl_by_x", self._plan.with_fields(slopes=dxs.data.ptr, dx=dx.data.ptr), self._rows)
        return dx

    def by_y(self, dys: Any) -> None:
        """Of the derivatives by `ys` makes those by y of the classes listed, and what all others have in common."""
        self._launch("kl_by_y", self._plan.with_fields(slopes=dys.data.ptr), self._rows)

    def spread(self, dys: Any, y: Any, weights: Any, temperature: Any, known: Any, dy: Any, inner_axes: int) -> None:
        """The derivative by y, from what `by_y` made of dys. Arrays are those of the call, with the batch axes in the
        order of dy's; with inner_axes >= 0 it is summed over so many of the last."""
        plan = self._planned(y.shape[:-1], {"y": y, "known": known, "to": dy}, y, weights, temperature)
        self._write(plan.with_fields(slopes=dys.data.ptr), y.shape, dy, inner_axes, self._y == "float64")

    def copy(self, values: Any, dx: Any, inner_axes: int) -> None:
        """float64 into a gradient, or summed over the last batch axes."""
        plan = self._planned(values.shape[:-1], {"values": values, "to": dx}, values, None, 1.0)
        self._write(plan, values.shape, dx, inner_axes, True)

    def _planned(
        self, batch: tuple[int, ...], classes: dict[str, Any], of: Any, weights: Any, temperature: Any, **by_row: Any
    ) -> plans.Plan:
        """A plan for rows that have the classes of the array `of`."""
        if weights is not None and weights.dtype not in (devices.FLOAT32, devices.FLOAT64):
            weights = weights.astype(devices.FLOAT64)
        by_row["weights"] = weights
        by_row["temperatures"] = None if isinstance(temperature, float) else temperature
        views = {name: plans.view_of(a, a.data.ptr, True) for name, a in classes.items()}
        views |= {name: plans.view_of(a, a.data.ptr, False) for name, a in by_row.items() if a is not None}
        layout = plans.layout_of(batch, of.shape[-1], views, keep_order=True)
        view = next(v for name, v in layout.views.items() if classes.get(name) is of)
        apart = [abs(step) for step in view.batch[-1:] if step]
        plan = plans.plan_of(
            layout, of.shape[-1], plans.LISTING, inverse_temperature=inverse_of(temperature),
            columns=any(step < abs(view.stride) for step in apart), **self._fields,
        )  # fmt: skip
        self._converted = weights  # as long as launches may be told of it
        return plan

    def _sum_others(self) -> None:
        """What y has of the classes that are not listed."""
        chunks = count = -(-self._read[2].shape[-1] // CHUNK)
        states = self._cupy.empty(self._rows * _STATES * chunks if chunks > 1 else 0)
        plan = self._plan.with_fields(states=states.data.ptr)
        bytes_a_warp = CHUNK * _cpu.SIZES[rows.CODES[self._y]]
        self._launch("kl_others", plan, self._rows * chunks, _WARPS, bytes_a_warp, self._y, self._y == "float64")
        while count > 1:
            groups = -(-count // CHUNK)
            sums = self._cupy.empty(self._rows * _STATES * groups if groups > 1 else 0)
            plan = plan.with_fields(states=states.data.ptr, sums=sums.data.ptr, level=count, groups=groups)
            self._launch("kl_others_fold", plan, self._rows * groups)
            states, count = sums, groups

    def _write(self, plan: plans.Plan, shape: tuple[int, ...], to: Any, inner_axes: int, wide: bool) -> None:
        batch, n = shape[:-1], shape[-1]
        inner = math.prod(batch[len(batch) - inner_axes :]) if inner_axes >= 0 else 1
        groups, outer = -(-inner // CHUNK), self._rows // inner
        size = _cpu.SIZES[rows.CODES[to.dtype.name]] + (0 if inner == 1 else 16 if wide else 12)
        sums = self._cupy.empty(outer * groups * n if inner > 1 else 0)
        plan = plan.with_fields(sums=sums.data.ptr, inner=inner, groups=groups)
        items, warps = outer * groups * -(-n // CHUNK), min(_WARPS, self._device.shared // (CHUNK * size))
        self._launch("kl_spread", plan, items, warps, CHUNK * size, to.dtype.name, wide)
        if inner > 1:
            self._launch("kl_spread_fold", plan, -(-outer * n // 32), dtype=to.dtype.name, wide=wide)

    def _launch(
        self, name: str, plan: plans.Plan, items: int, warps: int = _WARPS, bytes_a_warp: int = 0,
        dtype: str = "float32", wide: bool = False,
    ) -> None:  # fmt: skip
        """`items`: how many warps have something to do."""
        if not items:
            return
        device = self._cupy.cuda.runtime.getDevice()
        function = kernels.kernel(device, kernels.listed_options(name, dtype, wide), name)
        grid = min(-(-items // _WARPS), _MOST_BLOCKS * self._device.multiprocessors)
        launch = Launch(name, function, (grid,), (32 * warps,), warps * bytes_a_warp)
        self._start([launch], plan.words.view(f"V{8 * plan.struct.words}"))
