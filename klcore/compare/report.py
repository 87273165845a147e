"""The report as numbers, for JSON and for other views; and as text of 80 columns."""

import math
import textwrap
from collections.abc import Iterator
from typing import Any

from klcore.compare.comparison import Comparison
from klcore.compare.figures import DIVERGENCES
from klcore.compare.tally import CONFIDENCE, Tally
from klcore.summary import Summary
from klcore.version import __version__

QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
WIDTH = 80
_LARGEST_EXPONENT = 709.0  # math.exp overflows above it
LABELS = DIVERGENCES | {"base_entropy": "entropy of base", "quant_entropy": "entropy of quant"}


def percent(fraction: float) -> str:
    """A fraction as text, such as "99.9 %"."""
    return f"{100 * fraction:g} %"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def make_report(comparison: Comparison, tally: Tally, command: str) -> dict[str, Any]:
    """All statistics, as dicts, lists, strings and numbers; NaN and infinities are None."""
    c, s = comparison, tally.summaries
    kl = s["kl"]
    report: dict[str, Any] = {
        "klcore": __version__,
        "command": command,
        "base": c.base.name,
        "quant": c.quant.name,
        "rows": c.rows,
        "rows_done": tally.done,
        "rows_counted": kl.count,
        "rows_infinite": kl.n_inf,
        "rows_nan": kl.n_nan,
        "vocab": c.vocab,
        "texts": kl.n_groups or None,
        "along": "text" if c.per_group else "file",
        "space": list(c.measure.spaces),
        "temperature": c.measure.temperature,
        "notes": list(_notes(c, tally)),
    }
    for name in LABELS:
        if name in s:
            report[name] = _statistics(s[name])
    report["same_top"] = _share(s["same_top"])
    if "tv" in s:  # speculative decoding accepts this share of the draft tokens
        tv = _share(s["tv"])
        low, high = tv["interval"]
        report["acceptance"] = tv | {"mean": _less(tv["mean"]), "interval": [_less(high), _less(low)]}
    report["confidence"] = [
        {"from": low, "to": high, "rows": b["same_top"].count} | {name: _mean(x) for name, x in b.items()}
        for low, high, b in zip(CONFIDENCE, CONFIDENCE[1:], tally.buckets, strict=False)
    ]
    if "base_nll" in s:
        report["tokens"] = _tokens(s)
    report["worst"] = [{"row": -row, "kl": _number(value)} | _place(c, -row) for value, row in tally.worst]
    return report


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _less(value: float | None) -> float | None:
    return None if value is None else 1 - value


def _mean(s: Summary) -> dict[str, Any]:
    return {
        "mean": _number(s.mean),
        "stderr": _number(s.stderr()),
        "stderr_iid": _number(s.stderr(cluster=False)),
        "interval": [_number(v) for v in s.interval()],
    }


def _share(s: Summary) -> dict[str, Any]:
    """As _mean, for values between 0 and 1; the interval, by Student's t, is clipped to that."""
    found = _mean(s)
    return found | {"interval": [v if v is None else min(max(v, 0.0), 1.0) for v in found["interval"]]}


def _statistics(s: Summary) -> dict[str, Any]:
    values = s.quantile(list(QUANTILES)).tolist()
    return _mean(s) | {
        "min": _number(s.min),
        "max": _number(s.max),
        "row_of_max": s.argmax,
        "quantiles": {f"{q:g}": _number(v) for q, v in zip(QUANTILES, values, strict=True)},
        "infinite": s.n_inf,
    }


def _tokens(s: dict[str, Summary]) -> dict[str, Any]:
    found: dict[str, Any] = {"count": s["log_ratio"].count, "infinite": s["quant_nll"].n_inf + s["base_nll"].n_inf}
    for name in ("base", "quant"):
        nll = s[f"{name}_nll"]
        found[f"{name}_perplexity"] = _exponential(nll)
    found["log_ratio"] = _mean(s["log_ratio"])
    found["ratio"] = _exponential(s["log_ratio"])
    found["delta_p"] = _statistics(s["delta_p"]) | {"rms": _number(s["delta_p"].rms)}
    return found


def _exponential(s: Summary) -> dict[str, Any]:
    """e to the power of the mean, with its standard error to first order."""
    if s.n_inf or not s.mean < _LARGEST_EXPONENT:
        return {"mean": None, "stderr": None}
    value = math.exp(s.mean)
    return {"mean": value, "stderr": _number(value * s.stderr())}


