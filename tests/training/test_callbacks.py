"""What a run keeps of itself."""

from __future__ import annotations

import io
import logging
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.cli import SaveConfigCallback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import pil_to_tensor

from distill.cli import main
from distill.data.loading import GlobalBatchSampler, ResumableLoader
from distill.files import go_on_taking
from distill.training import callbacks
from distill.training.callbacks import Checkpoint, RunMonitor, UpdatesBar
from distill.training.cli import SaveRecipe
from distill.training.ending import END, Told
from distill.training.module import DistillModule
from distill.training.storage import unfinished
from tests.runs import fit_arguments


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


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("renamed", [0, 1, 2], ids=["before", "between", "after"])
def test_a_run_killed_while_checkpoints_change_places_goes_on(
    renamed: int, resumes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, between and after the two renames of the exchange, while the old one is removed."""
    callback, trainer, last = Checkpoint(str(tmp_path)), ShardedTrainer(killed_at=0), tmp_path / "last.ckpt"
    callback._save_checkpoint(trainer, str(last))  # type: ignore[arg-type]
    left = [renamed]

    def until_killed(path: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    rename = Path.rename
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", until_killed)
        patched.setattr("distill.files.remove", Mock(side_effect=KeyboardInterrupt))
        callback._save_checkpoint(trainer, str(last))  # type: ignore[arg-type]
    if resumes:
        go_on_taking(unfinished(last), last)
        assert [file.read_text() for file in sorted(last.iterdir())] == ["1" if not renamed else "2"] * 2
    callback._save_checkpoint(trainer, str(last))  # type: ignore[arg-type]
    assert [file.read_text() for file in sorted(last.iterdir())] == ["3", "3"]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], "what the killed save left is still there"


class Numbers:
    def __len__(self) -> int:
        return 20

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


class Reader(L.LightningModule):
    """Learns nothing of note and remembers what it was given, when, and after which steps it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: list[int], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.fit_loop.total_batch_idx, self.current_epoch, batch))
        return self.weight(torch.ones(1, 1)).sum()

    def validation_step(self, batch: list[int], batch_idx: int) -> None:
        self.log("falling", -float(self.global_step), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        self.validated.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(L.Callback):
    """Stops at a step, after a batch or after a validation, as early stopping does."""

    def __init__(self, step: int, validated: bool = False):
        self.step, self.validated = step, validated

    def __str__(self) -> str:
        return f"stop {'after validation' if self.validated else ''}at {self.step}"

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= not self.validated and trainer.global_step == self.step

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= self.validated and trainer.global_step >= self.step


class EndAt(L.Callback):
    """A cluster's signal amid a step, or in the validation after it."""

    def __init__(self, step: int, signal: int = signal.SIGTERM, validated: bool = False):
        self.step, self.signal, self.validated = step, signal, validated

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name} {'in validation ' if self.validated else ''}at {self.step}"

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.validated and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int, *_: Any) -> None:
        if self.validated and (trainer.global_step, index) == (self.step, 1):
            os.kill(os.getpid(), self.signal)


