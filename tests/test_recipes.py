"""The recipes at paper size run two steps as they are, but for sizes, on small random networks saved to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill import backbones
from distill.adversarial import vision
from distill.cli import main
from distill.export import load_student
from tests.runs import checkpoint, fit_arguments, logged


@pytest.fixture
def small_vision(vit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every vision network is a small random one; answers the names that were asked for."""
    asked: list[str] = []
    real = vision.open_vit

    def small(name: str):
        asked.append(name)
        return real(str(vit_folder))

    monkeypatch.setattr(vision, "open_vit", small)
    return asked


@pytest.mark.parametrize(("recipe", "family"), [("add_sd21.yaml", "sd_folder"), ("add_sdxl.yaml", "sdxl_folder")])
def test_add_runs_two_steps(
    recipe: str, family: str, pictures: Path, small_vision: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    teacher = request.getfixturevalue(family)
    options = {"data__source": pictures, "data__height": 32, "data__width": 32, "samples__every": 2}
    main(fit_arguments(recipe, teacher, None, tmp_path, **options))
    assert small_vision == ["vit_small_patch14_dinov2", "vit_large_patch14_dinov2"]
    scalars = logged(tmp_path)
    for name in ("student/PixelAdversarial", "student/ScoreDistillation", "critic/PixelAdversarial/game",
                 "critic/PixelAdversarial/r1", "gradient_at_sample/ScoreDistillation"):  # fmt: skip
        assert len(scalars[name]) == 2 and all(0 < abs(value) < 1e4 for value in scalars[name]), name
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 2 and saved["distill"]["strategies"] == ["PixelAdversarial", "ScoreDistillation"]
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"student", "ema", "strategies", "skipped", "latent"}
    start = backbones.load(str(teacher)).denoiser().state_dict()
    student = load_student(tmp_path / "checkpoints" / "last.ckpt", raw=True)
    moved = [name for name, tensor in student.denoiser.state_dict().items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(start), "some weights of the student never moved"
    assert (tmp_path / "samples" / "step-000002.png").is_file()
