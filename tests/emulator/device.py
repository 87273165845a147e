"""A stand-in for CuPy and NVRTC, on NumPy, g++ and emulator.h, so that klcore's CUDA backend runs unchanged.

``install()`` replaces them and ``uninstall()`` restores them; tests change ``settings``. The stand-in is as strict as
CuPy where CuPy is stricter than NumPy: arrays of the two do not mix, results without dimensions stay arrays, and
arguments that CuPy refuses are refused. Where hardware would fail silently, an EmulatorError says what happened. There
is one exception: ``numpy.asarray`` accepts these arrays, but refuses CuPy's.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


@dataclass
class Settings:
    seed: int = 0  # of the schedule; 0: everything in order
    threads: int = min(4, os.cpu_count() or 1)  # operating-system threads per launch
    architecture: str = "90"  # compute capability, as CuPy writes it
    devices: int = 1
    multiprocessors: int = 4  # per device
    sanitize: bool = False  # compile with ASan and UBSan, in a process started with sanitizer_environment()
    ucontext: bool = False  # switch threads as on other platforms than x86-64 Linux


settings = Settings()


class EmulatorError(RuntimeError):
    """A kernel or a launch did something that a GPU would refuse, or that is undefined."""


# ---- NVRTC -----------------------------------------------------------------------------------------------------------


def compile(source, options, arch):
    """Stand in for nvrtc.compile: returns the bytes of a shared library. Only options that define macros are used."""
    return _compiled(source, tuple(options), arch).read_bytes()


def _build(options, arch):
    """Stand in for nvrtc.build, for klcore's own kernels."""
    return _compiled(importlib.import_module("klcore.backends.cuda.nvrtc").source(), tuple(options), arch)


def _compiled(source, options, arch):
    """The path of the library."""
    flags = [*_flags(settings.sanitize), f"-DKL_EMULATOR_ARCH={arch}"]
    flags.append("-O0")  # tests spend more time compiling than computing
    macros = [o for o in options if o.startswith("-D")]
    launch = (HERE / "launch.h").read_text()

    def make(work):
        (work / "source.cu").write_text(source)
        (work / "unit.cpp").write_text('#include "emulator.h"\n#include "source.cu"\n#include "launch.h"\n')
        folders = [f"-I{folder}" for folder in (_header(flags), HERE, work)]
        return _run([*flags, *macros, "-shared", *folders, str(work / "unit.cpp")], work / "part.so")

    return _once(f"{_key(source, flags, macros, launch)}.so", make)


@functools.cache
def _emulator(sanitize, ucontext):
    """emulator.cpp, compiled and loaded."""
    flags = [*_flags(sanitize), f"-O{1 if sanitize else 2}", *(["-DEMULATOR_UCONTEXT"] if ucontext else [])]
    source = HERE / "emulator.cpp"

    def make(work):
        return _run([*flags, "-shared", str(source)], work / "runtime.so")

    library = ctypes.CDLL(str(_once(f"{_key(source.read_text(), flags)}.so", make)))
    library.emulator_runtime.restype = ctypes.c_void_p
    library.emulator_launch.restype = ctypes.c_char_p
    library.emulator_launch.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
    )
    return library


def _header(flags):
    """A folder with emulator.h and its precompiled header, which saves a fifth of a kernel's compile time."""

    def make(work):
        folder = work / "header"
        folder.mkdir()
        shutil.copy(HERE / "emulator.h", folder)
        if "clang" not in _compiler()[1]:
            _run([*flags, "-x", "c++-header", str(folder / "emulator.h")], folder / "emulator.h.gch")
        return folder

    return _once(f"{_key(flags)}.header", make)


