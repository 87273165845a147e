"""What type checkers see of the public functions, beside what they do.

`make lint` runs mypy over this file: every `assert_type` must hold, and every `type: ignore` must be needed, or it
fails. pytest runs the same lines: what the types promise comes back, and what they refuse raises.
"""

import inspect
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from typing_extensions import Unpack, assert_type, is_typeddict

import klcore
from klcore import typing as words
from klcore.backends import options
from klcore.compat import keras, mxnet, puzzlelib, pytorch, rtorch
from klcore.operations import ESTIMATORS, OPERATIONS

if TYPE_CHECKING:
    import jax
    import numpy.typing as npt
    import torch

    NumPy = npt.NDArray[np.float64]

X: "NumPy" = np.array([[0.5, 0.5]])
Y: "NumPy" = np.array([[0.25, 0.75]])


# ---- the public functions --------------------------------------------------------------------------------------------


def test_value() -> None:
    value = klcore.kl_div(X, Y, space="probs", axis=1, reduction="sum", weights=[2.0], temperature=1, device="cpu")
    assert_type(value, Any)  # a scalar, of float64 or float32
    assert np.isscalar(value)
    assert_type(klcore.rel_entr(X, Y, return_grad=None), "NumPy")
    assert_type(klcore.cross_entropy(X, Y, space=("probs", "logits"), out=np.empty(1)), "NumPy")
    assert_type(klcore.entropy(X, space="probs"), "NumPy")
    assert_type(klcore.entropy(X, reduction="mean"), Any)
    assert_type(klcore.kl_div(0.5, 0.25), Any)
    number: float = klcore.kl_div([0.5, 0.5], Y[0].tolist(), reduction="sum")
    assert number > 0
    assert_type(klcore.kl_div(X, [0.25, 0.75]), "NumPy")
    assert_type(klcore.kl_div([[0.5, 0.5]], Y, return_grad="y"), "tuple[NumPy, NumPy]")


def test_one_gradient() -> None:
    assert_type(klcore.kl_div(X, Y, return_grad="x"), "tuple[NumPy, NumPy]")
    assert_type(klcore.rel_entr(X, Y, return_grad=("y",)), "tuple[NumPy, NumPy]")
    assert_type(klcore.cross_entropy(X, Y, return_grad="y", space="logits", temperature=2.0), "tuple[NumPy, NumPy]")
    assert_type(klcore.entropy(X, return_grad=("x",)), "tuple[NumPy, NumPy]")
    assert_type(klcore.kl_div(X, Y, return_grad="x", reduction="sum"), tuple[Any, Any])
    value, dx = klcore.entropy(X, return_grad="x")
    assert value.shape == (1,)
    assert dx.shape == X.shape
    with pytest.raises(ValueError, match="not enough values"):
        _value, _dx, _dy = klcore.kl_div(X, Y, return_grad="y")  # type: ignore[misc]


def test_two_gradients() -> None:
    assert_type(klcore.kl_div(X, Y, return_grad=("x", "y")), "tuple[NumPy, NumPy, NumPy]")
    assert_type(klcore.cross_entropy(X, Y, return_grad=("x", "y"), axis=-1), "tuple[NumPy, NumPy, NumPy]")
    value, dx, dy = klcore.rel_entr(X, Y, return_grad=("x", "y"))
    assert value.shape == (1,)
    assert dx.shape == dy.shape == X.shape
    with pytest.raises(ValueError, match="too many values"):
        _value, _dx = klcore.kl_div(X, Y, return_grad=("x", "y"))  # type: ignore[misc]


