import pytest
import torch
from torch import Tensor, nn

from distill.batch import Draws, Sample, length
from tests.tiny import CPU, draws


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_the_numbers_of_a_global_batch_do_not_depend_on_the_number_of_processes(ranks, kind):
    whole = getattr(draws(8), kind)("noise", 3, 2)
    share = 8 // ranks
    parts = [getattr(draws(share, first=rank * share), kind)("noise", 3, 2) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch": 1}, {"first": 1}])
def test_another_seed_batch_or_sample_draws_other_numbers(other):
    here = draws(1).normal("noise", 64)
    there = draws(1, **other).normal("noise", 64)
    assert (here - there).abs().min() > 0


def test_purposes_and_samples_are_independent():
    a, b = draws(64).normal("critic", 256), draws(64).normal("student", 256)
    together = torch.cat([a, b])
    correlation = together.corrcoef() - torch.eye(128)
    assert correlation.abs().max() < 0.4  # 6 standard deviations of 1 / sqrt(256)


def test_one_purpose_does_not_shift_another():
    once, twice = draws(4), draws(4)
    twice.normal("critic", 100)
    assert torch.equal(once.normal("student", 5), twice.normal("student", 5))
    assert torch.equal(once.normal("student", 5), once.normal("student", 5))


def test_the_numbers_are_standard_normal_and_uniform():
    source = draws(100)
    normal, uniform = source.normal("n", 400), source.uniform("u", 400)
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((0, 1), abs=0.02)
    assert (uniform.mean().item(), uniform.std().item()) == pytest.approx((0.5, 12**-0.5), abs=0.01)
    assert 0 <= uniform.min() and uniform.max() < 1


def test_like_has_the_shape_of_its_model_in_float32():
    x = torch.zeros(3, 4, 5, 6, dtype=torch.float16)
    drawn = draws(3).like("noise", x)
    assert drawn.shape == x.shape and drawn.dtype == torch.float32
    assert torch.equal(drawn, draws(3).normal("noise", 4, 5, 6))


def test_generators_are_one_per_sample_and_as_independent():
    drawn = [torch.rand(64, generator=generator) for generator in draws(4, first=2).generators("sampler")]
    assert torch.equal(torch.stack(drawn[1:]), torch.stack([
        torch.rand(64, generator=generator) for generator in draws(3, first=3).generators("sampler")
    ]))  # fmt: skip
    other = [torch.rand(64, generator=generator) for generator in draws(4, first=2, seed=1).generators("sampler")]
    assert not any(torch.equal(one, two) for one in drawn for two in other), "another seed repeats no sample's noise"


def test_every_one_of_the_seed_parts_is_told_apart():
    keys = [Draws(1, 11, 0, 1, CPU), Draws(11, 1, 0, 1, CPU), Draws(1, 1, 10, 1, CPU), Draws(1, 1, 1, 1, CPU)]
    assert len({key.uniform("x").item() for key in keys}) == 4


class Scene:
    """A student, a decoder that counts its passes, and a critic, all small."""

    def __init__(self):
        torch.manual_seed(0)
        self.student = nn.Conv2d(4, 4, 3, padding=1)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 3, 2, 2), nn.Tanh())
        self.critic = nn.Conv2d(4, 2, 1)
        self.image_critic = nn.Conv2d(3, 1, 3)
        self.x_t, self.t = torch.randn(2, 4, 6, 4), torch.tensor([1.0, 0.5])
        self.forwards = self.backwards = 0

    def decode(self, latents: Tensor) -> Tensor:
        self.forwards += 1
        pixels = self.decoder(latents)
        pixels.register_hook(self._count)
        return pixels

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1

    def sample(self) -> Sample:
        return Sample(self.student(self.x_t), self.x_t, self.t, self.decode)

    def latent_loss(self, x0: Tensor) -> Tensor:
        return self.critic(x0).square().mean()

    def pixel_loss(self, pixels: Tensor) -> Tensor:
        return self.image_critic(pixels).exp().mean()

    def both_loss(self, x0: Tensor, pixels: Tensor) -> Tensor:
        return (x0.mean() - pixels.square().mean()).square()

    def reference_gradients(self) -> list[Tensor]:
        x0 = self.student(self.x_t)
        pixels = self.decoder(x0)
        loss = self.latent_loss(x0) + 0.3 * self.pixel_loss(pixels) + 2 * self.both_loss(x0, pixels)
        return list(torch.autograd.grad(loss, list(self.student.parameters())))

    @property
    def student_gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.student.parameters()]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def _gather_all(scene: Scene, sample: Sample) -> None:
    sample.gather(sample.gradient(scene.latent_loss(sample.x0)))
    sample.gather(sample.gradient(scene.pixel_loss(sample.pixels)), 0.3)
    sample.gather(sample.gradient(scene.both_loss(sample.x0, sample.pixels)), torch.tensor(2.0))


