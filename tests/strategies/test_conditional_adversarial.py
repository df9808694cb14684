from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn.functional import softplus

from distill.adversarial.gan import ApproximateR1, ExactR1
from distill.adversarial.unet import BlockCritic, UNetCritic
from distill.batch import Batch, Sample
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.conditional_adversarial import ConditionalAdversarial
from tests import tiny

B = 6
FAMILIES = {"unet": tiny.sd_denoiser, "mmdit": tiny.sd3_denoiser}


class Game:
    """A critic on a tiny teacher, a batch of pairs and a student's answer."""

    def __init__(self, family: str = "unet", size: int = B, **settings: Any):
        batch = tiny.batch(size)
        self.batch = replace(batch, noise=batch.draws.like("noise", batch.x0))
        self.teacher = FAMILIES[family](seed=1)
        self.strategy = ConditionalAdversarial(**settings)
        torch.manual_seed(2)
        backbone: Any = SimpleNamespace(denoiser=lambda: FAMILIES[family](seed=1), latent_shape=lambda: (4, 8, 12))
        self.strategy.configure(backbone, Frozen(self.teacher))
        self.student = torch.nn.Conv2d(4, 4, 1)
        self.sample = Sample(self.student(self.batch.noise), self.batch.noise, torch.ones(size), _no_pixels)  # type: ignore[arg-type]

    @property
    def critic(self) -> Any:
        return self.strategy.critic


def _no_pixels(latents: Tensor) -> Tensor:
    raise AssertionError("this critic decodes nothing")


def gradients(module: torch.nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("multi_scale", [True, False])
def test_readouts(family: str, multi_scale: bool) -> None:
    """Three per scale of the U-Net's decoder at its sizes, one per block of the transformer; else the last one
    alone.
    """
    game = Game(family, multi_scale=multi_scale)
    shapes = [tuple(head.shape[1:]) for head in game.critic(game.batch.x0, game.batch.noise, game.batch.cond)]
    everything = {"unet": [(4, 6)] * 3 + [(8, 12)] * 3, "mmdit": [(4, 6)] * 2}[family]
    assert shapes == (everything if multi_scale else everything[-1:])
    assert isinstance(game.critic, {"unet": UNetCritic, "mmdit": BlockCritic}[family])


def test_the_readouts_are_of_skip_below_and_both() -> None:
    """What the readouts see, against a plain run of the teacher's own stages with the latent fed in by hand."""
    game = Game()
    with torch.no_grad():
        game.critic.enter["0"].weight.normal_()
        seen: list[Tensor] = []
        for readout in game.critic.readouts:
            readout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        x, cond = game.batch.x0, game.batch.cond
        game.critic(x, game.batch.noise, cond)

        network, text = game.teacher.network, cond["text"]
        emb = network.time_embedding(network.time_proj(torch.zeros(B)).float())
        h = network.conv_in(x)
        skips = [h]
        h, some = network.down_blocks[0](h, emb, text)
        h = h + torch.nn.functional.conv2d(
            torch.nn.functional.avg_pool2d(x, 2), game.critic.enter["0"].weight, game.critic.enter["0"].bias, padding=1
        )
        skips += [*some[:-1], h]
        h, some = network.down_blocks[1](h, emb)
        skips += some
        h = network.mid_block(h, emb, text)
        for index, block in enumerate(network.up_blocks):
            mine, skips = skips[-2:], skips[:-2]
            assert torch.allclose(seen[3 * index], mine[-1], atol=1e-5)
            assert torch.allclose(seen[3 * index + 1], h, atol=1e-5)
            kwargs = {"encoder_hidden_states": text} if index else {}
            h = block(h, tuple(mine), emb, **kwargs)
        assert torch.allclose(seen[5], h, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_teacher_and_blind_to_the_noise(family: str) -> None:
    game = Game(family)
    own, given = game.critic.denoiser.network.state_dict(), game.teacher.network.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items())
    x, cond = game.batch.x0, game.batch.cond
    a, b = (game.critic(x, noise, cond) for noise in (game.batch.noise, -game.batch.noise))
    assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))
    torch.nn.init.ones_(game.critic.noise.weight)
    c = game.critic(x, game.batch.noise, cond)
    assert not any(torch.equal(i, j) for i, j in zip(a, c, strict=True))
    assert Game(family, noise=False).critic.noise is None
    fresh = Game(family, pretrained=False).critic.denoiser.network.state_dict()
    assert not all(torch.equal(tensor, given[name]) for name, tensor in fresh.items())


