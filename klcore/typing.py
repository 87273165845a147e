"""The words that the public functions take, as types: for their annotations, and for those of your own wrappers.

>>> import klcore
>>> from klcore.typing import ArrayT, Reduction
>>> def loss(x: ArrayT, y: ArrayT, reduction: Reduction = "row") -> ArrayT:
...     return klcore.kl_div(x, y, reduction=reduction)

What type checkers are told comes back:

* Arrays of the type that went in: a `torch.Tensor` for two of them, and tuples of them with `return_grad`. So a typed
  function may return what klcore returns, under ``mypy --strict`` as well. A list or a number goes with the other's
  type. Of two types that are not related, as of two libraries, what they have in common, or either: a call raises.
* Of NumPy the totals ("sum", "rowmean", "batchmean", "mean") are `Any`, as NumPy's own sums are: they are scalars,
  float64 ones, which are Python's floats as well, or float32 ones, which are not. What is "row" or "none" is called an
  array, though that of one row is a scalar, too, which no type can tell: say ``float(...)`` if a float is to be had.
  An array's type is taken as it is given; that 16-bit numbers and integers make wider values is not in it.
* `Any` for lists and numbers alone.
* Of pandas, polars and xarray the results are NumPy arrays, whatever the checker says: pass ``.to_numpy()`` where types
  matter.

Numbers of NumPy's are taken as `temperature` and `axis`: what has ``__float__``, which strings have not, and what has
``__index__``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypeAlias, TypedDict, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "AlphaOptions",
    "Array",
    "ArrayT",
    "BetaOptions",
    "EntropyGrad",
    "EntropyOptions",
    "EstimateOptions",
    "EstimateReduction",
    "Estimator",
    "ForwardOptions",
    "Options",
    "Reduction",
    "RenyiOptions",
    "ReturnGrad",
    "Space",
    "Spaces",
]


class Array(Protocol):
    """An array of any library: what all of them have, and lists and numbers have not."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=Array)
Plain: TypeAlias = float | Sequence[Any]  # taken as float64
OfNumPy: TypeAlias = "NDArray[Any] | np.generic | Plain"
Temperature: TypeAlias = SupportsFloat | Array | list[float] | tuple[float, ...]

Space = Literal["probs", "log_probs", "logits", "counts"]
Spaces = Space | tuple[Space, Space]
Total = Literal["sum", "rowmean", "batchmean", "mean"]
Reduction = Literal["row", "sum", "rowmean", "none", "batchmean", "mean"]
Tail = Literal["bucket", "zero", "renorm"]
Estimator = Literal["k1", "k2", "k3"]
EstimateTotal = Literal["sum", "mean"]
EstimateReduction = Literal["none", "sum", "mean"]
OneGrad = Literal["x", "y"] | tuple[Literal["x", "y"]]
BothGrads = tuple[Literal["x"], Literal["y"]]
ReturnGrad = OneGrad | BothGrads
EntropyGrad = Literal["x"] | tuple[Literal["x"]]


class _CommonOptions(TypedDict, total=False):
    axis: SupportsIndex
    weights: Any
    denominator: Any
    temperature: Temperature
    base: SupportsFloat | None
    out: Any
    device: str | None


class Options(_CommonOptions, total=False):
    """The keywords of cross_entropy but `return_grad`, and what others have too; for ``**options: Unpack[Options]``."""

    space: Spaces
    reduction: Reduction


class _Listed(TypedDict, total=False):
    indices: Any
    tail: Tail | None
    tail_mass: Any


class ListedOptions(Options, _Listed, total=False):
    """Those of Options, and how x lists some classes: of kl_div, rel_entr and tv_dist."""


class EntropyOptions(_CommonOptions, total=False):
    """Those of entropy."""

    space: Space
    reduction: Reduction


class BetaOptions(ListedOptions, total=False):
    """Those of ListedOptions, and what js_div has beside them."""

    beta: SupportsFloat
    scaled: bool


class ForwardOptions(ListedOptions, total=False):
    """The same of mixed_kl_div."""

    forward: SupportsFloat


class AlphaOptions(Options, total=False):
    """Those of Options, and what skew_kl_div and alpha_div have beside them."""

    alpha: SupportsFloat


class TotalOptions(_CommonOptions, total=False):
    """Those of Options but `reduction`."""

    space: Spaces


class ListedTotalOptions(TotalOptions, _Listed, total=False):
    """Those of ListedOptions but `reduction`."""


class BetaTotalOptions(ListedTotalOptions, total=False):
    """Those of BetaOptions but `reduction`."""

    beta: SupportsFloat
    scaled: bool


class ForwardTotalOptions(ListedTotalOptions, total=False):
    """Those of ForwardOptions but `reduction`."""

    forward: SupportsFloat


class AlphaTotalOptions(TotalOptions, total=False):
    """Those of AlphaOptions but `reduction`."""

    alpha: SupportsFloat


class _Alpha(TypedDict):
    alpha: SupportsFloat


class RenyiTotalOptions(TotalOptions, _Alpha):
    """Those of RenyiOptions but `reduction`."""


class RenyiOptions(RenyiTotalOptions, total=False):
    """The same as AlphaOptions of renyi_div, which has no default for alpha, and is no sum of terms."""

    reduction: Literal["row"] | Total


class EntropyTotalOptions(_CommonOptions, total=False):
    """Those of EntropyOptions but `reduction`."""

    space: Space


class EstimateTotalOptions(TypedDict, total=False):
    """Those of EstimateOptions but `reduction`."""

    kind: Estimator
    ratio: Any
    limit: SupportsFloat | None
    weights: Any
    denominator: Any
    base: SupportsFloat | None
    out: Any
    device: str | None


class EstimateOptions(EstimateTotalOptions, total=False):
    """Those of kl_estimate but `return_grad`."""

    reduction: EstimateReduction
