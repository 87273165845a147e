"""klcore.compat.puzzlelib: compared with what PuzzleLib returned (golden.py), and behaviour."""

import numpy as np
import pytest
from golden import CASES, F32, HALF, LOGITS, PROBS, check, check_error, each, ones, runs

from klcore.compat import puzzlelib

# ---- values ----------------------------------------------------------------------------------------------------------

# Its softmax underflows, or meets NaN and infinities as the one library does that it ran on. Ours: the divergence of
# the log-softmax, finite; and NaN in a row makes the row NaN. value, gradient:
PUZZLELIB_DIFFERS = {
    "edge_pred/1/soft": (798.9703, [[-0.8, 0.3, 0.5]]),
    "edge_pred/2/hot": (1000.6931, [[1, -0.5, -0.5]]),
    "edge_pred/4/soft": (np.nan, [[np.nan] * 3]),
    "edge_pred/4/hot": (np.nan, [[np.nan] * 3]),
    "edge_pred/6/soft": (78.97035, [[-0.8, 0.3, 0.5]]),
    "edge_pred/7/soft": (np.nan, [[np.nan] * 3]),
    "edge_pred/7/hot": (np.nan, [[np.nan] * 3]),
    "edge_norm_target/3": (0.0, [[np.nan] * 3]),
}


@runs("puzzlelib")
def test_puzzlelib(arrays, case, compared):
    cost = puzzlelib.KLDivergence(case.params.get("maxlabels"), case.params.get("normTarget", False))
    pred, target = arrays.put(case["pred"]), arrays.put(case["target"])
    expected = PUZZLELIB_DIFFERS.get(case.id, (case["error"], case["grad"]))
    error, grad = cost(pred, target)
    for found in (error, cost.validate(pred, target), cost.getMeanError(), cost.getError(), cost.getValError()):
        check(arrays.get(found), expected[0], "float32", compared, "puzzlelib")
    assert grad is cost.grad
    assert np.asarray(arrays.get(grad)).dtype == F32
    check(arrays.get(grad), expected[1], "float32", compared, "puzzlelib")
    again, (same,) = cost.value_and_grad(pred, target)
    np.testing.assert_array_equal(arrays.get(again), arrays.get(error))
    np.testing.assert_array_equal(arrays.get(same), arrays.get(grad))


@pytest.mark.parametrize("case", [c for c in CASES["puzzlelib"] if c.family == "maxlabels" and c.error], ids=repr)
def test_puzzlelib_maxlabels(case):
    with pytest.raises(AssertionError, match="maxlabels"):
        puzzlelib.KLDivergence(case.params["maxlabels"])(case["pred"], case["target"])


def test_puzzlelib_accumulates(compared):
    cost = puzzlelib.KLDivergence()
    for case in (c for c in CASES["puzzlelib"] if c.family == "accumulate"):
        error, _ = cost(case["pred"], case["target"])
        check(error, case["error"], "float32", compared, "puzzlelib")
        check(cost.getMeanError(), case["mean_error_after"], "float32", compared, "puzzlelib")
        assert (cost.batchsize, cost.numOfSamples) == (case.params["batchsize"], case.params["numOfSamples"])


ERRORS = {
    "batch_mismatch": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(3, 3)),
    "broadcast_batch": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(1, 3)),
    "shape_tail": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(4, 2)),
    "ndim": lambda: puzzlelib.KLDivergence()(ones(4, 3), ones(4, 3, 1)),
    "empty_batch": lambda: puzzlelib.KLDivergence()(ones(0, 3), ones(0, 3)),
    "pred_f64": lambda: puzzlelib.KLDivergence()(HALF, ones(2, 3)),
    "target_f64": lambda: puzzlelib.KLDivergence()(ones(2, 3), HALF),
    "target_f64_norm": lambda: puzzlelib.KLDivergence(normTarget=True)(ones(2, 3), HALF),
    "target_i32": lambda: puzzlelib.KLDivergence()(ones(2, 3), np.ones((2, 3), np.int32)),
    "list": lambda: puzzlelib.KLDivergence()([[0.5, 0.5]], ones(1, 2)),
}


@each("error", "puzzlelib")
def test_errors(case, compared):
    check_error(case, ERRORS, compared)


# ---- behaviour -------------------------------------------------------------------------------------------------------

SCORES, TARGETS = LOGITS.astype(F32), (PROBS / 3).astype(F32)


def test_puzzlelib_state():
    cost = puzzlelib.KLDivergence()
    with pytest.warns(RuntimeWarning, match="no batch yet"):
        assert np.isnan(cost.getError())
    with pytest.warns(RuntimeWarning, match="no batch yet"):
        assert np.isnan(cost.getMeanError())
    cost.validate(SCORES, TARGETS)
    assert (cost.error is None or np.isnan(cost.error), cost.grad, cost.batchsize) == (True, None, 0)
    grad = cost(SCORES, TARGETS, queryError=False)
    assert grad is cost.grad
    assert cost.dirty
    assert cost.getError() == pytest.approx(cost.valError, rel=1e-6)
    assert not cost.dirty
    first = cost.error
    error, _ = cost(SCORES[:1], TARGETS[:1])
    assert (cost.batchsize, cost.numOfSamples) == (1, 5)
    assert cost.getMeanError() == pytest.approx((4 * first + error) / 5, rel=1e-6)
    cost.resetAccumulator()
    assert (cost.accumErr, cost.batchsize, cost.numOfSamples) == (0, 0, 0)
    before = dict(vars(cost))
    cost.value_and_grad(SCORES, TARGETS)
    assert vars(cost) == before


def test_puzzlelib_softmax_spans_all_axes():
    for shape in ((4, 15), (4, 5, 3), (4, 3, 5, 1)):
        error, grad = puzzlelib.KLDivergence()(SCORES.reshape(shape), TARGETS.reshape(shape))
        assert grad.shape == shape
        assert error == pytest.approx(puzzlelib.KLDivergence()(SCORES, TARGETS)[0], rel=1e-6)


def test_puzzlelib_gradient_descends_where_targets_sum_to_one():
    _, (grad,) = puzzlelib.KLDivergence().value_and_grad(SCORES, TARGETS, cotangent=4.0)
    scores = LOGITS.reshape(4, 15)
    softmax = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(grad.reshape(4, 15), TARGETS.reshape(4, 15) - softmax, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "pred", "target", "error"),
    [
        ({"maxlabels": 3}, ones(4), ones(4), IndexError),
        ({}, np.float32(1), np.float32(1), IndexError),
        ({}, np.ones((2, 3), np.int32), ones(2, 3), TypeError),
        ({}, np.ones((2, 3), np.float16), ones(2, 3), KeyError),
        ({"normTarget": True}, ones(2, 3), np.ones((2, 3), np.int32), TypeError),
        ({}, ones(2, 3), [[1.0]], AttributeError),
    ],
)
def test_puzzlelib_refuses(words, pred, target, error):
    with pytest.raises(error):
        puzzlelib.KLDivergence(**words)(pred, target)


def test_puzzlelib_no_classes():
    error, grad = puzzlelib.KLDivergence()(ones(2, 0), ones(2, 0))
    assert error == 0
    assert grad.shape == (2, 0)
    assert puzzlelib.KLDivergence(maxlabels=0)(ones(2, 3), ones(2, 3))[1].shape == (2, 3)
