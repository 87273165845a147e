"""Files with one distribution per row, read a few rows at a time: .npy, .npz, .safetensors, folders, raw numbers.

The first bytes of a file decide its format, not its name. Nothing is ever unpickled. Rows are read with `readinto` into
arrays of the caller's thread, not mapped: memory stays bounded whatever the system caches, and a file that shrinks
raises an error, while a memory map would end the process. The formats of llama.cpp are in llama.py.
"""

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from klcore.compare.errors import InputError

FLOATS = ("float64", "float32", "float16", "bfloat16")
Array = Any


@dataclass(frozen=True)
class Source:
    """The rows of a file, or of several files in order.

    Attributes
    ----------
    name : str
        Its name in messages.
    rows, vocab : int
    promised : int
        The number of rows according to its header; more than `rows` if the file is truncated.
    dtype : str
    read : callable
        ``read(start, stop)`` returns an array of shape (stop - start, vocab) in native byte order; thread-safe.
    parts : tuple of Path
        Its files.
    """

    name: str
    rows: int
    vocab: int
    promised: int
    dtype: str
    read: Callable[[int, int], Array]
    parts: tuple[Path, ...]

    def check_whole(self) -> None:
        if self.rows < self.promised:
            raise InputError(
                f"{self.name} is truncated after row {self.rows - 1}: only {self.rows:,} of {self.promised:,} rows are "
                "complete; --partial compares these"
                if self.rows
                else f"{self.name} is truncated in its first row, of {self.promised:,} rows"
            )


def split_member(text: str) -> tuple[Path, str | None]:
    """Split FILE or FILE:NAME into the path, and the name of an array in that file."""
    path = Path(text)
    head, colon, member = text.rpartition(":")
    if not os.path.exists(path) and colon and member and os.path.exists(head):
        return Path(head), member
    return path, None


def first_bytes(path: Path, count: int = 16) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path} is a pipe or a device, which cannot be read in any order; save it to a file")
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def open_source(text: str, shape: tuple[int, int] | None, dtype: str | None) -> Source:
    """Open FILE or FILE:NAME; `shape` and `dtype` are for files without a header."""
    path, member = split_member(text)
    if os.path.isdir(path):
        return _folder(path, member or "logits")
    start = first_bytes(path)
    if start.startswith(b"\x93NUMPY"):
        if member is not None:
            raise InputError(f"{path} is a single array, without an array named {member!r}")
        return _npy(path, dtype)
    if start.startswith(b"PK\x03\x04"):
        return _npz(path, member, dtype)
    if _is_safetensors(path, start):
        return _safetensors(path, member)
    if re.match(rb"\x80[\x02-\x05]", start):
        raise InputError(
            f"{path} is a pickle, which can run any code when it is loaded; save the logits as .npy or .safetensors"
        )
    if shape and dtype:
        return _raw(path, shape, dtype)
    if not start:
        raise InputError(f"{path} is empty")
    raise InputError(
        f"{path} is not .npy, .npz, .safetensors or the logits of llama.cpp; for raw numbers, pass --shape ROWS,VOCAB "
        "and --dtype"
    )


# ---- dtypes and shapes -----------------------------------------------------------------------------------------------


def _dtype(found: Any, named: str | None, name: str) -> Any:
    """The dtype of the numbers; `named` is that of the user, for bfloat16, which NumPy writes as two plain bytes."""
    if named == "bfloat16" and found in (np.dtype("V2"), np.dtype("u2"), np.dtype("i2")):
        return bfloat16(name)
    if found.name not in FLOATS:
        hint = "; for bfloat16, pass --dtype bfloat16" if found == np.dtype("V2") else ""
        raise InputError(f"{name} has dtype {found}, but logits must be {', '.join(FLOATS)}{hint}")
    return found


def bfloat16(name: str) -> Any:
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise InputError(
            f"{name} holds bfloat16, which needs the package ml_dtypes: pip install 'klcore[compare]'"
        ) from error


def _two_axes(shape: tuple[int, ...], name: str) -> tuple[int, int]:
    if len(shape) < 2:
        raise InputError(f"{name} has shape {shape}, but logits have two or more axes, with the vocabulary last")
    if min(shape) < 1:
        raise InputError(f"{name} has shape {shape}, which is empty")
    return math.prod(shape[:-1]), shape[-1]


# ---- uncompressed arrays in files ------------------------------------------------------------------------------------


