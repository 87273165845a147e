"""What `klcore compare` keeps of the rows so far: summaries, the worst rows, and columns that outputs need."""

import heapq
import math
from typing import Any

import numpy as np

from klcore.compare.figures import DIVERGENCES, QUICK
from klcore.summary import Summary

# The edges of the buckets of base's probability of its top token, as in EXL3's tools; the last bucket includes 1.
CONFIDENCE = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
PLACES = 64  # parts of a text, or of the file, for the divergence by position

_SIGNED = ("log_ratio", "delta_p")
_BUCKETED = ("kl", "same_top", "base_confidence", "quant_confidence")
_MEANS = ("same_top", "base_confidence", "quant_confidence")  # no quantiles are needed


class Tally:
    """The statistics of all rows so far, which do not depend on how the rows were split into chunks.

    Parameters
    ----------
    quick, tokens : bool
        Which figures are computed.
    columns : tuple of str
        Figures whose values are kept for every row, as float32.
    worst : int
        The number of rows with the largest KL to keep.
    """

    def __init__(self, quick: bool, tokens: bool, columns: tuple[str, ...] = (), worst: int = 10) -> None:
        names = [n for n in DIVERGENCES if not quick or n in QUICK]
        names += [] if quick else ["base_entropy", "quant_entropy"]
        names += ["same_top", *(("base_nll", "quant_nll", *_SIGNED) if tokens else ())]
        self.done = 0  # rows, including those that a mask left out
        self.first_nan: int | None = None
        self.summaries = {n: Summary(quantiles=n not in _MEANS, signed=n in _SIGNED) for n in names}
        self.buckets = [{n: Summary(quantiles=False) for n in _BUCKETED} for _ in CONFIDENCE[1:]]
        self.places = [Summary(quantiles=False) for _ in range(PLACES)]
        self.worst: list[tuple[float, int]] = []  # a heap: KL, -row
        self.columns: dict[str, list[Any]] = {n: [] for n in columns}
        self._worst = worst

    @np.errstate(over="ignore")  # a float64 beyond float32 becomes infinite, in columns as in summaries
    def add(self, figures: dict[str, Any], mask: Any, groups: Any, places: Any) -> None:
        """Add the next rows.

        Parameters
        ----------
        figures : dict of str to array of shape (rows,)
        mask : array of bool of shape (rows,), or None
        groups : array of int of shape (rows,), or None
        places : array of int of shape (rows,)
            The place of each row, below `PLACES`.
        """
        kl, at = figures["kl"], self.done
        counts = np.ones(len(kl), bool) if mask is None else mask
        undefined = np.isnan(kl) & counts
        if undefined.any() and self.first_nan is None:
            self.first_nan = at + int(undefined.argmax())
        defined = counts & ~undefined  # rows whose divergence is NaN enter no other statistic
        self.summaries["kl"].update(kl, counts, groups, start=at)
        derived = _with_derived(figures)
        for name, summary in self.summaries.items():
            if name == "kl":
                continue
            known = defined & ~np.isnan(derived[name]) if name.endswith(("_nll", *_SIGNED)) else defined
            summary.update(derived[name], known, groups, start=at)
        bucket = np.searchsorted(CONFIDENCE[1:-1], figures["base_confidence"], side="right")
        for k in np.unique(bucket[defined]).tolist():
            for name, summary in self.buckets[k].items():
                summary.update(figures[name], defined & (bucket == k), groups, start=at)
        for k in np.unique(places[defined]).tolist():
            self.places[k].update(kl, defined & (places == k), groups, start=at)
        self._keep_worst(kl, np.flatnonzero(defined), at)
        for name, kept in self.columns.items():
            kept.append(np.where(counts, figures[name], np.nan).astype(np.float32))
        self.done += len(kl)

    def _keep_worst(self, kl: Any, rows: Any, at: int) -> None:
        if not self._worst or not rows.size:
            return
        largest = rows[np.argsort(-kl[rows], kind="stable")[: self._worst]]
        found = [(float(np.float32(kl[r])), -(at + int(r))) for r in largest]
        self.worst = heapq.nlargest(self._worst, [*self.worst, *found])

    def column(self, name: str) -> Any:
        return np.concatenate([np.empty(0, np.float32), *self.columns[name]])

    # ---- for --resume --------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "first_nan": self.first_nan,
            "summaries": {n: s.to_dict() for n, s in self.summaries.items()},
            "buckets": [{n: s.to_dict() for n, s in bucket.items()} for bucket in self.buckets],
            "places": [s.to_dict() for s in self.places],
            "worst": [[str(kl) if math.isinf(kl) else kl, row] for kl, row in self.worst],
        }

    def load(self, state: dict[str, Any], columns: dict[str, Any]) -> None:
        """Restore what `to_dict` returned, for a tally with the same arguments, and its columns."""
        self.done, self.first_nan = state["done"], state["first_nan"]
        self.summaries = {n: Summary.from_dict(state["summaries"][n]) for n in self.summaries}
        self.buckets = [{n: Summary.from_dict(s) for n, s in bucket.items()} for bucket in state["buckets"]]
        self.places = [Summary.from_dict(s) for s in state["places"]]
        self.worst = [(float(kl), int(row)) for kl, row in state["worst"]]
        self.columns = {n: [columns[n]] for n in self.columns}


def _with_derived(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, and those that follow from the losses of the target tokens."""
    if "base_nll" not in figures:
        return figures
    base, quant = figures["base_nll"], figures["quant_nll"]
    with np.errstate(invalid="ignore"):  # if both are infinite
        log_ratio = quant - base
    return figures | {"log_ratio": log_ratio, "delta_p": np.exp(-quant) - np.exp(-base)}
