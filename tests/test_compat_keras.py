"""klcore.compat.keras: compared with what Keras 3 and 2 returned (golden.py), and behaviour."""

import copy
import importlib.util
import math
import pickle

import numpy as np
import pytest
from conftest import DTYPES
from golden import F32, F64, HALF, LOG_PROBS, PROBS, RNG, SHORT, check, check_error, each, run, runs

from klcore.compat import keras as of_keras

pytestmark = pytest.mark.usefixtures("without_keras")

# ---- values ----------------------------------------------------------------------------------------------------------


class Masked(np.ndarray):
    """An array that Keras's mask can be attached to."""


def keras_call(case):
    """A callable of the arrays for a case, or None where Keras 2 and 3 differ."""
    reduction = case.params.get("reduction", "function")
    if reduction == "function":
        return of_keras.kullback_leibler_divergence
    dtype = SHORT.get(case.params.get("dtype"))
    return of_keras.KLDivergence(reduction=reduction, dtype=dtype)


@runs("keras")
def test_keras(arrays, case, compared):
    inner = keras_call(case)
    weight = (arrays.put(case["sample_weight"]),) if "sample_weight" in case.names else ()

    def function(y_true, y_pred):
        if case.family == "mask":
            y_pred = y_pred.view(Masked) if arrays.name == "cpu" else y_pred
            y_pred._keras_mask = arrays.put(case["mask"])
        return inner(y_true, y_pred, *weight)

    function.value_and_grad = lambda *a, cotangent: inner.value_and_grad(*a, *weight, cotangent=cotangent)
    of_keras.set_epsilon(case.params.get("epsilon", 1e-7))
    try:
        run(function, case, arrays, compared, ("y_true", "y_pred"))
    finally:
        of_keras.set_epsilon(1e-7)


# deviation: Keras 2 weighs the first axis of the values where ours, as Keras 3, weighs the last. A (batch, 1) weight of
# a vector of values makes a column in Keras 3, a vector in Keras 2. The other cases agree.
KERAS_2_DIFFERS = ("2x3x4_w2/", "4x4x3_w4/")


@runs("keras_2")
def test_keras_2(arrays, case, compared):
    function = keras_call(case)
    inputs = [arrays.put(case[name]) for name in ("y_true", "y_pred")]
    if "sample_weight" in case.names:
        weight = arrays.put(case["sample_weight"])
        if any(shape in case.id for shape in KERAS_2_DIFFERS):
            if "2x3x4_w2/" in case.id:  # does not fit the last axis
                with pytest.raises(ValueError, match="must be equal or broadcast"):
                    function(*inputs, weight)
            else:  # fits both
                assert not np.allclose(arrays.get(function(*inputs, weight)), case["out"], rtol=1e-4)
            weight = weight[:, None]  # what says it in Keras 3
        value = function(*inputs, weight)
        if case.params["reduction"] == "none" and "4x5_w4x1" in case.id:
            value = value.reshape(-1)
        check(arrays.get(value), case["out"], case.dtype("out"), compared, "keras_2")
    else:
        run(function, case, arrays, compared, ("y_true", "y_pred"))


def check_metric(case, put, compared):
    metric = of_keras.KLDivergenceMetric()
    for k, (result, total, count) in enumerate(case["results"]):
        names = [n for n in (f"y_true_{k}", f"y_pred_{k}", f"sample_weight_{k}") if n in case.names]
        metric.update_state(*(put(case[n]) for n in names))
        for found, expected in ((metric.result(), result), (metric.total, total), (metric.count, count)):
            check(np.float64(float(found)), expected, "float32", compared, "keras")
    metric.reset_state()
    assert float(metric.result()) == 0.0


@each("metric", "keras")
def test_keras_metric(case, compared):
    check_metric(case, np.asarray, compared)


@each("metric", "keras")
def test_keras_metric_is_one_of_keras(case, compared, keras):
    metric = of_keras.KLDivergenceMetric(name="kl")
    assert isinstance(metric, keras.metrics.Metric)
    assert isinstance(metric, of_keras.KLDivergenceMetric)
    assert metric.name == "kl"
    check_metric(case, np.asarray, compared)


ERRORS = {
    # deviation: Keras looks metrics up by name, and not by this one; here `kld` is a function, and there is no look-up
    "metric_get_kld": lambda: of_keras.kld(HALF, HALF),
    "shape": lambda: of_keras.kld(np.ones((2, 3)), np.ones((2, 4))),
    "shape_rank": lambda: of_keras.kld(np.ones((2, 3, 1)), np.ones((2, 3))),
    "0d": lambda: of_keras.kld(np.float64(0.5), np.array(0.5)),
}


