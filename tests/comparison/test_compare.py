"""Entries trained, painted and measured once; a report that says what was measured."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli import main
from distill.collaboration.calibration import Calibration, prompts_hash
from distill.comparison.claims import Claim, Source, check, judge
from distill.comparison.compare import _cost, _measured, _open, _trained, compare
from distill.comparison.measures import Diversity, Drawn, LikeTeacher, Measure
from distill.comparison.report import _claims, markdown, summary
from distill.comparison.rows import Adaptive, Comparison, Entry, Row, rows_of
from distill.data import shapes
from distill.errors import ConfigError
from distill.files import Lock, save_json
from distill.identity import sources, weights
from distill.inference import open_painter
from tests.runs import ROOT, fit_arguments

FEW = [{"class_path": "Drawn", "init_args": {"count": 100}}]  # held-out images, of which 10,000 take a while to draw


def comparison(tmp_path: Path, **settings) -> Comparison:
    recipe = str(ROOT / "recipes" / "tiny_ladd.yaml")
    entries = [Entry("teacher", pipeline="tiny-sd3", steps=[1, 4]), Entry("ours", recipe=recipe, steps=[1])]
    return Comparison(
        entries, str(tmp_path / "report"), runs=str(tmp_path), **{"samples": 100, "seeds": [0, 1], **settings}
    )


def test_rows_are_an_entry_at_each_number_of_steps_and_each_training_seed(tmp_path: Path) -> None:
    rows = [(row.entry.name, row.steps, row.seed) for row in rows_of(comparison(tmp_path))]
    assert rows == [("teacher", 1, None), ("teacher", 4, None), ("ours", 1, 0), ("ours", 1, 1)]


def test_rows_measured_elsewhere_are_taken_from_the_file_of_results(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    listed = comparison(tmp_path, results=str(results))
    files = [row.file(listed) for row in rows_of(listed)]
    rows = [{"name": "old", "images": f"elsewhere/{file.stem}", "fid_shapes": n} for n, file in enumerate(files)]
    save_json({"values": {"rows": rows}}, results)
    found = compare(listed)
    assert [row["fid_shapes"] for row in found] == [0, 1, 2, 3], "nothing was trained or measured"
    assert [row["name"] for row in found] == ["teacher", "teacher", "ours", "ours"]
    save_json({"fid_shapes": 7, "images": "kept"}, files[0])
    assert compare(listed)[0]["fid_shapes"] == 7, "what was measured here stays"
    assert not files[1].exists(), "another file of results measures it here"
    save_json({"values": 1}, results)
    with pytest.raises(ConfigError, match=r"results.json' holds no rows of a comparison; give another file of results"):
        compare(listed)


def test_a_file_of_results_loses_no_row_and_keeps_where_it_is_from(tmp_path: Path, monkeypatch, capsys) -> None:
    """Rows the list does not name stay; a look at finished rows is no new measurement."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results.json"
    entries = [Entry("teacher", pipeline="tiny-sd3", steps=[1])]
    (row,) = rows_of(listed := Comparison(entries, "report", samples=100))
    known = {"steps": 1, "fid_shapes": 3.0, "samples": 100, "seed": 0, "reference": "drawn images"}
    rows = [known | {"name": "teacher", "images": row.file(listed).stem}, known | {"name": "other", "images": "other"}]
    save_json({"values": {"rows": rows}}, results)
    main(["compare", "--entries", '[{"name": "teacher", "pipeline": "tiny-sd3", "steps": [1]}]', "--output", "report",
          "--samples", "100", "--results", str(results)])  # fmt: skip
    assert "1 of 1 rows are taken from" in capsys.readouterr().err
    kept = json.loads(results.read_text())
    assert [row["name"] for row in kept["values"]["rows"]] == ["teacher"]
    assert [row["name"] for row in kept["values"]["unlisted"]] == ["other"]
    save_json(kept | {"machine": "another"}, results)
    main(["compare", "--entries", '[{"name": "teacher", "pipeline": "tiny-sd3", "steps": [1]}]', "--output", "report",
          "--samples", "100", "--results", str(results)])  # fmt: skip
    assert json.loads(results.read_text()) == kept | {"machine": "another"}
    about = {"claim": "a", "source": "ours", "metric": "fid_shapes", "order": "x < y"}
    save_json({"one": 1.0}, tmp_path / "own.json")
    values = {name: {"file": "own.json", "value": "one"} for name in "xy"}
    claims = json.dumps([about | {"values": values}])
    main(["compare", "--entries", "[]", "--output", "report", "--claims", claims, "--results", str(results)])
    assert len(json.loads(results.read_text())["values"]["unlisted"]) == 2, "claims alone take no row away either"


