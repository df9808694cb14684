"""Distances between latents that need no network."""

from __future__ import annotations

import math

from torch import Tensor

DISTANCES = ("mse", "pseudo_huber", "l1")


def latent_distance(kind: str, one: Tensor, other: Tensor) -> Tensor:
    """Of each pair of latents `[B, C, H, W]`: `[B]`.

    Args:
        kind: `mse` and `l1`, means over a latent's values; `pseudo_huber` of a whole latent, with c = 0.00054 sqrt(d)
            (arXiv 2310.14189, section 3.3).
        one, other: of the same shape.
    """
    difference = (one.float() - other.float()).flatten(1)
    if kind == "mse":
        return difference.square().mean(1)
    if kind == "l1":
        return difference.abs().mean(1)
    c = 0.00054 * math.sqrt(difference.shape[1])
    return (difference.square().sum(1) + c**2).sqrt() - c
