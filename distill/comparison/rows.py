"""What is compared, and how a measurement is told from any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from distill.collaboration.judges import check_judge
from distill.collaboration.pipeline import MODES
from distill.comparison.measures import Drawn, Measure, Setting, specification
from distill.data import shapes
from distill.data.prompts import read_prompts
from distill.data.shapes_data import HELD_OUT
from distill.errors import ConfigError, at_least_one, check_seeds
from distill.export import read_checkpoint
from distill.identity import digest, named, networks, sources, stamp, weights

OWN = {"seed_everything", "ckpt_path", "checkpoint.dirpath", "trainer.default_root_dir"}
NOTHING = "there is nothing to compare; give entries, each with a name and a recipe, checkpoint or pipeline"


@dataclass(frozen=True)
class Adaptive:
    """How a teacher improves what an entry's student paints badly, see `distill collaborate`.

    Attributes:
        teacher: shipped name, folder or hub id.
        teacher_steps: of the teacher per improved image.
        student_steps: of the student.
        mode: `refine` or `regenerate`.
        variance: of the noise a refined latent gets.
        solver: a diffusers scheduler in place of the teacher's own.
        judge: that decides; none that measures.
        held_out: a file of prompts or a set's name, by which the budget is set; captions of drawn images if not given.
        count: how many captions of drawn images; the more, the nearer what is spent to the budget.

    Held-out prompts are to be like those that are measured, as the share of rejected images is taken from them;
    captions of drawn images are, some of which are short and among both.

    Raises:
        ConfigError: settings that no improvement can be made with.
    """

    teacher: str
    teacher_steps: int
    student_steps: int = 1
    mode: str = "regenerate"
    variance: float | None = None
    solver: str | None = None
    judge: str = "small-shapes"
    held_out: str | None = None
    count: int = 10000

    def __post_init__(self) -> None:
        check_judge(self.judge)
        if self.mode not in MODES:
            raise ConfigError(f"a teacher improves images by {' or '.join(MODES)}; got adaptive.mode={self.mode}")
        if (self.mode == "refine") != (self.variance is not None and 0 < self.variance < 1):
            raise ConfigError(
                f"adaptive.variance is that of the noise a refined latent gets, between 0 and 1, and only for "
                f"mode=refine; got {self.variance} with mode={self.mode}"
            )

    def budgets(self) -> tuple[int, int]:
        """The least and the most that can be spent on average."""
        return self.student_steps, self.student_steps + self.teacher_steps


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
        steps: numbers of steps to measure at; with `adaptive` the average numbers that may be spent.
        adaptive: a teacher that improves some of the images.
        guidance, solver: of a pipeline, as in `distill evaluate`.
        teacher: of a pipeline, for measures that compare it with its teacher; a checkpoint knows its own.

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
    teacher: str | None = None
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("recipe", "checkpoint", "pipeline") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"the entry '{self.name}' names {' and '.join(given) or 'nothing'}; give a recipe to train, a "
                "checkpoint, or a pipeline"
            )
        if self.recipe and not Path(self.recipe).is_file():
            raise ConfigError(f"the entry '{self.name}': there is no recipe '{self.recipe}'")
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ConfigError(
                f"the entry '{self.name}' needs different numbers of steps, such as [1, 4]; got {self.steps}"
            )
        if not self.pipeline and (self.guidance is not None or self.solver is not None):
            raise ConfigError(
                f"the entry '{self.name}' gives guidance or solver, which are of a pipeline; a student is sampled "
                "without guidance at its trained levels"
            )
        if self.options and not self.recipe:
            raise ConfigError(f"the entry '{self.name}' has options, which are of a recipe, and it has none")
        if own := sorted(set(self.options) & OWN):
            raise ConfigError(
                f"the entry '{self.name}' gives {', '.join(own)}, which the comparison sets itself: a folder and a "
                "seed of `seeds` for each training"
            )
        if self.teacher and not self.pipeline:
            raise ConfigError(
                f"the entry '{self.name}' names a teacher; only a pipeline does, a checkpoint knows its own"
            )
        if self.adaptive:
            low, high = self.adaptive.budgets()
            if not all(low < budget < high for budget in self.steps):
                raise ConfigError(
                    f"the entry '{self.name}' spends between {low} and {high} steps, those of its student and those of "
                    f"its teacher besides; its budgets are {self.steps}"
                )


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
        results: a file that an earlier comparison wrote. Rows that it has are not measured again either, whatever
            machine they come from; only images are not in it.
        missing: `measure` rows that are not there, or `skip` them.
        prompts: a file of prompts or a set's name, used in turn; captions of held-out drawn images if not given.
        measures: what rows are measured by; `Drawn` if there are none.
    """

    entries: list[Entry]
    output: str
    samples: int = 1000
    seeds: list[int] = field(default_factory=lambda: [0])
    seed: int = 0
    batch_size: int = 64
    runs: str = "runs"
    missing: str = "measure"
    prompts: str | None = None
    results: str | None = None
    measures: list[Measure] = field(default_factory=lambda: [Drawn()])

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"entries need names of their own; {', '.join(twice)} is there more than once")
        for entry in self.entries:
            if entry.after and not (entry.recipe and self.first(entry).recipe):
                raise ConfigError(f"the entry '{entry.name}' is after '{entry.after}'; both need a recipe")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"a comparison needs different seeds of training, such as [0]; got {self.seeds or 'none'}"
            )
        check_seeds(seed=self.seed, **{f"seeds.{index}": seed for index, seed in enumerate(self.seeds)})
        at_least_one(batch_size=self.batch_size)
        for measure in self.measures:
            if "__dataclass_fields__" not in vars(type(measure)):  # which a subclass of a dataclass has as well
                raise ConfigError(
                    f"the measure {type(measure).__name__} is no dataclass; put @dataclass before its class, so that "
                    "its settings tell rows apart"
                )
        if not names:
            raise ConfigError(NOTHING)
        if self.missing not in ("measure", "skip"):
            raise ConfigError(f"rows that are missing can be measured or skipped: measure or skip, not {self.missing}")
        if self.samples < 100:
            raise ConfigError(f"distances of less than 100 images say nothing; got samples={self.samples}")
        if self.prompts and any(entry.adaptive and not entry.adaptive.held_out for entry in self.entries):
            raise ConfigError(
                "with prompts of one's own, adaptive entries need held_out prompts to set their budget by"
            )
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ConfigError(f"the measures give {', '.join(twice)} more than once; leave one of them out")

    def first(self, entry: Entry) -> Entry:
        """The one that an entry comes after.

        Raises:
            ConfigError: there is none of that name.
        """
        for other in self.entries[: self.entries.index(entry)]:
            if other.name == entry.after:
                return other
        raise ConfigError(f"the entry '{entry.name}' is after '{entry.after}', and no entry above it has that name")

    @property
    def names(self) -> list[str]:
        """Of what rows are measured by, in the order of tables."""
        spent = ["steps_spent"] if any(entry.adaptive for entry in self.entries) else []
        return [*(name for measure in self.measures for name in measure.names), *spent, "seconds_per_image"]

    @cached_property
    def setting(self) -> Setting:
        """What the images of all rows have in common."""
        lines = read_prompts(self.prompts) if self.prompts else shapes.captions(HELD_OUT, range(self.samples))
        asked = [lines[index % len(lines)] for index in range(self.samples)]
        return Setting(asked, self.seed, self.batch_size, Path(self.runs) / "measures")

    @cached_property
    def contents(self) -> dict[str, Any]:
        """What each entry's recipe, checkpoint or pipeline holds, read once."""
        return {entry.name: contents(entry) for entry in self.entries}


