import errno
import io
import json
import shlex
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image as Pillow

from distill import backbones
from distill.cli import main
from distill.data.generate import make_here
from distill.data.images import EncodedImages, ImagesData, ImagesDataset, decode, resize_and_crop
from distill.data.loading import loader
from distill.data.shards import MANIFEST, LatentsDataset
from distill.errors import ConfigError, sentence_of
from distill.evaluation.evaluate import reference_images
from distill.files import read_json, save_json

COLOURS = {"red": (1.0, -1.0, -1.0), "lime": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "white": (1.0, 1.0, 1.0)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of four pictures of different sizes with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index, colour in enumerate(COLOURS):
        Pillow.new("RGB", (40 + 10 * index, 36), colour).save(folder / f"{colour}.png")
        lines.append(json.dumps({"file_name": f"{colour}.png", "text": f"a {colour} wall"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _parquet(pictures: Path, path: Path) -> Path:
    rows = {"image": [str(pictures / f"{c}.png") for c in COLOURS], "caption": [f"a {c} wall" for c in COLOURS]}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))
    data.map(lambda row: row).to_parquet(path)
    return path


def _webdataset(pictures: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for index, colour in enumerate(COLOURS):
            text = pictures / f"{colour}.txt"
            text.write_text(f"a {colour} wall")
            archive.add(pictures / f"{colour}.png", f"{index}.png")
            archive.add(text, f"{index}.txt")
    return path


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_captioned_images_of_any_kind(kind: str, pictures: Path, tmp_path: Path) -> None:
    sources = {
        "folder": lambda: pictures,
        "parquet": lambda: _parquet(pictures, tmp_path / "rows.parquet"),
        "webdataset": lambda: _webdataset(pictures, tmp_path / "rows.tar"),
    }
    data = ImagesDataset(str(sources[kind]()), 24, 32)
    batch = data.__getitems__([0, 2, 3])
    by_caption = dict(zip(batch["prompts"], batch["pixels"], strict=True))
    assert batch["pixels"].shape == (3, 3, 24, 32) and batch["unread"] == [] and len(data) == 4
    for caption, pixels in by_caption.items():
        rgb = {
            "a red wall": (1, -1, -1),
            "a blue wall": (-1, -1, 1),
            "a white wall": (1, 1, 1),
            "a green wall": (-1, 0, -1),
        }
        assert torch.allclose(pixels.mean((1, 2)), torch.tensor(rgb[caption], dtype=torch.float), atol=0.01)


def test_resize_keeps_the_aspect_and_the_centre() -> None:
    picture = torch.zeros(3, 40, 120)
    picture[:, :, 40:80] = 1
    cropped = resize_and_crop(picture, 20, 20)
    assert cropped.shape == (3, 20, 20) and (cropped > 0.8).all(), "the middle third fills the square"
    assert resize_and_crop(picture, 80, 80).shape == (3, 80, 80)


def test_images_that_cannot_be_read_are_skipped_and_named(pictures: Path) -> None:
    (pictures / "red.png").write_bytes(b"no picture")
    data = ImagesDataset(str(pictures), 16, 16)
    names = list(data.rows["text"])
    bad = names.index("a red wall")
    batch = data.__getitems__([bad])
    assert batch["prompts"] == [names[(bad + 1) % 4]]
    (told,) = batch["unread"]
    assert Path(told.partition(" (")[0]).name == "red.png" and "cannot identify image file" in told
    module = ImagesData(str(pictures), 16, 16)
    with pytest.warns(UserWarning, match=r"1 images could not be read so far .*red.png"):
        assert set(module.on_before_batch_transfer(batch, 0)) == {"pixels", "prompts"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the same image, in another epoch
        module.on_before_batch_transfer(data.__getitems__([bad]), 0)
    assert module.unread == {told}
    for colour in COLOURS:
        (pictures / f"{colour}.png").write_bytes(b"no picture")
    workers = loader(data, 2, 0, None, workers=1)
    with pytest.raises(ConfigError) as raised:
        next(iter(workers))
    assert sentence_of(raised.value).startswith(f"none of the 4 images of '{pictures}' can be read with a caption; the")
    with pytest.raises(ConfigError, match="none of the 4 images of .* can be read with a caption; the last: "):
        ImagesDataset(str(pictures), 16, 16).__getitems__([0])


def test_a_storage_that_fails_is_not_skipped_through(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the system says so, or one image after the other is not there."""
    data = ImagesDataset(str(pictures), 16, 16)

    def stale(value: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("distill.data.images._decode", stale)
    with pytest.raises(ConfigError, match=r"the storage of .* failed at .*png \(.*Stale file handle\); when"):
        data.__getitems__([0])
    monkeypatch.undo()
    monkeypatch.setattr("distill.data.images.IN_A_ROW", 2)
    for picture in pictures.glob("*.png"):
        picture.unlink()
    with pytest.raises(ConfigError, match="none of 2 images in a row of .* can be read with a caption; the last: "):
        data.__getitems__([0])


def test_images_that_cannot_be_read_are_told_of_when_they_are_encoded(
    pictures: Path, sd_folder: Path, tmp_path: Path
) -> None:
    (pictures / "red.png").write_bytes(b"no picture")
    maker = EncodedImages(backbones.load(str(sd_folder)), tmp_path / "encoded", ImagesDataset(str(pictures), 16, 16))
    with pytest.warns(UserWarning, match=r"1 images could not be read so far .*red.png.*; the next ones stand in"):
        maker.make([0, 1, 2, 3], torch.device("cpu"))


def test_encoded_images_of_other_captions_are_other_images(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    def encode() -> None:
        images = ImagesDataset(str(pictures), 16, 16)
        make_here(EncodedImages(backbones.load(str(sd_folder)), tmp_path / "encoded", images), "encoding")

    encode()
    lines = (pictures / "metadata.jsonl").read_text()
    (pictures / "metadata.jsonl").write_text(lines.replace("a red wall", "a wall in red"))
    with pytest.raises(ConfigError, match="was made with other settings .captions=.* there, .* asked"):
        encode()


def test_what_is_compared_with_is_another_split(tmp_path: Path) -> None:
    for split, colours in (("train", ["red", "blue"]), ("validation", ["white", "lime", "red"])):
        (tmp_path / split).mkdir()
        lines = []
        for colour in colours:
            Pillow.new("RGB", (16, 16), colour).save(tmp_path / split / f"{colour}.png")
            lines.append(json.dumps({"file_name": f"{colour}.png", "text": f"a {colour} wall"}))
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    data = ImagesData(str(tmp_path), 16, 16, workers=0, reference=2, batch_size=8)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, num_training_batches=1, state=SimpleNamespace(fn="validate")
    )
    data.prepare_data()
    data.setup("validate")
    (batch,) = list(data.val_dataloader())
    assert set(batch["prompts"]) < {"a white wall", "a lime wall", "a red wall"} and len(batch["prompts"]) == 2
    nothing = ImagesData(str(tmp_path), 16, 16)
    nothing.trainer = data.trainer
    nothing.setup("validate")
    with pytest.raises(ConfigError, match="there is nothing to compare with; set data.reference"):
        nothing.val_dataloader()


def test_more_images_to_compare_with_than_there_are_are_refused(pictures: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(train\) holds \d+ images, and 5000 are asked; set data.reference to"):
        ImagesDataset(str(pictures), 16, 16, count=5000)


def test_encoded_images_may_be_added_to(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    def encode(colours: list[str]) -> int:
        rows = {"image": [str(pictures / f"{c}.png") for c in colours], "caption": [f"a {c} wall" for c in colours]}
        table = Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))
        table.map(lambda row: row).to_parquet(tmp_path / "rows.parquet")
        images = ImagesDataset(str(tmp_path / "rows.parquet"), 16, 16)
        make_here(EncodedImages(backbones.load(str(sd_folder)), tmp_path / "encoded", images), "encoding")
        return len(LatentsDataset(tmp_path / "encoded"))

    colours = list(COLOURS)
    assert encode(colours[:2]) == 2
    assert encode(colours) == len(colours)
    with pytest.raises(ConfigError, match="was made with other settings .captions="):
        encode([*reversed(colours), colours[0]])


def test_a_row_that_cannot_be_used_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture too large to open, one without a caption, and one that is there with several."""
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    sizes, captions = [(30, 30), (8, 8), (8, 8), (8, 8)], [["too large"], [], ["the first", "the second"], ["another"]]
    made = []
    for index, size in enumerate(sizes):
        picture = io.BytesIO()
        Pillow.new("RGB", size, (10 * index, 0, 0)).save(picture, "png")
        made.append({"bytes": picture.getvalue(), "path": f"{index}.png"})
    features = Features({"image": Image(), "text": List(Value("string"))})
    Dataset.from_dict({"image": made, "text": captions}, features=features).to_parquet(tmp_path / "rows.parquet")
    batch = ImagesDataset(str(tmp_path / "rows.parquet"), 8, 8).__getitems__([0, 1, 2, 3])
    assert batch["prompts"] == ["the first", "the first", "the first", "another"]
    assert [told.split(" ")[0] for told in batch["unread"]] == ["0.png", "1.png", "1.png"]
    assert "exceeds limit" in batch["unread"][0]
    numbers = Dataset.from_dict(
        {"image": made, "text": [1, 2, 3, 4]}, features=Features(image=Image(), text=Value("int64"))
    )
    numbers.to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ConfigError, match="the column text of .* holds Value.* and no text; name that of the captions"):
        ImagesDataset(str(tmp_path / "numbers.parquet"), 8, 8)


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    picture = Pillow.new("RGB", (16, 8), "red")
    picture.paste("blue", (8, 0, 16, 8))  # stored lying, red on the left
    turned = Pillow.Exif()
    turned[0x0112] = 6  # to be turned by a quarter to the right: red is on top
    picture.save(tmp_path / "turned.png", exif=turned)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "turned.png", "text": "red above blue"}))
    seen = ImagesDataset(str(tmp_path), 16, 8).__getitems__([0])["pixels"][0]
    assert seen[0, 2].mean() > 0.9 and seen[0, -2].mean() < -0.9
    Pillow.new("RGB", (8, 8)).save(tmp_path / "second.png")
    reference = dict(zip(["second", "turned"], reference_images(tmp_path, (16, 8)), strict=True))
    torch.testing.assert_close(reference["turned"], seen / 2 + 0.5)


def _gradient(mode: str, path: Path) -> None:
    values = np.linspace(0, 1, 64)[None].repeat(8, 0)
    if mode == "I;16":
        Pillow.fromarray((values * 65535).astype(np.uint16)).save(path)
    else:
        Pillow.fromarray((values * 255).astype(np.uint8)).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "P"])
