"""Each measure beside a plain restatement, and what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.comparison.measures import (
    Diversity,
    Drawn,
    Judged,
    LikeTeacher,
    Measure,
    RealImages,
    Setting,
    held_out_features,
    specification,
    teachers_own,
)
from distill.comparison.rows import Comparison, Entry, rows_of
from distill.data import shapes
from distill.data.shapes_data import HELD_OUT, ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.distances import open_distance
from distill.evaluation.statistics import frechet_distance, kernel_distance
from distill.inference import Painter, open_painter, save_png
from distill.perceptual.latent_lpips import TINY, LatentLPIPS


def setting(folder: Path, count: int = 6) -> Setting:
    return Setting(shapes.captions(HELD_OUT, range(count)), seed=3, batch_size=4, cache=folder)


def told(measure: Measure, given: Setting, painter: Painter, images: Tensor) -> dict:
    """What a measure says of images that come in batches of four."""
    measure.begin(given, painter)
    for part in torch.arange(len(images)).split(4):
        measure.update(part.tolist(), images[part])
    return measure.values()


NOBODY = Painter(None, {})


def test_real_images_against_themselves_are_perfect(tmp_path: Path) -> None:
    images = ShapesDataset(200, seed=HELD_OUT).__getitems__(list(range(200)))["pixels"] / 2 + 0.5
    for _ in range(2):  # a second row is measured from nothing
        values = told(measure := Drawn(count=200), setting(tmp_path, 200), NOBODY, images)
        assert values["fid_shapes"] == pytest.approx(0, abs=1e-3) and values["alignment"] > 0.99
        assert values["precision"] == values["recall"] == 1
        low, high = values["fid_shapes_interval"]
        assert low <= 0.01 and high >= 0
    assert {*measure.names} <= {*values} and values["reference"] == "200 held-out drawn images"
    assert len(held_out_features(200)) == 200


def test_prompts_that_are_no_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the measure Drawn reads drawn shapes only, so name other measures"):
        Drawn().check(Setting(["a dog"], 0, 4, tmp_path))


def test_judged_is_the_mean_score(tmp_path: Path) -> None:
    from distill.collaboration.judges import open_judge

    given = setting(tmp_path)
    images = ShapesDataset(6, seed=HELD_OUT).__getitems__(list(range(6)))["pixels"] / 2 + 0.5
    images[:3] = 1 - images[:3]  # some do not show what they should
    values = told(Judged("small-shapes"), given, NOBODY, images)
    expected = open_judge("small-shapes")(given.prompts, images)
    assert values["small-shapes"] == pytest.approx(float(expected.mean()), abs=1e-5)
    low, high = values["small-shapes_interval"]
    assert low < values["small-shapes"] < high


class Pooled(torch.nn.Module):
    """Stands in for Inception: the mean colours of four quarters."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def test_real_images_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RealImages, "network", Pooled())
    reals, fakes = torch.rand(40, 3, 16, 16), torch.rand(24, 3, 16, 16) ** 2
    for index, image in enumerate(reals):
        save_png(image, tmp_path / "real" / f"{index:02d}.png")
    measure = RealImages(str(tmp_path / "real"))
    values = told(measure, setting(tmp_path / "kept"), NOBODY, fakes)
    stored = torch.stack([(image * 255).round() for image in reals])  # as PNG keeps them
    features = [Pooled()(images.to(torch.uint8)) for images in (stored, (fakes * 255).round())]
    assert values["fid"] == pytest.approx(frechet_distance(*features), rel=0.02)
    kernels = (torch.stack([features[0][index] for index in range(40)]), features[1])
    assert values["kid"] == pytest.approx(kernel_distance(*kernels), abs=0.02)
    assert values["reference"] == f"40 images of {tmp_path / 'real'}" and {*measure.names} < {*values}
    (kept,) = (tmp_path / "kept").iterdir()
    written = kept.stat().st_mtime_ns
    assert told(measure, setting(tmp_path / "kept"), NOBODY, fakes) == values
    assert kept.stat().st_mtime_ns == written
    save_png(reals[0], tmp_path / "real" / "more.png")
    told(measure, setting(tmp_path / "kept"), NOBODY, fakes)
    assert len(list((tmp_path / "kept").iterdir())) == 2, "another folder is another reference"


