"""What a run shows of itself: image grids, speed and memory, and metrics against drawn images."""

from __future__ import annotations

import copy
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from torch import nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from distill.data import shapes
from distill.diffusion.denoiser import Denoiser
from distill.errors import ConfigError, at_least_one, check_seeds, none_or_more
from distill.evaluation.metrics import Alignment, ClipScore, FidShapes, as_written, inception_fid
from distill.files import aside, go_on_taking, remove, take_place
from distill.frozen import Frozen
from distill.inference import Painter, grid, save_png
from distill.training.ending import Told, end
from distill.training.module import DistillModule
from distill.training.storage import WholeFiles, unfinished


class SampleGrid(L.Callback):
    """Images of the same prompts and noise, one row per number of steps, to TensorBoard and as PNG files.

    Args:
        prompts: what is painted; shapes captions if not given.
        steps: numbers of student steps; those of 1, 2 and 4 that it has levels for if not given.
        every: student updates between two grids; 0 for none.
        folder: where the PNG files go; `samples` under the trainer's default_root_dir if not given.
        scale: enlargement of each pixel.
        batch_size: images per call; the autoencoder decodes in float32 beside all that training keeps in memory.

    Raises:
        ConfigError: numbers that are none, or an empty list.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        steps: tuple[int, ...] | None = None,
        every: int = 500,
        folder: str | None = None,
        scale: int = 2,
        batch_size: int = 4,
    ):
        none_or_more(**{"samples.every": every})
        at_least_one(**{"samples.scale": scale, "samples.batch_size": batch_size})
        for name, given in (("prompts", prompts), ("steps", steps)):
            if given is not None and not given:
                raise ConfigError(
                    f"samples.{name} is empty; leave it out for the usual ones, or set samples.every to 0"
                )
        self.prompts = prompts or shapes.captions(seed=2, indices=range(12))
        self.steps, self.every, self.folder, self.scale, self.batch_size = steps, every, folder, scale, batch_size
        self._last = -1

    def check(self, module: DistillModule) -> None:
        """Refuses numbers of steps that the student will not have.

        Raises:
            ConfigError: one of them has no levels.
        """
        if self.every:
            for n in self._counts(module):
                module.inputs.visited(n)

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        if stage == "fit":
            self.check(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if self.every and step and step % self.every == 0 and step != self._last:
            self._last = step
            self.paint(trainer, module)

    def paint(self, trainer: L.Trainer, module: DistillModule) -> None:
        """Paints one grid; every process takes part, the first one writes."""
        counts = self._counts(module)
        rows = [painter(self.prompts, batch_size=self.batch_size) for painter in painters(module, counts).values()]
        if not trainer.is_global_zero:
            return
        names = [f"{count} step{'s' * (count > 1)}" for count in counts]
        picture = grid(torch.cat(rows), len(self.prompts), self.scale, names)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "samples")
        save_png(picture, folder / f"step-{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples/steps_" + "_".join(map(str, counts)), picture, trainer.global_step)

    def _counts(self, module: Any) -> tuple[int, ...]:
        return self.steps or module.inputs.counts((1, 2, 4))


class Evaluation(L.Callback):
    """How near the student's images are to the reference and to their captions, at some numbers of steps, during
    validation and test: `fid_shapes` and `alignment` where the reference is drawn; `fid_inception` and, if asked for,
    `clip_score` where it is real images.

    Args:
        steps: numbers of student steps; those of 1 and 4 that it has levels for if not given.
        seed: of the images' noise.
        inception: Inception weight file; downloaded if not given.
        clip: open_clip model for the CLIP score as `ARCHITECTURE:WEIGHTS`, such as `ViT-g-14:laion2b_s34b_b88k`; none
            if not given.
        batch_size: images per call, as in `SampleGrid`.

    Raises:
        ConfigError: a seed or a number that is none.
    """

    def __init__(
        self,
        steps: tuple[int, ...] | None = None,
        seed: int = 0,
        inception: str | None = None,
        clip: str | None = None,
        batch_size: int = 4,
    ):
        check_seeds(**{"evaluation.seed": seed})
        at_least_one(**{"evaluation.batch_size": batch_size})
        self.steps, self.seed, self.inception, self.clip, self.batch_size = steps, seed, inception, clip, batch_size
        self.opened: dict[str, Metric] = {}  # once in a run, and never updated

    def on_validation_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        self.painters = painters(module, self.steps or module.inputs.counts((1, 4)))
        self.metrics: dict[int, dict[str, Metric]] = {}
        self.seen = 0  # images, by all processes

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        real, prompts = batch["pixels"] / 2 + 0.5, batch["prompts"]
        if not self.metrics:
            self.opened = self.opened or self._open("attributes" in batch)
            self.metrics = {n: _copies(self.opened, module.device) for n in self.painters}
        first = self.seen + trainer.global_rank * len(prompts)
        self.seen += trainer.world_size * len(prompts)
        for n, metrics in self.metrics.items():
            images = self.painters[n](prompts, self.seed + first, self.batch_size).to(module.device)
            for metric in metrics.values():
                if isinstance(metric, FidShapes):
                    metric.update(real, real=True)
                    metric.update(images, real=False)
                elif isinstance(metric, FrechetInceptionDistance):
                    metric.update(as_written(real), real=True)
                    metric.update(as_written(images), real=False)
                else:
                    metric.update(images, prompts)

    def _open(self, drawn: bool) -> dict[str, Metric]:
        if drawn:
            return {"fid_shapes": FidShapes(), "alignment": Alignment()}
        found = {"fid_inception": inception_fid(self.inception)}
        return found | ({"clip_score": ClipScore(*self.clip.split(":", 1))} if self.clip else {})

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        for n, metrics in self.metrics.items():
            values = {f"{name}/steps_{n}": metric.compute().float() for name, metric in metrics.items()}
            module.log_dict(values, sync_dist=False)
        self.metrics = {}
        for metric in self.opened.values():  # training has the accelerator's memory to itself
            metric.cpu()

    def on_test_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        self.on_validation_epoch_start(trainer, module)

    def on_test_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        self.on_validation_batch_end(trainer, module, *rest)

    def on_test_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self.on_validation_epoch_end(trainer, module)


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, which also keeps the last step of a run that ends between two checkpoints.

    A checkpoint is renamed when it is whole: a run that is killed while it writes `last.ckpt` can be continued from the
    one before. A sharded one is a folder that all processes write to; a run that is killed while the old and the new
    change places is continued from the new one.

    A Ctrl-C or SIGTERM, to whichever process, ends a run after the batch of training or validation they are at, and
    with `save_last` the last update is kept. So does the signal of Slurm that asks to be requeued (SIGUSR1, where
    Lightning's Slurm environment is used); the job then is. A second Ctrl-C ends at once.

    Args:
        overwrite: whether a new run may take the place of another in its folder; `distill fit` looks at it.
        enable_version_counter: whether a run begun anew gives its checkpoints other names than those of the run before,
            whose `last.ckpt` stays.
        args, options: as of `ModelCheckpoint`.
    """

    def __init__(self, *args: Any, overwrite: bool = False, enable_version_counter: bool = False, **options: Any):
        super().__init__(*args, enable_version_counter=enable_version_counter, **options)  # type: ignore[misc]
        self.overwrite = overwrite
        self._told: Told | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._told = None
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's usual one
            trainer.strategy.checkpoint_io = WholeFiles()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A resumed run does not save the step it begins with again, amid the batches of its next update."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        self._listen(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step != trainer.max_steps:  # a run that ends anyway does
            self._end_if_told(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *rest: Any) -> None:
        super().on_validation_batch_end(trainer, pl_module, *rest)
        self._end_if_told(trainer, pl_module)

    def _listen(self, trainer: L.Trainer) -> None:
        """The last of a run's checkpoints does, for all of them."""
        if self._told is None and _ours(trainer)[-1] is self:
            self._told = Told(trainer)

    def _end_if_told(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._told is None or not (told := self._told.anywhere()):
            return
        self._told = None
        if not trainer.sanity_checking:
            for checkpoint in _ours(trainer):
                checkpoint.on_train_end(trainer, pl_module)
        end(told, requeues=trainer.is_global_zero)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            super()._save_checkpoint(trainer, filepath)
            return
        path = Path(filepath)
        part = unfinished(path)
        if trainer.is_global_zero:  # what a run that was killed left
            go_on_taking(part, path)
            remove(part)
            remove(aside(part))
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, str(part))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            take_place(part, path)
        trainer.strategy.barrier()
        self._last_checkpoint_saved = filepath

    def _save_none_monitor_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        """Leaves the newest to `last.ckpt` where that is kept, instead of writing it twice."""
        if self.save_last and self.save_top_k == 1:
            self._last_global_step_saved = trainer.global_step  # which Lightning looks at before it saves the last
        else:
            super()._save_none_monitor_checkpoint(trainer, monitor_candidates)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, torch.Tensor]:
        """With the step of now: the module logs one for the x axis, which is that of the last line logged."""
        return super()._monitor_candidates(trainer) | {"step": torch.tensor(trainer.global_step)}

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.save_last and self._last_global_step_saved != trainer.global_step and not trial:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps a run that ended within an epoch as one that was killed there.

        Lightning counts the epoch as gone through then, and a run that is given more steps would go on with the next
        one's order.
        """
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        if epochs["current"]["processed"] < epochs["current"]["ready"]:
            return
        for part in ("total", "current"):
            epochs[part]["processed"] = epochs[part]["completed"] = epochs[part]["ready"] - 1
            batches[part]["completed"] = batches[part]["ready"] - 1  # the batch, too, counts once its hooks are through
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        checkpoint["epoch"] = epochs["current"]["completed"]


def _ours(trainer: L.Trainer) -> list[Checkpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoint)]


class RunMonitor(L.Callback):
    """Images per second, learning rates and peak memory, beside what the module logs.

    Args:
        every: batches between two measurements; 0 for none.

    Raises:
        ConfigError: a number below that.
    """

    def __init__(self, every: int = 20):
        none_or_more(**{"monitor.every": every})
        self.every = every
        self._since, self._images, self._batches = time.perf_counter(), 0, 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._since, self._images, self._batches = time.perf_counter(), 0, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch["prompts"]) * trainer.world_size
        self._batches += 1  # over epochs, which may be shorter
        if not self.every or self._batches % self.every:
            return
        now = time.perf_counter()
        module.log("images/s", self._images / (now - self._since), prog_bar=True)
        self._since, self._images = now, 0
        module.log("peak_memory_GiB", peak_memory() / 2**30)
        for name, optimizer in zip(("student", "critic"), trainer.optimizers, strict=False):
            module.log(f"{name}/learning_rate", optimizer.param_groups[0]["lr"])


class Networks(L.Callback):
    """Says once what is trained and what is borrowed, in place of Lightning's summary, which sees no frozen network."""

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero and isinstance(module, DistillModule):
            print("\n".join(f"{name:<36}{size:>8}  {role}" for name, size, role in self.lines(module)), flush=True)

    def lines(self, module: DistillModule) -> list[tuple[str, str, str]]:
        """Name, number of parameters and role of each network."""
        trained = "trained" if module.lora is None else f"trained, as adapters of rank {module.lora.rank}"
        found: list[tuple[str, Any, str]] = [("student", module.student, trained)]
        for strategy in module.strategies:
            if strategy.has_critic:
                found.append((f"critic of {type(strategy).__name__}", strategy, "trained"))
        for name, average in (("ema", module.ema), ("target", module.target)):
            if average is not None:
                found.append((name, average, "moving average of the student"))
        for name, part in module.named_modules():
            if isinstance(part, Frozen):
                found.append((name.rpartition(".")[2].strip("_"), part.network, "frozen"))
        return [(name, get_human_readable_count(_size(network)), role) for name, network, role in found]


