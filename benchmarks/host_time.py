"""Microseconds of Python that a call on a GPU takes before its kernels run, measured without a GPU.

    python benchmarks/host_time.py [--against TREE]

The arrays are those of stub.py, which cost nothing, and launches do nothing, so this measures klcore's own work for a
warm call, one whose shapes were seen before. CuPy's time for allocations and launches comes on top; both are counted.
`--against` measures another checkout of klcore as well, in turns, each round in a separate process, and prints both.
The figure is processor time: the fastest repetition of a round, and the median round, because other programs can only
add to it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stub

TREE = Path(__file__).resolve().parents[1]
TARGET = 20.0  # microseconds (docs/performance.md)
ROUNDS, REPETITIONS, CALLS = 5, 7, 300


def calls(cupy: Any, shape: tuple[int, int] = (8192, 32768)) -> dict[str, Callable[[], Any]]:
    """Every kind of call whose host time matters, by name."""
    import klcore

    x, y = (cupy.empty(shape, "float32") for _ in "xy")
    a, b = (cupy.empty(shape, "float16") for _ in "xy")
    row, total, weights = cupy.empty(shape[0], "float32"), cupy.empty((), "float32"), cupy.empty(shape[0], "float32")
    dx, dy, db = cupy.empty_like(x), cupy.empty_like(y), cupy.empty_like(b)
    mask = cupy.empty(shape[0], "bool")
    kl = klcore.kl_div
    logits = {"space": "logits"}
    weighted = {"space": "logits", "reduction": "rowmean", "weights": weights, "return_grad": "y"}
    return {
        "row": lambda: kl(x, y),
        "row, out=": lambda: kl(x, y, out=row),
        "sum": lambda: kl(x, y, reduction="sum"),
        "sum, out=": lambda: kl(x, y, reduction="sum", out=total),
        "logits, batchmean": lambda: kl(x, y, reduction="batchmean", **logits),
        "logits, row + dy": lambda: kl(x, y, return_grad="y", **logits),
        "logits, row + dy, out=": lambda: kl(x, y, return_grad="y", out=(row, dy), **logits),
        "logits, sum + dy": lambda: kl(x, y, return_grad="y", reduction="sum", **logits),
        "logits, sum + dy, out=": lambda: kl(x, y, return_grad="y", reduction="sum", out=(total, dy), **logits),
        "logits, batchmean + dx + dy, out=": lambda: kl(
            x, y, return_grad=("x", "y"), reduction="batchmean", out=(total, dx, dy), **logits
        ),
        "16 bits, logits, sum + dy, out=": lambda: kl(
            a, b, return_grad="y", reduction="sum", out=(total, db), **logits
        ),
        "weighted rowmean + dy": lambda: kl(x, y, **weighted),
        "weighted rowmean + dy, out=": lambda: kl(x, y, out=(total, dy), **weighted),
        "rowmean + dy, a mask": lambda: kl(x, y, **{**weighted, "weights": mask}),
        "entropy, mean": lambda: klcore.entropy(x, reduction="mean"),
    }


def measure() -> dict[str, dict[str, float]]:
    """Microseconds, allocations and launches of each kind of call."""
    found = {}
    with stub.installed() as cupy:
        for name, call in calls(cupy).items():
            call()
            stub.counts.clear()
            call()
            counted = {what: stub.counts[what] for what in ("allocations", "launches")}
            best = min(timeit.repeat(call, timer=time.thread_time, number=CALLS, repeat=REPETITIONS)) / CALLS
            found[name] = {"us": 1e6 * best, **counted}
    return found


def measure_in(tree: Path) -> dict[str, dict[str, float]]:
    """The same for the klcore of another tree, in a separate process."""
    words = [sys.executable, str(Path(__file__).resolve()), "--json"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout, to measure in turns")
    parser.add_argument("--json", action="store_true", help="one round, of the klcore that is imported")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(measure()))
        return
    trees = [TREE] + ([args.against.resolve()] if args.against else [])
    rounds = [[measure_in(tree) for tree in trees] for _ in range(ROUNDS)]
    print(f"{'':36}" + (f"{'before':>8}" if args.against else "") + f"{'us':>8}{'allocations':>13}{'launches':>10}")
    late = []
    for name, counted in rounds[0][0].items():
        ours, *other = (statistics.median(r[k][name]["us"] for r in rounds) for k in range(len(trees)))
        late += [name] if ours > TARGET else []
        print(
            f"{name:36}" + "".join(f"{us:8.1f}" for us in other) + f"{ours:8.1f}{counted['allocations']:13}"
            f"{counted['launches']:10}"
        )
    print(f"target: {TARGET:.0f} us; " + (f"missed by {', '.join(late)}" if late else "met by all"))


if __name__ == "__main__":
    main()
