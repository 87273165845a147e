"""The number of threads of the CPU kernels. It never changes a result, only how long it takes."""

import operator
import os
from contextvars import ContextVar
from typing import Any, SupportsIndex

MOST = 2**31 - 1  # a C int
_within: ContextVar[Any] = ContextVar("klcore_threads", default=None)  # (the innermost `threads` block's n, outer ones)
_set: int | None = None  # by set_num_threads
_found: int | None = None  # by _default; not _set, which a first call could overwrite while another thread sets it


def _positive(n: SupportsIndex, what: str) -> int:
    try:
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"{what} must be an integer, found {n!r}") from None
    if number < 1:
        raise ValueError(f"{what} must be at least 1, found {number}")
    if number > MOST:
        raise ValueError(f"{what} must be at most {MOST}; found {_shown(number)}")
    return number


def _shown(number: int) -> str:
    return str(number) if number.bit_length() < 100 else f"an integer of {number.bit_length()} bits"


def _usable_cpus() -> int:
    """The number of processors that this process may use, limited to the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
        if quota != "max":
            cpus = min(cpus, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cpus


def _default() -> int:
    for name in ("KLCORE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP allows a list, one number per nesting level
        if text:
            if text.isdecimal() and int(text):
                return _positive(int(text), name)
            if name.startswith("KLCORE"):  # OpenMP ignores invalid values of its own variable, and so does klcore
                raise ValueError(
                    f"the environment variable {name} must be a whole number of at least 1, found {text!r}; unset "
                    "it to use all processors"
                )
    return _usable_cpus()


def get_num_threads() -> int:
    """The number of threads that klcore's CPU kernels may use in this context.

    This is the number of the innermost :class:`threads` block; without one, that of :func:`set_num_threads`; else that
    of the environment variable ``KLCORE_NUM_THREADS`` or ``OMP_NUM_THREADS`` at the first call; else the number of
    processors that this process may use. Small inputs use one thread in any case. No call uses more threads than there
    are processors, or than the system lets it create.

    Returns
    -------
    int
        The number of threads.

    See Also
    --------
    threads : Sets the number for a ``with`` block.
    set_num_threads : Sets the number for the whole process.

    Examples
    --------
    >>> import klcore
    >>> klcore.get_num_threads() >= 1
    True
    """
    global _found
    within = _within.get()
    n: int | None = within[0] if within else _set
    if n is None:
        n = _found
    if n is None:
        n = _found = _default()
    return n


def set_num_threads(n: SupportsIndex) -> None:
    """Use at most `n` threads from now on, in all Python threads of this process.

    Parameters
    ----------
    n : int
        At least 1. Results have the same bits for every `n`.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is out of range.

    See Also
    --------
    threads : Sets the number for a ``with`` block.
    get_num_threads : Returns the number.

    Examples
    --------
    >>> import klcore
    >>> before = klcore.get_num_threads()
    >>> klcore.set_num_threads(1)
    >>> klcore.get_num_threads()
    1
    >>> klcore.set_num_threads(before)
    """
    global _set
    _set = _positive(n, "the number of threads")


class threads:
    """Use at most `n` threads inside a ``with`` block, in this Python thread or task only.

    Parameters
    ----------
    n : int
        At least 1. Results have the same bits for every `n`.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is out of range.

    See Also
    --------
    set_num_threads : Sets the number for the whole process.
    get_num_threads : Returns the number.

    Examples
    --------
    >>> import klcore
    >>> with klcore.threads(1):
    ...     klcore.get_num_threads()
    1
    """

    def __init__(self, n: SupportsIndex) -> None:
        self._n = _positive(n, "the number of threads")

    def __enter__(self) -> None:
        _within.set((self._n, _within.get()))

    def __exit__(self, *_: object) -> None:
        _within.set(_within.get()[1])
