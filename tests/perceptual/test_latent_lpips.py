from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, max_pool2d, relu

from distill.errors import ConfigError
from distill.perceptual.latent_lpips import LatentLPIPS

CONVS = {1: (0, 3), 2: (7, 10), 3: (14, 17, 20), 4: (24, 27, 30), 5: (34, 37, 40)}
WIDTHS = {1: 1, 2: 2, 3: 4, 4: 8, 5: 8}


def published(channels: int = 4, width: int = 4) -> dict[str, Tensor]:
    """A random state dict in the names of the published metric: 101 tensors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights: dict[str, Tensor] = {}
    before = channels
    for piece, convs in CONVS.items():
        after = WIDTHS[piece] * width
        for index in convs:
            conv, norm = f"net.slice{piece}.{index}", f"net.slice{piece}.{index + 1}"
            weights |= {f"{conv}.weight": random(after, before, 3, 3) / before**0.5, f"{conv}.bias": random(after)}
            weights |= {f"{norm}.weight": random(after), f"{norm}.bias": random(after)}
            weights |= {f"{norm}.running_mean": random(after), f"{norm}.running_var": random(after).square() + 0.1}
            weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)
            before = after
    for index, times in enumerate(WIDTHS.values()):
        weights[f"lin{index}.model.1.weight"] = random(1, times * width, 1, 1).abs()
        weights[f"lins.{index}.model.1.weight"] = weights[f"lin{index}.model.1.weight"]
    return weights


def _reference_distance(weights: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The distance written out from the published layout: where the pools are, which outputs are read."""

    def features(x: Tensor) -> list[Tensor]:
        answer = []
        for piece, convs in CONVS.items():
            if piece == 5:
                x = max_pool2d(x, 2)  # index 33 of VGG16-BN, the first module of what is read fourth to fifth
            for index in convs:
                conv, norm = f"net.slice{piece}.{index}", f"net.slice{piece}.{index + 1}"
                x = conv2d(x, weights[f"{conv}.weight"], weights[f"{conv}.bias"], padding=1)
                mean, var = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
                x = relu(batch_norm(x, mean, var, weights[f"{norm}.weight"], weights[f"{norm}.bias"]))
            answer.append(x)
        return [*answer[:3], max_pool2d(answer[3], 2), max_pool2d(answer[4], 2)]

    total = torch.zeros(len(a))
    for index, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        x, y = (f / (f.pow(2).sum(1, keepdim=True) + 1e-8).sqrt() for f in (x, y))
        total += conv2d((x - y).pow(2), weights[f"lin{index}.model.1.weight"]).mean((1, 2, 3))
    return total


def pair(channels: int = 4, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 3, channels, height, width, generator=generator)
    return a, b


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("layout", ["both", "lin", "lins", "module."])
def test_the_published_layout_gives_the_published_distance(channels: int, layout: str, tmp_path: Path) -> None:
    weights = published(channels)
    assert len(weights) == 101
    a, b = pair(channels)
    expected = _reference_distance(weights, a, b)
    stored = {
        "both": weights,
        "lin": {k: v for k, v in weights.items() if not k.startswith("lins.")},
        "lins": {k: v for k, v in weights.items() if not k.startswith("lin") or k.startswith("lins.")},
        "module.": {f"module.{k}": v for k, v in weights.items()},
    }[layout]
    torch.save(stored, tmp_path / "metric.pth")
    metric = LatentLPIPS.load(tmp_path / "metric.pth")
    assert metric.channels == channels
    assert torch.allclose(metric(a, b), expected, rtol=1e-5, atol=1e-5)


def test_a_trunk_alone_weighs_its_channels_alike(tmp_path: Path) -> None:
    weights = published()
    trunk = {"module.model.features." + k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith("net.")}
    trunk |= {"module.model.classifier.0.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": trunk, "best_acc1": torch.tensor(0.5)}, tmp_path / "trunk.pth.tar")
    a, b = pair()
    alike = {k: torch.ones_like(v) if k.startswith("lin") else v for k, v in weights.items()}
    assert torch.allclose(
        LatentLPIPS.load(tmp_path / "trunk.pth.tar")(a, b), _reference_distance(alike, a, b), rtol=1e-5
    )


def test_the_full_width_is_vgg16s() -> None:
    metric = LatentLPIPS(channels=4)
    state = metric.state_dict()
    assert state["net.slice5.40.weight"].shape == (512, 512, 3, 3)
    assert set(state) == {name for name in published() if not name.startswith("lins.")}
    sides = [f.shape[-1] for f in metric.net(torch.zeros(1, 4, 64, 64))]
    assert sides == [64, 64, 64, 32, 16]


def test_it_stays_in_eval_mode_whatever_its_parent_does() -> None:
    parent = nn.Module()
    parent.metric = LatentLPIPS(width=4)
    parent.train()
    assert not any(module.training for module in parent.metric.modules())
    a, b = pair()
    assert torch.equal(parent.metric(a, b), parent.metric(a, b))


def test_identity_symmetry_and_gradient() -> None:
    torch.manual_seed(0)
    metric = LatentLPIPS(width=4)
    a, b = pair(height=8, width=16)
    assert torch.equal(metric(a, a), torch.zeros(3))
    assert torch.allclose(metric(a, b), metric(b, a))
    assert (metric(a, b) > 0).all()
    a.requires_grad_()
    metric(a, b).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    assert all(p.grad is None for p in metric.parameters())


def test_distances_are_weighed_in_full_precision_under_autocast() -> None:
    metric = LatentLPIPS(width=4)
    features = [torch.rand(2, width, 4, 4) * 1e-3 for width in (4, 8, 16, 32, 32)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [piece(f) for piece, f in zip(metric.calibration, features, strict=True)]
    for value, f in zip(found, features, strict=True):
        assert value.dtype == torch.float32 and torch.allclose(value[:, 0], f.sum(1), rtol=1e-6)


def test_what_is_no_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no LatentLPIPS weights at 'nowhere.pth'; give a weight file"):
        LatentLPIPS.load("nowhere.pth")
    torch.save({"something": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    short = {k: v for k, v in published().items() if k != "net.slice3.17.weight"}
    torch.save(short, tmp_path / "short.pth")
    for name in ("other.pth", "tensor.pth", "noise.pth", "short.pth"):
        with pytest.raises(ConfigError, match="holds no LatentLPIPS weights"):
            LatentLPIPS.load(tmp_path / name)
