"""The losses of seven systems, rebuilt: a module each, with the names, arguments and numbers of the original.

All are imported by name, and handle arguments: words, checks, dtypes, weights. `pytorch`, `rtorch`, `keras`, `mxnet`
and `puzzlelib` import none of those libraries. The terms are in src/kl_compat.h, and the engine adds them up, for
arrays of NumPy, CuPy, PyTorch and JAX; `keras` takes TensorFlow's tensors as well. `trl` and `liger` are for PyTorch's
tensors, and import it. Their losses are klcore's public functions.
"""
