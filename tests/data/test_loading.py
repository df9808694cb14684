import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch

from distill.data.images import ImagesData
from distill.data.latents import EncodedShapesData, LatentsData
from distill.data.loading import GlobalBatchSampler, batches, loader
from distill.data.shapes_data import ShapesData
from distill.errors import ConfigError
from distill.training.callbacks import Checkpoint


class Indices:
    """A data set that answers with what it was asked."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"indices": indices}


def _seen(data) -> list[list[int]]:
    return [batch["indices"] for batch in data]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("epoch", [0, 3])
def test_any_number_of_ranks_deals_the_same_global_batches(ranks, training, epoch):
    def deal(rank: int, world: int) -> list[list[int]]:
        sampler = GlobalBatchSampler(52, 8, seed=5, rank=rank, world_size=world, training=training)
        sampler.set_epoch(epoch)
        return list(sampler)

    shares = zip(*(deal(rank, ranks) for rank in range(ranks)), strict=True)
    assert [sum(parts, []) for parts in shares] == deal(0, 1)


def test_one_process_of_all_nodes_makes_what_is_missing() -> None:
    """Of all data that can be missing."""
    every = (LatentsData("", ""), EncodedShapesData("", ""), ImagesData(""))
    assert not any(data.prepare_data_per_node for data in every)


def test_an_epoch_deals_every_sample_at_most_once_and_drops_the_last_incomplete_batch():
    sampler = GlobalBatchSampler(50, 8)
    dealt = list(sampler)
    assert len(sampler) == len(dealt) == 6
    assert all(len(batch) == 8 for batch in dealt)
    flat = sum(dealt, [])
    assert len(set(flat)) == 48 and set(flat) <= set(range(50))


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = GlobalBatchSampler(64, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert order(1, 1) == orders[-1]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert sum(orders[0], []) != list(range(64))


def test_where_nothing_is_trained_all_samples_come_in_their_own_order():
    sampler = GlobalBatchSampler(10, 4, seed=3, training=False)
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and len(sampler) == 3
    second = GlobalBatchSampler(10, 4, seed=3, rank=1, world_size=2, training=False)
    assert list(second) == [[2, 3], [6, 7], [9]]


@pytest.mark.parametrize(("asked", "batch_size"), [(10, 4), (3, 8), (2, 2)])
def test_as_many_images_are_compared_as_are_asked_for(asked: int, batch_size: int) -> None:
    data = ShapesData(batch_size=batch_size, reference=asked)
    assert sum(len(batch["prompts"]) for batch in data.val_dataloader()) == asked


@pytest.mark.parametrize(("asked", "world"), [(1, 1), (9, 2)])
def test_references_that_cannot_be_compared_are_refused(asked: int, world: int) -> None:
    data = ShapesData(batch_size=4, reference=asked)
    data.trainer = SimpleNamespace(world_size=world, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=f"2 or more that divides by the processes, .* are {world}; got {asked}"):
        data.val_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"length": 50, "batch_size": 6, "world_size": 4},
            "a positive multiple of their number, 4; got 6",
        ),
        ({"length": 50, "batch_size": 0}, "a positive multiple of their number, 1; got 0"),
        ({"length": 5, "batch_size": 8}, "data.batch_size is 8, but the data set holds only 5 samples"),
    ],
)
def test_batches_that_cannot_be_dealt_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GlobalBatchSampler(**settings)


def test_lightning_gives_every_epoch_its_own_order():
    data, orders = loader(Indices(64), 8, 0, None), []
    for epoch in range(3):
        _set_sampler_epoch(data, epoch)
        orders.append(_seen(data))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    sampler = GlobalBatchSampler(64, 8, 0)
    sampler.set_epoch(2)
    assert orders[2] == list(sampler)


@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (0, 2), (2, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("kept", [1, 3, 4])
def test_a_resumed_loader_goes_on_where_the_state_was_kept_with_any_number_of_workers(workers, kept):
    def two_epochs(state_after: int) -> tuple[list[list[int]], dict[str, Any]]:
        data, seen, state = loader(Indices(16), 4, 0, None, workers[0]), [], {}
        for epoch in (1, 2):
            _set_sampler_epoch(data, epoch)
            iterator = iter(data)
            for _ in range(len(data)):  # Lightning does not ask for one more
                seen.append(next(iterator)["indices"])
                if len(seen) == state_after:
                    state = data.state_dict()
        return seen, state

    unbroken, state = two_epochs(kept)
    resumed = loader(Indices(16), 4, 0, None, workers[1])
    resumed.load_state_dict(state)
    rest = list(iter(resumed))
    first = 2 if kept == 4 else 1
    for epoch in range(first + 1, 3):
        _set_sampler_epoch(resumed, epoch)
        rest += list(resumed)
    assert _seen(rest) == unbroken[kept:]


class Groups(Indices):
    """Answers with the process group that it is asked in."""

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"group": os.getpgid(0)}


def test_what_tells_a_run_to_end_does_not_end_its_workers_first():
    """A terminal's Ctrl-C goes to a process group."""
    (alone,), (worker,) = (list(loader(Groups(4), 4, 0, None, workers)) for workers in (0, 1))
    assert alone["group"] == os.getpgid(0) != worker["group"]


