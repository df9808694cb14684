"""What `distill calibrate` and `distill collaborate` do."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.collaboration.calibrate import MeanScore, Target, generators, seeded
from distill.collaboration.calibration import Calibration
from distill.collaboration.calls import at_own_size
from distill.collaboration.judges import open_judge
from distill.collaboration.pipeline import KEPT, AdaptivePipeline, Decided
from distill.data import shapes
from distill.data.prompts import read_prompts
from distill.files import written_whole
from distill.inference import (
    begun,
    grid,
    numbered,
    open_painter,
    open_student_painter,
    pick_device,
    remove_samples,
    save_png,
    save_prompts,
)


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
    dtype: torch.dtype = torch.float32,
) -> AdaptivePipeline:
    """A student and a teacher by name, called as their folders say; a teacher of another size than the student's paints
    at its own.

    Raises:
        ConfigError: no such pipeline, judge or calibration, or one of another set-up.
    """
    if student.endswith(".ckpt"):
        painter = open_student_painter(student, student_steps, student_guidance, None, device, dtype)
    else:
        painter = open_painter(student, student_steps, student_guidance, None, device, dtype)
    other = open_painter(teacher, None, teacher_guidance, solver, device, dtype)
    made = Calibration.load(calibration) if calibration else None
    decides = open_judge(judge, pick_device(device))
    call = at_own_size((painter.pipeline, painter.call), (other.pipeline, other.call))
    pair = AdaptivePipeline(painter.pipeline, other.pipeline, decides, made, painter.call, call)
    pair.set_progress_bar_config(desc="painting", unit="image")  # type: ignore[attr-defined]
    return pair


def prompts_of(file: str | None, count: int, seed: int) -> list[str]:
    """The lines of a file, or captions of drawn images."""
    return read_prompts(file) if file else shapes.captions(seed, range(count))


class NearDrawn:
    """How near images are to drawn ones: the negative `fid_shapes`."""

    def __init__(self) -> None:
        from distill.evaluation.evaluate import held_out

        self.distance = copy.deepcopy(held_out(10000))

    def update(self, prompts: list[str], images: Tensor) -> None:
        """B prompts and their images."""
        self.distance.update(images, real=False)

    def value(self) -> float:
        """The higher, the nearer."""
        return -float(self.distance.compute())


def target_of(name: str | None, device: str = "auto") -> Callable[[], Target] | None:
    """What makes the target of a search: a judge's mean score, or the negative `fid_shapes`.

    Raises:
        ConfigError: an unknown judge.
    """
    if name is None:
        return None
    return NearDrawn if name == "fid_shapes" else partial(MeanScore, open_judge(name, pick_device(device)))


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
