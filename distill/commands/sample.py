"""`distill sample`."""

from __future__ import annotations

from pathlib import Path

from distill.errors import at_least_one, check_seeds
from distill.files import check_folder


def sample(
    pipeline: str | None = None,
    checkpoint: str | None = None,
    output: str = "samples",
    prompt: list[str] | str | None = None,
    prompts: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
    columns: int = 8,
    scale: int = 1,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Paints prompts: single PNG files and one grid.

    Args:
        pipeline: shipped pipeline, folder or hub id.
        checkpoint: a checkpoint of `distill fit`, in place of a pipeline.
        output: folder for 00000.png, ..., prompts.txt and, of the first eight rows, grid.png, in place of an earlier
            call's; others' pictures are not replaced. A call that was killed is continued by the same call.
        prompt: one, or several as '["a red ring", "a blue square"]'.
        prompts: a text file with one prompt per line, or another set: see `distill.data.prompts`.
        steps: of the sampler; what the pipeline's folder says if not given.
        guidance: classifier-free guidance; what the folder says if not given.
        solver: a diffusers scheduler in place of the pipeline's own.
        seed: image i starts from the noise of seed + i.
        batch_size: images per call.
        columns: of the grid.
        scale: enlargement of each pixel in the grid.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    import torch

    from distill.backbones import dtype_of
    from distill.data.prompts import given_prompts
    from distill.inference import check_samples, grid, open_either, paint, save_png

    at_least_one(steps=steps, batch_size=batch_size, columns=columns, scale=scale)
    check_seeds(seed=seed)
    check_folder(output)
    lines = given_prompts(prompt, prompts)
    check_samples(output, len(lines))
    painter = open_either(pipeline, checkpoint, steps, guidance, solver, device, dtype_of(dtype, half=True))
    shown, kept = paint(painter, lines, output, seed, batch_size, columns * 8)
    save_png(grid(torch.stack(shown), columns, scale), Path(output) / "grid.png")
    some = "their grid" if len(shown) == len(lines) else f"a grid of the first {len(shown)}"
    before = f"; {kept} of them were there from the same call before" if kept else ""
    print(f"{len(lines)} images and {some} are in {output}{before}")
