"""Arithmetic of pairwise votes: win rates and ELO as in ADD (arXiv 2311.17042, appendix B.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.errors import ConfigError


@dataclass(frozen=True)
class Vote:
    """One comparison of two images of one prompt; people's and judges' votes have the same form.

    Attributes:
        first, second: whose images.
        outcome: 1 if the first was preferred, 0 if the second, 0.5 for a tie.
        prompt: what was asked for.
        voter: who voted.
    """

    first: str
    second: str
    outcome: float
    prompt: str = ""
    voter: str = ""


def win_rate(votes: Sequence[Vote], first: str, second: str, z: float = 1.96) -> tuple[float, float, float]:
    """How often `first` beat `second`, ties counted half, with Wilson's 95 % interval.

    Returns:
        Rate, lower and upper bound.

    Raises:
        ValueError: the two were never compared.
    """
    outcomes = [v.outcome for v in votes if (v.first, v.second) == (first, second)]
    outcomes += [1 - v.outcome for v in votes if (v.first, v.second) == (second, first)]
    if not outcomes:
        raise ValueError(f"there is no vote between '{first}' and '{second}'")
    n, rate = len(outcomes), sum(outcomes) / len(outcomes)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    return rate, centre - half, centre + half


def elo(
    votes: Sequence[Vote], k: float = 1.0, start: float = 1000.0, shuffles: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """ELO ratings, the mean over random orders of the votes, with the central 95 % over these orders.

    A vote moves both ratings by `k (outcome - expected)`, with `expected = 1 / (1 + 10^((R_other - R) / 400))`.

    Args:
        votes: any.
        k: 1 in the paper.
        start: every rating's beginning.
        shuffles: orders the mean is over; 1,000 in the paper.
        seed: of the orders.

    Raises:
        ConfigError: no votes.
    """
    if not votes:
        raise ConfigError("there are no votes to rate anything by; give one or more")
    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    place = {name: index for index, name in enumerate(names)}
    pairs = torch.tensor([[place[v.first], place[v.second]] for v in votes])
    outcomes = torch.tensor([v.outcome for v in votes], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(votes), generator=generator) for _ in range(shuffles)])
    ratings, rows = torch.full((shuffles, len(names)), start, dtype=torch.float64), torch.arange(shuffles)
    for order in orders.unbind(1):  # one vote of every shuffle at a time
        one, other = pairs[order].unbind(1)
        expected = 1 / (1 + 10 ** ((ratings[rows, other] - ratings[rows, one]) / 400))
        move = k * (outcomes[order] - expected)
        ratings[rows, one] += move
        ratings[rows, other] -= move
    low, high = torch.quantile(ratings, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    means = ratings.mean(0)
    return {name: (float(means[i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}
