"""The results of a run on a GPU as lines of JSON: results.jsonl, with a line as soon as something is known.

gpu_run.py and the processes of its stages write it, report.py reads it. Nothing is held back until the end, so a
process that is killed leaves complete lines. A line names its `stage`, and its `item` if it is about one of the items
of a stage.
"""

import faulthandler
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NAME = "results.jsonl"
FILES = "KLCORE_GPU_RESULTS"  # files for lines, separated by os.pathsep; the last one also has earlier calls
CALL = "KLCORE_GPU_CALL"


def call() -> int:
    return int(os.environ.get(CALL, "1"))


def say(**line: Any) -> None:
    """Append a line, in one write, to every file."""
    data = (json.dumps({"call": call(), **line}) + "\n").encode()
    for path in filter(None, os.environ.get(FILES, "").split(os.pathsep)):
        with open(path, "ab", buffering=0) as file:
            file.write(data)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines except truncated ones, which a full disk could leave."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def known() -> list[dict[str, Any]]:
    """The lines of this call and, in a second call, those of the first."""
    path = os.environ.get(FILES, "").rpartition(os.pathsep)[2]
    return read(Path(path)) if path else []


def sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def each(
    stage: str, names: Iterable[str], work: Callable[[str], dict[str, Any]], deadline: float,
    alive: Callable[[], Any] = lambda: None, shard: tuple[int, int] = (0, 1), needs: float = 1.0,
    patience: float = 60.0,
) -> None:  # fmt: skip
    """Do `work` for each name that has no result yet, until the deadline less the seconds that one item `needs`.

    Writes a line when an item begins, and one with its result. An item that began in this call and has no result ended
    its process, and would do so again; one from an earlier call comes last. After an error, `alive` raises if the
    process has lost the GPU; another process then continues. The same happens, if there is a deadline, when an item
    takes longer than `patience`, because kernels can hang.
    """
    names = list(names)
    k, count = shard
    before = [line for line in known() if line["stage"] == stage]
    if k == 0 and not any("planned" in line for line in before):
        say(stage=stage, planned=names)
    ended = [line for line in before if "item" in line]
    skip = {line["item"] for line in ended if not {"begin", "died"} & set(line) or line["call"] == call()}
    begun = {line["item"] for line in ended}
    for name in sorted(names[k::count], key=lambda name: name in begun):
        if name in skip:
            continue
        if time.time() > deadline - needs:
            return
        say(stage=stage, item=name, begin=os.getpid())
        start = time.time()
        if max(deadline, patience) < math.inf:
            faulthandler.dump_traceback_later(patience, exit=True)
        try:
            found, failed = work(name), False
        except Exception as error:  # of any kind: the following items are worth as much
            found, failed = {"failed": sentence(error)}, True
        faulthandler.cancel_dump_traceback_later()
        say(stage=stage, item=name, seconds=round(time.time() - start, 3), **found)
        if failed:
            alive()
