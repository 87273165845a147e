"""How fast klcore is on a GPU: beside what memory allows, and beside the libraries one would use instead.

Run by gpu_check.py, as its step "benchmark". One *case* is a shape, a dtype, a space and what is wanted: the value (the
sum over all rows), or the value and one gradient or both. One *contender* is a way of computing it.

* Every contender gets the same arrays, and gives gradients to the same operands. For probabilities all start from
  probabilities, for logits from logits; none waits for the GPU.
* Calls go over as many sets of arrays as it takes to fill four times the L2 cache, and 256 MB at least: data comes from
  memory, not from a cache.
* k calls are captured in a CUDA graph, k so large that a replay takes milliseconds, and replays are timed by events.
  JAX cannot be captured: k calls are made without waiting, and the clock is read around them. So it is for whoever
  fails to be captured; what was done stands in the record as "how".
* Contenders take turns, one replay each, round after round. Medians and the 20th and 80th percentile count.
* "wall" is the time of one uncaptured call from Python, when many are made without waiting: where it is more than the
  time on the GPU, it is what launching costs.
* "first call" is the first of this case in its process, with all that is compiled in it. Nobody finds there what an
  earlier run compiled (of klcore that holds for the cases called "first"; behind those it may use its cache on disk);
  whoever compiles once for many cases pays in one of them.
* Bandwidth counts *necessary bytes*: both inputs read once, every gradient written once. 100 percent is what a copy by
  the driver reaches on this GPU, reading and writing counted.
* Errors are those of the value, relative, and of the gradients' first rows, in units of the largest entry, against
  float64. 16-bit libraries give 16-bit values.

The cases come in an order of importance, and what time does not suffice for is listed as not run.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_device import Gpu, numpy_dtype, open_device

import klcore

OUTPUTS: dict[str, Any] = {"value": None, "value+dy": "y", "value+dx+dy": ("x", "y")}
NECESSARY = {"value": 2, "value+dy": 3, "value+dx+dy": 4}  # arrays to move
SIZES = (
    (65_536, 64), (32_768, 256), (32_768, 1_000), (32_768, 1_024), (32_768, 2_048), (32_768, 2_049), (16_384, 4_096),
    (8_192, 32_000), (8_192, 32_768), (4_096, 50_257), (4_096, 128_256), (8_192, 128_256), (2_048, 151_936),
    (2_048, 262_144), (1, 1 << 24),
)  # fmt: skip
FIRST = ((8_192, 32_768), (4_096, 128_256))  # a gigabyte and more: what the targets are about
# where klcore changes its ways, and between: 128 | classes share a warp, 1024 | one chunk; then by shared memory
SWEEP = (
    64, 127, 128, 129, 256, 512, 1_000, 1_023, 1_024, 1_025, 1_536, 2_048, 2_049, 3_072, 4_096, 6_144, 8_192, 8_193,
    12_288, 16_384, 16_385, 24_576, 32_768, 32_769, 49_152, 65_536, 65_537, 98_304, 131_072, 131_073, 196_608, 262_144,
    262_145, 524_288, 1_048_576, 1_048_577,
)  # fmt: skip
SWEPT = 1 << 28  # elements an array
ROUNDS = 20
WARM_SECONDS = 0.1  # before rounds count: the clocks come up
REPLAY_MS = 2.0
MOST_CALLS = 256  # in a graph
WRONG = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 3e-2}  # more is a mistake, not rounding
SAMPLE = 16  # rows whose gradients are checked
RESERVE = 20.0  # seconds that a case with all peers may take


@dataclass(frozen=True)
class Case:
    rows: int
    n: int
    dtype: str
    space: str
    outputs: str

    @property
    def array_bytes(self) -> int:
        return self.rows * self.n * numpy_dtype(self.dtype).itemsize

    @property
    def necessary_bytes(self) -> int:
        return NECESSARY[self.outputs] * self.array_bytes

    @property
    def title(self) -> str:
        return f"({self.rows}, {self.n}) {self.dtype} {self.space} {self.outputs}"


@dataclass(frozen=True)
class Task:
    """A case, and those who compute it."""

    part: str
    case: Case
    contenders: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.part}: {self.case.title}"


def tasks(emulated: bool, quick: bool) -> list[Task]:
    """All there is to measure, the most important first."""
    spaces = ("probs", "log_probs", "logits")
    if emulated:
        return [
            Task("first", Case(33, 3, "float32", s, o), ("klcore",)) for s in spaces[::2] for o in list(OUTPUTS)[:2]
        ]
    two = list(OUTPUTS)[:2]

    def over(part: str, contenders: Sequence[str], sizes: Any, dtypes: Any, outputs: Any) -> Iterator[Task]:
        for size in sizes:
            for dtype in dtypes:
                for space in spaces:
                    for wanted in outputs:
                        yield Task(part, Case(*size, dtype, space, wanted), tuple(contenders))

    everyone, ours = tuple(CONTENDERS), ("klcore",)
    rest = [size for size in SIZES if size not in FIRST]
    found = list(over("first", everyone, FIRST, ("float32", "bfloat16"), two))
    if quick:
        return found[:6] + list(over("klcore alone", ours, SIZES, ("float32",), two))
    found += over("klcore alone", ours, rest, ("float32", "bfloat16"), two)
    for dtype in ("float32", "bfloat16"):
        for space, wanted in (("probs", "value"), ("logits", "value+dy")):
            found += [Task("sweep", Case(max(1, SWEPT // n), n, dtype, space, wanted), ours) for n in SWEEP]
    found += over("others", everyone, rest, ("float32",), two)
    found += over("others", everyone, FIRST, ("float32", "bfloat16"), ("value+dx+dy",))
    found += over("others", everyone, FIRST, ("float16",), OUTPUTS)
    found += over("others", everyone, rest, ("bfloat16",), two)
    found += over("others", everyone, rest, ("float16",), two)
    found += over("others", everyone, rest, ("float32", "bfloat16", "float16"), ("value+dx+dy",))
    return found


# ---- data ------------------------------------------------------------------------------------------------------------


class Data:
    """The sets of arrays of one shape, dtype and space, and what float64 says about the first of them."""

    def __init__(self, gpu: Gpu, case: Case) -> None:
        self.gpu, self.case = gpu, case
        enough = max(256 << 20, 4 * gpu.cache_bytes()) if not gpu.emulated else 1
        count = -(-enough // (2 * case.array_bytes))
        self.sets = [
            tuple(gpu.fill(case.rows, case.n, case.dtype, case.space, seed, side) for side in (0, 1))
            for seed in range(count)
        ]
        gpu.synchronize()

    def _widened(self, a: Any) -> Any:
        """float64, on the GPU; bfloat16 by its bits, which are the upper half of a float32's."""
        if self.case.dtype == "bfloat16":
            a = (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return a.astype(np.float64)

    @functools.cached_property
    def values(self) -> tuple[float, float]:
        """The sums of the first set, by the formulas, in float64, some rows at a time: with -x + y, and without."""
        x, y = self.sets[0]
        divergence, mass, at_once = 0.0, 0.0, max(1, (1 << 26) // self.case.n)
        for start in range(0, self.case.rows, at_once):
            a, b = (self._widened(v[start : start + at_once]) for v in (x, y))
            if self.case.space == "logits":
                a, b = (v - v.max(axis=1, keepdims=True) for v in (a, b))
                a, b = (v - np.log(np.exp(v).sum(axis=1, keepdims=True)) for v in (a, b))
            p, q = (a, b) if self.case.space == "probs" else (np.exp(a), np.exp(b))
            terms = p * np.log(p / q) if self.case.space == "probs" else p * (a - b)
            divergence += float(terms.sum())
            mass += float((q - p).sum())
        return divergence + mass, divergence

    @functools.cached_property
    def gradients(self) -> dict[str, list[np.ndarray]]:
        """Of the first rows, in float64: those of kl_div and of the sum without -x + y. Libraries choose either."""
        a, b = (self.gpu.get(v[:SAMPLE]).astype(np.float64) for v in self.sets[0])
        if self.case.space == "probs":
            return {"dy": [1 - a / b, -a / b], "dx": [np.log(a / b), np.log(a / b) + 1]}
        if self.case.space == "log_probs":
            p, q = np.exp(a), np.exp(b)
            return {"dy": [q - p, -p], "dx": [p * (a - b), p * (a - b) + p]}
        a, b = (v - v.max(axis=1, keepdims=True) for v in (a, b))
        a, b = (v - np.log(np.exp(v).sum(axis=1, keepdims=True)) for v in (a, b))
        p, q = np.exp(a), np.exp(b)
        return {"dy": [q - p], "dx": [p * (a - b - (p * (a - b)).sum(axis=1, keepdims=True))]}

    def error(self, value: float, gradients: dict[str, np.ndarray]) -> dict[str, float]:
        found = {"value": min(abs(value - right) / abs(right) for right in self.values)}
        for name, g in gradients.items():
            g = g[:SAMPLE].astype(np.float64)
            found[name] = min(float(abs(g - right).max() / abs(right).max()) for right in self.gradients[name])
        return found


# ---- contenders ------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """What a contender needs is not there, or it does not offer what is asked for."""


class Contender:
    """`call(k)` computes set k and gives the value and the gradients, arrays of its library, without waiting."""

    captured = True

    def __init__(self, data: Data) -> None:
        self.data, self.case, self.gpu = data, data.case, data.gpu
        self.wanted = {"value": (), "value+dy": ("dy",), "value+dx+dy": ("dx", "dy")}[data.case.outputs]

    def call(self, k: int) -> Any:
        raise NotImplementedError

    def synchronize(self) -> None:
        self.gpu.synchronize()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        """A function that replays the calls once and gives the milliseconds."""
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

    def extra_bytes(self) -> int | None:
        return self.gpu.extra_bytes(lambda: self.call(0))

    def to_numpy(self, a: Any) -> np.ndarray:
        return self.gpu.get(a)

    def free(self) -> None:
        self.gpu.free()


class Klcore(Contender):
    """klcore.kl_div into arrays of the caller's."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        empty = self.gpu.cupy.empty
        self._outs = []
        for x, _ in data.sets:
            value = empty((), np.float32)
            self._outs.append((value, *(self.gpu.cupy.empty_like(x) for _ in self.wanted)) if self.wanted else value)
        self._keywords = {
            "space": self.case.space,
            "reduction": "sum",
            "return_grad": OUTPUTS[self.case.outputs],
        }

    def call(self, k: int) -> Any:
        x, y = self.data.sets[k]
        return klcore.kl_div(x, y, out=self._outs[k], **self._keywords)

    def extra_bytes(self) -> int | None:
        x, y = self.data.sets[0]
        return self.gpu.extra_bytes(lambda: klcore.kl_div(x, y, **self._keywords))


class Torch(Contender):
    """PyTorch's own functions, as one would write them."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.torch = importlib.import_module("torch")
        self.sets = [tuple(self._lend(a) for a in arrays) for arrays in data.sets]
        if self.wanted:
            of = {"dx": 0, "dy": 1}
            self._leaves = [[arrays[of[name]].requires_grad_() for name in self.wanted] for arrays in self.sets]
        self._loss = self.loss()

    def _lend(self, a: Any) -> Any:
        """The same memory; bfloat16 as integers, which every exchange format knows."""
        bits = a.view(np.int16) if self.case.dtype == "bfloat16" else a
        tensor = self.torch.from_dlpack(bits)
        return tensor.view(self.torch.bfloat16) if self.case.dtype == "bfloat16" else tensor

    def loss(self) -> Callable[[Any, Any], Any]:
        F = importlib.import_module("torch.nn.functional")
        return {
            "probs": lambda x, y: F.kl_div(y.log(), x, reduction="sum"),
            "log_probs": lambda x, y: F.kl_div(y, x, reduction="sum", log_target=True),
            "logits": lambda x, y: F.kl_div(
                F.log_softmax(y, -1), F.log_softmax(x, -1), reduction="sum", log_target=True
            ),
        }[self.case.space]

    def call(self, k: int) -> Any:
        value = self._loss(*self.sets[k])
        if not self.wanted:
            return value
        return (value.detach(), *self.torch.autograd.grad(value, self._leaves[k]))

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        torch = self.torch
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls[0]()  # libraries make themselves at home on a stream before it is captured
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

    def extra_bytes(self) -> int | None:
        cuda = self.torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        result = self.call(0)
        cuda.synchronize()
        results = result if isinstance(result, tuple) else (result,)
        return int(cuda.max_memory_allocated() - before - sum(r.numel() * r.element_size() for r in results))

    def to_numpy(self, a: Any) -> np.ndarray:
        return np.asarray(a.detach().to(self.torch.float32).cpu().numpy())

    def free(self) -> None:
        self.torch.cuda.empty_cache()


class TorchCompile(Torch):
    def loss(self) -> Callable[[Any, Any], Any]:
        self.torch._dynamo.reset()  # or the second shape would be compiled for all shapes
        return self.torch.compile(super().loss(), dynamic=False)


class Liger(Torch):
    """Liger-Kernel's divergence; it has no gradient with respect to x."""

    def loss(self) -> Callable[[Any, Any], Any]:
        if "dx" in self.wanted:
            raise Unavailable("has no gradient with respect to x")
        F = importlib.import_module("torch.nn.functional")
        module = importlib.import_module("liger_kernel.transformers")
        of_probs = module.LigerKLDIVLoss(reduction="sum", log_target=False)
        of_logs = module.LigerKLDIVLoss(reduction="sum", log_target=True)
        return {
            "probs": lambda x, y: of_probs(y.log(), x),
            "log_probs": of_logs_of(of_logs, lambda a: a),
            "logits": of_logs_of(of_logs, lambda a: F.log_softmax(a, -1)),
        }[self.case.space]

    @property
    def captured(self) -> bool:  # type: ignore[override]
        return not self.wanted  # its backward looks at a number, which waits for the GPU


def of_logs_of(loss: Any, change: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, y: loss(change(y), change(x))


class Jax(Contender):
    captured = False

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others need memory too
        jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
        self._jax, space = jax, self.case.space

        def total(x: Any, y: Any) -> Any:
            if space == "probs":
                return (x * jnp.log(x / y)).sum()
            if space == "logits":
                x, y = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
            return (jnp.exp(x) * (x - y)).sum()

        def value_and_gradients(x: Any, y: Any) -> Any:
            of = tuple({"dx": 0, "dy": 1}[name] for name in self.wanted)
            value, gradients = jax.value_and_grad(total, argnums=of)(x, y)
            return (value, *gradients)

        self.sets = [tuple(self._lend(a) for a in arrays) for arrays in data.sets]
        self._compiled = jax.jit(value_and_gradients if self.wanted else total).lower(*self.sets[0]).compile()

    def _lend(self, a: Any) -> Any:
        jax = self._jax
        if self.case.dtype != "bfloat16":
            return jax.dlpack.from_dlpack(a)
        return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(a.view(np.int16)), jax.numpy.bfloat16)

    def call(self, k: int) -> Any:
        return self._compiled(*self.sets[k])

    def wait(self, result: Any) -> None:
        self._jax.block_until_ready(result)

    def extra_bytes(self) -> int | None:
        return int(self._compiled.memory_analysis().temp_size_in_bytes)

    def to_numpy(self, a: Any) -> np.ndarray:
        return np.asarray(a.astype("float32"))


class Cupy(Contender):
    """The formulas as one writes them with arrays."""

    def _fused(self, function: Any) -> Any:
        return function

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        cupy = self.gpu.cupy
        value = {
            "probs": lambda x, y: x * cupy.log(x / y),
            "log_probs": lambda x, y: cupy.exp(x) * (x - y),
        }
        gradient = {
            ("probs", "dx"): lambda x, y: cupy.log(x / y) + 1,
            ("probs", "dy"): lambda x, y: -x / y,
            ("log_probs", "dx"): lambda x, y: cupy.exp(x) * (x - y + 1),
            ("log_probs", "dy"): lambda x, y: -cupy.exp(x),
        }
        logits = {
            "value": lambda a, b, la, lb: cupy.exp(a - la) * ((a - la) - (b - lb)),
            "dx": lambda a, b, la, lb, kl: cupy.exp(a - la) * ((a - la) - (b - lb) - kl),
            "dy": lambda a, b, la, lb, kl: cupy.exp(b - lb) - cupy.exp(a - la),
        }
        fused = self._fused
        minus_top = fused(lambda a, top: cupy.exp(a - top))
        if self.case.space != "logits":
            of_value = fused(value[self.case.space])
            of_gradient = [fused(gradient[self.case.space, name]) for name in self.wanted]
        else:
            of_value, of_gradient = fused(logits["value"]), [fused(logits[name]) for name in self.wanted]

        def log_of_sum(a: Any) -> Any:
            top = a.max(axis=-1, keepdims=True)
            return top + cupy.log(minus_top(a, top).sum(axis=-1, keepdims=True))

        def compute(x: Any, y: Any) -> Any:
            if self.case.space != "logits":
                return (of_value(x, y).sum(), *(g(x, y) for g in of_gradient))
            lx, ly = log_of_sum(x), log_of_sum(y)
            rows = of_value(x, y, lx, ly).sum(axis=-1, keepdims=True)
            return (rows.sum(), *(g(x, y, lx, ly, rows) for g in of_gradient))

        self._compute = compute

    def call(self, k: int) -> Any:
        return self._compute(*self.data.sets[k])


class CupyFuse(Cupy):
    def _fused(self, function: Any) -> Any:
        return self.gpu.cupy.fuse(function)


CONTENDERS: dict[str, tuple[type[Contender], tuple[str, ...]]] = {
    "klcore": (Klcore, ()),
    "torch.compile": (TorchCompile, ("torch", "triton")),
    "Liger-Kernel": (Liger, ("torch", "triton", "liger_kernel")),
    "torch eager": (Torch, ("torch",)),
    "JAX jit": (Jax, ("jax",)),
    "CuPy": (Cupy, ()),
    "cupy.fuse": (CupyFuse, ()),
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
        start = time.perf_counter()
        self.contender = kind(data)
        result = self.contender.call(0)
        self.contender.wait(result)
        self.first_call = time.perf_counter() - start
        self.errors = self._errors(result)
        del result
        self.extra = self.contender.extra_bytes()
        calls = [functools.partial(self.contender.call, k) for k in range(len(data.sets))]
        once = self.contender.uncaptured(calls)
        once()
        a_round = once()  # of all sets
        self.calls = calls * max(1, min(round(REPLAY_MS / a_round), MOST_CALLS // len(calls)))
        # many calls are under way before the first has ended, so this is what Python needs, if that is more
        many = calls * max(1, min(round(10 / a_round), 100 // len(calls)))
        time_many = self.contender.uncaptured(many)
        self.wall_us = 1e3 * min(time_many() for _ in range(3)) / len(many)
        self.contender.free()  # a graph brings its own memory
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
        results = result if isinstance(result, tuple) else (result,)
        value = float(self.contender.to_numpy(results[0]))
        gradients = {
            name: self.contender.to_numpy(g[:SAMPLE])
            for name, g in zip(self.contender.wanted, results[1:], strict=True)
        }
        return self.data.error(value, gradients)

    def time(self) -> None:
        self.times.append(self.replay() / len(self.calls))

    def record(self, copy: float) -> dict[str, Any]:
        case = self.data.case
        low, median, high = (float(v) for v in np.quantile(self.times, (0.2, 0.5, 0.8)))
        limit = WRONG[case.dtype]
        return {
            "name": self.name,
            "ms": median,
            "ms 20%": low,
            "ms 80%": high,
            "ms all": [round(t, 6) for t in self.times],
            "percent of copy": 100 * case.necessary_bytes / (1e-3 * median) / copy,
            "wall us": self.wall_us,
            "first call s": self.first_call,
            "extra bytes": self.extra,
            "errors": self.errors,
            "wrong": any(not e <= limit for e in self.errors.values()),
            "calls": len(self.calls),
            "how": self.how,
        }


def sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def run_task(
    task: Task, data: Data, copy: float, skipped: dict[str, str], begin: Callable[[str], None]
) -> dict[str, Any]:
    """The record of one case. `skipped` are those who must not be tried again, and why."""
    runners, absent = [], []
    for name in task.contenders:
        begin(name)
        reason = skipped.get(f"{task.key}: {name}")
        if reason is None:
            try:
                runners.append(Runner(name, data))
                continue
            except Exception as error:  # one that fails must not keep the others from being measured
                reason = str(error) if isinstance(error, Unavailable) else sentence(error)
                data.gpu.synchronize()  # raises if the GPU is lost to this process
            release(data.gpu)
        absent.append({"name": name, "absent": reason})
    begin("taking turns")
    start = time.perf_counter()
    while runners and not data.gpu.emulated and time.perf_counter() - start < WARM_SECONDS:
        for runner in runners:
            runner.replay()
    for _ in range(3 if data.gpu.emulated else ROUNDS):
        for runner in runners:
            runner.time()
    figures = [runner.record(copy) for runner in runners] + absent
    return asdict(task.case) | {"part": task.part, "sets": len(data.sets), "contenders": figures}


# ---- calls so small that there is nothing to compute -----------------------------------------------------------------


def overhead(gpu: Gpu, rounds: int = 15, calls: int = 200) -> dict[str, float]:
    """Microseconds a call on (10, 10) float32 takes from Python."""
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
    """Give back what contenders leave behind: the next ones need it, and do not ask each other."""
    gc.collect()
    gpu.free()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


# ---- all of them -----------------------------------------------------------------------------------------------------


def run(lines: Path, emulated: bool, quick: bool, deadline: float) -> None:
    """Append a line of JSON to `lines` for everything that is measured, and for everything that is begun.

    Called again after it died, it goes on behind what is there, without whoever was at work when it died.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as fresh:  # compilers' processes may still write
        kept = os.environ.get("KLCORE_CACHE_DIR")
        for variable in ("KLCORE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR"):
            os.environ[variable] = os.path.join(fresh, variable)
        _run(lines, open_device(emulated), tasks(emulated, quick), deadline, kept)


def read(lines: Path) -> list[dict[str, Any]]:
    """What run wrote; a process that was ended may have left half a line."""
    found = []
    for line in lines.read_text().splitlines() if lines.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _run(lines: Path, gpu: Gpu, todo: list[Task], deadline: float, cache: str | None) -> None:
    before = read(lines)
    done = {entry["key"] for entry in before if "figures" in entry or "failed" in entry}
    skipped: dict[str, str] = {}
    if before and "begin" in before[-1]:
        skipped[before[-1]["begin"]] = "ended its process"
    skipped |= {entry["begin"]: entry["died"] for entry in before if "died" in entry}

    def write(**entry: Any) -> None:
        with lines.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    for begun, reason in skipped.items():
        write(begin=begun, died=reason)
    known = [entry for entry in before if entry.get("key") == "ceilings"]
    if known:
        copies = known[0]["figures"]
    else:
        copies = gpu.copies()
        write(key="ceilings", figures=copies)
        write(key="overhead", figures=overhead(gpu))
    data: Data | None = None
    for task in todo:
        if task.key in done:
            continue
        if time.time() > deadline - (RESERVE if len(task.contenders) > 1 else 2):
            continue  # a shorter one may still fit
        if f"{task.key}: taking turns" in skipped or f"{task.key}: data" in skipped:
            write(key=task.key, failed="ended its process")
            continue

        def begin(name: str, key: str = task.key) -> None:
            write(begin=f"{key}: {name}")

        if task.part != "first":
            os.environ.pop("KLCORE_CACHE_DIR", None)
            os.environ |= {} if cache is None else {"KLCORE_CACHE_DIR": cache}
        begin("data")
        case = task.case
        try:
            if data is None or [data.case.rows, data.case.n, data.case.dtype, data.case.space] != [
                case.rows, case.n, case.dtype, case.space
            ]:  # fmt: skip
                data = None
                gpu.free()
                if gpu.memory() < 6 * case.array_bytes:
                    write(key=task.key, failed=f"{gpu.memory() >> 20} MiB of memory are free, too few")
                    continue
                data = Data(gpu, case)
            data.case = case
            write(key=task.key, figures=run_task(task, data, copies["copy"], skipped, begin))
            release(gpu)
        except MemoryError as error:
            write(key=task.key, failed=sentence(error))
            data = None
