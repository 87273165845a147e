"""What is accepted besides arrays of one library: tables and their labels, sequences, arrays of another library.

And what is refused by name: arrays whose numbers mean something else, and invalid options.
"""

import array
import collections
import contextlib
import datetime
import importlib
import re

import numpy as np
import pytest
import scipy.sparse
from conftest import GPUS, computing_on
from hypothesis import given, settings
from hypothesis import strategies as st

import klcore

pd = pytest.importorskip("pandas", reason="pandas is not installed here")
pl = pytest.importorskip("polars", reason="polars is not installed here")
xr = pytest.importorskip("xarray", reason="xarray is not installed here")

EMULATED = [name for name in GPUS if name == "emulated"]  # none without a compiler, as in the tests of a wheel
PAIR = ("x", "y")
A = np.random.default_rng(1).dirichlet(np.ones(4), 3)
B = np.random.default_rng(2).dirichlet(np.ones(4), 3)
A.flags.writeable = B.flags.writeable = False
W = np.array([1.0, 0.0, 2.0])
CLASSES = ["a", "b", "c", "d"]


class WithArray:
    """Only __array__."""

    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return np.array(self.a, dtype)


TABLES = {
    "pandas": pd.DataFrame,
    "pandas, named": lambda a: pd.DataFrame(a, index=[f"r{k}" for k in range(len(a))], columns=range(a.shape[1])),
    "polars": lambda a: pl.DataFrame(np.array(a), schema=[f"c{k}" for k in range(a.shape[1])]),
    "xarray": lambda a: xr.DataArray(a, dims=["row", "class"][-a.ndim :]),
    "xarray Variable": lambda a: xr.Variable(["row", "class"][-a.ndim :], a),
    "__array__": WithArray,
    "memoryview": lambda a: memoryview(np.array(a)),
}
VECTORS = {
    "pandas": pd.Series,
    "pandas Index": pd.Index,
    "pandas array": lambda a: pd.array(a, dtype="Float64"),
    "polars": lambda a: pl.Series(np.array(a)),
    "xarray": lambda a: xr.DataArray(a, dims=["class"]),
    "array": lambda a: array.array("d", a),
    "deque": collections.deque,
    "memoryview": lambda a: memoryview(np.array(a)),
}


def same(found, expected):
    found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
    for f, e in zip(found, expected, strict=True):
        assert type(f) is type(e)
        np.testing.assert_array_equal(np.asarray(f), np.asarray(e), strict=True)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", TABLES)
def test_tables(name, axis):
    """NumPy's results, whichever argument is a table."""
    expected = klcore.kl_div(A, B, axis=axis, return_grad=PAIR)
    x, y = TABLES[name](A), TABLES[name](B)
    for arrays in ((x, y), (x, B), (A, y)):
        same(klcore.kl_div(*arrays, axis=axis, return_grad=PAIR), expected)
    same(klcore.entropy(x, axis=axis, reduction="sum"), klcore.entropy(A, axis=axis, reduction="sum"))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    make = VECTORS[name]
    same(klcore.kl_div(make(A[0]), make(B[0]), return_grad=PAIR), klcore.kl_div(A[0], B[0], return_grad=PAIR))
    same(klcore.kl_div(A, make(B[0])), klcore.kl_div(A, B[0]))
    same(klcore.kl_div(A, B, weights=make(W)), klcore.kl_div(A, B, weights=W))


