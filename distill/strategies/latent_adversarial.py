"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, https://arxiv.org/abs/2403.12015, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from distill.adversarial.gan import (
    R1,
    ApproximateR1,
    GanLoss,
    Hinge,
    Logits,
    finite_difference_penalty,
    gradient_penalty,
    mean_logit,
    neighbours,
    per_sample,
    pick,
)
from distill.adversarial.heads import GridHead, HeadCondition, check_alone
from distill.adversarial.taps import Taps
from distill.backbones.base import Backbone
from distill.batch import Batch, Sample
from distill.diffusion.levels import Levels, LogitNormal
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.base import Strategy, Weight

JUDGED = 4  # levels at which a picture is scored


class LatentCritic(nn.Module):
    """An independent head per tapped block, all conditioned on noise level and pooled text.

    Args:
        widths: channels of each block's features.
        pooled: size of the pooled text embedding.
        hidden, norm: as in `GridHead`.
    """

    def __init__(self, widths: list[int], pooled: int, hidden: int | None, norm: str):
        super().__init__()
        self.condition = HeadCondition(pooled)
        self.heads = nn.ModuleList(GridHead(width, self.condition.size, hidden, norm) for width in widths)

    def forward(self, features: list[Tensor], t: Tensor, pooled: Tensor) -> Logits:
        """Features `[B, D, h, w]` of each block -> logits `[B, h, w]` of each head."""
        condition = self.condition(t, pooled)
        return [head(feature, condition) for head, feature in zip(self.heads, features, strict=True)]


