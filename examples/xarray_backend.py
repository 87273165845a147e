"""A backend of klcore for xarray, in one file: the worked example of docs/backends.md.

    klcore.register_backend("xarray", "xarray_backend")

From then on klcore takes DataArrays and returns DataArrays. Dimensions are matched by name, so `axis` may be a name,
and `weights` a DataArray. Coordinates have to agree, and come back. No maths here: the arrays within are klcore's to
compute with, be they NumPy's, CuPy's or Dask's.
"""

from functools import partial

import numpy as np
import xarray as xr

import klcore


def _named(a, like):
    """A list or number next to a DataArray has its last dimensions."""
    return a if isinstance(a, xr.DataArray) else xr.DataArray(np.asarray(a), dims=like.dims[like.ndim - np.ndim(a) :])


def _call(function, operands, space, axis, reduction, weights, temperature, return_grad, out, device):
    if out is not None:
        raise TypeError("out= is not for DataArrays, whose memory belongs to the array within: pass `.data`")
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
    result = function(
        *arrays, space=space, reduction=reduction, weights=weights, temperature=temperature, return_grad=return_grad,
        device=device,
    )  # fmt: skip
    value, *gradients = result if isinstance(result, tuple) else (result,)
    dims = {"row": batch, "none": order}.get(reduction, [])
    coords = {name: c for a in given for name, c in a.coords.items() if set(c.dims) <= set(dims)}
    value = xr.DataArray(value, dims=dims, coords=coords)
    if not gradients:
        return value
    wanted = [return_grad] if isinstance(return_grad, str) else return_grad
    of = {"x": given[0], "y": given[-1]}
    return value, *(_like(g, of[name], order) for g, name in zip(gradients, wanted, strict=True))


def _like(gradient, a, order):
    gradient = xr.Variable(order, gradient).squeeze([d for d in order if d not in a.dims])
    return a.copy(data=gradient.transpose(*a.dims).data)


def _binary(function, x, y, *arguments):
    return _call(function, (x, y), *arguments)


def entropy(x, *arguments):
    return _call(klcore.entropy, (x,), *arguments)


kl_div = partial(_binary, klcore.kl_div)
rel_entr = partial(_binary, klcore.rel_entr)
cross_entropy = partial(_binary, klcore.cross_entropy)
