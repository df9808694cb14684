"""Making a calibration: scores of a student's images on held-out prompts, and the best way to spend a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.collaboration.calibration import (
    Calibration,
    judge_identity,
    numbers,
    parts,
    percentiles,
    plain,
    prompts_hash,
)
from distill.collaboration.judges import Judge
from distill.collaboration.pipeline import AdaptiveOutput, AdaptivePipeline, Decided
from distill.errors import ConfigError
from distill.progress import tracked

CALIBRATION = 2  # seed of captions of drawn images that are neither trained on nor measured with
VARIANCES = (0.3, 0.4, 0.55, 0.7, 0.75)  # the range of the paper, section 3.2
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
FEWEST = 20  # prompts that percentiles are taken of


class Target(Protocol):
    """What a search is to make highest, of one way's images."""

    def update(self, prompts: list[str], images: Tensor) -> None:
        """B prompts and images `[B, 3, H, W]` in [0, 1], in any order."""
        ...

    def value(self) -> float:
        """Of all images so far."""
        ...


class MeanScore:
    """A judge's mean score, whatever order the images come in; a score that is no number is as low as the lowest."""

    def __init__(self, judge: Judge):
        self.judge = judge
        self.scores: list[Tensor] = []

    def update(self, prompts: list[str], images: Tensor) -> None:
        """B prompts and their images."""
        self.scores.append(self.judge(prompts, images).double().cpu())

    def value(self) -> float:
        """The mean."""
        scores = numbers(torch.cat(self.scores), self.judge.spec).tolist()
        return math.fsum(scores) / len(scores)


def seeded(pipeline: AdaptivePipeline, prompts: Sequence[str], seed: int, **options: Any) -> AdaptiveOutput:
    """A pipeline's images, float `[N, 3, H, W]`; image i has the noise of seed `seed + i`, as with `distill sample`."""
    answer = pipeline(prompts, generator=generators(pipeline, prompts, seed), output_type="pt", **options)
    assert isinstance(answer, AdaptiveOutput)
    return answer


def generators(pipeline: AdaptivePipeline, prompts: Sequence[str], seed: int) -> list[torch.Generator]:
    """For image i the one of seed `seed + i`."""
    return [torch.Generator(pipeline.device).manual_seed(seed + index) for index in range(len(prompts))]


