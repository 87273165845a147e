"""How far results are from the exact ones of the same input, which tests/oracle.py computes."""

from typing import Any

import ml_dtypes
import numpy as np
import oracle

import klcore

from .calls import DEVICES, NAMES, library, random_logits, to_space
from .divergence import VALUES


class Accuracy:
    """kl_div and its gradient with respect to y; errors are relative to what the bounds in tests/oracle.py are."""

    params = (VALUES, DEVICES, ["float64", "float32", "bfloat16"], ["16x1500"])
    param_names = NAMES
    unit = "relative error"

    def setup(self, space: str, device: str, dtype: str, shape: str) -> None:
        xp = library(device)
        x, y, self.exact = _rows(space, dtype, shape)
        found = klcore.kl_div(xp.asarray(x), xp.asarray(y), space=space, return_grad="y")
        self.value, self.dy = (np.asarray(a if device == "cpu" else a.get(), np.float64) for a in found)

    def track_value(self, *params: str) -> float:
        return _worst(np.abs(self.value - self.exact.value) / self.exact.value_size)

    def track_gradient(self, *params: str) -> float:
        return _worst(np.abs(self.dy - self.exact.dy).sum(axis=-1) / self.exact.dy_size)


def _worst(errors: np.ndarray) -> float:
    if np.isnan(errors).any():  # which asv would take for a benchmark left out
        raise ArithmeticError(f"a result is NaN: {errors}")
    return float(errors.max())


def _rows(space: str, dtype: str, shape: str) -> tuple[Any, Any, Any]:
    """x, y and the answer: rows from a millionth apart (a divergence of 1e-12), or just not the same, to far apart."""
    rows, n = map(int, shape.split("x"))
    closest = max(1e-6, float(ml_dtypes.finfo(dtype).eps))
    x = 2.0 * random_logits(rows, n, seed=0)
    y = x + np.geomspace(closest, 3.0, rows)[:, None] * random_logits(rows, n, seed=1)
    x, y = (to_space(space, a).astype(dtype) for a in (x, y))
    return x, y, oracle.fast("kl_div", x, y, space)
