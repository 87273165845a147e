"""The relatives of the divergence compared with other implementations: `python benchmarks/family.py speed` or
`accuracy`.

speed: float32, (2048, 32768) unless --shape says otherwise. Each function's value, and value and gradient, as multiples
of the time of kl_div, interleaved, medians. Beside them TRL's formula of the Jensen-Shannon divergence in PyTorch,
eager and compiled, and in JAX. accuracy: the Jensen-Shannon divergence and the total variation distance of the same
rows of logits, by the formulas of TRL, Liger-Kernel, MLX-LM and torchmetrics in float32 PyTorch, and by SciPy: the
worst relative error, and how many results are negative or NaN.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

NAMES = ["kl_div", *(o.name for o in OPERATIONS.values() if o.form == _cpu.BY_CLASS)]


# ---- other systems' formulas, written from their descriptions; a are the teacher's logits, b the student's -----------


def trl(a: Any, b: Any, beta: float = 0.5) -> Any:
    """The logarithm of the mixture by log-sum-exp."""
    s, t, w = F.log_softmax(b, -1), F.log_softmax(a, -1), torch.tensor(beta, dtype=a.dtype)
    m = torch.logsumexp(torch.stack([s + torch.log1p(-w), t + torch.log(w)]), 0)
    of_t, of_s = (F.kl_div(m, v, reduction="none", log_target=True) for v in (t, s))
    return (w * of_t + (1 - w) * of_s).sum(-1)


def liger(a: Any, b: Any, beta: float = 0.5) -> Any:
    """Entropies of the parts, minus that of the mixture."""
    s, t = F.log_softmax(b, -1), F.log_softmax(a, -1)
    of_t, of_s = beta * t.exp(), (1 - beta) * s.exp()
    m = of_t + of_s
    return (of_t * t + of_s * s - m * m.log()).sum(-1)


def mlx(a: Any, b: Any) -> Any:
    s, t = F.log_softmax(b, -1), F.log_softmax(a, -1)
    of_t, of_s = (v.exp() * (math.log(2) - torch.log(1 + torch.exp(o - v))) for v, o in ((t, s), (s, t)))
    return (of_t + of_s).sum(-1) / 2


def torchmetrics(a: Any, b: Any) -> Any:
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    return sum(torch.special.xlogy(v, v / m).sum(-1) for v in (p, q)) / 2


def scipy(a: Any, b: Any) -> Any:
    return jensenshannon(a.softmax(-1).numpy(), b.softmax(-1).numpy(), axis=-1) ** 2


def tvd(a: Any, b: Any) -> Any:
    return (a.softmax(-1) - b.softmax(-1)).abs().sum(-1) / 2


def ours(name: str) -> Callable[[Any, Any], Any]:
    return lambda a, b: getattr(klcore, name)(a.numpy(), b.numpy(), space="logits", **OPERATIONS[name].needed)


CONTENDERS = {
    "js_div": {
        "TRL": trl, "Liger": liger, "MLX": mlx, "torchmetrics": torchmetrics, "SciPy": scipy, "klcore": ours("js_div"),
    },
    "tv_dist": {"Liger TVD": tvd, "klcore tv_dist": ours("tv_dist")},
}  # fmt: skip


def accuracy() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    relatives = importlib.import_module("relatives")
    rng = np.random.default_rng(7)
    header = [name for contenders in CONTENDERS.values() for name in contenders]
    print("| divergence of the rows | " + " | ".join(header) + " |\n|---|" + "--:|" * len(header))
    for apart, label in (
        (1.4e-5, "1e-10"),
        (1.4e-4, "1e-8"),
        (1.4e-3, "1e-6"),
        (0.14, "1e-2"),
        (1.4, "1"),
        (40.0, "far"),
    ):
        a = (3 * rng.normal(size=(4, 4096))).astype(np.float32)
        b = (a + apart * rng.normal(size=a.shape)).astype(np.float32)
        cells = []
        for name, contenders in CONTENDERS.items():
            right = relatives.exact(name, a, b, "logits").value
            for f in contenders.values():
                found = np.asarray(f(torch.tensor(a), torch.tensor(b)), np.float64)
                worst = np.nanmax(abs(found - right) / right) if not np.isnan(found).all() else math.nan
                odd = f", {(found < 0).sum()} negative" * bool((found < 0).any())
                cells.append(f"{worst:.0e}{odd}{f', {np.isnan(found).sum()} NaN' * bool(np.isnan(found).any())}")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


# ---- speed -----------------------------------------------------------------------------------------------------------


def in_jax(a: Any, b: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """TRL's formula for two JAX arrays: the values, and the values with the student's gradient."""
    x, y = jax.numpy.asarray(a), jax.numpy.asarray(b)

    def js(x: Any, y: Any) -> Any:
        t, s = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
        m = jax.numpy.logaddexp(s, t) - math.log(2)
        return (jax.numpy.exp(t) * (t - m) + jax.numpy.exp(s) * (s - m)).sum(-1) / 2

    value, gradient = jax.jit(js), jax.jit(jax.value_and_grad(lambda x, y: js(x, y).sum(), 1))
    return lambda: jax.block_until_ready(value(x, y)), lambda: jax.block_until_ready(gradient(x, y))


def medians(
    calls: dict[Any, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, float]:
    """Seconds of each call, called once per round."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 1):
        for name, f in calls.items():
            time.sleep(0.01)  # the threads of the previous call spin for a while
            start = clock()
            f()
            if k:
                times[name].append(clock() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def speed(rows: int, n: int, rounds: int) -> None:
    torch.set_num_threads(klcore.get_num_threads())
    rng = np.random.default_rng(0)
    a = rng.normal(0, 3, (rows, n)).astype(np.float32)
    b = (a + rng.normal(0, 0.5, a.shape)).astype(np.float32)
    p, q = (torch.tensor(v).softmax(-1).numpy() for v in (a, b))
    teacher, student = torch.tensor(a), torch.tensor(b, requires_grad=True)
    compiled = torch.compile(trl)

    def step(f: Callable[[Any, Any], Any]) -> Callable[[], Any]:
        def run() -> None:
            student.grad = None
            f(teacher, student).sum().backward()

        return run

    def plain(f: Callable[[Any, Any], Any]) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                f(teacher, student)

        return run

    print(f"({rows}, {n}) float32, {klcore.get_num_threads()} threads, milliseconds and multiples of kl_div's")
    print("| | value | | value and gradient | |\n|---|--:|--:|--:|--:|")
    for space, x, y in (("logits", a, b), ("probs", p, q)):
        calls: dict[str, Callable[[], Any]] = {}
        for name in NAMES:
            f = partial(getattr(klcore, name), **OPERATIONS[name].needed)
            calls[name] = partial(f, x, y, space=space)
            calls[f"{name}, y"] = partial(f, x, y, space=space, return_grad="y")
        if space == "logits":
            for name, f in (("TRL's js, PyTorch", trl), ("TRL's js, torch.compile", compiled)):
                calls[name], calls[f"{name}, y"] = plain(f), step(f)
            calls["TRL's js, JAX jit"], calls["TRL's js, JAX jit, y"] = in_jax(a, b)
        found = medians(calls, rounds)
        for name in (name for name in found if not name.endswith(", y")):
            cells = [
                f"{found[k] * 1e3:.0f} | {found[k] / found[of]:.2f}"
                for k, of in ((name, "kl_div"), (f"{name}, y", "kl_div, y"))
            ]
            print(f"| {name} of {space} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "accuracy"))
    parser.add_argument("--shape", default="2048x32768", help="rows x classes, for speed")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.what == "accuracy":
        accuracy()
    else:
        speed(*map(int, args.shape.split("x")), args.rounds)


if __name__ == "__main__":
    main()
