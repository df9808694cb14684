"""The ensemble of E-LatentLPIPS: one random, differentiable change for both latents that are compared.

Diffusion2GAN, arXiv 2405.05967, section 3.2; the changes and their strengths are those of ADA (arXiv 2006.06676,
appendix B) and DiffAugment (arXiv 2006.10738).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, grid_sample, pad

from distill.batch import Draws, no_autocast

KINDS = "bgco"  # blit, geometric, colour, cutout
SYM6 = (  # the low-pass filter of the symlet wavelet with 6 vanishing moments, which ADA resamples with
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip


class Ensemble:
    """Changes two batches of latents alike, sample by sample.

    Args:
        kinds: which changes, letters of `bgco`: blit (flips, quarter turns, whole-pixel moves), geometric (scales,
            turns, moves), colour (brightness, contrast, saturation), cutout (a hole half as wide and high as the
            latent).

    Raises:
        ValueError: another letter.
    """

    def __init__(self, kinds: str = KINDS):
        if not set(kinds) <= set(KINDS):
            raise ValueError(f"the ensemble's changes are letters of {KINDS}; got '{kinds}'")
        self.kinds = kinds

    def __call__(self, first: Tensor, second: Tensor, draws: Draws, purpose: str) -> tuple[Tensor, Tensor]:
        """`[B, C, H, W]` twice -> the same shapes, float32; a function of the draws and `purpose`. What needs no
        gradient gets none.

        In float32 throughout: places in bfloat16 are off by a tenth of a latent pixel on average, by one at the ends.
        """
        with no_autocast(first.device):
            both = self._changed(torch.cat([first, second]).float(), draws, purpose)
        pairs = zip(both.chunk(2), (first, second), strict=True)
        one, other = (made if given.requires_grad else made.detach() for made, given in pairs)
        return one, other

    def _changed(self, both: Tensor, draws: Draws, purpose: str) -> Tensor:
        if "b" in self.kinds or "g" in self.kinds:
            both = warp(both, self._back(draws, purpose, both.shape[-2:]).repeat(2, 1, 1))
        if "c" in self.kinds:
            both = _colour(both, draws.uniform(f"{purpose}/colour", 3).repeat(2, 1))
        if "o" in self.kinds:
            both = _cutout(both, draws.uniform(f"{purpose}/cutout", 2).repeat(2, 1))
        return both

    def _back(self, draws: Draws, purpose: str, size: torch.Size) -> Tensor:
        """`[B, 3, 3]`: from places (x, y) of the changed latent, from its middle, to those of the given one."""
        sides = torch.tensor([size[1], size[0]], device=draws.device)
        back = torch.eye(3, device=draws.device)
        if "b" in self.kinds:
            flip, turn, x, y = draws.uniform(f"{purpose}/blit", 4).unbind(1)
            whole = ((torch.stack([x, y], 1) - 0.5) * 0.25 * sides).round()
            sign = 1 - 2 * (flip < 0.5).float()
            back = back @ _scale(sign, torch.ones_like(sign)) @ _turn((4 * turn).floor() * math.pi / 2) @ _move(whole)
        if "g" in self.kinds:
            isotropic, squeeze, *fraction = draws.normal(f"{purpose}/geometric", 4).unbind(1)
            before, after = (2 * draws.uniform(f"{purpose}/turns", 2) - 1).mul(math.pi).unbind(1)
            isotropic, squeeze = 2 ** (-0.2 * isotropic), 2 ** (-0.2 * squeeze)
            back = back @ _scale(isotropic, isotropic) @ _turn(before) @ _scale(squeeze, 1 / squeeze) @ _turn(after)
            back = back @ _move(torch.stack(fraction, 1) * 0.125 * sides)
        return back


def warp(x: Tensor, back: Tensor) -> Tensor:
    """Resamples `x` `[B, C, H, W]` through `back` `[B, 3, 3]`, at twice the resolution between two wavelet filters.

    Mirrored at its borders, 0 beyond the mirror images. The identity changes nothing.
    """
    height, width = x.shape[-2:]
    margin_y, margin_x = height - 1, width - 1
    fine = _double(pad(x, (margin_x, margin_x, margin_y, margin_y), mode="reflect"))
    reach = len(SYM6) - 2  # what the last filter needs beside
    places_y = (torch.arange(2 * height + reach, device=x.device) - reach // 2) / 2
    places_x = (torch.arange(2 * width + reach, device=x.device) - reach // 2) / 2
    y, x_ = torch.meshgrid(places_y - margin_y / 2, places_x - margin_x / 2, indexing="ij")
    source = torch.einsum("bij,jhw->bhwi", back[:, :2].float(), torch.stack([x_, y, torch.ones_like(y)]))
    middle = torch.tensor([margin_x / 2 + margin_x, margin_y / 2 + margin_y], device=x.device)
    ends = torch.tensor([fine.shape[-1] - 1, fine.shape[-2] - 1], device=x.device)
    grid = 2 * (2 * (source + middle)) / ends - 1
    return _halve(grid_sample(fine, grid.to(fine.dtype), align_corners=True))


def _double(x: Tensor) -> Tensor:
    channels = x.shape[1]
    for weight, stride, padding in _filters(x, channels):
        x = conv_transpose2d(x, 2 * weight, stride=stride, padding=padding, groups=channels)
    return x


def _halve(x: Tensor) -> Tensor:
    channels = x.shape[1]
    for weight, stride, _ in _filters(x, channels):
        x = conv2d(x, weight, stride=stride, groups=channels)
    return x


def _filters(x: Tensor, channels: int) -> list[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
    """The filter along rows and along columns: weight, stride, padding."""
    taps = torch.tensor(SYM6, device=x.device, dtype=x.dtype)
    taps = (taps / taps.sum()).repeat(channels, 1, 1, 1)
    side = len(SYM6) // 2 - 1
    return [(taps, (1, 2), (0, side)), (taps.transpose(2, 3), (2, 1), (side, 0))]


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], 1))


def _turn(angle: Tensor) -> Tensor:
    matrix = torch.zeros(len(angle), 3, 3, device=angle.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 1, 0], matrix[:, 0, 1], matrix[:, 2, 2] = angle.sin(), -angle.sin(), 1
    return matrix


def _move(by: Tensor) -> Tensor:
    matrix = torch.eye(3, device=by.device).repeat(len(by), 1, 1)
    matrix[:, :2, 2] = -by
    return matrix


def _colour(x: Tensor, draws: Tensor) -> Tensor:
    """Brightness by up to 0.5, contrast by 0.5 to 1.5 times, saturation by up to 2 times; about each one's own
    means.
    """
    brightness, contrast, saturation = draws.view(len(x), 3, 1, 1, 1).unbind(1)
    x = x + brightness - 0.5
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, 0.5 + contrast)
    return torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)


def _cutout(x: Tensor, centre: Tensor) -> Tensor:
    """A rectangle of half the height and width becomes 0; its centre lies anywhere."""
    rows, columns = (_inside(side, centre[:, index]) for index, side in enumerate(x.shape[-2:]))
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _inside(side: int, centre: Tensor) -> Tensor:
    places = (torch.arange(side, device=centre.device) + 0.5) / side
    return (places - centre[:, None]).abs() < 0.25
