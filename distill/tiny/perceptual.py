"""The tiny world's perceptual distances: trunks that classify drawn pictures, and their calibration by comparisons."""

from __future__ import annotations

from typing import Any

import lightning as L
import lpips
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from distill import backbones
from distill.evaluation.shapes_judge import ShapesJudge
from distill.files import save_tensors
from distill.frozen import Frozen
from distill.perceptual.latent_lpips import LatentLPIPS, trunk_layers
from distill.perceptual.lpips import load_lpips


class TrunkTraining(L.LightningModule):
    """Classifies what is in drawn pictures, as ImageNet classifiers became the trunks of LPIPS and LatentLPIPS.

    Args:
        output: where the trained weights go, under the names of torchvision's classifiers (safetensors, float16).
        teacher: whose latents a VGG16-BN reads; None trains a SqueezeNet 1.1 on pictures.
        width: of the VGG's first layers, 64 in the published ones.
        lr: peak learning rate of the one-cycle schedule.
    """

    def __init__(self, output: str, teacher: str | None = None, width: int = 16, lr: float = 1e-3):
        super().__init__()
        self.output, self.lr, self.values = output, lr, ShapesJudge().sizes
        self.model = nn.Module()
        if teacher is None:
            from torchvision.models import squeezenet1_1

            self.model.features, self.seen = squeezenet1_1(weights=None).features, lpips.ScalingLayer()
        else:
            backbone = backbones.load(teacher)
            self.model.features = nn.Sequential(*trunk_layers(backbone.latent_shape()[0], width))
            self.seen = Frozen(_Encoder(backbone.autoencoder()))
        self.model.classifier = nn.Sequential(nn.Flatten(), nn.LazyLinear(256), nn.ReLU())
        self.model.readout = nn.Linear(256, sum(self.values))

    def configure_model(self) -> None:
        """Lets the classifier see how large a trunk's answer to a picture is."""
        self._logits(torch.zeros(2, 3, 32, 32))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        truth = batch["attributes"]
        columns = list(zip(self._logits(batch["pixels"]), truth.unbind(1), strict=True))
        loss = torch.stack([cross_entropy(x, y, ignore_index=-1) for x, y in columns]).sum()
        right = torch.stack([x.argmax(1) for x, _ in columns], 1) == truth
        self.log_dict({"loss": loss, "accuracy": right[truth >= 0].float().mean()}, prog_bar=True)
        return loss

    def _logits(self, pixels: Tensor) -> list[Tensor]:
        parts: Any = self.model
        return list(parts.readout(parts.classifier(parts.features(self.seen(pixels)))).split(self.values, dim=1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            save_tensors(_halved(self.model.state_dict(prefix="model.")), self.output)


class CalibrationTraining(L.LightningModule):
    """Weighs the channels of a trunk by which of two changed pictures is nearer to the one they were made from.

    Two-alternative forced choice as for LPIPS (arXiv 1801.03924, section 3.2): a small network on both distances tells
    the choice; weights stay 0 or more; Adam 1e-4 with betas .5, .999. People's answers are not to be had for drawn
    pictures, so the choice is known by construction: the farther picture bears the nearer one's change and another on
    top (see `changed`).

    Args:
        trunk: what `TrunkTraining` wrote.
        output: where the metric goes (safetensors, float16).
        teacher: whose latents are compared; None compares pictures.
        lr: of Adam, falling to 0 over the second half.
    """

    def __init__(self, trunk: str, output: str, teacher: str | None = None, lr: float = 1e-4):
        super().__init__()
        self.output, self.lr = output, lr
        self.metric: Any = LatentLPIPS.load(trunk) if teacher else load_lpips("squeeze", trunk)
        self.seen = Frozen(_Encoder(backbones.load(teacher).autoencoder()) if teacher else nn.Identity())
        self.ranking: Any = lpips.BCERankingLoss()

    @property
    def calibration(self) -> list[nn.Module]:
        return self.metric.calibration if isinstance(self.metric, LatentLPIPS) else list(self.metric.lins)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        pixels = batch["pixels"]
        near = changed(pixels)
        far = changed(near)
        first = torch.rand(len(pixels), device=pixels.device) < 0.5
        places = first[:, None, None, None]
        one, two = torch.where(places, near, far), torch.where(places, far, near)
        for layer in self.calibration:
            layer.train().requires_grad_()
        reference = self.seen(pixels)
        d0, d1 = (self.metric(reference, self.seen(x)).view(-1, 1, 1, 1) for x in (one, two))
        judged = 1 - 2 * first.float().view(-1, 1, 1, 1)  # 1: the second is nearer
        loss = self.ranking(d0, d1, judged)
        right = ((d0 < d1) == (judged < 0)).float().mean()
        self.log_dict({"loss": loss, "right": right}, prog_bar=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        for layer in self.calibration:
            for weight in layer.parameters():
                weight.data.clamp_(min=0)

    def configure_optimizers(self) -> Any:
        weights = [p for layer in self.calibration for p in layer.parameters()]
        optimizer = torch.optim.Adam([*weights, *self.ranking.parameters()], self.lr, betas=(0.5, 0.999))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            state = self.metric.state_dict()
            save_tensors(_halved({k: v for k, v in state.items() if not k.startswith("lins.")}), self.output)


class _Encoder(nn.Module):
    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder: Any = autoencoder

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels)


def changed(pictures: Tensor) -> Tensor:
    """Each picture `[B, 3, H, W]` with one random change of a random strength: noise, blur, a move, other brightness,
    other saturation, or a patch painted over.
    """
    count, device = len(pictures), pictures.device
    strength = torch.rand(count, 1, 1, 1, device=device)
    blurred = avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    grey = pictures.mean(1, keepdim=True)
    side = pictures.shape[-1] // 4
    top, left = (torch.randint(0, pictures.shape[-1] - side, (count, 1, 1, 1), device=device) for _ in range(2))
    rows, columns = (torch.arange(pictures.shape[d], device=device).view(*[1] * d, -1, *[1] * (3 - d)) for d in (2, 3))
    patch = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    colour = 2 * torch.rand(count, 3, 1, 1, device=device) - 1
    steps = torch.randint(1, 4, (2,)).tolist()
    kinds = [
        pictures + 0.4 * strength * torch.randn_like(pictures),
        torch.lerp(pictures, blurred, strength),
        pictures.roll(steps, (2, 3)),
        pictures + (strength - 0.5).sign() * 0.1 + (strength - 0.5),
        torch.lerp(pictures, grey, strength),
        torch.where(patch, torch.lerp(pictures, colour.expand_as(pictures), strength), pictures),
    ]
    which = torch.randint(0, len(kinds), (count,), device=device)
    return torch.stack(kinds)[which, torch.arange(count, device=device)].clamp(-1, 1)


def _halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
