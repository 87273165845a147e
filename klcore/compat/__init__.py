"""The KL losses of five systems, rebuilt: a module each, with the names, arguments and numbers of the original.

`pytorch`, `rtorch`, `keras`, `mxnet` and `puzzlelib` are imported by name, and import none of those libraries. They
handle arguments: words, checks, dtypes, weights. The terms are in src/kl_compat.h, and the engine adds them up, for
arrays of NumPy, CuPy, PyTorch and JAX.
"""
