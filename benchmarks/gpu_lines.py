"""What a run on a GPU finds, as lines of JSON: results.jsonl, a line the moment something is known.

gpu_run.py and the processes of its stages write, report.py reads. Nothing waits in memory for an end that may not
come: whoever is killed leaves complete lines. A line names its `stage`, and its `item` if it is about one of the things
that a stage goes through.
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
FILES = "KLCORE_GPU_RESULTS"  # where lines go, split by os.pathsep; the last file knows earlier calls as well
CALL = "KLCORE_GPU_CALL"


def call() -> int:
    return int(os.environ.get(CALL, "1"))


def say(**line: Any) -> None:
    """Append a line, by one write, to every file."""
    data = (json.dumps({"call": call(), **line}) + "\n").encode()
    for path in filter(None, os.environ.get(FILES, "").split(os.pathsep)):
        with open(path, "ab", buffering=0) as file:
            file.write(data)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines but those cut short, which a full disk could leave."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def known() -> list[dict[str, Any]]:
    """The lines of this call, and in a second call those of the first."""
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
    """Do `work` for each name that has no result yet, until the deadline less the seconds that one `needs`.

    A line when it begins, and one with what was found. Who began in this call and left no result has ended its process,
    and would again; of an earlier call's, it comes last. `alive` raises, after an error, if the process has lost the
    GPU: then another goes on. So it does where there is a deadline and one takes longer than `patience`: kernels hang.
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
        except Exception as error:  # of any kind: what follows is worth as much
            found, failed = {"failed": sentence(error)}, True
        faulthandler.cancel_dump_traceback_later()
        say(stage=stage, item=name, seconds=round(time.time() - start, 3), **found)
        if failed:
            alive()
