"""Metrics against plain restatements."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy import linalg

from distill.data import shapes
from distill.data.shapes_data import ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.metrics import Alignment, ClipDirection, ClipScore, FidShapes, inception_fid, read_back
from distill.evaluation.shapes_judge import load_shapes_judge


def _reference_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """FID (arXiv 1706.08500, Eq. 6)."""
    x, y = a.double().numpy(), b.double().numpy()
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(cx @ cy).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * root))


def test_fid_shapes_is_the_frechet_distance_of_judge_features() -> None:
    real = ShapesDataset(300, seed=1).__getitems__(list(range(300)))["pixels"]
    fake = ShapesDataset(300, seed=2).__getitems__(list(range(300)))["pixels"] * 0.7
    metric = FidShapes()
    metric.update(real / 2 + 0.5, real=True)
    metric.update(fake / 2 + 0.5, real=False)
    judge = load_shapes_judge()
    expected = _reference_frechet(judge.features(real), judge.features(fake))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-2)


def test_judge_reads_drawn_images() -> None:
    """At least 99 % of the attributes of images it never saw."""
    batch = ShapesDataset(1024, seed=77).__getitems__(list(range(1024)))
    truth = batch["attributes"]
    right = load_shapes_judge().read(batch["pixels"]) == truth
    assert right[truth >= 0].float().mean() >= 0.99


def test_alignment_of_drawn_images_is_one_and_of_shuffled_ones_is_chance() -> None:
    batch = ShapesDataset(512, seed=5).__getitems__(list(range(512)))
    aligned, shuffled = Alignment(), Alignment()
    aligned.update(batch["pixels"] / 2 + 0.5, batch["prompts"])
    shuffled.update(batch["pixels"].roll(1, 0) / 2 + 0.5, batch["prompts"])
    assert aligned.compute() >= 0.99
    assert 0.1 < shuffled.compute() < 0.5


def table(**columns: int) -> torch.Tensor:
    row = torch.zeros(1, 9, dtype=torch.long)
    for name, value in columns.items():
        row[0, list(shapes.ATTRIBUTES).index(name)] = value
    return row


@pytest.mark.parametrize(
    ("prompt", "read", "expected"),
    [
        ("a red ring", table(layout=0, shape_1=3, colour_1=0), (2, 2)),
        ("a red ring", table(layout=0, shape_1=3, colour_1=1, shape_2=3, colour_2=0), (1, 2)),  # there is no second
        ("a red ring", table(layout=1, shape_1=1, colour_1=1, shape_2=3, colour_2=0), (2, 2)),  # either may be meant
        ("a red ring left of a blue square", table(layout=1, shape_1=3, shape_2=1, colour_2=2), (5, 5)),
        ("a blue square right of a red ring", table(layout=1, shape_1=3, shape_2=1, colour_2=2), (5, 5)),
        ("a red ring left of a blue square", table(layout=1, shape_1=1, colour_1=2, shape_2=3), (1, 5)),  # exchanged
        ("a small shape at the top on a tan background", table(layout=0, position=1, background=2), (3, 4)),
        ("", table(), (0, 0)),
    ],
)
def test_what_counts_as_read_right(prompt: str, read: torch.Tensor, expected: tuple[int, int]) -> None:
    right, named = read_back(read, shapes.parse([prompt]))
    assert (right.item(), named.item()) == expected


def test_clip_score_is_open_clips(tmp_path: Path) -> None:
    """On a small random tower: the mean cosine of open_clip's own features, called by hand."""
    import open_clip

    torch.manual_seed(0)
    tower, _, preprocess = open_clip.create_model_and_transforms("RN50-quickgelu", pretrained=None)
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    images = torch.rand(2, 3, 224, 224)
    prompts = ["a red ring", "a blue square"]
    metric = ClipScore("RN50-quickgelu", str(tmp_path / "tower.pt"))
    metric.update(images, prompts)
    tower.eval()
    with torch.no_grad():
        image = tower.encode_image(preprocess.transforms[-1](images))
        text = tower.encode_text(open_clip.get_tokenizer("RN50-quickgelu")(prompts))
    expected = torch.nn.functional.cosine_similarity(image, text).mean()
    assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-5)


TINY_CLIP = "tiny-clip-of-tests"


