"""Who decides which images are good enough: `(prompts, images) -> [B]`, higher is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from distill.data import shapes
from distill.errors import ConfigError
from distill.evaluation.image_reward import load_image_reward
from distill.evaluation.metrics import ClipScore
from distill.evaluation.shapes_judge import ShapesJudge, load_shapes_judge
from distill.files import ASSETS

SCORES = 3  # raised whenever a judge scores otherwise than it did: kept scores are of one way of scoring


class Judge(Protocol):
    """What scores images.

    Attributes:
        spec: what `open_judge` opens this judge by, and what a calibration remembers of it.
        about: in one line what scale its scores have and where its model comes from, for whoever reads them.
    """

    spec: str
    about: str

    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        """B prompts and images `[B, 3, H, W]` in [0, 1] -> scores `[B]`, float32 or float64; one sample's does not
        depend on the others.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Moves its model, if it holds one; scores are on the CPU all the same."""
        ...


class ShapesScore:
    """How sure a shapes judge is of what the caption names: the geometric mean of the probabilities of the named
    attributes, in (0, 1].

    Args:
        spec: `shapes` for the judge that measures alignment; `small-shapes` for a smaller one of another training, so
            that nothing is measured by the network that decided.

    Scores are float64: in float32 many images of a good student have exactly 1, and no threshold lies between them.
    A prompt that is no caption of drawn shapes raises a ConfigError. It stays on the CPU, where it is fast enough.
    """

    def __init__(self, spec: str = "small-shapes"):
        self.spec = spec
        self.about = f"a probability in (0, 1]; the network '{spec}' that ships with distill"
        small = ASSETS / "small_judge.safetensors" if spec == "small-shapes" else None
        self.judge: ShapesJudge = load_shapes_judge(small)

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        try:
            asked = shapes.parse(prompts)
        except ValueError as error:
            raise ConfigError(f"the judge '{self.spec}' scores drawn shapes only: {error}") from error
        logits = [column.double().log_softmax(1) for column in self.judge(images.float().cpu() * 2 - 1)]
        named = asked.attributes != shapes.UNNAMED
        direct = _surety(logits, asked, named)
        other = _surety([*logits[: shapes.FIRST.start], *logits[shapes.SECOND], *logits[shapes.FIRST]], asked, named)
        two = logits[shapes.LAYOUT].argmax(1) != 0
        return torch.where(~asked.ordered & two, torch.maximum(direct, other), direct).exp()

    def to(self, device: torch.device | str) -> Self:
        """Stays where it is."""
        return self


def _surety(logits: list[Tensor], asked: shapes.Named, named: Tensor) -> Tensor:
    """Mean log-probability of the named values, `[B]`."""
    chosen = [
        column.gather(1, value.clamp(min=0)[:, None])[:, 0]
        for column, value in zip(logits, asked.attributes.unbind(1), strict=True)
    ]
    return (torch.stack(chosen, 1) * named).sum(1) / named.sum(1).clamp(min=1)


class ClipJudge:
    """Cosine of image and prompt in an open_clip model, in [-1, 1] (arXiv 2104.08718 without its factor 2.5).

    Args:
        spec: `clip:ARCHITECTURE:WEIGHTS`, such as `clip:ViT-bigG-14:laion2b_s39b_b160k`; an open_clip tag or a file.
        device: of the model.

    Raises:
        ConfigError: no such model or weights.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu"):
        _, architecture, weights = _parts(spec, 3, "clip:ARCHITECTURE:WEIGHTS")
        self.spec = spec
        self.about = f"a cosine in [-1, 1]; open_clip's {architecture} with the weights {weights}"
        self.metric = ClipScore(architecture, weights).to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        return self.metric.cosines(images.to(self.metric.device), prompts).float().cpu()

    def to(self, device: torch.device | str) -> Self:
        """Moves the model."""
        self.metric.to(device)
        return self


