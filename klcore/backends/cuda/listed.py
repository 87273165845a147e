"""Calls in which x lists some classes of y: the steps of klcore/backends/sparse.py by the kernels of src/kl_sparse.cu.

An invalid index or mass, which raises on the CPU, makes its row NaN here: nothing is read back from the device.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from klcore import _cpu
from klcore.backends import options, rows
from klcore.backends.cuda import devices, kernels, plans
from klcore.backends.cuda.launches import CHUNK, Launch, grid_of
from klcore.backends.cuda.preparation import inverse_of

_WARPS, _SORTING = 4, 32  # in a block; in a block that sorts a row of more than CHUNK keys

Start = Callable[[list[Launch], np.ndarray], None]


class Listed:
    """The K + 1 classes of each row, and their derivatives, on the current device; see _cpu.Listed."""

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
        self._device = cupy.cuda.runtime.getDevice()
        batch, count, n = x.shape[:-1], x.shape[-1], y.shape[-1]
        self._rows, self._dtype = math.prod(batch), y.dtype.name
        self._filled = cupy.empty if weights is None else cupy.zeros  # rows with weight 0 are skipped
        self.keys, self.known = self._filled((*batch, count), np.uint64), self._filled((*batch, _cpu.ROW_NUMBERS))
        self.xs, self.ys = self._filled((*batch, count + 1)), self._filled((*batch, count + 1))
        self._fields = {
            "count": count, "tail": tail, "space_x": space_x, "space_y": space_y, "keys": self.keys.data.ptr,
            "xs": self.xs.data.ptr, "ys": self.ys.data.ptr,
        }  # fmt: skip
        weights = devices.as_read(cupy, weights)
        self._read = x, indices, y, weights, temperature, mass  # keep them alive: the plan holds their addresses
        arrays = {"y": y, "x": x, "indices": indices.view(np.float64), "known": self.known}
        self._plan = self._planned(arrays, weights, temperature, mass)

        warps = _WARPS if count <= CHUNK else _SORTING
        self._launch("kl_keys", self._plan, self._rows * (1 if count <= CHUNK else warps), warps)
        if tail != options.TAILS["renorm"]:
            self._sum_others(-(-n // CHUNK))
        self._launch("kl_classes", self._plan, self._rows)

    def by_x(self, dxs: Any) -> Any:
        """The derivatives with respect to x, float64 of shape batch + (K,), from those with respect to `xs`."""
        dx = self._filled(self.keys.shape)
        self._launch("kl_by_x", self._plan.with_fields(slopes=dxs.data.ptr, dx=dx.data.ptr), self._rows)
        return dx

    def by_y(self, dys: Any) -> None:
        """Turn the derivatives with respect to `ys`, in place, into those for the listed classes of y, and the part
        that all other classes have in common."""
        self._launch("kl_by_y", self._plan.with_fields(slopes=dys.data.ptr), self._rows)

    def spread(self, dys: Any, y: Any, weights: Any, temperature: Any, known: Any, dy: Any, inner_axes: int) -> None:
        """The derivative with respect to y, from dys after `by_y`. The arrays are those of the call, with the batch
        axes in the order of dy. With inner_axes >= 0 it is summed over that many of the last batch axes."""
        weights = devices.as_read(self._cupy, weights)
        plan = self._planned({"y": y, "known": known, "to": dy}, weights, temperature)
        self._write(plan.with_fields(slopes=dys.data.ptr), y.shape, dy, inner_axes, self._dtype)

    def copy(self, values: Any, dx: Any, inner_axes: int) -> None:
        """Copy float64 values into a gradient, or sum them over the last batch axes."""
        self._write(self._planned({"values": values, "to": dx}), values.shape, dx, inner_axes, dx.dtype.name, True)

    def _planned(
        self, arrays: dict[str, Any], weights: Any = None, temperature: Any = 1.0, mass: Any = None
    ) -> plans.Plan:
        """The plan for `arrays`; warps share the classes of the first one."""
        by_row = {
            "weights": weights,
            "temperatures": None if isinstance(temperature, float) else temperature,
            "tail_mass": mass,
        }
        views = {name: plans.view_of(a, a.data.ptr, True) for name, a in arrays.items()}
        views |= {name: plans.view_of(a, a.data.ptr, False) for name, a in by_row.items() if a is not None}
        *batch, n = next(iter(arrays.values())).shape
        layout = plans.layout_of(tuple(batch), n, views, keep_order=True)
        view = next(iter(layout.views.values()))
        columns = any(0 < abs(step) < abs(view.stride) for step in view.batch[-1:])
        return plans.plan_of(
            layout, n, plans.LISTING, inverse_temperature=inverse_of(temperature), columns=columns, **self._fields
        )

    def _sum_others(self, chunks: int) -> None:
        """Sum y over the classes that are not listed."""
        count, states = chunks, self._cupy.empty(self._rows * _cpu.NORM_STATES * chunks)
        plan, size = self._plan.with_fields(states=states.data.ptr), _cpu.SIZES[rows.CODES[self._dtype]]
        wide = self._dtype == "float64"
        self._launch("kl_others", plan, self._rows * chunks, _WARPS, CHUNK * size, (self._dtype, self._dtype), wide)
        while count > 1:
            groups = -(-count // CHUNK)
            sums = self._cupy.empty(self._rows * _cpu.NORM_STATES * groups)
            plan = plan.with_fields(states=states.data.ptr, sums=sums.data.ptr, level=count, groups=groups)
            self._launch("kl_others_fold", plan, self._rows * groups)
            states, count = sums, groups

    def _write(
        self, plan: plans.Plan, shape: tuple[int, ...], to: Any, inner_axes: int, read: str, wide: bool = False
    ) -> None:
        """Write a gradient; `read`: the dtype of y; `wide`: compute in double."""
        batch, n, dtype = shape[:-1], shape[-1], to.dtype.name
        wide = wide or read == "float64"
        inner = math.prod(batch[len(batch) - inner_axes :]) if inner_axes >= 0 else 1
        groups, outer = -(-inner // CHUNK), self._rows // inner
        summed, size = inner > 1 or read != dtype, _cpu.SIZES[rows.CODES[read]]
        if summed:
            size += 8 + (8 if wide else 4)  # the sums, and the numbers of a row
        sums = self._cupy.empty(outer * groups * n if summed else 0)
        plan = plan.with_fields(sums=sums.data.ptr, inner=inner, groups=groups)
        warps = min(_WARPS, devices.properties(self._device).shared // (CHUNK * size))
        self._launch("kl_spread", plan, outer * groups * -(-n // CHUNK), warps, CHUNK * size, (read, dtype), wide)
        if summed:
            self._launch("kl_spread_fold", plan, -(-outer * n // 32), _WARPS, 0, (read, dtype), wide)

    def _launch(
        self, name: str, plan: plans.Plan, items: int, warps: int = _WARPS, bytes_a_warp: int = 0,
        dtypes: tuple[str, str] = ("float32", "float32"), wide: bool = False,
    ) -> None:  # fmt: skip
        """Launch a kernel; each of the `items` is the work of one warp."""
        if not items:
            return
        function = kernels.kernel(self._device, kernels.listed_macros(name, dtypes, wide), name)
        grid = grid_of(self._device, -(-items // warps))
        launch = Launch(name, function, grid, (32 * warps,), warps * bytes_a_warp)
        self._start([launch], plan.words.view(f"V{8 * plan.struct.words}"))
