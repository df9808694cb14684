"""A student leaves as a pipeline stock diffusers loads and calls, and paints what `distill sample` paints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill import backbones
from distill.cli import main
from distill.errors import ConfigError
from distill.export import export, load_student
from tests.runs import checkpoint, fit_arguments

STOCK = """
import json, sys, torch
from diffusers import DiffusionPipeline
folder, steps, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, **ABSENT)
call = json.load(open(folder + "/distill.json"))["calls"][steps]
images = []
for index, prompt in enumerate(["a red ring", "a blue square"]):
    torch.manual_seed(5 + index)
    images.append(pipe(prompt, output_type="pt", **call).images)
torch.save(torch.cat(images), out)
assert "distill" not in sys.modules
print([round(float(s), 4) for s in pipe.scheduler.LEVELS])
"""
SD3 = STOCK.replace("ABSENT", '{"text_encoder_3": None, "tokenizer_3": None}').replace("LEVELS", "sigmas")
SD = STOCK.replace("ABSENT", '{"safety_checker": None}').replace("LEVELS", "timesteps")


@pytest.fixture(scope="module")
def run(sd3_folder: Path, sd3_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, folder, trainer__max_steps=3))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


@pytest.fixture(scope="module")
def add_run(sd_folder: Path, pictures: Path, vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("add_run")
    critic = {"class_path": "PixelAdversarial", "init_args": {"vision": str(vit_folder), "image": None}}
    terms = {"model__strategies": json.dumps([critic, {"class_path": "ScoreDistillation"}])}
    sizes = {"data__source": pictures, "data__height": 32, "data__width": 32}
    main(fit_arguments("add_sd21.yaml", sd_folder, None, folder, trainer__max_steps=3, **terms, **sizes))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


@pytest.fixture(scope="module")
def diffusion2gan_run(sd_folder: Path, sd_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion2gan_run")
    regression = {"class_path": "PerceptualRegression", "init_args": {"distance": "pseudo_huber"}}
    terms = {"model__strategies": json.dumps([regression, {"class_path": "ConditionalAdversarial"}])}
    main(fit_arguments("diffusion2gan_sd15.yaml", sd_folder, sd_pairs, folder, trainer__max_steps=3, **terms))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


@pytest.fixture(scope="module")
def consistency_run(sd_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consistency_run")
    sizes = {"data__source": pictures, "data__height": 32, "data__width": 32}
    main(fit_arguments("consistency_sd15.yaml", sd_folder, None, folder, trainer__max_steps=3, **sizes))
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(folder / "student")])
    return folder


@pytest.mark.parametrize(
    ("method", "script", "steps", "levels"),
    [
        ("run", SD3, 1, [1.0, 0.0]),
        ("run", SD3, 4, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("add_run", SD, 1, [999]),
        ("add_run", SD, 4, [999, 749, 499, 249]),
        ("diffusion2gan_run", SD, 1, [999]),
        ("consistency_run", SD, 4, [999, 759, 499, 259]),
    ],
)
def test_stock_diffusers_paints_what_sample_paints(
    method: str, script: str, steps: int, levels: list[float], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from distill.inference import open_painter

    student = str(request.getfixturevalue(method) / "student")
    file, answer = tmp_path / "stock.py", tmp_path / "images.pt"
    file.write_text(script)
    stock = subprocess.run(
        [sys.executable, str(file), student, str(steps), str(answer)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert stock.returncode == 0, stock.stderr[-2000:]
    assert json.loads(stock.stdout.splitlines()[-1]) == levels, "the sampler visits exactly the trained levels"
    ours = open_painter(student, steps, device="cpu")(["a red ring", "a blue square"], seed=5)
    assert (torch.load(answer) - ours).abs().max() <= 1e-3


def test_exported_one_step_student_answers_its_noise_in_one_call(diffusion2gan_run: Path) -> None:
    """Stock diffusers' one step on a noise is the student's own answer; and it knows no other number of steps."""
    from distill.inference import open_painter

    student = load_student(diffusion2gan_run / "checkpoints" / "last.ckpt")
    folder = diffusion2gan_run / "student"
    painter = open_painter(str(folder), 1, device="cpu")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red ring", "a blue square"]
    found = painter.pipeline(prompts, latents=noise.clone(), output_type="latent", **painter.call).images
    cond = student.backbone.text_encoder()(prompts)
    with torch.no_grad():
        answer = student.denoiser(noise, torch.ones(2), cond)
    assert (found - answer).abs().max() <= 1e-3 * answer.abs().max()
    with pytest.raises(ConfigError, match="samples in 1 steps, not in 4"):
        open_painter(str(folder), 4, device="cpu")


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


def test_student_is_called_at_the_size_it_was_trained_at(run: Path) -> None:
    calls = json.loads((run / "student" / "distill.json").read_text())["calls"]
    assert {(call["height"], call["width"]) for call in calls.values()} == {(32, 32)}


def test_a_sharded_checkpoint_that_lost_its_shards_is_told_so(tmp_path: Path) -> None:
    torch.save({"distill": {}}, tmp_path / "meta.pt")
    with pytest.raises(ConfigError, match="is no checkpoint, or a damaged one; give one that `distill fit` wrote"):
        load_student(tmp_path)