def test_a_loader_resumed_twice_in_an_epoch_knows_where_it_is():
    states, seen = [{"epoch": 1, "dealt": 0}], []
    for taken in (1, 2, 1):
        data = loader(Indices(20), 4, 0, None)
        data.load_state_dict(states[-1])
        iterator = iter(data)
        seen += [next(iterator)["indices"] for _ in range(taken)]
        states.append(data.state_dict())
    sampler = GlobalBatchSampler(20, 4, 0)
    sampler.set_epoch(1)
    assert seen == list(sampler)[:4] and [state["dealt"] for state in states] == [0, 1, 3, 4]


@pytest.mark.parametrize(("size", "begins"), [(4, 3), (8, 1), (2, 6), (6, 2)])
def test_a_loader_resumed_with_other_batches_loses_no_sample(size, begins):
    """Of a batch that was begun, what is seen is seen again."""
    data = loader(Indices(48), 4, 0, None)
    iterator = iter(data)
    for _ in range(3):
        next(iterator)
    resumed = loader(Indices(48), size, 0, None)
    resumed.load_state_dict(data.state_dict())
    assert _seen(list(resumed)) == list(GlobalBatchSampler(48, size, 0))[begins:]


class Seen(L.LightningModule):
    """Learns nothing of note and remembers what it was given."""

    def __init__(self, batch_size: int):
        super().__init__()
        self.weight, self.batch_size = torch.nn.Parameter(torch.zeros(1)), batch_size
        self.seen: list[tuple[int, list[int]]] = []

    def train_dataloader(self) -> Any:
        return loader(Indices(64), self.batch_size, 0, self.trainer)

    def training_step(self, batch: dict[str, list[int]], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["indices"]))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("size", "first"), [(8, 2), (4, 5), (2, 10)])
def test_an_epoch_gone_on_with_in_other_batches_is_gone_through(size: int, first: int, tmp_path: Path) -> None:
    """Lightning, too, has to know how many batches are left of it."""
    usual: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": -1}
    usual |= {"enable_model_summary": False, "use_distributed_sampler": False, "enable_checkpointing": False}
    kept = [Checkpoint(str(tmp_path), save_last=True, enable_version_counter=False)]
    L.Trainer(max_steps=5, callbacks=kept, **(usual | {"enable_checkpointing": True})).fit(Seen(4))  # type: ignore[arg-type]
    again, sampler = Seen(size), GlobalBatchSampler(64, size, 0)
    L.Trainer(max_steps=5 + len(sampler) - first + 1, **usual).fit(again, ckpt_path=tmp_path / "last.ckpt")
    expected = [(0, batch) for batch in list(sampler)[first:]]
    sampler.set_epoch(1)
    assert again.seen == [*expected, (1, next(iter(sampler)))]


def test_an_epoch_that_the_trainer_cuts_short_is_over_when_it_says_so():
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1, num_training_batches=3)
    data = loader(Indices(24), 4, 0, trainer)
    iterator = iter(data)
    for _ in range(3):
        next(iterator)
    assert data.state_dict() == {"epoch": 1, "dealt": 0, "batch_size": 4}


def test_the_place_an_earlier_version_kept_is_refused():
    with pytest.raises(ConfigError, match="as an earlier version did; begin a new run"):
        loader(Indices(24), 4, 0, None).load_state_dict({"_iterator_finished": False, "epoch": 0})


def test_indices_are_cut_into_lists():
    assert list(batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches([], 3)) == []
