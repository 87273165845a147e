"""Runs sharded_jax.py in a process whose JAX has four devices: JAX fixes their number when it is imported."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("jax", reason="JAX is not installed")


@pytest.mark.parametrize("chosen", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])
def test_in_a_process_with_four_devices(chosen):
    path = pathlib.Path(__file__).with_name("sharded_jax.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", chosen, str(path)]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
