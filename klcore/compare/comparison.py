"""Two sources to compare, and the loop over their rows: threads read and compute chunks, one thread adds them up."""

import collections
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from klcore.backends.threads import get_num_threads
from klcore.compare.errors import InputError
from klcore.compare.figures import Measure
from klcore.compare.files import Source
from klcore.compare.llama import tool_figures
from klcore.compare.tally import PLACES, Tally

_SAVE_EVERY = 30.0  # seconds
_LARGEST = 1.05  # the largest probability that rounding to 16 bits can produce


@dataclass(frozen=True)
class Comparison:
    """The inputs of a comparison.

    Attributes
    ----------
    base, quant : Source
    rows, vocab : int
        How many rows and classes are compared.
    measure : Measure
    targets : array of int of shape (rows,), or None
    mask : array of bool of shape (rows,), or None
    groups : array of int of shape (rows,), or None
        The text of each row.
    per_group : int or None
        The number of rows per text, if it is the same for all.
    with_tool : bool
        Also compute the figures of llama.cpp.
    quant_floored : bool
        The quant is a file of llama.cpp with a floor, too.
    """

    base: Source
    quant: Source
    rows: int
    vocab: int
    measure: Measure
    targets: Any = None
    mask: Any = None
    groups: Any = None
    per_group: int | None = None
    with_tool: bool = False
    quant_floored: bool = False

    def figures(self, start: int, stop: int) -> dict[str, Any]:
        """The figures of these rows; thread-safe."""
        x, y = (source.read(start, stop)[:, : self.vocab] for source in (self.base, self.quant))
        targets = None if self.targets is None else self.targets[start:stop]
        found = self.measure(x, y, targets)
        counts = True if self.mask is None else self.mask[start:stop]
        for source, name in ((self.base, "base_confidence"), (self.quant, "quant_confidence")):
            above = (found[name] > _LARGEST) & counts
            if above.any():
                row = start + int(above.argmax())
                raise InputError(
                    f"row {row} of {source.name} has a probability above 1; the file is corrupt, or --space is wrong"
                )
        if self.with_tool:
            tool = tool_figures(x, y.astype(np.float32), targets)
            found |= {f"llama {name}": column for name, column in tool.items()}
        return found

    def places(self, start: int, stop: int) -> Any:
        """The place of each row: the part of its text, or of the file, that it is in."""
        rows = np.arange(start, stop)
        if self.per_group:
            return rows % self.per_group * PLACES // self.per_group
        return rows * PLACES // self.rows

    def run(
        self,
        tally: Tally,
        chunk_bytes: int,
        stop: threading.Event,
        save: Callable[[], None] = lambda: None,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> None:
        """Add the rows that are not in `tally` yet, in order, until `stop` is set.

        Each thread reads and computes a chunk of at most `chunk_bytes` by itself, so that a busy processor delays one
        chunk, not every kernel call. There is one thread more than processors, to wait for the disk. `save` is called
        from time to time, `progress` with the number of new rows.
        """
        row_bytes = sum(np.dtype(_memory(s)).itemsize * s.vocab for s in (self.base, self.quant))
        size = max(1, chunk_bytes // row_bytes)
        starts = iter(range(tally.done, self.rows, size))
        pending: collections.deque[tuple[int, int, Future[dict[str, Any]]]] = collections.deque()
        saved = time.monotonic()
        workers = get_num_threads() + 1
        with ThreadPoolExecutor(workers) as pool:
            try:
                while not stop.is_set():
                    while len(pending) <= workers and (start := next(starts, None)) is not None:
                        end = min(start + size, self.rows)
                        pending.append((start, end, pool.submit(self.figures, start, end)))
                    if not pending:
                        break
                    start, end, future = pending.popleft()
                    self._add(tally, start, end, _result(future))
                    progress(end - start)
                    if time.monotonic() - saved > _SAVE_EVERY:
                        save()
                        saved = time.monotonic()
            finally:
                for _, _, future in pending:
                    future.cancel()

    def _add(self, tally: Tally, start: int, end: int, figures: dict[str, Any]) -> None:
        mask, groups = (None if a is None else a[start:end] for a in (self.mask, self.groups))
        tally.add(figures, mask, groups, self.places(start, end))


def _memory(source: Source) -> str:
    """A dtype of the size of a chunk's numbers in memory: NumPy has no bfloat16, so float16."""
    return "float16" if source.dtype == "bfloat16" else source.dtype


def _result(future: "Future[dict[str, Any]]") -> dict[str, Any]:
    try:
        return future.result()
    except OSError as error:
        raise InputError(f"a file cannot be read any further: {error}") from error
    except MemoryError as error:
        raise InputError("there is not enough memory for a chunk of rows; use a smaller --chunk-bytes") from error
