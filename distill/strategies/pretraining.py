"""Plain diffusion training: how the tiny teachers are made, and the control every distillation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.backbones.base import Backbone
from distill.batch import Batch, Sample
from distill.frozen import Frozen
from distill.strategies.base import Strategy


class DiffusionPretraining(Strategy):
    """Squared error in the network's own parametrisation: of the noise (arXiv 2006.11239, Eq. 14) or of the flow.

    The student answers in x0; `out = a x0 + b noise` with `noise = (x_t - alpha x0) / sigma` turns its error there into
    the error of its output by the factor `a - b alpha / sigma`.
    """

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        self.process = backbone.process()  # the student's: a run may give it another schedule than its teacher's

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        t = sample.t.clamp(min=1e-3)
        zero = torch.zeros_like(batch.x0)
        factor = self.process.to_output(torch.ones_like(zero), zero, t)  # d out / d x0 at fixed x_t
        return (factor * (sample.x0 - batch.x0)).square().mean()
