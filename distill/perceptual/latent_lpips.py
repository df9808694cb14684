"""LatentLPIPS: a perceptual distance between latents (Diffusion2GAN, arXiv 2405.05967, section 3.2), in the
published layout.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import ConfigError
from distill.files import ASSETS

TINY = "tiny-latent-lpips"  # the metric in distill/assets
POOLS = (6, 13, 23)  # of VGG16-BN's five; a latent is an eighth of its picture already
SLICES = ((0, 7), (7, 14), (14, 24), (24, 34), (34, 44))


def trunk_layers(channels: int, width: int) -> list[nn.Module]:
    """The layers of VGG16-BN (arXiv 1409.1556, configuration D) for latents, its first three pools left out.

    Args:
        channels: of the latents.
        width: of the first layers; 64 in the published networks.
    """
    from torchvision.models.vgg import make_layers

    times: list[int | str] = [1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"]
    layers = list(make_layers([t if isinstance(t, str) else t * width for t in times], batch_norm=True))
    layers[0] = nn.Conv2d(channels, width, 3, padding=1)
    for index in POOLS:
        layers[index] = nn.Identity()
    return layers


class _Trunk(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        layers = trunk_layers(channels, width)
        for number, (first, last) in enumerate(SLICES, 1):
            named = {str(index): layers[index] for index in range(first, last)}
            self.add_module(f"slice{number}", nn.Sequential(OrderedDict(named)))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for piece in self.children():
            x = piece(x)
            features.append(x)
        return features


class _Calibration(nn.Module):
    """A weight per channel behind a dropout, which a metric in eval mode passes over."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
        nn.init.ones_(self.model[1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, h, w]` -> `[B, 1, h, w]`; written out, for autocast would run the convolution in low precision."""
        dropout, convolution = self.model
        return (dropout(x) * convolution.weight[0]).sum(1, keepdim=True)  # type: ignore[index]


class LatentLPIPS(nn.Module):
    """Squared differences of a latent VGG16-BN's unit-normalised features, weighted per channel, averaged over
    places and summed over five depths. Always in eval mode.

    Its state dict has the names of the published package, without their duplicates under `lins`.

    Args:
        channels: of the latents, 4 or 16 in the published networks.
        width: of the trunk's first layers.
    """

    def __init__(self, channels: int = 4, width: int = 64):
        super().__init__()
        self.net = _Trunk(channels, width)
        for index, times in enumerate((1, 2, 4, 8, 8)):
            self.add_module(f"lin{index}", _Calibration(times * width))
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, name: str | Path) -> LatentLPIPS:
        """A metric from the shipped `tiny-latent-lpips` or from a weight file.

        Files may hold the whole metric as the published package stores it (with `lin*`, `lins.*` or both), or the
        trunk alone (`model.features.*`, as its classifier's checkpoints do), whose channels then all weigh 1. Either
        may say `module.` before every name, and may be a safetensors file. Sizes are taken from the weights.

        Raises:
            ConfigError: no such file, or one that holds something else.
        """
        path = ASSETS / f"{TINY}.safetensors" if str(name) == TINY else Path(name)
        if not path.is_file():
            raise ConfigError(
                f"there are no LatentLPIPS weights at '{name}'; give a weight file of the metric or of its trunk, or "
                f"the shipped {TINY}"
            )
        try:
            weights = _canonical(_read(path))
            metric = cls(weights["net.slice1.0.weight"].shape[1], len(weights["net.slice1.0.weight"]))
            weights = {**{k: v for k, v in metric.state_dict().items() if k.startswith("lin")}, **weights}
            metric.load_state_dict(weights)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"'{name}' holds no LatentLPIPS weights: neither the metric's (net.slice1.0.weight, lin0.model.1.weight"
                ", ...) nor its trunk's (model.features.0.weight, ...)"
            ) from error
        return metric

    @property
    def channels(self) -> int:
        """Of the latents it compares."""
        return self.net.slice1[0].in_channels  # type: ignore[index,union-attr,return-value]

    def train(self, mode: bool = True) -> LatentLPIPS:
        """Stays in eval mode: its batch norms and dropouts are those of a metric."""
        return super().train(False)

    def differences(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Latents `[B, C, h, w]` twice, scaled as the diffusion model sees them -> five squared differences of unit
        features, `[B, D, h', w']`.
        """
        here, there = self.net(first), self.net(second)  # apart: a target without gradient keeps no activations
        return [(_unit(a.float()) - _unit(b.float())).square() for a, b in zip(here, there, strict=True)]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` twice, scaled as the diffusion model sees them -> distances `[B]`."""
        pieces = zip(self.calibration, self.differences(first, second), strict=True)
        return torch.stack([piece(difference).mean((1, 2, 3)) for piece, difference in pieces]).sum(0)

    @property
    def calibration(self) -> list[nn.Module]:
        """The layers that weigh the channels, one per depth; in eval mode unless they are being trained."""
        return [getattr(self, f"lin{index}") for index in range(len(SLICES))]


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor.float() for name, tensor in load_file(path).items()}
    import pickle

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError("not a weight file") from error
    if not isinstance(stored, dict):
        raise ValueError("not a state dict")
    return stored.get("state_dict", stored)


def _canonical(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in `LatentLPIPS`, from any of the layouts that `load` reads."""
    stored = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    features = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    if any(name.startswith("features.") for name in features):
        return {_place(name): tensor for name, tensor in features.items() if name.startswith("features.")}
    answer = {name: tensor for name, tensor in stored.items() if not name.startswith("lins.")}
    for name, tensor in stored.items():
        if name.startswith("lins."):
            answer.setdefault(name.replace("lins.", "lin", 1), tensor)
    return answer


def _place(name: str) -> str:
    _, index, rest = name.split(".", 2)
    number = next(n for n, (first, last) in enumerate(SLICES, 1) if first <= int(index) < last)
    return f"net.slice{number}.{index}.{rest}"
