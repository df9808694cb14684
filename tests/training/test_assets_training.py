"""The networks of the tiny world train through the same command as students do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli import main
from distill.perceptual.latent_lpips import LatentLPIPS
from distill.perceptual.lpips import load_lpips
from tests.runs import ROOT

SHRUNK = ["--trainer.max_steps", "2", "--data.batch_size", "8", "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize(
    ("recipe", "output", "options"),
    [
        ("judge", "shapes_judge.safetensors", []),
        ("small_judge", "small_judge.safetensors", []),
        ("autoencoder", "vae/config.json", ["--model.measured", "128"]),
        ("tiny_vit", "tiny-vit/model.safetensors", []),
        ("latent_trunk", "latent-trunk.safetensors", []),
        ("lpips_trunk", "lpips-trunk.safetensors", []),
        ("text_encoders", "text/text_encoder_2/model.safetensors", []),
    ],
)
def test_parts_are_trained_and_written(
    recipe: str,
    output: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(ROOT / "recipes" / "assets" / f"{recipe}.yaml"), *SHRUNK, *options])
    assert (tmp_path / "build" / "assets" / output).stat().st_size > 0
    said = capsys.readouterr().out
    assert "2 updates are in" in said and "distill export" not in said, "there is no student"


def test_the_tiny_sd3_teacher_is_trained_in_two_stages(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the commands of `make assets`, each recipe as it is: the second goes on from the first, on the same data."""
    from distill import backbones

    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd3_folder, "build/assets/untrained/tiny-sd3")
    last = "build/assets/{}/checkpoints/last.ckpt"
    for recipe, run, output in (
        ("tiny_sd3", "tiny-sd3-stage1", "build/assets/trained/tiny-sd3-stage1"),
        ("tiny_sd3_stage2", "tiny-sd3", "tiny-sd3"),
    ):
        file = str(ROOT / "recipes" / "assets" / f"{recipe}.yaml")
        main(["fit", "--config", file, *SHRUNK, "--data.count", "64"])
        main(["export", "--checkpoint", last.format(run), "--output", output])
    weights = [
        backbones.load(folder).denoiser().state_dict()
        for folder in (str(sd3_folder), "build/assets/trained/tiny-sd3-stage1", "tiny-sd3")
    ]
    for before, after in zip(weights, weights[1:], strict=False):
        assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    assert not backbones.load("tiny-sd3").calls, "a pretrained network is no few-step student"


@pytest.mark.parametrize(
    ("trunk", "metric", "load"),
    [("latent_trunk", "latent_lpips", LatentLPIPS.load), ("lpips_trunk", "lpips", lambda p: load_lpips("squeeze", p))],
)
def test_distances_are_calibrated_on_their_trunk(
    trunk: str, metric: str, load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk stays as it was trained; the weights per channel begin at 1, move, and stay 0 or more."""
    monkeypatch.chdir(tmp_path)
    for name, options in ((trunk, []), (metric, ["--model.lr", "0.8"])):
        main(["fit", "--config", str(ROOT / "recipes" / "assets" / f"{name}.yaml"), *SHRUNK, *options])
    files = [f"build/assets/{name.replace('_', '-')}.safetensors" for name in (trunk, f"tiny-{metric}")]
    before, after = (load(file) for file in files)
    trunks = [{k: v for k, v in each.state_dict().items() if k.startswith("net.")} for each in (before, after)]
    assert all(torch.allclose(trunks[0][name], tensor, atol=2e-3) for name, tensor in trunks[1].items())
    weights = [each.lin0.model[1].weight for each in (before, after)]
    assert (weights[0] == 1).all() and (weights[1] != 1).any() and (weights[1] >= 0).all()


@pytest.mark.parametrize("schedule", [{}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}])
def test_teacher_is_pretrained_exported_and_distilled_from(
    schedule: dict, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill import backbones

    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes" / "assets" / "tiny_sd.yaml")
    options = ["--model.teacher", str(sd_folder), "--data.count", "64", "--model.schedule", json.dumps(schedule)]
    main(["fit", "--config", recipe, *SHRUNK, *options])
    last = "build/assets/tiny-sd/checkpoints/last.ckpt"
    main(["export", "--checkpoint", last, "--output", "teacher"])
    trained = backbones.load("teacher").denoiser().state_dict()
    before = backbones.load(str(sd_folder)).denoiser().state_dict()
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    assert not backbones.load("teacher").calls, "a pretrained network is no few-step student"
    config = backbones.load("teacher").pipeline().scheduler.config
    assert {name: config[name] for name in schedule} == schedule, "its sampler follows another schedule"
