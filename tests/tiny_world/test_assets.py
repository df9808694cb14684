"""What ships: small, loadable by stock diffusers, and good enough to be a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill import backbones
from distill.data import shapes
from distill.data.shapes_data import ShapesDataset
from distill.evaluation.metrics import Alignment
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.files import ASSETS
from distill.inference import open_painter
from distill.tiny.text import MAX_TOKENS, build_tokenizer
from tests.runs import ROOT

SHIPPED = backbones.TINY


def test_assets_are_small_safetensors() -> None:
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    pipelines = [file for file in files if file.relative_to(ASSETS).parts[0] in ("tiny-sd", "tiny-sd3")]
    assert sum(file.stat().st_size for file in pipelines) <= 25e6
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert not {file.suffix for file in files} & {".bin", ".pt", ".pth", ".ckpt"}


@pytest.mark.parametrize("name", SHIPPED)
def test_judge_reads_reconstructions(name: str) -> None:
    """At least 97 % of the attributes of images that went through the autoencoder."""
    batch = ShapesDataset(512, seed=77).__getitems__(list(range(512)))
    autoencoder = backbones.load(name).autoencoder()
    with torch.no_grad():
        pixels = autoencoder.decode(autoencoder.encode(batch["pixels"]))
    right = load_shapes_judge().read(pixels) == batch["attributes"]
    assert right[batch["attributes"] >= 0].float().mean() >= 0.97


@pytest.mark.parametrize("name", SHIPPED)
def test_latents_have_unit_scale(name: str) -> None:
    pixels = ShapesDataset(512, seed=78).__getitems__(list(range(512)))["pixels"]
    with torch.no_grad():
        latents = backbones.load(name).autoencoder().encode(pixels)
    assert latents.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", SHIPPED)
def test_teacher_paints_what_it_is_asked_better_with_more_steps(name: str) -> None:
    prompts = shapes.captions(seed=4, indices=range(64))
    scores = {}
    for steps in (1, 16):
        alignment = Alignment()
        alignment.update(open_painter(name, steps, device="cpu")(prompts), prompts)
        scores[steps] = alignment.compute().item()
    assert scores[16] >= 0.85 and scores[16] > scores[1]


def test_every_word_of_the_captions_is_one_token(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    for caption in shapes.captions(seed=9, indices=range(500)):
        assert len(tokenizer.tokenize(caption)) == len(caption.split()) <= MAX_TOKENS - 2
    tokenizer.save_pretrained(tmp_path)
    reloaded = type(tokenizer).from_pretrained(tmp_path)
    assert reloaded(caption).input_ids == tokenizer(caption).input_ids


def test_make_assets_copies_everything_that_ships() -> None:
    makefile = (ROOT / "Makefile").read_text()
    trained = [path for path in ASSETS.iterdir() if path.suffix != ".txt"]  # LADD's prompts are no weights
    for shipped in trained:
        assert shipped.name in makefile.split("\nassets:")[1].split("\nclean:")[0], shipped.name