def test_other_weights_under_a_name_are_another_row(tmp_path: Path) -> None:
    assert set(weights({"a": [{"vision": "tiny-vit"}, 3, None], "b": "tiny-latent-lpips", "c": "adam"})) == {
        "tiny-vit",
        "tiny-latent-lpips",
    }
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "weights").write_text("one")
    files = []
    for text in ("one", "other", "other"):
        if (folder / "weights").read_text() != text:
            (folder / "weights").write_text(text)
        listed = Comparison([Entry("a", pipeline=str(folder), steps=[1])], "report", runs=str(tmp_path))
        files += [row.file(listed) for row in rows_of(listed)]
    assert files[0] != files[1] == files[2]


@pytest.mark.parametrize("place", ["recipe", "options", "overlay"])
def test_other_code_of_ones_own_is_another_training(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a new idea is compared by again and again; classes that are installed are not looked at."""
    monkeypatch.syspath_prepend(tmp_path)
    recipe, overlay, code = (tmp_path / name for name in ("recipe.yaml", "mine.yaml", "own_idea.py"))
    terms = {"model": {"strategies": [{"class_path": "own_idea.Idea"}], "optimizer": "torch.optim.AdamW"}}
    save_json(terms if place == "recipe" else {}, recipe)
    save_json(terms if place == "overlay" else {"model": {"teacher": "tiny-sd"}}, overlay)
    options = {"options": terms, "overlay": {"config": str(overlay)}, "recipe": {}}[place]
    runs = []
    for text in ("one", "other", "other"):
        code.write_text(text)
        listed = Comparison([Entry("a", recipe=str(recipe), options=options, steps=[1])], "report", runs=str(tmp_path))
        runs += [row.run(listed) for row in rows_of(listed)]
    assert runs[0] != runs[1] == runs[2]
    assert set(sources(terms)) == {"own_idea"}
    assert not sources({"class_path": "torch.optim.AdamW", "of": "distill.strategies.Strategy", "at": "no.module.X"})


def test_another_overlay_is_another_training(tmp_path: Path) -> None:
    recipe, overlay, runs = tmp_path / "recipe.yaml", tmp_path / "mine.yaml", []
    save_json({}, recipe)
    for weight in (0.5, 50.0, 50.0):
        save_json({"weight": weight}, overlay)
        entry = Entry("a", recipe=str(recipe), options={"config": str(overlay)}, steps=[1])
        listed = Comparison([entry], "report", runs=str(tmp_path))
        runs += [row.run(listed) for row in rows_of(listed)]
    assert runs[0] != runs[1] == runs[2]


def test_what_a_class_of_ones_own_is_given_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the options come as text."""
    monkeypatch.syspath_prepend(tmp_path)
    recipe, code, network, runs = tmp_path / "recipe.yaml", tmp_path / "own_term.py", tmp_path / "net.pt", []
    save_json({}, recipe)
    options = {"model.strategies": json.dumps([{"class_path": "own_term.Term", "init_args": {"net": str(network)}}])}
    for text, weights_ in (("one", "1"), ("other", "1"), ("other", "22"), ("other", "22")):
        for file, content in ((code, text), (network, weights_)):
            if not file.exists() or file.read_text() != content:
                file.write_text(content)
        listed = Comparison([Entry("a", recipe=str(recipe), options=options, steps=[1])], "report", runs=str(tmp_path))
        runs += [row.run(listed) for row in rows_of(listed)]
    assert len(set(runs)) == 3 and runs[2] == runs[3]


def test_a_damaged_checkpoint_stops_no_other(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.ckpt").write_text("half a file")
    entries = [
        {"name": "broken", "checkpoint": str(tmp_path / "broken.ckpt"), "steps": [1, 2]},
        {"name": "fine", "pipeline": str(sd_folder), "steps": [1]},
    ]
    config = {"entries": entries, "output": str(tmp_path / "out"), "runs": str(tmp_path / "runs"), "samples": 100,
              "measures": FEW}  # fmt: skip
    save_json(config, tmp_path / "list.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(tmp_path / "list.yaml")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("the entry 'broken': '") == 1, "one sentence for all its steps"
    assert "| fine | 1 |" in (tmp_path / "out" / "table.md").read_text()


def test_another_teachers_folder_behind_a_checkpoint_is_another_row(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path
) -> None:
    """It holds the autoencoder and the text encoders that the student paints with."""
    teacher = Path(shutil.copytree(sd3_folder, tmp_path / "sd3"))
    main(fit_arguments("ladd_sd3.yaml", teacher, sd3_latents, tmp_path / "run", trainer__max_steps=1))
    entry, files = Entry("a", checkpoint=str(tmp_path / "run" / "checkpoints" / "last.ckpt"), steps=[1]), []
    for _ in range(2):
        listed = Comparison([entry], "report", runs=str(tmp_path))
        files += [row.file(listed) for row in rows_of(listed)]
        (teacher / "vae" / "config.json").write_text((teacher / "vae" / "config.json").read_text() + " ")
    assert files[0] != files[1]


@pytest.mark.parametrize("setting", ["teacher", "student_init"])
@pytest.mark.parametrize("place", ["recipe", "options"])
def test_another_network_in_the_place_of_one_on_disk_is_another_training(
    setting: str, place: str, tmp_path: Path
) -> None:
    network, recipe, runs = tmp_path / "network", tmp_path / "recipe.yaml", []
    written = {"model": {"init_args": {setting: str(network)}}} if place == "recipe" else {}
    options = {} if written else {f"model.{setting}": str(network)}
    save_json(written, recipe)
    for content in ("one", "another"):
        network.write_text(content)
        entry = Entry("a", recipe=str(recipe), options=options, steps=[1])
        listed = Comparison([entry], "report", runs=str(tmp_path / "runs"))
        runs += [row.run(listed) for row in rows_of(listed)]
    assert runs[0] != runs[1]


def test_a_row_that_cannot_be_measured_stops_no_other(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    diverged = shutil.copytree(sd_folder, tmp_path / "diverged")
    (file,) = (diverged / "unet").glob("*.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    names = {"diverged": diverged, "fine": sd_folder}
    entries = [{"name": name, "pipeline": str(folder), "steps": [1]} for name, folder in names.items()]
    config = {"entries": entries, "output": str(tmp_path / "out"), "runs": str(tmp_path / "runs"), "samples": 100,
              "measures": FEW}  # fmt: skip
    save_json(config, tmp_path / "list.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(tmp_path / "list.yaml")])
    sentence = "the entry 'diverged' could not be measured at 1 steps (FloatingPointError: the pipeline paints pictures"
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    (row,) = (tmp_path / "runs" / "rows").glob("*.json")
    assert row.name.startswith(sd_folder.name)
    assert "| fine | 1 |" in (tmp_path / "out" / "table.md").read_text(), "what there is, is reported"


def test_a_finished_list_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = comparison(tmp_path)
    for row in rows_of(listed):
        save_json({"fid_shapes": 1.0}, row.file(listed))
    monkeypatch.setattr(Drawn, "check", lambda *_: pytest.fail("it asks a measure"))
    assert len(compare(listed)) == 4


def test_the_timed_call_is_no_larger_than_others(sd_folder: Path, tmp_path: Path) -> None:
    """Or memory that suffices for all images would not for their time."""
    sizes: list[int] = []
    listed = Comparison([Entry("a", pipeline=str(sd_folder), steps=[1])], "report", 100, batch_size=5)
    painter = open_painter(str(sd_folder), 1, device="cpu")
    painter.encode = lambda prompts: sizes.append(len(prompts)) or {"prompt": prompts}  # type: ignore[func-returns-value]
    _measured(painter, listed, tmp_path / "row")
    assert max(sizes) == 5


def test_a_run_has_a_lock_of_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "ladd.v2.yaml"
    recipe.write_text("a: 1")
    listed = Comparison([Entry("a", recipe=str(recipe), steps=[1, 2])], "report", seeds=[0, 1], runs=str(tmp_path))
    assert len({row.lock(listed) for row in rows_of(listed)}) == 2


def test_a_lock_lives_as_long_as_the_child_it_was_given_to(tmp_path: Path) -> None:
    """As that of a training whose comparison was killed."""
    path = tmp_path / "lock"
    with Lock(path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.descriptor])
    with Lock(path) as again:
        assert not again.mine
    child.communicate(b"\n")
    with Lock(path) as again:
        assert again.mine


def test_another_setting_is_another_row(tmp_path: Path) -> None:
    files = {row.file(comparison(tmp_path)) for row in rows_of(comparison(tmp_path))}
    entries = [Entry("another name", pipeline="tiny-sd3", steps=[1])]
    (renamed,) = rows_of(Comparison(entries, "another report", samples=100, runs=str(tmp_path)))
    assert renamed.file(Comparison(entries, "another report", samples=100, runs=str(tmp_path))) in files
    batches = {row.file(comparison(tmp_path, batch_size=8)) for row in rows_of(comparison(tmp_path, batch_size=8))}
    assert not files & batches, "samplers that draw noise on the way take it per batch"
    more = {row.file(comparison(tmp_path, samples=200)) for row in rows_of(comparison(tmp_path, samples=200))}
    again = {row.file(comparison(tmp_path)) for row in rows_of(comparison(tmp_path))}
    assert len(files) == 4 and not files & more and files == again


def test_an_edited_recipe_is_another_row_and_another_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    files = []
    for text in ("a: 1", "a: 2", "a: 1  # for a reason"):
        recipe.write_text(text)
        listed = Comparison([Entry("ours", recipe=str(recipe), steps=[1])], "report", runs=str(tmp_path))
        (row,) = rows_of(listed)
        files.append((row.file(listed), row.run(listed)))
    assert files[0] == files[2] and files[0][0] != files[1][0] and files[0][1] != files[1][1]


def test_a_second_stage_begins_at_the_first_ones_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1")
    calls = []

    def run(command: list[str], lock: Lock) -> int:
        calls.append(" ".join(command))
        return 0

    monkeypatch.setattr("distill.comparison.compare._run", run)
    first = Entry("first", recipe=str(recipe), options={"b": 1}, steps=[1])
    second = Entry("second", recipe=str(recipe), after="first", steps=[1])
    alone = Entry("alone", recipe=str(recipe), steps=[1])
    listed = Comparison([first, second, alone], "report", runs=str(tmp_path / "runs"))
    for row in rows_of(listed):
        row.run(listed).mkdir(parents=True, exist_ok=True)
    one, two, three = rows_of(listed)
    assert two.run(listed) != three.run(listed) and two.file(listed) != three.file(listed)
    with Lock(two.lock(listed)) as lock:
        _trained(two, listed, lock)
        assert len(calls) == 2, "the first stage is trained for the second"
    for call, row in zip(calls, (one, two), strict=True):  # whatever folders a recipe names
        folder = row.run(listed)
        assert f"--trainer.default_root_dir {folder} " in call and f"--checkpoint.dirpath {folder}/checkpoints" in call
    with Lock(one.lock(listed)) as lock:
        _trained(one, listed, lock)
    assert len(calls) == 2, "and not again"
    assert f"--model.student_init {one.run(listed)}/checkpoints/last.ckpt" in calls[1]
    spent = {"images": 8, "wall_seconds": 2.5, "device_seconds": 2.5, "evaluations": {"student": 8}, "peak_GiB": 1.0}
    for row, share in ((one, 1), (two, 3)):
        evaluations = {"student": 8 * share}
        save_json({**spent, "images": 8 * share, "evaluations": evaluations}, row.run(listed) / "cost.json")
    both = _cost(two, listed)
    assert (both["images"], both["wall_seconds"], both["evaluations"]["student"]) == (32, 5.0, 32)
    assert _cost(one, listed)["images"] == 8
    with pytest.raises(ConfigError, match="'second' is after 'first', and no entry above it has that name"):
        Comparison([second, first], "report")
    with pytest.raises(ConfigError, match="'x' is after 'teacher'; both need a recipe"):
        Comparison([Entry("teacher", pipeline="tiny-sd"), Entry("x", recipe=str(recipe), after="teacher")], "report")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "the entry 'x' names nothing; give a recipe to train, a checkpoint, or a pipeline"),
        ({"pipeline": "a", "checkpoint": "b"}, "names checkpoint and pipeline; give"),
        ({"recipe": "nowhere.yaml"}, "there is no recipe 'nowhere.yaml'"),
        ({"pipeline": "a", "steps": []}, "needs different numbers of steps"),
        ({"pipeline": "a", "steps": [2, 2]}, "needs different numbers of steps, such as .*; got .2, 2."),
        ({"recipe": str(ROOT / "recipes/tiny_ladd.yaml"), "guidance": 7.0}, "gives guidance or solver, which are of a"),
        ({"pipeline": "a", "options": {"x": 1}}, "has options, which are of a recipe, and it has none"),
        (
            {"recipe": str(ROOT / "recipes/tiny_ladd.yaml"), "options": {"seed_everything": 5}},
            "gives seed_everything, which the comparison sets itself",
        ),
    ],
)
def test_bad_entries_get_a_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Entry("x", **settings)


def test_bad_lists_get_a_sentence(tmp_path: Path) -> None:
    entry = Entry("a", pipeline="tiny-sd")
    with pytest.raises(ConfigError, match="entries need names of their own; a is there more than once"):
        Comparison([entry, entry], str(tmp_path))
    with pytest.raises(ConfigError, match="there is nothing to compare"):
        Comparison([], str(tmp_path))
    with pytest.raises(ConfigError, match="needs different seeds of training"):
        Comparison([entry], str(tmp_path), seeds=[])
    (tmp_path / "broken.yaml").write_text("a: [")
    broken = Comparison([Entry("a", recipe=str(tmp_path / "broken.yaml"), steps=[1])], str(tmp_path))
    with pytest.raises(ConfigError, match="the recipe '.*broken.yaml' of the entry 'a' is no YAML"):
        compare(broken)
    with pytest.raises(ConfigError, match="needs different seeds of training, such as .0.; got .1, 1."):
        Comparison([entry], str(tmp_path), seeds=[1, 1])
    with pytest.raises(ConfigError, match="seeds.1=-1: a seed is a whole number"):
        Comparison([entry], str(tmp_path), seeds=[0, -1])
    with pytest.raises(ConfigError, match="batch_size=0 is too few"):
        Comparison([entry], str(tmp_path), batch_size=0)
    with pytest.raises(ConfigError, match="the measure Plain is no dataclass; put @dataclass before its class"):
        Comparison([entry], str(tmp_path), measures=[type("Plain", (Measure,), {"names": ("x",)})()])
    with pytest.raises(ConfigError, match="the measure Like is no dataclass"):
        Comparison([entry], str(tmp_path), measures=[type("Like", (Drawn,), {})()])
    with pytest.raises(ConfigError, match="less than 10 images say nothing; got Drawn's count=3"):
        Drawn(count=3)
    with pytest.raises(ConfigError, match="within is a difference, 0 or more; got -1"):
        Claim("alike", "ours", "a@1 ~ b@1", "alignment", within=-1)
    with pytest.raises(ConfigError, match="less than 100 images say nothing; got samples=10"):
        Comparison([entry], str(tmp_path), samples=10)


def test_summary_spreads_over_training_seeds() -> None:
    metrics = {name: 0.5 for name in ("alignment", "kid", "precision", "recall", "seconds_per_image")}
    rows = [
        {"name": "a", "steps": 1, "fid_shapes": value, "fid_shapes_interval": [0, 9], **metrics} for value in (1.0, 3.0)
    ]
    alone = {"name": "b", "steps": 1, "fid_shapes": 4.0, "fid_shapes_interval": [3.0, 5.0], **metrics}
    columns = ["fid_shapes", *metrics, "to_teacher", "training_minutes"]
    first, second = summary([*rows, alone], columns)
    assert first["seeds"] == 2 and first["fid_shapes"] == (2.0, 1.0, 3.0)
    assert second["seeds"] == 1 and second["fid_shapes"] == (4.0, 3.0, 5.0)
    assert second["training_minutes"] is None, "nobody knows what it cost"
    assert second["to_teacher"] is None, "it has no teacher"
    assert markdown([second], columns).endswith("| 0.5 | - | - |\n")


def test_claims_are_part_of_the_page() -> None:
    claim = Claim("a < b", "a & b", "1 < 2", note="seen")
    page = _claims([judge(claim, [])])
    assert "<td>a &lt; b</td><td>a &amp; b</td><td>1 &lt; 2; seen</td><td>holds</td>" in page
    assert _claims([]) == ""


def test_a_teacher_improves_what_the_budget_allows(tmp_path: Path, sd_folder: Path) -> None:
    """The student is called at its own steps, the budget is spent on average, and the row is not the student's."""
    adaptive = Adaptive(str(sd_folder), teacher_steps=3, count=40)
    student = Entry("student", pipeline=str(sd_folder), steps=[1, 2], guidance=1.0)
    together = replace(student, name="together", adaptive=adaptive, steps=[2])
    listed = Comparison([student, together], "report", samples=100, runs=str(tmp_path), batch_size=20)
    rows = list(rows_of(listed))
    assert len({row.file(listed) for row in rows}) == 3 and rows[2]._training(listed) == rows[0]._training(listed)
    with Lock(tmp_path / "lock") as lock:
        painter, _ = _open(rows[2], listed, lock)
        (alone, _), prompts = _open(rows[0], listed, lock), listed.setting.prompts
    calibration = painter.pipeline.pair.calibration
    assert calibration.steps == 1 and calibration.prompts == 40
    assert calibration.prompts_hash == prompts_hash(shapes.captions(2, range(40))) != prompts_hash(prompts[:40])
    assert painter.call["budget"] == 2 and painter.call["teacher_steps"] == 3
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "calibrations").glob("*.json")}
    budget = replace(together, adaptive=replace(adaptive, teacher_steps=4))
    assert len(made) == 1 and _calibration_of(budget, rows[2], listed) == calibration
    moved = str(shutil.copytree(sd_folder, tmp_path / "moved"))
    assert _calibration_of(replace(together, pipeline=moved), rows[2], listed) == calibration
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "calibrations").glob("*.json")}
    others = [replace(together, solver="EulerDiscreteScheduler"), replace(together, guidance=2.0)]
    for changed in ({"judge": "shapes"}, {"count": 41}, {"student_steps": 2}):
        others.append(replace(together, steps=[3], adaptive=replace(adaptive, **changed)))
    for count, other in enumerate(others, 2):
        _calibration_of(other, rows[2], listed)
        assert len(list((tmp_path / "calibrations").glob("*.json"))) == count, other
    improved, before = painter(prompts, 0, 20), alone(prompts, 0, 20)
    kept = (improved - before).flatten(1).abs().amax(1) < 1e-5
    assert painter.pipeline.steps == [1 if same else 4 for same in kept.tolist()]
    assert 0.4 < float(kept.float().mean()) < 0.9, "2 = 1 + 3 / 3 steps: one of three"


