"""Distributions of noise levels `t` in [0, 1]."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from distill.batch import Draws

Level = TypeVar("Level", float, Tensor)


class Levels:
    """A distribution over noise levels.

    Attributes:
        values: the levels there are, most noise first, where they are few; empty otherwise.
    """

    values: list[float] = []

    def draw(self, draws: Draws, purpose: str) -> Tensor:
        """One level per sample, `[B]` float32 in [0, 1]."""
        raise NotImplementedError


class Uniform(Levels):
    """Uniform on (low, high]; t = 0 never comes, for there `x_t` holds no noise to predict.

    Raises:
        ValueError: bounds outside 0 <= low < high <= 1.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0):
        if not 0 <= low < high <= 1:
            raise ValueError(f"uniform levels need 0 <= low < high <= 1; got low={low}, high={high}")
        self.low, self.high = low, high

    def draw(self, draws: Draws, purpose: str) -> Tensor:
        return self.high - (self.high - self.low) * draws.uniform(purpose)


class LogitNormal(Levels):
    """`t = sigmoid(u)`, `u ~ N(m, s^2)` (arXiv 2403.03206, section 3.1): a larger `m` means more noise.

    The level that hides a picture depends on its resolution: m = 1 (LADD, section 4.1) suits 64x64 latents and more.

    Raises:
        ValueError: a spread that is not positive.
    """

    def __init__(self, m: float = 1.0, s: float = 1.0):
        if s <= 0:
            raise ValueError(f"logit-normal levels need s > 0; got s={s}")
        self.m, self.s = m, s

    def draw(self, draws: Draws, purpose: str) -> Tensor:
        return torch.sigmoid(self.m + self.s * draws.normal(purpose))


class Discrete(Levels):
    """A few levels with their probabilities; what a student is trained and sampled at.

    Args:
        values: levels in (0, 1], from most to least noise.
        probabilities: of each; they sum to 1. Equal if not given.

    Raises:
        ValueError: levels out of range or not descending, or probabilities that are none.
    """

    def __init__(self, values: list[float], probabilities: list[float] | None = None):
        if not values or any(not 0 < v <= 1 for v in values) or sorted(set(values), reverse=True) != list(values):
            raise ValueError(f"levels must descend within (0, 1], such as [1.0, 0.75, 0.5, 0.25]; got {values}")
        probabilities = probabilities or [1 / len(values)] * len(values)
        if len(probabilities) != len(values) or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
            raise ValueError(f"{len(values)} levels need as many probabilities that sum to 1; got {probabilities}")
        self.values, self.probabilities = values, probabilities

    def draw(self, draws: Draws, purpose: str) -> Tensor:
        u = draws.uniform(purpose)
        edges = torch.tensor(self.probabilities, device=u.device).cumsum(0)[:-1].contiguous()
        return torch.tensor(self.values, device=u.device)[torch.bucketize(u, edges, right=True)]

    def visited(self, steps: int) -> list[float]:
        """The levels a sampler of `steps` steps visits: evenly chosen, the first always among them.

        Raises:
            ValueError: more steps than levels.
        """
        if not 1 <= steps <= len(self.values):
            raise ValueError(
                f"this student was trained at {len(self.values)} levels {self.values}: it samples in 1 to "
                f"{len(self.values)} steps, not {steps}"
            )
        return [self.values[i * len(self.values) // steps] for i in range(steps)]


def shifted(t: Level, shift: float) -> Level:
    """`s t / (1 + (s - 1) t)`, written so that noise alone stays noise alone."""
    return shift * t / (shift * t + (1 - t))


class Evenly(Discrete):
    """Many levels between 0 and 1, evenly spaced and equally probable: the grid of consistency distillation.

    Args:
        count: how many; 0 is none of them.
        shift: of all of them, as in `Shifted`.

    Raises:
        ValueError: no levels, or a shift that is not positive.
    """

    def __init__(self, count: int = 50, shift: float = 1.0):
        if count < 1 or shift <= 0:
            raise ValueError(f"evenly spaced levels are 1 or more, with a positive shift; got {count} and {shift}")
        even = [(count - index) / count for index in range(count)]
        super().__init__([shifted(t, shift) for t in even])


class Shifted(Levels):
    """Other levels pushed towards noise for a higher resolution, `t' = s t / (1 + (s - 1) t)` (SD3, Eq. 23).

    Args:
        levels: the distribution to shift.
        shift: s; 1 changes nothing, SD3 samples with 3.

    Raises:
        ValueError: a shift that is not positive.
    """

    def __init__(self, levels: Levels, shift: float = 3.0):
        if shift <= 0:
            raise ValueError(f"the shift of noise levels must be positive; got {shift}")
        self.levels, self.shift = levels, shift
        self.values = [shifted(t, shift) for t in levels.values]

    def draw(self, draws: Draws, purpose: str) -> Tensor:
        return shifted(self.levels.draw(draws, purpose), self.shift)
