"""A student leaves as a pipeline stock diffusers loads and calls, and paints what `distill sample` paints."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import backbones
from distill.cli import main
from distill.errors import ConfigError
from distill.export import export, load_student, model_card, read_checkpoint
from distill.files import read_json, save_json
from tests.pipelines import random_sd, random_sd3
from tests.runs import checkpoint, fit_arguments, logged, mistake

STOCK = """
import json, sys, torch
from diffusers import DiffusionPipeline
for line in sys.stdin:
    folder, out, absent, levels, counts = json.loads(line)
    pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
    calls = json.load(open(folder + "/distill.json"))["calls"]
    images, visited = [], []
    for steps in counts:
        for index, prompt in enumerate(["a red ring", "a blue square"]):
            torch.manual_seed(5 + index)
            images.append(pipe(prompt, output_type="pt", **calls[str(steps)]).images)
        visited.append([round(float(s), 4) for s in getattr(pipe.scheduler, levels)])
    torch.save(torch.cat(images), out)
    assert "distill" not in sys.modules
    print(json.dumps([type(pipe).__name__, visited]), flush=True)
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[str, list[list[float]], Tensor]]]:
    """A process that has diffusers and not us, and paints what it is asked for: its start takes seconds, once."""
    folder = tmp_path_factory.mktemp("stock")
    file, answer, errors = folder / "stock.py", folder / "images.pt", folder / "errors.txt"
    file.write_text(STOCK)
    with errors.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )

    def paint(student: str, absent: list[str], levels: str, counts: list[int]) -> tuple[str, list[list[float]], Tensor]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([student, str(answer), absent, levels, counts]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, errors.read_text()[-2000:]
        return *json.loads(line), torch.load(answer)

    yield paint
    process.communicate()
    assert process.returncode == 0, errors.read_text()[-2000:]


@pytest.fixture(scope="module")
def run(sd3_folder: Path, sd3_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, folder, trainer__max_steps=3))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


def add(teacher: Path, pictures: Path, vit: Path, folder: Path) -> Path:
    """ADD of a Stable Diffusion as its recipe has it, with a small vision network, and the student's export."""
    critic = {"class_path": "PixelAdversarial", "init_args": {"vision": str(vit), "image": None}}
    terms = {"model__strategies": json.dumps([critic, {"class_path": "ScoreDistillation"}])}
    sizes = {"data__source": pictures, "data__height": 32, "data__width": 32}
    main(fit_arguments("add_sd21.yaml", teacher, None, folder, trainer__max_steps=3, **terms, **sizes))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


