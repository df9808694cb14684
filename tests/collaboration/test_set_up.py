"""What a calibration holds for, what is kept of a pair on disk, and where its parts are."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.collaboration import calibration as calibrations
from distill.collaboration import pipeline as pipelines
from distill.collaboration.calibrate import calibrate, search, seeded
from distill.collaboration.calibration import judge_identity, parts
from distill.collaboration.calls import at_own_size, own_size
from distill.collaboration.judges import NetworkJudge
from distill.collaboration.opening import open_pair
from distill.collaboration.pipeline import FILE, AdaptivePipeline
from distill.comparison.compare import _adaptive
from distill.comparison.rows import Adaptive, Comparison, Entry
from distill.errors import ConfigError
from distill.files import save_json
from distill.inference import open_painter
from tests.collaboration.test_pipeline import PROMPTS, Pair, redness

JUDGE = NetworkJudge(redness, "redness")


@pytest.fixture
def calibrated(sd_folder: Path) -> AdaptivePipeline:
    """A pair that is calibrated and has chosen a way."""
    pipe = Pair(sd_folder).pipe
    pipe.calibration = calibrate(pipe, PROMPTS * 2, batch_size=32)
    pipe.calibration = search(pipe, PROMPTS * 2, 6.0, ["regenerate"], shares=(0.5,), batch_size=32)
    return pipe


def scaled(network: Any) -> None:
    next(network.parameters()).data.mul_(1.01)


CHANGES = {
    "unet": lambda pipeline: scaled(pipeline.unet),
    "vae": lambda pipeline: scaled(pipeline.vae),
    "text_encoder": lambda pipeline: scaled(pipeline.text_encoder),
    "scheduler": lambda pipeline: pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True),
    "tokenizer": lambda pipeline: pipeline.tokenizer.add_tokens(["a new word"]),
}


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("part", CHANGES)
def test_every_part_of_a_pipeline_belongs_to_it(part: str, who: str, calibrated: AdaptivePipeline) -> None:
    made, pipeline = calibrated.calibration, getattr(calibrated, who)
    if part == "tokenizer":  # student and teacher share theirs
        pipeline.tokenizer = type(pipeline.tokenizer).from_pretrained(pipeline.tokenizer.name_or_path)
    calibrated.calibration = made
    CHANGES[part](pipeline)
    with pytest.raises(ConfigError, match=rf"made for another {who} \(its {part}\); make one for this"):
        calibrated.calibration = made


def test_settings_of_an_autoencoder_belong_to_it(calibrated: AdaptivePipeline) -> None:
    calibrated.student.vae.register_to_config(scaling_factor=0.7)
    with pytest.raises(ConfigError, match=r"another student \(its vae\)"):
        calibrated.calibration = calibrated.calibration


def test_all_that_differs_is_named(calibrated: AdaptivePipeline) -> None:
    made = calibrated.calibration
    scaled(calibrated.student.unet)
    scaled(calibrated.student.vae)
    calibrated.teacher_call["guidance_scale"] = 9.0
    sentence = (
        r"another student \(its vae, unet\) and another call of the teacher \(guidance_scale=3.0, not guid.*=9.0\)"
    )
    with pytest.raises(ConfigError, match=sentence):
        calibrated.calibration = made
    calibrated.calibration = None


def test_a_teacher_is_looked_at_only_where_a_way_was_chosen(calibrated: AdaptivePipeline) -> None:
    scaled(calibrated.teacher.unet)
    calibrated.teacher_call["guidance_scale"] = 9.0
    calibrated.calibration = replace(calibrated.calibration, choice={})


def test_a_call_that_changed_since_has_no_budget(calibrated: AdaptivePipeline) -> None:
    calibrated.student_call["guidance_scale"] = 2.0
    with pytest.raises(ConfigError, match="another call of the student"):
        calibrated(PROMPTS[:1], budget=5.0)


def test_a_judge_is_its_weights_and_its_way_of_scoring(
    calibrated: AdaptivePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calibrated.calibration
    (tmp_path / "weights").write_text("a")
    spec = f"mine:{tmp_path / 'weights'}"
    calibrated.judge.spec = spec
    of_file = replace(made, judge=spec, judged_by=judge_identity(spec))
    calibrated.calibration = of_file
    (tmp_path / "weights").write_text("another")
    with pytest.raises(ConfigError, match=r"made for another judge \(mine:.*scores otherwise by now\)"):
        calibrated.calibration = of_file
    calibrated.judge.spec = "redness"
    monkeypatch.setattr(calibrations, "SCORES", calibrations.SCORES + 1)
    with pytest.raises(ConfigError, match=r"made for another judge \(redness scores otherwise by now\)"):
        calibrated.calibration = made


def test_shipped_judges_are_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = {judge_identity("shapes"), judge_identity("small-shapes"), judge_identity("redness")}
    assert len(identities) == 3
    monkeypatch.setattr("distill.identity._shipped", lambda name: "other" if "judge" in name else None)
    assert not identities & {judge_identity("shapes"), judge_identity("small-shapes")}


@pytest.mark.parametrize("kind", ["mine:{}", "clip:ViT-B-32:{}", "image-reward:{}"])
def test_a_judge_is_what_is_in_its_files(kind: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/weights.pt").write_bytes(b"a" * 10000)
    copied = shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(copied / "weights.pt", (1, 1))
    before = [judge_identity(kind.format(tmp_path / "one" / name)) for name in ("", "weights.pt")]
    (tmp_path / "one/weights.pt").write_bytes(b"a" * 9999 + b"b")
    after = [judge_identity(kind.format(tmp_path / "one" / name)) for name in ("", "weights.pt")]
    assert not set(before) & set(after)
    shutil.rmtree(tmp_path / "one")
    shutil.move(copied, tmp_path / "one")
    assert [judge_identity(kind.format(tmp_path / "one" / name)) for name in ("", "weights.pt")] == before


def test_a_folder_of_a_shipped_judges_name_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [judge_identity("shapes"), judge_identity("small-shapes")]
    monkeypatch.chdir(tmp_path)
    for name in ("shapes", "small-shapes", "shapes_judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    assert [judge_identity("shapes"), judge_identity("small-shapes")] == before


def test_parts_are_the_same_from_another_place(sd_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(sd_folder, tmp_path / "moved")
    one, other = (open_painter(str(folder)).pipeline for folder in (sd_folder, moved))
    assert parts(one) == parts(other) and {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} == parts(one).keys()
    one.save_pretrained(tmp_path / "again")
    assert parts(open_painter(str(tmp_path / "again")).pipeline) == parts(one)


def test_tuples_of_a_call_survive(sdxl_folder: Path, tmp_path: Path) -> None:
    """SDXL adds sizes up, which it does with tuples only."""
    pipe = Pair(sdxl_folder).pipe
    size = {"original_size": (64, 48), "target_size": (32, 32), "crops_coords_top_left": (0, 0)}
    pipe.student_call |= size
    pipe.teacher_call |= size
    pipe.calibration = calibrate(pipe, PROMPTS * 2, batch_size=32)
    pipe.calibration = search(pipe, PROMPTS * 2, 6.0, ["regenerate"], shares=(0.5,), batch_size=32)
    pipe.calibration.save(tmp_path / "c.json")
    pipe.calibration = calibrations.Calibration.load(tmp_path / "c.json")
    pipe.save_pretrained(tmp_path / "pair")
    again = AdaptivePipeline.from_pretrained(tmp_path / "pair", judge=JUDGE)
    assert again.student_call == pipe.student_call and again.teacher_call == pipe.teacher_call
    one, other = (seeded(pair, PROMPTS[:4], 0) for pair in (pipe, again))
    assert torch.equal(one.images, other.images) and len(set(one.decisions)) == 2


def test_calls_that_cannot_be_kept_are_refused(sd_folder: Path, tmp_path: Path) -> None:
    pipe = Pair(sd_folder).pipe
    pipe.student_call["prompt_embeds"] = torch.zeros(1)
    with pytest.raises(
        ConfigError, match="a call with prompt_embeds of the type Tensor cannot be kept; give one of num"
    ):
        calibrate(pipe, PROMPTS * 2)
    with pytest.raises(ConfigError, match="a call with prompt_embeds of the type Tensor cannot be kept"):
        pipe.save_pretrained(tmp_path / "pair")
    assert not (tmp_path / "pair").exists()


def test_a_pair_keeps_its_precision(sd_folder: Path, tmp_path: Path) -> None:
    """Each part its own."""
    pipe = Pair(sd_folder).pipe.to(torch.bfloat16)
    pipe.student.vae.to(torch.float32)
    decode = pipe.student.vae.decode
    pipe.student.vae.decode = lambda latents, *rest, **options: decode(latents.float(), *rest, **options)
    pipe.calibration = calibrate(pipe, PROMPTS * 2, batch_size=32)
    pipe.save_pretrained(tmp_path / "pair")
    again = AdaptivePipeline.from_pretrained(tmp_path / "pair", judge=JUDGE)
    for pipeline in (again.student, again.teacher):
        assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert again.student.vae.dtype == torch.float32 and again.teacher.vae.dtype == torch.bfloat16
    assert again.calibration == pipe.calibration
    for name in ("torch_dtype", "dtype"):
        with pytest.raises(ConfigError, match=r"another student \(its vae, text_encoder, unet\)"):
            AdaptivePipeline.from_pretrained(tmp_path / "pair", judge=JUDGE, **{name: torch.float16})
    kept = json.loads((tmp_path / "pair" / FILE).read_text())
    save_json({key: value for key, value in kept.items() if key != "dtypes"} | {"calibration": None},
              tmp_path / "pair" / FILE)  # fmt: skip
    old = AdaptivePipeline.from_pretrained(tmp_path / "pair", judge=JUDGE)
    assert old.student.unet.dtype == torch.float32, "as diffusers has it"


def test_a_pair_of_an_earlier_version_is_to_be_calibrated_again(calibrated: AdaptivePipeline, tmp_path: Path) -> None:
    calibrated.save_pretrained(tmp_path / "pair")
    kept = json.loads((tmp_path / "pair" / FILE).read_text())
    del kept["calibration"]["version"]
    save_json(kept, tmp_path / "pair" / FILE)
    with pytest.raises(ConfigError, match="adaptive.json' is of another version of distill, .* make it again"):
        AdaptivePipeline.from_pretrained(tmp_path / "pair", judge=JUDGE)


def test_another_precision_has_no_calibration(calibrated: AdaptivePipeline) -> None:
    with pytest.raises(ConfigError, match="another student .* and another teacher"):
        calibrated.to(torch.float16)


class Movable(NetworkJudge):
    """A judge that remembers where it was sent."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.places: list[Any] = []

    def to(self, device: Any) -> Any:
        self.places.append(device)
        return self


