"""What gathering rejected images saves, and what a judge costs beside a step of the teacher.

Writes benchmarks/results/collaboration_cost.json. Times are ratios of one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import results
import torch

from distill.cli import quiet
from distill.collaboration.calibrate import seeded
from distill.collaboration.opening import open_pair
from distill.data import shapes

JUDGE = "ViT-B-32"  # open_clip; the time of a forward pass does not depend on the weights


def main() -> None:
    """Measures both and prints them."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", required=True, help="checkpoint or exported folder")
    parser.add_argument("--teacher", default="tiny-sd3")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--teacher_steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    values = {"throughput": throughput(arguments), "judge": judge_share(arguments.repeats)}
    results.save("collaboration_cost", values, [0])
    print(values)


def throughput(arguments: argparse.Namespace) -> dict[str, float]:
    """The same images at the same threshold, half of them improved: batches of 32 with gathering, batches of 32 whose
    rejected images are improved at once, and image by image.
    """
    pair = open_pair(arguments.student, arguments.teacher, "small-shapes", solver="DPMSolverMultistepScheduler")
    pair.set_progress_bar_config(disable=True)
    prompts = shapes.captions(4, range(arguments.images))
    how = {"mode": "regenerate", "teacher_steps": arguments.teacher_steps}
    scores = seeded(pair, prompts, 0, threshold=-float("inf"), batch_size=32, **how).scores
    threshold = float(torch.tensor(scores).median()) + 1e-9

    def paint(batch_size: int, at_once: int) -> None:
        for first in range(0, len(prompts), at_once):
            seeded(pair, prompts[first : first + at_once], first, threshold=threshold, batch_size=batch_size, **how)

    ways = {
        "gathered": lambda: paint(32, len(prompts)),
        "batch by batch": lambda: paint(32, 32),
        "image by image": lambda: paint(1, 1),
    }
    seconds = {name: timed(way, arguments.repeats) for name, way in ways.items()}
    ratios = {f"{name} over gathered": round(value / seconds["gathered"], 2) for name, value in seconds.items()}
    return {**ratios, "images": len(prompts), "improved": sum(score < threshold for score in scores)}


def judge_share(repeats: int) -> dict[str, float]:
    """A ViT-B judge's pass over a guided step of Stable Diffusion 1.5's U-Net at 64x64, one image, random weights."""
    import open_clip
    from diffusers import UNet2DConditionModel

    with torch.no_grad():
        clip, _, _ = open_clip.create_model_and_transforms(JUDGE, pretrained=None)
        words = open_clip.get_tokenizer(JUDGE)(["a red fox in fresh snow"])
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        latents, text = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
        image = torch.rand(1, 3, 224, 224)
        judge = timed(lambda: (clip.encode_image(image), clip.encode_text(words)), repeats)
        step = timed(lambda: unet(latents, 500, text), repeats)
    return {"judge over guided step": round(judge / step, 4)}


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds, after one run to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


if __name__ == "__main__":
    main()
