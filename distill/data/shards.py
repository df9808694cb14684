"""Latents with captions on disk: Arrow files that are memory-mapped, and a manifest that says what they are."""

from __future__ import annotations

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


def write_shard(path: Path, latents: Tensor, prompts: list[str]) -> None:
    """Writes latents `[N, C, h, w]` (stored as float16) and N prompts as one Arrow file, whole or not at all."""
    from datasets import Array3D, Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"x0": Array3D(tuple(latents.shape[1:]), "float16"), "prompt": Value("string")})
    with written_whole(path) as part, ArrowWriter(path=str(part), features=features) as writer:
        writer.write_batch({"x0": latents.half().cpu().numpy(), "prompt": prompts})
        writer.finalize()


class LatentsDataset:
    """Memory-mapped latents with their captions.

    Args:
        folder: as a generator wrote it.
        drop_prompts: share of captions that are emptied, for training with guidance; which ones is fixed by the index.

    Raises:
        ConfigError: no such folder, one whose generation has not finished, or one with missing shards.
    """

    def __init__(self, folder: str | Path, drop_prompts: float = 0.0):
        from datasets import Dataset, concatenate_datasets

        manifest = self._manifest(folder)
        files = [Path(folder) / name for name in manifest["shards"]]
        missing = [file.name for file in files if not file.is_file()]
        if missing or not manifest["complete"]:
            what = f"lacks {', '.join(missing[:3])}" if missing else "is not finished"
            raise ConfigError(f"the folder of latents '{folder}' {what}; run the command that makes it again")
        rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
        self.rows = rows.with_format("torch", columns=["x0"], output_all_columns=True)
        generator = torch.Generator().manual_seed(17)
        self.dropped = torch.rand(len(rows), generator=generator) < drop_prompts

    @classmethod
    def read_settings(cls, folder: str | Path) -> dict[str, Any]:
        """What the latents in `folder` were made with and by."""
        return cls._manifest(folder)["settings"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """`{"x0": [B, C, h, w] float32 (stored as float16), "prompts": B captions}`."""
        rows = self.rows[indices]
        prompts = ["" if self.dropped[i] else prompt for i, prompt in zip(indices, rows["prompt"], strict=True)]
        return {"x0": rows["x0"], "prompts": prompts}

    @staticmethod
    def _manifest(folder: str | Path) -> dict[str, Any]:
        if not (Path(folder) / MANIFEST).is_file():
            raise ConfigError(f"there are no latents at '{folder}': it has no {MANIFEST}")
        return read_json(Path(folder) / MANIFEST)
