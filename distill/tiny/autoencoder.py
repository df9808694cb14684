"""Training of the tiny pipelines' autoencoder: a small `AutoencoderKL`, 32x32 pixels to 8x8 latents."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from distill.files import written_whole


class AutoencoderTraining(L.LightningModule):
    """L1 + L2 reconstruction and a small KL term (the autoencoder of latent diffusion, arXiv 2112.10752 section 3.1).

    At the end the latents' mean and spread over `measured` images are measured and stored as the autoencoder's
    `shift_factor` and `scaling_factor`, so that what the diffusion models see has mean 0 and standard deviation 1.

    Args:
        output: folder the trained autoencoder goes to, in the diffusers layout.
        channels: of the three resolutions; the first works on all pixels and costs most.
        latent_channels: of the latents.
        lr: peak learning rate of the one-cycle schedule.
        kl: weight of the KL term.
        measured: images the scaling factor is measured on.
    """

    def __init__(
        self,
        output: str,
        channels: tuple[int, int, int] = (16, 32, 64),
        latent_channels: int = 4,
        lr: float = 2e-3,
        kl: float = 1e-4,
        measured: int = 4096,
    ):
        from diffusers import AutoencoderKL

        super().__init__()
        self.output, self.lr, self.kl, self.measured = output, lr, kl, measured
        self.autoencoder: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=channels,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        pixels = batch["pixels"]
        posterior = self.autoencoder.encode(pixels).latent_dist
        decoded = self.autoencoder.decode(posterior.sample()).sample
        reconstruction = l1_loss(decoded, pixels) + 4 * mse_loss(decoded, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"reconstruction": reconstruction, "kl": kl}, prog_bar=True)
        return reconstruction + self.kl * kl

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @torch.no_grad()
    def on_fit_end(self) -> None:
        if not self.trainer.is_global_zero:
            return
        dataset = self.trainer.datamodule.dataset  # type: ignore[attr-defined]
        parts = (dataset.__getitems__(list(range(i, i + 128)))["pixels"] for i in range(0, self.measured, 128))
        latents = torch.cat([self.autoencoder.encode(part.to(self.device)).latent_dist.mode() for part in parts])
        self.autoencoder.register_to_config(
            scaling_factor=round(1 / latents.std().item(), 5), shift_factor=round(latents.mean().item(), 5)
        )
        with written_whole(self.output) as folder:
            self.autoencoder.save_pretrained(folder)
