"""What type checkers see of the public functions, beside what they do.

`make lint` runs mypy over this file: every `assert_type` must hold, and every `type: ignore` must be needed, or it
fails. pytest runs the same lines: what the types promise comes back, and what they refuse raises.
"""

import inspect
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from typing_extensions import Unpack, assert_type, is_typeddict

import klcore
from klcore import typing as words
from klcore.backends import rows
from klcore.compat import keras, mxnet, puzzlelib, pytorch, rtorch

X, Y = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])


# ---- the public functions --------------------------------------------------------------------------------------------


def test_value() -> None:
    value = klcore.kl_div(X, Y, space="probs", axis=1, reduction="sum", weights=[2.0], temperature=1, device="cpu")
    assert_type(value, Any)
    assert np.isscalar(value)
    assert_type(klcore.rel_entr(X, Y, return_grad=None), Any)
    assert_type(klcore.cross_entropy(X, Y, space=("probs", "logits"), out=np.empty(1)), Any)
    assert_type(klcore.entropy(X, space="probs"), Any)


def test_one_gradient() -> None:
    assert_type(klcore.kl_div(X, Y, return_grad="x"), tuple[Any, Any])
    assert_type(klcore.rel_entr(X, Y, return_grad=("y",)), tuple[Any, Any])
    assert_type(klcore.cross_entropy(X, Y, return_grad="y", space="logits", temperature=2.0), tuple[Any, Any])
    assert_type(klcore.entropy(X, return_grad=("x",)), tuple[Any, Any])
    value, dx = klcore.entropy(X, return_grad="x")
    assert value.shape == (1,)
    assert dx.shape == X.shape
    with pytest.raises(ValueError, match="not enough values"):
        _value, _dx, _dy = klcore.kl_div(X, Y, return_grad="y")  # type: ignore[misc]


def test_two_gradients() -> None:
    assert_type(klcore.kl_div(X, Y, return_grad=("x", "y")), tuple[Any, Any, Any])
    assert_type(klcore.cross_entropy(X, Y, return_grad=("x", "y"), axis=-1), tuple[Any, Any, Any])
    value, dx, dy = klcore.rel_entr(X, Y, return_grad=("x", "y"))
    assert value.shape == (1,)
    assert dx.shape == dy.shape == X.shape
    with pytest.raises(ValueError, match="too many values"):
        _value, _dx = klcore.kl_div(X, Y, return_grad=("x", "y"))  # type: ignore[misc]


def wrapper(return_grad: words.ReturnGrad | None, **options: Unpack[words.Options]) -> Any:
    """As a user would write one."""
    result = klcore.kl_div(X, Y, return_grad=return_grad, **options)
    assert_type(result, Any)
    return result


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
    assert_type(klcore.backends(), dict[str, str])
    with klcore.threads(1) as nothing:
        assert_type(nothing, None)
    with pytest.raises(ValueError, match="mode must be"):
        klcore.show_config("json")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="number of threads"):
        klcore.set_num_threads(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="module must be"):
        klcore.register_backend("library", np)  # type: ignore[arg-type]


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


# ---- the words -------------------------------------------------------------------------------------------------------


def test_words_are_those_of_rows() -> None:
    assert get_args(words.Space) == tuple(rows.SPACES)
    assert get_args(words.Reduction) == rows.REDUCTIONS
    one, two = (get_args(get_args(words.ReturnGrad)[k]) for k in (0, 2))
    assert {*one, *((name,) for name in one), ("x", "y"), None} == rows.GRADIENTS.keys()
    assert [get_args(name) for name in two] == [("x",), ("y",)]


@pytest.mark.parametrize(
    ("name", "options"),
    [*product(("kl_div", "rel_entr", "cross_entropy"), [words.Options]), ("entropy", words.EntropyOptions)],
)
def test_options_are_the_keywords(name: str, options: Any) -> None:
    assert is_typeddict(options)
    keywords = [
        p.name for p in inspect.signature(getattr(klcore, name)).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    assert options.__annotations__.keys() | {"return_grad"} == set(keywords)
