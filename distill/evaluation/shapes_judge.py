"""The shapes judge: a small CNN that reads what is in a drawn image. The tiny world's Inception and CLIP in one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from distill.files import ASSETS

FEATURES = 64


class ShapesJudge(nn.Module):
    """Reads the attribute table of `data/shapes.py` off a picture.

    Args:
        sizes: number of values of each attribute column.
        width: channels of the first stage.
    """

    def __init__(self, sizes: tuple[int, ...] = (3, 4, 5, 6, 8, 2, 6, 8, 2), width: int = 32):
        super().__init__()
        self.sizes = sizes
        self.trunk = nn.Sequential(
            _stage(3, width),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 2 * width),
            _stage(2 * width, 4 * width, stride=2),
            _stage(4 * width, 4 * width),
            nn.Conv2d(4 * width, 24, 1),
            nn.Flatten(),
            nn.Linear(24 * 64, FEATURES),
        )
        self.readout = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, 256), nn.SiLU(), nn.Linear(256, sum(sizes)))

    def features(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> `[B, 64]`, what `fid_shapes` is computed on."""
        if pixels.shape[-2:] != (32, 32):
            pixels = nn.functional.interpolate(pixels, (32, 32), mode="area")
        return self.trunk(pixels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` in [-1, 1] -> one `[B, values]` of logits per attribute column."""
        return list(self.readout(self.features(pixels)).split(self.sizes, dim=1))

    def read(self, pixels: Tensor) -> Tensor:
        """The likeliest value of each attribute: `[B, 9]` int64."""
        return torch.stack([logits.argmax(1) for logits in self(pixels)], dim=1)


def load_shapes_judge(path: str | Path | None = None) -> ShapesJudge:
    """The judge that ships with the package, or the one stored at `path`, frozen."""
    from safetensors.torch import load_file

    weights = load_file(path or ASSETS / "shapes_judge.safetensors")
    judge = ShapesJudge(width=len(weights["trunk.0.0.weight"]))
    judge.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return judge.eval().requires_grad_(False)


def _stage(channels: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU())
