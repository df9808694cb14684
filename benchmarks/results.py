"""How a benchmark's numbers are kept: with the command, the machine, the date and the seeds they came from."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from distill.files import save_json
from distill.provenance import stamped

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def save(name: str, values: dict[str, Any], seeds: list[int]) -> Path:
    """Writes `benchmarks/results/NAME.json` and returns its path.

    Args:
        name: of the benchmark.
        values: what was measured.
        seeds: of every run behind `values`.
    """
    path = FOLDER / f"{name}.json"
    save_json(stamped(values, seeds, command()), path)
    return path


def command() -> str:
    """This process's command line, as it is typed in the root of the repository."""
    script = Path(sys.argv[0]).resolve()
    typed = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", typed, *sys.argv[1:]])
