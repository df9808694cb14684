"""`LatentsData`: a folder of latents as a Lightning data module that knows how its folder is made."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchdata.stateful_dataloader import StatefulDataLoader

from distill import backbones
from distill.backbones.base import same_network
from distill.data import loading
from distill.data.generate import EncodedShapes, Generation, PairGeneration, TeacherLatents, TeacherPairs, make_here
from distill.data.shapes_data import ShapesDataset
from distill.data.shards import MANIFEST, LatentsDataset, read_manifest
from distill.errors import ConfigError, check_seeds, none_or_more


class LatentsData(loading.Compared, loading.SharedFolders):
    """Latents a teacher made, for training; drawn images to compare with, for validation.

    Args:
        folder: where the latents are, or go.
        teacher: the pipeline that made them; checked against the folder's manifest.
        generation: how they are made. A shipped tiny teacher's missing latents are made on the spot; for any other the
            error names the command that makes them. A finished folder that was made otherwise is used as it is, and
            told of.
        batch_size: samples of one batch over all processes.
        seed: of their order.
        workers: loader processes.
        reference: drawn images that `validate` and `test` compare with; 0 for none.

    Raises:
        ConfigError: latents that are missing or were made by another teacher.
    """

    maker: type[TeacherLatents] = TeacherLatents

    def __init__(
        self,
        folder: str,
        teacher: str,
        generation: Generation = Generation(),
        batch_size: int = 128,
        seed: int = 0,
        workers: int = 0,
        reference: int = 0,
    ):
        super().__init__()
        check_seeds(**{"data.seed": seed})
        none_or_more(**{"data.workers": workers, "data.reference": reference})
        self.folder, self.teacher, self.generation = folder, teacher, generation
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.reference = ShapesDataset(reference, seed=1)

    @property
    def description(self) -> str:
        """What the data is, for a student's model card."""
        made = LatentsDataset.read_settings(self.folder)
        return (
            f"{made['count']} {self.maker.what} of {made['teacher']} ({made['steps']} steps, guidance "
            f"{made['guidance']})"
        )

    def check(self) -> None:
        """Refuses latents that cannot be used or made.

        Raises:
            ConfigError: they are missing and the teacher is not a shipped one, or another teacher made them.
        """
        manifest = Path(self.folder) / MANIFEST
        if not manifest.is_file() and self.teacher not in backbones.TINY:
            raise ConfigError(
                f"there are no {self.maker.what} at '{self.folder}'; make them with: {self._command(self.folder)}"
            )
        if manifest.is_file():
            self._check_origin(LatentsDataset.read_settings(self.folder))

    @property
    def embedded(self) -> bool:
        """Whether the latents have their prompts' embeddings beside them."""
        made = (Path(self.folder) / MANIFEST).is_file()  # not where a student is only validated
        return made and bool(LatentsDataset.read_settings(self.folder).get("embeddings"))

    def prepare_data(self) -> None:
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # validation compares with drawn images
        self.check_batch_size()
        self.check()
        if self.teacher in backbones.TINY and not self._whole_and_other():
            maker = self.maker(backbones.load(self.teacher), self.folder, self.generation)
            make_here(maker, f"{maker.what} of {self.teacher}", processes=torch.get_num_threads())
        else:
            self._compare(LatentsDataset.read_settings(self.folder))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check()  # on every process, so that all of them stop
            self.dataset = LatentsDataset(self.folder)

    def train_dataloader(self) -> StatefulDataLoader:
        return loading.loader(self.dataset, self.batch_size, self.seed, self.trainer, self.workers)

    def _check_origin(self, settings: dict[str, Any]) -> None:
        expected = backbones.load(self.teacher).fingerprint
        if not same_network(settings.get("teacher"), expected):
            raise ConfigError(
                f"the latents at '{self.folder}' were made by {settings.get('teacher') or settings['kind']}, not by "
                f"model.teacher {expected}; set data.folder to that teacher's latents, which this makes: "
                f"{self._command(f'{self.folder}-{Path(self.teacher).name}')}"
            )

    def _whole_and_other(self) -> bool:
        """Whether the folder is finished, and not by what the recipe says of the making, or has more than that or in
        other shards and batches."""
        if not (Path(self.folder) / MANIFEST).is_file():
            return False
        manifest = read_manifest(self.folder)
        made = manifest["settings"]
        enough = made["count"] >= self.generation.count
        more = bool(made.get("embeddings")) > self.generation.embeddings
        regrouped = any(made.get(key) != getattr(self.generation, key) for key in ("count", "shard_size", "batch_size"))
        return manifest["complete"] and (bool(self._others(made)) or (enough and (regrouped or more)))

    def _others(self, made: dict[str, Any]) -> list[str]:
        """What was made otherwise than the recipe says, to be told; embeddings it does not ask for are used unsaid."""
        asked, made = asdict(self.generation), {"embeddings": False, **made}  # of which earlier versions did not say
        grouping = ("count", "shard_size", "batch_size", *(() if asked["embeddings"] else ("embeddings",)))
        return [f"{k}={made[k]}, not {v}" for k, v in asked.items() if k not in grouping and made.get(k, v) != v]

    def _fewer(self, made: dict[str, Any]) -> list[str]:
        """Whether there are fewer than the recipe asks for, to be told; more than it asks for are used unsaid."""
        return [f"count={made['count']}, not {self.generation.count}"] if made["count"] < self.generation.count else []

    def _compare(self, made: dict[str, Any]) -> None:
        """Tells what the recipe says of the making of latents that are there and were made otherwise."""
        if other := self._others(made) + self._fewer(made):
            rank_zero_warn(
                f"the {self.maker.what} at '{self.folder}' were made with {', '.join(other)} as data.generation says; "
                "they are used as they are"
            )

    def _command(self, folder: str) -> str:
        usual = type(self.generation)()
        changed = {k: v for k, v in asdict(self.generation).items() if v != getattr(usual, k)}
        options = [part for name, value in changed.items() for part in (f"--{name}", str(value))]
        return shlex.join(
            ["distill", "generate", self.maker.what, "--teacher", self.teacher, "--output", folder, *options]
        )


