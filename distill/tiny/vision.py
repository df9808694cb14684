"""The tiny world's vision network: a ViT of DINOv2's architecture, trained on drawn pictures without any label."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from distill.adversarial.vision import save_whitening
from distill.data.shapes_data import ShapesDataset
from distill.diffusion.denoiser import attention
from distill.files import written_whole

ARCHITECTURE = "vit_small_patch14_dinov2"
SIDE, PATCH, WIDTH = 32, 4, 96
SIZES: dict[str, Any] = {
    "img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 6, "num_heads": 3, "init_values": 1.0
}  # fmt: skip
WHITENED = 1000  # pictures that tokens are whitened by
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # of the pictures in [0, 1] it sees


class VisionTraining(L.LightningModule):
    """Four self-supervised tasks on noised views of crisp pictures and of spoilt copies of them.

    Some patches are hidden behind a mask token, and the patches' tokens say what all pixels were before the noise
    (SimMIM, arXiv 2111.09886, and a denoising autoencoder): noise is seen through. Two views of a picture find each
    other in the batch by their class tokens (MoCo v3, arXiv 2104.02057, without a momentum network), and by their
    tokens at the same place (DenseCL, arXiv 2011.09157). Each picture has a blurred or blended copy in the batch that
    is another picture, so the tokens tell crisp from blurred. Crops keep their colours. The class token alone says
    what the whole picture was, edges too: pictures of a batch find each other by their colours, and a class token that
    need not know places and shapes did not.

    A critic on the tokens leads a student only as far as they see: without noise and spoilt copies they told noise
    better than blur, and students became blurred.

    Args:
        output: folder in timm's layout (`config.json`, `model.safetensors`, float16).
        lr: peak learning rate of the one-cycle schedule.
        hidden: largest share of hidden patches.
        noise: largest standard deviation of a view's noise, of pixels in [0, 1].
        contrast, dense, painted: weights of the other tasks.
        places: how many of a view's tokens look for their like.
    """

    def __init__(
        self,
        output: str,
        lr: float = 2e-3,
        hidden: float = 0.5,
        noise: float = 0.06,
        contrast: float = 0.3,
        dense: float = 0.5,
        places: int = 8,
        painted: float = 5.0,
    ):
        import timm
        from open_clip.loss import ClipLoss

        super().__init__()
        self.output, self.lr, self.hidden, self.noise, self.places = output, lr, hidden, noise, places
        self.weights = {"pixels": 1.0, "contrast": contrast, "dense": dense, "painted": painted}
        network: Any = timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True, **SIZES)
        with torch.no_grad():
            network.pos_embed[0, 1:] = _places(SIDE // PATCH, WIDTH)
        self.network = network
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.pixels = nn.Linear(WIDTH, 3 * PATCH**2)
        self.whole = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
        self.part = nn.Sequential(nn.Linear(WIDTH, 192), nn.GELU(), nn.Linear(192, 64))
        self.same_picture: Any = ClipLoss()
        self.paint = nn.Sequential(nn.Linear(WIDTH, 1024), nn.GELU(), nn.Linear(1024, 3 * SIDE**2))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        crisp = _cropped(batch["pixels"] / 2 + 0.5)
        clean = torch.cat([crisp, _spoilt(crisp)]).repeat(2, 1, 1, 1)  # two views of each
        sigma = self.noise * torch.rand(len(clean), 1, 1, 1, device=clean.device) ** 2
        patches = _patches(clean, PATCH)
        share = self.hidden * torch.rand(len(clean), 1, device=clean.device)
        hidden = torch.rand(patches.shape[:2], device=clean.device) < share
        tokens = self._tokens(clean + sigma * torch.randn_like(clean), hidden)
        parts = tokens[:, self.network.num_prefix_tokens :]
        places = torch.randint(0, parts.shape[1], (self.places,)).tolist()
        losses = {
            "pixels": mse_loss(self.pixels(parts), patches),
            "contrast": self._find(self.whole(tokens[:, 0]), temperature=0.2),
            "dense": torch.stack([self._find(self.part(parts[:, place]), 0.1) for place in places]).mean(),
            "painted": _crisp_mse(self.paint(tokens[:, 0]).view_as(clean), clean),
        }
        self.log_dict(losses, prog_bar=True)
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()

    def _find(self, views: Tensor, temperature: float) -> Tensor:
        """How hard the first half of the embeddings `[2N, D]` finds the second, and the other way round."""
        first, second = normalize(views, dim=1).chunk(2)
        return self.same_picture(first, second, 1 / temperature)

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
            save_whitening(self.output, ShapesDataset(WHITENED, seed=77).__getitems__(list(range(WHITENED)))["pixels"])


def _crisp_mse(answer: Tensor, pictures: Tensor) -> Tensor:
    """The mean squared error of pixels, and of what neighbouring pixels differ by, which is where edges are."""
    apart = answer - pictures
    return apart.square().mean() + 2 * (apart.diff(dim=2).square().mean() + apart.diff(dim=3).square().mean())


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


def _spoilt(pictures: Tensor) -> Tensor:
    """Each picture `[B, 3, H, W]` blurred, blended with another of the batch, or both, by a random amount."""
    from torchvision.transforms.functional import gaussian_blur

    amount, share, kind = torch.rand(3, len(pictures), 1, 1, 1, device=pictures.device)
    blurred = torch.where(
        kind < 0.7, torch.lerp(pictures, gaussian_blur(pictures, [7, 7], [1.5, 1.5]), amount), pictures
    )
    blended = torch.lerp(blurred, pictures.roll(1, 0), 0.1 + 0.4 * share)
    return torch.where(kind < 0.4, blurred, blended)


def _patches(pictures: Tensor, patch: int) -> Tensor:
    """`[B, 3, H, W]` -> the pixels of each patch `[B, N, 3 patch^2]`, row by row."""
    return nn.functional.unfold(pictures, patch, stride=patch).transpose(1, 2)
