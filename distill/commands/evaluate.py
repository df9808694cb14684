"""`distill evaluate`."""

from __future__ import annotations

import json
import sys

from distill.errors import ConfigError, at_least_one, check_seeds
from distill.files import check_file, save_json


def evaluate(
    pipeline: str | None = None,
    checkpoint: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    samples: int = 10000,
    seed: int = 0,
    batch_size: int = 128,
    reference: str = "shapes",
    prompts: str | None = None,
    inception: str | None = None,
    clip: str | None = None,
    clip_weights: str = "laion2b_s34b_b88k",
    output: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Measures a pipeline or a checkpoint's student against a reference set and prints the values as JSON.

    Args:
        pipeline: shipped pipeline, folder or hub id.
        checkpoint: a checkpoint of `distill fit`, in place of a pipeline.
        steps: of the sampler; what the pipeline's folder says if not given.
        guidance: classifier-free guidance; what the folder says if not given.
        solver: a diffusers scheduler in place of the pipeline's own.
        samples: number of images.
        seed: of their noise.
        batch_size: images per call.
        reference: `shapes` (fid_shapes, alignment) or a folder of real images (Inception FID, CLIP score).
        prompts: for a folder of real images, a text file with one prompt per line.
        inception: Inception weight file; downloaded if not given.
        clip: open_clip architecture for the CLIP score, such as ViT-g-14; none if not given.
        clip_weights: its open_clip tag or weight file.
        output: a JSON file to write the values to as well.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    from distill.backbones import dtype_of
    from distill.data.prompts import read_prompts
    from distill.evaluation.evaluate import evaluate_on_images, evaluate_on_shapes
    from distill.inference import open_either, pick_device

    for name, given in (("prompts", prompts), ("inception", inception), ("clip", clip)):
        if reference == "shapes" and given is not None:
            raise ConfigError(f"--{name} is for real images; give --reference FOLDER with it, or leave it out")
    at_least_one(steps=steps, batch_size=batch_size)
    check_seeds(seed=seed)
    precision = dtype_of(dtype, half=True)
    check_file(output)
    if samples < 2:
        raise ConfigError(f"a distance between distributions needs 2 images or more; got --samples {samples}")
    painter = open_either(pipeline, checkpoint, steps, guidance, solver, device, precision)
    if reference == "shapes":
        values = evaluate_on_shapes(painter, samples, seed, batch_size)
    else:
        if prompts is None:
            raise ConfigError("real images need captions to paint; give --prompts FILE with one per line")
        tower = (clip, clip_weights) if clip else None
        values = evaluate_on_images(
            painter, read_prompts(prompts), reference, samples, seed, batch_size, inception, tower, pick_device(device)
        )
    print(json.dumps(values, indent=2))
    if samples < 2000:
        note = f"distances of {samples} images are larger than those of many; compare with the same number only"
        print(f"distill: {note}", file=sys.stderr)
    if output:
        save_json(values, output)
