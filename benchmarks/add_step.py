"""Time and peak memory of one ADD step beside one LADD step of the same student and teacher, decoder included.

Every variant trains for a few steps in a process of its own, in turn, several rounds: `add` with both terms, each of
its terms alone, `add_summed` with both terms' graphs kept until one backward pass (the plain form of a weighted sum),
and `ladd`, which never decodes. ADD reads pictures and encodes them, as it is trained; LADD reads latents, as it is.
With `--lora` the student is adapters on the teacher's weights, which leaves room for larger networks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from results import ROOT, save

import distill.strategies  # noqa: F401  (so that the recipes' short class names are found)
from distill.batch import Batch, Sample
from distill.data import shapes
from distill.data.loading import loader
from distill.training.callbacks import peak_memory
from distill.training.module import DistillModule

ADD, LADD = "tiny_add", "tiny_ladd"  # whose strategies are compared
VARIANTS = {"add": (ADD, None), "add_summed": (ADD, None), "pixel": (ADD, 0), "score": (ADD, 1), "ladd": (LADD, None)}
RATIOS = [("add", "ladd"), ("add", "add_summed"), ("pixel", "ladd")]


class SummedModule(DistillModule):
    """The plain form: all terms are computed, summed, and only then differentiated."""

    def _student_turn(self, sample: Sample, batch: Batch, step: int, updates: bool) -> None:
        losses = [strategy.weight * strategy.student_loss(sample, batch, step) for strategy in self.strategies]
        total = torch.stack(losses).sum()
        self._losses[0].append(total.detach())
        sample.gather(sample.gradient(total))
        sample.backward()
        self._update(0, self.student.weights)  # type: ignore[union-attr]


class Data:
    """Random pictures or latents under drawn captions."""

    def __init__(self, count: int, key: str, shape: tuple[int, ...]):
        self.key, self.values = key, torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        self.prompts = shapes.captions(seed=0, indices=range(count))

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {self.key: self.values[indices], "prompts": [self.prompts[index] for index in indices]}


class Clock(L.Callback):
    """Seconds of each step after the first."""

    def __init__(self) -> None:
        self.seconds, self._since = list[float](), 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._since:
            self.seconds.append(now - self._since)
        self._since = now


def main() -> None:
    """Measures all variants in turn, prints and writes the result."""
    options = arguments()
    if options.one:
        print(json.dumps(one(options, options.one)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for _ in range(options.rounds):
        for name in options.variants:
            found[name].append(apart(name))
            print(name, found[name][-1], flush=True)
    values = {
        "teacher": options.teacher,
        "size": options.size,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "lora_rank": options.lora,
        "seconds_per_step": {name: median(row["seconds"] for row in rows) for name, rows in found.items()},
        "peak_memory_mib": {name: median(row["mib"] for row in rows) for name, rows in found.items()},
        "ratios": {f"{a}/{b}": ratio(found[a], found[b]) for a, b in RATIOS if {a, b} <= found.keys()},
    }
    print(json.dumps(values, indent=1))
    print(save(options.output, values, [0]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--teacher", default="tiny-sd", help="a pipeline of the SD family")
    parser.add_argument("--vision", default="tiny-vit", help="ADD's vision network")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a variant in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations of student and teacher")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank, not all weights")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", default="add_step", help="name of the file in benchmarks/results")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)  # one variant, in a process of its own
    return parser.parse_args()


def ratio(a: list[dict[str, float]], b: list[dict[str, float]]) -> dict[str, float]:
    """Of seconds, round by round, and of peak memory."""
    times = [x["seconds"] / y["seconds"] for x, y in zip(a, b, strict=True)]
    memory = [x["mib"] / y["mib"] for x, y in zip(a, b, strict=True)]
    return {"time": median(times), "time_min": min(times), "time_max": max(times), "memory": median(memory)}


def apart(name: str) -> dict[str, float]:
    """One variant in a process of its own, with the options of this one."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--one", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def one(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Seconds per step and peak memory of a variant in this process."""
    module, clock = make(options, name), Clock()
    pictures = VARIANTS[name][0] == ADD
    latent = module.backbone.latent_shape(options.size, options.size)
    shape = (3, options.size, options.size) if pictures else latent
    data = Data(4 * options.batch_size, "pixels" if pictures else "x0", shape)
    trainer = L.Trainer(
        max_steps=options.steps + 1,
        max_epochs=-1,
        precision=options.precision,
        devices=1,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(data, options.batch_size, 0, trainer=None))
    return {"seconds": median(clock.seconds), "mib": peak_memory() / 2**20}


def make(options: argparse.Namespace, name: str) -> DistillModule:
    """The module of ADD's recipe with the strategies of the variant: one student, teacher and optimizer for all."""
    source, index = VARIANTS[name]
    model = settings(ADD)
    strategies = settings(source)["init_args"]["strategies"]
    for strategy in strategies:
        if strategy["class_path"] == "PixelAdversarial":
            strategy["init_args"] |= {"vision": options.vision, "image": options.vision}
        if strategy["class_path"] == "LatentAdversarial" and options.batch_size == 1:
            strategy["init_args"]["norm"] = "group"  # as ADD's recipe has it; local batch norm takes two samples
    model["init_args"] |= {
        "strategies": strategies if index is None else [strategies[index]],
        "teacher": options.teacher,
        "checkpoint": options.checkpoint,
        "lora": {"rank": options.lora} if options.lora else None,
        "ema": None,
    }
    for player in ("student", "critic"):
        model["init_args"].pop(f"{player}_schedule", None)
    if name == "add_summed":
        model["class_path"] = f"{__name__}.SummedModule"
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    return parser.instantiate_classes(parser.parse_object({"model": model})).model


def settings(recipe: str) -> dict[str, Any]:
    """A recipe's model, interpolated."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes" / f"{recipe}.yaml"), resolve=True)
    return loaded["model"]


if __name__ == "__main__":
    main()
