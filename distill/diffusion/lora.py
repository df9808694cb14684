"""Low-rank adapters that are trained in place of a network's weights: LoRA, arXiv 2106.09685, by peft."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.errors import ConfigError, at_least_one

MARK = ".lora_"  # in the name of each weight of an adapter, as peft has it


@dataclass(frozen=True)
class LoRA:
    """What a student learns beside frozen weights: the answer of a layer W becomes `W x + alpha / rank B A x`, where B
    begins at zero (section 4.1).

    Args:
        rank: of A and B.
        alpha: their strength; `rank` if not given.
        layers: ends of the names of layers that get an adapter, such as `attn.to_q`; all linear and convolution layers
            of the network's blocks if not given.

    Raises:
        ConfigError: a rank below 1, an alpha that is not positive, or an empty list.
    """

    rank: int = 64
    alpha: float | None = None
    layers: list[str] | None = None

    def __post_init__(self) -> None:
        at_least_one(**{"model.lora.rank": self.rank})
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(
                f"model.lora.alpha={self.alpha} is no strength; give a positive number, or null for the rank"
            )
        if self.layers is not None and not self.layers:
            raise ConfigError("model.lora.layers is empty; leave it out for all layers of the network's blocks")

    @property
    def strength(self) -> float:
        """The alpha in force."""
        return self.rank if self.alpha is None else self.alpha

    def adapt(self, network: Any, blocks: list[nn.Module]) -> None:
        """Freezes a diffusers network and gives its layers adapters, which begin at random numbers of torch's own and
        change nothing yet.

        Raises:
            ConfigError: no layer of the blocks has a name that ends as asked.
        """
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        inside = {id(layer) for block in blocks for layer in block.modules()}
        named = [n for n, layer in network.named_modules() if id(layer) in inside and _adaptable(layer)]
        chosen = [name for name in named if self.layers is None or any(_ends(name, end) for end in self.layers)]
        if missing := [end for end in self.layers or [] if not any(_ends(name, end) for name in chosen)]:
            known = sorted({".".join(part for part in name.split(".")[-2:]) for name in named})
            raise ConfigError(
                f"model.lora.layers names {', '.join(missing)}, and no linear or convolution layer of the network's "
                f"blocks has a name that ends so; they end in {', '.join(known)}"
            )
        network.requires_grad_(False)
        network.add_adapter(
            LoraConfig(r=self.rank, lora_alpha=self.strength, target_modules=chosen)  # type: ignore[arg-type]
        )
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):  # autocast sees to it, without float32 copies of all inputs
                layer.cast_input_dtype_enabled = False  # type: ignore[attr-defined]

    def settings(self) -> dict[str, Any]:
        """As a checkpoint keeps them: the same for adapters that are the same, however they were asked for."""
        return {"rank": self.rank, "alpha": self.strength, "layers": self.layers and sorted(self.layers)}


def merge(network: Any) -> None:
    """Adds what a network's adapters have learnt to the weights beside them, in place, and takes the adapters out."""
    network.fuse_lora()
    network.unload_lora()


def portable(network: Any, lora: LoRA) -> dict[str, Any]:
    """The adapters' weights as diffusers' `save_lora_weights` takes them, their strength within, so that nobody has to
    be told of it.
    """
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network)
    scale = lora.strength / lora.rank
    return {name: scale * tensor if ".lora_B." in name else tensor for name, tensor in weights.items()}


def _adaptable(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)
