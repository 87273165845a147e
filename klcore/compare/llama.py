"""llama.cpp's files of log-probabilities (`llama-perplexity --kl-divergence-base`): how to read them, and its report.

Layout, little-endian, without padding, version or checksum:

    char    magic[8]                "_logits_"
    int32   n_ctx, n_vocab, n_chunk
    int32   tokens[n_chunk][n_ctx]
    uint16  rows[n_chunk][n_ctx - 1 - n_ctx//2][2*((n_vocab + 1)//2) + 4]

Row j of a chunk holds the log-probabilities after token n_ctx//2 + j, so its target is the next token. A row is

    float32 scale, float32 least    (the first four uint16)
    uint16  code[n_vocab]           and an unused one if n_vocab is odd

and log p = scale*code + least. Code 0 means "at the floor or below it": 16 nats below the largest of the row in
llama.cpp, and 24 in ik_llama.cpp, with the same magic. The magic "_logits2" of a fork has no floor: log p = scale*(code
- 1) + least, code 0 is probability 0, and the decoded numbers are normalised.

Source: tools/perplexity/perplexity.cpp of ggml-org/llama.cpp.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from klcore.compare.errors import InputError
from klcore.compare.files import Source, first_bytes, read_into

MAGIC, MAGIC2 = b"_logits_", b"_logits2"
FLOORS = (16, 24)  # nats below the largest of the row, in llama.cpp and in ik_llama.cpp
_HEAD = 20  # bytes
LEAST_ROWS = 2  # the standard errors need two; the tool itself prints nothing for fewer than 100


@dataclass(frozen=True)
class LlamaFile:
    """A file of llama.cpp.

    Attributes
    ----------
    source : Source
        Its rows, as float32 log-probabilities, decoded as the tool does.
    has_floor : bool
        Whether log-probabilities below the floor of a row read as the floor; `is_below` says which.
    tokens : array of shape (n_chunk, n_ctx)
    per_chunk : int
        The number of rows per chunk.
    """

    source: Source
    has_floor: bool
    tokens: Any
    per_chunk: int

    @property
    def targets(self) -> Any:
        """The target token of each row, of shape (rows,)."""
        return self.tokens[:, -self.per_chunk :].reshape(-1)[: self.source.rows]


def is_llama(text: str) -> bool:
    path = Path(text)
    return os.path.isfile(path) and first_bytes(path, 8) in (MAGIC, MAGIC2)


def open_llama(text: str) -> LlamaFile:
    path = Path(text)
    start, size = first_bytes(path, _HEAD), path.stat().st_size
    if len(start) < _HEAD:
        raise InputError(f"{path} ends in its header; the run that wrote it stopped before the first token")
    n_ctx, n_vocab, n_chunk = np.frombuffer(start, "<i4", 3, 8).tolist()
    if n_ctx < 4 or n_vocab < 1 or n_chunk < 1:
        raise InputError(f"{path} has an invalid header: n_ctx {n_ctx}, n_vocab {n_vocab}, n_chunk {n_chunk}")
    if size < _HEAD + 4 * n_chunk * n_ctx:
        raise InputError(f"{path} ends in its {n_chunk:,} x {n_ctx:,} tokens, before its first row")
    tokens = np.empty((n_chunk, n_ctx), "<i4")
    read_into(path, _HEAD, tokens)
    per_chunk = n_ctx - 1 - n_ctx // 2
    length = 2 * ((n_vocab + 1) // 2) + 4
    offset = _HEAD + tokens.nbytes
    promised = n_chunk * per_chunk
    rows = min(promised, (size - offset) // (2 * length))
    without_floor = start.startswith(MAGIC2)
    decode = _decode2 if without_floor else _decode

    def read(start: int, stop: int) -> Any:
        stored = np.empty((stop - start, length), "<u2")
        read_into(path, offset + 2 * length * start, stored)
        with np.errstate(over="ignore", invalid="ignore"):  # corrupt rows become NaN
            return decode(*_parts(stored, n_vocab))

    source = Source(str(path), rows, n_vocab, promised, "float32", read, (path,))
    return LlamaFile(source, not without_floor, tokens, per_chunk)


def _parts(stored: Any, n_vocab: int) -> tuple[Any, Any, Any]:
    """Scale, least, codes."""
    head = np.ascontiguousarray(stored[:, :4]).view("<f4")
    return head[:, :1], head[:, 1:2], stored[:, 4 : 4 + n_vocab]


def _decode(scale: Any, least: Any, code: Any) -> Any:
    return scale * code.astype(np.float32) + least


def _decode2(scale: Any, least: Any, code: Any) -> Any:
    found = np.where(code > 0, scale * (code.astype(np.float32) - 1) + least, -np.inf).astype(np.float32)
    top = found.max(1, keepdims=True)
    return found - (top + np.log(np.exp(found - top).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32))


def is_below(log_probs: Any) -> Any:
    """Where a decoded row is at its floor, so that its log-probabilities may be lower.

    A row that spans less than the floor is stored exactly, including its smallest entry.
    """
    least, top = log_probs.min(1, keepdims=True), log_probs.max(1, keepdims=True)
    span = top - least
    cut = np.logical_or.reduce([np.abs(span - floor) < 1e-4 * floor for floor in FLOORS])
    return (log_probs == least) & cut


# ---- the statistics of the tool itself -------------------------------------------------------------------------------

COLUMNS = ("kld", "p_diff", "nll", "nll_base", "same_top")  # the figures of a row


def tool_figures(log_base: Any, logits: Any, targets: Any) -> dict[str, Any]:
    """The figures that the tool computes for each row, in its arithmetic: float32, with sums in double.

    Parameters
    ----------
    log_base : array of shape (rows, vocab)
        As the tool decodes it, with its floor.
    logits : array of shape (rows, vocab), float32
        The logits of the other model.
    targets : array of shape (rows,)
    """
    row = np.arange(len(logits))
    top = logits.max(1)
    log_total = np.log(np.exp(logits - top[:, None]).sum(1, dtype=np.float64)).astype(np.float32)
    shift = (top + log_total)[:, None]
    nll, nll_base = shift[:, 0] - logits[row, targets], -log_base[row, targets]
    terms = np.exp(log_base) * (log_base - logits + shift)
    return {
        "kld": np.where(log_base > -16, terms, 0).sum(1, dtype=np.float64).astype(np.float32),
        "p_diff": np.exp(-nll) - np.exp(-nll_base),
        "nll": nll,
        "nll_base": nll_base,
        "same_top": (logits.argmax(1) == log_base.argmax(1)).astype(np.float32),
    }


def tool_report(columns: dict[str, Any]) -> str:
    """The report that the tool prints at the end, given the columns of all rows."""
    n = len(columns["kld"])
    if n < LEAST_ROWS:
        raise InputError(f"--llama needs {LEAST_ROWS} rows for the standard errors; found {n}")
    nll, nll_base = (columns[k].astype(np.float64) for k in ("nll", "nll_base"))
    (q, dq), (b, db) = _mean(nll), _mean(nll_base)
    cov = (float((nll * nll_base).sum()) / n - q * b) / (n - 1)
    ratio, dratio = q - b, math.sqrt(max(dq * dq + db * db - 2 * cov, 0))
    ppl, base = _exp(q), _exp(b)
    dppl, dbase = ppl * dq, base * db
    dgap = math.sqrt(max(dppl * dppl + dbase * dbase - 2 * ppl * base * cov, 0))
    kld, p = np.sort(columns["kld"]), np.sort(columns["p_diff"])
    square, dsquare = _mean(columns["p_diff"] ** 2)
    rms = math.sqrt(square)
    same = float(columns["same_top"].mean(dtype=np.float64))
    return "\n".join(
        [
            "====== Perplexity statistics ======",
            f"Mean PPL(Q)                   : {ppl:10.6f} ± {dppl:10.6f}",
            f"Mean PPL(base)                : {base:10.6f} ± {dbase:10.6f}",
            f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * cov / (dq * db) if dq * db else math.nan:6.2f}%",
            f"Mean ln(PPL(Q)/PPL(base))     : {ratio:10.6f} ± {dratio:10.6f}",
            f"Mean PPL(Q)/PPL(base)         : {_exp(ratio):10.6f} ± {_exp(ratio) * dratio:10.6f}",
            f"Mean PPL(Q)-PPL(base)         : {ppl - base:10.6f} ± {dgap:10.6f}",
            "",
            "====== KL divergence statistics ======",
            "Mean    KLD: {:10.6f} ± {:10.6f}".format(*_mean(columns["kld"])),
            f"Maximum KLD: {kld[-1]:10.6f}",
            *(f"{f:4.1%}   KLD: {_percentile(kld, f):10.6f}" for f in (0.999, 0.99, 0.95, 0.9)),
            f"Median  KLD: {_median(kld):10.6f}",
            *(f"{f:5.1%}   KLD: {_percentile(kld, f):10.6f}" for f in (0.1, 0.05, 0.01, 0.001)),
            f"Minimum KLD: {kld[0]:10.6f}",
            "",
            "====== Token probability statistics ======",
            "Mean    Δp: {:6.3f} ± {:5.3f} %".format(*(100 * v for v in _mean(columns["p_diff"]))),
            f"Maximum Δp: {100 * p[-1]:6.3f}%",
            *(f"{f:4.1%}   Δp: {100 * _percentile(p, f):6.3f}%" for f in (0.999, 0.99, 0.95, 0.9, 0.75)),
            f"Median  Δp: {100 * _median(p):6.3f}%",
            *(f"{f:5.1%}   Δp: {100 * _percentile(p, f):6.3f}%" for f in (0.25, 0.1, 0.05, 0.01, 0.001)),
            f"Minimum Δp: {100 * p[0]:6.3f}%",
            f"RMS Δp    : {100 * rms:6.3f} ± {100 * 0.5 / rms * dsquare if rms else 0.0:5.3f} %",
            f"Same top p: {100 * same:6.3f} ± {100 * math.sqrt(same * (1 - same) / (n - 1)):5.3f} %",
        ]
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _mean(values: Any) -> tuple[float, float]:
    """The mean, and its standard error as the tool computes it, for independent rows."""
    n, v = len(values), values.astype(np.float64)
    mean = v.sum() / n
    spread = (v**2).sum() / n - mean * mean
    return float(mean), math.sqrt(spread / (n - 1)) if spread > 0 else 0.0


def _percentile(ordered: Any, fraction: float) -> Any:
    """A quantile, in float32 as in the tool."""
    at = np.float32(fraction) * np.float32(len(ordered) - 1)
    low = int(at)
    part = np.float32(at - low)
    return (1 - part) * ordered[low] + part * ordered[min(low + 1, len(ordered) - 1)]


def _median(ordered: Any) -> Any:
    n = len(ordered)
    return ordered[n // 2] if n % 2 else np.float32(0.5) * (ordered[n // 2] + ordered[n // 2 - 1])
