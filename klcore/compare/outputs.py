"""The files that `klcore compare` writes, atomically, and without overwriting existing ones unless --force is given."""

import contextlib
import io
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from klcore.compare.errors import InputError

STATE = 1  # the format of --resume


def check_outputs(outputs: Iterable[str], inputs: Iterable[Path], force: bool) -> None:
    """Check, before anything is read, that each output can be written, and that nothing would be lost."""
    given = {os.path.realpath(path) for path in inputs}
    seen: set[str] = set()
    for text in outputs:
        path, place = Path(text), os.path.realpath(text)
        if place in given:
            raise InputError(f"{path} is an input; write to another file")
        if place in seen:
            raise InputError(f"{path} is given for two outputs")
        seen.add(place)
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder; write to a file")
        if os.path.exists(path) and not os.path.isfile(path):  # it would be replaced by a file
            raise InputError(f"{path} is a pipe or a device; write to a file")
        if os.path.exists(path) and not force:
            raise InputError(f"{path} exists; --force overwrites it")
        if not os.path.isdir(path.parent):
            raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path} cannot be written: no permission to write in its folder")


def write(text: str | Path, content: bytes) -> None:
    """Write a file atomically: to a temporary file next to it, which then replaces it."""
    path = Path(text)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # the usual permissions; those of a temporary file are for its owner only
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def say(text: str) -> None:
    """Write to standard output, which may be a file on a full disk, a closed pipe, or missing."""
    if sys.stdout is None:  # print() says nothing then, either
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))  # "±" or a file name may not be encodable
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # otherwise Python flushes again at exit, and prints an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"standard output cannot be written: {error.strerror or error}") from error


def npy_bytes(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def write_state(path: str, about: dict[str, Any], tally: dict[str, Any], columns: dict[str, Any]) -> None:
    """Write the state for --resume: JSON and arrays, in an archive like .npz."""
    out = io.BytesIO()
    text = json.dumps({"format": STATE, "about": about, "tally": tally})
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state.json", text)
        for name, column in columns.items():
            archive.writestr(f"{name}.npy", npy_bytes(column))
    write(path, out.getvalue())


def read_state(path: str, about: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the tally and the columns; InputError if they are from another comparison."""
    try:
        with zipfile.ZipFile(path) as archive:
            state = json.loads(archive.read("state.json"))
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            columns = {
                name.removesuffix(".npy"): np.load(io.BytesIO(archive.read(name)), allow_pickle=False) for name in names
            }
    except Exception as error:  # from zipfile, zlib, json or NumPy
        raise InputError(f"{path} is not a state of klcore compare: {error}") from error
    if state.get("format") != STATE:
        raise InputError(f"{path} was written by another version of klcore; delete it to start again")
    for name, value in about.items():
        if state["about"].get(name) != value:
            raise InputError(
                f"{path} is from another comparison: its {name} is {state['about'].get(name)}, but here it is {value}; "
                "delete it to start again"
            )
    return state["tally"], columns