def test_features_are_those_of_the_inception_network(inception: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    network = Inception("random", ["2048"], feature_extractor_weights_path=str(inception)).eval()
    images = torch.rand(3, 3, 24, 24)
    with torch.no_grad():
        (expected,) = network((images * 255).round().to(torch.uint8))  # as files of them hold them
    found = RealImages("real", inception=str(inception))._features(images)
    assert found.shape == (3, 2048) and found.std() > 0
    torch.testing.assert_close(found, expected)


def test_numbers_that_mean_another_thing_now_are_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = specification([Drawn(), RealImages("real")])
    assert before[0] == ["distill.comparison.measures.Drawn", {"count": 10000}], "as all rows so far have it"
    monkeypatch.setattr(RealImages, "version", RealImages.version + 1)
    after = specification([Drawn(), RealImages("real")])
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize("measure", [Judged("clip:NoSuch:none"), Judged("image-reward:/nowhere")])
def test_a_judge_that_cannot_be_opened_is_refused_before_anything_is_trained(measure: Judged, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        measure.check(setting(tmp_path))


def test_distance_to_the_teacher_is_of_the_same_noise_and_prompts(sd_folder: Path, tmp_path: Path) -> None:
    given = setting(tmp_path)
    few = open_painter(str(sd_folder), 1, 1.0, device="cpu")
    images = few(given.prompts, given.seed, given.batch_size)
    own = open_painter(str(sd_folder), device="cpu")(given.prompts[:5], given.seed, given.batch_size)
    measure = LikeTeacher(["shapes", TINY], images=5)
    values = told(measure, given, Painter(None, {}, teacher=str(sd_folder)), images)
    seen = (own * 255).round() / 255  # as they are kept
    expected = open_distance("shapes")(images[:5], seen).mean()
    assert values["to_teacher_shapes"] == pytest.approx(float(expected), abs=1e-4)
    vae = few.pipeline.vae
    with torch.no_grad():
        latents = [vae.encode(x * 2 - 1).latent_dist.mode() * vae.config.scaling_factor for x in (images[:5], seen)]
        latent = LatentLPIPS.load(TINY)(*latents).mean()
    assert values[f"to_teacher_{TINY}"] == pytest.approx(float(latent), abs=1e-4)
    assert {*measure.names} < {*values}
    assert torch.equal(teachers_own(str(sd_folder), given, 5), seen)


def test_the_teacher_is_asked_as_the_measure_says(sd_folder: Path, tmp_path: Path) -> None:
    """Its own images of the same steps, guidance and solver are no distance away but for how they are kept."""
    given = setting(tmp_path)
    how: dict[str, Any] = {"steps": 2, "guidance": 1.0, "solver": "EulerDiscreteScheduler"}
    images = open_painter(str(sd_folder), **how, device="cpu")(given.prompts, given.seed, given.batch_size)
    student = Painter(None, {}, teacher=str(sd_folder))
    asked = told(LikeTeacher(["shapes"], images=5, **how), given, student, images)
    usual = told(LikeTeacher(["shapes"], images=5), given, student, images)
    assert asked["to_teacher_shapes"] < 1e-3 < usual["to_teacher_shapes"]


def test_a_setting_that_is_not_given_is_no_part_of_what_tells_measures_apart() -> None:
    """So rows keep their names when a measure learns another setting."""
    assert "guidance" not in str(specification([LikeTeacher()]))
    assert "guidance" in str(specification([LikeTeacher(guidance=3.0)]))


def test_a_row_without_a_teacher_has_no_such_number(tmp_path: Path) -> None:
    assert told(LikeTeacher(["shapes"]), setting(tmp_path), NOBODY, torch.rand(6, 3, 32, 32)) == {}


def test_diversity_is_the_mean_over_pairs_of_one_prompt(sd_folder: Path, tmp_path: Path) -> None:
    painter, given = open_painter(str(sd_folder), 1, 1.0, device="cpu"), setting(tmp_path)
    values = told(Diversity("shapes", prompts=2, images=3), given, painter, torch.rand(6, 3, 32, 32))
    asked = [prompt for prompt in given.prompts[:2] for _ in range(3)]
    images = painter(asked, given.seed, given.batch_size)
    apart = open_distance("shapes")
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    expected = sum(float(apart(images[a][None], images[b][None])) for a, b in pairs) / 6
    assert values["diversity_shapes"] == pytest.approx(expected, abs=1e-4)


def test_other_measures_or_prompts_are_other_rows(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\na blue square\n")

    def file(**settings) -> Path:
        listed = Comparison([Entry("a", pipeline="tiny-sd", steps=[1])], "report", runs=str(tmp_path), **settings)
        (row,) = rows_of(listed)
        return row.file(listed)

    files = [
        file(),
        file(measures=[Judged("shapes")]),
        file(measures=[Drawn(), Diversity()]),
        file(measures=[Drawn(50)]),
    ]
    files.append(file(prompts=str(prompts)))
    assert len({*files}) == 5 and file(measures=[Drawn()]) == file()

    @dataclass
    class Mine(Drawn):
        """As the package's, but for its name's path."""

    Mine.__qualname__ = "Drawn"
    assert file(measures=[Mine()]) not in files
    real = tmp_path / "real"
    for count in (2, 3):
        save_png(torch.rand(3, 8, 8), real / f"{count}.png")
        files.append(file(measures=[RealImages(str(real))]))
    assert files[-1] != files[-2], "more images in the folder"
    prompts.write_text("a red ring\n")
    assert file(prompts=str(prompts)) not in files


def test_bad_measures_get_a_sentence(tmp_path: Path) -> None:
    entry = Entry("a", pipeline="tiny-sd", steps=[1])
    with pytest.raises(ConfigError, match="the measures give kid, precision, recall more than once; leave one of them"):
        Comparison([entry], "report", measures=[Drawn(), RealImages("somewhere")])
    with pytest.raises(ConfigError, match="Diversity needs a distance of shapes, .*; got shapes, 50 and 1"):
        Diversity("shapes", images=1)
    with pytest.raises(ConfigError, match="the judge 'beauty' is unknown"):
        Judged("beauty").check(setting(tmp_path))
    with pytest.raises(ConfigError, match="needs a package: pip install 'distill\\[dreamsim\\]'"):
        Diversity("dreamsim").check(setting(tmp_path))
    with pytest.raises(ConfigError, match="holds 0 images; give a folder with 2 or more"):
        RealImages(str(tmp_path / "nowhere")).check(setting(tmp_path))
    with pytest.raises(ConfigError, match="LikeTeacher's distances are some of shapes, tiny-lpips, .*; got beauty"):
        LikeTeacher(["beauty"])