def test_the_prompt_is_read() -> None:
    game = Game()
    other = {name: tensor.flip(0) for name, tensor in game.batch.cond.items()}
    a = game.critic(game.batch.x0, game.batch.noise, game.batch.cond)
    b = game.critic(game.batch.x0, game.batch.noise, other)
    assert not torch.allclose(a[-1], b[-1])


def test_losses_are_means_over_places_heads_and_batch() -> None:
    game = Game(mixed_latents=0, mixed_prompts=0, mixed_noises=0)
    real = game.critic(game.batch.x0, game.batch.noise, game.batch.cond)
    fake = game.critic(game.sample.x0, game.batch.noise, game.batch.cond)
    expected = sum(softplus(-r).mean() + softplus(f).mean() for r, f in zip(real, fake, strict=True)) / len(real)
    terms = game.strategy.critic_loss(game.sample, game.batch, 0)
    assert set(terms) == {"game"} and torch.allclose(terms["game"], expected, rtol=1e-5)  # type: ignore[arg-type]
    student = sum(softplus(-f).mean() for f in fake) / len(fake)
    assert torch.allclose(game.strategy.student_loss(game.sample, game.batch, 0), student, rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "kind"), [("mixed_latents", 0), ("mixed_prompts", 1), ("mixed_noises", 2)])
def test_mixed_fakes_are_real_latents_that_do_not_belong(share: str, kind: int) -> None:
    shares = {"mixed_latents": 0.0, "mixed_prompts": 0.0, "mixed_noises": 0.0} | {share: 0.9999}
    game = Game(size=7, **shares)
    batch = game.batch
    assert batch.noise is not None
    x, noise, cond = game.strategy._mix(game.sample.x0.detach(), batch.noise, batch)
    other = [1, 0, 3, 2, 5, 4, 5]
    assert torch.equal(x, batch.x0[other] if kind == 0 else batch.x0)
    assert torch.equal(noise, batch.noise[other] if kind == 2 else batch.noise)
    for name, tensor in batch.cond.items():
        assert torch.equal(cond[name], tensor[other] if kind == 1 else tensor)


def test_the_shares_of_mixed_fakes() -> None:
    game = Game(size=2000, mixed_latents=0.1, mixed_prompts=0.2, mixed_noises=0.3)
    assert game.batch.noise is not None
    mine = game.sample.x0.detach()
    x, noise, cond = game.strategy._mix(mine, game.batch.noise, game.batch)
    student = (x == mine).flatten(1).all(1).float().mean()
    latents = 1 - ((x == mine) | (x == game.batch.x0)).flatten(1).all(1).float().mean()
    prompts = (cond["pooled"] != game.batch.cond["pooled"]).any(1).float().mean()
    noises = (noise != game.batch.noise).flatten(1).any(1).float().mean()
    assert [float(v) for v in (student, latents, prompts, noises)] == pytest.approx([0.4, 0.1, 0.2, 0.3], abs=0.04)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_r1_of_one_sample_against_a_finite_difference(family: str) -> None:
    game = Game(family, r1=ExactR1(2.0, every=16), r1_samples=1)
    penalty = game.strategy.critic_loss(game.sample, game.batch, 16)["r1"]
    assert game.batch.noise is not None
    x = game.batch.x0[:1].double().requires_grad_()
    cond = {name: tensor[:1].double() for name, tensor in game.batch.cond.items()}
    critic = game.critic.double()
    logits = critic(x, game.batch.noise[:1].double(), cond)
    score = torch.stack([head.double().mean() for head in logits]).mean()
    (gradient,) = torch.autograd.grad(score, x)
    assert penalty.item() == pytest.approx(2 * 16 * gradient.square().sum().item(), rel=1e-3)


def test_r1_is_lazy_and_reaches_the_network() -> None:
    game = Game(r1=ExactR1(1.0, every=16))
    assert set(game.strategy.critic_loss(game.sample, game.batch, 15)) == {"game"}
    game.strategy.critic_loss(game.sample, game.batch, 32)["r1"].backward()
    reached = [g for g in gradients(game.critic.denoiser) if g is not None and g.abs().sum() > 0]
    assert len(reached) > 20


