"""A frozen vision transformer as a feature network on pixels (ADD, arXiv 2311.17042; StyleGAN-T, arXiv 2301.09515)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill.diffusion.denoiser import attention
from distill.errors import ConfigError
from distill.files import ASSETS

TINY = "tiny-vit"  # the network in distill/assets


class VisionTransformer(nn.Module):
    """A timm ViT that answers with the tokens of some depths.

    Args:
        name: a timm architecture with its weights from the hub, such as `vit_small_patch14_dinov2`; or a folder that
            timm's `save_for_hf` wrote (`config.json` and the weights); or the shipped `tiny-vit`.
        blocks: indices of the blocks that are read; four evenly spaced ones if not given, of 12 these are 2, 5, 8, 11.
            The tokens after the patch embedding are read besides.
        size: side of the square picture it sees; its own if not given. Position embeddings are interpolated for others.

    Raises:
        ConfigError: no such network, or none with patches and blocks.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, blocks: list[int] | None = None, size: int | None = None):
        super().__init__()
        self.network: Any = open_vit(name)
        depth = len(self.network.blocks)
        self.blocks = blocks if blocks is not None else [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        if any(not 0 <= block < depth for block in self.blocks):
            raise ConfigError(f"{name} has the blocks 0 to {depth - 1}; got blocks={self.blocks}")
        self.size = size or self.network.patch_embed.img_size[0]
        patch = self.network.patch_embed.patch_size[0]
        if self.size % patch:
            raise ConfigError(f"{name} cuts pictures into patches of {patch} pixels; size={self.size} does not divide")
        for key in ("mean", "std"):  # of the pictures in [0, 1] it was trained on
            self.register_buffer(key, torch.tensor(self.network.pretrained_cfg[key])[:, None, None], persistent=False)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.network.embed_dim

    @property
    def taps(self) -> int:
        """How many depths are read: the patch embedding and the blocks."""
        return 1 + len(self.blocks)

    def tokens(self, pictures: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` in [-1, 1] -> for each depth `[B, D, N]`: the N patches' tokens with the class token added.

        The class token goes into each patch, as in StyleGAN-T (section 3.3), and register tokens are dropped.
        """
        x, answer = self._embed(pictures), []
        answer.append(self._grid_tokens(x))
        with attention(x.device):
            for index, block in enumerate(self.network.blocks[: max(self.blocks, default=-1) + 1]):
                x = block(x)
                if index in self.blocks:
                    answer.append(self._grid_tokens(x))
        return answer

    def forward(self, pictures: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> the final, normalised class token `[B, D]`."""
        x = self._embed(pictures)
        for block in self.network.blocks:
            x = block(x)
        return self.network.norm(x)[:, 0]

    def _embed(self, pictures: Tensor) -> Tensor:
        pictures = fit(pictures, self.size)
        x = self.network.patch_embed((pictures / 2 + 0.5 - self.mean) / self.std)
        return self.network.norm_pre(self.network.patch_drop(self.network._pos_embed(x)))

    def _grid_tokens(self, x: Tensor) -> Tensor:
        prefix = self.network.num_prefix_tokens
        patches = x[:, prefix:] + x[:, :1] if prefix else x
        return patches.transpose(1, 2)


def open_vit(name: str) -> Any:
    """A timm vision transformer by name or folder, for pictures of any size its patches divide.

    Raises:
        ConfigError: there is none, or it is no plain vision transformer.
    """
    import timm

    folder = ASSETS / name if name == TINY else Path(name)
    where = f"local-dir:{folder}" if folder.is_dir() else name
    try:
        network = timm.create_model(where, pretrained=True, num_classes=0, dynamic_img_size=True)
    except (RuntimeError, TypeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the vision network '{name}' cannot be opened ({reason}); give the name of a timm ViT, such as "
            f"vit_small_patch14_dinov2, a folder that timm's save_for_hf wrote, or the shipped {TINY}"
        ) from error
    if not hasattr(network, "_pos_embed") or not hasattr(network, "blocks"):
        raise ConfigError(f"'{name}' is a {type(network).__name__}; this critic reads timm's VisionTransformer")
    return network


def fit(pictures: Tensor, size: int) -> Tensor:
    """Pictures at `size` x `size`: averaged over areas to become smaller, bicubic to become larger."""
    height, width = pictures.shape[-2:]
    if (height, width) == (size, size):
        return pictures
    if min(height, width) >= size:
        return interpolate(pictures, (size, size), mode="area")
    return interpolate(pictures, (size, size), mode="bicubic", antialias=True)
