"""Schedules of a teacher that take as many steps as asked for, from pure noise or from an image."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch

from distill.collaboration.calls import arguments
from distill.errors import ConfigError


def cut(scheduler: Any, teacher_steps: int, variance: float | None = None, strength: float | None = None) -> int:
    """How many steps a schedule must have so that its last `teacher_steps` begin nearest to a noise level.

    Args:
        scheduler: the teacher's; its timesteps are set anew.
        teacher_steps: that are left.
        variance: of the noise where they begin, of a total of 1.
        strength: the share of the schedule that is left, in place of a variance.
    """
    longest = min(50 * teacher_steps, levels(scheduler))
    counts = [n for n in range(teacher_steps, longest + 1) if n * (teacher_steps / n) == teacher_steps]
    # (other n: diffusers would find one step more or less in `n * strength`, by rounding)
    if strength is not None:
        return min(counts, key=lambda n: abs(teacher_steps / n - strength))
    assert variance is not None

    def begins_at(n: int) -> float:
        return noise_variances(scheduler, n)[n - teacher_steps]

    place = bisect_left(counts, -variance, key=lambda n: -begins_at(n))  # the longer, the lower the last steps begin
    return min(counts[max(place - 1, 0) : place + 1], key=lambda n: abs(begins_at(n) - variance))


def whole(pipeline: Any, steps: int, call: dict[str, Any]) -> int:
    """How many steps a pipeline's schedule must have so that it takes `steps`: more where it begins with an image.

    Args:
        pipeline: whose scheduler's timesteps are set anew.
        steps: that are taken.
        call: its arguments, of which `strength` is the share of the schedule that is taken.

    Raises:
        ConfigError: a strength out of range, or so small that the schedule would have more steps than there are levels.
    """
    if "strength" not in arguments(pipeline):
        return steps
    strength = call.get("strength", arguments(pipeline)["strength"].default)
    if strength is None or not 0 < strength <= 1:
        raise ConfigError(f"the strength of the teacher's call must lie between 0 and 1; got {strength}")
    nearest = steps / strength
    counts = range(max(steps, int(nearest) - 1), int((steps + 1) / strength) + 2)
    right = [n for n in counts if n <= levels(pipeline.scheduler) and _taken(pipeline, n, strength) == steps]
    if not right:
        raise ConfigError(
            f"teacher_steps={steps} at a strength of {strength} are {nearest:.0f} of a whole schedule, and the teacher "
            f"has {levels(pipeline.scheduler)} levels; ask for fewer"
        )
    return min(right, key=lambda n: abs(n - nearest))


def _taken(pipeline: Any, schedule: int, strength: float) -> int:
    """Steps of a schedule that diffusers takes at a strength; pipelines round differently."""
    pipeline.scheduler.set_timesteps(schedule)
    if not hasattr(pipeline, "get_timesteps"):
        return int(schedule * strength)
    return len(pipeline.get_timesteps(schedule, strength, "cpu")[0])


def levels(scheduler: Any) -> int:
    """The most steps that a schedule can have."""
    return scheduler.config.num_train_timesteps


def noise_variances(scheduler: Any, steps: int) -> list[float]:
    """Of the noise at every step of a schedule, of a total variance of 1: from nearly 1 down to nearly 0."""
    scheduler.set_timesteps(steps)
    if not hasattr(scheduler, "sigmas") or len(scheduler.sigmas) < len(scheduler.timesteps):
        kept = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()]
        return (1 - kept).tolist()
    noise = scheduler.sigmas[: len(scheduler.timesteps) : scheduler.order].double().cpu()
    flows = type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False)
    data = 1 - noise if flows else torch.ones_like(noise)  # others count noise in units of the data
    return (noise**2 / (noise**2 + data**2)).tolist()


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuses a scheduler whose schedule cannot be made from a number of steps, or takes another number of them.

    Raises:
        ConfigError: one of these, or more steps than levels.
    """
    name = type(scheduler).__name__
    if scheduler.config.get("use_dynamic_shifting", False):
        raise ConfigError(
            f"the teacher's {name} shifts its schedule by the picture's size, which is not supported here"
        )
    check_levels(scheduler, steps)
    scheduler.set_timesteps(steps)
    if (taken := len(scheduler.timesteps)) != steps:
        raise ConfigError(
            f"the teacher's {name} asks the network {taken} times in {steps} steps, so no budget could be kept; set "
            "one that asks once a step, such as DPMSolverMultistepScheduler"
        )


def check_levels(scheduler: Any, steps: int) -> None:
    """Refuses more steps than a scheduler has levels; its timesteps are set anew.

    Raises:
        ConfigError: there are more, or the scheduler has no schedule of so many.
    """
    name = type(scheduler).__name__
    if steps > levels(scheduler):
        raise ConfigError(f"the teacher's {name} has {levels(scheduler)} levels, fewer than teacher_steps={steps}")
    if scheduler.config.get("use_dynamic_shifting", False):  # it wants to know the picture's size first
        return
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the teacher's {name} has no schedule of teacher_steps={steps} ({reason})") from error
