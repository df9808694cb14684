"""Time and memory of one LADD training step: ours under Lightning, against plain PyTorch loops of the same mathematics.

The variants, each with its own networks from the same weights: `ours`; `plain`, a hand-written loop that asks the
student once per batch as ours does; `usual`, the form such loops commonly have, which asks it twice; `usual_unfrozen`,
the same without freezing the heads for the student's turn. Blocks of steps of all take turns within one real
`Trainer.fit`, so that a noisy machine is noisy for all; a block's clock runs from the end of one step to the end of
another, so it holds fetching, transfer, logging and everything Lightning does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.utils.tensorboard  # noqa: F401  (in every process, so that peak memory compares steps and not imports)
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from plain_ladd import PlainLoop
from results import ROOT, save
from torchdata.stateful_dataloader import StatefulDataLoader

import distill.strategies  # noqa: F401  (so that the recipe's short class names are found)
from distill.batch import Draws
from distill.data import shapes
from distill.data.loading import loader
from distill.training.callbacks import RunMonitor, peak_memory
from distill.training.module import DistillModule

RECIPE = ROOT / "recipes" / "tiny_ladd.yaml"
LOOPS: dict[str, dict[str, Any]] = {  # settings of the hand-written loop
    "plain": {"twice": False, "freeze": True},
    "usual": {"twice": True, "freeze": True},
    "usual_unfrozen": {"twice": True, "freeze": False},
}
VARIANTS = ("ours", *LOOPS)
LIMITS: dict[str, float | None] = {"ours/plain": 1.05, "ours/usual": 0.92, "ours/usual_unfrozen": None}
BATCHES = 64  # in an epoch, as the recipe's 8192 latents make
SEED = 0
CHECK_STEPS = 3
CHECK_TOLERANCE = 1e-5


class MemoryLatents:
    """Random latents under drawn captions, in memory."""

    def __init__(self, count: int, shape: tuple[int, int, int]):
        self.x0 = torch.randn(count, *shape, generator=torch.Generator().manual_seed(SEED)).half()
        self.prompts = shapes.captions(seed=SEED, indices=range(count))

    def __len__(self) -> int:
        return len(self.x0)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"x0": self.x0[indices], "prompts": [self.prompts[index] for index in indices]}


class Rounds(L.Callback):
    """After every block of our steps, runs a block of each plain loop, and keeps the seconds of all.

    Args:
        others: the plain loops.
        steps: of one block.
    """

    def __init__(self, others: dict[str, PlainLoop], steps: int):
        self.others, self.steps, self.seconds = others, steps, list[dict[str, float]]()
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._since = now()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.steps:
            return
        spans = {"ours": now() - self._since}
        for name, loop in self.others.items():
            start = now()
            for _ in range(self.steps):
                loop.step()
            spans[name] = now() - start
        self.seconds.append({name: span / self.steps for name, span in spans.items()})
        self._since = now()


def main() -> None:
    """Checks that the variants do the same, measures, prints and writes the result."""
    options = arguments()
    if options.memory:
        print(json.dumps(memory_here(options, options.memory)))
        return
    memory = {name: memory_apart(name) for name in VARIANTS}  # first: see there
    difference = check(options)
    print(f"largest difference after {CHECK_STEPS} steps in float32: {difference}")
    seconds = measure(options)
    values = {
        "teacher": options.teacher,
        "batch_size": options.batch_size,
        "steps_per_block": options.steps,
        "largest_difference": difference,
        **summary(seconds),
        "peak_memory_bytes": memory,
        "blocks": seconds,
    }
    report(values)
    print(save(options.output, values, [SEED]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--teacher", default="tiny-sd3", help="a pipeline of the SD3 family")
    parser.add_argument("--rounds", type=int, default=80, help="measured blocks of each variant")
    parser.add_argument("--steps", type=int, default=1, help="of one block; few, as other load comes and goes")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--output", default="step_time", help="name of the file in benchmarks/results")
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)  # one variant, in a process of its own
    return parser.parse_args()


# The variants ---------------------------------------------------------------------------------------------------------


def recipe(options: argparse.Namespace) -> DistillModule:
    """The tiny recipe's module without R1 and schedules, which the loops do not have; no weights read."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    model: Any = OmegaConf.to_container(OmegaConf.load(RECIPE), resolve=True)["model"]  # type: ignore[call-overload, index]
    model["init_args"]["teacher"] = options.teacher
    for player in ("student", "critic"):
        del model["init_args"][f"{player}_schedule"]
    del model["init_args"]["strategies"][0]["init_args"]["r1"]
    return parser.instantiate_classes(parser.parse_object({"model": model})).model


