"""klcore.compat.mxnet: compared with what MXNet 1.6 and 1.9 returned (golden.py), and behaviour."""

import numpy as np
import oracle
import pytest
from golden import F32, HALF, LOG_PROBS, LOGITS, PROBS, RNG, check_error, each, run, runs

from klcore.compat import mxnet

# ---- values ----------------------------------------------------------------------------------------------------------


def mxnet_loss(case):
    words = {k: case.params[k] for k in ("from_logits", "axis", "batch_axis", "weight") if k in case.params}
    if case.id.endswith("weighted_raw"):
        assert case.params["from_logits"] is False
    return mxnet.KLDivLoss(**words, nonbatch=case.params["reduction_over_nonbatch"])


@runs("mxnet", "mxnet_1.9")
def test_mxnet(arrays, case, compared):
    inputs = [n for n in ("pred", "label", "sample_weight") if n in case.names]
    raw = not case.params.get("from_logits", True) and case.dtype("out") == "float32"
    loose = oracle.TOLERANCES["golden softmax", "float32"] if raw else None
    run(mxnet_loss(case), case, arrays, compared, inputs, loose)


@each("broadcast", "mxnet", "mxnet_1.9")
def test_mxnet_deviation_shapes_must_match(case):
    """It broadcasts where it is not hybridized, and only there."""
    with pytest.raises(ValueError, match="the same shape"):
        mxnet_loss(case)(case["pred"], case["label"])


ERRORS = {
    "weight_str": lambda: mxnet.KLDivLoss(weight="2")(HALF, HALF),
    "size_mismatch": lambda: mxnet.KLDivLoss()(HALF, HALF.reshape(6)),
    "dtype_mismatch": lambda: mxnet.KLDivLoss()(HALF, HALF.astype(F32)),
    "kw_sample_weight": lambda: mxnet.KLDivLoss()(HALF, HALF, sample_weight=np.ones((2, 1))),
    "unknown_kw": lambda: mxnet.KLDivLoss(epsilon=1),
    # deviation: NumPy arrays are taken
    "numpy": lambda: mxnet.KLDivLoss()(HALF, HALF),
}


@each("error", "mxnet", "mxnet_1.9")
def test_errors(case, compared):
    classes = {"size_mismatch": ValueError, "dtype_mismatch": TypeError}
    check_error(case, ERRORS, compared, classes, taken=("numpy",))


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_mxnet_repr_and_words():
    assert repr(mxnet.KLDivLoss(weight=2.0, batch_axis=1)) == "KLDivLoss(batch_axis=1, w=2.0)"
    with pytest.raises(ValueError, match="nonbatch must be"):
        mxnet.KLDivLoss(nonbatch="max")
    with pytest.raises(TypeError):
        mxnet.KLDivLoss()(LOG_PROBS, label=PROBS)


@pytest.mark.parametrize(
    ("words", "arguments", "error", "message"),
    [
        ({}, (LOG_PROBS.tolist(), PROBS), TypeError, "pred must be an array"),
        ({}, (LOG_PROBS.astype(int), PROBS.astype(int)), TypeError, "must have dtype float16"),
        ({}, (np.array(-1.0), np.array(0.5)), ValueError, "batch axis"),
        ({"batch_axis": 3}, (LOG_PROBS, PROBS), ValueError, "batch_axis must be in"),
        ({"batch_axis": None}, (LOG_PROBS, PROBS), TypeError, "batch_axis must be an integer"),
        ({"batch_axis": (0, 1)}, (LOG_PROBS, PROBS), TypeError, "batch_axis must be an integer"),
        ({"from_logits": 0, "axis": -4}, (LOG_PROBS, PROBS), ValueError, "axis must be in"),
        ({}, (LOG_PROBS, PROBS, np.ones(4)), ValueError, "must be equal or broadcast"),
        ({"weight": "1"}, (LOG_PROBS, PROBS), AssertionError, "weight must be a number"),
    ],
)
def test_mxnet_refuses(words, arguments, error, message):
    with pytest.raises(error, match=message):
        mxnet.KLDivLoss(**words)(*arguments)


def test_mxnet_empty():
    assert mxnet.KLDivLoss()(np.ones((0, 3)), np.ones((0, 3))).shape == (0,)
    np.testing.assert_array_equal(mxnet.KLDivLoss()(np.ones((2, 0)), np.ones((2, 0))), [np.nan] * 2)
    np.testing.assert_array_equal(mxnet.KLDivLoss(nonbatch="sum")(np.ones((2, 0)), np.ones((2, 0))), [0.0] * 2)


@pytest.mark.parametrize("weight", [2, 0.5, True, np.float32(2), -1.5, 0, 0.0, np.nan])
@pytest.mark.parametrize("from_logits", [True, False])
def test_mxnet_weight_multiplies(weight, from_logits):
    plain, weighted = (mxnet.KLDivLoss(from_logits, weight=w) for w in (None, weight))
    for a, b in zip(plain.value_and_grad(LOGITS, PROBS), weighted.value_and_grad(LOGITS, PROBS), strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a) * float(weight), rtol=1e-14)


def test_mxnet_weight_of_zero_keeps_nan():
    pred = np.array([[-np.inf, 0.0], [-1.0, -1.0]])
    label = np.array([[1.0, 0.0], [0.5, 0.5]])
    np.testing.assert_array_equal(mxnet.KLDivLoss(weight=0.0)(pred, label), [np.nan, 0.0])
    np.testing.assert_array_equal(mxnet.KLDivLoss()(pred, label, np.array([[0.0], [0.0]])), [np.nan, 0.0])


@pytest.mark.parametrize(
    ("words", "shape"),
    [({}, (4, 1, 1)), ({"batch_axis": 1}, (1, 3, 1)), ({}, (1,)), ({"from_logits": False}, (4, 1, 1)), ({}, None)],
)
def test_mxnet_needs_no_array_of_terms(words, shape, monkeypatch):
    """Where one weight holds for a sample."""
    calls = []
    engine = mxnet.loss
    monkeypatch.setattr(mxnet, "loss", lambda *a, **k: calls.append(k["reduction"]) or engine(*a, **k))
    loss = mxnet.KLDivLoss(**words)
    weights = () if shape is None else (RNG.uniform(size=shape),)
    value = loss(LOGITS, PROBS, *weights)
    assert calls == ["row"]
    if shape is not None:
        np.testing.assert_allclose(value, loss(LOGITS, PROBS, np.broadcast_to(weights[0], PROBS.shape)), rtol=1e-13)
        assert calls[1:] == ["none"]
