"""Folders of latents made by a network: by the teacher from prompts, or by the autoencoder from drawn images.

The work is cut into shards. A shard is a function of the settings and its index alone, is written whole and then
renamed; so any number of processes and nodes share the work, a killed run goes on where it stopped, and the result is
that of an unbroken run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import backbones
from distill.backbones.base import Backbone
from distill.batch import Draws
from distill.data import shapes
from distill.data.loading import batches
from distill.data.shapes_data import ShapesDataset
from distill.data.shards import MANIFEST, shard_name, write_shard
from distill.errors import ConfigError
from distill.files import checksum, read_json, save_json

SHAPES = "shapes"  # the name of the drawn images' captions where a file of prompts could stand


@dataclass(frozen=True)
class Generation:
    """What a teacher's latents depend on besides the teacher.

    Attributes:
        count: samples in all.
        steps: of the teacher's sampler.
        guidance: classifier-free guidance, one constant value (LADD, section 3).
        prompts: a text file with one prompt per line, or `shapes` for the drawn images' captions; used in turn.
        solver: a diffusers scheduler by class name; the pipeline's own if not given.
        seed: of noise and shapes captions.
        height, width: in pixels; the pipeline's own size if not given.
        shard_size: samples per file.
        batch_size: samples per call of the pipeline.
    """

    count: int = 4096
    steps: int = 50
    guidance: float = 4.5
    prompts: str = SHAPES
    solver: str | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    shard_size: int = 512
    batch_size: int = 128


class Maker:
    """Makes the shards of one folder.

    Args:
        folder: where they go.
        settings: everything the result depends on; kept in the manifest.
        count, shard_size, batch_size: samples in all, per file, and per network call.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], count: int, shard_size: int, batch_size: int):
        self.folder, self.settings = Path(folder), settings
        self.count, self.shard_size, self.batch_size = count, shard_size, batch_size

    def make(self, indices: list[int], device: torch.device) -> tuple[Tensor, list[str]]:
        """Latents `[N, C, h, w]` and captions of the consecutive samples `indices`."""
        raise NotImplementedError

    @property
    def shards(self) -> range:
        """Indices of all shards."""
        return range(-(-self.count // self.shard_size))

    def write(self, shard: int, device: torch.device) -> None:
        """Makes shard `shard` and writes it."""
        indices = range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))
        parts = [self.make(part, device) for part in batches(indices, self.batch_size)]
        latents = torch.cat([latents for latents, _ in parts])
        write_shard(self.folder / shard_name(shard), latents, [prompt for _, prompts in parts for prompt in prompts])

    def begin(self, write: bool = True) -> list[int]:
        """Writes an unfinished manifest if there is none, and returns the shards still to be made.

        Shards of a finished folder that are missing or damaged are to be made again.

        Args:
            write: False on all processes but one.

        Raises:
            ConfigError: the folder was made with other settings.
        """
        path = self.folder / MANIFEST
        manifest = read_json(path) if path.is_file() else None
        if manifest is None and write:
            save_json({"settings": self.settings, "complete": False, "shards": {}}, path)
        if manifest is not None and manifest["settings"] != self.settings:
            old, new = manifest["settings"], self.settings
            changed = ", ".join(f"{k}={old.get(k)} there, {v} asked" for k, v in new.items() if old.get(k) != v)
            raise ConfigError(f"'{self.folder}' was made with other settings ({changed}); choose another folder")
        known = manifest["shards"] if manifest else {}
        return [shard for shard in self.shards if not self._good(shard_name(shard), known)]

    def finish(self) -> None:
        """Completes the manifest with each shard's checksum."""
        shards = {shard_name(shard): checksum(self.folder / shard_name(shard)) for shard in self.shards}
        save_json({"settings": self.settings, "complete": True, "shards": shards}, self.folder / MANIFEST)

    def _good(self, name: str, known: dict[str, str]) -> bool:
        path = self.folder / name
        return path.is_file() and (name not in known or checksum(path) == known[name])


class TeacherLatents(Maker):
    """Latents a teacher pipeline makes from prompts with its own sampler.

    Args:
        backbone: the teacher.
        folder: where the shards go.
        generation: the settings.
    """

    def __init__(self, backbone: Backbone, folder: str | Path, generation: Generation):
        self.backbone, self.generation = backbone, generation
        self._pipeline: Any = None
        settings = {
            "kind": "teacher",
            "teacher": backbone.fingerprint,
            "dtype": str(backbone.dtype),
            **asdict(generation),
        }
        if generation.prompts != SHAPES:
            settings["prompts_checksum"] = checksum(_existing(generation.prompts))
        super().__init__(folder, settings, generation.count, generation.shard_size, generation.batch_size)
        self.lines = None if generation.prompts == SHAPES else read_prompts(generation.prompts)

    def make(self, indices: list[int], device: torch.device) -> tuple[Tensor, list[str]]:
        settings, pipeline = self.generation, self.pipeline(device)
        prompts = self._prompts(indices)
        shape = self.backbone.latent_shape(settings.height, settings.width)
        noise = Draws(settings.seed, 0, indices[0], len(indices), device).normal("generate/noise", *shape)
        size = {"height": settings.height, "width": settings.width} if settings.height else {}
        with torch.no_grad():
            call = {**self.backbone.call, "num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
            answer = pipeline(prompts, latents=noise.to(self.backbone.dtype), output_type="latent", **size, **call)
        return answer.images, prompts

    def pipeline(self, device: torch.device) -> Any:
        """The teacher's pipeline, read once."""
        if self._pipeline is None:
            self._pipeline = self.backbone.pipeline().to(device)
            self._pipeline.set_progress_bar_config(disable=True)
            if self.generation.solver:
                self._pipeline.scheduler = backbones.solver(self.generation.solver, self._pipeline.scheduler)
        return self._pipeline

    def _prompts(self, indices: list[int]) -> list[str]:
        if self.lines is None:
            return shapes.captions(self.generation.seed + 1000, indices)  # not the teacher's own training pictures
        return [self.lines[index % len(self.lines)] for index in indices]


class EncodedShapes(Maker):
    """Drawn images through a pipeline's autoencoder: what the tiny teachers are trained on.

    Args:
        backbone: whose autoencoder.
        folder: where the shards go.
        count: images in all.
        seed: of the images.
        height, width: in pixels.
    """

    def __init__(
        self, backbone: Backbone, folder: str | Path, count: int, seed: int = 0, height: int = 32, width: int = 32
    ):
        settings = {"kind": "shapes", "count": count, "seed": seed, "height": height, "width": width}
        settings["autoencoder"] = backbone.autoencoder_fingerprint
        super().__init__(folder, settings, count, shard_size=8192, batch_size=256)
        self.images = ShapesDataset(count, seed, height, width)
        self.autoencoder = backbone.autoencoder().eval()

    def make(self, indices: list[int], device: torch.device) -> tuple[Tensor, list[str]]:
        batch = self.images.__getitems__(indices)
        with torch.no_grad():
            return self.autoencoder.to(device).encode(batch["pixels"].to(device)), batch["prompts"]


def read_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        ConfigError: no such file, or one without prompts.
    """
    lines = [line.strip() for line in _existing(path).read_text().splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"the file '{path}' holds no prompts; write one per line")
    return lines


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ConfigError(f"there is no file of prompts at '{path}'; give a text file with one prompt per line")
    return Path(path)


def make_here(maker: Maker, title: str) -> None:
    """Makes what is missing in this process, with a progress bar over shards."""
    from rich.progress import track

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shard in track(maker.begin(), title):
        maker.write(shard, device)
    maker.finish()