def read(
    folder: Path, resume: bool = False, stop: L.Callback | None = None, kept: dict | None = None, **settings: Any
) -> tuple[Reader, Checkpoint]:
    """Fits a reader to 20 numbers in batches of 4: five to an epoch."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests run
    usual = {"save_last": True, "enable_version_counter": False}  # as the command line has it
    checkpoint = Checkpoint(str(folder), **(usual | (kept or {"every_n_train_steps": 500})))
    module = Reader()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False,
        callbacks=[checkpoint, *([stop] if stop else [])], num_sanity_val_steps=0, use_distributed_sampler=False,
        **{"max_epochs": -1, "enable_progress_bar": False, **settings},
    )  # fmt: skip
    loaders = [
        ResumableLoader(Numbers(), batch_sampler=GlobalBatchSampler(20, 4), collate_fn=list)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    with suppress(SystemExit):  # by which Lightning ends, too
        trainer.fit(
            module,
            loaders[0],
            loaders[1] if settings.get("val_check_interval") else None,
            ckpt_path=folder / "last.ckpt" if resume else None,
        )
    return module, checkpoint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validated", [{}, {"val_check_interval": 2}, {"val_check_interval": 5}], ids=["", "2", "5"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_steps": 3}, {"max_steps": 13}),
        ({"max_steps": 5}, {"max_steps": 13}),
        ({"max_steps": 3}, {"max_epochs": 3}),
        ({"max_epochs": 2}, {"max_epochs": 3}),
        ({"max_epochs": 2, "max_steps": 100}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": StopAt(3)}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": StopAt(5)}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": StopAt(4, validated=True)}, {"max_steps": 13}),
        ({"max_epochs": 3, "stop": StopAt(4, validated=True)}, {"max_epochs": 3}),
        ({"max_steps": 13, "stop": EndAt(3)}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": EndAt(4)}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": EndAt(5)}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": EndAt(10)}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": EndAt(4, signal.SIGINT)}, {"max_steps": 13}),
        ({"max_steps": 13, "stop": EndAt(4, validated=True)}, {"max_steps": 13}),
    ],
    ids=lambda how: ",".join(map(str, how.values())),
)
@pytest.mark.parametrize("kept", [{"every_n_train_steps": 500}, {"every_n_epochs": 1}], ids=["steps", "epochs"])
def test_a_run_that_ended_goes_on_where_it_was(
    first: dict, then: dict, validated: dict, kept: dict, tmp_path: Path
) -> None:
    """However it ended, and however it is prolonged: the same batches and validations as in one go."""
    if "every_n_epochs" in kept and validated == {"val_check_interval": 2} and str(first.get("stop")) == "stop at 5":
        pytest.xfail("stopped at an epoch's end and validated out of turn, Lightning saves before it counts the epoch")
    whole, _ = read(tmp_path / "whole", kept=kept, **then, **validated)
    one, _ = read(tmp_path / "parts", kept=kept, **first, **validated)
    other, _ = read(tmp_path / "parts", resume=True, kept=kept, **then, **validated)
    assert 0 < len(one.seen) and one.seen + other.seen == whole.seen
    stopped = {len(one.seen)} - set(whole.validated) if "stop" in first else set()  # Lightning validates there besides
    cut = {len(one.seen)} if isinstance(first.get("stop"), EndAt) else set()  # Lightning ends a validation, too, and
    found, expected = one.validated + other.validated, whole.validated  # does not begin it again
    assert [step for step in found if step not in stopped | cut] == [step for step in expected if step not in cut]


def test_what_a_run_was_begun_without_ears_for_it_does_not_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that puts a run in the background shields it from the terminal's Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        told = Told(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
        for number in before:
            os.kill(os.getpid(), number)
        assert told.anywhere() == END
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_slurm_wants_to_move_is_kept_and_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    about = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in about.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    plugins = [SLURMEnvironment()]
    read(tmp_path / "run", stop=EndAt(3, signal.SIGUSR1), max_steps=13, devices=1, plugins=plugins)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert told.read_text() == "requeue 7\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ({"every_n_train_steps": 5}, ["last.ckpt"]),
        ({"every_n_epochs": 1}, ["last.ckpt"]),
        ({"every_n_epochs": 1, "save_top_k": -1}, ["epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt", "last.ckpt"]),
        ({"every_n_train_steps": 5, "save_last": False}, ["epoch=1-step=10.ckpt"]),
        ({"every_n_epochs": 1, "save_last": False}, ["epoch=1-step=10.ckpt"]),
    ],
)
@pytest.mark.parametrize("validated", [{}, {"val_check_interval": 5}], ids=["", "validated"])
def test_each_checkpoint_is_written_once(
    kept: dict, found: list[str], validated: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run goes on, by steps and by epochs; the newest alone is `last.ckpt`, or named by its step."""
    written: list[tuple[int, str]] = []
    save = L.Trainer.save_checkpoint

    def saved(trainer: L.Trainer, path: Any, *rest: Any) -> None:
        written.append((trainer.global_step, Path(path).name))
        save(trainer, path, *rest)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", saved)
    read(tmp_path, max_epochs=2, kept=kept, **validated)
    assert sorted(file.name for file in tmp_path.iterdir()) == found
    assert [step for step, _ in written] == ([5, 5, 10, 10] if "save_top_k" in kept else [5, 10])


