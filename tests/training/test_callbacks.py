"""What a run keeps of itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.training.callbacks import Checkpoint


class ShardedTrainer:
    """A trainer under FSDP2, as far as a checkpoint callback asks it; it is killed within the save it is told to."""

    is_global_zero, loggers, global_step = True, (), 3

    def __init__(self, killed_at: int):
        self.strategy = SimpleNamespace(_save_distributed_checkpoint=True, barrier=lambda: None)
        self.saves, self.killed_at = 0, killed_at

    def save_checkpoint(self, path: str, weights_only: bool) -> None:
        self.saves += 1
        Path(path).mkdir()
        (Path(path) / "shard-0").write_text(str(self.saves))
        if self.saves == self.killed_at:
            raise KeyboardInterrupt
        (Path(path) / "shard-1").write_text(str(self.saves))


def test_sharded_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    callback, trainer, last = Checkpoint(str(tmp_path)), ShardedTrainer(killed_at=2), tmp_path / "last.ckpt"
    callback._save_checkpoint(trainer, str(last))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        callback._save_checkpoint(trainer, str(last))  # type: ignore[arg-type]
    assert [file.read_text() for file in sorted(last.iterdir())] == ["1", "1"], "the earlier checkpoint was spoilt"
    callback._save_checkpoint(trainer, str(last))  # type: ignore[arg-type]
    assert [file.read_text() for file in sorted(last.iterdir())] == ["3", "3"]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], "what the killed save left is still there"
    assert callback._last_checkpoint_saved == str(last)
