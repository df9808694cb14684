"""One process, DDP and FSDP2: the same losses; and a killed run that goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.export import load_student, read_checkpoint
from distill.files import read_json
from distill.strategies import Strategy
from tests.runs import Forked, checkpoint, distill, fit_arguments, forked, logged, mistake

FSDP2 = {
    "trainer__devices": 2,
    "trainer__strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
    "trainer__strategy__data_parallel_size": 2,
    "trainer__strategy__tensor_parallel_size": 1,
}
DDP = {"trainer__strategy": "ddp", "trainer__devices": 2}
SHARDED_ALONE = {**FSDP2, "trainer__devices": 1, "trainer__strategy__data_parallel_size": 1}
NORMS = ("student/gradient_norm", "critic/gradient_norm")
COMPARED = {
    "ladd": ("student/LatentAdversarial", "critic/LatentAdversarial/game",
             "gradient_at_sample/LatentAdversarial", *NORMS),
    "add": ("student/PixelAdversarial", "student/ScoreDistillation", "critic/PixelAdversarial/game",
            "critic/PixelAdversarial/r1", "gradient_at_sample/PixelAdversarial", *NORMS),
    "diffusion2gan": ("student/PerceptualRegression_0", "student/PerceptualRegression_1",
                      "student/ConditionalAdversarial", "weight/ConditionalAdversarial",
                      "critic/ConditionalAdversarial/game", "critic/ConditionalAdversarial/r1",
                      "gradient_at_sample/ConditionalAdversarial", *NORMS),
    "consistency": ("student/ConsistencyDistillation", "gradient_at_sample/ConsistencyDistillation",
                    "student/gradient_norm"),
}  # fmt: skip


@dataclass
class Method:
    """A method's recipe with everything it needs, and its run on one process."""

    name: str
    arguments: Callable[..., list[str]]
    alone: Path


