"""Trainable heads that turn a frozen network's features into logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.utils.parametrizations import spectral_norm

from distill.errors import ConfigError, at_least_one


class BatchNormLocal(nn.Module):
    """Batch norm over small groups of the batch, without running statistics (StyleGAN-T, arXiv 2301.09515 section 3.3).

    Args:
        channels: of the input.
        group: samples that share their statistics; the batch is split into equal groups of at most this many.
    """

    def __init__(self, channels: int, group: int = 8, eps: float = 1e-5):
        super().__init__()
        self.group, self.eps = group, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, ...]` -> the same.

        Raises:
            ValueError: a batch of one, whose statistics say nothing about a distribution.
        """
        if len(x) < 2:
            raise ValueError("local batch norm needs at least 2 samples per process")
        size = max(n for n in range(1, min(self.group, len(x)) + 1) if len(x) % n == 0)
        size = len(x) if size == 1 else size  # a prime batch: one group rather than groups of one
        groups = len(x) // size
        side_by_side = x.float().unflatten(0, (groups, size)).transpose(0, 1).flatten(1, 2)  # [size, groups C, ...]
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        y = batch_norm(side_by_side, None, None, weight, bias, training=True, eps=self.eps)
        return y.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1).to(x.dtype)


class ProjectedHead(nn.Module):
    """One logit per place of a feature map, conditioned by projection (StyleGAN-T, section 3.3).

    Args:
        width: channels of the features.
        cond: size of the condition; 0 for none.
        hidden: channels inside; the features' own width if not given, as StyleGAN-T has it.
        norm: `local_batch` (needs batches of 2 and more) or `group`.
        project: size of the projection.

    Raises:
        ConfigError: an unknown norm, no channels inside.
    """

    def __init__(self, width: int, cond: int, hidden: int | None = None, norm: str = "local_batch", project: int = 64):
        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {
            "local_batch": BatchNormLocal,
            "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
        }
        if norm not in norms:
            raise ConfigError(f"head norm '{norm}' is unknown; choose one of {', '.join(norms)}")
        at_least_one(hidden=hidden)
        hidden = hidden or width
        act = nn.LeakyReLU(0.2)
        self.enter = nn.Sequential(spectral_norm(self.pointwise(width, hidden)), norms[norm](hidden), act)
        self.mix = nn.Sequential(spectral_norm(self.neighbours(hidden)), norms[norm](hidden), act)
        self.leave = spectral_norm(self.pointwise(hidden, project if cond else 1))
        self.project = nn.Linear(cond, project) if cond else None

    def pointwise(self, inputs: int, outputs: int) -> nn.Module:
        """A convolution of one place."""
        raise NotImplementedError

    def neighbours(self, channels: int) -> nn.Module:
        """A convolution over neighbouring places that keeps their number."""
        raise NotImplementedError

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:
        """Features `[B, width, ...]` and condition `[B, cond]` -> logits `[B, ...]`."""
        x = self.enter(features.float())
        x = self.leave((self.mix(x) + x) / math.sqrt(2))
        if self.project is None or condition is None:
            return x[:, 0]
        direction = self.project(condition)
        places = [1] * (x.ndim - 2)
        return (x * direction.view(*direction.shape, *places)).sum(1) / math.sqrt(direction.shape[1])


class GridHead(ProjectedHead):
    """For features `[B, D, h, w]` of any aspect ratio.

    StyleGAN-T's 1-D kernel of 9 as a 3x3 one, as LADD section 3 asks ("we reshape the token sequence back to the
    original spatial layout and transition to 2D convolution").
    """

    def pointwise(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 1)

    def neighbours(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1)


class TokenHead(ProjectedHead):
    """For sequences of tokens `[B, D, N]`, N at least 4: StyleGAN-T's own head, as ADD uses it (section 3.2)."""

    def pointwise(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Conv1d(inputs, outputs, 1)

    def neighbours(self, channels: int) -> nn.Module:
        return nn.Conv1d(channels, channels, 9, padding=4, padding_mode="circular")


class HeadCondition(nn.Module):
    """What LADD's heads are conditioned on (section 3): the noise level and the pooled text embedding.

    Args:
        pooled: size of the pooled text embedding.
        frequencies: of the sinusoidal embedding of t.
    """

    frequencies: Tensor

    def __init__(self, pooled: int, frequencies: int = 32):
        super().__init__()
        self.register_buffer("frequencies", 2 ** torch.linspace(0, 8, frequencies), persistent=False)
        self.level = nn.Sequential(nn.Linear(2 * frequencies, 128), nn.SiLU(), nn.Linear(128, 128))
        self.text = nn.LayerNorm(pooled)
        self.size = 128 + pooled

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """`t` `[B]`, `pooled` `[B, P]` -> `[B, size]`."""
        phase = t.float()[:, None] * self.frequencies
        waves = torch.cat([phase.sin(), phase.cos()], dim=1)
        return torch.cat([self.level(waves), self.text(pooled.float())], dim=1)


def check_alone(norm: str, strategy: str) -> None:
    """Refuses to score with heads that see samples beside each other.

    Raises:
        ConfigError: the heads were trained with `local_batch`.
    """
    if norm != "group":
        raise ConfigError(
            f"the critic of {strategy} was trained with norm={norm}: a score would depend on the other samples of the "
            "batch; train it with norm=group to judge with it"
        )
