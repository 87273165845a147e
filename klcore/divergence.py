"""The public functions of one or two distributions: what they mean, and the call that each makes of its arguments.

`loss` makes the call for klcore.compat. The overloads are for type checkers: they say which options there are, and what
is returned, which depends on `return_grad`.
"""

from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, overload

from klcore.backends import compute, find
from klcore.operations import CROSS_ENTROPY, ENTROPY, KL_DIV, LOSSES, REL_ENTR, Call
from klcore.parameters import units_per_nat
from klcore.typing import ArrayT, BothGrads, EntropyGrad, OneGrad, Plain, ReturnGrad, Temperature, Total

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

    from klcore.typing import (
        EntropyOptions,
        EntropyTotalOptions,
        ListedOptions,
        ListedTotalOptions,
        OfNumPy,
        Options,
        TotalOptions,
    )


@overload
def kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[ListedTotalOptions]"
) -> Any: ...
@overload
def kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[ListedTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def kl_div(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[ListedTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def kl_div(x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[ListedOptions]") -> Any: ...
@overload
def kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[ListedOptions]"
) -> ArrayT: ...
@overload
def kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[ListedOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[ListedOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def kl_div(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[ListedOptions]"
) -> Any: ...
def kl_div(
    x: Any,
    y: Any,
    *,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    indices: Any = None,
    tail: str | None = None,
    tail_mass: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Kullback-Leibler divergence KL(x || y) = sum(x*log(x/y) - x + y) over the classes, in nats.

    This is the relative entropy of Kullback and Leibler [1]_ plus the terms ``-x + y`` [2]_, which cancel in the sum if
    x and y are distributions. They make every term, and so every result, non-negative, and exactly zero where x equals
    y.

    Parameters
    ----------
    x : array of shape (..., n, ...)
        The first distribution: the truth, or the teacher. An array of NumPy, CuPy, PyTorch, JAX or Dask, or any array
        with ``__dlpack__``. Tables of pandas, polars and xarray, and anything else with ``__array__``, are taken as
        NumPy arrays. The dtypes are float64, float32, float16 and bfloat16 (``ml_dtypes``); integers, booleans and
        lists are converted to float64. A 0-d array is one class.
    y : array of shape (..., n, ...)
        The second distribution: the model, or the student. It has as many classes as x, and the batch axes of x and y
        broadcast.
    space : {"probs", "log_probs", "logits", "counts"} or a pair of these
        What the numbers in x and y are. It cannot be inferred from the numbers, and a wrong space gives a wrong result.
        Logits and counts are unnormalised. klcore normalises them, logits by the softmax over `axis` and counts
        (histograms, word counts: any numbers >= 0) by their sum, and differentiates through the normalisation. A pair
        is (space of x, space of y).
    axis : int
        The class axis; all other axes are the batch. It is an axis of the shape to which x and y broadcast, so a
        negative number means the same axis of both.
    reduction : {"row", "sum", "rowmean", "none", "batchmean", "mean"}
        "row": one value per row, that is, per distribution. "sum": the sum over all rows. "rowmean": the mean over all
        rows; use this one for tokens. "none": the terms, not summed. "batchmean": the sum divided by the size of the
        first axis. "mean": the sum divided by the number of elements. The last two are PyTorch's definitions.
    weights : array, optional
        One weight >= 0 per row, broadcastable to the batch shape; for example a boolean mask. The value of each row is
        multiplied by its weight. "rowmean" divides by the sum of the weights; the other reductions divide by the same
        number as without weights. Rows with weight 0 are skipped and give 0, even if they hold NaN.
    denominator : float or 0-d array, optional
        Divides the value and the gradients; only with ``reduction="sum"``. For example, the number of tokens of a batch
        that is computed in parts, or that number divided by the square of the temperature. If it is 0, the result is
        NaN. An array on a GPU is read there, without synchronisation, so a negative, infinite or NaN denominator raises
        on the CPU only.
    temperature : float or array
        Divides the logits; only valid if x or y is logits. The result is not multiplied by the square of the
        temperature. An array holds one temperature per row, like `weights`; each row then has the same bits as if it
        were computed alone, with its temperature as a number. An array on a GPU, even a 0-d one, is read there, without
        synchronisation. If no argument is float64, the temperatures in an array must be between 2**-20 and 2**100. An
        invalid temperature of a row whose weight is not 0 raises on the CPU, and makes its row NaN on a GPU.
    base : float, optional
        The base of the logarithms, above 1. It sets the unit of the value and the gradients: 2 gives bits. None gives
        nats.
    indices : array of integers, optional
        The classes of y that x lists, if x has only some of them; for example a teacher's top K. Of shape (..., K),
        like x; batch axes broadcast. The classes can be in any order. -1 means no class. If a class is listed several
        times, its probabilities are added.
    tail : {"bucket", "zero", "renorm"}
        With `indices`: what x has in the classes that it does not list. "bucket": these classes are merged into one.
        The mass of x in it is what is left of x, and the mass of y is the sum of y over these classes. "zero": x has
        nothing there. "renorm": x and y are both renormalised over the listed classes. "bucket" and "zero" need x as
        probabilities or log-probabilities, at the same temperature as the one that divides the logits of y.
    tail_mass : array, optional
        With "bucket": the mass of x in the merged class, one number between 0 and 1 per row. It is then a constant that
        does not depend on x. None means 1 minus the sum of x, or 0 where that is negative.
    return_grad : {"x", "y", ("x", "y")}, optional
        Also return the gradient of the value with respect to these arguments, in the space in which they were given,
        computed in the same pass. For "row" and "none" it is the gradient of the sum of the returned values. PyTorch's
        autograd and ``jax.grad`` do not need this option.
    out : array or tuple of arrays, optional
        Where to write the value, or (value, gradients...); None in a tuple allocates. An output must not overlap an
        input, another output, or itself. One exception: ``out=(None, y)`` writes the gradient for y over y, if y is
        logits, y is not x, and no argument whose gradient is asked for is broadcast.
    device : {"cpu", "cuda", "cuda:N"}, optional
        Where to compute; the result stays there. None means where the arrays are.

    Returns
    -------
    value : array or scalar
        float64 if x or y is float64 or was converted to it, else float32. It has the batch shape for "row", the shape
        to which x and y broadcast for "none", and is a scalar otherwise.
    gradients : arrays
        In the shapes and dtypes of their arguments, if `return_grad` asks for them: ``(value, dx)``, ``(value, dy)`` or
        ``(value, dx, dy)``.

    Raises
    ------
    TypeError
        For complex, object, string, masked or sparse arrays; arrays with units; arrays of an unknown library; two
        arrays whose libraries do not go together; labels in another order than the positions, next to an argument
        without labels; and `indices` without `tail`.
    ValueError
        For shapes or labels that do not match, and for unknown option values.
    klcore.BackendUnavailableError
        If the device cannot be used; klcore never falls back to another device.

    See Also
    --------
    rel_entr : The literal sum of x*log(x/y).
    kl_estimate : An estimate from sampled tokens, where only their log-probabilities are known.

    Notes
    -----
    Per class, x = 0 contributes y; x > 0 with y = 0 gives +inf; equal finite numbers contribute exactly 0; negative
    numbers and NaN give NaN. As a log-probability or a logit, -inf is an exact zero. A row of logits is NaN if all of
    it is -inf, or if it holds +inf or NaN. A row of counts is NaN if all of it is 0, or if it holds a negative number,
    +inf or NaN. No row affects another.

    With `indices`, the value is the divergence of K + 1 classes, computed in float64: the terms above for each listed
    class, and for all other classes as one. The mass of y in the other classes is their sum, not 1 minus the rest. If
    all classes are listed, the merged class is empty and contributes nothing. The terms ("none") are those of the
    classes in the order listed, and last that of the merged class. If a class is listed several times, its term stands
    at its largest entry, and the others are 0. An index outside of y, or a mass outside of [0, 1], raises on the CPU,
    and makes its row NaN on a GPU.

    Accuracy and the order of addition are part of the contract (docs/maths.md): the same input gives the same bits for
    any number of threads, instruction set, batch and memory layout.

    References
    ----------
    .. [1] Kullback, S., and Leibler, R. A., "On Information and Sufficiency", Annals of Mathematical Statistics 22
       (1951).
    .. [2] Csiszar, I., "Why Least Squares and Maximum Entropy?", Annals of Statistics 19 (1991).

    Examples
    --------
    >>> import klcore
    >>> print(klcore.kl_div([0.5, 0.5], [0.9, 0.1]))
    0.5108256237659906

    Two tokens, the second of which is masked out:

    >>> teacher, student, mask = [[2.0, 0.0], [9.0, 9.0]], [[1.0, 1.0], [0.0, 5.0]], [True, False]
    >>> loss, dy = klcore.kl_div(
    ...     teacher, student, space="logits", reduction="rowmean", weights=mask, return_grad="y"
    ... )
    >>> print(round(float(loss), 6), dy.round(6).tolist())
    0.327813 [[-0.380797, 0.380797], [0.0, 0.0]]

    A teacher's two most likely classes out of four:

    >>> best = {"indices": [1, 3], "tail": "bucket", "space": ("probs", "logits")}
    >>> print(round(float(klcore.kl_div([0.6, 0.3], [1.0, 2.0, 0.0, 1.0], **best)), 6))
    0.097251
    """
    return find(x, y, device).compute(Call(
        KL_DIV, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator, 0.0,
        units_per_nat(base),
        indices=indices, tail=tail, tail_mass=tail_mass,
    ))  # fmt: skip


@overload
def rel_entr(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[ListedTotalOptions]"
) -> Any: ...
@overload
def rel_entr(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[ListedTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def rel_entr(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[ListedTotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def rel_entr(
    x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[ListedOptions]"
) -> Any: ...
@overload
def rel_entr(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[ListedOptions]"
) -> ArrayT: ...
@overload
def rel_entr(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[ListedOptions]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def rel_entr(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[ListedOptions]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def rel_entr(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[ListedOptions]"
) -> Any: ...
def rel_entr(
    x: Any,
    y: Any,
    *,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    indices: Any = None,
    tail: str | None = None,
    tail_mass: Any = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Relative entropy sum(x*log(x/y)) over the classes, the literal sum, in nats.

    Equal to :func:`kl_div` if x and y both sum to one. Otherwise it can be negative, and if the distributions are
    close, rounding errors in their normalisation show at first order. Use `kl_div` unless you need exactly this sum.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    space, axis, reduction, weights, denominator, temperature, base, return_grad, out, device
        As for :func:`kl_div`.
    indices, tail, tail_mass
        For an x that lists only some of the classes of y, as for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`.

    Raises
    ------
    TypeError, ValueError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all options, results and errors.
    cross_entropy : The same sum without the entropy of x.

    Notes
    -----
    Per class, x = 0 contributes 0 for any y >= 0; x > 0 with y = 0 gives +inf; negative numbers and NaN give NaN.

    Examples
    --------
    >>> import klcore
    >>> print(klcore.rel_entr([1.0, 2.0], [2.0, 1.0]))
    0.6931471805599453
    """
    return find(x, y, device).compute(Call(
        REL_ENTR, x, y, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        0.0, units_per_nat(base),
        indices=indices, tail=tail, tail_mass=tail_mass,
    ))  # fmt: skip


@overload
def cross_entropy(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[TotalOptions]"
) -> Any: ...
@overload
def cross_entropy(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: OneGrad, **options: "Unpack[TotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def cross_entropy(
    x: "OfNumPy", y: "OfNumPy", *, reduction: Total, return_grad: BothGrads, **options: "Unpack[TotalOptions]"
) -> tuple[Any, Any, Any]: ...
@overload
def cross_entropy(
    x: Plain, y: Plain, *, return_grad: ReturnGrad | None = None, **options: "Unpack[Options]"
) -> Any: ...
@overload
def cross_entropy(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: None = None, **options: "Unpack[Options]"
) -> ArrayT: ...
@overload
def cross_entropy(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: OneGrad, **options: "Unpack[Options]"
) -> tuple[ArrayT, ArrayT]: ...
@overload
def cross_entropy(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: BothGrads, **options: "Unpack[Options]"
) -> tuple[ArrayT, ArrayT, ArrayT]: ...
@overload
def cross_entropy(
    x: ArrayT | Plain, y: ArrayT | Plain, *, return_grad: ReturnGrad | None, **options: "Unpack[Options]"
) -> Any: ...
def cross_entropy(
    x: Any,
    y: Any,
    *,
    space: str | tuple[str, str] = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    return_grad: str | tuple[str, ...] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Cross-entropy H(x, y) = -sum(x*log(y)) over the classes, in nats.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    space, axis, reduction, weights, denominator, temperature, base, return_grad, out, device
        As for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`.

    Raises
    ------
    TypeError, ValueError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all options, results and errors.
    entropy : What the cross-entropy is if y equals x.

    Notes
    -----
    Per class, x = 0 contributes 0 for any y >= 0; x > 0 with y = 0 gives +inf; negative numbers and NaN give NaN.

    Examples
    --------
    >>> import klcore
    >>> print(klcore.cross_entropy([0.5, 0.5], [0.25, 0.75]))
    0.8369882167858358
    """
    return find(x, y, device).compute(Call(
        CROSS_ENTROPY, x, y, space, axis, reduction, weights, temperature, return_grad, out, device,
        denominator, 0.0, units_per_nat(base),
    ))  # fmt: skip


@overload
def entropy(
    x: "OfNumPy", *, reduction: Total, return_grad: None = None, **options: "Unpack[EntropyTotalOptions]"
) -> Any: ...
@overload
def entropy(
    x: "OfNumPy", *, reduction: Total, return_grad: EntropyGrad, **options: "Unpack[EntropyTotalOptions]"
) -> tuple[Any, Any]: ...
@overload
def entropy(x: Plain, *, return_grad: EntropyGrad | None = None, **options: "Unpack[EntropyOptions]") -> Any: ...
@overload
def entropy(x: ArrayT, *, return_grad: None = None, **options: "Unpack[EntropyOptions]") -> ArrayT: ...
@overload
def entropy(x: ArrayT, *, return_grad: EntropyGrad, **options: "Unpack[EntropyOptions]") -> tuple[ArrayT, ArrayT]: ...
@overload
def entropy(x: ArrayT, *, return_grad: EntropyGrad | None, **options: "Unpack[EntropyOptions]") -> Any: ...
def entropy(
    x: Any,
    *,
    space: str = "probs",
    axis: SupportsIndex = -1,
    reduction: str = "row",
    weights: Any = None,
    denominator: Any = None,
    temperature: Temperature = 1.0,
    base: SupportsFloat | None = None,
    return_grad: str | tuple[str] | None = None,
    out: Any = None,
    device: str | None = None,
) -> Any:
    """Entropy H(x) = -sum(x*log(x)) over the classes, in nats.

    Parameters
    ----------
    x : array of shape (..., n, ...)
        The distribution.
    space : {"probs", "log_probs", "logits", "counts"}
        What the numbers are.
    axis, reduction, weights, denominator, temperature, base, return_grad, out, device
        As for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As for :func:`kl_div`.

    Raises
    ------
    TypeError, ValueError, klcore.BackendUnavailableError
        As for :func:`kl_div`.

    See Also
    --------
    kl_div : Explains all options, results and errors.
    cross_entropy : The same sum with the logarithms of another distribution.

    Notes
    -----
    Per class, x = 0 contributes 0; negative numbers and NaN give NaN.

    Examples
    --------
    >>> import klcore
    >>> print(klcore.entropy([0.25, 0.25, 0.25, 0.25]))
    1.3862943611198906
    """
    return find(x, x, device).compute(Call(
        ENTROPY, x, None, space, axis, reduction, weights, temperature, return_grad, out, device, denominator,
        0.0, units_per_nat(base),
    ))  # fmt: skip


def loss(
    term: str,
    x: Any,
    y: Any,
    *,
    space: tuple[str, str],
    axis: int = -1,
    reduction: str = "row",
    factors: Any = None,
    denominator: float | None = None,
    epsilon: float = 0.0,
    dtype: str | None = None,
    return_grad: str | tuple[str, str] | None = None,
) -> Any:
    """Sum the terms of another system's loss, for :mod:`klcore.compat`; not part of the public interface.

    Parameters
    ----------
    term : {"pytorch", "keras", "mxnet", "puzzlelib"}
        The system whose term is summed; the terms are in src/kl_compat.h.
    x, y : array
        The target and the prediction. They broadcast over all axes, including the class axis.
    space : pair of {"probs", "log_probs", "logits"}
        What x and y are. Each term accepts certain pairs: "pytorch" (probs, log_probs) and (log_probs, log_probs);
        "keras" (probs, probs); "mxnet" (probs, log_probs) and (probs, logits); "puzzlelib" (probs, logits) and
        (logits, logits).
    axis : int
        The class axis of the broadcast shape.
    reduction : {"row", "sum", "none"}
        Sum over the classes, sum over everything, or return the terms.
    factors : array, optional
        Multiplies the terms and the gradients: any numbers, of a shape that broadcasts to that of the terms. A row
        whose classes all share the factor 0 is skipped and gives 0.
    denominator : float, optional
        Divides the result and the gradients.
    epsilon : float
        Where "keras" clips, and what "mxnet" adds inside the logarithm.
    dtype : str, optional
        The name of the dtype of the value. None: float64 if an argument is float64, else float32.
    return_grad : {"x", "y", ("x", "y")}, optional
        As in :func:`kl_div`. "puzzlelib" accepts only "y", and its gradient is (x - softmax(y)) / denominator, a
        direction of descent.

    Returns
    -------
    value : array
        Followed by the gradients that `return_grad` asks for, in the shapes and dtypes of x and y.
    """
    return compute(
        Call(
            LOSSES[term],
            x,
            y,
            space,
            axis,
            reduction,
            factors,
            1.0,
            return_grad,
            None,
            None,
            denominator,
            epsilon,
            dtype=dtype,
        )
    )
