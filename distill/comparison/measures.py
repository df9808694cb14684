"""What the rows of a comparison are measured by: each measure looks at a row's images as they are painted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import backbones
from distill.collaboration.calls import SIDES
from distill.collaboration.judges import check_judge, open_judge
from distill.data import shapes
from distill.data.loading import batches
from distill.data.shapes_data import HELD_OUT, ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.distances import DISTANCES, Distance, open_distance
from distill.evaluation.evaluate import reference_images
from distill.evaluation.metrics import open_inception, read_back
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.evaluation.statistics import (
    bootstrap,
    frechet_to,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
)
from distill.files import written_whole
from distill.identity import digest, named, sources
from distill.inference import Painter, open_painter, pick_device
from distill.perceptual.latent_lpips import TINY as TINY_LATENT
from distill.perceptual.latent_lpips import LatentLPIPS


@dataclass(frozen=True)
class Setting:
    """How the images of every row come about.

    Attributes:
        prompts: of the images.
        seed: of their noise.
        batch_size: images per call.
        cache: folder for what is computed once for all rows.
    """

    prompts: list[str]
    seed: int
    batch_size: int
    cache: Path


class Measure:
    """A few numbers about a row. Subclasses are dataclasses, whose fields are part of what tells rows apart.

    Attributes:
        version: counts the times that the same fields came to mean other numbers.
    """

    version = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the numbers, as tables and claims call them; where one is uncertain, `NAME_interval` goes with it."""
        raise NotImplementedError

    def check(self, setting: Setting) -> None:
        """Refuses what cannot be measured, before anything is trained.

        Raises:
            ConfigError: what was given, what is accepted, what to do.
        """

    def begin(self, setting: Setting, painter: Painter) -> None:
        """Forgets all images, and looks at what is to paint."""
        raise NotImplementedError

    def update(self, part: list[int], images: Tensor) -> None:
        """Sees the images `[B, 3, H, W]` in [0, 1] of the prompts with the indices `part`; all come once, in order."""
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """The numbers, once all images were seen, and what they were measured against; a number that this row cannot
        have is left out.
        """
        raise NotImplementedError


@dataclass
class Drawn(Measure):
    """Against held-out drawn images, by the shapes judge: the tiny world's Inception and CLIP in one.

    `kid` compares with the held-out images of the very captions that were painted, so it is smaller than to others.

    Attributes:
        count: held-out images on the other side.
    """

    count: int = 10000

    def __post_init__(self) -> None:
        if self.count < 10:
            raise ConfigError(f"distances to less than 10 images say nothing; got Drawn's count={self.count}")

    @property
    def names(self) -> tuple[str, ...]:
        return ("fid_shapes", "alignment", "kid", "precision", "recall")

    def check(self, setting: Setting) -> None:
        try:
            shapes.parse(setting.prompts)
        except ValueError as error:
            raise ConfigError(f"the measure Drawn reads drawn shapes only, so name other measures: {error}") from error

    def begin(self, setting: Setting, painter: Painter) -> None:
        self.judge, self.prompts = load_shapes_judge(), setting.prompts
        self.seen: list[list[Tensor]] = []  # features, attributes read right, attributes named

    def update(self, part: list[int], images: Tensor) -> None:
        asked = shapes.parse([self.prompts[index] for index in part])
        with torch.no_grad():
            features, read = self.judge.features(images * 2 - 1), self.judge.read(images * 2 - 1)
        self.seen.append([features, *read_back(read, asked)])

    def values(self) -> dict[str, Any]:
        features, right, named = (torch.cat(column) for column in zip(*self.seen, strict=True))
        real, count = held_out_features(self.count), len(features)

        def aligned(some: Tensor) -> float:
            return float(right[some].sum() / named[some].sum())

        scale = real.std()  # the kernel is made for features of about 1
        return distances(real, features, "fid_shapes") | {
            "kid": round(kernel_distance(real[:count] / scale, features / scale), 5),
            "alignment": round(aligned(torch.arange(count)), 5),
            "alignment_interval": bootstrap(aligned, count),
            "reference": f"{self.count} held-out drawn images",
        }


