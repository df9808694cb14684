"""What a user types, and what a user gets for a mistake: one clear sentence and exit code 2."""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from torchvision.io import decode_image

from distill.cli import COMMANDS, HELP, main
from distill.errors import ConfigError
from distill.training import parallel
from tests.runs import ROOT, checkpoint, fit_arguments, logged, mistake


def test_help_is_quick_and_names_every_command() -> None:
    import subprocess
    import sys

    loaded = "import sys; from distill.cli import main; main(['--help']); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout
    assert answer.startswith(HELP)
    assert answer.endswith("False\n"), "--help must not import torch"
    assert all(f"  {command} " in HELP for command in COMMANDS)


def test_recipe_of_ladd_at_paper_size_runs_two_steps(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path))
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 2
    assert saved["distill"]["levels"] == [1.0, 0.75, 0.5, 0.25]
    kept = {"student", "ema", "strategies", "skipped", "lengths", "latent"}
    assert {name.split(".")[0] for name in saved["state_dict"]} == kept
    assert all(abs(value) < 100 for value in logged(tmp_path)["student/LatentAdversarial"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model__studnet_clip": 1}, ["studnet_clip"]),
        ({"trainer__max_steps": "many"}, ["max_steps", "many"]),
        ({"model__teacher": "/nowhere/sd3"}, ["/nowhere/sd3", "no pipeline"]),
        ({"model__strategies": '[{"class_path": "LatentAdversarail"}]'}, ["LatentAdversarail"]),
        ({"data__batch_size": 1}, ["batch_size", "norm=group"]),
        ({"data__batch_size": 65}, ["65", "64"]),
        ({"trainer__strategy": "fsdp", "trainer__devices": 2}, ["FSDP2", "ModelParallelStrategy"]),
        ({"trainer__precision": "16-mixed"}, ["16-mixed", "bf16-mixed"]),
        ({"trainer__precision": "bf16-true"}, ["bf16-true", "bf16-mixed"]),
        ({"ckpt_path": "nowhere.ckpt"}, ["no checkpoint at 'nowhere.ckpt'"]),
        ({"samples__every": 1, "samples__steps": "[1,3,9]"}, ["1 to 4 steps", "not in 9"]),
        ({"model__critic_updates": 0}, ["critic_updates"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_in_a_recipe(
    options: dict,
    words: list[str],
    sd3_folder: Path,
    sd3_latents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = mistake(capsys, fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **options))
    assert all(word in error for word in words), error
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("lacks", "insists", "computes"),
    [(True, None, "32-true"), (True, "bf16-mixed", "bf16-mixed"), (False, None, "bf16-mixed")],
)
@pytest.mark.parametrize("name", ["bf16-mixed", "bf16"])
def test_a_recipe_s_bfloat16_is_for_machines_that_have_it(
    name: str,
    lacks: bool,
    insists: str | None,
    computes: str,
    sd3_folder: Path,
    sd3_latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(parallel, "lacks_bfloat16", lambda accelerator: lacks)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "recipes/tiny_ladd.yaml").read_text().replace("bf16-mixed", name))
    options = {"trainer__precision": insists, "trainer__max_steps": 1}
    main(fit_arguments(str(recipe), sd3_folder, sd3_latents, tmp_path, **options))
    said = capsys.readouterr().out.count("no instructions for bfloat16")
    kept = OmegaConf.load(next(tmp_path.rglob("config.yaml"))).trainer.precision
    usual = {"bf16": "bf16-mixed"}.get(kept, kept)
    assert (usual, said) == (computes, computes == "32-true")


def test_teacher_that_is_no_pipeline(sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = fit_arguments("ladd_sd3.yaml", tmp_path, sd3_latents, tmp_path / "run")
    assert "no model_index.json" in mistake(capsys, arguments)


def test_latents_of_another_teacher(
    sd_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = mistake(capsys, fit_arguments("ladd_sd3.yaml", sd_folder, sd3_latents, tmp_path))
    assert "made by sd3@" in error and "not by model.teacher sd@" in error


def test_missing_latents_name_the_command(sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = mistake(capsys, fit_arguments("ladd_sd3.yaml", sd3_folder, tmp_path / "none", tmp_path))
    assert f"distill generate latents --teacher {sd3_folder} --output {tmp_path / 'none'}" in error


def test_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml" in mistake(capsys, ["fit", "--config", "none.yaml"])


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'fitt' is no command" in mistake(capsys, ["fitt"])


def test_measuring_does_not_begin_in_inference_mode(capsys: pytest.CaptureFixture[str]) -> None:
    """In which FSDP2 networks cannot be asked first; on gloo, where they are tested, Lightning never takes it."""
    with pytest.raises(SystemExit):
        main(fit_recipe("--print_config"))
    assert "  inference_mode: false\n" in capsys.readouterr().out


def test_interpolation_sees_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(fit_recipe("--model.teacher", "other", "--print_config"))
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.model.init_args.teacher == printed.data.init_args.teacher == "other"


@pytest.mark.parametrize("where", ["two words", "=", "a file", "a file, in short"])
def test_a_list_of_strategies_takes_the_place_of_the_recipes(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it leaves out is the class's default, not what the recipe said of a class at the same place."""
    strategies = [{"class_path": "LatentAdversarial", "init_args": {"weight": 2.0}}]
    model = {"class_path": "DistillModule", "init_args": {"teacher": "tiny-sd3", "strategies": strategies}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": model}))
    given = json.dumps(strategies)
    option = {
        "two words": ["--model.strategies", given],
        "=": [f"--model.strategies={given}"],
        "a file": ["--config", str(tmp_path / "mine.yaml")],
        "a file, in short": ["-c", str(tmp_path / "mine.yaml")],
    }[where]
    with pytest.raises(SystemExit):
        main(fit_recipe(*option, "--print_config"))
    (made,) = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["strategies"]
    assert [made["init_args"][name] for name in ("weight", "r1", "levels")] == [2.0, None, None]


def test_generate_export_sample_evaluate(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "latents"
    main(
        ["generate", "latents", "--teacher", str(sd3_folder), "--output", str(made), "--count", "64", "--steps", "2"]
        + ["--guidance", "3.0", "--shard_size", "32", "--batch_size", "32", "--accelerator", "cpu", "--devices", "1"]
    )
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (made, sd3_latents)]
    assert manifests[0]["shards"] == manifests[1]["shards"], "Trainer.predict and the plain loop make the same latents"
    main(fit_arguments("ladd_sd3.yaml", sd3_folder, made, tmp_path / "run"))
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    main(["export", "--checkpoint", last, "--output", str(tmp_path / "student")])
    main(
        ["sample", "--pipeline", str(tmp_path / "student"), "--prompt", '["a red ring", "a blue square"]']
        + ["--steps", "4", "--output", str(tmp_path / "images"), "--device", "cpu"]
    )
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "00000.png",
        "00001.png",
        "grid.png",
        "prompts.txt",
    ]
    same = ["sample", "--checkpoint", last, "--prompt", '["a red ring", "a blue square"]', "--steps", "4"]
    main([*same, "--output", str(tmp_path / "same"), "--device", "cpu"])
    first, again = (decode_image(str(tmp_path / folder / "00001.png")).int() for folder in ("images", "same"))
    assert (first - again).abs().max() <= 1, "a checkpoint paints as its export does"
    values = tmp_path / "values.json"
    main(
        ["evaluate", "--checkpoint", last, "--steps", "1", "--samples", "64", "--output", str(values)]
        + ["--device", "cpu", "--batch_size", "32"]
    )
    assert 0 <= json.loads(values.read_text())["alignment"] <= 1
    assert "distances of 64 images are larger than those of many" in capsys.readouterr().err


def test_steps_a_student_was_not_trained_for(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=1))
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    assert "samples in 1, 2, 3, 4 steps, not in 5" in mistake(
        capsys, ["evaluate", "--checkpoint", last, "--steps", "5", "--samples", "64"]
    )
    for option in (["--guidance", "9.0"], ["--solver", "DDIMScheduler"]):
        error = mistake(capsys, ["evaluate", "--checkpoint", last, "--samples", "64", *option])
        assert "has its own guidance and solver; leave both out" in error


def test_checkpoint_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    arguments = ["export", "--checkpoint", str(tmp_path / "other.ckpt"), "--output", str(tmp_path / "out")]
    assert "no checkpoint of a DistillModule" in mistake(capsys, arguments)
    assert not (tmp_path / "out").exists()


def fit_recipe(*options: str) -> list[str]:
    return ["fit", "--config", str(ROOT / "recipes/tiny_ladd.yaml"), *options]


def test_other_strategies_than_a_run_began_with(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=1))
    strategies = '[{"class_path": "PerceptualRegression", "init_args": {"distance": "mse"}}]'
    again = {"trainer__max_steps": 2, "model__strategies": strategies, "ckpt_path": "last"}
    error = mistake(capsys, fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **again))
    assert "of a run with model.strategies LatentAdversarial, this recipe has PerceptualRegression; go on" in error


def test_a_new_run_takes_the_place_of_another_only_when_told(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=1)
    main(arguments)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    error = mistake(capsys, arguments)
    assert f"'{last}' is the checkpoint of another run, which a new one would replace; go on with it by" in error
    assert last.read_bytes() == before
    main([*arguments, "--checkpoint.overwrite", "true", "--trainer.max_steps", "2"])
    assert f"2 updates are in {last}" in capsys.readouterr().out and last.read_bytes() != before


def test_a_folder_in_ones_home_is_the_same_folder(
    sd3_folder: Path,
    sd3_latents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=1)
    for option, name in (("--checkpoint.dirpath", "~/mine"), ("--trainer.default_root_dir", "~/run")):
        own = [*arguments, "--checkpoint.dirpath", "null", option, name]
        main(own)
        assert "is the checkpoint of another run" in mistake(capsys, own)
    assert {path.parent.name for path in tmp_path.rglob("last.ckpt")} == {"mine", "checkpoints"}


def test_a_run_that_names_no_folder_for_its_checkpoints_finds_them_again(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning's own folder is named anew for every start; `last` was in none of them, and nothing was said."""
    given = {"checkpoint__dirpath": "null", "ckpt_path": "last"}
    for steps in (1, 2):
        main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=steps, **given))
    said = " ".join(capsys.readouterr().out.split())
    place = tmp_path / "checkpoints" / "last.ckpt"
    assert said.count(f"There is no {place} to go on from, so this run begins anew.") == 1
    assert f"2 updates are in {place}" in said
    measured = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path / "other", **given)
    error = mistake(capsys, ["validate", *measured[1:], "--trainer.limit_val_batches", "1"])
    assert f"there is no checkpoint at '{tmp_path / 'other' / 'checkpoints' / 'last.ckpt'}' yet" in error


def test_another_critic_than_a_run_began_with(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=1))
    again = {"trainer__max_steps": 2, "ckpt_path": "last"}
    wider = '[{"class_path": "LatentAdversarial", "init_args": {"hidden": 48}}]'
    arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, model__strategies=wider, **again)
    assert "the critic of LatentAdversarial has other layers than in the checkpoint; go on" in mistake(
        capsys, arguments
    )
    arguments = fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, **again)
    with pytest.warns(UserWarning, match="LatentAdversarial goes on with other loss than in the checkpoint"):
        main([*arguments, "--model.strategies.loss", "Logistic"])


