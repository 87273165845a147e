"""The command line of `klcore compare`: arguments, what they mean, and the order of what happens.

Exit status: 0; 1 if --max-mean or --max-q99 is exceeded; 2 if something is wrong with the input, in one sentence; 130
after Ctrl-C, with the figures of the rows until then.
"""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from klcore.backends.threads import threads
from klcore.compare import files, llama, outputs
from klcore.compare.comparison import Comparison
from klcore.compare.errors import InputError
from klcore.compare.figures import Measure
from klcore.compare.page import as_page
from klcore.compare.plots import SUFFIXES, THEMES, check_plots, draw
from klcore.compare.report import as_text, figure, make_report
from klcore.compare.tally import Tally

SPACES = ("logits", "log_probs", "probs")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `klcore compare`."""
    parser.add_argument(
        "base", metavar="BASE", help="the original's logits: a file, FILE:ARRAY, or a folder of EXL3 rows"
    )
    parser.add_argument("quant", metavar="QUANT", help="the other model's, of the same tokens")
    what = parser.add_argument_group("what the files hold")
    what.add_argument(
        "--space",
        type=_spaces,
        default=None,
        metavar="SPACE[,SPACE]",
        help="logits (the default), log_probs or probs; of base and of quant if they differ",
    )
    what.add_argument("--shape", type=_shape, metavar="ROWS,VOCAB", help="of files without a header")
    what.add_argument("--dtype", choices=files.FLOATS, help="of files without a header")
    what.add_argument("--vocab", type=_positive, metavar="N", help="compare the first N classes: cuts padding")
    what.add_argument("--temperature", type=float, default=1.0, metavar="T", help="divides logits")
    what.add_argument("--partial", action="store_true", help="take the whole rows of files that are cut off")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--tokens", metavar="T.npy", help="the token that came after each row (negative: none), for perplexities"
    )
    rows.add_argument("--mask", metavar="M.npy", help="booleans: the rows that count")
    rows.add_argument(
        "--groups",
        metavar="N|G.npy",
        help="rows of a text, or the number of each row's text: errors are then clustered by text",
    )
    rows.add_argument("--skip-nan", action="store_true", help="exit status 0 also if there are rows of NaN")
    out = parser.add_argument_group("what is written")
    out.add_argument("--json", metavar="FILE", help="all figures; - is standard output, in place of the table")
    out.add_argument("--rows", metavar="FILE.npy", help="the KL of each row, float32; NaN where a mask left it out")
    out.add_argument("--plot", metavar="FILE", help=f"a picture: {', '.join(SUFFIXES)}")
    out.add_argument("--html", metavar="FILE", help="a page with figures and pictures, in one file")
    out.add_argument("--llama", action="store_true", help="print what llama-perplexity does, by its own arithmetic")
    out.add_argument("--worst", type=_natural, default=10, metavar="N", help="rows with the largest KL to name (10)")
    out.add_argument("--force", action="store_true", help="overwrite files that exist")
    gate = parser.add_argument_group("for CI: exit status 1 if exceeded")
    gate.add_argument("--max-mean", type=float, metavar="X", help="of the mean KL, in nats")
    gate.add_argument("--max-q99", type=float, metavar="X", help="of the KL of 99 %% of the rows")
    how = parser.add_argument_group("how")
    how.add_argument("--quick", action="store_true", help="KL and agreement alone: several times as fast")
    how.add_argument(
        "--resume", metavar="STATE", help="go on from this file if it is there; it is written now and then"
    )
    how.add_argument(
        "--chunk-bytes",
        type=_bytes,
        default=8 << 20,
        metavar="SIZE",
        help="of both files, in memory for each thread (8M)",
    )
    how.add_argument("--threads", type=_positive, metavar="N", help="as klcore.threads")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, found {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number of at least 0, found {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    number, unit = text.rstrip("kKmMgG"), text[len(text.rstrip("kKmMgG")) :].lower()
    if unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"a size as 16M, found {text!r}")
    return _positive(number) * _UNITS[unit]


def _shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"two numbers, as 1000,32000; found {text!r}")
    return _positive(parts[0]), _positive(parts[1])


def _spaces(text: str) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) > 2 or any(p not in SPACES for p in parts):
        raise argparse.ArgumentTypeError(f"one or two of {', '.join(SPACES)}; found {text!r}")
    return parts[0], parts[-1]


def main(arguments: argparse.Namespace, command: list[str]) -> int:
    """The exit status; `command` is what was typed, for the report."""
    limited = threads(arguments.threads) if arguments.threads else contextlib.nullcontext()
    try:
        with limited:  # and not for whoever calls this from Python
            return _compare(arguments, shlex.join(command))
    except InputError as error:
        print(f"klcore compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first chunk or after the last, or the second one
        return 130
    finally:
        files.remove_temporary()


def _compare(a: argparse.Namespace, command: str) -> int:
    comparison, columns = _prepare(a)
    inputs = [*comparison.base.parts, *comparison.quant.parts]
    inputs += [Path(f) for f in (a.tokens, a.mask, a.groups) if f and not f.isdecimal()]
    _check_outputs(a, inputs)
    tally = Tally(a.quick, comparison.targets is not None, columns, a.worst)
    about = _about(a, comparison, columns, inputs)
    if a.resume and os.path.exists(a.resume):
        tally.load(*outputs.read_state(a.resume, about))

    def save() -> None:
        if a.resume:
            kept = {name: tally.column(name) for name in columns}
            outputs.write_state(a.resume, about, tally.to_dict(), kept)

    with _until_interrupted() as stop, _progress(comparison.rows, tally.done) as progress:
        comparison.run(tally, a.chunk_bytes, stop, save, progress)
    report = make_report(comparison, tally, command)
    try:
        save()
    finally:  # figures are not lost with a state that cannot be written
        _write(a, report, tally)
    return _status(a, report, tally.done < comparison.rows)


# ---- what is compared ------------------------------------------------------------------------------------------------


def _prepare(a: argparse.Namespace) -> tuple[Comparison, tuple[str, ...]]:
    """The comparison, and the columns that its outputs need."""
    opened = [_open(text, a) for text in (a.base, a.quant)]
    sources = [f.source if isinstance(f, llama.LlamaFile) else f for f in opened]
    spaces = tuple(
        "log_probs" if isinstance(f, llama.LlamaFile) else (a.space or ("logits", "logits"))[k]
        for k, f in enumerate(opened)
    )
    if not (a.temperature > 0 and np.isfinite(a.temperature)):
        raise InputError(f"--temperature must be above 0 and finite; found {a.temperature}")
    if a.temperature != 1 and "logits" not in spaces:
        raise InputError("--temperature divides logits, and neither file holds these")
    base, quant = sources
    if not a.partial:
        for source in sources:
            source.check_whole()
        if base.rows != quant.rows:
            raise InputError(_rows_differ(opened))
    rows = min(base.rows, quant.rows)
    if not rows:
        raise InputError("there is no whole row to compare")
    vocab = _vocab(a, base, quant)
    of_llama = next((f for f in opened if isinstance(f, llama.LlamaFile)), None)
    targets, groups, per_group = None, None, None
    if of_llama is not None:
        targets, per_group = of_llama.targets[:rows], of_llama.per_chunk
    if a.tokens:
        targets = files.read_small(a.tokens, "--tokens", "iu", rows)
    if a.groups and a.groups.isdecimal():
        per_group = _per_group(int(a.groups), rows, a.partial)
    elif a.groups:
        groups, per_group = files.read_small(a.groups, "--groups", "iu", rows), None
    if per_group:
        groups = np.arange(rows) // per_group
    mask = files.read_small(a.mask, "--mask", "b", rows) if a.mask else None
    if mask is not None and not mask.any():
        raise InputError(f"{a.mask} leaves no row")
    if targets is not None:
        targets = np.asarray(targets, np.int64)
        if targets.max() >= vocab:
            row = int(targets.argmax())
            raise InputError(f"the token of row {row} is {targets[row]}, and there are {vocab:,} classes")
    if a.llama:
        _check_llama(opened, spaces, targets, mask)
    floored, quant_floored = (isinstance(f, llama.LlamaFile) and f.has_floor for f in opened)
    if quant_floored and not floored:
        raise InputError(f"{quant.name} is stored above a floor, so BASE must be a _logits_ file of llama.cpp too")
    measure = Measure((spaces[0], spaces[1]), a.temperature, floored, a.quick)
    comparison = Comparison(
        base, quant, rows, vocab, measure, targets=targets, mask=mask, groups=groups, per_group=per_group,
        with_tool=a.llama, quant_floored=quant_floored,
    )  # fmt: skip
    tool = tuple(f"llama {name}" for name in llama.COLUMNS) if a.llama else ()
    return comparison, (*(("kl",) if a.rows else ()), *tool)


def _open(text: str, a: argparse.Namespace) -> "files.Source | llama.LlamaFile":
    return llama.open_llama(text) if llama.is_llama(text) else files.open_source(text, a.shape, a.dtype)


def _rows_differ(opened: list[Any]) -> str:
    base, quant = (f.source if isinstance(f, llama.LlamaFile) else f for f in opened)
    text = f"{base.name} has {base.rows:,} rows, and {quant.name} {quant.rows:,}"
    of_llama = next((f for f in opened if isinstance(f, llama.LlamaFile)), None)
    if of_llama is not None:
        n_ctx, first = of_llama.tokens.shape[1], of_llama.tokens.shape[1] // 2
        text += f"; llama.cpp keeps positions {first} to {n_ctx - 2} of each chunk of {n_ctx} tokens: save these"
    return text


def _vocab(a: argparse.Namespace, base: files.Source, quant: files.Source) -> int:
    least = min(base.vocab, quant.vocab)
    if a.vocab is None:
        if base.vocab != quant.vocab:
            raise InputError(
                f"{base.name} has {base.vocab:,} classes, and {quant.name} {quant.vocab:,}; if the larger one is "
                f"padded, say --vocab {least}"
            )
        return least
    if a.vocab > least:
        raise InputError(f"--vocab {a.vocab:,} is more than the {least:,} classes that both files have")
    return int(a.vocab)


def _per_group(count: int, rows: int, partial: bool) -> int:
    if count < 1 or (rows % count and not partial):
        raise InputError(
            f"--groups {count}: {rows:,} rows are not whole texts of {count:,} rows; a text of n tokens has n - 1"
        )
    return count


def _check_llama(opened: list[Any], spaces: tuple[str, ...], targets: Any, mask: Any) -> None:
    if not (isinstance(opened[0], llama.LlamaFile) and opened[0].has_floor and spaces[1] == "logits"):
        raise InputError("--llama is for a _logits_ file of llama.cpp as BASE, and logits as QUANT")
    if mask is not None or targets.min() < 0:
        raise InputError("--llama takes all rows, as llama.cpp does: leave --mask away, and negative tokens")
    if len(targets) < llama.LEAST_ROWS:
        raise InputError(f"--llama needs {llama.LEAST_ROWS} rows for its errors; found {len(targets)}")


def _about(a: argparse.Namespace, c: Comparison, columns: tuple[str, ...], inputs: list[Path]) -> dict[str, Any]:
    """By what a state is known to be of this comparison: of these arrays, in files that have not changed."""
    names = ("tokens", "mask", "groups", "temperature", "quick", "worst")
    return {
        **{end: [s.name, s.dtype] for end, s in (("base", c.base), ("quant", c.quant))},
        **{f"--{name}": getattr(a, name) for name in names},
        **{str(path): _stamp(path) for path in inputs},
        "rows": c.rows,
        "vocabulary": c.vocab,
        "space": list(c.measure.spaces),
        "columns": list(columns),
    }


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size:,} bytes of {np.datetime64(found.st_mtime_ns, 'ns')}"


# ---- while it runs ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Set by Ctrl-C, so that a chunk is either in the figures or not; a second Ctrl-C ends at once."""
    stop = threading.Event()

    def interrupt(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _progress(rows: int, done: int) -> Iterator[Callable[[int], object]]:
    """A bar, for people, if tqdm is there."""
    bar = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            bar = importlib.import_module("tqdm").tqdm(
                total=rows, initial=done, unit=" rows", unit_scale=True, leave=False
            )
    try:
        yield bar.update if bar is not None else lambda rows: None
    finally:
        if bar is not None:
            bar.close()


# ---- what is written -------------------------------------------------------------------------------------------------


def _check_outputs(a: argparse.Namespace, inputs: list[Any]) -> None:
    if a.plot and not a.plot.lower().endswith(SUFFIXES):
        raise InputError(f"--plot {a.plot}: its name must end in {', '.join(SUFFIXES)}")
    if a.llama and a.json == "-":
        raise InputError("--llama and --json - both print: write --json to a file")
    if a.plot or a.html:
        check_plots()
    written = [f for f in (None if a.json == "-" else a.json, a.rows, a.plot, a.html) if f]
    outputs.check_outputs(written, inputs, a.force)
    if a.resume:
        outputs.check_outputs([*written, a.resume], inputs, True)


def _write(a: argparse.Namespace, report: dict[str, Any], tally: Tally) -> None:
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if a.json == "-":
        outputs.say(text)
    else:
        outputs.say(as_text(report))
        if a.llama:
            columns = {name: tally.column(f"llama {name}") for name in llama.COLUMNS}
            outputs.say("\n" + llama.tool_report(columns) + "\n")
    if a.json and a.json != "-":
        outputs.write(a.json, text.encode())
    if a.rows:
        outputs.write(a.rows, outputs.npy_bytes(tally.column("kl")))
    if a.plot:
        kind = a.plot.lower().rpartition(".")[2]
        outputs.write(a.plot, draw(tally, report, "light", kind))
    if a.html:
        pictures = {(t, n): draw(tally, report, t, "svg", n) for t in THEMES for n in (False, True)}
        outputs.write(a.html, as_page(report, pictures).encode(errors="replace"))


def _status(a: argparse.Namespace, report: dict[str, Any], stopped: bool) -> int:
    if stopped:
        return 130
    if report["rows_nan"] and not a.skip_nan:
        print(
            f"klcore compare: {report['notes'][0]}; --skip-nan takes that as it is",
            file=sys.stderr,
        )
        return 2
    kl = report["kl"]
    exceeded = False
    for option, limit, value, what in (
        ("--max-mean", a.max_mean, kl["mean"], "the mean KL"),
        ("--max-q99", a.max_q99, kl["quantiles"]["0.99"], "the KL of 99 % of the rows"),
    ):
        if limit is None:
            continue
        if report["rows_infinite"]:
            print(f"klcore compare: {option} {limit:g} is exceeded: rows with an infinite KL", file=sys.stderr)
            exceeded = True
        elif value is None or not value <= limit:
            print(f"klcore compare: {what} is {figure(value)}, above {option} {limit:g}", file=sys.stderr)
            exceeded = True
    return int(exceeded)