@pytest.fixture(scope="module", params=COMPARED)
def method(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Method:
    """Five steps of LADD on a small SD3, or of another method on a small SD."""
    get = request.getfixturevalue

    def arguments(folder: Path, **options: Any) -> list[str]:
        if request.param == "ladd":
            return fit_arguments("ladd_sd3.yaml", get("sd3_folder"), get("sd3_latents"), folder, **options)
        if request.param == "diffusion2gan":
            # R1 of each process's first sample would be another loss on two of them, and a finite difference of a tiny
            # step is rounding. The perceptual loss is compared and moves nothing: its gradient was 12 % apart
            # once, after equal losses (its network has kinks), and is not compared here.
            penalty = {"class_path": "ApproximateR1", "init_args": {"sigma": 0.1, "every": 1}}
            critic = {"class_path": "ConditionalAdversarial", "init_args": {"r1": penalty, "r1_samples": 16}}
            smooth = {"class_path": "PerceptualRegression", "init_args": {"distance": "pseudo_huber"}}
            settings = {"weights": str(get("latent_lpips")), "weight": 0.0}
            metric = {"class_path": "PerceptualRegression", "init_args": settings}
            terms = {"model__strategies": json.dumps([smooth, metric, critic])}
            return fit_arguments(
                "diffusion2gan_sd15.yaml", get("sd_folder"), get("sd_pairs"), folder, **terms, **options
            )
        sizes = {"data__source": get("pictures"), "data__height": 32, "data__width": 32}
        if request.param == "consistency":
            sizes["model__student_optimizer"] = "torch.optim.AdamW"  # RAdam's first steps are lost in float32
            return fit_arguments("consistency_sd15.yaml", get("sd_folder"), None, folder, **sizes, **options)
        vit = str(get("vit_folder"))
        critic = {"class_path": "PixelAdversarial", "init_args": {"vision": vit, "image": vit, "r1": "ExactR1"}}
        terms = {"model__strategies": json.dumps([critic, {"class_path": "ScoreDistillation"}])}
        return fit_arguments("add_sd21.yaml", get("sd_folder"), None, folder, **terms, **sizes, **options)

    folder = tmp_path_factory.mktemp("alone")
    forked(arguments(folder, trainer__max_steps=5))  # its own process: what ran before in this one can round
    return Method(request.param, arguments, folder)


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(strategy: dict, method: Method, tmp_path: Path) -> None:
    forked(method.arguments(tmp_path, **{"trainer__max_steps": 5, **strategy}), ranks=2)
    _assert_trained_alike(method, logged(tmp_path), steps=5)
    start = load_student(method.alone / "checkpoints" / "last.ckpt", raw=True).backbone.denoiser().state_dict()
    for raw in (True, False):  # the student and its moving average
        trained = [
            load_student(run / "checkpoints" / "last.ckpt", raw=raw).denoiser.state_dict()
            for run in (method.alone, tmp_path)
        ]
        moves = [
            {name: tensor - start[name] for name, tensor in state.items() if not name.endswith("pos_embed.pos_embed")}
            for state in trained
        ]
        still = {name for name, move in moves[1].items() if not move.any()}
        assert all(".1.attn." in name and "add" in name for name in still), "the last block's text queries lead nowhere"
        here, there = (torch.cat([move.flatten() for move in moved.values()]) for moved in moves)
        assert (here - there).norm() <= 0.02 * here.norm()


class PoisonedOnOne(Strategy):
    """A loss that is no number in the second process's second batch, while its gradient is one."""

    def student_loss(self, sample: Any, batch: Any, step: int) -> torch.Tensor:
        poisoned = batch.draws.first > 0 and batch.draws.batch == 1
        return sample.x0.square().mean() + (float("nan") if poisoned else 0.0)


def test_an_update_that_one_process_must_skip_all_skip(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    """Or one would ask for a batch more than the other, and both wait for ever."""
    terms = json.dumps([{"class_path": f"{__name__}.PoisonedOnOne"}])
    options = {**DDP, "model__strategies": terms, "trainer__max_steps": 3}
    codes, said = Forked(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **options), ranks=2).wait(80)
    assert codes == [0, 0], said[-2000:]
    found = logged(tmp_path)
    assert found["step"] == [1, 1, 2, 3] and found["skipped_updates"] == [0, 1, 1, 1]


def test_fsdp2_in_bfloat16_begins_as_float32_does(method: Method, tmp_path: Path) -> None:
    """Its first losses are those of one process in float32 but for rounding, which matters most in a finite difference.
    Without a moving average the grid is the student's own, whose weights come in bfloat16.
    """
    room = {"r1": 0.5, "gradient": 0.15}
    options = {"trainer__precision": "bf16-mixed", "model__ema": "null", "samples__every": 1, **FSDP2}
    forked(method.arguments(tmp_path, trainer__max_steps=1, **options), ranks=2)
    found, alone = logged(tmp_path), logged(method.alone)
    for name in COMPARED[method.name]:
        close = next((share for part, share in room.items() if part in name), 0.05)
        assert found[name][0] == pytest.approx(alone[name][0], rel=close), name
    assert (tmp_path / "samples" / "step-000001.png").exists()


def test_recipe_as_it_is_under_fsdp2(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    """bf16-mixed, a bfloat16 teacher, grids while sharded, and a resume: what the recipe does on many GPUs.

    Lightning starts the second process of the first run.
    """
    options = {**FSDP2, "trainer__precision": "bf16-mixed", "model__teacher_dtype": "bfloat16", "samples__every": 1}

    def arguments(steps: int) -> list[str]:
        shrunk = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=steps, **options)
        return [*shrunk, "--ckpt_path", "last"]

    run = distill(arguments(1))
    assert run.returncode == 0, run.stderr[-2000:]
    forked(arguments(2), ranks=2)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000001.png", "step-000002.png"]
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert load_student(last).facts["steps"] == 2
    assert logged(tmp_path)["step"] == [2], "the second run began anew"
    one, weights = read_checkpoint(last, ["ema.", "student."])
    both, every = read_checkpoint(last)
    assert one == both and set(weights) == {name for name in every if name.startswith("ema.")} < set(every)
    assert all(torch.equal(tensor, every[name]) for name, tensor in weights.items())
    assert set(read_checkpoint(last, ["none.", "student."])[1]) == {n for n in every if n.startswith("student.")}
    hidden = {"model__strategies__init_args__hidden": 16}
    for other, sentence in (
        (hidden, "the critic of LatentAdversarial has other layers than in the checkpoint; go on with"),
        ({"model__ema": "null"}, "the checkpoint keeps the moving averages ema, this recipe none; go on with"),
    ):
        changed = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **options, **other)
        codes, said = Forked([*changed, "--ckpt_path", "last"], ranks=2).wait()
        assert codes[0] == 2 and all(codes) and sentence in said and "Traceback" not in said


