"""How close klcore is to the limit of memory: the time of a call divided by the time that moving its bytes takes.

Both are measured in one process, in turns, so that the ratio does not change if the machine's speed does. (GB/s would
be the inverse, and asv treats an increase as a regression.)
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from floor import floor

from .calls import DEVICES, NAMES, PAST_CACHE, Call, library, warm
from .divergence import GRADIENTS, VALUES

ROUNDS = 25
LAUNCHES = {"cpu": 1, "cuda": 10}  # before waiting, which takes a GPU as long as moving a few MB


class Bandwidth:
    """Rows larger than every cache."""

    params = (VALUES + GRADIENTS, DEVICES, ["float32"], [PAST_CACHE])
    param_names = NAMES

    def setup(self, operation: str, device: str, dtype: str, shape: str) -> None:
        self.call = warm(operation, device, dtype, shape)
        self.floors = _floors(device, self.call)

    def track_floor(self, operation: str, device: str, dtype: str, shape: str) -> float:
        """The median time of a call, divided by that of its floor."""
        launches = [self.call.launch, *self.floors]
        rounds = [[_seconds(launch, self.call.wait, LAUNCHES[device]) for launch in launches] for _ in range(ROUNDS)]
        ours, *floors = map(statistics.median, zip(*rounds, strict=True))
        return ours / min(floors)

    track_floor.unit = "x floor"


def _floors(device: str, call: Call) -> list[Callable[[], Any]]:
    """Functions that move the bytes of `call` and do nothing else; the fastest one counts."""
    if device == "cpu":
        names = ["read_write", "read_stream"] if call.outputs else ["read_both"]
        return [floor(name, *call.inputs, *call.outputs) for name in names]
    xp = library(device)
    half = sum(a.nbytes for a in (*call.inputs, *call.outputs)) // 2  # a copy reads as much as it writes
    source, target = xp.zeros(half, "uint8"), xp.zeros(half, "uint8")
    return [lambda: xp.copyto(target, source)]


def _seconds(launch: Callable[[], Any], wait: Callable[[], Any], launches: int) -> float:
    start = time.perf_counter()
    for _ in range(launches):
        launch()
    wait()
    return (time.perf_counter() - start) / launches
