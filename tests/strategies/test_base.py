"""What every strategy of the package offers alike."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from distill import strategies
from distill.collaboration.critic import strategies_of
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.base import Strategy, named_numbers, one_number

TERMS = [name for name in strategies.__all__ if issubclass(getattr(strategies, name), Strategy)]


@pytest.mark.parametrize("name", sorted(set(TERMS) - {"Strategy", "DiffusionPretraining"}))
def test_every_term_of_a_recipe_can_be_balanced_and_every_game_begin_later(name: str) -> None:
    taken = inspect.signature(getattr(strategies, name)).parameters
    given = {"weight": "balanced", "balance": 0.3, "weights": "tiny-latent-lpips", "begins": 5}
    given = {option: value for option, value in given.items() if option in taken}
    (made,) = strategies_of({"strategy_configs": [{"class_path": name, "init_args": given}]}, "a.ckpt")
    assert (made.weight, made.balance) == ("balanced", 0.3)
    assert made.begins == (5 if "Adversarial" in name else 0)


class Idea(Strategy):
    """One of a user's own, not finished."""


LOSS = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (None, "Idea.student_loss is to return one 0-dim tensor; got NoneType"),
        (torch.ones(8, requires_grad=True), r"is to return one 0-dim tensor; got a tensor \[8\]"),
        ({"a": LOSS}, "is to return one 0-dim tensor; got dict"),
        (torch.ones(()), "does not depend on sample.x0 or sample.pixels"),
    ],
)
def test_what_is_no_loss_is_named(loss: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        one_number(Idea(), loss)
    assert one_number(Idea(), LOSS) is LOSS


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        (LOSS, r"Idea.critic_loss is to return 0-dim tensors by name, .*; got a tensor \[\]"),
        ({"game": torch.ones(2)}, r"by name, .*; got {'game': 'a tensor \[2\]'}"),
        ({}, "does not depend on the critic's weights"),
        ({"game": torch.ones(())}, "does not depend on the critic's weights"),
    ],
)
def test_what_is_no_critics_loss_is_named(terms: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        named_numbers(Idea(), terms)
    terms = {"game": LOSS, "share": torch.ones(())}
    assert named_numbers(Idea(), terms) is terms


def test_losses_that_are_not_there_are_named() -> None:
    nothing: Any = None
    with pytest.raises(ConfigError, match="Idea has no student_loss"):
        Idea().student_loss(nothing, nothing, 0)
    with pytest.raises(ConfigError, match="Idea has a critic and no critic_loss"):
        Idea().critic_loss(nothing, nothing, 0)


def test_weights_that_nothing_would_train_are_named() -> None:
    idea = Idea()
    idea.critic, idea.borrowed = nn.Linear(1, 1), Frozen(nn.Linear(1, 1))
    idea.check_parts()
    idea.mine = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="Idea has weights that nothing trains, the first is mine.weight"):
        idea.check_parts()
