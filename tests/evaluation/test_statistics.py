from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from distill.evaluation.preference import Vote, elo, win_rate
from distill.evaluation.statistics import bootstrap, frechet_distance, kernel_distance, precision_recall


class Flat(nn.Module):
    """Pictures as they are, for features."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, 12, generator=generator) @ mixing + shift


def test_frechet_distance_is_torchmetrics() -> None:
    real, fake = features(300, 0), features(200, 1, 0.5)
    metric = FrechetInceptionDistance(feature=Flat(), normalize=True).set_dtype(torch.float64)
    metric.update(real.double().view(-1, 3, 2, 2), real=True)
    metric.update(fake.double().view(-1, 3, 2, 2), real=False)
    assert frechet_distance(real, fake) == pytest.approx(float(metric.compute()), rel=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_torchmetrics() -> None:
    real, fake = features(100, 0), features(100, 1, 0.5)
    metric = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=100, normalize=True, coef=1.0)
    metric.update(real.view(-1, 3, 2, 2), real=True)
    metric.update(fake.view(-1, 3, 2, 2), real=False)
    assert kernel_distance(real, fake) == pytest.approx(float(metric.compute()[0]), rel=1e-3)


def _reference_covered(points: Tensor, manifold: Tensor, k: int) -> float:
    inside = 0
    for point in points:
        for index, centre in enumerate(manifold):
            others = torch.cat([manifold[:index], manifold[index + 1 :]])
            radius = sorted((others - centre).norm(dim=1).tolist())[k - 1]
            if (point - centre).norm() <= radius + 1e-6:
                inside += 1
                break
    return inside / len(points)


def test_precision_and_recall_are_what_the_paper_says() -> None:
    real, fake = features(60, 0), features(50, 1, 1.0)[:, :12] * 0.7
    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(_reference_covered(fake, real, 3))
    assert recall == pytest.approx(_reference_covered(real, fake, 3))
    assert 0 < precision < 1 and 0 < recall < 1


def test_bootstrap_covers_the_mean() -> None:
    inside = 0
    for seed in range(200):
        values = torch.randn(80, generator=torch.Generator().manual_seed(seed))
        low, high = bootstrap(lambda drawn, values=values: float(values[drawn].mean()), 80, seed=seed)
        inside += low <= 0 <= high
    assert 0.88 < inside / 200 < 0.99


def _reference_elo(votes: list[Vote], order: list[int]) -> dict[str, float]:
    rating = {name: 1000.0 for vote in votes for name in (vote.first, vote.second)}
    for index in order:
        vote = votes[index]
        expected = 1 / (1 + 10 ** ((rating[vote.second] - rating[vote.first]) / 400))
        rating[vote.first] += vote.outcome - expected
        rating[vote.second] -= vote.outcome - expected
    return rating


VOTES = [Vote("a", "b", 1.0)] * 30 + [Vote("b", "a", 1.0)] * 10 + [Vote("b", "c", 0.5)] * 8 + [Vote("a", "c", 0.0)] * 5


def test_elo_is_the_mean_over_orders() -> None:
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(len(VOTES), generator=generator).tolist() for _ in range(50)]
    expected = [_reference_elo(VOTES, order) for order in orders]
    for name, (mean, low, high) in elo(VOTES, shuffles=50, seed=3).items():
        values = [rating[name] for rating in expected]
        assert mean == pytest.approx(sum(values) / 50)
        assert min(values) <= low <= mean <= high <= max(values)
    assert sum(value[0] for value in elo(VOTES, shuffles=5).values()) == pytest.approx(3000)


def test_win_rate_counts_both_orders_and_half_ties() -> None:
    rate, low, high = win_rate(VOTES, "a", "b")
    assert rate == 30 / 40 and 0.59 < low < rate < high < 0.87
    assert win_rate(VOTES, "b", "c")[0] == 0.5 and win_rate(VOTES, "c", "a")[0] == 1.0
    with pytest.raises(ValueError, match="there is no vote between 'a' and 'd'"):
        win_rate(VOTES, "a", "d")
