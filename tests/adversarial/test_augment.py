import pytest
import torch
from torch import Tensor

from distill.adversarial.augment import augment, random_crop
from tests import tiny

B, H, W = 5, 24, 40


@pytest.fixture
def pictures() -> Tensor:
    return tiny.draws(B, batch=3).uniform("pictures", 3, H, W) * 2 - 1


def _reference_augment(picture: Tensor, u: list[float]) -> Tensor:
    """One picture, step by step, as StyleGAN-T's code has it."""
    brightness, saturation, contrast, move_y, move_x, hole_y, hole_x = u
    x = picture + brightness - 0.5
    x = (x - x.mean(0, keepdim=True)) * 2 * saturation + x.mean(0, keepdim=True)
    x = (x - x.mean()) * (contrast + 0.5) + x.mean()
    reach_y, reach_x = int(H / 8 + 0.5), int(W / 8 + 0.5)
    dy, dx = int(move_y * (2 * reach_y + 1)) - reach_y, int(move_x * (2 * reach_x + 1)) - reach_x
    moved = torch.zeros_like(x)
    for row in range(H):
        for column in range(W):
            if 0 <= row + dy < H and 0 <= column + dx < W:
                moved[:, row, column] = x[:, row + dy, column + dx]
    tall, wide = int(H * 0.2 + 0.5), int(W * 0.2 + 0.5)
    top = int(hole_y * (H + 1 - tall % 2)) - tall // 2
    left = int(hole_x * (W + 1 - wide % 2)) - wide // 2
    moved[:, max(top, 0) : max(top + tall, 0), max(left, 0) : max(left + wide, 0)] = 0
    return moved


def test_each_picture_is_changed_by_its_own_draws(pictures: Tensor) -> None:
    draws = tiny.draws(B)
    numbers = draws.uniform("a", 7).tolist()
    expected = torch.stack([_reference_augment(picture, u) for picture, u in zip(pictures, numbers, strict=True)])
    torch.testing.assert_close(augment(pictures, draws, "a"), expected, atol=1e-5, rtol=1e-5)


def test_some_changes_alone(pictures: Tensor) -> None:
    """Each is what is left of all where the others do nothing; none leaves the pictures alone."""
    draws = tiny.draws(B)
    numbers = draws.uniform("a", 7)
    for changes, kept in (("colour", (0, 1, 2)), ("translation", (3, 4)), ("cutout", (5, 6))):
        still = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, -1.0, -1.0]).repeat(B, 1)  # nothing changes, the hole is outside
        still[:, kept] = numbers[:, kept]
        expected = torch.stack([_reference_augment(p, u) for p, u in zip(pictures, still.tolist(), strict=True)])
        torch.testing.assert_close(augment(pictures, draws, "a", [changes]), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(augment(pictures, draws, "a", []), pictures)


def test_same_draws_change_any_picture_alike(pictures: Tensor) -> None:
    first, second = (augment(torch.full_like(pictures, value), tiny.draws(B), "a") for value in (0.25, 0.5))
    assert torch.equal(first == 0, second == 0), "moves or holes differ"
    assert not torch.equal(augment(pictures, tiny.draws(B), "a"), augment(pictures, tiny.draws(B), "b"))


def test_gradients_reach_what_is_still_seen(pictures: Tensor) -> None:
    leaf = pictures.clone().requires_grad_()
    augment(leaf, tiny.draws(B), "a").square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert (leaf.grad.flatten(1).abs().sum(1) > 0).all()


def test_crop_is_one_square_of_the_batch_or_nothing() -> None:
    pictures = torch.arange(H * W, dtype=torch.float32).view(1, 1, H, W).expand(B, 3, H, W)
    kinds = set()
    for number in range(20):
        cropped = random_crop(pictures, 16, tiny.draws(B, number), "crop")
        kinds.add(tuple(cropped.shape[-2:]))
        assert torch.equal(cropped[0], cropped[-1])
    assert kinds == {(16, 16), (H, W)}
    assert random_crop(pictures, H, tiny.draws(B), "crop") is pictures, "no larger than the network's own size"
