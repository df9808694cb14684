import hashlib
from pathlib import Path

import pytest
import torch

from distill.files import checksum, read_json, save_json, save_tensors, written_whole


def _write_folder(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def _texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_file_takes_its_place_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with written_whole(path) as part:
        part.write_text("new")
        assert not path.exists() and part.parent == path.parent
    assert _texts(path.parent) == {"file.txt": "new"}


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert _texts(tmp_path) == {"file.txt": "old"}


def test_an_interrupted_write_leaves_the_old_folder_and_nothing_else(tmp_path):
    path = tmp_path / "student"
    _write_folder(path, weights="old", card="old")
    with pytest.raises(OSError, match="disk full"), written_whole(path) as part:
        _write_folder(part, weights="half")
        raise OSError("disk full")
    assert _texts(path) == {"weights": "old", "card": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "student"
    _write_folder(path, weights="old", stale="old")
    with written_whole(path) as part:
        _write_folder(part, weights="new")
        assert _texts(path) == {"weights": "old", "stale": "old"}
    assert _texts(path) == {"weights": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_a_link_goes_on_leading_to_what_is_written(tmp_path: Path) -> None:
    """Results on a scratch disk, say."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "student").symlink_to(tmp_path / "scratch")
    with written_whole(tmp_path / "student") as part:
        part.mkdir()
        (part / "weights").write_text("new")
    assert (tmp_path / "student").is_symlink() and (tmp_path / "scratch" / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "student"]


def test_a_writer_that_wrote_nothing_costs_nothing(tmp_path):
    folder, file = tmp_path / "student", tmp_path / "file.txt"
    _write_folder(folder, weights="old")
    file.write_text("old")
    for path in (folder, file):
        with pytest.raises(FileNotFoundError), written_whole(path):
            pass
    assert _texts(folder) == {"weights": "old"} and file.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.txt", "student"]


def test_json_comes_back_as_it_was(tmp_path):
    value = {"settings": {"steps": 4, "guidance": 0.5}, "shards": [1, None, "ü"]}
    save_json(value, tmp_path / "a" / "manifest.json")
    assert read_json(tmp_path / "a" / "manifest.json") == value


def test_tensors_come_back_as_they_were(tmp_path):
    from safetensors.torch import load_file

    tensors = {"a": torch.randn(3, 4).t().requires_grad_(), "b": torch.arange(3, dtype=torch.float16)}
    save_tensors(tensors, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert set(found) == {"a", "b"}
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)


def test_a_checksum_is_the_sha256_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 1000)
    assert checksum(tmp_path / "file") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_a_file_never_takes_a_folders_place(tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("thesis")
    with pytest.raises(IsADirectoryError, match="a file was to be written, and this is a folder.*precious"):
        save_json({}, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "thesis.txt"]
