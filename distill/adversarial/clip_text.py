"""A frozen open_clip text tower, as ADD conditions its critic with (arXiv 2311.17042, section 4: CLIP-ViT-g-14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import ConfigError


class ClipText(nn.Module):
    """Prompts to the pooled text embedding of an open_clip model; its image tower is thrown away.

    Args:
        name: `architecture:weights`, such as `ViT-g-14:laion2b_s34b_b88k`; the weights are a tag
            of open_clip or a file.

    Raises:
        ConfigError: no such model or weights.
    """

    def __init__(self, name: str):
        import open_clip

        super().__init__()
        architecture, _, weights = name.partition(":")
        if architecture not in open_clip.list_models() or not weights:
            raise ConfigError(
                f"the text tower '{name}' is unknown; give an open_clip architecture and its weights, such as "
                "ViT-g-14:laion2b_s34b_b88k or ViT-B-32:weights.safetensors"
            )
        try:
            model: Any = open_clip.create_model(architecture, pretrained=weights)
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the weights of the text tower '{name}' cannot be read ({reason})") from error
        model.visual = None
        self.model, self.tokenizer = model, open_clip.get_tokenizer(architecture)
        with torch.no_grad():
            self.width = model.encode_text(self.tokenizer([""])).shape[1]

    def forward(self, prompts: list[str]) -> Tensor:
        """B prompts -> `[B, P]`, in float32."""
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(list(prompts)).to(device)).float()
