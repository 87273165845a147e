"""What klcore was built with and what it uses here."""

import importlib
import os
import platform
import sys
from typing import Any, Literal, overload

from klcore.backends import backends
from klcore.backends.threads import get_num_threads
from klcore.version import __version__


def _version(number: int) -> str:
    """CUDA's way to write 13.2 is 13020."""
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
        "NVRTC": ".".join(map(str, importlib.import_module("klcore.backends.nvrtc").version())),
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
    """Print version, compiler, instruction sets, threads and devices.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print, or return the same as a nested dict.

    Returns
    -------
    dict or None
        Of ``mode="dicts"`` only.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', found {mode!r}")
    cpu = importlib.import_module("klcore._cpu")
    importlib.import_module("klcore.backends.cpu")  # chooses the instruction set
    config: dict[str, Any] = {
        "klcore": {"version": __version__, "numerics": "v1"},
        "python": {"version": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"},
        "numpy": {"version": importlib.import_module("numpy").__version__},
        "cpu": {
            "compiler": cpu.COMPILER,
            "instruction sets built": ", ".join(cpu.instruction_sets()),
            "instruction set in use": cpu.instruction_set(),
            "OpenMP": str(cpu.OPENMP) if cpu.OPENMP else "no: one thread",
            "threads": get_num_threads(),
            "processors": os.cpu_count(),
        },
        "cuda": _cuda(),
        "backends": backends(),
    }
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
    return None
