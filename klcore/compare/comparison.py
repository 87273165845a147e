"""Two sources that go together, and the loop over their rows: threads that read and measure, one that adds up."""

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
_LARGEST = 1.05  # probability, as 16 bits may have rounded it


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes
    ----------
    base, quant : Source
    rows, vocab : int
        Those of both that count.
    measure : Measure
    targets : array of int of shape (rows,), or None
    mask : array of bool of shape (rows,), or None
    groups : array of int of shape (rows,), or None
        The text of each row.
    per_group : int or None
        Rows of a text, where all have as many.
    with_tool : bool
        Also compute what llama.cpp does.
    quant_floored : bool
        The quant is a file of llama.cpp with a floor as well.
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
        """Of these rows; several threads may ask at once."""
        x, y = (source.read(start, stop)[:, : self.vocab] for source in (self.base, self.quant))
        targets = None if self.targets is None else self.targets[start:stop]
        found = self.measure(x, y, targets)
        counts = True if self.mask is None else self.mask[start:stop]
        for source, name in ((self.base, "base_confidence"), (self.quant, "quant_confidence")):
            above = (found[name] > _LARGEST) & counts
            if above.any():
                row = start + int(above.argmax())
                raise InputError(
                    f"row {row} of {source.name} has a probability above 1: it is spoilt, or not what --space says"
                )
        if self.with_tool:
            tool = tool_figures(x, y.astype(np.float32), targets)
            found |= {f"llama {name}": column for name, column in tool.items()}
        return found

    def places(self, start: int, stop: int) -> Any:
        """Which part of its text, or of the file, each row is in."""
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
        """Add the rows that `tally` has not seen, in order, until `stop` is set.

        Each thread reads and measures a chunk of at most `chunk_bytes` by itself, so that a busy neighbour delays one
        chunk and not every kernel call; one thread more than there are processors, which waits for the disk. `save` is
        called now and then; `progress` with the number of new rows.
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
    """The dtype that a chunk has in memory: NumPy knows no bfloat16, of the size of float16."""
    return "float16" if source.dtype == "bfloat16" else source.dtype


def _result(future: "Future[dict[str, Any]]") -> dict[str, Any]:
    try:
        return future.result()
    except OSError as error:
        raise InputError(f"a file cannot be read any further: {error}") from error
    except MemoryError as error:
        raise InputError("there is not enough memory for a chunk of rows; say a smaller --chunk-bytes") from error
