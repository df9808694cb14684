"""Images as they are decided, and how many are held at once."""

from __future__ import annotations

import csv
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.io import decode_image

from distill.collaboration import calibrate as calibrating
from distill.collaboration import pipeline as pipelines
from distill.collaboration.calibrate import MeanScore, calibrate, search, seeded
from distill.collaboration.judges import NetworkJudge
from distill.collaboration.opening import target_of
from distill.collaboration.painting import paint
from distill.collaboration.pipeline import KEPT, REGENERATED, AdaptivePipeline
from distill.errors import ConfigError
from distill.evaluation import evaluate
from tests.collaboration.test_pipeline import PROMPTS, Pair, redness

NAN, INFINITE = float("nan"), float("inf")
HOW: dict[str, Any] = {"mode": "regenerate", "teacher_steps": 2}


def every(count: int) -> Callable[[list[str], Tensor], Tensor]:
    """A judge that rejects every `count`-th image, by the order they come in."""
    seen = [0]

    def judge(prompts: list[str], images: Tensor) -> Tensor:
        part = torch.arange(seen[0], seen[0] + len(images))
        seen[0] += len(images)
        return (part % count != 0).float()

    return judge


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of painted images that are alive, at the beginning of every batch."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    paint = pipelines.paint

    def watched(*arguments: Any) -> Any:
        counts.append(sum(1 for one in alive if one() is not None))
        answer = paint(*arguments)
        alive.append(weakref.ref(answer[0].untyped_storage()))
        return answer

    monkeypatch.setattr(pipelines, "paint", watched)
    return counts


def test_images_come_as_soon_as_they_are_decided(sd_folder: Path) -> None:
    """Of 16 in batches of 4 with every third rejected: the teacher has four together after the tenth image."""
    pipe = Pair(sd_folder, judge=every(3)).pipe
    stream = pipe.stream(PROMPTS, threshold=0.5, generator=generators(16), batch_size=4, **HOW)
    order = [(one.index, one.decision) for one in stream]
    rejected = [0, 3, 6, 9, 12, 15]
    expected = [(index, KEPT) for index in range(12) if index not in rejected]
    expected += [(index, REGENERATED) for index in rejected[:4]]
    expected += [(13, KEPT), (14, KEPT), (12, REGENERATED), (15, REGENERATED)]
    assert order == expected


def test_the_call_gives_what_the_stream_gives(sd_folder: Path) -> None:
    pair = Pair(sd_folder)
    threshold = pair.median()
    how: dict[str, Any] = {"threshold": threshold, "batch_size": 4, "variance": 0.5, "teacher_steps": 3}
    one_by_one = {one.index: one for one in pair.pipe.stream(PROMPTS, generator=generators(16), **how)}
    for output_type in ("pt", "np", "pil"):
        answer = pair.pipe(PROMPTS, generator=generators(16), output_type=output_type, **how)
        for index, image in enumerate(answer.images):
            told = (answer.scores[index], answer.decisions[index], answer.steps[index])
            assert told == one_by_one[index][2:]
            expected = one_by_one[index].image
            if output_type == "pt":
                assert torch.equal(image, expected)
            elif output_type == "np":
                assert torch.equal(torch.from_numpy(image).permute(2, 0, 1), expected)
            else:
                assert image.getpixel((3, 5)) == tuple((expected[:, 5, 3] * 255).round().to(torch.uint8).tolist())


def test_a_stream_is_refused_when_it_is_asked_for(sd_folder: Path) -> None:
    with pytest.raises(ConfigError, match="a budget needs a calibration"):
        Pair(sd_folder).pipe.stream(PROMPTS, budget=5.0, teacher_steps=3, mode="regenerate")


def test_streaming_holds_few_batches_however_few_are_rejected(sd_folder: Path, held: list[int]) -> None:
    """Four that wait would otherwise keep the four batches they come from."""
    pipe = Pair(sd_folder, judge=every(4)).pipe
    images = [one.image for one in pipe.stream(PROMPTS * 2, threshold=0.5, batch_size=4, **HOW) if one.index < 3]
    assert len(held) == 8 + 2 and max(held) <= 2 and len(images) == 3


def test_calibrating_holds_one_batch(sd_folder: Path, held: list[int]) -> None:
    pipe = Pair(sd_folder).pipe
    made = calibrate(pipe, PROMPTS * 2, batch_size=4)
    assert len(held) == 8 and max(held) <= 1
    scores = seeded(pipe, PROMPTS * 2, 0, threshold=-INFINITE, batch_size=4, **HOW).scores
    assert made.percentiles[0] == min(scores) and made.percentiles[100] == max(scores) and made.steps == 4


def test_searching_holds_few_batches(sd_folder: Path, held: list[int]) -> None:
    pipe = Pair(sd_folder).pipe
    pipe.calibration = calibrate(pipe, PROMPTS * 2, batch_size=4)
    held.clear()
    search(pipe, PROMPTS * 2, 6.0, ["regenerate"], batch_size=4, shares=(0.5,))
    assert len(held) == 8 + 4 and max(held) <= 3


