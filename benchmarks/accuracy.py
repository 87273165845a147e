"""How accurate klcore is on the CPU, compared with the libraries people use instead: ``make accuracy``, three minutes.

    python benchmarks/accuracy.py [--quick] [--json FILE]
    python benchmarks/accuracy.py --close [--json FILE]
    python benchmarks/accuracy.py --spaces

--close records what klcore, NumPy and PyTorch return for some pairs of float32 logits, beside the exact divergence.
--spaces prints the worst errors of every pair of spaces beside their bounds, for docs/accuracy.md, in a minute. Without
either, the record answers two questions. Records are docs/benchmarks/accuracy-DATE.json and close-DATE.json;
benchmarks/plots.py draws them.

* What is the error of log, exp, log1p and expm1, in units in the last place? Arguments are random, octave by octave,
  where argument and result are normal numbers (tests/test_accuracy.py covers all others). The exact results are those
  of mpmath, and for float32 those of NumPy in float64.
* How far from the divergence are the values that klcore and its peers compute from the same rows, and how far are the
  gradients? Students are their teachers plus noise of any size, so that divergences range from 1e-14 to 1e3. The exact
  divergence is that of the given numbers, normalised exactly. Rounded probabilities do not add up to one, and what is
  missing enters every formula that takes them as they are. So the record also holds how far such a formula is from the
  divergence when nothing is rounded. The exact numbers are computed with pairs of doubles by tests/oracle.py, which
  imports nothing of klcore.

The peers' expressions are those that side_by_side.py times, and two more with SciPy.
"""

import argparse
import functools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import mpmath
import numpy as np
import peers
import scipy.special
import side_by_side
import torch
from tqdm import tqdm

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import oracle  # noqa: E402
import ranges  # noqa: E402
from oracle import Doubles, Pair  # noqa: E402

OURS = "klcore"
LIBRARIES = ("klcore", "numpy", "scipy", "torch", "jax", "mpmath")
DTYPES = ("float32", "float64")
FUNCTIONS = ("log", "exp", "log1p", "expm1")
OCTAVES = range(-32, 32)
POINTS = {"float32": 1 << 17, "float64": 2_000}  # per octave
SPACES = ("probs", "log_probs", "logits")
DECADES = range(-14, 3)
PAIRS = {1_000: 3_400, 32_768: 170}  # classes -> pairs of rows
QUICK = 32  # divisor of all of these
BLOCK = 1 << 15  # classes at a time: exact results take many intermediate arrays, which should stay in the cache

Contenders = dict[str, Callable[..., Any]]


def digits(values: Any) -> list[float | None]:
    """Three digits of each number; NaN, where nothing was measured, becomes None."""
    return [None if np.isnan(v) else float(f"{v:.3g}") for v in values]


# ---- elementary functions --------------------------------------------------------------------------------------------


