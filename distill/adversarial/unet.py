"""A teacher's own network as the critic of (latent, noise, prompt): Diffusion2GAN, arXiv 2405.05967, section 3.3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill.adversarial.gan import Logits
from distill.adversarial.taps import Taps
from distill.batch import Cond
from distill.diffusion.denoiser import Denoiser, attention


def conditional_critic(denoiser: Denoiser, channels: int, noise: bool, multi_scale: bool) -> ConditionalCritic:
    """The critic that suits a denoiser: a U-Net is read at its decoder's scales, a transformer after every block.

    Args:
        denoiser: a trainable copy of the teacher's network; the critic keeps and changes it.
        channels: of the latents.
        noise: condition on the noise the latent came from.
        multi_scale: of a U-Net, feed and read every scale rather than read the end; of a transformer, read every block
            rather than the last.
    """
    kind = UNetCritic if hasattr(denoiser.network, "up_blocks") else BlockCritic
    return kind(denoiser, channels, noise, multi_scale)


class ConditionalCritic(nn.Module):
    """What both kinds share: the noise enters through a convolution that begins at 0, the prompt as the network has it,
    and the time is that of clean latents.

    Args:
        denoiser, channels, noise: as in `conditional_critic`.
        widths: channels of each readout's features.
    """

    def __init__(self, denoiser: Denoiser, channels: int, noise: bool, widths: list[int]):
        super().__init__()
        self.denoiser = denoiser
        self.noise = _nothing_yet(channels, channels) if noise else None
        self.readouts = nn.ModuleList(_readout(width) for width in widths)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond) -> Logits:
        """Latents and the noise they came from, `[B, C, H, W]` each, with B prompts -> `[B, h, w]` of each readout."""
        entered = x if self.noise is None else x + self.noise(noise)
        with attention(x.device, self.denoiser.network.is_gradient_checkpointing):
            features = self._features(entered, x, cond)
        return [readout(feature)[:, 0] for readout, feature in zip(self.readouts, features, strict=True)]

    def _features(self, entered: Tensor, x: Tensor, cond: Cond) -> list[Tensor]:
        raise NotImplementedError

    def _run(self, entered: Tensor, cond: Cond) -> None:
        clean = self.denoiser.process.timestep(torch.zeros(len(entered), device=entered.device))
        self.denoiser.predict(entered, clean, cond)


class UNetCritic(ConditionalCritic):
    """Readouts at every scale of the decoder: of the skip connection, of what comes up from below, and of both
    combined. The latent itself, made smaller, enters after every stage of the encoder that makes its features smaller.

    Args:
        denoiser, channels, noise, multi_scale: as in `conditional_critic`.
    """

    def __init__(self, denoiser: Denoiser, channels: int, noise: bool, multi_scale: bool):
        network: Any = denoiser.network
        network.conv_norm_out, network.conv_out = None, nn.Identity()  # the noise it predicted is of no use any more
        scales = [_widths(network, index) for index in range(len(network.up_blocks))]
        widths = [width for scale in scales for width in scale] if multi_scale else [scales[-1][-1]]
        super().__init__(denoiser, channels, noise, widths)
        self.multi_scale = multi_scale
        self.enter = nn.ModuleDict()
        self._latent: Tensor | None = None
        self._found: dict[tuple[int, int], Tensor] = {}
        for index, block in enumerate(network.up_blocks):
            block.register_forward_pre_hook(self._note_entering(index), with_kwargs=True)
            last = (getattr(block, "attentions", None) or block.resnets)[-1]
            last.register_forward_hook(self._note_combined(index))
        for index, block in enumerate(network.down_blocks if multi_scale else []):
            if block.downsamplers is not None:
                width = network.config.block_out_channels[index]
                self.enter[str(index)] = _nothing_yet(channels, width)
                block.register_forward_hook(self._feed(index))

    def _features(self, entered: Tensor, x: Tensor, cond: Cond) -> list[Tensor]:
        self._latent, self._found = x, {}
        try:
            self._run(entered, cond)
            found = [self._found[place] for place in sorted(self._found)]
        finally:
            self._latent, self._found = None, {}
        return found if self.multi_scale else found[-1:]

    def _note_entering(self, scale: int) -> Any:
        def note(block: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
            if self._latent is not None:
                self._found[scale, 0] = named["res_hidden_states_tuple"][-1]
                self._found[scale, 1] = named["hidden_states"]

        return note

    def _note_combined(self, scale: int) -> Any:
        def note(layer: nn.Module, arguments: Any, output: Any) -> None:
            if self._latent is not None:
                self._found[scale, 2] = output[0] if isinstance(output, tuple) else output

        return note

    def _feed(self, index: int) -> Any:
        def feed(block: nn.Module, arguments: Any, output: Any) -> Any:
            if self._latent is None:
                return None
            features, skips = output
            smaller = interpolate(self._latent, features.shape[-2:], mode="area")
            features = features + self.enter[str(index)](smaller)
            return features, (*skips[:-1], features)

        return feed


class BlockCritic(ConditionalCritic):
    """Readouts of the image tokens after every block of a transformer.

    Args:
        denoiser, channels, noise, multi_scale: as in `conditional_critic`.
    """

    def __init__(self, denoiser: Denoiser, channels: int, noise: bool, multi_scale: bool):
        count = len(denoiser.blocks)
        indices = list(range(count)) if multi_scale else [count - 1]
        super().__init__(denoiser, channels, noise, [denoiser.widths[index] for index in indices])
        for unread in (denoiser.network.norm_out, denoiser.network.proj_out):  # what it predicted is of no use any more
            unread.requires_grad_(False)
        self.taps = Taps(denoiser, indices)

    def _features(self, entered: Tensor, x: Tensor, cond: Cond) -> list[Tensor]:
        return self.taps(entered, torch.zeros(len(entered), device=entered.device), cond)


def _widths(network: Any, scale: int) -> tuple[int, int, int]:
    """Channels at a scale of the decoder, the smallest first: of its first skip connection, of what comes up from
    below, and of both combined.
    """
    sides, layers = list(reversed(network.config.block_out_channels)), network.up_blocks[scale].resnets
    below = sides[max(scale - 1, 0)]
    return layers[0].in_channels - below, below, layers[-1].out_channels


def _nothing_yet(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution


def _readout(width: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(math.gcd(32, width), width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