@pytest.mark.filterwarnings("ignore")
def test_the_last_step_is_kept_beside_the_best_ones(tmp_path: Path) -> None:
    """A run that ends with a validation keeps what that makes the best, and `last.ckpt` once."""
    kept = {"monitor": "falling", "every_n_epochs": 1}
    _, checkpoint = read(tmp_path, max_steps=10, val_check_interval=5, kept=kept)
    assert Path(checkpoint.best_model_path).name == "epoch=1-step=10.ckpt"
    _, checkpoint = read(tmp_path / "short", max_steps=12, val_check_interval=5, kept=kept)
    last = torch.load(tmp_path / "short" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["epoch"]) == (12, 2)
    read(tmp_path / "short", fast_dev_run=True)
    assert torch.load(tmp_path / "short" / "last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.filterwarnings("ignore")
def test_updates_are_told_in_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, lines in ((0, 7), (1000, 2)):  # each update; the first and the last
        read(tmp_path, max_steps=7, stop=UpdatesBar(seconds), enable_progress_bar=True)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update ")]
        assert len(said) == lines and said[0].startswith("update 1/7") and said[-1].startswith("update 7/7")
        assert "-2" not in "".join(said) and "v_num" not in "".join(said)


@pytest.mark.filterwarnings("ignore")
def test_the_bar_of_a_run_that_goes_on_ends_where_it_does(tmp_path: Path) -> None:
    """Of an epoch of 5 batches that stopped after 2: not at the one batch that is left, nor beyond the epoch."""
    read(tmp_path, max_steps=2)
    for last, batches in ((3, 3), (13, 5)):
        totals: list[float] = []

        class Bar(UpdatesBar):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
                totals.append(self.total_train_batches)  # noqa: B023
                super().on_train_batch_end(trainer, module, *rest)

        read(tmp_path, resume=True, max_steps=last, stop=Bar(1000), enable_progress_bar=True)
        assert totals[0] == batches


@pytest.mark.parametrize("gone", [0, 2, 5])
def test_the_bar_counts_batches_where_an_update_has_several(gone: int) -> None:
    """Ten updates of four batches, in an epoch of a thousand."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=gone))
    loop = SimpleNamespace(total_batch_idx=gone - 1, epoch_loop=SimpleNamespace(batch_progress=progress))
    module = Mock(spec=DistillModule, batches=4, begun=lambda number: number % 4)
    bar = UpdatesBar()
    bar._trainer = SimpleNamespace(  # type: ignore[assignment]
        max_steps=10, global_step=gone // 4, num_training_batches=1000, fit_loop=loop, lightning_module=module
    )
    assert bar.total_train_batches == 40


def test_epochs_without_an_end_have_none() -> None:
    bar = UpdatesBar()
    for epochs, words in ((-1, "Epoch 3"), (8, "Epoch 3/7")):
        bar._trainer = SimpleNamespace(max_epochs=epochs)  # type: ignore[assignment]
        assert bar._get_train_description(3).strip() == words


def test_speed_is_told_where_epochs_are_short() -> None:
    monitor, told = RunMonitor(every=3), []
    module = SimpleNamespace(log=lambda name, value, **_: told.append(name))
    trainer: Any = SimpleNamespace(world_size=1, optimizers=[])
    monitor.on_train_start(trainer, module)
    for batch in (0, 1, 0, 1, 0, 1):
        monitor.on_train_batch_end(trainer, module, None, {"prompts": ["a red ring"]}, batch)
    assert told.count("images/s") == 2


def test_a_run_leaves_the_saved_recipe_until_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring never does."""
    saved: list[str] = []
    monkeypatch.setattr(SaveConfigCallback, "setup", lambda self, trainer, module, stage: saved.append(stage))
    callback = SaveRecipe(None, Namespace(ckpt_path="last"))  # type: ignore[arg-type]
    for stage in ("fit", "validate", "test"):
        callback.setup(None, None, stage)  # type: ignore[arg-type]
    assert saved == []
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    assert saved == ["fit"] and callback.config.ckpt_path is None


@pytest.fixture(scope="module")
def told(
    sd3_folder: Path, sd3_latents: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EventAccumulator]:
    """Four updates of LADD's recipe with its own logger, and what TensorBoard reads of them."""
    folder = tmp_path_factory.mktemp("told")
    fall = "{start_factor: 1, end_factor: 0, total_iters: 4}"
    rates = f"{{class_path: torch.optim.lr_scheduler.LinearLR, init_args: {fall}}}"
    options = {"trainer__logger": None, "trainer__logger__save_dir": None, "monitor__every": 1, "samples__every": 2}
    options |= {"trainer__max_steps": 4, "model__student_schedule": rates, "model__student_optimizer__lr": 1e-3}
    with pytest.MonkeyPatch.context() as here:
        here.setattr(torch.cuda, "is_available", lambda: False)  # whose memory would be told
        main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, folder, **options))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return folder, events


