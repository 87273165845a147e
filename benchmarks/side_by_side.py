"""How fast klcore is on the CPU, compared with the limit of memory and with the libraries people use instead.

    python benchmarks/side_by_side.py [--quick] [--isa avx2] [--json FILE]

Every operation is measured on float32 arrays that together are larger than any last-level cache (except with --quick).
No library can then be faster than moving each necessary byte once: both inputs for a value (2u, where u are the bytes
of one input), and also the output for a gradient (3u). The *floor* is a C loop that does only that, on the same buffers
with the same number of threads. Each contender is called once first, so that everything is compiled, and its result is
compared with klcore's. Then they take turns, one call each, round after round, and the median counts: of five rounds,
or of three for contenders that take more than a second. On a busy machine the figures mean little.

The conditions:

* klcore, numba and numexpr write into existing arrays. PyTorch, JAX and NumPy cannot do that with these expressions,
  and allocate, as they do for their users; so does "klcore, new arrays".
* SciPy and NumPy run on a sixteenth of the rows, scaled up: they use one thread, and their time is proportional to
  size.
* --isa limits only klcore; the others keep the instructions that they detect.
* JAX takes its number of threads from the processors that it may use; all others are set to klcore's.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
from floor import Unavailable, buffer, floor
from tqdm import tqdm

import klcore

CLASSES = 32_768
ROWS, QUICK_ROWS = 8_192, 1_024  # 1 GiB and 128 MiB per array
ROUNDS, QUICK_ROUNDS = 5, 3
SLOW_ROUNDS = 3  # for contenders that take more than a second: their median needs no more
SLICE = 16
PEAK = 10  # memory in all, in arrays of the size of one input: ours and those of the contender that needs most
LIBRARIES = ("klcore", "numpy", "scipy", "torch", "jax", "numba", "numexpr")


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One operation on arrays of shape (rows, n); `values` and `grad` are the arrays to write into."""

    space: str
    reduction: str
    gradient: bool
    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    grad: np.ndarray

    @property
    def title(self) -> str:
        return f"{'value and gradient' if self.gradient else 'value'}, {self.space}, {self.reduction!r}"

    @property
    def necessary_bytes(self) -> int:
        return (3 if self.gradient else 2) * self.x.nbytes

    def slice(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x[: len(self.x) // SLICE], self.y[: len(self.y) // SLICE]

    def reduced(self, values: Any) -> Any:
        """The values of rows, or their sum if that is the operation."""
        return values.sum() if self.reduction == "sum" else values

    def total(self, terms: Any) -> Any:
        return self.reduced(terms.sum(axis=-1))


@dataclass
class Contender:
    """`build(job)` returns a function without arguments that returns the value or (value, gradient), or None."""

    name: str
    build: Callable[[Job], Callable[[], Any] | None]
    needs: tuple[str, ...] = ()
    sliced: bool = False

    @property
    def floor(self) -> bool:
        return self.name.startswith("floor")

    def missing(self) -> str:
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else ""


CONTENDERS: list[Contender] = []


def contender(name: str, *needs: str, sliced: bool = False) -> Callable[[Any], Any]:
    def register(build: Any) -> Any:
        CONTENDERS.append(Contender(name, build, needs, sliced))
        return build

    return register


# --- the floors ------------------------------------------------------------------------------------------------------


@contender("floor: read")
def floor_read(job: Job) -> Any:
    return None if job.gradient else floor("read_both", job.x, job.y)


@contender("floor: read, write")
def floor_read_write(job: Job) -> Any:
    return floor("read_write", job.x, job.y, job.grad) if job.gradient else None


@contender("floor: read, stream")
def floor_read_stream(job: Job) -> Any:
    return floor("read_stream", job.x, job.y, job.grad) if job.gradient else None


# --- klcore ----------------------------------------------------------------------------------------------------------


@contender("klcore")
def klcore_out(job: Job) -> Any:
    kl_div = functools.partial(klcore.kl_div, job.x, job.y, space=job.space, reduction=job.reduction)
    if job.gradient:
        return functools.partial(kl_div, return_grad="y", out=(job.values, job.grad))
    return functools.partial(kl_div, out=job.values) if job.reduction == "row" else kl_div


@contender("klcore, new arrays")
def klcore_new(job: Job) -> Any:
    if not job.gradient:
        return None  # it allocates nothing large
    return lambda: klcore.kl_div(job.x, job.y, space=job.space, reduction=job.reduction, return_grad="y")


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_loss(job: Job) -> Callable[[Any, Any], Any]:
    return peers.torch_loss(job.space, peers.torch_kl(job.reduction))


def torch_call(job: Job, loss: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(klcore.get_num_threads())
    x, y = torch.from_numpy(job.x), torch.from_numpy(job.y)
    return peers.torch_step(functools.partial(loss, x), y) if job.gradient else lambda: loss(x, y)


@contender("torch eager", "torch")
def torch_eager(job: Job) -> Any:
    return torch_call(job, torch_loss(job))


@contender("torch.compile", "torch")
def torch_compile(job: Job) -> Any:
    import torch

    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("needs a C++ compiler")
    torch._dynamo.reset()  # otherwise it would compile the second operation for dynamic shapes
    return torch_call(job, torch.compile(torch_loss(job), dynamic=False))


# --- JAX -------------------------------------------------------------------------------------------------------------


@contender("JAX jit", "jax")
def jax_jit(job: Job) -> Any:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    def rows(x: Any, y: Any) -> Any:
        return peers.jax_terms(job.space, x, y).sum(-1)

    def value_and_gradient(y: Any, x: Any) -> Any:
        def total(y: Any) -> Any:
            values = rows(x, y)
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(y)
        return values, gradient

    x, y = jnp.from_dlpack(job.x), jnp.from_dlpack(job.y)  # no copies
    compiled = jax.jit(value_and_gradient if job.gradient else lambda y, x: job.reduced(rows(x, y)))
    return lambda: jax.block_until_ready(compiled(y, x))


# --- numba and numexpr ------------------------------------------------------------------------------------------------


@contender("numba", "numba")
def numba_fused(job: Job) -> Any:
    import numba

    numba.set_num_threads(klcore.get_num_threads())
    kernel = peers.numba_kernels()[job.space, job.gradient]

    def call() -> Any:
        if job.gradient:
            kernel(job.x, job.y, job.values, job.grad)
            return job.values, job.grad
        kernel(job.x, job.y, job.values)
        return job.reduced(job.values)

    return call


@contender("numexpr", "numexpr")
def numexpr_blocks(job: Job) -> Any:
    import numexpr

    numexpr.set_num_threads(klcore.get_num_threads())
    return lambda: peers.numexpr_kl(job.space, job.x, job.y, job.grad, job.total, job.gradient)


# --- SciPy and NumPy: one thread, on a slice of the rows -------------------------------------------------------------


@contender("SciPy", "scipy", sliced=True)
def scipy_special(job: Job) -> Any:
    if job.gradient:
        return None
    return lambda: job.reduced(peers.scipy_kl("kl_div", job.space, *job.slice()))


@contender("NumPy", sliced=True)
def numpy_lines(job: Job) -> Any:
    return lambda: peers.array_kl(np, job.space, *job.slice(), job.total, job.gradient)


# --- agreement -------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """klcore's results: every row's value, and the gradient of the first rows."""

    values: np.ndarray
    gradients: list[np.ndarray]

    @classmethod
    def of(cls, job: Job) -> "Reference":
        values = klcore.kl_div(job.x, job.y, space=job.space)
        few = job.x[:SLICE], job.y[:SLICE]
        # for unnormalised arguments the gradients of kl_div and rel_entr differ, and libraries choose either
        both = [f(*few, space=job.space, return_grad="y")[1] for f in (klcore.kl_div, klcore.rel_entr)]
        return cls(values, both if job.gradient else [])

    def disagreement(self, job: Job, result: Any, sliced: bool) -> str:
        """What differs, or ''. Sums of 32,768 float32 terms in any order agree to 1e-4; mistakes do not."""
        value, gradient = result if job.gradient else (result, None)
        expected = self.values[: len(self.values) // SLICE] if sliced else self.values
        if job.reduction == "sum":
            expected = expected.sum(dtype=np.float64)
        if not np.allclose(np.asarray(value), expected, rtol=1e-4, atol=1e-7):
            return "another value than klcore"
        if gradient is None:
            return ""
        gradient = np.asarray(gradient[:SLICE])
        expected = [g[: len(gradient)] for g in self.gradients]
        close = any(np.allclose(gradient, g, rtol=1e-4, atol=1e-5 * np.abs(g).max()) for g in expected)
        return "" if close else "another gradient than klcore"


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    name: str
    seconds: list[float]
    note: str = ""
    failed: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def prepare(job: Job) -> tuple[list[tuple[Contender, Callable[[], Any]]], list[Measurement]]:
    """The contenders that can be measured, each called once and checked, and a note on each one that cannot."""
    reference, ready, absent = Reference.of(job), [], []
    for c in tqdm(CONTENDERS, desc="first calls", leave=False, disable=None):
        if note := c.missing():
            absent.append(Measurement(c.name, [], note))
            continue
        try:
            call = c.build(job)
            if call is None:
                continue
            result = call()
        except Unavailable as error:
            absent.append(Measurement(c.name, [], str(error)))
            continue
        except Exception as error:  # a contender that fails must not stop the others
            absent.append(Measurement(c.name, [], f"failed: {str(error).strip().partition(chr(10))[0][:80]}", True))
            continue
        note = "" if c.floor else reference.disagreement(job, result, c.sliced)
        if note:
            absent.append(Measurement(c.name, [], note, True))
        else:
            ready.append((c, call))
        del result  # up to 1 GiB
    return ready, absent


def measure(job: Job, rounds: int) -> list[Measurement]:
    ready, absent = prepare(job)
    seconds: dict[str, list[float]] = {c.name: [] for c, _ in ready}
    for turn in tqdm(range(rounds), desc=job.title, leave=False, disable=None):
        for c, call in ready:
            if turn >= SLOW_ROUNDS and min(seconds[c.name]) > 1:
                continue
            time.sleep(0.01)  # the threads of the previous call spin for a while
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            del result  # outside the measured time, and before the next one allocates
            seconds[c.name].append(elapsed * (SLICE if c.sliced else 1))
    note = f"1/{SLICE} of the rows, scaled"
    return [Measurement(c.name, seconds[c.name], note if c.sliced else "") for c, _ in ready] + absent


def report(job: Job, measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Print the table of one operation; return its figures for the JSON file."""
    timed = {m.name: m.median for m in measurements if m.seconds}
    floor_time = min((t for name, t in timed.items() if name.startswith("floor")), default=None)
    ours = timed.get("klcore")
    necessary = job.necessary_bytes
    print(f"\n{job.title}: {necessary / 2**30:.2f} GiB to move, {'3u' if job.gradient else '2u'}")
    print(f"  {'':<20}{'median ms':>10}{'GB/s':>8}{'x floor':>9}{'x klcore':>10}")
    figures = []
    for m in measurements:
        if not m.seconds:
            print(f"  {m.name:<20}{'-':>10}{'-':>8}{'-':>9}{'-':>10}   {m.note}")
            figures.append({"contender": m.name, "note": m.note, "failed": m.failed})
            continue
        t = m.median
        row = {
            "contender": m.name,
            "median_ms": 1e3 * t,
            "gb_per_s": necessary / t / 1e9,
            "times_floor": floor_time and t / floor_time,
            "times_klcore": ours and t / ours,
            "seconds": m.seconds,
            "note": m.note,
        }
        figures.append(row)
        ratios = (f"{row[key]:.2f}" if row[key] else "-" for key in ("times_floor", "times_klcore"))
        print(
            f"  {m.name:<20}{row['median_ms']:>10.1f}{row['gb_per_s']:>8.2f}{next(ratios):>9}{next(ratios):>10}"
            f"   {m.note}".rstrip()
        )
    sys.stdout.flush()
    return figures


def call_overhead(rounds: int = 15, calls: int = 2_000) -> dict[str, float]:
    """Microseconds that a call on (10, 10) float32 takes: nothing but overhead."""
    rng = np.random.default_rng(0)
    x, y = rng.dirichlet(np.ones(10), (2, 10)).astype(np.float32)
    timed: dict[str, Callable[[], Any]] = {
        "klcore": lambda: klcore.kl_div(x, y),
        "klcore, 'sum'": lambda: klcore.kl_div(x, y, reduction="sum"),
        "klcore, with gradient": lambda: klcore.kl_div(x, y, return_grad="y"),
    }
    if importlib.util.find_spec("torch"):
        import torch
        from torch.nn.functional import kl_div

        tx, log_ty = torch.from_numpy(x), torch.from_numpy(np.log(y))
        timed["torch kl_div, 'sum'"] = lambda: kl_div(log_ty, tx, reduction="sum")
        timed["torch kl_div, rows"] = lambda: kl_div(log_ty, tx, reduction="none").sum(-1)
    if importlib.util.find_spec("scipy"):
        from scipy import special

        timed["SciPy kl_div, rows"] = lambda: special.kl_div(x, y).sum(axis=-1)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            times[name].append(timeit.timeit(call, number=calls) / calls * 1e6)
    medians = {name: statistics.median(t) for name, t in times.items()}
    print("\ncall on (10, 10), probs (torch is given log y)")
    print(f"  {'':<24}{'median us':>10}{'x klcore':>10}")
    for name, t in medians.items():
        print(f"  {name:<24}{t:>10.2f}{t / medians['klcore']:>10.2f}")
    if "torch kl_div, 'sum'" not in medians:
        print("  torch not installed")
    sys.stdout.flush()
    return medians


# --- the data --------------------------------------------------------------------------------------------------------


def blocks(a: np.ndarray) -> Any:
    return tqdm(np.split(a, len(a) // 64), desc="data", leave=False, disable=None)


def fill_with_logits(a: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for block in blocks(a):
        rng.standard_normal(out=block, dtype=np.float32)


def to_log_probs(a: np.ndarray) -> None:
    for block in blocks(a):
        block -= np.log(np.exp(block).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def to_probs(a: np.ndarray) -> None:
    for block in blocks(a):
        np.exp(block, out=block)


def run_all(rows: int, rounds: int, quick: bool) -> dict[str, Any]:
    x, y, grad = (buffer((rows, CLASSES)) for _ in range(3))
    values = buffer((rows,))
    for seed, a in enumerate((x, y)):
        fill_with_logits(a, seed)
    results: dict[str, Any] = {}
    # each space is computed from the previous one, in place
    for space, convert in (("logits", None), ("log_probs", to_log_probs), ("probs", to_probs)):
        if convert:
            for a in (x, y):
                convert(a)
        for reduction, gradient in (("row", False), ("sum", False), ("row", True)):
            if quick and reduction == "sum":
                continue  # the same kernels
            job = Job(space, reduction, gradient, x, y, values, grad)
            results[job.title] = report(job, measure(job, rounds))
    return results


# --- the machine -----------------------------------------------------------------------------------------------------


def first_match(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def rows_that_fit(rows: int) -> int:
    available = first_match("/proc/meminfo", "MemAvailable")  # in KiB
    while available and rows > 64 and PEAK * rows * CLASSES * 4 > int(available.split()[0]) * 1024:
        rows //= 2
    return rows


def last_level_cache() -> str:
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return f"{int(sizes[-1].read_text().strip().removesuffix('K')) // 1024} MiB" if sizes else "unknown"


def describe(libraries: Iterable[str]) -> dict[str, Any]:
    try:
        config = klcore.show_config(mode="dicts")
    except ValueError as error:  # an unknown instruction set
        sys.exit(str(error))
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": first_match("/proc/cpuinfo", "model name") or platform.processor(),
        "instruction set of klcore": config["cpu"]["instruction set in use"],
        "threads": klcore.get_num_threads(),
        "last-level cache": last_level_cache(),
        # processes waiting for a processor before we start: with more than a few tenths, others affect the times
        "load average of the last minute": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version()} | {name: peers.version(name) for name in libraries},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller arrays, fewer rounds: for a first look")
    parser.add_argument("--isa", help="the instruction set that klcore uses, as KLCORE_ISA: generic, avx2, avx512")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures there")
    args = parser.parse_args()
    if args.isa and os.environ.get("KLCORE_ISA") != args.isa:  # chosen once per process: start another one
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"KLCORE_ISA": args.isa})

    rows = rows_that_fit(QUICK_ROWS if args.quick else ROWS)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    machine = describe(LIBRARIES) | {
        "arrays": f"({rows}, {CLASSES}) float32, {rows * CLASSES * 4 / 2**20:.0f} MiB each",
        "rounds": rounds,
    }
    for key, entry in machine.items():
        print(f"{key}: {', '.join(f'{k} {v}' for k, v in entry.items()) if isinstance(entry, dict) else entry}")
    if args.quick:
        print("quick: arrays too small, rounds too few for figures to be quoted")
    start = time.perf_counter()
    operations = run_all(rows, rounds, args.quick)
    overhead = call_overhead()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"\nin {time.perf_counter() - start:.0f} s, at most {peak:.1f} GiB of memory")
    if args.json:
        figures = {"machine": machine, "operations": operations, "call on (10, 10), microseconds": overhead}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    failures = [
        f"{title}: {f['contender']}: {f['note']}" for title, o in operations.items() for f in o if f.get("failed")
    ]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
