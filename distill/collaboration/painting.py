"""A student's and its teacher's pictures in a folder, with a table of what was decided."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.collaboration.calibrate import generators, seeded
from distill.collaboration.pipeline import KEPT, AdaptivePipeline, Decided
from distill.files import written_whole
from distill.inference import begun, grid, numbered, remove_samples, save_png, save_prompts


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