def _calibration_of(entry: Entry, like: Row, listed: Comparison) -> Calibration:
    with Lock(Path(listed.runs) / "lock") as lock:
        return _open(replace(like, entry=entry), listed, lock)[0].pipeline.pair.calibration


def test_a_checkpoint_that_is_not_there_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    entries = [
        Entry("trained", recipe=str(ROOT / "recipes/tiny_consistency.yaml"), steps=[1]),
        Entry("mine", checkpoint=str(tmp_path / "nothing.ckpt"), steps=[1]),
    ]
    with pytest.raises(ConfigError, match="the entry 'mine': there is no checkpoint '.*nothing.ckpt'"):
        compare(Comparison(entries, "report", samples=100, runs=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_claim_about_a_number_that_a_row_lacks_is_undecided() -> None:
    rows = [{"name": name, "steps": 1, "train_seed": None, **more} for name, more in (("a", {"apart": 1.0}), ("b", {}))]
    assert judge(Claim("c", "s", "a@1 < b@1", metric="apart"), rows)["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "mend"}, "improves images by refine or regenerate; got adaptive.mode=mend"),
        ({"mode": "refine"}, "between 0 and 1, and only for mode=refine; got None with mode=refine"),
        ({"judge": "beauty"}, "the judge 'beauty' is unknown"),
    ],
)
def test_bad_improvements_get_a_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Adaptive("tiny-sd", teacher_steps=3, **settings)


def test_budgets_and_prompts_of_improvements_are_checked(tmp_path: Path) -> None:
    adaptive = Adaptive("tiny-sd", teacher_steps=3)
    with pytest.raises(ConfigError, match="'x' spends between 1 and 4 steps, .*; its budgets are \[2, 4\]"):
        Entry("x", pipeline="tiny-sd", steps=[2, 4], adaptive=adaptive)
    entry = Entry("x", pipeline="tiny-sd", steps=[2], adaptive=adaptive)
    with pytest.raises(ConfigError, match="adaptive entries need held_out prompts to set their budget by"):
        Comparison([entry], "report", prompts="ladd-128")
    with pytest.raises(ConfigError, match="the entry 'x' names a teacher; only a pipeline does"):
        Entry("x", checkpoint="x.ckpt", teacher="tiny-sd")


def test_what_an_improvement_names_is_part_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("a red ring\n")
    entry = Entry("x", pipeline="tiny-sd", steps=[2], adaptive=Adaptive("tiny-sd", 3, held_out=f"{tmp_path}/held.txt"))
    files = []
    for text in ("a red ring\n", "a blue ring and more\n"):
        (tmp_path / "held.txt").write_text(text)
        listed = Comparison([entry], "report", runs=str(tmp_path))
        files += [row.file(listed) for row in rows_of(listed)]
    assert len({*files}) == 2


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher and a recipe of two updates; a second call measures nothing again."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    options = {"trainer.max_steps": 2, "data.batch_size": 16, "samples.every": 0, "trainer.accelerator": "cpu"}
    config = {
        "entries": [
            {"name": "teacher", "pipeline": "tiny-sd3", "steps": [1], "guidance": 1.0},
            {"name": "consistency", "recipe": "recipes/tiny_consistency.yaml", "options": options, "steps": [1, 2]},
        ],
        "output": "compared",
        "samples": 100,
        "batch_size": 50,
        "measures": [
            {"class_path": "Drawn"},
            {"class_path": "LikeTeacher", "init_args": {"distances": ["shapes"], "images": 4}},
            {"class_path": "distill.comparison.measures.Diversity", "init_args": {"prompts": 3, "images": 2}},
        ],
    }
    save_json(config, tmp_path / "list.yaml")
    main(["compare", "--config", "list.yaml"])
    said = capsys.readouterr().out
    assert said.count("| consistency |") == 2 and said.count("| teacher |") == 1
    folder = tmp_path / "compared"
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "rows").glob("*.json")}
    assert len(files) == 3
    main(["compare", "--config", "list.yaml"])
    assert capsys.readouterr().out == said
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "rows").glob("*.json")} == files
    kept = json.loads((folder / "results.json").read_text())
    assert {"command", "machine", "date"} < set(kept) and kept["seeds"] == [0]
    results = kept["values"]["rows"]
    training = results[1]["training"]
    assert training["wall_seconds"] > 0 and training["images"] == training["evaluations"]["student"] == 32
    assert results[1]["train_seed"] == 0
    assert [("to_teacher_shapes" in row, "diversity_tiny-lpips" in row) for row in results] == [
        (False, True), (True, True), (True, True)
    ]  # fmt: skip
    assert 0 < results[1]["to_teacher_shapes"] < 1 and "| diversity_tiny-lpips |" in said
    assert [row["steps"] for row in csv.DictReader((folder / "table.csv").open())] == ["1", "1", "2"]
    assert (folder / "quality.png").is_file() and (folder / "grid.png").is_file()
    page = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "it needs nothing else"
    assert page.count("data:image/png;base64,") == 1 + 3 * 16


