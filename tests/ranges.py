"""Rows of logits from all the ranges for which docs/accuracy.md promises something, not only from the comfortable
middle.

Used by test_accuracy.py and by benchmarks/accuracy.py; imports nothing of klcore.
"""

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float64", "bfloat16")}


def lowest(dtype: str) -> float:
    return float(ml_dtypes.finfo(DTYPES[dtype]).min)


def log_uniform(rng: Any, low: float, high: float, shape: Any = None) -> Any:
    return np.exp(rng.uniform(np.log(low), np.log(high), shape))


def rows(rng: Any, dtype: str, n: int, count: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Teachers and students, (count, n): the kind, offsets and masks of every row are drawn independently."""
    each = (count, 1)

    def some(share: float, of: Any, other: Any) -> np.ndarray:
        return np.where(rng.random(each) < share, of, other)

    a = some(0.6, log_uniform(rng, 0.1, 10, each), log_uniform(rng, 1e-7, 1e3, each)) * rng.normal(size=(count, n))
    a[np.arange(count), rng.integers(0, n, count)] += some(0.2, rng.uniform(3, 110, each), 0.0)[:, 0]  # nearly one-hot
    noise = log_uniform(rng, 1e-7, 1e3, each) * rng.normal(size=a.shape)
    few = rng.random(a.shape) < 1.5 / n
    b = some(0.1, noise, a + np.where(some(0.2, few, True), noise, 0.0) * some(0.1, 0.0, 1.0))
    a, b = (v * some(0.7, temperature, 1.0) for v in (a, b))

    def offset() -> np.ndarray:
        return some(0.6, log_uniform(rng, 1, 1e6, each), log_uniform(rng, 1, 1e30, each)) * rng.choice([-1, 1], each)

    common = some(0.2, offset(), 0.0)
    a, b = (v + common + some(0.3, offset(), 0.0) for v in (a, b))

    # classes that are excluded, or nearly so: by x, by y, by both
    masked = (rng.random(a.shape) < rng.choice([0.1, 0.5, 0.9], each)) & some(0.3, True, False)
    masked[np.arange(count), rng.integers(0, n, count)] = False
    by = rng.choice([-np.inf, lowest(dtype), -1e9], each)
    side = rng.integers(0, 3, each)
    a, b = np.where(masked & (side != 0), by, a), np.where(masked & (side != 1), by, b)
    # and rows of which one side is masked throughout
    a, b = (some(0.06, rng.choice([lowest(dtype), -1e9], each), v) for v in (a, b))
    return a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype])


def beyond(v: np.ndarray) -> np.ndarray:
    """Which rows hold float64's lowest number or similar ones, which oracle.fast cannot represent."""
    return ((np.abs(v.astype(np.float64)) > 1e270) & np.isfinite(v)).any(axis=-1)


def promised(x: np.ndarray, y: np.ndarray, temperature: float, value: np.ndarray) -> np.ndarray:
    """Which of these rows the bounds apply to: docs/accuracy.md lists the exceptions."""
    x, y = (v.astype(np.float64) for v in (x, y))
    with np.errstate(all="ignore"):
        u = (x - x.max(axis=-1, keepdims=True)) / temperature
        z = np.minimum(np.abs((y - y.max(axis=-1, keepdims=True)) / temperature), 1e308)
        lost = np.where((u < -84) & np.isfinite(u) & np.isfinite(z), np.exp(u) * z, 0).sum(axis=-1)
    return (value >= 1e-12) & (value <= 1e3) & (lost < 1e-19)
