"""What a training cost is counted by hand here."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from distill.cli import main
from distill.data.latents import LatentsData
from distill.data.shapes_data import ShapesData
from distill.diffusion.levels import Discrete
from distill.files import read_json
from distill.strategies import LatentAdversarial, NoisedData, PixelAdversarial, ScoreDistillation, Strategy
from distill.training.callbacks import SampleGrid
from distill.training.cost import TrainingCost
from distill.training.module import DistillModule
from tests.runs import fit_arguments


def trained(
    teacher: Path, strategies: list[Strategy], data: L.LightningDataModule, folder: Path, steps: int = 2, last=None
) -> TrainingCost:
    cost = TrainingCost()
    model = DistillModule(str(teacher), strategies, NoisedData(Discrete([1.0, 0.5])), ema=None)
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[cost], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=last)
    trainer.save_checkpoint(folder / "last.ckpt")
    return cost


def test_evaluations_of_a_latent_method(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    """Each update asks the student once per sample, the teacher and the heads once for the student's turn and twice for
    the critic's (real and fake); nothing is decoded.
    """
    data = LatentsData(str(sd3_latents), str(sd3_folder), batch_size=8)
    trained(sd3_folder, [LatentAdversarial()], data, tmp_path)
    kept = read_json(tmp_path / "cost.json")
    assert kept["images"] == 16
    assert kept["evaluations"] == {"student": 16, "target": 0, "teacher": 48, "critic": 48, "decoder": 0}
    assert kept["wall_seconds"] > 0 and kept["device_seconds"] == kept["wall_seconds"] and kept["peak_GiB"] > 0


def test_evaluations_of_add(sd_folder: Path, vit_folder: Path, tmp_path: Path) -> None:
    """Guided, the teacher costs two; the student's pictures and the teacher's are decoded."""
    strategies = [PixelAdversarial(vision=str(vit_folder), image=None), ScoreDistillation(guidance=2.0)]
    cost = trained(sd_folder, strategies, ShapesData(batch_size=8), tmp_path)
    assert cost.evaluations == {"student": 16, "target": 0, "teacher": 32, "critic": 48, "decoder": 32}


def test_a_continued_run_counts_on(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    data = LatentsData(str(sd3_latents), str(sd3_folder), batch_size=8)
    first = trained(sd3_folder, [LatentAdversarial()], data, tmp_path)
    seconds = first.wall
    again = trained(sd3_folder, [LatentAdversarial()], data, tmp_path, steps=3, last=tmp_path / "last.ckpt")
    assert again.images == 24 and again.evaluations["teacher"] == 72 and again.wall > seconds


class AsksByName(Strategy):
    """As a user may write it."""

    def configure(self, backbone: Any, teacher: Any) -> None:
        self.teacher = teacher

    def student_loss(self, sample: Any, batch: Any, step: int) -> torch.Tensor:
        with torch.no_grad():
            target = self.teacher(x_t=sample.x_t, t=sample.t, cond=batch.cond)
        return (sample.x0 - target).square().mean()


def test_what_is_asked_by_name_is_counted_too(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    data = LatentsData(str(sd3_latents), str(sd3_folder), batch_size=8)
    assert trained(sd3_folder, [AsksByName()], data, tmp_path).evaluations["teacher"] == 16


def test_sums_are_over_the_processes_of_each_stretch() -> None:
    """Two batches of 4 on 8 processes, then one on 2: what is kept is of all of them."""
    cost = TrainingCost()
    for processes, batches in ((8, 2), (2, 1)):
        stretch = TrainingCost()
        stretch.load_state_dict(cost.state_dict())
        stretch.on_train_start(SimpleNamespace(world_size=processes), None)  # type: ignore[arg-type]
        for _ in range(batches):
            stretch._counting = True
            stretch._counter("student")(None, (torch.zeros(4),), {})
            stretch._since = time.perf_counter() - 1
            stretch.on_train_batch_end(None, SimpleNamespace(decoded=4), None, {"prompts": [""] * 4}, 0)  # type: ignore[arg-type]
        cost = stretch
    found = cost.summary()
    assert found["images"] == found["evaluations"]["student"] == found["evaluations"]["decoder"] == 8 * 8 + 4 * 2
    assert found["wall_seconds"] == pytest.approx(3, abs=0.1)
    assert found["device_seconds"] == pytest.approx(18, abs=0.5)
    assert found["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


def test_painting_is_no_training(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each painting takes 1,000 seconds of a clock that is the real one otherwise."""
    painted: list[Any] = []
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000 * len(painted))
    monkeypatch.setattr("distill.training.cost.time", clock)
    monkeypatch.setattr(SampleGrid, "paint", lambda *arguments: painted.append(arguments))
    main(fit_arguments("tiny_ladd.yaml", sd3_folder, sd3_latents, tmp_path, samples__every=1))
    assert painted and 0 < read_json(tmp_path / "cost.json")["wall_seconds"] < 1000
