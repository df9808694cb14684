"""The recipes at paper size run two steps as they are, but for sizes, on small random networks saved to disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from distill import backbones
from distill.adversarial import vision
from distill.cli import main
from distill.errors import ConfigError
from distill.export import load_student
from distill.strategies import Discrete, NoisedData, ScoreDistillation
from distill.training.module import DistillModule
from tests.runs import ROOT, checkpoint, fit_arguments, logged


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
    assert {name.split(".")[0] for name in saved["state_dict"]} == {
        "student",
        "ema",
        "strategies",
        "skipped",
        "lengths",
        "latent",
    }
    start = backbones.load(str(teacher)).denoiser().state_dict()
    student = load_student(tmp_path / "checkpoints" / "last.ckpt", raw=True)
    moved = [name for name, tensor in student.denoiser.state_dict().items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(start), "some weights of the student never moved"
    assert (tmp_path / "samples" / "step-000002.png").is_file()


@pytest.mark.parametrize(
    ("recipe", "family"),
    [("consistency_sd15.yaml", "sd_folder"), ("lcm_sdxl.yaml", "sdxl_folder"), ("ladd_sd3.yaml", "sd3_folder")],
)
def test_grids_are_painted_beside_a_teacher_of_lower_precision(
    recipe: str, family: str, pictures: Path, sd3_latents: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As the recipes have it: the student and its autoencoder are float32, the text encoders are not."""
    real = {"data__source": pictures, "data__height": 32, "data__width": 32}
    data, options = (sd3_latents, {}) if family == "sd3_folder" else (None, real)
    options |= {"model__teacher_dtype": "bfloat16", "trainer__precision": "bf16-mixed"}
    options |= {"trainer__max_steps": 1, "samples__every": 1}
    main(fit_arguments(recipe, request.getfixturevalue(family), data, tmp_path, **options))
    assert (tmp_path / "samples" / "step-000001.png").is_file()


