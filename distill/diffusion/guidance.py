"""Classifier-free guidance of a frozen network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.batch import Batch, Cond


def guided(
    network: Callable[[Tensor, Tensor, Cond], Tensor], x_t: Tensor, t: Tensor, batch: Batch, guidance: float | Tensor
) -> Tensor:
    """What a denoiser answers under guidance, `[B, C, H, W]`: the answer for no prompt, and `guidance` times from there
    to the answer for the prompt. It acts alike on x0, noise and velocity: all are affine in one another.

    Args:
        network: a `Denoiser`, asked once, with a batch of 2B.
        x_t, t: `[B, C, H, W]` and `[B]`.
        batch: whose prompts.
        guidance: one number, or one per sample, `[B]`; the number 1 is none, and the network is asked with B.
    """
    if isinstance(guidance, int | float) and guidance == 1:
        return network(x_t, t, batch.cond)
    empty = batch.cond_of("")
    both = {name: torch.cat([empty[name], tensor]) for name, tensor in batch.cond.items()}
    nothing, asked = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    scale = guidance[:, None, None, None] if isinstance(guidance, Tensor) else guidance
    return nothing + scale * (asked - nothing)
