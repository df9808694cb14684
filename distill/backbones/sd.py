"""Stable Diffusion 1.5 and 2.1: a U-Net on a discrete variance-preserving schedule, one CLIP encoder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from distill.backbones.base import Backbone, TextEncoder, absent_components
from distill.batch import Cond
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.process import VariancePreserving
from distill.diffusion.sampling import on_same_noise
from distill.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SAFETY = ("safety_checker", "feature_extractor", "image_encoder")
NOISE = (  # settings of diffusers' schedulers that make the noise schedule
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


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
        return SDDenoiser(self.unet(), self.process())

    def unet(self) -> Any:
        """The pipeline's network, as diffusers has it.

        Raises:
            ConfigError: one that was distilled already and is told its guidance.
        """
        from diffusers import UNet2DConditionModel

        folder = self.folder  # of a hub id: fetched, and asked from here on
        if self.config().get("time_cond_proj_dim"):
            raise ConfigError(
                f"the network of '{self.path}' takes the guidance as an input (time_cond_proj_dim), as distilled ones "
                "do; give the pipeline that it was distilled from"
            )
        return UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", torch_dtype=self.dtype, variant=self.variant("unet")
        )

    def text_encoder(self) -> SDTextEncoder:
        from transformers import CLIPTextModel, CLIPTokenizer

        encoder = CLIPTextModel.from_pretrained(
            self.folder, subfolder="text_encoder", dtype=self.dtype, variant=self.variant("text_encoder")
        )
        return SDTextEncoder(CLIPTokenizer.from_pretrained(self.folder, subfolder="tokenizer"), encoder)

    @property
    def pooled(self) -> int:
        from transformers import CLIPTextConfig

        return CLIPTextConfig.from_pretrained(self.near, subfolder="text_encoder").hidden_size

    def process(self) -> VariancePreserving:
        scheduler = self._ddim()
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @property
    def absent(self) -> dict[str, None]:
        """What checks and describes pictures, where a folder lacks it."""
        if not Path(self.near).is_dir():
            return {}
        return {name: None for name in absent_components(self.near) if name in SAFETY}

    def pipeline(self, **components: Any) -> Any:
        if self.schedule and "scheduler" not in components:  # the folder's own sampler would follow the old schedule
            components["scheduler"] = self._ddim()
        return super().pipeline(**components)

    def student_scheduler(self) -> Any:
        from diffusers import LCMScheduler

        config = self._ddim().config
        noise = {name: config[name] for name in NOISE}  # what a config leaves to a class is not taken over by another
        return LCMScheduler.from_config(config, timestep_spacing="trailing", **noise)

    def _levels_call(self, levels: list[float]) -> dict[str, Any]:
        return {"timesteps": self.process().timestep(torch.tensor(levels)).tolist()}

    def embedding_arguments(self, cond: Cond) -> dict[str, Any]:
        return {"prompt_embeds": cond["text"]}

    def _ddim(self) -> Any:
        """DDIM on the folder's noise schedule with the changes of `schedule`.

        Raises:
            ConfigError: a folder whose scheduler follows no such noise schedule.
        """
        from diffusers import DDIMScheduler

        noise = self._noise()
        settings: dict[str, Any] = {"clip_sample": False}  # these are latents; DDIM's own value is True
        if self.schedule.get("rescale_betas_zero_snr"):
            settings["timestep_spacing"] = "trailing"  # beginning at pure noise (arXiv 2305.08891, section 3.3)
        return DDIMScheduler.from_pretrained(self.near, subfolder="scheduler", **noise | settings | self.schedule)

    def _noise(self) -> dict[str, Any]:
        """The settings of `NOISE` that the folder's scheduler has, its class's own where its file leaves them out."""
        from diffusers import DDIMScheduler

        config = DDIMScheduler.load_config(self.near, subfolder="scheduler")
        try:
            own = self.scheduler()
        except (AttributeError, ImportError):  # a class that is not here; its file may say enough
            own, settings = None, config
        else:
            settings = own.config
        noise = {name: settings[name] for name in NOISE if name in settings}
        told = own is not None or {"beta_start", "beta_end", "beta_schedule"} <= noise.keys()
        if told and noise.get("prediction_type", "epsilon") in PREDICTIONS and not settings.get("use_flow_sigmas"):
            with suppress(NotImplementedError):  # of kinds of betas that DDIM has not
                made = DDIMScheduler(**noise)
                if own is None or on_same_noise(own, made):
                    return noise
        raise ConfigError(
            f"the scheduler of '{self.path}', {config.get('_class_name')}, follows no discrete variance-preserving "
            f"noise schedule that DDIM knows with a prediction_type of {', '.join(PREDICTIONS)}, the one kind on which "
            "such a pipeline can be distilled"
        )

    def config(self) -> dict[str, Any]:
        """The denoiser's configuration; of a network of old, with the size that diffusers gives it."""
        from diffusers import UNet2DConditionModel

        config = UNet2DConditionModel.load_config(self.near, subfolder="unet")
        old = Version(config.get("_diffusers_version", "1")) < Version("0.9.0.dev0")
        return {**config, "sample_size": 64} if old and config["sample_size"] < 64 else config
