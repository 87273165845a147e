"""Prepare what a GPU borrowed for a quarter of an hour needs: ``make gpu-carry``.

    python benchmarks/gpu_carry.py [--to .carry] [--python 3.12] [--processes N] [--list]

writes, for gpu_run.py: klcore's kernels for an H100 or H200, compiled by the NVRTC version that is installed there;
wheels of what is missing there; and manifest.json, which names the sources of the kernels. It needs no GPU. The list of
kernels is not written down but recorded: every stage makes its calls on a CuPy that does no work (stub.py), and the
tests run with kernels that do nothing. Compiling takes 0.7 s per kernel; it continues where it was interrupted, and the
most valuable kernels come first.
"""

import argparse
import ctypes
import functools
import importlib
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gpu_bench
import gpu_bits
import gpu_run
import numpy as np
import stub
from gpu_device import Gpu, numpy_dtype, own_kernels
from tqdm import tqdm

ROOT = gpu_run.ROOT
NVRTC = "13.0.88"  # the one of CUDA 13.0: the key of a kernel contains the compiler's major and minor version
ARCH = 90
CACHE = ROOT / "build" / f"gpu-carry-{NVRTC}"
WHEELS = ("liger_kernel", "setuptools>=77", "cython>=3.1")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
RECORD = "KLCORE_GPU_CARRY"  # where the pytest plugin writes the requested kernels
MEBI = 1 << 20


# ---- which kernels ---------------------------------------------------------------------------------------------------


class Planned(Gpu):
    """A GPU that does nothing; its arrays hold nothing."""

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def synchronize(self) -> None:
        pass

    free = synchronize

    def fill(self, rows: int, n: int, dtype: str, space: str, seed: int, side: int) -> Any:
        return self.cupy.empty((rows, n), numpy_dtype(dtype))


def of_stages(gpu: Gpu) -> None:
    """The calls of all stages, the most valuable first."""
    for shape, dtype, space, given in gpu_bits.light_cases(gpu).values():
        x, y = (gpu.cupy.empty(shape, numpy_dtype(dtype)) for _ in range(2))
        keywords = {name: value for name, value in given.items() if name != "broadcast"}
        gpu_bits.light_call(gpu, [x, y[:1] if "broadcast" in given else y], space, **keywords)
    for stage in gpu_run.report.BENCHMARKS:
        for task in gpu_bench.tasks(stage, False):
            gpu_bench.Klcore(gpu_bench.Data(gpu, task.case)).call(0)
    for make in gpu_bits.roles(gpu).values():
        make().run()
    for group in gpu_bits.groups():
        for make in gpu_bits.cases(gpu, group).values():
            make().run()
    for name in gpu_bits.LARGE:
        dtype, space = name.split()
        for rows in (8_200, 1):
            for gradient in (None, "y"):
                x, y = (gpu.fill(rows, 262_144, dtype, space, 0, side) for side in (0, 1))
                gpu_bits.klcore.kl_div(x, y, space=space, return_grad=gradient)
    for _, call in gpu_bits.profiled(gpu):
        call()


def planned() -> list[tuple[str, ...]]:
    """The options of every kernel that the stages request, in order."""
    numbers = gpu_bits.numbers
    gpu_bits.numbers = lambda rows, n, space, dtype, side: np.empty((rows, n), numpy_dtype(dtype))  # type: ignore[assignment]
    stub.builds.clear()
    try:
        with stub.installed() as cupy:
            of_stages(Planned(cupy))
    finally:
        gpu_bits.numbers = numbers
    return [options for options, _ in stub.builds]


def pytest_sessionstart() -> None:
    """This file is also a pytest plugin: it only records which kernels the emulator is asked for."""
    emulator = importlib.import_module("emulator.device")

    def build(options: tuple[str, ...], arch: int) -> Path:
        with open(os.environ[RECORD], "a") as file:
            file.write(json.dumps([options, arch]) + "\n")
        return Path("none")

    class Kernel(stub.RawKernel):
        def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
            pass

    emulator._build = build
    emulator.RawModule.get_function = lambda self, name: Kernel()
    attributes = emulator.Device.attributes.fget
    emulator.Device.attributes = property(lambda self: attributes(self) | stub.H100)
    for name in [name for name in dir(np.testing) if name.startswith("assert_")]:
        setattr(np.testing, name, lambda *arguments, **keywords: None)