class UpdatesBar(RichProgressBar):
    """Lightning's bar with the student's updates on it, by which runs end; lines where no terminal shows a bar.

    Args:
        seconds: between two lines.
    """

    def __init__(self, seconds: float = 60.0):
        super().__init__()
        self.seconds, self._said = seconds, -float("inf")

    def get_metrics(self, trainer: L.Trainer, module: Any) -> dict[str, Any]:
        shown = super().get_metrics(trainer, module)
        shown.pop("v_num", None)
        last = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        return {"update": f"{trainer.global_step}{last}", **shown}

    @property
    def total_train_batches(self) -> int | float:
        """Of this epoch or until the last update. Lightning counts from where a run goes on, and updates as batches."""
        trainer, module = self.trainer, self.trainer.lightning_module
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        loop = trainer.fit_loop
        left = trainer.max_steps - trainer.global_step
        if isinstance(module, DistillModule):  # any other makes an update of each batch
            left = left * module.batches - module.begun(loop.total_batch_idx + 1)
        return min(trainer.num_training_batches, loop.epoch_loop.batch_progress.current.ready + left)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        ended = trainer.global_step == trainer.max_steps
        if sys.stdout.isatty() or self.is_disabled or (time.monotonic() - self._said < self.seconds and not ended):
            return
        self._said = time.monotonic()
        values = self.get_metrics(trainer, module).items()
        print(", ".join(f"{name} {v if isinstance(v, str) else format(v, '.4g')}" for name, v in values), flush=True)

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs == -1:  # Lightning counts to one less, and shows a -2
            return f"Epoch {current_epoch}"
        return super()._get_train_description(current_epoch)


