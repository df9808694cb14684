"""What every strategy of the package offers alike."""

import inspect

import pytest

from distill import strategies
from distill.collaboration.critic import strategies_of
from distill.strategies.base import Strategy

TERMS = [name for name in strategies.__all__ if issubclass(getattr(strategies, name), Strategy)]


@pytest.mark.parametrize("name", sorted(set(TERMS) - {"Strategy", "DiffusionPretraining"}))
def test_every_term_of_a_recipe_can_be_balanced_and_every_game_begin_later(name: str) -> None:
    taken = inspect.signature(getattr(strategies, name)).parameters
    given = {"weight": "balanced", "balance": 0.3, "weights": "tiny-latent-lpips", "begins": 5}
    given = {option: value for option, value in given.items() if option in taken}
    (made,) = strategies_of({"strategy_configs": [{"class_path": name, "init_args": given}]}, "a.ckpt")
    assert (made.weight, made.balance) == ("balanced", 0.3)
    assert made.begins == (5 if "Adversarial" in name else 0)
