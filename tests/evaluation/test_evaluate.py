from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.v2 import functional as F

from distill.cli import main
from distill.data import shapes
from distill.data.shapes_data import HELD_OUT
from distill.evaluation import metrics
from distill.evaluation.evaluate import evaluate_on_shapes, fid_of_shapes
from distill.evaluation.metrics import Alignment
from distill.files import read_json
from distill.inference import open_painter
from tests.runs import mistake

SMALL = partial(FrechetInceptionDistance, feature=64, normalize=True)  # of 2048 channels each distance takes seconds
TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = ["a red ring", "a blue square", "a cyan cross"]


def test_painted_shapes_are_measured_by_their_own_captions(sd_folder: Path) -> None:
    """In parts of any size, all images, with the noise of the seed, against the captions they were painted from."""
    painter = open_painter(str(sd_folder), 1, 1.0, device="cpu")
    found = evaluate_on_shapes(painter, samples=7, seed=3, batch_size=4, reference=50)
    prompts, alignment = shapes.captions(HELD_OUT, range(7)), Alignment()
    images = painter(prompts, seed=3, batch_size=7)
    alignment.update(images, prompts)
    assert found["alignment"] == pytest.approx(alignment.compute().item(), abs=1e-5)
    assert found["fid_shapes"] == pytest.approx(fid_of_shapes(images, reference=50), rel=1e-3)
    assert (found["samples"], found["seed"], found["reference"]) == (7, 3, "50 held-out drawn images")


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Six pictures of noise, wide, high and larger than what is painted, one of them in a folder of its own."""
    generator = torch.Generator().manual_seed(5)
    for index, (height, width) in enumerate([(32, 32), (40, 64), (64, 40), (50, 33), (96, 96), (32, 48)]):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        file = tmp_path / "real" / ("more" if index == 5 else "") / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)
    (tmp_path / "real" / "metadata.jsonl").write_text("{}")
    return tmp_path / "real"


@pytest.fixture
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small random CLIP that open_clip knows as `tiny`, with its weights in `tower.pt`."""
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TOWER)
    model = open_clip.create_model("tiny", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "tower.pt")
    return model


def read_references(folder: Path) -> Tensor:
    """Each resized on its shorter side to 32 and cropped to the centre, `[N, 3, 32, 32]` in [0, 1]."""
    read = []
    for file in sorted(folder.rglob("*.png")):
        picture = F.to_dtype(F.pil_to_tensor(Image.open(file)), torch.float32, scale=True)
        read.append(F.center_crop(F.resize(picture, [32], antialias=True), [32, 32]))
    return torch.stack(read)


def arguments(pipeline: Path, folder: Path, inception: Path, *more: str) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {
        "pipeline": pipeline, "reference": folder / "real", "prompts": folder / "prompts.txt", "inception": inception,
        "steps": 1, "guidance": 1.0, "samples": 5, "seed": 3, "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    return ["evaluate", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *more]


def test_painted_pictures_are_measured_against_a_folder(
    sd_folder: Path, inception: Path, references: Path, tower: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by torchmetrics' distance and open_clip's features called by hand; prompts are used in turn."""
    import open_clip

    monkeypatch.setattr(metrics, "FrechetInceptionDistance", SMALL)
    values = tmp_path / "values.json"
    towered = ["--clip", "tiny", "--clip_weights", str(tmp_path / "tower.pt"), "--output", str(values)]
    main(arguments(sd_folder, tmp_path, inception, *towered))
    asked = [*PROMPTS, *PROMPTS[:2]]
    images = open_painter(str(sd_folder), 1, 1.0, device="cpu")(asked, seed=3)
    fid = SMALL(feature_extractor_weights_path=str(inception))
    fid.update(images, real=False)
    fid.update(read_references(references), real=True)
    with torch.no_grad():
        seen = F.normalize(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        shown, said = tower.encode_image(seen), tower.encode_text(open_clip.get_tokenizer("tiny")(asked))
    cosine = torch.nn.functional.cosine_similarity(shown, said).mean().item()
    found = read_json(values)
    assert found.pop("fid_inception") == pytest.approx(fid.compute().item(), rel=1e-2) != 0
    assert found.pop("clip_score") == pytest.approx(cosine, abs=1e-5) != 0
    assert found == {"samples": 5, "seed": 3, "reference": f"6 images of {references}"}


def test_without_a_tower_there_is_no_clip_score(
    sd_folder: Path, inception: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(metrics, "FrechetInceptionDistance", SMALL)
    values = tmp_path / "values.json"
    main(arguments(sd_folder, tmp_path, inception, "--output", str(values)))
    assert set(read_json(values)) == {"fid_inception", "samples", "seed", "reference"}
    assert "distances of 5 images are larger than those of many" in capsys.readouterr().err


def test_a_folder_of_one_picture_is_no_reference(
    sd_folder: Path, inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "real" / "0.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.inference.Painter.stream", None)  # nothing is painted
        said = mistake(capsys, arguments(sd_folder, tmp_path, inception))
    assert f"the reference '{tmp_path / 'real'}' holds 1 images; give a folder with 2 or more" in said
    asked = arguments(sd_folder, tmp_path, inception)
    del asked[(place := asked.index("--prompts")) : place + 2]
    assert "real images need captions to paint; give --prompts FILE with one per line" in mistake(capsys, asked)


def test_a_damaged_reference_picture_is_named(
    sd_folder: Path, inception: Path, references: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (references / "0.png").write_bytes(b"no picture")
    said = mistake(capsys, arguments(sd_folder, tmp_path, inception))
    assert f"the reference image '{references / '0.png'}' cannot be read" in said
