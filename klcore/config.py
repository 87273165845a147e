"""What klcore was built with and what it finds here: `klcore.show_config`, which `python -m klcore` calls."""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import sys
from typing import Any, Literal, overload

from klcore.backends import list_backends
from klcore.backends.threads import get_num_threads
from klcore.version import __version__

LIBRARIES = (  # the names on PyPI
    "numpy", "ml_dtypes", "cupy", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12",
    "torch", "jax", "jaxlib", "keras", "dask",
)  # fmt: skip
VARIABLES = ("KLCORE_", "OMP_", "CUDA_VISIBLE_DEVICES")  # prefixes of their names


def _libraries() -> dict[str, str]:
    """The versions of those installed, from their metadata, because an import may take seconds."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(number: int) -> str:
    """CUDA writes version 13.2 as 13020."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cuda() -> dict[str, Any]:
    sentence = importlib.import_module("klcore.backends.cuda").missing()
    if sentence:
        return {"available": f"no: {sentence}"}
    cupy = importlib.import_module("cupy")
    runtime = cupy.cuda.runtime
    entries = {
        "available": "yes",
        "CuPy": cupy.__version__,
        "NVRTC": ".".join(map(str, importlib.import_module("klcore.backends.cuda.nvrtc").version())),
        "driver": f"of CUDA {_version(runtime.driverGetVersion())}",
    }
    for k in range(runtime.getDeviceCount()):
        about = runtime.getDeviceProperties(k)
        capability = f"compute capability {about['major']}.{about['minor']}"
        entries[f"cuda:{k}"] = f"{about['name'].decode()}, {capability}, {about['totalGlobalMem'] / 2**30:.0f} GiB"
    return entries


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, dict[str, Any]]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print the versions, compiler, instruction sets, threads, devices and environment variables that klcore uses.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        "stdout" prints the configuration, "dicts" returns it as a nested dict.

    Returns
    -------
    dict or None
        The configuration with ``mode="dicts"``, else None.

    Raises
    ------
    ValueError
        For an unknown `mode`.

    See Also
    --------
    list_backends : The array libraries that klcore knows.

    Examples
    --------
    >>> import klcore
    >>> klcore.show_config("dicts")["klcore"]["version"] == klcore.__version__
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts'; found {mode!r}")
    cpu = importlib.import_module("klcore._cpu")
    importlib.import_module("klcore.backends.cpu")  # this import chooses the instruction set
    built = cpu.instruction_sets()
    config: dict[str, Any] = {
        "klcore": {"version": __version__, "numerics": "v2"},
        "python": {"version": " ".join(sys.version.split()), "platform": platform.platform()},
        "libraries": _libraries(),
        "cpu": {
            "processor": _processor(),
            "processors": os.cpu_count(),
            "compiler": cpu.COMPILER,
            "instruction sets built": ", ".join(built),
            "instruction sets of this processor": ", ".join(name for name in built if built[name]),
            "instruction set in use": cpu.instruction_set(),
            "OpenMP": str(cpu.OPENMP) if cpu.OPENMP else "no: one thread",
            "threads": get_num_threads(),
        },
        "cuda": _cuda(),
        "backends": list_backends(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
    }
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
    return None
