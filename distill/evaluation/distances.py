"""Distances between finished pictures, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from distill.errors import ConfigError
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.perceptual import lpips

Distance = Callable[[Tensor, Tensor], Tensor]  # images [B, 3, H, W] in [0, 1], twice -> [B]
SHAPES, DREAMSIM = "shapes", "dreamsim"
DISTANCES = (SHAPES, lpips.TINY, *lpips.NETWORKS, DREAMSIM)


def open_distance(name: str, device: torch.device | str = "cpu") -> Distance:
    """A distance that says how unlike two pictures look.

    Args:
        name: `shapes`, one minus the cosine of the shapes judge's features; `tiny-lpips`; `vgg`, `alex` or `squeeze`,
            LPIPS (arXiv 1801.03924), whose weights come from the hub; `dreamsim` (arXiv 2306.09344), through its
            package.
        device: of the network; answers are on the CPU.

    Raises:
        ConfigError: an unknown name, or a package that is not installed or cannot be imported.
    """
    if name not in DISTANCES:
        raise ConfigError(f"the distance '{name}' is unknown; choose one of {', '.join(DISTANCES)}")
    measure = {SHAPES: _shapes, DREAMSIM: _dreamsim}.get(name, _lpips)(name, device)
    return torch.no_grad()(lambda one, other: measure(one.to(device), other.to(device)).flatten().float().cpu())


def _shapes(name: str, device: torch.device | str) -> Distance:
    judge = load_shapes_judge().to(device)
    return lambda one, other: 1 - cosine_similarity(judge.features(one * 2 - 1), judge.features(other * 2 - 1))


def _lpips(name: str, device: torch.device | str) -> Distance:
    metric = lpips.load_lpips(*((name, None) if name in lpips.NETWORKS else ("squeeze", name))).to(device)
    return lambda one, other: metric(one * 2 - 1, other * 2 - 1)


def _dreamsim(name: str, device: torch.device | str) -> Distance:
    try:
        from dreamsim import dreamsim
    except Exception as error:  # of a package that is there, whatever it does when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == DREAMSIM:
            raise ConfigError("the distance 'dreamsim' needs a package: pip install 'distill[dreamsim]'") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the distance 'dreamsim' cannot be used: its package is installed and fails to import ({reason})"
        ) from error
    model: Any = dreamsim(pretrained=True, device=str(device))[0]

    def seen(images: Tensor) -> Tensor:
        return interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)

    return lambda one, other: model(seen(one), seen(other))
