"""The students of a recipe against their teacher, on shapes: 1, 2 and 4 steps beside 50, 4 and 1 of the teacher; and
how far the one-step student's pictures are from the teacher's own of the same noise and prompts.

Trains what is missing (one run per seed), measures what is missing, keeps finished rows, and writes
benchmarks/results/NAME.json. Killed and started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import results
from omegaconf import OmegaConf

from distill import backbones
from distill.cli import quiet
from distill.evaluation.evaluate import distance_to_teacher, evaluate_on_shapes
from distill.export import load_student
from distill.files import read_json, save_json
from distill.inference import open_painter, open_student_painter

TEACHER_ROWS = {  # name -> (steps, guidance); the 1-step teacher at its better guidance is found among them
    "teacher_50": (50, None),
    "teacher_1_unguided": (1, 1.0),
    "teacher_1_guided": (1, None),
    "teacher_4": (4, None),
}


def main() -> None:
    """Measures every row that is not there yet and prints the summary."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--recipe", required=True, help="name of a file in recipes/")
    parser.add_argument("--first", help="a recipe trained before, under the same seed, whose student begins this one")
    parser.add_argument("--pairs", type=int, default=2000, help="pictures of the distance to the teacher's own")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--name", required=True, help="of the result; ladd_tiny for --recipe tiny_ladd_long")
    arguments = parser.parse_args()
    teacher = OmegaConf.load(results.ROOT / "recipes" / f"{arguments.recipe}.yaml").model.init_args.teacher
    rows_file = arguments.runs / f"{arguments.name}.rows.json"
    rows: dict[str, Any] = read_json(rows_file) if rows_file.is_file() else {}

    def keep(name: str, measure: Any) -> None:
        if name not in rows:
            rows[name] = measure()
            save_json(rows, rows_file)
            print(name, rows[name], flush=True)

    def keep_quality(name: str, make: Any) -> None:
        keep(name, lambda: evaluate_on_shapes(make(), arguments.samples))

    for seed in arguments.seeds:
        first = [] if arguments.first is None else [
            "--model.student_init", str(train(arguments.first, seed, arguments.runs))
        ]  # fmt: skip
        checkpoint = str(train(arguments.recipe, seed, arguments.runs, first))
        for steps in map(int, load_student(checkpoint).calls):
            keep_quality(f"student_{steps}_seed_{seed}", lambda c=checkpoint, n=steps: open_student_painter(c, n))
        pair = functools.partial(distance_to_teacher, open_student_painter(checkpoint, 1), open_painter(teacher))
        keep(f"to_teacher_seed_{seed}", lambda pair=pair: pair(backbones.load(teacher).autoencoder(), arguments.pairs))
    for name, (steps, guidance) in TEACHER_ROWS.items():
        keep_quality(name, lambda n=steps, g=guidance: open_painter(teacher, n, g))
    results.save(
        arguments.name,
        {"recipe": arguments.recipe, "teacher": teacher, "rows": rows, "summary": summary(rows, arguments.seeds)},
        arguments.seeds,
    )


def train(recipe: str, seed: int, runs: Path, options: list[str] | None = None) -> Path:
    """The last checkpoint of the recipe's run under `seed`; trains or continues it if it is not finished."""
    folder = runs / f"{recipe}_seed_{seed}"
    done = folder / "done"
    if not done.is_file():
        command = [sys.executable, "-m", "distill", "fit", "--config", f"recipes/{recipe}.yaml"]
        command += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
        subprocess.run([*command, *(options or [])], check=True)
        done.touch()
    return folder / "checkpoints" / "last.ckpt"


def summary(rows: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """The asked-for ratios: each student's distance over its teacher's, and what alignment it loses (in points)."""
    best = min(rows["teacher_1_unguided"]["fid_shapes"], rows["teacher_1_guided"]["fid_shapes"])
    fifty = rows["teacher_50"]
    answer: dict[str, Any] = {"teacher_1_over_teacher_50": round(best / fifty["fid_shapes"], 3)}
    for steps in [n for n in (1, 2, 4) if f"student_{n}_seed_{seeds[0]}" in rows]:
        students = [rows[f"student_{steps}_seed_{seed}"] for seed in seeds]
        distances = [student["fid_shapes"] for student in students]
        losses = [100 * (fifty["alignment"] - student["alignment"]) for student in students]
        answer[f"student_{steps}"] = {
            "fid_over_teacher_50": spread([distance / fifty["fid_shapes"] for distance in distances]),
            "fid_over_teacher_1": spread([distance / best for distance in distances]),
            "alignment_points_below_teacher_50": spread(losses),
        }
    distances = [rows[f"to_teacher_seed_{seed}"] for seed in seeds if f"to_teacher_seed_{seed}" in rows]
    for name in ("judge", "latent_lpips"):
        if distances:
            answer[f"{name}_distance_to_teacher"] = spread([row[name] for row in distances])
    return answer


def spread(values: list[float]) -> dict[str, float]:
    """Mean, lowest and highest over the seeds."""
    return {"mean": round(mean(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


if __name__ == "__main__":
    main()
