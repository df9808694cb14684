"""How a recipe becomes a run: LightningCLI with this package's names and safeguards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace, namespace_to_dict, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

import distill.data.images
import distill.data.latents
import distill.data.shapes_data
import distill.strategies
import distill.tiny.autoencoder
import distill.tiny.judge
import distill.tiny.perceptual
import distill.tiny.text
import distill.tiny.vision  # noqa: F401  (imported so that recipes can use short class names)
from distill.data.loading import Compared, SharedFolders, check_batch_size
from distill.errors import ConfigError, recipes_of
from distill.export import is_sharded
from distill.files import go_on_taking
from distill.training import parallel
from distill.training.callbacks import (
    Checkpoint,
    Evaluation,
    Networks,
    RunMonitor,
    SampleGrid,
    UpdatesBar,
)
from distill.training.cost import TrainingCost
from distill.training.module import DistillModule
from distill.training.recipes import linked, numbered_entries, whole_lists
from distill.training.storage import unfinished

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)

REFUSED = (ValueError, MisconfigurationException, ModuleNotFoundError)  # how constructors refuse their arguments


OTHERS = {  # options of Lightning's Trainer: how they stay, and what does it for two players
    "accumulate_grad_batches": (1, "model.accumulate"),
    "gradient_clip_val": (None, "model.student_clip and model.critic_clip"),
}


class RecipeParser(LightningArgumentParser):
    """Turns what is wrong with a recipe into one sentence, and writes recipes with the `${...}` they were read with."""

    recipes: list[str] = []

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(message)

    def dump(self, namespace: Namespace, format: str = "parser_mode", *rest: Any, **options: Any) -> str:
        text = super().dump(namespace, format, *rest, **options)
        if not self.recipes or "${" in text or format not in ("parser_mode", "yaml") or options.get("with_comments"):
            return text
        header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        return header + yaml.safe_dump(linked(yaml.safe_load(text), self.recipes), sort_keys=False)


class SaveRecipe(SaveConfigCallback):
    """Keeps the recipe of a run beside its scalars once it trains; measuring a run does not replace it, nor does one
    that may not go on with its checkpoint. What the run went on from is no part of it: who begins a run from the file
    begins a new one.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.config = self.config.clone()
        self.config.ckpt_path = None
        super().setup(trainer, pl_module, "fit")


