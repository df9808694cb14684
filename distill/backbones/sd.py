"""Stable Diffusion 1.5 and 2.1: a U-Net on a discrete variance-preserving schedule, one CLIP encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.backbones.base import Backbone, TextEncoder
from distill.batch import Cond
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.process import VariancePreserving


class SDDenoiser(Denoiser):
    """`UNet2DConditionModel`; its blocks are the down, middle and up stages, whose outputs are grids already."""

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks]

    @property
    def widths(self) -> list[int]:
        channels = list(self.network.config.block_out_channels)
        return [*channels, channels[-1], *reversed(channels)]

    def grid(self, output: Any, x_t: Tensor) -> Tensor:
        return output[0] if isinstance(output, tuple) else output  # down stages answer (features, skips)

    def predict(self, x_t: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        dtype = self.network.dtype
        return self.network(x_t.to(dtype), timestep, cond["text"].to(dtype), return_dict=False)[0]


class SDTextEncoder(TextEncoder):
    """The last hidden states of one CLIP text encoder, as the pipeline uses them.

    Args:
        tokenizer, encoder: the pipeline's.
    """

    def __init__(self, tokenizer: Any, encoder: Any):
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder

    @property
    def components(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "text_encoder": self.encoder}

    def forward(self, prompts: list[str]) -> Cond:
        """B prompts -> `text` `[B, L, D]`, `pooled` `[B, D]`."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        answer = self.encoder(tokens.input_ids.to(self.encoder.device))
        return {"text": answer.last_hidden_state, "pooled": answer.pooler_output}


class SDBackbone(Backbone):
    """`StableDiffusionPipeline`, predicting noise (1.5) or v (2.1)."""

    schedule_options = ("prediction_type", "rescale_betas_zero_snr")
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def denoiser(self) -> SDDenoiser:
        from diffusers import UNet2DConditionModel

        network = UNet2DConditionModel.from_pretrained(self.folder, subfolder="unet", torch_dtype=self.dtype)
        return SDDenoiser(network, self.process())

    def text_encoder(self) -> SDTextEncoder:
        from transformers import CLIPTextModel, CLIPTokenizer

        encoder = CLIPTextModel.from_pretrained(self.folder, subfolder="text_encoder", dtype=self.dtype)
        return SDTextEncoder(CLIPTokenizer.from_pretrained(self.folder, subfolder="tokenizer"), encoder)

    @property
    def pooled(self) -> int:
        from transformers import CLIPTextConfig

        return CLIPTextConfig.from_pretrained(self.near, subfolder="text_encoder").hidden_size

    def process(self) -> VariancePreserving:
        scheduler = self._ddim()
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def pipeline(self, **components: Any) -> Any:
        if self.schedule and "scheduler" not in components:  # the folder's own sampler would follow the old schedule
            components["scheduler"] = self._ddim()
        return super().pipeline(**components)

    def student_scheduler(self) -> Any:
        from diffusers import LCMScheduler

        return LCMScheduler.from_config(self._ddim().config, timestep_spacing="trailing")

    def _levels_call(self, levels: list[float]) -> dict[str, Any]:
        return {"timesteps": self.process().timestep(torch.tensor(levels)).tolist()}

    def embedding_arguments(self, cond: Cond) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"]}

    def _ddim(self) -> Any:
        from diffusers import DDIMScheduler

        # These are latents; where a folder's scheduler is another, DDIM's own value is True.
        settings: dict[str, Any] = {"clip_sample": False}
        if self.schedule.get("rescale_betas_zero_snr"):
            settings["timestep_spacing"] = "trailing"  # beginning at pure noise (arXiv 2305.08891, section 3.3)
        return DDIMScheduler.from_pretrained(self.near, subfolder="scheduler", **settings | self.schedule)

    def config(self) -> dict[str, Any]:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.load_config(self.near, subfolder="unet")
