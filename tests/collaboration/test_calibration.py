from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cli import main
from distill.collaboration.calibrate import choices
from distill.collaboration.calibration import Calibration, digest, numbers, percentiles, prompts_hash
from distill.collaboration.pipeline import AdaptivePipeline
from distill.errors import ConfigError
from distill.files import save_json
from tests import tiny


def made(prompts: int = 1000, steps: int = 4) -> Calibration:
    return Calibration(
        {"unet": "abc"}, {"guidance_scale": 0.0}, steps, "judge", prompts, "def", percentiles(torch.rand(prompts))
    )


def test_percentiles_are_numpys() -> None:
    scores = torch.randn(137)
    expected = np.percentile(scores.double().numpy(), range(101))
    np.testing.assert_allclose(percentiles(scores), expected, atol=1e-6)


def test_threshold_and_share() -> None:
    calibration = made()
    assert calibration.share(10, 12) == 0.5
    assert calibration.threshold(0.5) == calibration.percentiles[50]
    low, high = calibration.percentiles[30], calibration.percentiles[31]
    assert calibration.threshold(0.305) == pytest.approx((low + high) / 2)


@pytest.mark.parametrize(("count", "share"), [(50, 0.5), (500, 0.3)])
def test_interval_covers_fresh_prompts(count: int, share: float) -> None:
    """Thresholds set by `count` scores, measured on the distribution itself: 95 % of the averages lie inside."""
    generator, inside, trials = torch.Generator().manual_seed(0), 0, 600
    for _ in range(trials):
        scores = torch.rand(count, generator=generator)
        calibration = Calibration({}, {}, 4, "", count, "", percentiles(scores))
        spent = 4 + 10 * calibration.threshold(share)  # of uniform scores the threshold is the share
        low, high = calibration.interval(share, 10)
        centre = 4 + 10 * share
        inside += low <= spent <= high
        assert low < centre < high
    assert 0.92 < inside / trials < 0.98


def test_interval_of_no_and_of_all_images() -> None:
    """A threshold at the lowest or highest score is one all the same: fresh scores lie beyond it. Of n scores all lie
    above a fresh one's with probability 1 / (n + 1)."""
    calibration = made(prompts=20)
    low, high = calibration.interval(1.0, 1)
    assert (low, high) == pytest.approx((4 + 0.025 ** (1 / 20), 4 + 0.975 ** (1 / 20)))
    low, high = calibration.interval(0.0, 1)
    assert (low, high) == pytest.approx((4 + 1 - 0.975 ** (1 / 20), 4 + 1 - 0.025 ** (1 / 20)))


def test_file(tmp_path: Path) -> None:
    calibration = made()
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    with pytest.raises(ConfigError, match="there is no calibration at .*`distill calibrate` makes one"):
        Calibration.load(tmp_path / "other.json")


CHOICE = {"mode": "refine", "teacher_steps": 3, "share": 0.5, "budget": 6.0, "teacher": {}, "teacher_call": {}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"percentiles": []}, r"is no calibration \(its percentiles are not 101 numbers\); give a file that `distill"),
        ({"percentiles": ["a"] * 101}, "its percentiles are not 101 numbers"),
        ({"percentiles": [float("nan")] * 101}, "its percentiles are not 101 numbers"),
        ({"percentiles": [float(-k) for k in range(101)]}, "its percentiles fall"),
        ({"steps": 0}, "it was made with 0 steps and 1000 prompts"),
        ({"student": "abc"}, "its student, call and choice are no groups"),
        ({"judge": None}, "its judge has no name"),
        ({"choice": {"mode": "refine", "share": 0.5}}, "its choice lacks budget, teacher, teacher_call, teacher_steps"),
        ({"choice": CHOICE | {"share": "half"}}, "its choice is not of numbers"),
        ({"choice": CHOICE | {"teacher": "abc"}}, "its choice names no teacher"),
        ({"more": 1}, "is no calibration; give a file"),
        ({"version": 1}, "is of another version of distill, .* make it again with `distill calibrate`"),
        ({"version": None}, "is of another version of distill"),
    ],
)
def test_files_of_something_else_get_a_sentence(changes: dict, sentence: str, tmp_path: Path) -> None:
    save_json(asdict(made()) | changes, tmp_path / "c.json")
    with pytest.raises(ConfigError, match=sentence):
        Calibration.load(tmp_path / "c.json")


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "no JSON"])
def test_files_that_are_no_calibration_get_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ConfigError, match="is no calibration; give a file that `distill calibrate` wrote"):
        Calibration.load(tmp_path / "wrong.json")


def test_a_file_of_an_earlier_version_is_to_be_made_again(tmp_path: Path) -> None:
    """As they were when they told the denoiser alone."""
    facts = asdict(made()) | {"student": "0123456789ab"}
    save_json(
        {name: value for name, value in facts.items() if name not in ("version", "judged_by")}, tmp_path / "c.json"
    )
    with pytest.raises(
        ConfigError, match="c.json' is of another version of distill.*make it again with `distill calib"
    ):
        Calibration.load(tmp_path / "c.json")


def test_scores_that_are_no_number_are_as_low_as_the_lowest() -> None:
    nan, infinite = float("nan"), float("inf")
    scores = torch.tensor([0.5, nan, 0.2, -infinite, infinite])
    assert numbers(scores, "j").tolist() == pytest.approx([0.5, 0.2, 0.2, 0.2, 0.5])
    with pytest.raises(ConfigError, match="the judge 'j' gave no score that is a number"):
        numbers(torch.tensor([nan, infinite]), "j")