def test_a_picture_of_sixteen_bits_is_seen_as_one_of_eight(mode: str, tmp_path: Path) -> None:
    """In training and in a reference."""
    for name in ("one", "two"):
        _gradient(mode, tmp_path / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "text": "a gradient"}) for name in ("one", "two")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    seen = ImagesDataset(str(tmp_path), 8, 64).__getitems__([0])["pixels"][0] / 2 + 0.5
    expected = torch.linspace(0, 1, 64).expand(3, 8, 64)
    assert torch.allclose(seen, expected, atol=0.01)
    assert torch.allclose(next(reference_images(tmp_path, (8, 64))), expected, atol=0.01)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    picture = Pillow.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 4, 8))
    picture.save(tmp_path / "half.png")
    seen = decode(tmp_path / "half.png")
    assert seen[:, 0, 0].tolist() == [0, 0, 1] and seen[:, 0, 7].tolist() == [1, 1, 1]


def test_numbers_without_a_range_are_no_picture(tmp_path: Path) -> None:
    Pillow.fromarray(np.linspace(0, 9, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "depth.tiff")
    with pytest.raises(ValueError, match="does not say which number is white"):
        decode(tmp_path / "depth.tiff")


@pytest.mark.parametrize("size", [(600, 1), (1, 600)])
def test_a_line_takes_no_gigabytes(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms.v2 import functional as F

    made: list[int] = []
    resize = F.resize
    monkeypatch.setattr(F, "resize", lambda *given, **named: made.append((r := resize(*given, **named)).numel()) or r)
    line = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    assert resize_and_crop(line, 64, 64).shape == (3, 64, 64)
    assert max(made) <= 3 * 64 * 128


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_a_table_of_files_that_datasets_did_not_write(kind: str, pictures: Path, tmp_path: Path) -> None:
    files = [(pictures / f"{colour}.png").read_bytes() for colour in COLOURS]
    column = pa.array(files) if kind == "binary" else pa.array([{"bytes": file, "path": None} for file in files])
    table = pa.table({"jpg": column, "caption": [f"a {colour} wall" for colour in COLOURS]})
    pq.write_table(table, tmp_path / "rows.parquet")
    batch = ImagesDataset(str(tmp_path / "rows.parquet"), 8, 8).__getitems__([0, 1, 2, 3])
    assert batch["unread"] == [] and batch["prompts"][0] == "a red wall"
    assert batch["pixels"][0, :, 4, 4].tolist() == pytest.approx(COLOURS["red"])


def test_latents_of_other_pictures_are_not_taken(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    def encode() -> None:
        images = ImagesDataset(str(pictures), 16, 16)
        make_here(EncodedImages(backbones.load(str(sd_folder)), tmp_path / "encoded", images), "encoding")

    encode()
    encode()  # the same
    Pillow.effect_noise((200, 36), 50).save(pictures / "red.png")
    with pytest.raises(ConfigError, match="was made with other settings .pictures="):
        encode()
    manifest = read_json(tmp_path / "encoded" / MANIFEST)
    del manifest["settings"]["pictures"]
    save_json(manifest, tmp_path / "encoded" / MANIFEST)
    encode()  # of an earlier version, that does not tell


def test_latents_are_encoded_once(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    module = ImagesData(
        str(pictures), 32, 48, batch_size=2, workers=0, encoded=str(tmp_path / "encoded"), teacher=str(sd_folder)
    )
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, num_training_batches=2, state=SimpleNamespace(fn="fit")
    )
    module.prepare_data()
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["x0"].shape == (2, 4, 8, 12) and len(module.dataset) == 4
    made = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "encoded").iterdir() if file.suffix == ".arrow"}
    module.prepare_data()
    assert made == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "encoded").iterdir() if f.suffix == ".arrow"}
    images = ImagesDataset(str(pictures), 32, 48)
    expected, _ = EncodedImages(backbones.load(str(sd_folder)), tmp_path / "other", images).make(
        [1], torch.device("cpu")
    )
    stored = LatentsDataset(str(tmp_path / "encoded")).__getitems__([1])["x0"]
    assert torch.allclose(stored, expected["x0"], atol=2e-3)


