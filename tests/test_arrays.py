"""Every kind of array that may be passed, and what is returned: shapes, strides, dtypes, out=, memory, and errors."""

import itertools
import sys

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import call, operands

import klcore
from klcore import operations

REDUCTIONS = ("row", "sum", "rowmean", "none", "batchmean", "mean")
PAIR = ("x", "y")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Those that the oracle knows; test_family.py covers the others.
OPERATIONS = {name: operations.OPERATIONS[name] for name in oracle.OPERATIONS}
OF_TWO = [name for name, o in OPERATIONS.items() if not o.single]


def numbers(shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).uniform(0.1, 1, size=shape).astype(dtype)


def gradients_of(operation):
    return OPERATIONS[operation].gradients


def terms(operation, x, y):
    """The terms of probabilities, and their derivatives with respect to x and y."""
    x, y = np.broadcast_arrays(x, y)
    true = oracle.fast(operation, x.reshape(-1, 1), y.reshape(-1, 1))
    return tuple(a.reshape(x.shape) for a in (true.terms, true.dx, true.dy))


def reduced(t, axis, reduction):
    """The value of a reduction, and the factor it puts on every term's derivative."""
    if t.ndim == 0:
        return t, 1.0
    row = t.sum(axis=axis)
    factor = {"rowmean": row.size, "batchmean": t.shape[0], "mean": t.size}.get(reduction, 1)
    if reduction == "none":
        return t, 1.0
    return (row if reduction == "row" else row.sum() / factor), 1 / factor


def summed_to(shape, a):
    """`a` summed over the axes along which an operand of that shape was broadcast."""
    a = a.sum(axis=tuple(range(a.ndim - len(shape))))
    return a.sum(axis=tuple(d for d in range(a.ndim) if shape[d] != a.shape[d]), keepdims=True)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


# ---- shapes ----------------------------------------------------------------------------------------------------------

SHAPES = ((), (1,), (5,), (3, 5), (3, 2, 5), (2, 3, 1, 4), (2, 1, 3, 2, 4))
AXES = [(shape, axis) for shape in SHAPES for axis in range(-max(1, len(shape)), max(1, len(shape)))]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "axis"), AXES)
def test_shape_and_axis(device, operation, reduction, shape, axis):
    x, y = numbers(shape, 1), numbers(shape, 2)
    t, *derivatives = terms(operation, x, y)
    expected, factor = reduced(t, axis, reduction)
    wanted = gradients_of(operation)
    value, *gradients = call(
        operation, device.put(x), device.put(y), axis=axis, reduction=reduction, return_grad=wanted
    )
    assert np.shape(value) == np.shape(expected)
    assert value.dtype == np.float64
    # NumPy returns a scalar, CuPy an array without dimensions
    assert type(value) is (np.float64 if device.numpy and not np.ndim(expected) else device.array_type())
    close(device.get(value), expected)
    for gradient, derivative in zip(gradients, derivatives, strict=False):
        assert type(gradient) is device.array_type()
        assert gradient.shape == shape
        close(device.get(gradient), derivative * factor)


BROADCAST = (
    ((3, 5), (5,), -1),
    ((3, 5), (1, 5), 1),
    ((1, 5), (3, 5), -1),
    ((5,), (2, 3, 5), -1),
    ((4, 1, 5), (3, 5), -1),
    ((4, 1, 5), (1, 3, 5), -1),
    ((4, 5, 1), (5, 3), -2),
    ((5, 1, 2), (5, 3, 1), 0),
    ((2, 1, 3, 1, 5), (4, 1, 2, 5), -1),
    ((1, 1, 5), (1, 5), -1),
)


@pytest.mark.parametrize("operation", OF_TWO)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("one", "other", "axis"), BROADCAST)
def test_broadcasting(device, operation, reduction, swap, one, other, axis):
    shapes = (other, one) if swap else (one, other)
    x, y = numbers(shapes[0], 1), numbers(shapes[1], 2)
    t, *derivatives = terms(operation, x, y)
    expected, factor = reduced(t, axis, reduction)
    value, *gradients = call(operation, device.put(x), device.put(y), axis=axis, reduction=reduction, return_grad=PAIR)
    close(device.get(value), expected)
    assert np.shape(value) == np.shape(expected)
    for gradient, derivative, shape in zip(gradients, derivatives, shapes, strict=True):
        assert gradient.shape == shape
        close(device.get(gradient), summed_to(shape, derivative * factor))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(6,), (3, 4, 6)])
