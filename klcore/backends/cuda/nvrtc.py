"""Compile src/kl_cuda.cu and src/kl_sparse.cu for one GPU architecture with NVRTC, and cache the result on disk.

CuPy can compile, too, but it appends options of its own, among them flush-to-zero, and the last option wins; and it
needs a driver. Here NVRTC is called through ctypes, without CuPy or a GPU, so that any machine can check the kernels.
"""

import atexit
import contextlib
import ctypes
import hashlib
import importlib
import importlib.resources
import importlib.util
import os
import re
import secrets
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from klcore.backends import BackendUnavailableError

SOURCES = (
    "kl_math.h", "kl_compat.h", "kl_estimate.h", "kl_tree.h", "kl_store.h", "kl_logits.h", "kl_family.h", "kl_renyi.h",
    "kl_sparse.h", "kl_cuda.cu", "kl_sparse_steps.h", "kl_sparse.cu",
)  # fmt: skip

# These come after the caller's options, so that they win: the last option counts.
_OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # constexpr functions, which both compilers read, have no __device__
    "--ftz=false",
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
)
# For CUDA 13 and CUDA 12: the file name of the library, and its folder in pip's `nvidia` package.
_LINUX = (("libnvrtc.so.13", "cu13/lib"), ("libnvrtc.so.12", "cuda_nvrtc/lib"))
_WINDOWS = (("nvrtc64_130_0.dll", "cu13/bin/x86_64"), ("nvrtc64_120_0.dll", "cuda_nvrtc/bin"))

_lock = threading.Lock()
_private: tempfile.TemporaryDirectory[str] | None = None  # the cache of a process that cannot write the shared one


# ---- the source ------------------------------------------------------------------------------------------------------


@cache
def source() -> str:
    """The files of SOURCES as one, because NVRTC has no include path; #line keeps file and line in its messages."""
    folder = importlib.resources.files("klcore._src")
    own = re.compile(rf'[ \t]*#[ \t]*(?:pragma[ \t]+once|include[ \t]*"(?:{"|".join(map(re.escape, SOURCES))})").*')
    parts = []
    for name in SOURCES:
        text = folder.joinpath(name).read_text(encoding="utf-8")
        lines = ["" if own.fullmatch(line) else line for line in text.splitlines()]
        parts += [f'#line 1 "{name}"', *lines]
    return "\n".join(parts) + "\n"


# ---- the compiler ----------------------------------------------------------------------------------------------------


@cache
def _library() -> ctypes.CDLL:
    """NVRTC, from pip, conda or the CUDA installer, or from the system's library path."""
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")  # comes with CuPy 14
        return _load(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError, OSError):
        pass
    for name in _files():
        try:
            return _load(name)
        except OSError:
            continue
    raise BackendUnavailableError(
        "NVRTC, NVIDIA's runtime compiler, is not installed or cannot be loaded; install it with: "
        'pip install "klcore[cuda13]" (or "klcore[cuda12]" for a driver of CUDA 12)'
    )


def _files() -> Iterator[str]:
    """Where to look for NVRTC without cuda.pathfinder: in pip's packages, then on the system's library path."""
    names = _WINDOWS if sys.platform == "win32" else _LINUX
    roots: list[str] = []
    with contextlib.suppress(ValueError):  # find_spec raises for a module whose __spec__ is None
        spec = importlib.util.find_spec("nvidia")
        roots = list(spec.submodule_search_locations or []) if spec else []
    for name, folder in names:
        yield from (str(Path(root, folder, name)) for root in roots)
    yield from (name for name, _ in names)


def _load(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    text, number, size = ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_size_t)
    program = ctypes.c_void_p
    for name, types in {
        "nvrtcVersion": (number, number),
        "nvrtcGetNumSupportedArchs": (number,),
        "nvrtcGetSupportedArchs": (number,),
        "nvrtcCreateProgram": (ctypes.POINTER(program), text, text, ctypes.c_int, program, program),
        "nvrtcDestroyProgram": (ctypes.POINTER(program),),
        "nvrtcCompileProgram": (program, ctypes.c_int, ctypes.POINTER(text)),
        "nvrtcGetProgramLogSize": (program, size),
        "nvrtcGetProgramLog": (program, text),
        "nvrtcGetCUBINSize": (program, size),
        "nvrtcGetCUBIN": (program, text),
    }.items():
        getattr(library, name).argtypes = types
    library.nvrtcGetErrorString.argtypes = (ctypes.c_int,)
    library.nvrtcGetErrorString.restype = text
    _load_builtins(library, path)
    return library


