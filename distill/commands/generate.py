"""`distill generate latents`, `pairs` and `encoded`: data made once, before training."""

from __future__ import annotations

from pathlib import Path

from distill import backbones
from distill.data.generate import Generation, PairGeneration, TeacherLatents, TeacherPairs
from distill.data.images import EncodedImages, ImagesDataset
from distill.errors import at_least_one
from distill.training.generating import generate


def latents(
    teacher: str,
    output: str,
    count: int = 4096,
    steps: int = 50,
    guidance: float = 4.5,
    prompts: str = "shapes",
    solver: str | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    shard_size: int = 512,
    batch_size: int = 128,
    embeddings: bool = False,
    dtype: str = "float32",
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """Latents a teacher makes from prompts, for LADD. A killed run goes on where it stopped.

    Args:
        teacher: shipped pipeline, folder or hub id.
        output: folder of the shards and their manifest.
        count: samples in all.
        steps: of the teacher's sampler.
        guidance: classifier-free guidance, one constant value.
        prompts: a text file with one prompt per line, or `shapes` for the drawn images' captions; used in turn.
        solver: a diffusers scheduler by class name; the pipeline's own if not given.
        seed: of the noise.
        height: in pixels; the pipeline's own size if not given.
        width: in pixels; the pipeline's own size if not given.
        shard_size: samples per file.
        batch_size: samples per call of the pipeline.
        embeddings: store the prompts' embeddings too, so that training needs no text encoder pass.
        dtype: of the teacher's weights, float32 or bfloat16.
        accelerator: as for Lightning's Trainer.
        devices: as for Lightning's Trainer.
        num_nodes: as for Lightning's Trainer.
    """
    generation = Generation(
        count, steps, guidance, prompts, solver, seed, height, width, shard_size, batch_size, embeddings
    )
    maker = TeacherLatents(backbones.load(teacher, backbones.dtype_of(dtype)), Path(output), generation)
    generate(maker, accelerator, devices, num_nodes)


def pairs(
    teacher: str,
    output: str,
    count: int = 20000,
    steps: int = 50,
    guidance: float = 3.0,
    prompts: str = "shapes",
    solver: str | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    shard_size: int = 512,
    batch_size: int = 128,
    embeddings: bool = False,
    dtype: str = "float32",
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """ODE pairs, for Diffusion2GAN: noise, prompt and what the teacher makes of them. A killed run goes on.

    A larger count adds to an existing folder.

    Args:
        teacher: shipped pipeline, folder or hub id.
        output: folder of the shards and their manifest.
        count: pairs in all.
        steps: of the teacher's sampler.
        guidance: classifier-free guidance.
        prompts: a text file with one prompt per line, or `shapes` for the drawn images' captions; used in turn.
        solver: a deterministic diffusers scheduler by class name; DDIM if not given, on a flow the pipeline's own
            Euler.
        seed: of the noise.
        height: in pixels; the pipeline's own size if not given.
        width: in pixels; the pipeline's own size if not given.
        shard_size: pairs per file.
        batch_size: pairs per call of the pipeline.
        embeddings: store the prompts' embeddings too, so that training needs no text encoder pass.
        dtype: of the teacher's weights, float32 or bfloat16.
        accelerator: as for Lightning's Trainer.
        devices: as for Lightning's Trainer.
        num_nodes: as for Lightning's Trainer.
    """
    generation = PairGeneration(
        count, steps, guidance, prompts, solver, seed, height, width, shard_size, batch_size, embeddings
    )
    maker = TeacherPairs(backbones.load(teacher, backbones.dtype_of(dtype)), Path(output), generation)
    generate(maker, accelerator, devices, num_nodes)


def encoded(
    teacher: str,
    source: str,
    output: str,
    height: int = 512,
    width: int = 512,
    split: str = "train",
    caption: str | None = None,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """Latents of captioned real images, for `data.encoded`. A killed run goes on where it stopped.

    Args:
        teacher: shipped pipeline, folder or hub id, whose autoencoder encodes them.
        source: a folder, a file or a data set on the hub, as `data.source` of a recipe.
        output: folder of the shards and their manifest.
        height: in pixels.
        width: in pixels.
        split: of the data set.
        caption: the column of the captions; one called caption, text, txt or prompt if not given.
        accelerator: as for Lightning's Trainer.
        devices: as for Lightning's Trainer.
        num_nodes: as for Lightning's Trainer.
    """
    at_least_one(height=height, width=width)
    images = ImagesDataset(source, height, width, split, caption)
    generate(EncodedImages(backbones.load(teacher), Path(output), images), accelerator, devices, num_nodes)
