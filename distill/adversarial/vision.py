"""A frozen vision transformer as a feature network on pixels (ADD, arXiv 2311.17042; StyleGAN-T, arXiv 2301.09515)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill.batch import no_autocast
from distill.diffusion.denoiser import attention
from distill.errors import ConfigError
from distill.files import ASSETS, written_whole

TINY = "tiny-vit"  # the network in distill/assets
WHITENING = "whitening.safetensors"  # beside a network's weights
FLOOR = 0.01  # of the mean variance, which smaller variances of tokens are not magnified beyond


class Whitening(nn.Module):
    """Makes the tokens of each depth uncorrelated and of like variance: `(x - mean) @ matrix`.

    Spectrally normalised heads see tokens at the scale they come in. Where nearly all that differs between tokens lies
    in a few directions, as in a network trained on few and simple pictures, heads are all but blind for the rest;
    DINOv2's own tokens are read as they are. The map is symmetric (ZCA), so a token stays near itself.

    Args:
        means: of each depth's tokens, `[D]`.
        matrices: of each depth, `[D, D]`.
    """

    means: Tensor
    matrices: Tensor

    def __init__(self, means: list[Tensor], matrices: list[Tensor]):
        super().__init__()
        self.register_buffer("means", torch.stack(means).float())
        self.register_buffer("matrices", torch.stack(matrices).float())

    @classmethod
    def of(cls, tokens: list[Tensor]) -> Whitening:
        """That of tokens `[B, D, N]` of each depth, over pictures and places."""
        flat = [depth.transpose(1, 2).flatten(0, 1).double() for depth in tokens]
        matrices = []
        for depth in flat:
            variances, directions = torch.linalg.eigh(torch.cov(depth.T, correction=0))
            scales = (variances + FLOOR * variances.mean()).rsqrt()
            matrices.append((directions * scales) @ directions.T)
        return cls([depth.mean(0) for depth in flat], matrices)

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        """Tokens `[B, D, N]` of each depth -> the same, float32."""
        each = zip(tokens, self.means, self.matrices, strict=True)
        return [matrix @ (depth.float() - mean[:, None]) for depth, mean, matrix in each]


class VisionTransformer(nn.Module):
    """A timm ViT that answers with the tokens of some depths.

    Args:
        name: a timm architecture with its weights from the hub, such as `vit_small_patch14_dinov2`; or with those of a
            file, `ARCHITECTURE:FILE`; or a folder that timm's `save_for_hf` wrote (`config.json` and the weights); or
            the shipped `tiny-vit`.
        blocks: indices of the blocks that are read; four evenly spaced ones if not given, of 12 these are 2, 5, 8, 11.
            The tokens after the patch embedding are read besides. A folder that holds the `Whitening` of all depths
            (`save_whitening`) has its tokens whitened.
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
        if any(not 0 <= block < depth for block in self.blocks) or len(set(self.blocks)) < len(self.blocks):
            raise ConfigError(f"{name} has the blocks 0 to {depth - 1}, each to be read once; got blocks={self.blocks}")
        self.whitening = open_whitening(name, [0, *(block + 1 for block in self.blocks)])
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

        The class token goes into each patch, as in StyleGAN-T (section 3.3), and register tokens are dropped. Tokens
        that are whitened are computed in float32: what bfloat16 rounds off is what whitening magnifies.
        """
        if self.whitening is None:
            return self._raw_tokens(pictures)
        with no_autocast(pictures.device):
            return self.whitening(self._raw_tokens(pictures.float()))

    def _raw_tokens(self, pictures: Tensor) -> list[Tensor]:
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

    folder, (architecture, _, file) = _folder(name), name.partition(":")
    where = f"local-dir:{folder}" if folder.is_dir() else architecture
    source: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file}} if file and not folder.is_dir() else {}
    try:
        if source and not Path(file).is_file():
            raise OSError(f"there is no file {file}")
        network = timm.create_model(where, pretrained=True, num_classes=0, dynamic_img_size=True, **source)
    except Exception as error:  # timm, torch and safetensors have kinds of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the vision network '{name}' cannot be opened ({reason}); give the name of a timm ViT, such as "
            f"vit_small_patch14_dinov2, one with a file as ARCHITECTURE:FILE, a folder that timm's save_for_hf wrote, "
            f"or the shipped {TINY}"
        ) from error
    if not hasattr(network, "_pos_embed") or not hasattr(network, "blocks"):
        raise ConfigError(f"'{name}' is a {type(network).__name__}; this critic reads timm's VisionTransformer")
    return network


def open_whitening(name: str, depths: list[int]) -> Whitening | None:
    """That of some depths, 0 for the patch embedding and n for block n - 1; None where a network has none beside it."""
    from safetensors.torch import load_file

    file = _folder(name) / WHITENING
    if not file.is_file():
        return None
    stored = load_file(file)
    return Whitening(list(stored["means"][depths]), list(stored["matrices"][depths]))


@torch.no_grad()
def save_whitening(folder: str, pictures: Tensor) -> None:
    """Writes the `Whitening` of all depths beside the network of a folder, which it is then opened with.

    Args:
        folder: that timm's `save_for_hf` wrote.
        pictures: real ones, `[B, 3, H, W]` in [-1, 1]; the places of all together should be many times the width.
    """
    from safetensors.torch import save_file

    file = Path(folder) / WHITENING
    file.unlink(missing_ok=True)
    network = VisionTransformer(folder, blocks=list(range(len(open_vit(folder).blocks))))
    parts = zip(*(network.tokens(part) for part in pictures.split(250)), strict=True)
    whitening = Whitening.of([torch.cat(depth) for depth in parts])
    with written_whole(file) as part:
        save_file({name: value.half().contiguous() for name, value in whitening.state_dict().items()}, part)


def _folder(name: str) -> Path:
    return ASSETS / name if name == TINY else Path(name)


def fit(pictures: Tensor, size: int) -> Tensor:
    """Pictures at `size` x `size`: averaged over areas to become smaller, bicubic to become larger."""
    height, width = pictures.shape[-2:]
    if (height, width) == (size, size):
        return pictures
    if min(height, width) >= size:
        return interpolate(pictures, (size, size), mode="area")
    return interpolate(pictures, (size, size), mode="bicubic", antialias=True)