@pytest.mark.parametrize("numbers", [range(1, 5), collections.deque([1, 2, 3, 4]), pd.Series([1, 2, 3, 4])])
def test_integers_are_float64(numbers):
    same(klcore.kl_div(numbers, [1, 2, 3, 5]), klcore.kl_div([1, 2, 3, 4], [1, 2, 3, 5]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["pandas", "polars", "xarray"])
def test_dtype_is_kept(name, dtype):
    x = TABLES[name](A.astype(dtype))
    value, gradient = klcore.kl_div(x, x, return_grad="x")
    assert (value.dtype, gradient.dtype) == (dtype, dtype)


@pytest.mark.parametrize("name", ["pandas", "polars", "xarray"])
def test_tables_in_keras(name):
    """By position, as Keras accepts them; the other systems refuse them by name."""
    from klcore.compat.keras import KLDivergence, kl_divergence

    for make, a, b in ((TABLES[name], A, B), (VECTORS[name], A[0], B[0])):
        for call in (kl_divergence, KLDivergence()):
            expected = call(a.astype("f4"), b.astype("f4"))
            np.testing.assert_array_equal(call(make(a), make(b)), expected)
            np.testing.assert_array_equal(call(make(a), b.astype("f4")), expected)


def test_apply_row_by_row():
    same(pd.DataFrame(A).apply(lambda row: klcore.kl_div(row, B[0]), axis=1).to_numpy(), klcore.kl_div(A, B[0]))


@pytest.mark.parametrize("name", ["pandas", "polars", "xarray", "__array__"])
def test_on_a_device(device, name):
    x = TABLES[name](A)
    found = klcore.kl_div(x, TABLES[name](B), weights=list(W), device=device.klcore_name)
    assert isinstance(found, device.array_type())
    np.testing.assert_array_equal(device.get(found), klcore.kl_div(A, B, weights=W))
    if not device.numpy:
        with pytest.raises(TypeError, match=r"cupy array and y is a numpy array.*device="):
            klcore.kl_div(device.put(A), x)


def test_what_is_missing_is_nan():
    """NaN where a table has missing values; an array of objects is not read."""
    x = pd.DataFrame(A).mask(pd.DataFrame(A) == A[1, 1])
    nullable = x.convert_dtypes()
    for table in (x, nullable.to_numpy(dtype=float), x.T[1].convert_dtypes(), pl.DataFrame(x), xr.DataArray(x)):
        assert np.isnan(klcore.kl_div(table, B)).tolist()[1]
    with pytest.raises(TypeError, match=r"x, .*dtype object.*x\.to_numpy\(dtype=float\)"):
        klcore.kl_div(nullable, B)


# ---- labels ----------------------------------------------------------------------------------------------------------


def frame(index=(0, 1, 2), columns=CLASSES, a=A):
    return pd.DataFrame(a, index=list(index), columns=list(columns))


def data_array(rows=None, classes=None, dims=("row", "class"), a=A):
    coords = {d: c for d, c in zip(dims, (rows, classes), strict=True) if c is not None}
    return xr.DataArray(a, dims=list(dims), coords=coords)


OTHER = CLASSES[::-1]
AGREE = {
    "frames": ({"x": frame(), "y": frame(a=B)}, {}),
    "a row": ({"x": frame(), "y": pd.Series(B[0], CLASSES)}, {}),
    "a row first": ({"x": pd.Series(A[0], CLASSES), "y": frame(a=B)}, {}),
    "one row of its own": ({"x": frame(), "y": frame([7], a=B[:1])}, {}),
    "weights by row": ({"x": frame("uvw"), "y": B, "weights": pd.Series(W, list("uvw"))}, {}),
    "weights of other rows than classes": ({"x": frame("uvw"), "y": B[0], "weights": pd.Series(W, list("uvw"))}, {}),
    "weights by column": ({"x": frame(), "y": B, "weights": pd.Series(B[0], CLASSES)}, {"axis": 0}),
    "labels beside none": ({"x": frame("wvu"), "y": B}, {}),
    "numerals beside none": ({"x": frame(["1", "0", "2"]), "y": B}, {}),
    "numbers with gaps": ({"x": frame([5, 3, 1]), "y": B}, {}),
    "repeated numbers": ({"x": frame([0, 0, 1]), "y": B}, {}),
    "numbers of classes from 1": ({"x": frame(columns=[4, 3, 2, 1]), "y": B}, {}),
    "another order beside one row": ({"x": frame([2, 1, 0]), "y": B[0]}, {}),
    "another order alone": ({"x": frame([2, 1, 0]), "y": 0.25 * np.ones(4)}, {}),
    "another order, both": ({"x": frame([2, 1, 0]), "y": frame([2, 1, 0], a=B)}, {}),
    "two levels": ({f: frame(pd.MultiIndex.from_tuples([(1, "a"), (1, "b"), (2, "a")])) for f in PAIR}, {}),
    "pandas and polars": ({"x": frame(), "y": pl.DataFrame(np.array(B), schema=CLASSES)}, {}),
    "pandas and xarray": ({"x": frame(), "y": data_array([0, 1, 2], CLASSES, a=B)}, {}),
    "coordinates on one side": ({"x": data_array([0, 1, 2], CLASSES), "y": data_array(a=B)}, {}),
    "a dimension less": ({"x": data_array(), "y": xr.DataArray(B[0], dims=["class"])}, {}),
    "weights of a dimension": ({"x": data_array(), "y": B, "weights": xr.DataArray(W, dims=["row"])}, {}),
    "weights along axis 0": ({"x": data_array(), "y": B, "weights": xr.DataArray(B[0], dims=["class"])}, {"axis": 0}),
}
DIFFER = {
    "rows": ({"x": frame(), "y": frame([0, 2, 1])}, {}, "axis 0 of x and axis 0 of y", "different labels"),
    "row of one": ({"x": frame([7], a=A[:1]), "y": frame([8], a=B[:1])}, {}, "axis 0 of x", "different labels"),
    "classes": ({"x": frame(), "y": frame(columns=OTHER)}, {}, "axis 1 of x and axis 1 of y", "(first at position 0:"),
    "classes of a row": ({"x": frame(), "y": pd.Series(B[0], OTHER)}, {}, "axis 1 of x and axis 0 of y", "reindex"),
    "classes of a column": ({"x": frame(), "y": frame([3, 4, 5])}, {"axis": 0}, "axis 0 of x and axis 0 of y", "0 and"),
    "the last class": ({"x": frame(), "y": frame(columns=[*CLASSES[:3], "e"])}, {}, "first at position 3: 'd' and 'e'"),
    "kinds": ({"x": frame(["0", "1", "2"]), "y": frame()}, {}, "first at position 0: '0' and 0 (str and int)"),
    "weights": ({"x": frame("uvw"), "y": B, "weights": pd.Series(W, list("uwv"))}, {}, "axis 0 of x", "of weights"),
    "weights by column": (
        {"x": frame(), "y": B, "weights": pd.Series(B[0], OTHER)}, {"axis": 0}, "axis 1 of x and axis 0 of weights",
    ),
    "polars": ({"x": pl.DataFrame(np.array(A), CLASSES), "y": pl.DataFrame(np.array(B), OTHER)}, {}, "axis 1 of x"),
    "pandas and polars": ({"x": frame(), "y": pl.DataFrame(np.array(A), schema=OTHER)}, {}, "axis 1 of x"),
    "coordinates": ({"x": data_array([0, 1, 2]), "y": data_array([1, 2, 3])}, {}, "axis 0 of x", "different labels"),
    "dimensions": ({"x": data_array(), "y": data_array(dims=("row", "topic"))}, {}, "'class'", "'topic'", "transpose"),
    "a dimension less": ({"x": data_array(), "y": xr.DataArray(B[0], dims=["row"])}, {}, "'class'", "'row'"),
    "weights of a dimension": (
        {"x": data_array(), "y": B, "weights": xr.DataArray(W, dims=["class"])}, {}, "'row'", "'class'", "weights",
    ),
}  # fmt: skip
REORDERED = {
    "weights": ({"x": A, "y": B, "weights": pd.Series(W, [2, 1, 0])}, {}, "axis 0 of weights", "x has no labels"),
    "list of weights": ({"x": frame([2, 1, 0]), "y": B[0], "weights": list(W)}, {}, "axis 0 of x", "weights has no"),
    "rows": ({"x": frame([1, 0, 2]), "y": B}, {}, "axis 0 of x (1, 0, 2)", "y has no labels"),
    "rows by objects": ({"x": frame(pd.Index([1, 0, 2], dtype=object)), "y": B}, {}, "axis 0 of x", "y has no labels"),
    "rows by floats": ({"x": frame([1.0, 0.0, 2.0]), "y": B}, {}, "axis 0 of x", "y has no labels"),
    "classes": ({"x": A, "y": pd.Series(B[0], [1, 0, 2, 3])}, {}, "axis 0 of y", "x has no labels"),
    "xarray": ({"x": data_array([2, 1, 0]), "y": B}, {}, "axis 0 of x"),
    "polars": ({"x": frame([1, 0, 2]), "y": pl.DataFrame(np.array(B), schema=CLASSES)}, {}, "axis 0 of x"),
}


@pytest.mark.parametrize("name", AGREE)
def test_labels_that_agree(name):
    """They are compared, but not returned."""
    arrays, options = AGREE[name]
    found = klcore.kl_div(**arrays, **options)
    plain = {of: np.asarray(a) for of, a in arrays.items()}
    same(found, klcore.kl_div(plain["x"], plain["y"], weights=plain.get("weights"), **options))


@pytest.mark.parametrize(
    ("error", "case"),
    [*((ValueError, case) for case in DIFFER.values()), *((TypeError, case) for case in REORDERED.values())],
    ids=[*DIFFER, *(f"reordered {name}" for name in REORDERED)],
)
def test_labels_that_do_not(error, case):
    arrays, options, *words = case
    with pytest.raises(error) as raised:
        klcore.kl_div(**arrays, **options)
    message = str(raised.value)
    assert [word for word in (*words, ".to_numpy() to ignore") if word not in message] == [], message
    # what the message recommends
    klcore.kl_div(**{of: a.to_numpy() if hasattr(a, "to_numpy") else a for of, a in arrays.items()}, **options)


COUNTS = pd.Series([5.0, 3.0, 2.0], ["card", "cash", "coin"])
MISSING = {
    "in x": (COUNTS[:2], COUNTS, "only y has 'coin'", "pass x.reindex(y.index, fill_value=0)"),
    "in y": (COUNTS, COUNTS[1:], "only x has 'card'", "pass y.reindex(x.index, fill_value=0)"),
    "in rows of x": (
        pd.DataFrame([COUNTS[:2]]), COUNTS, "only y has 'coin'", "pass x.reindex(columns=y.index, fill_value=0)",
    ),
    "in all of x": (
        COUNTS[:0], pd.DataFrame([COUNTS]), "'card', 'cash', 'coin'", "pass x.reindex(y.columns, fill_value=0)",
    ),
    "in both": (
        COUNTS[:2], COUNTS[1:], "(first at position 0: 'card' and 'cash')", "only x has 'card' and only y has 'coin'",
        "reindex both with x.index.union(y.index) and fill_value=0",
    ),
    "in both, of two sizes": (
        COUNTS[:1], COUNTS[1:], "only x has 'card' and only y has 'cash', 'coin'", "x.index.union(y.index)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING.values(), ids=MISSING)
def test_classes_that_one_side_lacks(case):
    """The message names them, and what it recommends keeps all counts."""
    x, y, *words = case
    with pytest.raises(ValueError, match=r"classes|labels") as raised:
        klcore.js_div(x, y, space="counts")
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message
    assert "indices=" not in message
    if call := re.search(r"pass ((x|y)\.reindex\(.*?\))", message):
        mended = eval(call[1], {"x": x, "y": y})
        x, y = (mended, y) if call[2] == "x" else (x, mended)
    else:
        both = eval(re.search(r"with (x\S+)", message)[1], {"x": x, "y": y})
        x, y = (a.reindex(both, fill_value=0) for a in (x, y))
    sums = [np.asarray(a).sum() for a in case[:2]]
    assert [np.asarray(a).sum() for a in (x, y)] == sums
    klcore.js_div(x, y, space="counts")


@pytest.mark.parametrize("dtype", ["string", "Int64", "float64", "object"])
def test_missing_labels(dtype):
    """pandas.NA cannot be compared, and NaN is not equal to itself."""
    labels = [pd.NA if dtype in ("string", "Int64") else np.nan, "1", "2", "3"]
    one, other = (pd.Index([*labels[:2], last], dtype=dtype) for last in labels[2:])
    x, y = pd.Series([3, 2, 1], one), pd.Series([3, 2, 1], other)
    assert klcore.kl_div(x, x, space="counts") == 0
    with pytest.raises(ValueError, match=r"first at position 2: .*2.* and .*3"):
        klcore.kl_div(x, y, space="counts")


def test_masked_rows_of_a_list():
    """What is recommended keeps the mask."""
    x = [np.ma.array([0.5, 0.5], mask=[True, False])]
    with pytest.raises(TypeError, match=r"such as numpy\.ma\.stack\(x\)\.filled\(value\)"):
        klcore.kl_div(x, x)
    assert np.ma.stack(x).filled(0.25).tolist() == [[0.25, 0.5]]


def test_labels_on_one_side_only():
    with pytest.raises(ValueError, match=r"found 2 and 3 \(shapes \(2,\) and \(3,\)\)$"):
        klcore.kl_div(COUNTS[:2], [1, 2, 3])
    with pytest.raises(ValueError, match="indices="):
        klcore.kl_div([1, 2], [1, 2, 3])


@pytest.mark.parametrize("make", [pd.Series, np.asarray])
@pytest.mark.parametrize("name", PAIR)
def test_one_axis_is_the_last(name, make):
    """Also with axis=0."""
    table, series = pd.DataFrame(A.T), make(B[0])
    arrays = {"x": table, "y": table, name: series}
    column = series.to_frame() if make is pd.Series else series[:, None]
    with pytest.raises(ValueError, match=rf"{name} has one axis.*pass {name}\[:, None\], or {name}\.to_frame\(\)"):
        klcore.kl_div(**arrays, axis=0)
    plain = {"x": A, "y": A, name: B[0]}
    same(klcore.kl_div(**arrays | {name: column}, axis=0), klcore.kl_div(**plain))


@pytest.mark.parametrize("library", ["torch", "jax", "dask", *EMULATED])
def test_labels_are_compared_beside_every_library(library):
    with lending(library) as lend:
        x = lend(np.asarray(A))
        w = pd.Series(W, [2, 1, 0])
        with pytest.raises(TypeError, match=r"axis 0 of weights .* x has no labels"):
            klcore.kl_div(x, x, weights=w)
        with pytest.raises(TypeError, match=r"axis 0 of weights .* x has no labels"):
            klcore.kl_div(x, x, axis=0, weights=pd.Series(B[0], [1, 0, 2, 3]))
        klcore.kl_div(x, x, weights=pd.Series(W))
        if library in ("torch", "jax"):
            with pytest.raises(TypeError, match=r"axis 0 of y .* x has no labels"):
                klcore.kl_div(x, frame([2, 1, 0]))
            with pytest.raises(ValueError, match="axis 0 of y and axis 0 of weights have different labels"):
                klcore.kl_div(x, frame("uvw"), weights=pd.Series(W, list("uwv")))
            klcore.kl_div(x, frame("uvw"), weights=pd.Series(W, list("uvw")))


# ---- lists of classes ------------------------------------------------------------------------------------------------

BEST = np.array([[3, 0], [1, -1], [2, 3]])
LIST = {"indices": BEST, "tail": "bucket", "return_grad": PAIR}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_list_classes(name):
    """By position, for either argument."""
    x, make = A[:, :2], TABLES[name]
    expected = klcore.kl_div(x, B, **LIST)
    same(klcore.kl_div(make(x), make(B), **LIST | {"indices": make(BEST)}), expected)
    same(klcore.kl_div(x, B, **LIST | {"indices": make(BEST)}), expected)
    mass = W / 4
    expected = klcore.kl_div(x, B, **LIST, tail_mass=mass)
    for vector in (pl.Series(mass), xr.DataArray(mass, dims=["row"]), list(mass)):
        same(klcore.kl_div(make(x), make(B), **LIST | {"indices": make(BEST)}, tail_mass=vector), expected)


@pytest.mark.parametrize("library", ["numpy", "jax", "dask"])
def test_labels_of_lists(library):
    """Labels of rows are compared; labels of the list's columns are not classes of y."""
    with contextlib.nullcontext(np.asarray) if library == "numpy" else lending(library) as lend:
        x, y, indices = lend(np.array(A[:, :2])), lend(np.array(B)), pd.DataFrame(BEST, columns=["best", "next"])
        klcore.kl_div(x, y, indices=indices, tail="bucket")
        with pytest.raises(TypeError, match=r"axis 0 of indices .*2, 1, 0.* x has no labels"):
            klcore.kl_div(x, y, indices=indices.set_axis([2, 1, 0]), tail="bucket")
        named, mass = indices.set_axis(list("uvw")), pd.Series(W / 4, list("uwv"))
        with pytest.raises(ValueError, match="axis 0 of indices and axis 0 of tail_mass have different labels"):
            klcore.kl_div(x, y, indices=named, tail="bucket", tail_mass=mass)
        klcore.kl_div(x, y, indices=named, tail="bucket", tail_mass=mass.reindex(list("uvw")))
        turned = {"indices": named.T, "tail": "bucket", "axis": 0}
        klcore.kl_div(x.T, y.T, **turned, weights=pd.Series(W, list("uvw")))
        with pytest.raises(ValueError, match="axis 1 of indices and axis 0 of tail_mass have different labels"):
            klcore.kl_div(x.T, y.T, **turned, tail_mass=mass)


def test_tables_of_all_that_lists_take():
    """Also as x and y, whose classes have different labels."""
    x = frame(columns=["best", "next"], a=A[:, :2])
    klcore.kl_div(x, frame(a=B), indices=pd.DataFrame(BEST, columns=x.columns), tail="bucket")
    with pytest.raises(ValueError, match="axis 1 of x and axis 1 of indices have different labels"):
        klcore.kl_div(x, frame(a=B), indices=pd.DataFrame(BEST, columns=["next", "best"]), tail="bucket")
    with pytest.raises(ValueError, match="axis 0 of y and axis 0 of indices have different labels"):
        klcore.kl_div(A[:, :2], frame("uvw", a=B), indices=pd.DataFrame(BEST, list("uwv")), tail="bucket")
    with pytest.raises(TypeError, match=r"indices, .*dtype object"):
        klcore.kl_div(A[:, :2], B, indices=pd.DataFrame(BEST).convert_dtypes().mask(BEST < 0), tail="bucket")


# ---- numbers that mean something else --------------------------------------------------------------------------------


class Units(np.ndarray):
    """Like astropy's Quantity and unyt's arrays: NumPy's functions treat it differently."""

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        raise NotImplementedError

    @property
    def value(self):
        return self.view(np.ndarray)


class Measured(WithArray):
    """Like pint's Quantity: not a subclass of NumPy's array."""

    __array_ufunc__ = Units.__array_ufunc__

    @property
    def magnitude(self):
        return self.a


class NoUfuncs(WithArray):
    __array_ufunc__ = None


class Dense:
    """Like pydata/sparse: refuses to be converted implicitly."""

    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not unasked")

    def todense(self):
        return self.a


class Readings:
    """Numbers with a unit that NumPy does not see, like astropy's CCDData."""

    unit = "adu"

    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return self.a


def _of_objects(a):
    rows = np.empty(len(a), object)
    rows[:] = list(a)
    return rows


MEANINGS = {
    "units": (lambda a: a.view(Units), "x.view(numpy.ndarray)", "x.value"),
    "measured": (Measured, "x.magnitude"),
    "no ufuncs": (NoUfuncs, "NoUfuncs"),
    "masked": (np.ma.array, "masked array", "x.filled(value)"),
    "scipy.sparse array": (scipy.sparse.csr_array, "sparse csr_array", "x.toarray()"),
    "scipy.sparse matrix": (scipy.sparse.coo_matrix, "sparse coo_matrix", "x.toarray()"),
    "pydata/sparse": (Dense, "x.todense()"),
    "Dataset": (lambda a: xr.Dataset({"a": (("row", "class"), a)}), "x, of type xarray", "Dataset"),
    "LazyFrame": (lambda a: pl.DataFrame(np.array(a)).lazy(), "x is of type polars", "LazyFrame"),
    "objects": (lambda a: pd.DataFrame(a).astype(object), "dtype object", "x.to_numpy(dtype=float)"),
    "text": (lambda a: pd.DataFrame(a).astype(str), "x", "dtype"),
    "dates": (lambda a: pd.DataFrame(np.full((3, 4), datetime.datetime(2000, 1, 1))), "x has dtype datetime64"),
    "str": (lambda a: "0.5", "x is of type builtins.str", "numbers"),
    "bytes": (lambda a: b"0.5", "x is of type builtins.bytes"),
    "bytearray": (lambda a: bytearray(b"0.5"), "x is of type builtins.bytearray"),
    "ragged": (lambda a: [[0.5], [0.5, 0.5]], "x, of type list, cannot be converted to a NumPy array"),
    "a list of columns": (
        lambda a: tuple(pd.Series(row) for row in a),
        "x is a tuple of pandas",
        "numpy.stack(",
    ),
    "a list of lists of masked": (lambda a: [[np.ma.array(row)] for row in a], "x is a list of numpy.ma", "mask"),
    "a list of units": (lambda a: [row.view(Units) for row in a], "x is a list of", "Units", "numpy.stack("),
    "a list of tensors": (
        lambda a: list(importlib.import_module("torch").tensor(a)),
        "x is a list of torch.Tensor",
        "torch",
    ),
    "a column of rows": (lambda a: pd.Series(list(a)), "its elements are lists or arrays", "numpy.stack("),
    "an array of rows": (lambda a: _of_objects(a), "its elements are lists or arrays", "numpy.stack("),
    "long double": (lambda a: a.astype(np.longdouble), "x has dtype", ".astype(float)"),
    "records": (lambda a: np.zeros(3, [("a", "f8")]), "x has dtype", "structured_to_unstructured("),
    "a unit beside": (Readings, "x is of type", "units"),
}
HINTS = {
    "x.view(numpy.ndarray)",
    "x.value",
    "x.magnitude",
    "x.toarray()",
    "x.todense()",
    "x.to_numpy(dtype=float)",
}


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", *EMULATED])
@pytest.mark.parametrize("name", MEANINGS)
def test_other_meanings(name, library):
    """Refused with the argument's name, for every argument and whatever the other ones are; and the hint works."""
    make, *words = MEANINGS[name]
    given = make(np.array(A))
    with lending(library) as lend:
        a = lend(np.array(B))
        device = {"device": "cuda"} if library == "emulated" else {}
        for arrays in ({"x": given, "y": a}, {"x": a, "y": given}, {"x": given, "y": [0.25] * 4}):
            of = "x" if arrays["x"] is given else "y"
            with pytest.raises((TypeError, ValueError)) as raised:
                klcore.kl_div(**arrays, **device)
            message = str(raised.value)
            expected = [f"{of}{word[1:]}" if word.startswith("x") else word for word in words]
            assert [word for word in expected if word not in message] == [], message
        with pytest.raises((TypeError, ValueError), match="weights"):
            klcore.kl_div(a, a, weights=given)
        for hint in HINTS.intersection(words):
            klcore.kl_div(eval(hint, {"x": given, "numpy": np}), B)


def test_astropy():
    units = pytest.importorskip("astropy.units", reason="astropy is not installed here")
    with pytest.raises(TypeError, match=r"x is of type astropy\.units.*Quantity.*x\.value"):
        klcore.kl_div(A * units.km, A * 1000 * units.m)


# ---- arrays of two libraries -----------------------------------------------------------------------------------------


def lending(library):
    """A context with a function that creates an array of that library."""
    return _Lending(library)


class _Lending:
    def __init__(self, library):
        self.library = library
        self.device = computing_on(library) if library in ("emulated", "cuda") else None

    def __enter__(self):
        if self.device is not None:
            return self.device.__enter__().put
        if self.library == "numpy":
            return np.asarray
        if self.library == "torch":
            return importlib.import_module("torch").tensor
        if self.library == "jax":
            return importlib.import_module("jax.numpy").asarray
        if self.library == "dask":
            return importlib.import_module("dask.array").from_array
        return Lent

    def __exit__(self, *error):
        return self.device.__exit__(*error) if self.device is not None else None


class Lent:
    """An array of an unknown library, which lends its memory."""

    def __init__(self, a):
        self.a = np.array(a)

    def __dlpack__(self, **keywords):
        return self.a.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return (1, 0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int8", ">f8", "float16"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_numpy_beside(library, swap, dtype):
    """The result belongs to the other library, with the gradients' shapes and dtypes."""
    with lending(library) as lend:
        a, b = np.array(A, "float32"), (10 * B).astype(dtype)
        mixed, alone = (a, lend(b.astype(b.dtype.newbyteorder("=")))) if swap else (lend(a), b), (lend(a),)
        other = lend(b.astype(b.dtype.newbyteorder("=")))
        expected = klcore.kl_div(*alone, other, return_grad=PAIR, weights=lend(W))
        for weights in (W, lend(W), list(W), pd.Series(W)):
            same(klcore.kl_div(*mixed, return_grad=PAIR, weights=weights), expected)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("kind", ["reversed", "transposed", "read-only", "gaps", "field", "pandas"])
def test_numpy_of_any_layout_beside(library, kind):
    records = np.zeros((3, 4), [("flag", "u1"), ("value", "f8")])
    records["value"] = B
    b = {
        "reversed": B[::-1, ::-1].copy()[::-1, ::-1], "transposed": np.array(B.T).T, "read-only": B,
        "gaps": np.repeat(B, 2, 0)[::2], "field": records["value"], "pandas": pd.DataFrame(B),
    }[kind]  # fmt: skip
    with lending(library) as lend:
        same(klcore.kl_div(lend(np.array(A)), b), klcore.kl_div(lend(np.array(A)), lend(np.array(B))))


def test_numpy_is_not_copied_for_pytorch(monkeypatch):
    torch, kernels = importlib.import_module("torch"), importlib.import_module("klcore.backends.torch.kernels")
    seen = []
    compute = kernels.compute
    monkeypatch.setattr(kernels, "compute", lambda call: seen.append(call.y) or compute(call))
    for b in (np.array(B), B, B[:, ::1], np.array(B.T).T):
        klcore.kl_div(torch.tensor(A), b)
        assert seen.pop().data_ptr() == b.ctypes.data


def test_numpy_beside_pytorch_that_learns():
    torch = importlib.import_module("torch")
    x = torch.tensor(A, requires_grad=True)
    klcore.kl_div(x, B, reduction="sum").backward()
    expected = klcore.kl_div(A, B, reduction="sum", return_grad="x")[1]
    np.testing.assert_array_equal(x.grad.numpy(), expected)
    y = torch.tensor(A, requires_grad=True)
    klcore.kl_div(B, y, reduction="sum", weights=W).backward()
    np.testing.assert_array_equal(y.grad, klcore.kl_div(B, A, reduction="sum", weights=W, return_grad="y")[1])


def test_numpy_beside_pytorch_compiled():
    torch = importlib.import_module("torch")
    loss = torch.compile(lambda x, y: klcore.kl_div(x, y), backend="eager")
    same(loss(torch.tensor(A), np.array(B)), klcore.kl_div(torch.tensor(A), torch.tensor(B)))


def test_numpy_beside_jax_traced():
    jax = importlib.import_module("jax")
    x = jax.numpy.asarray(np.array(A, "f4"))
    b = np.array(B, "f4")
    expected = klcore.kl_div(x, jax.numpy.asarray(b), weights=W)
    same(jax.jit(lambda x: klcore.kl_div(x, b, weights=W))(x), expected)
    gradient = jax.grad(lambda x: klcore.kl_div(x, b, reduction="sum"))(x)
    np.testing.assert_array_equal(gradient, klcore.kl_div(np.array(A, "f4"), b, reduction="sum", return_grad="x")[1])


@pytest.mark.parametrize("of_weights", ["numpy", "torch", "jax", "dask", "dlpack", "pandas"])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "dask", "dlpack", *EMULATED])
def test_weights_of_another_library(library, of_weights):
    """Accepted, or refused by name."""
    with lending(library) as lend:
        x, y = lend(np.array(A)), lend(np.array(B))
        w = pd.Series(W) if of_weights == "pandas" else lending(of_weights).__enter__()(W)
        refused = ("torch", "jax", "dlpack") if library == "dask" else ("dask",)
        if of_weights in refused:
            with pytest.raises(TypeError, match="weights is "):
                klcore.kl_div(x, y, weights=w)
            return
        found = klcore.kl_div(x, y, weights=w)
        found = found.get() if library == "emulated" else np.asarray(found)
        np.testing.assert_allclose(found, klcore.kl_div(A, B, weights=W), rtol=1e-5)


def test_a_tensor_on_a_gpu_beside_numpy():
    """Not moved implicitly. (If PyTorch has no GPU, a device without memory stands in.)"""
    memory, torch = importlib.import_module("klcore.backends.torch.memory"), importlib.import_module("torch")

    class OnGpu:
        device = torch.device("cuda", 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "check", lambda t, name: None)
        patch.setattr(memory.torch, "Tensor", OnGpu)
        for arrays in ((OnGpu(), np.array(B)), (pd.DataFrame(B), OnGpu())):
            with pytest.raises(TypeError, match=r"in host memory, .* a tensor on cuda:0; move one .* device="):
                memory.operands(*arrays, None)


# ---- options ---------------------------------------------------------------------------------------------------------

HUGE = 10**400
BAD = {
    "return_grad": [
        ("x", ["y"]), ["x", ["y"]], [["x"]], ({},), {"x": 1}, {"x"}, np.array(["x"]), np.array(["x", "y"]), b"x", HUGE,
        10**5000, True, (np.array(["x"]), "y"),
    ],
    "space": [
        ["probs", ["probs"]], ("probs", ["logits"]), ("probs", {}), {}, np.array("probs"), np.array(["probs", "probs"]),
        b"probs", HUGE, 10**5000, None,
    ],
    "axis": [HUGE, -HUGE, 10**5000, 2**63, 1.0, True + 0.0, [0], [[0]], np.array([0, 1]), {}, "0", b"0", None],
    "temperature": [
        HUGE, -HUGE, 10**5000, [1.0, 2.0], [[1.0]], {}, "1", b"1", np.array([1.0, 2.0]), None, 1 + 0j, float("nan"),
        {1.0},
    ],
    "reduction": [np.array(["row"]), np.array(["row", "sum"]), ["row"], ("row",), {}, b"row", HUGE, 10**5000, None, 0],
    "device": [np.array(["cpu"]), ["cpu"], {}, b"cpu", 0, HUGE, "cuda:" + 5000 * "9"],
    "out": ["text", {}, HUGE, [0.0, 0.0, 0.0], np.array(["x"] * 3), (["x"],)],
}  # fmt: skip
CASES = [(name, k) for name, values in BAD.items() for k in range(len(values))]
WAYS = ("numpy", "numpy, axis 0", "torch", "torch with autograd", "torch compiled", "jax", "dask", "dlpack", *EMULATED)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "k"), CASES, ids=str)
def test_options_that_are_none(way, name, k):
    value = BAD[name][k]
    library = way.partition(" ")[0].rstrip(",")
    with lending(library) as lend, contextlib.ExitStack() as stack:
        a, b = lend(np.array(A)), lend(np.array(B))
        options = {"space": "logits", name: value}
        if way == "numpy, axis 0":
            options = {"axis": 0, **options}
        call = klcore.kl_div
        if way == "torch with autograd":
            b.requires_grad_()
        if way == "torch compiled":
            # The right call is compiled, and the wrong one falls back, as after a few other calls, whatever ran before:
            # for some of these numbers and arrays the compiler itself raises errors.
            torch = importlib.import_module("torch")
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=1))
            call = torch.compile(klcore.kl_div, backend="eager")
        call(a, b, space="logits", **{} if way != "numpy, axis 0" else {"axis": 0})  # a right one first
        with pytest.raises((TypeError, ValueError)) as raised:
            call(a, b, **options)
        assert name in str(raised.value), str(raised.value)[:300]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "dask", "dlpack", *EMULATED])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("axis", 1, 1.0), ("axis", 0, -0.0), ("temperature", 1.0, 1 + 0j), ("reduction", "row", np.array(["row"]))],
    ids=str,
)
def test_what_only_equals_a_right_word_is_refused_ever_after(library, name, right, wrong):
    with lending(library) as lend:
        a, b = lend(np.array(A)), lend(np.array(B))
        for _ in range(3):
            klcore.kl_div(a, b, space="logits", **{name: right})
            with pytest.raises((TypeError, ValueError), match=name):
                klcore.kl_div(a, b, space="logits", **{name: wrong})


