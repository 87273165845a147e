"""What all tests share: devices and dtypes to run over, Hypothesis' profile for CI, and a fresh interpreter."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

import klcore

DEVICES = [name.strip() for name in os.environ.get("KLCORE_TEST_DEVICES", "cpu").split(",") if name.strip()]
DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# CI must not fail by chance, nor because its machine is slow.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


class Device:
    """Where a test computes: `put` moves a NumPy array there, `get` brings a result back."""

    def __init__(self, name):
        self.name = name
        self.numpy = name == "cpu"  # results are NumPy arrays
        if not self.numpy:
            import cupy

            self._cupy = cupy

    def put(self, array):
        return array if self.numpy else self._cupy.asarray(array)

    def get(self, array):
        return array if self.numpy else self._cupy.asnumpy(array)

    def array_type(self):
        return np.ndarray if self.numpy else self._cupy.ndarray


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    """Every device of KLCORE_TEST_DEVICES. One that is missing fails the test: a skip would hide that nothing ran."""
    try:
        klcore.kl_div([0.5, 0.5], [0.25, 0.75], device=request.param)
        return Device(request.param)
    except (klcore.BackendUnavailableError, ValueError, ImportError) as error:
        pytest.fail(f"KLCORE_TEST_DEVICES asks for {request.param!r}, which cannot be used: {error}")


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(scope="session")
def python():
    """Run code in a fresh interpreter, for what only a process of its own can show. Returns what it printed."""

    def run(code, *arguments, timeout=120, warnings="error", fails=False, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KLCORE_NUM", "KLCORE_ISA", "OMP_"))}
        env.update({k: str(v) for k, v in environment.items()})
        filters = warnings if isinstance(warnings, tuple) else (warnings,)
        done = subprocess.run(
            [sys.executable, *(f"-W{w}" for w in filters), "-c", code, *map(str, arguments)],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run
