"""What painted pictures hold more or less often than drawn ones, and how much of their distance is such a shift.

A caption leaves things open, and a student may come to choose one answer too often, which no single picture shows.
Prints `fid_shapes` in its two parts, that of the means and that of the covariances, the alignment, and by how many
points of a hundred each value of the attributes is read off the pictures more often than off held-out drawn ones.

    python benchmarks/attributes.py --checkpoint runs/tiny_ladd/checkpoints/last.ckpt --steps 1 2 4
    python benchmarks/attributes.py --pipeline tiny-sd3 --guidance 1.75 --steps 8 --solver UniPCMultistepScheduler
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from distill.cli import quiet
from distill.data import shapes
from distill.data.loading import batches
from distill.data.shapes_data import HELD_OUT, ShapesDataset
from distill.evaluation.metrics import read_back
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.inference import Painter, open_painter, open_student_painter

Read = tuple[Tensor, Tensor]  # of N pictures: features [N, 64], attributes [N, 9]


def looked_at(images: Tensor) -> Read:
    """What the judge says of pictures `[N, 3, H, W]` in [0, 1]."""
    judge = load_shapes_judge()
    parts = [part * 2 - 1 for part in images.split(256)]
    return torch.cat([judge.features(part) for part in parts]), torch.cat([judge.read(part) for part in parts])


def drawn(count: int) -> Read:
    """Of held-out drawn pictures."""
    data = ShapesDataset(count, seed=HELD_OUT)
    parts = [looked_at(data.__getitems__(part)["pixels"] / 2 + 0.5) for part in batches(range(count), 256)]
    return torch.cat([features for features, _ in parts]), torch.cat([read for _, read in parts])


def distance(painted: Tensor, real: Tensor) -> tuple[float, float]:
    """The Fréchet distance of features `[N, D]` in two parts: of the means, and of the covariances."""
    painted, real = painted.double(), real.double()
    means = (painted.mean(0) - real.mean(0)).square().sum()
    a, b = painted.T.cov(), real.T.cov()
    root = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return means.item(), (a.trace() + b.trace() - 2 * root).item()


def shifts(painted: Tensor, real: Tensor) -> dict[str, list[float]]:
    """By attribute, the change of each value's share from `real` `[M, 9]` to `painted` `[N, 9]`."""
    return {
        name: [((painted[:, i] == v).double().mean() - (real[:, i] == v).double().mean()).item() for v in range(values)]
        for i, (name, values) in enumerate(shapes.ATTRIBUTES.items())
        if not name.endswith("_2")  # of the second object, which half of the pictures lack
    }


@torch.no_grad()
def describe(painter: Painter, real: Read, samples: int, seed: int) -> str:
    """A few lines on one painter's pictures of held-out captions."""
    prompts = shapes.captions(HELD_OUT, range(samples))
    features, read = looked_at(painter(prompts, seed, batch_size=128))
    means, covariances = distance(features, real[0])
    right, named = read_back(read, shapes.parse(prompts))
    lines = [
        f"fid_shapes {means + covariances:.1f} = means {means:.1f} + covariances {covariances:.1f}, "
        f"alignment {right.sum() / named.sum():.4f}"
    ]
    for name, changes in shifts(read, real[1]).items():
        lines.append(f"  {name:12}" + " ".join(f"{100 * change:+6.1f}" for change in changes))
    return "\n".join(lines)


def main() -> None:
    """Prints a paragraph per number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="of `distill fit`")
    what.add_argument("--pipeline", help="shipped pipeline or folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--solver")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--reference", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet()
    real = drawn(arguments.reference)
    for steps in arguments.steps:
        name, how = arguments.checkpoint or arguments.pipeline, (steps, arguments.guidance, arguments.solver)
        painter = open_student_painter(name, *how) if arguments.checkpoint else open_painter(name, *how)
        print(
            f"{steps} step{'s' * (steps > 1)}: {describe(painter, real, arguments.samples, arguments.seed)}", flush=True
        )


if __name__ == "__main__":
    main()
