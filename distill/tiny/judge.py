"""Training of the shapes judge."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.evaluation.shapes_judge import ShapesJudge
from distill.files import save_tensors


class JudgeTraining(L.LightningModule):
    """Cross-entropy of every attribute that the picture has, on lightly blurred and noised drawn images.

    The noise keeps the judge from resting on single pixels, so that it reads pictures that went through an autoencoder.

    Args:
        output: where the trained weights go (safetensors, float16).
        lr: peak learning rate of the one-cycle schedule.
        noise: largest standard deviation of the added noise (pixels span [-1, 1]).
        width: of the judge.
    """

    def __init__(self, output: str, lr: float = 2e-3, noise: float = 0.1, width: int = 32):
        super().__init__()
        self.output, self.lr, self.noise = output, lr, noise
        self.judge = ShapesJudge(width=width)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        pixels, truth = batch["pixels"], batch["attributes"]
        strength = self.noise * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
        logits = self.judge(pixels + strength * torch.randn_like(pixels))
        columns = zip(logits, truth.unbind(1), strict=True)
        loss = torch.stack([cross_entropy(x, y, ignore_index=-1) for x, y in columns]).sum()
        right = torch.stack([x.argmax(1) for x in logits], 1) == truth
        self.log("accuracy", right[truth >= 0].float().mean(), prog_bar=True)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            save_tensors({name: tensor.half() for name, tensor in self.judge.state_dict().items()}, self.output)