@pytest.mark.parametrize(
    ("recipe", "family"), [("consistency_sd15.yaml", "sd_folder"), ("lcm_sdxl.yaml", "sdxl_folder")]
)
def test_consistency_runs_two_steps(
    recipe: str, family: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    teacher = request.getfixturevalue(family)
    options = {"data__source": pictures, "data__height": 32, "data__width": 32, "samples__every": 2}
    main(fit_arguments(recipe, teacher, None, tmp_path, **options))
    assert all(value > 0 for value in logged(tmp_path)["student/ConsistencyDistillation"])
    saved = checkpoint(tmp_path)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {
        "student", "ema", "target", "skipped", "lengths", "latent"
    }  # fmt: skip
    assert (tmp_path / "samples" / "step-000002.png").is_file()
    assert {"1", "2", "4"} <= set(load_student(tmp_path / "checkpoints" / "last.ckpt").calls)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusion2gan_runs_two_steps_from_an_earlier_stage(
    family: str, latent_lpips: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Regression alone, then with the critic, from the first stage's checkpoint: the commands in the recipe's head."""
    name = "sd" if family == "sd15" else family
    teacher, pairs = request.getfixturevalue(f"{name}_folder"), request.getfixturevalue(f"{name}_pairs")
    recipe = f"diffusion2gan_{family}.yaml"
    metric = {"class_path": "PerceptualRegression", "init_args": {"weights": str(latent_lpips)}}
    terms = {"model__strategies": json.dumps([metric])}
    main(fit_arguments(recipe, teacher, pairs, tmp_path / "first", **terms))
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    assert checkpoint(tmp_path / "first")["distill"]["strategies"] == ["PerceptualRegression"]
    text = (ROOT / "recipes" / recipe).read_text()
    changed = tmp_path / recipe
    changed.write_text(re.sub(r"weights: weights/\S+", f"weights: {latent_lpips}", text))
    options = {"model__student_init": last, "samples__every": 2}
    main(fit_arguments(str(changed), teacher, pairs, tmp_path / "second", **options))
    scalars = logged(tmp_path / "second")
    for term in ("student/PerceptualRegression", "student/ConditionalAdversarial", "weight/ConditionalAdversarial",
                 "critic/ConditionalAdversarial/game", "gradient_at_sample/ConditionalAdversarial"):  # fmt: skip
        assert len(scalars[term]) == 2 and all(0 < abs(value) < 1e4 for value in scalars[term]), term
    assert scalars["critic/ConditionalAdversarial/r1"][0] > 0
    lengths = [scalars[f"gradient_at_sample/{term}"][0] for term in ("PerceptualRegression", "ConditionalAdversarial")]
    assert lengths[1] == pytest.approx(0.05 * lengths[0], rel=1e-4), "balance: 0.05 of the regression's gradient"
    before, after = (load_student(run / "checkpoints" / "last.ckpt", raw=True).denoiser.state_dict()
                     for run in (tmp_path / "first", tmp_path / "second"))  # fmt: skip
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (tmp_path / "second" / "samples" / "step-000002.png").is_file()


def test_the_long_recipe_of_diffusion2gan_runs_two_steps_as_it_is(tmp_path: Path) -> None:
    """On few pairs, which it makes itself, in its own precision; its rate falls to a fiftieth."""
    made = {"data__generation__count": 32, "data__generation__steps": 2, "data__folder": tmp_path / "pairs"}
    kept = {"data__workers": None, "model__teacher_dtype": None, "trainer__precision": None}
    recipe = "tiny_diffusion2gan_regression_long.yaml"
    main(fit_arguments(recipe, Path("tiny-sd"), None, tmp_path / "run", **made, **kept))
    values = logged(tmp_path / "run")["student/PerceptualRegression"]
    assert len(values) == 2 and all(0 < value < 10 for value in values)
    saved = checkpoint(tmp_path / "run")
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(3e-4 / 50)
    assert {*load_student(tmp_path / "run" / "checkpoints" / "last.ckpt").calls} == {"1"}


def test_diffusion2gan_on_an_sd3_teacher(sd3_folder: Path, sd3_pairs: Path, tmp_path: Path) -> None:
    """The critic of a transformer, with a regression that needs no weights."""
    terms = [{"class_path": "PerceptualRegression", "init_args": {"distance": "pseudo_huber"}},
             {"class_path": "ConditionalAdversarial", "init_args": {"r1": "ExactR1"}}]  # fmt: skip
    options = {"model__strategies": json.dumps(terms)}
    main(fit_arguments("diffusion2gan_sd15.yaml", sd3_folder, sd3_pairs, tmp_path, **options))
    assert len(logged(tmp_path)["critic/ConditionalAdversarial/game"]) == 2


def test_a_lazy_penalty_is_logged_whenever_the_log_comes_next(sd_folder: Path, sd_pairs: Path, tmp_path: Path) -> None:
    """Paid after steps 0, 2 and 4, logged after steps 2, 4 and 6, which are others."""
    penalty = {"class_path": "ExactR1", "init_args": {"every": 2}}
    terms = [{"class_path": "PerceptualRegression", "init_args": {"distance": "mse"}},
             {"class_path": "ConditionalAdversarial", "init_args": {"r1": penalty}}]  # fmt: skip
    options = {"model__strategies": json.dumps(terms), "trainer__max_steps": 6, "trainer__log_every_n_steps": 2}
    main(fit_arguments("diffusion2gan_sd15.yaml", sd_folder, sd_pairs, tmp_path, **options))
    assert len(set(logged(tmp_path)["critic/ConditionalAdversarial/r1"])) == 3


def test_tiny_add_runs_two_steps_as_it_is(tmp_path: Path) -> None:
    """On the shipped pipeline and vision network; its pictures are drawn and encoded on the fly."""
    main(fit_arguments("tiny_add.yaml", Path("tiny-sd"), None, tmp_path, data__workers=None, model__teacher_dtype=None))
    scalars = logged(tmp_path)
    for name in ("student/PixelAdversarial", "student/ScoreDistillation", "critic/PixelAdversarial/r1"):
        assert len(scalars[name]) == 2 and all(0 < abs(value) < 1e4 for value in scalars[name]), name


def test_the_long_recipe_of_add_runs_two_steps_as_it_is(tmp_path: Path) -> None:
    """Three terms share the student's one answer, and the critic's weight follows the others'."""
    arguments = {"data__workers": None, "model__teacher_dtype": None}
    main(fit_arguments("tiny_add_long.yaml", Path("tiny-sd"), None, tmp_path, **arguments))
    scalars = logged(tmp_path)
    for name in ("student/PixelAdversarial", "student/ScoreDistillation", "student/ConsistencyDistillation",
                 "critic/PixelAdversarial/r1", "weight/PixelAdversarial"):  # fmt: skip
        assert len(scalars[name]) == 2 and all(0 < abs(value) < 1e4 for value in scalars[name]), name
    assert {"1", "2", "4"} <= {*load_student(tmp_path / "checkpoints" / "last.ckpt").calls}


def test_the_long_recipe_of_consistency_runs_two_steps_as_it_is(tmp_path: Path) -> None:
    """Asked at its 12 levels, painted at 1, 2 and 4 of them."""
    kept = {"data__workers": None, "model__teacher_dtype": None, "trainer__precision": None}
    main(fit_arguments("tiny_consistency_long.yaml", Path("tiny-sd3"), None, tmp_path, **kept))
    values = logged(tmp_path)["student/ConsistencyDistillation"]
    assert len(values) == 2 and all(0 < value < 1e4 for value in values)
    assert {"1", "2", "4"} <= {*load_student(tmp_path / "checkpoints" / "last.ckpt").calls}


def test_the_long_recipe_of_ladd_runs_two_steps_as_it_is(tmp_path: Path) -> None:
    """On few latents of the shipped teacher, in its own precision; the critic pulls half as hard as the other term."""
    made = {"data__generation__count": 32, "data__generation__steps": 2, "data__folder": tmp_path / "latents"}
    kept = {"data__workers": None, "model__teacher_dtype": None, "trainer__precision": None}
    main(fit_arguments("tiny_ladd_long.yaml", Path("tiny-sd3"), None, tmp_path / "run", **made, **kept))
    scalars = logged(tmp_path / "run")
    for name in ("student/LatentAdversarial", "student/ConsistencyDistillation", "critic/LatentAdversarial/game",
                 "critic/LatentAdversarial/r1"):  # fmt: skip
        assert len(scalars[name]) == 2 and all(0 < abs(value) < 1e4 for value in scalars[name]), name
    lengths = [scalars[f"gradient_at_sample/{term}"] for term in ("LatentAdversarial", "ConsistencyDistillation")]
    assert lengths[0][0] == pytest.approx(0.5 * lengths[1][0], rel=1e-2)
    saved = checkpoint(tmp_path / "run")
    assert {name.split(".")[0] for name in saved["state_dict"]} >= {"student", "ema", "target"}
    assert {"1", "2", "4"} <= {*load_student(tmp_path / "run" / "checkpoints" / "last.ckpt").calls}


def _assert_next_run_begins_with(last: Path, teacher: Path, schedule: dict) -> None:
    """`student_init` takes the student of an earlier run, of the same schedule only."""
    settings = {"strategies": [ScoreDistillation()], "inputs": NoisedData(Discrete([1.0])), "student_init": str(last)}
    module = DistillModule(str(teacher), schedule=schedule, **settings)
    module.configure_model()
    earlier = load_student(last).denoiser.state_dict()
    for network in (module.student, module.ema):
        assert all(torch.equal(tensor, earlier[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ConfigError, match="was trained with the schedule {'rescale_betas_zero_snr': True"):
        DistillModule(str(teacher), **settings).configure_model()


def test_student_of_a_schedule_that_ends_at_pure_noise_is_exported_as_trained(sd_folder: Path, tmp_path: Path) -> None:
    """The checkpoint remembers the schedule; the exported scheduler has it, and samples as the student does."""
    from distill.inference import open_painter, open_student_painter

    schedule = '{"rescale_betas_zero_snr": true, "prediction_type": "v_prediction"}'
    options = {"model__schedule": schedule, "data__workers": None, "model__teacher_dtype": None}
    main(fit_arguments("tiny_add.yaml", sd_folder, None, tmp_path / "run", **options))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    main(["export", "--checkpoint", str(last), "--output", str(tmp_path / "student")])
    exported = open_painter(str(tmp_path / "student"), 4, device="cpu")
    config = exported.pipeline.scheduler.config
    assert (config.rescale_betas_zero_snr, config.prediction_type) == (True, "v_prediction")
    prompts = ["a red ring", "a blue square"]
    torch.testing.assert_close(exported(prompts), open_student_painter(str(last), 4, device="cpu")(prompts))
    _assert_next_run_begins_with(last, sd_folder, json.loads(schedule))
    options["model__schedule"] = '{"rescale_betas_zero_snr": true}'
    with pytest.raises(SystemExit) as ended:
        main(fit_arguments("tiny_add.yaml", sd_folder, None, tmp_path / "refused", **options))
    assert ended.value.code == 2 and not (tmp_path / "refused").exists()
