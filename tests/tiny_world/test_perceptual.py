"""The shipped distances: they tell which of two changed pictures is nearer, and see more where there is more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill import backbones
from distill.data.shapes_data import ShapesDataset
from distill.perceptual import lpips
from distill.perceptual.latent_lpips import TINY, LatentLPIPS
from distill.tiny.perceptual import changed

Distance = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module", params=["latents", "pictures"])
def distance(request: pytest.FixtureRequest) -> Distance:
    """Between pictures `[B, 3, H, W]` in [-1, 1] -> `[B]`."""
    if request.param == "pictures":
        metric = lpips.load_lpips("squeeze", lpips.TINY)
        return lambda a, b: metric(a, b).flatten()
    autoencoder, latent = backbones.load("tiny-sd").autoencoder(), LatentLPIPS.load(TINY)
    return lambda a, b: latent(autoencoder.encode(a), autoencoder.encode(b))


@torch.no_grad()
def test_the_nearer_of_two_changed_pictures_is_told(distance: Distance) -> None:
    """The farther one bears the nearer one's change and another; chance is one half."""
    pictures = ShapesDataset(512, seed=1).__getitems__(list(range(512)))["pixels"]
    torch.manual_seed(0)
    near = changed(pictures)
    far = changed(near)
    right = (distance(pictures, near) < distance(pictures, far)).float().mean()
    assert right > 0.75


@torch.no_grad()
def test_more_noise_is_farther(distance: Distance) -> None:
    pictures = ShapesDataset(64, seed=1).__getitems__(list(range(64)))["pixels"]
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    means = [distance(pictures, pictures + amount * noise).mean() for amount in (0.0, 0.05, 0.1, 0.3)]
    assert means[0] < 1e-6 and means[0] < means[1] < means[2] < means[3]
