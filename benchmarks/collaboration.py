"""Adaptive collaboration against the teacher, refining everything and the student alone, at equal average steps
(arXiv 2312.10835, Fig. 10), of students of several trainings.

The small judge decides; the other shapes judge, `fid_shapes` and alignment measure, on draws of captions and noise that
set no threshold (most short captions are among both). Keeps finished rows, and writes
benchmarks/results/collaboration_tiny.json and docs/images/collaboration.png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import results
import torch
from scipy.stats import t as student_t

from distill.cli import quiet
from distill.collaboration.calibrate import CALIBRATION, search, seeded
from distill.collaboration.calibration import Calibration
from distill.collaboration.judges import ShapesScore
from distill.collaboration.opening import open_pair
from distill.comparison.compare import calibration_key, kept_calibration
from distill.data import shapes
from distill.evaluation.evaluate import fid_of_shapes
from distill.evaluation.metrics import Alignment
from distill.files import Lock, read_json, save_json
from distill.identity import digest, named

FRESH, PROMISE = 3, 4  # seeds of the captions that are measured on, and of those the spent steps are counted on
BUDGETS = (5, 8, 10, 15)
WAYS = {"variances": (0.3, 0.5, 0.7), "shares": (0.3, 0.5, 0.7)}
METRICS = ("judge", "fid_shapes", "alignment")
SOLVER = "DPMSolverMultistepScheduler"  # the teacher's
NEVER, ALWAYS = -math.inf, math.inf


def main() -> None:
    """Measures every row that is not there yet and writes the summary."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--students", required=True, nargs="+", help="checkpoints or exported folders")
    parser.add_argument("--teacher", default="tiny-sd3")
    parser.add_argument("--student_steps", type=int, default=1, help=f"fewer than {min(BUDGETS) - 1}")
    parser.add_argument("--samples", type=int, default=1000, help="images of each way, budget and student")
    parser.add_argument("--held_out", type=int, default=10000, help="captions that set thresholds")
    parser.add_argument("--tried_on", type=int, default=300, help="of these, captions every way is tried on")
    parser.add_argument("--counted_on", type=int, default=10000, help="captions per student spent steps are counted on")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where rows and calibrations are kept")
    arguments = parser.parse_args()
    if arguments.student_steps >= min(BUDGETS) - 1:
        parser.error(f"a student of {arguments.student_steps} steps leaves a budget of {min(BUDGETS)} no choice")
    held_out = shapes.captions(CALIBRATION, range(arguments.held_out))
    pairs = [
        open_pair(student, arguments.teacher, "small-shapes", None, arguments.student_steps, solver=SOLVER)
        for student in arguments.students
    ]
    file = arguments.runs / f"collaboration_tiny-{key(pairs, held_out, arguments)}.json"
    with Lock(file.with_suffix(".lock"), wait=True):
        for pair in pairs:
            pair.calibration = kept_calibration(pair, held_out, arguments.runs, batch_size=64)
        rows: dict[str, Any] = read_json(file) if file.is_file() else {}
        for index, pair in enumerate(pairs):
            counted = f"counted_seed_{index}"
            if counted not in rows:
                rows[counted] = scores(pair, index, arguments.counted_on)
                save_json(rows, file)
            for name, how in settings(pairs[0], held_out[: arguments.tried_on], rows, file).items():
                row = f"{name}_seed_{index}"
                if row not in rows:
                    rows[row] = measured(pair, how, index, arguments.samples)
                    save_json(rows, file)
                    print(row, rows[row], flush=True)
    calibrations = [pair.calibration for pair in pairs]
    values = {
        "students": arguments.students,
        "student_steps": arguments.student_steps,
        "teacher": arguments.teacher,
        "samples": arguments.samples,
        "calibrated_on": arguments.held_out,
        "counted_on": arguments.counted_on,
        "ways": {name: row for name, row in rows.items() if name.startswith("way_")},
        "rows": {name: row for name, row in rows.items() if "_seed_" in name and not name.startswith("counted_")},
        "summary": summary(rows, calibrations),
    }
    results.save("collaboration_tiny", values, list(range(len(pairs))))
    plot(values["summary"])


def key(pairs: list[Any], held_out: list[str], arguments: argparse.Namespace) -> str:
    """What tells these rows from those of other students, of another teacher, or of other settings."""
    weights = named([arguments.teacher, "small_judge", "shapes_judge"])
    how = [arguments.teacher, SOLVER, WAYS, BUDGETS, FRESH, PROMISE]
    sizes = [arguments.samples, arguments.tried_on, arguments.counted_on]
    return digest([[calibration_key(pair, held_out) for pair in pairs], weights, how, sizes])