def test_approximate_r1_is_near_the_exact_one_on_average() -> None:
    """E |D(x + s e) - D(x)|^2 = s^2 |grad D|^2 for a small s."""
    game = Game(r1=ApproximateR1(1.0, sigma=1e-2), r1_samples=B)
    exact = Game(r1=ExactR1(1.0), r1_samples=B)
    values = []
    for number in range(60):
        game.batch = replace(game.batch, draws=tiny.draws(B, batch=number))
        values.append(game.strategy.critic_loss(game.sample, game.batch, 0)["r1"].item())
    penalty = exact.strategy.critic_loss(exact.sample, exact.batch, 0)["r1"].item()
    assert sum(values) / len(values) / 1e-4 == pytest.approx(penalty, rel=0.2)


def test_a_finite_difference_needs_no_pass_of_its_own() -> None:
    game = Game(r1=ApproximateR1(1.0), r1_samples=2)
    asked: list[int] = []
    game.critic.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    game.strategy.critic_loss(game.sample, game.batch, 0)
    assert asked == [2 * B + 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_critics_turn_moves_all_of_it_and_nothing_else(family: str) -> None:
    game = Game(family)
    with torch.no_grad():  # what begins at 0 lets nothing through at first
        for convolution in (game.critic.noise, *getattr(game.critic, "enter", {}).values()):
            convolution.weight.normal_()
    torch.stack(list(game.strategy.critic_loss(game.sample, game.batch, 0).values())).sum().backward()
    idle = [name for name, p in game.critic.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == [] or family == "mmdit"
    # the transformer's last block keeps nothing of its text tokens, its output layers are not read
    assert all("norm_out" in n or "proj_out" in n or "blocks.1" in n for n in idle), idle
    assert game.sample.x0.grad is None and gradients(game.student) == [None, None]
    assert set(gradients(game.teacher)) == {None}


def test_the_students_turn_reaches_the_student_alone() -> None:
    game = Game()
    game.sample.gather(game.sample.gradient(game.strategy.student_loss(game.sample, game.batch, 0)))
    game.sample.backward()
    assert set(gradients(game.critic)) == {None}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(game.student))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="below 1 together; got 0.5, 0.25, 0.25"):
        ConditionalAdversarial(mixed_latents=0.5)
    with pytest.raises(ConfigError, match="r1_samples must be 1 or more"):
        ConditionalAdversarial(r1_samples=0)
    with pytest.raises(ConfigError, match="a strategy's weight is a number or balanced, got 'heavy'"):
        ConditionalAdversarial(weight="heavy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 2 samples per process, got 1"):
        ConditionalAdversarial().check(1)
    ConditionalAdversarial(mixed_latents=0, mixed_prompts=0, mixed_noises=0).check(1)
    with pytest.raises(ConfigError, match="set r1 to ApproximateR1"):
        ConditionalAdversarial(r1=ExactR1()).check_sharded()
    ConditionalAdversarial(r1=ApproximateR1()).check_sharded()
    game = Game()
    with pytest.raises(ConfigError, match="it needs PairsData"):
        game.strategy.student_loss(game.sample, Batch(game.batch.x0, game.batch.cond, [], game.batch.draws), 0)


def test_a_critic_judges_with_its_new_weights_in_half_precision() -> None:
    """It is asked, updated and asked again within one step, where casts of weights must not be kept."""
    game = Game()
    game.critic.requires_grad_(True)
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        (before, *_) = game.critic(game.batch.x0, game.batch.noise, game.batch.cond)
        with torch.no_grad():
            for parameter in game.critic.parameters():
                parameter.add_(0.1)
        (after, *_) = game.critic(game.batch.x0, game.batch.noise, game.batch.cond)
    assert not torch.equal(before, after)


def test_a_finite_difference_is_of_the_latent_alone() -> None:
    """Beside the same noise and prompt; a critic that begins blind to the noise would not show another in its score."""
    game = Game(r1=ApproximateR1(1.0, sigma=0.05), r1_samples=2)
    asked: list[Any] = []
    game.critic.register_forward_pre_hook(lambda module, inputs: asked.append(inputs))
    game.strategy.critic_loss(game.sample, game.batch, 0)
    ((x, noise, cond),) = asked
    assert torch.equal(noise[2 * B :], noise[:2])
    assert all(torch.equal(tensor[2 * B :], tensor[:2]) for tensor in cond.values())
    assert (x[2 * B :] - x[:2]).std().item() == pytest.approx(0.05, rel=0.1)
