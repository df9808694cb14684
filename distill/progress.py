"""Progress bars of long work, on the error stream, so that what a command prints can be piped on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def tracked(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, under a bar with the time that is left.

    Args:
        items: any.
        title: what is being done.
        total: how many there are, where `items` does not say.
    """
    return iter(track(items, title, total=total, transient=True, console=Console(stderr=True)))
