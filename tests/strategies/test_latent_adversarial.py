from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill.adversarial.gan import ApproximateR1, ExactR1, Hinge, Logistic, mean_logit
from distill.batch import Batch, Sample
from distill.diffusion.levels import Discrete
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.latent_adversarial import LatentAdversarial
from tests import tiny

B = 4


class Game:
    """A strategy at work on a tiny teacher and student, with a note of all that the teacher was asked."""

    def __init__(self, **settings):
        self.batch = tiny.batch(B)
        self.teacher = tiny.sd3_denoiser(seed=1)
        self.student = tiny.sd3_denoiser(seed=2)
        self.strategy = LatentAdversarial(**settings)
        torch.manual_seed(3)
        self.strategy.configure(SimpleNamespace(pooled=tiny.POOLED), Frozen(self.teacher))
        self.calls = tiny.watch(self.teacher)
        t = torch.tensor([1.0, 0.75, 0.5, 0.25])
        x_t = self.student.process.add_noise(self.batch.x0, t, self.batch.draws.like("x_t", self.batch.x0))
        self.sample = Sample(self.student(x_t, t, self.batch.cond), x_t, t, _no_pixels)

    def settled(self) -> "Game":
        """The heads no longer move their estimate of the spectral norm, so that calls can be compared."""
        self.strategy.critic.eval()
        return self

    def reference_logits(self, x_t: Tensor, t: Tensor) -> list[Tensor]:
        """What the heads say of `x_t`, without taps: the image tokens of every block, as grids."""
        grids = []
        hooks = [
            block.register_forward_hook(lambda m, i, out: grids.append(out[1].mT.unflatten(2, (4, 6))))
            for block in self.teacher.network.transformer_blocks
        ]
        self.teacher(x_t, t, self.batch.cond)
        for hook in hooks:
            hook.remove()
        chosen = [grids[index] for index in self.strategy.blocks or range(len(grids))]
        return self.strategy.critic(chosen, t, self.batch.cond["pooled"])


def _no_pixels(latents: Tensor) -> Tensor:
    raise AssertionError("LADD decodes nothing")


def _noise_in(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    t = t[:, None, None, None]
    return (x_t - (1 - t) * x0) / t


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.stack([a.flatten(), b.flatten()]).corrcoef()[0, 1].item()


def test_the_critic_sees_real_and_fake_at_one_level_under_independent_noise():
    game = Game()
    game.strategy.critic_loss(game.sample, game.batch, 0)
    (x_t,), (t,), (cond,) = game.calls.x_t, game.calls.t, game.calls.cond
    assert torch.equal(t[:B], t[B:]) and len(set(t[:B].tolist())) == B
    for name, given in game.batch.cond.items():
        assert torch.equal(cond[name][:B], given) and torch.equal(cond[name][B:], given)
    real = _noise_in(x_t[:B], game.batch.x0, t[:B])
    fake = _noise_in(x_t[B:], game.sample.x0.detach(), t[B:])
    assert (real.std().item(), fake.std().item()) == pytest.approx((1, 1), abs=0.05)
    assert abs(_correlation(real, fake)) < 0.1


def test_mixed_fakes_are_the_neighbours_real_latents_under_the_prompt_as_it_was():
    game, plain = Game(mixed_latents=0.5), Game()
    for each in (game, plain):
        each.strategy.critic_loss(each.sample, each.batch, 0)
    (t,), (x_t,), (cond,), (before,) = game.calls.t, game.calls.x_t, game.calls.cond, plain.calls.x_t
    own, fakes = game.strategy._mix(game.sample.x0.detach(), game.batch)
    noise = _noise_in(before[B:], plain.sample.x0.detach(), t[B:])
    torch.testing.assert_close(x_t[B:], game.teacher.process.add_noise(fakes, t[B:], noise), atol=1e-4, rtol=1e-4)
    assert torch.equal(x_t[:B], before[:B]), "the real ones stay"
    assert all(torch.equal(cond[name][B:], given) for name, given in game.batch.cond.items())
    many, batch = torch.randn(7, *game.batch.x0.shape[1:]), tiny.batch(7)
    own, fakes = LatentAdversarial(mixed_latents=0.9999)._mix(many, batch)
    assert not own.any() and torch.equal(fakes, batch.x0[[1, 0, 3, 2, 5, 4, 5]])
    own, fakes = LatentAdversarial(mixed_latents=0.5)._mix(many, batch)
    assert 0 < own.sum() < 7 and torch.equal(fakes[own], many[own])


def test_a_process_whose_fakes_are_all_mixed_reports_no_nan():
    game = Game(mixed_latents=0.9999)
    game.strategy.critic_loss(game.sample, game.batch, 0)
    assert game.strategy.report["fake"] == 0
    logits = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])]
    assert mean_logit(logits) == 4 and mean_logit(logits, torch.tensor([False, True])) == 5


