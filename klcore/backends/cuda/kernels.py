"""The kernels of src/kl_cuda.cu and src/kl_sparse.cu: the macros that each is compiled with, and how it is loaded."""

from functools import cache
from typing import Any

from klcore import _cpu
from klcore.backends import options, rows
from klcore.backends.cuda import devices, nvrtc
from klcore.operations import KL_DIV, Operation

OUTPUTS, TERMS = {"x": 1, "y": 2}, 4  # KL_OUTPUTS
ENTRIES = {
    "kl_units": "KL_UNITS", "kl_narrow": "KL_NARROW", "kl_rows": "KL_ROWS", "kl_fold": "KL_FOLD", "kl_sum": "KL_SUM",
    "kl_weights": "KL_SUM", "kl_summed": "KL_SUMMED", "kl_summed_fold": "KL_SUMMED",
    # of src/kl_sparse.cu
    "kl_keys": "KL_LISTED", "kl_others_fold": "KL_LISTED", "kl_classes": "KL_LISTED", "kl_by_x": "KL_SLOPES",
    "kl_by_y": "KL_SLOPES", "kl_others": "KL_OTHERS", "kl_spread": "KL_SPREAD", "kl_spread_fold": "KL_SPREAD",
}  # fmt: skip
# kernels that stage chunks in shared memory
_STAGING = ("kl_units", "kl_narrow", "kl_rows", "kl_summed", "kl_others", "kl_spread")


def is_beside(operation: Operation, spaces: tuple[int, int]) -> bool:
    """Whether only one of x and y is logits, in a divergence: norms are double, log-probabilities in two parts.

    Such a kernel takes as many registers as a wide one, and does not use hardware exponentials.
    """
    return options.LOGITS in spaces and spaces[0] != spaces[1] and operation.form == _cpu.BY_RATIO


def is_fast(operation: Operation, spaces: tuple[int, int], dtypes: tuple[int, int], wide: bool) -> bool:
    """Whether to use hardware exponentials: 16-bit inputs arrive faster than exact exponentials can be computed."""
    beside = is_beside(operation, spaces) or operation.form == _cpu.BY_CLASS
    return not wide and not beside and max(_cpu.SIZES[d] for d in dtypes) == 2


def tempered_by(temperature: Any) -> str:
    """The macro for one temperature, or for one per row; none if the temperature is 1."""
    return "TEMPERATURES" if not isinstance(temperature, float) else "TEMPERATURE" if temperature != 1 else ""


def macros(
    operation: Operation, spaces: tuple[int, int], dtypes: tuple[int, int], wide: bool, outputs: int,
    entries: tuple[str, ...], tempered: str = "", factors: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """The macros that kl_cuda.cu is compiled with for these kernels; `tempered` comes from `tempered_by`."""
    values = {
        "OPERATION": operation.code, "SPACE_X": spaces[0], "SPACE_Y": spaces[1], "X": dtypes[0], "Y": dtypes[1],
        "WIDE": int(wide), "OUTPUTS": outputs,
    }  # fmt: skip
    if tempered:
        values[tempered] = 1
    if factors:
        values["FACTORS"] = 1
    if is_fast(operation, spaces, dtypes, wide):
        values["FAST16"] = 1
    return (
        *(f"-DKL_{name}={value}" for name, value in values.items()),
        *sorted({f"-D{ENTRIES[entry]}" for entry in entries}),
    )


def sum_macros() -> tuple[str, ...]:
    pair, float32 = (options.SPACES["probs"],) * 2, (rows.CODES["float32"],) * 2
    return macros(KL_DIV, pair, float32, False, 0, ("kl_sum",))  # kl_sum depends on none of these


@cache
def listed_macros(entry: str, dtypes: tuple[str, str], wide: bool) -> tuple[str, ...]:
    """The macros for a kernel of src/kl_sparse.cu; `dtypes`: what it reads and writes; `wide`: compute in double."""
    spaces = options.SPACES["probs"], options.LOGITS  # a pair with exact exponentials; spaces have no other use
    return macros(KL_DIV, spaces, (rows.CODES[dtypes[0]], rows.CODES[dtypes[1]]), wide, 0, (entry,))


@cache
def states(operation: int, spaces: tuple[int, int], outputs: int, factors: bool) -> tuple[int, ...]:
    return _cpu.sweeps(operation, *spaces, False, bool(outputs & TERMS), bool(outputs & ~TERMS), factors)


@cache
def kernel(device: int, options: tuple[str, ...], name: str) -> Any:
    """A kernel, compiled if necessary, loaded on the current device, and set up to use its shared memory. It is CuPy's
    Function, which launches faster than a RawKernel."""
    properties = devices.properties(device)
    kernel = devices.library().RawModule(path=str(nvrtc.build(options, properties.arch))).get_function(name)
    if name in _STAGING:
        kernel.max_dynamic_shared_size_bytes = properties.shared
        kernel.preferred_shared_memory_carveout = 100  # percent; launches.py assumes all of it
    return kernel.kernel
