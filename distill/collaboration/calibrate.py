"""Making a calibration: scores of a student's images on held-out prompts, and the best way to spend a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.collaboration.calibration import Calibration, digest, percentiles, prompts_hash
from distill.collaboration.pipeline import AdaptiveOutput, AdaptivePipeline, network_of
from distill.errors import ConfigError
from distill.progress import tracked

CALIBRATION = 2  # seed of captions of drawn images that are neither trained on nor measured with
VARIANCES = (0.3, 0.4, 0.55, 0.7, 0.75)  # the range of the paper, section 4
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
Target = Callable[[list[str], Tensor], float]


def seeded(pipeline: AdaptivePipeline, prompts: Sequence[str], seed: int, **options: Any) -> AdaptiveOutput:
    """A pipeline's images, float `[N, 3, H, W]`; image i has the noise of seed `seed + i`, as with `distill sample`."""
    generators = [torch.Generator(pipeline.device).manual_seed(seed + index) for index in range(len(prompts))]
    answer = pipeline(prompts, generator=generators, output_type="pt", **options)
    assert isinstance(answer, AdaptiveOutput)
    return answer


def calibrate(pipeline: AdaptivePipeline, prompts: Sequence[str], seed: int = 0, batch_size: int = 16) -> Calibration:
    """Scores the student's images of held-out prompts, at the steps and guidance of the pipeline; no teacher is asked.

    Args:
        pipeline: its student, call and judge.
        prompts: none of those it will be used or measured on.
        seed: of the noise.
        batch_size: images per call.

    Raises:
        ConfigError: fewer than 20 prompts, or a judge whose score is not finite.
    """
    if len(prompts) < 20:
        raise ConfigError(f"percentiles of scores need 20 held-out prompts or more, got {len(prompts)}")
    answer = seeded(pipeline, prompts, seed, threshold=-float("inf"), teacher_steps=1, mode="regenerate",
                    batch_size=batch_size)  # fmt: skip
    scores = torch.tensor(answer.scores, dtype=torch.float64)
    if not scores.isfinite().all():
        raise ConfigError(f"the judge '{pipeline.judge.spec}' gave a score that is not finite")
    return Calibration(
        student=digest(network_of(pipeline.student)),
        call=pipeline.student_call,
        steps=answer.steps[0],
        judge=pipeline.judge.spec,
        prompts=len(prompts),
        prompts_hash=prompts_hash(prompts),
        percentiles=percentiles(scores),
    )


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
    left = budget - calibration.steps
    counts = sorted({round(left / share) for share in shares} - {0})
    counts = [count for count in counts if left <= count]
    if not counts or left <= 0:
        raise ConfigError(f"a budget of {budget} steps leaves the teacher none: the student takes {calibration.steps}")
    ways = [{"mode": mode, "teacher_steps": count, "share": left / count} for count in counts]
    return [way | {"variance": v} for way in ways for v in variances] if mode == "refine" else ways


def search(
    pipeline: AdaptivePipeline,
    prompts: Sequence[str],
    budget: float,
    modes: Sequence[str] = ("refine", "regenerate"),
    target: Target | None = None,
    seed: int = 0,
    batch_size: int = 16,
    variances: Sequence[float] = VARIANCES,
    shares: Sequence[float] = SHARES,
) -> Calibration:
    """Tries all `choices` for a budget on held-out prompts and keeps the best.

    Args:
        pipeline: with its calibration.
        prompts: held-out; those of the calibration will do.
        budget: average steps per image.
        modes: that may be chosen.
        target: what is to be highest, of prompts and images; the judge's mean score if not given.
        seed, batch_size: as in `calibrate`.
        variances, shares: that are tried.

    Returns:
        The calibration with its `choice`, in which `tried` lists all with their values.
    """
    assert pipeline.calibration is not None
    judge = pipeline.judge
    value = target or (lambda asked, images: float(judge(asked, images).mean()))
    tried = []
    bars = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]  # one bar over all ways is enough
    ways = [way for mode in modes for way in choices(pipeline.calibration, budget, mode, variances, shares)]
    try:
        for way in tracked(ways, "searching"):
            settings = {name: way[name] for name in ("mode", "teacher_steps", "variance") if name in way}
            threshold = pipeline.calibration.threshold(way["share"])
            answer = seeded(pipeline, prompts, seed, threshold=threshold, batch_size=batch_size, **settings)
            tried.append(way | {"value": value(list(prompts), answer.images)})
    finally:
        pipeline.set_progress_bar_config(**bars)  # type: ignore[attr-defined]
    best = max(tried, key=lambda way: way["value"])
    asked = {"budget": budget, "teacher": digest(network_of(pipeline.teacher))}
    return replace(pipeline.calibration, choice={**best, **asked, "tried": tried})