@each("error", "keras")
def test_errors(case, compared):
    classes = dict.fromkeys(("shape", "shape_rank", "0d"), ValueError)
    check_error(case, ERRORS, compared, classes, taken=("metric_get_kld",))


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_keras_names():
    """The names are what Keras writes into its logs."""
    assert of_keras.kl_divergence is of_keras.KLD is of_keras.kld
    assert of_keras.kl_divergence.__name__ == "kl_divergence"
    assert of_keras.kullback_leibler_divergence.__name__ == "kullback_leibler_divergence"
    for name in of_keras.__all__:  # where pickles and saved models look for them
        public = getattr(of_keras, name)
        assert public.__module__ == "klcore.compat.keras"
        assert pickle.loads(pickle.dumps(public)) is public
    np.testing.assert_array_equal(of_keras.kld(PROBS, PROBS), of_keras.kullback_leibler_divergence(PROBS, PROBS))


@pytest.mark.parametrize("loaded", [False, True])
def test_keras_epsilon(loaded, request):
    keras = request.getfixturevalue("keras") if loaded else None
    assert of_keras.epsilon() == 1e-7
    y_true, y_pred = np.array([1.0]), np.array([0.0])
    before = of_keras.kld(y_true, y_pred)
    of_keras.set_epsilon(1e-3)
    try:
        assert of_keras.epsilon() == 1e-3
        assert not loaded or keras.config.epsilon() == 1e-3
        assert of_keras.kld(y_true, y_pred) == pytest.approx(-math.log(1e-3))
    finally:
        of_keras.set_epsilon(1e-7)
    assert before == pytest.approx(-math.log(1e-7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keras_epsilon_is_rounded(dtype):
    """To the dtype: what is clipped equals the bound, and so contributes nothing."""
    bound = np.array([1e-7]).astype(DTYPES[dtype])
    assert of_keras.kld(bound, np.zeros_like(bound)) == 0
    _, (d_true, d_pred) = of_keras.kld.value_and_grad(bound, bound)
    assert (d_true, d_pred) == (1, -1)  # the bound is inside


@pytest.mark.parametrize(
    ("y_true", "y_pred", "dtype"),
    [
        ([[0, 1]], np.array([[0.25, 0.75]]), F64),
        (np.array([[False, True]]), np.array([[0.25, 0.75]], F32), F32),
        (np.array([[0.0, 1.0]]), np.array([[0.25, 0.75]], np.float16), np.float16),
        ([[0.0, 1.0]], [[0.25, 0.75]], F32),
    ],
)
def test_keras_function_dtypes(y_true, y_pred, dtype):
    value, (d_true, _) = of_keras.kld.value_and_grad(y_true, y_pred)
    assert value.dtype == dtype
    assert value == pytest.approx([-math.log(0.75)], rel=1e-3)
    assert d_true.shape == (1, 2)


def test_keras_integer_predictions_are_floats():
    np.testing.assert_allclose(of_keras.kld(np.array([[0, 1]]), np.array([[0, 1]])), 0, atol=1e-6)
    with pytest.raises(TypeError, match="must be real"):
        of_keras.kld(PROBS, PROBS * 1j)


def test_keras_class_casts():
    assert of_keras.KLDivergence()(PROBS, PROBS).dtype == F32
    assert of_keras.KLDivergence(dtype="float64")(PROBS.astype(F32), PROBS).dtype == F64
    with pytest.raises(ValueError, match="dtype must be one of"):
        of_keras.KLDivergence(dtype="int32")


@pytest.mark.parametrize("reduction", ["auto", "batchmean", "SUM", 1])
def test_keras_unknown_reductions(reduction):
    with pytest.raises(ValueError, match="reduction must be one of"):
        of_keras.KLDivergence(reduction=reduction)


def test_keras_weights_that_do_not_fit():
    loss = of_keras.KLDivergence()
    for shape in ((2,), (4, 5), (3, 4)):
        with pytest.raises(ValueError, match="must be equal or broadcast"):
            loss(PROBS, PROBS, np.ones(shape))


def test_keras_weight_of_zero():
    """The value is the original's; the gradient of a row that does not count is 0."""
    y_pred = PROBS[0].copy()
    y_pred[1] = np.nan
    weight = np.array([1.0, 0.0, 1.0])
    loss = of_keras.KLDivergence("none", dtype="float64")
    value, (_, d_pred) = loss.value_and_grad(PROBS[0], y_pred, weight)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    np.testing.assert_array_equal(d_pred[1], 0)
    assert of_keras.KLDivergence("mean_with_sample_weight")(PROBS[0], PROBS[0], np.zeros(3)) == 0


@pytest.mark.parametrize("loaded", [False, True])
def test_keras_config(loaded, request):
    keras = request.getfixturevalue("keras") if loaded else None
    loss = of_keras.KLDivergence("sum", name="kl", dtype="float64")
    assert loss.get_config() == {"name": "kl", "reduction": "sum"}
    for other in (
        of_keras.KLDivergence.from_config(loss.get_config()),
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
    ):
        assert isinstance(other, of_keras.KLDivergence)
        assert other.get_config() == loss.get_config()
        assert not loaded or isinstance(other, keras.losses.Loss)
    assert pickle.loads(pickle.dumps(loss)).dtype == "float64"
    metric = of_keras.KLDivergenceMetric("kl")
    assert metric.get_config() == {"name": "kl", "dtype": "float32"}
    assert of_keras.KLDivergenceMetric.from_config(metric.get_config()).name == "kl"
    if loaded:
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(loss), custom_objects={"KLDivergence": of_keras.KLDivergence}
        )
        assert isinstance(again, of_keras.KLDivergence)
        assert again.get_config() == loss.get_config()


def test_keras_policy():
    class Policy:
        compute_dtype = "float16"

    assert of_keras.KLDivergence(dtype=Policy())(PROBS, PROBS).dtype == np.float16


def needs(*libraries):
    """Skip a test whose own process would import what is not there."""
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"not run: {name} is not installed")


