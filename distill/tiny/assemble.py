"""Puts tiny pipelines together: trained autoencoder and text encoders, and a denoiser that has yet to be trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from distill.backbones.base import CALL_FILE
from distill.files import save_json, written_whole
from distill.tiny.text import MAX_TOKENS


def tiny_sd3(parts: dict[str, Any]) -> Any:
    """A `StableDiffusion3Pipeline` with a random MMDiT of 6 blocks, width 128, and no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    encoders = [CLIPTextModelWithProjection.from_pretrained(path) for path in parts["text_encoders"]]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=sum(encoder.config.hidden_size for encoder in encoders),
        caption_projection_dim=128,
        pooled_projection_dim=sum(encoder.config.projection_dim for encoder in encoders),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=parts["vae"],
        text_encoder=encoders[0],
        tokenizer=parts["tokenizer"],
        text_encoder_2=encoders[1],
        tokenizer_2=parts["tokenizer"],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def tiny_sd(parts: dict[str, Any]) -> Any:
    """A `StableDiffusionPipeline` with a random U-Net of two scales, predicting noise on the scaled-linear schedule."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(parts["text_encoders"][1])
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=encoder.config.hidden_size,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing",  # any number of steps begins at pure noise (arXiv 2305.08891, section 3.3)
    )  # fmt: skip
    vae = parts["vae"]
    vae.register_to_config(shift_factor=None)  # StableDiffusionPipeline knows no shift
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=vae,
        text_encoder=encoder,
        tokenizer=parts["tokenizer"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"tiny-sd3": tiny_sd3, "tiny-sd": tiny_sd}
CALLS = {
    "tiny-sd3": {"max_sequence_length": 0, "guidance_scale": 2.5, "num_inference_steps": 50},
    "tiny-sd": {"guidance_scale": 2.5, "num_inference_steps": 50},
}


def assemble(name: str, source: str | Path, output: str | Path, seed: int = 0) -> None:
    """Writes the untrained tiny pipeline `name` to `output`.

    Args:
        name: `tiny-sd3` or `tiny-sd`.
        source: folder with `vae/`, `text/tokenizer`, `text/text_encoder` and `text/text_encoder_2`.
        output: the pipeline's folder.
        seed: of the denoiser's random weights.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    source = Path(source)
    torch.manual_seed(seed)
    parts = {
        "vae": AutoencoderKL.from_pretrained(source / "vae"),
        "tokenizer": CLIPTokenizer.from_pretrained(source / "text" / "tokenizer", model_max_length=MAX_TOKENS),
        "text_encoders": [source / "text" / "text_encoder", source / "text" / "text_encoder_2"],
    }
    pipeline = PIPELINES[name](parts)
    with written_whole(output) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        save_json({"call": CALLS[name]}, folder / CALL_FILE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Assemble an untrained tiny pipeline.")
    parser.add_argument("name", choices=PIPELINES)
    parser.add_argument("source")
    parser.add_argument("output")
    arguments = parser.parse_args()
    assemble(arguments.name, arguments.source, arguments.output)
