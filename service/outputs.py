"""Files that a command leaves behind: whole under their names, or not at all, and refused in words where they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from service.errors import NotWritten

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def naming(path: Path, needed: int | None = None) -> Iterator[None]:
    """Around what is written to `path`, of `needed` bytes where that is known. Raises NotWritten in place of OSError."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else path
        raise NotWritten(_refusal(path if named == _beside(path) else named, error, needed)) from error


@contextlib.contextmanager
def whole(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A file beside `path` that becomes it at the end; after a failure nothing is left of it, and `path` is as it was. Makes its folder.

    A pipe or a device is written to itself, and so is what /dev/stdout leads to, and a file in a folder that takes no other. Who may read
    a file that is there already stays as it was. Raises NotWritten.
    """
    handed = path.is_symlink() and path.absolute().parts[1] in ("dev", "proc")
    itself = handed or (path.exists() and not (path.is_file() and os.access(path.resolve().parent, os.W_OK)))
    path = path if itself else path.resolve()
    with naming(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
    place = path if itself else _beside(path)
    try:
        with naming(path, needed):
            yield place
            if not itself:
                _move(place, path)
    finally:
        if not itself:
            with contextlib.suppress(OSError):  # it is not there where it could not be made
                place.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """All of `path`. Raises NotWritten."""
    with whole(path, len(content)) as place:
        place.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """All of `path`, in UTF-8. Raises NotWritten."""
    write_bytes(path, content.encode())


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _move(place: Path, path: Path) -> None:
    if path.exists() and path.stat().st_mode != place.stat().st_mode:  # some shared folders know no modes, and refuse to set one
        shutil.copymode(path, place)
    try:
        place.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(place, path)  # a file that is mounted by itself, as containers have it, can be written and not replaced


def _refusal(path: Path, error: OSError, needed: int | None) -> str:
    why = error.strerror or str(error)
    if error.errno not in NO_ROOM:
        return f"{path} cannot be written: {why}. Give another place."
    room = "" if needed is None else f" It takes {needed:,} bytes."
    if error.errno == errno.ENOSPC:
        room += _free(path)
    return f"{path} cannot be written: {why}.{room} Make room, or give another place."


def _free(path: Path) -> str:
    """How much its disk has left for this user; a disk out of inodes has bytes left, too."""
    folder = next((folder for folder in path.absolute().parents if folder.is_dir()), path)
    try:
        return f" {shutil.disk_usage(folder).free:,} bytes are free in {folder}."
    except OSError:
        return ""
