"""The report as one self-contained HTML page: statistics, pictures, the worst rows, and the command that made it."""

import base64
from html import escape
from typing import Any

from klcore.compare.report import LABELS, figure, percent, share

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line: #d8dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #30363d; --card: #151b23; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.45rem; font-weight: 600; line-height: 1.3; }
.card span { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; } img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: .5rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
@media (max-width: 40rem) { .for-wide { display: none; } }
@media (min-width: 40.01rem) { .for-narrow { display: none; } }
"""


def as_page(report: dict[str, Any], pictures: dict[tuple[str, bool], bytes]) -> str:
    """The page; `pictures` are SVG, by (theme, whether they are narrow)."""
    r = report
    rows = f"{r['rows_counted'] + r['rows_infinite']:,} rows of {r['vocab']:,} classes"
    texts = f" in {r['texts']:,} texts" if r["texts"] else ""
    notes = "".join(f"<li>{escape(note)}.</li>" for note in r["notes"])
    parts = [
        f"<h1>{escape(_last(r['quant']))} compared with {escape(_last(r['base']))}</h1>",
        f"<p class='soft'>{rows}{texts}; divergences in nats</p>",
        _cards(r),
        f"<ul>{notes}</ul>",
        *(_picture(pictures, narrow) for narrow in (False, True)),
        "<h2>Divergences</h2>",
        _divergences(r),
        "<h2>By the confidence of base</h2>",
        _confidence(r),
        *(("<h2>Target tokens</h2>", _tokens(r["tokens"])) if "tokens" in r else ()),
        *(("<h2>Rows with the largest KL</h2>", _worst(r["worst"])) if r["worst"] else ()),
        "<h2>Command</h2>",
        f"<pre>{escape(r['command'])}</pre>",
        f"<p class='soft'>base: {escape(r['base'])}<br>quant: {escape(r['quant'])}<br>klcore {escape(r['klcore'])}</p>",
    ]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(_last(r['quant']))}: klcore compare</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _picture(pictures: dict[tuple[str, bool], bytes], narrow: bool) -> str:
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(pictures[theme, narrow]).decode()}" for theme in ("light", "dark")
    )
    alt = "Histogram of the KL of the rows, mean KL by position, and agreement by the confidence of base"
    return (
        f"<picture class='{'for-narrow' if narrow else 'for-wide'}'>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{dark}'><img src='{light}' alt=\"{alt}\"></picture>"
    )


def _cards(r: dict[str, Any]) -> str:
    kl = r["kl"]
    cards = [
        (figure(kl["mean"]), f"mean KL ± {figure(kl['stderr'])}"),
        (figure(kl["quantiles"]["0.99"]), "99 % quantile of KL"),
        (share(r["same_top"]["mean"]), "same most likely token"),
    ]
    if "acceptance" in r:
        cards.append((share(r["acceptance"]["mean"]), "draft acceptance, 1 - TV"))
    if "tokens" in r:
        ratio = r["tokens"]["ratio"]
        cards.append((figure(ratio["mean"]), f"ratio of perplexities ± {figure(ratio['stderr'])}"))
    body = "".join(f"<div class='card'><b>{value}</b><span>{escape(label)}</span></div>" for value, label in cards)
    return f"<div class='cards'>{body}</div>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _divergences(r: dict[str, Any]) -> str:
    shown = ("0.01", "0.1", "0.5", "0.9", "0.99", "0.999")
    head = ["", "mean", "± error", *(percent(float(q)) for q in shown), "largest", "at row"]
    rows = [
        [label, figure(s["mean"]), figure(s["stderr"]), *(figure(s["quantiles"][q]) for q in shown), figure(s["max"]),
         "-" if s["row_of_max"] is None else str(s["row_of_max"])]
        for name, label in LABELS.items() if (s := r.get(name))
    ]  # fmt: skip
    return _table(head, rows)


def _confidence(r: dict[str, Any]) -> str:
    head = ["probability of its top token", "rows", "mean KL", "± error", "same token", "p by base", "p by quant"]
    rows = [
        [f"{b['from']:.2f} to {b['to']:.2f}", f"{b['rows']:,}", figure(b["kl"]["mean"]), figure(b["kl"]["stderr"]),
         *(share(b[k]["mean"]) for k in ("same_top", "base_confidence", "quant_confidence"))]
        for b in r["confidence"]
    ]  # fmt: skip
    return _table(head, rows)


def _tokens(t: dict[str, Any]) -> str:
    d = t["delta_p"]
    rows = [
        [label, figure(t[name]["mean"]), figure(t[name]["stderr"])]
        for label, name in (
            ("perplexity of base", "base_perplexity"), ("perplexity of quant", "quant_perplexity"),
            ("their ratio, paired", "ratio"), ("ln of the ratio", "log_ratio"),
        )
    ]  # fmt: skip
    rows.append(["change of probability", share(d["mean"], digits=3), share(d["stderr"], digits=3)])
    rows.append(["its root mean square", share(d["rms"], digits=3), ""])
    return _table(["", "mean", "± error"], rows)


def _worst(worst: list[dict[str, Any]]) -> str:
    places = [p for p in ("text", "position") if p in worst[0]]
    rows = [[str(w["row"]), "inf" if w["kl"] is None else figure(w["kl"]), *(str(w[p]) for p in places)] for w in worst]
    return _table(["row", "KL", *places], rows)