def test_what_another_process_works_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.comparison.compare.WAIT", 0.05)
    monkeypatch.setattr("distill.comparison.compare._open", lambda *_: pytest.fail("the other process does it"))
    listed = Comparison([Entry("teacher", pipeline="tiny-sd3", steps=[1])], "report", samples=100, runs=str(tmp_path))
    (row,) = rows_of(listed)
    lock = Lock(row.lock(listed))
    answers: list[Any] = []
    with lock:
        waiting = threading.Thread(target=lambda: answers.append(compare(listed)))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive() and not answers
        assert lock.mine
        save_json({"name": "teacher", "steps": 1}, row.file(listed))
    waiting.join(timeout=10)
    assert [found["name"] for found in answers[0]] == ["teacher"]


def test_a_training_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"trainer.max_steps": 2, "data.batch_size": -3, "trainer.accelerator": "cpu"}
    entry = {"name": "broken", "recipe": str(ROOT / "recipes/tiny_consistency.yaml"), "options": options}
    config = {"entries": [entry], "output": str(tmp_path / "out"), "runs": str(tmp_path / "runs"), "samples": 100,
              "measures": FEW}  # fmt: skip
    save_json(config, tmp_path / "list.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(tmp_path / "list.yaml")])
    assert stopped.value.code == 2 and "training the entry 'broken' ended with code" in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "rows").rglob("*.json"))


