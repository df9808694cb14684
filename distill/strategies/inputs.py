"""What the student is asked: at which noise levels, and from which data."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Batch
from distill.diffusion.levels import Discrete, Levels
from distill.diffusion.process import Process
from distill.errors import ConfigError


class Inputs:
    """Makes the student's question of a batch."""

    def __call__(self, batch: Batch, process: Process, step: int) -> tuple[Tensor, Tensor]:
        """`(x_t [B, C, H, W], t [B])`."""
        raise NotImplementedError

    few_levels: list[
        float
    ] = []  # the levels a few-step student is trained at, most noise first; none for other networks

    def visited(self, steps: int) -> list[float]:
        """The levels a student trained with these inputs is sampled at in `steps` steps.

        Raises:
            ConfigError: a number of steps it was not trained for.
        """
        if not self.few_levels:
            raise ConfigError(
                "a network that is trained at all levels is no few-step student; set samples.every=0, or give "
                "model.inputs.levels a few, such as {class_path: Discrete, init_args: {values: [1.0, 0.75, 0.5, 0.25]}}"
            )
        most = len(self.few_levels)
        if not 1 <= steps <= most:
            counts = f"in 1 to {most} steps, as many as it has levels" if most > 1 else "in 1 step, at its one level"
            raise ConfigError(f"this student samples {counts}; not in {steps}")
        return Discrete(self.few_levels).visited(steps)

    def counts(self, wished: tuple[int, ...]) -> tuple[int, ...]:
        """Those numbers of steps among `wished` that this student has levels for; all for a network without few levels,
        which is then refused by `visited`.
        """
        return tuple(n for n in wished if n <= len(self.few_levels)) or wished


class NoisedData(Inputs):
    """The batch's latents under noise.

    Args:
        levels: where the student is trained; a few discrete ones for a few-step student.
        warmup: other levels for the first steps (LADD, section 5: only .5 and .25 at first).
        warmup_steps: how many.
        pure_noise: whether a few-step student is asked at t = 1 what it will be asked when it samples, the noise alone.
            A schedule that does not end at zero SNR, such as Stable Diffusion's, mixes a trace of the data into it
            (arXiv 2305.08891), and a student that reads its picture's brightness there has nothing to read later. ADD
            (section 3) enforces zero SNR to this end.

    Raises:
        ConfigError: a few levels without that of noise alone, or a warm-up without levels or steps, or at levels that
            are none of a few.
    """

    def __init__(self, levels: Levels, warmup: Levels | None = None, warmup_steps: int = 0, pure_noise: bool = True):
        self.levels, self.warmup, self.warmup_steps, self.pure_noise = levels, warmup, warmup_steps, pure_noise
        self.few_levels = list(levels.values)
        if (warmup is None) == (warmup_steps > 0) or warmup_steps < 0:
            raise ConfigError(
                f"a warm-up is levels and a number of steps; got model.inputs.warmup={warmup and type(warmup).__name__}"
                f" and model.inputs.warmup_steps={warmup_steps}; give both or neither"
            )
        if warmup is not None and self.few_levels and not set(self.few_levels).issuperset(warmup.values or [-1.0]):
            raise ConfigError(
                f"the levels of model.inputs.warmup are to be among model.inputs.levels, {self.few_levels}; got "
                f"{warmup.values or type(warmup).__name__}"
            )
        if self.few_levels and self.few_levels[0] < 1:
            raise ConfigError(
                f"a few-step student begins with noise alone, so the first of its levels is 1; got {self.few_levels}"
            )

    def __call__(self, batch: Batch, process: Process, step: int) -> tuple[Tensor, Tensor]:
        levels = self.warmup if self.warmup is not None and step < self.warmup_steps else self.levels
        t = levels.draw(batch.draws, "inputs/t")
        noise = batch.draws.like("inputs/noise", batch.x0)
        x_t = process.add_noise(batch.x0, t, noise)
        alone = (t >= 1) & (self.pure_noise and bool(self.few_levels))
        return torch.where(alone[:, None, None, None], noise, x_t), t


class PairedNoise(Inputs):
    """The noise each latent of an ODE pair came from, at the last level: a one-step student (Diffusion2GAN,
    section 3.1).

    Raises:
        ConfigError: data that are no pairs.
    """

    few_levels = [1.0]

    def __call__(self, batch: Batch, process: Process, step: int) -> tuple[Tensor, Tensor]:
        if batch.noise is None:
            raise ConfigError("PairedNoise asks the student what the teacher was asked; it needs data: PairsData")
        return batch.noise.float(), torch.ones(len(batch.noise), device=batch.noise.device)