def batches(options: argparse.Namespace, module: DistillModule) -> StatefulDataLoader:
    """The loader that data modules use, over the same latents for every variant."""
    latents = MemoryLatents(BATCHES * options.batch_size, module.backbone.latent_shape())
    return loader(latents, options.batch_size, SEED, trainer=None)


def plain_loop(options: argparse.Namespace, name: str, **settings: Any) -> PlainLoop:
    """A hand-written loop by its name, under autocast unless `settings` say otherwise."""
    module = recipe(options)
    settings = {"device": device(), "autocast": True, **settings}
    return PlainLoop(module, batches(options, module), **LOOPS[name], **settings)


def fit(options: argparse.Namespace, steps: int, callbacks: list[L.Callback], precision: Any = None) -> DistillModule:
    """Trains ours for some steps, logging as the recipe has it."""
    module, settings = recipe(options), OmegaConf.load(RECIPE).trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            precision=precision or settings.precision,
            accelerator=device().type,
            devices=1,
            log_every_n_steps=settings.log_every_n_steps,
            logger=TensorBoardLogger(folder, name="tensorboard", version=""),
            default_root_dir=folder,
            callbacks=[RunMonitor(), *callbacks],
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, batches(options, module))
    return module


# What is asked of them ------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> dict[str, float]:
    """Largest difference of any student parameter between ours and each plain loop, fed the same random numbers.

    Raises:
        SystemExit: the variants do not do the same.
    """
    ours = fit(options, CHECK_STEPS, [], precision="32-true")
    seed, size = ours.seed, options.batch_size
    differences = {}
    for name in LOOPS:
        draws = {"numbers": lambda number: Draws(seed, number, 0, size, device())}
        loop = plain_loop(options, name, autocast=False, **draws)
        for _ in range(CHECK_STEPS):
            loop.step()
        differences[name] = largest_difference(ours.student.network, loop.student)  # type: ignore[union-attr]
    if max(differences.values()) > CHECK_TOLERANCE:
        raise SystemExit(f"the variants train differently, nothing was measured: {differences}")
    return differences


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Over all parameters of two networks of one kind."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x.detach().to(y.device) - y.detach()).abs().max()) for x, y in pairs)


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds per step of every variant in every round; a first round warms up and is left out."""
    rounds = Rounds({name: plain_loop(options, name) for name in LOOPS}, options.steps)
    fit(options, (options.rounds + 1) * options.steps, [rounds])
    return rounds.seconds[1:]


def memory_here(options: argparse.Namespace, name: str) -> int:
    """Peak memory of this process, in bytes, after one block of a variant."""
    if name == "ours":
        fit(options, options.steps, [])
    else:
        loop = plain_loop(options, name)
        for _ in range(options.steps):
            loop.step()
    return peak_memory()


def memory_apart(name: str) -> int:
    """The same in a process of its own, with the options of this one.

    Linux lets a process begin with the peak of the one that started it, so this one must not have trained yet.
    """
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--memory", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.split()[-1])


def summary(seconds: list[dict[str, float]]) -> dict[str, Any]:
    """Median seconds per step; the ratios of these, and of each round's ratio the median, least and greatest."""
    seconds_per_step = {name: median(block[name] for block in seconds) for name in VARIANTS}
    of_medians = {pair: seconds_per_step[pair.split("/")[0]] / seconds_per_step[pair.split("/")[1]] for pair in LIMITS}
    ratios = {pair: [block[pair.split("/")[0]] / block[pair.split("/")[1]] for block in seconds] for pair in LIMITS}
    return {
        "seconds_per_step": seconds_per_step,
        "ratios": {
            pair: {
                "of_medians": of_medians[pair],
                "median": median(each),
                "min": min(each),
                "max": max(each),
                "limit": LIMITS[pair],
            }
            for pair, each in ratios.items()
        },
    }


def report(values: dict[str, Any]) -> None:
    """Prints the result as a table."""
    for name in VARIANTS:
        memory = values["peak_memory_bytes"][name] / 2**20
        print(f"{name:20}{values['seconds_per_step'][name]:8.3f} s/step{memory:10.0f} MiB")
    for pair, ratio in values["ratios"].items():
        limit = "" if ratio["limit"] is None else f", at most {ratio['limit']}"
        spread = f"rounds: {ratio['median']:.3f}, {ratio['min']:.3f} to {ratio['max']:.3f}"
        print(f"{pair:20}{ratio['of_medians']:8.3f} ({spread}){limit}")


def device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds, once all work given to the accelerator is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
