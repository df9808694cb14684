"""Where a measured number comes from: the command, the machine, the date and the seeds."""

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

LIBRARIES = ("torch", "lightning", "diffusers")


def stamped(values: Any, seeds: list[int], command: str) -> dict[str, Any]:
    """`values` with where they come from, as every file in `benchmarks/results` has them.

    Args:
        values: what was measured.
        seeds: of every run behind them.
        command: that made them, as it is typed.
    """
    return {"command": command, "machine": machine(), "date": today(), "seeds": seeds, "values": values}


def typed_command() -> str:
    """The command line of this process, as it is typed."""
    return shlex.join(["distill", *sys.argv[1:]])


def today() -> str:
    """The date, as 2026-01-31."""
    return datetime.date.today().isoformat()


def machine() -> dict[str, Any]:
    """The processor, the accelerator if there is one, and the versions that matter."""
    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # without bfloat16 `fit` computes in float32
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Of the libraries whose change may change a number or a picture."""
    return {name: version(name) for name in LIBRARIES}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