@pytest.mark.parametrize("weights_shape", ["batch", "one", "scalar"])
def test_weights(device, operation, shape, weights_shape):
    x, y = numbers(shape, 1), numbers(shape, 2)
    batch = shape[:-1]
    w = numbers({"batch": batch, "one": (1,) * len(batch), "scalar": ()}[weights_shape], 3)
    t, *derivatives = terms(operation, x, y)
    row, weight = t.sum(axis=-1), np.broadcast_to(w, batch)
    for reduction, expected, factor in (
        ("row", row * weight, 1.0),
        ("sum", (row * weight).sum(), 1.0),
        ("rowmean", (row * weight).sum() / weight.sum(), 1 / weight.sum()),
        ("none", t * weight[..., None], 1.0),
        ("mean", (row * weight).sum() / t.size, 1 / t.size),
    ):
        value, *gradients = call(
            operation, device.put(x), device.put(y), weights=device.put(w), reduction=reduction,
            return_grad=gradients_of(operation),
        )  # fmt: skip
        close(device.get(value), expected)
        for gradient, derivative in zip(gradients, derivatives, strict=False):
            close(device.get(gradient), derivative * weight[..., None] * factor)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("space", "dtype"),
    [("probs", "float32"), ("probs", "float64"), ("logits", "float32"), (("probs", "logits"), "float32")],
)
def test_weights_of_any_size(device, space, dtype, reduction):
    """A common factor of the weights multiplies value and gradients; in a mean weighted by row it changes nothing. Also
    if float32 cannot hold the weights, or float64 their sum. A weight of 0 stays 0."""
    x, y = numbers((4, 8), 1, dtype), numbers((4, 8), 2, dtype)
    y[:, :2] *= 2.0**-20
    x[1] = y[1]
    x, y = device.put(x), device.put(y)
    w = np.array([5.0, 2, 0, 9])  # their sum is a power of two, like all denominators
    value = device.get(klcore.kl_div(x, y, space=space, reduction=reduction, weights=device.put(w)))
    units = [device.get(g) for g in klcore.kl_div(x, y, space=space, return_grad=PAIR)[1:]]
    denominator = {"rowmean": 16, "batchmean": 4, "mean": 32}.get(reduction, 1)
    for exponent in (-1074, -1030, -700, -400, -141, 0, 40, 131, 160, 450, 700, 1020):
        weights = np.ldexp(w, exponent)
        found = klcore.kl_div(x, y, space=space, reduction=reduction, weights=device.put(weights), return_grad=PAIR)
        factor = 1.0 if reduction == "rowmean" else np.ldexp(1.0, exponent)
        with np.errstate(over="ignore", under="ignore"):
            scale = (w / denominator * factor)[:, None]
            expected = [a.astype(dtype) for a in (value * np.float64(factor), *(u * scale for u in units))]
        for a, like in zip(found, expected, strict=True):
            about = np.finfo(dtype)
            np.testing.assert_allclose(
                device.get(a), like, rtol=2 * about.eps, atol=8 * about.smallest_subnormal, err_msg=f"2^{exponent}"
            )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("space", ["probs", "log_probs", "logits"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_of_weight_zero_are_not_read(device, operation, space, reduction):
    x, y = numbers((4, 6), 1), numbers((4, 6), 2)
    w = np.array([1.0, 0, 2, 0])
    dirty = x.copy(), y.copy()
    for a in dirty:
        a[1], a[3] = np.nan, -np.inf
    keywords = {"space": space, "weights": w, "reduction": reduction, "return_grad": gradients_of(operation)}
    clean_results = call(operation, device.put(x), device.put(y), **keywords)
    dirty_results = call(operation, *(device.put(a) for a in dirty), **keywords)
    for clean, found in zip(clean_results, dirty_results, strict=True):
        np.testing.assert_array_equal(device.get(found), device.get(clean))
    for found in dirty_results[0 if reduction in ("row", "none") else 1 :]:
        assert not device.get(found)[[1, 3]].any()


EMPTY = ((0,), (3, 0), (0, 3), (0, 0), (2, 0, 3), (0, 3, 2), (2, 3, 0))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("space", ["probs", "log_probs", "logits"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(device, operation, space, reduction, shape):
    x = device.put(np.zeros(shape, np.float32))
    value, *gradients = call(operation, x, x, space=space, reduction=reduction, return_grad=gradients_of(operation))
    # no class: the empty sum. No row: nothing to average.
    counted = {"rowmean": int(np.prod(shape[:-1])), "batchmean": shape[0], "mean": 0}.get(reduction, 1)
    result_shape = {"row": shape[:-1], "none": shape}.get(reduction, ())
    assert value.dtype == np.float32
    np.testing.assert_array_equal(device.get(value), np.full(result_shape, 0.0 if counted else np.nan))
    assert [g.shape for g in gradients] == [shape] * len(gradients)


def test_gradient_of_an_operand_broadcast_over_no_rows(device):
    _, dx, dy = klcore.kl_div(device.put(np.ones((0, 3))), device.put(np.ones(3)), return_grad=PAIR)
    assert dx.shape == (0, 3)
    np.testing.assert_array_equal(device.get(dy), np.zeros(3))


# ---- memory layout and kinds of array --------------------------------------------------------------------------------


def every_second(a):
    wide = np.full([2 * s for s in a.shape], np.nan).astype(a.dtype)
    wide[tuple(slice(1, None, 2) for _ in a.shape)] = a
    return wide[tuple(slice(1, None, 2) for _ in a.shape)]


def backwards(a):
    turned = tuple(slice(None, None, -1) for _ in a.shape)
    return a[turned].copy()[turned]


def transposed(a):
    return np.ascontiguousarray(a.T).T


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def byte_swapped(a):
    return a.astype(a.dtype.newbyteorder())


def unaligned(a):
    view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def field(a):
    """A field of records: strides that are not a multiple of the item size."""
    records = np.zeros(a.shape, [("flag", "u1"), ("value", a.dtype), ("more", "u2")])
    records["value"] = a
    return records["value"]


class Subclass(np.ndarray):
    pass


KINDS = {f.__name__: f for f in (every_second, backwards, transposed, read_only, byte_swapped, unaligned, field)}
KINDS["subclass"] = lambda a: a.view(Subclass)
KINDS["matrix"] = lambda a: a.view(np.matrix)


@pytest.fixture(params=[*KINDS, "memmap"])
def kind(request, tmp_path):
    def memmap(a):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        a.tofile(path)
        return np.memmap(path, a.dtype, "r", shape=a.shape)

    return KINDS.get(request.param, memmap)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("reduction", ["row", "sum", "none"])
@pytest.mark.parametrize("axis", [0, 1])
def test_kind_of_array(kind, dtype, operation, reduction, axis):
    if kind is byte_swapped and dtype == BFLOAT16:
        pytest.skip("ml_dtypes has no byte-swapped bfloat16")
    x, y = numbers((7, 9), 1, dtype), numbers((7, 9), 2, dtype)
    keywords = {"reduction": reduction, "axis": axis, "return_grad": gradients_of(operation)}
    expected = call(operation, x, y, **keywords)
    for arrays in ((kind(x), kind(y)), (kind(x), y), (x, kind(y))):
        for found, like in zip(call(operation, *arrays, **keywords), expected, strict=True):
            np.testing.assert_array_equal(found, like)
            assert type(found) is type(like)
            assert found.dtype == like.dtype  # native


def test_matrix_rows():
    a = numbers((3, 4)).view(np.matrix)
    assert klcore.kl_div(a, a[::-1]).shape == (3,)


PYTHON = {
    "list": [0.25, 0.75],
    "tuple": (0.25, 0.75),
    "nested": [[0.25, 0.75], (0.5, 0.5)],
    "integers": [1, 3],
    "booleans": [True, False],
    "float": 0.5,
    "int": 3,
    "bool": True,
    "integer array": np.array([[1, 2], [3, 4]], np.int8),
    "unsigned array": np.array([1, 2], np.uint64),
    "boolean array": np.array([True, False]),
    "NumPy scalar": np.float64(0.5),
    "NumPy integer": np.int32(3),
    "array of no dimensions": np.array(0.5),
}


@pytest.mark.parametrize("name", PYTHON)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_python_numbers_are_float64(operation, name):
    x = PYTHON[name]
    a = np.array(x, np.float64)
    expected = call(operation, a, a * 2, return_grad=gradients_of(operation))
    found = call(operation, x, a * 2, return_grad=gradients_of(operation))
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(f, e)
        assert f.dtype == np.float64
        assert type(f) is type(e)


@pytest.mark.parametrize("operation", OF_TWO)
def test_list_beside_float32(operation):
    """A list counts as float64 in every position."""
    x = numbers((2, 3), 1, np.float32)
    value, dx, dy = call(operation, x, [0.2, 0.3, 0.5], return_grad=PAIR)
    assert (value.dtype, dx.dtype, dy.dtype) == (np.float64, np.float32, np.float64)
    np.testing.assert_array_equal(value, call(operation, x, np.array([0.2, 0.3, 0.5])))


@pytest.mark.parametrize("operation", OF_TWO)
@pytest.mark.parametrize("dtypes", list(itertools.product(["float64", "float32", "float16", BFLOAT16], repeat=2)))
@pytest.mark.parametrize("space", ["probs", "logits", ("probs", "logits")])
def test_dtypes(operation, dtypes, space):
    x, y = (numbers((3, 20), seed, t) for seed, t in enumerate(dtypes))
    wide = np.float64 if np.float64 in (x.dtype, y.dtype) else np.float32
    for reduction in REDUCTIONS:
        value, dx, dy = call(operation, x, y, reduction=reduction, space=space, return_grad=PAIR)
        assert (value.dtype, dx.dtype, dy.dtype) == (wide, x.dtype, y.dtype)
        assert isinstance(value, (np.ndarray, np.generic))
        exact = call(operation, x.astype(float), y.astype(float), reduction=reduction, space=space, return_grad=PAIR)
        for found, like in zip((value, dx, dy), exact, strict=True):
            # terms are of order 1 and computed in `wide`; a gradient is rounded to its dtype at the end
            about = ml_dtypes.finfo(found.dtype)
            rounding = float(about.smallest_subnormal) + 20 * np.finfo(wide).eps
            np.testing.assert_allclose(np.asarray(found, float), like, rtol=8 * float(about.eps), atol=rounding)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("space", ["probs", "log_probs", "logits"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_inputs_are_not_modified(dtype, operation, space, axis):
    x, y = (numbers((5, 5), seed, dtype) for seed in (1, 2))
    w = numbers(5, 3)
    before = [a.copy() for a in (x, y, w)]
    for reduction in REDUCTIONS:
        call(
            operation, x, y, space=space, axis=axis, weights=w, reduction=reduction,
            return_grad=gradients_of(operation),
        )  # fmt: skip
    for a, b in zip((x, y, w), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_same_array_twice(device):
    x = device.put(numbers((3, 4)))
    for found in klcore.kl_div(x, x, return_grad=PAIR):
        assert not device.get(found).any()


# ---- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), ()])
@pytest.mark.parametrize("given", ["all", "value", "value alone", "gradients", "none"])
def test_out(device, dtype, operation, reduction, shape, given):
    x, y = (device.put(numbers(shape, seed, dtype)) for seed in (1, 2))
    keywords = {"reduction": reduction, "return_grad": gradients_of(operation)}
    expected = call(operation, x, y, **keywords)
    out = [device.put(np.full_like(np.asarray(device.get(e)), 7)) for e in expected]
    out = [o if given == "all" or (k > 0) == (given == "gradients") else None for k, o in enumerate(out)]
    out = [None] * len(out) if given == "none" else out
    results = call(operation, x, y, **keywords, out=out[0] if given == "value alone" else tuple(out))
    for o, found, like in zip(out, results, expected, strict=True):
        assert o is None or found is o
        np.testing.assert_array_equal(device.get(found), device.get(like))


def test_out_of_a_call_without_gradients():
    x, y, out = numbers((3, 4), 1), numbers((3, 4), 2), np.zeros(3)
    assert klcore.kl_div(x, y, out=(out,)) is out
    np.testing.assert_array_equal(out, klcore.kl_div(x, y))


def test_out_of_any_strides():
    x, y = numbers((4, 6), 1), numbers((4, 6), 2)
    expected = klcore.kl_div(x, y, return_grad=PAIR)
    wide = np.full((9, 13), 7.0)
    out = np.full((8, 2), 7.0)[::-2, 1], np.full((6, 4), 7.0).T, wide[1::2, 12:0:-2]
    for found, like in zip(klcore.kl_div(x, y, return_grad=PAIR, out=out), expected, strict=True):
        np.testing.assert_array_equal(found, like)
    assert (wide[::2] == 7).all()
    assert (wide[:, ::2][:, 0] == 7).all()
    assert (wide[:, 1::2] == 7).all()


def test_out_beside_an_input_in_one_buffer():
    """Interleaved arrays do not overlap."""
    buffer = np.zeros((4, 12))
    x, dx = buffer[:, ::2], buffer[:, 1::2]
    x[...] = numbers((4, 6), 1)
    y = numbers((4, 6), 2)
    expected = klcore.kl_div(x.copy(), y, return_grad="x")
    for found, like in zip(klcore.kl_div(x, y, return_grad="x", out=(None, dx)), expected, strict=True):
        np.testing.assert_array_equal(found, like)


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY = '''
import resource, sys, tracemalloc
import numpy as np, klcore

def filled(shape, seed):  # in place: a temporary array would raise the high-water mark beforehand
    a = np.empty(shape, np.float32)
    np.random.default_rng(seed).random(dtype=np.float32, out=a)
    return a

def arguments(rows, n, space, reduction, gradients, weighted):
    out = [np.full({"row": (rows,), "none": (rows, n)}.get(reduction, ()), 7, np.float32)]
    out += [np.full((rows, n), 7, np.float32) for _ in gradients]
    weights = np.ones(rows) if weighted else None
    keywords = dict(space=space, reduction=reduction, weights=weights, return_grad=gradients or None, out=tuple(out))
    return (filled((rows, n), 1), filled((rows, n), 2)), keywords

def high_water(reset=False):
    """Bytes, without the code that has been read from files: how much of it a call needs first depends on its luck.
    Linux can forget an earlier peak, as that of the imports, which would hide a later one below it."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
        with open("/proc/self/status") as f:
            kilobytes = {line.split(":")[0]: line.split()[1] for line in f if line.endswith("kB\\n")}
        return 1024 * (int(kilobytes["VmHWM"]) - int(kilobytes["RssFile"]))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

klcore.set_num_threads(2)
for small in ((40, 1025), (1, 200_000)):  # threads, stacks and modules are there before the measurement
    arrays, keywords = arguments(*small, "probs", "sum", ("x",), True)
    klcore.kl_div(*arrays, **keywords)
arrays, keywords = eval(sys.argv[1])
before = high_water(reset=True)
klcore.kl_div(*arrays, **keywords)
native = high_water() - before
tracemalloc.start()
klcore.kl_div(*arrays, **keywords)
print(native, tracemalloc.get_traced_memory()[1])
'''


SIZES = ((1_000_000, 10), (1, 16 * 2**20), (40, 200_000))
ASKED = (("row", (), False), ("sum", PAIR, False), ("rowmean", ("y",), True), ("none", (), False))


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is missing on Windows")
@pytest.mark.parametrize("asked", range(len(ASKED)))
@pytest.mark.parametrize("size", range(len(SIZES)))
def test_extra_memory(python, size, asked):
    """All pairs of a size, a space and a set of results."""
    (rows, n), (reduction, gradients, weighted) = SIZES[size], ASKED[asked]
    space = ("probs", "logits", ("probs", "logits"))[(size + asked) % 3]
    arguments = rows, n, space, reduction, gradients, weighted
    native, of_numpy = map(int, python(MEMORY, f"arguments(*{arguments!r})").split())
    # what the writing sweep takes from the reading one: two rows per thread, and some padding, for rows that fit a
    # cache
    kept = 2 * 2 * n * 4 * 1.1 if gradients and space == "logits" and n < 400_000 else 0
    assert native < 2**20 + kept
    assert of_numpy < 2**20


MB = 2**20
ROADS = {  # the limits of docs/performance.md, with two threads: arguments, and bytes
    **{
        f"{dtype} weights": (
            "(filled((10**6, 4), 1), filled((10**6, 4), 2)), "
            f"dict(weights=np.ones(10**6, {dtype!r}), reduction='rowmean')",
            MB,
        )
        for dtype in ("bool", "int64", "uint8", "float16", "float32")
    },
    "gradient of a broadcast row, wide": (
        "(filled((4, 10**6), 1), filled((10**6,), 2)), "
        "dict(reduction='sum', return_grad='y', out=(None, filled((10**6,), 3)))",
        MB,
    ),
    "of logits, wide": (
        "(filled((4, 10**6), 1), filled((10**6,), 2)), "
        "dict(space='logits', reduction='sum', return_grad='y', out=(None, filled((10**6,), 3)))",
        MB,
    ),
    "of logits, long": (
        "(filled((10**6, 10), 1), filled((10,), 2)), dict(space='logits', reduction='sum', return_grad='y')",
        MB,
    ),
    "of logits, wide and long": (  # plus 8 bytes per class
        "(np.broadcast_to(filled((80_000,), 1), (5000, 80_000)), filled((80_000,), 2)), "
        "dict(space='logits', reduction='sum', return_grad='y')",
        MB + 8 * 80_000,
    ),
    "classes first": (  # half a megabyte per array and thread
        "(filled((5000, 4000), 1), filled((5000, 4000), 2)), dict(axis=0, space='logits', reduction='sum')",
        MB + 2 * 2 * MB // 2,
    ),
    "classes first, with a gradient": (
        "(filled((5000, 4000), 1), filled((5000, 4000), 2)), "
        "dict(axis=0, space='logits', reduction='sum', return_grad='y', out=(None, filled((5000, 4000), 3)))",
        MB + 2 * 3 * MB // 2,
    ),
}


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is missing on Windows")
@pytest.mark.parametrize("road", ROADS)
def test_extra_memory_by_road(python, road):
    """The least of three processes: when it is busy, the system gives a process more memory than it requests."""
    arguments, most = ROADS[road]
    native, of_numpy = zip(*(map(int, python(MEMORY, arguments).split()) for _ in range(3)), strict=True)
    assert min(native) < most
    assert min(of_numpy) < MB


@pytest.mark.parametrize("reduction", ["row", "sum", "rowmean", "none"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_errors_of_floats_that_numpy_shall_raise(dtype, reduction):
    """klcore's arithmetic within is not what the caller asks NumPy to watch."""
    x, y = np.array([[1e-6, 0.8], [0, 0.5]], dtype), np.array([[0.3, 1e-7], [0.6, 0.4]], dtype)
    options = {"reduction": reduction, "return_grad": PAIR, "weights": [1e300, 1e-300]}
    expected = klcore.kl_div(x, y, **options), klcore.kl_div(x, y[0], **options)
    with np.errstate(all="raise"):
        found = klcore.kl_div(x, y, **options), klcore.kl_div(x, y[0], **options)
        klcore.Summary().update([1e200, 1e-200, 1])
    for of_found, of_expected in zip(found, expected, strict=True):
        assert [a.tobytes() for a in of_found] == [a.tobytes() for a in of_expected]


# ---- errors ----------------------------------------------------------------------------------------------------------

X, Y = numbers((2, 3), 1), numbers((2, 3), 2)
X.flags.writeable = Y.flags.writeable = False
SPACE_WORDS = ("'probs'", "'log_probs'", "'logits'")
FLOATS = ("float64", "float32", "float16", "bfloat16")


def case(name, error, *words, x=X, y=Y, operation="kl_div", **keywords):
    return pytest.param(operation, x, y, keywords, error, words, id=name)


def in_weights_x_and_y(name, error, array, *words):
    yield case(f"x {name}", error, "x", *words, x=array)
    yield case(f"y {name}", error, "y", *words, y=array)
    yield case(f"entropy {name}", error, "x", *words, x=array, operation="entropy")
    yield case(f"weights {name}", error, "weights", *words, weights=array[:, 0])


WRONG = [
    case("classes", ValueError, "(2, 3)", "(2, 4)", "axis -1", "same number of classes", y=numbers((2, 4))),
    case("classes do not broadcast", ValueError, "(2, 3)", "(2, 1)", "axis -1", y=numbers((2, 1))),
    case("classes of axis 0", ValueError, "(2, 3)", "(3, 3)", "axis 0", y=numbers((3, 3)), axis=0),
    case("number and vector", ValueError, "()", "(3,)", "classes", x=1.0, y=[1.0, 2.0, 3.0]),
    case("batch", ValueError, "(2, 3)", "(4, 3)", "broadcast", y=numbers((4, 3))),
    case("batch of five", ValueError, "(2, 1, 3, 3)", "(2, 3)", "broadcast", x=numbers((2, 1, 3, 3))),
    case("space", ValueError, "'prob'", *SPACE_WORDS, space="prob"),
    case("space None", ValueError, "None", *SPACE_WORDS, space=None),
    case("space number", ValueError, "0", *SPACE_WORDS, space=0),
    case("space of three", ValueError, "pair", *SPACE_WORDS, space=("probs",) * 3),
    case("space of a pair", ValueError, "'log'", "pair", *SPACE_WORDS, space=("probs", "log")),
    case("space of entropy", ValueError, "('probs', 'probs')", *SPACE_WORDS, space=("probs",) * 2, operation="entropy"),
    case("reduction", ValueError, "'avg'", *(repr(r) for r in REDUCTIONS), reduction="avg"),
    case("reduction None", ValueError, "None", *(repr(r) for r in REDUCTIONS), reduction=None),
    case("reduction list", ValueError, "['sum']", "'sum'", reduction=["sum"]),
    case("return_grad", ValueError, "'z'", "None", "'x'", "'y'", "('x', 'y')", return_grad="z"),
    case("return_grad order", ValueError, "('y', 'x')", "('x', 'y')", return_grad=("y", "x")),
    case("return_grad bool", ValueError, "True", "'x'", return_grad=True),
    case("return_grad dict", ValueError, "{}", "'x'", return_grad={}),
    case("return_grad of entropy", ValueError, "'y'", "None", "'x'", return_grad="y", operation="entropy"),
    case("device", ValueError, "'gpu'", "'cpu'", "'cuda'", "'cuda:N'", device="gpu"),
    case("device cpu:1", ValueError, "'cpu:1'", "'cpu'", device="cpu:1"),
    case("device cuda:x", ValueError, "'cuda:x'", "'cuda:N'", device="cuda:x"),
    case("device cuda:", ValueError, "'cuda:'", "'cuda:N'", device="cuda:"),
    case("device number", ValueError, "0", "'cpu'", device=0),
    case("device list", ValueError, "['cuda']", "'cpu'", "'cuda:N'", device=["cuda"]),
    case("axis", ValueError, "axis 2", "2 dimensions", axis=2),
    case("axis below", ValueError, "axis -3", "2 dimensions", axis=-3),
    case("axis of a number", ValueError, "axis 1", "0-dimensional", x=1.0, y=2.0, axis=1),
    case("axis float", TypeError, "axis", "integer", "float", axis=1.0),
    case("axis None", TypeError, "axis", "integer", "NoneType", axis=None),
    case("axis tuple", TypeError, "axis", "integer", "tuple", axis=(0, 1)),
    case("temperature of probs", ValueError, "2.0", "logits", temperature=2.0),
    case("temperature of log_probs", ValueError, "2.0", "logits", temperature=2.0, space="log_probs"),
    *(
        case(f"temperature {t}", ValueError, "temperature", "positive", repr(t), temperature=t, space="logits")
        for t in (0, 0.0, -1.0, float("nan"), float("inf"))
    ),
    case("temperature text", TypeError, "temperature", "number", "str", temperature="hot", space="logits"),
    case("temperature None", TypeError, "temperature", "number", "NoneType", temperature=None, space="logits"),
    case("weights shape", ValueError, "weights", "(3,)", "(2,)", "broadcast", weights=np.ones(3)),
    case("weights of too many axes", ValueError, "weights", "(1, 2)", "(2,)", weights=np.ones((1, 2))),
    case("weights negative", ValueError, "weights", ">= 0", "-1.0 at index (1,)", weights=[1.0, -1.0]),
    case("weights NaN", ValueError, "weights", ">= 0", "nan at index (1,)", weights=[1.0, np.nan]),
    case("weights infinite", ValueError, "weights", "finite", "inf at index (1,)", weights=[1.0, np.inf]),
    case("set", TypeError, "set", "numpy", "register_backend", x={1.0, 2.0}),
    case("None", TypeError, "NoneType", "numpy", "register_backend", y=None),
    case("text", TypeError, "str", "numpy", "register_backend", x="0.5"),
    case("bytes", TypeError, "bytes", "numpy", y=b"0.5"),
    case("list of text", TypeError, "x", *FLOATS, x=["a", "b", "c"]),
    case("complex number", TypeError, "x", "complex128", *FLOATS, x=1j, y=1.0),
    *in_weights_x_and_y("complex", TypeError, X + 0j, "complex128", *FLOATS),
    *in_weights_x_and_y("object", TypeError, X.astype(object), "object", *FLOATS),
    *in_weights_x_and_y("string", TypeError, X.astype(str), "<U", *FLOATS),
    *in_weights_x_and_y("bytes", TypeError, X.astype("S8"), "S8", *FLOATS),
    *in_weights_x_and_y("datetime", TypeError, np.full((2, 3), "2000-01-01", "M8[s]"), "datetime64", *FLOATS),
    *in_weights_x_and_y("timedelta", TypeError, X.astype("m8[s]"), "timedelta64", *FLOATS),
    *in_weights_x_and_y("record", TypeError, np.zeros((2, 3), [("a", "f4")]), "'a'", *FLOATS),
    *in_weights_x_and_y("float8", TypeError, X.astype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn", *FLOATS),
    *in_weights_x_and_y("masked", TypeError, np.ma.masked_less(X, 0.5), "masked array", "filled"),
]
if np.dtype(np.longdouble).itemsize > 8:
    WRONG += in_weights_x_and_y("long double", TypeError, X.astype(np.longdouble), np.dtype("g").name, *FLOATS)


@pytest.mark.parametrize(("operation", "x", "y", "keywords", "error", "words"), WRONG)
def test_wrong_arguments(operation, x, y, keywords, error, words):
    out = np.full(2, 7.0)
    keywords = {"out": (out,) if "return_grad" not in keywords else (out, None), **keywords}
    with pytest.raises(error) as raised:
        getattr(klcore, operation)(*operands(operation, x, y), **keywords)
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"return_grad": {"x"}}, ValueError),
        ({"return_grad": np.array(["x"])}, ValueError),
        ({"axis": -1.0}, TypeError),
        ({"temperature": np.ones(1)}, ValueError),
        ({"temperature": np.ones(2)}, ValueError),
        ({"temperature": "1"}, TypeError),
        ({"space": ["probs"]}, ValueError),
        ({"reduction": ["row"]}, ValueError),
    ],
    ids=str,
)
def test_wrong_words_of_plain_calls(keywords, error):
    """Without `out`, the fast path checks the options first, and must not accept a value that merely equals a valid
    one."""
    (word,) = keywords
    with pytest.raises(error, match=word):
        klcore.kl_div(X, Y, **keywords)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_arrays_are_positional(operation):
    with pytest.raises(TypeError, match="positional"):
        getattr(klcore, operation)(*operands(operation, X, Y), "probs")


def good(shape, dtype="float64"):
    return np.full(shape, 7, dtype)


def frozen(a):
    a.flags.writeable = False
    return a


OVERLAPPING = np.full((4, 3), 7.0)
IN_PLACE = numbers((2, 3), 1)
WRONG_OUT = {
    "shape": (ValueError, good(3), None, ("the value", "(2,)", "(3,)")),
    "shape of a column": (ValueError, good((2, 1)), None, ("the value", "(2,)", "(2, 1)")),
    "dtype": (ValueError, good(2, "float32"), None, ("the value", "float64", "float32")),
    "byte-swapped": (ValueError, good(2, np.dtype("f8").newbyteorder()), None, ("the value", "float64", "f8")),
    "list": (TypeError, [7.0, 7.0], None, ("the value", "ndarray", "list")),
    "scalar": (TypeError, np.float64(7), None, ("the value", "ndarray", "float64")),
    "masked": (TypeError, np.ma.masked_equal(good(2), 0), None, ("the value", "ndarray", "MaskedArray")),
    "read-only": (ValueError, frozen(good(2)), None, ("the value", "read-only")),
    "broadcast view": (ValueError, np.lib.stride_tricks.as_strided(good(1), (2,), (0,)), None, ("the value", "share")),
    "gradient's shape": (ValueError, (good(2), good((3, 2))), "x", ("respect to x", "(2, 3)", "(3, 2)")),
    "gradient's dtype": (ValueError, (good(2), good((2, 3), "f4")), "y", ("respect to y", "float64", "float32")),
    "gradient not an array": (TypeError, (good(2), [[7.0] * 3] * 2), "y", ("respect to y", "ndarray", "list")),
    "gradient read-only": (ValueError, (good(2), frozen(good((2, 3)))), "y", ("respect to y", "read-only")),
    "tuple too long": (ValueError, (good(2), good((2, 3))), None, ("tuple of 1", "tuple of 2", "out")),
    "tuple too short": (ValueError, (good(2), good((2, 3))), PAIR, ("tuple of 3", "tuple of 2", "out")),
    "empty tuple": (ValueError, (), "x", ("tuple of 2", "tuple of 0", "out")),
    "overlapping": (ValueError, (None, OVERLAPPING[:2], OVERLAPPING[1:3]), PAIR, ("overlap", "separate")),
    "the same twice": (ValueError, (None, OVERLAPPING[:2], OVERLAPPING[:2]), PAIR, ("overlap", "separate")),
    "x itself": (ValueError, (None, IN_PLACE), "x", ("overlaps", "input", "separate array")),
    "x itself for y": (ValueError, (None, IN_PLACE), "y", ("overlaps", "input", "separate array")),
    "a part of x": (ValueError, IN_PLACE[:, 1], None, ("overlaps", "input", "separate array")),
}


@pytest.mark.parametrize("name", WRONG_OUT)
def test_wrong_out(name):
    error, out, gradient, words = WRONG_OUT[name]
    arrays = [a for a in (out if isinstance(out, tuple) else (out,)) if isinstance(a, np.ndarray)]
    before = [np.asarray(a).copy() for a in arrays]
    with pytest.raises(error) as raised:
        klcore.kl_div(IN_PLACE, Y, return_grad=gradient, out=out)
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("which", ["y", "weights"])
def test_out_overlaps(which):
    arrays = {"y": numbers((2, 3)), "weights": numbers(2)}
    out = {"y": arrays["y"][:, 0], "weights": arrays["weights"]}[which]
    before = out.copy()
    with pytest.raises(ValueError, match="out overlaps the memory of an input"):
        klcore.kl_div(X, arrays["y"], weights=arrays["weights"], out=out)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_out_of_every_reduction_is_checked(reduction):
    with pytest.raises(ValueError, match=r"must have shape .* found \(9,\)"):
        klcore.kl_div(X, Y, reduction=reduction, out=good(9))
