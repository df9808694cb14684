from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from distill.collaboration.judges import ClipJudge, ImageRewardJudge, Judge, NetworkJudge, ShapesScore, open_judge
from distill.data import shapes
from distill.data.shapes_data import ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.files import ASSETS
from tests.evaluation.test_image_reward import PROMPTS, pictures, save
from tests.evaluation.test_metrics import TINY_CLIP, tiny_clip

if TYPE_CHECKING:
    from transformers import CLIPModel


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


def random_preference(folder: Path) -> CLIPModel:
    """A small random CLIP on disk, as `preference:FOLDER` opens it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from distill.tiny.text import build_tokenizer

    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 77}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return model


def test_preference_judge_is_the_models_scaled_cosine(tmp_path: Path) -> None:
    model = random_preference(tmp_path)
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
        ("image-reward", "names no model; write it as image-reward:ImageReward-v1.0"),
        (
            "image-reward:nowhere",
            "ImageReward cannot be read from 'nowhere', which has no ImageReward.pt and no med_config",
        ),
        ("clip:ViT-NoSuch:x", "open_clip has no architecture 'ViT-NoSuch'; give one it names, such as ViT-g-14 with"),
        ("clip:RN50-quickgelu:nosuch", r"opened with the weights 'nosuch' \(.*not a known tag.*\); give a weight file"),
    ],
)
def test_bad_judges_get_a_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        open_judge(spec)


def test_image_reward_judge_is_the_models_score(tmp_path: Path) -> None:
    judge = open_judge(f"image-reward:{save(tmp_path)}")
    assert isinstance(judge, ImageRewardJudge) and judge.spec == f"image-reward:{tmp_path}"
    scores = judge(PROMPTS, pictures()[1])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, judge.model(PROMPTS, pictures()[1]))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_a_networks_scores_keep_their_digits(given: torch.dtype, kept: torch.dtype) -> None:
    """Scores of nearly 1 that float32 has as one."""
    scores = torch.tensor([1 - 1e-9, 1 - 2e-9], dtype=torch.float64).to(given)
    answer = NetworkJudge(lambda prompts, images: scores, "mine")(["a", "b"], torch.rand(2, 3, 8, 8))
    assert answer.dtype == kept and torch.equal(answer, scores.to(kept))


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return self.scale * images.mean((1, 2, 3))


def judges(folder: Path) -> list[tuple[Judge, nn.Module | None, str]]:
    """One of each kind that holds a model of its own, the model that `to` moves, and what it says of itself."""
    for name in ("reward", "preference"):
        (folder / name).mkdir()
    random_preference(folder / "preference")
    clip = ClipJudge(f"clip:{TINY_CLIP}:{tiny_clip(folder)}")
    reward = ImageRewardJudge(f"image-reward:{save(folder / 'reward')}")
    preference = open_judge(f"preference:{folder}/preference")
    mine, small = NetworkJudge(Mean(), "mine", "a mean in [0, 1]; mine"), ShapesScore()
    return [
        (small, None, "a probability in (0, 1]; the network 'small-shapes' that ships with distill"),
        (clip, clip.metric, f"a cosine in [-1, 1]; open_clip's {TINY_CLIP} with the weights {folder}/clip.pt"),
        (reward, reward.model, f"ImageReward (arXiv 2304.05977) of {folder}/reward"),
        (preference, preference.model, f"{folder}/preference through transformers"),  # type: ignore[attr-defined]
        (mine, mine.network, "a mean in [0, 1]; mine"),  # type: ignore[list-item]
    ]


def test_a_judge_says_what_it_is_and_moves_its_model(tmp_path: Path) -> None:
    prompts, images = drawn(2)
    for judge, model, about in judges(tmp_path):
        assert about in judge.about and "\n" not in judge.about
        before = judge(prompts, images)
        assert judge.to("cpu") is judge
        torch.testing.assert_close(judge(prompts, images), before)
        assert judge.to("meta") is judge
        if model is None:
            torch.testing.assert_close(judge(prompts, images), before)
        else:
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_moved_network_gets_its_images_where_it_is_and_a_function_as_they_are() -> None:
    seen = []

    def function(prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        seen.append(images.device.type)
        return torch.zeros(len(images))

    network = Mean()
    network.register_forward_pre_hook(lambda module, given: seen.append(given[1].device.type))
    NetworkJudge(function, "function").to("meta")(["a"], torch.rand(1, 3, 8, 8))
    with pytest.raises(NotImplementedError, match="meta"):  # scores have no values there
        NetworkJudge(network, "network").to("meta")(["a"], torch.rand(1, 3, 8, 8))
    assert seen == ["cpu", "meta"]


def test_prompts_without_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="the judge 'small-shapes' scores drawn shapes only: 'dog'"):
        open_judge("small-shapes")(["a dog"], torch.rand(1, 3, 32, 32))
