import pytest
import torch
from torch import Tensor, nn

from distill.batch import Batch, Sample
from distill.diffusion.levels import Discrete, Uniform
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.score_distillation import ScoreDistillation
from tests import tiny

B = 4


class Decoder(nn.Module):
    """Latents to pictures by one convolution, with a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.network, self.calls = nn.ConvTranspose2d(tiny.CHANNELS, 3, 2, stride=2), 0

    def forward(self, latents: Tensor) -> Tensor:
        self.calls += 1
        return self.network(latents)


class Scene:
    """The term at work on a tiny teacher: U-Net with noise prediction, or MMDiT on a flow."""

    def __init__(self, family: str = "sd", **settings):
        make = {"sd": tiny.sd_denoiser, "sd3": tiny.sd3_denoiser}[family]
        self.teacher, self.decoder = make(seed=1).requires_grad_(False), Decoder().requires_grad_(False)
        given = tiny.batch(B)
        self.batch = Batch(given.x0, given.cond, given.prompts, given.draws, None, None, self.decoder, self.constant)
        self.answer = (given.draws.like("answer", given.x0)).requires_grad_()
        self.sample = Sample(self.answer * 1.0, given.x0, torch.ones(B), self.decoder)
        self.term = ScoreDistillation(**settings)
        self.term.configure(None, Frozen(self.teacher))  # type: ignore[arg-type]
        self.calls = tiny.watch(self.teacher)

    def constant(self, prompt: str) -> dict[str, Tensor]:
        return tiny.cond(1, seed=100 + len(prompt))

    def noised(self) -> tuple[Tensor, Tensor, Tensor]:
        """`t`, the noise and `x_t` as the term draws them."""
        t = self.term.levels.draw(self.batch.draws, "score/t")
        noise = self.batch.draws.like("score/noise", self.sample.x0)
        return t, noise, self.teacher.process.add_noise(self.sample.x0.detach(), t, noise)

    def gradient(self) -> Tensor:
        return torch.autograd.grad(self.term.student_loss(self.sample, self.batch, 0), self.sample.x0)[0]


def _columns(*values: Tensor) -> list[Tensor]:
    return [value[:, None, None, None] for value in values]


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_exponential_distance_in_pixels(family: str) -> None:
    scene = Scene(family)
    t, _, x_t = scene.noised()
    alpha, _ = scene.teacher.process.alpha_sigma(t)
    target = scene.decoder(scene.teacher(x_t, t, scene.batch.cond))
    pixels = scene.decoder(scene.sample.x0)
    expected = sum(alpha[i] * ((pixels[i] - target[i]) ** 2).mean() for i in range(B)) / B
    torch.testing.assert_close(scene.term.student_loss(scene.sample, scene.batch, 0), expected)


def test_sds_is_the_gradient_of_score_distillation_sampling() -> None:
    """grad = w(t) (eps_teacher - eps) with w = sigma^2 (appendix A), over the number of values the mean is over."""
    scene = Scene(weighting="sds", space="latents", guidance=3.0, levels=Uniform(0.1, 0.9))
    t, noise, x_t = scene.noised()
    _, sigma = _columns(*scene.teacher.process.alpha_sigma(t))
    asked, nothing = (
        scene.teacher.process.to_noise(scene.teacher(x_t, t, cond), x_t, t)
        for cond in (scene.batch.cond, scene.batch.cond_of(""))
    )
    predicted = nothing + 3.0 * (asked - nothing)
    expected = sigma**2 * (predicted - noise) / scene.sample.x0.numel()
    torch.testing.assert_close(scene.gradient(), expected, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("level", [0.1, 0.7])
def test_nfsd_is_the_noise_free_direction(level: float) -> None:
    """grad = w(t) (delta_D + s delta_C) (arXiv 2310.17590, Eq. 10), its domain part by level."""
    scene = Scene(weighting="nfsd", space="latents", guidance=7.5, levels=Discrete([level]))
    t, _, x_t = scene.noised()
    _, sigma = _columns(*scene.teacher.process.alpha_sigma(t))
    noises = [
        scene.teacher.process.to_noise(scene.teacher(x_t, t, cond), x_t, t)
        for cond in (scene.batch.cond, scene.batch.cond_of(""), scene.batch.cond_of(scene.term.negative))
    ]
    domain = noises[1] if level < 0.2 else noises[1] - noises[2]
    expected = sigma**2 * (domain + 7.5 * (noises[0] - noises[1])) / scene.sample.x0.numel()
    torch.testing.assert_close(scene.gradient(), expected, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("weighting", ["exponential", "sds", "nfsd"])
def test_nothing_flows_through_the_teacher(weighting: str) -> None:
    scene = Scene(weighting=weighting, space="latents", guidance=2.0)
    flows = []
    scene.teacher.register_forward_hook(lambda module, inputs, output: flows.append(output.requires_grad))
    scene.gradient()
    assert len(flows) == (3 if weighting == "nfsd" else 1) and not any(flows)


def test_teacher_walks_down_evenly() -> None:
    scene = Scene("sd3", teacher_steps=4, space="latents")
    t, _, x_t = scene.noised()
    scene.term.student_loss(scene.sample, scene.batch, 0)
    for call, left in zip(scene.calls.t, (4, 3, 2, 1), strict=True):
        torch.testing.assert_close(call, t * left / 4)
    scene.calls.t.clear()
    level = t
    for left in (4, 3, 2):
        x0 = scene.teacher(x_t, level, scene.batch.cond)
        lower = t * (left - 1) / 4
        velocity = (x_t - x0) / level[:, None, None, None]
        x_t, level = x_t + (lower - level)[:, None, None, None] * velocity, lower
    target = scene.teacher(x_t, level, scene.batch.cond)
    expected = ((1 - t) * (scene.sample.x0 - target).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(scene.term.student_loss(scene.sample, scene.batch, 0), expected)


def test_sample_is_decoded_once_with_gradient_and_the_target_once_without() -> None:
    scene = Scene()
    scene.sample.gather(scene.sample.gradient(scene.term.student_loss(scene.sample, scene.batch, 0)))
    assert scene.decoder.calls == 2
    scene.sample.gather(scene.sample.gradient(scene.term.student_loss(scene.sample, scene.batch, 0)))
    assert scene.decoder.calls == 3, "the sample was decoded again"
    scene.sample.backward()
    assert scene.answer.grad is not None and scene.answer.grad.any()


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="weighting 'cosine' is unknown; choose one of exponential, sds, nfsd"):
        ScoreDistillation(weighting="cosine")
    with pytest.raises(ConfigError, match="space 'wavelets' is unknown; choose one of pixels, latents"):
        ScoreDistillation(space="wavelets")
    with pytest.raises(ConfigError, match="needs guidance above 1"):
        ScoreDistillation(weighting="nfsd")
    with pytest.raises(ConfigError, match="teacher_steps of 1 or more, got 0"):
        ScoreDistillation(teacher_steps=0)
