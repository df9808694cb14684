"""Distances between two sets of features, with the uncertainty that comes from their numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features `[N, D]` and `[M, D]` (FID, arXiv 1706.08500); in float64."""
    return frechet_to(real)(fake)


def frechet_to(real: Tensor) -> Callable[[Tensor], float]:
    """The same to one set of real features, whose covariance's square root is computed once."""
    mean, one = real.double().mean(0), torch.cov(real.double().T)
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(fake: Tensor) -> float:
        other = torch.cov(fake.double().T)
        cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
        apart = (mean - fake.double().mean(0)).square().sum()
        return float(apart + one.trace() + other.trace() - 2 * cross)

    return distance


def kernel_distance(real: Tensor, fake: Tensor, degree: int = 3) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel `(x.y / D + 1)^3` (KID, arXiv 1801.01401)."""
    real, fake = real.double(), fake.double()
    n, m, size = len(real), len(fake), real.shape[1]
    within_real, within_fake, across = (
        (a @ b.T / size + 1) ** degree for a, b in ((real, real), (fake, fake), (real, fake))
    )
    same_real = (within_real.sum() - within_real.diagonal().sum()) / (n * (n - 1))
    same_fake = (within_fake.sum() - within_fake.diagonal().sum()) / (m * (m - 1))
    return float(same_real + same_fake - 2 * across.mean())


def kernel_distance_of_subsets(
    real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> float:
    """The mean of `kernel_distance` over random subsets of both sides, each of `size` or all there are."""
    generator, size = torch.Generator().manual_seed(seed), min(size, len(real), len(fake))

    def some(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    return sum(kernel_distance(some(real), some(fake)) for _ in range(subsets)) / subsets


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of fake features in the manifold of the real ones, and of real in that of the fake (arXiv 1904.06991).

    Args:
        real, fake: `[N, D]`, `[M, D]`.
        neighbours: a point's ball reaches to its k-th neighbour.
    """
    return _covered(fake, real, neighbours), _covered(real, fake, neighbours)


def _covered(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    radius = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values  # the nearest is itself
    return float((torch.cdist(points, manifold) <= radius).any(1).double().mean())


def bootstrap(measure: Callable[[Tensor], float], count: int, draws: int = 200, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of a measure from resamples, moved so that their mean lies on the measure itself.

    A distance between sets is larger for resamples, in which samples repeat; only their spread says how sure it is.

    Args:
        measure: of the indices of a resample, `[count]`.
        count: how many samples there are.
        draws: how many resamples.
        seed: of the resampling.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([measure(torch.randint(count, (count,), generator=generator)) for _ in range(draws)]).double()
    low, high = torch.quantile(
        values - values.mean() + measure(torch.arange(count)), torch.tensor([0.025, 0.975]).double()
    )
    return float(low), float(high)