def compat(module):
    return importlib.import_module(f"klcore.compat.{module}")


LOG_A = np.log(A)
COMPAT = {
    "pytorch reduction": ("reduction", lambda v: compat("pytorch").kl_div(LOG_A, B, reduction=v)),
    "pytorch reduction of a loss": ("reduction", lambda v: compat("pytorch").KLDivLoss(reduction=v)(LOG_A, B)),
    "pytorch log_target": ("log_target", lambda v: compat("pytorch").kl_div(LOG_A, B, reduction="sum", log_target=v)),
    "rtorch reduction": ("reduction", lambda v: compat("rtorch").nnf_kl_div(LOG_A, B, v)),
    "rtorch reduction of a loss": ("reduction", lambda v: compat("rtorch").nn_kl_div_loss(v)),
    "keras reduction": ("reduction", lambda v: compat("keras").KLDivergence(reduction=v)),
    "keras dtype": ("dtype", lambda v: compat("keras").KLDivergence(dtype=v)),
    "keras epsilon": ("epsilon", lambda v: compat("keras").set_epsilon(v)),
    "mxnet nonbatch": ("nonbatch", lambda v: compat("mxnet").KLDivLoss(nonbatch=v)),
    "mxnet axis": ("axis", lambda v: compat("mxnet").KLDivLoss(False, v)(LOG_A, B)),
    "mxnet batch_axis": ("batch_axis", lambda v: compat("mxnet").KLDivLoss(batch_axis=v)(LOG_A, B)),
    "mxnet weight": ("weight", lambda v: compat("mxnet").KLDivLoss(weight=v)(LOG_A, B)),
}
TRUTHS = {
    "pytorch size_average": ("size_average", lambda v: compat("pytorch").kl_div(LOG_A, B, size_average=v)),
    "pytorch reduce": ("reduce", lambda v: compat("pytorch").kl_div(LOG_A, B, reduce=v)),
    "mxnet from_logits": ("from_logits", lambda v: compat("mxnet").KLDivLoss(v)(LOG_A, B)),
    "puzzlelib maxlabels": ("maxlabels", lambda v: compat("puzzlelib").KLDivergence(v)(A.astype("f4"), B.astype("f4"))),
    "puzzlelib normTarget": (
        "normTarget",
        lambda v: compat("puzzlelib").KLDivergence(normTarget=v)(A.astype("f4"), B.astype("f4")),
    ),
}
NEVER = [
    np.array(["sum"]), np.array(["sum", "mean"]), np.array(["float32"]), ["sum"], [["sum"]], {"sum": 1}, ("x", ["y"]),
    HUGE, 10**5000, np.array([0.5, 1.0]),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(NEVER)))
