"""What klcore was built with and what it uses here."""

import importlib
import os
import platform
import sys
from typing import Any

from klcore.backends import backends
from klcore.backends.threads import get_num_threads
from klcore.version import __version__


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
        "cuda": {"available": "no: " + importlib.import_module("klcore.backends.cuda").missing()},
        "backends": backends(),
    }
    if mode == "dicts":
        return config
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
    return None
