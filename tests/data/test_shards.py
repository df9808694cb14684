import errno
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.data.shards import MANIFEST, LatentsDataset, shard_name, write_shard
from distill.errors import ConfigError
from distill.files import save_json

SETTINGS = {"teacher": "tiny@123", "steps": 4}


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(7, 4, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompts() -> list[str]:
    return [f"prompt {i}, ünïcode" for i in range(7)]


@pytest.fixture
def folder(tmp_path, latents, prompts) -> Path:
    """Seven latents in shards of four and three."""
    for index, part in enumerate((slice(0, 4), slice(4, 7))):
        write_shard(tmp_path / shard_name(index), {"x0": latents[part]}, prompts[part])
    _manifest(tmp_path, True)
    return tmp_path


def _manifest(folder: Path, complete: bool) -> None:
    shards = {shard_name(index): "checksum" for index in range(2)} if complete else {}
    save_json({"settings": SETTINGS, "complete": complete, "shards": shards}, folder / MANIFEST)


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5, 6], [6, 0, 4, 3], [5]])
def test_latents_come_back_as_they_were_written(folder, latents, prompts, indices):
    dataset = LatentsDataset(folder)
    batch = dataset.__getitems__(indices)
    assert len(dataset) == 7
    assert torch.equal(batch["x0"], latents.half().float()[indices])
    assert batch["prompts"] == [prompts[index] for index in indices]


def test_everything_stored_comes_back(tmp_path, latents, prompts):
    stored = {"x0": latents, "noise": latents + 1, "cond.text": torch.randn(7, 3, 5), "cond.pooled": torch.randn(7, 6)}
    write_shard(tmp_path / shard_name(0), stored, prompts)
    save_json({"settings": {}, "complete": True, "shards": {shard_name(0): ""}}, tmp_path / MANIFEST)
    batch = LatentsDataset(tmp_path).__getitems__([6, 1])
    assert set(batch) == {*stored, "prompts"}
    for name, tensor in stored.items():
        assert torch.equal(batch[name], tensor.half().float()[[6, 1]])


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, latents, prompts, monkeypatch):
    from datasets.arrow_writer import ArrowWriter

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ArrowWriter, "finalize", full)
    with pytest.raises(ConfigError, match="the disk is full at .*; make room and run the same command again"):
        write_shard(tmp_path / shard_name(0), {"x0": latents}, prompts)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_is_refused_when_read(folder):
    (folder / shard_name(1)).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="has a damaged shard; run the command that makes it again"):
        LatentsDataset(folder)


def test_low_precision_latents_can_be_written(tmp_path, latents, prompts):
    write_shard(tmp_path / shard_name(0), {"x0": latents.bfloat16()}, prompts)
    save_json({"settings": {}, "complete": True, "shards": {shard_name(0): ""}}, tmp_path / MANIFEST)
    batch = LatentsDataset(tmp_path).__getitems__(list(range(7)))
    assert torch.equal(batch["x0"], latents.bfloat16().half().float())


def test_the_settings_can_be_read_before_the_folder_is_finished(tmp_path):
    _manifest(tmp_path, False)
    assert LatentsDataset.read_settings(tmp_path) == SETTINGS


def test_an_unfinished_folder_is_refused(folder):
    _manifest(folder, False)
    with pytest.raises(ConfigError, match=f"'{folder}' is not finished; run the command that makes it again"):
        LatentsDataset(folder)


def test_a_folder_that_lost_a_shard_is_refused(folder):
    (folder / shard_name(1)).unlink()
    with pytest.raises(ConfigError, match=f"lacks {shard_name(1)}; run the command"):
        LatentsDataset(folder)


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_folder_without_latents_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"no latents at '.*': it has no {MANIFEST}"):
        LatentsDataset(tmp_path / name)


def test_a_shard_that_fails_leaves_nothing(tmp_path, latents):
    with pytest.raises(Exception, match="expected length|lengths|same"):
        write_shard(tmp_path / shard_name(0), {"x0": latents}, ["too few"])
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_share_of_captions_is_emptied(tmp_path):
    count = 1000
    write_shard(tmp_path / shard_name(0), {"x0": torch.zeros(count, 1, 1, 1)}, ["caption"] * count)
    save_json({"settings": {}, "complete": True, "shards": {shard_name(0): ""}}, tmp_path / MANIFEST)

    def emptied(share: float) -> list[int]:
        prompts = LatentsDataset(tmp_path, share).__getitems__(list(range(count)))["prompts"]
        assert set(prompts) <= {"", "caption"}
        return [index for index, prompt in enumerate(prompts) if not prompt]

    assert emptied(0.0) == []
    assert len(emptied(0.1)) / count == pytest.approx(0.1, abs=0.03)
    assert emptied(0.1) == emptied(0.1)
    assert len(emptied(1.0)) == count


def test_shards_sort_in_their_order():
    names = [shard_name(index) for index in (0, 9, 10, 123456)]
    assert sorted(names) == names and len(set(names)) == 4
