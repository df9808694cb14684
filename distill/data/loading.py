"""How batches are dealt: one seeded order of the whole data set, the same global batch for any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import lightning as L
import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from distill.errors import ConfigError


class SharedFolders(L.LightningDataModule):
    """Data in a folder that all nodes share: one process makes what is missing."""

    batch_size: int

    def __init__(self) -> None:
        super().__init__()
        self.prepare_data_per_node = False

    def check_batch_size(self) -> None:
        """As the function, for the processes of this run."""
        check_batch_size(self.batch_size, self.trainer.world_size if self.trainer is not None else 1)


def check_batch_size(batch_size: int, world_size: int) -> None:
    """Refuses batches that cannot be dealt, before the data for them are made.

    Raises:
        ConfigError: a batch of nothing, or one that does not divide by the processes.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"data.batch_size counts the samples over all processes and must be a positive multiple of their number, "
            f"{world_size}; got {batch_size}"
        )


class Compared:
    """Data that `validate` and `test` compare the student's images with.

    Attributes:
        reference: what they are compared with; of length 0 where there is nothing.
        batch_size, seed: as of training.
    """

    reference: BatchedDataset
    batch_size: int
    seed: int
    trainer: L.Trainer | None

    def val_dataloader(self) -> Any:
        if not len(self.reference):
            if self.trainer is not None and self.trainer.state.fn == "fit":
                return []
            raise ConfigError("there is nothing to compare with; set data.reference to a number of images")
        world = self.trainer.world_size if self.trainer is not None else 1
        if len(self.reference) < 2 or len(self.reference) % world:
            raise ConfigError(
                f"data.reference is a number of images of 2 or more that divides by the processes, of which there are "
                f"{world}; got {len(self.reference)}"
            )
        size = min(self.batch_size, len(self.reference))
        return loader(self.reference, size, self.seed, self.trainer, training=False)

    test_dataloader = val_dataloader


class BatchedDataset(Protocol):
    """A data set that answers a list of indices with one collated batch: a dict of tensors `[B, ...]` and lists."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> dict[str, Any]: ...


class GlobalBatchSampler(Sampler[list[int]]):
    """Deals batch after batch of one seeded permutation per epoch; each rank gets its contiguous part of every batch.

    Lightning's own `DistributedSampler` deals other batches to two ranks than to one; this one does not, so runs on
    one process, DDP and FSDP2 can be compared number by number. The last incomplete batch of an epoch is dropped in
    training.

    Args:
        length: samples in the data set.
        batch_size: samples of one batch over all ranks.
        seed: of the order.
        rank, world_size: this process among those that train on different data.
        training: False deals the whole data set in its own order, the last batch incomplete.

    Raises:
        ConfigError: a batch that does not divide by the ranks, or is larger than the data set.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, training: bool = True
    ):
        check_batch_size(batch_size, world_size)
        if length < batch_size:
            raise ConfigError(
                f"data.batch_size is {batch_size}, but the data set holds only {length} samples; "
                f"set data.batch_size to {length} or less, or add data"
            )
        self.length, self.batch_size, self.seed, self.training = length, batch_size, seed, training
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self.begin = 0  # the batch that the next epoch that is dealt begins with: a resumed one does within

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Itself: Lightning looks for `set_epoch` on the sampler of a batch sampler, not on the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch, resumed ones included."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size if self.training else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator) if self.training else torch.arange(self.length)
        begin, self.begin = self.begin, 0
        for batch in range(begin, len(self)):
            dealt = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            share = len(dealt) // self.world_size
            yield dealt[self.rank * share : (self.rank + 1) * share].tolist()


class ResumableLoader(StatefulDataLoader):
    """A loader whose state is the epoch and the number of its batches that were dealt, of which size.

    The order is a function of the epoch, so nothing more is needed, whatever the number of workers; torchdata's own
    state fits its number only. With batches of another size a run goes on at the first that holds a sample not seen.
    Right after an epoch's last batch the state is the beginning of the next epoch: a run resumed from there would go
    through an empty one otherwise.
    """

    batch_sampler: GlobalBatchSampler
    trainer: L.Trainer | None = None  # which may end an epoch before the data do
    _dealt_before = 0  # batches of this epoch that an earlier run was dealt

    def __iter__(self) -> Any:
        self._dealt_before = self.batch_sampler.begin
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        dealt = self._dealt_before + (self._iterator._num_yielded if self._iterator is not None else 0)
        last = min(len(self.batch_sampler), self.trainer.num_training_batches if self.trainer else len(self))
        over = dealt >= last
        size = self.batch_sampler.batch_size
        return {"epoch": self.batch_sampler.epoch + over, "dealt": 0 if over else dealt, "batch_size": size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "dealt" not in state_dict:
            raise ConfigError(
                "the checkpoint keeps its place in the data as an earlier version did; begin a new run with its "
                "student (model.student_init)"
            )
        self.batch_sampler.set_epoch(state_dict["epoch"])
        seen = state_dict["dealt"] * state_dict.get("batch_size", self.batch_sampler.batch_size)
        self.batch_sampler.begin = seen // self.batch_sampler.batch_size
        if self.trainer is not None:  # Lightning ends an epoch after as many batches as it has
            gone = self.trainer.fit_loop.epoch_loop.batch_progress.current
            for what in ("ready", "started", "processed", "completed"):
                setattr(gone, what, getattr(gone, what) + self.batch_sampler.begin - state_dict["dealt"])


def _as_is(batch: Any) -> Any:
    return batch


def _apart(worker: int) -> None:
    """A process group of its own for a worker: a Ctrl-C, or what else is sent to the run's group, would end it before
    the run's last batch is through. It ends with the run.
    """
    os.setpgid(0, 0)


def loader(
    dataset: BatchedDataset,
    batch_size: int,
    seed: int,
    trainer: L.Trainer | None,
    workers: int = 0,
    training: bool = True,
    collate: Callable[[Any], Any] = _as_is,
) -> StatefulDataLoader:
    """A loader whose position goes into the checkpoint, so that a resumed run continues mid-epoch."""
    rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    sampler = GlobalBatchSampler(len(dataset), batch_size, seed, rank, world, training)
    made = ResumableLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_apart,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    made.trainer = trainer
    return made


def batches(indices: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """`indices` in consecutive lists of at most `batch_size`."""
    for start in range(0, len(indices), batch_size):
        yield list(indices[start : start + batch_size])