def test_a_judge_goes_where_the_pair_goes(sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    pipe.judge = Movable(redness, "redness")
    pipe.to("cpu")
    pipe.to(torch.float32)
    pipe.to(device="meta")
    assert pipe.judge.places == [torch.device("cpu"), torch.device("meta")]
    pipe = Pair(sd_folder).pipe
    pipe.judge = lambda prompts, images: redness(prompts, images)  # has no `to`
    assert pipe.to("meta").device.type == "meta"


def test_a_judge_is_opened_where_the_pair_is(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pair(sd_folder).pipe.save_pretrained(tmp_path / "pair")
    opened: list[Any] = []
    monkeypatch.setattr(pipelines, "open_judge", lambda spec, device: opened.append((spec, device)) or JUDGE)
    AdaptivePipeline.from_pretrained(tmp_path / "pair")
    assert opened == [("redness", torch.device("cpu"))]


@pytest.fixture
def large(sd_folder: Path, tmp_path: Path) -> Path:
    """The same pipeline, which paints 64 pixels by itself."""
    folder = shutil.copytree(sd_folder, tmp_path / "large")
    config = json.loads((folder / "unet" / "config.json").read_text())
    save_json(config | {"sample_size": 16}, folder / "unet" / "config.json")
    return folder


def test_a_larger_teacher_paints_at_its_own_size(sd_folder: Path, large: Path, tmp_path: Path) -> None:
    """By the commands and in comparisons; what it is called with otherwise stays."""
    pair = open_pair(str(sd_folder), str(large), "small-shapes", student_steps=1)
    assert (pair.teacher_call["height"], pair.teacher_call["width"]) == (64, 64)
    for threshold in (-9.0, 9.0):
        answer = seeded(pair, PROMPTS[:1], 0, threshold=threshold, mode="regenerate", teacher_steps=1)
        assert answer.images.shape == (1, 3, 64, 64)
    assert "height" not in open_pair(str(sd_folder), str(sd_folder), "small-shapes").teacher_call
    how = Adaptive(str(large), teacher_steps=3, count=20)
    entry = Entry("together", pipeline=str(sd_folder), steps=[2], adaptive=how)
    listed = Comparison([entry], "report", samples=100, runs=str(tmp_path / "runs"), batch_size=20)
    painter = _adaptive(open_painter(str(sd_folder), 1), how, 2, listed)
    assert painter.pipeline.pair.teacher_call == {"height": 64, "width": 64}


def test_sizes_that_pipelines_have_by_themselves(sd_folder: Path, sdxl_folder: Path, sd3_folder: Path) -> None:
    student = Pair(sd_folder).pipe.student
    for folder in (sd_folder, sdxl_folder, sd3_folder):
        teacher = open_painter(str(folder)).pipeline
        assert own_size(teacher) == {"height": 32, "width": 32}
        for sides in ({}, {"height": 32}, {"height": 32, "width": 32}):
            call = at_own_size((student, sides), (teacher, {"guidance_scale": 2.0}))
            assert call == {"guidance_scale": 2.0}
        small = (student, {"height": 16, "width": 16})
        assert at_own_size(small, (teacher, {})) == {"height": 32, "width": 32}, "a student that was trained smaller"
        wide = (student, {"height": 16, "width": 32})
        assert at_own_size(wide, (teacher, {})) == {}, "another format would be squeezed"
    teacher.default_sample_size = 16
    assert at_own_size((student, {}), (teacher, {"height": 48})) == {"height": 48, "width": 64}
    teacher.vae_scale_factor = None
    assert own_size(teacher) == {}


def test_a_comparison_refuses_a_teacher_before_it_scores(sd_folder: Path, tmp_path: Path) -> None:
    how = Adaptive(str(sd_folder), teacher_steps=3, solver="HeunDiscreteScheduler")
    entry = Entry("together", pipeline=str(sd_folder), steps=[2], adaptive=how)
    listed = Comparison([entry], "report", samples=100, runs=str(tmp_path))
    with pytest.raises(ConfigError, match="HeunDiscreteScheduler asks the network"):
        _adaptive(open_painter(str(sd_folder), 1), how, 2, listed)
    assert not list(tmp_path.iterdir())
