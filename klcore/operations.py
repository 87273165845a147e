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
    """An operation of the table.

    There is one object per operation, so comparing and hashing go by identity.

    Attributes
    ----------
    name : str
        The name of its public function, of its loss in klcore.compat, or of its estimator.
    code : int
        Its number in the kernels.
    form : int
        How rows of logits are computed: kl::Form in src/kl_math.h.
    single : bool
        Whether x is its only argument.
    is_loss : bool
        Whether it is a loss of klcore.compat.
    pairs : tuple of pairs of str
        The spaces of (x, y) that it accepts.
    gradients : tuple of str
        The arguments that it has gradients for.
    parameters : tuple of str
        The keywords that only this operation has.
    needed : dict of str to float
        Its keywords without a default, each with a valid value.
    has_terms : bool
        Whether the value of a row is a sum of terms.
    is_estimator : bool
        Whether it is an estimator of kl_estimate: every number is a row of one class, and there is no class axis.
    takes_indices : bool
        Whether x may list only some of the classes of y.
    """

    name: str
    code: int
    form: int
    single: bool
    is_loss: bool
    pairs: tuple[tuple[str, str], ...]
    gradients: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    needed: dict[str, float] = field(default_factory=dict)
    has_terms: bool = True
    is_estimator: bool = False
    takes_indices: bool = False

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

    :func:`klcore.kl_div` explains those that are not described here, and ``klcore.divergence.loss`` those of the losses
    of klcore.compat.

    Attributes
    ----------
    operation : Operation
        What to compute.
    x, y : array
        y is None for an operation with one argument.
    space, axis, reduction, temperature, return_grad, out, device, indices, tail, tail_mass
        As for :func:`klcore.kl_div`.
    weights : array or None
        For a loss, its factors: any numbers, one per term.
    denominator : float or array or None
        Divides a sum and its gradients; for a loss, whatever is returned.
    parameter : float
        The parameter of an operation that has one, such as beta of js_div, or the epsilon of a loss.
    factor : float
        Multiplies the value and the gradients.
    dtype : str or None
        For a loss, the dtype of its value.
    cotangent : array or None
        If given, only the gradients are returned, those of ``sum(cotangent * value)``, and `out` is for them.
    ratio : array or None
        For an estimator: multiplies the terms like weights, but no mean divides by it.
    examples : int
        Set by adapters: how many leading axes are examples, each with a total of its own.
    """

    operation: Operation
    x: Any
    y: Any
    space: Any
    axis: Any
    reduction: Any
    weights: Any = None
    temperature: Any = 1.0
    return_grad: Any = None
    out: Any = None
    device: Any = None
    denominator: Any = None
    parameter: Any = 0.0
    factor: Any = 1.0
    dtype: Any = None
    cotangent: Any = None
    ratio: Any = None
    examples: int = 0
    indices: Any = None
    tail: Any = None
    tail_mass: Any = None
