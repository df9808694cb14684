"""Runs of the real recipes on small random pipelines: the same YAML, sizes shrunk from the command line."""

from __future__ import annotations

import csv
import multiprocessing
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import distill as package
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
    """`distill` as a user runs it."""
    command = [sys.executable, "-m", "distill", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


class Forked:
    """`distill` in fresh processes, forked from one that only imported it: a start takes no seconds of imports.

    Several `ranks`, as many as the arguments' devices, find one another by the environment, as Lightning has it where
    something else has started them. The processes end with this one.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload([module.name for module in pkgutil.walk_packages(package.__path__, "distill.")])

    def __init__(self, arguments: list[str], ranks: int = 1) -> None:
        self.folder = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        places = [shared | {"LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
        self.processes = [
            self._context.Process(target=_run, args=(arguments, place, Path(self.folder.name, str(rank))), daemon=True)
            for rank, place in enumerate(places)
        ]
        for process in self.processes:
            process.start()

    @property
    def ended(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, seconds: float = 300) -> tuple[list[int | None], str]:
        """The exit code of each process, and what all wrote; a process that does not end is killed."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.kill()
        said = "".join(path.read_text() for path in sorted(Path(self.folder.name).iterdir()))
        return [process.exitcode for process in self.processes], said


def _run(arguments: list[str], variables: dict[str, str], output: Path) -> None:
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests run
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(arguments)


def forked(arguments: list[str], ranks: int = 1) -> str:
    """Runs `distill` in processes of its own, which must end well; returns what they said."""
    codes, said = Forked(arguments, ranks).wait()
    assert not any(codes), said[-2000:]
    return said


def mistake(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs a command that must end with exit code 2, and returns its one line of error."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill: error: ")]
    assert len(lines) == 1
    return lines[0]


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
