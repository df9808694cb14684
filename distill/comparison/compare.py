"""Which method is best: every entry of a list trained if need be, painted, measured, and kept row by row."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from statistics import mean
from typing import Any

from distill.collaboration.calibrate import CALIBRATION, calibrate
from distill.collaboration.calibration import VERSION, Calibration, judge_identity, parts, plain, prompts_hash
from distill.collaboration.calls import at_own_size
from distill.collaboration.judges import open_judge
from distill.collaboration.pipeline import AdaptiveOutput, AdaptivePipeline
from distill.comparison.rows import Adaptive, Comparison, Row, rows_of
from distill.data import shapes
from distill.data.prompts import read_prompts
from distill.errors import ConfigError
from distill.files import Lock, read_json, save_json, written_whole
from distill.identity import digest
from distill.inference import Painter, open_painter, open_student_painter, pick_device, save_png
from distill.progress import tracked
from distill.provenance import machine, today

SHOWN = 16  # prompts whose images are kept for the report
TIMED = 16  # images of the timed call
TIMED_TOGETHER = 128  # where a teacher improves some of them
WAIT = 5.0  # seconds before asking again whether another process has finished


class Unfinished(ConfigError):
    """Some rows could not be had.

    Args:
        sentence: which, and why.
        rows: those that are there.
    """

    def __init__(self, sentence: str, rows: list[dict[str, Any]]):
        super().__init__(sentence)
        self.rows = rows


def compare(comparison: Comparison) -> list[dict[str, Any]]:
    """Trains and measures what is missing.

    Several processes, or machines that share the folders, may run the same comparison: each takes an entry and seed
    that no other has taken, and all wait for the last. A process that is killed leaves its training running and locked;
    another run of the comparison waits for that and goes on.

    Returns:
        Every row there is, with its values.

    Raises:
        ConfigError: what can be told before anything is trained.
        Unfinished: trainings that failed, pipelines that cannot be opened and rows that cannot be measured, once all
            others are done.
    """
    kept = kept_rows(comparison.results)
    groups: dict[Path, list[Row]] = {}
    for row in rows_of(comparison) if comparison.missing == "measure" else ():
        if row.file(comparison).stem not in kept and not row.file(comparison).is_file():
            groups.setdefault(row.lock(comparison), []).append(row)
    failures: list[str] = []
    for row in rows_of(comparison) if groups else ():
        if row.entry.checkpoint and not Path(row.entry.checkpoint).exists():
            raise ConfigError(f"the entry '{row.entry.name}': there is no checkpoint '{row.entry.checkpoint}'")
    for measure in comparison.measures if groups else ():
        measure.check(comparison.setting)
    while groups:
        for path in list(groups):
            with Lock(path) as lock:
                if lock.mine:
                    try:
                        _finish(groups.pop(path), comparison, lock, failures)
                    except ConfigError as error:
                        failures.append(str(error))
        if groups:
            time.sleep(WAIT)
    there: list[dict[str, Any]] = [
        {**(read_json(file) if file.is_file() else kept[file.stem]), "name": row.entry.name,
         "images": str(file.with_suffix(""))}
        for row, file in ((row, row.file(comparison)) for row in rows_of(comparison))
        if file.is_file() or file.stem in kept
    ]  # fmt: skip
    if failures:
        raise Unfinished("; ".join(dict.fromkeys(failures)), there)
    return there


def kept_rows(results: str | Path | None) -> dict[str, dict[str, Any]]:
    """The rows that a file of results has, if there is one, wherever they were measured, by the name of a row's file.

    Raises:
        ConfigError: it is a file of something else.
    """
    if results is None or not Path(results).is_file():
        return {}
    try:
        values = read_json(results)["values"]
        return {Path(row["images"]).name: row for row in [*values["rows"], *values.get("unlisted", [])]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"'{results}' holds no rows of a comparison; give another file of results, or remove it"
        ) from error


def _finish(rows: list[Row], comparison: Comparison, lock: Lock, failures: list[str]) -> None:
    """Measures those of the rows of one training that are not there; `failures` gets a sentence for each where that
    fails.

    Raises:
        ConfigError: the training failed.
    """
    if rows[0].entry.recipe:
        _trained(rows[0], comparison, lock)
    for row in rows:
        if not row.file(comparison).is_file():
            try:
                _measure(row, comparison, lock)
            except ConfigError as error:
                failures.append(f"the entry '{row.entry.name}': {error}")
            except Exception as error:  # memory that ran out, a measure of one's own, ...: the other rows go on
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                failures.append(f"the entry '{row.entry.name}' could not be measured at {row.steps} steps ({reason})")


def _measure(row: Row, comparison: Comparison, lock: Lock) -> None:
    file = row.file(comparison)
    painter, cost = _open(row, comparison, lock)
    values = _measured(painter, comparison, file.with_suffix(""))
    about = {"steps": row.steps, "train_seed": row.seed, "date": today(), "machine": machine(), **cost}
    save_json(about | values, file)
    print(f"{row.entry.name}, {row.steps} steps: {_short(values, comparison.names)}", file=sys.stderr)


def _open(row: Row, comparison: Comparison, lock: Lock) -> tuple[Painter, dict[str, Any]]:
    """What paints a row, and what its training cost."""
    entry, cost = row.entry, {}
    checkpoint = entry.checkpoint
    steps = entry.adaptive.student_steps if entry.adaptive else row.steps
    if entry.recipe:
        checkpoint, cost = str(_trained(row, comparison, lock)), {"training": _cost(row, comparison)}
    if checkpoint:
        painter = open_student_painter(checkpoint, steps)
    else:
        painter = open_painter(str(entry.pipeline), steps, entry.guidance, entry.solver)
        painter.teacher = entry.teacher
    return (_adaptive(painter, entry.adaptive, row.steps, comparison) if entry.adaptive else painter), cost


def _adaptive(student: Painter, how: Adaptive, budget: int, comparison: Comparison) -> Painter:
    """A student whose teacher improves as many images as the budget allows."""
    teacher = open_painter(how.teacher, solver=how.solver)
    judge = open_judge(how.judge, pick_device("auto"))
    own = at_own_size((student.pipeline, student.call), (teacher.pipeline, teacher.call))
    pair = AdaptivePipeline(student.pipeline, teacher.pipeline, judge, None, student.call, own)
    pair.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    call: dict[str, Any] = {"mode": how.mode, "variance": how.variance, "teacher_steps": how.teacher_steps}
    pair.plan(threshold=0.0, **call)  # what the teacher cannot do is refused before the student's images are scored
    held_out = read_prompts(how.held_out) if how.held_out else shapes.captions(CALIBRATION, range(how.count))
    pair.calibration = kept_calibration(pair, held_out, comparison.runs, comparison.batch_size)
    call |= {"budget": budget, "batch_size": comparison.batch_size}
    return Painter(Counted(pair), call, teacher=student.teacher)


def kept_calibration(pair: AdaptivePipeline, prompts: list[str], runs: str | Path, batch_size: int) -> Calibration:
    """The judge's scores of the student's images of these prompts, made once: all budgets of one student share them.

    Args:
        pair: whose student, call and judge make it.
        prompts: as in `calibrate`.
        runs: the folder of comparisons; calibrations are kept under `calibrations`.
        batch_size: images per call.
    """
    file = Path(runs) / "calibrations" / f"{calibration_key(pair, prompts)}.json"
    with Lock(file.with_suffix(".lock"), wait=True):
        if not file.is_file():
            calibrate(pair, prompts, batch_size=batch_size).save(file)
    return Calibration.load(file)


def calibration_key(pair: AdaptivePipeline, prompts: list[str]) -> str:
    """What tells scores from any others: all parts of the student, its call, the judge and the prompts."""
    judge = [pair.judge.spec, judge_identity(pair.judge.spec)]
    return digest([VERSION, parts(pair.student), plain(pair.student_call), judge, prompts_hash(prompts)])


class Counted:
    """A pipeline of student and teacher that remembers the steps it spends.

    Attributes:
        steps: of every image so far.
    """

    def __init__(self, pair: AdaptivePipeline):
        self.pair, self.device, self.steps = pair, pair.device, []  # type: ignore[var-annotated]

    def __call__(self, **call: Any) -> AdaptiveOutput:
        answer = self.pair(**call)
        assert isinstance(answer, AdaptiveOutput)
        self.steps += answer.steps
        return answer


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
    command += [part for name, value in options.items() for part in (f"--{name}", _text(value))]
    command += ["--seed_everything", str(row.seed), "--trainer.default_root_dir", str(folder), "--ckpt_path", "last"]
    command += ["--checkpoint.dirpath", str(checkpoint.parent)]  # wherever the recipe has its own
    if code := _run(command, lock):
        raise ConfigError(f"training the entry '{entry.name}' ended with code {code}; see above for why")
    done.touch()
    return checkpoint


def _run(command: list[str], lock: Lock) -> int:
    """The exit code of a training, which a Ctrl-C tells to end as well, and which then saves what it has."""
    process = subprocess.Popen(command, stdout=2, pass_fds=[lock.descriptor])  # what is printed is the table alone
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def _measured(painter: Painter, comparison: Comparison, folder: Path) -> dict[str, Any]:
    """What the measures say of its images, seconds per image, and the first images as files."""
    setting, shown = comparison.setting, []
    for measure in comparison.measures:
        measure.begin(setting, painter)
    stream = painter.finite(setting.prompts, setting.seed, setting.batch_size)
    for part, images in tracked(stream, "painting", -(-comparison.samples // comparison.batch_size)):
        for measure in comparison.measures:
            measure.update(part, images)
        shown += [image for index, image in zip(part, images, strict=True) if index < SHOWN]
    spent = painter.pipeline.steps[:] if isinstance(painter.pipeline, Counted) else []
    with written_whole(folder) as kept:
        for index, image in enumerate(shown):
            save_png(image, kept / f"{index:02d}.png")
    found = [measure.values() for measure in comparison.measures]
    against = "; ".join(values.pop("reference") for values in found if "reference" in values)
    numbers = {name: _plain(value) for values in found for name, value in values.items()}
    if spent:
        numbers["steps_spent"] = round(mean(spent), 4)
    together = TIMED_TOGETHER if spent else min(TIMED, setting.batch_size)
    seconds = painter.seconds_per_image(setting.prompts[:together])
    return {**numbers, "seconds_per_image": round(seconds, 5), "samples": comparison.samples, "seed": comparison.seed,
            "reference": against}  # fmt: skip


def _plain(value: Any) -> Any:
    """What JSON takes, of a number of NumPy or PyTorch."""
    return value.item() if hasattr(value, "item") else value


def _short(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names if name in values)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
