"""What `fit` and `validate` say of a student on real and on drawn images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from distill.cli import main
from distill.data.images import ImagesDataset
from distill.evaluation import metrics
from distill.evaluation.evaluate import evaluate_on_shapes
from distill.inference import open_student_painter
from distill.training import callbacks
from distill.training.callbacks import Evaluation
from tests.runs import fit_arguments, logged

SMALL = partial(FrechetInceptionDistance, feature=64, normalize=True)  # of 2048 channels each distance takes seconds


def test_students_of_real_images_are_measured_during_fit_and_by_validate(
    sd_folder: Path, pictures: Path, inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by torchmetrics' distance called by hand, of the images that the checkpoint paints from the same captions."""
    monkeypatch.setattr(metrics, "FrechetInceptionDistance", SMALL)
    options: dict[str, Any] = {
        "data__source": pictures, "data__height": 32, "data__width": 32, "data__reference": 8,
        "data__reference_split": "train", "trainer__limit_val_batches": 1.0, "trainer__val_check_interval": 2,
        "trainer__max_steps": 2, "data__batch_size": 8, "evaluation__inception": inception, "evaluation__seed": 3,
        "evaluation__steps": "[1]",
    }  # fmt: skip
    arguments = fit_arguments("consistency_sd15.yaml", sd_folder, None, tmp_path / "run", **options)
    main(arguments)
    (during,) = logged(tmp_path / "run")["fid_inception/steps_1"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    real = ImagesDataset(str(pictures), 32, 32, "train", count=8).__getitems__(list(range(8)))
    painted = open_student_painter(str(last), 1, device="cpu")(real["prompts"], seed=3)
    fid = SMALL(feature_extractor_weights_path=str(inception))
    fid.update(real["pixels"] / 2 + 0.5, real=True)
    fid.update(painted, real=False)
    assert during == pytest.approx(fid.compute().item(), rel=1e-2) != 0

    again = [part.replace(str(tmp_path / "run"), str(tmp_path / "again")) for part in arguments[1:]]
    main(["validate", *again, "--ckpt_path", str(last)])
    assert logged(tmp_path / "again")["fid_inception/steps_1"] == [pytest.approx(during, rel=1e-3)]


def test_students_of_drawn_images_are_measured_as_evaluate_does(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "data": '{"class_path": "ShapesData", "init_args": {"batch_size": 8, "reference": 16}}',
        "data__height": 32, "data__width": 32,  # the recipe's are 512
        "trainer__limit_val_batches": 1.0, "trainer__val_check_interval": 2, "data__workers": None,
        "evaluation__steps": "[1]", "data__batch_size": 8,
    }  # fmt: skip
    main(fit_arguments("consistency_sd15.yaml", sd_folder, None, tmp_path, **options))
    scalars = logged(tmp_path)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    said = capsys.readouterr().out
    assert f"2 updates are in {last}" in said and f"distill export --checkpoint {last}" in said
    listed = {line.split()[0]: line.split()[1:] for line in said.splitlines() if "frozen" in line or "trained" in line}
    assert {"student", "teacher", "text_encoder"} <= set(listed)
    assert listed["student"][:2] == listed["teacher"][:2] != ["0", "frozen"], "as many parameters"
    asked = evaluate_on_shapes(open_student_painter(last, 1, device="cpu"), samples=16, reference=16, batch_size=8)
    assert scalars["alignment/steps_1"] == [pytest.approx(asked["alignment"], abs=1e-4)]
    assert scalars["fid_shapes/steps_1"] == [pytest.approx(asked["fid_shapes"], rel=1e-2)]
    assert torch.tensor(scalars["fid_shapes/steps_1"]).isfinite().all()


def test_reference_networks_are_opened_once_for_all_counts_and_validations(
    sd_folder: Path, pictures: Path, inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FrechetInceptionDistance", SMALL)
    opened, used = list[Any](), list[Any]()

    def open_one(weights: str | None) -> Any:
        opened.append(metrics.inception_fid(weights))
        return opened[-1]

    def update(self: Evaluation, *arguments: Any) -> None:
        batch_end(self, *arguments)
        used.extend(found["fid_inception"] for found in self.metrics.values())

    batch_end = Evaluation.on_validation_batch_end
    monkeypatch.setattr(callbacks, "inception_fid", open_one)
    monkeypatch.setattr(Evaluation, "on_validation_batch_end", update)
    options: dict[str, Any] = {
        "data__source": pictures, "data__height": 32, "data__width": 32, "data__reference": 8,
        "data__reference_split": "train", "trainer__limit_val_batches": 1.0, "trainer__val_check_interval": 1,
        "trainer__max_steps": 2, "data__batch_size": 8, "evaluation__inception": inception,
        "evaluation__steps": "[1, 4]", "trainer__num_sanity_val_steps": 0,
    }  # fmt: skip
    main(fit_arguments("consistency_sd15.yaml", sd_folder, None, tmp_path, **options))
    assert len(opened) == 1 and len(used) == len(set(map(id, used))) == 4
    assert all(metric.inception is opened[0].inception for metric in used)
    assert len(set(logged(tmp_path)["fid_inception/steps_1"])) == 2, "each validation measures its own images only"
    assert all(metric.fake_features_num_samples == 8 for metric in used)
