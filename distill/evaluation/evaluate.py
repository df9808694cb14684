"""A pipeline's images against a reference set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data import shapes
from distill.data.images import decode, resize_and_crop
from distill.data.loading import batches
from distill.data.shapes_data import HELD_OUT, ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.metrics import Alignment, ClipScore, FidShapes, as_written, inception_fid
from distill.inference import Painter
from distill.progress import tracked

IMAGES = {".png", ".jpg", ".jpeg", ".webp"}


def evaluate_on_shapes(
    painter: Painter, samples: int, seed: int = 0, batch_size: int = 128, reference: int = 10000
) -> dict[str, Any]:
    """`fid_shapes` and `alignment` of images painted from the captions of held-out drawn images, against these images.

    Args:
        painter: what is measured.
        samples: painted images; fewer give a larger distance, so compare equal numbers only.
        seed: of the images' noise.
        batch_size: images per call.
        reference: held-out drawn images on the other side.
    """
    fid, alignment = copy.deepcopy(held_out(reference)), Alignment()
    prompts = shapes.captions(HELD_OUT, range(samples))
    for part, images in _tracked(painter.finite(prompts, seed, batch_size), samples, batch_size):
        fid.update(images, real=False)
        alignment.update(images, [prompts[index] for index in part])
    return {
        "fid_shapes": round(fid.compute().item(), 3),
        "alignment": round(alignment.compute().item(), 5),
        "samples": samples,
        "seed": seed,
        "reference": f"{reference} held-out drawn images",
    }


def fid_of_shapes(images: Tensor, reference: int = 10000) -> float:
    """`fid_shapes` of images `[N, 3, H, W]` in [0, 1] against held-out drawn ones."""
    fid = copy.deepcopy(held_out(reference))
    for part in images.split(256):
        fid.update(part, real=False)
    return fid.compute().item()


@lru_cache(maxsize=1)
def held_out(count: int) -> FidShapes:
    """The metric with its real side filled."""
    fid, images = FidShapes(), ShapesDataset(count, seed=HELD_OUT)
    for part in batches(range(count), 256):
        fid.update(images.__getitems__(part)["pixels"] / 2 + 0.5, real=True)
    return fid


def evaluate_on_images(
    painter: Painter,
    prompts: list[str],
    reference: str | Path,
    samples: int,
    seed: int = 0,
    batch_size: int = 16,
    inception: str | None = None,
    clip: tuple[str, str] | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Inception FID (torchmetrics) against a folder of images and, if asked for, the CLIP score (open_clip).

    Args:
        painter: what is measured.
        prompts: used in turn.
        reference: folder of real images, resized and centre-cropped to the painted size.
        samples: painted images.
        seed: of their noise.
        batch_size: images per call.
        inception: Inception weight file; downloaded if not given.
        clip: open_clip architecture, and its tag or weight file.
        device: of the reference networks.

    Raises:
        ConfigError: a reference without images.
    """
    reference_files(reference)  # refused before anything is painted
    device = device or torch.device("cpu")
    fid = inception_fid(inception).to(device)
    score = ClipScore(*clip).to(device) if clip else None
    asked = [prompts[index % len(prompts)] for index in range(samples)]
    count = 0
    for part, images in _tracked(painter.finite(asked, seed, batch_size), samples, batch_size):
        if not count:  # with the first batch their size is known; one that cannot be read is told before the others
            for image in reference_images(reference, (images.shape[-2], images.shape[-1])):
                fid.update(as_written(image[None].to(device)), real=True)
                count += 1
        fid.update(as_written(images.to(device)), real=False)
        if score is not None:
            score.update(images.to(device), [asked[index] for index in part])
    values = {"fid_inception": fid.compute().item()} | ({"clip_score": score.compute().item()} if score else {})
    return {**values, "samples": samples, "seed": seed, "reference": f"{count} images of {reference}"}


def reference_images(folder: str | Path, size: tuple[int, int]) -> Iterator[Tensor]:
    """The images of a folder, resized on the shorter side and centre-cropped to `size`: `[3, H, W]` in [0, 1].

    Raises:
        ConfigError: as `reference_files`, or an image that cannot be read.
    """
    for file in reference_files(folder):
        try:
            picture = decode(file)
        except Exception as error:  # decoders have many kinds
            raise ConfigError(
                f"the reference image '{file}' cannot be read ({error}); replace it or take it away"
            ) from error
        yield resize_and_crop(picture, *size)


def reference_files(folder: str | Path) -> list[Path]:
    """The images of a folder and those within it, in the order of their names.

    Raises:
        ConfigError: fewer than two, of which no distance can be told.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGES and not _is_grid(path))
    if len(files) < 2:
        raise ConfigError(f"the reference '{folder}' holds {len(files)} images; give a folder with 2 or more")
    return files


def _is_grid(path: Path) -> bool:
    """Whether a picture is the grid of those beside it, as `distill sample` leaves one."""
    return path.name == "grid.png" and (path.parent / "prompts.txt").is_file()


def _tracked(painted: Iterator[Any], samples: int, batch_size: int) -> Any:
    return tracked(painted, "painting", -(-samples // batch_size))
