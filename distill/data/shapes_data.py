"""`ShapesData`: the drawn images of `shapes.py` as a Lightning data module."""

from __future__ import annotations

from typing import Any

import lightning as L
from torchdata.stateful_dataloader import StatefulDataLoader

from distill.data import shapes
from distill.data.loading import Compared, loader
from distill.errors import at_least_one, check_seeds

HELD_OUT = 1  # seed of the drawn images that no teacher and no student has seen
KEPT = 100_000  # how many of them are kept for measuring; training with the same seed begins after them


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


class ShapesData(Compared, L.LightningDataModule):
    """Images drawn as they are asked for; nothing is stored.

    Args:
        batch_size: samples of one batch over all processes.
        length: samples of one epoch.
        height, width: in pixels.
        seed: of the pictures and of their order.
        reference: other drawn images that `validate` and `test` compare with; 0 for none.
    """

    def __init__(
        self,
        batch_size: int = 128,
        length: int = 1_000_000,
        height: int = 32,
        width: int = 32,
        seed: int = 0,
        reference: int = 0,
    ):
        super().__init__()
        at_least_one(length=length, height=height, width=width)
        check_seeds(**{"data.seed": seed})
        self.batch_size, self.seed = batch_size, seed
        first = KEPT if seed == HELD_OUT else 0
        self.dataset = ShapesDataset(length, seed, height, width, first)
        self.reference = ShapesDataset(reference, HELD_OUT, height, width)

    @property
    def description(self) -> str:
        """What the data is, for a student's model card."""
        return f"drawn shapes, {self.dataset.height} x {self.dataset.width}"

    def train_dataloader(self) -> StatefulDataLoader:
        return loader(self.dataset, self.batch_size, self.seed, self.trainer)