@pytest.mark.parametrize("case", COMPAT)
def test_options_of_compat_that_are_none(case, k):
    name, call = COMPAT[case]
    with pytest.raises((TypeError, ValueError, AssertionError), match=name):
        call(NEVER[k])


@pytest.mark.parametrize("case", TRUTHS)
def test_truths_of_compat_that_are_none(case):
    name, call = TRUTHS[case]
    with pytest.raises((TypeError, AssertionError), match=name):
        call(np.array([True, False]))


@pytest.mark.parametrize("layout", ["strided", "jagged"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:reduction='mean'")
def test_nested_tensors(layout, which):
    torch = importlib.import_module("torch")
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=getattr(torch, layout))
    arrays = [torch.ones(2, 3), torch.ones(2, 3)]
    arrays[which] = nested
    for call in (compat("pytorch").kl_div, compat("mxnet").KLDivLoss(), compat("puzzlelib").KLDivergence()):
        with pytest.raises(TypeError, match=r"is a nested tensor, .*to_padded_tensor"):
            call(*arrays)


# ---- 64 dimensions ---------------------------------------------------------------------------------------------------

REDUCTIONS = ("row", "sum", "rowmean", "none", "batchmean", "mean")


def many(a):
    """All the axes that NumPy supports."""
    return a.reshape((1,) * (64 - a.ndim) + a.shape)


MANY = pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 1 has 32 dimensions")


@MANY
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax", *EMULATED])
@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_all_dimensions(library, reduction, axis):
    """Broadcasting against an array of few dimensions, in every position of the class axis."""
    few = (np.array(A), np.array(B if axis != -1 else B[0]))
    if axis:
        arrays = many(few[0]), few[1]
    else:
        arrays = few[0].reshape(3, *(1,) * 62, 4), few[1].reshape(3, *(1,) * 62, 4)[..., :1]
        few = few[0], few[1][:, :1]
    expected = klcore.kl_div(*few, axis=axis, reduction="none")
    with lending(library) as lend:
        for a, b in (arrays, arrays[::-1]):
            _, *gradients = klcore.kl_div(lend(a), lend(b), axis=axis, reduction=reduction, return_grad=PAIR)
            assert [g.shape for g in gradients] == [a.shape, b.shape]
        found = klcore.kl_div(*map(lend, arrays), axis=axis, reduction="none", weights=lend(np.ones((1,) * 63)))
        found = found.get() if library == "emulated" else np.asarray(found)
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5)
        if reduction == "row":
            found = klcore.kl_div(*map(lend, arrays), axis=axis, weights=lend(np.array(2.0)))
            assert found.ndim == 63


