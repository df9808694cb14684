"""Every command in README runs, in the order they stand there, sizes shrunk from the command line; those in docs run or
parse; and the pages make a site."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

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
    "compare": "--samples 100 --seeds [0] --entries '[{name: teacher, pipeline: tiny-sd, steps: [1]}]' "
    "--results results.json",
    "analyse": "--count 16 --teacher_steps 3 --device cpu",
    "export": "",
    "vote": "--device cpu",
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


def test_page_about_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are one script; then it goes on where it ended, as the page says."""
    script = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL))
    fewer = {
        "max_steps=200": "max_steps=2",
        "batch_size=64": "batch_size=4",
        "steps=50": "steps=2",
        "samples=256": "samples=4, reference=64",
        "every=100": "every=1",
    }
    for written, shrunk in fewer.items():
        assert written in script
        script = script.replace(written, shrunk)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(script, made)
    assert load_student(made["checkpoint"]).facts["steps"] == 2
    assert (tmp_path / "runs/python/compared.png").is_file()
    assert (tmp_path / "runs/python/samples/step-000002.png").is_file()
    assert "2 updates on drawn shapes, 32 x 32" in (tmp_path / "runs/python/student/README.md").read_text()
    before = script[: script.index("trainer.fit(")].replace("max_steps=2", "max_steps=3")
    exec(before + "trainer.fit(module, datamodule=ShapesData(batch_size=4), ckpt_path=checkpoint)", made)
    assert load_student(made["checkpoint"]).facts["steps"] == 3


PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each bash block of a page: the text before it, and its commands, of which one may span lines."""
    text = page.read_text()
    for block in re.finditer(r"```bash\n(.*?)```", text, re.DOTALL):
        whole = block[1].replace("\\\n", " ")
        lines = [line.split(" #")[0].strip() for line in whole.splitlines()]
        yield text[: block.start()], [line for line in lines if line]


def needs(before: str) -> list[str]:
    """What a block says it needs, in a comment right above it that a sentence above the comment says to the reader."""
    comment = re.search(r"([^\n]+(?:\n[^\n]+)*)\n\n<!-- needs: (.+) -->\n$", before)
    if comment is None:
        return []
    sentence, named = comment[1].replace("\n", " "), comment[2].split(", ")
    assert "needs" in sentence and all(need in sentence for need in named), f"'{sentence}' does not name {named}"
    return named


class Parsed(Exception):
    """Raised in place of running a command whose options were understood."""


def understood(arguments: list[str]) -> bool:
    """Whether `distill` takes the arguments; nothing is run."""
    shown = ["--print_config"] if arguments[0] in ("fit", "validate", "test") else []
    try:
        main([*arguments, *shown])
    except Parsed:
        return True
    except SystemExit as ended:
        return bool(shown) and ended.code == 0
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_commands_in_docs_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of README are run above. Whatever is not `distill`, `make` or a benchmark says what it needs."""

    def stop(*_: object, **__: object) -> None:
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "instantiate_classes", stop)
    monkeypatch.chdir(ROOT)
    run, targets = (
        commands(ROOT / "README.md"),
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE),
    )
    for before, lines in blocks(page):
        needed = needs(before)
        for line in lines:
            words = shlex.split(line)
            if "distill" in words:
                assert words[0] == "distill" or needed, f"{line}: say what it needs"
                assert line in run or understood(words[words.index("distill") + 1 :]), line
            elif words[0] == "make":
                assert words[1] in targets, line
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), line
            else:
                assert needed, f"{line}: say what it needs"


def test_a_command_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert not understood(["evaluate", "--piplein", "tiny-sd3"])
    assert not understood(["fit", "--config", "recipes/tiny_ladd.yaml", "--model.emma", "0.9"])
    with pytest.raises(AssertionError, match="does not name"):
        needs("This needs patience.\n\n<!-- needs: GPUs -->\n")


def test_site_lists_every_page() -> None:
    def listed(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
                yield from listed(part)

    nav = list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)


def test_site_builds_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[-2000:]
    assert "LatentAdversarial" in (tmp_path / "reference" / "strategies.html").read_text()
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r"""<(?:script|img|link)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*""", page.read_text())
        assert not fetched, page


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