def settings(pair: Any, prompts: list[str], rows: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """How the pipeline is called for every line and budget, each way found on held-out captions with the first student.

    `share` is that of the images which the teacher improves; 0 and 1 ask no judge. `alone` is the teacher without any
    student.
    """
    steps = pair.calibration.steps
    calls: dict[str, dict[str, Any]] = {"student": {"share": 0.0, "mode": "regenerate", "teacher_steps": 1}}
    for budget in BUDGETS:
        for mode in ("refine", "regenerate"):
            name = f"way_{mode}_{budget}"
            if name not in rows:
                found = search(pair, prompts, budget, [mode], batch_size=64, **WAYS).choice
                rows[name] = {key: value for key, value in found.items() if key != "tried"}
                save_json(rows, file)
                print(name, rows[name], flush=True)
            calls[f"{mode}_{budget}"] = {
                key: rows[name][key] for key in ("mode", "teacher_steps", "variance", "share") if key in rows[name]
            }
        name = f"way_all_{budget}"
        if name not in rows:
            tried = []
            for variance in WAYS["variances"]:
                call = {"mode": "refine", "teacher_steps": budget - steps, "variance": variance}
                answer = seeded(pair, prompts, 0, threshold=ALWAYS, batch_size=64, **call)
                tried.append(call | {"value": float(pair.judge(prompts, answer.images).mean())})
            rows[name] = max(tried, key=lambda call: call["value"])
            save_json(rows, file)
        refined = {key: rows[name][key] for key in ("mode", "teacher_steps", "variance")}
        calls[f"refine_all_{budget}"] = {**refined, "share": 1.0}
        calls[f"teacher_{budget}"] = {"mode": "regenerate", "teacher_steps": budget, "share": 1.0, "alone": True}
    return calls


def threshold(calibration: Calibration, share: float) -> float:
    """Below which a student's image is improved, so that `share` of them are."""
    ends = {0.0: NEVER, 1.0: ALWAYS}
    return ends[share] if share in ends else calibration.threshold(share)


def scores(pair: Any, index: int, count: int) -> list[float]:
    """The judge's of a student's images of captions and noise that set no threshold; each student has its own."""
    prompts = shapes.captions(PROMISE, range(index * count, (index + 1) * count))
    how = {"threshold": NEVER, "mode": "regenerate", "teacher_steps": 1}
    return seeded(pair, prompts, 10**8 * (1 + index), batch_size=64, **how).scores


def measured(pair: Any, how: dict[str, Any], index: int, samples: int) -> dict[str, float]:
    """The metrics of captions and noise that set no threshold; each student has its own."""
    prompts = shapes.captions(FRESH, range(index * samples, (index + 1) * samples))
    call = {name: how[name] for name in ("mode", "teacher_steps", "variance") if name in how}
    limit = threshold(pair.calibration, how["share"])
    answer = seeded(pair, prompts, 10**6 * (1 + index), threshold=limit, batch_size=64, **call)
    alignment = Alignment()
    alignment.update(answer.images, prompts)
    spent = mean(answer.steps) - (pair.calibration.steps if how.get("alone") else 0)
    return {
        "judge": round(float(ShapesScore("shapes")(prompts, answer.images).mean()), 5),
        "fid_shapes": round(fid_of_shapes(answer.images), 3),
        "alignment": round(float(alignment.compute()), 5),
        "steps": round(spent, 4),
    }


def summary(rows: dict[str, Any], calibrations: list[Calibration]) -> dict[str, Any]:
    """Means over students with the half-width of their 95 % intervals.

    Of each budget besides: what it promised, with the 95 % interval of what one calibration of so many captions spends
    in the long run; and what was spent on the many captions that only students paint.
    """
    students = range(len(calibrations))
    names = dict.fromkeys(row.rsplit("_seed_", 1)[0] for row in rows if "_seed_" in row)
    answer: dict[str, Any] = {}
    for name in names:
        if name == "counted":
            continue
        found = [rows[f"{name}_seed_{index}"] for index in students]
        answer[name] = {metric: interval([row[metric] for row in found]) for metric in (*METRICS, "steps")}
        if (way := rows.get(f"way_{name}")) and "share" in way:
            low, high = calibrations[0].interval(way["share"], way["teacher_steps"])
            answer[name]["promised_steps"] = [way["budget"], round(low, 3), round(high, 3)]
            spent = [counted(rows[f"counted_seed_{index}"], calibrations[index], way) for index in students]
            answer[name]["counted_steps"] = interval(spent)
    return answer


def counted(scores: list[float], calibration: Calibration, way: dict[str, Any]) -> float:
    """Average steps that a way spends on images of these scores."""
    limit = threshold(calibration, way["share"])
    return calibration.steps + way["teacher_steps"] * mean(score < limit for score in scores)


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean and half-width of its 95 % interval (Student's t)."""
    count = len(values)
    half = float(student_t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count) if count > 1 else None
    return {"mean": round(mean(values), 5), "half_width": None if half is None else round(half, 5)}


def plot(found: dict[str, Any]) -> None:
    """Each metric against average steps, a line per way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 3), METRICS, strict=True):
        for line in ("refine", "regenerate", "refine_all", "teacher"):
            points = [found[f"{line}_{budget}"] for budget in BUDGETS if f"{line}_{budget}" in found]
            x = [point["steps"]["mean"] for point in points]
            y = [point[metric]["mean"] for point in points]
            error = [point[metric]["half_width"] or 0 for point in points]
            axis.errorbar(x, y, yerr=error, marker="o", capsize=3, label=line.replace("_", " "))
        student = found["student"]
        axis.plot([student["steps"]["mean"]], [student[metric]["mean"]], "k*", label="student")
        axis.set_xlabel("average steps")
        axis.set_title(metric)
    axis.legend()
    figure.savefig(results.ROOT / "docs" / "images" / "collaboration.png", dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
