"""What a perceptual term costs at Stable Diffusion 1.5's sizes, forward and backward, for one latent of 64x64x4.

`decode + lpips` sends the latent through the SD autoencoder's decoder and LPIPS compares pictures of 512x512;
`e_latent_lpips` changes both latents and compares them with a full-width LatentLPIPS; `latent_lpips` leaves the change
out. Networks have the real architectures and random weights. Each runs in a process of its own, in turn, several
rounds; memory is the process's peak over what it was with the networks loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from results import save
from torch import Tensor

from distill.batch import Draws
from distill.perceptual.augment import Ensemble
from distill.perceptual.latent_lpips import LatentLPIPS
from distill.training.callbacks import peak_memory

VARIANTS = ("decode + lpips", "e_latent_lpips", "latent_lpips")


def term(variant: str, device: torch.device) -> Callable[[Tensor, Draws], Tensor]:
    """The distance of a latent `[B, 4, 64, 64]` to a fixed target, 0-dim."""
    target = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)
    if variant != "decode + lpips":
        metric, ensemble = LatentLPIPS(4).to(device), Ensemble("bgco" if variant == "e_latent_lpips" else "")
        return lambda x, draws: metric(*ensemble(x, target.expand_as(x), draws, "cost")).mean()
    import lpips
    from diffusers import AutoencoderKL

    decoder: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    decoder.to(device).requires_grad_(False)
    distance = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False).to(device)
    distance.requires_grad_(False)
    pictures = torch.rand(1, 3, 512, 512, device=device) * 2 - 1  # the target's picture is decoded once, elsewhere
    return lambda x, draws: distance(decoder.decode(x).sample, pictures.expand(len(x), -1, -1, -1)).mean()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward and backward, and MiB above the loaded networks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    run, seconds = term(options.variant, device), []
    x = torch.randn(options.batch_size, 4, 64, 64, device=device, requires_grad=True)
    loaded = peak_memory()
    for number in range(options.steps + 1):
        start = time.perf_counter()
        torch.autograd.grad(run(x, Draws(0, number, 0, len(x), device)), x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": median(seconds[1:]), "added_mib": (peak_memory() - loaded) / 2**20}


def main() -> None:
    """Measures all variants in turn, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed ones of each round")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS, help="measures one, here, and prints it")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--variant", name, "--steps", str(options.steps)]
            command += ["--batch-size", str(options.batch_size)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(answer.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    values: dict[str, Any] = {
        name: {key: round(median(run[key] for run in runs), 4) for key in runs[0]} for name, runs in found.items()
    }
    dear, cheap = values["decode + lpips"], values["e_latent_lpips"]
    values["ratio"] = {key: round(dear[key] / cheap[key], 2) for key in dear}
    values |= {"batch_size": options.batch_size, "rounds": options.rounds}
    print(json.dumps(values, indent=2))
    print(save("perceptual_cost", values, [0]))


if __name__ == "__main__":
    main()