def calibrate(
    pipeline: AdaptivePipeline,
    prompts: Sequence[str],
    seed: int = 0,
    batch_size: int = 16,
    inputs: dict[str, Any] | None = None,
) -> Calibration:
    """Scores the student's images of held-out prompts, at the steps and guidance of the pipeline; no teacher is asked.

    A score that is no number counts as the lowest, as such images are rejected. No image is held.

    Args:
        pipeline: its student, call and judge.
        prompts: none of those it will be used or measured on.
        seed: of the noise.
        batch_size: images per call.
        inputs: of the pipeline's call, one value per prompt.

    Raises:
        ConfigError: fewer than 20 prompts, or a judge that gives no score that is a number.
    """
    check_prompts(prompts)
    call, scores, steps = plain(pipeline.student_call), [], 0  # type: ignore[var-annotated]
    for batch in pipeline.judged(prompts, generators(pipeline, prompts, seed), batch_size, inputs):
        scores, steps = scores + batch.scores, batch.steps
    return Calibration(
        student=parts(pipeline.student),
        call=call,
        steps=steps,
        judge=pipeline.judge.spec,
        prompts=len(prompts),
        prompts_hash=prompts_hash(prompts),
        percentiles=percentiles(numbers(torch.tensor(scores, dtype=torch.float64), pipeline.judge.spec)),
        judged_by=judge_identity(pipeline.judge.spec),
    )


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses too few.

    Raises:
        ConfigError: fewer than 20.
    """
    if len(prompts) < FEWEST:
        raise ConfigError(f"percentiles of scores need {FEWEST} held-out prompts or more, got {len(prompts)}")


def check_search(
    pipeline: AdaptivePipeline,
    prompts: Sequence[str],
    budget: float,
    modes: Sequence[str] = ("refine", "regenerate"),
    inputs: dict[str, Any] | None = None,
) -> None:
    """Refuses what `search` would refuse after a calibration, by one image of the student, which tells its steps.

    Args:
        pipeline: not calibrated yet.
        prompts, budget, modes, inputs: as in `search`.

    Raises:
        ConfigError: a budget that leaves the teacher no step, or a way that the teacher cannot go.
    """
    check_prompts(prompts)
    first = {name: values[:1] for name, values in (inputs or {}).items()}
    (batch,) = pipeline.judged(prompts[:1], generators(pipeline, prompts[:1], 0), 1, first)
    for mode in modes:
        check_ways(pipeline, ways(batch.steps, budget, mode))


def check_ways(pipeline: AdaptivePipeline, some: list[dict[str, Any]]) -> None:
    """Refuses those that the teacher cannot go, before anything is painted.

    Raises:
        ConfigError: one of them.
    """
    for way in some:
        pipeline.plan(threshold=0.0, **settings(way))


def choices(
    calibration: Calibration,
    budget: float,
    mode: str,
    variances: Sequence[float] = VARIANCES,
    shares: Sequence[float] = SHARES,
) -> list[dict[str, Any]]:
    """The ways to spend `budget` average steps that are tried: variances, and shares with the teacher steps they leave.

    Raises:
        ConfigError: a budget that leaves the teacher no step.
    """
    return ways(calibration.steps, budget, mode, variances, shares)


def ways(
    steps: int, budget: float, mode: str, variances: Sequence[float] = VARIANCES, shares: Sequence[float] = SHARES
) -> list[dict[str, Any]]:
    """The same, of a student that takes `steps`."""
    left = budget - steps
    if not left > 0 or not math.isfinite(left):
        raise ConfigError(f"a budget of {budget} steps leaves the teacher none: the student takes {steps}")
    counts = sorted({max(round(left / share), 1) for share in shares})
    some = [{"mode": mode, "teacher_steps": count, "share": left / count} for count in counts if left <= count]
    return [way | {"variance": v} for way in some for v in variances] if mode == "refine" else some


def settings(way: dict[str, Any]) -> dict[str, Any]:
    """What of a way the pipeline is called with."""
    return {name: way[name] for name in ("mode", "teacher_steps", "variance") if name in way}


def search(
    pipeline: AdaptivePipeline,
    prompts: Sequence[str],
    budget: float,
    modes: Sequence[str] = ("refine", "regenerate"),
    target: Callable[[], Target] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    variances: Sequence[float] = VARIANCES,
    shares: Sequence[float] = SHARES,
    inputs: dict[str, Any] | None = None,
) -> Calibration:
    """Tries all `choices` for a budget on held-out prompts and keeps the best.

    Args:
        pipeline: with its calibration.
        prompts: held-out; those of the calibration will do.
        budget: average steps per image.
        modes: that may be chosen.
        target: makes what is to be highest, anew for every way; the judge's mean score if not given.
        seed, batch_size, inputs: as in `calibrate`.
        variances, shares: that are tried.

    Returns:
        The calibration with its `choice`, in which `tried` lists all with their values.

    Raises:
        ConfigError: no calibration, a budget that leaves the teacher no step, or a way that the teacher cannot go; all
            before anything is painted. No way's value is a number.
    """
    made = pipeline.calibration
    if made is None:
        raise ConfigError("a search needs the pipeline's calibration; assign the one that `calibrate` returns")
    some = [way for mode in modes for way in choices(made, budget, mode, variances, shares)]
    check_ways(pipeline, some)
    new = target or (lambda: MeanScore(pipeline.judge))
    tried = []
    bars = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]  # one bar over all ways is enough
    try:
        for way in tracked(some, "searching"):
            start = generators(pipeline, prompts, seed)
            stream = pipeline.stream(prompts, threshold=made.threshold(way["share"]), generator=start,
                                     batch_size=batch_size, inputs=inputs, **settings(way))  # fmt: skip
            tried.append(way | {"value": _value(stream, list(prompts), new(), batch_size)})
    finally:
        pipeline.set_progress_bar_config(**bars)  # type: ignore[attr-defined]
    asked = {"budget": budget, "teacher": parts(pipeline.teacher), "teacher_call": plain(pipeline.teacher_call)}
    return replace(made, choice={**_best(tried), **asked, "tried": tried})


def _best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    known = [way for way in tried if way["value"] == way["value"]]  # a value that is no number is of broken images
    if not known:
        raise ConfigError("the target is no number for any way to spend the budget; see what the teacher paints")
    return max(known, key=lambda way: way["value"])


def _value(stream: Iterator[Decided], prompts: list[str], target: Target, batch_size: int) -> float:
    """A target's value of images as they come; no more than a batch of them is held."""
    waiting: list[Decided] = []

    def hand_on() -> None:
        target.update([prompts[one.index] for one in waiting], torch.stack([one.image for one in waiting]))
        waiting.clear()

    for one in stream:
        waiting.append(one)
        if len(waiting) == batch_size:
            hand_on()
    if waiting:
        hand_on()
    return target.value()