def test_transformer_critic_pays_a_finite_difference_sharded(sd3_folder: Path, sd3_pairs: Path, tmp_path: Path) -> None:
    """More than one pass through a sharded critic before the way back fails in its blocks; and the run can go on, for
    which all its weights need a gradient.
    """
    penalty = {"class_path": "ApproximateR1", "init_args": {"every": 1}}
    terms = [{"class_path": "PerceptualRegression", "init_args": {"distance": "mse"}},
             {"class_path": "ConditionalAdversarial", "init_args": {"r1": penalty}}]  # fmt: skip
    options = {**FSDP2, "model__strategies": json.dumps(terms)}
    for steps in (2, 3):
        options["trainer__max_steps"] = steps
        arguments = fit_arguments("diffusion2gan_sd15.yaml", sd3_folder, sd3_pairs, tmp_path, **options)
        forked([*arguments, "--ckpt_path", "last"], ranks=2)
    rows = logged(tmp_path)
    assert rows["step"][-1] == 3 and all(value > 0 for value in rows["critic/ConditionalAdversarial/r1"])


def test_exact_r1_of_a_sharded_critic_is_refused(sd_folder: Path, sd_pairs: Path, tmp_path: Path) -> None:
    terms = [{"class_path": "PerceptualRegression", "init_args": {"distance": "mse"}},
             {"class_path": "ConditionalAdversarial", "init_args": {"r1": "ExactR1"}}]  # fmt: skip
    options = {**FSDP2, "model__strategies": json.dumps(terms)}
    run = Forked(fit_arguments("diffusion2gan_sd15.yaml", sd_folder, sd_pairs, tmp_path, **options), ranks=2)
    codes, said = run.wait()
    assert codes[0] == 2 and all(codes)
    assert "cannot train a sharded critic" in said and "set r1 to ApproximateR1" in said


def test_killed_run_continues_bit_for_bit(method: Method, tmp_path: Path) -> None:
    options = {"trainer__max_steps": 20, "checkpoint__every_n_train_steps": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    forked(method.arguments(whole, **options))
    arguments = [*method.arguments(killed, **options), "--ckpt_path", "last"]
    run = Forked(arguments)
    while not (killed / "checkpoints" / "last.ckpt").exists():
        assert not run.ended, "the run ended before its first checkpoint"
        time.sleep(0.01)
    time.sleep(random.random() / 2)
    assert not run.ended, "the kill came too late to test anything"
    run.kill()
    forked(arguments)
    first, second = checkpoint(whole), checkpoint(killed)
    assert first["global_step"] == second["global_step"] == 20
    _assert_equal(first["state_dict"], second["state_dict"])
    _assert_equal(first["optimizer_states"], second["optimizer_states"])
    assert min(logged(killed)["step"]) >= 3, "the second run began anew"


@pytest.mark.parametrize(
    ("command", "ranks", "told"),
    [("fit", 1, signal.SIGTERM), ("fit", 1, signal.SIGINT), ("fit", 2, signal.SIGTERM), ("generate", 1, signal.SIGINT),
     ("generate", 1, signal.SIGTERM), ("generate", 2, signal.SIGTERM)],
    ids=str,
)  # fmt: skip
def test_a_signal_ends_what_runs_and_no_script_goes_on(
    command: str, ranks: int, told: signal.Signals, sd3_folder: Path, sd3_latents: Path, tmp_path: Path
) -> None:
    """Lightning ends a training with exit code 0 then, hangs where one process alone is told, and does not end the
    making of data at all.
    """
    if command == "fit":
        begun = tmp_path / "samples" / "step-000001.png"
        options = {"trainer__max_steps": 100000, "samples__every": 1, "checkpoint__every_n_train_steps": 100000}
        options |= DDP if ranks > 1 else {}
        arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **options)
    else:
        begun = tmp_path / "shard-000000.arrow"
        arguments = ["generate", "latents", "--teacher", str(sd3_folder), "--output", str(tmp_path)]
        arguments += ["--count", "80000", "--shard_size", "8", "--steps", "2", "--accelerator", "cpu"]
        arguments += ["--devices", str(ranks)]
    run = Forked(arguments, ranks)
    while not begun.exists():
        assert not run.ended, "it ended before anything was written"
        time.sleep(0.01)
    for process in run.processes[1:] if (command, ranks) == ("fit", 2) else run.processes:
        os.kill(process.pid, told)
    codes, said = run.wait(60)
    assert codes == [128 + told] * ranks, said[-2000:]
    if command == "fit":
        what = "interrupted" if told == signal.SIGINT else "ended by SIGTERM"
        assert f"distill: {what} before fit was through; --ckpt_path last goes on from" in said
        assert (tmp_path / "checkpoints" / "last.ckpt").is_file(), "what it had learnt is kept"


