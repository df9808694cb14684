"""LPIPS between pictures (arXiv 1801.03924), by the `lpips` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.files import ASSETS

TINY = "tiny-lpips"  # the weights in distill/assets, for the network `squeeze`
NETWORKS = ("vgg", "alex", "squeeze")


def load_lpips(network: str = "vgg", weights: str | None = None) -> Any:
    """The `lpips` package's metric on pictures in [-1, 1], `[B, 3, H, W]` twice -> `[B, 1, 1, 1]`, in eval mode.

    Args:
        network: its trunk, one of torchvision's `vgg` (16), `alex` and `squeeze` (1.1).
        weights: a state dict of the metric or of torchvision's classifier, whose channels then all weigh 1 (safetensors
            or torch); the shipped `tiny-lpips`; or None for the package's calibration on a trunk from the hub.

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
        metric.load_state_dict(_canonical(_read(path), metric.state_dict()))
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"'{weights}' does not hold the weights of LPIPS on {network}; name the network they are for"
        ) from error
    return metric.eval().requires_grad_(False)


def _canonical(stored: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the package's metric, from its own or from a classifier's `features.*`; `lins.*` repeat `lin*`."""
    stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    if not any(name.startswith("features.") for name in stored):
        repeats = {f"lins.{name[3:]}": tensor for name, tensor in stored.items() if name.startswith("lin")}
        return {**stored, **{name: tensor for name, tensor in repeats.items() if name in own}}
    places = {name.split(".", 2)[2]: name for name in own if name.startswith("net.")}  # 0.weight: net.slice1.0.weight
    trunk = {places[name[9:]]: tensor for name, tensor in stored.items() if name[9:] in places}
    rest = {n: torch.ones_like(t) if n.startswith("lin") else t for n, t in own.items() if not n.startswith("net.")}
    return {**rest, **trunk}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor.float() for name, tensor in load_file(path).items()}
    return torch.load(path, map_location="cpu", weights_only=True)
