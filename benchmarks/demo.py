"""The end of `make demo`: exports the student, paints the comparison, measures it, and says where everything is."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from distill.cli import quiet
from distill.data import shapes
from distill.evaluation.evaluate import evaluate_on_shapes
from distill.export import export
from distill.files import read_json, save_json
from distill.inference import Painter, grid, open_painter, save_png

CELLS = {
    "teacher_50": ("tiny-sd3", 50),
    "teacher_1": ("tiny-sd3", 1),
    "student_1": ("student", 1),
    "student_4": ("student", 4),
}


def main() -> None:
    """Writes grid.png, metrics.json and student/ into the run's folder and prints the table."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the folder `distill fit` wrote")
    parser.add_argument("--samples", type=int, default=768, help="images per cell of the table")
    arguments = parser.parse_args()
    run: Path = arguments.run
    export(run / "checkpoints" / "last.ckpt", run / "student")
    painters = {
        cell: open_painter(str(run / "student") if name == "student" else name, steps)
        for cell, (name, steps) in CELLS.items()
    }
    paint(painters, run / "grid.png")
    metrics = {cell: measure(painter, arguments.samples) for cell, painter in painters.items()}
    save_json(metrics, run / "metrics.json")
    export(run / "checkpoints" / "last.ckpt", run / "student", metrics=run / "metrics.json")
    report(read_json(run / "metrics.json"), run)


def paint(painters: dict[str, Painter], path: Path) -> None:
    """One row per cell, the same prompts and noise in each column."""
    prompts = shapes.captions(seed=3, indices=range(12))
    rows = torch.cat([painter(prompts) for painter in painters.values()])
    save_png(grid(rows, columns=12, scale=3, rows=list(painters)), path)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


def measure(painter: Painter, samples: int) -> dict[str, float]:
    """`fid_shapes`, `alignment` and seconds per image in batches of 32."""
    values = evaluate_on_shapes(painter, samples)
    seconds = painter.seconds_per_image(shapes.captions(seed=3, indices=range(32)))
    return {**values, "seconds_per_image": round(seconds, 6)}


def report(metrics: dict[str, dict[str, float]], run: Path) -> None:
    """Prints the table and the paths."""
    print(f"\n{'':12}{'fid_shapes':>12}{'alignment':>12}{'s / image':>12}")
    for cell, values in metrics.items():
        print(f"{cell:12}{values['fid_shapes']:12.1f}{values['alignment']:12.3f}{values['seconds_per_image']:12.5f}")
    print(f"\nthe prompts of the grid are in {run / 'grid.txt'}")
    for what, where in (
        ("images", "grid.png"),
        ("metrics", "metrics.json"),
        ("student", "student"),
        ("logs", "tensorboard"),
    ):
        print(f"{what:8} {run / where}")


if __name__ == "__main__":
    main()
