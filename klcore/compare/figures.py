"""The figures of each row: divergences, agreement and confidence of two models, and the losses of the target token.

All divergences are klcore's public functions, applied to rows that are still in the cache.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from klcore.backends.threads import threads
from klcore.compare.llama import is_below
from klcore.divergence import cross_entropy, entropy, kl_div
from klcore.family import js_div, tv_dist

# name -> label, in the order of reports
DIVERGENCES = {
    "kl": "KL(base || quant)",
    "reverse_kl": "KL(quant || base)",
    "js": "Jensen-Shannon",
    "tv": "total variation",
}
QUICK = ("kl",)  # the only divergence with --quick


@dataclass(frozen=True)
class Measure:
    """How figures are computed from rows.

    Attributes
    ----------
    spaces : tuple of str
        The spaces of base and quant.
    temperature : float
        Divides logits.
    floored : bool
        The base is a file of llama.cpp with a floor. Divergences are over the classes above it, in both models, because
        the others are unknown. They are then lower bounds.
    quick : bool
        Compute only KL, agreement and confidence.
    """

    spaces: tuple[str, str] = ("logits", "logits")
    temperature: float = 1.0
    floored: bool = False
    quick: bool = False
    _own: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    def __call__(self, base: Any, quant: Any, targets: Any = None) -> dict[str, Any]:
        """The figures of some rows, computed in one thread.

        Parameters
        ----------
        base, quant : array of shape (rows, vocab)
        targets : array of int of shape (rows,), optional
            The token that follows each row; negative if there is none.

        Returns
        -------
        dict of str to array of shape (rows,)
            Divergences and entropies in nats. `same_top`: 1 if both have the same top token (the first one, if several
            are equally likely). `base_confidence`: the probability of base's top token; `quant_confidence`: the
            probability of that token in quant. With targets, `base_nll` and `quant_nll`, NaN where there is no target.
        """
        x, y = (a.astype(np.float32) if a.dtype.itemsize == 2 else a for a in (base, quant))
        with threads(1):
            of_x, of_y = (_Row(self, a, space) for a, space in zip((x, y), self.spaces, strict=True))
            options: dict[str, Any] = {"space": self.spaces}
            if self.floored:
                x, y, options = _above_floor(x, of_y, options)
            if "logits" in options["space"]:
                options["temperature"] = self.temperature
            turned = options | {"space": options["space"][::-1]}
            found = {"kl": kl_div(x, y, **options)}
            if not self.quick:
                found |= {
                    "reverse_kl": kl_div(y, x, **turned),
                    "js": js_div(x, y, **options),
                    "tv": tv_dist(x, y, **options),
                    "base_entropy": of_x.entropy(),
                    "quant_entropy": of_y.entropy(),
                }
            found["same_top"] = (of_x.top == of_y.top).astype(np.float32)
            with np.errstate(over="ignore"):  # overflows if --space calls logits log-probabilities
                found["base_confidence"] = np.exp(of_x.log_top)
                found["quant_confidence"] = np.exp(of_y.log_at(of_x.top))
            if targets is not None:
                known = targets >= 0
                for name, row in (("base_nll", of_x), ("quant_nll", of_y)):
                    # rounding can make a probability of 1 slightly larger
                    nll = np.maximum(-row.log_at(np.where(known, targets, 0)), 0)
                    found[name] = np.where(known, nll, np.nan)
        return found

    def certain(self, shape: tuple[int, ...]) -> Any:
        """This thread's array of zeros, which must be all zeros again after use. A new one per chunk would be slow."""
        last = getattr(self._own, "certain", None)
        if last is None or last.shape != shape:
            self._own.certain = last = np.zeros(shape, np.float32)
        return last


class _Row:
    """Rows of one model: their top tokens, and log-probabilities of tokens."""

    def __init__(self, measure: Measure, a: Any, space: str) -> None:
        self.a = a
        self.space: Any = space
        self._options: dict[str, Any] = {"temperature": measure.temperature} if space == "logits" else {}
        self._temperature = measure.temperature if space == "logits" else 1.0
        self._index = np.arange(len(a))
        self.top = a.argmax(1)
        if space == "logits":  # the negative cross-entropy with a one-hot distribution
            certain = measure.certain(a.shape)
            certain[self._index, self.top] = 1
            self.log_top = -cross_entropy(certain, a, space=("probs", "logits"), **self._options).astype(np.float64)
            certain[self._index, self.top] = 0
        else:
            self.log_top = self.log_at(self.top)

    def log_at(self, tokens: Any) -> Any:
        """The log-probability of one token per row, float64."""
        at = self.a[self._index, tokens].astype(np.float64)
        if self.space == "logits":
            with np.errstate(invalid="ignore"):  # rows that are all -inf are NaN in all figures
                return self.log_top - (self.a[self._index, self.top] - at) / self._temperature
        if self.space == "log_probs":
            return at
        with np.errstate(divide="ignore", invalid="ignore"):  # log of 0, and of negative numbers, which is NaN
            return np.log(at)

    def entropy(self) -> Any:
        # rounding can make a probability of 1 slightly larger
        return np.maximum(entropy(self.a, space=self.space, **self._options), 0)

    def log_probs(self) -> Any:
        """All log-probabilities, in a new array."""
        if self.space == "log_probs":
            return self.a.copy()
        if self.space == "probs":
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(self.a)
        top = self.a[self._index, self.top].astype(np.float64)
        return self.a / self._temperature + (self.log_top - top / self._temperature)[:, None].astype(self.a.dtype)


def _above_floor(x: Any, of_y: _Row, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Both as log-probabilities, -inf where x is at its floor, so that these classes contribute nothing."""
    below = is_below(x)
    x, y = x.copy(), of_y.log_probs()
    x[below] = y[below] = -np.inf
    return x, y, options | {"space": ("log_probs", "log_probs")}
