"""klcore.compat.keras on Keras' backend TensorFlow: by `make test-tensorflow`, in a process without another backend."""

import importlib
import os
import sys
import warnings

import numpy as np
import pytest
from golden import check, values
from test_compat_keras import keras_call

import klcore
from klcore.compat import keras as ours
from klcore.operations import OPERATIONS

if os.environ.get("KERAS_BACKEND") != "tensorflow":
    pytest.skip("not run: make test-tensorflow does, with KERAS_BACKEND=tensorflow", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of the imports are not ours
    tf, keras = map(importlib.import_module, ("tensorflow", "keras"))  # asked for: it fails without

# TensorFlow's own, where it makes NumPy arrays of bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

RNG = np.random.default_rng(0)
TRUTH, GUESS = (RNG.dirichlet(np.ones(4), (3, 5)).astype("float32") for _ in range(2))
DTYPES = ("float64", "float32", "float16", "bfloat16")


def gradients(function, *tensors, cotangent=None):
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return value, *tape.gradient(value, tensors, output_gradients=cotangent)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", values("keras"), ids=repr)
def test_golden(case, compared):
    """What Keras returned, values and derivatives."""
    function = keras_call(case)
    weight = (tf.constant(case["sample_weight"]),) if "sample_weight" in case.names else ()

    def call(y_true, y_pred):
        if case.family == "mask":
            keras.src.backend.set_keras_mask(y_pred, tf.constant(case["mask"]))
        return function(y_true, y_pred, *weight)

    tensors = [tf.cast(case[name], case.dtype(name)) for name in ("y_true", "y_pred")]
    ours.set_epsilon(case.params.get("epsilon", 1e-7))
    try:
        cotangent = tf.cast(case["grad_out"], case.dtype("out")) if "grad_out" in case.names else None
        value, *derivatives = gradients(call, *tensors, cotangent=cotangent)
    finally:
        ours.set_epsilon(1e-7)
    assert value.dtype.name == case.dtype("out")
    check(value.numpy(), case["out"], case.dtype("out"), compared, "keras")
    for name, derivative in zip(("y_true", "y_pred"), derivatives, strict=True):
        if cotangent is not None:
            expected = case[f"grad_{name}"]
            if case.family == "half":  # deviation: t/p, formed in float16, overflows there; in float32 here
                expected = np.where(np.isfinite(expected), expected, derivative)
            check(derivative.numpy(), expected, case.dtype(name), compared, "keras")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_numpy(dtype):
    tensors = [tf.cast(a, dtype) for a in (TRUTH, GUESS)]
    value, *derivatives = gradients(ours.kl_divergence, *tensors)
    expected = ours.kl_divergence.value_and_grad(*(a.numpy() for a in tensors))
    for found, numbers in zip((value, *derivatives), (expected[0], *expected[1]), strict=True):
        assert found.dtype.name == dtype
        assert found.numpy().tobytes() == numbers.tobytes()


@pytest.mark.parametrize("loss", [ours.kl_divergence, ours.KLDivergence(), ours.KLDivergence("none")])
@pytest.mark.parametrize("shape", [(3, 5, 4), (None, None, 4), (None, None, None)])
def test_graphs_have_the_bits_of_eager_mode(loss, shape):
    """Also where sizes are not known when the graph is made."""
    signature = [tf.TensorSpec(shape)] * 2
    graph = tf.function(lambda t, p: gradients(loss, t, p), input_signature=signature)
    for found, expected in zip(graph(TRUTH, GUESS), gradients(loss, *map(tf.constant, (TRUTH, GUESS))), strict=True):
        np.testing.assert_array_equal(found, expected)
    value, *derivatives = graph.get_concrete_function().structured_outputs
    rank = 0 if loss is not ours.kl_divergence and loss.reduction != "none" else 2
    assert value.shape.as_list() == list(shape[:rank])
    assert [d.shape.as_list() for d in derivatives] == [list(shape)] * 2


@pytest.mark.parametrize(
    ("t", "p"), [((1, 5, 4), (3, 5, 4)), ((4,), (3, 5, 4)), ((3, 5, 1), (3, 5, 4)), ((0, 4), (0, 4))]
)
def test_broadcasting(t, p):
    inputs = [np.full(shape, 0.3, "float32") for shape in (t, p)]
    expected_value, expected = ours.kl_divergence.value_and_grad(*inputs)
    value, *derivatives = tf.function(lambda *a: gradients(ours.kl_divergence, *a))(*map(tf.constant, inputs))
    for found, numbers in zip((value, *derivatives), (expected_value, *expected), strict=True):
        np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize("weight", [None, 2.0, np.linspace(0, 1, 15, dtype="float32").reshape(3, 5)])
@pytest.mark.parametrize("reduction", ["mean", "mean_with_sample_weight", "sum", "none"])
def test_reductions(reduction, weight):
    value = ours.KLDivergence(reduction)(tf.constant(TRUTH), GUESS, weight)
    expected = keras.losses.KLDivergence(reduction)(TRUTH, GUESS, weight)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_either_may_be_numpys():
    expected = ours.kl_divergence(TRUTH, GUESS)
    for pair in ((tf.constant(TRUTH), GUESS), (TRUTH, tf.Variable(GUESS)), (TRUTH.tolist(), keras.Variable(GUESS))):
        found = ours.kl_divergence(*pair)
        assert tf.is_tensor(found)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(ours.KLDivergence()(TRUTH, GUESS, tf.ones((3, 5))), expected.mean(), rtol=1e-6)


# ---- training --------------------------------------------------------------------------------------------------------

X = RNG.normal(size=(30, 6)).astype("float32")  # batches of 8: the last has 6
Y = RNG.dirichlet(np.ones(4), 30).astype("float32")
WEIGHT = RNG.uniform(0.5, 2, 30).astype("float32")


def batches():
    return tf.data.Dataset.from_tensor_slices((X, Y, WEIGHT)).batch(8)


WAYS = {
    "arrays": {"x": X, "y": Y, "batch_size": 8},
    "sample weights": {"x": X, "y": Y, "sample_weight": WEIGHT, "batch_size": 8},
    "class weights": {"x": X, "y": np.eye(4, dtype="float32")[Y.argmax(-1)], "class_weight": {0: 2, 1: 1, 2: 3, 3: 1}},
    "tf.data": {"x": batches()},
}


def train(loss, metric, way, compiled, classes=None):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(4, "softmax")]
    if classes is not None:
        layers = [keras.Input((3, 6)), keras.layers.Masking(), *map(keras.layers.TimeDistributed, layers)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=[metric], weighted_metrics=[], **compiled)
    history = model.fit(**way, epochs=2, verbose=0, shuffle=False).history
    found = model.evaluate(way["x"], way.get("y"), verbose=0)
    return [*map(np.ravel, (*model.get_weights(), *history.values(), found))]


