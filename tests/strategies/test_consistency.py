from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.batch import Batch, Sample
from distill.diffusion.levels import Evenly
from distill.diffusion.process import VariancePreserving
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.consistency import ConsistencyDistillation
from tests import tiny

B = 4
FAMILIES = {
    "sd": tiny.sd_denoiser,
    "v": lambda seed: tiny.sd_denoiser(seed, "v_prediction"),
    "sd3": tiny.sd3_denoiser,
}


class Scene:
    """The term at work with a teacher and a target network of their own."""

    def __init__(self, family: str = "sd", **settings: Any):
        make = FAMILIES[family]
        self.teacher, self.target = (make(seed=seed).requires_grad_(False) for seed in (1, 2))
        given = tiny.batch(B)
        constant = lambda prompt: tiny.cond(1, seed=100 + len(prompt))  # noqa: E731
        self.batch = Batch(given.x0, given.cond, given.prompts, given.draws, constant=constant)
        self.t = torch.tensor([1.0, 0.5, 0.02, 0.26])
        self.x_t = self.teacher.process.add_noise(given.x0, self.t, given.draws.like("noise", given.x0))
        self.sample = Sample(
            given.draws.like("answer", given.x0), self.x_t, self.t, lambda latents: latents, self.target
        )
        self.term = ConsistencyDistillation(**settings)
        process: Any = SimpleNamespace(process=lambda: self.teacher.process)
        self.term.configure(process, Frozen(self.teacher))

    def loss(self) -> Tensor:
        return self.term.student_loss(self.sample, self.batch, 0)


def _reference_target(scene: Scene, lower: Tensor, guidance: Tensor) -> Tensor:
    """One step of DDIM, or of Euler, written out sample by sample, and the target network's answer behind it."""
    answers = []
    for i in range(B):
        x, t, s = scene.x_t[i : i + 1], scene.t[i : i + 1], lower[i : i + 1]
        asked = scene.teacher(x, t, {name: tensor[i : i + 1] for name, tensor in scene.batch.cond.items()})
        nothing = scene.teacher(x, t, scene.batch.constant(""))  # type: ignore[misc]
        x0 = nothing + guidance[i] * (asked - nothing)
        (alpha, sigma), (alpha_s, sigma_s) = (scene.teacher.process.alpha_sigma(level) for level in (t, s))
        below = alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma
        cond = {name: tensor[i : i + 1] for name, tensor in scene.batch.cond.items()}
        answers.append(below if s == 0 else scene.target(below, s, cond))
    return torch.cat(answers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [1, 5])
def test_target_is_the_answer_below_on_the_teachers_path(family: str, skip: int) -> None:
    scene = Scene(family, skip=skip, guidance=3.0, distance="mse")
    lower = torch.tensor([1.0 - skip / 50, 0.5 - skip / 50, 0.0, max(0.26 - skip / 50, 0)])
    target = _reference_target(scene, lower, torch.full((B,), 3.0))
    expected = (scene.sample.x0 - target).square().mean()
    torch.testing.assert_close(scene.loss(), expected, rtol=1e-4, atol=1e-5)


def test_guidance_is_drawn_for_each_sample() -> None:
    scene = Scene(guidance=[2.0, 6.0], distance="l1")
    drawn = 2 + 4 * scene.batch.draws.uniform("consistency/guidance")
    target = _reference_target(scene, torch.tensor([0.98, 0.48, 0.0, 0.24]), drawn)
    torch.testing.assert_close(scene.loss(), (scene.sample.x0 - target).abs().mean(), rtol=1e-4, atol=1e-5)


def test_network_is_asked_once_and_nothing_flows_into_teacher_or_target() -> None:
    scene = Scene("sd3")
    asked, targeted = tiny.watch(scene.teacher), tiny.watch(scene.target)
    for parameter in [*scene.teacher.parameters(), *scene.target.parameters()]:
        parameter.requires_grad_()
    gradient = scene.sample.gradient(scene.loss())
    assert [len(asked), len(asked.t[0]), len(targeted)] == [1, 2 * B, 1]
    assert gradient["x0"].abs().sum() > 0
    assert all(p.grad is None for p in [*scene.teacher.parameters(), *scene.target.parameters()])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("skip", [1, 3])
def test_steps_down_the_grid_the_student_is_trained_on(shift: float, skip: int) -> None:
    levels = torch.tensor([*Evenly(50, shift).values, 0.0])
    lower = ConsistencyDistillation(levels=50, skip=skip, shift=shift).lower(levels)
    expected = torch.cat([levels[skip:], torch.zeros(skip)])
    torch.testing.assert_close(lower, expected, atol=1e-5, rtol=0)
    assert (lower[-1 - skip :] == 0).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"distance": "lpips"}, "distance 'lpips' is unknown; choose one of mse, pseudo_huber, l1"),
        ({"skip": 0}, "steps down skip of its levels, 1 to 50; got skip=0"),
        ({"skip": 51}, "got skip=51, levels=50"),
        ({"guidance": [5.0, 3.0]}, r"a number or \[lowest, highest\]; got \[5.0, 3.0\]"),
        ({"shift": 0.0}, "shift must be positive"),
    ],
)
def test_refuses_settings_that_are_none(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ConsistencyDistillation(**settings)


def test_refuses_levels_that_lead_to_none_of_themselves() -> None:
    grid, few = Evenly(50).values, [1.0, 0.75, 0.5, 0.25]
    for settings, levels in (
        ({}, grid),
        ({}, []),
        ({"levels": 4}, few),
        ({"levels": 50, "shift": 3.0}, Evenly(50, 3.0).values),
    ):
        ConsistencyDistillation(**settings).check_levels(levels)
    with pytest.raises(
        ConfigError, match=r"steps of 0.02 lead from 1, 0.75, 0.5, 0.25 to 0.98, 0.73, 0.48, 0.23, where"
    ):
        ConsistencyDistillation().check_levels(few)


def test_refuses_a_student_off_the_teachers_path() -> None:
    teacher = Frozen(tiny.sd_denoiser())
    other: Any = SimpleNamespace(process=lambda: VariancePreserving(torch.linspace(0.99, 1e-7, 1000), "v_prediction"))
    with pytest.raises(ConfigError, match="remove rescale_betas_zero_snr"):
        ConsistencyDistillation().configure(other, teacher)
    clean: Any = SimpleNamespace(process=lambda: VariancePreserving(tiny.stable_diffusion_alphas(), "sample"))
    with pytest.raises(ConfigError, match="set model.schedule.prediction_type to v_prediction"):
        ConsistencyDistillation().configure(clean, teacher)
