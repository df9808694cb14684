"""What tells a measurement from any other: digests of settings, and of what the names in them stand for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from distill.files import ASSETS, checksum, pieces

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
INSTALLED = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
NETWORKS = ("teacher", "student_init", "vision", "image", "text", "weights")  # settings that may name one on disk


def stamp(path: Path) -> list[Any] | None:
    """Sizes and times of a file or of a folder's files; None where there is nothing. A copy is told from the first."""
    found = [[name, file.stat().st_size, file.stat().st_mtime_ns] for name, file in _files(path)]
    return found or None


def contents(path: Path) -> str | None:
    """A digest of what is in a file or in a folder's files, of large ones by pieces; None where there is nothing. A
    copy has the same.
    """
    found = [[name, hashlib.sha256(pieces(file)).hexdigest()] for name, file in _files(path)]
    return digest(found) if found else None


def digest(about: Any) -> str:
    """Ten letters that stand for a value made of plain ones."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:10]


def weights(value: Any) -> dict[str, str]:
    """Digests of the package's own weights that are named anywhere in `value`."""
    return {name: found for name in _texts(value) if (found := _shipped(name))}


def named(value: Any, look: Callable[[Path], Any] = stamp) -> dict[str, Any]:
    """What lies behind the names anywhere in `value`: the package's own weights, and files and folders, also as parts
    of `KIND:PATH` and `KIND:NAME:PATH`. What a name on the hub stands for is not looked at.

    Args:
        value: of plain ones.
        look: at a path that is not of the package's own; None where there is nothing.
    """
    parts = sorted({part for text in _texts(value) for part in _suffixes(text)})
    shipped = weights(parts)
    places = {part: found for part in parts if part and part not in shipped and (found := look(Path(part)))}
    return shipped | places


def networks(settings: Any) -> dict[str, Any]:
    """What the networks of a training are: the package's own weights that its settings name anywhere, and the files and
    folders that stand for one of `NETWORKS`, or that a class of one's own is given.
    """
    return weights(settings) | named(list(_networks(settings)))


def sources(settings: Any) -> dict[str, Any]:
    """Digests of the files of one's own modules behind the class paths anywhere in `settings`. What is installed, this
    package too, is not looked at, nor what such a module imports.
    """
    modules = {text.rpartition(".")[0] for text in _texts(settings) if CLASS_PATH.fullmatch(text)}
    found = {module: _origin(module) for module in sorted(modules)}
    return {module: contents(path) for module, path in found.items() if path is not None}


def _origin(module: str) -> Path | None:
    """The file of a module that is one's own."""
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)  # where `python -m distill`, by which comparisons train, looks first
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # it is none, or its package cannot be imported
        return None
    finally:
        sys.path.remove(here)
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return None
    path, package = Path(spec.origin).resolve(), module.partition(".")[0]
    if package == __name__.partition(".")[0] or any(path.is_relative_to(place) for place in INSTALLED):
        return None
    return path


def _is_own(class_path: Any) -> bool:
    is_path = isinstance(class_path, str) and CLASS_PATH.fullmatch(class_path) is not None
    return is_path and _origin(class_path.rpartition(".")[0]) is not None


def _networks(settings: Any) -> Iterator[str]:
    if isinstance(settings, list):
        settings = dict(enumerate(settings))
    if isinstance(settings, dict):
        if _is_own(settings.get("class_path")):
            yield from _texts(settings.get("init_args"))
        for name, value in settings.items():
            if isinstance(value, str) and str(name).split(".")[-1] in NETWORKS:
                yield value
            yield from _networks(value)


def _suffixes(text: str) -> list[str]:
    """A text and what follows each of its colons."""
    return [text, *(text[at + 1 :] for at, letter in enumerate(text) if letter == ":")]


def _files(path: Path) -> list[tuple[str, Path]]:
    """A file, or a folder's files, with their names in it."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file.relative_to(path)), file) for file in files if file.is_file()]


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


@cache
def _shipped(name: str) -> str | None:
    if not name or "/" in name:
        return None
    for path in (ASSETS / name, ASSETS / f"{name}.safetensors"):
        files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        if files:
            return digest([[str(file.relative_to(ASSETS)), checksum(file)] for file in files])
    return None
