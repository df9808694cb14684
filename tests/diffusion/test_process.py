import pytest
import torch
from torch import Tensor

from distill.diffusion.process import PREDICTIONS, Process, RectifiedFlow, VariancePreserving
from tests.tiny import stable_diffusion_alphas

LEVELS = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])


def _process(kind: str, prediction: str) -> Process:
    if kind == "flow":
        return RectifiedFlow(prediction=prediction)
    return VariancePreserving(stable_diffusion_alphas(), prediction)


def _reference_alpha_sigma(kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "flow":
        return 1 - t, t
    kept = torch.stack([stable_diffusion_alphas()[round(1000 * level) - 1] for level in t.tolist()])
    return kept.sqrt(), (1 - kept).sqrt()


def _reference_output(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return alpha * noise - sigma * x0
    return noise - x0


def _column(x: Tensor) -> Tensor:
    return x[:, None, None, None]


@pytest.fixture
def x0() -> Tensor:
    return torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["flow", "vp"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_an_output_and_the_x0_it_stands_for_agree_with_the_definitions(kind, prediction, x0, noise):
    process = _process(kind, prediction)
    alpha, sigma = map(_column, _reference_alpha_sigma(kind, LEVELS))
    x_t = process.add_noise(x0, LEVELS, noise)
    output = _reference_output(prediction, x0, noise, alpha, sigma)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
    torch.testing.assert_close(process.to_x0(output, x_t, LEVELS), x0, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(process.to_output(x0, x_t, LEVELS), output, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(process.to_noise(x0, x_t, LEVELS), noise, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["flow", "vp"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_a_network_that_says_x0_is_understood(kind, prediction, x0, noise):
    process = _process(kind, prediction)
    other = x0.flip(0)
    x_t = process.add_noise(x0, LEVELS, noise)
    back = process.to_x0(process.to_output(other, x_t, LEVELS), x_t, LEVELS)
    torch.testing.assert_close(back, other, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("flow", "flow"), ("flow", "v_prediction"), ("flow", "sample")] + [("vp", name) for name in PREDICTIONS],
)
def test_pure_noise_can_be_asked(kind, prediction, x0, noise):
    process, t = _process(kind, prediction), torch.ones(5)
    x_t = process.add_noise(x0, t, noise)
    torch.testing.assert_close(process.to_x0(process.to_output(x0, x_t, t), x_t, t), x0, atol=1e-4, rtol=1e-4)
    if kind == "flow":
        assert torch.equal(x_t, noise)


@pytest.mark.parametrize("kind", ["flow", "vp"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_without_noise_the_answer_is_the_data(kind, prediction, x0, noise):
    process, t = _process(kind, prediction), torch.zeros(5)
    x_t = process.add_noise(x0, t, noise)
    output = x0 if prediction == "sample" else noise
    assert torch.equal(x_t, x0)
    assert torch.equal(process.to_x0(output, x_t, t), x0)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_steps_are_those_of_the_ddim_scheduler(prediction, x0, noise):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type=prediction, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(4)
    process = VariancePreserving(scheduler.alphas_cumprod, prediction)
    levels = [1.0, 0.75, 0.5, 0.25, 0.0]
    x_t = noise
    for k, (now, following) in enumerate(zip(levels, levels[1:], strict=False)):
        t, s = torch.full((5,), now), torch.full((5,), following)
        output = torch.sin(x_t + k)
        expected = scheduler.step(output, scheduler.timesteps[k], x_t, eta=0.0).prev_sample
        assert process.timestep(t).tolist() == [scheduler.timesteps[k]] * 5
        x_t = process.step(process.to_x0(output, x_t, t), x_t, t, s)
        torch.testing.assert_close(x_t, expected, atol=1e-4, rtol=1e-4)


def test_steps_are_those_of_the_euler_scheduler_of_a_flow(noise):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    levels = [1.0, 0.7, 0.5, 0.25, 0.0]
    scheduler.set_timesteps(sigmas=levels[:-1])
    process = RectifiedFlow()
    x_t = noise
    for k, (now, following) in enumerate(zip(levels, levels[1:], strict=False)):
        t, s = torch.full((5,), now), torch.full((5,), following)
        output = torch.sin(x_t + k)
        expected = scheduler.step(output, scheduler.timesteps[k], x_t).prev_sample
        torch.testing.assert_close(process.timestep(t), scheduler.timesteps[k].expand(5))
        x_t = process.step(process.to_x0(output, x_t, t), x_t, t, s)
        torch.testing.assert_close(x_t, expected, atol=1e-5, rtol=1e-5)


def test_a_step_with_the_true_x0_lands_on_the_same_path(x0, noise):
    process, s = _process("vp", "epsilon"), torch.full((5,), 0.3)
    x_t = process.add_noise(x0, LEVELS, noise)
    torch.testing.assert_close(process.step(x0, x_t, LEVELS, s), process.add_noise(x0, s, noise), atol=5e-5, rtol=1e-4)


def test_every_level_of_a_discrete_schedule_is_one_of_its_timesteps():
    process = _process("vp", "epsilon")
    shown = process.timestep(torch.linspace(0, 1, 5001))
    assert shown.dtype == torch.int64
    assert sorted(set(shown.tolist())) == list(range(1000))
    quarters = torch.tensor([0.25, 0.5, 0.75, 1.0])
    assert process.timestep(quarters).tolist() == [249, 499, 749, 999]


def test_a_flow_sees_levels_times_a_thousand():
    shown = RectifiedFlow(1000).timestep(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert shown.tolist() == [0.0, 250.0, 500.0, 1000.0]


def test_stable_diffusion_keeps_the_share_of_data_its_schedule_is_known_for():
    alpha, sigma = _process("vp", "epsilon").alpha_sigma(torch.tensor([1.0, 0.5]))
    assert alpha.square().tolist() == pytest.approx([0.00466, 0.2777], rel=2e-3)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(2))


def test_low_precision_input_is_computed_in_float32(x0, noise):
    process = _process("vp", "v_prediction")
    x_t = process.add_noise(x0.bfloat16(), LEVELS, noise.bfloat16())
    assert x_t.dtype == torch.float32
    assert process.to_x0(x0.bfloat16(), x_t.bfloat16(), LEVELS).dtype == torch.float32


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'velocity' is unknown; known are epsilon, sample, v_prediction, flow"):
        RectifiedFlow(prediction="velocity")


def test_the_least_noise_is_that_of_the_first_step():
    """Levels that round to 0 would hold none, and divide by it."""
    process, t = VariancePreserving(stable_diffusion_alphas()), torch.tensor([0.0, 1e-7, 4e-4, 1e-3])
    alpha, sigma = process.alpha_sigma(t)
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert bool((sigma[1:] == sigma[3]).all()) and process.timestep(t).tolist() == [0, 0, 0, 0]
    x0 = torch.zeros(4, 1, 1, 1)
    assert process.to_noise(x0, process.add_noise(x0, t, x0 + 1), t)[1:].isfinite().all()
