"""ImageReward against a plain restatement of its authors' forward, on random weights in their checkpoint's layout."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from distill.errors import ConfigError
from distill.evaluation import image_reward
from distill.evaluation.image_reward import as_seen, load_image_reward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ring", "##s", "fox", ","]
WIDTH, PATCH, SIZE, HEADS = 128, 16, 32, 2  # of the image encoder
TEXT, TEXT_HEADS = 48, 4
CONFIG = {  # the keys of med_config.json; encoder_width is overruled by the image encoder's in blip_pretrain.py
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": TEXT, "initializer_range": 0.02, "intermediate_size": 80,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 40, "model_type": "bert", "num_attention_heads": TEXT_HEADS,
    "num_hidden_layers": 2, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(WORDS) + 2,
    "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip
PROMPTS = ["a red ring", "a fox, red rings", "red fox zebra " * 20]  # the last is longer than 35 tokens


def shapes_of() -> dict[str, tuple[int, ...]]:
    """Of all tensors in the original layout."""
    sizes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        sizes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        sizes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    sizes[f"{vision}.cls_token"] = (1, 1, WIDTH)
    sizes[f"{vision}.pos_embed"] = (1, 1 + (SIZE // PATCH) ** 2, WIDTH)
    sizes[f"{vision}.patch_embed.proj.weight"] = (WIDTH, 3, PATCH, PATCH)
    sizes[f"{vision}.patch_embed.proj.bias"] = (WIDTH,)
    for block in (f"{vision}.blocks.0", f"{vision}.blocks.1"):
        norm(f"{block}.norm1", WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    norm(f"{vision}.norm", WIDTH)
    sizes[f"{text}.embeddings.word_embeddings.weight"] = (len(WORDS) + 2, TEXT)
    sizes[f"{text}.embeddings.position_embeddings.weight"] = (40, TEXT)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in (f"{text}.encoder.layer.0", f"{text}.encoder.layer.1"):
        for kind, width in (("attention", TEXT), ("crossattention", WIDTH)):
            linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}.{kind}.self.key", TEXT, width)
            linear(f"{layer}.{kind}.self.value", TEXT, width)
            linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 80, TEXT)
        linear(f"{layer}.output.dense", TEXT, 80)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 256, WIDTH)  # in the checkpoint, and of no use for the score
    linear("blip.text_proj", 256, TEXT)
    for index, (out, into) in {0: (1024, TEXT), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        linear(f"mlp.layers.{index}", out, into)
    return sizes


def random_weights() -> dict[str, Tensor]:
    """Small at the image encoder's beginning, where it shows which epsilon its norms have."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes_of().items():
        scale = 0.1 if len(shape) == 1 else prod(shape[1:]) ** -0.5
        if name.startswith("blip.visual_encoder.") and "blocks" not in name and ".norm." not in name:
            scale *= 0.02
        weights[name] = scale * torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            weights[name] += 1
    return weights | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def save(folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    torch.save(random_weights() if weights is None else weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def _reference_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | float = 0) -> Tensor:
    query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(0, 1) for tensor in (query, key, value))
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def _reference_score(weights: dict[str, Tensor], ids: list[int], mask: list[int], pixels: Tensor) -> float:
    """One image's score: ImageReward.py, models/BLIP/vit.py and models/BLIP/med.py of the authors."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    patch = f"{vision}.patch_embed.proj"
    patches = F.conv2d(pixels[None], weights[f"{patch}.weight"], weights[f"{patch}.bias"], PATCH)[0].flatten(1).T
    x = torch.cat([weights[f"{vision}.cls_token"][0], patches]) + weights[f"{vision}.pos_embed"][0]
    for block in (f"{vision}.blocks.0", f"{vision}.blocks.1"):
        query, key, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", _reference_attention(query, key, value, HEADS))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    image = norm(f"{vision}.norm", x, 1e-6)

    padding = (1 - torch.tensor(mask)) * -10000.0
    embeddings = f"{text}.embeddings"
    x = weights[f"{embeddings}.word_embeddings.weight"][ids]
    x = x + weights[f"{embeddings}.position_embeddings.weight"][: len(ids)]
    x = norm(f"{embeddings}.LayerNorm", x, 1e-12)
    for layer in (f"{text}.encoder.layer.0", f"{text}.encoder.layer.1"):
        for kind, looks_at, bias in (("attention", None, padding), ("crossattention", image, torch.zeros(()))):
            name, other = f"{layer}.{kind}", x if looks_at is None else looks_at
            query, key = linear(f"{name}.self.query", x), linear(f"{name}.self.key", other)
            value = linear(f"{name}.self.value", other)
            mixed = linear(f"{name}.output.dense", _reference_attention(query, key, value, TEXT_HEADS, bias))
            x = norm(f"{name}.output.LayerNorm", mixed + x, 1e-12)
        inner = F.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + x, 1e-12)
    reward = x[0]
    for index in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{index}", reward)
    return float((reward - 0.16717362830052426) / 1.0333394966054072)


def _reference_transform(picture: Image.Image, size: int) -> Tensor:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
    crop, normalize = transforms.CenterCrop(size), transforms.Normalize(mean, std)
    return transforms.Compose([resize, crop, transforms.ToTensor(), normalize])(picture)


def _reference_tokens(prompt: str) -> tuple[list[int], list[int]]:
    """[CLS] words [SEP] [PAD] ..., 35 in all."""
    words = prompt.replace(",", " , ").replace("rings", "ring ##s").split()
    ids = [WORDS.index(word) if word in WORDS else 1 for word in words][:33]
    return [2, *ids, 3, *[0] * (33 - len(ids))], [1] * (len(ids) + 2) + [0] * (33 - len(ids))


def pictures() -> tuple[list[Image.Image], Tensor]:
    """Of 8 bits and no square, as files and as tensors."""
    smooth = F.interpolate(torch.rand(3, 3, 5, 6, generator=torch.Generator().manual_seed(3)), (45, 70), mode="bicubic")
    images = (smooth.clamp(0, 1) * 255).round() / 255
    return [to_pil_image((image * 255).round().to(torch.uint8)) for image in images], images


def test_a_score_is_the_authors(tmp_path: Path) -> None:
    files, images = pictures()
    weights = random_weights()
    expected = torch.tensor(
        [
            _reference_score(weights, *_reference_tokens(prompt), _reference_transform(file, SIZE))
            for prompt, file in zip(PROMPTS, files, strict=True)
        ]
    )
    model = load_image_reward(str(save(tmp_path, weights)))
    scores = model(PROMPTS, images)
    assert expected.std() > 0.05, "these are all the same"
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    for index, prompt in enumerate(PROMPTS):  # a score does not depend on what else is scored
        alone = model([prompt], images[index : index + 1])
        torch.testing.assert_close(alone, scores[index : index + 1], atol=1e-5, rtol=1e-5)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_blips_two_tokens_come_after_berts_words(tmp_path: Path) -> None:
    tokenizer = load_image_reward(str(save(tmp_path))).tokenizer
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(WORDS), len(WORDS) + 1]


def test_images_are_seen_as_the_authors_read_files() -> None:
    files, images = pictures()
    expected = torch.stack([_reference_transform(file, 24) for file in files])
    torch.testing.assert_close(as_seen(images, 24), expected, atol=1e-6, rtol=0)


def test_a_file_stands_for_its_folder(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "ImageReward.pt").rename(folder / "mine.pt")
    scores = load_image_reward(str(folder / "mine.pt"))(PROMPTS, pictures()[1])
    torch.testing.assert_close(scores, load_image_reward(str(save(tmp_path)))(PROMPTS, pictures()[1]))


def test_the_name_is_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = save(tmp_path), []

    def download(repository: str, file: str) -> str:
        asked.append(f"{repository}/{file}")
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(image_reward, "TOKENIZER", str(folder))
    load_image_reward("ImageReward-v1.0")
    assert asked == ["THUDM/ImageReward/ImageReward.pt", "THUDM/ImageReward/med_config.json"]


def test_a_hub_that_does_not_answer_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, file: str) -> str:
        raise OSError("no way there\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    expected = r"cannot be had from the hub \(no way there\); give a folder that holds ImageReward.pt, med_config.json"
    with pytest.raises(ConfigError, match=expected):
        load_image_reward("ImageReward-v1.0")


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("mlp.layers.4.weight", "it lacks the weights mlp.layers.4.weight$"),
        ("blip.visual_encoder.pos_embed", "it lacks the weights blip.visual_encoder.pos_embed$"),
        ("blip.visual_encoder.blocks.1.attn", "blip.visual_encoder.blocks.1.attn.qkv.weight and 3 more$"),
        (
            "blip.text_encoder.encoder.layer.1.crossattention.self",
            "1.crossattention.self.query.weight and 5 more$",
        ),
        ("", "it lacks the weights blip.visual_encoder.patch_embed.proj.weight$"),
    ],
)
def test_a_checkpoint_that_lacks_weights_gets_a_sentence(tmp_path: Path, gone: str, sentence: str) -> None:
    weights = {name: tensor for name, tensor in random_weights().items() if not name.startswith(gone)}
    with pytest.raises(ConfigError, match=f"ImageReward.pt' is no checkpoint of ImageReward: .*{sentence}"):
        load_image_reward(str(save(tmp_path, weights)))


def test_what_is_not_there_or_no_model_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no ImageReward.pt and no med_config.json; give ImageReward-v1.0, or"):
        load_image_reward(str(tmp_path / "nowhere"))
    folder = save(tmp_path)
    (folder / "med_config.json").write_text(json.dumps(CONFIG | {"hidden_size": 64}))
    with pytest.raises(ConfigError, match="are not of the model that .*med_config.json' describes \\(size mismatch"):
        load_image_reward(str(folder))
    for broken in ("{", '{"hidden_size": "wide"}'):
        (folder / "med_config.json").write_text(broken)
        with pytest.raises(ConfigError, match="med_config.json' does not describe a BERT"):
            load_image_reward(str(folder))
    (save(tmp_path) / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match="has 7 words and ImageReward's 13; put vocab.txt or tokenizer.json of bert"):
        load_image_reward(str(folder))
    for junk in (b"", b"not weights at all", bytes(range(256)) * 9):
        (folder / "ImageReward.pt").write_bytes(junk)
        with pytest.raises(ConfigError, match="ImageReward.pt' is no weight file, or a damaged one"):
            load_image_reward(str(folder))
