"""The contract of a strategy: one term of the student's objective, and whatever is trained against it."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from distill.backbones.base import Backbone
from distill.batch import Batch, Sample
from distill.errors import ConfigError
from distill.frozen import Frozen

BALANCED = "balanced"
Weight = float | Literal["balanced"]


class Strategy(nn.Module):
    """One term of the student's objective and whatever is trained against it (its critic).

    A strategy knows no optimizer, device, precision, logging or sharding and never calls backward. Trainable parts go
    into `critic`; borrowed networks are held in `Frozen`; random numbers come from `batch.draws`, for only those are
    repeated by a resumed run. Whatever it wants to report goes into `report`.

    Args:
        weight: of this term in the student's objective; `balanced` scales it so that its gradient at the sample is as
            long as that of all terms whose weight is a number.
        balance: how much longer or shorter than that, for a weight that is `balanced`.
        begins: the student's update from which this term acts on it. Its critic learns from the first, so that the
            student never follows one that knows nothing; other terms have to train the student until then.

    Raises:
        ConfigError: a word other than `balanced`, a negative weight, balance or update.
    """

    def __init__(self, weight: Weight = 1.0, balance: float = 1.0, begins: int = 0):
        super().__init__()
        if isinstance(weight, str) and weight != BALANCED:
            raise ConfigError(f"a strategy's weight is a number or {BALANCED}, got '{weight}'")
        for name, number in (("weight", weight), ("balance", balance)):
            if not isinstance(number, str) and not (math.isfinite(number) and number >= 0):
                raise ConfigError(f"a strategy's {name} is a number of 0 or more, got {number}")
        if begins < 0:
            raise ConfigError(f"a strategy begins at an update of the student, 0 or later, got begins={begins}")
        self.weight, self.balance, self.begins = weight, balance, begins
        self.critic: nn.Module | None = None
        self.report: dict[str, Tensor] = {}

    @property
    def has_critic(self) -> bool:
        """Whether this kind of strategy trains something against the student; known before anything is built."""
        return type(self).critic_loss is not Strategy.critic_loss

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        """Builds the critic and frozen helpers; no weights are made or read before this is called.

        Args:
            backbone: the teacher's pipeline.
            teacher: its frozen `Denoiser`.
        """

    def check(self, batch_size: int) -> None:
        """Refuses a number of samples per process that this term cannot work with.

        Raises:
            ConfigError: what was given, what is needed, what to do.
        """

    def check_levels(self, levels: list[float]) -> None:
        """Refuses levels that the student is asked at and this term cannot work with.

        Args:
            levels: the few there are, most noise first; empty where the student is asked at all.

        Raises:
            ConfigError: what was given, what is needed, what to do.
        """

    def check_sharded(self) -> None:
        """Refuses a critic that cannot be trained sharded; asked only where it is.

        Raises:
            ConfigError: what was given, what is needed, what to do.
        """

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        """This term for the student, 0-dim, unweighted; differentiable towards `sample.x0` or `sample.pixels`.

        Args:
            sample: the student's answer.
            batch: data, conditioning and random numbers.
            step: student updates so far.
        """
        raise ConfigError(f"{type(self).__name__} has no student_loss; every strategy says what the student is to do")

    def critic_loss(self, sample: Sample, batch: Batch, step: int) -> dict[str, Tensor]:
        """The critic's loss as named 0-dim terms, which are summed; called only where there is a critic.

        Args:
            sample, batch: as in `student_loss`.
            step: critic updates so far.
        """
        raise ConfigError(f"{type(self).__name__} has a critic and no critic_loss, so nothing would train it")

    def check_parts(self) -> None:
        """Refuses trainable weights outside the critic, which no optimizer would get.

        Raises:
            ConfigError: there are some.
        """
        trained = {id(weight) for weight in (self.critic.parameters() if self.critic is not None else ())}
        lost = [name for name, weight in self.named_parameters() if weight.requires_grad and id(weight) not in trained]
        if lost:
            raise ConfigError(
                f"{type(self).__name__} has weights that nothing trains, the first is {lost[0]}; what is trained "
                "belongs into `critic`, what is not into a `Frozen`"
            )

    def check_judging(self) -> None:
        """Refuses to be a judge, as a strategy does that has no critic of a picture and its prompt alone.

        Raises:
            ConfigError: why `score` cannot be asked, what to do.
        """
        raise ConfigError(f"{type(self).__name__} has no critic of a picture and its prompt alone")

    def score(self, batch: Batch) -> Tensor:
        """How real the trained critic finds what the batch holds beside its prompts, `[B]` float32; higher is better.

        One sample's score does not depend on the others, as `batch.draws` gives each sample the same numbers.
        """
        raise NotImplementedError


def one_number(strategy: Strategy, loss: Any) -> Tensor:
    """What a strategy returned as the student's loss.

    Raises:
        ConfigError: anything but one number that depends on the sample.
    """
    name = f"{type(strategy).__name__}.student_loss"
    if not _is_number(loss):
        raise ConfigError(f"{name} is to return one 0-dim tensor; got {_described(loss)}")
    if not loss.requires_grad:
        raise ConfigError(
            f"{name} does not depend on sample.x0 or sample.pixels, so the student learns nothing from it"
        )
    return loss


def named_numbers(strategy: Strategy, terms: Any) -> dict[str, Tensor]:
    """What a strategy returned as its critic's loss.

    Raises:
        ConfigError: anything but named numbers, of which one depends on the critic.
    """
    name = f"{type(strategy).__name__}.critic_loss"
    if not isinstance(terms, dict) or not all(_is_number(term) for term in terms.values()):
        got = {key: _described(term) for key, term in terms.items()} if isinstance(terms, dict) else _described(terms)
        raise ConfigError(f"{name} is to return 0-dim tensors by name, such as {{'game': loss}}; got {got}")
    if not any(term.requires_grad for term in terms.values()):
        raise ConfigError(f"{name} does not depend on the critic's weights, so it teaches the critic nothing")
    return terms


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
