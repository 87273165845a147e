"""How fast klcore is through the adapters of PyTorch and JAX, compared with those libraries' own losses.

    python benchmarks/adapters.py [--rows N] [--json FILE]

Values and gradients of arrays of (rows, 32768) float32, and of (10, 10), where the time is that of the call itself.
Contenders take turns, one call each, and the median counts; their values are compared first. Nothing is written to
existing memory: every gradient is a new array, as in training. A step is the value and its gradient with respect to the
model, by the library's own automatic differentiation. Then come PyTorch's gradients of 2,000 samples, one per sample,
by torch.func.vmap.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import torch
from tqdm import tqdm

import klcore
from klcore.compat import pytorch

CLASSES = 32_768
SAMPLES = 2_000
ROUNDS = 7
LIBRARY = {"PyTorch": "F.kl_div", "JAX": "jnp, jit"}  # whose time is the unit

Calls = dict[str, Callable[[], Any]]


def arrays(rows: int, n: int) -> dict[str, np.ndarray]:
    """Teacher and student, in every space."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, n)).astype(np.float32)
    y = x + 0.5 * rng.normal(size=(rows, n)).astype(np.float32)
    p, q = (torch.log_softmax(torch.from_numpy(a), -1).numpy() for a in (x, y))
    return {"x logits": x, "y logits": y, "x log_probs": p, "y log_probs": q, "x probs": np.exp(p)}


def of_pytorch(data: dict[str, np.ndarray]) -> dict[str, Calls]:
    """Operation -> contender -> call."""
    t = {name: torch.from_numpy(a) for name, a in data.items()}
    words = {"reduction": "batchmean"}

    def theirs(space: str, x: str) -> Callable[[Any], Any]:
        return partial(peers.torch_loss(space, peers.torch_kl("batchmean")), t[x])

    losses: dict[str, tuple[str, dict[str, Callable[[Any], Any]]]] = {
        "logits": (
            "y logits",
            {
                "klcore": lambda y: klcore.kl_div(t["x logits"], y, space="logits", **words),
                "F.kl_div": theirs("soft targets", "x logits"),
            },
        ),
        "log-probabilities": (
            "y log_probs",
            {
                "klcore": lambda y: klcore.kl_div(t["x log_probs"], y, space="log_probs", **words),
                "compat.pytorch": lambda y: pytorch.kl_div(y, t["x log_probs"], log_target=True, **words),
                "F.kl_div": theirs("log_probs", "x log_probs"),
            },
        ),
        "probabilities, log-probabilities": (
            "y log_probs",
            {
                "compat.pytorch": lambda y: pytorch.kl_div(y, t["x probs"], **words),
                "F.kl_div": theirs("probs log_probs", "x probs"),
            },
        ),
    }
    found: dict[str, Calls] = {}
    for operation, (name, of) in losses.items():
        plain, leaf = t[name], t[name].clone().requires_grad_()

        def step(loss: Callable[[Any], Any], leaf: Any = leaf) -> Any:
            leaf.grad = None
            value = loss(leaf)
            value.backward()
            return value, leaf.grad

        found[f"{operation}, value"] = {k: lambda f=f, y=plain: f(y) for k, f in of.items()}  # type: ignore[misc]
        found[f"{operation}, step"] = {k: lambda f=f, step=step: step(f) for k, f in of.items()}  # type: ignore[misc]
    return found


def of_samples(rows: int, n: int) -> Calls:
    """A value and a gradient per sample, for so many rows."""
    x, y = torch.randn(2, SAMPLES, rows, n)
    losses: dict[str, Callable[[Any, Any], Any]] = {
        "klcore": partial(klcore.kl_div, space="logits", reduction="batchmean"),
        "F.kl_div": peers.torch_loss("soft targets", peers.torch_kl("batchmean")),
    }

    def step(loss: Any) -> Any:
        gradients, values = torch.func.vmap(torch.func.grad_and_value(loss, 1))(x, y)
        return values.sum(), gradients

    return {name: lambda f=f: step(f) for name, f in losses.items()}  # type: ignore[misc]


def of_jax(data: dict[str, np.ndarray]) -> dict[str, Calls]:
    x, y = jnp.asarray(data["x logits"]), jnp.asarray(data["y logits"])

    def formula(y: Any, x: Any) -> Any:
        return peers.jax_terms("logits", x, y).sum(-1).mean()

    def ours(y: Any, x: Any) -> Any:
        return klcore.kl_div(x, y, space="logits", reduction="rowmean")

    losses = {"klcore, jit": ours, "jnp, jit": formula}
    values = {k: jax.jit(f) for k, f in losses.items()}
    steps = {k: jax.jit(jax.value_and_grad(f)) for k, f in losses.items()}
    return {
        "logits, value": {
            **{k: lambda f=f: jax.block_until_ready(f(y, x)) for k, f in values.items()},  # type: ignore[misc]
            "klcore": lambda: jax.block_until_ready(ours(y, x)),
        },
        "logits, step": {k: lambda f=f: jax.block_until_ready(f(y, x)) for k, f in steps.items()},  # type: ignore[misc]
    }


def compare(operation: str, calls: Calls) -> None:
    """Check that all contenders have the same values, up to the rounding of the worst of them.

    Gradients are not compared: for kl_div it is q - p with respect to log-probabilities, for the literal sum it is -p.
    Through a log-softmax both are the same, which the tests check.
    """
    values = {}
    for name, call in calls.items():
        result = call()
        value = result[0] if isinstance(result, tuple) else result
        values[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
    if not np.allclose(list(values.values()), next(iter(values.values())), rtol=1e-3):
        raise SystemExit(f"{operation}: the contenders do not agree: {values}")


def seconds(calls: Calls, rounds: int, number: int) -> dict[str, float]:
    """Median time of a call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(number):
                call()
            times[name].append((time.perf_counter() - start) / number)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(klcore.get_num_threads())
    warnings.simplefilter("ignore")

    found: dict[str, Any] = {}

    def measure(library: str, operation: str, shape: str, calls: Calls, rounds: int, number: int, scale: float) -> None:
        compare(operation, calls)
        found[f"{library}, {operation}, {shape}"] = median = seconds(calls, rounds, number)
        unit = median[LIBRARY[library]]
        shown = ", ".join(f"{name} {t * scale:.1f} ({t / unit:.2f})" for name, t in median.items())
        tqdm.write(f"{library:8} {operation:42} {shown}")

    for rows, n, rounds, number, unit, scale in (
        (args.rows, CLASSES, ROUNDS, 1, "ms", 1e3),
        (10, 10, 3 * ROUNDS, 300, "us", 1e6),
    ):
        data = arrays(rows, n)
        print(f"\n({rows}, {n}) float32, {unit}; times what {' and '.join(LIBRARY.values())} takes")
        for library, make in (("PyTorch", of_pytorch), ("JAX", of_jax)):
            for operation, calls in tqdm(make(data).items(), desc=library, leave=False):
                measure(library, operation, f"({rows}, {n})", calls, rounds, number, scale)
    print(f"\n{SAMPLES} samples, ms")
    for rows, n in ((1, 10), (8, 10), (1, 100), (8, 100)):
        measure("PyTorch", f"vmap of ({rows}, {n})", f"{SAMPLES} samples", of_samples(rows, n), 3 * ROUNDS, 1, 1e3)
    if args.json:
        about = {
            "date": datetime.date.today().isoformat(),
            "instruction set": klcore.show_config(mode="dicts")["cpu"]["instruction set in use"],
            "threads": klcore.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in ("klcore", "numpy", "torch", "jax")},
        }
        args.json.write_text(json.dumps({"machine": about, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
