"""Writes docs/results.md from the files in benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.comparison import claims, report
from distill.files import read_json

ROOT = Path(__file__).parents[1]
Section = Callable[[dict[str, Any]], str]


def main() -> None:
    """Every result there is, in its own section."""
    parts = [
        "# Results\n\nMade by `python benchmarks/tables.py` from the files in `benchmarks/results`. What the columns "
        "are: [what is measured](comparing.md#what-is-measured).\n"
    ]
    sections = {
        "ladd_tiny": comparison("LADD's long recipe, `benchmarks/ladd_tiny.yaml`"),
        "add_tiny": comparison("ADD, `benchmarks/add_tiny.yaml`"),
        "diffusion2gan_tiny": comparison("Diffusion2GAN, `benchmarks/diffusion2gan_tiny.yaml`"),
        "methods_tiny": comparison("All methods, `benchmarks/methods_tiny.yaml`"),
        "consistency_tiny": comparison("Consistency distillation beside LADD, `benchmarks/consistency_tiny.yaml`"),
        "adapters_tiny": comparison("LADD's demo with adapters, `benchmarks/adapters_tiny.yaml`"),
        "hybrids": comparison("Mixtures, `benchmarks/hybrids.yaml`"),
        "claims_add": comparison("Claims of ADD, `benchmarks/papers/add.yaml`"),
        "claims_ladd": comparison("Claims of LADD, `benchmarks/papers/ladd.yaml`"),
        "claims_diffusion2gan": comparison("Claims of Diffusion2GAN, `benchmarks/papers/diffusion2gan.yaml`"),
        "claims_adaptive": comparison("Claims of adaptive collaboration, `benchmarks/papers/adaptive.yaml`"),
        "collaboration_tiny": collaboration,
        "collaboration_cost": plain("What collaboration costs beside the teacher"),
        "reconstruction": reconstruction("One latent found again by each distance alone", "reconstruction"),
        "reconstruction_64": reconstruction("The same on latents of 64×64", "reconstruction_64"),
        "perceptual_cost": plain("What a perceptual term costs at Stable Diffusion 1.5's sizes"),
        "pairs": plain("Pair generation under fire"),
        "samplers": plain("A student under the samplers it could be exported with"),
        "add_step": plain("Time and memory of an ADD step beside a LADD step"),
        "add_step_sd15": plain("The same at Stable Diffusion 1.5's sizes, 512 pixels, random weights"),
        "add_step_sd15_cpu": plain("The same on a CPU, two pictures a step"),
        "add_step_sdxl_cpu": plain("The same at SDXL's sizes, one picture a step, the student as adapters"),
        "full_size": plain("Recipes at paper size, random weights"),
        "step_time": plain("Time and memory of a LADD step"),
    }
    for name, section in sections.items():
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        if file.is_file():
            parts.append(section(read_json(file)))
    (ROOT / "docs" / "results.md").write_text("\n".join(parts))


def comparison(title: str) -> Section:
    """What `distill compare` found, and what it says to the claims."""

    def section(result: dict[str, Any]) -> str:
        values = result["values"]
        lines = [f"## {title}\n", origin(result)]
        if values["rows"]:
            lines.append(
                f"{values['rows'][0]['samples']} images a row. A cell is the mean over seeds, with the lowest and the "
                "highest; of a single run with the interval of its images.\n"
            )
            columns = [name for name in values["table"][0] if name not in ("name", "steps", "seeds")]
            lines.append(report.markdown(values["table"], columns))
        if values["claims"]:
            lines += [claims.markdown(values["claims"])]
        return "\n".join(lines)

    return section


def collaboration(result: dict[str, Any]) -> str:
    """A row per way and budget, means over seeds with the half-width of their 95 % intervals."""
    values = result["values"]
    found = values["summary"]
    columns = ("judge", "fid_shapes", "alignment", "steps")
    lines = [
        f"## Adaptive collaboration: {values['student_steps']}-step students, teacher {values['teacher']}\n",
        origin(result),
        f"{len(values['students'])} students, {values['samples']} images of each in a row; ± is the 95 % interval of "
        f"their mean. The small judge's scores of {values['calibrated_on']} other draws of captions and noise set each "
        "budget's threshold; `judge` is the mean score of the other judge. `counted` are the average steps on "
        f"{values['counted_on']} more draws per student, which no teacher paints; `promised` is the budget, with the "
        "95 % interval of what one such calibration spends in the long run.\n",
        f"| | {' | '.join(columns)} | counted | promised |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for name, row in found.items():
        cells = [estimate(row[column]) for column in columns]
        promised = row.get("promised_steps")
        cells.append(estimate(row["counted_steps"]) if promised else "")
        cells.append(f"{promised[0]} ({promised[1]:.2f} to {promised[2]:.2f})" if promised else "")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += ["", "![quality against average steps](images/collaboration.png)"]
    return "\n".join(lines) + "\n"


def estimate(interval: dict[str, float | None]) -> str:
    """A mean with the half-width of its interval, where several numbers gave one."""
    half = f" ± {interval['half_width']:.2g}" if interval["half_width"] else ""
    return f"{interval['mean']:.4g}{half}"


def reconstruction(title: str, picture: str) -> Section:
    """What each distance alone leads back to."""

    def section(result: dict[str, Any]) -> str:
        rows = result["values"]["rows"]
        columns = list(next(iter(rows.values())))
        lines = [f"## {title}\n", origin(result)]
        lines += [
            f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |",
            "|---|" + "---|" * len(columns),
        ]
        lines += [
            f"| {name} | {' | '.join(f'{row[column]:.5f}' for column in columns)} |" for name, row in rows.items()
        ]
        lines += ["", f"Left the target, then in this order:\n\n![{', '.join(rows)}](images/{picture}.png)"]
        return "\n".join(lines) + "\n"

    return section


def plain(title: str) -> Section:
    """The values as they stand."""

    def section(result: dict[str, Any]) -> str:
        lines = [f"## {title}\n", origin(result), "```json"]
        shown = {name: value for name, value in result["values"].items() if name != "blocks"}  # each round's seconds
        return "\n".join([*lines, json.dumps(shown, indent=1), "```"]) + "\n"

    return section


def origin(result: dict[str, Any]) -> str:
    """Where a result is from; rows, which may be from other machines than the one that gathered them, say so."""
    machines = [row["machine"] for row in result["values"].get("rows", []) if "machine" in row]
    seeds = ", ".join(map(str, result["seeds"]))
    what = sorted({described(machine) for machine in machines or [result["machine"]]})
    return f"`{result['command']}`, {result['date']}, seeds {seeds}; {'; '.join(what)}.\n"


def described(machine: dict[str, Any]) -> str:
    """A machine in a few words."""
    return f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"


if __name__ == "__main__":
    main()
