"""The top k log-probabilities of a teacher, compared with other implementations.

    python benchmarks/topk.py [--speed | --memory | --accuracy] ...

--speed (the default): values, and values with the student's gradient, for (128, 151936) logits of students. The units
are a floor, a C loop that reads these logits (and writes as much, for the gradient), and one logsumexp of the rows by
PyTorch, compiled, which is its fastest. Beside klcore are the formulas of verl, NeMo-RL and TRL in PyTorch, eager and
compiled; their values and gradients are compared first. Interleaved, medians. With one thread, processor time counts,
which does not depend on how busy the machine is. klcore writes its gradient into an existing array, except through
PyTorch's autograd, where all contenders allocate theirs. The cost of that depends on the system: with --keep freed
memory stays with the process, as it does with caching allocators. --memory: the peak memory of a second call, each
contender in a separate process, in arrays of the size of the logits. Only on Linux. --accuracy: float32 rows whose
unlisted classes have the probability p_R. The reference, in 40 digits, is the divergence of the listed classes and all
others as one, for the stored log-probabilities and tail_mass, in float32. Relative errors, the worst of 8 rows: of
values / of gradients, relative to the largest of their row. Without tail_mass p_R is what the stored log-probabilities
leave of 1. Each of them has a rounding error of about 1e-7 of itself, so a p_R of 1e-6 is off by percents, and smaller
ones are lost. The peers compute p_R in this way too, in float32, for the student as well; verl leaves it out, which
gives another number than the divergence. "of storing" is how far the reference itself is from the teacher's own
divergence.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import peers
import side_by_side
import torch
from family import medians
from floor import buffer, floor

import klcore

ROWS, CLASSES = 128, 151_936
SPACE = ("log_probs", "logits")
DTYPES = ("float32", "bfloat16")
LIBRARIES = ("klcore", "numpy", "torch")

# their formula, and the expression of klcore that gives the same number
PEERS = {
    "verl": (peers.verl_topk, "klcore zero, rel_entr"),
    "NeMo-RL, zero_outside_topk": (peers.nemo_zero_topk, "klcore zero, rel_entr"),
    "NeMo-RL": (peers.nemo_topk, "klcore renorm"),
    "TRL, loss_add_tail": (peers.trl_topk, "klcore bucket"),
}

# ---- speed -----------------------------------------------------------------------------------------------------------


def of_torch(a: np.ndarray) -> Any:
    return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == "bfloat16" else torch.from_numpy(a)


@dataclass
class Job:
    """A student's logits, and a teacher's top k; in shared memory, as NumPy arrays and as tensors."""

    y: np.ndarray
    grad: np.ndarray
    log_p: np.ndarray
    indices: np.ndarray

    @classmethod
    def of(cls, rows: int, k: int, dtype: str) -> "Job":
        """Teachers that follow Zipf's law, with the classes in random order, and students that are flatter. So verl
        clamps nothing: no logarithm is below -10, and no sum is negative."""
        rng = np.random.default_rng(0)
        y, grad = (buffer((rows, CLASSES), dtype) for _ in range(2))
        log_p, indices = np.empty((rows, k), np.float32), np.empty((rows, k), np.int64)
        teacher = -np.log(np.arange(1, CLASSES + 1))
        log_p[...] = teacher[:k] - np.log(np.exp(teacher).sum())
        for r in range(rows):
            order = rng.permutation(CLASSES)
            indices[r] = order[:k]
            y[r, order] = 0.9 * teacher + 0.1 * rng.standard_normal(CLASSES)
        return cls(y, grad, log_p, indices)


Build = Callable[[Job, bool], Callable[[], Any]]


def ours(function: str, tail: str) -> Build:
    def build(job: Job, gradient: bool) -> Any:
        call = partial(getattr(klcore, function), job.log_p, job.y, indices=job.indices, tail=tail, space=SPACE)
        return partial(call, return_grad="y", out=(None, job.grad)) if gradient else call

    return build


def theirs(f: Callable[..., Any], compiled: bool) -> Build:
    def build(job: Job, gradient: bool) -> Any:
        torch._dynamo.reset()  # otherwise it would compile the second operation for dynamic shapes
        loss = torch.compile(f, dynamic=False) if compiled else f
        y, log_p, indices = (of_torch(a) for a in (job.y, job.log_p, job.indices))
        of = partial(loss, log_p=log_p, indices=indices)
        return peers.torch_step(of, y) if gradient else partial(of, y)

    return build


def entropy(job: Job, gradient: bool) -> Any:
    options = {"return_grad": "x", "out": (None, job.grad)} if gradient else {}
    return partial(klcore.entropy, job.y, space="logits", **options)


def lowest(job: Job, gradient: bool) -> Any:
    y, grad = job.y.view(np.float32), job.grad.view(np.float32)
    return floor("read_stream", y, y, grad) if gradient else floor("read_both", y, y)


def bucket(y: Any, log_p: Any, indices: Any) -> Any:
    return klcore.kl_div(log_p, y, indices=indices, tail="bucket", space=SPACE, reduction="sum")


def logsumexp(y: Any, log_p: Any, indices: Any) -> Any:
    return y.logsumexp(-1)


FLOOR, UNIT = "floor", "torch logsumexp, compiled"
CONTENDERS: dict[str, Build] = {
    FLOOR: lowest,
    UNIT: theirs(logsumexp, True),
    "torch logsumexp": theirs(logsumexp, False),
    "klcore entropy, of y alone": entropy,
    "klcore bucket": ours("kl_div", "bucket"),
    "klcore bucket, PyTorch": theirs(bucket, False),
    "klcore zero, rel_entr": ours("rel_entr", "zero"),
    "klcore renorm": ours("kl_div", "renorm"),
    **{f"{name}{', compiled' * c}": theirs(f, c) for name, (f, _) in PEERS.items() for c in (False, True)},
}


def compare(job: Job) -> None:
    """Sums of a thousand float32 terms agree to 1e-4; mistakes do not."""
    few = Job(*(a[:8] for a in (job.y, job.grad, job.log_p, job.indices)))
    for name, (_, same) in PEERS.items():
        (value, grad), (expected, g) = (CONTENDERS[n](few, True)() for n in (name, same))
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if job.y.dtype == np.float32 else {"rtol": 0.1, "atol": 0.05}
        size = np.abs(g.astype(np.float32)).max()
        close = np.allclose(value, expected, **tolerance) and np.allclose(
            grad.float() / size, g.astype(np.float32) / size, **tolerance
        )
        if not close:
            raise SystemExit(f"{name} and {same} do not agree: {value} and {expected}")


def prepare(rows: int, k: int, dtype: str, threads: int) -> Job:
    klcore.set_num_threads(threads)
    torch.set_num_threads(threads)
    return Job.of(rows, k, dtype)


def speed(rounds: int, *arguments: Any) -> dict[str, dict[str, float]]:
    """Seconds of every contender's value, and of value and gradient."""
    job = prepare(*arguments)
    compare(job)
    kinds = {"value": False, "value and gradient": True}
    calls = {(name, kind): f(job, gradient) for name, f in CONTENDERS.items() for kind, gradient in kinds.items()}
    clock = time.process_time if klcore.get_num_threads() == 1 else time.perf_counter
    found = medians(calls, rounds, clock)
    return {kind: {name: found[name, kind] for name in CONTENDERS} for kind in kinds}


