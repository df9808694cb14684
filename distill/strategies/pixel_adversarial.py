"""ADD's adversarial term: heads on a frozen vision network (Sauer et al. 2023, https://arxiv.org/abs/2311.17042)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from distill.adversarial.augment import CHANGES, augment, random_crop
from distill.adversarial.clip_text import ClipText
from distill.adversarial.gan import R1, ExactR1, GanLoss, Hinge, Logits, gradient_penalty, mean_logit, per_sample
from distill.adversarial.heads import TokenHead, check_alone
from distill.adversarial.vision import VisionTransformer
from distill.backbones.base import Backbone
from distill.batch import Batch, Sample
from distill.errors import ConfigError
from distill.frozen import Frozen
from distill.strategies.base import Strategy, Weight


class PixelCritic(nn.Module):
    """An independent head per depth of the vision network, all with one condition.

    Args:
        width: channels of a token.
        taps: number of heads.
        cond: size of the condition; 0 for none.
        hidden, norm: as in `ProjectedHead`.
    """

    def __init__(self, width: int, taps: int, cond: int, hidden: int | None, norm: str):
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(width, cond, hidden, norm) for _ in range(taps))

    def forward(self, features: list[Tensor], condition: Tensor | None) -> Logits:
        """Tokens `[B, D, N]` of each depth -> logits `[B, N]` of each head."""
        return [head(feature, condition) for head, feature in zip(self.heads, features, strict=True)]


class PixelAdversarial(Strategy):
    """A frozen vision transformer reads decoded pictures; trained heads tell real from fake at every depth.

    Args:
        weight: of this term, or `balanced`.
        vision: timm name or folder of the vision network (Table 1a: DINOv2 ViT-S).
        text: whether the heads see the pooled text embedding of the batch (c_text); an open_clip text tower in place of
            the pipeline's as `architecture:weights` (section 4: ViT-g-14), see `ClipText`.
        image: timm name or folder of the network whose class token of the real picture the heads see (c_img; section
            4: DINOv2 ViT-L); None for none.
        image_from_noise: whether they see it too where the student began at pure noise, so never saw the picture.
        loss: the game; hinge if not given.
        r1: gradient penalty at the heads' inputs on real pictures; gamma = 1e-5 if not given, none at a weight of 0.
        blocks: of the vision network, see `VisionTransformer`.
        size: side of the picture it sees; its own if not given.
        augment: how real and fake are changed alike before they are judged: some of `colour`, `translation` and
            `cutout`; all if not given.
        hidden, norm: as in `ProjectedHead`.
        balance, begins: as in `Strategy`.

    Raises:
        ConfigError: R1 of another kind than `ExactR1`, or an unknown change of the pictures.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        vision: str = "vit_small_patch14_dinov2",
        text: bool | str = True,
        image: str | None = "vit_large_patch14_dinov2",
        image_from_noise: bool = False,
        loss: GanLoss | None = None,
        r1: R1 | None = None,
        blocks: list[int] | None = None,
        size: int | None = None,
        augment: list[str] | None = None,
        hidden: int | None = None,
        norm: str = "local_batch",
        balance: float = 1.0,
        begins: int = 0,
    ):
        super().__init__(weight, balance, begins)
        if not isinstance(r1, ExactR1 | None):
            raise ConfigError(f"PixelAdversarial pays R1 at the heads' inputs: give ExactR1, not {type(r1).__name__}")
        if unknown := sorted(set(augment or ()) - set(CHANGES)):
            raise ConfigError(f"PixelAdversarial's augment is some of {', '.join(CHANGES)}; got {', '.join(unknown)}")
        self.vision_name, self.image_name, self.text, self.image_from_noise = vision, image, text, image_from_noise
        self.loss, self.r1, self.blocks, self.size = loss or Hinge(), r1 or ExactR1(1e-5), blocks, size
        self.hidden, self.norm = hidden, norm
        self.changes = list(CHANGES) if augment is None else augment

    def configure(self, backbone: Backbone, teacher: Frozen) -> None:
        self.vision = Frozen(VisionTransformer(self.vision_name, self.blocks, self.size))
        self.image = Frozen(VisionTransformer(self.image_name)) if self.image_name else None
        read = self.vision.network
        self.tower = Frozen(ClipText(self.text)) if isinstance(self.text, str) else None
        words = self.tower.network.width if self.tower else backbone.pooled
        cond = (words if self.text else 0) + (self.image.network.width if self.image else 0)
        self.critic = PixelCritic(read.width, read.taps, cond, self.hidden, self.norm)

    def check(self, batch_size: int) -> None:
        if batch_size < 2 and self.norm == "local_batch":
            raise ConfigError(
                "PixelAdversarial with norm=local_batch needs at least 2 samples per process, got 1; "
                "raise data.batch_size or set norm=group"
            )

    def student_loss(self, sample: Sample, batch: Batch, step: int) -> Tensor:
        features = self.vision.network.tokens(self._changed(sample.pixels, batch, "student"))
        critic = {name: tensor.detach() for name, tensor in self.critic.named_parameters()}  # type: ignore[union-attr]
        fake = functional_call(self.critic, critic, (features, self._condition(batch, self._hidden(sample))))  # type: ignore[arg-type]
        return self.loss.student(fake)

    def critic_loss(self, sample: Sample, batch: Batch, step: int) -> dict[str, Tensor]:
        """Real and fake under the same changes of colour and place, through the vision network in one pass."""
        assert self.critic is not None
        with torch.no_grad():  # the vision network reads; only the heads learn
            pictures = [self._changed(real_or_fake, batch, "critic") for real_or_fake in (batch.pixels, sample.pixels)]
            features = [feature.chunk(2) for feature in self.vision.network.tokens(torch.cat(pictures))]
            condition = self._condition(batch, self._hidden(sample))
        pays = self.r1.due(step)
        real_features = [real.detach().requires_grad_(pays) for real, _ in features]
        with parametrize.cached():  # one set of spectrally normalised weights for all that is compared
            real = self.critic(real_features, condition)
            fake = self.critic([fake for _, fake in features], condition)
            terms = {"game": self.loss.critic(real, fake)}
            if pays:
                terms["r1"] = self.r1.weight * self.r1.every * gradient_penalty(real, real_features)
        self.report = {"real": mean_logit(real), "fake": mean_logit(fake)}
        return terms

    def _changed(self, pictures: Tensor, batch: Batch, turn: str) -> Tensor:
        """The pictures as the vision network is to see them in a turn; the same changes for real and fake."""
        pictures = pictures.float()  # a decoder's may be bfloat16, for which not every device resizes
        if self.changes:
            pictures = augment(pictures, batch.draws, f"pixel/{turn}/augment", self.changes)
        return random_crop(pictures, self.vision.network.size, batch.draws, f"pixel/{turn}/crop")

    def check_judging(self) -> None:
        check_alone(self.norm, type(self).__name__)
        if self.image_name and self.image_from_noise:
            raise ConfigError(
                "the critic of PixelAdversarial was trained to see each prompt's real picture, which a judge does not "
                "have; train it with image=null or image_from_noise=false"
            )

    def score(self, batch: Batch) -> Tensor:
        """The mean over places and depths of the pictures as they are, without a condition on any other picture."""
        assert self.critic is not None
        return per_sample(self.critic(self.vision.network.tokens(batch.pixels), self._condition(batch, None)))

    def _hidden(self, sample: Sample) -> Tensor:
        """Of which samples the heads do not see the real picture: `[B]` bool."""
        return (sample.t >= 1) & (not self.image_from_noise)

    def _condition(self, batch: Batch, hidden: Tensor | None) -> Tensor | None:
        """c_text and c_img of each sample, each of mean square 1, side by side: `[B, P]`; None for neither.

        `hidden` are the samples without c_img, `[B]` bool; None for all.
        """
        parts = []
        if self.text:
            parts.append(_levelled(self._words(batch)))
        if self.image is not None and (hidden is None or hidden.all()):
            parts.append(torch.zeros(len(batch.prompts), self.image.network.width, device=batch.x0.device))
        elif self.image is not None:
            assert hidden is not None
            image = batch.once(f"pixel/image/{id(self)}", lambda: self.image(batch.pixels))  # type: ignore[misc]
            parts.append(_levelled(image).masked_fill(hidden[:, None], 0.0))
        return torch.cat(parts, dim=1) if parts else None

    def _words(self, batch: Batch) -> Tensor:
        if self.tower is None:
            return batch.cond["pooled"]
        return batch.once(f"pixel/words/{id(self)}", lambda: self.tower(batch.prompts))  # type: ignore[misc]


def _levelled(embedding: Tensor) -> Tensor:
    return normalize(embedding.float(), dim=1) * math.sqrt(embedding.shape[1])
