"""`distill collaborate`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.backbones import dtype_of
from distill.collaboration.calibrate import generators, seeded
from distill.collaboration.opening import open_pair
from distill.collaboration.pipeline import KEPT, AdaptivePipeline, Decided
from distill.data.prompts import given_prompts
from distill.errors import ConfigError, at_least_one, check_seeds
from distill.files import check_folder, written_whole
from distill.inference import begun, check_samples, grid, numbered, remove_samples, save_png, save_prompts


def collaborate(
    student: str,
    teacher: str,
    output: str = "collaboration",
    judge: str = "small-shapes",
    calibration: str | None = None,
    prompt: list[str] | str | None = None,
    prompts: str | None = None,
    budget: float | None = None,
    threshold: float | None = None,
    mode: str | None = None,
    variance: float | None = None,
    strength: float | None = None,
    teacher_steps: int | None = None,
    student_steps: int | None = None,
    student_guidance: float | None = None,
    teacher_guidance: float | None = None,
    solver: str | None = "DPMSolverMultistepScheduler",
    compare: int = 8,
    scale: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Paints prompts with a student and lets its teacher improve what a judge rejects.

    Args:
        student: exported folder, hub id, or a checkpoint of `distill fit`.
        teacher: shipped pipeline, folder or hub id.
        output: folder for 00000.png, ..., prompts.txt, decisions.csv and grid.png (rows: teacher, student, adaptive).
        judge: as in `distill calibrate`.
        calibration: the file `distill calibrate` wrote.
        prompt: one, or several as '["a red ring", "a blue square"]'.
        prompts: a text file with one prompt per line, or another set: see `distill.data.prompts`.
        budget: average steps per image; or give a threshold.
        threshold: images that score below it are improved.
        mode: refine or regenerate.
        variance: of the noise a refined latent gets, between 0 and 1; or give a strength.
        strength: share of the teacher's schedule that refines.
        teacher_steps: for each improved image.
        student_steps, student_guidance, teacher_guidance, solver: as in `distill calibrate`.
        compare: how many prompts the grid shows.
        scale: enlargement of each pixel in the grid.
        seed: image i starts from the noise of seed + i.
        batch_size: images per call.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    at_least_one(student_steps=student_steps, batch_size=batch_size, compare=compare, scale=scale)
    check_seeds(seed=seed)
    if mode == "regenerate" and not (variance is None and strength is None):
        raise ConfigError("--variance and --strength are of --mode refine; leave them out to regenerate")
    check_folder(output)
    lines = given_prompts(prompt, prompts)
    check_samples(output, len(lines))
    pair = open_pair(
        student, teacher, judge, calibration, student_steps, student_guidance, teacher_guidance, solver, device,
        dtype_of(dtype, half=True)
    )  # fmt: skip
    how = {"budget": budget, "threshold": threshold, "mode": mode, "variance": variance, "strength": strength,
           "teacher_steps": teacher_steps}  # fmt: skip
    print(paint(pair, lines, output, how, seed, batch_size, compare, scale))


def paint(
    pair: AdaptivePipeline,
    prompts: list[str],
    output: str | Path,
    how: dict[str, Any],
    seed: int,
    batch_size: int,
    compare: int,
    scale: int,
) -> str:
    """Paints prompts into a folder, with a table of decisions and a grid of teacher, student and adaptive.

    Every picture is written when it is decided, so that only those of the grid are held. Of an earlier call into the
    same folder nothing is left.

    Returns:
        One line about what was done.
    """
    plan, folder = pair.plan(**how), Path(output)
    stream = pair.stream(prompts, generator=generators(pair, prompts, seed), batch_size=batch_size, **how)
    decided, shown = _written(stream, prompts, folder, compare)
    save_decisions(decided, prompts, seed, folder / "decisions.csv")
    improved = sum(one.decision != KEPT for one in decided)
    spent = sum(one.steps for one in decided) / len(prompts)
    done = (
        f"{len(prompts)} images, of which {improved} scored below {plan.threshold:.4f} and were improved: {spent:.2f} "
        f"steps on average; images and decisions.csv are in {folder}"
    )
    if not shown:
        return done
    kept = {"mode": "regenerate", "teacher_steps": plan.teacher_steps, "batch_size": batch_size}
    student, teacher = (
        seeded(pair, prompts[:compare], seed, threshold=threshold, **kept).images
        for threshold in (-float("inf"), float("inf"))
    )
    rows = torch.cat([teacher, student, torch.stack(shown)])
    names = [f"teacher, {plan.teacher_steps} steps", "student", "adaptive"]
    save_png(grid(rows, len(shown), scale, names), folder / "grid.png")
    return f"{done}, and grid.png"


def _written(stream: Any, prompts: list[str], folder: Path, compare: int) -> tuple[list[Decided], list[Tensor]]:
    """Writes what comes; what was decided without the images, and the first images."""
    coming = begun(stream)
    remove_samples(folder)
    (folder / "decisions.csv").unlink(missing_ok=True)
    save_prompts(prompts, folder)
    decided, shown = [], {}
    for one in coming:
        save_png(one.image, numbered(folder, one.index), prompts[one.index])
        decided.append(one.without_image())
        if one.index < compare:
            shown[one.index] = one.image
    return sorted(decided), [shown[index] for index in sorted(shown)]


def save_decisions(decided: list[Decided], prompts: list[str], seed: int, path: Path) -> None:
    """A table with one line per image."""
    with written_whole(path) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "seed", "score", "decision", "steps", "prompt"])
        for one in decided:
            row = [f"{one.index:05d}.png", seed + one.index, f"{one.score:.6f}", one.decision, one.steps]
            table.writerow([*row, prompts[one.index]])