@MANY
@pytest.mark.parametrize("term", ["pytorch", "keras", "mxnet"])
def test_all_dimensions_of_compat(term):
    x, y = many(np.array(A, "f4")), np.array(B[0], "f4")
    if term == "pytorch":
        call = compat(term).kl_div
        pairs, options = ((np.log(x), y), (y, x)), {"reduction": "batchmean"}
    else:
        call, options = {"keras": compat("keras").KLDivergence(), "mxnet": compat("mxnet").KLDivLoss()}[term], {}
        pairs = ((x, x * 0.5),) if term == "mxnet" else ((x, y[None]), (x, x))
    for a, b in pairs:
        call(a, b, **options)
        gradients = call.value_and_grad(a, b, **options)[1]
        assert [g.shape for g in gradients] == [a.shape, b.shape]


# ---- out= ------------------------------------------------------------------------------------------------------------

OVERLAPPING = {
    "windows": (12, (3, 4), (1, 1)),
    "rows that overlap": (12, (3, 4), (2, 1)),
    "a step of 0": (4, (3, 4), (0, 1)),
    "turned": (12, (3, 4), (1, 2)),
}


@pytest.mark.parametrize("library", ["numpy", "torch", "dlpack", *EMULATED])
@pytest.mark.parametrize("name", OVERLAPPING)
@pytest.mark.parametrize("reduction", ["none", "row"])
def test_out_that_overlaps_itself(library, name, reduction):
    """Later elements would overwrite earlier ones: for the terms, or for a gradient."""
    size, shape, steps = OVERLAPPING[name]
    with lending(library) as lend:
        a, b, buffer = lend(np.array(A)), lend(np.array(B)), lend(np.full(size, 7.0))
        if library == "torch":
            out = buffer.as_strided(shape, steps)
        elif library == "emulated":
            out = importlib.import_module("cupy").ndarray(shape, float, buffer.data, tuple(8 * s for s in steps))
        else:
            out = np.lib.stride_tricks.as_strided(np.full(size, 7.0), shape, tuple(8 * s for s in steps))
            buffer = out
        if library == "dlpack":
            out, kept = Lent([]), out
            out.a = kept
        for _ in range(2):
            with pytest.raises(ValueError, match=r"out .*share memory; pass a new"):
                klcore.kl_div(a, b, reduction=reduction, **(
                    {"out": out} if reduction == "none" else {"out": (None, out), "return_grad": "y"}
                ))  # fmt: skip
        buffer = buffer.get() if library == "emulated" else np.asarray(buffer)
        assert (buffer == 7).all()


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_views_of_ordinary_arrays_do_not_overlap(data):
    """Slices, reversals, transposes, new axes, fields: everything that indexing produces."""
    destinations = importlib.import_module("klcore.backends.destinations")
    dtype = data.draw(st.sampled_from(["f4", "f8", [("a", "f8"), ("b", "u1")]]))
    a = np.zeros(data.draw(st.lists(st.integers(0, 5), max_size=5)), dtype)
    a = a["a"] if a.dtype.names else a
    for _ in range(data.draw(st.integers(0, 3))):
        index = tuple(data.draw(st.one_of(st.just(np.newaxis), st.slices(n))) if n else slice(None) for n in a.shape)
        a = a[index].transpose(data.draw(st.permutations(range(a[index].ndim))))
    assert not destinations.shares_with_itself(a.shape, a.strides, a.itemsize)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_no_overlap_is_missed(data):
    """For small arrays of any strides, all addresses are compared."""
    destinations = importlib.import_module("klcore.backends.destinations")
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = data.draw(st.lists(st.integers(-20, 20), min_size=len(shape), max_size=len(shape)))
    size = data.draw(st.sampled_from([1, 2, 4]))
    starts = [sum(i * step for i, step in zip(at, strides, strict=True)) for at in np.ndindex(*shape)]
    covered = [byte for start in starts for byte in range(start, start + size)]
    if len(set(covered)) < len(covered):
        assert destinations.shares_with_itself(shape, strides, size)


