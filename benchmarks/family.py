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
import peers
import torch

import klcore
from klcore import _cpu
from klcore.operations import OPERATIONS

NAMES = ["kl_div", *(o.name for o in OPERATIONS.values() if o.form == _cpu.BY_CLASS)]


# ---- accuracy -------------------------------------------------------------------------------------------------------


def ours(name: str) -> Callable[[Any, Any], Any]:
    return lambda a, b: getattr(klcore, name)(a.numpy(), b.numpy(), space="logits", **OPERATIONS[name].needed)


CONTENDERS = {
    "js_div": {
        "TRL": peers.trl_js,
        "Liger": peers.liger_js,
        "MLX": peers.mlx_js,
        "torchmetrics": peers.torchmetrics_js,
        "SciPy": peers.scipy_js,
        "klcore": ours("js_div"),
    },
    "tv_dist": {"Liger TVD": peers.liger_tvd, "klcore tv_dist": ours("tv_dist")},
}


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
    """The values of two JAX arrays, and the total with the gradient of the student."""
    x, y = jax.numpy.asarray(a), jax.numpy.asarray(b)
    value = jax.jit(peers.jax_js)
    gradient = jax.jit(jax.value_and_grad(lambda x, y: peers.jax_js(x, y).sum(), 1))
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
    teacher, student = torch.tensor(a), torch.tensor(b)
    print(f"({rows}, {n}) float32, {klcore.get_num_threads()} threads, milliseconds and multiples of kl_div's")
    print("| | value | | value and gradient | |\n|---|--:|--:|--:|--:|")
    for space, x, y in (("logits", a, b), ("probs", p, q)):
        calls: dict[str, Callable[[], Any]] = {}
        for name in NAMES:
            f = partial(getattr(klcore, name), **OPERATIONS[name].needed)
            calls[name] = partial(f, x, y, space=space)
            calls[f"{name}, y"] = partial(f, x, y, space=space, return_grad="y")
        if space == "logits":
            for name, f in (("PyTorch", peers.trl_js), ("torch.compile", torch.compile(peers.trl_js))):
                calls[f"TRL's js, {name}"] = partial(f, teacher, student)
                calls[f"TRL's js, {name}, y"] = peers.torch_step(partial(f, teacher), student)
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