@pytest.fixture(scope="module")
def add_run(sd_folder: Path, pictures: Path, vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add(sd_folder, pictures, vit_folder, tmp_path_factory.mktemp("add_run"))


@pytest.fixture(scope="module")
def v_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Stable Diffusion 2.1, which predicts v."""
    return random_sd(tmp_path_factory.mktemp("pipelines") / "sd-v", prediction="v_prediction")


@pytest.fixture(scope="module")
def v_run(v_teacher: Path, pictures: Path, vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add(v_teacher, pictures, vit_folder, tmp_path_factory.mktemp("v_run"))


@pytest.fixture(scope="module")
def diffusion2gan_run(sd_folder: Path, sd_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion2gan_run")
    regression = {"class_path": "PerceptualRegression", "init_args": {"distance": "pseudo_huber"}}
    terms = {"model__strategies": json.dumps([regression, {"class_path": "ConditionalAdversarial"}])}
    main(fit_arguments("diffusion2gan_sd15.yaml", sd_folder, sd_pairs, folder, trainer__max_steps=3, **terms))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


def consistency(recipe: str, teacher: Path, pictures: Path, folder: Path) -> Path:
    sizes = {"data__source": pictures, "data__height": 32, "data__width": 32}
    main(fit_arguments(recipe, teacher, None, folder, trainer__max_steps=3, **sizes))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


@pytest.fixture(scope="module")
def consistency_run(sd_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return consistency("consistency_sd15.yaml", sd_folder, pictures, tmp_path_factory.mktemp("consistency_run"))


@pytest.fixture(scope="module")
def sdxl_run(sdxl_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return consistency("lcm_sdxl.yaml", sdxl_folder, pictures, tmp_path_factory.mktemp("sdxl_run"))


FOUR = [999, 749, 499, 249]


SD = "StableDiffusionPipeline"
STUDENTS: dict[str, tuple[str, list[str], dict[int, list[float]]]] = {  # what a folder is without, levels by steps
    "run": ("StableDiffusion3Pipeline", ["text_encoder_3", "tokenizer_3"], {1: [1, 0], 4: [1, 0.75, 0.5, 0.25, 0]}),
    "add_run": (SD, ["safety_checker"], {1: [999], 4: FOUR}),
    "v_run": (SD, ["safety_checker"], {1: [999], 4: FOUR}),
    "diffusion2gan_run": (SD, ["safety_checker"], {1: [999]}),
    "consistency_run": (SD, ["safety_checker"], {4: [999, 759, 499, 259]}),
    "sdxl_run": ("StableDiffusionXLPipeline", [], {1: [999], 4: [999, 759, 499, 259]}),
}


@pytest.mark.parametrize("method", STUDENTS)
def test_stock_diffusers_paints_what_sample_paints(
    method: str, stock: Callable[..., tuple[str, list[list[float]], Tensor]], request: pytest.FixtureRequest
) -> None:
    from distill.inference import open_painter

    (pipeline, absent, levels), student = STUDENTS[method], str(request.getfixturevalue(method) / "student")
    name, visited, theirs = stock(student, absent, "sigmas" if "3" in pipeline else "timesteps", [*levels])
    assert name == pipeline and visited == [*levels.values()], "the sampler visits exactly the trained levels"
    painters = [open_painter(student, steps, device="cpu") for steps in levels]
    ours = torch.cat([painter(["a red ring", "a blue square"], seed=5) for painter in painters])
    assert (theirs - ours).abs().max() <= 1e-3


@pytest.mark.parametrize("method", ["diffusion2gan_run", "v_run"])
def test_one_step_of_an_exported_student_answers_its_noise_in_one_call(
    method: str, request: pytest.FixtureRequest
) -> None:
    """Stock diffusers' one step on a noise is the student's own answer, whatever its network predicts."""
    from distill.inference import open_painter

    run = request.getfixturevalue(method)
    student = load_student(run / "checkpoints" / "last.ckpt")
    painter = open_painter(str(run / "student"), 1, device="cpu")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red ring", "a blue square"]
    found = painter.pipeline(prompts, latents=noise.clone(), output_type="latent", **painter.call).images
    cond = student.backbone.text_encoder()(prompts)
    with torch.no_grad():
        answer = student.denoiser(noise, torch.ones(2), cond)
    assert (found - answer).abs().max() <= 1e-3 * answer.abs().max()


def test_exported_one_step_student_knows_no_other_number_of_steps(diffusion2gan_run: Path) -> None:
    from distill.inference import open_painter

    with pytest.raises(ConfigError, match="samples in 1 steps, not in 4"):
        open_painter(str(diffusion2gan_run / "student"), 4, device="cpu")


def test_student_of_a_teacher_that_predicts_v_predicts_v(v_teacher: Path, v_run: Path) -> None:
    """It learned, and its sampler follows the teacher's schedule."""
    for term in ("student/PixelAdversarial", "student/ScoreDistillation", "critic/PixelAdversarial/game"):
        assert len(logged(v_run)[term]) == 3 and all(0 < abs(value) < 1e4 for value in logged(v_run)[term]), term
    student = load_student(v_run / "checkpoints" / "last.ckpt", raw=True)
    assert student.denoiser.process.prediction == "v_prediction" and student.facts["schedule"] == {}
    start = backbones.load(str(v_teacher)).denoiser().state_dict()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in student.denoiser.state_dict().items())
    files = (folder / "scheduler" / "scheduler_config.json" for folder in (v_run / "student", v_teacher))
    config, taught = (read_json(file) for file in files)
    kept = ("prediction_type", "beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    assert config["_class_name"] == "LCMScheduler" and config["prediction_type"] == "v_prediction"
    assert [config[name] for name in kept] == [taught[name] for name in kept]


def test_exported_weights_are_the_moving_average(run: Path) -> None:
    state = checkpoint(run)["state_dict"]
    exported = backbones.load(str(run / "student")).denoiser().state_dict()
    for name, tensor in exported.items():
        assert torch.equal(tensor, state[f"ema.{name}"])
    assert any(not torch.equal(state[f"ema.{name}"], state[f"student.{name}"]) for name in exported)


def test_model_card_says_what_the_student_is(run: Path) -> None:
    card = (run / "student" / "README.md").read_text()
    for fact in ("LatentAdversarial", "3 updates", "64 latents of sd3@", "[1.0, 0.75, 0.5, 0.25]", "guidance 0"):
        assert fact in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code and "sigmas=[1.0, 0.75, 0.5, 0.25]" in code[1]
    names: dict = {}
    exec(code[1].replace("THIS_FOLDER", str(run / "student")), names)  # the card's own example runs
    assert names["image"].size == (32, 32)


def test_model_card_of_a_half_precision_export_runs(run: Path, tmp_path: Path) -> None:
    """Left to themselves diffusers reads it in float32 and transformers in float16, and neither takes the other's."""
    export(run / "checkpoints" / "last.ckpt", tmp_path / "half", half=True)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "half" / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("THIS_FOLDER", str(tmp_path / "half")), names)
    assert names["pipe"].dtype == torch.float16 and names["image"].size == (32, 32)


