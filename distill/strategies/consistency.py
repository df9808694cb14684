"""Consistency distillation (Song et al. 2023, https://arxiv.org/abs/2303.01469); in latents, with guidance: LCM (Luo et
al. 2023, https://arxiv.org/abs/2310.04378).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.backbones.base import Backbone
from distill.batch import Batch, Sample
from distill.diffusion.distances import DISTANCES, latent_distance
from distill.diffusion.guidance import guided
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.base import Strategy, Weight

SOME = torch.linspace(0.1, 1.0, 10)  # levels at which two noise schedules are compared


class ConsistencyDistillation(Strategy):
    """Asks the student to answer alike at two levels of one path of the guided teacher.

    The teacher goes one deterministic step from the student's level to a lower one; what the target network answers
    there, in x0, is what the student is to answer. At level 0 that is the teacher's latent itself: an answer in x0 from
    predicted noise, velocity or flow meets the boundary condition f(x, 0) = x by itself. The target network is the
    module's `target_ema`, or without one the student itself, without gradient.

    Args:
        weight: of this term, or `balanced`.
        levels: how many evenly spaced levels the teacher's path has, between 0 and 1.
        skip: how many of them the teacher's step goes down (LCM, section 4.3). LCM's k counts the 1000 steps of the
            schedule: its k = 20 is 50 levels and a skip of 1.
        shift: of the levels, as in `Shifted`; 3 for SD3.
        guidance: of the teacher: one number, or the bounds of a range it is drawn from for each sample (LCM, section
            4.2). The student is not told which, as in LCM-LoRA, and needs no guidance when it is sampled.
        distance: `mse`, `pseudo_huber` or `l1`, in x0.
        balance: as in `Strategy`.

    Raises:
        ConfigError: levels, skip, range or distance that are none.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        levels: int = 50,
        skip: int = 1,
        shift: float = 1.0,
        guidance: float | list[float] = 8.0,
        distance: str = "pseudo_huber",
        balance: float = 1.0,
    ):
        super().__init__(weight, balance)
        if distance not in DISTANCES:
            raise ConfigError(
                f"ConsistencyDistillation's distance '{distance}' is unknown; choose one of {', '.join(DISTANCES)}"
            )
        if not 1 <= skip <= levels:
            raise ConfigError(
                f"ConsistencyDistillation steps down skip of its levels, 1 to {levels}; got skip={skip}, "
                f"levels={levels}"
            )
        if isinstance(guidance, list) and (len(guidance) != 2 or not guidance[0] <= guidance[1]):
            raise ConfigError(f"ConsistencyDistillation's guidance is a number or [lowest, highest]; got {guidance}")
        if shift <= 0:
            raise ConfigError(f"ConsistencyDistillation's shift must be positive, got {shift}")
        self.stride, self.shift, self.guidance, self.distance = skip / levels, shift, guidance, distance

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        self.teacher = teacher
        if backbone.process().prediction == "sample":
            raise ConfigError(
                "ConsistencyDistillation needs a network that says x itself at level 0, which one of "
                "prediction_type=sample does not; set model.schedule.prediction_type to v_prediction"
            )
        here, there = backbone.process().alpha_sigma(SOME), teacher.network.process.alpha_sigma(SOME)
        if not torch.allclose(here[0], there[0]):
            raise ConfigError(
                "ConsistencyDistillation compares two points of the teacher's own path; a student with another noise "
                "schedule leaves it: remove rescale_betas_zero_snr from model.schedule"
            )

    def check_levels(self, levels: list[float]) -> None:
        lower = self.lower(torch.tensor(levels)).tolist()
        if levels and (lost := [low for low in lower if low and min(abs(low - level) for level in levels) > 1e-3]):
            raise ConfigError(
                "ConsistencyDistillation leads from each level the student is asked at to another one or to 0; its "
                f"steps of {self.stride:.3g} lead from {', '.join(f'{level:.3g}' for level in levels)} to "
                f"{', '.join(f'{low:.3g}' for low in lost)}, where it is never asked: give model.inputs.levels the "
                "levels of the strategy, such as Evenly, or the strategy as many levels as there are"
            )

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        with torch.no_grad():
            lower = self.lower(sample.t)
            x0 = guided(self.teacher, sample.x_t, sample.t, batch, self._guidance(batch))
            x_lower = self.teacher.network.process.step(x0, sample.x_t, sample.t, lower)
            target = sample.target(x_lower, lower, batch.cond)
        return latent_distance(self.distance, sample.x0, target).mean()

    def lower(self, t: Tensor) -> Tensor:
        """The level the teacher steps down to from each of `t`, `[B]`; 0 where there is none below."""
        even = t / (self.shift - (self.shift - 1) * t)  # where t would be without the shift
        even = (even - self.stride).clamp(min=0)
        even = torch.where(even < 1e-4, 0.0, even)  # of the differences of evenly spaced levels only rounding is left
        return self.shift * even / (1 + (self.shift - 1) * even)

    def _guidance(self, batch: Batch) -> float | Tensor:
        if isinstance(self.guidance, list):
            low, high = self.guidance
            return low + (high - low) * batch.draws.uniform("consistency/guidance")
        return self.guidance
