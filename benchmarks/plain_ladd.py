"""LADD (https://arxiv.org/abs/2403.12015) as a plain PyTorch loop: what one would write by hand without this package.

Only the networks, their optimizers and the recipe's numbers come from the package; the mathematics is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils import parametrize
from torchdata.stateful_dataloader import StatefulDataLoader

from distill import backbones
from distill.batch import Cond
from distill.diffusion.denoiser import attention
from distill.strategies.latent_adversarial import LatentCritic
from distill.training.module import DistillModule


class Numbers(Protocol):
    """The random numbers of one batch."""

    def normal(self, purpose: str, *shape: int) -> Tensor: ...

    def uniform(self, purpose: str, *shape: int) -> Tensor: ...


class TorchNumbers:
    """Random numbers from torch's own generator, whatever they are for."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.device = size, device

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """`[B, *shape]`."""
        return torch.randn(self.size, *shape, device=self.device)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """`[B, *shape]`."""
        return torch.rand(self.size, *shape, device=self.device)


class PlainLoop:
    """One step of LADD after another.

    Args:
        recipe: a module whose settings are used; none of its networks are.
        batches: loader of `{"x0": [B, C, H, W], "prompts": list}`.
        twice: the usual form, which asks the student once without gradient for the critic's turn and once more for
            its own; otherwise both turns use one answer.
        freeze: spare the heads the student's turn, so that no gradient for them is computed and thrown away.
        device: where to compute.
        autocast: whether to compute in bfloat16 where that is safe.
        numbers: random numbers of the n-th batch; torch's own if not given.
    """

    def __init__(
        self,
        recipe: DistillModule,
        batches: StatefulDataLoader,
        twice: bool,
        freeze: bool,
        device: torch.device,
        autocast: bool,
        numbers: Callable[[int], Numbers] | None = None,
    ):
        self.twice, self.freeze, self.device, self.autocast = twice, freeze, device, autocast
        self.step_number = 0
        self.batches, size = _endless(batches), batches.batch_sampler.batch_size  # type: ignore[union-attr]
        self.numbers = numbers or (lambda number: TorchNumbers(size, device))
        self.clips, self.ema_target = recipe.clips, recipe.decays[0]
        self.input_levels, self.term = recipe.inputs.levels, recipe.strategies[0]  # type: ignore[attr-defined]
        self._read_networks(recipe)
        makers, players = recipe.optimizer_makers, (self.student, self.heads)
        self.optimizers = [make(player.parameters()) for make, player in zip(makers, players, strict=True)]
        self.logged: list[dict[str, float]] = []

    def _read_networks(self, recipe: DistillModule) -> None:
        backbone, frozen = recipe.backbone, backbones.load(recipe.teacher_name, recipe.teacher_dtype)
        self.student = backbone.denoiser().network.to(self.device).train()
        self.average = backbone.denoiser().network.to(self.device).eval().requires_grad_(False)
        self.teacher = frozen.denoiser().network.to(self.device).eval().requires_grad_(False)
        self.text_encoder = frozen.text_encoder().to(self.device).eval().requires_grad_(False)
        self.tokens: list[Tensor] = []  # image tokens after each block of the teacher's last pass
        for block in self.teacher.transformer_blocks:
            block.register_forward_hook(lambda module, inputs, output: self.tokens.append(output[1]))
        widths = [self.teacher.inner_dim] * len(self.teacher.transformer_blocks)
        torch.manual_seed(recipe.seed)  # the heads begin as the recipe's do
        self.heads = LatentCritic(widths, backbone.pooled, self.term.hidden, self.term.norm).to(self.device)

    def step(self) -> None:
        """The critic's turn, then the student's."""
        raw, draw = next(self.batches), self.numbers(self.step_number)
        x0 = raw["x0"].to(self.device).float()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            cond = self._encode(raw["prompts"])
            t = self._input_levels(draw)
            x_t = _noised(x0, t, draw.normal("inputs/noise", *x0.shape[1:]))
            with torch.set_grad_enabled(not self.twice):
                fake = self._answer(x_t, t, cond)
            critic_loss = self._critic_loss(x0, fake.detach(), cond, draw)
        critic_loss.backward()
        self._update(1, self.heads)
        self.heads.requires_grad_(not self.freeze)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            fake = self._answer(x_t, t, cond) if self.twice else fake
            student_loss = self._student_loss(fake, cond, draw)
        student_loss.backward()
        self.heads.requires_grad_(True)
        self.optimizers[1].zero_grad(set_to_none=True)
        self._update(0, self.student)
        self._update_average()
        self._log(critic=critic_loss, student=student_loss)
        self.step_number += 1

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Cond:
        return {name: tensor.float() for name, tensor in self.text_encoder(prompts).items()}

    def _input_levels(self, draw: Numbers) -> Tensor:
        values = torch.tensor(self.input_levels.values, device=self.device)
        edges = torch.tensor(self.input_levels.probabilities, device=self.device).cumsum(0)[:-1].contiguous()
        return values[torch.bucketize(draw.uniform("inputs/t"), edges, right=True)]

    def _answer(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The student's clean latent: its velocity is noise - x0, so x0 = x_t - t velocity."""
        return x_t - t[:, None, None, None] * _velocity(self.student, x_t, t, cond).float()

    def _critic_loss(self, x0: Tensor, fake: Tensor, cond: Cond, draw: Numbers) -> Tensor:
        t = self._teacher_levels(draw, "ladd/critic/t")
        noise = [draw.normal(f"ladd/critic/{which}", *x0.shape[1:]) for which in ("real", "fake")]
        with torch.no_grad():
            x_t = _noised(torch.cat([x0, fake]), t.repeat(2), torch.cat(noise))
            both = self._features(x_t, t.repeat(2), {name: torch.cat([c, c]) for name, c in cond.items()})
        with parametrize.cached():
            real = self.heads([features.chunk(2)[0] for features in both], t, cond["pooled"])
            fakes = self.heads([features.chunk(2)[1] for features in both], t, cond["pooled"])
        hinge = [relu(1 - logits.float()).mean() for logits in real] + [relu(1 + x.float()).mean() for x in fakes]
        return torch.stack(hinge).sum()

    def _student_loss(self, fake: Tensor, cond: Cond, draw: Numbers) -> Tensor:
        t = self._teacher_levels(draw, "ladd/student/t")
        x_t = _noised(fake, t, draw.normal("ladd/student/noise", *fake.shape[1:]))
        logits = self.heads(self._features(x_t, t, cond), t, cond["pooled"])
        return -self.term.weight * torch.stack([head.float().mean() for head in logits]).sum()

    def _teacher_levels(self, draw: Numbers, purpose: str) -> Tensor:
        return torch.sigmoid(self.term.levels.m + self.term.levels.s * draw.normal(purpose))

    def _features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        self.tokens.clear()
        _velocity(self.teacher, x_t, t, cond)
        patch = self.teacher.config.patch_size
        grid = (x_t.shape[-2] // patch, x_t.shape[-1] // patch)
        features = [tokens.transpose(1, 2).unflatten(2, grid) for tokens in self.tokens]
        self.tokens.clear()
        return features

    def _update(self, player: int, network: nn.Module) -> None:
        limit = self.clips[player]
        if limit is not None:
            nn.utils.clip_grad_norm_(network.parameters(), limit)
        self.optimizers[player].step()
        self.optimizers[player].zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.ema_target is None:
            return
        decay = min(self.ema_target, (1 + self.step_number) / (10 + self.step_number))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - decay)

    def _log(self, every: int = 10, **losses: Tensor) -> None:
        if (self.step_number + 1) % every == 0:
            self.logged.append({name: loss.item() for name, loss in losses.items()})


def _noised(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Rectified flow: x_t = (1 - t) x0 + t noise."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * noise


def _velocity(network: Any, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    with attention(x_t.device):
        return network(
            hidden_states=x_t.to(network.dtype),
            timestep=1000 * t,
            encoder_hidden_states=cond["text"].to(network.dtype),
            pooled_projections=cond["pooled"].to(network.dtype),
            return_dict=False,
        )[0]


def _endless(loader: StatefulDataLoader) -> Iterator[dict[str, Any]]:
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        yield from loader
        epoch += 1
