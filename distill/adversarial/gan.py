"""Adversarial losses and gradient penalties, over one or many heads.

Every `logits` is a list with one tensor per head, `[B, ...]`: any number of places each. A loss is a mean over batch
and places inside a head, and a sum over heads (the sum over k of ADD, Eq. 2 and 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Logits = list[Tensor]


class GanLoss:
    """An adversarial game: what the critic and what the student minimise."""

    def critic(self, real: Logits, fake: Logits) -> Tensor:
        """The critic's loss, 0-dim."""
        raise NotImplementedError

    def student(self, fake: Logits) -> Tensor:
        """The student's loss, 0-dim."""
        raise NotImplementedError


class Hinge(GanLoss):
    """ADD, Eq. 2 and 3; LADD names no form and keeps ADD's."""

    def critic(self, real: Logits, fake: Logits) -> Tensor:
        return _over_heads(real, lambda x: relu(1 - x)) + _over_heads(fake, lambda x: relu(1 + x))

    def student(self, fake: Logits) -> Tensor:
        return _over_heads(fake, torch.neg)


class Logistic(GanLoss):
    """The non-saturating logistic game (arXiv 1406.2661; Diffusion2GAN, section 3.3)."""

    def critic(self, real: Logits, fake: Logits) -> Tensor:
        return _over_heads(real, lambda x: softplus(-x)) + _over_heads(fake, softplus)

    def student(self, fake: Logits) -> Tensor:
        return _over_heads(fake, lambda x: softplus(-x))


def _over_heads(logits: Logits, loss: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([loss(head.float()).mean() for head in logits]).sum()


def per_sample(logits: Logits) -> Tensor:
    """One number per sample, the mean over places and heads: `[B]` float32."""
    return torch.stack([head.float().flatten(1).mean(1) for head in logits]).mean(0)


def mean_logit(logits: Logits, some: Tensor | None = None) -> Tensor:
    """The mean over all samples, or over those of a mask `[B]`, 0-dim, for reports; 0 where it has none."""
    each = per_sample([head.detach() for head in logits])
    return each.mean() if some is None else (each * some).sum() / some.sum().clamp(min=1)


def neighbours(size: int, device: torch.device) -> Tensor:
    """Each sample's partner in the batch `[size]`, two by two; the last of an odd number takes the one before it.

    Partners are on one process as long as each has an even share, so any number of processes pairs alike.
    """
    partners = torch.arange(size, device=device) ^ 1
    partners[-1] = size - 2
    return partners


def pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Samples of `yes` `[B, ...]` where `mask` `[B]` holds, of `no` elsewhere."""
    return torch.where(mask.view(-1, *[1] * (no.ndim - 1)), yes, no)


def gradient_penalty(logits: Logits, inputs: list[Tensor]) -> Tensor:
    """R1 (arXiv 1801.04406, Eq. 9) at the `inputs` of each head: the squared norm of the gradient of a sample's summed
    logits, mean over the batch, summed over heads. Differentiable: needs a double backward through the heads.
    """
    gradients = torch.autograd.grad([head.float().sum() for head in logits], inputs, create_graph=True)
    return torch.stack([gradient.float().flatten(1).square().sum(1).mean() for gradient in gradients]).sum()


def finite_difference_penalty(clean: Logits, perturbed: Logits) -> Tensor:
    """Approximate R1 (arXiv 2501.08316, section 3.3): squared change of the logits under a small step of the input."""
    changes = [(a.float() - b.float()).square().mean() for a, b in zip(clean, perturbed, strict=True)]
    return torch.stack(changes).sum()


class R1:
    """Which gradient penalty on real data a critic pays.

    Args:
        weight: gamma; 0 pays nothing.
        every: the penalty is computed at every n-th step and weighted n times (lazy R1, arXiv 1912.04958 section 4).

    Raises:
        ValueError: a negative weight, or an interval below 1.
    """

    def __init__(self, weight: float, every: int = 1):
        if weight < 0:
            raise ValueError(f"the weight of R1 is 0 or more; got {weight}")
        if every < 1:
            raise ValueError(f"R1 is computed every 1 or more steps; got every={every}")
        self.weight, self.every = weight, every

    def due(self, step: int) -> bool:
        """Whether `step` pays."""
        return self.weight > 0 and step % self.every == 0


class ExactR1(R1):
    """The gradient itself, at the heads' inputs (ADD, section 3.2; gamma = 1e-5 in section 4)."""

    def __init__(self, weight: float = 1e-5, every: int = 1):
        super().__init__(weight, every)


class ApproximateR1(R1):
    """A finite difference at the critic's clean input: no double backward, so it works on sharded critics.

    Args:
        weight: gamma; it acts as gamma sigma^2, the same as in arXiv 2501.08316, which has 100 and a sigma of 0.01.
        sigma: standard deviation of the perturbation. A critic that computes in bfloat16, whose steps near 1 are .008
            wide, answers to one of 0.01 mostly by rounding.
        every: as in `R1`.
    """

    def __init__(self, weight: float = 1.0, sigma: float = 0.1, every: int = 1):
        super().__init__(weight, every)
        if sigma <= 0:
            raise ValueError(f"approximate R1 needs a perturbation of sigma > 0; got {sigma}")
        self.sigma = sigma
