"""One latent found again by each distance alone: Figure 3 of Diffusion2GAN (arXiv 2405.05967) in the tiny world.

From noise, Adam moves a latent of the tiny SD pipeline until its distance to a drawn picture's latent is small. What it
then is, not what the distance says of it, shows whether the distance can be trusted: errors of latent and picture in a
table, pictures in docs/images (one row per target: the target, then each distance).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from results import ROOT, save
from torch import Tensor

from distill import backbones
from distill.batch import Batch, Draws, Sample
from distill.cli import quiet
from distill.data.shapes_data import ShapesDataset
from distill.frozen import Frozen
from distill.inference import grid, save_png
from distill.strategies import PerceptualRegression

DISTANCES: dict[str, dict[str, Any]] = {
    "lpips": {"distance": "lpips", "weights": "tiny-lpips", "network": "squeeze"},
    "latent_lpips": {"distance": "latent_lpips", "weights": "tiny-latent-lpips"},
    "e_latent_lpips, b": {"weights": "tiny-latent-lpips", "changes": "b"},
    "e_latent_lpips, bg": {"weights": "tiny-latent-lpips", "changes": "bg"},
    "e_latent_lpips, bgc": {"weights": "tiny-latent-lpips", "changes": "bgc"},
    "e_latent_lpips": {"weights": "tiny-latent-lpips"},
    "mse": {"distance": "mse"},
}


def reconstruct(settings: dict[str, Any], targets: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The latents found for `targets` `[B, 4, h, w]`, and their last distance, 0-dim (Adam, 5e-2, falling to 0)."""
    backbone = backbones.load("tiny-sd")
    autoencoder = backbone.autoencoder().eval().requires_grad_(False)
    term = PerceptualRegression(**settings)
    term.configure(backbone, Frozen(backbone.denoiser()))
    found = torch.randn(targets.shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    adam = torch.optim.Adam([found], lr=5e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    loss = torch.zeros(())
    for number in range(steps):
        draws = Draws(seed, number, 0, len(targets), targets.device)
        sample = Sample(found, found, torch.ones(len(targets)), autoencoder.decode)
        batch = Batch(targets, {}, [], draws, decode=autoencoder.decode)
        loss = term.student_loss(sample, batch, number)
        sample.gather(sample.gradient(loss))
        adam.zero_grad()
        sample.backward()
        adam.step()
        schedule.step()
    return found.detach(), loss.detach()


def main() -> None:
    """Runs every distance, prints and writes the result and the pictures."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--targets", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--side", type=int, default=32, help="of the pictures in pixels; four times that of the latents"
    )
    parser.add_argument("--distances", nargs="+", choices=DISTANCES, default=list(DISTANCES))
    parser.add_argument("--output", default="reconstruction", help="name of the files")
    options = parser.parse_args()
    autoencoder = backbones.load("tiny-sd").autoencoder().eval()
    with torch.no_grad():
        drawn = ShapesDataset(options.targets, seed=3, height=options.side, width=options.side)
        targets = autoencoder.encode(drawn.__getitems__(list(range(options.targets)))["pixels"])
        pictures = autoencoder.decode(targets)
    rows, columns = {}, [pictures]
    for name in options.distances:
        found, loss = reconstruct(DISTANCES[name], targets, options.steps, options.seed)
        with torch.no_grad():
            columns.append(autoencoder.decode(found))
        rows[name] = {
            "distance": round(loss.item(), 5),
            "latent_rms_error": round((found - targets).square().mean().sqrt().item(), 5),
            "picture_rms_error": round((columns[-1] - pictures).square().mean().sqrt().item(), 5),
        }
        print(name, rows[name], flush=True)
    images = torch.stack(columns, 1).flatten(0, 1).clamp(-1, 1) / 2 + 0.5
    scale = max(1, 96 // options.side)
    save_png(grid(images, columns=len(columns), scale=scale), ROOT / "docs" / "images" / f"{options.output}.png")
    values = {"steps": options.steps, "targets": options.targets, "side": options.side, "rows": rows}
    print(save(options.output, values, [options.seed]))


if __name__ == "__main__":
    main()
