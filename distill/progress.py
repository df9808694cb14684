"""Progress of long work, on the error stream, so that what a command prints can be piped on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
Advance = Callable[[int], None]


@contextmanager
def counted(title: str, total: int, unit: str = "", seconds: float = 60.0) -> Iterator[Advance]:
    """A bar that is told how many are done, with the time that is left; lines where no terminal shows a bar.

    Args:
        title: what is being done.
        total: how many there are.
        unit: what is counted, where their number per second is to be shown.
        seconds: between two lines.
    """
    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
    shown = total and console.is_terminal
    with Progress(
        *columns, console=console, transient=True, disable=not shown, speed_estimate_period=float("inf")
    ) as bar:
        number = bar.add_task(title, total=total, rate="")
        bar.advance(number, 0)  # the speed is that since the beginning, as what is told may come in bursts
        (task,) = bar.tasks
        said = time.monotonic()

        def advance(count: int) -> None:
            nonlocal said
            bar.advance(number, count)
            if unit and task.speed:
                bar.update(number, rate=f"{task.speed:.3g} {unit}/s")
            if not console.is_terminal and time.monotonic() - said >= seconds:
                said = time.monotonic()
                left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
                console.print(f"{title}: {task.completed:.0f}/{total} {task.fields['rate']}".rstrip() + left)

        yield advance


def tracked(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, under a bar with the time that is left.

    Args:
        items: any.
        title: what is being done.
        total: how many there are, where `items` does not say.
    """
    known = len(items) if total is None and isinstance(items, Sized) else total or 0
    with counted(title, known) as advance:
        for item in items:
            yield item
            advance(1)
