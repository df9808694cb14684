"""`ShapesData`: the drawn images of `shapes.py` as a Lightning data module."""

from __future__ import annotations

from typing import Any

import lightning as L
from torchdata.stateful_dataloader import StatefulDataLoader

from distill.data import shapes
from distill.data.loading import loader


class ShapesDataset:
    """Drawn images, their captions and what is in them.

    Args:
        length: number of samples.
        seed: of the pictures; another seed is another data set.
        height, width: in pixels.
        first: index of the first sample.
    """

    def __init__(self, length: int, seed: int = 0, height: int = 32, width: int = 32, first: int = 0):
        self.length, self.seed, self.height, self.width, self.first = length, seed, height, width, first

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """`{"pixels": [B, 3, H, W] in [-1, 1], "prompts": B captions, "attributes": [B, 9] int64}`."""
        where = [self.first + index for index in indices]
        scene = shapes.scenes(self.seed, where)
        return {
            "pixels": shapes.render(scene, self.height, self.width),
            "prompts": shapes.captions(self.seed, where, scene),
            "attributes": scene.attributes,
        }


class ShapesData(L.LightningDataModule):
    """Images drawn as they are asked for; nothing is stored.

    Args:
        batch_size: samples of one batch over all processes.
        length: samples of one epoch.
        height, width: in pixels.
        seed: of the pictures and of their order.
    """

    def __init__(
        self, batch_size: int = 128, length: int = 1_000_000, height: int = 32, width: int = 32, seed: int = 0
    ):
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        self.dataset = ShapesDataset(length, seed, height, width)

    def train_dataloader(self) -> StatefulDataLoader:
        return loader(self.dataset, self.batch_size, self.seed, self.trainer)