@dataclass(frozen=True)
class Row:
    """One measurement that is to be made."""

    entry: Entry
    steps: int
    seed: int | None

    def file(self, comparison: Comparison) -> Path:
        """Where it is kept; another setting is another file, another name or list is not."""
        entry = self.entry
        settings: dict[str, Any] = {
            "what": self._training(comparison),
            "painted": [self.steps, entry.guidance, entry.solver],
            "measured": [comparison.samples, comparison.seed, comparison.batch_size],
            "seed": self.seed,
        }
        if entry.adaptive:
            settings["adaptive"] = [asdict(entry.adaptive), named(asdict(entry.adaptive))]
        if comparison.prompts:
            settings["prompts"] = comparison.setting.prompts
        if (by := specification(comparison.measures)) != specification([Drawn()]):
            settings["by"] = [by, named(by), entry.teacher, named(entry.teacher)]
        source = Path(str(entry.recipe or entry.checkpoint or entry.pipeline)).stem
        return Path(comparison.runs) / "rows" / f"{source}-{self.steps}-{digest(settings)}.json"

    def run(self, comparison: Comparison) -> Path:
        """Where its recipe is trained."""
        name = f"{Path(str(self.entry.recipe)).stem}_{digest(self._training(comparison))}_seed_{self.seed}"
        return Path(comparison.runs) / name

    def before(self, comparison: Comparison) -> Row | None:
        """The training that this one begins after, under the same seed."""
        return Row(comparison.first(self.entry), 1, self.seed) if self.entry.after else None

    def lock(self, comparison: Comparison) -> Path:
        """Held by the process that works on it: one for all rows of a training."""
        path = self.run(comparison) if self.entry.recipe else self.file(comparison)
        return path.with_name(path.name + ".lock")

    def _training(self, comparison: Comparison) -> list[Any]:
        """All that tells what is measured from anything else."""
        first = self.before(comparison)
        mine = [comparison.contents[self.entry.name], self.entry.options, networks(read(self.entry.options))]
        return [*mine, *([first._training(comparison)] if first else [])]