class ImageRewardJudge:
    """ImageReward (arXiv 2304.05977), the judge of the adaptive collaboration paper, standardised by its authors.

    Args:
        spec: `image-reward:ImageReward-v1.0`, from the hub, or `image-reward:FOLDER`, see `load_image_reward`.
        device: of the model.

    Raises:
        ConfigError: no such model, or one that lacks something.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu"):
        _, name = _parts(spec, 2, "image-reward:ImageReward-v1.0")
        self.spec = spec
        self.about = f"of mean 0 and deviation 1 by its authors' account; ImageReward (arXiv 2304.05977) of {name}"
        self.model = load_image_reward(name).to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        return self.model(prompts, images).float().cpu()

    def to(self, device: torch.device | str) -> Self:
        """Moves the model."""
        self.model.to(device)
        return self


class PreferenceJudge:
    """A CLIP trained on people's choices, through transformers: PickScore (arXiv 2305.01569) and its like. The cosine
    times the model's own scale.

    Args:
        spec: `preference:MODEL`, a hub id such as `preference:yuvalkirstain/PickScore_v1`, or a folder.
        device: of the model.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu"):
        from transformers import AutoModel, AutoProcessor

        _, name = _parts(spec, 2, "preference:yuvalkirstain/PickScore_v1")
        self.spec = spec
        self.about = f"a cosine times the model's own scale; {name} through transformers"
        try:
            self.model: Any = AutoModel.from_pretrained(name).eval().requires_grad_(False).to(device)
            self.processor: Any = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the judge '{spec}' cannot be opened ({str(error).splitlines()[0]})") from error

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        pictures = [to_pil_image(image) for image in images.float().cpu()]
        options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
        answer = self.model(**self.processor(text=prompts, images=pictures, **options).to(self.model.device))
        return answer.logits_per_image.diagonal().float().cpu()

    def to(self, device: torch.device | str) -> Self:
        """Moves the model."""
        self.model.to(device)
        return self


class NetworkJudge:
    """Any network of one's own as a judge.

    Args:
        network: `(prompts, images) -> [B]`. A module that `to` has moved is given its images where it is; a function
            sees to that itself.
        spec: a name for it that changes when its weights do.
        about: what scale its scores have and where it comes from.
    """

    def __init__(
        self,
        network: Callable[[list[str], Tensor], Tensor] | nn.Module,
        spec: str,
        about: str = "of a scale of its own; a network given in Python",
    ):
        self.network, self.spec, self.about = network, spec, about
        self.device: torch.device | str | None = None

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        scores = self.network(prompts, images if self.device is None else images.to(self.device))
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).cpu()

    def to(self, device: torch.device | str) -> Self:
        """Moves a module."""
        if isinstance(self.network, nn.Module):
            self.network.to(device)
            self.device = device
        return self


def _critic(spec: str, device: torch.device | str) -> Judge:
    from distill.collaboration.critic import CriticJudge

    return CriticJudge(spec, device)


KINDS: dict[str, Callable[[str, torch.device | str], Judge]] = {
    "shapes": lambda spec, device: ShapesScore(spec),
    "small-shapes": lambda spec, device: ShapesScore(spec),
    "clip": ClipJudge,
    "image-reward": ImageRewardJudge,
    "preference": PreferenceJudge,
    "critic": _critic,
}


def open_judge(spec: str, device: torch.device | str = "cpu") -> Judge:
    """A judge by its name: `small-shapes`, `shapes`, `clip:ARCHITECTURE:WEIGHTS`, `image-reward:NAME`,
    `preference:MODEL` or `critic:CHECKPOINT`.

    Raises:
        ConfigError: an unknown kind, or one whose model cannot be opened.
    """
    check_judge(spec)
    return KINDS[spec.split(":")[0]](spec, device)


def check_judge(spec: str) -> None:
    """Refuses a judge of an unknown kind, without opening any.

    Raises:
        ConfigError: an unknown kind.
    """
    if spec.split(":")[0] not in KINDS:
        raise ConfigError(f"the judge '{spec}' is unknown; name one of {', '.join(KINDS)}")


def _parts(spec: str, count: int, example: str) -> list[str]:
    parts = spec.split(":", count - 1)
    if len(parts) < count or not all(parts):
        raise ConfigError(f"the judge '{spec}' names no model; write it as {example}")
    return parts