def test_claims_are_looked_at_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"name": "a", "recipe": str(ROOT / "recipes/tiny_consistency.yaml"), "steps": [1]}
    config = {"entries": [entry], "output": str(tmp_path / "out"), "runs": str(tmp_path / "runs")}
    for order, metric, sentence in (
        ("a@1 < b@1", "alignment", "names b@1; the list has a@1"),
        ("a@1 < 3", "beauty", "asks for 'beauty'; rows have fid_shapes"),
    ):
        claims = [{"claim": "c", "source": "s", "metric": metric, "order": order}]
        save_json({**config, "claims": claims}, tmp_path / "list.yaml")
        with pytest.raises(SystemExit) as stopped:
            main(["compare", "--config", str(tmp_path / "list.yaml")])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    save_json({**config, "missing": "skip"}, tmp_path / "list.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(tmp_path / "list.yaml")])
    assert stopped.value.code == 2 and "no row of the list has been measured yet" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_list_of_the_docs_page_is_one_that_fit_accepts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "comparing.md").read_text()
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    entries = [Entry(**entry) for entry in settings.pop("entries")]
    assert Comparison(entries, **settings)
    changed = [entry for entry in entries if entry.options]
    assert changed
    for entry in changed:
        options = [part for name, value in entry.options.items() for part in (f"--{name}", str(value))]
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", str(entry.recipe), *options, "--print_config"])
        assert not ended.value.code and "strategies:" in capsys.readouterr().out


