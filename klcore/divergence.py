"""The public functions: what they mean, and one line each that hands the arrays to their backend.

And `loss`, which is the same for the front-ends of klcore.compat. The overloads are for type checkers: they say what
comes back, which depends on `return_grad`, and which words are known.
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

    For distributions the terms ``-x + y`` cancel in the sum; they make every term, and so every result, non-negative
    and exactly zero where the arguments are equal.

    Parameters
    ----------
    x : array of shape (..., n, ...)
        The first distribution: the truth, the teacher. Of NumPy, CuPy, PyTorch, JAX, Dask, or with ``__dlpack__``;
        tables of pandas, polars and xarray, and whatever else has ``__array__``, as NumPy arrays. float64, float32,
        float16 or bfloat16 (``ml_dtypes``); integers, booleans and lists are taken as float64. A 0-d array is one
        class.
    y : array
        The second: the model, the student. The same number of classes; the batch axes of x and y broadcast.
    space : {"probs", "log_probs", "logits", "counts"} or a pair of them
        What the numbers are, which cannot be seen from them: a wrong space is a wrong result. Logits and counts are
        unnormalised: the softmax over `axis` of the ones, and the division by their sum of the others (histograms, word
        counts: any numbers >= 0), are part of the computation, and of the derivative. A pair is (space of x, space of
        y).
    axis : int
        The class axis; all others are the batch. Counted in the shape to which x and y broadcast: a negative number
        means the same axis of both.
    reduction : {"row", "sum", "rowmean", "none", "batchmean", "mean"}
        "row": one value a distribution. "sum": of all rows. "rowmean": their mean, which for tokens is the one to take.
        "none": the terms, not summed. "batchmean": the sum divided by the size of the first axis; "mean": by the number
        of elements (PyTorch's words).
    weights : array, optional
        One weight >= 0 a row, broadcastable to the batch shape; a boolean mask, say. Rows are multiplied by them,
        "rowmean" is divided by their sum, the other denominators are those without weights. A row of weight 0 is not
        read, and yields 0, even if it holds NaN.
    denominator : float or 0-d array, optional
        Divides the value, and the gradients with it; only with "sum". The number of tokens of a batch whose parts are
        computed one after the other, say, or that number divided by the temperature's square. An array of the GPU is
        read there, and nothing waits for it: so one that is negative, infinite or NaN raises on the CPU only. The
        result is NaN where it is 0.
    temperature : float or array
        Divides the logits; only with logits. Nothing is multiplied by its square. An array holds one a row, as
        `weights` do, and each row has the bits that it has alone with its number. One of the GPU, of no dimensions as
        well, is read there, and nothing waits for it. Where no argument is float64 the numbers of an array are to lie
        between 2**-20 and 2**100. A bad one, of a row that has a weight, raises on the CPU, and makes its row NaN on a
        GPU.
    base : float, optional
        Of the logarithms, above 1: the value and the gradients are in its unit, as in bits for 2. None: nats.
    indices : array of integers, optional
        x lists some classes only, a teacher's best K, say: these, where y has all. Of the shape (..., K), as x; batch
        axes broadcast. In any order; -1 stands for no class, and the probabilities of one that is listed several times
        are added.
    tail : {"bucket", "zero", "renorm"}
        With `indices`: what x has of all other classes. "bucket": together they are one class, of the mass that is left
        to x, and what y has of them is that class's. "zero": nothing. "renorm": x and y are both renormalised on the
        classes listed. The first two take x as probabilities or log-probabilities, at the temperature that divides y's
        logits.
    tail_mass : array, optional
        With "bucket": the mass that is left to x, one number between 0 and 1 a row, which then does not depend on x.
        None: 1 less the sum of x, or 0 where that is negative.
    return_grad : {"x", "y", ("x", "y")}, optional
        Also return the derivative of the value (for "row" and "none": of the sum of what is returned) with respect to
        these arguments as they were given, computed in the same pass. PyTorch's autograd and ``jax.grad`` need no such
        word.
    out : array or tuple of arrays, optional
        Where to write the value, or (value, gradients...). Must not overlap an input, nor itself; but the gradient for
        y from logits may be written over y, ``out=(None, y)``, unless y is x, or one of them is broadcast whose
        gradient is asked for.
    device : {"cpu", "cuda", "cuda:N"}, optional
        Where to compute, and where the result stays. None: where the arrays are.

    Returns
    -------
    value : array or scalar
        float64 if an argument is, else float32. Of the batch shape for "row", of the broadcast input shape for "none",
        else a scalar.
    gradients : arrays
        Of the shape and dtype of their arguments, if `return_grad` asks for them: ``(value, dx)``, ``(value, dy)`` or
        ``(value, dx, dy)``.

    Raises
    ------
    TypeError
        For complex, object, string, masked or sparse arrays, those with units, arrays of an unknown library, or of two
        that do not go together; for labels that contradict the positions of an argument without labels; for `indices`
        without `tail`.
    ValueError
        For shapes and labels that do not match and words that are not known.
    klcore.BackendUnavailableError
        If the device cannot be used; never is another one used instead.

    Notes
    -----
    Domain, per class: x = 0 contributes y; x > 0 with y = 0 makes +inf; equal finite numbers contribute exactly 0;
    negative numbers and NaN make NaN. Of log-probabilities and logits -inf is an exact zero. A row of logits that is
    all -inf, or holds +inf or NaN, is NaN, and so is a row of counts that is all 0, or holds a negative number, +inf
    or NaN. No row affects another.

    With `indices` the value is that of K + 1 classes, computed in float64: the terms above of each class listed, and of
    all others as one. What y has of these is summed over them, and is not 1 less the rest. A class of its own that is
    empty, because all are listed, counts nothing. Terms ("none") are those of the classes in the order listed, and last
    of all others; that of a class that is listed several times stands at its largest number. On a GPU an index outside
    of y, or a mass outside of [0, 1], makes its row NaN; on the CPU they raise.

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

    Two tokens, of which the mask leaves out the second:

    >>> teacher, student, mask = [[2.0, 0.0], [9.0, 9.0]], [[1.0, 1.0], [0.0, 5.0]], [True, False]
    >>> loss, dy = klcore.kl_div(
    ...     teacher, student, space="logits", reduction="rowmean", weights=mask, return_grad="y"
    ... )
    >>> print(round(float(loss), 6), dy.round(6).tolist())
    0.327813 [[-0.380797, 0.380797], [0.0, 0.0]]

    The two best classes of a teacher, out of four:

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
    """Relative entropy sum(x*log(x/y)), the literal sum, in nats.

    Equal to :func:`kl_div` where both arguments sum to one. Otherwise it may be negative, and rounding in the
    normalisation of close distributions shows in it at first order: prefer `kl_div` unless it is this sum that is
    wanted.

    Parameters
    ----------
    x, y : array of shape (..., n, ...)
        The truth and the model.
    space, axis, reduction, weights, denominator, temperature, base, indices, tail, tail_mass, return_grad, out,
    device
        As for :func:`kl_div`.

    Returns
    -------
    value, gradients
        As of :func:`kl_div`.

    See Also
    --------
    kl_div : says what all parameters mean, what is returned, and what raises.

    Notes
    -----
    Domain, per class: x = 0 contributes 0 for any y >= 0; x > 0 with y = 0 makes +inf; negative numbers and NaN
    make NaN.

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
        As of :func:`kl_div`.

    See Also
    --------
    kl_div : says what all parameters mean, what is returned, and what raises.

    Notes
    -----
    Domain, per class: x = 0 contributes 0 for any y >= 0; x > 0 with y = 0 makes +inf; negative numbers and NaN
    make NaN.

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
        As of :func:`kl_div`.

    See Also
    --------
    kl_div : says what all parameters mean, what is returned, and what raises.

    Notes
    -----
    Domain, per class: x = 0 contributes 0; negative numbers and NaN make NaN.

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
    """Sum of the terms of another system's loss, for :mod:`klcore.compat`: not part of the public interface.

    Parameters
    ----------
    term : {"pytorch", "keras", "mxnet", "puzzlelib"}
        Whose term; they stand in src/kl_compat.h.
    x, y : array
        The target and the prediction. They broadcast over all axes, that of the classes included.
    space : pair of {"probs", "log_probs", "logits"}
        What x and y are. Each term knows certain pairs: "pytorch" (probs, log_probs) and (log_probs, log_probs);
        "keras" (probs, probs); "mxnet" (probs, log_probs) and (probs, logits); "puzzlelib" (probs, logits) and
        (logits, logits).
    axis : int
        The class axis, counted in the broadcast shape.
    reduction : {"row", "sum", "none"}
        Sums over the classes, over everything, or the terms.
    factors : array, optional
        Multiplies the terms, and the gradients with them: any numbers, of a shape that broadcasts to the terms'. A row
        whose factor, the same for all its classes, is 0 is not read, and yields 0.
    denominator : float, optional
        Divides the result, and the gradients with it.
    epsilon : float
        What "keras" clips at, and "mxnet" adds within the logarithm.
    dtype : str, optional
        Name of the value's dtype. None: float64 if an argument is, else float32.
    return_grad : {"x", "y", ("x", "y")}, optional
        As in :func:`kl_div`; with "puzzlelib" only "y": its gradient is (x - softmax(y)) / denominator, a direction of
        descent.

    Returns
    -------
    value : array
        With the gradients, if `return_grad` asks for them, in the operands' shapes and dtypes.
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