def _values(events: EventAccumulator, name: str) -> list[float]:
    """Of one curve, which has a point at each of the four updates."""
    assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
    return [event.value for event in events.Scalars(name)]


def test_tensorboard_has_the_curves_of_both_players(told: tuple[Path, EventAccumulator]) -> None:
    _, events = told
    curves = {name: _values(events, f"critic/LatentAdversarial/{name}") for name in ("D(real)", "D(fake)", "game")}
    loss = _values(events, "student/LatentAdversarial")
    assert all(value != 0 and abs(value) < 1e3 for curve in [*curves.values(), loss] for value in curve)
    assert curves["D(real)"] != curves["D(fake)"]
    for player in ("student", "critic"):
        assert all(value > 0 for value in _values(events, f"{player}/gradient_norm"))


def test_a_grid_is_painted_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve pictures at once would be decoded beside everything that training keeps in memory."""
    sizes: list[int] = []

    def paint(prompts: list[str], seed: int = 0, batch_size: int = 64) -> torch.Tensor:
        sizes.append(batch_size)
        return torch.zeros(len(prompts), 3, 4, 4)

    monkeypatch.setattr(callbacks, "painters", lambda module, steps: {1: paint})
    trainer = SimpleNamespace(is_global_zero=False)
    module = SimpleNamespace(inputs=SimpleNamespace(counts=lambda asked: (1,)))
    for grid in (callbacks.SampleGrid(), callbacks.SampleGrid(batch_size=2)):
        grid.paint(trainer, module)  # type: ignore[arg-type]
    assert sizes == [4, 2]


def test_tensorboard_has_rates_speed_and_memory(told: tuple[Path, EventAccumulator]) -> None:
    _, events = told
    falling = [1e-3 * (1 - update / 4) for update in (1, 2, 3, 4)]  # as they are after each update
    assert _values(events, "student/learning_rate") == pytest.approx(falling, abs=1e-9)
    assert _values(events, "critic/learning_rate") == pytest.approx([5e-5] * 4), "the recipe's"
    peaks = _values(events, "peak_memory_GiB")
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of kB
    assert peaks == sorted(peaks) and 0.05 < peaks[0] and peaks[-1] <= now * 1.001
    first, *_, last = (event.wall_time for event in events.Scalars("images/s"))
    seconds = [16 / speed for speed in _values(events, "images/s")]  # of the 16 images of each update
    assert sum(seconds[1:]) == pytest.approx(last - first, abs=1)


def test_tensorboard_has_the_grids_that_lie_in_the_folder(told: tuple[Path, EventAccumulator]) -> None:
    folder, events = told
    (name,) = events.Tags()["images"]
    assert name == "samples/steps_1_2_4" and [event.step for event in events.Images(name)] == [2, 4]
    for event in events.Images(name):
        shown = pil_to_tensor(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
        kept = pil_to_tensor(Image.open(folder / "samples" / f"step-{event.step:06d}.png"))
        assert shown.shape == kept.shape and (shown.int() - kept.int()).abs().max() <= 1  # one rounds, one cuts off
        assert shown.float().std() > 10
