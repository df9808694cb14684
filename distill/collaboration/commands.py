"""What `distill calibrate` and `distill collaborate` do."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from distill.collaboration.calibrate import Target, seeded
from distill.collaboration.calibration import Calibration
from distill.collaboration.judges import open_judge
from distill.collaboration.pipeline import KEPT, AdaptiveOutput, AdaptivePipeline
from distill.data import shapes
from distill.data.prompts import read_prompts
from distill.files import written_whole
from distill.inference import grid, open_painter, open_student_painter, pick_device, save_png, save_samples


def open_pair(
    student: str,
    teacher: str,
    judge: str,
    calibration: str | None = None,
    student_steps: int | None = None,
    student_guidance: float | None = None,
    teacher_guidance: float | None = None,
    solver: str | None = None,
    device: str = "auto",
) -> AdaptivePipeline:
    """A student and a teacher by name, called as their folders say.

    Raises:
        ConfigError: no such pipeline, judge or calibration, or one of another set-up.
    """
    if student.endswith(".ckpt"):
        painter = open_student_painter(student, student_steps, student_guidance, None, device)
    else:
        painter = open_painter(student, student_steps, student_guidance, None, device)
    other = open_painter(teacher, None, teacher_guidance, solver, device)
    made = Calibration.load(calibration) if calibration else None
    decides = open_judge(judge, pick_device(device))
    pair = AdaptivePipeline(painter.pipeline, other.pipeline, decides, made, painter.call, other.call)
    pair.set_progress_bar_config(desc="painting", unit="image")  # type: ignore[attr-defined]
    return pair


def prompts_of(file: str | None, count: int, seed: int) -> list[str]:
    """The lines of a file, or captions of drawn images."""
    return read_prompts(file) if file else shapes.captions(seed, range(count))


def target_of(name: str | None, device: str = "auto") -> Target | None:
    """What a search is to make highest: a judge's mean score, or the negative `fid_shapes`.

    Raises:
        ConfigError: an unknown judge.
    """
    if name is None:
        return None
    if name == "fid_shapes":
        from distill.evaluation.evaluate import fid_of_shapes

        return lambda prompts, images: -fid_of_shapes(images)
    judge = open_judge(name, pick_device(device))
    return lambda prompts, images: float(judge(prompts, images).mean())


def collaborate(
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

    Returns:
        One line about what was done.
    """
    plan, folder = pair.plan(**how), Path(output)
    answer = seeded(pair, prompts, seed, batch_size=batch_size, **how)
    save_samples(answer.images, prompts, folder)
    save_decisions(answer, prompts, seed, folder / "decisions.csv")
    improved = sum(decision != KEPT for decision in answer.decisions)
    spent = sum(answer.steps) / len(prompts)
    done = (
        f"{len(prompts)} images, of which {improved} scored below {plan.threshold:.4f} and were improved: {spent:.2f} "
        f"steps on average; images and decisions.csv are in {folder}"
    )
    shown = prompts[:compare]
    if not shown:
        return done
    kept = {"mode": "regenerate", "teacher_steps": plan.teacher_steps, "batch_size": batch_size}
    student, teacher = (
        seeded(pair, shown, seed, threshold=threshold, **kept).images for threshold in (-float("inf"), float("inf"))
    )
    rows = torch.cat([teacher, student, answer.images[:compare]])
    names = [f"teacher, {plan.teacher_steps} steps", "student", "adaptive"]
    save_png(grid(rows, len(shown), scale, names), folder / "grid.png")
    return f"{done}, and grid.png"


def save_decisions(answer: AdaptiveOutput, prompts: list[str], seed: int, path: Path) -> None:
    """A table with one line per image."""
    with written_whole(path) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "seed", "score", "decision", "steps", "prompt"])
        rows = zip(answer.scores, answer.decisions, answer.steps, prompts, strict=True)
        for index, (score, decision, steps, prompt) in enumerate(rows):
            table.writerow([f"{index:05d}.png", seed + index, f"{score:.6f}", decision, steps, prompt])
