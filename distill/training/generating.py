"""The shards of a folder dealt to processes and nodes by `Trainer.predict`."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from distill.data.generate import Maker
from distill.errors import ENDED, ConfigError
from distill.progress import Advance, counted


class ShardWriter(L.LightningModule):
    """One shard per predict step; the shards are dealt to the processes in turn, and one may get none.

    Args:
        maker: makes and writes the shards.
    """

    def __init__(self, maker: Maker):
        super().__init__()
        self.maker = maker
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._advance: Advance = lambda samples: None
        self._bar = ExitStack()

    def predict_dataloader(self) -> Any:
        """This process's shards of those that one process found missing, before any began to write."""
        end_when_told(self.trainer)
        self.maker.check()
        todo = self._todo() if self.trainer.is_global_zero else []
        wait_for_all()
        mine = self.trainer.strategy.broadcast(todo)[self.trainer.global_rank :: self.trainer.world_size]
        if self.trainer.is_global_zero:
            share = f" (of process 1 of {self.trainer.world_size})" if self.trainer.world_size > 1 else ""
            self._advance = self._bar.enter_context(
                counted(self.maker.what + share, self.maker.total(mine), self.maker.what)
            )
        return DataLoader(mine, batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def _todo(self) -> list[int]:
        self.maker.begin()
        return self.maker.missing()

    def predict_step(self, shards: list[int], batch_idx: int) -> None:
        for shard in shards:
            self.maker.write(shard, self.device, self._advance)

    def close(self) -> None:
        """Ends the progress bar; a process without shards gets no call of `on_predict_end`."""
        self._bar.close()


def generate(maker: Maker, accelerator: str, devices: str, num_nodes: int) -> None:
    """Makes what is missing of a folder on all processes, then completes its manifest and says so.

    Raises:
        ConfigError: no such accelerator or devices on this machine.
    """
    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    writer = ShardWriter(maker)
    try:
        trainer.predict(writer, return_predictions=False)
    finally:
        writer.close()
    wait_for_all()
    if trainer.is_global_zero:
        maker.finish()
        print(f"{maker.count} {maker.what} are in {maker.folder}")


def end_when_told(trainer: L.Trainer) -> None:
    """Lets a SIGTERM end the process, and those it has launched: shards are written whole or not at all.

    In place of Lightning's handler, which only notes it, and waits for all processes to do so.
    """

    def end(number: int, frame: Any) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)  # type: ignore[arg-type]
        raise SystemExit(ENDED)

    signal.signal(signal.SIGTERM, end)


def wait_for_all() -> None:
    """A barrier without the half hour's limit of others: one process may have days of work more than another."""
    with _InfiniteBarrier() as barrier:
        barrier()
