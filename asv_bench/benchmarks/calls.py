"""What the benchmarks call: operations by name, on arrays that are prepared in advance.

Parameters are always operation, device, dtype and shape, in this order, as plain strings that are the same on every
machine. They also name the results of other commits: if something is measured differently, it needs a new name.
"""

import functools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # teaches NumPy "bfloat16"
import numpy as np
from floor import buffer

import klcore
from klcore import operations

NAMES = ["operation", "device", "dtype", "shape"]
DEVICES = ["cpu", "cuda"]
IN_CACHE = "1024x256"  # 1 MiB of float32; one thread on the CPU, timed by `timer`: arithmetic alone
PAST_CACHE = "2048x32768"  # 256 MiB of float32 per array, more than caches hold; all threads

# function, its arguments; gradients are with respect to y
OPERATIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    f"{space}{', gradient' if grad else ''}": (klcore.kl_div, {"space": space, "return_grad": grad})
    for space in ("probs", "log_probs", "logits")
    for grad in (None, "y")
} | {
    "probs to logits, gradient": (klcore.kl_div, {"space": ("probs", "logits"), "return_grad": "y"}),
    "entropy of logits": (klcore.entropy, {"space": "logits"}),
    "cross-entropy, probs to logits": (klcore.cross_entropy, {"space": ("probs", "logits")}),
    "sum": (klcore.kl_div, {"reduction": "sum"}),
    "terms": (klcore.kl_div, {"reduction": "none"}),
    "weights": (klcore.kl_div, {"reduction": "rowmean", "weights": True}),
    "one y for all": (klcore.kl_div, {}),
    "one y for all, gradient": (klcore.kl_div, {"return_grad": "y"}),
    "axis 0": (klcore.kl_div, {"axis": 0}),
    "64 classes listed, gradient": (
        klcore.kl_div,
        {"space": ("probs", "logits"), "tail": "bucket", "return_grad": "y"},
    ),
}
OTHERS = {  # all but kl_div: value and gradient
    f"{row.name}, {space}": (
        getattr(klcore, row.name),
        {"space": space, "return_grad": row.gradients[-1], **row.needed},
    )
    for row in operations.OPERATIONS.values()
    for space in ("probs", "logits")
    if row.name != "kl_div"
}
OPERATIONS |= OTHERS


class Call(NamedTuple):
    """`launch()` starts the operation, `wait()` returns when it is done; `inputs` and `outputs` hold the arrays."""

    launch: Callable[[], Any]
    wait: Callable[[], Any]
    inputs: list[Any]
    outputs: list[Any]

    def __call__(self) -> None:
        self.launch()
        self.wait()


@functools.cache
def library(device: str) -> ModuleType:
    """NumPy or CuPy. Without a usable GPU, raises the error that makes asv skip a benchmark."""
    if device == "cpu":
        return np
    try:
        klcore.kl_div([1.0], [1.0], device=device)
    except klcore.BackendUnavailableError as error:
        raise NotImplementedError(str(error)) from error
    import cupy

    return cupy


def waiting(device: str) -> Callable[[], Any]:
    """A function that returns when the device has finished everything that was launched."""
    return (lambda: None) if device == "cpu" else library(device).cuda.get_current_stream().synchronize


def timer(device: str, shape: str) -> Callable[[], float]:
    """The clock for calls on that shape; a single thread's clock stops while other threads have the processor."""
    return time.perf_counter if device == "cuda" or shape == PAST_CACHE else time.thread_time


def random_logits(rows: int, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, n))


def to_space(space: str, logits: np.ndarray) -> np.ndarray:
    """The same distributions in another space."""
    if space == "logits":
        return logits
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.exp(log_probs) if space == "probs" else log_probs


def full(space: str, dtype: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """An array of that shape with every page touched: a few random rows, repeated."""
    array = buffer(shape, dtype)
    few = to_space(space, random_logits(min(16, shape[0]), shape[1], seed))
    array.reshape(-1, *few.shape)[...] = few.astype(dtype)
    return array


@functools.cache
def prepare(operation: str, device: str, dtype: str, shape: str) -> Call:
    """One operation, with arrays for everything it returns except one value per row."""
    xp = library(device)
    function, words = OPERATIONS[operation]
    rows, n = map(int, shape.split("x"))
    words = dict(words)
    space = words.get("space", "probs")
    spaces = [space, space] if isinstance(space, str) else list(space)
    if operations.OPERATIONS[function.__name__].single:
        del spaces[1]
    sizes = [(rows, n), (1 if "one y" in operation else rows, n)]
    inputs = [xp.asarray(full(s, dtype, size, seed)) for seed, (s, size) in enumerate(zip(spaces, sizes, strict=False))]
    if operation == "axis 0":
        inputs = [a.reshape(n, rows) for a in inputs]
    if "tail" in words:
        inputs[0] = xp.ascontiguousarray(inputs[0][:, :: n // 64])
        words["indices"] = xp.asarray(np.tile(np.arange(0, n, n // 64), (rows, 1)))
    if "weights" in words:
        words["weights"] = xp.asarray(np.linspace(0.5, 1.5, rows))
    outputs = []
    if words.get("return_grad"):
        outputs = [xp.asarray(buffer(inputs[-1].shape, dtype))]
        words["out"] = (None, *outputs)
    elif words.get("reduction") == "none":
        outputs = [xp.asarray(buffer((rows, n)))]
        words["out"] = outputs[0]
    threads = 1 if shape == IN_CACHE else klcore.get_num_threads()

    def launch() -> None:
        with klcore.threads(threads):
            function(*inputs, **words)

    return Call(launch, waiting(device), inputs, outputs)


@functools.cache  # asv calls setup() before every sample
def warm(*params: str) -> Call:
    """The same, called once so that everything is compiled."""
    call = prepare(*params)
    call()
    return call
