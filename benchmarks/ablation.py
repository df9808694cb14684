"""Ablation tables: a recipe with one thing changed per row, several seeds, short runs.

Trains and measures what is missing, keeps finished rows, and writes benchmarks/results/TABLE.json. Killed and started
again, it goes on where it stopped. Rows of one table are compared with each other only: the runs are short.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import results
from omegaconf import DictConfig, OmegaConf

from distill.cli import quiet
from distill.evaluation.evaluate import evaluate_on_shapes
from distill.export import load_student
from distill.files import read_json, save_json
from distill.inference import open_student_painter

Change = Callable[[DictConfig], None]
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 %, by number of seeds


@dataclass(frozen=True)
class Table:
    """Rows over one recipe.

    Attributes:
        recipe: name of a file in recipes/.
        source: the table it repeats at tiny scale.
        rows: what each row changes.
    """

    recipe: str
    source: str
    rows: dict[str, Change]


def put(**values: Any) -> Change:
    """Sets the module's arguments."""

    def change(config: DictConfig) -> None:
        config.model.init_args |= values

    return change


def term(index: int, **values: Any) -> Change:
    """Sets the arguments of one strategy."""

    def change(config: DictConfig) -> None:
        config.model.init_args.strategies[index].init_args |= values

    return change


def only(index: int) -> Change:
    """Keeps one strategy."""

    def change(config: DictConfig) -> None:
        config.model.init_args.strategies = [config.model.init_args.strategies[index]]

    return change


def swapped(index: int, name: str, **values: Any) -> Change:
    """Replaces one strategy by another."""

    def change(config: DictConfig) -> None:
        config.model.init_args.strategies[index] = {"class_path": name, "init_args": values}

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(config: DictConfig) -> None:
        for one in changes:
            one(config)

    return change


def same(_: DictConfig) -> None:
    """The recipe itself."""


PIXEL, SCORE = 0, 1  # places of tiny_add.yaml's strategies
LATENT = {"levels": {"class_path": "LogitNormal", "init_args": {"m": -1.5, "s": 1.5}}}  # as in tiny_ladd.yaml
REGRESSION, CRITIC = 0, 1  # places of tiny_diffusion2gan.yaml's strategies
PLAIN = {"r1": None, "noise": False, "multi_scale": False}
UNMIXED = {"mixed_latents": 0.0, "mixed_prompts": 0.0, "mixed_noises": 0.0}


def distance(name: str, **values: Any) -> Change:
    """Regression alone, from the teacher, by another distance."""
    return both(term(REGRESSION, distance=name, **values), only(REGRESSION), put(student_init="teacher"))


TABLES = {
    "add_ablation": Table(
        "tiny_add",
        "ADD (arXiv 2311.17042), Table 1 b, c, d, f",
        {
            "both terms": same,
            "adversarial alone": only(PIXEL),
            "distillation alone": only(SCORE),
            "random initialisation": put(student_init="random"),
            "no condition": term(PIXEL, text=False, image=None),
            "text condition": term(PIXEL, image=None),
            "image condition": term(PIXEL, text=False),
            "2 teacher steps": term(SCORE, teacher_steps=2),
            "4 teacher steps": term(SCORE, teacher_steps=4),
            "sds weighting": term(SCORE, weighting="sds"),
        },
    ),
    "diffusion2gan_ablation": Table(
        "tiny_diffusion2gan",
        "Diffusion2GAN (arXiv 2405.05967), Tables 1 and 2; the latter's rows begin at the first stage's checkpoint",
        {
            "e_latent_lpips": distance("e_latent_lpips"),
            "lpips": distance("lpips", weights="tiny-lpips", network="squeeze"),
            "latent_lpips": distance("latent_lpips"),
            "pseudo_huber": distance("pseudo_huber"),
            "mse": distance("mse"),
            "regression": only(REGRESSION),
            "+ diffusion critic": term(CRITIC, **PLAIN, **UNMIXED),
            "+ noise": term(CRITIC, **{**PLAIN, "noise": True}, **UNMIXED),
            "+ R1": term(CRITIC, multi_scale=False, **UNMIXED),
            "+ multi-scale": term(CRITIC, **UNMIXED),
            "+ mix-and-match": same,
        },
    ),
    "hybrids": Table(
        "tiny_add",
        "mixtures by YAML alone; the first is LADD on real images (arXiv 2403.12015, section 4.2)",
        {
            "PixelAdversarial + ScoreDistillation": same,
            "LatentAdversarial + ScoreDistillation": swapped(PIXEL, "LatentAdversarial", **LATENT),
            "PixelAdversarial + LatentAdversarial": swapped(SCORE, "LatentAdversarial", **LATENT),
        },
    ),
}


def main() -> None:
    """Runs every row of a table that is not there yet and writes the result."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="updates of a row")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rows", nargs="+", help="some of the table's rows; all if not given")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    table = TABLES[options.table]
    file = options.runs / f"{options.table}.rows.json"
    rows: dict[str, Any] = read_json(file) if file.is_file() else {}
    for seed in options.seeds:
        for name in options.rows or table.rows:
            key = f"{name}, seed {seed}"
            if key not in rows:
                measured = measure(table, name, seed, options)
                rows = (read_json(file) if file.is_file() else {}) | {key: measured}  # another process may work on it
                save_json(rows, file)
                print(key, rows[key], flush=True)
    values = {"recipe": table.recipe, "source": table.source, "steps": options.steps, "batch_size": options.batch_size}
    values |= {"rows": rows, "summary": summary(rows, list(table.rows))}
    print(results.save(options.table, values, options.seeds))


def measure(table: Table, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one row under one seed and measures its student at one step and at four."""
    folder = options.runs / options.table / f"{name.replace(' ', '_')}_{seed}"
    config: Any = OmegaConf.load(results.ROOT / "recipes" / f"{table.recipe}.yaml")
    table.rows[name](config)
    config.seed_everything = seed
    config.data.init_args.batch_size = options.batch_size
    config.trainer |= {"max_steps": options.steps, "default_root_dir": str(folder)}
    config.samples = {"every": 0}
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "recipe.yaml")
    command = [sys.executable, "-m", "distill", "fit", "--config", str(folder / "recipe.yaml"), "--ckpt_path", "last"]
    subprocess.run(command, check=True)
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    counts = [n for n in (1, 4) if str(n) in load_student(checkpoint).calls]
    found = {n: evaluate_on_shapes(open_student_painter(checkpoint, n), options.samples) for n in counts}
    shutil.rmtree(folder / "checkpoints")  # tens of rows of them would fill a disk
    return {f"{what}_{n}": found[n][what] for n in found for what in ("fid_shapes", "alignment")}


def summary(rows: dict[str, dict[str, float]], names: list[str]) -> dict[str, Any]:
    """For each row and metric the mean over seeds and half the width of its 95 % interval (Student's t)."""
    answer = {}
    for name in names:
        runs = [values for key, values in rows.items() if key.rsplit(", seed ", 1)[0] == name]
        if runs:
            answer[name] = {metric: interval([run[metric] for run in runs]) for metric in runs[0]}
    return answer


def interval(values: list[float]) -> dict[str, Any]:
    """Mean, half-width of the 95 % interval (None for one seed), and number of seeds."""
    count = len(values)
    half = STUDENT_T[count] * stdev(values) / count**0.5 if count > 1 else None
    return {"mean": round(mean(values), 4), "half_width": None if half is None else round(half, 4), "seeds": count}


if __name__ == "__main__":
    main()