def test_digest_tells_weights_apart() -> None:
    one, same, other = tiny.sd_denoiser(1), tiny.sd_denoiser(1), tiny.sd_denoiser(2)
    assert digest(one) == digest(same) != digest(other)
    assert prompts_hash(["a", "b"]) != prompts_hash(["b", "a"])


def test_choices_spend_the_budget() -> None:
    ways = choices(made(), 10, "refine")
    assert {round(4 + way["share"] * way["teacher_steps"], 9) for way in ways} == {10.0}
    assert {way["variance"] for way in ways} == {0.3, 0.4, 0.55, 0.7, 0.75}
    assert {way["teacher_steps"] for way in choices(made(), 10, "regenerate")} == {30, 20, 15, 12, 10, 9}
    with pytest.raises(ConfigError, match="leaves the teacher none: the student takes 4"):
        choices(made(), 4, "refine")


PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "cyan") for shape in
           ("ring", "square", "circle", "cross", "diamond", "triangle")]  # fmt: skip


def test_commands(sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrate with a search, then collaborate by its choice, on the pipelines as a user has them."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    pair = ["--student", str(sd_folder), "--teacher", str(sd_folder), "--student_steps", "2"]
    calibration, output = str(tmp_path / "calibration.json"), tmp_path / "images"
    main(["calibrate", *pair, "--prompts", str(file), "--budget", "4", "--target", "shapes", "--output", calibration])
    said = capsys.readouterr().out
    assert "scores of 24 images by small-shapes" in said and "best for 4 steps on average" in said
    assert " % below " in said and " steps of the teacher" in said and "; shapes " in said
    kept = json.loads(Path(calibration).read_text())
    assert kept["steps"] == 2 and len(kept["percentiles"]) == 101 and len(kept["choice"]["tried"]) > 10
    assert kept["choice"]["value"] == max(way["value"] for way in kept["choice"]["tried"])
    main(["collaborate", *pair, "--prompts", str(file), "--calibration", calibration, "--output", str(output),
          "--compare", "3"])  # fmt: skip
    assert "24 images, of which" in capsys.readouterr().out
    rows = list(csv.DictReader((output / "decisions.csv").open()))
    assert [row["prompt"] for row in rows] == PROMPTS and [row["seed"] for row in rows[:2]] == ["0", "1"]
    spent = sum(int(row["steps"]) for row in rows) / len(rows)
    assert spent == pytest.approx(4, abs=0.6)
    assert (output / "grid.png").is_file() and (output / "00023.png").is_file()
    later = ["--prompts", str(file), "--calibration", calibration, "--output", str(output), "--compare", "1"]
    main(["collaborate", *pair, "--prompt", '["a red ring"]', *later[2:]])
    assert sorted(path.name for path in output.iterdir()) == ["00000.png", "decisions.csv", "grid.png", "prompts.txt"]
    wrong = [*pair[:-1], "3", "--prompts", str(file), "--calibration", calibration, "--output", str(output)]
    guided = [*pair, "--teacher_guidance", "2", *later]
    for arguments, sentence in (
        (wrong, "made for another call of the student (num_inference_steps=2, not num_inference_steps=3)"),
        (guided, "made for another call of the teacher (without guidance_scale, not guidance_scale=2.0)"),
        ([*pair, "--prompts", str(file)], "how many steps the teacher improves"),
        ([*pair], "nothing to paint"),
        ([*pair, "--prompt", '["a red ring"]', "--judge", "clip", "--threshold", "0"], "names no model"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["collaborate", *arguments])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_bad_searches_are_refused_before_anything_is_painted(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["--student", str(sd_folder), "--teacher", str(sd_folder), "--output", str(tmp_path / "c.json")]
    for options, sentence in (
        (["--modes", '["refine","improve"]'], "modes are some of refine, regenerate; got ['improve']"),
        (["--target", "beauty"], "the judge 'beauty' is unknown"),
    ):
        with pytest.raises(SystemExit):
            main(["calibrate", *pair, "--budget", "4", *options])
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--budget", "1"], "a budget of 1.0 steps leaves the teacher none: the student takes 2"),
        (["--budget", "6", "--solver", "HeunDiscreteScheduler"], "HeunDiscreteScheduler asks the network"),
        (["--budget", "900"], "has 1000 levels, fewer than teacher_steps=1283"),
    ],
)
def test_searches_that_cannot_be_are_refused_after_one_image(
    options: list[str],
    sentence: str,
    sd_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    painted, judged = [], AdaptivePipeline.judged
    monkeypatch.setattr(
        AdaptivePipeline, "judged", lambda pair, prompts, *rest: painted.append(prompts) or judged(pair, prompts, *rest)
    )
    pair = ["--student", str(sd_folder), "--teacher", str(sd_folder), "--output", str(tmp_path / "c.json")]
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", *pair, "--student_steps", "2", "--count", "40", *options])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert [len(prompts) for prompts in painted] == [1] and not (tmp_path / "c.json").exists()


def test_too_few_prompts_are_refused(sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--student", str(sd_folder), "--teacher", str(sd_folder), "--student_steps", "1"]
    with pytest.raises(SystemExit):
        main(["calibrate", *pair, "--count", "5", "--output", str(tmp_path / "c.json")])
    assert "need 20 held-out prompts or more, got 5" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
