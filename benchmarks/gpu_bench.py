"""How fast klcore is on a GPU, compared with the limit of memory and with the libraries people use instead.

Run by gpu_run.py, for its stages "ceilings", "alone", "peers" and "more". A *case* is a shape, a dtype, a space, an
operation (mostly kl_div), and what is wanted: the value (the sum over all rows), or the value and a gradient. A
*contender* is a way of computing it.

* Every contender gets the same arrays, and computes gradients with respect to the same operands. Probabilities start
  from probabilities, logits from logits; no contender waits for the GPU.
* Calls go over as many sets of arrays as fill four times the L2 cache, and at least 256 MB: data comes from memory, not
  from a cache.
* k calls are captured in a CUDA graph, with k so large that a replay takes milliseconds, and replays are timed by
  events. JAX cannot be captured: k calls are made without waiting, and the clock is read around them. The same goes for
  any contender that fails to be captured; the record says in "how" what was done.
* Contenders take turns, one replay each, round after round. Medians and the 20th and 80th percentile count.
* "wall" is the time of one uncaptured call from Python, when many are made without waiting: if it is more than the time
  on the GPU, it is the cost of launching.
* The record holds times, and the bandwidth of a copy on this GPU. report.py turns them into percentages.
* Errors are relative for the value, and in units of the largest entry for the gradient of the first rows, compared with
  float64. 16-bit libraries return 16-bit values.
"""

import functools
import gc
import importlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
from gpu_bits import distribution
from gpu_device import SPACES, Gpu, numpy_dtype
from gpu_lines import sentence

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

OUTPUTS: dict[str, Any] = {"value": None, "value+dy": "y", "value+dx": "x"}
COMPARED = ("float32", "bfloat16")
FIRST = ((8_192, 32_768), (4_096, 128_256))  # a gigabyte and more: what the targets are about
NAMED = ((2_048, 131_072), (4_096, 151_936), (4_096, 50_257), (1_000_000, 100))
FEW = ((2_000_000, 2), (1_000_000, 10), (500_000, 32))  # classes
# where klcore changes its method, and between: 128 | classes share a warp, 1024 | one chunk; then by shared memory
SWEEP = (
    64, 127, 128, 129, 256, 512, 1_000, 1_024, 1_025, 1_536, 2_048, 2_049, 4_096, 8_192, 8_193, 16_384, 16_385, 32_768,
    32_769, 65_536, 65_537, 131_072, 131_073, 262_144, 262_145, 524_288, 1_048_576, 1_048_577,
)  # fmt: skip
SWEPT = 1 << 28  # elements per array
ROUNDS = 20
WARM_SECONDS = 0.1  # before rounds count: until the clocks are up
REPLAY_MS = 2.0
MOST_CALLS = 256  # in a graph
WRONG = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 3e-2}  # a larger error is a mistake, not rounding
SAMPLE = 16  # rows whose gradients are checked


@dataclass(frozen=True)
class Case:
    rows: int
    n: int
    dtype: str
    space: str  # or two names, where x and y differ
    outputs: str
    operation: str = "kl_div"

    @property
    def array_bytes(self) -> int:
        return self.rows * self.n * numpy_dtype(self.dtype).itemsize

    @property
    def spaces(self) -> tuple[str, str]:
        x, _, y = self.space.partition(" ")
        return x, y or x


@dataclass(frozen=True)
class Task:
    """A case, and the contenders that compute it."""

    part: str
    case: Case
    contenders: tuple[str, ...]

    @property
    def name(self) -> str:
        c = self.case
        operation = "" if c.operation == "kl_div" else f" {c.operation}"
        return f"{self.part}:{operation} ({c.rows}, {c.n}) {c.dtype} {c.space} {c.outputs}"


