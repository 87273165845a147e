"""The worked example of docs/backends.md, examples/xarray_backend.py: DataArrays in, DataArrays out, NumPy's bits."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from conftest import OF_TWO

import klcore

xr = pytest.importorskip("xarray", reason="xarray is not installed here")
EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("no examples beside the tests: these are of an installed package", allow_module_level=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """As a user registers it; undone afterwards."""
    registry = importlib.import_module("klcore.backends")
    for name in ("_MODULES", "_libraries", "_loaded"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.syspath_prepend(EXAMPLES)
    klcore.register_backend("xarray", "xarray_backend")


@pytest.fixture
def x():
    values = np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 3))
    return xr.DataArray(values, dims=["year", "document", "topic"], coords={"document": ["a", "b", "c"]})


@pytest.fixture
def y():
    """With other dimensions, in another order: no years."""
    values = np.random.default_rng(1).dirichlet(np.ones(5), size=3).T
    return xr.DataArray(values, dims=["topic", "document"], coords={"topic": list("vwxyz")})


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


@pytest.mark.parametrize("operation", OF_TWO)
@pytest.mark.parametrize("reduction", ["row", "sum", "rowmean", "none"])
def test_values_and_gradients(operation, reduction, x, y):
    function = getattr(klcore, operation)
    value, dx, dy = function(x, y, axis="topic", reduction=reduction, return_grad=("x", "y"))
    expected, ex, ey = function(x.values, y.values.T[None], reduction=reduction, return_grad=("x", "y"))
    same(value, expected)
    same(dx, ex)
    same(dy, ey[0].T)
    assert value.dims == {"row": x.dims[:2], "none": x.dims}.get(reduction, ())
    assert set(value.coords) == {"row": {"document"}, "none": {"document", "topic"}}.get(reduction, set())
    assert dx.dims == x.dims
    assert dy.dims == y.dims
    assert list(dy.topic) == list("vwxyz")


def test_entropy_of_logits_in_any_order(x):
    value, dx = klcore.entropy(x.transpose("topic", ...), space="logits", axis=0, return_grad="x")
    expected, ex = klcore.entropy(x.values, space="logits", return_grad="x")
    same(value, expected)
    same(dx.transpose(*x.dims), ex)


def test_weights_and_lists(x):
    flat = [0.1, 0.2, 0.3, 0.4, 0.0]
    weights = xr.DataArray([0.0, 1.0, 2.0], dims="document")
    value = klcore.kl_div(flat, x, reduction="rowmean", weights=weights)
    same(value, klcore.kl_div(np.array(flat), x.values, reduction="rowmean", weights=np.array([0.0, 1.0, 2.0])))


def test_dask_stays_lazy(x, y):
    pytest.importorskip("dask.array", reason="Dask is not installed here")
    value = klcore.kl_div(x.chunk(), y.chunk(), axis="topic")
    assert value.chunks is not None
    same(value.compute(), klcore.kl_div(x, y, axis="topic"))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "dimension of all operands", {"axis": "year"}),
        (ValueError, "dimension of all operands", {"axis": 3}),
        (ValueError, "reduction must be one of", {"reduction": "rows"}),
        (TypeError, "indices= is not for DataArrays", {"indices": np.zeros(1, int), "tail": "zero"}),
        (TypeError, "out= is not for DataArrays", {"out": np.empty(3)}),
    ],
)
def test_refuses(error, message, change, x, y):
    with pytest.raises(error, match=message):
        klcore.kl_div(x, y, **{"axis": "topic", **change})


def test_coordinates_have_to_agree(x):
    with pytest.raises(ValueError, match="document"):
        klcore.kl_div(x, x.assign_coords(document=["a", "b", "d"]))
