"""Score distillation from a frozen teacher (ADD, Sauer et al. 2023, https://arxiv.org/abs/2311.17042, Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.backbones.base import Backbone
from distill.batch import Batch, Cond, Sample
from distill.diffusion.guidance import guided
from distill.diffusion.levels import Levels, Uniform
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.base import Strategy, Weight

WEIGHTINGS = ("exponential", "sds", "nfsd")
SPACES = ("pixels", "latents")


class ScoreDistillation(Strategy):
    """Pulls the student's sample towards what the teacher makes of it once it is noised again.

    The distance is a mean over all values: a sum over the pixels of a picture would dwarf any adversarial term.

    Args:
        weight: lambda, 2.5 in the paper, or `balanced`.
        weighting: c(t). `exponential` is alpha_t; `sds` makes the gradient at the latents, where these are
            compared, that of score distillation sampling with w(t) = sigma_t^2 (appendix A, up to the mean); `nfsd` is
            `sds` with the target of noise-free score distillation (arXiv 2310.17590, Eq. 10), which asks the teacher
            three times.
        space: where the distance is measured, `pixels` (section 3.3: more stable gradients) or `latents`.
        levels: where the teacher is asked; uniform but for the ends, where a step is singular, if not given.
        teacher_steps: consecutive deterministic steps of the teacher, at evenly spaced levels (Table 1f).
        guidance: the teacher's classifier-free guidance; 1 is none. With `nfsd` it is the scale of the condition.
        negative: the prompt of `nfsd` that stands for bad pictures.
        balance: as in `Strategy`.

    Raises:
        ConfigError: an unknown weighting or space, `nfsd` without guidance or with more than one teacher step.
    """

    def __init__(
        self,
        weight: Weight = 2.5,
        weighting: str = "exponential",
        space: str = "pixels",
        levels: Levels | None = None,
        teacher_steps: int = 1,
        guidance: float = 1.0,
        negative: str = "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
        "low-resolution, gloomy",
        balance: float = 1.0,
    ):
        super().__init__(weight, balance)
        for name, value, known in (("weighting", weighting, WEIGHTINGS), ("space", space, SPACES)):
            if value not in known:
                raise ConfigError(f"ScoreDistillation's {name} '{value}' is unknown; choose one of {', '.join(known)}")
        if teacher_steps < 1:
            raise ConfigError(f"ScoreDistillation needs teacher_steps of 1 or more, got {teacher_steps}")
        if weighting == "nfsd" and (guidance <= 1 or teacher_steps > 1):
            raise ConfigError(
                f"ScoreDistillation with weighting=nfsd needs guidance above 1 (7.5 is usual) and teacher_steps=1; "
                f"got guidance={guidance}, teacher_steps={teacher_steps}"
            )
        self.weighting, self.space, self.levels = weighting, space, levels or Uniform(0.02, 0.98)
        self.teacher_steps, self.guidance, self.negative = teacher_steps, guidance, negative

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        self.teacher = teacher
        self.process = teacher.network.process

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        t = self.levels.draw(batch.draws, "score/t")
        with torch.no_grad():
            x_t = self.process.add_noise(sample.x0, t, batch.draws.like("score/noise", sample.x0))
            noise_free = self.weighting == "nfsd"
            target = self._noise_free(sample.x0, x_t, t, batch) if noise_free else self._walk(x_t, t, batch)
            weight = self._weight(t)
            target = batch.decode(target) if self.space == "pixels" else target  # type: ignore[misc]
        answer = sample.pixels if self.space == "pixels" else sample.x0
        return (weight * (answer.float() - target.float()).square().flatten(1).mean(1)).mean()

    def _weight(self, t: Tensor) -> Tensor:
        """c(t), `[B]`."""
        alpha, sigma = self.process.alpha_sigma(t)
        return alpha if self.weighting == "exponential" else alpha * sigma / 2  # alpha w / (2 sigma), w = sigma^2

    def _walk(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The teacher's clean latent after `teacher_steps` steps from `x_t`."""
        for left in range(self.teacher_steps, 1, -1):
            x0, lower = guided(self.teacher, x_t, t, batch, self.guidance), t * (left - 1) / left
            x_t, t = self.process.step(x0, x_t, t, lower), lower
        return guided(self.teacher, x_t, t, batch, self.guidance)

    def _noise_free(self, x0: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The clean latent that `x0` is pulled to by delta_D + s delta_C in place of the predicted noise's error."""
        noises = [
            self.process.to_noise(self._ask(x_t, t, cond), x_t, t)
            for cond in (batch.cond, batch.cond_of(""), batch.cond_of(self.negative))
        ]
        asked, nothing, bad = noises
        little = (t < 0.2)[:, None, None, None]  # the paper's 200 of 1000 steps
        domain = torch.where(little, nothing, nothing - bad)
        alpha, sigma = (value[:, None, None, None] for value in self.process.alpha_sigma(t))
        return x0 - sigma / alpha * (domain + self.guidance * (asked - nothing))

    def _ask(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.teacher(x_t, t, cond)
