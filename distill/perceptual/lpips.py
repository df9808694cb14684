"""LPIPS between pictures (arXiv 1801.03924), by the `lpips` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.errors import ConfigError
from distill.files import ASSETS

TINY = "tiny-lpips"  # the weights in distill/assets, for the network `squeeze`
NETWORKS = ("vgg", "alex", "squeeze")


def load_lpips(network: str = "vgg", weights: str | None = None) -> Any:
    """The `lpips` package's metric on pictures in [-1, 1], `[B, 3, H, W]` twice -> `[B, 1, 1, 1]`, in eval mode.

    Args:
        network: its trunk, one of torchvision's `vgg` (16), `alex` and `squeeze` (1.1).
        weights: a state dict of the metric (safetensors or torch), the shipped `tiny-lpips`, or None for the package's
            calibration on a trunk from the hub.

    Raises:
        ConfigError: an unknown trunk, or a file that does not hold its weights.
    """
    import contextlib
    import io

    import lpips

    if network not in NETWORKS:
        raise ConfigError(f"LPIPS has no network '{network}'; choose one of {', '.join(NETWORKS)}")
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
        if weights is None:
            return lpips.LPIPS(net=network).eval().requires_grad_(False)
        metric = lpips.LPIPS(net=network, pnet_rand=True, pretrained=False)
    path = ASSETS / f"{TINY}.safetensors" if weights == TINY else Path(weights)
    if not path.is_file():
        raise ConfigError(f"there are no LPIPS weights at '{weights}'; give a weight file or the shipped {TINY}")
    try:
        metric.load_state_dict(_read(path))
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"'{weights}' does not hold the weights of LPIPS on {network}; name the network they are for"
        ) from error
    return metric.eval().requires_grad_(False)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor.float() for name, tensor in load_file(path).items()}
    return torch.load(path, map_location="cpu", weights_only=True)
