"""Writes docs/results.md from the files in benchmarks/results; nothing in it is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.files import read_json

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Every result there is, in its own section."""
    parts = ["# Results\n\nMade by `python benchmarks/tables.py` from the files in `benchmarks/results`.\n"]
    sections = {"ladd_tiny": students, "ladd_demo": students, "add_tiny": students, "step_time": step_time}
    for name, section in sections.items():
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        if file.is_file():
            parts.append(section(read_json(file)))
    (ROOT / "docs" / "results.md").write_text("\n".join(parts))


def students(result: dict[str, Any]) -> str:
    """The students of a recipe beside their teacher, 1, 2 and 4 steps, a row for each seed."""
    rows = result["values"]["rows"]
    lines = [
        f"## Recipe {result['values']['recipe']}, teacher {result['values']['teacher']}\n",
        origin(result),
        "| | fid_shapes | alignment | images |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['fid_shapes']:.1f} | {row['alignment']:.3f} | {row['samples']} |"
        for name, row in rows.items()
    ]
    lines += [
        "",
        "Over the seeds, mean (lowest to highest):\n",
        "| | fid / teacher at 50 steps | fid / teacher at 1 step | alignment lost, points |",
        "|---|---|---|---|",
    ]
    for name, values in result["values"]["summary"].items():
        if isinstance(values, dict):
            cells = [f"{v['mean']} ({v['min']} to {v['max']})" for v in values.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def step_time(result: dict[str, Any]) -> str:
    """Our training step over hand-written loops."""
    lines = ["## Time and memory of a LADD step\n", origin(result), "```json"]
    return "\n".join([*lines, json.dumps(result["values"], indent=1), "```"]) + "\n"


def origin(result: dict[str, Any]) -> str:
    """Where a result is from."""
    machine = result["machine"]
    what = ", ".join(str(machine[key]) for key in machine if key in {"gpu", "cpu", "cores", "torch"} and machine[key])
    return f"`{result['command']}`, {result['date']}, seeds {result['seeds']}; {what}.\n"


if __name__ == "__main__":
    main()