def test_mixing_needs_two_samples():
    with pytest.raises(ConfigError, match="with mixed_latents needs at least 2 samples per process, got 1"):
        LatentAdversarial(norm="group", mixed_latents=0.5).check(1)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_mixed_fakes_leaves_some_to_the_student(share):
    with pytest.raises(ConfigError, match=f"is a share of the fakes, from 0 to below 1; got {share}"):
        LatentAdversarial(mixed_latents=share)


def test_the_student_is_judged_under_noise_of_its_own():
    game = Game()
    game.strategy.critic_loss(game.sample, game.batch, 0)
    game.strategy.student_loss(game.sample, game.batch, 0)
    (critic_x_t, x_t), (critic_t, t) = game.calls.x_t, game.calls.t
    noise = _noise_in(x_t, game.sample.x0.detach(), t)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    for half, x0 in ((slice(0, B), game.batch.x0), (slice(B, None), game.sample.x0.detach())):
        assert abs(_correlation(noise, _noise_in(critic_x_t[half], x0, critic_t[half]))) < 0.1
    assert not torch.equal(t, critic_t[:B])


@pytest.mark.parametrize("settings", [{}, {"r1": ExactR1()}], ids=["plain", "exact"])
def test_the_teacher_is_asked_once_in_each_turn(settings):
    game = Game(**settings)
    game.strategy.critic_loss(game.sample, game.batch, 0)
    assert [len(t) for t in game.calls.t] == [2 * B]
    game.strategy.student_loss(game.sample, game.batch, 0)
    assert [len(t) for t in game.calls.t] == [2 * B, B]


def test_levels_are_those_asked_for():
    game = Game(levels=Discrete([0.6]))
    game.strategy.critic_loss(game.sample, game.batch, 0)
    game.strategy.student_loss(game.sample, game.batch, 0)
    assert set(torch.cat(game.calls.t).tolist()) == {torch.tensor(0.6).item()}


@pytest.mark.parametrize("loss", [Hinge(), Logistic()])
def test_the_losses_are_the_games_on_the_heads_logits(loss):
    game = Game(loss=loss).settled()
    terms = game.strategy.critic_loss(game.sample, game.batch, 0)
    critic_report = game.strategy.report
    student = game.strategy.student_loss(game.sample, game.batch, 0)
    (both, alone), (t, student_t) = game.calls.x_t, game.calls.t
    real, fake = game.reference_logits(both[:B], t[:B]), game.reference_logits(both[B:], t[B:])
    assert set(terms) == {"game"}
    torch.testing.assert_close(terms["game"], loss.critic(real, fake), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student, loss.student(game.reference_logits(alone, student_t)), atol=1e-5, rtol=1e-5)
    for name, logits in (("real", real), ("fake", fake)):
        mean = sum(head.mean().item() for head in logits) / len(logits)
        assert critic_report[name].item() == pytest.approx(mean, abs=1e-5)


def test_the_critics_turn_reaches_the_critic_alone():
    game = Game(r1=ExactR1())
    torch.stack(list(game.strategy.critic_loss(game.sample, game.batch, 0).values())).sum().backward()
    assert all(parameter.grad is not None for parameter in game.strategy.critic.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in game.strategy.critic.parameters())
    assert {parameter.grad for parameter in game.student.parameters()} == {None}
    assert {parameter.grad for parameter in game.teacher.parameters()} == {None}
    assert game.sample.x0.grad is None


def test_the_students_turn_reaches_the_student_alone():
    game = Game()
    game.sample.gather(game.sample.gradient(game.strategy.student_loss(game.sample, game.batch, 0)))
    game.sample.backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in game.student.parameters() if parameter.grad is not None)
    assert {parameter.grad for parameter in game.strategy.critic.parameters()} == {None}
    assert {parameter.grad for parameter in game.teacher.parameters()} == {None}


def test_the_students_gradient_goes_through_noise_and_teacher_to_every_latent():
    game = Game().settled()
    loss = game.strategy.student_loss(game.sample, game.batch, 0)
    (found,) = torch.autograd.grad(loss, game.sample.x0)
    t = game.calls.t[0]
    x_t = game.calls.x_t[0].requires_grad_()
    (at_x_t,) = torch.autograd.grad(Hinge().student(game.reference_logits(x_t, t)), x_t)
    torch.testing.assert_close(found, (1 - t)[:, None, None, None] * at_x_t, atol=1e-6, rtol=1e-4)
    assert (found != 0).all()


def test_approximate_r1_nudges_the_clean_latent_and_keeps_level_and_noise():
    game = Game(r1=ApproximateR1(sigma=0.05))
    game.strategy.critic_loss(game.sample, game.batch, 0)
    (both, nudged), (t, nudged_t) = game.calls.x_t, game.calls.t
    assert torch.equal(nudged_t, t[:B])
    nudge = (nudged - both[:B]) / (1 - nudged_t)[:, None, None, None]
    assert nudge.std().item() == pytest.approx(0.05, rel=0.05)
    assert abs(_correlation(nudge, _noise_in(both[:B], game.batch.x0, nudged_t))) < 0.1


