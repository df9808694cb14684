"""What tells a measurement from any other: digests of settings, and of what the names in them stand for."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from distill.files import ASSETS, checksum


def digest(about: Any) -> str:
    """Ten letters that stand for a value made of plain ones."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:10]


def weights(value: Any) -> dict[str, str]:
    """Digests of the package's own weights that are named anywhere in `value`."""
    return {name: found for name in _texts(value) if (found := _shipped(name))}


def named(value: Any) -> dict[str, Any]:
    """What lies behind the names anywhere in `value`: the package's own weights, and files and folders, also as parts
    of `KIND:PATH`. What a name on the hub stands for is not looked at.
    """
    parts = {part for text in _texts(value) for part in (text, text.partition(":")[2])}
    places = {part: found for part in sorted(parts) if part and (found := stamp(Path(part)))}
    return weights(value) | places


def stamp(path: Path) -> list[Any] | None:
    """Sizes and times of a file or of a folder's files; None where there is nothing."""
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


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
