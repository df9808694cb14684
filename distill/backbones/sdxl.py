"""Stable Diffusion XL: a U-Net with two CLIP encoders, a pooled embedding and micro-conditioning on picture sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.backbones.base import TextEncoder
from distill.backbones.sd import SDBackbone, SDDenoiser
from distill.batch import Cond
from distill.diffusion.process import Process


class SDXLDenoiser(SDDenoiser):
    """`UNet2DConditionModel` told that each picture is whole and of its own size, as the pipeline says by default.

    Args:
        network: the diffusers model.
        process: what its checkpoint fixes.
        factor: pixels per latent, each way.
    """

    def __init__(self, network: Any, process: Process, factor: int):
        super().__init__(network, process)
        self.factor = factor

    def predict(self, x_t: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        dtype = self.network.dtype
        size = [side * self.factor for side in x_t.shape[-2:]]
        sizes = torch.tensor([*size, 0, 0, *size], device=x_t.device, dtype=dtype)  # original, top left corner, target
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": sizes.expand(len(x_t), 6)}
        return self.network(
            x_t.to(dtype), timestep, cond["text"].to(dtype), added_cond_kwargs=added, return_dict=False
        )[0]


class SDXLTextEncoder(TextEncoder):
    """The pipeline's own `encode_prompt`; an empty prompt is all zeros where the pipeline guides with zeros.

    Args:
        pipeline: a `StableDiffusionXLPipeline` without networks other than its text encoders.
    """

    def __init__(self, pipeline: Any):
        super().__init__()
        self.encoder, self.encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        self.pipeline = pipeline

    @property
    def components(self) -> dict[str, Any]:
        names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
        return {name: getattr(self.pipeline, name) for name in names}

    def forward(self, prompts: list[str]) -> Cond:
        """B prompts -> `text` `[B, L, D]`, `pooled` `[B, P]`."""
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.encoder_2.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=text.device)
            text, pooled = text.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"text": text, "pooled": pooled}


class SDXLBackbone(SDBackbone):
    """`StableDiffusionXLPipeline`, base model."""

    unchecked = {}

    def denoiser(self) -> SDXLDenoiser:
        return SDXLDenoiser(self.unet(), self.process(), self.factor)

    def text_encoder(self) -> SDXLTextEncoder:  # type: ignore[override]
        return SDXLTextEncoder(self.pipeline(vae=None, unet=None))

    @property
    def pooled(self) -> int:
        from transformers import CLIPTextConfig

        return CLIPTextConfig.from_pretrained(self.near, subfolder="text_encoder_2").projection_dim  # type: ignore[return-value]

    def embedding_arguments(self, cond: Cond) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"]}
