"""Stable Diffusion 3 and 3.5: an MMDiT on a rectified flow, two CLIP encoders and an optional T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.backbones.base import Backbone, TextEncoder, absent_components
from distill.batch import Cond
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.process import RectifiedFlow


class SD3Denoiser(Denoiser):
    """`SD3Transformer2DModel`; a block answers (text tokens, image tokens), and the image tokens form the grid."""

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.network.transformer_blocks)

    @property
    def widths(self) -> list[int]:
        return [self.network.inner_dim] * len(self.blocks)

    def grid(self, output: Any, x_t: Tensor) -> Tensor:
        patch = self.network.config.patch_size
        height, width = x_t.shape[-2] // patch, x_t.shape[-1] // patch
        return output[1].transpose(1, 2).unflatten(2, (height, width))

    def predict(self, x_t: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return self.network(
            hidden_states=x_t.to(self.network.dtype),
            timestep=timestep,
            encoder_hidden_states=cond["text"].to(self.network.dtype),
            pooled_projections=cond["pooled"].to(self.network.dtype),
            return_dict=False,
        )[0]


class SD3TextEncoder(TextEncoder):
    """The pipeline's own `encode_prompt`, so that training and stock sampling see the same conditioning.

    Args:
        pipeline: a `StableDiffusion3Pipeline` without autoencoder.
        tokens: T5 tokens beside the CLIP ones; zeros where T5 is absent, as the pipeline does.
    """

    def __init__(self, pipeline: Any, tokens: int):
        super().__init__()
        self.encoder, self.encoder_2, self.encoder_3 = (
            pipeline.text_encoder,
            pipeline.text_encoder_2,
            pipeline.text_encoder_3,
        )
        self.pipeline, self.tokens = pipeline, tokens

    @property
    def components(self) -> dict[str, Any]:
        kinds = ("text_encoder", "tokenizer")
        names = [kind + suffix for kind in kinds for suffix in ("", "_2", "_3")]
        return {name: getattr(self.pipeline, name) for name in names}

    def forward(self, prompts: list[str]) -> Cond:
        """B prompts -> `text` `[B, L + tokens, D]`, `pooled` `[B, P]`."""
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return {"text": text, "pooled": pooled}


class SD3Backbone(Backbone):
    """`StableDiffusion3Pipeline`, with or without T5."""

    denoiser_name = "transformer"

    def denoiser(self) -> SD3Denoiser:
        from diffusers import SD3Transformer2DModel

        network = SD3Transformer2DModel.from_pretrained(
            self.folder, subfolder="transformer", torch_dtype=self.dtype, variant=self.variant("transformer")
        )
        return SD3Denoiser(network, self.process())

    def text_encoder(self) -> SD3TextEncoder:
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):  # encode_prompt asks the transformer for its widths only
            transformer = SD3Transformer2DModel.from_config(self.config())
        pipeline = self.pipeline(vae=None, transformer=transformer)
        return SD3TextEncoder(pipeline, self.call.get("max_sequence_length", 256))

    @property
    def absent(self) -> dict[str, None]:
        """T5 where the pipeline has none."""
        return {name: None for name in absent_components(self.near) if name in ("text_encoder_3", "tokenizer_3")}

    @property
    def multiple(self) -> int:
        """Pictures are whole patches of latents."""
        return self.factor * self.config()["patch_size"]

    @property
    def pooled(self) -> int:
        return self.config()["pooled_projection_dim"]

    def process(self) -> RectifiedFlow:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.near, subfolder="scheduler")
        return RectifiedFlow(scheduler.config.num_train_timesteps)

    def student_scheduler(self) -> Any:
        from diffusers import FlowMatchLCMScheduler

        return FlowMatchLCMScheduler(shift=1.0)  # the levels of `sigmas=` are the network's own: nothing to shift

    def _levels_call(self, levels: list[float]) -> dict[str, Any]:
        kept = {name: self.call[name] for name in ("max_sequence_length",) if name in self.call}
        return {"sigmas": levels, **kept}

    def embedding_arguments(self, cond: Cond) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"]}

    def config(self) -> dict[str, Any]:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel.load_config(self.near, subfolder="transformer")