def rows_of(comparison: Comparison) -> Iterator[Row]:
    """All rows, in the order of the list."""
    for entry in comparison.entries:
        for seed in comparison.seeds if entry.recipe else [None]:
            for steps in entry.steps:
                yield Row(entry, steps, seed)


def read(options: dict[str, Any]) -> dict[str, Any]:
    """Options with what is given as text read as YAML, as the command line reads it."""

    def value(text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text

    return {name: value(given) if isinstance(given, str) else given for name, given in options.items()}


def _overlaid(entry: Entry, recipe: Any) -> list[Any]:
    """What is in the file that an entry lays over its recipe (`options: {config: FILE}`), and the code of one's own
    behind both and the options, as far as there is any.
    """
    file = entry.options.get("config")
    overlay = yaml.safe_load(Path(file).read_text()) if isinstance(file, str) and Path(file).is_file() else None
    code = sources([recipe, read(entry.options), overlay])
    return [*([overlay, networks(overlay)] if overlay else []), *([code] if code else [])]


def _teachers_folder(checkpoint: Path) -> list[Any]:
    """What a checkpoint's student is decoded and conditioned by, where that is a folder."""
    try:
        facts, _ = read_checkpoint(checkpoint, ["nothing of its weights"])
    except ConfigError:  # which its own row will say
        return []
    teacher = Path(facts.get("teacher") or "")
    return [stamp(teacher)] if facts.get("teacher") and teacher.is_dir() else []


def contents(entry: Entry) -> Any:
    """What tells a changed recipe, checkpoint or pipeline from the one that was measured.

    A recipe's comments are no change; other weights under a name of the package are, and other files of a pipeline's
    folder, or of a network that the recipe begins from or asks, a file laid over it, and the code of a class of one's
    own with the files that its arguments name. Of a checkpoint also the folder of its teacher. What a name of the hub
    stands for, and data in a folder, are not looked at.

    Raises:
        ConfigError: a recipe that is no YAML.
    """
    if entry.recipe:
        try:
            recipe = yaml.safe_load(Path(entry.recipe).read_text())
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the recipe '{entry.recipe}' of the entry '{entry.name}' is no YAML: {reason}"
            ) from error
        return [recipe, networks(recipe), *_overlaid(entry, recipe)]
    if entry.checkpoint:
        return [entry.checkpoint, stamp(Path(entry.checkpoint)), *_teachers_folder(Path(entry.checkpoint))]
    shipped = weights(entry.pipeline)
    return [entry.pipeline, shipped, None if shipped else stamp(Path(str(entry.pipeline)))]
