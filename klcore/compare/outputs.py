"""Files that `klcore compare` writes: each whole or not at all, and none over one that is there without --force."""

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
    """Before anything is read: that each can be written, and that nothing would be lost."""
    given = {os.path.realpath(path) for path in inputs}
    seen: set[str] = set()
    for text in outputs:
        path, place = Path(text), os.path.realpath(text)
        if place in given:
            raise InputError(f"{path} is read: write to another file")
        if place in seen:
            raise InputError(f"{path} is named for two outputs")
        seen.add(place)
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder, and not a file to write to")
        if os.path.exists(path) and not os.path.isfile(path):  # it would be replaced by a file
            raise InputError(f"{path} is a pipe or a device, and not a file to write to")
        if os.path.exists(path) and not force:
            raise InputError(f"{path} exists; --force overwrites it")
        if not os.path.isdir(path.parent):
            raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path} cannot be written: its folder is not yours to write in")


def write(text: str | Path, content: bytes) -> None:
    """Whole or not at all: beside the file first, and then in its place."""
    path = Path(text)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # as other files: a temporary one is for its owner alone
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def say(text: str) -> None:
    """To standard output, which may be a file on a disk that is full, or a pipe that nobody reads any more."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))  # ASCII has no ±, a file's name any bytes
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # else Python tries again when it ends, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise InputError(f"standard output cannot be written: {error.strerror or error}") from error


def npy_bytes(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def write_state(path: str, about: dict[str, Any], tally: dict[str, Any], columns: dict[str, Any]) -> None:
    """What --resume goes on from: JSON, and arrays, in an archive as NumPy's."""
    out = io.BytesIO()
    text = json.dumps({"format": STATE, "about": about, "tally": tally})
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state.json", text)
        for name, column in columns.items():
            archive.writestr(f"{name}.npy", npy_bytes(column))
    write(path, out.getvalue())


def read_state(path: str, about: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tally and the columns; InputError if it is of another comparison."""
    try:
        with zipfile.ZipFile(path) as archive:
            state = json.loads(archive.read("state.json"))
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            columns = {
                name.removesuffix(".npy"): np.load(io.BytesIO(archive.read(name)), allow_pickle=False) for name in names
            }
    except Exception as error:  # of zipfile, zlib, json or NumPy
        raise InputError(f"{path} is no state of klcore compare: {error}") from error
    if state.get("format") != STATE:
        raise InputError(f"{path} is a state of another version of klcore: delete it to begin again")
    for name, value in about.items():
        if state["about"].get(name) != value:
            raise InputError(
                f"{path} is of another comparison: its {name} is {state['about'].get(name)}, and this one's {value}; "
                "delete it to begin again"
            )
    return state["tally"], columns
