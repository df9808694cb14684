"""What a trained LADD critic tells apart: real latents from the student's, and a caption from another one's.

Areas under the curve of its mean logit at some levels of noise, on latents it may have been trained on; .5 is chance.

    python benchmarks/critic_auc.py --checkpoint runs/tiny_ladd/checkpoints/last.ckpt \\
        --latents runs/latents/tiny-sd3-g1.75
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from distill.adversarial.gan import per_sample
from distill.batch import Cond, Draws
from distill.cli import quiet
from distill.collaboration.critic import restore, strategies_of
from distill.data.shards import LatentsDataset
from distill.errors import ConfigError
from distill.export import load_student, read_checkpoint
from distill.frozen import Frozen
from distill.strategies import LatentAdversarial

LEVELS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85)


class Critic:
    """A checkpoint's LADD critic on its teacher's features.

    Args:
        checkpoint: of `distill fit`, unsharded.

    Raises:
        ConfigError: a run without `LatentAdversarial`.
    """

    def __init__(self, checkpoint: str):
        facts, weights = read_checkpoint(checkpoint)
        found = [
            (index, strategy)
            for index, strategy in enumerate(strategies_of(facts, checkpoint))
            if isinstance(strategy, LatentAdversarial)
        ]
        if not found:
            raise ConfigError(f"'{checkpoint}' was trained without LatentAdversarial; give one of LADD")
        index, self.strategy = found[0]
        restore(self.strategy, index, facts, weights)

    def __call__(self, latents: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        """Mean logits `[B]` of clean latents `[B, C, h, w]` under `noise` at levels `t` `[B]`."""
        assert self.strategy.critic is not None
        x_t = self.strategy.process.add_noise(latents, t, noise)
        return per_sample(self.strategy.critic(self.strategy.taps(x_t, t, cond), t, cond["pooled"]))


def area(higher: Tensor, lower: Tensor) -> float:
    """The share of pairs, one of each, whose first is the larger."""
    return (higher[:, None] > lower[None]).float().mean().item()


@torch.no_grad()
def areas(checkpoint: str, latents: str, count: int, seed: int) -> dict[float, tuple[float, float]]:
    """By level: real against the student's one step, and real under its caption against real under another's."""
    critic, student = Critic(checkpoint), load_student(checkpoint)
    rows = LatentsDataset(latents).__getitems__(list(range(count)))
    real, text = rows["x0"].float(), Frozen(student.backbone.text_encoder())
    cond = {name: tensor.float() for name, tensor in text(rows["prompts"]).items()}
    other = {name: tensor.roll(count // 2, 0) for name, tensor in cond.items()}
    draws = Draws(seed, 0, 0, count, real.device)
    fake = student.denoiser(draws.like("start", real), torch.ones(count), cond)
    table = {}
    for level in LEVELS:
        t, noise = torch.full((count,), level), draws.like(f"{level}/real", real)
        own = critic(real, t, noise, cond)
        students = critic(fake, t, draws.like(f"{level}/fake", real), cond)
        table[level] = area(own, students), area(own, critic(real, t, noise, other))
    return table


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--latents", required=True, help="the folder the run was trained on")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet()
    print(f"{'level':>6}{'real / student':>17}{'own / other caption':>22}")
    table = areas(arguments.checkpoint, arguments.latents, arguments.count, arguments.seed)
    for level, (student, caption) in table.items():
        print(f"{level:6.2f}{student:17.2f}{caption:22.2f}")


if __name__ == "__main__":
    main()