def _size(network: nn.Module) -> int:
    """How many numbers its weights are; of an adapted student those of its adapters, as the rest is the teacher's."""
    weights = network.weights if isinstance(network, Denoiser) else network.parameters()
    return sum(weight.numel() for weight in weights)


def _copies(metrics: dict[str, Metric], device: torch.device) -> dict[str, Metric]:
    """Metrics with states of their own, and the same networks."""
    found = {}
    for name, metric in metrics.items():
        networks = {id(network): network for network in metric.to(device).children()}
        found[name] = copy.deepcopy(metric, networks)
    return found


def peak_memory() -> int:
    """Bytes: of the accelerator if there is one, of this process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def painters(module: DistillModule, steps: tuple[int, ...]) -> dict[int, Painter]:
    """The module's current student as stock pipelines, one per number of steps, sharing its networks."""
    shared = {"vae": module.autoencoder.network.network, **module.text_encoder.network.components}
    # It is given embeddings, and would cast them, and the noise, to the precision of text encoders it has.
    shared |= {name: None for name in shared if name.startswith("text_encoder")}
    pipeline = module.backbone.student_pipeline(module.sampled, **shared, **module.backbone.unchecked)
    pipeline.set_progress_bar_config(disable=True)

    def encode(prompts: list[str]) -> dict[str, Any]:
        return module.backbone.embedding_arguments(module.conditioning(prompts))

    calls = {n: module.backbone.student_call(module.inputs.visited(n), module.latent_size) for n in steps}
    return {n: Painter(pipeline, call, encode) for n, call in calls.items()}