@dataclass
class RealImages(Measure):
    """Against a folder of real images, by the Inception network of torch-fidelity: FID, KID, precision and recall.

    Features of the folder are computed once and kept. Use as many images as the protocol asks for: ADD and
    Diffusion2GAN report 5,000 and 30,000 of COCO. FID is to the whole folder, KID the mean over 100 subsets of up to
    1,000 (arXiv 1801.01401, section 4), precision and recall of as many on both sides, drawn at random.

    Attributes:
        reference: the folder; images are resized and centre-cropped to the size of the painted ones.
        inception: weight file; downloaded if not given.
    """

    version = 2  # 1: pictures were cut off to 8 bits, and are rounded; 2: 16 bits and what is transparent are seen
    reference: str
    inception: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return ("fid", "kid", "precision", "recall")

    def check(self, setting: Setting) -> None:
        next(reference_images(self.reference, (8, 8)))
        self._open("cpu")

    def begin(self, setting: Setting, painter: Painter) -> None:
        self.cache, self.seen, self.size = setting.cache, [], (0, 0)  # type: ignore[var-annotated]

    def update(self, part: list[int], images: Tensor) -> None:
        self.size = (images.shape[-2], images.shape[-1])
        self.seen.append(self._features(images))

    def values(self) -> dict[str, Any]:
        real, fake = self._real(), torch.cat(self.seen)
        return distances(real, fake, "fid") | {
            "kid": round(kernel_distance_of_subsets(real, fake), 6),
            "reference": f"{len(real)} images of {self.reference}",
        }

    @cached_property
    def network(self) -> Any:
        """Images of 8-bit values -> features `[B, 2048]`."""
        return self._open(pick_device("auto"))

    def _open(self, device: str | torch.device) -> Any:
        from torchmetrics.image.fid import NoTrainInceptionV3

        made = open_inception(self.inception, lambda path: NoTrainInceptionV3("inception-v3-compat", ["2048"], path))
        return made.eval().to(device)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        where = pick_device("auto")
        return self.network((images * 255).round().clamp(0, 255).to(where, torch.uint8)).cpu()

    def _real(self) -> Tensor:
        about = [named([self.reference, self.inception]), self.size, self.inception, self.version]
        file = self.cache / f"{digest(about)}.pt"
        if not file.is_file():
            images = reference_images(self.reference, self.size)
            features = torch.cat([self._features(image[None]) for image in images])
            with written_whole(file) as part:
                torch.save(features, part)
        return torch.load(file, weights_only=True)


@dataclass
class Judged(Measure):
    """The mean score of a judge: CLIP score, ImageReward, PickScore, ..., see `open_judge`.

    Attributes:
        judge: its name, such as `clip:ViT-g-14:laion2b_s34b_b88k`.
        name: of the number; the judge's if not given.
    """

    judge: str
    name: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name or self.judge,)

    def check(self, setting: Setting) -> None:
        check_judge(self.judge)
        open_judge(self.judge, torch.device("cpu"))  # and not kept: the accelerator is the trainings' now

    def begin(self, setting: Setting, painter: Painter) -> None:
        self.prompts, self.scores = setting.prompts, []  # type: ignore[var-annotated]

    @cached_property
    def network(self) -> Any:
        """The judge, opened once."""
        return open_judge(self.judge, pick_device("auto"))

    def update(self, part: list[int], images: Tensor) -> None:
        self.scores.append(self.network([self.prompts[index] for index in part], images))

    def values(self) -> dict[str, Any]:
        return mean_of(torch.cat(self.scores), self.names[0])


