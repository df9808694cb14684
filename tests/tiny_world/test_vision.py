"""The shipped vision network sees what is in a drawn picture, though it was never told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from distill.adversarial.vision import TINY, VisionTransformer
from distill.data import shapes
from distill.data.shapes_data import ShapesDataset
from distill.tiny.vision import VisionTraining, _cropped, _patches, _spoilt


def _probe(network: VisionTransformer, column: int, count: int = 1500) -> float:
    """Share of 500 fresh pictures whose attribute a linear readout of the class token gets right (ridge regression)."""
    batch = ShapesDataset(count + 500, seed=5).__getitems__(list(range(count + 500)))
    with torch.no_grad():
        seen = torch.cat([network(part) for part in batch["pixels"].split(250)]).double()
    seen = torch.cat([(seen - seen.mean(0)) / seen.std(0), torch.ones(len(seen), 1)], 1)
    truth = batch["attributes"][:, column]
    targets = torch.nn.functional.one_hot(truth, int(truth.max()) + 1).double()
    left, right = seen[:count], targets[:count]
    readout = torch.linalg.solve(left.T @ left + torch.eye(left.shape[1]), left.T @ right)
    return float(((seen[count:] @ readout).argmax(1) == truth[count:]).float().mean())


@pytest.mark.parametrize(
    ("attribute", "asked"), [("layout", 0.85), ("background", 0.95), ("colour_1", 0.75), ("size_1", 0.75)]
)
def test_class_token_tells_what_is_there(attribute: str, asked: float) -> None:
    column = list(shapes.ATTRIBUTES).index(attribute)
    assert _probe(VisionTransformer(TINY), column) >= asked


def test_network_is_dinov2s_architecture() -> None:
    network = VisionTransformer(TINY)
    assert network.network.pretrained_cfg["architecture"] == "vit_small_patch14_dinov2"
    assert (network.size, network.width, network.taps) == (32, 96, 5)


def test_hidden_patches_are_hidden() -> None:
    """What a hidden patch held changes nothing that comes out."""
    training = VisionTraining("unused").eval()
    pictures = torch.rand(2, 3, 32, 32)
    hidden = torch.zeros(2, 64, dtype=torch.bool)
    hidden[:, 9] = True
    changed = pictures.clone()
    changed[:, :, 4:8, 4:8] = 0.0  # the tenth patch: second row, second column
    with torch.no_grad():
        a, b = training._tokens(pictures, hidden), training._tokens(changed, hidden)
        c = training._tokens(changed, torch.zeros_like(hidden))
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_patches_are_in_the_order_of_the_tokens() -> None:
    pictures = torch.rand(2, 3, 32, 32)
    patches = _patches(pictures, 4)
    assert patches.shape == (2, 64, 48)
    torch.testing.assert_close(patches[:, 9].view(2, 3, 4, 4), pictures[:, :, 4:8, 4:8])


def test_crops_keep_colour_and_size() -> None:
    flat = torch.tensor([0.9, 0.1, 0.5])[None, :, None, None].expand(4, 3, 32, 32)
    torch.testing.assert_close(_cropped(flat), flat)
    torch.manual_seed(0)
    ramp: Tensor = torch.linspace(0, 1, 32).expand(4, 3, 32, 32)
    spans = _cropped(ramp).amax((1, 2, 3)) - _cropped(ramp).amin((1, 2, 3))
    assert spans.max() <= 1 and spans.min() >= 0.5


def test_spoilt_copies_are_other_pictures_of_the_same_size() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(64, 3, 32, 32)
    spoilt = _spoilt(pictures)
    assert spoilt.shape == pictures.shape and spoilt.min() >= 0 and spoilt.max() <= 1
    assert (spoilt - pictures).flatten(1).norm(dim=1).min() > 0
    flat = torch.full((8, 3, 32, 32), 0.5)
    torch.testing.assert_close(_spoilt(flat), flat)  # nothing to blur, and blended with its like


def test_tokens_tell_blur_better_than_noise() -> None:
    """Of the same pictures, against how far tokens of different pictures lie apart, before they are whitened."""
    pictures = ShapesDataset(64, seed=9).__getitems__(list(range(64)))["pixels"]
    generator = torch.Generator().manual_seed(0)
    blurred = gaussian_blur(pictures, [5, 5], [1.0, 1.0])
    size = (blurred - pictures).square().mean().sqrt()
    noised = pictures + size * torch.randn(pictures.shape, generator=generator)
    network = VisionTransformer(TINY)
    network.whitening = None
    with torch.no_grad():
        clean, blurry, noisy = (network.tokens(some) for some in (pictures, blurred, noised))
    for depth in (2, 3, 4):
        by_blur, by_noise = ((some[depth] - clean[depth]).square().mean().sqrt() for some in (blurry, noisy))
        assert by_blur > 1.2 * by_noise, f"depth {depth}: {by_blur:.3f} by blur, {by_noise:.3f} by noise"


def _local(tokens: Tensor) -> float:
    """Of what differs between pictures, the share that differs between places too."""
    apart = tokens - tokens.mean(0)
    return float((apart - apart.mean(2, keepdim=True)).square().mean() / apart.square().mean())


def test_whitened_tokens_say_what_their_own_place_holds() -> None:
    """Not only what the whole picture is."""
    pictures = ShapesDataset(200, seed=5).__getitems__(list(range(200)))["pixels"]
    network = VisionTransformer(TINY)
    with torch.no_grad():
        whitened = [_local(tokens) for tokens in network.tokens(pictures)]
        network.whitening = None
        raw = [_local(tokens) for tokens in network.tokens(pictures)]
    for share, before, asked in zip(whitened, raw, (0.8, 0.5, 0.3, 0.3, 0.2), strict=True):
        assert share > asked and share > 2 * before
