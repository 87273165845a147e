"""A klcore backend for xarray, in one file: the worked example of docs/backends.md.

    klcore.register_backend("xarray", "xarray_backend")

Then klcore accepts DataArrays and returns DataArrays. Dimensions are matched by name, so `axis` may be a name, and
`weights` a DataArray. Coordinates must agree, and are returned. There is no mathematics here: klcore computes with the
arrays inside, which may be NumPy's, CuPy's or Dask's.
"""

import numpy as np
import xarray as xr

from klcore import backends


def _named(a, like):
    """A list or number beside a DataArray gets its last dimensions."""
    return a if isinstance(a, xr.DataArray) else xr.DataArray(np.asarray(a), dims=like.dims[like.ndim - np.ndim(a) :])


def compute(call):
    if call.operation.is_loss:
        raise TypeError("klcore.compat takes no DataArrays: pass `.data`")
    if call.indices is not None:
        raise TypeError("indices= is not for DataArrays: pass `.data`")
    if call.out is not None:
        raise TypeError("out= is not for DataArrays, whose memory belongs to the array within: pass `.data`")
    operands = [a for a in (call.x, call.y) if a is not None]
    axis, weights = call.axis, call.weights
    like = next(a for a in operands if isinstance(a, xr.DataArray))
    given = xr.align(*(_named(a, like) for a in operands), join="exact")
    if isinstance(axis, int) and -like.ndim <= axis < like.ndim:
        axis = like.dims[axis]
    for a in given:
        if axis not in a.dims:
            raise ValueError(f"axis must be a dimension of all operands, found {axis!r} and {a.dims}")
    batch = [d for d in dict.fromkeys(d for a in given for d in a.dims) if d != axis]
    order = [*batch, axis]
    arrays = [a.variable.set_dims(order).data for a in given]  # in one order; missing dimensions of size 1: no copies
    if weights is not None:
        weights = _named(weights, given[0].isel({axis: 0})).variable.set_dims(batch).data
    y = None if call.y is None else arrays[1]
    result = backends.compute(call._replace(x=arrays[0], y=y, axis=-1, weights=weights))
    value, *gradients = result if isinstance(result, tuple) else (result,)
    dims = {"row": batch, "none": order}.get(call.reduction, [])
    coords = {name: c for a in given for name, c in a.coords.items() if set(c.dims) <= set(dims)}
    value = xr.DataArray(value, dims=dims, coords=coords)
    if not gradients:
        return value
    wanted = [call.return_grad] if isinstance(call.return_grad, str) else call.return_grad
    of = {"x": given[0], "y": given[-1]}
    return value, *(_like(g, of[name], order) for g, name in zip(gradients, wanted, strict=True))


def _like(gradient, a, order):
    gradient = xr.Variable(order, gradient).squeeze([d for d in order if d not in a.dims])
    return a.copy(data=gradient.transpose(*a.dims).data)