@pytest.mark.parametrize(
    ("way", "compiled"),
    [
        ("arrays", {"run_eagerly": True}),
        ("sample weights", {}),
        ("class weights", {}),
        ("tf.data", {"steps_per_execution": 2}),
    ],
)
def test_training_goes_where_that_of_keras_goes(way, compiled):
    theirs = train(keras.losses.KLDivergence(), keras.metrics.KLDivergence(), WAYS[way], compiled)
    for loss in (ours.KLDivergence(), ours.kullback_leibler_divergence):
        found = train(loss, ours.KLDivergenceMetric(), WAYS[way], compiled)
        for a, b in zip(found, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_masks():
    steps = np.where(RNG.random((10, 3, 1)) < 0.3, 0, X.reshape(10, 3, 6))
    way = {"x": steps, "y": Y[:30].reshape(10, 3, 4), "batch_size": 4}
    theirs = train(keras.losses.KLDivergence(), keras.metrics.KLDivergence(), way, {}, classes=4)
    for a, b in zip(train(ours.KLDivergence(), ours.KLDivergenceMetric(), way, {}, classes=4), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_policies(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        theirs = train(keras.losses.KLDivergence(), keras.metrics.KLDivergence(), WAYS["sample weights"], {})
        found = train(ours.KLDivergence(), ours.KLDivergenceMetric(), WAYS["sample weights"], {})
    finally:
        keras.config.set_dtype_policy(before)
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2 if "mixed" in policy else 1e-6, atol=1e-3)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_xla_is_refused_by_name():
    words = r"klcore.compat.keras cannot be compiled by XLA; pass jit_compile=False to model.compile"
    with pytest.raises(NotImplementedError, match=words):
        train(ours.KLDivergence(), ours.KLDivergenceMetric(), WAYS["arrays"], {"jit_compile": True})
    with pytest.raises(NotImplementedError, match=words):
        tf.function(tf.function(ours.kl_divergence), jit_compile=True)(TRUTH, GUESS)


@pytest.mark.parametrize("mode", [tf.function, lambda function: function], ids=["graph", "eager"])
def test_second_derivatives_are_refused_by_name(mode):
    def first(t, p):
        return gradients(ours.kl_divergence, t, p)[2]

    with pytest.raises(NotImplementedError, match=r"klcore.compat.keras has first derivatives .* only"):
        mode(lambda t, p: gradients(first, t, p))(tf.constant(TRUTH), tf.constant(GUESS))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"must be equal or broadcast, found \(3, 5, 4\) and \(2, 5, 4\)"):
        ours.kl_divergence(tf.constant(TRUTH), tf.constant(GUESS[:2]))
    graph = tf.function(ours.kl_divergence, input_signature=[tf.TensorSpec((None, 5, 4))] * 2)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"found \(3, 5, 4\) and \(2, 5, 4\)"):
        graph(TRUTH, GUESS[:2])
    with pytest.raises(ValueError, match="must have a class axis"):
        ours.kl_divergence(tf.constant(0.5), tf.constant(GUESS))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (tf.ragged.constant([[0.5, 0.5], [1.0]]), "RaggedTensor.*to_tensor"),
        (tf.sparse.from_dense(TRUTH), "SparseTensor.*tf.sparse.to_dense"),
        (tf.cast(TRUTH, "complex64"), "must be real, found complex64"),
    ],
)
def test_other_tensors(tensor, words):
    with pytest.raises(TypeError, match=words):
        ours.kl_divergence(tensor, tf.constant(GUESS))