def entry_of(settings: dict[str, Any]) -> Entry:
    adaptive = settings.pop("adaptive", None)
    return Entry(**settings, adaptive=Adaptive(**adaptive) if adaptive else None)


def test_the_measures_of_the_docs_page_are_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to the command in a list of which nothing is made."""
    page = (ROOT / "docs" / "comparing.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    settings = yaml.safe_load(next(block for block in blocks if "measures:" in block))
    seen: list[Comparison] = []
    monkeypatch.setattr("distill.comparison.compare.compare", lambda comparison: seen.append(comparison) or [])
    settings |= {"entries": [{"name": "a", "pipeline": "tiny-sd"}], "output": str(tmp_path), "prompts": "ladd-128"}
    save_json(settings, tmp_path / "list.yaml")
    with pytest.raises(SystemExit):  # nothing was measured
        main(["compare", "--config", str(tmp_path / "list.yaml")])
    assert [type(measure).__name__ for measure in seen[0].measures] == [
        "RealImages", "Judged", "Judged", "LikeTeacher", "Diversity"
    ]  # fmt: skip
    assert {"fid", "clip_score", "image_reward", "to_teacher_dreamsim", "diversity_dreamsim"} <= {*seen[0].names}


def claim_of(settings: dict[str, Any]) -> Claim:
    values = {name: Source(**value) for name, value in settings.pop("values", {}).items()}
    return Claim(**settings, values=values)


MEASURES: dict[str, Any] = {measure.__name__: measure for measure in (Drawn, LikeTeacher, Diversity)}
LISTS = sorted([*ROOT.glob("benchmarks/*.yaml"), *ROOT.glob("benchmarks/papers/*.yaml")])


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_lists_of_the_benchmarks_are_lists(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they name is there: recipes, entries of claims, values in result files."""
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(file.read_text())
    entries = [entry_of(entry) for entry in settings.pop("entries", [])]
    claims = [claim_of(claim) for claim in settings.pop("claims", [])]
    assert settings.pop("results").startswith("benchmarks/results/") and (entries or claims)
    measures = [MEASURES[one["class_path"]](**one.get("init_args", {})) for one in settings.pop("measures", [])]
    listed = Comparison(entries, **settings, measures=measures or [Drawn()]) if entries else None
    names = [f"{row.entry.name}@{row.steps}" for row in rows_of(listed)] if listed else []
    check(claims, names, listed.names if listed else [])
    for claim in claims:
        judge(claim, [])