def elementary_contenders(function: str) -> Contenders:
    def ours(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        _cpu.elementary(function, x, out)
        return out

    of_torch, of_jax = getattr(torch, function), jax.jit(getattr(jax.numpy, function))
    return {
        OURS: ours,
        "PyTorch": lambda x: of_torch(torch.from_numpy(x)).numpy(),
        "JAX": lambda x: np.asarray(of_jax(x)),
        "NumPy": getattr(np, function),
    }


def arguments(function: str, octave: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Both signs where there is a result. Every other argument around 1 is close to 1, where log is 0; log1p has its
    pole at -1."""
    x = 2.0**octave * rng.uniform(1, 2, count)
    if octave in (-1, 0):
        x[::2] = 1 + (1 if octave == 0 else -1) * 2.0 ** rng.uniform(-50, -1, len(x[::2]))
    return x if function == "log" else x * rng.choice([-1.0, 1.0], count)


def exact_elementary(function: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The results as sums of two doubles; results that are not finite become NaN."""

    def both(v: float) -> tuple[float, float]:
        if function == "log1p" and v <= -1:
            return np.nan, 0.0
        true = getattr(mpmath, function)(mpmath.mpf(v))
        high = float(true)
        return (high, float(true - high)) if np.isfinite(high) else (np.nan, 0.0)

    if x.dtype == np.float32:
        high = getattr(np, function)(x, dtype=np.float64)
        return high, np.zeros_like(high)
    with mpmath.workdps(40):
        high, low = np.frompyfunc(both, 1, 2)(x)
    return high.astype(np.float64), low.astype(np.float64)


def elementary(function: str, dtype: str, points: int) -> dict[str, list[float | None]]:
    """The largest error of every contender, in ulp, by octave of the argument."""
    rng, limits = np.random.default_rng(0), np.finfo(dtype)
    contenders = elementary_contenders(function)
    worst: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():  # PyTorch's first log in a process was off by 22 ulp in 2 of 150 processes
        call(np.ones(POINTS["float32"], dtype))
    for octave in OCTAVES:
        x = arguments(function, octave, points, rng).astype(dtype)
        high, low = exact_elementary(function, x)
        normal = (np.abs(high) >= float(limits.tiny)) & (np.abs(high) <= float(limits.max))
        ulp = 2.0 ** (np.frexp(high[normal])[1] - limits.nmant - 1)
        for name, call in contenders.items():
            error = np.abs(call(x)[normal].astype(np.float64) - high[normal] - low[normal]) / ulp
            worst[name].append(np.nan_to_num(error, nan=np.inf).max() if error.size else np.nan)
    return {name: digits(errors) for name, errors in worst.items()}


# ---- divergences -----------------------------------------------------------------------------------------------------


class Job(side_by_side.Job):
    """A job of side_by_side.py in which every contender gets all rows, however slow it is."""

    def slice(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x, self.y


def of_scipy(name: str) -> Callable[..., Any]:
    return lambda job: functools.partial(peers.scipy_kl, name, job.space, job.x, job.y)


VALUES: Contenders = {
    OURS: side_by_side.klcore_out,
    "SciPy kl_div": side_by_side.scipy_special,
    "SciPy rel_entr": of_scipy("rel_entr"),
    "SciPy entropy": of_scipy("entropy"),
    "PyTorch": side_by_side.torch_eager,
    "JAX": side_by_side.jax_jit,
    "NumPy": side_by_side.numpy_lines,
}
GRADIENTS: Contenders = {name: VALUES[name] for name in (OURS, "PyTorch", "JAX", "NumPy")}


def rows_of(space: str, dtype: str, n: int, pairs: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Teachers, flat to peaked, and students; about as many for every decade of the divergence."""
    target = 10.0 ** rng.uniform(DECADES[0] - 0.3, DECADES[-1] + 0.7, (pairs, 1))
    x = rng.uniform(0.5, 8, (pairs, 1)) * rng.normal(size=(pairs, n))
    y = x + (np.sqrt(2 * target) + target / 3) * rng.normal(size=x.shape)
    if space != "logits":
        x, y = (scipy.special.log_softmax(a, axis=-1) for a in (x, y))
    if space == "probs":
        x, y = np.exp(x), np.exp(y)
        normal = np.minimum(x, y).min(axis=-1) >= np.finfo(dtype).tiny  # JAX takes smaller numbers for zeros
        x, y = x[normal], y[normal]
    return x.astype(dtype), y.astype(dtype)


def exact(space: str, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """By row: the divergence of the normalised rows, and what two formulas make of the rows as they are; by class: the
    divergence's derivative with respect to the logits of y, q - p."""
    x, y = (Pair(a.astype(np.float64)) for a in (x, y))
    if space == "probs":
        p, q, log_ratio = x, y, Doubles.log(x) - Doubles.log(y)
    else:
        if space == "logits":  # normalising undoes any shift; this one keeps exp in range
            x, y = (a - a.hi.max(axis=-1, keepdims=True) for a in (x, y))
        p, q, log_ratio = Doubles.exp(x), Doubles.exp(y), x - y
    of_p, of_q, literal = Doubles.sum(p), Doubles.sum(q), Doubles.sum(p * log_ratio)
    by_row = {"divergence": literal / of_p - Doubles.log(of_p / of_q)}
    if space != "logits":
        by_row |= {"x log(x/y)": literal, "x log(x/y) - x + y": literal - of_p + of_q}
    return {k: Doubles.double(v)[..., 0] for k, v in by_row.items()} | {"dy": Doubles.double(q / of_q - p / of_p)}


def by_decade(decade: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """Worst and median of the finite errors, and the number of errors that are not finite."""
    finite = np.isfinite(error)
    errors = [error[(decade == d) & finite] for d in DECADES]
    return {
        "worst": digits(np.max(e) if e.size else np.nan for e in errors),
        "median": digits(np.median(e) if e.size else np.nan for e in errors),
        "not finite": count(decade, ~finite),
    }


def count(decade: np.ndarray, of: np.ndarray) -> list[int]:
    return [int(((decade == d) & of).sum()) for d in DECADES]


def divergences(space: str, dtype: str, fewer: int) -> dict[str, Any]:
    """By decade of the divergence: errors of values, relative to the value, and of gradients, relative to the row's
    largest."""
    rng = np.random.default_rng(0)
    decades: list[np.ndarray] = []
    errors: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    negative: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for n, pairs in PAIRS.items():
        x, y = rows_of(space, dtype, n, pairs // fewer, rng)
        parts = max(1, x.size // BLOCK)
        blocks = zip(np.array_split(x, parts), np.array_split(y, parts), strict=True)
        shown = tqdm(blocks, f"exact: {space}, {dtype}, {n}", parts, leave=False, disable=None)
        found = [exact(space, *block) for block in shown]
        true = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
        divergence, dy = true.pop("divergence"), true.pop("dy")
        decades.append(np.floor(np.log10(divergence)))

        job = Job(space, "row", False, x, y, np.empty(len(x), dtype), np.empty_like(x))
        values = {("values", name): np.asarray(build(job)(), np.float64) for name, build in VALUES.items()}
        for key, got in (values | {("formulas", name): v for name, v in true.items()}).items():
            errors[key].append(np.abs(got - divergence) / divergence)
            negative[key].append(got < 0)
        job.gradient = space == "logits"
        for name, build in GRADIENTS.items() if job.gradient else ():
            got = np.asarray(build(job)()[1], np.float64)
            errors["gradients", name].append(np.abs(got - dy).max(axis=-1) / np.abs(dy).max(axis=-1))
    decade = np.concatenate(decades)
    figures: dict[str, Any] = {"pairs": count(decade, np.isfinite(decade))}
    for (kind, name), of_n in errors.items():
        figures.setdefault(kind, {})[name] = by_decade(decade, np.concatenate(of_n))
    for (kind, name), of_n in negative.items():
        figures[kind][name]["negative"] = count(decade, np.concatenate(of_n))
    return figures


# ---- a few values themselves -----------------------------------------------------------------------------------------

CLOSE_CLASSES, CLOSE_PAIRS = 1_000, 160
CLOSE_RANGE = (1e-12, 1.0)  # nats


def close() -> dict[str, Any]:
    """Divergences of rows of float32 logits: exact, and as contenders return them; in ascending order."""
    x, y = rows_of("logits", "float32", CLOSE_CLASSES, CLOSE_PAIRS, np.random.default_rng(0))
    true = exact("logits", x, y)["divergence"]
    job = Job("logits", "row", False, x, y, np.empty(len(x), x.dtype), np.empty_like(x))
    returned = {name: np.asarray(VALUES[name](job)(), np.float64) for name in (OURS, "NumPy", "PyTorch")}
    kept = [k for k in np.argsort(true) if CLOSE_RANGE[0] <= true[k] <= CLOSE_RANGE[1]]
    found = {name: list(values[kept]) for name, values in returned.items()}
    return {"classes": CLOSE_CLASSES, "dtype": "float32", "exact": list(true[kept]), "returned": found}


# ---- every pair of spaces --------------------------------------------------------------------------------------------

ROWS = {2: 20_000, 3: 16_000, 10: 10_000, 100: 2_000, 1_500: 150}  # classes -> rows per pair of spaces, in BATCHES
BATCHES = 10


def in_space(a: np.ndarray, space: str, dtype: str, temperature: float) -> np.ndarray:
    if space == "logits":
        return a
    log = scipy.special.log_softmax(a.astype(np.float64) / temperature, axis=-1)
    return (np.exp(log) if space == "probs" else log).astype(dtype)


def worst_errors(operation: str, pair: tuple[str, str], dtype: str) -> tuple[float, dict[str, float]]:
    """Of the value, relative to the value; and of value and gradient, as fractions of the bound."""
    row = OPERATIONS[operation]
    rng = np.random.default_rng(0)
    worst, shares = 0.0, dict.fromkeys(("value", *(f"d{name}" for name in row.gradients)), 0.0)
    for n, count in [(n, count // BATCHES) for n, count in ROWS.items() for _ in range(BATCHES)]:
        temperature = ranges.log_uniform(rng, 0.01, 100) if "logits" in pair else 1.0
        a, b = ranges.rows(rng, dtype, n, count, temperature)
        kept = ~(ranges.beyond(a) | ranges.beyond(b)) & np.isfinite(a).all(axis=-1) & np.isfinite(b).all(axis=-1)
        x, y = (in_space(v[kept], space, dtype, temperature) for v, space in zip((a, b), pair, strict=True))
        options = {"temperature": temperature} if "logits" in pair else {}
        true = oracle.fast(operation, x, y, pair, temperature)
        promised = ranges.promised(a[kept], b[kept], temperature, true.value)
        arguments, space = ((x,), pair[0]) if row.single else ((x, y), pair)
        found = getattr(klcore, operation)(*arguments, space=space, return_grad=row.gradients, **options)
        results = dict(zip(shares, found, strict=True))
        for name, got in results.items():
            size, error = getattr(true, f"{name}_size"), np.abs(got - getattr(true, name))
            if name == "value":
                worst = max(worst, np.max(error[promised] / true.value[promised], initial=0))
            else:
                error = error.sum(axis=-1)
            of = "value" if name == "value" else "gradient"
            relative, _ = oracle.tolerance(operation, pair, got.dtype, of)
            some = promised & np.isfinite(error) & (size > 1e-30) & (size < 1e30)  # far from the ends of float32
            if name == "dy" and pair[1] == "probs":  # -p/q where p counts as zero
                some &= ((y == 0) | (y > 2e6 * np.finfo(dtype).tiny)).all(axis=-1)
            limit = relative * size + (true.dy_floor if name == "dy" else 0)
            shares[name] = max(shares[name], np.max(error[some] / limit[some], initial=0))
    return worst, shares


def spaces() -> None:
    np.seterr(all="ignore")
    # leaves out sums that may have either sign, for which relative errors mean nothing: rel_entr, and costs of
    # probabilities that are not normalised
    lines = [
        (name, pair)
        for name, row in OPERATIONS.items()
        for pair in row.pairs
        if "counts" not in pair  # test_counts.py has their bounds
        if name != "rel_entr" and ("logits" in pair or row.form != _cpu.BY_COST) and name in oracle.OPERATIONS
    ]
    print("| | worst error of the value | as a share of its bound | d/dx | d/dy |")
    print("|---|" + "--:|" * 4)
    for (operation, pair), dtype in tqdm([(line, dtype) for line in lines for dtype in DTYPES], disable=None):
        worst, shares = worst_errors(operation, pair, dtype)
        figures = f"{worst:.0e}", *(f"{share:.2g}" for share in shares.values())
        tqdm.write(" | ".join([f"| {operation} {', '.join(pair)}, {dtype}", *figures]) + " |")


# ---- the record ------------------------------------------------------------------------------------------------------


def measure(fewer: int) -> dict[str, Any]:
    jax.config.update("jax_enable_x64", True)
    np.seterr(all="ignore")  # the peers overflow
    turns = [(f"{function} {dtype}", function, dtype) for function in FUNCTIONS for dtype in DTYPES]
    found = {
        "elementary": {
            "octaves": list(OCTAVES),
            "points": {dtype: points // fewer for dtype, points in POINTS.items()},
            "bounds": {dtype: oracle.TOLERANCES["elementary", dtype] for dtype in DTYPES},
            "ulp": {name: elementary(f, dtype, POINTS[dtype] // fewer) for name, f, dtype in tqdm(turns, disable=None)},
        },
        "divergence": {
            "decades": list(DECADES),
            "classes": {n: pairs // fewer for n, pairs in PAIRS.items()},
            "bounds": {
                "values": {dtype: oracle.TOLERANCES["kl", dtype] for dtype in DTYPES},
                "gradients": {dtype: oracle.TOLERANCES["gradient", dtype] for dtype in DTYPES},
            },
        },
    }
    for space in SPACES:
        for dtype in DTYPES:
            found["divergence"][f"{space} {dtype}"] = divergences(space, dtype, fewer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} times fewer of all: for a first look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the record's place, if not docs/benchmarks")
    parser.add_argument("--close", action="store_true", help="record what is returned for a few pairs of logits")
    parser.add_argument("--spaces", action="store_true", help="print the worst errors of every pair of spaces")
    args = parser.parse_args()
    if args.spaces:
        return spaces()
    machine = side_by_side.describe(LIBRARIES)
    kind, found = ("close", close()) if args.close else ("accuracy", measure(QUICK if args.quick else 1))
    path = args.json or ROOT / "docs" / "benchmarks" / f"{kind}-{machine['date'][:10]}.json"
    text = json.dumps({"machine": machine} | found, indent=1)
    path.write_text(re.sub(r"\[[^][]*\]", lambda found: " ".join(found[0].split()), text) + "\n")  # one line per list
    print(path)


if __name__ == "__main__":
    main()
