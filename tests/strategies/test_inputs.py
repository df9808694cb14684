"""What a student is asked at each level."""

from __future__ import annotations

import pytest
import torch

from distill.diffusion.levels import Discrete, Levels, Shifted, Uniform
from distill.diffusion.process import RectifiedFlow, VariancePreserving
from distill.errors import ConfigError
from distill.strategies.inputs import NoisedData
from tests import tiny

B = 6


@pytest.mark.parametrize("pure", [True, False])
def test_at_the_last_level_there_is_only_noise(pure: bool) -> None:
    """As in sampling; Stable Diffusion's own schedule leaves 7 % of the data there."""
    batch, process = tiny.batch(B), VariancePreserving(tiny.stable_diffusion_alphas(), "epsilon")
    x_t, t = NoisedData(Discrete([1.0, 0.5]), pure_noise=pure)(batch, process, 0)
    noise = batch.draws.like("inputs/noise", batch.x0)
    assert 0 < (t == 1).sum() < B
    mixed = process.add_noise(batch.x0, t, noise)
    last = t == 1
    torch.testing.assert_close(x_t[~last], mixed[~last])
    torch.testing.assert_close(x_t[last], noise[last] if pure else mixed[last])
    assert (noise[last] - mixed[last]).abs().max() > 0.05


class Last(Levels):
    def draw(self, draws, purpose: str) -> torch.Tensor:
        return torch.ones(draws.size)


def test_networks_without_few_levels_keep_their_schedule() -> None:
    batch, process = tiny.batch(B), VariancePreserving(tiny.stable_diffusion_alphas(), "epsilon")
    inputs = NoisedData(Last())
    x_t, t = inputs(batch, process, 0)
    assert inputs.few_levels == [] and bool((t == 1).all())
    torch.testing.assert_close(x_t, process.add_noise(batch.x0, t, batch.draws.like("inputs/noise", batch.x0)))


def test_a_flow_ends_in_noise_anyway() -> None:
    batch = tiny.batch(B)
    answers = [NoisedData(Discrete([1.0]), pure_noise=pure)(batch, RectifiedFlow(), 0)[0] for pure in (True, False)]
    assert torch.equal(*answers)


def test_a_student_of_shifted_levels_samples_at_them() -> None:
    inputs = NoisedData(Shifted(Discrete([1.0, 0.5]), 3.0))
    assert inputs.visited(2) == [1.0, 0.75] and inputs.counts((1, 2, 4)) == (1, 2)


def test_a_network_of_all_levels_is_told_to_be_no_few_step_student() -> None:
    with pytest.raises(ConfigError, match="is no few-step student; set samples.every=0, or give model.inputs.levels a"):
        NoisedData(Uniform()).visited(1)
