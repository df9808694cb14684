"""A critic that a distillation has trained, as the judge of its own student's images."""

from __future__ import annotations

import hashlib
from typing import Any, Self

import torch
from torch import Tensor

from distill import backbones
from distill.backbones.base import Backbone
from distill.batch import Batch, SameDraws
from distill.errors import ConfigError
from distill.export import read_checkpoint
from distill.frozen import Frozen
from distill.strategies.base import Strategy


class CriticJudge:
    """How real a strategy's trained critic finds an image of a prompt: its mean logit, of no particular range.

    It was trained against the student of its own run and says little about the images of another. The paper of the
    adaptive collaboration (arXiv 2312.10835) uses ImageReward; this judge costs no further network.

    Its `spec` ends in a digest of the checkpoint, and a judge that is opened again by that spec must have the same.

    Args:
        spec: `critic:CHECKPOINT`, of `distill fit`; of its strategies the first whose critic can judge is taken.
        device: of the networks.
        strategies: of the run, in its order, where the checkpoint does not say how they were made.

    Raises:
        ConfigError: no such checkpoint, none of its critics can judge, or it does not say how they were made.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu", strategies: list[Strategy] | None = None):
        checkpoint, _, known = spec.partition(":")[2].partition("@")
        if not checkpoint:
            raise ConfigError(f"the judge '{spec}' names no checkpoint; write it as critic:CHECKPOINT")
        facts, weights = read_checkpoint(checkpoint)
        found = _digest(weights)
        if known and known != found:
            raise ConfigError(f"the judge '{spec}' is another by now: its checkpoint's critics are {found}")
        self.spec = f"critic:{checkpoint}@{found}"
        self.about = f"a mean logit, of no particular range; the critic that {checkpoint} was trained against"
        index, self.strategy = _first_that_judges(strategies or strategies_of(facts, checkpoint), checkpoint)
        self.backbone, self.teacher = restore(self.strategy, index, facts, weights)
        self.text_encoder = Frozen(self.backbone.text_encoder())
        self.autoencoder = Frozen(self.backbone.autoencoder())
        self.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Moves all of its networks."""
        self.device = torch.device(device)
        for network in (self.strategy, self.teacher, self.text_encoder, self.autoencoder):
            network.to(self.device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: Tensor) -> Tensor:
        pictures = images.to(self.device, torch.float32) * 2 - 1
        return self.strategy.score(self._batch(prompts, pictures)).float().cpu()

    def _batch(self, prompts: list[str], pictures: Tensor) -> Batch:
        latents = self.autoencoder.network.encode(pictures)
        draws = SameDraws(0, 0, 0, len(prompts), self.device)
        cond = self._conditioning(prompts)
        return Batch(latents, cond, prompts, draws, pictures=pictures, constant=lambda one: self._conditioning([one]))

    def _conditioning(self, prompts: list[str]) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in self.text_encoder(prompts).items()}


def _digest(weights: dict[str, Tensor]) -> str:
    """Of the critics among a run's weights."""
    critics = {name: tensor for name, tensor in weights.items() if name.startswith("strategies.")}
    found = hashlib.sha256()
    for name in sorted(critics):
        found.update(name.encode() + critics[name].float().contiguous().numpy().tobytes())
    return found.hexdigest()[:10]


def strategies_of(facts: dict[str, Any], checkpoint: str) -> list[Strategy]:
    """The strategies of a run as its recipe says, not yet configured."""
    from jsonargparse import ArgumentParser

    if not facts.get("strategy_configs"):
        raise ConfigError(
            f"'{checkpoint}' does not say how its strategies were made, as it was not trained by `distill fit`; "
            "give them to CriticJudge"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategies", type=list[Strategy])
    configs = parser.parse_object({"strategies": facts["strategy_configs"]})
    made: list[Strategy] = parser.instantiate_classes(configs).strategies
    return made


def restore(
    strategy: Strategy, index: int, facts: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[Backbone, Frozen]:
    """Gives a run's strategy the critic that the run has trained, frozen.

    Args:
        strategy: as `strategies_of` made it.
        index: its place among the run's strategies.
        facts, weights: what `read_checkpoint` found.

    Returns:
        The backbone and the teacher it was configured with.
    """
    backbone = backbones.load(facts["teacher"], schedule=facts.get("schedule"))
    teacher = Frozen(backbones.load(facts["teacher"]).denoiser())  # a copy: a critic can begin as the backbone's own
    strategy.configure(backbone, teacher)
    prefix = f"strategies.{index}.critic."
    trained = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    strategy.critic.load_state_dict(trained)  # type: ignore[union-attr]
    strategy.eval().requires_grad_(False)
    return backbone, teacher


def _first_that_judges(strategies: list[Strategy], checkpoint: str) -> tuple[int, Strategy]:
    reasons = []
    for index, strategy in enumerate(strategies):
        try:
            strategy.check_judging()
            return index, strategy
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(f"no critic of '{checkpoint}' can judge: {'; '.join(reasons)}")
