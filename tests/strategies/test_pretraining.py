from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill import backbones
from distill.batch import Sample
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.levels import Uniform
from distill.frozen import Frozen
from distill.strategies.inputs import NoisedData
from distill.strategies.pretraining import DiffusionPretraining
from tests import tiny


def _denoiser(prediction: str) -> Denoiser:
    return tiny.sd3_denoiser() if prediction == "flow" else tiny.sd_denoiser(prediction=prediction)


def _reference_target(prediction: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    if prediction == "epsilon":
        return noise
    if prediction == "flow":
        return noise - x0
    kept = tiny.stable_diffusion_alphas()[(1000 * t).round().long() - 1][:, None, None, None]
    return kept.sqrt() * noise - (1 - kept).sqrt() * x0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_loss_is_the_squared_error_of_the_networks_own_output(prediction):
    student, batch = _denoiser(prediction), tiny.batch(6)
    x_t, t = NoisedData(Uniform(0.01, 1.0))(batch, student.process, 0)
    output = student.predict(x_t, student.process.timestep(t), batch.cond)
    noise = batch.draws.like("inputs/noise", batch.x0)
    plain = (output - _reference_target(prediction, batch.x0, noise, t)).square().mean()
    expected = torch.autograd.grad(plain, list(student.parameters()), allow_unused=True)

    strategy = DiffusionPretraining()
    strategy.configure(SimpleNamespace(process=lambda: student.process), Frozen(_denoiser("epsilon")))
    sample = Sample(student(x_t, t, batch.cond), x_t, t, lambda latents: pytest.fail("nothing is decoded"))
    loss = strategy.student_loss(sample, batch, 0)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)

    sample.gather(sample.gradient(loss))
    sample.backward()
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_there_is_no_critic():
    assert DiffusionPretraining().critic is None


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_a_level_without_noise_keeps_the_loss_finite(prediction):
    batch, strategy = tiny.batch(2), DiffusionPretraining()
    strategy.configure(SimpleNamespace(process=lambda: _denoiser(prediction).process), Frozen(_denoiser(prediction)))
    sample = Sample(batch.x0.clone().requires_grad_(), batch.x0, torch.zeros(2), lambda latents: latents)
    assert strategy.student_loss(sample, batch, 0).item() == 0


def test_another_schedule_than_the_teachers_is_the_students(sd_folder):
    """One error of the velocity everywhere counts the same at every level, pure noise included."""
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    student, teacher = backbones.load(str(sd_folder), schedule=schedule), backbones.load(str(sd_folder))
    process, batch, strategy = student.process(), tiny.batch(4), DiffusionPretraining()
    strategy.configure(student, Frozen(teacher.denoiser()))
    noise = batch.draws.like("noise", batch.x0)
    for level in (1.0, 0.9, 0.5, 0.1):
        t = torch.full((4,), level)
        x_t = process.add_noise(batch.x0, t, noise)
        x0 = process.to_x0(process.to_output(batch.x0, x_t, t) + 0.1, x_t, t)
        sample = Sample(x0.requires_grad_(), x_t, t, lambda latents: latents)
        assert strategy.student_loss(sample, batch, 0).item() == pytest.approx(0.01, rel=1e-3), level
