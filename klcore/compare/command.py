"""The command line of `klcore compare`: its arguments, what they mean, and the steps of a run.

Exit status: 0; 1 if --max-mean or --max-q99 is exceeded; 2 if the input is wrong, with a message of one sentence; 130
after Ctrl-C, with the report on the rows so far.
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

from klcore.backends.threads import get_num_threads, threads
from klcore.compare import files, llama, outputs
from klcore.compare.comparison import Comparison
from klcore.compare.errors import InputError
from klcore.compare.figures import Measure
from klcore.compare.page import as_page
from klcore.compare.plots import SUFFIXES, THEMES, check_plots, draw
from klcore.compare.report import as_text, figure, make_report
from klcore.compare.tally import Tally
from klcore.divergence import kl_div

SPACES = ("logits", "log_probs", "probs")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `klcore compare`."""
    parser.add_argument(
        "base", metavar="BASE", help="the logits of the original model: a file, FILE:ARRAY, or a folder of EXL3 rows"
    )
    parser.add_argument("quant", metavar="QUANT", help="the logits of the other model, for the same tokens")
    what = parser.add_argument_group("input files")
    what.add_argument(
        "--space",
        type=_spaces,
        default=None,
        metavar="SPACE[,SPACE]",
        help="what the numbers are: logits (the default), log_probs or probs; a pair if base and quant differ",
    )
    what.add_argument("--shape", type=_shape, metavar="ROWS,VOCAB", help="the shape of files without a header")
    what.add_argument("--dtype", choices=files.FLOATS, help="the dtype of files without a header")
    what.add_argument(
        "--vocab", type=_positive, metavar="N", help="compare only the first N classes, to ignore padding"
    )
    what.add_argument("--temperature", type=float, default=1.0, metavar="T", help="divide logits by T")
    what.add_argument("--partial", action="store_true", help="compare the complete rows of truncated files")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--tokens", metavar="T.npy", help="the token that follows each row (negative: none), for perplexities"
    )
    rows.add_argument("--mask", metavar="M.npy", help="booleans: the rows to compare")
    rows.add_argument(
        "--groups",
        type=_groups,
        metavar="N|G.npy",
        help="the number of rows per text, or the text of each row as an integer: clusters the errors by text",
    )
    rows.add_argument("--skip-nan", action="store_true", help="exit status 0 even if there are rows of NaN")
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="write the report as JSON; - prints it instead of the table")
    out.add_argument("--rows", metavar="FILE.npy", help="write the KL of each row, float32; NaN for rows left out")
    out.add_argument("--plot", metavar="FILE", help=f"write a picture: {', '.join(SUFFIXES)}")
    out.add_argument("--html", metavar="FILE", help="write a self-contained page with tables and pictures")
    out.add_argument("--llama", action="store_true", help="print the report of llama-perplexity, in its arithmetic")
    out.add_argument("--worst", type=_natural, default=10, metavar="N", help="list the N rows with the largest KL (10)")
    out.add_argument("--force", action="store_true", help="overwrite existing files")
    gate = parser.add_argument_group("limits for CI: exit status 1 if exceeded")
    gate.add_argument("--max-mean", type=float, metavar="X", help="the limit of the mean KL, in nats")
    gate.add_argument("--max-q99", type=float, metavar="X", help="the limit of the 99 %% quantile of the KL, in nats")
    how = parser.add_argument_group("execution")
    how.add_argument("--quick", action="store_true", help="compute only KL and agreement; several times as fast")
    how.add_argument(
        "--resume", metavar="STATE", help="save the state to this file regularly, and continue from it if it exists"
    )
    how.add_argument(
        "--chunk-bytes",
        type=_bytes,
        default=8 << 20,
        metavar="SIZE",
        help="how much of both files to hold in memory per thread (8M)",
    )
    how.add_argument("--threads", type=_positive, metavar="N", help="use at most N threads")


def _positive(text: str) -> int:
    return _integer(text, 1)


