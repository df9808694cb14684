"""Writing so that a reader never meets half a file: everything goes to a temporary neighbour, then is renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR, ENOTDIR
from pathlib import Path
from typing import Any

from torch import Tensor

ASSETS = Path(__file__).parent / "assets"  # what ships with the package
os.umask(_umask := os.umask(0))  # there is no other way to ask
USUAL = 0o666 & ~_umask  # the permissions of new files


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary neighbour of `path` to write a file or folder to; it takes the place of `path` at the end."""
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)  # a link leads to another disk, perhaps
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{path.name}.{uuid.uuid4().hex[:12]}"  # process ids may be equal on two nodes
    part = path.with_name(own + ".part")
    try:
        yield part
        _open_to_others(part)
        take_place(part, path)
    finally:
        remove(part)


def _open_to_others(part: Path) -> None:
    """Gives files the permissions that others are made with; safetensors makes some (0.8) that only their owner reads.
    A file system that has none is left as it is.
    """
    for file in part.rglob("*") if part.is_dir() else [part]:
        if file.is_file() and not file.is_symlink() and (mode := file.stat().st_mode) | USUAL != mode:
            with suppress(OSError):
                file.chmod(mode | USUAL)


def take_place(part: Path, path: Path) -> None:
    """Renames a finished file or folder to `path`, in place of what is there.

    Raises:
        IsADirectoryError: a file is to replace a folder, which nobody means.
    """
    if part.is_file():
        check_file(path)
    if path.is_dir() and part.exists():  # if nothing was written, `replace` raises and `path` stays
        old = aside(part)
        path.rename(old)
        try:
            part.rename(path)
        except OSError:
            old.rename(path)
            raise
        with suppress(OSError):  # some network file systems do not remove what is being read
            remove(old)
    else:
        part.replace(path)


def aside(part: Path) -> Path:
    """Where a folder lies while `part` takes its place."""
    return part.with_name(part.name + ".old")


def go_on_taking(part: Path, path: Path) -> None:
    """Ends a `take_place` of folders that was killed after the old one was moved aside: the new one, whole by then,
    gets its place. Where none was, nothing happens; any number of processes may ask.
    """
    if aside(part).exists() and not path.exists():
        with suppress(FileNotFoundError):  # another process was first
            part.rename(path)


def check_file(path: str | Path | None) -> None:
    """Refuses a folder where a file is to be written, before the work whose result it is for; None is not looked at.

    Raises:
        IsADirectoryError: it is one.
    """
    if path is not None and Path(path).is_dir():
        raise IsADirectoryError(EISDIR, "a file was to be written, and this is a folder", str(path))


def check_folder(path: str | Path) -> None:
    """Refuses a file where a folder is to be written, before the work whose result it is for.

    Raises:
        NotADirectoryError: it is one.
    """
    for place in (Path(path), *Path(path).parents):
        if place.is_file():
            raise NotADirectoryError(ENOTDIR, "a folder was to be written, and this is a file", str(place))


def save_json(value: Any, path: str | Path) -> None:
    """`value` as readable JSON."""
    with written_whole(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds."""
    return json.loads(Path(path).read_text())


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """`tensors` as one safetensors file."""
    from safetensors.torch import save_file

    with written_whole(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)


def checksum(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pieces(path: str | Path, count: int = 256, size: int = 4096) -> bytes:
    """Length and `count` evenly spaced pieces of a file: weights that differ anywhere much give other bytes."""
    length = Path(path).stat().st_size
    with open(path, "rb") as file:
        found = []
        for index in range(count):
            file.seek(index * max(length - size, 0) // max(count - 1, 1))
            found.append(file.read(size))
    return str(length).encode() + b"".join(found)


class Lock:
    """A file that one process at a time holds, as a context; let go when the process ends, however it ends.

    A child that is given `descriptor` holds it too: a training goes on to be locked when what began it is killed.

    Args:
        path: of the file, which stays.
        wait: for who holds it; otherwise `mine` tells whether it was free.
    """

    def __init__(self, path: Path, wait: bool = False):
        self.path, self.wait, self.mine, self.descriptor = path, wait, False, -1

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
            self.mine = True
        except BlockingIOError:
            self.mine = False
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.descriptor)


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