# ---- no examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["row", "none", "sum", "rowmean"])
def test_vmap_of_no_examples(reduction):
    torch, jax = importlib.import_module("torch"), importlib.import_module("jax")

    def loss(x, y):
        return klcore.kl_div(x, y, reduction=reduction)

    x = torch.ones(0, 3, 4, requires_grad=True)
    expected = jax.vmap(loss)(jax.numpy.ones((0, 3, 4)), jax.numpy.ones((0, 3, 4)))
    found = torch.vmap(loss)(x, torch.ones(0, 3, 4))
    assert found.shape == expected.shape
    found.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.vmap(torch.func.grad(lambda x: klcore.kl_div(x, x, reduction="sum")))(x.detach()).shape == x.shape
    assert torch.vmap(loss, (0, None))(x, torch.ones(3, 4)).shape == expected.shape


def test_out_of_another_meaning():
    with pytest.raises(TypeError, match=r"out for the value must be a plain numpy\.ndarray, found Units"):
        klcore.kl_div(A, B, out=np.empty(3).view(Units))


def test_a_bad_weight_is_found():
    weights = np.ones((4, 3))
    weights[2, 1], weights[3, 0] = np.nan, -1
    with pytest.raises(ValueError, match=r"finite and >= 0; found nan at index \(2, 1\), and 1 more"):
        klcore.kl_div(np.ones((4, 3, 2)), np.ones(2), weights=weights)


@pytest.mark.parametrize("reduction", ["row", "none", "sum"])
def test_numpy_beside_pytorch_may_change(reduction):
    """Before backward uses it: PyTorch notices such a change only for tensors."""
    torch = importlib.import_module("torch")
    x, y = torch.tensor(A, requires_grad=True), np.array(B)
    value = klcore.kl_div(x, y, reduction=reduction, weights=W)
    y[:] = 0.25
    value.sum().backward()
    expected = klcore.kl_div(A, B, reduction="sum", weights=W, return_grad="x")[1]
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-12)


def test_many_values_in_bfloat16_of_jax():
    jnp = importlib.import_module("jax.numpy")
    keras = importlib.import_module("klcore.compat.keras")
    x = jnp.ones((40_000, 4), jnp.bfloat16) / 4
    assert keras.kl_divergence(x, x).shape == (40_000,)


def test_a_list_that_holds_itself():
    itself = []
    itself.append(itself)
    with pytest.raises((TypeError, ValueError), match="x, of type list"):
        klcore.kl_div(itself, [1.0])
