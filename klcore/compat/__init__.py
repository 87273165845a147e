"""The losses of seven systems, one module per system, with the names, arguments and results of the original.

Import the modules by name. They handle arguments: options, checks, dtypes, weights. `pytorch`, `rtorch`, `keras`,
`mxnet` and `puzzlelib` do not import the original library. Their terms are in src/kl_compat.h, and the engine adds them
up, for arrays of NumPy, CuPy, PyTorch and JAX; `keras` also takes TensorFlow tensors. `trl` and `liger` are for PyTorch
tensors, and import PyTorch. Their losses are computed by klcore's public functions.
"""
