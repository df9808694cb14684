"""How a benchmark's numbers are kept: with the command, the machine, the date and the seeds they came from."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.files import save_json

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "lightning", "diffusers")


def machine() -> dict[str, Any]:
    """The processor, the accelerator if there is one, and the versions that matter."""
    return {
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def save(name: str, values: dict[str, Any], seeds: list[int]) -> Path:
    """Writes `benchmarks/results/NAME.json` and returns its path.

    Args:
        name: of the benchmark.
        values: what was measured.
        seeds: of every run behind `values`.
    """
    path = FOLDER / f"{name}.json"
    result = {
        "command": command(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "seeds": seeds,
        "values": values,
    }
    save_json(result, path)
    return path


def command() -> str:
    """This process's command line, as it is typed in the root of the repository."""
    script = Path(sys.argv[0]).resolve()
    typed = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", typed, *sys.argv[1:]])


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
