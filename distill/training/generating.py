"""`distill generate`: the shards of a folder dealt to processes and nodes by `Trainer.predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from distill import backbones
from distill.data.generate import Generation, Maker, TeacherLatents
from distill.training.module import DTYPES


class ShardWriter(L.LightningModule):
    """One shard per predict step; the shards are dealt to the processes in turn, and one may get none.

    Args:
        maker: makes and writes the shards.
        todo: those still to be made.
    """

    def __init__(self, maker: Maker, todo: list[int]):
        super().__init__()
        self.maker, self.todo = maker, todo
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> Any:
        mine = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=1, collate_fn=list)  # type: ignore[arg-type]

    def predict_step(self, shards: list[int], batch_idx: int) -> None:
        for shard in shards:
            self.maker.write(shard, self.device)


def generate(maker: Maker, trainer: L.Trainer) -> None:
    """Makes what is missing of a folder on all processes of `trainer`, then completes its manifest."""
    todo = maker.begin(write=trainer.is_global_zero)
    if todo:
        trainer.predict(ShardWriter(maker, todo), return_predictions=False)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        maker.finish()


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
        dtype: of the teacher's weights, float32 or bfloat16.
        accelerator: as for Lightning's Trainer.
        devices: as for Lightning's Trainer.
        num_nodes: as for Lightning's Trainer.
    """
    generation = Generation(count, steps, guidance, prompts, solver, seed, height, width, shard_size, batch_size)
    maker = TeacherLatents(backbones.load(teacher, DTYPES[dtype]), Path(output), generation)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        logger=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    generate(maker, trainer)
    if trainer.is_global_zero:
        print(f"{count} latents of {teacher} are in {output}")
