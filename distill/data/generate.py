"""Folders of latents made by a network: by the teacher from prompts, or by the autoencoder from drawn images.

The work is cut into shards. A shard is a function of the settings and its index alone, is written whole and then
renamed; so any number of processes and nodes share the work, a killed run goes on where it stopped, and the result is
that of an unbroken run. A larger count adds to a folder.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from distill import backbones
from distill.backbones.base import Backbone, TextEncoder, same_network
from distill.batch import Cond, Draws
from distill.data import shapes
from distill.data.loading import batches
from distill.data.prompts import read_prompts
from distill.data.shapes_data import ShapesDataset
from distill.data.shards import MANIFEST, read_manifest, shard_name, write_shard
from distill.diffusion.process import RectifiedFlow
from distill.diffusion.sampling import draws_noise, own_noise
from distill.errors import ConfigError, at_least_one, check_seeds
from distill.files import check_folder, checksum, remove, save_json, written_whole
from distill.progress import Advance, counted

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
        embeddings: store the prompts' embeddings too, for text encoders that cost more than the disk.
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
    embeddings: bool = False

    def __post_init__(self) -> None:
        at_least_one(count=self.count, steps=self.steps, shard_size=self.shard_size, batch_size=self.batch_size)
        at_least_one(height=self.height, width=self.width)
        check_seeds(seed=self.seed)


@dataclass(frozen=True)
class PairGeneration(Generation):
    """What ODE pairs depend on besides the teacher: 50 deterministic steps (Diffusion2GAN, section 4).

    Attributes:
        solver: a deterministic diffusers scheduler by class name; DDIM if not given, on a flow the pipeline's own
            Euler.
    """

    count: int = 20000
    guidance: float = 3.0


Made = tuple[dict[str, Tensor], list[str]]  # tensors [N, ...] by name, and N captions


class Maker:
    """Makes the shards of one folder.

    Args:
        folder: where they go.
        settings: everything a sample depends on; kept in the manifest.
        count, shard_size, batch_size: samples in all, per file, and per network call.
    """

    what = "latents"  # for progress bars and messages

    def __init__(self, folder: str | Path, settings: dict[str, Any], count: int, shard_size: int, batch_size: int):
        self.folder, self.settings = Path(folder), settings
        self.count, self.shard_size, self.batch_size = count, shard_size, batch_size

    def make(self, indices: list[int], device: torch.device) -> Made:
        """The consecutive samples `indices`: latents `x0` `[N, C, h, w]`, whatever is stored beside, captions."""
        raise NotImplementedError

    @property
    def shards(self) -> range:
        """Indices of all shards."""
        return range(-(-self.count // self.shard_size))

    def samples(self, shard: int) -> range:
        """Indices of the samples in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def total(self, shards: list[int]) -> int:
        """The number of samples in some shards."""
        return sum(len(self.samples(shard)) for shard in shards)

    def write(self, shard: int, device: torch.device, advance: Advance = lambda samples: None) -> None:
        """Makes shard `shard` and writes it, and beside it its checksum: of terabytes one process would take hours.

        Args:
            advance: told the number of samples after each call of the network.

        Raises:
            FloatingPointError: samples that are not finite, or too large for float16.
        """
        rows: list[dict[str, Tensor]] = []
        captions: list[str] = []
        for indices in batches(self.samples(shard), self.batch_size):
            tensors, prompts = self.make(indices, device)
            rows.append({name: _storable(tensor, name, indices) for name, tensor in tensors.items()})
            captions += prompts
            advance(len(indices))
        columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        path = self.folder / shard_name(shard)
        self._summed(path).unlink(missing_ok=True)  # of another shard that was here
        write_shard(path, columns, captions)
        with written_whole(self._summed(path)) as part:
            part.write_text(checksum(path))

    def check(self) -> None:
        """Refuses a folder that cannot be gone on with; every process asks, so that all of them stop. With another
        batch size it can: that rounds otherwise, and nothing more.

        Raises:
            ConfigError: the folder was made with other settings, or holds more samples than are asked for.
        """
        check_folder(self.folder)
        if (self.folder / MANIFEST).is_file():
            self._check(read_manifest(self.folder))

    def begin(self) -> None:
        """Writes an unfinished manifest, unless the folder is complete as it is; one process does this before others
        ask what is `missing`.

        Raises:
            ConfigError: as `check`.
        """
        self.check()
        path = self.folder / MANIFEST
        manifest = read_manifest(self.folder) if path.is_file() else None
        if manifest is not None:
            before = manifest["settings"]["count"]
            if before == self.count:
                return
            if manifest["complete"]:
                print(
                    f"'{self.folder}' holds {before} {self.what} and {self.count} are asked for: the rest is made; ask "
                    f"for {before} to keep to those"
                )
            if before % self.shard_size:  # its last shard is to become whole
                last = shard_name(before // self.shard_size)
                (self.folder / last).unlink(missing_ok=True)
                manifest["shards"].pop(last, None)
        shards = manifest["shards"] if manifest else {}
        save_json({"settings": self.settings, "complete": False, "shards": shards}, path)

    def missing(self) -> list[int]:
        """The shards still to be made: those that are not there, and those whose checksum is not the manifest's."""
        known = read_manifest(self.folder)["shards"]
        return [shard for shard in self.shards if not self._good(shard_name(shard), known)]

    def finish(self) -> None:
        """Completes the manifest with each shard's checksum, and removes what writers left."""
        known, shards = read_manifest(self.folder)["shards"], {}
        for path in (self.folder / shard_name(shard) for shard in self.shards):
            summed = self._summed(path)
            found = summed.read_text() if summed.is_file() else known.get(path.name)
            shards[path.name] = found or checksum(path)
        save_json({"settings": self.settings, "complete": True, "shards": shards}, self.folder / MANIFEST)
        for left in (*self.folder.glob(".shard-*.part"), *self.folder.glob(".shard-*.sha256")):
            remove(left)

    def asked(self, count: int) -> dict[str, Any]:
        """The settings a folder with the first `count` of the samples has."""
        return self.settings

    def _check(self, manifest: dict[str, Any]) -> None:
        old = manifest["settings"]
        asked = self.asked(min(old["count"], self.count))
        changed = ", ".join(
            f"{name}={old.get(name, 'unknown to an earlier version')} there, {asked.get(name)} asked"
            for name in dict.fromkeys([*old, *asked])
            if name not in ("count", "batch_size") and not self._alike(name, old.get(name), asked.get(name))
        )
        if changed:
            empty = not manifest["complete"] and not any(self.folder.glob("shard-*"))
            raise ConfigError(
                f"'{self.folder}' was {'begun' if empty else 'made'} with other settings ({changed}); ask for the same"
                f"{', remove it, in which nothing is yet,' if empty else ''} or choose another folder"
            )
        if old["count"] > self.count:
            holds = "holds" if manifest["complete"] else "is unfinished and is to hold"
            raise ConfigError(
                f"'{self.folder}' {holds} {old['count']} samples, {self.count} are asked for; ask for {old['count']} "
                "or more, or choose another folder"
            )

    def _alike(self, name: str, old: Any, asked: Any) -> bool:
        if name == "embeddings":  # of which earlier versions' latents do not say that they have none
            return bool(old) == bool(asked)
        return same_network(old, asked) if name == "teacher" else old == asked

    def _summed(self, path: Path) -> Path:
        """Where a shard's checksum is until the manifest has it."""
        return path.with_name(f".{path.name}.sha256")

    def _good(self, name: str, known: dict[str, str]) -> bool:
        path = self.folder / name
        if not path.is_file():
            return False
        if name in known and checksum(path) != known[name]:
            warnings.warn(f"{path} is damaged and is made again", stacklevel=2)
            return False
        return True


def _storable(tensor: Tensor, name: str, indices: list[int]) -> Tensor:
    """In float16, as shards are; what would be stored as no number makes whole trainings skip their updates."""
    stored = tensor.half().cpu()
    finite = stored.flatten(1).isfinite().all(1)
    if not finite.all():
        lost = [index for index, good in zip(indices, finite.tolist(), strict=True) if not good]
        raise FloatingPointError(
            f"{name} of {len(lost)} of {len(indices)} samples is not finite in float16, the first is number {lost[0]}; "
            "nothing of their shard was written: look at the weights of what makes them"
        )
    return stored


class TeacherLatents(Maker):
    """Latents a teacher pipeline makes from prompts with its own sampler.

    Args:
        backbone: the teacher.
        folder: where the shards go.
        generation: the settings.
    """

    kind = "teacher"

    def __init__(self, backbone: Backbone, folder: str | Path, generation: Generation):
        self.backbone, self.generation = backbone, generation
        self._pipeline: Any = None
        settings = {
            "kind": self.kind,
            "teacher": backbone.fingerprint,
            "dtype": str(backbone.dtype),
            **asdict(generation),
        }
        self.lines = None if generation.prompts == SHAPES else read_prompts(generation.prompts)
        if self.lines is not None:
            settings["prompts_checksum"] = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        super().__init__(folder, settings, generation.count, generation.shard_size, generation.batch_size)

    def check(self) -> None:
        """As of all folders; and refuses what the pipeline cannot be asked, before anything is written.

        Raises:
            ConfigError: one of these.
        """
        self.backbone.check_size(self.generation.height, self.generation.width)
        self.scheduler()
        super().check()

    def make(self, indices: list[int], device: torch.device) -> Made:
        noise, prompts = self.noise(indices, device), self._prompts(indices)
        made = {"x0": self.solve(prompts, noise, indices), **self._kept(noise)}
        if self.generation.embeddings:
            made |= {f"cond.{name}": tensor for name, tensor in self._embed(prompts, device).items()}
        return made, prompts

    def _kept(self, noise: Tensor) -> dict[str, Tensor]:
        """What is stored of the noise."""
        return {}

    def _embed(self, prompts: list[str], device: torch.device) -> Cond:
        with torch.no_grad():
            return self.text_encoder.to(device)(prompts)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The teacher's text encoders, read once."""
        return self.backbone.text_encoder().eval()

    def noise(self, indices: list[int], device: torch.device) -> Tensor:
        """What the samples begin with, `[N, C, h, w]`; a function of the seed and each index."""
        shape = self.backbone.latent_shape(self.generation.height, self.generation.width)
        return self._draws(indices, device).normal("generate/noise", *shape)

    def solve(self, prompts: list[str], noise: Tensor, indices: list[int]) -> Tensor:
        """The teacher's latents for N prompts from `noise`; guidance doubles the batch of a call, not the calls.

        A sampler that draws more noise on its way draws that of each index. The latents are float32 between the steps,
        whatever the network computes in: rounded 50 times to bfloat16 they would be off by 5 %.
        """
        settings = self.generation
        size = {side: getattr(settings, side) for side in ("height", "width") if getattr(settings, side)}
        call = {**self.backbone.call, "num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
        noise, pipeline = noise.float(), self.pipeline(noise.device)
        generators = self._draws(indices, noise.device).generators("generate/between steps")
        with own_noise(pipeline.scheduler, generators), torch.no_grad():
            try:
                return pipeline(prompts, latents=noise, output_type="latent", **size, **call).images
            except ValueError as error:  # how diffusers refuses sizes, numbers of steps, ...
                raise ConfigError(f"{type(pipeline).__name__} cannot be called so: {error}") from error

    def pipeline(self, device: torch.device) -> Any:
        """The teacher's pipeline, read once."""
        if self._pipeline is None:
            self._pipeline = self.backbone.pipeline(**self.backbone.unchecked, **self.shared).to(device)
            self._pipeline.set_progress_bar_config(disable=True)
            if self.backbone.dtype != torch.float32:
                between_float32(getattr(self._pipeline, self.backbone.denoiser_name), self.backbone.dtype)
            if self.solver:
                self._pipeline.scheduler = backbones.solver(self.solver, self._pipeline.scheduler)
        return self._pipeline

    @property
    def shared(self) -> dict[str, Any]:
        """Components of the pipeline that are read already."""
        return self.text_encoder.components if self.generation.embeddings else {}

    def scheduler(self) -> Any:
        """What the pipeline will sample with."""
        own = self.backbone.scheduler()
        return backbones.solver(self.solver, own) if self.solver else own

    @property
    def solver(self) -> str | None:
        """The scheduler in place of the pipeline's own."""
        return self.generation.solver

    def _draws(self, indices: list[int], device: torch.device) -> Draws:
        return Draws(self.generation.seed, 0, indices[0], len(indices), device)

    def _prompts(self, indices: list[int]) -> list[str]:
        if self.lines is None:
            return shapes.captions(self.generation.seed + 1000, indices)  # not the teacher's own training pictures
        return [self.lines[index % len(self.lines)] for index in indices]


def between_float32(network: nn.Module, dtype: torch.dtype) -> None:
    """Lets a pipeline's network compute in `dtype` while what goes in and comes out is float32.

    Args:
        network: called as diffusers' pipelines do: the latents are the one argument of four dimensions, and the answer
            is a tuple.
        dtype: of its weights.
    """

    def lower(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.ndim == 4 else value

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(lower, given)), {name: lower(value) for name, value in named.items()}

    network.register_forward_pre_hook(before, with_kwargs=True)
    network.register_forward_hook(lambda _, given, answer: tuple(part.float() for part in answer))


class TeacherPairs(TeacherLatents):
    """ODE pairs: the teacher's latents with the noise each came from (Diffusion2GAN, section 3.1).

    The noise is rounded to float16, and to the teacher's own precision, before the teacher sees it, so what is stored
    is what it answered to.
    """

    kind = "pairs"
    what = "pairs"

    def noise(self, indices: list[int], device: torch.device) -> Tensor:
        return super().noise(indices, device).to(self.backbone.dtype).half().float()

    def _kept(self, noise: Tensor) -> dict[str, Tensor]:
        return {"noise": noise}

    def check(self) -> None:
        """As of all folders; and refuses a sampler that draws noise.

        Raises:
            ConfigError: one of these.
        """
        super().check()
        scheduler = self.scheduler()
        if draws_noise(scheduler):
            raise ConfigError(
                f"{type(scheduler).__name__} draws noise on its way, so its answer belongs to no noise it began with; "
                "pairs need a deterministic solver, such as DDIMScheduler or DPMSolverMultistepScheduler"
            )

    @property
    def solver(self) -> str | None:
        flow = isinstance(self.backbone.process(), RectifiedFlow)
        return self.generation.solver or (None if flow else "DDIMScheduler")


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

    def make(self, indices: list[int], device: torch.device) -> Made:
        batch = self.images.__getitems__(indices)
        with torch.no_grad():
            return {"x0": self.autoencoder.to(device).encode(batch["pixels"].to(device))}, batch["prompts"]


def make_here(maker: Maker, title: str, processes: int = 1) -> None:
    """Makes what is missing on this machine, with a progress bar.

    Args:
        maker: makes and writes the shards.
        title: of the bar.
        processes: that share the work where there is no GPU; on one core each, small networks paint more than on all
            cores together.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    maker.begin()
    todo = maker.missing()
    processes = min(processes, len(todo))
    if processes > 1 and device.type == "cpu" and not multiprocessing.current_process().daemon:
        _write_on_cores(maker, todo, title, processes)
    else:
        with counted(title, maker.total(todo), maker.what) as advance:
            for shard in todo:
                maker.write(shard, device, advance)
    maker.finish()


def _write_on_cores(maker: Maker, todo: list[int], title: str, processes: int) -> None:
    """Writes the shards `todo` in as many processes of one thread."""
    try:
        workers = iter(DataLoader(_Shards(maker, todo), None, num_workers=processes))  # before the bar starts a thread
        with counted(title, maker.total(todo), maker.what) as advance:
            for made in workers:
                if isinstance(made, Exception):
                    raise made
                advance(made)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise ConfigError(
            f"a process that made {maker.what} was killed, for its memory perhaps ({error}); the same command goes on "
            "from the last whole shard, and with OMP_NUM_THREADS=1 one process makes them alone"
        ) from error


class _Shards(Dataset[int | Exception]):
    """The shards `todo`, made by a loader's workers; an item is the number of samples, or why there are none."""

    def __init__(self, maker: Maker, todo: list[int]):
        self.maker, self.todo = maker, todo

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, index: int) -> int | Exception:
        shard = self.todo[index]
        try:
            self.maker.write(shard, torch.device("cpu"))
        except (ConfigError, FloatingPointError, OSError) as error:  # the loader would add its traceback
            return error
        return len(self.maker.samples(shard))
