"""How a recipe becomes a run: LightningCLI with this package's names and safeguards."""

from __future__ import annotations

from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

import distill.data.latents
import distill.data.shapes_data
import distill.strategies
import distill.tiny.autoencoder
import distill.tiny.judge
import distill.tiny.text
import distill.training.callbacks
import distill.training.module  # noqa: F401  (imported so that recipes can use short class names)

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class DistillCLI(LightningCLI):
    """`fit`, `validate` and `test` from YAML with dotted overrides and `${}` interpolation that sees them."""

    def __init__(self, args: list[str]):
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+"},
            trainer_defaults={"use_distributed_sampler": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}
        return {name: skipped for name in ("fit", "validate", "test")}
