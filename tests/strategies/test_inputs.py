"""What a student is asked at each level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli import main
from distill.diffusion.levels import Discrete, Levels, Shifted, Uniform
from distill.diffusion.process import RectifiedFlow, VariancePreserving
from distill.errors import ConfigError
from distill.strategies.inputs import NoisedData
from tests import tiny
from tests.runs import fit_arguments, logged

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


@pytest.mark.parametrize(
    ("warmup", "steps", "sentence"),
    [
        (None, 5, "warmup=None and model.inputs.warmup_steps=5; give both or neither"),
        (Discrete([0.5]), 0, "warmup=Discrete and model.inputs.warmup_steps=0; give both or neither"),
        (Discrete([0.5, 0.3]), 5, r"are to be among model.inputs.levels, \[1.0, 0.5\]; got \[0.5, 0.3\]"),
        (Uniform(), 5, "are to be among model.inputs.levels, .*; got Uniform"),
    ],
)
def test_a_warm_up_that_is_none_is_refused(warmup: Levels | None, steps: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        NoisedData(Discrete([1.0, 0.5]), warmup, steps)


def test_a_few_step_student_begins_with_noise_alone() -> None:
    with pytest.raises(ConfigError, match=r"the first of its levels is 1; got \[0.75, 0.5\]"):
        NoisedData(Discrete([0.75, 0.5]))


def test_a_network_of_all_levels_is_told_to_be_no_few_step_student() -> None:
    with pytest.raises(ConfigError, match="is no few-step student; set samples.every=0, or give model.inputs.levels a"):
        NoisedData(Uniform()).visited(1)


VALUES = [1.0, 0.75, 0.5, 0.25]
FIRST, THEN = [0.0, 0.0, 0.5, 0.5], [0.7, 0.1, 0.1, 0.1]  # LADD, section 4


def _reference_levels(drawn: torch.Tensor, probabilities: list[float]) -> list[float]:
    """The level in whose share of [0, 1) a uniform number lies."""
    shares = [(sum(probabilities[:place]), sum(probabilities[: place + 1])) for place in range(len(VALUES))]
    return [next(v for v, (low, high) in zip(VALUES, shares, strict=True) if low <= u < high) for u in drawn.tolist()]


@pytest.mark.parametrize("step", [0, 1, 4, 5, 6, 1000])
def test_other_levels_are_drawn_until_the_warm_up_is_over(step: int) -> None:
    inputs = NoisedData(Discrete(VALUES, THEN), warmup=Discrete(VALUES, FIRST), warmup_steps=5)
    batch = tiny.batch(400, 2, 2)
    _, t = inputs(batch, RectifiedFlow(), step)
    assert t.tolist() == _reference_levels(batch.draws.uniform("inputs/t"), FIRST if step < 5 else THEN)
    counts = {value: int((t == value).sum()) for value in VALUES}
    for value, probability in zip(VALUES, FIRST if step < 5 else THEN, strict=True):
        assert counts[value] == pytest.approx(400 * probability, abs=40)
    assert step >= 5 or counts[1.0] == counts[0.75] == 0
    assert inputs.few_levels == VALUES and inputs.visited(4) == VALUES, "it is sampled at all levels"


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["before", "at", "after"])
def test_a_run_that_goes_on_ends_its_warm_up_at_the_same_update(
    stop: int, sd3_folder: Path, sd3_latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LADD's recipe with a warm-up of three updates, each of two batches, stopped around its end."""
    asked: list[tuple[int, list[float]]] = []
    ask = NoisedData.__call__

    def noted(self: NoisedData, batch: Any, process: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x_t, t = ask(self, batch, process, step)
        asked.append((step, t.tolist()))
        return x_t, t

    monkeypatch.setattr(NoisedData, "__call__", noted)
    options = {"model__inputs__warmup_steps": 3, "model__accumulate": 2}
    for steps in (stop, 5):
        arguments = fit_arguments(
            "ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=steps, **options
        )
        main([*arguments, "--ckpt_path", "last"])
    assert logged(tmp_path)["step"][-1] == 5
    drawn = [tiny.draws(16, batch).uniform("inputs/t") for batch in range(10)]
    expected = [(n // 2, _reference_levels(u, FIRST if n // 2 < 3 else THEN)) for n, u in enumerate(drawn)]
    assert asked == expected