def test_what_a_parser_found_wrong_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Not the types it tried."""
    for arguments, sentence in (
        (fit_recipe("--model.guidanc", "3"), "model has no option 'guidanc'; "),
        (
            fit_recipe("--model.strategies", '[{"class_path": "LatentAdversarial", "init_args": {"wieght": 3}}]'),
            "model: LatentAdversarial has no option 'wieght'; --print_config",
        ),
        (["sample", "--pipeline", "tiny-sd", "--columns", "many"], "columns"),
        (["compare", "--entries", "3"], "entries"),
        (
            fit_recipe("--model.strategies", '[{"class_path": "LatentAdverserial"}]'),
            "strategies: there is no class 'LatentAdverserial'; give the name of one of this package or the import",
        ),
        (
            fit_recipe("--model.strategies", '[{"class_path": "no_such_module.Mine"}]'),
            "(No module named 'no_such_module'); give the name of one of this package or the import path of your own, "
            "such as my_module.MyClass; a module of your own has to be on PYTHONPATH",
        ),
        (
            fit_recipe("--model.strategies", '[{"class_path": "distill.batch.Mine"}]'),
            "the class 'distill.batch.Mine' cannot be had (module 'distill.batch' has no attribute 'Mine'); give",
        ),
        (fit_recipe("--model.inputs.levels", "LogitNrmal"), "there is no class 'LogitNrmal'"),
        (fit_recipe("--model.inputs", "null"), "model needs inputs, and none was given"),
        (
            fit_recipe("--data.generation", "null"),
            "generation holds options of its own and was given as null; leave",
        ),
        (fit_recipe("--data", "ShapsData"), "data: there is no class 'ShapsData'"),
        (fit_recipe("--trainer.max_step", "5"), "error: there is no option --trainer.max_step; --help shows"),
        (
            fit_recipe("--trainer.precision", "half"),
            "error: trainer.precision is 64 or 32 or 16 or transformer-engine or",
        ),
        (
            ["compare", "--entries", '[{"name": "a", "steps": 4}]'],
            "error: entries.steps is list, and '4' is none",
        ),
        (fit_recipe("--model.ema", "high"), "error: ema is float, and 'high' is none"),
        (fit_recipe("--data.batch_size", "many"), "error: batch_size is int, and 'many' is none"),
        (["fit"], "nothing says what data, model is; a recipe does, such as --config recipes/tiny_ladd.yaml"),
        (["fit", "--config", "recipes/nope.yaml"], "recipes/nope.yaml'; --config is the path of a YAML file"),
        (["fit", "--config", str(ROOT / "Makefile")], "Makefile' is no YAML at line "),
        (["fit", f"--config={ROOT / 'Makefile'}"], "Makefile' is no YAML at line "),
        (
            ["fit", "--config", str(ROOT / "distill" / "data" / "__init__.py")],
            "is empty; a recipe is a YAML mapping",
        ),
        (fit_recipe("--data.batch_size", "-4"), "must be a positive multiple of their number, 1; got -4"),
        (fit_recipe("--monitor.every", "-1"), "monitor.every=-1 is too few; give 0 for none, or more"),
        (fit_recipe("--samples.every", "-1"), "samples.every=-1 is too few; give 0 for none, or more"),
        (fit_recipe("--samples.scale", "0"), "scale=0 is too few; give 1 or more"),
        (fit_recipe("--model.student_clip", "-1"), "a positive length, or null for none; got model.student_clip=-1.0"),
        (
            fit_recipe("--model.inputs.warmup_steps", "5"),
            "inputs.warmup=None and model.inputs.warmup_steps=5",
        ),
        (
            ["generate", "latents", "--teacher", "tiny-sd", "--output", "out", "--height", "-32"],
            "height=-32 is too few; give 1 or more",
        ),
        (
            ["generate", "latents", "--teacher", "tiny-sd", "--output", "out", "--height", "34"],
            "takes pictures whose height and width are positive multiples of 4 pixels; got 34",
        ),
        (
            ["generate", "latents", "--teacher", "tiny-sd", "--output", "out", "--solver", "Nope"],
            "diffusers has no scheduler 'Nope'",
        ),
        (fit_recipe("--trainer.accelerator", "mps"), "MPS"),
        (fit_recipe("--data.workers", "-1"), "data.workers=-1 is too few; give 0 for none, or more"),
        (
            fit_recipe("--model.seed", "99999999999999999999"),
            "model.seed=99999999999999999999: a seed is a whole number",
        ),
        (fit_recipe("--data.seed", "-1"), "data.seed=-1: a seed is a whole number from 0 to 4294967295"),
        (fit_recipe("--samples.prompts", "[]"), "samples.prompts is empty; leave it out for the usual ones"),
        (fit_recipe("--samples.steps", "[]"), "samples.steps is empty; leave it out for the usual ones"),
        (fit_recipe("--evaluation.batch_size", "0"), "evaluation.batch_size=0 is too few; give 1 or more"),
        (fit_recipe("--data.batch_size", "1", "--model.strategies.norm", "local_batch"), "at least 2 samples"),
        (fit_recipe("--model.strategies.weight", "-1"), "a strategy's weight is a number of 0 or more, got -1"),
        (
            ["sample", "--pipeline", "tiny-sd", "--prompt", "a", "--seed", "18446744073709551616"],
            "seed=18446744073709551616: a seed is a whole number from 0 to 4294967295",
        ),
        (
            ["generate", "latents", "--teacher", "tiny-sd", "--output", "out", "--devices", "-3"],
            "devices",
        ),
        (
            [
                "sample",
                "--pipeline",
                "tiny-sd",
                "--prompt",
                "a",
                "--guidance",
                ".nan",
                "--steps",
                "2",
                "--output",
                "out",
            ],
            "a guidance of nan is no scale; give a finite number",
        ),
        (["sample", "--prompt", "a"], "give either --pipeline or --checkpoint"),
        (
            ["evaluate", "--pipeline", "tiny-sd", "--prompts", "mine.txt"],
            "--prompts is for real images; give --reference FOLDER with it, or leave it out",
        ),
        (["evaluate", "--pipeline", "tiny-sd", "--samples", "1"], "needs 2 images or more; got --samples 1"),
        (["export", "--checkpoint", str(ROOT), "--output", "out"], "is a folder and no checkpoint"),
        (["sample", "--pipeline", "tiny-sd", "--prompt", '["a red ring'], '--prompt ["a red ring begins as a list'),
        (
            ["validate", *fit_recipe("--ckpt_path", "last")[1:]],
            "trainer.limit_val_batches=0 leaves nothing to measure on; add --trainer.limit_val_batches 1.0",
        ),
        (fit_recipe("--ckpt_path", str(ROOT / "README.md")), "README.md' is no checkpoint, or a damaged one; give one"),
        (["sample", "--pipeline", "tiny-sd", "--prompt", "a", "--steps", "0"], "steps=0 is too few; give 1 or more"),
        (["sample", "--pipeline", "tiny-sd", "--prompt", "a", "--batch_size", "0"], "batch_size=0 is too few"),
        (["evaluate", "--pipeline", "tiny-sd", "--batch_size", "0"], "batch_size=0 is too few; give 1 or more"),
        (["evaluate", "--pipeline", "tiny-sd", "--device", "gpu"], "there is no device 'gpu'"),
        (
            ["generate", "latents", "--teacher", "tiny-sd", "--output", "out", "--dtype", "float16"],
            "a teacher's dtype is one of float32, bfloat16; got float16",
        ),
        (
            ["export", "--checkpoint", str(ROOT), "--output", "out", "--metrics", "no.json"],
            "--metrics no.json is no JSON file; give one that `distill evaluate --output` wrote",
        ),
        (
            fit_recipe("--data", "ShapesData", "--data.generation.count", "5"),
            "has no option 'generation.count'; --print_config and --help show those it has",
        ),
        (
            fit_recipe("--trainer.accumulate_grad_batches", "2"),
            "one optimizer, and here are two players; set model.acc",
        ),
        (fit_recipe("--trainer.gradient_clip_val", "1.0"), "two players; set model.student_clip and model.critic_clip"),
        (
            fit_recipe("--model.ema", "1.5"),
            "decay is a number from 0 to below 1, or null for none; got model.ema=1.5",
        ),
        (
            ["evaluate", "--pipeline", "tiny-sd", "--output", str(ROOT / "docs")],
            "a file was to be written, and this",
        ),
        (
            ["sample", "--pipeline", "tiny-sd", "--prompt", "a", "--output", str(ROOT / "Makefile")],
            "a folder was to be written, and this is a file",
        ),
        (["sample", "--pipeline", "runs/none", "--prompt", "a red ring"], "there is no pipeline at 'runs/none'; give"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and sentence in said
        assert not any(word in said for word in ("Union", "Namespace", "<class")) and len(said.splitlines()) == 1, said
    assert not Path("out").exists()


def test_an_interpolation_that_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (ROOT / "recipes" / "tiny_ladd.yaml").read_text().replace("${trainer.max_steps}", "${trainer.maxsteps}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    error = mistake(capsys, ["fit", "--config", str(tmp_path / "recipe.yaml")])
    assert "total_iters refers to ${trainer.maxsteps}, and the recipe has no such option" in error


def test_grids_that_cannot_be_are_refused_before_data_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = mistake(capsys, fit_recipe("--samples.steps", "[0]", "--data.folder", str(tmp_path / "latents")))
    assert "this student samples in 1 to 4 steps, as many as it has levels; not in 0" in error
    assert not (tmp_path / "latents").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    making = ["generate", "latents", "--teacher", "tiny-sd3", "--output", str(tmp_path), "--accelerator", "gpu"]
    for arguments in (fit_recipe("--trainer.accelerator", "gpu"), making):
        error = mistake(capsys, arguments)
        assert "the accelerator is to be gpu, and none is found on this machine; auto takes what there is" in error


def test_one_prompt_needs_no_list(tmp_path: Path) -> None:
    main(["sample", "--pipeline", "tiny-sd", "--prompt", "a red ring", "--steps", "1", "--output", str(tmp_path)])
    assert (tmp_path / "00000.png").is_file() and (tmp_path / "prompts.txt").read_text() == "a red ring\n"


def test_half_precision_paints_nearly_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the same: then the option would do nothing."""
    asked = ["sample", "--pipeline", "tiny-sd", "--prompt", "a red ring", "--steps", "4", "--device", "cpu"]
    pictures = []
    for dtype in ("float32", "bfloat16"):
        main([*asked, "--dtype", dtype, "--output", str(tmp_path / dtype)])
        pictures.append(decode_image(str(tmp_path / dtype / "00000.png")).float())
    assert 0 < (pictures[0] - pictures[1]).abs().mean() < 16
    assert "a pipeline's dtype is one of float32, bfloat16, float16; got int8" in mistake(
        capsys, [*asked, "--dtype", "int8", "--output", str(tmp_path)]
    )


