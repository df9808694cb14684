from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.collaboration.judges import ClipJudge, ShapesScore, open_judge
from distill.data import shapes
from distill.data.shapes_data import ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.files import ASSETS


def drawn(count: int, seed: int = 9) -> tuple[list[str], torch.Tensor]:
    batch = ShapesDataset(count, seed=seed).__getitems__(list(range(count)))
    return batch["prompts"], batch["pixels"] / 2 + 0.5


@pytest.mark.parametrize("spec", ["small-shapes", "shapes"])
def test_shapes_score_tells_right_captions_from_wrong(spec: str) -> None:
    prompts, images = drawn(200)
    judge = open_judge(spec)
    right, wrong = judge(prompts, images), judge([*prompts[1:], prompts[0]], images)
    assert right.shape == (200,) and 0 < float(wrong.min()) and float(right.max()) <= 1
    assert (right > wrong).float().mean() > 0.9 and right.median() > 0.95
    torch.testing.assert_close(judge(prompts[:7], images[:7]), right[:7], atol=1e-5, rtol=1e-4)


def _reference(image: torch.Tensor, prompt: str) -> float:
    """The geometric mean of the named attributes' probabilities, of the better of both orders where there is none."""
    named = shapes.parse([prompt])
    judge = load_shapes_judge(ASSETS / "small_judge.safetensors")
    logits = [column.softmax(1)[0] for column in judge(image[None] * 2 - 1)]
    orders = [[0, 1, 2, 3, 4, 5, 6, 7, 8]]
    if not named.ordered[0] and logits[0].argmax() != 0:
        orders.append([0, 1, 2, 6, 7, 8, 3, 4, 5])
    values = [(column, int(value)) for column, value in enumerate(named.attributes[0]) if value >= 0]
    means = [
        torch.stack([logits[order[column]][value] for column, value in values]).log().mean().exp() for order in orders
    ]
    return float(max(means))


@pytest.mark.parametrize("spec", ["small-shapes", "shapes"])
def test_shapes_score_tells_good_images_apart(spec: str) -> None:
    """A threshold lies between nearly any two of them, so that nearly every share can be rejected."""
    drawn = ShapesDataset(512, seed=9).__getitems__(list(range(512)))
    scores = ShapesScore(spec)(drawn["prompts"], drawn["pixels"] / 2 + 0.5)
    assert len(scores.float().unique()) < 400, "these are no good images"
    assert len(scores.unique()) > 500 and bool((scores <= 1).all())


def test_shapes_score_is_a_geometric_mean() -> None:
    prompts, images = drawn(24)
    noised = (images + 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    scores = ShapesScore("small-shapes")(prompts, noised)
    expected = [_reference(image, prompt) for image, prompt in zip(noised, prompts, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-3, check_dtype=False)
    assert scores.std() > 0.1


def test_the_small_judge_is_another_network_that_reads_real_images() -> None:
    small, judge = load_shapes_judge(ASSETS / "small_judge.safetensors"), load_shapes_judge()
    batch = ShapesDataset(1000, seed=77).__getitems__(list(range(1000)))
    truth = batch["attributes"]
    right = (small.read(batch["pixels"]) == truth)[truth >= 0].float().mean()
    assert right >= 0.99
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in judge.parameters())


def test_clip_judge_is_open_clips_cosine(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    tower, _, preprocess = open_clip.create_model_and_transforms("RN50-quickgelu", pretrained=None)
    weights = tmp_path / "clip.pt"
    torch.save(tower.state_dict(), weights)
    images, prompts = torch.rand(2, 3, 224, 224), ["a red ring", "a blue square"]
    judge = open_judge(f"clip:RN50-quickgelu:{weights}")
    assert isinstance(judge, ClipJudge)
    with torch.no_grad():
        tower.eval()
        image = tower.encode_image(preprocess.transforms[-1](images), normalize=True)
        text = tower.encode_text(open_clip.get_tokenizer("RN50-quickgelu")(prompts), normalize=True)
    torch.testing.assert_close(judge(prompts, images), (image * text).sum(1), atol=1e-4, rtol=1e-3)


def test_preference_judge_is_the_models_scaled_cosine(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from distill.tiny.text import build_tokenizer

    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 77}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(tmp_path)
    judge = open_judge(f"preference:{tmp_path}")
    prompts, images = drawn(3)
    scores = judge(prompts, images)
    assert scores.shape == (3,) and scores.std() > 0
    torch.testing.assert_close(judge(prompts[1:2], images[1:2]), scores[1:2], atol=1e-3, rtol=1e-3)
    assert scores.abs().max() <= float(model.logit_scale.exp()) * 1.001


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "beauty",
            "the judge 'beauty' is unknown; name one of shapes, small-shapes, clip, image-reward, preference, critic",
        ),
        ("clip", "names no model; write it as clip:ARCHITECTURE:WEIGHTS"),
        ("clip:ViT-B-32", "names no model"),
        ("preference:", "names no model; write it as preference:yuvalkirstain/PickScore_v1"),
        ("image-reward:ImageReward-v1.0", "needs a package: pip install image-reward"),
    ],
)
def test_bad_judges_get_a_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        open_judge(spec)


def test_prompts_without_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="the judge 'small-shapes' scores drawn shapes only: 'dog'"):
        open_judge("small-shapes")(["a dog"], torch.rand(1, 3, 32, 32))
