"""Optimizers and learning-rate schedules that follow the recipe, also where a checkpoint has those of another."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler

from distill.errors import ConfigError

Settings = list[dict[str, Any]]  # of each parameter group


def settings(optimizer: Optimizer) -> Settings:
    """Rates, decays and so on of each parameter group."""
    return [{name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups]  # fmt: skip


def replay(
    optimizer: Optimizer,
    asked: Settings,
    make: Callable[[Optimizer], LRScheduler] | None,
    count: int,
    before: Settings | None = None,
) -> LRScheduler | None:
    """Sets an optimizer to what a recipe says it is after `count` steps of its schedule. What it has learnt is left as
    it is, also what some optimizers keep of that among their settings.

    Args:
        optimizer: as a checkpoint left it.
        asked: its settings before there was a schedule.
        make: the recipe's schedule; None for a constant rate.
        count: of the schedule's steps.
        before: what `asked` was for the checkpoint's recipe; if it is not known, rates alone are set.

    Returns:
        The schedule after its steps.

    Raises:
        ConfigError: it ends before.
    """
    for group, own, old in zip(optimizer.param_groups, asked, before or asked, strict=True):
        other = {name for name, value in own.items() if _plain(old.get(name)) != _plain(value)} | {"lr"}
        group.pop("initial_lr", None)  # which a schedule would keep to
        group.update({name: copy.deepcopy(own[name]) for name in other})
    if make is None:
        return None
    schedule = make(optimizer)
    with warnings.catch_warnings():  # that no update was made between the steps is meant
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(count):
            step(schedule)
    return schedule


def steps_of(schedule: LRScheduler) -> int:
    """How many steps a schedule has made."""
    while isinstance(schedule, ChainedScheduler):  # the one that does not count
        schedule = schedule._schedulers[0]
    return schedule.last_epoch


def step(schedule: LRScheduler) -> None:
    """One step.

    Raises:
        ConfigError: the schedule has come to its end.
    """
    try:
        schedule.step()
    except ValueError as error:
        if "Tried to step" not in str(error):  # what OneCycleLR says
            raise
        raise ConfigError(
            f"a learning-rate schedule has come to its end ({error}); give it as many steps as its player has updates, "
            "and to go on after them choose one without an end, such as LinearLR"
        ) from error


def changes(before: Settings, now: Settings) -> list[str]:
    """What differs, in words, each once."""
    found = []
    for old, new in zip(before, now, strict=True):
        for name in new.keys() & old.keys() - {"initial_lr"}:
            was, is_ = _plain(old.get(name)), _plain(new[name])
            if was != is_:
                found.append(f"{name} {is_} (in the checkpoint {was})")
    return sorted(set(found))


def _plain(value: Any) -> Any:
    """As a checkpoint may have it."""
    return list(value) if isinstance(value, tuple) else value
