import math

import pytest
import torch
from torch import Tensor, nn

from distill.adversarial.gan import (
    R1,
    ApproximateR1,
    ExactR1,
    Hinge,
    Logistic,
    finite_difference_penalty,
    gradient_penalty,
)


def _logits(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator) for shape in ((4, 3, 5), (4, 2, 2), (4, 7))]


def _reference_mean(logits: list[Tensor], loss) -> float:
    """Mean over samples and places in a head, sum over heads."""
    return sum(sum(loss(x) for x in head.flatten().tolist()) / head.numel() for head in logits)


def test_hinge_is_that_of_add():
    real, fake = _logits(0), _logits(1)
    expected = _reference_mean(real, lambda x: max(0, 1 - x)) + _reference_mean(fake, lambda x: max(0, 1 + x))
    assert Hinge().critic(real, fake).item() == pytest.approx(expected, rel=1e-5)
    assert Hinge().student(fake).item() == pytest.approx(_reference_mean(fake, lambda x: -x), rel=1e-5)


def test_logistic_is_the_cross_entropy_of_real_and_fake():
    real, fake = _logits(0), _logits(1)

    def likely(x: float) -> float:
        return -math.log(1 / (1 + math.exp(-x)))

    def unlikely(x: float) -> float:
        return -math.log(1 - 1 / (1 + math.exp(-x)))

    expected = _reference_mean(real, likely) + _reference_mean(fake, unlikely)
    assert Logistic().critic(real, fake).item() == pytest.approx(expected, rel=1e-5)
    assert Logistic().student(fake).item() == pytest.approx(_reference_mean(fake, likely), rel=1e-5)


@pytest.mark.parametrize("loss", [Hinge(), Logistic()])
def test_critic_and_student_pull_apart(loss):
    real, fake = [torch.zeros(3, 2, 2, requires_grad=True)], [torch.zeros(3, 2, 2, requires_grad=True)]
    up, down = torch.autograd.grad(loss.critic(real, fake), [*real, *fake])
    (student,) = torch.autograd.grad(loss.student(fake), fake)
    assert up.max() < 0 < down.min()
    assert student.max() < 0


def test_the_logistic_game_stays_finite_far_from_the_boundary():
    far = [torch.tensor([200.0, -200.0])]
    assert Logistic().critic(far, far).item() == pytest.approx(200.0)
    assert Logistic().student(far).item() == pytest.approx(100.0)


def test_low_precision_logits_are_averaged_in_float32():
    fake = [torch.full((1, 4096), 1.001, dtype=torch.bfloat16)]
    assert Hinge().student(fake).dtype == torch.float32


def test_the_penalty_of_a_linear_head_is_its_weight_squared_at_every_place():
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Conv2d(5, 1, 1), nn.Conv2d(3, 1, 1)])
    inputs = [torch.randn(4, 5, 3, 2, requires_grad=True), torch.randn(4, 3, 6, 7, requires_grad=True)]
    penalty = gradient_penalty([head(x)[:, 0] for head, x in zip(heads, inputs, strict=True)], inputs)
    places = [6, 42]
    expected = sum(n * head.weight.square().sum() for n, head in zip(places, heads, strict=True))
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    for n, head in zip(places, heads, strict=True):
        torch.testing.assert_close(head.weight.grad, 2 * n * head.weight.detach())


def test_the_penalty_of_a_curved_head_is_what_finite_differences_say():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1)).double()
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def summed(flat: Tensor) -> Tensor:
        return head(flat.view_as(x)).sum()

    nudge = 1e-3 * torch.eye(x.numel(), dtype=torch.float64)
    flat = x.detach().flatten()
    slopes = torch.stack([(summed(flat + step) - summed(flat - step)) / 2e-3 for step in nudge])
    expected = slopes.view(3, -1).square().sum(1).mean()
    assert gradient_penalty([head(x)[:, 0]], [x]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_finite_difference_penalty_is_the_squared_change_of_the_logits():
    clean, perturbed = _logits(0), _logits(1)
    changes = [a - b for a, b in zip(clean, perturbed, strict=True)]
    expected = _reference_mean(changes, lambda x: x**2)
    assert finite_difference_penalty(clean, perturbed).item() == pytest.approx(expected, rel=1e-5)
    assert finite_difference_penalty(clean, clean).item() == 0


def test_the_finite_difference_penalty_approaches_the_squared_gradient():
    torch.manual_seed(0)
    direction, sigma = torch.randn(16), 0.01
    x = torch.randn(20_000, 16)
    penalty = finite_difference_penalty([x @ direction], [(x + sigma * torch.randn_like(x)) @ direction])
    assert penalty.item() / sigma**2 == pytest.approx(direction.square().sum().item(), rel=0.05)


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (4, [0, 4, 8]), (16, [0])])
def test_lazy_penalties_are_due_at_every_nth_step(every, due):
    assert [step for step in range(9) if R1(1.0, every).due(step)] == due


def test_the_defaults_are_the_papers():
    assert ExactR1().weight == 1e-5
    assert ApproximateR1().weight * ApproximateR1().sigma ** 2 == pytest.approx(100.0 * 0.01**2), "the paper's"
    assert ExactR1().every == ApproximateR1().every == 1


@pytest.mark.parametrize("kind", [ExactR1, ApproximateR1])
def test_an_interval_below_one_is_refused(kind):
    with pytest.raises(ValueError, match="every 1 or more steps; got every=0"):
        kind(every=0)


@pytest.mark.parametrize("make", [lambda: ExactR1(-1e-5), lambda: ApproximateR1(1.0, sigma=0.0)])
def test_penalties_of_a_wrong_sign_are_refused(make):
    with pytest.raises(ValueError, match="0 or more; got -1e-05|sigma > 0; got 0.0"):
        make()
