"""Runs of the real recipes on small random pipelines: the same YAML, sizes shrunk from the command line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli import main

ROOT = Path(__file__).parents[1]


def fit_arguments(recipe: str, teacher: Path, latents: Path | None, folder: Path, **options: Any) -> list[str]:
    """`fit` with a small teacher, few samples and float32 on the CPU; `options` are dotted overrides, `.` as `__`."""
    shrunk = {
        "model__teacher": teacher,
        "model__teacher_dtype": "float32",
        "data__folder": latents,
        "data__batch_size": 16,
        "data__workers": 0,
        "trainer__accelerator": "cpu",
        "trainer__devices": 1,
        "trainer__strategy": "auto",
        "trainer__precision": "32-true",
        "trainer__max_steps": 2,
        "trainer__default_root_dir": folder,
        "trainer__logger": "CSVLogger",
        "trainer__logger__save_dir": folder,
        "trainer__log_every_n_steps": 1,
        "trainer__enable_progress_bar": False,
        "samples__every": 0,
    } | options
    pairs = [(f"--{name.replace('__', '.')}", str(value)) for name, value in shrunk.items() if value is not None]
    return ["fit", "--config", str(ROOT / "recipes" / recipe), *(part for pair in pairs for part in pair)]


def distill(arguments: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """`distill` as a user runs it, in a process of its own."""
    return subprocess.run(command(arguments), capture_output=True, text=True, timeout=300, env=environment(), **kwargs)


def mistake(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs a command that must end with exit code 2, and returns its one line of error."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill: error: ")]
    assert len(lines) == 1
    return lines[0]


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "distill", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def logged(folder: Path) -> dict[str, list[float]]:
    """What a run's CSVLogger wrote, by column; of a continued run only the continuation."""
    columns: dict[str, list[float]] = {}
    (file,) = folder.rglob("metrics.csv")
    for row in csv.DictReader(file.open()):
        for name, value in row.items():
            if value:
                columns.setdefault(name, []).append(float(value))
    return columns


def checkpoint(folder: Path) -> dict[str, Any]:
    """A run's last checkpoint, read as untrusted."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