def tasks(stage: str, emulated: bool) -> list[Task]:
    """What a stage measures, the most important first."""
    ours, everyone = ("klcore",), tuple(CONTENDERS)

    def over(part: str, sizes: Any, spaces: Iterable[str], contenders: Sequence[str] = ours) -> Iterator[Task]:
        for size, dtype, space, wanted in itertools.product(sizes, COMPARED, spaces, ("value", "value+dy")):
            yield Task(part, Case(*size, dtype, space, wanted), tuple(contenders))

    if emulated:
        shape = {"alone": (33, 3), "peers": (20, 3), "more": (9, 3)}[stage]
        return [Task(stage, Case(*shape, "float32", s, o), ours) for s in SPACES[::2] for o in ("value", "value+dy")]
    if stage == "alone":
        found = [*over(stage, FIRST, SPACES), *over(stage, NAMED, SPACES[::2]), *over(stage, FEW, SPACES)]
        return [*found, *operations(), *over(stage, NAMED, SPACES[1:2])]
    if stage == "peers":
        return list(over(stage, FIRST[:1], SPACES[::2], everyone))
    found = [*over("peers", FIRST[1:], SPACES[::2], everyone), *over("peers", FIRST, SPACES[1:2], everyone)]
    for dtype, (space, wanted) in itertools.product(COMPARED, (("probs", "value"), ("logits", "value+dy"))):
        found += [Task("sweep", Case(max(1, SWEPT // n), n, dtype, space, wanted), ours) for n in SWEEP]
    return found


def operations() -> Iterator[Task]:
    """Every operation and pair of spaces that is not measured elsewhere, at one shape, for operations with fast answers
    from the oracle."""
    for dtype, sx, sy, row in itertools.product(COMPARED, SPACES, SPACES, OPERATIONS.values()):
        elsewhere = sx == sy and row.name == "kl_div"
        if not elsewhere and (sx, sy) in row.pairs and row.form != _cpu.BY_CLASS:
            for wanted in ("value", f"value+d{row.gradients[-1]}"):
                space = sx if sx == sy else f"{sx} {sy}"
                yield Task("operations", Case(*FIRST[0], dtype, space, wanted, row.name), ("klcore",))


# ---- data ------------------------------------------------------------------------------------------------------------


def definitions(operation: str) -> list[Any]:
    """The definitions in tests/oracle.py that a result may follow: libraries' divergences are with or without -x +
    y."""
    tests = str(Path(__file__).resolve().parents[1] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    known = importlib.import_module("oracle").DEFINITIONS
    return [known[name] for name in dict.fromkeys((operation, "rel_entr" if operation == "kl_div" else operation))]


class Data:
    """The sets of arrays of one shape, dtype and spaces, and the float64 results for the first of them."""

    def __init__(self, gpu: Gpu, case: Case) -> None:
        self.gpu, self.case = gpu, case
        self._values: dict[str, list[float]] = {}
        enough = max(256 << 20, 4 * gpu.cache_bytes()) if not gpu.emulated else 1
        count = -(-enough // (2 * case.array_bytes))
        self.sets = [
            tuple(gpu.fill(case.rows, case.n, case.dtype, s, seed, side) for side, s in enumerate(case.spaces))
            for seed in range(count)
        ]
        gpu.synchronize()

    def _widened(self, a: Any) -> Any:
        """float64, on the GPU; bfloat16 from its bits, which are the upper half of a float32's."""
        if self.case.dtype == "bfloat16":
            a = (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return a.astype(np.float64)

    def values(self, operation: str) -> list[float]:
        """The exact ones, in float64, some rows at a time."""
        if operation in self._values:
            return self._values[operation]
        x, y = self.sets[0]
        found, at_once = np.zeros(len(definitions(operation))), max(1, (1 << 26) // self.case.n)
        for start in range(0, self.case.rows, at_once):
            a, b = (self._widened(v[start : start + at_once]) for v in (x, y))
            (p, log_p), (q, log_q) = map(distribution, (a, b), self.case.spaces)
            found += [float(d.terms(p, q, log_p, log_q).sum()) for d in definitions(operation)]
        self._values[operation] = found.tolist()
        return self._values[operation]

    def gradients(self, operation: str) -> list[np.ndarray]:
        """The exact ones of the first rows, in float64, likewise."""
        a, b = (self.gpu.get(v[:SAMPLE]).astype(np.float64) for v in self.sets[0])
        (p, log_p), (q, log_q) = map(distribution, (a, b), self.case.spaces)
        of = p, q, log_p, log_q
        if OPERATIONS[operation].single:
            of_log, at, space = [p * d.by_p(*of) for d in definitions(operation)], p, self.case.spaces[0]
        else:
            of_log, at, space = [d.by_log_q(*of) for d in definitions(operation)], q, self.case.spaces[1]
        if space == "probs":
            return [g / at for g in of_log]
        return [g - at * g.sum(-1, keepdims=True) for g in of_log] if space == "logits" else of_log

    def error(self, value: float, gradients: Sequence[np.ndarray]) -> dict[str, float]:
        operation = self.case.operation
        found = {"value": min(abs(value - right) / abs(right) for right in self.values(operation))}
        for g in gradients:
            g = g.astype(np.float64)
            errors = [float(abs(g - right).max() / abs(right).max()) for right in self.gradients(operation)]
            found[self.case.outputs.partition("+")[2]] = min(errors)
        return found


# ---- contenders ------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """Something that a contender needs is missing, or it cannot do what is asked."""


class Contender:
    """`call(k)` computes set k and returns the value and the gradients, arrays of its library, without waiting."""

    captured = True

    def __init__(self, data: Data) -> None:
        self.data, self.case, self.gpu = data, data.case, data.gpu
        self.with_gradient = data.case.outputs != "value"

    def call(self, k: int) -> Any:
        raise NotImplementedError

    def synchronize(self) -> None:
        self.gpu.synchronize()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        """A function that replays the calls once and returns the milliseconds."""
        return self.gpu.capture(calls).milliseconds

    def uncaptured(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        def milliseconds() -> float:
            self.synchronize()
            start = time.perf_counter()
            for call in calls:
                last = call()
            self.wait(last)
            return 1e3 * (time.perf_counter() - start)

        return milliseconds

    def wait(self, result: Any) -> None:
        self.synchronize()

    def to_numpy(self, a: Any) -> np.ndarray:
        return self.gpu.get(a)


class Klcore(Contender):
    """klcore's functions, writing into existing arrays."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        empty = self.gpu.cupy.empty
        self._outs = []
        for x, _ in data.sets:
            value = empty((), np.float32)
            self._outs.append((value, self.gpu.cupy.empty_like(x)) if self.with_gradient else value)
        self._keywords = {
            "space": self.case.spaces[0] if OPERATIONS[self.case.operation].single else self.case.spaces,
            "reduction": "sum",
            "return_grad": OUTPUTS[self.case.outputs],
        }

    def call(self, k: int) -> Any:
        arrays = self.data.sets[k][: len(OPERATIONS[self.case.operation].gradients)]
        return getattr(klcore, self.case.operation)(*arrays, out=self._outs[k], **self._keywords)


class Torch(Contender):
    """PyTorch's own functions, written as usual."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.torch = importlib.import_module("torch")
        self.sets = [tuple(self._lend(a) for a in arrays) for arrays in data.sets]
        if self.with_gradient:
            for _, y in self.sets:
                y.requires_grad_()
        self._loss = self.loss()

    def _lend(self, a: Any) -> Any:
        """The same memory; bfloat16 as integers, which every exchange format supports."""
        bits = a.view(np.int16) if self.case.dtype == "bfloat16" else a
        tensor = self.torch.from_dlpack(bits)
        return tensor.view(self.torch.bfloat16) if self.case.dtype == "bfloat16" else tensor

    def loss(self) -> Callable[[Any, Any], Any]:
        return peers.torch_loss(self.case.space, peers.torch_kl("sum"))

    def call(self, k: int) -> Any:
        value = self._loss(*self.sets[k])
        if not self.with_gradient:
            return value
        return (value.detach(), *self.torch.autograd.grad(value, self.sets[k][1:]))

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        torch = self.torch
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls[0]()  # libraries initialise themselves on a stream before it is captured
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for call in calls:
                call()

        def milliseconds() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        return milliseconds

    def to_numpy(self, a: Any) -> np.ndarray:
        return np.asarray(a.detach().to(self.torch.float32).cpu().numpy())


class TorchCompile(Torch):
    def loss(self) -> Callable[[Any, Any], Any]:
        self.torch._dynamo.reset()  # otherwise the second shape would be compiled for dynamic shapes
        return self.torch.compile(super().loss(), dynamic=False)


class Liger(Torch):
    """Liger-Kernel's divergence."""

    def loss(self) -> Callable[[Any, Any], Any]:
        return peers.torch_loss(self.case.space, peers.liger_kl())

    @property
    def captured(self) -> bool:  # type: ignore[override]
        return not self.with_gradient  # its backward reads a number, which waits for the GPU


class Jax(Contender):
    captured = False

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        jax = importlib.import_module("jax")
        self._jax, space = jax, self.case.space

        def total(x: Any, y: Any) -> Any:
            return peers.jax_terms(space, x, y).sum()

        function = jax.value_and_grad(total, argnums=1) if self.with_gradient else total
        self.sets = [tuple(self._lend(a) for a in arrays) for arrays in data.sets]
        self._compiled = jax.jit(function).lower(*self.sets[0]).compile()

    def _lend(self, a: Any) -> Any:
        jax = self._jax
        if self.case.dtype != "bfloat16":
            return jax.dlpack.from_dlpack(a)
        return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(a.view(np.int16)), jax.numpy.bfloat16)

    def call(self, k: int) -> Any:
        return self._compiled(*self.sets[k])

    def wait(self, result: Any) -> None:
        self._jax.block_until_ready(result)

    def to_numpy(self, a: Any) -> np.ndarray:
        return np.asarray(a.astype("float32"))


class Cupy(Contender):
    """The formulas written with arrays."""

    def call(self, k: int) -> Any:
        cupy = self.gpu.cupy
        return peers.array_kl(cupy, self.case.space, *self.data.sets[k], cupy.sum, self.with_gradient)


CONTENDERS: dict[str, tuple[type[Contender], tuple[str, ...]]] = {
    "klcore": (Klcore, ()),
    "torch eager": (Torch, ("torch",)),
    "torch.compile": (TorchCompile, ("torch", "triton")),
    "Liger-Kernel": (Liger, ("torch", "triton", "liger_kernel")),
    "JAX jit": (Jax, ("jax",)),
    "CuPy": (Cupy, ()),
}


# ---- one case --------------------------------------------------------------------------------------------------------


class Runner:
    """A contender, checked and ready to be timed."""

    def __init__(self, name: str, data: Data) -> None:
        kind, needs = CONTENDERS[name]
        absent = [module for module in needs if importlib.util.find_spec(module) is None]
        if absent:
            raise Unavailable(f"{', '.join(absent)} not installed")
        self.name, self.data = name, data
        self.contender = kind(data)
        result = self.contender.call(0)
        self.contender.wait(result)
        self.errors = self._errors(result)
        del result
        calls = [functools.partial(self.contender.call, k) for k in range(len(data.sets))]
        once = self.contender.uncaptured(calls)
        once()
        a_round = once()  # over all sets
        self.calls = calls * max(1, min(round(REPLAY_MS / a_round), MOST_CALLS // len(calls)))
        # many calls are pending before the first has ended, so this is Python's time if that is larger
        many = calls * max(1, min(round(10 / a_round), 100 // len(calls)))
        time_many = self.contender.uncaptured(many)
        self.wall_us = 1e3 * min(time_many() for _ in range(3)) / len(many)
        release(data.gpu)  # a graph brings its own memory
        self.how = "graph"
        try:
            if not self.contender.captured:
                raise Unavailable("cannot be captured")
            self.replay = self.contender.capture(self.calls)
            self.replay()
        except Exception as error:  # of any library's own
            self.how = f"clock around {len(self.calls)} calls: {sentence(error)}"
            self.replay = self.contender.uncaptured(self.calls)
            self.replay()
        self.times: list[float] = []

    def _errors(self, result: Any) -> dict[str, float]:
        value, *gradients = result if isinstance(result, tuple) else (result,)
        to_numpy = self.contender.to_numpy
        return self.data.error(float(to_numpy(value)), [to_numpy(g[:SAMPLE]) for g in gradients])

    def time(self) -> None:
        self.times.append(self.replay() / len(self.calls))

    def record(self) -> dict[str, Any]:
        low, median, high = (float(v) for v in np.quantile(self.times, (0.2, 0.5, 0.8)))
        limit = WRONG[self.data.case.dtype]
        return {
            "name": self.name,
            "ms": median,
            "ms 20%": low,
            "ms 80%": high,
            "wall us": self.wall_us,
            "errors": self.errors,
            "wrong": any(not e <= limit for e in self.errors.values()),
            "calls": len(self.calls),
            "how": self.how,
        }


def measure(task: Task, data: Data) -> dict[str, Any]:
    """The record of one case."""
    runners, absent = [], []
    for name in task.contenders:
        try:
            runners.append(Runner(name, data))
        except Exception as error:  # a case that fails must not stop the others
            absent.append({"name": name, "absent": str(error) if isinstance(error, Unavailable) else sentence(error)})
            data.gpu.synchronize()  # raises if this process has lost the GPU
            release(data.gpu)
    start = time.perf_counter()
    while runners and not data.gpu.emulated and time.perf_counter() - start < WARM_SECONDS:
        for runner in runners:
            runner.replay()
    for _ in range(3 if data.gpu.emulated else ROUNDS):
        for runner in runners:
            runner.time()
    figures = [runner.record() for runner in runners] + absent
    return asdict(task.case) | {"part": task.part, "sets": len(data.sets), "contenders": figures}


class Bench:
    """Measures tasks by name; data is kept as long as the next task needs the same data."""

    def __init__(self, gpu: Gpu, stage: str) -> None:
        self.gpu = gpu
        self.tasks = {task.name: task for task in tasks(stage, gpu.emulated)}
        self._data: Data | None = None

    def __call__(self, name: str) -> dict[str, Any]:
        return {"figures": measure(self.tasks[name], self.data(self.tasks[name].case))}

    def data(self, case: Case) -> Data:
        def lies_in(c: Case) -> tuple[Any, ...]:
            return c.rows, c.n, c.dtype, c.space

        if self._data is None or lies_in(self._data.case) != lies_in(case):
            self._data = None
            release(self.gpu)
            if self.gpu.memory() < 6 * case.array_bytes:
                raise MemoryError(f"{self.gpu.memory() >> 20} MiB of memory are free, too few")
            self._data = Data(self.gpu, case)
        self._data.case = case
        release(self.gpu)
        return self._data

    def warm(self, name: str) -> dict[str, Any]:
        """Make the libraries of a case compile, for a later timed run with the same caches on disk."""
        task = self.tasks[name]
        for contender in ("torch.compile", "Liger-Kernel", "JAX jit"):
            kind, needs = CONTENDERS[contender]
            if contender in task.contenders and all(map(importlib.util.find_spec, needs)):
                kind(self.data(task.case)).call(0)
                self.gpu.synchronize()
        return {}


# ---- calls so small that there is nothing to compute -----------------------------------------------------------------


def overhead(gpu: Gpu) -> dict[str, float]:
    """Microseconds that a call on (10, 10) float32 takes from Python."""
    rounds, calls = (1, 5) if gpu.emulated else (15, 200)
    x, y = (gpu.fill(10, 10, "float32", "probs", 0, side) for side in (0, 1))
    out = gpu.cupy.empty(10, np.float32)
    timed: dict[str, Callable[[], Any]] = {
        "klcore": lambda: klcore.kl_div(x, y),
        "klcore, out=": lambda: klcore.kl_div(x, y, out=out),
        "klcore, with gradient": lambda: klcore.kl_div(x, y, return_grad="y"),
    }
    if not gpu.emulated and importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        tx, log_ty = torch.from_dlpack(x), torch.from_dlpack(y).log()
        kl_div = torch.nn.functional.kl_div
        timed["torch kl_div, 'sum'"] = lambda: kl_div(log_ty, tx, reduction="sum")
    if not gpu.emulated:
        timed["CuPy"] = lambda: (x * gpu.cupy.log(x / y)).sum(axis=-1)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            call()
            gpu.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            gpu.synchronize()
            times[name].append(1e6 * (time.perf_counter() - start) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def release(gpu: Gpu) -> None:
    """Free what contenders leave behind: the next ones need the memory, and cannot ask for it."""
    gc.collect()
    gpu.free()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
