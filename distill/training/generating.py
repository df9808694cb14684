"""`distill generate`: the shards of a folder dealt to processes and nodes by `Trainer.predict`."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from distill import backbones
from distill.data.generate import Generation, Maker, PairGeneration, TeacherLatents, TeacherPairs
from distill.data.images import EncodedImages, ImagesDataset
from distill.errors import ENDED, ConfigError, at_least_one
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


def generate_latents(
    teacher: str,
    output: str,
    count: int = 4096,
    steps: int = 50,
    guidance: float = 4.5,
    prompts: str = "shapes",
    solver: str | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    shard_size: int = 512,
    batch_size: int = 128,
    embeddings: bool = False,
    dtype: str = "float32",
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """Latents a teacher makes from prompts, for LADD. A killed run goes on where it stopped.

    Args:
        teacher: shipped pipeline, folder or hub id.
        output: folder of the shards and their manifest.
        count: samples in all.
        steps: of the teacher's sampler.
        guidance: classifier-free guidance, one constant value.
        prompts: a text file with one prompt per line, or `shapes` for the drawn images' captions; used in turn.
        solver: a diffusers scheduler by class name; the pipeline's own if not given.
        seed: of the noise.
        height: in pixels; the pipeline's own size if not given.
        width: in pixels; the pipeline's own size if not given.
        shard_size: samples per file.
        batch_size: samples per call of the pipeline.
        embeddings: store the prompts' embeddings too, so that training needs no text encoder pass.
        dtype: of the teacher's weights, float32 or bfloat16.
        accelerator: as for Lightning's Trainer.
        devices: as for Lightning's Trainer.
        num_nodes: as for Lightning's Trainer.
    """
    generation = Generation(
        count, steps, guidance, prompts, solver, seed, height, width, shard_size, batch_size, embeddings
    )
    maker = TeacherLatents(backbones.load(teacher, backbones.dtype_of(dtype)), Path(output), generation)
    generate(maker, accelerator, devices, num_nodes)


def generate_pairs(
    teacher: str,
    output: str,
    count: int = 20000,
    steps: int = 50,
    guidance: float = 3.0,
    prompts: str = "shapes",
    solver: str | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    shard_size: int = 512,
    batch_size: int = 128,
    embeddings: bool = False,
    dtype: str = "float32",
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """ODE pairs, for Diffusion2GAN: noise, prompt and what the teacher makes of them. A killed run goes on.

    A larger count adds to an existing folder.

    Args:
        teacher: shipped pipeline, folder or hub id.
        output: folder of the shards and their manifest.
        count: pairs in all.
        steps: of the teacher's sampler.
        guidance: classifier-free guidance.
        prompts: a text file with one prompt per line, or `shapes` for the drawn images' captions; used in turn.
        solver: a deterministic diffusers scheduler by class name; DDIM if not given, on a flow the pipeline's own
            Euler.
        seed: of the noise.
        height: in pixels; the pipeline's own size if not given.
        width: in pixels; the pipeline's own size if not given.
        shard_size: pairs per file.
        batch_size: pairs per call of the pipeline.
        embeddings: store the prompts' embeddings too, so that training needs no text encoder pass.
        dtype: of the teacher's weights, float32 or bfloat16.
        accelerator: as for Lightning's Trainer.
        devices: as for Lightning's Trainer.
        num_nodes: as for Lightning's Trainer.
    """
    generation = PairGeneration(
        count, steps, guidance, prompts, solver, seed, height, width, shard_size, batch_size, embeddings
    )
    maker = TeacherPairs(backbones.load(teacher, backbones.dtype_of(dtype)), Path(output), generation)
    generate(maker, accelerator, devices, num_nodes)


def generate_encoded(
    teacher: str,
    source: str,
    output: str,
    height: int = 512,
    width: int = 512,
    split: str = "train",
    caption: str | None = None,
    accelerator: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
) -> None:
    """Latents of captioned real images, for `data.encoded`. A killed run goes on where it stopped.

    Args:
        teacher: shipped pipeline, folder or hub id, whose autoencoder encodes them.
        source: a folder, a file or a data set on the hub, as `data.source` of a recipe.
        output: folder of the shards and their manifest.
        height: in pixels.
        width: in pixels.
        split: of the data set.
        caption: the column of the captions; one called caption, text, txt or prompt if not given.
        accelerator: as for Lightning's Trainer.
        devices: as for Lightning's Trainer.
        num_nodes: as for Lightning's Trainer.
    """
    at_least_one(height=height, width=width)
    images = ImagesDataset(source, height, width, split, caption)
    generate(EncodedImages(backbones.load(teacher), Path(output), images), accelerator, devices, num_nodes)
