"""diffusers' schedulers: which draw noise between their steps and whose it is, and which share a noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


@contextmanager
def own_noise(scheduler: Any | None, generators: list[torch.Generator]) -> Iterator[None]:
    """Inside, a scheduler that draws noise between its steps draws each sample's from its own generator, whether the
    pipeline hands it on or not. None stands for a pipeline without one, which sees to its noise itself.

    What a sample becomes is then a function of its generator alone, not of its batch, and no noise comes twice: a
    pipeline whose scheduler draws from the global generator would repeat its first noise where both have one seed.
    """
    step = getattr(scheduler, "step", None)
    if step is None or "generator" not in inspect.signature(step).parameters:
        yield
        return

    @wraps(step)
    def own(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **{**kwargs, "generator": generators})

    scheduler.step = own  # type: ignore[union-attr]
    try:
        yield
    finally:
        del scheduler.step  # type: ignore[union-attr]


def draws_noise(scheduler: Any) -> bool:
    """Whether a scheduler draws noise between its steps, found by taking some; it begins anew afterwards."""
    scheduler.set_timesteps(4)
    nothing, generator = torch.zeros(1, 4, 2, 2), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        before = torch.get_rng_state(), generator.get_state()
        with own_noise(scheduler, [generator]):
            for timestep in scheduler.timesteps[:-1]:
                scheduler.step(nothing, timestep, nothing)
        after = torch.get_rng_state(), generator.get_state()
    return any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def on_same_noise(one: Any, other: Any) -> bool:
    """Whether two diffusers schedulers share one discrete, variance-preserving noise schedule."""
    here, there = (getattr(scheduler, "alphas_cumprod", None) for scheduler in (one, other))
    if here is None or there is None or here.shape != there.shape:
        return False
    return torch.allclose(here.double(), there.double(), atol=1e-6)
