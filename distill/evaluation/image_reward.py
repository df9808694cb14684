"""ImageReward: how much people like an image of a prompt (arXiv 2304.05977), read from its authors' checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from distill.errors import ConfigError

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

# All numbers are of github.com/THUDM/ImageReward: ImageReward/ImageReward.py, utils.py and models/BLIP.
NAME, HUB = "ImageReward-v1.0", "THUDM/ImageReward"
WEIGHTS, CONFIG, TOKENIZER = "ImageReward.pt", "med_config.json", "google-bert/bert-base-uncased"
TOKENS = 35  # of a prompt; what is longer is cut off
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of its scores, which are standardised by them
HEAD_WIDTH = 64  # channels of an attention head, in BLIP's ViT-B as in its ViT-L
TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "layer_norm_eps", "pad_token_id")  # fmt: skip
ORIGINAL = (  # names here -> the checkpoint's, the way back of transformers' convert_blip_original_pytorch_to_hf.py
    (r"^mlp\.", "mlp.layers."),
    (r"^text\.", "blip.text_encoder."),
    (r"^vision\.embeddings\.class_embedding", "vision.cls_token"),
    (r"^vision\.embeddings\.position_embedding", "vision.pos_embed"),
    (r"^vision\.embeddings\.patch_embedding", "vision.patch_embed.proj"),
    (r"^vision\.encoder\.layers\.", "vision.blocks."),
    (r"^vision\.post_layernorm\.", "vision.norm."),
    (r"\.layer_norm(?=[12]\.)", ".norm"),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"^vision\.", "blip.visual_encoder."),
)


class ImageReward(nn.Module):
    """BLIP's text encoder (arXiv 2201.12086) reads a prompt while it looks at the image; a head scores its first token.

    Args:
        vision: of the image encoder.
        text: of the text encoder; the image encoder's width is its `encoder_hidden_size`.
        tokenizer: BERT's, with BLIP's two tokens.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, tokenizer: Any):
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.mlp = nn.Sequential(
            nn.Linear(text.hidden_size, 1024),  # nothing but dropout between them: the authors left out their ReLUs
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        self.size, self.tokenizer = cast(int, vision.image_size), tokenizer

    def forward(self, prompts: list[str], images: Tensor) -> Tensor:
        """B prompts and images `[B, 3, H, W]` in [0, 1] -> `[B]`, each as the authors' `ImageReward.score`."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
        words = self.tokenizer(list(prompts), return_tensors="pt", **options).to(self.vision.device)
        seen = self.vision(as_seen(images, self.size).to(self.vision.device)).last_hidden_state
        read = self.text(words.input_ids, words.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return (self.mlp(read[:, 0])[:, 0] - MEAN) / STD


def as_seen(images: Tensor, size: int) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] as the authors' code reads their files: 8 bits, the shorter side resized by
    Pillow, the middle, CLIP's mean and deviation; `[B, 3, size, size]` on the CPU.
    """
    from torchvision.transforms.v2 import functional as F
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pictures = [F.to_pil_image(image) for image in (images.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)]
    resized = [F.resize(picture, [size], F.InterpolationMode.BICUBIC) for picture in pictures]
    middles = torch.stack([F.pil_to_tensor(F.center_crop(picture, [size, size])) for picture in resized])
    return F.normalize(middles.float() / 255, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def load_image_reward(name: str = NAME) -> ImageReward:
    """ImageReward with its authors' weights, frozen. Sizes are read off the weights.

    Args:
        name: `ImageReward-v1.0`, from the hub; or a folder with `ImageReward.pt`, `med_config.json` and the files of
            bert-base-uncased's tokenizer, or the weight file in such a folder.

    Raises:
        ConfigError: there is none, or one that lacks something.
    """
    file, config, words = _files(name)
    weights = _read(file)
    try:
        vision = _vision(weights)
    except KeyError as error:
        raise _lacking(file, [error.args[0]]) from error
    text = _text(config, vision.hidden_size)
    model = ImageReward(vision, text, _tokenizer(words, text.vocab_size))
    names = {ours: _original(ours) for ours in model.state_dict()}
    if lacking := [original for original in names.values() if original not in weights]:
        raise _lacking(file, lacking)
    try:
        model.load_state_dict({ours: weights[original] for ours, original in names.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"the weights '{file}' are not of the model that '{config}' describes ({reason})") from error
    return model.eval().requires_grad_(False)


def _files(name: str) -> tuple[Path, Path, str]:
    """The weights, what describes the text encoder, and the tokenizer's folder or hub id."""
    needs = f"{WEIGHTS}, {CONFIG} and the files of bert-base-uncased's tokenizer"
    if name == NAME:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(HUB, WEIGHTS)), Path(hf_hub_download(HUB, CONFIG)), TOKENIZER
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{NAME} cannot be had from the hub ({reason}); give a folder that holds {needs} in place of the name"
            ) from error
    file = Path(name) if Path(name).is_file() else Path(name) / WEIGHTS
    if lacking := [path.name for path in (file, file.with_name(CONFIG)) if not path.is_file()]:
        raise ConfigError(
            f"ImageReward cannot be read from '{name}', which has no {' and no '.join(lacking)}; give {NAME}, or a "
            f"folder that holds {needs}"
        )
    return file, file.with_name(CONFIG), str(file.parent)


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # torch.load meets what is no weight file with half a dozen kinds
        raise ConfigError(f"'{file}' is no weight file, or a damaged one; give {WEIGHTS} of {HUB}") from error


def _lacking(file: Path, names: list[str]) -> ConfigError:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ConfigError(f"'{file}' is no checkpoint of ImageReward: it lacks the weights {names[0]}{others}")


def _vision(weights: Mapping[str, Tensor]) -> BlipVisionConfig:
    """ImageReward's is a ViT-L for 224 pixels; a KeyError names weights that tell and are not there."""
    from transformers import BlipVisionConfig

    width, *_, patch = weights["blip.visual_encoder.patch_embed.proj.weight"].shape
    places = weights["blip.visual_encoder.pos_embed"].shape[1] - 1
    blocks = {name.split(".")[3] for name in weights if name.startswith("blip.visual_encoder.blocks.")}
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=isqrt(places) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # models/BLIP/vit.py; transformers' own is 1e-5
    )


def _text(config: Path, width: int) -> BlipTextConfig:
    """The text encoder that `med_config.json` describes: a BERT's, as in models/BLIP/blip_pretrain.py."""
    from transformers import BertConfig, BlipTextConfig

    try:
        bert = BertConfig.from_json_file(config)
        known = {key: getattr(bert, key) for key in TEXT}
        return BlipTextConfig(encoder_hidden_size=width, is_decoder=True, **known)  # a decoder is what looks at images
    except Exception as error:  # transformers has its own kinds for wrong values
        raise ConfigError(f"'{config}' does not describe a BERT; give {CONFIG} of {HUB}") from error


def _tokenizer(where: str, words: int) -> Any:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(where)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != words:  # transformers makes up a tokenizer of 5 words where there is none
        raise ConfigError(
            f"the tokenizer of '{where}' has {len(tokenizer)} words and ImageReward's {words}; put vocab.txt or "
            f"tokenizer.json of bert-base-uncased beside {WEIGHTS}"
        )
    return tokenizer


def _original(name: str) -> str:
    for pattern, theirs in ORIGINAL:
        name = re.sub(pattern, theirs, name)
    return name
