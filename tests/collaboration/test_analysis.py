from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cli import main
from distill.collaboration.analysis import COLUMNS, agreement, analyse, draw, findings, intervals
from distill.collaboration.analysis import _Path as Route
from distill.collaboration.judges import NetworkJudge
from distill.errors import ConfigError
from tests.collaboration.test_pipeline import PROMPTS, Pair, redness


def test_curvature_of_a_straight_path_is_none() -> None:
    start, end = torch.zeros(2, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]], [[[1.0, 1.0]]]])
    straight, bent = Route(), Route()
    for step, share in enumerate((0.0, 0.3, 1.0)):
        straight(step, start + share * (end - start))
    for step, point in enumerate((start, torch.tensor([[[[3.0, 0.0]]], [[[1.0, 0.0]]]]), end)):
        bent(step, point)
    torch.testing.assert_close(straight.curvature(), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(bent.curvature(), torch.tensor([7 / 5 - 1, 2 / 2**0.5 - 1]))


def test_findings_of_rows_made_by_hand() -> None:
    """The farther the student's image, the likelier it wins; the judge agrees with the votes on every image."""
    count = 100
    distance = [index / count for index in range(count)]
    vote = [1.0 if index % 10 < index // 10 else -1.0 for index in range(count)]
    rows = {
        "distance": distance, "vote": vote, "student": vote, "teacher": [0.0] * count, "words": [3.0] * count,
        "curvature": [d**2 for d in distance], "complexity": [1 - d for d in distance],
    }  # fmt: skip
    found = findings(rows)
    assert found["student_wins"] == pytest.approx(0.45)
    wins = found["student_wins_by_distance"]
    assert wins["low"] < wins["medium"] < wins["high"]
    assert found["correlations"]["distance ~ curvature"] == pytest.approx(1.0)
    assert found["correlations"]["distance ~ complexity"] == pytest.approx(-1.0)
    assert found["correlations"]["distance ~ words"] is None
    assert found["correlations"].keys() >= {
        "quality gap ~ words",
        "quality gap ~ curvature",
        "quality gap ~ complexity",
    }
    rows |= {"student": distance, "teacher": [0.0] * count, "words": [1 - d**3 for d in distance]}
    assert findings(rows)["correlations"]["quality gap ~ words"] == pytest.approx(-1.0)
    assert findings(rows)["correlations"]["quality gap ~ curvature"] == pytest.approx(1.0)
    assert found["agreement"]["full_reference"] == 1.0


def test_scores_that_differ_beyond_single_precision_differ() -> None:
    """The shapes judge gives most of a teacher's pictures a score within 1e-8 of 1."""
    count = 100
    rows = {name: [float(index) for index in range(count)] for name in ("distance", "words", "curvature", "complexity")}
    scores = [1 - 1e-9 * (1 + index) for index in range(count)]
    rows |= {
        "student": scores,
        "teacher": [1 - 5.05e-8] * count,
        "vote": [1.0 if index < 50 else -1.0 for index in range(count)],
    }
    assert findings(rows)["agreement"]["full_reference"] == 1.0


def test_intervals_narrow_with_the_number_of_images() -> None:
    """Near the normal approximation of a share's interval."""
    for count in (100, 1600):
        vote = [1.0 if index % 2 else -1.0 for index in range(count)]
        other = [float(index * 7919 % count) for index in range(count)]
        rows = dict.fromkeys(("distance", "student", "teacher", "words", "curvature", "complexity"), other)
        bounds = intervals(rows | {"vote": vote})["student_wins"]
        assert bounds["high"] - bounds["low"] == pytest.approx(2 * 1.96 * 0.5 / count**0.5, rel=0.25)


def test_a_threshold_at_the_right_percentile_agrees_with_the_votes() -> None:
    """Where images that score below the 40th percentile are those the teacher paints better."""
    student = torch.linspace(-1, 1, 101)
    found = {"student": student, "teacher": torch.zeros(101), "vote": student - torch.quantile(student, 0.4) + 1e-4}
    agreed = agreement(found)
    assert agreed["best"] == 40 and agreed["percentile"][40] == pytest.approx(1.0, abs=0.011)
    assert agreed["full_reference"] == pytest.approx(0.9, abs=0.01)


def test_figures_set_everything_against_the_gap() -> None:
    rows = {name: [float(index) for index in range(20)] for name in COLUMNS}
    axes = draw(rows, findings(rows)).axes
    against = {(axis.get_xlabel(), axis.get_ylabel()) for axis in axes}
    gap = "score of student - teacher"
    assert {("tokens of the prompt", gap), ("curvature of teacher's path", gap)} <= against
    assert {("complexity of teacher's image, kB", gap), ("distance", gap)} <= against and len(axes) == 10


def test_images_of_different_sizes_and_scores_that_are_no_number(sd_folder: Path) -> None:
    """The student's are made as large as the teacher's where both are compared; what overflowed scores lowest."""
    pipe = Pair(sd_folder).pipe
    pipe.teacher_call |= {"height": 64, "width": 64}
    seen: list[tuple[str, Any]] = []

    def voting(prompts: list[str], images: Tensor) -> Tensor:
        seen.append(("votes", images.shape[-2:]))
        return redness(prompts, images)

    def judging(prompts: list[str], images: Tensor) -> Tensor:
        seen.append(("judge", images.shape[-2:]))
        return torch.cat([torch.tensor([float("nan")]), redness(prompts, images)[1:]])

    def apart(one: Tensor, other: Tensor) -> Tensor:
        seen.append(("distance", one.shape[-2:]))
        return (one - other).flatten(1).norm(dim=1)

    pipe.judge = NetworkJudge(judging, "redness")
    rows = analyse(pipe, PROMPTS[:4], NetworkJudge(voting, "votes"), apart, 3, batch_size=4)
    assert seen == [("judge", (32, 32)), ("judge", (64, 64)), ("distance", (64, 64)), *[("votes", (64, 64))] * 2]
    assert rows["student"][0] == rows["teacher"][0] == min(rows["student"] + rows["teacher"])
    assert all(value == value for name in COLUMNS for value in rows[name])
    with pytest.raises(ConfigError, match="fewer than teacher_steps=1500"):
        analyse(pipe, PROMPTS[:4], NetworkJudge(voting, "votes"), apart, 1500)


def test_command(sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--student", str(sd_folder), "--teacher", str(sd_folder), "--student_steps", "1", "--output", str(tmp_path)]
    main(["analyse", *pair, "--count", "16", "--teacher_steps", "3", "--batch_size", "8"])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 16 and found["student_wins"] <= 1
    kept = json.loads((tmp_path / "findings.json").read_text())
    bounds = kept["values"].pop("intervals")
    assert kept["values"] == found and kept["seeds"] == [0] and kept["machine"]["cores"]
    assert bounds["student_wins"]["low"] <= found["student_wins"] <= bounds["student_wins"]["high"]
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert len(rows) == 16 and all(float(row["curvature"]) > 0 and float(row["distance"]) > 0 for row in rows)
    assert (tmp_path / "figures.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", *pair, "--count", "16", "--teacher_steps", "1"])
    assert (
        stopped.value.code == 2
        and "needs 3 teacher steps and 10 prompts or more; got 1 and 16" in capsys.readouterr().err
    )