@dataclass
class LikeTeacher(Measure):
    """How far a student's images are from its teacher's own of the same noise and prompts (Diffusion2GAN, Table 5).

    Students of checkpoints know their teacher; an entry of a pipeline names it as `teacher`, or has no such number.
    The teacher is called at the student's height and width, and as its folder says or as said here: for a student of
    pairs, as these were made.

    Attributes:
        distances: of `open_distance`; `tiny-latent-lpips` compares what the teacher's autoencoder makes of them.
        images: how many, the first ones.
        steps, guidance, solver: of the teacher; what its folder says where not given.
    """

    distances: list[str] = field(default_factory=lambda: ["shapes", "tiny-lpips"])
    images: int = 500
    steps: int | None = None
    guidance: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        known = (*DISTANCES, TINY_LATENT)
        if unknown := [name for name in self.distances if name not in known]:
            raise ConfigError(f"LikeTeacher's distances are some of {', '.join(known)}; got {', '.join(unknown)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"to_teacher_{name}" for name in self.distances)

    def check(self, setting: Setting) -> None:
        for name in self.distances:
            if name != TINY_LATENT:
                open_distance(name)

    def begin(self, setting: Setting, painter: Painter) -> None:
        self.painted, self.networks = None, {}  # type: ignore[var-annotated]
        self.apart: dict[str, list[Tensor]] = {name: [] for name in self.distances}
        if painter.teacher:
            size = {side: painter.call[side] for side in SIDES if side in painter.call}
            how = (self.steps, self.guidance, self.solver)
            self.painted = teachers_own(painter.teacher, setting, self.images, size, *how)
            self.networks = {name: self._open(name, painter.teacher) for name in self.distances}

    def _open(self, name: str, teacher: str) -> Distance:
        if name != TINY_LATENT:
            return open_distance(name, pick_device("auto"))
        metric, autoencoder = LatentLPIPS.load(name), backbones.load(teacher).autoencoder()

        @torch.no_grad()
        def measure(one: Tensor, other: Tensor) -> Tensor:
            return metric(*(autoencoder.encode(images * 2 - 1) for images in (one, other))).flatten()

        return measure

    def update(self, part: list[int], images: Tensor) -> None:
        known = [index for index in part if index < self.images]
        if self.painted is not None and known:
            if images.shape[1:] != self.painted.shape[1:]:
                sizes = (f"{image.shape[-1]}x{image.shape[-2]}" for image in (images, self.painted))
                raise ConfigError(
                    "LikeTeacher compares images of one size; the student paints {}, its teacher {}".format(*sizes)
                )
            for name, network in self.networks.items():
                self.apart[name].append(network(images[: len(known)], self.painted[known]))

    def values(self) -> dict[str, Any]:
        if self.painted is None:
            return {}
        each = (mean_of(torch.cat(self.apart[name]), f"to_teacher_{name}") for name in self.distances)
        return {name: value for values in each for name, value in values.items()}


@dataclass
class Diversity(Measure):
    """How unlike the images of one prompt are: the mean distance of all pairs, over prompts.

    With `dreamsim` this is the DreamDiv of Diffusion2GAN (arXiv 2405.05967); with another distance it stands in for it
    under its own name.

    Attributes:
        distance: of `open_distance`.
        prompts: how many, the first ones.
        images: of each prompt; the paper has 8, and fewer leave the mean less sure and no other.
    """

    distance: str = "tiny-lpips"
    prompts: int = 50
    images: int = 4

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES or self.images < 2 or self.prompts < 2:
            raise ConfigError(
                f"Diversity needs a distance of {', '.join(DISTANCES)}, and 2 prompts and images of each or more; got "
                f"{self.distance}, {self.prompts} and {self.images}"
            )

    def check(self, setting: Setting) -> None:
        open_distance(self.distance)

    @property
    def names(self) -> tuple[str, ...]:
        return (f"diversity_{self.distance}",)

    def begin(self, setting: Setting, painter: Painter) -> None:
        self.setting, self.painter = setting, painter

    def update(self, part: list[int], images: Tensor) -> None:
        """Paints images of its own."""

    def values(self) -> dict[str, Any]:
        network, setting = open_distance(self.distance, pick_device("auto")), self.setting
        asked = [prompt for prompt in setting.prompts[: self.prompts] for _ in range(self.images)]
        painted = self.painter(asked, setting.seed, setting.batch_size).unflatten(0, (-1, self.images))
        pairs = torch.combinations(torch.arange(self.images)).unbind(1)
        apart = torch.stack([network(images[pairs[0]], images[pairs[1]]).mean() for images in painted])
        return mean_of(apart, self.names[0])


def distances(real: Tensor, fake: Tensor, fid: str) -> dict[str, Any]:
    """Of features `[N, D]` and `[M, D]`: the Fréchet distance, called `fid`, with its interval; precision and recall of
    as many on both sides, a random part of the larger.
    """
    frechet, count = frechet_to(real), min(len(real), len(fake))
    generator = torch.Generator().manual_seed(0)
    one, other = (features[torch.randperm(len(features), generator=generator)[:count]] for features in (real, fake))
    precision, recall = precision_recall(one, other)
    return {
        fid: round(frechet(fake), 3),
        f"{fid}_interval": bootstrap(lambda chosen: frechet(fake[chosen]), len(fake), draws=100),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
    }


def mean_of(each: Tensor, name: str) -> dict[str, Any]:
    """The mean of `[N]`, with the interval of a bootstrap."""
    interval = bootstrap(lambda some: float(each[some].mean()), len(each))
    return {name: round(float(each.mean()), 5), f"{name}_interval": interval}


@cache
def held_out_features(count: int) -> Tensor:
    """The shapes judge's features of held-out drawn images, `[count, 64]`."""
    judge, images = load_shapes_judge(), ShapesDataset(count, seed=HELD_OUT)
    parts = (images.__getitems__(part)["pixels"] for part in batches(range(count), 256))
    with torch.no_grad():
        return torch.cat([judge.features(pixels) for pixels in parts])


def teachers_own(
    teacher: str,
    setting: Setting,
    count: int,
    size: dict[str, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
) -> Tensor:
    """The images `[N, 3, H, W]` in [0, 1] that a teacher paints of the first prompts; kept as 8-bit values."""
    painter, prompts = open_painter(teacher, steps, guidance, solver), setting.prompts[:count]
    painter.call |= size or {}
    noise = [painter.pipeline.device.type, setting.seed, setting.batch_size]  # generators of devices differ
    about = [teacher, named(teacher), painter.call, prompts, noise, *([solver] if solver else [])]
    return _kept(setting.cache / f"{digest(about)}.pt", lambda: painter(prompts, setting.seed, setting.batch_size))


def _kept(file: Path, paint: Callable[[], Tensor]) -> Tensor:
    if not file.is_file():
        with written_whole(file) as part:
            torch.save((paint() * 255).round().to(torch.uint8), part)
    return torch.load(file, weights_only=True) / 255


def specification(measures: list[Measure]) -> list[Any]:
    """What tells these measures from others, with the code of one's own; what is not given is no part of it."""
    kinds = [type(measure) for measure in measures]
    given = [{name: value for name, value in asdict(each).items() if value is not None} for each in measures]  # type: ignore[call-overload]
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    return [
        [name, settings, *([kind.version] if kind.version else []), *([code] if (code := sources(name)) else [])]
        for name, kind, settings in zip(names, kinds, given, strict=True)
    ]