def read_into(path: Path, offset: int, array: Array) -> None:
    """Fill an array from the file, starting at this offset."""
    memory = memoryview(array.reshape(-1).view(np.uint8))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while memory:
            got = file.readinto(memory)
            if not got:
                raise InputError(f"{path} was truncated while it was read")
            memory = memory[got:]


def _plain(name: str, path: Path, offset: int, size: int, shape: tuple[int, int], dtype: Any) -> Source:
    """Contiguous rows from an offset on, of which `size` bytes are there."""
    promised, vocab = shape
    row = vocab * dtype.itemsize

    def read(start: int, stop: int) -> Array:
        found = np.empty((stop - start, vocab), dtype)
        read_into(path, offset + start * row, found)
        return found if dtype.isnative else found.astype(dtype.newbyteorder("="))

    return Source(name, min(promised, max(size, 0) // row), vocab, promised, dtype.name, read, (path,))


def _npy(path: Path, named: str | None, name: str | None = None) -> Source:
    name = name or str(path)
    with open(path, "rb") as file:
        shape, dtype, offset = _npy_header(file, name)
        size = os.fstat(file.fileno()).st_size - offset
    dtype = _dtype(dtype, named, name)
    return _plain(name, path, offset, size, _two_axes(shape, name), dtype)


def _npy_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], Any, int]:
    """The shape, the dtype, and the offset of the numbers."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read[min(version, (2, 0))](file)
    except Exception as error:  # NumPy's parser passes on what Python's tokenizer raises
        raise InputError(f"{name} starts like a .npy file, but has no valid header: {error}") from error
    if dtype.hasobject:
        raise InputError(f"{name} holds Python objects, which would have to be unpickled; save it with a numeric dtype")
    if by_columns and len(shape) > 1 and min(shape) > 1:
        raise InputError(
            f"{name} is in Fortran order, so its rows are not contiguous; save numpy.ascontiguousarray(logits)"
        )
    return shape, dtype, file.tell()


def _raw(path: Path, shape: tuple[int, int], dtype: str) -> Source:
    kind = bfloat16(str(path)) if dtype == "bfloat16" else np.dtype(dtype)
    size, wanted = path.stat().st_size, shape[0] * shape[1] * kind.itemsize
    if size > wanted:
        raise InputError(
            f"{path} has {size:,} bytes, but {shape[0]:,} rows of {shape[1]:,} {dtype} are {wanted:,} bytes; --shape "
            "or --dtype is wrong"
        )
    return _plain(str(path), path, 0, size, shape, kind)


# ---- archives --------------------------------------------------------------------------------------------------------


def _npz(path: Path, member: str | None, named: str | None) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.rpartition("/")[2] == "data.pkl" for name in names):
                raise InputError(
                    f"{path} was written by torch.save: it is a pickle, which can run any code when it is loaded; save "
                    "the logits as .npy or .safetensors"
                )
            chosen = _choose(path, [n.removesuffix(".npy") for n in names if n.endswith(".npy")], member)
            info = archive.getinfo(f"{chosen}.npy")
            name = f"{path}:{chosen}"
            if info.compress_type == zipfile.ZIP_STORED:
                with open(path, "rb") as file:
                    start = _start_of(file, info)
                    file.seek(start)
                    shape, dtype, offset = _npy_header(file, name)
                dtype = _dtype(dtype, named, name)
                return _plain(name, path, offset, start + info.file_size - offset, _two_axes(shape, name), dtype)
            # compressed, so rows have no fixed offset: unpack it once, into a temporary file
            with archive.open(info) as packed:
                return _npy(_unpacked(packed), named, name)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # RuntimeError: unsupported by zipfile
        raise InputError(f"{path} cannot be read as .npz: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be unpacked in {tempfile.gettempdir()}: {error.strerror or error}") from error


def _start_of(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The offset of a member's bytes, after its own header, which may be longer than the directory says."""
    file.seek(info.header_offset + 26)
    lengths = np.frombuffer(file.read(4), "<u2")
    return info.header_offset + 30 + int(lengths.sum())


_temporary = contextlib.ExitStack()


