from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.batch import Batch, Sample
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.perceptual.augment import Ensemble
from distill.perceptual.latent_lpips import LatentLPIPS
from distill.perceptual.lpips import load_lpips
from distill.strategies.perceptual_regression import PerceptualRegression
from tests import tiny

B = 4
BACKBONE: Any = SimpleNamespace(pooled=tiny.POOLED, latent_shape=lambda: (tiny.CHANNELS, 8, 12))


def decode(latents: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(latents[:, :3], scale_factor=4).tanh()


def scene() -> tuple[Sample, Batch]:
    batch = tiny.batch(B)
    batch.decode = decode
    answer = (batch.x0 + 0.3 * batch.draws.like("answer", batch.x0)).requires_grad_()
    return Sample(answer, batch.x0, torch.ones(B), decode), batch


def term(**settings: Any) -> PerceptualRegression:
    strategy = PerceptualRegression(**settings)
    strategy.configure(BACKBONE, Frozen(tiny.sd_denoiser()))
    return strategy


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("metric") / "latent.pth"
    torch.save(LatentLPIPS(width=4).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    import lpips

    torch.manual_seed(6)
    path = tmp_path_factory.mktemp("metric") / "lpips.pth"
    torch.save(lpips.LPIPS(net="squeeze", pnet_rand=True, pretrained=False, verbose=False).state_dict(), path)
    return str(path)


def _reference(distance: str, x: Tensor, y: Tensor) -> Tensor:
    difference = x - y
    per_sample = {
        "mse": lambda d: d.pow(2).mean(),
        "l1": lambda d: d.abs().mean(),
        "pseudo_huber": lambda d: (d.pow(2).sum() + (0.00054**2 * d.numel())).sqrt() - 0.00054 * d.numel() ** 0.5,
    }[distance]
    return torch.stack([per_sample(d) for d in difference]).mean()


@pytest.mark.parametrize("distance", ["mse", "l1", "pseudo_huber"])
def test_plain_distances_against_their_formulas(distance: str) -> None:
    sample, batch = scene()
    assert torch.allclose(
        term(distance=distance).student_loss(sample, batch, 0), _reference(distance, sample.x0, batch.x0)
    )


def test_e_latent_lpips_is_latent_lpips_under_one_change_of_both(weights: str) -> None:
    sample, batch = scene()
    metric = LatentLPIPS.load(weights)
    plain = term(distance="latent_lpips", weights=weights).student_loss(sample, batch, 0)
    assert torch.allclose(plain, metric(sample.x0, batch.x0).mean())
    found = term(weights=weights, changes="bg").student_loss(sample, batch, 0)
    x, y = Ensemble("bg")(sample.x0, batch.x0, batch.draws, "regression/ensemble")
    assert torch.allclose(found, metric(x, y).mean())
    assert not torch.allclose(found, plain, rtol=1e-2)
    with_l1 = term(weights=weights, changes="bg", l1=2.0).student_loss(sample, batch, 0)
    assert torch.allclose(with_l1, found + 2 * (sample.x0 - batch.x0).abs().mean())


def test_lpips_decodes_both_and_leads_the_student_through_the_decoder(lpips_weights: str) -> None:
    sample, batch = scene()
    strategy = term(distance="lpips", weights=lpips_weights, network="squeeze")
    loss = strategy.student_loss(sample, batch, 0)
    metric = load_lpips("squeeze", lpips_weights)
    assert torch.allclose(loss, metric(decode(sample.x0), decode(batch.x0)).mean())
    gradient = sample.gradient(loss)
    assert set(gradient) == {"pixels"} and gradient["pixels"].abs().sum() > 0


@pytest.mark.parametrize("distance", ["e_latent_lpips", "latent_lpips", "mse", "pseudo_huber", "l1"])
def test_every_latent_is_pulled_and_equal_latents_are_at_rest(distance: str, weights: str) -> None:
    sample, batch = scene()
    strategy = term(distance=distance, weights=weights)
    gradient = sample.gradient(strategy.student_loss(sample, batch, 0))
    assert set(gradient) == {"x0"} and (gradient["x0"].flatten(1).abs().sum(1) > 0).all()
    same = Sample(batch.x0.clone().requires_grad_(), batch.x0, torch.ones(B), decode)
    assert strategy.student_loss(same, batch, 0) < 1e-6


def test_what_cannot_work_is_refused(weights: str, lpips_weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="distance 'ssim' is unknown; choose one of e_latent_lpips"):
        PerceptualRegression(distance="ssim")
    with pytest.raises(ConfigError, match="distance=e_latent_lpips needs weights"):
        PerceptualRegression()
    other: Any = SimpleNamespace(latent_shape=lambda: (16, 8, 8))
    with pytest.raises(ConfigError, match="are for latents of 4 channels, the teacher's have 16"):
        PerceptualRegression(weights=weights).configure(other, Frozen(tiny.sd_denoiser()))
    with pytest.raises(ConfigError, match="does not hold the weights of LPIPS on vgg; name the network"):
        term(distance="lpips", weights=lpips_weights)
    with pytest.raises(ConfigError, match="there are no LPIPS weights at 'nowhere.pth'"):
        term(distance="lpips", weights="nowhere.pth")
    with pytest.raises(ConfigError, match="LPIPS has no network 'resnet'"):
        term(distance="lpips", weights=lpips_weights, network="resnet")