def test_terms_gathered_one_by_one_give_the_gradient_of_the_summed_loss(scene):
    sample = scene.sample()
    _gather_all(scene, sample)
    sample.backward()
    torch.testing.assert_close(scene.student_gradients, scene.reference_gradients(), atol=1e-6, rtol=1e-6)


def test_the_student_and_the_decoder_run_once_however_many_terms_ask(scene):
    sample = scene.sample()
    answers = []
    sample.answer.register_hook(answers.append)
    _gather_all(scene, sample)
    assert (scene.forwards, scene.backwards, len(answers)) == (1, 0, 0)
    sample.backward()
    assert (scene.forwards, scene.backwards, len(answers)) == (1, 1, 1)


def test_no_one_but_the_student_gets_a_gradient(scene):
    sample = scene.sample()
    _gather_all(scene, sample)
    sample.backward()
    others = [*scene.critic.parameters(), *scene.image_critic.parameters(), *scene.decoder.parameters()]
    assert [parameter.grad for parameter in others] == [None] * len(others)
    assert all(gradient.abs().sum() > 0 for gradient in scene.student_gradients)


def test_pixels_nobody_asked_for_are_never_decoded(scene):
    sample = scene.sample()
    sample.gather(sample.gradient(scene.latent_loss(sample.x0)))
    sample.backward()
    assert (scene.forwards, scene.backwards) == (0, 0)
    expected = torch.autograd.grad(scene.latent_loss(scene.student(scene.x_t)), list(scene.student.parameters()))
    torch.testing.assert_close(scene.student_gradients, list(expected), atol=1e-6, rtol=1e-6)


def test_pixels_a_critic_looked_at_without_gradient_still_lead_the_student(scene):
    sample = scene.sample()
    with torch.no_grad():
        seen = sample.pixels
    sample.gather(sample.gradient(scene.pixel_loss(sample.pixels)))
    sample.backward()
    expected = torch.autograd.grad(
        scene.pixel_loss(scene.decoder(scene.student(scene.x_t))), list(scene.student.parameters())
    )
    assert sample.pixels is seen
    torch.testing.assert_close(scene.student_gradients, list(expected), atol=1e-6, rtol=1e-6)


def test_the_length_of_a_gradient_is_over_both_leaves(scene):
    sample = scene.sample()
    x0, pixels = sample.x0.detach().requires_grad_(), sample.pixels.detach().requires_grad_()
    sample.gather(sample.gradient(5 * scene.latent_loss(sample.x0)))
    first, second = torch.autograd.grad(scene.both_loss(x0, pixels), [x0, pixels])
    expected = (first.square().sum() + second.square().sum()).sqrt()
    torch.testing.assert_close(length(sample.gradient(scene.both_loss(sample.x0, sample.pixels))), expected)


def test_a_gradient_at_the_pixels_is_told_at_the_latent(scene):
    sample = scene.sample()
    gradient = sample.gradient(scene.both_loss(sample.x0, sample.pixels))
    x0 = sample.x0.detach().requires_grad_()
    (expected,) = torch.autograd.grad(scene.both_loss(x0, scene.decoder(x0)), x0)
    torch.testing.assert_close(sample.at_latent(gradient), expected, atol=1e-6, rtol=1e-5)
    assert sample.gathered == {}
    sample.gather(gradient)  # the decoder's graph is still there
    sample.backward()


def test_backward_scales_what_was_gathered(scene):
    sample = scene.sample()
    _gather_all(scene, sample)
    sample.backward(0.25)
    expected = [gradient / 4 for gradient in scene.reference_gradients()]
    torch.testing.assert_close(scene.student_gradients, expected, atol=1e-6, rtol=1e-6)


def test_the_leaves_are_cut_off_from_the_student(scene):
    sample = scene.sample()
    assert sample.x0.is_leaf and sample.pixels.is_leaf
    assert torch.equal(sample.x0, sample.answer)
    torch.testing.assert_close(sample.pixels, scene.decoder(sample.answer))


def test_common_draw_is_the_same_on_every_process() -> None:
    whole, second = draws(4), draws(2, first=2)
    assert torch.equal(whole.common("crop", 3), second.common("crop", 3))
    assert not torch.equal(whole.common("crop", 3), whole.common("other", 3))
    assert not torch.equal(whole.common("crop", 3), draws(4, batch=1).common("crop", 3))


def test_backward_passes_run_without_autocast(scene):
    """Lightning's autocast spans the training step, and is meant for its forward passes only."""
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        sample = scene.sample()
        loss = scene.pixel_loss(sample.pixels)
        loss.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        sample.answer.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        sample.gather(sample.gradient(loss))
        sample.backward()
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False]
