"""Which method is best: every entry of a list trained if need be, painted, measured, and kept row by row."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.comparison.rows import Comparison, Row, rows_of
from distill.data import shapes
from distill.data.loading import batches
from distill.data.shapes_data import ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.evaluate import HELD_OUT
from distill.evaluation.metrics import read_back
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.evaluation.statistics import bootstrap, frechet_distance, kernel_distance, precision_recall
from distill.files import Lock, read_json, save_json, written_whole
from distill.inference import Painter, open_painter, open_student_painter, save_png
from distill.progress import tracked
from distill.provenance import machine, today

SHOWN = 16  # prompts whose images are kept for the report
TIMED = 16  # images of the timed call
WAIT = 5.0  # seconds before asking again whether another process has finished
METRICS = ("fid_shapes", "alignment", "kid", "precision", "recall", "seconds_per_image")


def compare(comparison: Comparison) -> list[dict[str, Any]]:
    """Trains and measures what is missing.

    Several processes, or machines that share the folders, may run the same comparison: each takes an entry and seed
    that no other has taken, and all wait for the last. A process that is killed leaves its training running and locked;
    another run of the comparison waits for that and goes on.

    Returns:
        Every row there is, with its values.

    Raises:
        ConfigError: trainings that failed or pipelines that cannot be opened, once all others are done.
    """
    groups: dict[Path, list[Row]] = {}
    for row in rows_of(comparison) if comparison.missing == "measure" else ():
        groups.setdefault(row.lock(comparison), []).append(row)
    reference, failures = cache(lambda: Reference(comparison.samples)), []
    while groups:
        for path in list(groups):
            with Lock(path) as lock:
                if lock.mine:
                    try:
                        _finish(groups.pop(path), comparison, reference, lock)
                    except ConfigError as error:
                        failures.append(str(error))
        if groups:
            time.sleep(WAIT)
    if failures:
        raise ConfigError("; ".join(failures))
    return [
        {**read_json(file), "name": row.entry.name, "images": str(file.with_suffix(""))}
        for row, file in ((row, row.file(comparison)) for row in rows_of(comparison))
        if file.is_file()
    ]


def _finish(rows: list[Row], comparison: Comparison, reference: Callable[[], Reference], lock: Lock) -> None:
    """Measures those of the rows that are not there."""
    for row in rows:
        file = row.file(comparison)
        if not file.is_file():
            painter, cost = _open(row, comparison, lock)
            values = _measured(painter, reference(), comparison, file.with_suffix(""))
            about = {"steps": row.steps, "train_seed": row.seed, "date": today(), "machine": machine(), **cost}
            save_json(about | values, file)
            print(f"{row.entry.name}, {row.steps} steps: {_short(values)}", file=sys.stderr)


class Reference:
    """The held-out drawn images that all rows are measured against, and their captions.

    Args:
        samples: captions that are painted.
        count: images on the other side.
    """

    def __init__(self, samples: int, count: int = 10000):
        self.prompts = shapes.captions(HELD_OUT, range(samples))
        self.judge, images = load_shapes_judge(), ShapesDataset(count, seed=HELD_OUT)
        parts = (images.__getitems__(part)["pixels"] for part in batches(range(count), 256))
        with torch.no_grad():
            self.features = torch.cat([self.judge.features(pixels) for pixels in parts])


def _open(row: Row, comparison: Comparison, lock: Lock) -> tuple[Painter, dict[str, Any]]:
    """What paints a row, and what its training cost."""
    entry = row.entry
    if entry.pipeline:
        return open_painter(entry.pipeline, row.steps, entry.guidance, entry.solver), {}
    if entry.checkpoint:
        return open_student_painter(entry.checkpoint, row.steps), {}
    checkpoint = _trained(row, comparison, lock)
    return open_student_painter(str(checkpoint), row.steps), {"training": _cost(row, comparison)}


def _cost(row: Row, comparison: Comparison) -> dict[str, Any]:
    """What a training cost, with all that it came after."""
    cost = read_json(row.run(comparison) / "cost.json")
    if first := row.before(comparison):
        earlier = _cost(first, comparison)
        cost |= {name: round(cost[name] + earlier[name], 2) for name in ("images", "wall_seconds", "device_seconds")}
        cost["evaluations"] = {role: n + earlier["evaluations"][role] for role, n in cost["evaluations"].items()}
        cost["peak_GiB"] = max(cost["peak_GiB"], earlier["peak_GiB"])
    return cost


def _trained(row: Row, comparison: Comparison, lock: Lock) -> Path:
    """The checkpoint of a row's recipe under its seed; trained or continued if it is not finished."""
    entry, folder = row.entry, row.run(comparison)
    checkpoint, done = folder / "checkpoints" / "last.ckpt", folder / "finished"
    if done.is_file():
        return checkpoint
    options = dict(entry.options)
    if first := row.before(comparison):
        with Lock(first.lock(comparison), wait=True) as other:
            options["model.student_init"] = str(_trained(first, comparison, other))
    command = [sys.executable, "-m", "distill", "fit", "--config", str(entry.recipe)]
    command += ["--seed_everything", str(row.seed), "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
    command += [part for name, value in options.items() for part in (f"--{name}", _text(value))]
    run = subprocess.run(command, stdout=2, pass_fds=[lock.descriptor])  # what is printed is the table alone
    if run.returncode:
        raise ConfigError(f"training the entry '{entry.name}' ended with code {run.returncode}; see above for why")
    done.touch()
    return checkpoint


@torch.no_grad()
def _measured(painter: Painter, reference: Reference, comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Metrics with their bootstrap intervals, seconds per image, and the first images as files."""
    features, right, named, shown = [], [], [], []
    stream = painter.stream(reference.prompts, comparison.seed, comparison.batch_size)
    for part, images in tracked(stream, "painting", -(-comparison.samples // comparison.batch_size)):
        asked = shapes.parse([reference.prompts[index] for index in part])
        features.append(reference.judge.features(images * 2 - 1))
        hits, total = read_back(reference.judge.read(images * 2 - 1), asked)
        right.append(hits)
        named.append(total)
        shown += [image for index, image in zip(part, images, strict=True) if index < SHOWN]
    with written_whole(folder) as kept:
        for index, image in enumerate(shown):
            save_png(image, kept / f"{index:02d}.png")
    values = _values(reference.features, torch.cat(features), torch.cat(right), torch.cat(named))
    about = f"{len(reference.features)} held-out drawn images"
    seconds = painter.seconds_per_image(reference.prompts[:TIMED])
    return {**values, "seconds_per_image": round(seconds, 5), "samples": comparison.samples, "seed": comparison.seed,
            "reference": about}  # fmt: skip


def _values(real: Tensor, fake: Tensor, right: Tensor, named: Tensor) -> dict[str, Any]:
    count = len(fake)
    some_real, scale = real[:count], real.std()  # as many on both sides; the kernel is made for features of about 1
    precision, recall = precision_recall(some_real, fake)

    def aligned(some: Tensor) -> float:
        return float(right[some].sum() / named[some].sum())

    return {
        "fid_shapes": round(frechet_distance(real, fake), 3),
        "fid_shapes_interval": bootstrap(lambda some: frechet_distance(real, fake[some]), count, draws=100),
        "alignment": round(aligned(torch.arange(count)), 5),
        "alignment_interval": bootstrap(aligned, count),
        "kid": round(kernel_distance(some_real / scale, fake / scale), 5),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
    }


def _short(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in ("fid_shapes", "alignment", "seconds_per_image"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
