"""Errors of results, compared with the exact results for the same input from tests/oracle.py."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle

from klcore import operations

from .calls import DEVICES, NAMES, OPERATIONS, OTHERS, library, random_logits, to_space
from .divergence import VALUES


class Accuracy:
    """Value and last gradient; errors are relative to the same sizes as the bounds in tests/oracle.py."""

    params = (
        VALUES + [name for name in OTHERS if OPERATIONS[name][0].__name__ in oracle.OPERATIONS],
        DEVICES,
        ["float64", "float32", "bfloat16"],
        ["16x1500"],
    )
    param_names = NAMES
    unit = "relative error"

    def setup(self, operation: str, device: str, dtype: str, shape: str) -> None:
        xp = library(device)
        function, words = OPERATIONS[operation]
        row = operations.OPERATIONS[function.__name__]
        x, y, space = *_rows(words["space"], dtype, shape), words["space"]
        self.exact, self.of = oracle.fast(row.name, x, y, space), f"d{row.gradients[-1]}"
        arrays = [xp.asarray(a) for a in (x, y)[: len(row.gradients)]]
        found = function(*arrays, space=space, return_grad=row.gradients[-1])
        self.value, self.gradient = (np.asarray(a if device == "cpu" else a.get(), np.float64) for a in found)

    def track_value(self, *params: str) -> float:
        return _worst(np.abs(self.value - self.exact.value) / self.exact.value_size)

    def track_gradient(self, *params: str) -> float:
        error = np.abs(self.gradient - getattr(self.exact, self.of)).sum(axis=-1)
        return _worst(error / getattr(self.exact, f"{self.of}_size"))


def _worst(errors: np.ndarray) -> float:
    if np.isnan(errors).any():  # asv would treat NaN as a skipped benchmark
        raise ArithmeticError(f"a result is NaN: {errors}")
    return float(errors.max())


def _rows(space: str, dtype: str, shape: str) -> tuple[Any, Any]:
    """x and y: rows that differ by a millionth (a divergence of 1e-12), or barely, up to rows that are far apart."""
    rows, n = map(int, shape.split("x"))
    closest = max(1e-6, float(ml_dtypes.finfo(dtype).eps))
    x = 2.0 * random_logits(rows, n, seed=0)
    y = x + np.geomspace(closest, 3.0, rows)[:, None] * random_logits(rows, n, seed=1)
    x, y = (to_space(space, a).astype(dtype) for a in (x, y))
    return x, y
