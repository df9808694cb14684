"""Adaptive collaboration against the teacher, refining everything and the student alone, at equal average steps
(arXiv 2312.10835, Fig. 10).

The small judge decides; the other shapes judge, `fid_shapes` and alignment measure, on captions that set no threshold.
Keeps finished rows, and writes benchmarks/results/collaboration_tiny.json and docs/images/collaboration.png.
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
from distill.collaboration.calibrate import CALIBRATION, calibrate, search, seeded
from distill.collaboration.calibration import Calibration
from distill.collaboration.commands import open_pair
from distill.collaboration.judges import ShapesScore
from distill.data import shapes
from distill.evaluation.evaluate import fid_of_shapes
from distill.evaluation.metrics import Alignment
from distill.files import read_json, save_json

FRESH = 3  # seed of the captions that are measured on
BUDGETS = (5, 8, 10, 15)
WAYS = {"variances": (0.3, 0.5, 0.7), "shares": (0.3, 0.5, 0.7)}
METRICS = ("judge", "fid_shapes", "alignment")
NEVER, ALWAYS = -math.inf, math.inf


def main() -> None:
    """Measures every row that is not there yet and prints the summary."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", required=True, help="checkpoint or exported folder")
    parser.add_argument("--teacher", default="tiny-sd3")
    parser.add_argument("--student_steps", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise and of the captions")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--held_out", type=int, default=2000, help="captions that set thresholds")
    parser.add_argument("--tried_on", type=int, default=300, help="of these, captions every way is tried on")
    parser.add_argument("--rows", type=Path, default=Path("runs/collaboration_tiny.rows.json"))
    arguments = parser.parse_args()
    rows: dict[str, Any] = read_json(arguments.rows) if arguments.rows.is_file() else {}
    pair = open_pair(arguments.student, arguments.teacher, "small-shapes", None, arguments.student_steps,
                     solver="DPMSolverMultistepScheduler")  # fmt: skip
    held_out = shapes.captions(CALIBRATION, range(arguments.held_out))
    if "calibration" not in rows:
        rows["calibration"] = vars(calibrate(pair, held_out, batch_size=64))
        save_json(rows, arguments.rows)
    pair.calibration = Calibration(**rows["calibration"])
    for name, how in settings(pair, held_out[: arguments.tried_on], rows, arguments.rows).items():
        for seed in arguments.seeds:
            row = f"{name}_seed_{seed}"
            if row not in rows:
                rows[row] = measured(pair, how, seed, arguments.samples)
                save_json(rows, arguments.rows)
                print(row, rows[row], flush=True)
    values = {
        "student": f"{Path(arguments.student).parts[-3]} in {arguments.student_steps} step",
        "teacher": arguments.teacher,
        "samples": arguments.samples,
        "calibrated_on": arguments.held_out,
        "ways": {name: row for name, row in rows.items() if name.startswith("way_")},
        "rows": {name: row for name, row in rows.items() if "_seed_" in name},
        "summary": summary(rows, arguments.seeds, pair.calibration),
    }
    results.save("collaboration_tiny", values, arguments.seeds)
    plot(values["summary"])


def settings(pair: Any, prompts: list[str], rows: dict[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """How the pipeline is called for every line and budget, each way found on held-out captions."""
    steps = pair.calibration.steps
    calls: dict[str, dict[str, Any]] = {"student": {"threshold": NEVER, "mode": "regenerate", "teacher_steps": 1}}
    for budget in BUDGETS:
        for mode in ("refine", "regenerate"):
            name = f"way_{mode}_{budget}"
            if name not in rows:
                found = search(pair, prompts, budget, [mode], batch_size=64, **WAYS).choice
                rows[name] = {key: value for key, value in found.items() if key != "tried"}
                save_json(rows, file)
                print(name, rows[name], flush=True)
            way = rows[name]
            call = {key: way[key] for key in ("mode", "teacher_steps", "variance") if key in way}
            calls[f"{mode}_{budget}"] = {**call, "threshold": pair.calibration.threshold(way["share"])}
        name = f"way_all_{budget}"
        if name not in rows:
            tried = []
            for variance in WAYS["variances"]:
                call = {"mode": "refine", "teacher_steps": budget - steps, "variance": variance}
                answer = seeded(pair, prompts, 0, threshold=ALWAYS, batch_size=64, **call)
                tried.append(call | {"value": float(pair.judge(prompts, answer.images).mean())})
            rows[name] = max(tried, key=lambda call: call["value"])
            save_json(rows, file)
        calls[f"refine_all_{budget}"] = {
            key: rows[name][key] for key in ("mode", "teacher_steps", "variance")
        } | {"threshold": ALWAYS}  # fmt: skip
        calls[f"teacher_{budget}"] = {"mode": "regenerate", "teacher_steps": budget, "threshold": ALWAYS}
    return calls


def measured(pair: Any, how: dict[str, Any], seed: int, samples: int) -> dict[str, float]:
    """The metrics of fresh captions, which differ from seed to seed as the noise does."""
    prompts = shapes.captions(FRESH, range(seed * samples, (seed + 1) * samples))
    answer = seeded(pair, prompts, 10**6 * (1 + seed), batch_size=64, **how)
    alignment = Alignment()
    alignment.update(answer.images, prompts)
    spent = mean(answer.steps)
    if how["threshold"] == ALWAYS and how["mode"] == "regenerate":  # the teacher alone asks no student
        spent -= pair.calibration.steps
    return {
        "judge": round(float(ShapesScore("shapes")(prompts, answer.images).mean()), 5),
        "fid_shapes": round(fid_of_shapes(answer.images), 3),
        "alignment": round(float(alignment.compute()), 5),
        "steps": round(spent, 4),
    }


def summary(rows: dict[str, Any], seeds: list[int], calibration: Calibration) -> dict[str, Any]:
    """Means over seeds with the half-width of their 95 % intervals, and what each budget promised."""
    names = list(dict.fromkeys(row.rsplit("_seed_", 1)[0] for row in rows if "_seed_" in row))
    answer: dict[str, Any] = {}
    for name in names:
        found = [rows[f"{name}_seed_{seed}"] for seed in seeds]
        answer[name] = {metric: interval([row[metric] for row in found]) for metric in (*METRICS, "steps")}
        if (way := rows.get(f"way_{name}")) and "share" in way:
            low, high = calibration.interval(way["share"], way["teacher_steps"])
            answer[name]["promised_steps"] = [way["budget"], round(low, 3), round(high, 3)]
    return answer


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
