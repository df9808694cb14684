"""Metrics of finished images: drawn shapes by the shapes judge, real images by the field's reference models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from distill.data import shapes
from distill.errors import ConfigError
from distill.evaluation.shapes_judge import FEATURES, ShapesJudge, load_shapes_judge


class _JudgeFeatures(nn.Module):
    num_features = FEATURES

    def __init__(self, judge: ShapesJudge):
        super().__init__()
        self.judge = judge

    def forward(self, images: Tensor) -> Tensor:
        return self.judge.features(images * 2 - 1)


class FidShapes(FrechetInceptionDistance):
    """Fréchet distance between images' shapes-judge features; never to be compared with an Inception FID.

    `update(images, real)` takes `[B, 3, H, W]` float in [0, 1]. The value depends on the number of images on each side.
    """

    def __init__(self) -> None:
        super().__init__(feature=_JudgeFeatures(load_shapes_judge()), normalize=True)


class Alignment(Metric):
    """Share of the attributes named in the captions that the shapes judge reads back right."""

    full_state_update = False
    right: Tensor
    named: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.judge = load_shapes_judge()
        self.add_state("right", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("named", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Images `[B, 3, H, W]` in [0, 1] and their B shapes captions.

        Raises:
            ValueError: a caption that is none of the shapes grammar.
        """
        right, named = read_back(self.judge.read(images * 2 - 1).cpu(), shapes.parse(prompts))
        self.right += right.sum()
        self.named += named.sum()

    def compute(self) -> Tensor:
        return self.right / self.named.clamp(min=1)


def read_back(read: Tensor, asked: shapes.Named) -> tuple[Tensor, Tensor]:
    """How many of the attributes each caption names were read right, and how many it names: `[B]`, `[B]`.

    Where a caption names one object without its place, it may be either of the two that are there.

    Args:
        read: `[B, 9]` attribute values read off the images.
        asked: what the captions name.
    """
    named = asked.attributes != shapes.UNNAMED
    direct = ((read == asked.attributes) & named).sum(1)
    exchanged = read.clone()
    exchanged[:, shapes.FIRST], exchanged[:, shapes.SECOND] = read[:, shapes.SECOND], read[:, shapes.FIRST]
    other = ((exchanged == asked.attributes) & named).sum(1)
    may = ~asked.ordered & (read[:, shapes.LAYOUT] != 0)
    return torch.where(may, torch.maximum(direct, other), direct), named.sum(1)


class ClipScore(Metric):
    """Mean cosine between image and caption in an open_clip model (arXiv 2104.08718 without its factor 2.5).

    Args:
        model: open_clip architecture; ADD and LADD report ViT-g-14.
        pretrained: open_clip tag, or a weight file.

    Raises:
        ConfigError: no such architecture or weights.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, model: str = "ViT-g-14", pretrained: str = "laion2b_s34b_b88k"):
        super().__init__()
        self.clip, preprocess, self.tokenizer = _open_clip(model, pretrained)
        self.clip.eval().requires_grad_(False)
        *self.fitting, normalize = preprocess.transforms
        self.mean, self.std = normalize.mean, normalize.std
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Images `[B, 3, H, W]` in [0, 1] and their B captions."""
        self.total += self.cosines(images, prompts).sum()
        self.count += len(images)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of each image `[B, 3, H, W]` in [0, 1] with its caption, `[B]`."""
        return (self.image_features(images) * self.text_features(prompts, images.device)).sum(1)

    def image_features(self, images: Tensor) -> Tensor:
        """Of images `[B, 3, H, W]` in [0, 1]: `[B, D]`, of length 1."""
        return self.clip.encode_image(self.fit(images), normalize=True)

    def fit(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] as the model is to see them, by open_clip's own transforms: most models the
        middle of an image whose shorter side is resized, some all of it, squeezed into a square.
        """
        from torchvision.transforms.v2 import functional as F

        for transform in self.fitting:
            images = transform(images)
        return F.normalize(images.clamp(0, 1), self.mean, self.std)

    def text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Of B prompts: `[B, D]`, of length 1."""
        return self.clip.encode_text(self.tokenizer(list(prompts)).to(device), normalize=True)

    def compute(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


def _open_clip(model: str, pretrained: str) -> tuple[Any, Any, Any]:
    """The model, what prepares images for it and what cuts text into its tokens."""
    import open_clip

    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained or None)
        return clip, preprocess, open_clip.get_tokenizer(model)
    except Exception as error:  # torch.load meets what is no weight file with half a dozen kinds
        names = "names, such as ViT-g-14 with laion2b_s34b_b88k"
        if ":" not in model and model not in open_clip.list_models():
            raise ConfigError(f"open_clip has no architecture '{model}'; give one it {names}") from error
        if Path(pretrained).is_file():
            raise ConfigError(f"'{pretrained}' is no weight file of open_clip's {model}, or a damaged one") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"open_clip's {model} cannot be opened with the weights '{pretrained}' ({reason}); give a weight file or "
            f"a tag that open_clip {names}"
        ) from error


class ClipDirection(ClipScore):
    """For editing: the mean cosine between what an edit changed in the image and in its caption, both as differences of
    normalised CLIP features (directional similarity, arXiv 2108.00946). Beside it belongs a distance to the image that
    was edited, such as LPIPS (`open_distance`).
    """

    def update(  # type: ignore[override]
        self, before: Tensor, after: Tensor, source: Sequence[str], target: Sequence[str]
    ) -> None:
        """Images `[B, 3, H, W]` in [0, 1] before and after, and the B captions of each."""
        shown = self.image_features(after) - self.image_features(before)
        said = self.text_features(target, after.device) - self.text_features(source, after.device)
        self.total += torch.nn.functional.cosine_similarity(shown, said).sum()
        self.count += len(after)


def as_written(images: Tensor) -> Tensor:
    """Images in [0, 1] as a PNG file of them would hold them: rounded to 8 bits, where torchmetrics would cut off."""
    return (images * 255).round().clamp(0, 255) / 255


def inception_fid(weights: str | Path | None = None) -> Any:
    """Fréchet Inception distance (torchmetrics); images are floats in [0, 1], see `as_written`.

    Args:
        weights: torch-fidelity's Inception weight file; downloaded if not given.

    Raises:
        ConfigError: as `open_inception`.
    """
    return open_inception(
        weights, lambda path: FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=path)
    )


def open_inception(weights: str | Path | None, make: Callable[[str | None], Any]) -> Any:
    """What `make` makes of a weight file's name, or of None, where torch-fidelity fetches its own.

    Raises:
        ConfigError: it cannot be fetched, or is no such file.
    """
    try:
        return make(str(weights) if weights else None)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # no network, no file, another one, a damaged one: each of another kind
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        what = f" from '{weights}'" if weights else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the Inception network cannot be opened{what} ({reason}); fetch {URL_INCEPTION_V3} where "
            "there is a network, and name the file in the option inception (in a recipe evaluation.inception)"
        ) from error
