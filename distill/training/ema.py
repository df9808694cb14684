"""The exponential moving average of the student: a second network of the same kind, so it samples, shards and saves as
the student does."""

from __future__ import annotations

import torch

from distill.diffusion.denoiser import Denoiser


@torch.no_grad()
def update_ema(average: Denoiser, student: Denoiser, decay: float) -> None:
    """`average = decay * average + (1 - decay) * student`, weight by weight; sharded ones too."""
    torch._foreach_lerp_(list(average.weights), list(student.weights), 1 - decay)


def ema_decay(decay: float, step: int) -> float:
    """`decay`, but less during the first steps, so that the average forgets where it began: min(decay, (1+n)/(10+n)).

    The ramp of TensorFlow's `ExponentialMovingAverage(num_updates)`; `step` counts the student updates so far.
    """
    return min(decay, (1 + step) / (10 + step))
