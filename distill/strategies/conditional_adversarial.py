"""The conditional diffusion GAN of Diffusion2GAN (Kang et al. 2024, https://arxiv.org/abs/2405.05967, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.adversarial.gan import (
    R1,
    ApproximateR1,
    ExactR1,
    GanLoss,
    Logistic,
    Logits,
    finite_difference_penalty,
    gradient_penalty,
    mean_logit,
    neighbours,
    per_sample,
    pick,
)
from distill.adversarial.unet import conditional_critic
from distill.backbones.base import Backbone
from distill.batch import Batch, Cond, Sample, no_autocast
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.base import Strategy, Weight

Triples = tuple[Tensor, Tensor, Cond]  # latents, the noises they came from, prompts


class ConditionalAdversarial(Strategy):
    """A critic of (latent, noise, prompt) that begins as the teacher and is trained whole.

    Real are the triples of the data, fake are the student's latents with the same noise and prompt. A share of the
    fakes is replaced by real latents whose latent, prompt or noise belongs to another triple (mix-and-match), so that
    the critic has to look at what belongs together. Losses are means over places, readouts and batch.

    Args:
        weight: of this term, published nowhere; `balanced` keeps its gradient at the sample as long as that of the
            terms with a number, `balance` times. The critic pulls a whole batch one way, the regression each sample its
            own, so equal lengths at the sample are no equal shares of the student's gradient.
        balance: see `weight`.
        loss: the game; logistic, non-saturating, if not given.
        r1: gradient penalty towards the real latents; none if not given, strength published nowhere. `ExactR1` needs a
            critic that is whole; `ApproximateR1` works on a sharded one too. The paper pays every 16 steps.
        r1_samples: how many samples of each process's share of the batch pay; one in the paper.
        noise: condition on the noise.
        multi_scale: feed and read every scale of the U-Net rather than read its end.
        pretrained: begin with the teacher's weights rather than random ones.
        mixed_latents, mixed_prompts, mixed_noises: shares of the fakes that are replaced each way; published nowhere.
        begins: the student's update from which it follows the critic; a critic that has learned nothing yet has a tiny
            gradient without a meaning, which `balanced` would make long.

    Raises:
        ConfigError: shares that are none.
    """

    def __init__(
        self,
        weight: Weight = "balanced",
        balance: float = 1.0,
        loss: GanLoss | None = None,
        r1: R1 | None = None,
        r1_samples: int = 1,
        noise: bool = True,
        multi_scale: bool = True,
        pretrained: bool = True,
        mixed_latents: float = 0.25,
        mixed_prompts: float = 0.25,
        mixed_noises: float = 0.25,
        begins: int = 0,
    ):
        super().__init__(weight, balance, begins)
        self.shares = (mixed_latents, mixed_prompts, mixed_noises)
        if min(self.shares) < 0 or sum(self.shares) >= 1:
            raise ConfigError(
                f"ConditionalAdversarial's mixed_latents, mixed_prompts and mixed_noises are shares of the fakes and "
                f"leave some to the student: each 0 or more, below 1 together; got {', '.join(map(str, self.shares))}"
            )
        if r1_samples < 1:
            raise ConfigError(f"ConditionalAdversarial's r1_samples must be 1 or more, got {r1_samples}")
        self.loss, self.r1, self.r1_samples = loss or Logistic(), r1, r1_samples
        self.noise, self.multi_scale, self.pretrained = noise, multi_scale, pretrained

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        denoiser = backbone.denoiser()
        if not self.pretrained:
            denoiser.forget(seed=0)
        self.critic = conditional_critic(denoiser, backbone.latent_shape()[0], self.noise, self.multi_scale)

    def check(self, batch_size: int) -> None:
        if batch_size < 2 and any(self.shares):
            raise ConfigError(
                "ConditionalAdversarial mixes triples and needs at least 2 samples per process, got 1; raise "
                "data.batch_size or set mixed_latents, mixed_prompts and mixed_noises to 0"
            )

    def check_sharded(self) -> None:
        if isinstance(self.r1, ExactR1):
            raise ConfigError(
                "ConditionalAdversarial with ExactR1 cannot train a sharded critic, whose double backward pass loses "
                "gradients; set r1 to ApproximateR1"
            )

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        logits = self._ask(sample.x0, self._noise_of(batch), batch.cond)
        return self.loss.student(logits) / len(logits)

    def critic_loss(self, sample: Sample, batch: Batch, step: int) -> dict[str, Tensor]:
        """Real triples, fakes, and what a finite difference needs, through the critic in one pass."""
        noise, size, some = self._noise_of(batch), len(batch.x0), slice(0, self.r1_samples)
        pays = self.r1 is not None and self.r1.due(step)
        triples = [(batch.x0, noise, batch.cond), self._mix(sample.x0.detach(), noise, batch)]
        if pays and isinstance(self.r1, ApproximateR1):
            nudged = batch.x0 + self.r1.sigma * batch.draws.like("conditional/nudge", batch.x0)
            triples.append((nudged[some], noise[some], {name: tensor[some] for name, tensor in batch.cond.items()}))
        logits = self._ask(*_joined(triples))
        real, fake = [head[:size] for head in logits], [head[size : 2 * size] for head in logits]
        terms = {"game": self.loss.critic(real, fake) / len(logits)}
        if pays:
            near = [head[2 * size :] for head in logits]
            terms["r1"] = self._penalty([head[some] for head in real], near, batch, noise)
        self.report = {"real": mean_logit(real), "fake": mean_logit(fake)}
        return terms

    def _mix(self, x: Tensor, noise: Tensor, batch: Batch) -> Triples:
        """The fakes: the student's triples, some replaced by real latents that do not belong to their prompt or noise.

        What does not belong is taken from the neighbour in the batch: any number of processes mixes alike, as long as
        the share of each is even.
        """
        edges = torch.tensor(self.shares, device=x.device).cumsum(0)
        kind = torch.bucketize(batch.draws.uniform("conditional/mix"), edges, right=True)  # 0, 1, 2; 3 is the student's
        other = neighbours(len(x), x.device)
        latents = pick(kind == 0, batch.x0[other], pick(kind < 3, batch.x0, x))
        cond = {name: pick(kind == 1, tensor[other], tensor) for name, tensor in batch.cond.items()}
        return latents, pick(kind == 2, noise[other], noise), cond

    def _penalty(self, real: Logits, near: Logits, batch: Batch, noise: Tensor) -> Tensor:
        """R1 of the first samples: from their logits and those of latents near by, or exactly, in a pass of its own."""
        r1, some = self.r1, slice(0, self.r1_samples)
        if isinstance(r1, ApproximateR1):
            penalty = finite_difference_penalty([per_sample(real)], [per_sample(near)])
        else:
            cond = {name: tensor[some] for name, tensor in batch.cond.items()}
            with self.critic.denoiser.twice_differentiable(), no_autocast(noise.device):  # type: ignore[union-attr,operator]
                x = batch.x0[some].detach().requires_grad_()
                penalty = gradient_penalty([per_sample(self._ask(x, noise[some], cond))], [x])
        return r1.weight * r1.every * penalty  # type: ignore[union-attr]

    def _ask(self, x: Tensor, noise: Tensor, cond: Cond) -> Logits:
        assert self.critic is not None
        return self.critic(x, noise, cond)

    def _noise_of(self, batch: Batch) -> Tensor:
        if batch.noise is None:
            raise ConfigError(
                "ConditionalAdversarial judges latents beside the noise they came from; it needs PairsData"
            )
        return batch.noise


def _joined(triples: list[Triples]) -> Triples:
    latents, noises, conds = zip(*triples, strict=True)
    return torch.cat(latents), torch.cat(noises), {n: torch.cat([cond[n] for cond in conds]) for n in conds[0]}