def test_arrays_come_back_as_they_went_in() -> None:
    """Functions as users write them under ``mypy --strict``, which takes no `Any` for what they say they return."""

    def of_torch(x: "torch.Tensor", y: "torch.Tensor") -> "torch.Tensor":
        return klcore.kl_div(x, y, space="logits", reduction="rowmean")

    def of_a_parameter(x: "torch.nn.Parameter", y: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        return klcore.kl_div(x, y, return_grad="y")

    def of_jax(x: "jax.Array", y: "jax.Array") -> "tuple[jax.Array, jax.Array, jax.Array]":
        return klcore.rel_entr(x, y, return_grad=("x", "y"), reduction="sum")

    def of_numpy(x: "npt.NDArray[Any]", y: np.ndarray) -> np.ndarray:  # with Any within, as most are annotated
        return klcore.cross_entropy(x, y)

    def entropy_and_gradient(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return klcore.entropy(x, return_grad="x")

    def of_any(x: words.ArrayT, y: words.ArrayT, **options: Unpack[words.Options]) -> words.ArrayT:
        return klcore.kl_div(x, y, **options)

    def of_another(x: "torch.Tensor", y: "torch.Tensor") -> "jax.Array":
        return klcore.kl_div(x, y)  # type: ignore[return-value]

    def untyped(x: Any, y: Any) -> None:
        assert_type(klcore.kl_div(x, y), Any)
        assert_type(klcore.kl_div(x, y, reduction="sum"), Any)
        assert_type(klcore.kl_div(x, X), Any)

    assert of_numpy(X, Y).shape == of_any(X, Y).shape == (1,)
    assert len(entropy_and_gradient(X)) == 2
    with pytest.raises(TypeError, match="x"):
        klcore.kl_div({0.5}, Y)  # type: ignore[call-overload]


def test_numbers_of_numpy() -> None:
    """As options; strings and fractions are none."""
    klcore.kl_div(X, Y, space="logits", temperature=np.float32(2), axis=np.int64(1))
    klcore.entropy(X, space="logits", temperature=np.float64(2), axis=np.int8(0))
    klcore.kl_div(X, Y, space="logits", temperature=np.ones(1))
    klcore.js_div(X, Y, space="logits", temperature=[2.0])
    mxnet.KLDivLoss(axis=np.int64(1), weight=np.float32(2), batch_axis=np.int64(0))(X, Y)
    puzzlelib.KLDivergence(maxlabels=np.int64(2))(X.astype("f4"), Y.astype("f4"))
    with pytest.raises(TypeError, match="temperature must be a number"):
        klcore.kl_div(X, Y, space="logits", temperature="2")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="axis"):
        klcore.kl_div(X, Y, axis=1.0)  # type: ignore[call-overload]


def wrapper(return_grad: words.ReturnGrad | None, **options: Unpack[words.Options]) -> Any:
    """As a user would write one."""
    return klcore.kl_div(X, Y, return_grad=return_grad, **options)


def test_a_wrapper() -> None:
    assert len(wrapper(("x", "y"), reduction="sum")) == 3
    assert np.isscalar(wrapper(None, reduction="sum"))
    with pytest.raises(ValueError, match="reduction must be one of"):
        wrapper("x", reduction="rows")  # type: ignore[arg-type]


def test_unknown_words() -> None:
    refused = pytest.raises(ValueError, match=r"must be one of|device must be")
    with refused:
        klcore.kl_div(X, Y, reduction="rows")  # type: ignore[call-overload]
    with refused:
        klcore.rel_entr(X, Y, space="probabilities", return_grad="x")  # type: ignore[call-overload]
    with refused:
        klcore.cross_entropy(X, Y, space=("probs", "probs", "probs"))  # type: ignore[arg-type]
    with refused:
        klcore.kl_div(X, Y, return_grad="z")  # type: ignore[call-overload]
    with refused:
        klcore.kl_div(X, Y, return_grad=("y", "x"))  # type: ignore[arg-type]
    with refused:
        klcore.kl_div(X, Y, device=3)  # type: ignore[call-overload]
    with refused:
        klcore.entropy(X, return_grad="y")  # type: ignore[call-overload]
    with refused:
        klcore.entropy(X, space=("probs", "probs"))  # type: ignore[call-overload]


def test_unknown_arguments() -> None:
    with pytest.raises(TypeError):
        klcore.kl_div(X, Y, "probs")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        klcore.kl_div(X, Y, spaces="probs")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        klcore.entropy(X, Y)  # type: ignore[call-overload]


def test_configuration() -> None:
    assert_type(klcore.show_config("dicts"), dict[str, dict[str, Any]])
    assert_type(klcore.get_num_threads(), int)
    assert_type(klcore.list_backends(), dict[str, str])
    with klcore.threads(1) as nothing:
        assert_type(nothing, None)
    with pytest.raises(ValueError, match="mode must be"):
        klcore.show_config("json")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="number of threads"):
        klcore.set_num_threads(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="module must be"):
        klcore.register_backend("library", np)  # type: ignore[arg-type]


def test_estimates() -> None:
    assert_type(klcore.kl_estimate(X, Y, kind="k1", ratio=X, limit=2), "NumPy")
    assert_type(klcore.kl_estimate(X, Y, reduction="none", return_grad="x"), "tuple[NumPy, NumPy]")
    assert_type(klcore.kl_estimate(X, Y, reduction="mean"), Any)
    assert_type(klcore.kl_estimate(X, Y, reduction="sum", denominator=3, return_grad=("x", "y")), tuple[Any, Any, Any])
    assert_type(klcore.kl_estimate(0.5, 0.25), Any)

    def of_torch(x: "torch.Tensor", y: "torch.Tensor") -> "torch.Tensor":
        return klcore.kl_estimate(x, y, reduction="mean", weights=x)

    def of_any(x: words.ArrayT, y: words.ArrayT, **options: Unpack[words.EstimateOptions]) -> words.ArrayT:
        return klcore.kl_estimate(x, y, **options)

    assert callable(of_torch)
    assert of_any(X, Y, kind="k2").shape == X.shape
    with pytest.raises(ValueError, match="kind must be one of"):
        klcore.kl_estimate(X, Y, kind="k4")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="reduction must be one of"):
        klcore.kl_estimate(X, Y, reduction="row")  # type: ignore[call-overload]