class DistillCLI(LightningCLI):
    """`fit`, `validate` and `test` from YAML with dotted overrides and `${}` interpolation that sees them."""

    def __init__(self, args: list[str]):
        self.insists = any(arg.startswith("--trainer.precision") for arg in args)
        self.sharded_beginning: Path | None = None
        self.recipes = recipes_of(args)
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
            trainer_defaults={
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "inference_mode": False,  # FSDP2 cannot begin in it, and Lightning spares only FSDP1
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=RecipeParser,
            args=whole_lists(numbered_entries(args)),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As LightningCLI's, with the recipes whose `${...}` it is to write again."""
        parser = super().init_parser(**kwargs)
        parser.recipes = self.recipes  # type: ignore[attr-defined]
        return parser

    def _parse_ckpt_path(self) -> None:
        """Nothing: our checkpoints hold no hyperparameters, for which Lightning would read the whole file."""

    def before_instantiate_classes(self) -> None:
        """Refuses by name what Lightning would refuse, or quietly replace, for reasons of its own on this machine, and
        leaves a recipe's bfloat16 to machines that have it.
        """
        trainer = self.config[self.subcommand].trainer
        strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
        parallel.check_names(str(strategy), str(trainer.precision))
        if self.config[self.subcommand].model.class_path == f"{DistillModule.__module__}.{DistillModule.__name__}":
            for name, (usual, other) in OTHERS.items():
                if trainer[name] != usual:
                    raise ConfigError(f"trainer.{name} is for one optimizer, and here are two players; set {other}")
        checkpoint = self.config[self.subcommand].ckpt_path
        if checkpoint is None and self.subcommand != "fit":
            raise ConfigError(f"distill {self.subcommand} measures a checkpoint; give --ckpt_path CHECKPOINT")
        limit = "limit_val_batches" if self.subcommand == "validate" else "limit_test_batches"
        if self.subcommand != "fit" and trainer[limit] == 0:
            raise ConfigError(f"trainer.{limit}=0 leaves nothing to measure on; add --trainer.{limit} 1.0")
        self._check_checkpoint(str(strategy))
        asked, here = trainer.precision in {"bf16-mixed", "bf16"}, str(trainer.accelerator)  # one has two names
        if asked and not self.insists and parallel.lacks_bfloat16(here):
            trainer.precision = "32-true"
            rank_zero_only(print)(
                "This CPU has no instructions for bfloat16, so the run computes in float32, many times faster here, "
                "where the recipe says bf16-mixed. --trainer.precision bf16-mixed insists."
            )

    def _check_checkpoint(self, strategy: str) -> None:
        given = self.config[self.subcommand].ckpt_path
        if given is None:
            self._check_new()
            return
        path = self._checkpoints() / "last.ckpt" if given == "last" else Path(given).expanduser()
        go_on_taking(unfinished(path), path)
        if path.exists():
            parallel.check_checkpoint(path, strategy, training=self.subcommand == "fit")
            self.sharded_beginning = path if is_sharded(path) else None
        elif given != "last":
            raise ConfigError(f"there is no checkpoint at '{given}'; `distill fit` writes them, `last` is the newest")
        elif self.subcommand == "fit":
            rank_zero_only(print)(f"There is no {path} to go on from, so this run begins anew.")
        else:
            raise ConfigError(f"there is no checkpoint at '{path}' yet; `distill fit` writes it")

    def _check_new(self) -> None:
        """Refuses to begin a run where the checkpoints of another would be lost."""
        last = self._checkpoints() / "last.ckpt"
        go_on_taking(unfinished(last), last)
        if last.exists() and not self.config[self.subcommand].checkpoint.overwrite:
            raise ConfigError(
                f"'{last}' is the checkpoint of another run, which a new one would replace; go on with it by "
                "--ckpt_path last, give the new run another --trainer.default_root_dir, or let it replace the other by "
                "--checkpoint.overwrite true"
            )

    def _checkpoints(self) -> Path:
        """Where this run's are. Lightning's own place has another name for every start, where none finds the last."""
        config = self.config[self.subcommand]
        folder = config.checkpoint.dirpath or Path(config.trainer.default_root_dir or ".") / "checkpoints"
        return Path(folder).expanduser()

    def instantiate_classes(self) -> None:
        """As LightningCLI, but says only what the constructor that refused its arguments said."""
        try:
            super().instantiate_classes()
        except REFUSED as error:
            raise ConfigError(str(_refusal(error))) from error
        if isinstance(self.model, DistillModule):
            made_from = self.config[self.subcommand].model.init_args.strategies
            self.model.strategy_configs = [namespace_to_dict(strategy) for strategy in made_from]
            self.model.sharded_beginning = self.sharded_beginning

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """With our bar for Lightning's, and the costs counted first, so that no other callback's time is among them."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [UpdatesBar() if type(callback) is RichProgressBar else callback for callback in callbacks]
        for callback in callbacks:
            if isinstance(callback, Checkpoint) and callback.dirpath is None:
                callback.dirpath = str(self._checkpoints())
        callbacks.insert(0, TrainingCost())
        callbacks.append(Networks())
        return trainer

    def before_fit(self) -> None:
        """Refuses what the grids cannot show, and batches too small for a strategy, before any data is made, which may
        take long, and any weights are read.
        """
        if isinstance(self.datamodule, SharedFolders | Compared) and isinstance(self.model, DistillModule):
            processes = self.trainer.num_devices * self.trainer.num_nodes  # type: ignore[attr-defined]
            check_batch_size(self.datamodule.batch_size, processes)
            self.model.check_batch(self.datamodule.batch_size // processes)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleGrid) and isinstance(self.model, DistillModule):
                callback.check(self.model)

    def after_fit(self) -> None:
        """Says where what was learnt is, and what to do with it."""
        path = getattr(self.trainer.checkpoint_callback, "last_model_path", "")
        if not (self.trainer.is_global_zero and path):
            return
        print(f"{self.trainer.global_step} updates are in {path}")
        if isinstance(self.model, DistillModule):
            print(f"As a pipeline: distill export --checkpoint {path} --output FOLDER")
        print("More updates: the same command with --ckpt_path last and a larger --trainer.max_steps")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What every run shows and keeps, each a section of the recipe beside `model`, `data` and `trainer`."""
        parser.add_lightning_class_args(SampleGrid, "samples")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(RunMonitor, "monitor")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.every_n_train_steps": 500,
            }
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}
        return {name: skipped for name in ("fit", "validate", "test")}


def _refusal(error: BaseException) -> BaseException:
    """The sentence meant for the user among the exceptions jsonargparse wraps it in."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    meant = [link for link in chain if isinstance(link, ConfigError)]
    refused = [link for link in chain if isinstance(link, REFUSED)]
    return [*refused, *meant][-1]
