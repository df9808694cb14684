"""The tiny world's vision network: a ViT of DINOv2's architecture, trained on drawn pictures without any label."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from distill.diffusion.denoiser import attention
from distill.files import written_whole

ARCHITECTURE = "vit_small_patch14_dinov2"
SIDE, PATCH, WIDTH = 32, 4, 96
SIZES: dict[str, Any] = {
    "img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 6, "num_heads": 3, "init_values": 1.0
}  # fmt: skip
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # of the pictures in [0, 1] it sees


class VisionTraining(L.LightningModule):
    """Two self-supervised tasks on two crops of each picture, parts of which are hidden behind a mask token.

    The patches' tokens say what the hidden pixels are (SimMIM, arXiv 2111.09886), which makes them tell small
    differences; the class tokens of the two crops of a picture find each other in the batch (MoCo v3, arXiv 2104.02057,
    without a momentum network), which makes them tell pictures apart. Crops keep their colours: a critic that cannot
    see colour is of no use.

    Args:
        output: folder in timm's layout (`config.json`, `model.safetensors`, float16).
        lr: peak learning rate of the one-cycle schedule.
        hidden: largest share of hidden patches.
        contrast: weight of the second task.
        temperature: of its softmax.
    """

    def __init__(
        self, output: str, lr: float = 2e-3, hidden: float = 0.6, contrast: float = 0.1, temperature: float = 0.2
    ):
        import timm
        from open_clip.loss import ClipLoss

        super().__init__()
        self.output, self.lr, self.hidden, self.contrast = output, lr, hidden, contrast
        network: Any = timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True, **SIZES)
        with torch.no_grad():
            network.pos_embed[0, 1:] = _places(SIDE // PATCH, WIDTH)
        self.network = network
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.pixels = nn.Linear(WIDTH, 3 * PATCH**2)
        self.project = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
        self.scale = 1 / temperature
        self.same_picture: Any = ClipLoss()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        views = [_cropped(batch["pixels"] / 2 + 0.5) for _ in range(2)]
        pictures = torch.cat(views)
        share = self.hidden * torch.rand(len(pictures), 1, device=pictures.device)
        patches = _patches(pictures, PATCH)
        hidden = torch.rand(patches.shape[:2], device=pictures.device) < share
        tokens = self._tokens(pictures, hidden)
        drawn = self.pixels(tokens[:, self.network.num_prefix_tokens :])
        pixels = mse_loss(drawn[hidden], patches[hidden])
        first, second = normalize(self.project(tokens[:, 0]), dim=1).chunk(2)
        contrast = self.same_picture(first, second, self.scale)
        self.log_dict({"pixels": pixels, "contrast": contrast}, prog_bar=True)
        return pixels + self.contrast * contrast

    def _tokens(self, pictures: Tensor, hidden: Tensor) -> Tensor:
        """All tokens after the last block `[B, 1 + N, D]`, `hidden` `[B, N]` patches replaced by the mask token."""
        mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (MEAN, STD))
        grid = self.network.patch_embed((pictures - mean) / std)  # [B, h, w, D]
        seen = torch.where(hidden.view(*grid.shape[:3], 1), self.mask_token.to(grid.dtype), grid)
        x = self.network.norm_pre(self.network._pos_embed(seen))
        with attention(x.device):
            return self.network.norm(self.network.blocks(x))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.95), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            save_vision(self.network, self.output)


def _places(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column for a square grid, `[side^2, width]`: where position embeddings begin.

    Begun near 0, as timm does, they are drowned by the patches' own embeddings and little but the background is learnt.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = 2 ** torch.linspace(0, 3, width // 4) * torch.pi / side
    phases = [place.flatten()[:, None] * waves for place in (rows, columns)]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1)


def save_vision(network: Any, folder: str) -> None:
    """Writes the network as timm does, which `open_vit` and timm's `local-dir:` read."""
    from timm.models import save_for_hf

    network.pretrained_cfg = {**network.pretrained_cfg, "mean": MEAN, "std": STD, "input_size": (3, 32, 32)}
    with written_whole(folder) as part:
        save_for_hf(network.half(), str(part), model_args=SIZES, safe_serialization=True)


def _cropped(pictures: Tensor) -> Tensor:
    """Another random square of each picture `[B, 3, H, W]`, 60 to 100 % of its side, at the size of the whole."""
    count, side = len(pictures), pictures.shape[-1]
    scale = 0.6 + 0.4 * torch.rand(count, device=pictures.device)
    shift = (1 - scale)[:, None] * (2 * torch.rand(count, 2, device=pictures.device) - 1)
    where = torch.zeros(count, 2, 3, device=pictures.device)
    where[:, 0, 0], where[:, 1, 1], where[:, :, 2] = scale, scale, shift
    grid = nn.functional.affine_grid(where, [count, 3, side, side], align_corners=False)
    return nn.functional.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def _patches(pictures: Tensor, patch: int) -> Tensor:
    """`[B, 3, H, W]` -> the pixels of each patch `[B, N, 3 patch^2]`, row by row."""
    return nn.functional.unfold(pictures, patch, stride=patch).transpose(1, 2)