class PairsData(LatentsData):
    """ODE pairs a teacher made: each latent with the noise it came from (Diffusion2GAN, section 3.1).

    Args:
        folder, teacher, generation, batch_size, seed, workers, reference: as in `LatentsData`.

    Raises:
        ConfigError: pairs that are missing or were made by another teacher, or latents without their noise.
    """

    maker = TeacherPairs

    def __init__(
        self,
        folder: str,
        teacher: str,
        generation: PairGeneration = PairGeneration(),
        batch_size: int = 128,
        seed: int = 0,
        workers: int = 0,
        reference: int = 0,
    ):
        super().__init__(folder, teacher, generation, batch_size, seed, workers, reference)

    def _check_origin(self, settings: dict[str, Any]) -> None:
        super()._check_origin(settings)
        if settings["kind"] != TeacherPairs.kind:
            raise ConfigError(
                f"'{self.folder}' holds latents without the noise they came from; set data.folder to pairs, which this "
                f"makes: {self._command(f'{self.folder}-pairs')}"
            )


class EncodedShapesData(loading.SharedFolders):
    """Drawn images as latents of a pipeline's autoencoder, encoded once; what the tiny teachers are trained on.

    Args:
        folder: where the latents are, or go.
        teacher: the pipeline whose autoencoder encodes them.
        count: images.
        drop_prompts: share of captions that are emptied, so that the network can be guided.
        batch_size: samples of one batch over all processes.
        seed: of their order.
    """

    def __init__(
        self,
        folder: str,
        teacher: str,
        count: int = 131072,
        drop_prompts: float = 0.1,
        batch_size: int = 128,
        seed: int = 0,
    ):
        super().__init__()
        check_seeds(**{"data.seed": seed})
        self.folder, self.teacher, self.count, self.drop_prompts = folder, teacher, count, drop_prompts
        self.batch_size, self.seed = batch_size, seed

    @property
    def description(self) -> str:
        """What the data is, for a model card."""
        return f"{self.count} drawn images, encoded"

    def prepare_data(self) -> None:
        self.check_batch_size()
        make_here(EncodedShapes(backbones.load(self.teacher), self.folder, self.count), "encoding shapes")

    def setup(self, stage: str) -> None:
        self.dataset = LatentsDataset(self.folder, self.drop_prompts)

    def train_dataloader(self) -> StatefulDataLoader:
        return loading.loader(self.dataset, self.batch_size, self.seed, self.trainer)