def test_an_export_can_be_read_by_whoever_reads_other_files_here(run: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    files = [path for path in (run / "student").rglob("*") if path.is_file()]
    assert files and all(path.stat().st_mode == usual for path in files)


@pytest.fixture(scope="module")
def sdxl_lora_run(sdxl_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora("lcm_sdxl.yaml", sdxl_folder, tmp_path_factory.mktemp("sdxl_lora"), data__source=pictures)


@pytest.fixture(scope="module")
def sd3_lora_run(sd3_folder: Path, sd3_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora("ladd_sd3.yaml", sd3_folder, tmp_path_factory.mktemp("sd3_lora"), data__folder=sd3_latents)


def lora(recipe: str, teacher: Path, folder: Path, **options: Any) -> Path:
    """A run of adapters that move far, and its student exported whole and as adapters."""
    if recipe == "lcm_sdxl.yaml":
        options |= {"data__height": 32, "data__width": 32}
    options |= {
        "model__lora__rank": 4,
        "model__lora__alpha": 8,
        "model__student_optimizer__lr": 0.05,
        "model__ema": 0.1,
    }
    main(fit_arguments(recipe, teacher, None, folder, trainer__max_steps=3, **options))
    export_it = ["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output"]
    main([*export_it, str(folder / "student")])
    main([*export_it, str(folder / "adapters"), "--lora", "true"])
    return folder


@pytest.mark.parametrize("method", ["sdxl_lora_run", "sd3_lora_run"])
def test_stock_diffusers_paints_with_adapters_alone_what_it_paints_with_the_whole_student(
    method: str, request: pytest.FixtureRequest
) -> None:
    """By the code of both model cards; other than the teacher does."""
    run, painted = request.getfixturevalue(method), []
    for name in ("adapters", "student", "adapters"):
        card = (run / name / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        assert code is not None and "adapters (LoRA) of rank 4" in card
        source = (
            code[1].replace("THIS_FOLDER", str(run / name)).replace('"YOUR PROMPT",', '"a ring", output_type="pt",')
        )
        if len(painted) == 2:
            source = re.sub(r"\npipe.load_lora_weights.*", "", source)  # the teacher, sampled so
        names: dict[str, Any] = {}
        exec(source, names)
        painted.append(names["image"])
    adapters, whole, teacher = painted
    assert (adapters - whole).abs().max() <= 1e-3 < (teacher - whole).abs().max() / 10
    assert (run / "adapters" / "pytorch_lora_weights.safetensors").is_file()
    assert not list((run / "adapters").rglob("*diffusion_pytorch_model*"))


def test_card_of_adapters_names_the_teacher_where_it_is(
    sd3_folder: Path, sd3_lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as a whole path, wherever it has moved to; the hub's field for it is for what is on the hub."""
    copytree(sd3_folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for teacher in ("moved", str(tmp_path / "moved")):
        export(sd3_lora_run / "checkpoints" / "last.ckpt", "out", teacher=teacher, lora=True)
        card = (tmp_path / "out" / "README.md").read_text()
        assert f'from_pretrained("{tmp_path / "moved"}"' in card and "tags:\n- lora\n---" in card
        assert f'from_pretrained("{sd3_folder}"' not in card and "base_model" not in card
    student = load_student(sd3_lora_run / "checkpoints" / "last.ckpt", merged=False)
    student.backbone.path = "org/model"
    card = model_card(student, student.backbone.student_pipeline(student.denoiser, **dict.fromkeys(["vae"])))
    assert 'from_pretrained("org/model"' in card and "base_model: org/model\n---" in card


def test_adapters_are_for_a_copy_of_their_teacher_too(sd3_folder: Path, sd3_lora_run: Path, tmp_path: Path) -> None:
    """Of half the size, say; the card then says how that is loaded."""
    backbones.load(str(sd3_folder)).pipeline().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    last = sd3_lora_run / "checkpoints" / "last.ckpt"
    with pytest.warns(
        UserWarning, match="a copy with other files or another pipeline: of it is all of the student but"
    ):
        export(last, tmp_path / "out", teacher=str(tmp_path / "half"), lora=True)
    assert 'tokenizer_3=None, variant="fp16")' in (tmp_path / "out" / "README.md").read_text()


def test_adapters_are_written_of_a_run_that_has_them(
    run: Path, sd3_lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--checkpoint", str(run / "checkpoints" / "last.ckpt"), "--output", str(tmp_path / "out")]
    assert "is of a run without adapters (model.lora)" in mistake(capsys, [*arguments, "--lora", "true"])
    assert not (tmp_path / "out").exists()
    arguments[2], arguments[4] = (str(sd3_lora_run / part) for part in ("checkpoints/last.ckpt", "adapters"))
    main(arguments)  # an earlier export, of either kind, may be replaced
    assert (sd3_lora_run / "adapters" / "model_index.json").is_file()
    main([*arguments, "--lora", "true"])
    assert not (sd3_lora_run / "adapters" / "model_index.json").exists()


def test_model_card_begins_with_four_steps_of_many(sd_folder: Path) -> None:
    """A student of many levels samples in many numbers of steps, in the order of numbers and not of letters."""
    backbone = backbones.load(str(sd_folder))
    denoiser = backbone.denoiser()
    calls = {str(count): {"num_inference_steps": count} for count in (1, 2, 4, 8, 16, 50)}
    facts = {"teacher": "a", "strategies": ["b"], "steps": 1, "data": "c", "levels": []}
    for given, first in ((calls, 4), ({"1": calls["1"]}, 1)):
        student = SimpleNamespace(facts=facts, calls=given, backbone=backbone, denoiser=denoiser)
        assert f'"YOUR PROMPT",\n    num_inference_steps={first},' in model_card(student, backbone.pipeline())


def test_model_card_holds_the_metrics_it_is_given(run: Path, tmp_path: Path) -> None:
    """Those of a file that `distill evaluate --output` wrote; a card without one says nothing of metrics."""
    values = {"fid_shapes": 17.125, "alignment": 0.90625, "samples": 5000, "seed": 3, "reference": "10000 drawn images"}
    save_json(values, tmp_path / "values.json")
    last, output = str(run / "checkpoints" / "last.ckpt"), tmp_path / "student"
    main(["export", "--checkpoint", last, "--output", str(output), "--metrics", str(tmp_path / "values.json")])
    card = (output / "README.md").read_text()
    (told,) = re.findall(r"## Metrics\n\n```json\n(.*?)```", card, re.DOTALL)
    assert json.loads(told) == values
    assert card.startswith((run / "student" / "README.md").read_text()), "the rest is the same"
    assert "Metrics" not in (run / "student" / "README.md").read_text()


def test_only_safetensors_are_written(run: Path) -> None:
    kinds = {file.suffix for file in (run / "student").rglob("*") if file.is_file()}
    assert ".safetensors" in kinds and not kinds & {".bin", ".pt", ".ckpt", ".pth"}


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_refused(run: Path, change: str, tmp_path: Path) -> None:
    state = checkpoint(run)
    name = next(name for name in state["state_dict"] if name.startswith("ema."))
    tensor = state["state_dict"][name]
    if change == "missing":
        del state["state_dict"][name]
    else:
        state["state_dict"]["ema.network.extra"] = tensor
    torch.save(state, tmp_path / "changed.ckpt")
    with pytest.raises(ConfigError, match="does not fit the teacher"):
        load_student(tmp_path / "changed.ckpt")


def test_only_pipelines_are_replaced(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for output in (run, tmp_path / "thesis"):
        with pytest.raises(ConfigError, match="would be lost"):
            export(last, output)
    assert last.is_file() and (tmp_path / "thesis" / "chapter.txt").is_file()
    export(last, run / "student")  # an earlier export may be


def test_what_lies_beside_an_export_is_not_lost(run: Path, tmp_path: Path) -> None:
    last, student = run / "checkpoints" / "last.ckpt", tmp_path / "student"
    export(last, student)
    (student / ".git").mkdir()
    with pytest.raises(ConfigError, match="holds something, such as .git, that no export wrote"):
        export(last, student)
    assert (student / ".git").is_dir()


def test_a_teacher_whose_scheduler_says_another_thing_is_refused(sd_folder: Path, v_teacher: Path, v_run: Path) -> None:
    """The same weights would answer another question."""
    with pytest.raises(ConfigError, match=r"was trained as v_prediction \(.* says epsilon \(alpha"):
        load_student(v_run / "checkpoints" / "last.ckpt", str(sd_folder))


def test_another_teacher_of_the_same_kind_is_told_of(run: Path, tmp_path: Path) -> None:
    random_sd3(tmp_path / "sd3", seed=5)
    with pytest.warns(UserWarning, match="was trained from sd3@.* is sd3@.*: of it are the student's autoencoder"):
        load_student(run / "checkpoints" / "last.ckpt", str(tmp_path / "sd3"))


def test_a_teacher_is_never_replaced(run: Path, tmp_path: Path) -> None:
    """Neither as it came nor with the file that says how it is called."""
    last = run / "checkpoints" / "last.ckpt"
    teacher = Path(read_checkpoint(last)[0]["teacher"])
    mine = tmp_path / "mine"
    copytree(teacher, mine)
    for call in (None, "{}"):
        (mine / "distill.json").write_text(call) if call else (mine / "distill.json").unlink(missing_ok=True)
        before = backbones.load(str(mine)).fingerprint
        with pytest.raises(ConfigError, match="would be lost; give a new folder"):
            export(last, mine, teacher=str(mine))
        assert backbones.load(str(mine)).fingerprint == before


def test_an_index_of_shards_runs_no_code(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harmed",)

    torch.save({"distill": {}}, tmp_path / "meta.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ConfigError, match="is no checkpoint, or a damaged one"):
        load_student(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_student_is_called_at_the_size_it_was_trained_at(run: Path) -> None:
    calls = json.loads((run / "student" / "distill.json").read_text())["calls"]
    assert {(call["height"], call["width"]) for call in calls.values()} == {(32, 32)}


def test_a_sharded_checkpoint_that_lost_its_shards_is_told_so(tmp_path: Path) -> None:
    torch.save({"distill": {}}, tmp_path / "meta.pt")
    with pytest.raises(ConfigError, match="is no checkpoint, or a damaged one; give one that `distill fit` wrote"):
        load_student(tmp_path)
