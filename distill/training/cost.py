"""What a training cost: images, network evaluations by role, time, memory (arXiv 2405.05967, Tables 6 and 7)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from distill.files import save_json
from distill.training.callbacks import peak_memory
from distill.training.module import DistillModule

ROLES = ("student", "target", "teacher", "critic", "decoder")


class TrainingCost(L.Callback):
    """Counts what the training steps do and keeps the sums in every checkpoint and in `cost.json` of the run's folder.

    An evaluation is one sample through one network: a guided teacher costs two, a critic that reads real and fake two;
    `target` is the student's moving average that consistency distillation asks. Only what leads to the weights at hand
    is counted: a run that was killed and goes on from a checkpoint forgets what came after it. Time is that of training
    steps; waiting for data, sampling and validation on the way are left out. Peak memory is that of the whole process.
    Sums are over all processes, which do the same, and stay right where a run goes on with another number of them.
    """

    def __init__(self) -> None:
        self.evaluations = dict.fromkeys(ROLES, 0)
        self.images, self.wall, self.device, self.peak = 0, 0.0, 0.0, 0
        self.processes = 1
        self._counting, self._since, self._decoded = False, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": dict(self.evaluations), "images": self.images, "wall": self.wall, "device": self.device,
                "peak": self.peak}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluations, self.images = dict(state["evaluations"]), state["images"]
        self.wall, self.device, self.peak = state["wall"], state["device"], state["peak"]

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.processes = trainer.world_size
        if isinstance(module, DistillModule):
            for role, network in _networks(module):
                network.register_forward_pre_hook(self._counter(role), with_kwargs=True)

    def _counter(self, role: str) -> Any:
        def count(network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._counting and (first := next(_tensors([*inputs, *named.values()]), None)) is not None:
                self.evaluations[role] += self.processes * len(first)

        return count

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if isinstance(module, DistillModule):
            self._counting, self._since, self._decoded = True, time.perf_counter(), module.decoded

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._counting:
            return
        self._counting = False
        seconds = time.perf_counter() - self._since
        self.evaluations["decoder"] += self.processes * (module.decoded - self._decoded)
        self.wall, self.device = self.wall + seconds, self.device + self.processes * seconds
        self.images += self.processes * len(batch["prompts"])
        self.peak = max(self.peak, peak_memory())

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero and isinstance(module, DistillModule):
            save_json(self.summary(), Path(trainer.default_root_dir) / "cost.json")

    def summary(self) -> dict[str, Any]:
        """The sums; `peak_GiB` is of one process."""
        return {
            "images": self.images,
            "evaluations": dict(self.evaluations),
            "wall_seconds": round(self.wall, 2),
            "device_seconds": round(self.device, 2),
            "peak_GiB": round(self.peak / 2**30, 3),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }


def _networks(module: DistillModule) -> Iterator[tuple[str, nn.Module]]:
    assert module.student is not None
    yield "student", module.student
    if module.target is not None:
        yield "target", module.target
    yield "teacher", module.teacher.network
    for critic in module.critics:
        yield "critic", critic


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