def _natural(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if len(text) > 18:  # Python does not convert thousands of digits
        raise argparse.ArgumentTypeError(f"must have at most 18 digits, found {len(text)} characters")
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, found {text!r}")
    return int(text)


def _groups(text: str) -> str:
    """The number of rows per text, or the name of a file."""
    return str(_natural(text)) if text.isdecimal() else text


def _bytes(text: str) -> int:
    number, unit = text.rstrip("kKmMgG"), text[len(text.rstrip("kKmMgG")) :].lower()
    if unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a size such as 16M, found {text!r}")
    return _positive(number) * _UNITS[unit]


def _shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"must be two integers such as 1000,32000; found {text!r}")
    return _positive(parts[0]), _positive(parts[1])


def _spaces(text: str) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) > 2 or any(p not in SPACES for p in parts):
        raise argparse.ArgumentTypeError(f"must be one or two of {', '.join(SPACES)}; found {text!r}")
    return parts[0], parts[-1]


def main(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the command; returns the exit status. `command` is the command line, for the report."""
    try:
        with _limited(arguments.threads):  # only within this call, which may come from Python
            return _compare(arguments, shlex.join(command))
    except InputError as error:
        print(f"klcore compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first chunk, after the last, or a second Ctrl-C
        return 130
    finally:
        files.remove_temporary()


def _limited(count: int | None) -> contextlib.AbstractContextManager[Any]:
    try:
        limited = threads(count) if count else contextlib.nullcontext()
        get_num_threads()
    except ValueError as error:
        raise InputError(str(error)) from error
    return limited


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
    finally:  # the report is not lost if the state cannot be written
        _write(a, report, tally)
    return _status(a, report, tally.done < comparison.rows)


# ---- the inputs ------------------------------------------------------------------------------------------------------


def _prepare(a: argparse.Namespace) -> tuple[Comparison, tuple[str, ...]]:
    """The comparison, and the columns that its outputs need."""
    opened = [_open(text, a) for text in (a.base, a.quant)]
    sources = [f.source if isinstance(f, llama.LlamaFile) else f for f in opened]
    spaces = tuple(
        "log_probs" if isinstance(f, llama.LlamaFile) else (a.space or ("logits", "logits"))[k]
        for k, f in enumerate(opened)
    )
    if a.temperature != 1 and "logits" not in spaces:
        raise InputError("--temperature divides logits, but neither file holds logits")
    try:
        kl_div([0.0], [0.0], space="logits", temperature=a.temperature)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    base, quant = sources
    if not a.partial:
        for source in sources:
            source.check_whole()
        if base.rows != quant.rows:
            raise InputError(_rows_differ(opened))
    rows = min(base.rows, quant.rows)
    if not rows:
        raise InputError("there is no complete row to compare")
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
        raise InputError(f"{a.mask}, for --mask, leaves out all rows")
    if targets is not None:
        targets = np.asarray(targets, np.int64)
        if targets.max() >= vocab:
            row = int(targets.argmax())
            raise InputError(f"the token of row {row} is {targets[row]}, but there are only {vocab:,} classes")
    if a.llama:
        _check_llama(opened, spaces, targets, mask)
    floored, quant_floored = (isinstance(f, llama.LlamaFile) and f.has_floor for f in opened)
    if quant_floored and not floored:
        raise InputError(f"{quant.name} is stored with a floor, so BASE must be a _logits_ file of llama.cpp, too")
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
    text = f"{base.name} has {base.rows:,} rows, but {quant.name} has {quant.rows:,}"
    of_llama = next((f for f in opened if isinstance(f, llama.LlamaFile)), None)
    if of_llama is not None:
        n_ctx, first = of_llama.tokens.shape[1], of_llama.tokens.shape[1] // 2
        text += (
            f"; llama.cpp keeps positions {first} to {n_ctx - 2} of each chunk of {n_ctx} tokens, so save only these"
        )
    return text


def _vocab(a: argparse.Namespace, base: files.Source, quant: files.Source) -> int:
    least = min(base.vocab, quant.vocab)
    if a.vocab is None:
        if base.vocab != quant.vocab:
            raise InputError(
                f"{base.name} has {base.vocab:,} classes, but {quant.name} has {quant.vocab:,}; if the larger one is "
                f"padded, pass --vocab {least}"
            )
        return least
    if a.vocab > least:
        raise InputError(f"--vocab {a.vocab:,} is more than the {least:,} classes that both files have")
    return int(a.vocab)


def _per_group(count: int, rows: int, partial: bool) -> int:
    if count < 1 or (rows % count and not partial):
        raise InputError(
            f"--groups {count}: {rows:,} rows are not a multiple of {count:,}; a text of n tokens has n - 1 rows"
        )
    return count


def _check_llama(opened: list[Any], spaces: tuple[str, ...], targets: Any, mask: Any) -> None:
    if not (isinstance(opened[0], llama.LlamaFile) and opened[0].has_floor and spaces[1] == "logits"):
        raise InputError("--llama needs a _logits_ file of llama.cpp as BASE, and logits as QUANT")
    if mask is not None or targets.min() < 0:
        raise InputError("--llama uses all rows, as llama.cpp does, so --mask and negative tokens are not supported")
    if len(targets) < llama.LEAST_ROWS:
        raise InputError(f"--llama needs {llama.LEAST_ROWS} rows for the standard errors; found {len(targets)}")


def _about(a: argparse.Namespace, c: Comparison, columns: tuple[str, ...], inputs: list[Path]) -> dict[str, Any]:
    """What identifies a comparison for --resume: the arrays, in files that have not changed, and the options."""
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
    """An event that Ctrl-C sets, so that a chunk is either counted or not; a second Ctrl-C ends at once."""
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
    """A progress bar if stderr is a terminal and tqdm is installed."""
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


# ---- the outputs -----------------------------------------------------------------------------------------------------


def _check_outputs(a: argparse.Namespace, inputs: list[Any]) -> None:
    if a.plot and not a.plot.lower().endswith(SUFFIXES):
        raise InputError(f"--plot {a.plot}: the name must end in {', '.join(SUFFIXES)}")
    if a.llama and a.json == "-":
        raise InputError("--llama and --json - both print; write the JSON to a file")
    if a.plot or a.html:
        check_plots()
    written = [f for f in (None if a.json == "-" else a.json, a.rows, a.plot, a.html) if f]
    outputs.check_outputs(written, inputs, a.force)
    if a.resume:
        outputs.check_outputs([*written, a.resume], inputs, True)


def _write(a: argparse.Namespace, report: dict[str, Any], tally: Tally) -> None:
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    try:
        _write_files(a, report, tally, text)
    finally:  # one is not lost if the other cannot be written
        if a.json == "-":
            outputs.say(text)
        else:
            outputs.say(as_text(report))
            if a.llama:
                columns = {name: tally.column(f"llama {name}") for name in llama.COLUMNS}
                outputs.say("\n" + llama.tool_report(columns) + "\n")


def _write_files(a: argparse.Namespace, report: dict[str, Any], tally: Tally, text: str) -> None:
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
            f"klcore compare: {report['notes'][0]}; --skip-nan accepts this",
            file=sys.stderr,
        )
        return 2
    kl = report["kl"]
    exceeded = False
    for option, limit, value, what in (
        ("--max-mean", a.max_mean, kl["mean"], "the mean KL"),
        ("--max-q99", a.max_q99, kl["quantiles"]["0.99"], "the 99 % quantile of the KL"),
    ):
        if limit is None:
            continue
        if report["rows_infinite"]:
            print(f"klcore compare: {option} {limit:g} is exceeded by rows with an infinite KL", file=sys.stderr)
            exceeded = True
        elif value is None or not value <= limit:
            print(f"klcore compare: {what} is {figure(value)}, above {option} {limit:g}", file=sys.stderr)
            exceeded = True
    return int(exceeded)
