"""Runs whose student is adapters: one copy of the weights, what is trained, what is kept, and what they go on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from torch import Tensor

from distill import backbones
from distill.cli import main
from distill.diffusion.lora import MARK, LoRA
from distill.errors import ConfigError
from distill.export import load_student, read_checkpoint
from distill.inference import open_painter, open_student_painter
from distill.training.callbacks import Networks
from distill.training.module import DistillModule
from tests.runs import checkpoint, fit_arguments, forked, logged, mistake
from tests.training.test_module import Pull, fit, module
from tests.training.test_processes import DDP, FSDP2

ADAPTED = {"model__lora__rank": 4, "trainer__max_steps": 4}
NAMES = ("student/LatentAdversarial", "critic/LatentAdversarial/game", "student/gradient_norm")


def adapters(model: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.weights])


def frozen(model: Any) -> dict[str, Tensor]:
    """What is no adapter, by the names of a network without any."""
    return {n.replace(".base_layer", ""): weight for n, weight in model.named_parameters() if MARK not in n}


class Watch(L.Callback):
    """Keeps the adapters of student and average after each batch."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, model: Any, *_: Any) -> None:
        self.rows.append((adapters(model.student).clone(), adapters(model.ema).clone()))


def test_all_networks_are_one_copy_of_weights_that_stay(sd3_folder: Path, sd3_latents: Path) -> None:
    model, watch = module(sd3_folder, [Pull()], lora=LoRA(rank=2), ema=0.9, target_ema=0.5), Watch()
    fit(model, sd3_latents, 4, [watch])
    assert model.student is not None and model.ema is not None and model.target is not None
    before, taught = frozen(model.backbone.denoiser()), frozen(model.teacher.network)
    for network in (model.student, model.ema, model.target):
        mine = frozen(network)
        assert mine.keys() == taught.keys() and all(mine[name] is weight for name, weight in taught.items())
    assert all(torch.equal(weight, before[name]) for name, weight in taught.items())
    moved = [row for row, _ in watch.rows]
    assert all(not torch.equal(one, other) for one, other in zip(moved, moved[1:], strict=False))
    average = watch.rows[0][1]
    for step, (student, found) in enumerate(watch.rows[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * student
        torch.testing.assert_close(found, average, atol=1e-6, rtol=1e-5)
    trained = {weight for group in model.trainer.optimizers[0].param_groups for weight in group["params"]}
    assert trained == set(model.student.weights)
    lines = {name: (size, role) for name, size, role in Networks().lines(model)}
    assert lines["student"] == (lines["ema"][0], "trained, as adapters of rank 2")
    assert lines["student"][0] == get_human_readable_count(len(adapters(model.student))) != lines["teacher"][0]


def test_teacher_dtype_is_that_of_text_encoders_where_the_teacher_is_the_students_weights(sd3_folder: Path) -> None:
    model = begun(sd3_folder, lora=LoRA(rank=2), teacher_dtype="bfloat16")
    assert model.student is not None and {weight.dtype for weight in model.student.parameters()} == {torch.float32}
    assert {weight.dtype for weight in model.text_encoder.network.parameters()} == {torch.bfloat16}


def test_adapters_of_a_unet_are_trained_sampled_and_measured_as_whole_students_are(
    sd_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """In bfloat16, recomputed, over several batches, with a target network, predicting what it did not before."""
    options = {
        "data__source": pictures, "data__height": 32, "data__width": 32, "data__batch_size": 8,
        "model__lora__rank": 4, "model__target_ema": 0.9, "model__ema": 0.1,
        "model__student_optimizer": "torch.optim.AdamW", "model__student_optimizer__lr": 0.05,
        "model__checkpoint": True, "model__accumulate": 2, "trainer__precision": "bf16-mixed", "samples__every": 2,
        "model__schedule": '{"prediction_type": "v_prediction"}',
    }  # fmt: skip
    main(fit_arguments("consistency_sd15.yaml", sd_folder, None, tmp_path, **options))
    assert (tmp_path / "samples" / "step-000002.png").is_file() and len(logged(tmp_path)["step"]) >= 2
    last = tmp_path / "checkpoints" / "last.ckpt"
    main(["export", "--checkpoint", str(last), "--output", str(tmp_path / "half"), "--lora", "true", "--half", "true"])
    main(["export", "--checkpoint", str(last), "--output", str(tmp_path / "whole")])
    stock = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    stock.load_lora_weights(tmp_path / "half")
    stock.scheduler = LCMScheduler.from_pretrained(tmp_path / "half", subfolder="scheduler")
    assert stock.scheduler.config.prediction_type == "v_prediction"
    painters = [
        open_painter(str(tmp_path / "whole"), 4, device="cpu"),
        open_student_painter(str(last), 4, device="cpu"),
    ]
    whole, direct = (painter(["a red ring"], seed=3) for painter in painters)
    torch.testing.assert_close(direct, whole, atol=1e-4, rtol=0)
    adapted = replace(painters[0], pipeline=stock)(["a red ring"], seed=3)
    assert (adapted - whole).abs().max() <= 2e-2, "float16 rounds"
    teacher = backbones.load(str(sd_folder), schedule=read_checkpoint(last)[0]["schedule"])
    taught = teacher.student_pipeline(teacher.denoiser(), **teacher.unchecked)
    assert (replace(painters[0], pipeline=taught)(["a red ring"], seed=3) - whole).abs().max() > 0.2
    with pytest.raises(ConfigError, match="holds adapters and no pipeline; export their checkpoint without --lora"):
        open_painter(str(tmp_path / "half"), 4, device="cpu")


@pytest.fixture(scope="module")
def alone(sd3_folder: Path, sd3_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process."""
    folder = tmp_path_factory.mktemp("alone")
    forked(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, folder, **ADAPTED))
    return folder


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_train_adapters_as_one(
    strategy: dict[str, Any], alone: Path, sd3_folder: Path, sd3_latents: Path, tmp_path: Path
) -> None:
    """And go on from their checkpoint."""
    for steps in (2, 4):
        options = {**ADAPTED, **strategy, "trainer__max_steps": steps}
        arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **options)
        forked([*arguments, "--ckpt_path", "last"], ranks=2)
    whole, parts = logged(alone), logged(tmp_path)
    assert parts["step"] == whole["step"][2:], "the second run began anew"
    for name in NAMES:
        assert parts[name] == pytest.approx(whole[name][2:], rel=1e-3 if "gradient" in name else 1e-4), name
    lasts = [folder / "checkpoints" / "last.ckpt" for folder in (alone, tmp_path)]
    begun = load_student(lasts[0]).backbone.denoiser()
    begun.adapt(LoRA(rank=4), seed=0)
    students = [load_student(last, merged=False, raw=True).denoiser for last in lasts]
    here, there = (adapters(student) - adapters(begun) for student in students)
    assert (here - there).norm() <= 0.02 * here.norm() and here.any()


def test_a_run_of_adapters_goes_on_bit_for_bit(
    alone: Path, sd3_folder: Path, sd3_latents: Path, tmp_path: Path
) -> None:
    for steps in (2, 4):
        options = {**ADAPTED, "trainer__max_steps": steps}
        arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **options)
        forked([*arguments, "--ckpt_path", "last"])
    first, second = (checkpoint(run) for run in (alone, tmp_path))
    names = [name for name in first["state_dict"] if name.startswith(("student.", "ema."))]
    assert names and all(MARK in name for name in names), "frozen weights are kept nowhere"
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    assert min(logged(tmp_path)["step"]) == 3, "the second run began anew"


@pytest.fixture(scope="module")
def run(alone: Path) -> Path:
    return alone / "checkpoints" / "last.ckpt"


def begun(teacher: Path, **options: Any) -> DistillModule:
    model = module(teacher, [Pull()], **options)
    model.configure_model()
    return model


def test_a_run_begins_with_the_adapters_of_another_or_with_them_merged(run: Path, sd3_folder: Path) -> None:
    weights = torch.load(run, weights_only=True)["state_dict"]
    model = begun(sd3_folder, student_init=str(run), lora=LoRA(rank=4))
    assert model.student is not None
    for name, tensor in model.student.state_dict().items():
        assert torch.equal(tensor, weights[f"ema.{name}"])
    whole = begun(sd3_folder, student_init=str(run))
    assert whole.student is not None and not whole.student.adapted
    merged = load_student(run).denoiser.state_dict()
    taught = whole.backbone.denoiser().state_dict()
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, merged[name])
    assert any(not torch.equal(tensor, taught[name]) for name, tensor in merged.items())
    same = begun(sd3_folder, student_init=str(run), lora=LoRA(rank=4, alpha=4.0))
    assert same.student is not None and same.student.adapted
    with pytest.raises(
        ConfigError, match=r"was trained with the adapters .*'rank': 4.*, this recipe is one with .*: 8"
    ):
        begun(sd3_folder, student_init=str(run), lora=LoRA(rank=8))


@pytest.mark.parametrize("lora", [{}, {"model__lora__rank": 8}])
def test_a_run_goes_on_with_the_adapters_it_began_with(
    lora: dict[str, Any], run: Path, sd3_folder: Path, sd3_latents: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=5, **lora)
    said = mistake(capsys, [*arguments, "--ckpt_path", str(run)])
    assert "is of a run with the adapters model.lora=" in said and "go on with the same model.lora, or begin" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"student_init": "random"}, "and model.student_init=random asks for others; leave one of them out"),
    ],
)
def test_what_adapters_cannot_be_is_said(options: dict[str, Any], sentence: str, sd3_folder: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        module(sd3_folder, [Pull()], lora=LoRA(), **options)