def test_another_library_beside():
    torch = pytest.importorskip("torch", reason="not run: PyTorch is not installed")
    with pytest.raises(TypeError, match="one library, found a TensorFlow tensor and an array of torch"):
        ours.kl_divergence(torch.tensor(TRUTH), tf.constant(GUESS))


def test_gradients_are_the_tapes():
    for function in (ours.kl_divergence, ours.KLDivergence()):
        with pytest.raises(TypeError, match=r"tensorflow.GradientTape, or pass tensor.numpy\(\)"):
            function.value_and_grad(tf.constant(TRUTH), GUESS)


def test_instances_made_without_keras(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras")
    for call in (ours.KLDivergence(), ours.KLDivergenceMetric()):
        with pytest.raises(TypeError, match=f"this {type(call).__name__} cannot take .* import Keras before you"):
            call(tf.constant(TRUTH), tf.constant(GUESS))
    np.testing.assert_array_equal(ours.kl_divergence(tf.constant(TRUTH), GUESS), ours.kl_divergence(TRUTH, GUESS))


PLACES = {
    "x": lambda call, t: call(t),
    "a variable": lambda call, t: call(tf.Variable(t)),
    "a variable of Keras'": lambda call, t: call(keras.Variable(t)),
    "in a graph": lambda call, t: tf.function(call)(t),
    "in a list": lambda call, t: call([t[0], t[1]]),
    "weights": lambda call, t: call(GUESS[0], weights=t[0]),
}


@pytest.mark.parametrize(
    ("operation", "place"), [*((o, "x") for o in (*OPERATIONS, "kl_estimate")), *(("kl_div", p) for p in PLACES)]
)
def test_public_functions_say_what_to_do(operation, place):
    """Not a silent NumPy array, without a gradient."""
    row = OPERATIONS.get(operation)
    single = row is not None and row.single
    needed = {} if row is None else row.needed

    def call(x, **keywords):
        return getattr(klcore, operation)(x, *(() if single else (GUESS[0],)), **needed, **keywords)

    with pytest.raises(TypeError, match=r"TensorFlow: train with the losses of klcore.compat.keras, or .* numpy\(\)"):
        PLACES[place](call, tf.constant(TRUTH[0]))


def test_tensors_beside_other_libraries():
    for call in (lambda t: klcore.kl_div(GUESS, t), lambda t: klcore.Summary.of(t)):
        with pytest.raises(TypeError, match=r"TensorFlow: train with the losses of klcore.compat.keras"):
            call(tf.constant(TRUTH))
