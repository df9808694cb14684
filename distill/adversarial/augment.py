"""Differentiable augmentation of pictures (arXiv 2006.10738), with StyleGAN-T's colour, translation and cutout."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from distill.batch import Draws

CHANGES = ("colour", "translation", "cutout")


def augment(pictures: Tensor, draws: Draws, purpose: str, changes: Collection[str] = CHANGES) -> Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1] with changed colours, moved, and with a square cut out; sample by sample.

    The same draws give every batch of pictures the same changes, so real and fake can be judged alike. Strengths are
    those of StyleGAN-T's code: brightness by up to 0.5, saturation by up to 2 times, contrast by 0.5 to 1.5 times,
    moves of up to an eighth of a side, a hole a fifth as wide as the picture.

    Args:
        changes: which of `CHANGES` are made.
    """
    brightness, saturation, contrast, move_y, move_x, hole_y, hole_x = draws.uniform(purpose, 7).unbind(1)
    if "colour" in changes:
        pictures = pictures + _column(brightness - 0.5)
        pictures = _spread(pictures, dim=(1,), factor=2 * saturation)
        pictures = _spread(pictures, dim=(1, 2, 3), factor=0.5 + contrast)
    if "translation" in changes:
        pictures = _move(pictures, move_y, move_x)
    return _cut(pictures, hole_y, hole_x) if "cutout" in changes else pictures


def random_crop(pictures: Tensor, size: int, draws: Draws, purpose: str, share: float = 0.5) -> Tensor:
    """For a `share` of the batches, one square of `size` out of pictures that are larger; the whole ones for the rest.

    One decision for the whole batch, as in StyleGAN-T's code, the same on every process.
    """
    height, width = pictures.shape[-2:]
    if min(height, width) <= size:
        return pictures
    decision, y, x = draws.common(purpose, 3).tolist()
    if decision >= share:
        return pictures
    top, left = int(y * (height - size + 1)), int(x * (width - size + 1))
    return pictures[..., top : top + size, left : left + size]


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _spread(pictures: Tensor, dim: tuple[int, ...], factor: Tensor) -> Tensor:
    middle = pictures.mean(dim, keepdim=True)
    return middle + (pictures - middle) * _column(factor)


def _move(pictures: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Moved by whole pixels; what comes in is 0."""
    height, width = pictures.shape[-2:]
    rows, columns = (_moved_indices(side, amount) for side, amount in ((height, y), (width, x)))
    outside = (rows < 0) | (rows >= height)
    beside = (columns < 0) | (columns >= width)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    sample = torch.arange(len(pictures), device=pictures.device)[:, None, None]
    moved = pictures.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved.masked_fill((outside[:, :, None] | beside[:, None, :])[:, None], 0.0)


def _moved_indices(side: int, amount: Tensor) -> Tensor:
    reach = int(side / 8 + 0.5)
    shift = (amount * (2 * reach + 1)).long() - reach
    return torch.arange(side, device=amount.device) + shift[:, None]


def _cut(pictures: Tensor, y: Tensor, x: Tensor) -> Tensor:
    height, width = pictures.shape[-2:]
    rows, columns = _hole(height, y), _hole(width, x)
    return pictures.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _hole(side: int, centre: Tensor) -> Tensor:
    """Which of `side` places lie in a hole of a fifth of them, its centre anywhere: `[B, side]`."""
    size = int(side * 0.2 + 0.5)
    first = (centre * (side + 1 - size % 2)).long() - size // 2
    places = torch.arange(side, device=centre.device)
    return (places >= first[:, None]) & (places < first[:, None] + size)
