"""The table of operations, and `Call`, which the public functions hand to a backend.

Code that loops over all operations (backends, tests, self-test, benchmarks, pages) reads OPERATIONS (the public
functions), LOSSES (the terms of other systems, for klcore.compat) and ESTIMATORS (the divergence from one sampled token
each, for klcore.kl_estimate). What the kernels know about each operation is in src/kl_math.h.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from klcore import _cpu

SPACES = tuple(_cpu.SPACES)
PAIRS = tuple((x, y) for x in SPACES for y in SPACES)


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation of the table. There is one object per operation, so comparing and hashing go by identity."""

    name: str
    code: int  # its number in the kernels
    form: int  # kl::Form: how rows of logits are computed
    single: bool  # whether x is its only argument
    is_loss: bool
    pairs: tuple[tuple[str, str], ...]  # the spaces of (x, y) that it accepts
    gradients: tuple[str, ...]  # the arguments that it has gradients for
    parameters: tuple[str, ...] = ()  # keywords of this operation only
    needed: dict[str, float] = field(default_factory=dict)  # its keywords without a default, with a valid value
    has_terms: bool = True  # whether the value of a row is a sum of terms
    is_estimator: bool = False  # whether every number is a row of one class, so that there is no class axis
    takes_indices: bool = False  # whether x may list only some classes of y

    @property
    def function(self) -> str:
        """The name of its public function, for messages."""
        return "kl_estimate" if self.is_estimator else self.name

    def __reduce__(self) -> Any:
        return named, (self.name,)


def named(name: str) -> Operation:
    """The operation of this name, from any of the tables."""
    return OPERATIONS.get(name) or LOSSES.get(name) or ESTIMATORS[name]


def _divergence(name: str, *parameters: str, takes_indices: bool = False) -> Operation:
    code, form, arguments = _cpu.OPERATIONS[name]
    if arguments == 1:
        return Operation(name, code, form, True, False, tuple((s, s) for s in SPACES), ("x",))
    return Operation(name, code, form, False, False, PAIRS, ("x", "y"), parameters, takes_indices=takes_indices)


def _loss(name: str, *pairs: tuple[str, str], gradients: tuple[str, ...] = ("x", "y")) -> Operation:
    code, form, _ = _cpu.OPERATIONS[name]
    return Operation(name, code, form, False, True, pairs, gradients)


def _estimator(name: str) -> Operation:
    code, form, _ = _cpu.OPERATIONS[name]
    pairs = (("log_probs", "log_probs"),)
    return Operation(name, code, form, False, False, pairs, ("x", "y"), ("ratio", "limit"), is_estimator=True)


KL_DIV = _divergence("kl_div", takes_indices=True)
REL_ENTR = _divergence("rel_entr", takes_indices=True)
CROSS_ENTROPY = _divergence("cross_entropy")
ENTROPY = _divergence("entropy")

JS_DIV = _divergence("js_div", "beta", "scaled", takes_indices=True)
MIXED_KL_DIV = _divergence("mixed_kl_div", "forward", takes_indices=True)
SKEW_KL_DIV = _divergence("skew_kl_div", "alpha")
ALPHA_DIV = _divergence("alpha_div", "alpha")
RENYI_DIV = replace(_divergence("renyi_div", "alpha"), needed={"alpha": 0.5}, has_terms=False)
TV_DIST = _divergence("tv_dist", takes_indices=True)
SQ_HELLINGER = _divergence("sq_hellinger")
CHI2_DIV = _divergence("chi2_div")

FAMILY = (JS_DIV, MIXED_KL_DIV, SKEW_KL_DIV, ALPHA_DIV, RENYI_DIV, TV_DIST, SQ_HELLINGER, CHI2_DIV)
OPERATIONS = {o.name: o for o in (KL_DIV, REL_ENTR, CROSS_ENTROPY, ENTROPY, *FAMILY)}
LOSSES = {
    o.name: o
    for o in (
        _loss("pytorch", ("probs", "log_probs"), ("log_probs", "log_probs")),
        _loss("keras", ("probs", "probs")),
        _loss("mxnet", ("probs", "log_probs"), ("probs", "logits")),
        _loss("puzzlelib", ("probs", "logits"), ("logits", "logits"), gradients=("y",)),
    )
}
ESTIMATORS = {name: _estimator(name) for name in ("k1", "k2", "k3")}


class Call(NamedTuple):
    """The arguments of a call, as the user gave them.

    :func:`klcore.kl_div` explains what they mean, and ``klcore.divergence.loss`` does for the losses of klcore.compat.
    """

    operation: Operation
    x: Any
    y: Any  # None for an operation of one argument
    space: Any
    axis: Any
    reduction: Any
    weights: Any = None  # for a loss: its factors, any numbers, one per term
    temperature: Any = 1.0
    return_grad: Any = None
    out: Any = None
    device: Any = None
    denominator: Any = None  # divides a sum and its gradients; for a loss, whatever is returned
    parameter: Any = 0.0  # for operations that have one, such as beta of js_div, or the epsilon of a loss
    factor: Any = 1.0  # multiplies the value and the gradients
    dtype: Any = None  # for a loss: the name of the dtype of its value
    cotangent: Any = None  # if given: return only the gradients, of sum(cotangent * value); `out` is for them
    ratio: Any = None  # for an estimator: multiplies the terms like weights, but no mean divides by it
    examples: int = 0  # set by adapters: how many leading axes are examples, each with a total of its own
    indices: Any = None  # the classes of y that x lists
    tail: Any = None  # what x has in the other classes
    tail_mass: Any = None  # how much that is
