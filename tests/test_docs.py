"""Every command in README and docs runs, in the order they stand there; sizes shrunk from the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from distill.cli import main
from distill.export import load_student
from tests.runs import ROOT

SHRUNK = {
    "fit": "--trainer.max_steps 2 --data.batch_size 16 --data.generation.count 32 --data.generation.steps 2 "
    "--data.generation.shard_size 32 --samples.every 1 --checkpoint.every_n_train_steps 1 --trainer.accelerator cpu",
    "validate": "--data.reference 64 --data.batch_size 32 --data.generation.count 32 --trainer.accelerator cpu",
    "generate": "--count 32 --steps 2 --shard_size 32 --accelerator cpu",
    "evaluate": "--samples 64 --batch_size 32 --device cpu",
    "sample": "--device cpu",
    "calibrate": "--count 20 --device cpu",
    "collaborate": "--device cpu",
    "compare": "--samples 100 --seeds [0] --entries '[{name: teacher, pipeline: tiny-sd, steps: [1]}]'",
    "analyse": "--count 16 --teacher_steps 3 --device cpu",
    "export": "",
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("distill ")]


def test_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("recipes", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    found = commands(ROOT / "README.md")
    assert {command.split()[1] for command in found} == set(SHRUNK)
    for command in found:
        arguments = shlex.split(command)[1:]
        main([*arguments, *shlex.split(SHRUNK[arguments[0]])])
    assert (tmp_path / "runs/student/model_index.json").is_file()
    assert (tmp_path / "runs/samples/grid.png").is_file()
    assert (tmp_path / "runs/tiny_ladd/samples/step-000002.png").is_file()
    assert list((tmp_path / "runs/tiny_ladd/tensorboard").glob("events.*"))


def test_commands_of_the_page_on_diffusion2gan_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage begins at the first one's checkpoint; neither makes pairs anew."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    found = commands(ROOT / "docs" / "diffusion2gan.md")
    assert [command.split()[1] for command in found] == ["generate", "fit", "fit"]
    times = []
    for command in found:
        arguments = shlex.split(command)[1:]
        main([*arguments, *shlex.split(SHRUNK[arguments[0]])])
        (shard,) = (tmp_path / "runs/pairs/tiny-sd-g3").glob("*.arrow")
        times.append(shard.stat().st_mtime_ns)
    assert len(set(times)) == 1
    assert (tmp_path / "runs/tiny_diffusion2gan/checkpoints/last.ckpt").is_file()


def test_commands_of_the_pages_on_consistency_and_collaboration_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collaboration with a student of the consistency page."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for page in ("consistency", "collaboration"):
        for command in commands(ROOT / "docs" / f"{page}.md"):
            arguments = shlex.split(command.replace("runs/tiny_ladd/", "runs/tiny_consistency/"))[1:]
            shrunk = SHRUNK[arguments[0]]
            main([*arguments, *shlex.split(re.sub(r"--data.generation.\S+ \S+ ", "", shrunk))])
    assert load_student("runs/tiny_consistency_sd/checkpoints/last.ckpt").facts["teacher"] == "tiny-sd"
    assert (tmp_path / "runs/collaboration/decisions.csv").is_file()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_files_pages_name_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:recipes|benchmarks|docs|distill)/[\w/.-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


GENERATED = {"tiny_pairs"}  # for `distill generate`; the page on Diffusion2GAN runs it
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.stem not in GENERATED)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_parse(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(recipe), "--print_config"])
    assert ended.value.code == 0
    assert "class_path" in capsys.readouterr().out
