"""Small random pipelines saved to disk in the diffusers layout: real architectures, real loading code, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.backbones.base import CALL_FILE
from distill.files import save_json
from distill.tiny.text import MAX_TOKENS, build_text_encoder, build_tokenizer


def autoencoder(latent_channels: int, shift: float | None = 0.1):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.5,
        shift_factor=shift,
    )


def transformer(latent_channels: int = 16, layers: int = 2):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )


def unet(text: int, **kwargs: Any):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=text,
        **kwargs,
    )


def ddim(prediction: str = "epsilon"):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction
    )


def random_sd3(folder: Path, seed: int = 0, latent_channels: int = 16, tokens: int | None = 4) -> Path:
    """An SD3 of 2 blocks without T5, as SD3 allows."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    network = transformer(latent_channels)
    torch.nn.init.normal_(network.proj_out.weight, std=0.05)
    StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(latent_channels),
        text_encoder=build_text_encoder(tokenizer, 16, 16),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer, 32, 16),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    if tokens is not None:
        save_json({"call": {"max_sequence_length": tokens}}, folder / CALL_FILE)
    return folder


def random_sd(folder: Path, seed: int = 0, prediction: str = "epsilon") -> Path:
    """An SD 1.5 (epsilon) or 2.1 (v_prediction) with a U-Net of two scales."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    StableDiffusionPipeline(
        unet=unet(32),
        scheduler=ddim(prediction),
        vae=autoencoder(4, shift=None),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def safety_checker() -> dict[str, Any]:
    """Stable Diffusion 1.5's, small, and suspicious of every picture."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return {"safety_checker": checker, "feature_extractor": processor, "requires_safety_checker": True}


def random_sdxl(folder: Path, seed: int = 0) -> Path:
    """An SDXL with a U-Net of two scales: two text encoders, a pooled embedding and the sizes of pictures."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    second = build_text_encoder(tokenizer, 32, 16)
    first = CLIPTextModel(CLIPTextConfig.from_dict(build_text_encoder(tokenizer, 16, 16).config.to_dict()))
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8}
    StableDiffusionXLPipeline(
        unet=unet(48, addition_embed_type="text_time", **sizes),
        scheduler=ddim(),
        vae=autoencoder(4, shift=None),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
    ).save_pretrained(folder)
    return folder


def random_vit(folder: Path, seed: int = 0) -> Path:
    """A small random vision transformer of DINOv2's architecture in timm's layout: 4 blocks, 4 x 4 patches."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    sizes = {"patch_size": 4, "img_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 3}
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sizes)
    save_for_hf(network, str(folder), model_args=sizes, safe_serialization=True)
    return folder