def _unpacked(packed: Any) -> Path:
    folder = Path(_temporary.enter_context(tempfile.TemporaryDirectory(prefix="klcore-")))
    path = folder / "member.npy"
    with open(path, "wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return path


def remove_temporary() -> None:
    """Delete the unpacked files."""
    _temporary.close()


def _choose(path: Path, names: list[str], member: str | None) -> str:
    """The array that was asked for, or the only one."""
    if member in names:
        return str(member)
    found = ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")
    if member is not None:
        raise InputError(f"{path} has no array {member!r}; it has {found or 'none'}")
    if len(names) != 1:
        raise InputError(
            f"{path} has {len(names)} arrays ({found}); choose one with {path}:NAME" if names else f"{path} is empty"
        )
    return names[0]


# ---- safetensors, and folders of them --------------------------------------------------------------------------------


def _is_safetensors(path: Path, start: bytes) -> bool:
    """The format starts with the length of a JSON header, in eight bytes, and the header."""
    length = int.from_bytes(start[:8], "little")
    return len(start) > 8 and start[8:9] == b"{" and 2 <= length <= max(path.stat().st_size, 1 << 27)


def _safe_open(path: Path) -> Any:
    try:
        library = importlib.import_module("safetensors")
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: pip install 'klcore[compare]'") from error
    try:
        return library.safe_open(path, "np")
    except Exception as error:  # an exception of the library
        raise InputError(f"{path} is not a complete .safetensors file: {error}") from error


_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _safetensors(path: Path, member: str | None) -> Source:
    with _safe_open(path) as file:
        chosen = _choose(path, list(file.keys()), member)
        part = file.get_slice(chosen)
        name, shape, code = f"{path}:{chosen}", tuple(part.get_shape()), part.get_dtype()
    if code not in _SAFETENSORS:
        raise InputError(f"{name} has dtype {code}, but logits must be {', '.join(_SAFETENSORS)}")
    dtype = bfloat16(name) if code == "BF16" else np.dtype(_SAFETENSORS[code]).newbyteorder("<")
    # find the offset: for each chunk, the library would read whole indices of the first axis, which may be all rows
    with open(path, "rb") as plain:
        length = int.from_bytes(plain.read(8), "little")
        begin, end = json.loads(plain.read(length))[chosen]["data_offsets"]
    return _plain(name, path, 8 + length + begin, end - begin, _two_axes(shape, name), dtype)


def _folder(path: Path, member: str) -> Source:
    """The format of EXL3's tools: row_000000.safetensors and so on, each with the logits of a text."""
    files = sorted(path.glob("row_*.safetensors"))
    if not files:
        raise InputError(f"{path} is a folder without files row_*.safetensors")
    return joined(str(path), [_safetensors(file, member) for file in files])


def joined(name: str, sources: list[Source]) -> Source:
    """Join several sources, which must have the same vocabulary and dtype."""
    for source in sources:
        if (source.vocab, source.dtype) != (sources[0].vocab, sources[0].dtype):
            raise InputError(
                f"{source.name} has {source.vocab:,} classes of {source.dtype}, but {sources[0].name} has "
                f"{sources[0].vocab:,} of {sources[0].dtype}"
            )
    ends = np.cumsum([s.rows for s in sources])

    def read(start: int, stop: int) -> Array:
        return np.concatenate(list(_overlapping(start, stop)))

    def _overlapping(start: int, stop: int) -> Iterable[Array]:
        for source, end in zip(sources, ends.tolist(), strict=True):
            low, high = max(start, end - source.rows), min(stop, end)
            if low < high:
                yield source.read(low - end + source.rows, high - end + source.rows)

    rows = int(ends[-1])
    return Source(
        name, rows, sources[0].vocab, rows, sources[0].dtype, read, tuple(p for s in sources for p in s.parts)
    )


# ---- small arrays, one number per row --------------------------------------------------------------------------------


def read_small(text: str, what: str, kinds: str, rows: int) -> Array:
    """Read a .npy file with `rows` numbers of one of NumPy's dtype kinds."""
    path = Path(text)
    if not first_bytes(path).startswith(b"\x93NUMPY"):
        raise InputError(f"{path}, for {what}, is not a .npy file")
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # as in _npy_header
        raise InputError(f"{path}, for {what}, cannot be read: {error}") from error
    if found.dtype.kind not in kinds:
        raise InputError(
            f"{path}, for {what}, has dtype {found.dtype}; it must hold {'booleans' if kinds == 'b' else 'integers'}"
        )
    if found.size != rows:
        raise InputError(f"{path}, for {what}, has {found.size:,} numbers, but there are {rows:,} rows")
    return found.reshape(-1)