def tiny_clip(folder: Path) -> str:
    """Makes an architecture of one layer known to open_clip; a file of random weights for it."""
    import open_clip

    vision = {"image_size": 224, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{TINY_CLIP}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{TINY_CLIP}.json")
    torch.save(open_clip.create_model(TINY_CLIP, pretrained=None).state_dict(), folder / "clip.pt")
    return str(folder / "clip.pt")


@pytest.mark.parametrize("size", [(256, 384), (384, 256), (150, 100), (224, 224), (300, 300)])
def test_clip_sees_images_as_open_clips_own_transform_has_them(tmp_path: Path, size: tuple[int, int]) -> None:
    """Up to what Pillow rounds to 8 bits, once after each side; a neighbouring pixel is more unlike than that."""
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    metric = ClipScore(TINY_CLIP, tiny_clip(tmp_path))
    preprocess = open_clip.create_model_and_transforms(TINY_CLIP, pretrained=None)[2]
    rough = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(rough, size, mode="bicubic").clamp(0, 1)
    image = (smooth * 255).round().to(torch.uint8)
    expected = preprocess(to_pil_image(image[0]))[None]
    torch.testing.assert_close(metric.fit(image / 255), expected, atol=1.5 / 255 / 0.26, rtol=0)
    assert (expected.roll(1, 3) - expected)[..., 1:].abs().max() > 4 / 255 / 0.26
    with torch.no_grad():
        features = torch.nn.functional.normalize(metric.clip.encode_image(expected))
        torch.testing.assert_close(metric.image_features(image / 255), features, atol=2e-3, rtol=0)


def test_clip_sees_squares_whole(tmp_path: Path) -> None:
    """Resized, without what bicubic weights overshoot."""
    from torchvision.transforms.v2 import functional as F

    metric, images = ClipScore(TINY_CLIP, tiny_clip(tmp_path)), torch.rand(2, 3, 300, 300)
    resized = F.resize(images, [224, 224], F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    assert torch.equal(metric.fit(images), F.normalize(resized, metric.mean, metric.std))


def test_models_that_squeeze_images_still_do(tmp_path: Path) -> None:
    """Some of open_clip's, such as SigLIP, see all of an image."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms.v2 import functional as F

    metric, images = ClipScore(TINY_CLIP, tiny_clip(tmp_path)), torch.rand(2, 3, 64, 96)
    *metric.fitting, _ = image_transform_v2(PreprocessCfg(size=32, resize_mode="squash"), is_train=False).transforms
    resized = F.resize(images, [32, 32], F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    expected = F.normalize(resized, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(metric.fit(images), expected)


def test_a_clip_that_cannot_be_opened_gets_a_sentence(tmp_path: Path) -> None:
    file = Path(tiny_clip(tmp_path))
    damaged = file.read_bytes()[:1000]
    torch.save({"other": torch.zeros(2)}, file)
    for junk in (
        file.read_bytes(),
        damaged,
        b"",
        b"not weights at all",
        bytes(range(256)) * 9,
        b"\x80\x02" + bytes(40),
    ):
        file.write_bytes(junk)
        with pytest.raises(
            ConfigError, match=f"^'.*clip.pt' is no weight file of open_clip's {TINY_CLIP}, or a damaged"
        ):
            ClipScore(TINY_CLIP, str(file))
    with pytest.raises(ConfigError, match="^open_clip has no architecture 'ViT-NoSuch'; give one it names, such as"):
        ClipScore("ViT-NoSuch", "x")
    with pytest.raises(ConfigError, match=f"^open_clip's {TINY_CLIP} cannot be opened with the weights 'nosuch' \\("):
        ClipScore(TINY_CLIP, "nosuch")


@pytest.mark.parametrize("given", [None, "none.pth", "damaged.pth"])
def test_an_inception_that_cannot_be_opened_gets_a_sentence(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network torch-fidelity says only that a name is not known."""

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", unreachable)
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    file = given and str(tmp_path / given)
    with pytest.raises(ConfigError, match="Inception network cannot be opened.*; fetch https://.*pth where") as said:
        inception_fid(file)
    assert (file or "Name or service not known") in str(said.value)


def test_clip_direction_is_what_an_edit_changed(tmp_path: Path) -> None:
    """The cosine of the two differences, by hand; an edit that is undone points the other way."""
    import open_clip

    torch.manual_seed(0)
    tower, _, preprocess = open_clip.create_model_and_transforms("RN50-quickgelu", pretrained=None)
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    before, after = torch.rand(2, 2, 3, 224, 224)
    source, target = ["a ring", "a red square"], ["a red ring", "a blue square"]
    metric = ClipDirection("RN50-quickgelu", str(tmp_path / "tower.pt"))
    metric.update(before, after, source, target)
    tower.eval()
    tokenizer = open_clip.get_tokenizer("RN50-quickgelu")
    with torch.no_grad():
        images = [tower.encode_image(preprocess.transforms[-1](some), normalize=True) for some in (before, after)]
        texts = [tower.encode_text(tokenizer(some), normalize=True) for some in (source, target)]
    shown, said = images[1] - images[0], texts[1] - texts[0]
    expected = ((shown * said).sum(1) / (shown.norm(dim=1) * said.norm(dim=1))).mean().item()
    assert metric.compute().item() == pytest.approx(expected, abs=1e-4) != 0
    metric.reset()
    metric.update(after, before, source, target)
    assert metric.compute().item() == pytest.approx(-expected, abs=1e-4)