def test_approximate_r1_is_the_weighted_squared_change_of_the_real_logits():
    game = Game(r1=ApproximateR1(weight=30.0, sigma=0.05, every=4)).settled()
    terms = game.strategy.critic_loss(game.sample, game.batch, 8)
    (both, nudged), t = game.calls.x_t, game.calls.t[1]
    clean, moved = game.reference_logits(both[:B], t), game.reference_logits(nudged, t)
    expected = 30 * 4 * sum((a - b).square().mean() for a, b in zip(clean, moved, strict=True))
    torch.testing.assert_close(terms["r1"], expected, rtol=1e-3, atol=1e-6)


def test_approximate_r1_compares_heads_of_the_same_weights():
    penalty = ApproximateR1()
    penalty.sigma = 0.0  # the change that is left is not the perturbation's
    game = Game(r1=penalty)
    for parameter in game.strategy.critic.heads.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # an update, after which the norms are out of date
    assert game.strategy.critic_loss(game.sample, game.batch, 0)["r1"].item() < 1e-8


def test_exact_r1_is_the_squared_gradient_at_the_heads_inputs():
    game = Game(r1=ExactR1(weight=0.5, every=2)).settled()
    terms = game.strategy.critic_loss(game.sample, game.batch, 2)
    x_t, t = game.calls.x_t[0][:B], game.calls.t[0][:B]
    features = [feature.detach().requires_grad_() for feature in game.strategy.taps(x_t, t, game.batch.cond)]
    logits = game.strategy.critic(features, t, game.batch.cond["pooled"])
    squares = [
        torch.autograd.grad(head.sum(), feature)[0].square().sum() / B
        for head, feature in zip(logits, features, strict=True)
    ]
    torch.testing.assert_close(terms["r1"], 0.5 * 2 * sum(squares), rtol=1e-3, atol=1e-6)
    assert terms["r1"].item() > 0


@pytest.mark.parametrize("r1", [ExactR1(every=4), ApproximateR1(every=4)])
def test_lazy_penalties_cost_nothing_in_between(r1):
    game = Game(r1=r1)
    paid = [set(game.strategy.critic_loss(game.sample, game.batch, step)) for step in range(5)]
    assert paid == [{"game", "r1"}, {"game"}, {"game"}, {"game"}, {"game", "r1"}]


def test_each_penalty_trains_the_heads():
    for r1 in (ExactR1(), ApproximateR1()):
        game = Game(r1=r1)
        game.strategy.critic_loss(game.sample, game.batch, 0)["r1"].backward()
        moved = [p.grad.abs().max() > 0 for p in game.strategy.critic.heads.parameters() if p.grad is not None]
        assert sum(moved) > len(moved) / 2


def test_the_heads_hear_of_level_and_prompt():
    game = Game().settled()
    features = game.strategy.taps(game.batch.x0, torch.full((B,), 0.5), game.batch.cond)
    pooled = game.batch.cond["pooled"]
    base = game.strategy.critic(features, torch.full((B,), 0.5), pooled)
    later = game.strategy.critic(features, torch.full((B,), 0.9), pooled)
    reworded = game.strategy.critic(features, torch.full((B,), 0.5), pooled.flip(0))
    for head, other, third in zip(base, later, reworded, strict=True):
        assert (head - other).abs().max() > 1e-3 and (head - third).abs().max() > 1e-3


@pytest.mark.parametrize(("blocks", "heads"), [(None, 2), ([1], 1), ([0], 1)])
def test_there_is_a_head_for_each_chosen_block(blocks, heads):
    game = Game(blocks=blocks).settled()
    loss = game.strategy.student_loss(game.sample, game.batch, 0)
    assert len(game.strategy.critic.heads) == heads
    expected = Hinge().student(game.reference_logits(game.calls.x_t[0], game.calls.t[0]))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_same_step_of_a_resumed_run_repeats_itself():
    first, again = Game(), Game()
    for game in (first, again):
        game.terms = game.strategy.critic_loss(game.sample, game.batch, 5)
    assert torch.equal(first.terms["game"], again.terms["game"])
    assert torch.equal(first.calls.x_t[0], again.calls.x_t[0])


def test_the_teacher_is_no_part_of_the_strategys_state():
    strategy = Game().strategy
    assert {name.split(".")[0] for name in strategy.state_dict()} == {"critic"}
    assert {id(p) for p in strategy.parameters()} == {id(p) for p in strategy.critic.parameters()}


def test_a_single_sample_needs_heads_without_batch_norm():
    with pytest.raises(ConfigError, match="at least 2 samples per process, got 1; .* norm=group"):
        LatentAdversarial().check(1)
    LatentAdversarial().check(2)
    LatentAdversarial(norm="group").check(1)
    alone: Batch = tiny.batch(1)
    strategy = LatentAdversarial(norm="group")
    strategy.configure(SimpleNamespace(pooled=tiny.POOLED), Frozen(tiny.sd3_denoiser()))
    sample = Sample(alone.x0.clone().requires_grad_(), alone.x0, torch.ones(1), _no_pixels)
    assert strategy.critic_loss(sample, alone, 0)["game"].isfinite()