# ---- klcore.compat ---------------------------------------------------------------------------------------------------

Pair = tuple[Any, tuple[Any, Any]]


def test_losses_of_other_systems() -> None:
    class Mine(pytorch.KLDivLoss): ...

    assert_type(Mine(reduction="sum"), Mine)
    assert_type(keras.KLDivergence(), keras.KLDivergence)
    assert_type(Mine(reduction="sum").value_and_grad(X, Y), Pair)
    assert_type(pytorch.kl_div.value_and_grad(X, Y, reduction="sum", cotangent=2.0), Pair)
    assert_type(rtorch.nnf_kl_div.value_and_grad(X, Y, "sum"), Pair)
    assert_type(keras.kld.value_and_grad(X, Y), Pair)
    assert_type(mxnet.KLDivLoss().value_and_grad(X, Y), tuple[Any, tuple[Any, ...]])
    assert_type(puzzlelib.KLDivergence().value_and_grad(X.astype("f4"), Y.astype("f4")), tuple[Any, tuple[Any]])
    assert_type(keras.kl_divergence(X, Y), Any)
    with pytest.raises(TypeError):
        pytorch.kl_div(X, Y, cotangent=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        keras.kld.value_and_grad(X)  # type: ignore[call-arg]


def test_losses_are_of_those_libraries() -> None:
    """Modules to type checkers, wherever PyTorch's types are; when it runs: test_compat_pytorch.py."""

    def model() -> "torch.nn.Sequential":
        loss: torch.nn.Module = pytorch.KLDivLoss(reduction="batchmean")
        original: torch.nn.KLDivLoss = pytorch.KLDivLoss(log_target=True)
        both = torch.nn.Sequential(torch.nn.LogSoftmax(-1), loss)
        both.add_module("loss", original)
        return both

    class Mine(pytorch.KLDivLoss):
        def forward(self, input: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
            return input

    assert_type(Mine().reduction, str)
    assert callable(model)
    assert pytorch.KLDivLoss.__mro__[1:] == (object,)
    with pytest.raises(TypeError):
        pytorch.KLDivLoss(reductions="sum")  # type: ignore[call-arg]


def test_losses_between_language_models() -> None:
    """Where there is no PyTorch they cannot be imported: nothing runs here."""

    def distil(student: "torch.Tensor", teacher: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        from klcore.compat import liger, trl

        loss: torch.nn.Module = liger.LigerJSD(beta=0.1)
        original: torch.nn.KLDivLoss = liger.LigerKLDIVLoss(reduction="batchmean")
        assert_type(liger.liger_tvd(student, teacher, labels, "sum"), torch.Tensor)
        liger.liger_jsd(X, Y)  # type: ignore[arg-type]
        return trl.generalized_jsd_loss(student, teacher, labels) + loss(student, teacher) + original(student, teacher)

    assert callable(distil)


# ---- the words -------------------------------------------------------------------------------------------------------


def test_words_are_those_of_rows() -> None:
    assert get_args(words.Space) == tuple(options.SPACES)
    assert get_args(words.Reduction) == options.REDUCTIONS
    assert get_args(words.Tail) == tuple(options.TAILS)
    one, two = (get_args(get_args(words.ReturnGrad)[k]) for k in (0, 2))
    assert {*one, *((name,) for name in one), ("x", "y"), None} == options.GRADIENTS.keys()
    assert [get_args(name) for name in two] == [("x",), ("y",)]


def test_words_of_estimates() -> None:
    assert get_args(words.Estimator) == tuple(ESTIMATORS)
    assert {"none", *get_args(words.EstimateTotal)} == {*get_args(words.EstimateReduction)}
    signature = inspect.signature(klcore.kl_estimate)
    keywords = {p.name for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY}
    assert words.EstimateOptions.__annotations__.keys() | {"return_grad"} == keywords


@pytest.mark.parametrize("name", OPERATIONS)
def test_options_are_the_keywords(name: str) -> None:
    row = OPERATIONS[name]
    plain = "Listed" if row.takes_indices else "Entropy" if row.single else ""
    own = row.parameters[0].capitalize() if row.parameters else plain
    options = getattr(words, f"{own}Options")
    assert is_typeddict(options)
    keywords = [
        p.name for p in inspect.signature(getattr(klcore, name)).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    assert options.__annotations__.keys() | {"return_grad"} == set(keywords)
