"""Regression to the teacher's own answers (Diffusion2GAN, Kang et al. 2024, https://arxiv.org/abs/2405.05967,
section 3).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.backbones.base import Backbone
from distill.batch import Batch, Sample
from distill.diffusion.distances import DISTANCES as PLAIN
from distill.diffusion.distances import latent_distance
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.perceptual.augment import KINDS, Ensemble
from distill.perceptual.latent_lpips import LatentLPIPS
from distill.perceptual.lpips import load_lpips
from distill.strategies.base import Strategy, Weight

DISTANCES = ("e_latent_lpips", "latent_lpips", "lpips", *PLAIN)


class PerceptualRegression(Strategy):
    """A distance between the student's sample and the teacher's latent for the same noise and prompt; the mean over the
    batch.

    Args:
        weight: of this term, or `balanced`.
        distance: `e_latent_lpips` (section 3.2: LatentLPIPS under one random change of both), `latent_lpips`, `lpips`
            (in pixels: decodes both), `mse`, `pseudo_huber` (arXiv 2310.14189, with its c) or `l1`.
        weights: of the perceptual ones. LatentLPIPS: a weight file or `tiny-latent-lpips`. LPIPS: a weight file of the
            `lpips` package's class, `tiny-lpips`, or nothing for the package's own, whose trunk comes from the hub.
        changes: of the ensemble, letters of `bgco` (blit, geometric, colour, cutout; appendix, Fig. A1). The published
            re-implementation's default is `bg`.
        l1: weight of an added mean absolute difference of the latents themselves; the re-implementation adds 1.
        network: of `lpips`, vgg, alex or squeeze.
        balance: as in `Strategy`.

    Raises:
        ConfigError: an unknown distance, missing weights, or weights for latents of other channels.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        distance: str = "e_latent_lpips",
        weights: str | None = None,
        changes: str = KINDS,
        l1: float = 0.0,
        network: str = "vgg",
        balance: float = 1.0,
    ):
        super().__init__(weight, balance)
        if distance not in DISTANCES:
            raise ConfigError(
                f"PerceptualRegression's distance '{distance}' is unknown; choose one of {', '.join(DISTANCES)}"
            )
        if distance.endswith("latent_lpips") and weights is None:
            raise ConfigError(
                f"PerceptualRegression with distance={distance} needs weights: a LatentLPIPS weight file for the "
                "teacher's latents, or tiny-latent-lpips for the shipped teachers"
            )
        self.distance, self.weights, self.l1, self.network = distance, weights, l1, network
        self.ensemble = Ensemble(changes if distance == "e_latent_lpips" else "")
        self.metric: Frozen | None = None

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        if self.distance == "lpips":
            self.metric = Frozen(load_lpips(self.network, self.weights))
        elif self.distance.endswith("latent_lpips"):
            metric, channels = LatentLPIPS.load(str(self.weights)), backbone.latent_shape()[0]
            if metric.channels != channels:
                raise ConfigError(
                    f"the LatentLPIPS weights '{self.weights}' are for latents of {metric.channels} channels, the "
                    f"teacher's have {channels}; give weights that were trained on them"
                )
            self.metric = Frozen(metric)

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        loss = self._distances(sample, batch).mean()
        if self.l1:
            loss = loss + self.l1 * (sample.x0 - batch.x0).abs().mean()
        return loss

    def _distances(self, sample: Sample, batch: Batch) -> Tensor:
        """`[B]`."""
        if self.distance in PLAIN:
            return latent_distance(self.distance, sample.x0, batch.x0)
        metric: Any = self.metric
        if self.distance == "lpips":
            return metric(sample.pixels, batch.pixels).flatten()
        return metric(*self.ensemble(sample.x0, batch.x0, batch.draws, "regression/ensemble"))
