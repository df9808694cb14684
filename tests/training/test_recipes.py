"""Recipes that are read, printed, saved, and begun from again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli import main
from distill.errors import recipes_of
from distill.training.recipes import linked, numbered_entries, whole_lists
from tests.runs import ROOT, fit_arguments, mistake


def written(path: Path, held: Any) -> str:
    path.write_text(yaml.safe_dump(held))
    return str(path)


def test_the_files_of_a_command_line() -> None:
    assert recipes_of(["fit", "--config=a.yaml", "-c", "b.yaml", "--config", "c.yaml", "--x", "1"]) == [
        "a.yaml",
        "b.yaml",
        "c.yaml",
    ]


def test_values_follow_one_another_again_but_where_they_were_overridden(tmp_path: Path) -> None:
    first = {"seed": 3, "root": "runs/a", "kept": "${root}/kept", "parts": [{"seed": "${seed}"}, {"seed": "${seed}"}]}
    first |= {"steps": 7, "total": "${steps}", "lost": "${steps}", "nowhere": "${none}"}
    files = [written(tmp_path / "a.yaml", first), written(tmp_path / "b.yaml", {"also": "${steps}"}), "no file"]
    final = {"seed": 3, "root": "runs/a", "kept": "runs/a/kept", "parts": [{"seed": 3}, {"seed": 4}]}
    final |= {"steps": 7, "total": 7, "also": 7, "more": 7}
    assert linked(final, files) == final | {
        "kept": "${root}/kept", "parts": [{"seed": "${seed}"}, {"seed": 4}], "total": "${steps}", "also": "${steps}"
    }  # fmt: skip


def test_a_later_file_or_list_cuts_what_followed_another_value(tmp_path: Path) -> None:
    """Also where it happens to be the same value; and nothing is written that would lead in a circle."""
    first = {"every": 50, "begins": "${every}", "list": [{"a": "${every}"}], "whole": "${model}", "model": {"lr": 1}}
    later = {"begins": 50, "list": [{"a": 50}], "whole": {"lr": "${model.lr}"}, "every": "${begins}"}
    files = [written(tmp_path / "a.yaml", first), written(tmp_path / "b.yaml", later)]
    final = {"every": 50, "begins": 50, "list": [{"a": 50}], "whole": {"lr": 1}, "model": {"lr": 1}, "off": False}
    assert linked(final, files) == final | {"whole": {"lr": "${model.lr}"}, "every": "${begins}"}
    circle = [written(tmp_path / "c.yaml", {"x": "${y}"}), written(tmp_path / "d.yaml", {"y": "${x}"})]
    assert linked({"x": 5, "y": 5}, circle) == {"x": 5, "y": 5}
    near = written(tmp_path / "e.yaml", {"m": {"x": 5, "y": "${.x}"}, "zero": "${off}"})
    assert linked({"x": 7, "m": {"x": 5, "y": 7}, "off": False, "zero": 0}, [near])["m"] == {"x": 5, "y": 7}


def test_what_is_printed_is_the_recipe_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "tiny_ladd.yaml")

    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["fit", *arguments, "--print_config"])
        return capsys.readouterr().out

    once = printed("--config", recipe, "--trainer.max_steps", "7")
    (tmp_path / "printed.yaml").write_text(once)
    assert "total_iters: ${trainer.max_steps}" in once and "seed: ${seed_everything}" in once
    assert printed("--config", str(tmp_path / "printed.yaml")) == once
    longer = printed("--config", str(tmp_path / "printed.yaml"), "--trainer.max_steps", "9")
    assert longer == once.replace("max_steps: 7", "max_steps: 9")


def test_a_run_begun_from_a_saved_recipe_leaves_the_run_it_is_of(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path
) -> None:
    """Also if that run was one that went on."""
    own = {"trainer__logger": None, "trainer__logger__save_dir": None, "ckpt_path": "last", "data__batch_size": 4}
    for steps in (1, 2):
        main(fit_arguments("tiny_ladd.yaml", sd3_folder, sd3_latents, tmp_path / "a", trainer__max_steps=steps, **own))
    files = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    saved = tmp_path / "a" / "tensorboard" / "config.yaml"
    main(["fit", "--config", str(saved), "--trainer.default_root_dir", str(tmp_path / "b"), "--trainer.max_steps", "1"])
    assert {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()} == files
    for name in ("checkpoints/last.ckpt", "tensorboard/config.yaml", "cost.json"):
        assert (tmp_path / "b" / name).is_file()
    assert yaml.safe_load(saved.read_text())["ckpt_path"] is None


def test_a_run_that_may_not_go_on_leaves_the_saved_recipe(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"trainer__logger": None, "trainer__logger__save_dir": None, "data__batch_size": 4, "ckpt_path": "last"}
    arguments = fit_arguments("tiny_ladd.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=1, **own)
    main(arguments)
    saved = tmp_path / "tensorboard" / "config.yaml"
    before = saved.read_bytes()
    mistake(capsys, [*arguments, "--model.ema", "null", "--trainer.max_steps", "2"])
    assert saved.read_bytes() == before


def test_an_entry_of_a_list_is_changed_by_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["fit", "--config", str(ROOT / "recipes" / "tiny_add.yaml")]
    changes = ["--model.strategies.0.weight", "0.25", "--trainer.max_steps", "7", "--model.strategies.0.r1", "null"]
    with pytest.raises(SystemExit):
        main([*recipe, *changes, "--print_config"])
    first, second = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["strategies"]
    assert (first["init_args"]["weight"], first["init_args"]["r1"], second["init_args"]["weight"]) == (0.25, None, 2.5)
    assert first["init_args"]["vision"] == "tiny-vit", "the rest is the recipe's"
    error = mistake(capsys, [*recipe, "--model.strategies.2.weight=1"])
    assert "--model.strategies.2.weight: model.strategies has 2 entries in this recipe, counted from 0" in error


def test_init_args_and_the_classes_own_names_are_told_apart() -> None:
    given = ["--model.strategies", '["A", {"class_path": "B", "init_args": {"levels": {"class_path": "L"}}}]']
    changes = ["--model.strategies.0.weight", "2", "--model.strategies.1.levels.m=-2.0"]
    changes += ["--model.strategies.1.class_path=C"]
    *before, option, entries = numbered_entries([*given, *changes])
    assert before == given and option == "--model.strategies"
    assert yaml.safe_load(entries) == [
        {"class_path": "A", "init_args": {"weight": 2}},
        {"class_path": "C", "init_args": {"levels": {"class_path": "L", "init_args": {"m": -2.0}}}},
    ]


def test_a_later_list_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    files = [
        written(tmp_path / f"{name}.yaml", {"model": {"init_args": {"strategies": [name]}}}) for name in ("a", "b")
    ]
    arguments = ["fit", "--config", files[0], "--config", files[1]]
    assert whole_lists(arguments) == ["fit", "--config", files[0], "--model.strategies", "[]", "--config", files[1]]