def _place(c: Comparison, row: int) -> dict[str, Any]:
    if c.per_group:
        return {"text": row // c.per_group, "position": row % c.per_group}
    return {} if c.groups is None else {"text": int(c.groups[row])}


def _notes(c: Comparison, tally: Tally) -> Iterator[str]:
    kl = tally.summaries["kl"]
    if tally.done < c.rows:
        yield f"stopped after {tally.done:,} of {c.rows:,} rows; the report covers these"
    if kl.n_nan:
        rows = "1 row is" if kl.n_nan == 1 else f"{kl.n_nan:,} rows are"
        yield f"{rows} NaN, starting with row {tally.first_nan}, and left out of the report"
    if kl.n_inf:
        rows = "1 row has" if kl.n_inf == 1 else f"{kl.n_inf:,} rows have"
        yield f"{rows} an infinite KL, because quant excludes a token that base does not; left out of the mean"
    losses = sum(tally.summaries[name].n_inf for name in ("base_nll", "quant_nll") if name in tally.summaries)
    if losses:
        infinite = "1 loss is" if losses == 1 else f"{losses:,} losses are"
        yield f"{infinite} infinite, because a model excludes the token; so is its perplexity; left out of the means"
    if "tv" in tally.summaries and tally.summaries["tv"].max > 1.001:
        yield "a total variation is above 1, so some rows do not sum to 1, as --space requires"
    if c.measure.floored:
        yield "base is stored with a floor: divergences are over the classes above it, and are lower bounds"
    if c.quant_floored:
        yield "quant is stored with a floor, too: classes below it read as the floor, which again gives lower bounds"
    if not kl.n_groups:
        yield "errors assume independent rows, but the rows of a text are not; pass --groups"


# ---- text ------------------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    """The report as text, of at most 80 columns unless a path is longer."""
    return "\n".join(line.rstrip() for line in _lines(report)) + "\n"


def figure(value: float | None, width: int = 0) -> str:
    """A number with four digits; "-" for None."""
    text = "-" if value is None else "0" if value == 0 else f"{value:.4g}"
    return f"{text:>{width}}"


def share(value: float | None, width: int = 0, digits: int = 2) -> str:
    """A fraction in percent; "-" for None."""
    if value is None:
        return f"{'-':>{width}}"
    return f"{f'{round(100 * value, digits) + 0.0:.{digits}f} %':>{width}}"  # -0 becomes 0


def _lines(r: dict[str, Any]) -> Iterator[str]:
    yield f"base   {r['base']}"
    yield f"quant  {r['quant']}"
    texts = f", {r['texts']:,} texts" if r["texts"] else ""
    yield f"rows   {r['rows_counted'] + r['rows_infinite']:,} of {r['vocab']:,} classes{texts}"
    yield ""
    yield f"{'nats':<20}{'mean':>11} ± {'error':<10}{'median':>11}{'99 %':>11}{'largest':>11}"
    yield "-" * WIDTH
    for name, label in LABELS.items():
        if name in r:
            s = r[name]
            mean, error = figure(s["mean"], 11), figure(s["stderr"])
            ends = (s["quantiles"]["0.5"], s["quantiles"]["0.99"], s["max"])
            yield f"{label:<20}{mean} ± {error:<10}" + "".join(figure(v, 11) for v in ends)
    yield ""
    yield from _shares(r)
    yield ""
    yield "quantiles of KL"
    quantiles = list(r["kl"]["quantiles"].items())
    for part in (quantiles[:6], quantiles[6:]):
        yield "".join(f"{percent(float(q)):>13}" for q, _ in part)
        yield "".join(figure(v, 13) for _, v in part)
    yield ""
    yield f"{'confidence of base':<20}{'rows':>11}{'mean KL':>14}{'same token':>14}{'p by base':>10}{'by quant':>11}"
    yield "-" * WIDTH
    for bucket in r["confidence"]:
        label = f"{bucket['from']:.2f} to {bucket['to']:.2f}"
        means = [bucket[k]["mean"] for k in ("kl", "same_top", "base_confidence", "quant_confidence")]
        yield (
            f"{label:<20}{bucket['rows']:>11,}{figure(means[0], 14)}{share(means[1], 14)}"
            f"{share(means[2], 10, 1)}{share(means[3], 11, 1)}"
        )
    if "tokens" in r:
        yield ""
        yield from _token_lines(r["tokens"])
    if r["worst"]:
        yield ""
        yield from _worst_lines(r["worst"])
    if r["notes"]:
        yield ""
        for note in r["notes"]:
            yield from textwrap.wrap(f"* {note}.", WIDTH, subsequent_indent="  ")


def _shares(r: dict[str, Any]) -> Iterator[str]:
    for label, name in (("same most likely token", "same_top"), ("draft acceptance, 1 - TV", "acceptance")):
        if name in r:
            s = r[name]
            low, high = s["interval"]
            error = f"{share(s['mean'], 10)} ± {share(s['stderr']):<9}"
            yield f"{label:<30}{error}{f'95 %: {share(low)} to {share(high)}':>28}"
    low, high = r["kl"]["interval"]
    yield f"{'mean KL, 95 % interval':<30}{figure(low, 10)} to {figure(high)}"
    if r["texts"]:
        yield f"{'its error if rows were independent':<40}{figure(r['kl']['stderr_iid'])}"


def _token_lines(t: dict[str, Any]) -> Iterator[str]:
    yield f"{'target tokens':<31}{'mean':>11} ± error"
    yield "-" * WIDTH
    rows = [("perplexity of base", "base_perplexity"), ("perplexity of quant", "quant_perplexity")]
    rows += [("their ratio, paired", "ratio"), ("ln of the ratio", "log_ratio")]
    for label, name in rows:
        yield f"{label:<31}{figure(t[name]['mean'], 11)} ± {figure(t[name]['stderr'])}"
    d = t["delta_p"]
    yield f"{'change of probability':<31}{share(d['mean'], 11, 3)} ± {share(d['stderr'], 0, 3)}"
    yield f"{'  its root mean square':<31}{share(d['rms'], 11, 3)}"
    ends = [d["quantiles"][q] for q in ("0.01", "0.05", "0.5", "0.95", "0.99")]
    yield f"{'  1, 5, 50, 95, 99 %':<31}" + "".join(share(v, 10, 2) for v in ends).removeprefix(" ")


def _worst_lines(worst: list[dict[str, Any]]) -> Iterator[str]:
    yield "largest KL"
    places = ["text", "position"] if "position" in worst[0] else ["text"] if "text" in worst[0] else []
    yield "".join(f"{head:>13}" for head in ("row", "KL", *places))
    for w in worst:
        value = "inf" if w["kl"] is None else figure(w["kl"])
        yield f"{w['row']:>13}{value:>13}" + "".join(f"{w[p]:>13}" for p in places)