@pytest.mark.parametrize("command", ["calibrate", "collaborate", "analyse", "evaluate"])
def test_half_precision_is_that_of_all_networks(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[torch.dtype] = []

    @wraps(StableDiffusionPipeline.__call__)  # whose arguments are looked at
    def look(pipeline: Any, **call: Any) -> None:
        opened.extend({part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)})
        raise ConfigError("seen")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", look)
    pair = ["--student", "tiny-sd", "--teacher", "tiny-sd"]
    rest = {
        "calibrate": [*pair, "--output", str(tmp_path / "made.json")],
        "collaborate": [
            *pair,
            "--prompt",
            "a red ring",
            "--threshold",
            "0",
            "--mode",
            "regenerate",
            "--teacher_steps",
            "2",
        ],
        "analyse": [*pair, "--output", str(tmp_path)],
        "evaluate": ["--pipeline", "tiny-sd"],
    }[command]
    mistake(capsys, [command, *rest, "--dtype", "bfloat16", "--device", "cpu"])
    assert opened == [torch.bfloat16]


def test_a_grid_shows_eight_rows_at_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompt", json.dumps(["a red ring"] * 10), "--steps", "1", "--columns", "1", "--output", str(tmp_path)]
    main(["sample", "--pipeline", "tiny-sd", *asked])
    assert f"10 images and a grid of the first 8 are in {tmp_path}" in capsys.readouterr().out
    assert decode_image(str(tmp_path / "grid.png")).shape == (3, 8 * (32 + 2) + 2, 32 + 4)
    assert len(list(tmp_path.glob("0*.png"))) == 10


@pytest.mark.parametrize(("name", "count"), [("00001.png", 2), ("grid.png", 1)])
@pytest.mark.parametrize("command", ["sample", "collaborate"])
def test_pictures_of_others_are_not_replaced(
    command: str, name: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is painted; one that lies beside what is to be written is in nobody's way."""
    (tmp_path / name).write_bytes(b"a scan")
    (tmp_path / "00007.png").write_bytes(b"another")
    networks = ["--pipeline", "tiny-sd"] if command == "sample" else ["--student", "tiny-sd", "--teacher", "tiny-sd"]
    asked = ["--prompt", json.dumps(["a red ring"] * count), "--output", str(tmp_path)]
    error = mistake(capsys, [command, *networks, *asked])
    assert f"'{tmp_path / name}' was not written by distill and would be lost; give another --output" in error
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "00007.png"])
