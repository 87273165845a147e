"""Types for the arguments of the public functions: for their annotations, and for wrappers that you write.

>>> import klcore
>>> from klcore.typing import ArrayT, Reduction
>>> def loss(x: ArrayT, y: ArrayT, reduction: Reduction = "row") -> ArrayT:
...     return klcore.kl_div(x, y, reduction=reduction)

What type checkers see as the return type:

* The type of the array arguments: a `torch.Tensor` for two tensors, and a tuple of tensors with `return_grad`. A typed
  function can return what klcore returns, also under ``mypy --strict``. A list or a number takes the type of the other
  argument. For two unrelated types, such as arrays of two libraries, it is their common base or a union, although the
  call raises.
* `Any` for the totals ("sum", "rowmean", "batchmean", "mean") of NumPy arrays, as for NumPy's own sums: they are
  scalars, either float64, which is a Python float, or float32, which is not. "row" and "none" have the type of an
  array, although one row gives a scalar, which no type can express: use ``float(...)`` to get a float. The dtype of an
  array type stays as it is; that 16-bit numbers and integers give wider values is not expressed.
* `Any` if there are only lists and numbers.
* For pandas, polars and xarray the results are NumPy arrays, whatever the checker says: pass ``.to_numpy()`` if types
  matter.

`temperature` and `axis` also accept NumPy's scalars: anything with ``__float__``, which excludes strings, or
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
    """An array of any library: the attributes that all of them have, and lists and numbers do not."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=Array)
Plain: TypeAlias = float | Sequence[Any]  # converted to float64
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
    """The keywords that all functions share, except `return_grad`; for ``**options: Unpack[Options]``."""

    space: Spaces
    reduction: Reduction


class _Listed(TypedDict, total=False):
    indices: Any
    tail: Tail | None
    tail_mass: Any


class ListedOptions(Options, _Listed, total=False):
    """The keywords of kl_div, rel_entr and tv_dist, except `return_grad`."""


class EntropyOptions(_CommonOptions, total=False):
    """The keywords of entropy, except `return_grad`."""

    space: Space
    reduction: Reduction


class BetaOptions(ListedOptions, total=False):
    """The keywords of js_div, except `return_grad`."""

    beta: SupportsFloat
    scaled: bool


class ForwardOptions(ListedOptions, total=False):
    """The keywords of mixed_kl_div, except `return_grad`."""

    forward: SupportsFloat


class AlphaOptions(Options, total=False):
    """The keywords of skew_kl_div and alpha_div, except `return_grad`."""

    alpha: SupportsFloat


class TotalOptions(_CommonOptions, total=False):
    """Options without `reduction`."""

    space: Spaces


class ListedTotalOptions(TotalOptions, _Listed, total=False):
    """ListedOptions without `reduction`."""


class BetaTotalOptions(ListedTotalOptions, total=False):
    """BetaOptions without `reduction`."""

    beta: SupportsFloat
    scaled: bool


class ForwardTotalOptions(ListedTotalOptions, total=False):
    """ForwardOptions without `reduction`."""

    forward: SupportsFloat


class AlphaTotalOptions(TotalOptions, total=False):
    """AlphaOptions without `reduction`."""

    alpha: SupportsFloat


class _Alpha(TypedDict):
    alpha: SupportsFloat


class RenyiTotalOptions(TotalOptions, _Alpha):
    """RenyiOptions without `reduction`."""


class RenyiOptions(RenyiTotalOptions, total=False):
    """The keywords of renyi_div, except `return_grad`: alpha is required, and there is no reduction "none"."""

    reduction: Literal["row"] | Total


class EntropyTotalOptions(_CommonOptions, total=False):
    """EntropyOptions without `reduction`."""

    space: Space


class EstimateTotalOptions(TypedDict, total=False):
    """EstimateOptions without `reduction`."""

    kind: Estimator
    ratio: Any
    limit: SupportsFloat | None
    weights: Any
    denominator: Any
    base: SupportsFloat | None
    out: Any
    device: str | None


class EstimateOptions(EstimateTotalOptions, total=False):
    """The keywords of kl_estimate, except `return_grad`."""

    reduction: EstimateReduction
