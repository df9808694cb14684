from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from distill.diffusion.levels import Discrete, Evenly, Levels, LogitNormal, Shifted, Uniform
from tests.tiny import draws

MANY = 20_000
FOUR = [1.0, 0.75, 0.5, 0.25]


@pytest.fixture(scope="module")
def many() -> SimpleNamespace:
    """Draws of `MANY` samples that are made once."""
    source = draws(MANY)
    uniform, normal = source.uniform("levels"), source.normal("levels")
    return SimpleNamespace(uniform=lambda purpose: uniform, normal=lambda purpose: normal)


@pytest.fixture
def extremes() -> SimpleNamespace:
    """The smallest and largest numbers that float32 generators give."""
    uniform, normal = torch.tensor([0.0, 1 - 2**-24]), torch.tensor([-5.6, 5.6])
    return SimpleNamespace(uniform=lambda purpose: uniform, normal=lambda purpose: normal)


def test_logit_normal_has_the_median_and_spread_of_ladd(many):
    t = LogitNormal(1.0, 1.0).draw(many, "t")
    low, median, high = t.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    assert median == pytest.approx(0.731, abs=0.01)
    assert (low, high) == pytest.approx((0.430, 0.907), abs=0.012)


@pytest.mark.parametrize(("m", "s"), [(-1.5, 1.0), (0.0, 0.5)])
def test_logit_normal_levels_have_the_mean_and_spread_asked_for(many, m, s):
    u = LogitNormal(m, s).draw(many, "t").logit()
    assert u.mean().item() == pytest.approx(m, abs=0.03)
    assert u.std().item() == pytest.approx(s, rel=0.03)


def test_uniform_levels_fill_their_range_evenly(many):
    t = Uniform(0.2, 0.6).draw(many, "t")
    quantiles = t.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    assert quantiles == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6], abs=0.01)
    assert 0.2 <= t.min() and t.max() <= 0.6


@pytest.mark.parametrize("probabilities", [None, [0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0]])
def test_discrete_levels_come_as_often_as_asked(many, probabilities):
    seen = Counter(Discrete(FOUR, probabilities).draw(many, "t").tolist())
    for level, probability in zip(FOUR, probabilities or [0.25] * 4, strict=True):
        assert seen[level] / MANY == pytest.approx(probability, abs=0.01)
        if probability == 0:
            assert level not in seen
    assert set(seen) <= set(FOUR)


@pytest.mark.parametrize("probabilities", [[0.0, 1.0, 0.0], [0.0, 0.4, 0.6], [0.5, 0.5, 0.0]])
def test_a_level_without_probability_is_not_drawn_at_the_edges_either(extremes, probabilities):
    levels = Discrete([1.0, 0.5, 0.25], probabilities)
    possible = {v for v, p in zip(levels.values, probabilities, strict=True) if p > 0}
    assert set(levels.draw(extremes, "t").tolist()) <= possible


def test_each_sample_of_a_batch_draws_its_own_level():
    t = LogitNormal().draw(draws(16), "t")
    assert t.shape == (16,) and t.dtype == torch.float32
    assert len(set(t.tolist())) == 16


@pytest.mark.parametrize(("steps", "levels"), [(1, [1.0]), (2, [1.0, 0.5]), (4, FOUR)])
def test_a_sampler_visits_evenly_chosen_levels_from_pure_noise(steps, levels):
    assert Discrete(FOUR).visited(steps) == levels


@pytest.mark.parametrize("steps", [0, 5])
def test_more_steps_than_levels_are_refused(steps):
    with pytest.raises(ValueError, match=f"trained at 4 levels .* in 1 to 4 steps, not {steps}"):
        Discrete(FOUR).visited(steps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_levels_follow_the_formula_of_sd3(many, shift):
    t = LogitNormal(0.0, 1.0).draw(many, "t").double()
    expected = shift * t / (1 + (shift - 1) * t)
    torch.testing.assert_close(Shifted(LogitNormal(0.0, 1.0), shift).draw(many, "t").double(), expected)


def test_the_shift_of_sd3_moves_the_middle_to_three_quarters():
    assert Shifted(Discrete([0.5]), 3.0).draw(draws(2), "t").tolist() == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize(
    "levels",
    [
        Uniform(),
        LogitNormal(1.0, 1.0),
        LogitNormal(-1.5, 1.0),
        Discrete(FOUR),
        Evenly(12, 3.0),
        Shifted(Uniform(), 3.0),
    ],
    ids=lambda levels: type(levels).__name__,
)
def test_every_level_is_noisy_and_none_beyond_pure_noise(levels: Levels, many, extremes):
    for source in (many, extremes):
        t = levels.draw(source, "t")
        assert t.min() > 0
        assert t.max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0.5, 0.5), "0 <= low < high <= 1; got low=0.5, high=0.5"),
        (lambda: Uniform(-0.1, 0.5), "got low=-0.1"),
        (lambda: Uniform(0.0, 1000.0), "high=1000.0"),
        (lambda: LogitNormal(1.0, 0.0), "s > 0; got s=0.0"),
        (lambda: Discrete([]), "descend within"),
        (lambda: Discrete([0.25, 0.5]), r"descend within .* got \[0.25, 0.5\]"),
        (lambda: Discrete([1.0, 1.0]), "descend within"),
        (lambda: Discrete([999.0, 499.0]), "descend within"),
        (lambda: Discrete([0.5, 0.0]), "descend within"),
        (lambda: Discrete([1.0, 0.5], [1.0]), "2 levels need as many probabilities"),
        (lambda: Discrete([1.0, 0.5], [0.5, 0.6]), "sum to 1; got"),
        (lambda: Discrete([1.0, 0.5], [1.5, -0.5]), "sum to 1; got"),
        (lambda: Shifted(Uniform(), 0.0), "must be positive; got 0.0"),
    ],
)
def test_settings_that_are_no_distribution_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shifted_levels_are_few_where_theirs_are():
    assert Shifted(Discrete([1.0, 0.5]), 3.0).values == [1.0, 0.75]
    assert Shifted(Uniform(), 3.0).values == LogitNormal().values == []


@pytest.mark.parametrize("shift", [0.1, 0.15, 0.2, 0.3, 0.45, 1.0, 3.0])
def test_a_shift_leaves_noise_alone_what_it_is(shift):
    assert Evenly(4, shift).values[0] == Shifted(Discrete(FOUR), shift).values[0] == 1
