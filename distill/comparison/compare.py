"""Which method is best: every entry of a list trained if need be, painted, measured, and kept row by row."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from distill.data import shapes
from distill.data.loading import batches
from distill.data.shapes_data import ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.evaluate import HELD_OUT
from distill.evaluation.metrics import read_back
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.evaluation.statistics import bootstrap, frechet_distance, kernel_distance, precision_recall
from distill.files import read_json, save_json, written_whole
from distill.inference import Painter, open_painter, open_student_painter, save_png
from distill.progress import tracked

SHOWN = 16  # prompts whose images are kept for the report
TIMED = 16  # images of the timed call
WAIT = 5.0  # seconds before asking again whether another process has finished


@dataclass(frozen=True)
class Entry:
    """One competitor: exactly one of `recipe`, `checkpoint` and `pipeline`.

    Attributes:
        name: in the tables.
        recipe: to train, once per seed; a file that `distill fit` takes.
        options: overrides of the recipe, dotted.
        after: name of another trained entry, whose student of the same seed begins this one (`model.student_init`).
        checkpoint: of `distill fit`.
        pipeline: shipped name, folder or hub id.
        steps: numbers of steps to measure at.
        guidance, solver: of a pipeline, as in `distill evaluate`.

    Raises:
        ConfigError: none or several of the three.
    """

    name: str
    recipe: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    checkpoint: str | None = None
    pipeline: str | None = None
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    guidance: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("recipe", "checkpoint", "pipeline") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"the entry '{self.name}' names {' and '.join(given) or 'nothing'}; give a recipe to train, a "
                "checkpoint, or a pipeline"
            )
        if self.recipe and not Path(self.recipe).is_file():
            raise ConfigError(f"the entry '{self.name}': there is no recipe '{self.recipe}'")
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"the entry '{self.name}' needs numbers of steps, such as [1, 4]; got {self.steps}")


@dataclass(frozen=True)
class Comparison:
    """What is compared and how.

    Attributes:
        entries: the competitors.
        output: folder of the report.
        samples: images of each row; distances of different numbers cannot be compared.
        seeds: of training; each trained entry has a row for each.
        seed: of the images' noise.
        batch_size: images per call.
        runs: where recipes are trained, and rows are kept with their images under `rows`. A row that is there is not
            measured again, by this list or another, so a comparison can be killed and continued.
        missing: `measure` rows that are not there, or `skip` them.
    """

    entries: list[Entry]
    output: str
    samples: int = 1000
    seeds: list[int] = field(default_factory=lambda: [0])
    seed: int = 0
    batch_size: int = 64
    runs: str = "runs"
    missing: str = "measure"

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"entries need names of their own; {', '.join(twice)} is there more than once")
        for entry in self.entries:
            if entry.after and not (entry.recipe and self.first(entry).recipe):
                raise ConfigError(f"the entry '{entry.name}' is after '{entry.after}'; both need a recipe")
        if not names:
            raise ConfigError(
                "there is nothing to compare; give entries, each with a name and a recipe, checkpoint or pipeline"
            )
        if self.missing not in ("measure", "skip"):
            raise ConfigError(f"rows that are missing can be measured or skipped: measure or skip, not {self.missing}")
        if self.samples < 100:
            raise ConfigError(f"distances of less than 100 images say nothing; got samples={self.samples}")

    def first(self, entry: Entry) -> Entry:
        """The one that an entry comes after.

        Raises:
            ConfigError: there is none of that name.
        """
        for other in self.entries[: self.entries.index(entry)]:
            if other.name == entry.after:
                return other
        raise ConfigError(f"the entry '{entry.name}' is after '{entry.after}', and no entry above it has that name")


@dataclass(frozen=True)
class Row:
    """One measurement that is to be made."""

    entry: Entry
    steps: int
    seed: int | None

    def file(self, comparison: Comparison) -> Path:
        """Where it is kept; another setting is another file, another name or list is not."""
        settings = {**asdict(self.entry), "name": None, "after": None, "steps": self.steps, "train_seed": self.seed}
        settings |= {"samples": comparison.samples, "seed": comparison.seed, "contents": contents(self.entry)}
        if first := self.before(comparison):
            settings["after"] = first._training(comparison)
        digest = _digest(settings)
        source = Path(str(self.entry.recipe or self.entry.checkpoint or self.entry.pipeline)).stem
        return Path(comparison.runs) / "rows" / f"{source}-{self.steps}-{digest}.json"

    def run(self, comparison: Comparison) -> Path:
        """Where its recipe is trained."""
        name = f"{Path(str(self.entry.recipe)).stem}_{_digest(self._training(comparison))}_seed_{self.seed}"
        return Path(comparison.runs) / name

    def before(self, comparison: Comparison) -> Row | None:
        """The training that this one begins after, under the same seed."""
        return Row(comparison.first(self.entry), 1, self.seed) if self.entry.after else None

    def _training(self, comparison: Comparison) -> list[Any]:
        """All that tells its training from another."""
        first = self.before(comparison)
        return [contents(self.entry), self.entry.options, *([first._training(comparison)] if first else [])]

    def lock(self, comparison: Comparison) -> Path:
        """Held by the process that works on it: one for all rows of a training."""
        return (self.run(comparison) if self.entry.recipe else self.file(comparison)).with_suffix(".lock")


def contents(entry: Entry) -> Any:
    """What tells a changed recipe or checkpoint from the one that was measured; None for a pipeline's name.

    A recipe's comments are no change.
    """
    if entry.recipe:
        return yaml.safe_load(Path(entry.recipe).read_text())
    if not entry.checkpoint or not Path(entry.checkpoint).exists():
        return None
    about = Path(entry.checkpoint).stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def rows_of(comparison: Comparison) -> Iterator[Row]:
    """All rows, in the order of the list."""
    for entry in comparison.entries:
        for seed in comparison.seeds if entry.recipe else [None]:
            for steps in entry.steps:
                yield Row(entry, steps, seed)


def compare(comparison: Comparison) -> list[dict[str, Any]]:
    """Trains and measures what is missing.

    Several processes, or machines that share the folders, may run the same comparison: each takes an entry and seed
    that no other has taken, and all wait for the last.

    Returns:
        Every row there is, with its values.

    Raises:
        ConfigError: a training that failed, or a pipeline that cannot be opened.
    """
    groups: dict[Path, list[Row]] = {}
    for row in rows_of(comparison) if comparison.missing == "measure" else ():
        groups.setdefault(row.lock(comparison), []).append(row)
    reference = cache(lambda: Reference(comparison.samples))
    while groups:
        for lock in list(groups):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(lock, timeout=0):
                _finish(groups.pop(lock), comparison, reference)
        if groups:
            time.sleep(WAIT)
    return [
        {**read_json(file), "name": row.entry.name, "images": str(file.with_suffix(""))}
        for row, file in ((row, row.file(comparison)) for row in rows_of(comparison))
        if file.is_file()
    ]


def _finish(rows: list[Row], comparison: Comparison, reference: Callable[[], Reference]) -> None:
    """Measures those of the rows that are not there."""
    for row in rows:
        file = row.file(comparison)
        if not file.is_file():
            painter, cost = _open(row, comparison)
            values = _measured(painter, reference(), comparison, file.with_suffix(""))
            about = {"steps": row.steps, "train_seed": row.seed, **cost}
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


def _open(row: Row, comparison: Comparison) -> tuple[Painter, dict[str, Any]]:
    """What paints a row, and what its training cost."""
    entry = row.entry
    if entry.pipeline:
        return open_painter(entry.pipeline, row.steps, entry.guidance, entry.solver), {}
    if entry.checkpoint:
        return open_student_painter(entry.checkpoint, row.steps), {}
    checkpoint = _trained(row, comparison)
    cost = read_json(row.run(comparison) / "cost.json")
    return open_student_painter(str(checkpoint), row.steps), {"training": cost}


def _trained(row: Row, comparison: Comparison) -> Path:
    """The checkpoint of a row's recipe under its seed; trained or continued if it is not finished."""
    entry, folder = row.entry, row.run(comparison)
    checkpoint, done = folder / "checkpoints" / "last.ckpt", folder / "finished"
    if done.is_file():
        return checkpoint
    options = dict(entry.options)
    if first := row.before(comparison):
        with FileLock(first.lock(comparison)):
            options["model.student_init"] = str(_trained(first, comparison))
    command = [sys.executable, "-m", "distill", "fit", "--config", str(entry.recipe)]
    command += ["--seed_everything", str(row.seed), "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
    command += [part for name, value in options.items() for part in (f"--{name}", _text(value))]
    run = subprocess.run(command, stdout=2)  # what is printed is the table alone
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


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