def print_speed(title: str, found: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n\n| | value, ms | floors | logsumexps | value and gradient, ms | floors | logsumexps |")
    print("|---|" + "--:|" * 6)
    for name in CONTENDERS:
        cells = [
            f"{of[name] * 1e3:.1f} | {of[name] / of[FLOOR]:.2f} | {of[name] / of[UNIT]:.2f}" for of in found.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


# ---- memory ----------------------------------------------------------------------------------------------------------


def status(key: str) -> int:
    """A number of bytes from the status of this process."""
    return int(side_by_side.first_match("/proc/self/status", key).split()[0]) * 1024


def peaks(name: str, *arguments: Any) -> list[float]:
    """Of the value, and of value and gradient."""
    job = prepare(*arguments)
    job.grad[...] = 1  # touch its pages
    found = []
    for gradient in (False, True):
        call = CONTENDERS[name](job, gradient)
        call()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        call()
        found.append((status("VmHWM") - before) / job.y.nbytes)
    return found


def print_memory(found: dict[str, list[float]]) -> None:
    print("\n| arrays of the size of y | value | value and gradient |\n|---|--:|--:|")
    for name, arrays in found.items():
        print(f"| {name} | " + " | ".join(f"{p:.2f}" for p in arrays) + " |", flush=True)


# ---- accuracy --------------------------------------------------------------------------------------------------------

TAILS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12)
APART = (0.1, 1e-2, 1e-3)  # the noise on the student's logits
PAIRS, N, K = 8, 3_000, 64  # rows per p_R, classes, listed classes


def rows_of(tail: float, apart: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits of teachers, whose first K classes have all of the probability except `tail`, and of students."""
    x = rng.normal(size=(PAIRS, N))
    x[:, K:] += np.log(tail / (1 - tail) * np.exp(x[:, :K]).sum(-1) / np.exp(x[:, K:]).sum(-1))[:, None]
    return x.astype(np.float32), (x + apart * rng.normal(size=x.shape)).astype(np.float32)


def softmax(a: np.ndarray) -> list[Any]:
    numbers = [mpmath.exp(float(v)) for v in a]
    total = mpmath.fsum(numbers)
    return [v / total for v in numbers]


def exact(p: list[Any], rest: Any, y: np.ndarray) -> tuple[float, np.ndarray]:
    """The divergence for p, the probabilities of the first classes, and the rest; and its gradient with respect to
    y."""
    q = softmax(y)
    others, mass = mpmath.fsum(q[len(p) :]), mpmath.fsum([*p, rest])
    pairs = [*zip(p, q[: len(p)], strict=True), (rest, others)]
    value = mpmath.fsum(i * mpmath.log(i / j) - i + j for i, j in pairs)
    gradient = [j * mass - i for i, j in pairs[:-1]] + [j * (mass - rest / others) for j in q[len(p) :]]
    return float(value), np.array(gradient, np.float64)


def values(y: np.ndarray, log_p: np.ndarray, tail_mass: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and gradients of all contenders."""
    indices = np.broadcast_to(np.arange(K), log_p.shape)
    call = partial(klcore.kl_div, log_p, y, indices=indices, tail="bucket", space=SPACE, return_grad="y")
    found = {"klcore": call(tail_mass=tail_mass), "klcore, no tail_mass": call()}
    job = Job(y, y, log_p, np.ascontiguousarray(indices))
    for name, f in {"TRL": peers.trl_topk, "Megatron": peers.megatron_topk, "verl": peers.verl_topk}.items():
        found[name] = tuple(map(np.asarray, theirs(f, False)(job, True)()))
    return found


def errors_of(tail: float, apart: float, rng: np.random.Generator) -> tuple[float, dict[str, list[float]]]:
    """The median divergence, and the errors of each contender's values and gradients."""
    x, y = rows_of(tail, apart, rng)
    teachers = [softmax(row) for row in x]
    log_p = np.array([[float(mpmath.log(p)) for p in row[:K]] for row in teachers], np.float32)
    tail_mass = np.array([float(mpmath.fsum(row[K:])) for row in teachers], np.float32)
    of_stored = [
        exact([mpmath.exp(float(v)) for v in a], mpmath.mpf(float(t)), b)
        for a, t, b in zip(log_p, tail_mass, y, strict=True)
    ]
    value, gradient = (np.array(v) for v in zip(*of_stored, strict=True))
    of_teacher = [exact(p[:K], mpmath.fsum(p[K:]), b)[0] for p, b in zip(teachers, y, strict=True)]
    size = np.abs(gradient).max(-1, keepdims=True)
    found = {
        name: [float(np.max(np.abs(v - value) / value)), float(np.max(np.abs(g - gradient) / size))]
        for name, (v, g) in values(y, log_p, tail_mass).items()
    }
    return float(np.median(value)), found | {"of storing": [float(np.abs(value / of_teacher - 1).max())]}


def accuracy() -> list[dict[str, Any]]:
    found = []
    rng = np.random.default_rng(0)
    mpmath.mp.dps = 40
    for apart in APART:
        print(f"\nStudents {apart:g} from their teachers\n")
        for tail in TAILS:
            kl, errors = errors_of(tail, apart, rng)
            found.append({"apart": apart, "p_R": tail, "KL": kl, "errors": errors})
            if tail == TAILS[0]:
                print("| p_R | KL | " + " | ".join(errors) + " |\n|---|" + "--:|" * (1 + len(errors)))
            cells = [" / ".join(f"{e:.0e}" for e in pair) for pair in errors.values()]
            print(f"| {tail:.0e} | {kl:.1e} | " + " | ".join(cells) + " |", flush=True)
    return found


# ---- the record ------------------------------------------------------------------------------------------------------


def alone(f: Callable[..., Any], *args: Any) -> Any:
    """In a separate process: compiled code keeps the number of threads that it was compiled for."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for what in ("speed", "memory", "accuracy"):
        parser.add_argument(f"--{what}", action="store_true")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"a multiple of {ROWS}: the floor reads blocks of 8192")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, klcore.get_num_threads()}))
    parser.add_argument("--keep", action="store_true", help="keep freed memory, for speed; glibc only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to those in FILE")
    args = parser.parse_args()
    if args.rows % ROWS:
        parser.error(f"--rows: {args.rows} is no multiple of {ROWS}")
    if args.keep and args.memory:
        parser.error("--keep hides what --memory measures")
    if args.keep:
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    figures: dict[str, Any] = {}
    if args.speed or not (args.memory or args.accuracy):
        for k, threads in ((k, threads) for k in args.k for threads in args.threads):
            title = f"K = {k}, ({args.rows}, {CLASSES}) {args.dtype}, threads: {threads}{', memory kept' * args.keep}"
            figures[title] = alone(speed, args.rounds, args.rows, k, args.dtype, threads)
            print_speed(title, figures[title])
    if args.memory:
        arguments = args.rows, args.k[-1], args.dtype, args.threads[-1]
        figures["memory"] = {name: alone(peaks, name, *arguments) for name in CONTENDERS if name != FLOOR}
        print_memory(figures["memory"])
    if args.accuracy:
        figures["accuracy"] = accuracy()
    if args.json:
        there = json.loads(args.json.read_text()) if args.json.exists() else {}
        machine = side_by_side.describe(LIBRARIES)
        args.json.write_text(json.dumps(there | {"machine": machine} | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