@pytest.mark.quick(1)
@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_keras_trains(python, backend):
    """A model that learns by our losses, as functions and as objects, ends where Keras's own takes it."""
    needs("keras", backend)
    code = """
import numpy as np, keras
from klcore.compat import keras as ours
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 6)).astype("float32"), rng.dirichlet(np.ones(4), 32).astype("float32")
weight = rng.uniform(0.5, 2, 32).astype("float32")

def train(loss, metric):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(4, "softmax")])
    model.compile(loss=loss, optimizer=keras.optimizers.SGD(0.1), metrics=[metric], weighted_metrics=[])
    history = model.fit(x, y, sample_weight=weight, batch_size=8, epochs=2, verbose=0, shuffle=False).history
    found = model.evaluate(x, y, verbose=0)
    return [w.tolist() for w in model.get_weights()], list(history.values()), found

class Subclass(ours.KLDivergence):
    def call(self, y_true, y_pred):
        return 0.5 * super().call(y_true, y_pred) + 0.5 * super().call(y_true, y_pred)

class Metric(ours.KLDivergenceMetric):
    pass

theirs = train(keras.losses.KLDivergence(), keras.metrics.KLDivergence())
for loss, metric in (
    (ours.kullback_leibler_divergence, ours.KLDivergenceMetric()), (ours.KLDivergence(), ours.KLDivergenceMetric()),
    (Subclass(), Metric()),
):
    mine = train(loss, metric)
    for a, b in zip(keras.tree.flatten(theirs), keras.tree.flatten(mine), strict=True):
        assert abs(a - b) <= 1e-5 * max(1, abs(a)), (loss, a, b)
total = train(ours.KLDivergence(reduction="sum"), ours.KLDivergenceMetric())
assert total[0] != mine[0]
print("trained")
"""
    assert python(code, KERAS_BACKEND=backend, warnings="ignore").strip().endswith("trained")


SAVED = """
import sys, keras, numpy as np
from klcore.compat import keras as ours
x = np.ones((4, 3), "float32")
for loss in (ours.KLDivergence("sum"), ours.kl_divergence, ours.kullback_leibler_divergence):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, "softmax")])
    model.compile(loss=loss, metrics=[ours.KLDivergenceMetric()])
    model.evaluate(x, x / 3, verbose=0)
    model.save(sys.argv[1])
    loaded = keras.models.load_model(sys.argv[1])
    assert type(loaded.loss) is type(loss) and "klcore" in type(loaded.loss).__module__ + str(loaded.loss.__module__)
    assert loaded.evaluate(x, x / 3, verbose=0) == model.evaluate(x, x / 3, verbose=0)
print("loaded")
"""


@pytest.mark.quick(1)
@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_keras_saved_models(python, tmp_path, backend):
    needs("keras", backend)
    code = SAVED.replace("sys.argv[1]", repr(str(tmp_path / "model.keras")))
    assert python(code, KERAS_BACKEND=backend, warnings="ignore").strip().endswith("loaded")


def test_keras_copies_of_metrics(keras):
    metric = of_keras.KLDivergenceMetric()
    metric.update_state(PROBS, np.exp(LOG_PROBS))
    for same in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert isinstance(same, keras.metrics.Metric)
        assert float(same.result()) == float(metric.result()) > 0


def test_keras_divisor_of_zero_hides_nan():
    loss = of_keras.KLDivergence("mean_with_sample_weight")
    assert loss(np.array([[np.nan, 1]]), np.array([[0.5, 0.5]]), np.zeros(1)) == 0


def test_keras_masks_of_tensors(keras):
    """As Keras attaches them in a model."""
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    if keras.config.backend() != "torch":
        pytest.skip(f"not run: Keras computes with {keras.config.backend()} here")
    y_true, y_pred = (torch.tensor(a, dtype=torch.float32) for a in (PROBS, np.exp(LOG_PROBS)))
    y_pred._keras_mask = torch.tensor(RNG.uniform(size=(4, 3)) < 0.5)
    for weight in (None, np.full((4, 3), 0.5, F32)):
        for reduction in ("sum_over_batch_size", "sum", "none"):
            expected = keras.losses.KLDivergence(reduction)(y_true, y_pred, weight)
            found = of_keras.KLDivergence(reduction)(PROBS, y_pred, weight)  # the truth as the data has it
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
