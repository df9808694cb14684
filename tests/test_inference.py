"""Pipelines as they are called for painting and measuring."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill import backbones
from distill.errors import ConfigError
from distill.inference import Painter, grid, open_painter, paint, pick_device, save_png, save_samples
from tests.pipelines import safety_checker


@dataclass
class Watched:
    """A pipeline whose calls go through `call`."""

    pipeline: Any
    call: Callable[..., Any]

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.call(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)


PROMPTS = ["a red ring", "a blue square", "a large green cross"]


@pytest.mark.parametrize("family", ["sd3", "sd"])
def test_an_image_does_not_depend_on_its_batch(family: str, request: pytest.FixtureRequest) -> None:
    backbone = backbones.load(str(request.getfixturevalue(f"{family}_folder")))
    painter = Painter(backbone.student_pipeline(backbone.denoiser()), backbone.student_call([1.0, 0.75, 0.5, 0.25]))
    torch.testing.assert_close(painter(PROMPTS, 5, 1), painter(PROMPTS, 5, 3), atol=1e-4, rtol=0)


def test_the_noise_between_steps_is_not_the_first_again(sd3_folder: Path) -> None:
    """The pipeline hands the scheduler no generator; the global one, under the same seed, would give the same noise."""
    backbone = backbones.load(str(sd3_folder))
    pipeline, seen = backbone.student_pipeline(backbone.denoiser()), []
    step = type(pipeline.scheduler).step

    def watched(self: Any, answer: torch.Tensor, t: Any, sample: torch.Tensor, **rest: Any) -> Any:
        found = step(self, answer, t, sample, **rest)
        x0 = sample - self.sigmas[self.step_index - 1] * answer
        noise = (found[0] - (1 - self.sigmas[self.step_index]) * x0) / self.sigmas[self.step_index]
        seen.append((sample.clone(), noise))
        return found

    type(pipeline.scheduler).step, kept = watched, step
    try:
        Painter(pipeline, backbone.student_call([1.0, 0.5]))(PROMPTS[:1], seed=5)
    finally:
        type(pipeline.scheduler).step = kept
    first, between = seen[0]
    assert abs(torch.corrcoef(torch.stack([first.flatten(), between.flatten()]))[0, 1]) < 0.2


def test_a_safety_checker_blackens_nothing_that_is_measured(sd_folder: Path, tmp_path: Path) -> None:
    pipeline = backbones.load(str(sd_folder)).pipeline()
    parts = {**pipeline.components, **safety_checker()}
    type(pipeline)(**parts).save_pretrained(tmp_path)
    backbone = backbones.load(str(tmp_path))
    assert backbone.pipeline()(PROMPTS[:1], num_inference_steps=1, output_type="pt").images.max() == 0
    painter = open_painter(str(tmp_path), 1, device="cpu")
    assert painter(PROMPTS).amax(dim=(1, 2, 3)).min() > 0 and painter.pipeline.safety_checker is None


def test_rows_of_a_grid_are_named_at_their_left() -> None:
    images = torch.rand(6, 3, 8, 8)
    plain, named = grid(images, 3, 4), grid(images, 3, 4, ["teacher", "student"])
    strip = named[:, :, : named.shape[2] - plain.shape[2]]
    assert torch.equal(named[:, :, strip.shape[2] :], plain) and strip.shape[1] == plain.shape[1]
    for half in strip.chunk(2, dim=1):
        assert half.min() < 0.5 and (half[:, 0] == 1).all() and (half[:, -1] == 1).all(), "one name within each row"


def test_samples_take_the_place_of_an_earlier_calls_and_of_nothing_else(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 4, 4)
    (tmp_path / "00007.png").touch()
    save_samples(images, PROMPTS, tmp_path)
    save_samples(images[:1], PROMPTS[:1], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "00007.png", "prompts.txt"]
    assert (tmp_path / "prompts.txt").read_text() == PROMPTS[0] + "\n"


def test_samples_are_written_as_they_come(tmp_path: Path) -> None:
    """None but those to be shown is held; what an earlier call painted stays until the first of this one is there."""
    save_samples(torch.rand(3, 3, 4, 4), PROMPTS, tmp_path)
    save_png(torch.rand(3, 4, 4), tmp_path / "grid.png")

    def broken() -> Iterator[torch.Tensor]:
        raise ConfigError("no such size")
        yield

    with pytest.raises(ConfigError):
        save_samples(broken(), PROMPTS, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 4

    written: list[int] = []

    def coming() -> Iterator[torch.Tensor]:
        for _ in range(5):
            written.append(len(list(tmp_path.glob("*.png"))))
            yield torch.rand(3, 4, 4)

    shown = save_samples(coming(), ["a"] * 5, tmp_path, shown=2)
    assert written == [4, 1, 2, 3, 4] and len(shown) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [*(f"{n:05d}.png" for n in range(5)), "prompts.txt"]


def test_painting_is_continued_where_it_was_ended(sd_folder: Path, tmp_path: Path) -> None:
    """With the batches that it would have had: the pictures are those of one call to the last bit."""
    painter = open_painter(str(sd_folder), 1, device="cpu")
    prompts = [f"a red ring {index}" for index in range(6)]
    whole, _ = paint(painter, prompts, tmp_path / "whole", 3, batch_size=2, shown=6)
    count, called = [0], painter.pipeline

    def ends(*given: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return called(*given, **named)

    ended = replace(painter, pipeline=Watched(called, ends))
    with pytest.raises(KeyboardInterrupt):
        paint(ended, prompts, tmp_path / "parts", 3, batch_size=2, shown=6)
    (tmp_path / "parts" / "00003.png").unlink()  # half a batch is painted again
    shown, kept = paint(painter, prompts, tmp_path / "parts", 3, batch_size=2, shown=6)
    assert kept == 2
    for index, (one, other) in enumerate(zip(whole, shown, strict=True)):
        names = [tmp_path / folder / f"{index:05d}.png" for folder in ("whole", "parts")]
        assert names[0].read_bytes() == names[1].read_bytes()
        torch.testing.assert_close(one, other, atol=0.5001 / 255, rtol=0)
    assert paint(painter, prompts, tmp_path / "parts", 3, batch_size=2)[1] == 6


@pytest.mark.parametrize("change", ["seed", "prompt", "steps", "weights"])
def test_what_another_call_left_is_painted_again(change: str, sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "pipeline")
    paint(open_painter(str(folder), 1, device="cpu"), PROMPTS, tmp_path, 3)
    if change == "weights":
        file = next((folder / "unet").glob("*.safetensors"))
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    painter = open_painter(str(folder), 2 if change == "steps" else 1, device="cpu")
    prompts = ["a square", *PROMPTS[1:]] if change == "prompt" else PROMPTS
    before = (tmp_path / "00000.png").read_bytes()
    assert paint(painter, prompts, tmp_path, 4 if change == "seed" else 3)[1] == 0
    assert (tmp_path / "00000.png").read_bytes() != before


def test_a_checkpoints_pictures_are_also_of_its_teachers_parts(sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "teacher")
    painter = replace(open_painter(str(folder), 1, device="cpu"), sources=("no file", str(folder)))
    before = painter.digests(PROMPTS)
    assert painter.digests(PROMPTS) == before
    file = next((folder / "vae").glob("*.safetensors"))
    save_file({name: tensor * 1.3 for name, tensor in load_file(file).items()}, file)
    assert not set(painter.digests(PROMPTS)) & set(before)


def test_pictures_of_no_numbers_are_not_kept(sd_folder: Path, tmp_path: Path) -> None:
    painter = open_painter(str(sd_folder), 1, device="cpu")
    with torch.no_grad():
        next(painter.pipeline.unet.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no finite numbers"):
        paint(painter, PROMPTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_says_its_prompt(tmp_path: Path) -> None:
    save_samples(torch.rand(1, 3, 4, 4), ["a red ring, \u00fc\u2028"], tmp_path)
    assert Image.open(tmp_path / "00000.png").info["Description"] == "a red ring, \u00fc\u2028"


def test_a_prompt_is_one_line_of_the_listing(tmp_path: Path) -> None:
    save_samples(torch.rand(2, 3, 4, 4), ["a red\u2028ring\non sand", "b"], tmp_path)
    assert (tmp_path / "prompts.txt").read_text().splitlines() == ["a red ring on sand", "b"]


def test_anothers_pictures_and_listing_are_no_earlier_call(tmp_path: Path) -> None:
    from torchvision.utils import save_image

    own = [tmp_path / f"{index:05d}.png" for index in (1, 2)]
    for path in own:
        save_image(torch.rand(3, 4, 4), path)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    save_samples(torch.rand(1, 3, 4, 4), PROMPTS[:1], tmp_path)
    assert all(path.is_file() for path in own)


def test_a_written_picture_is_rounded(tmp_path: Path) -> None:
    from torchvision.io import decode_image

    image = torch.rand(3, 4, 4)
    save_samples(image[None], PROMPTS[:1], tmp_path)
    assert torch.equal(decode_image(str(tmp_path / "00000.png")), (255 * image + 0.5).byte())


def test_devices_that_are_not_there_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match="there is no device 'gpu' .*choose auto, cpu, cuda"):
        pick_device("gpu")
