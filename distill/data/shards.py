"""Latents with captions on disk: Arrow files that are memory-mapped, and a manifest that says what they are.

A row has a caption and named tensors: `x0` always; `noise` where the latent is a teacher's answer to it; the caption's
embeddings, `cond.text` and so on, where they were asked for.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.files import read_json, written_whole

MANIFEST = "manifest.json"


def shard_name(index: int) -> str:
    """File name of shard `index`."""
    return f"shard-{index:06d}.arrow"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a folder says of itself: `settings`, whether it is `complete`, and the checksums of its `shards`.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return read_json(Path(folder) / MANIFEST)
    except ValueError as error:
        raise ConfigError(
            f"'{Path(folder) / MANIFEST}' is damaged; remove it and make the folder again by the same command: "
            "the shards that are there are kept"
        ) from error


def write_shard(path: Path, tensors: dict[str, Tensor], prompts: list[str]) -> None:
    """Writes N rows as one Arrow file, whole or not at all.

    Args:
        path: of the file.
        tensors: by name, each `[N, ...]` of one to three more dimensions; stored as float16.
        prompts: N captions.

    Raises:
        ConfigError: the disk is full.
    """
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = {name: _feature(tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
    columns = {name: tensor.half().cpu().numpy() for name, tensor in tensors.items()}
    try:
        with written_whole(path) as part:
            with ArrowWriter(path=str(part), features=Features(features | {"prompt": Value("string")})) as writer:
                writer.write_batch({**columns, "prompt": prompts})
                writer.finalize()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"the disk is full at '{path.parent}': {path.name} was not written, what was finished before is kept; "
            "make room and run the same command again"
        ) from error


def _feature(shape: tuple[int, ...]) -> Any:
    from datasets import Array2D, Array3D, Sequence, Value

    if len(shape) == 1:
        return Sequence(Value("float16"), length=shape[0])
    return {2: Array2D, 3: Array3D}[len(shape)](shape, "float16")


class LatentsDataset:
    """Memory-mapped latents with their captions.

    Args:
        folder: as a generator wrote it.
        drop_prompts: share of captions that are emptied, for training with guidance; which ones is fixed by the index.

    Raises:
        ConfigError: no such folder, one whose generation has not finished, or one with missing or damaged shards.
    """

    def __init__(self, folder: str | Path, drop_prompts: float = 0.0):
        from datasets import Dataset, concatenate_datasets

        manifest = self._manifest(folder)
        files = [Path(folder) / name for name in manifest["shards"]]
        missing = [file.name for file in files if not file.is_file()]
        if missing or not manifest["complete"]:
            what = f"lacks {', '.join(missing[:3])}" if missing else "is not finished"
            raise ConfigError(f"the folder of latents '{folder}' {what}; run the command that makes it again")
        try:
            rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
        except (OSError, ValueError) as error:  # what Arrow raises at a damaged file
            raise ConfigError(
                f"the folder of latents '{folder}' has a damaged shard; run the command that makes it again"
            ) from error
        self.names = [name for name in rows.column_names if name != "prompt"]
        self.rows = rows.with_format("torch", columns=self.names, output_all_columns=True)
        generator = torch.Generator().manual_seed(17)
        self.dropped = torch.rand(len(rows), generator=generator) < drop_prompts

    @classmethod
    def read_settings(cls, folder: str | Path) -> dict[str, Any]:
        """What the latents in `folder` were made with and by."""
        return cls._manifest(folder)["settings"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """`{"x0": [B, C, h, w], "prompts": B captions}` and what else is stored, all float32 (stored as float16)."""
        rows = self.rows[indices]
        prompts = ["" if self.dropped[i] else prompt for i, prompt in zip(indices, rows["prompt"], strict=True)]
        return {name: rows[name] for name in self.names} | {"prompts": prompts}

    @staticmethod
    def _manifest(folder: str | Path) -> dict[str, Any]:
        if not (Path(folder) / MANIFEST).is_file():
            raise ConfigError(f"there are no latents at '{folder}': it has no {MANIFEST}")
        return read_manifest(folder)
