"""Networks of a few thousand parameters with random weights, and something to ask them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.backbones.sd import SDDenoiser
from distill.backbones.sd3 import SD3Denoiser
from distill.batch import Batch, Cond, Draws
from distill.diffusion.process import RectifiedFlow, VariancePreserving

CPU = torch.device("cpu")
CHANNELS, TEXT, POOLED = 4, 12, 10
HEIGHT, WIDTH = 8, 12  # not square, so that a swap of the two shows


def stable_diffusion_alphas() -> Tensor:
    """The cumulated product of 1 - beta of Stable Diffusion's scaled-linear schedule, `[1000]`."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def sd3_denoiser(seed: int = 0, layers: int = 2) -> SD3Denoiser:
    """A random MMDiT of width 16 on a rectified flow."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    network = SD3Transformer2DModel(
        sample_size=WIDTH,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
    )
    return SD3Denoiser(network, RectifiedFlow())


def sd_denoiser(seed: int = 0, prediction: str = "epsilon") -> SDDenoiser:
    """A random U-Net of two scales, 8 and 16 channels, on Stable Diffusion's schedule."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    network = UNet2DConditionModel(
        sample_size=WIDTH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
    )
    return SDDenoiser(network, VariancePreserving(stable_diffusion_alphas(), prediction))


def draws(size: int, batch: int = 0, first: int = 0, seed: int = 0) -> Draws:
    """Random numbers of a batch, on the CPU."""
    return Draws(seed, batch, first, size, CPU)


def cond(size: int, tokens: int = 3, seed: int = 0) -> Cond:
    """Random conditioning for either network."""
    source = draws(size, seed=seed)
    return {"text": source.normal("text", tokens, TEXT), "pooled": source.normal("pooled", POOLED)}


def batch(size: int, height: int = HEIGHT, width: int = WIDTH, number: int = 0) -> Batch:
    """Random latents with random conditioning."""
    source = draws(size, number)
    x0 = source.normal("data", CHANNELS, height, width)
    return Batch(x0, cond(size, seed=number), [f"prompt {i}" for i in range(size)], source)


@dataclass
class Calls:
    """What a denoiser was asked, call by call."""

    x_t: list[Tensor] = field(default_factory=list)
    t: list[Tensor] = field(default_factory=list)
    cond: list[Cond] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.t)


def watch(denoiser: nn.Module) -> Calls:
    """Notes every call of `denoiser` from now on."""
    calls = Calls()

    def note(module: nn.Module, inputs: Any) -> None:
        x_t, t, given = inputs
        calls.x_t.append(x_t.detach().clone())
        calls.t.append(t.clone())
        calls.cond.append(given)

    denoiser.register_forward_pre_hook(note)
    return calls