def of_tests() -> list[tuple[str, ...]]:
    """The options of every kernel that the tests request. The tests fail, since nothing is computed, but continue:
    -O."""
    path = ROOT / "build" / f"gpu-carry-tests-{gpu_run.source_digest()}.jsonl"
    part = path.with_suffix(".part")
    part.parent.mkdir(exist_ok=True)
    part.unlink(missing_ok=True)
    words = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "gpu_carry", "--assert=plain", "-W", "default"]
    words += ["-p", "no:cacheprovider", "--tb=no", *(test for test in gpu_run.TESTS if "torch" not in test)]
    paths = os.pathsep.join([str(gpu_run.HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"KLCORE_TEST_DEVICES": "emulated", RECORD: str(part), "PYTHONPATH": paths}
    if not path.exists():  # otherwise these sources have been asked already
        with open(path.with_suffix(".log"), "w") as log:
            subprocess.run(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
        part.replace(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list(dict.fromkeys(tuple(options) for options, arch in lines if arch == ARCH))


# ---- compiling -------------------------------------------------------------------------------------------------------


@functools.cache
def nvrtc() -> Any:
    """klcore's module, using the compiler of that version."""
    folder = ROOT / "build" / f"nvrtc-{NVRTC}"
    if not folder.exists():
        words = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"nvidia-cuda-nvrtc=={NVRTC}"]
        subprocess.run([sys.executable, *words], check=True)
    libraries = folder / "nvidia" / "cu13" / "lib"
    ctypes.CDLL(str(next(libraries.glob("libnvrtc-builtins.so.*"))), ctypes.RTLD_GLOBAL)
    module = importlib.import_module("klcore.backends.cuda.nvrtc")
    library = module._load(str(libraries / "libnvrtc.so.13"))
    module._library = lambda: library
    module.version.cache_clear()
    return module


def build(options: tuple[str, ...]) -> Path:
    return Path(nvrtc().build(options, ARCH))


def compile_all(wanted: list[tuple[str, ...]], processes: int) -> list[Path]:
    nvrtc()  # downloaded once
    os.environ["KLCORE_CACHE_DIR"] = str(CACHE)
    with ProcessPoolExecutor(processes) as pool:
        found = list(tqdm(pool.map(build, wanted, chunksize=4), total=len(wanted), desc="kernels", mininterval=5))
        return [*found, pool.submit(own_kernels_of_this_compiler).result()]


def own_kernels_of_this_compiler() -> Path:
    nvrtc()
    return own_kernels(ARCH)


# ---- packing ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / ".carry", help="the folder: .carry")
    parser.add_argument("--python", default="3.12", help="that of the machine with the GPU: 3.12")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="only print which kernels")
    args = parser.parse_args()
    wanted = list(dict.fromkeys([*planned(), *of_tests()]))
    if args.list:
        print(*(" ".join(options) for options in wanted), sep="\n")
        return
    cubins = compile_all(wanted, args.processes)
    args.to.mkdir(exist_ok=True)
    for path in args.to.iterdir():
        path.unlink()
    with tarfile.open(args.to / "cache.tar.xz", "w:xz", preset=6) as archive:
        for path in tqdm(cubins, desc="packing", mininterval=5):
            archive.add(path, path.name)
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(args.to)]
    words += ["--python-version", args.python, "--implementation", "cp"]
    subprocess.run([*words, *(w for p in PLATFORMS for w in ("--platform", p)), *WHEELS], check=True)
    sizes = {path.name: path.stat().st_size for path in sorted(args.to.iterdir())}
    raw = sum(path.stat().st_size for path in cubins)
    about = {"kernels": gpu_run.kernel_digest(), "sources": gpu_run.source_digest(), "nvrtc": NVRTC, "arch": ARCH}
    about |= {"cubins": len(cubins), "bytes": raw, "sizes": sizes}
    (args.to / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")
    print(
        f"{args.to}: {len(cubins)} kernels, {raw / MEBI:.0f} MiB unpacked; {sum(sizes.values()) / MEBI:.1f} MiB in all:"
    )
    print(*(f"  {size / MEBI:6.1f} MiB {name}" for name, size in sizes.items()), sep="\n")


if __name__ == "__main__":
    main()
