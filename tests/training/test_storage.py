"""A checkpoint is the old one or the new one, at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch

from distill.training.callbacks import Checkpoint
from distill.training.storage import WholeFiles, unfinished


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing goes by way of the system's temporary folder, which may be small, or another file system."""
    path = tmp_path / "run" / "last.ckpt"
    monkeypatch.setattr("tempfile.mkstemp", Mock(side_effect=AssertionError("a temporary file elsewhere")))
    WholeFiles().save_checkpoint({"step": torch.tensor(1)}, path)

    def half(value: dict, file: Any) -> None:
        file.write(b"half")
        assert [part.parent for part in path.parent.glob(".*")] == [path.parent]
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(torch, "save", half)
        WholeFiles().save_checkpoint({"step": torch.tensor(2)}, path)
    assert int(torch.load(path)["step"]) == 1
    assert list(path.parent.iterdir()) == [path], "nor does the half stay on a disk that is full"


def test_a_file_takes_the_place_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for folder in (path, unfinished(path)):
        folder.mkdir()
        (folder / "meta.pt").touch()
    WholeFiles().save_checkpoint({"step": torch.tensor(1)}, path)
    assert int(torch.load(path)["step"]) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_runs_write_so_unless_they_are_given_another_way(tmp_path: Path) -> None:
    class Other(WholeFiles):
        pass

    found = []
    for plugins in ([], [Other()]):
        trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[Checkpoint(str(tmp_path))], plugins=plugins)
        trainer.checkpoint_callback.setup(trainer, L.LightningModule(), "fit")  # type: ignore[union-attr]
        found.append(type(trainer.strategy.checkpoint_io))
    assert found == [WholeFiles, Other]