def test_encoding_for_many_processes_names_the_command_that_shares_it(
    pictures: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command makes what `fit` would have made."""
    folders = tmp_path / "by fit", tmp_path / "by command"
    module = ImagesData(str(pictures), 32, 48, batch_size=2, encoded=str(folders[0]), teacher=str(sd_folder))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=2, num_training_batches=2, state=SimpleNamespace(fn="fit")
    )
    with pytest.warns(UserWarning, match="one process encodes while the others wait; all share it in: distill") as told:
        module.prepare_data()
    (said,) = (str(one.message) for one in told if "one process" in str(one.message))
    words = shlex.split(said.split(": distill ")[1])
    words[words.index("--output") + 1] = str(folders[1])
    main([*words, "--accelerator", "cpu", "--devices", "1"])
    assert f"4 latents are in {folders[1]}" in capsys.readouterr().out
    one, other = (LatentsDataset(str(folder)).__getitems__([0, 1, 2, 3]) for folder in folders)
    assert torch.equal(one["x0"], other["x0"]) and one["prompts"] == other["prompts"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module.prepare_data()


def test_every_process_tells_of_the_images_it_could_not_read(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 5)
    module = ImagesData(str(pictures), 32, 48)
    with pytest.warns(UserWarning, match="1 images could not be read so far .*red.png"):
        module.on_before_batch_transfer({"unread": ["red.png"]}, 0)


def test_what_is_no_set_of_captioned_images(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ImagesDataset(str(tmp_path / "nowhere"), 16, 16)
    with pytest.raises(ConfigError, match="need a column of images and one of captions"):
        ImagesDataset(str(pictures), 16, 16, caption="title")
    with pytest.raises(ConfigError, match="data.encoded needs data.teacher"):
        ImagesData(str(pictures), encoded="x")