class LatentAdversarial(Strategy):
    """The frozen teacher is the discriminator's feature network: it reads re-noised latents of student and data.

    Nothing is decoded. The level of the re-noising decides what is judged: much noise composition, little noise detail.

    Args:
        weight: of this term, or `balanced`.
        levels: distribution of the re-noising level; logit-normal m = 1, s = 1 if not given (section 4.1).
        loss: the game; hinge if not given.
        r1: gradient penalty on real data; none if not given. `ExactR1` acts at the heads' inputs, `ApproximateR1` at
            the clean latent, with the same level and noise in both branches.
        blocks: the teacher's blocks that are read; all if not given (section 3).
        hidden: channels inside the heads; the teacher's width if not given.
        norm: `local_batch` as in StyleGAN-T, or `group` for batches of one.
        mixed_latents: share of the critic's fakes that are its neighbour's real latents in the batch, so that it has to
            look at what belongs to a prompt; 0 in the paper. Diffusion2GAN's mix-and-match (arXiv 2405.05967, section
            3.3). It draws the student to what sets its prompt apart, as guidance does, the more the larger the share.
        balance, begins: as in `Strategy`.

    Raises:
        ConfigError: a share that is none.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        levels: Levels | None = None,
        loss: GanLoss | None = None,
        r1: R1 | None = None,
        blocks: list[int] | None = None,
        hidden: int | None = None,
        norm: str = "local_batch",
        mixed_latents: float = 0.0,
        balance: float = 1.0,
        begins: int = 0,
    ):
        super().__init__(weight, balance, begins)
        if not 0 <= mixed_latents < 1:
            raise ConfigError(
                f"LatentAdversarial's mixed_latents is a share of the fakes, from 0 to below 1; got {mixed_latents}"
            )
        self.mixed_latents = mixed_latents
        self.levels, self.loss, self.r1 = levels or LogitNormal(1.0, 1.0), loss or Hinge(), r1
        self.blocks, self.hidden, self.norm = blocks, hidden, norm

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        self.process = teacher.network.process
        self.taps = Taps(teacher.network, self.blocks)
        self.critic = LatentCritic(self.taps.widths, backbone.pooled, self.hidden, self.norm)

    def check(self, batch_size: int) -> None:
        if batch_size < 2 and self.norm == "local_batch":
            raise ConfigError(
                "LatentAdversarial with norm=local_batch needs at least 2 samples per process, got 1; "
                "raise data.batch_size or set norm=group"
            )
        if batch_size < 2 and self.mixed_latents:
            raise ConfigError(
                "LatentAdversarial with mixed_latents needs at least 2 samples per process, got 1; raise "
                "data.batch_size or set mixed_latents to 0"
            )

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        t = self.levels.draw(batch.draws, "ladd/student/t")
        noise = batch.draws.like("ladd/student/noise", sample.x0)
        x_t = self.process.add_noise(sample.x0, t, noise)
        fake = self._heads(self.taps(x_t, t, batch.cond), t, batch, fixed=True)
        return self.loss.student(fake)

    def critic_loss(self, sample: Sample, batch: Batch, step: int) -> dict[str, Tensor]:
        """Real and fake at the same level under independent noise, through the teacher in one pass."""
        t = self.levels.draw(batch.draws, "ladd/critic/t")
        real_noise = batch.draws.like("ladd/critic/real", batch.x0)
        fake_noise = batch.draws.like("ladd/critic/fake", batch.x0)
        with torch.no_grad():  # the teacher reads; only the heads learn
            own, fakes = self._mix(sample.x0.detach(), batch)
            both = torch.cat([batch.x0, fakes])
            twice = {name: torch.cat([tensor, tensor]) for name, tensor in batch.cond.items()}
            x_t = self.process.add_noise(both, t.repeat(2), torch.cat([real_noise, fake_noise]))
            features = [feature.chunk(2) for feature in self.taps(x_t, t.repeat(2), twice)]
        pays = self.r1 is not None and self.r1.due(step)
        real_features = [real.detach().requires_grad_(pays) for real, _ in features]
        with parametrize.cached():  # one set of spectrally normalised weights for all that is compared
            real = self._heads(real_features, t, batch)
            fake = self._heads([fake for _, fake in features], t, batch)
            terms = {"game": self.loss.critic(real, fake)}
            if pays:
                terms["r1"] = self._penalty(real, real_features, batch, t, real_noise)
        self.report = {"real": mean_logit(real), "fake": mean_logit(fake, own)}
        return terms

    def _mix(self, x0: Tensor, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Which fakes are the student's, a mask `[B]` or None for all, and the fakes: elsewhere a neighbour's real
        latents.
        """
        if not self.mixed_latents:
            return None, x0
        own = batch.draws.uniform("ladd/critic/mix") >= self.mixed_latents
        return own, pick(own, x0, batch.x0[neighbours(len(x0), x0.device)])

    def check_judging(self) -> None:
        check_alone(self.norm, type(self).__name__)

    def score(self, batch: Batch) -> Tensor:
        """The mean over `JUDGED` levels of the distribution it was trained at, under the same noise for each sample."""
        scores = []
        for look in range(JUDGED):
            t = self.levels.draw(batch.draws, f"ladd/score/{look}/t")
            x_t = self.process.add_noise(batch.x0, t, batch.draws.like(f"ladd/score/{look}/noise", batch.x0))
            scores.append(per_sample(self._heads(self.taps(x_t, t, batch.cond), t, batch, fixed=True)))
        return torch.stack(scores).mean(0)

    def _penalty(self, real: Logits, features: list[Tensor], batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        r1 = self.r1
        if isinstance(r1, ApproximateR1):
            nudge = r1.sigma * batch.draws.like("ladd/critic/nudge", batch.x0)
            with torch.no_grad():
                nudged = self.taps(self.process.add_noise(batch.x0 + nudge, t, noise), t, batch.cond)
            penalty = finite_difference_penalty(real, self._heads(nudged, t, batch))
        else:
            penalty = gradient_penalty(real, features)
        return r1.weight * r1.every * penalty  # type: ignore[union-attr]

    def _heads(self, features: list[Tensor], t: Tensor, batch: Batch, fixed: bool = False) -> Logits:
        """The logits; `fixed` heads keep nothing for gradients of their own."""
        assert self.critic is not None
        inputs = features, t, batch.cond["pooled"]
        if not fixed:
            return self.critic(*inputs)
        return functional_call(self.critic, {name: p.detach() for name, p in self.critic.named_parameters()}, inputs)