def _load_builtins(library: ctypes.CDLL, path: str) -> None:
    """Load the second library of NVRTC, which NVRTC loads by name when it compiles. With some pip packages the system
    does not search next to the first library, and NVRTC finds the second one only if it is loaded already."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    builtins = Path(path).with_name(f"libnvrtc-builtins.so.{major.value}.{minor.value}")
    if builtins.is_absolute() and builtins.exists():
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed: {_library().nvrtcGetErrorString(status).decode()}")


def _read(name: str, program: ctypes.c_void_p) -> bytes:
    """Read data from NVRTC, which takes two calls: one for the size, one for the bytes."""
    size = ctypes.c_size_t()
    _call(f"{name}Size", program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    _call(name, program, data)
    return data.raw


@cache
def version() -> tuple[int, int]:
    """The major and minor version of NVRTC, which are those of CUDA."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def supported() -> tuple[int, ...]:
    """The architectures that NVRTC supports, in ascending order: 90 for compute capability 9.0."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    archs = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", archs)
    return tuple(sorted(archs))


def _require(arch: int) -> None:
    if arch in supported():
        return
    (major, minor), oldest = version(), supported()[0]
    gpu = f"NVRTC {major}.{minor} does not support this GPU, of compute capability {arch // 10}.{arch % 10}"
    if arch > oldest:
        package = "nvidia-cuda-nvrtc" if major > 12 else f"nvidia-cuda-nvrtc-cu{major}"
        newer = "" if major > 12 else ', or switch to CUDA 13: pip install "klcore[cuda13]"'
        raise BackendUnavailableError(f"{gpu}; upgrade it: pip install --upgrade {package}{newer}")
    if arch >= 70:
        raise BackendUnavailableError(f'{gpu}, but NVRTC 12 does: pip install "klcore[cuda12]"')
    raise BackendUnavailableError(f"{gpu}; klcore needs 7.0 or newer")


def _compile(source: str, options: tuple[str, ...], arch: int) -> tuple[bytes, str]:
    """The cubin and the log of NVRTC."""
    _require(arch)
    words = [*options, f"--gpu-architecture=sm_{arch}", *_OPTIONS]
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"klcore.cu", 0, None, None)
    try:
        given = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        status = _library().nvrtcCompileProgram(program, len(words), given)
        log = _read("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
        if status:
            raise RuntimeError(
                f"NVRTC {'.'.join(map(str, version()))} cannot compile klcore's kernels for sm_{arch} with "
                f"{' '.join(options) or 'no options'}: {_library().nvrtcGetErrorString(status).decode()}\n{log}"
            )
        return _read("nvrtcGetCUBIN", program), log
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def compile(source: str, options: tuple[str, ...], arch: int) -> bytes:
    """Compile for exactly one architecture.

    Parameters
    ----------
    source : str
        CUDA C++ without #include.
    options : tuple of str
        Options of NVRTC. C++17 and IEEE arithmetic (no flush-to-zero, no contraction, exact division) are fixed.
    arch : int
        90 for compute capability 9.0.

    Returns
    -------
    bytes
        A cubin.

    Raises
    ------
    BackendUnavailableError
        If NVRTC is missing or does not support the architecture.
    RuntimeError
        If the source does not compile; the message has the log of NVRTC.
    """
    with _lock:
        return _compile(source, options, arch)[0]


# ---- the cache -------------------------------------------------------------------------------------------------------
# An entry is a file KEY-DIGEST.cubin, where KEY is a hash of the inputs and DIGEST one of the content. A truncated or
# damaged file does not match its DIGEST, and is compiled again.


def build(options: tuple[str, ...], arch: int) -> Path:
    """The path of klcore's kernels as a cubin, which is compiled on the first call with these options, and then cached.

    Parameters
    ----------
    options : tuple of str
        Options of NVRTC, such as ``-DNAME=VALUE``.
    arch : int
        90 for compute capability 9.0.

    Returns
    -------
    pathlib.Path
        A file in the folder KLCORE_CACHE_DIR, or in the user's cache folder; if that cannot be written, in a temporary
        folder of this process.

    Raises
    ------
    BackendUnavailableError, RuntimeError
        As for `compile`.
    """
    key = _key(options, arch)
    with _lock:
        found = _find(key)
        if found is None:
            cubin, _ = _compile(source(), options, arch)
            found = _keep(f"{key}-{_digest(cubin)}.cubin", cubin)
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _key(options: tuple[str, ...], arch: int) -> str:
    return _digest(repr((source(), options, _OPTIONS, version(), arch)).encode())


def _folder() -> Path:
    """The cache folder: KLCORE_CACHE_DIR, or the platform's folder for caches."""
    chosen = os.environ.get("KLCORE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "klcore"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "klcore"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "klcore"


def _find(key: str) -> Path | None:
    try:
        folders = [_folder()]
    except RuntimeError:  # there is no home directory
        folders = []
    if _private is not None:
        folders.append(Path(_private.name))
    for folder in folders:
        try:
            for path in folder.glob(f"{key}-*.cubin"):
                if path.stem == f"{key}-{_digest(path.read_bytes())}":
                    return path
        except OSError:
            continue
    return None


def _keep(name: str, cubin: bytes) -> Path:
    global _private
    where = "the user's cache directory"
    try:
        folder = _folder()
        where = str(folder)
        return _write(folder, name, cubin)
    except (OSError, RuntimeError) as error:
        if _private is None:
            _private = tempfile.TemporaryDirectory(prefix="klcore-", ignore_cleanup_errors=True)
            atexit.register(_private.cleanup)
            warnings.warn(
                f"cannot cache compiled CUDA kernels in {where} ({error}), so every process will compile them again; "
                "set KLCORE_CACHE_DIR to another directory",
                UserWarning,
                stacklevel=3,
            )
    return _write(Path(_private.name), name, cubin)


def _write(folder: Path, name: str, cubin: bytes) -> Path:
    """Write a file atomically, so that no other process sees half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    part = folder / f"{secrets.token_hex(8)}.part"  # unique, also among machines that share the folder
    try:
        part.write_bytes(cubin)
        part.replace(path)
    except PermissionError:  # on Windows, while another process reads the same entry
        if not path.exists() or path.read_bytes() != cubin:
            raise
    finally:
        part.unlink(missing_ok=True)
    return path
