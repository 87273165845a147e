"""The table of operations, and the call of one: what the public functions hand to a backend.

Whatever goes over all operations, in backends, tests, self-test, benchmarks and pages, reads OPERATIONS (the public
functions), LOSSES (the terms of other systems, for klcore.compat) and ESTIMATORS (of the divergence, from a token each,
for klcore.kl_estimate). What kernels are told of an operation stands in src/kl_math.h.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from klcore import _cpu

SPACES = tuple(_cpu.SPACES)
PAIRS = tuple((x, y) for x in SPACES for y in SPACES)


@dataclass(frozen=True, eq=False)
class Operation:
    """One row of the table. There is one object of it: so it is compared and hashed, and unpickled."""

    name: str
    code: int  # how kernels know it
    form: int  # kl::Form: how rows of logits are computed
    single: bool  # it has one argument, x
    is_loss: bool
    pairs: tuple[tuple[str, str], ...]  # the spaces of x and y that it is for
    gradients: tuple[str, ...]  # with respect to what
    parameters: tuple[str, ...] = ()  # keywords that are its own
    needed: dict[str, float] = field(default_factory=dict)  # the keywords without a default, with a value to try
    has_terms: bool = True  # a row's value is their sum
    is_estimator: bool = False  # each number is a row of its own, of one class: there is no class axis
    takes_indices: bool = False  # x may list some classes of y

    @property
    def function(self) -> str:
        """Whose operation it is, for messages."""
        return "kl_estimate" if self.is_estimator else self.name

    def __reduce__(self) -> Any:
        return named, (self.name,)


def named(name: str) -> Operation:
    """The row of that name, of whichever table."""
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
    """The arguments of a call, as they were given: what they mean, ``klcore.kl_div`` says, and for losses
    ``klcore.divergence.loss``."""

    operation: Operation
    x: Any
    y: Any  # None for an operation of one argument
    space: Any
    axis: Any
    reduction: Any
    weights: Any = None  # of a loss: its factors, any numbers, one a term
    temperature: Any = 1.0
    return_grad: Any = None
    out: Any = None
    device: Any = None
    denominator: Any = None  # divides a sum, and its gradients; of a loss, whatever is returned
    parameter: Any = 0.0  # of the operations that take one: js_div's beta, say, or the epsilon of a loss
    factor: Any = 1.0  # multiplies the value, and the gradients with it
    dtype: Any = None  # a loss's: its name
    cotangent: Any = None  # not None: the gradients alone, of sum(cotangent * value), and `out` is for these
    ratio: Any = None  # an estimator's: multiplies the terms as their weights do, but no mean is divided by it
    examples: int = 0  # an adapter's: how many of the first axes count examples, each with a total of its own
    indices: Any = None  # the classes of y that x lists
    tail: Any = None  # what x has beside them
    tail_mass: Any = None  # and how much that is