def _run(words, made):
    done = subprocess.run([_compiler()[0], *words, "-o", str(made)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{made.name} does not compile for the emulator:\n{done.stderr}")
    return made


def _key(*what):
    header = (HERE / "emulator.h").read_text()
    return hashlib.sha256(repr((what, header, _compiler())).encode()).hexdigest()[:32]


def _once(name, make):
    """The path of a cached file, created once per machine, however many processes request it at the same time."""
    import fcntl  # not on Windows, where there is no emulator

    path = _cache() / name
    if path.exists():
        return path
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as work:
                make(Path(work)).replace(path)
    return path


def _cache():
    folder = Path(os.environ.get("KLCORE_EMULATOR_CACHE") or Path.home() / ".cache" / "klcore-emulator")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _compiler():
    name = os.environ.get("CXX", "g++")
    return name, subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _flags(sanitize):
    flags = ["-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno"]
    if "clang" not in _compiler()[1]:
        flags.append("-fno-gnu-unique")  # otherwise libraries with different macros would share variables
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and "fma" in cpu.read_text().split():
        flags.append("-mfma")  # the C library's fma is far slower; the bits are the same
    if sanitize:
        flags += ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return flags


def sanitizer_environment():
    """What a process needs in its environment to load code compiled with `settings.sanitize`."""
    # ASan must be loaded before everything else, and libstdc++ too: ASan would miss exceptions otherwise
    paths = [
        subprocess.run([_compiler()[0], f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Python itself leaks at exit, and NumPy deliberately requests more memory than there is
    return {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}


# ---- devices and streams ---------------------------------------------------------------------------------------------

_current = threading.local()  # .device: int, .stream
# compute capability -> KB of shared memory: the most per block, per multiprocessor
_SHARED = {"70": (96, 96), "75": (64, 64), "80": (163, 164), "86": (99, 100), "87": (163, 164), "89": (99, 100)}
_SHARED |= {"90": (227, 228), "100": (227, 228), "103": (227, 228), "120": (99, 100), "121": (99, 100)}


class Device:
    """cupy.cuda.Device"""

    def __init__(self, device=None):
        self.id = getattr(_current, "device", 0) if device is None else int(device)
        if not 0 <= self.id < settings.devices:
            raise EmulatorError(f"cudaErrorInvalidDevice: invalid device ordinal: {self.id}")
        self._left = []

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def use(self):
        _current.device = self.id

    def __enter__(self):
        self._left.append(getattr(_current, "device", 0))
        self.use()
        return self

    def __exit__(self, *error):
        _current.device = self._left.pop()

    def synchronize(self):
        """Nothing to wait for: kernels run immediately."""

    @property
    def compute_capability(self):
        return settings.architecture

    @property
    def attributes(self):
        block, multiprocessor = _SHARED[settings.architecture]
        return {
            "MultiProcessorCount": settings.multiprocessors,
            "WarpSize": 32,
            "MaxThreadsPerBlock": 1024,
            "MaxThreadsPerMultiProcessor": 1024 if settings.architecture == "75" else 2048,
            "MaxSharedMemoryPerBlock": 48 << 10,
            "MaxSharedMemoryPerBlockOptin": block << 10,
            "MaxSharedMemoryPerMultiprocessor": multiprocessor << 10,
            "ComputeCapabilityMajor": int(settings.architecture[:-1]),
            "ComputeCapabilityMinor": int(settings.architecture[-1]),
        }


class Stream:
    """cupy.cuda.Stream; kernels run immediately, whatever the stream."""

    def __init__(self, null=False, non_blocking=False):
        self.ptr = 0 if null else id(self)
        self._left = []

    @classmethod
    def from_external(cls, obj):
        if not hasattr(obj, "__cuda_stream__"):
            raise TypeError(f"Object of type {type(obj).__name__} does not implement the CUDA stream protocol")
        version, pointer = obj.__cuda_stream__()
        if version != 0 or type(pointer) is not int:
            raise TypeError(f"__cuda_stream__() must return (0, int), got ({version!r}, {pointer!r})")
        stream = cls()
        stream.ptr = pointer
        return stream

    def __enter__(self):
        self._left.append(_stream())
        _current.stream = self
        return self

    def __exit__(self, *error):
        _current.stream = self._left.pop()

    def synchronize(self):
        pass


Stream.null = Stream(null=True)


class ExternalStream(Stream):
    """CuPy 14 warns about this class, and in klcore's tests warnings are errors."""

    def __init__(self, ptr, device_id=-1):
        raise EmulatorError("ExternalStream is deprecated: CuPy 14 warns each time; use Stream.from_external")


def _stream():
    return getattr(_current, "stream", Stream.null)


# ---- arrays ----------------------------------------------------------------------------------------------------------


@functools.cache
def _libc():
    library = ctypes.CDLL(None)
    library.posix_memalign.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    library.free.argtypes = (ctypes.c_void_p,)
    library.free.restype = None
    return library


class _Memory:
    """Exactly the requested number of bytes, so that ASan detects overruns; aligned like CuPy's; full of NaNs."""

    ALIGNMENT = 512

    def __init__(self, nbytes):
        pointer = ctypes.c_void_p()
        self._c = _libc()
        self.size, self.device_id = nbytes, Device().id
        if self._c.posix_memalign(ctypes.byref(pointer), self.ALIGNMENT, max(nbytes, 1)):
            raise MemoryError(f"cannot allocate {nbytes} bytes")
        self.ptr = pointer.value
        ctypes.memset(self.ptr, 0xFF, nbytes)

    def __del__(self):
        if hasattr(self, "ptr"):
            self._c.free(self.ptr)


class UnownedMemory:
    """cupy.cuda.UnownedMemory"""

    def __init__(self, ptr, size, owner, device_id):
        self.ptr, self.size, self.device_id, self._owner = int(ptr), int(size), int(device_id), owner


class MemoryPointer:
    """cupy.cuda.MemoryPointer"""

    def __init__(self, mem, offset):
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    @property
    def device(self):
        return Device(self.device_id)


def alloc(nbytes):
    """cupy.cuda.alloc"""
    allocator = getattr(_current, "allocator", None)
    return MemoryPointer(_Memory(nbytes), 0) if allocator is None else allocator(nbytes)


@contextlib.contextmanager
def using_allocator(allocator=None):
    before = getattr(_current, "allocator", None)
    _current.allocator = allocator
    try:
        yield
    finally:
        _current.allocator = before


class _Bytes:
    """A memory as NumPy sees it."""

    def __init__(self, memptr, nbytes):
        self.memptr = memptr  # kept alive by the arrays that use it
        data = (memptr.ptr, False)
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": data, "version": 3}


class Flags:
    """cupy.ndarray.flags: fewer than NumPy's."""

    def __init__(self, flags, owndata):
        self.c_contiguous, self.f_contiguous, self.owndata = flags.c_contiguous, flags.f_contiguous, owndata

    def __getitem__(self, name):
        return {"C_CONTIGUOUS": self.c_contiguous, "F_CONTIGUOUS": self.f_contiguous, "OWNDATA": self.owndata}[name]


class ndarray(np.ndarray):
    """cupy.ndarray"""

    __module__ = "cupy"

    def __new__(cls, shape, dtype=float, memptr=None, strides=None, order="C"):
        return _allocate(shape, dtype, order, strides, memptr)

    def __array_finalize__(self, parent):
        self._device = getattr(parent, "_device", None) or Device()

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **keywords):
        given = [*inputs, *out, *keywords.values()]
        if any(isinstance(a, np.ndarray) and not isinstance(a, ndarray) for a in given):
            raise TypeError(f"Unsupported type {np.ndarray}")
        keywords = {name: _plain(a) for name, a in keywords.items()}
        if out:
            keywords["out"] = tuple(map(_plain, out))
        result = getattr(ufunc, method)(*map(_plain, inputs), **keywords)
        if out:
            return out[0] if len(out) == 1 else out
        if isinstance(result, tuple):
            return tuple(map(_wrap, result))
        return None if result is None else _wrap(result)

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return array.view(ndarray)

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if isinstance(found, np.ndarray):
            return found
        return super().__getitem__((*key, ...) if isinstance(key, tuple) else (key, ...))  # a view without dimensions

    def __setitem__(self, key, value):
        if isinstance(value, np.ndarray) and not isinstance(value, ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        super().__setitem__(key, value)

    @property
    def device(self):
        return self._device

    @property
    def data(self):
        at = _plain(self).ctypes.data if self.size else 0
        return MemoryPointer(UnownedMemory(at, self.nbytes, self, self._device.id), 0)

    @property
    def flags(self):
        return Flags(_plain(self).flags, owndata=not isinstance(self.base, ndarray))

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "data": (self.data.ptr, False),
            "strides": None if self.flags.c_contiguous else self.strides,
            "stream": 1,
            "version": 3,
        }

    def get(self):
        return np.array(_plain(self))


def _plain(a):
    return a.view(np.ndarray) if isinstance(a, ndarray) else a


def _wrap(result):
    return np.asarray(result).view(ndarray)


def _allocate(shape, dtype, order="C", strides=None, memptr=None):
    dtype = np.dtype(dtype)
    if dtype.kind not in "biufcV":
        raise ValueError(f"Unsupported dtype {dtype}")
    shape = tuple(shape) if hasattr(shape, "__iter__") else (shape,)
    nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if memptr is None:
        memptr = alloc(nbytes)
    elif strides is not None:  # a view with gaps: up to the end of what it covers
        nbytes = dtype.itemsize + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if nbytes else 0
    memory = np.asarray(_Bytes(memptr, nbytes)) if nbytes else None
    if memory is None and strides is not None:  # NumPy would choose other strides for an empty array
        array = np.lib.stride_tricks.as_strided(np.empty(0, dtype), shape, strides).view(ndarray)
    else:
        array = np.ndarray.__new__(ndarray, shape, dtype, buffer=memory, order=order, strides=strides)
    array._device = memptr.device
    return array


def _allocate_like(a, dtype=None, order="K", subok=None, shape=None):
    if subok is not None:
        raise TypeError("subok is not supported yet")
    like = np.empty_like(_plain(a), dtype, order, subok=False, shape=shape)
    return _allocate(like.shape, like.dtype, strides=like.strides)


def _filled(array, value):
    array[...] = value
    return array


def array(a, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    if isinstance(a, ndarray) and not copy and dtype in (None, a.dtype) and a.ndim >= ndmin:
        return a
    if isinstance(a, (list, tuple)):
        a = [_plain(item) for item in a]
    host = np.array(_plain(a), dtype, order=order, ndmin=ndmin)
    native = host.astype(host.dtype.newbyteorder("="), copy=False)
    moved = _allocate_like(native)
    _plain(moved)[...] = native
    return moved


def asarray(a, dtype=None, order=None, *, blocking=False):
    return array(a, dtype, copy=False, order=order or "K")


def put_along_axis(arr, indices, values, axis):
    np.put_along_axis(_plain(arr), _plain(indices), _plain(values), axis)


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def shares_memory(a, b, max_work=None):
    if isinstance(max_work, int):
        raise NotImplementedError("Not supported for integer `max_work`.")
    return np.shares_memory(_plain(a), _plain(b))


def may_share_memory(a, b, max_work=None):
    if max_work is not None:
        raise NotImplementedError("Only supported for `max_work` is `None`")
    return np.may_share_memory(_plain(a), _plain(b))


# ---- modules and kernels ---------------------------------------------------------------------------------------------

_libraries = {}  # path, device, switch -> loaded library: like CuPy, loads a path once
_lock = threading.Lock()


def _load_copy(path):
    """Load a copy: the loader identifies files by path, and would use one module for two devices."""
    with tempfile.NamedTemporaryFile(dir=_cache(), suffix=".so", delete=False) as copy:
        copy.write(Path(path).read_bytes())
    try:
        return ctypes.CDLL(copy.name)
    finally:
        os.unlink(copy.name)


def _load(path):
    with _lock:
        key = os.fspath(path), Device().id, settings.ucontext
        if key not in _libraries:
            if settings.sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
                raise RuntimeError("sanitized code needs a process started with sanitizer_environment()")
            # ASan reads the file again, to report the line
            library = ctypes.CDLL(os.path.abspath(path)) if settings.sanitize else _load_copy(path)
            library.emulator_plan_size.restype = ctypes.c_size_t
            library.runtime = _emulator(settings.sanitize, settings.ucontext)
            library.emulator_connect.argtypes = (ctypes.c_void_p,)
            library.emulator_connect(library.runtime.emulator_runtime())
            _libraries[key] = library
        return _libraries[key]


class RawModule:
    """cupy.RawModule, for a file that `compile` made; its name does not matter."""

    def __init__(self, *, path):
        self.file_path = path

    def get_function(self, name):
        return RawKernel(_load(self.file_path), name)


class RawKernel:
    """cupy.RawKernel: ``kernel(grid, block, (plan,), shared_mem=bytes)``."""

    preferred_shared_memory_carveout = -1

    def __init__(self, library, name):
        self.name = name
        self.kernel = Function(library, name)

    def __call__(self, grid, block, args, *, shared_mem=0):
        self.kernel(grid, block, args, shared_mem)

    @property
    def max_dynamic_shared_size_bytes(self):
        return self.kernel.shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if not 0 <= size <= Device().attributes["MaxSharedMemoryPerBlockOptin"]:
            raise EmulatorError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {size} bytes of shared memory are not available"
            )
        self.kernel.shared = size


class Function:
    """cupy.cuda.Function; its only argument, the plan, is a structured array of size 1."""

    def __init__(self, library, name):
        try:
            function = getattr(library, name)
        except AttributeError:
            raise EmulatorError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}") from None
        self._library, self.name = library, name
        self.ptr = ctypes.cast(function, ctypes.c_void_p).value
        self.shared = 48 << 10

    def __call__(self, grid, block, args, shared_mem=0):
        if any(n > 1 for n in (*grid[1:], *block[1:])):
            raise NotImplementedError(f"{self.name}: grids and blocks of more than one dimension")
        if shared_mem > self.shared:
            raise EmulatorError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: launched with {shared_mem} bytes of shared memory; "
                f"max_dynamic_shared_size_bytes is {self.shared}"
            )
        (plan,) = args
        if not isinstance(plan, np.ndarray) or isinstance(plan, ndarray) or plan.size != 1:
            raise TypeError(f"{self.name}: a plan is passed by value, as a numpy.ndarray of size one")
        if plan.itemsize != self._library.emulator_plan_size():
            raise EmulatorError(
                f"{self.name}: the plan has {plan.itemsize} bytes, its struct {self._library.emulator_plan_size()}"
            )
        error = self._library.runtime.emulator_launch(
            self._library.emulator_call,
            self.ptr,
            self.name.encode(),
            plan.ctypes.data,
            max(1, grid[0]),  # as CuPy does
            max(1, block[0]),
            shared_mem,
            settings.seed,
            settings.threads,
        )
        if error:
            raise EmulatorError(error.decode())


# ---- CuPy ------------------------------------------------------------------------------------------------------------


def _module(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    return module


_runtime = _module(
    "cupy.cuda.runtime",
    getDevice=lambda: Device().id,
    getDeviceCount=lambda: settings.devices,
    getDeviceProperties=lambda device: {
        "name": b"emulated",
        "major": int(settings.architecture[:-1]),
        "minor": int(settings.architecture[-1]),
        "totalGlobalMem": 8 << 30,
    },
    driverGetVersion=lambda: 13000,
    deviceSynchronize=lambda: None,
    CUDARuntimeError=EmulatorError,
)
_cuda = _module(
    "cupy.cuda",
    Device=Device,
    Stream=Stream,
    ExternalStream=ExternalStream,
    MemoryPointer=MemoryPointer,
    UnownedMemory=UnownedMemory,
    alloc=alloc,
    using_allocator=using_allocator,
    runtime=_runtime,
    get_current_stream=_stream,
    is_available=lambda: True,
)
cupy = _module(
    "cupy",
    __version__="emulated",
    cuda=_cuda,
    RawModule=RawModule,
    is_available=lambda: True,
    ndarray=ndarray,
    array=array,
    asarray=asarray,
    asnumpy=asnumpy,
    empty=lambda shape, dtype=float, order="C": _allocate(shape, dtype, order),
    zeros=lambda shape, dtype=float, order="C": _filled(_allocate(shape, dtype, order), 0),
    ones=lambda shape, dtype=float, order="C": _filled(_allocate(shape, dtype, order), 1),
    full=lambda shape, value, dtype=None, order="C": _filled(
        _allocate(shape, np.asarray(value).dtype if dtype is None else dtype, order), value
    ),
    empty_like=_allocate_like,
    zeros_like=lambda a, *args, **keywords: _filled(_allocate_like(a, *args, **keywords), 0),
    broadcast_to=lambda a, shape: np.broadcast_to(a, shape, subok=True),
    broadcast_shapes=np.broadcast_shapes,
    concatenate=lambda arrays, axis=0: array(np.concatenate([asnumpy(a) for a in arrays], axis)),
    put_along_axis=put_along_axis,
    take_along_axis=lambda a, indices, axis: array(np.take_along_axis(asnumpy(a), asnumpy(indices), axis)),
    minimum=np.minimum,
    moveaxis=np.moveaxis,
    expand_dims=np.expand_dims,
    squeeze=np.squeeze,
    where=lambda condition, number, a: array(np.where(asnumpy(condition), number, asnumpy(a))),
    may_share_memory=may_share_memory,
    shares_memory=shares_memory,
    dtype=np.dtype,
    bool_=np.bool_,
    int64=np.int64,
    float16=np.float16,
    float32=np.float32,
    float64=np.float64,
    inf=np.inf,
    nan=np.nan,
)

_replaced = []  # functions that undo, to be called in reverse order


def install():
    """Replace CuPy and NVRTC in this process, until uninstall()."""
    if _replaced:
        return
    nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
    for module in (cupy, _cuda, _runtime):
        _replaced.append(functools.partial(_restore, module.__name__, sys.modules.get(module.__name__)))
        sys.modules[module.__name__] = module
    for name, function in {"compile": compile, "build": _build, "version": lambda: (0, 0)}.items():
        _replaced.append(functools.partial(setattr, nvrtc, name, getattr(nvrtc, name)))
        setattr(nvrtc, name, function)
    _forget()


def uninstall():
    while _replaced:
        _replaced.pop()()
    _forget()


def _restore(name, module):
    if module is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = module


def _forget():
    """Make Python import the backend again, which keeps the kernels and the CuPy that it found first. The module of the
    compiler stays, because it is patched in place."""
    for name in [n for n in sys.modules if n.startswith("klcore.backends.cuda") and not n.endswith(".nvrtc")]:
        del sys.modules[name]
    importlib.import_module("klcore.backends")._loaded.clear()


@contextlib.contextmanager
def using(**changes):
    """Change settings temporarily: ``with using(seed=3, architecture="75"): ...``"""
    before = {name: getattr(settings, name) for name in changes}
    _change(changes)
    try:
        yield
    finally:
        _change(before)


_PROPERTIES = ("architecture", "multiprocessors")


def _change(changes):
    if any(getattr(settings, name) != changes.get(name, getattr(settings, name)) for name in _PROPERTIES):
        _forget()  # what the backend knows about its devices
    for name, value in changes.items():
        setattr(settings, name, value)