@pytest.mark.parametrize("method", ["ladd"], indirect=True)
@pytest.mark.parametrize(
    ("before", "after"),
    [(DDP, {}), (FSDP2, SHARDED_ALONE)],
    ids=["ddp-one", "fsdp2-sharded_alone"],
)
def test_a_run_is_given_more_steps_and_other_processes(
    before: dict, after: dict, method: Method, tmp_path: Path
) -> None:
    """Two steps, then three on other processes: the batches and losses of five on one."""
    for steps, how in ((2, before), (5, after)):
        arguments = method.arguments(tmp_path, trainer__max_steps=steps, **how)
        said = forked([*arguments, "--ckpt_path", "last"], ranks=how.get("trainer__devices", 1))
    assert "optimizer goes on with" not in said, "the recipe is the same"
    whole, rest = logged(method.alone), logged(tmp_path)
    assert rest["step"] == whole["step"][2:], "the second run began anew"
    _assert_trained_alike(method, rest, steps=3)
    costs = [read_json(folder / "cost.json") for folder in (method.alone, tmp_path)]
    assert [cost["images"] for cost in costs] == [80, 80] and costs[0]["evaluations"] == costs[1]["evaluations"]


@pytest.mark.parametrize("method", ["ladd"], indirect=True)
def test_a_run_that_cannot_go_on_sharded_or_whole_is_told_how(
    method: Method, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = method.alone / "checkpoints" / "last.ckpt"
    said = mistake(capsys, [*method.arguments(tmp_path, **FSDP2), "--ckpt_path", str(whole)])
    assert "is the checkpoint of an unsharded run" in said and "model.student_init: " in said
    folder = tmp_path / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True)
    for subcommand in ("fit", "validate"):
        arguments = [subcommand, *method.arguments(tmp_path)[1:], "--trainer.limit_val_batches", "1"]
        said = mistake(capsys, [*arguments, "--ckpt_path", str(folder)])
        assert f"'{folder}' is a folder and no checkpoint; give one, such as" in said
    (folder / "meta.pt").touch()
    said = mistake(capsys, [*method.arguments(tmp_path), "--ckpt_path", "last"])
    assert "is the checkpoint of an FSDP2 run, which trainer.strategy=auto cannot load; set trainer.s" in said


def _assert_trained_alike(method: Method, found: dict[str, list[float]], steps: int) -> None:
    """The last steps of five: losses agree to 1e-4, as they must over processes.

    Norms of gradients get more room: Adam makes signs of the rounding of near-zero gradients, which on some processors
    has led norms 2e-4 apart by the fifth step.
    """
    alone = logged(method.alone)
    for name in COMPARED[method.name]:
        assert found[name] == pytest.approx(alone[name][-steps:], rel=1e-3 if "gradient" in name else 1e-4), name


def _assert_equal(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)  # type: ignore[arg-type]
    elif isinstance(first, dict):
        assert first.keys() == second.keys()  # type: ignore[attr-defined]
        for key in first:
            _assert_equal(first[key], second[key])  # type: ignore[index]
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):  # type: ignore[call-overload]
            _assert_equal(one, other)
    else:
        assert first == second