def test_a_search_gives_its_target_every_image(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a way is worth is the target's value of the images that the way's call gives."""
    drawn = evaluate.held_out(128)
    monkeypatch.setattr(evaluate, "held_out", lambda count: drawn)
    pipe = Pair(sd_folder).pipe
    prompts = PROMPTS * 2
    pipe.calibration = calibrate(pipe, prompts, batch_size=32)
    way = {"shares": (0.5,), "batch_size": 5}
    made = search(pipe, prompts, 6.0, ["regenerate"], **way)
    (tried,) = made.choice["tried"]
    threshold = made.threshold(0.5)
    images = seeded(pipe, prompts, 0, threshold=threshold, mode="regenerate", teacher_steps=4, batch_size=5).images
    assert tried["value"] == pytest.approx(float(redness(prompts, images).double().mean()), abs=1e-6)
    far = search(pipe, prompts, 6.0, ["regenerate"], target_of("fid_shapes"), **way)
    assert far.choice["value"] == pytest.approx(-evaluate.fid_of_shapes(images), rel=1e-4)


def test_a_mean_score_does_not_depend_on_the_order() -> None:
    prompts, images = ["a"] * 9, torch.rand(9, 3, 4, 4)
    judge = NetworkJudge(redness, "redness")
    whole, turned = MeanScore(judge), MeanScore(judge)
    whole.update(prompts, images)
    for part in (8, 3, 1, 0, 2, 7, 5, 6, 4):
        turned.update(prompts[:1], images[part : part + 1])
    assert whole.value() == turned.value() == pytest.approx(float(images[:, 0].mean()))


def test_collaborating_writes_images_as_they_come(sd_folder: Path, held: list[int], tmp_path: Path) -> None:
    pair = Pair(sd_folder)
    how = HOW | {"threshold": pair.median()}
    held.clear()
    paint(pair.pipe, PROMPTS * 2, tmp_path, how, seed=0, batch_size=4, compare=2, scale=1)
    assert max(held) <= 3
    answer = seeded(pair.pipe, PROMPTS * 2, 0, batch_size=4, **how)
    for index, image in enumerate(answer.images):
        written = decode_image(str(tmp_path / f"{index:05d}.png"))
        assert torch.equal(written, (image * 255 + 0.5).clamp(0, 255).to(torch.uint8))
    rows = list(csv.DictReader((tmp_path / "decisions.csv").open()))
    assert [row["decision"] for row in rows] == answer.decisions
    assert [int(row["steps"]) for row in rows] == answer.steps and [row["prompt"] for row in rows] == PROMPTS * 2
    assert (tmp_path / "prompts.txt").read_text().splitlines() == PROMPTS * 2


def test_what_breaks_off_leaves_nothing_of_an_earlier_call(sd_folder: Path, tmp_path: Path) -> None:
    """All of it, if it breaks before its first picture."""
    pair = Pair(sd_folder)
    how = HOW | {"threshold": 0.0}
    paint(pair.pipe, PROMPTS[:3], tmp_path, how, seed=0, batch_size=4, compare=1, scale=1)

    scores = [torch.ones(1)]
    pair.pipe.judge = NetworkJudge(lambda prompts, images: scores.pop(), "one score")
    for _ in range(2):  # the second call has none, and leaves what the first wrote
        with pytest.raises(IndexError):
            paint(pair.pipe, PROMPTS[:2], tmp_path, how, seed=0, batch_size=1, compare=1, scale=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "prompts.txt"]


@pytest.mark.parametrize("threshold", [-INFINITE, 0.0])
def test_a_score_that_is_no_number_is_rejected(threshold: float, sd_folder: Path) -> None:
    pipe = Pair(sd_folder, judge=lambda prompts, images: torch.tensor([NAN, 1.0, NAN])).pipe
    answer = seeded(pipe, PROMPTS[:3], 0, threshold=threshold, **HOW)
    assert answer.decisions == [REGENERATED, KEPT, REGENERATED] and answer.steps == [6, 4, 6]


@pytest.mark.parametrize("mode", ["refine", "regenerate"])
def test_a_picture_that_overflowed_is_rejected_whatever_the_judge_says(mode: str, sd_folder: Path) -> None:
    """The student's autoencoder overflows; the teacher's own makes pictures, also from what is none."""
    pipe = Pair(sd_folder, judge=lambda prompts, images: torch.ones(len(images))).pipe
    next(pipe.teacher.vae.decoder.parameters()).data.mul_(1.1)  # so that it refines in pixels
    next(pipe.student.vae.decoder.parameters()).data.fill_(NAN)
    answer = seeded(pipe, PROMPTS[:2], 0, threshold=0.5, mode=mode, variance=0.5, teacher_steps=2)
    assert KEPT not in answer.decisions and answer.images.isfinite().all()
    assert all(score != score for score in answer.scores)


def test_scores_that_are_no_number_are_the_lowest_of_a_calibration(sd_folder: Path) -> None:
    scores = torch.arange(32.0)
    judge = lambda prompts, images: scores.where(scores != 5, torch.tensor(NAN))  # noqa: E731
    pipe = Pair(sd_folder, judge=judge).pipe
    made = pipe.calibration = calibrate(pipe, PROMPTS * 2, batch_size=32)
    assert made.percentiles[0] == made.percentiles[3] == 0.0 and made.percentiles[100] == 31.0
    pipe.judge.network = lambda prompts, images: torch.full((len(images),), NAN)
    with pytest.raises(ConfigError, match="the judge 'redness' gave no score that is a number"):
        calibrate(pipe, PROMPTS * 2, batch_size=32)
    with pytest.raises(ConfigError, match="gave no score that is a number"):
        search(pipe, PROMPTS * 2, 6.0, ["regenerate"], shares=(0.5,), batch_size=32)


def test_a_way_whose_value_is_no_number_is_not_the_best() -> None:
    ways = [{"value": NAN}, {"value": -2.0}, {"value": -1.0}, {"value": NAN}]
    assert calibrating._best(ways) == {"value": -1.0}
    with pytest.raises(ConfigError, match="the target is no number for any way"):
        calibrating._best(ways[:1])


def test_a_search_needs_a_calibration(sd_folder: Path) -> None:
    pipe: AdaptivePipeline = Pair(sd_folder).pipe
    with pytest.raises(ConfigError, match="a search needs the pipeline's calibration"):
        search(pipe, PROMPTS, 6.0)
