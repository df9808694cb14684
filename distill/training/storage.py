"""Checkpoints as files that are whole at any moment."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from distill.files import aside, remove


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one before and then renames it, so that a run that is killed, or a disk that is
    full, leaves one of both.

    Lightning writes to the system's temporary folder first and copies from there where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # a store that has no renaming, and no halves
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = unfinished(path)
        remove(part)  # what a run that was killed left
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            remove(part)
            raise
        if path.is_dir():  # a sharded one
            path.rename(aside(part))
        part.replace(path)
        with suppress(OSError):  # some network file systems do not remove what is being read
            remove(aside(part))


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written that will be at `path`."""
    return path.with_name(f".{path.name}.part")
