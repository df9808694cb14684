from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.batch import Draws
from distill.perceptual.augment import KINDS, SYM6, Ensemble, warp

DRAWS = Draws(0, 0, 0, 6, torch.device("cpu"))


def latents(size: int = 6, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(size, 4, height, width, generator=torch.Generator().manual_seed(1))


def smooth(height: int = 16, width: int = 16) -> Tensor:
    """Latents without what a resampling cannot keep."""
    return torch.nn.functional.avg_pool2d(latents(3, height, width), 5, 1, 2) * 4


def test_the_wavelet_is_the_symlet_with_six_vanishing_moments() -> None:
    taps = torch.tensor(SYM6, dtype=torch.float64)
    for shift in range(0, len(taps), 2):  # orthonormal to its own even shifts
        product = (taps[: len(taps) - shift] * taps[shift:]).sum()
        assert product.item() == pytest.approx(float(shift == 0), abs=1e-9)
    signs = (-1.0) ** torch.arange(len(taps))
    for moment in range(6):
        assert (signs * taps * torch.arange(len(taps)) ** moment).sum().item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_the_identity_changes_nothing(size: tuple[int, int]) -> None:
    x = latents(6, *size)
    assert torch.allclose(warp(x, torch.eye(3).repeat(6, 1, 1)), x, atol=1e-5)


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor([[*rows[0]], [*rows[1]], [0.0, 0.0, 1.0]]).repeat(3, 1, 1)


def test_flips_turns_and_moves_go_where_they_say() -> None:
    """Through the filters up to what resampling costs; the wavelet leans by a tenth of a fine pixel."""
    x = smooth()
    flipped = warp(x, matrix([[-1, 0, 0], [0, 1, 0]]))
    assert (flipped - x.flip(3)).abs().mean() < 0.05 < (x - x.flip(3)).abs().mean()
    turned = warp(x, matrix([[0, -1, 0], [1, 0, 0]]))
    assert (turned - x.rot90(1, (2, 3))).abs().mean() < 0.05 < (x - x.rot90(1, (2, 3))).abs().mean()
    moved = warp(x, matrix([[1, 0, -3], [0, 1, 2]]))  # by 3 to the right and 2 up
    assert torch.allclose(moved[:, :, :-2, 3:], x[:, :, 2:, :-3], atol=1e-4)
    mirrored = x.flip(3)[..., -4:-1]  # what comes in on the left is the mirror image
    assert torch.allclose(moved[:, :, :-2, :3], mirrored[:, :, 2:], atol=1e-4)


@pytest.mark.parametrize("kinds", ["b", "g", "bgco"])
def test_places_are_float32_whatever_the_networks_compute_in(kinds: str) -> None:
    x = torch.randn(6, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    plain, _ = Ensemble(kinds)(x, x, DRAWS, "ensemble")
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = Ensemble(kinds)(x, x, DRAWS, "ensemble")
        given_lower, _ = Ensemble(kinds)(x.bfloat16(), x.bfloat16(), DRAWS, "ensemble")
    assert torch.equal(plain, mixed)
    assert (plain - given_lower).norm() < 0.01 * plain.norm()


def test_a_scale_enlarges() -> None:
    x = torch.zeros(3, 1, 17, 17)
    x[:, :, 4:13, 4:13] = 1
    larger = warp(x, matrix([[0.5, 0, 0], [0, 0.5, 0]]))
    assert larger[:, :, 2:-2, 2:-2].min() > 0.9
    smaller = warp(x, matrix([[2, 0, 0], [0, 2, 0]]))
    assert smaller[:, :, 7:10, 7:10].min() > 0.9  # with mirror images around it, so the rest says nothing
    assert smaller[:, :, 5, 5:12].abs().max() < 0.2


@pytest.mark.parametrize("kinds", ["b", "g", "c", "o", "co", "bg", "bgc", "bgco", "bgo"])
def test_the_same_change_for_both_and_another_for_each_sample(kinds: str) -> None:
    x = latents()[:1].repeat(6, 1, 1, 1)
    first, second = Ensemble(kinds)(x, x, DRAWS, "ensemble")
    assert torch.equal(first, second)
    assert first.shape == x.shape
    assert len({round(sample.sum().item(), 3) for sample in first}) > 1
    assert (first - x).abs().max() > 0.1
    again, _ = Ensemble(kinds)(x, x, DRAWS, "ensemble")
    assert torch.equal(first, again)
    other, _ = Ensemble(kinds)(x, x, DRAWS, "other")
    assert not torch.equal(first, other)


def test_a_sample_is_changed_alike_in_any_batch() -> None:
    x = latents()
    whole, _ = Ensemble()(x, x, DRAWS, "e")
    part, _ = Ensemble()(x[2:4], x[2:4], Draws(0, 0, 2, 2, torch.device("cpu")), "e")
    assert torch.allclose(whole[2:4], part, atol=1e-6)


def _reference_colour(x: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    x = x + (brightness - 0.5)
    x = (x - x.mean()) * (contrast + 0.5) + x.mean()
    grey = x.mean(0, keepdim=True)
    return (x - grey) * (saturation * 2) + grey


def test_colour_is_about_each_ones_own_means() -> None:
    a, b = latents(), latents() + 1
    numbers = DRAWS.uniform("e/colour", 3)
    first, second = Ensemble("c")(a, b, DRAWS, "e")
    for index in range(6):
        assert torch.allclose(first[index], _reference_colour(a[index], *numbers[index].tolist()), atol=1e-5)
        assert torch.allclose(second[index], _reference_colour(b[index], *numbers[index].tolist()), atol=1e-5)


def test_cutout_takes_half_of_each_side_at_most() -> None:
    x = torch.ones(6, 4, 8, 8)
    cut, _ = Ensemble("o")(x, x, DRAWS, "e")
    shares = 1 - cut.mean((1, 2, 3))
    assert (shares > 0).all() and (shares <= 0.25).all()
    assert set(cut.unique().tolist()) == {0.0, 1.0}


def test_gradients_reach_both() -> None:
    a, b = latents().requires_grad_(), latents().requires_grad_()
    first, second = Ensemble(KINDS)(a, b, DRAWS, "e")
    (first.square().sum() + second.sum()).backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0


@pytest.mark.parametrize("kinds", ["", KINDS])
def test_a_target_without_gradient_stays_without(kinds: str) -> None:
    """So that a metric keeps no activations for it."""
    first, second = Ensemble(kinds)(latents().requires_grad_(), latents(), DRAWS, "e")
    assert first.requires_grad and not second.requires_grad


def test_strengths_are_adas() -> None:
    """Scales are 2 to the power of N(0, 0.2), moves N(0, 0.125) of a side: seen in the matrices of many draws."""
    back = Ensemble("g")._back(Draws(0, 0, 0, 4000, torch.device("cpu")), "e", torch.Size([8, 16]))
    logs = torch.linalg.svdvals(back[:, :2, :2]).log2()
    assert logs.mean(1).std() == pytest.approx(0.2, rel=0.05)  # isotropic
    assert ((logs[:, 0] - logs[:, 1]) / 2).square().mean().sqrt() == pytest.approx(0.2, rel=0.05)  # squeeze
    forward = back.inverse()
    assert forward[:, 0, 2].std() == pytest.approx(0.125 * 16, rel=0.05)
    assert forward[:, 1, 2].std() == pytest.approx(0.125 * 8, rel=0.05)
    angle = torch.atan2(back[:, 1, 0], back[:, 0, 0])
    assert angle.std() == pytest.approx(math.pi / math.sqrt(3), rel=0.05)


def test_an_unknown_change_is_refused() -> None:
    with pytest.raises(ValueError, match="letters of bgco; got 'bx'"):
        Ensemble("bx")
