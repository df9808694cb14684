"""What every family of diffusers pipelines offers to the rest: its networks, its conditioning, and how it is saved."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.batch import Cond
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.process import Process
from distill.errors import ConfigError
from distill.files import pieces, read_json, save_json, written_whole

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")
WEIGHTS = ("*.safetensors", "*.bin")
Schedule = dict[str, Any]  # changes to a noise schedule, by the names of diffusers' schedulers
ADAPTERS = "pytorch_lora_weights.safetensors"  # as diffusers calls the file
CALL_FILE = "distill.json"  # the arguments a pipeline of ours is meant to be called with; diffusers passes over it


def absent_components(path: str | Path) -> dict[str, None]:
    """Components that a pipeline was saved without, or whose folders its own lacks, as partial downloads do where they
    can be done without; diffusers wants to be told at every load.
    """
    from diffusers import DiffusionPipeline

    index, local = DiffusionPipeline.load_config(path), Path(path).is_dir()
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple)}
    lost = [name for name in OPTIONAL if local and not (Path(path) / name).is_dir()]
    return {name: None for name, entry in entries.items() if entry[0] is None or name in lost}


class Autoencoder(nn.Module):
    """An `AutoencoderKL` that speaks the diffusion model's scaled latents.

    Args:
        network: the diffusers autoencoder.

    Raises:
        ConfigError: one whose latents are scaled channel by channel.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        if network.config.get("latents_mean") or network.config.get("latents_std"):
            raise ConfigError(
                "the pipeline's autoencoder has a mean and a deviation for each latent channel (latents_mean, "
                "latents_std), which is not supported; give a pipeline whose autoencoder has one scaling_factor"
            )
        self.scale = network.config.scaling_factor
        self.shift = network.config.get("shift_factor") or 0.0

    def encode(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> latents `[B, C, h, w]`, the posterior's mean."""
        return (self.network.encode(pixels).latent_dist.mode() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> pixels `[B, 3, H, W]`, about [-1, 1], not clamped; differentiable."""
        return self.network.decode(latents / self.scale + self.shift).sample

    forward = decode


class TextEncoder(nn.Module):
    """Prompts to conditioning tensors. Subclasses hold the family's encoders as submodules."""

    @property
    def components(self) -> dict[str, Any]:
        """Tokenizers and encoders by their names in the pipeline."""
        raise NotImplementedError

    def forward(self, prompts: list[str]) -> Cond:
        """B prompts -> at least `text` `[B, L, D]` and `pooled` `[B, P]`."""
        raise NotImplementedError


class Backbone:
    """A pipeline on disk, on the hub, or shipped; light until a network is asked for.

    Args:
        path: folder or hub id of a diffusers pipeline.
        dtype: of the weights when they are loaded.
        schedule: what differs from the pipeline's own noise schedule, of the names in `schedule_options`.

    Raises:
        ConfigError: a change that the family's schedule does not know.
    """

    schedule_options: tuple[str, ...] = ()
    unchecked: dict[str, Any] = {}  # components without the safety checker, whose black pictures would be measured
    denoiser_name = "unet"  # the pipeline component that is distilled

    def __init__(self, path: str, dtype: torch.dtype = torch.float32, schedule: Schedule | None = None):
        self.path, self.dtype, self.schedule = path, dtype, schedule or {}
        if unknown := [name for name in self.schedule if name not in self.schedule_options]:
            known = f"knows {', '.join(self.schedule_options)}" if self.schedule_options else "cannot be changed"
            raise ConfigError(f"model.schedule names {', '.join(unknown)}; the noise schedule of '{path}' {known}")

    # What only a family knows -------------------------------------------------------------------------------------

    def denoiser(self) -> Denoiser:
        """A fresh copy of the pipeline's network, in x0."""
        raise NotImplementedError

    def text_encoder(self) -> TextEncoder:
        """The pipeline's text encoders."""
        raise NotImplementedError

    def process(self) -> Process:
        """The pipeline's noise schedule and prediction type."""
        raise NotImplementedError

    @property
    def pooled(self) -> int:
        """Size of the pooled text embedding."""
        raise NotImplementedError

    def student_scheduler(self) -> Any:
        """The diffusers scheduler that samples a few-step student."""
        raise NotImplementedError

    def student_call(self, levels: list[float], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call that make `student_scheduler` visit exactly `levels`.

        Args:
            levels: noise levels, most noise first.
            size: height and width of the latents it was trained on; the pipeline's own if not given.
        """
        return {**self._levels_call(levels), "num_inference_steps": len(levels), "guidance_scale": 0.0} | (
            {"height": size[0] * self.factor, "width": size[1] * self.factor} if size else {}
        )

    def _levels_call(self, levels: list[float]) -> dict[str, Any]:
        raise NotImplementedError

    def embedding_arguments(self, cond: Cond) -> dict[str, Any]:
        """The pipeline's arguments that stand for prompts encoded already."""
        raise NotImplementedError

    # What all share -------------------------------------------------------------------------------------------------

    @cached_property
    def folder(self) -> str:
        """Where the pipeline's files are, without its safety checker. Those of a hub id are fetched with the first
        network: a run of weeks that has begun asks the hub for nothing more.
        """
        from diffusers import DiffusionPipeline

        if Path(self.path).is_dir():
            return self.path
        left_out = {**self.absent, **self.unchecked}
        try:
            return str(DiffusionPipeline.download(self.path, **left_out))
        except Exception:  # a hub that is not reached has many kinds; what was fetched before may be enough
            return str(DiffusionPipeline.download(self.path, local_files_only=True, **left_out))

    @property
    def near(self) -> str:
        """The folder if it is there already, otherwise the hub id: for what needs no other network."""
        return self.__dict__.get("folder", self.path)

    def plain(self, dtype: torch.dtype) -> Backbone:
        """The same files with weights in another precision and the pipeline's own noise schedule."""
        _ = self.folder  # fetched once, so that all networks are of one revision
        other = copy.copy(self)
        other.dtype, other.schedule = dtype, {}
        return other

    def autoencoder(self) -> Autoencoder:
        """The pipeline's autoencoder."""
        from diffusers import AutoencoderKL

        network = AutoencoderKL.from_pretrained(
            self.near, subfolder="vae", torch_dtype=self.dtype, variant=self.variant("vae")
        )
        return Autoencoder(network)

    def variant(self, component: str) -> str | None:
        """`fp16` where a folder has a component's weights in that variant alone, as half-size downloads do."""
        names = [file.name for kind in WEIGHTS for file in (Path(self.near) / component).glob(kind)]
        return "fp16" if names and all(is_half(name) for name in names) else None

    @property
    def half_alone(self) -> bool:
        """Whether any component's weights are there in the variant `fp16` alone."""
        folders = [path.name for path in Path(self.near).iterdir()] if Path(self.near).is_dir() else []
        return any(self.variant(name) for name in folders)

    @property
    def absent(self) -> dict[str, None]:
        """Components that diffusers wants to be told are absent at every load."""
        return {}

    def pipeline(self, **components: Any) -> Any:
        """The stock diffusers pipeline, with `components` in place of its own."""
        from diffusers import DiffusionPipeline

        place = self.folder if self.unchecked.keys() <= components.keys() else self.path
        return DiffusionPipeline.from_pretrained(
            place,
            torch_dtype=self.dtype,
            variant="fp16" if self.half_alone else None,  # of the components that have it
            **{**self.absent, **components},
        )

    @property
    def without_others(self) -> dict[str, None]:
        """Components for a pipeline of the denoiser alone: no text encoders, no autoencoder, no safety checker."""
        from diffusers import DiffusionPipeline

        large = [n for n in DiffusionPipeline.load_config(self.near) if n.startswith("text_encoder") or n == "vae"]
        return {**dict.fromkeys(large), **self.unchecked}

    def scheduler(self) -> Any:
        """The pipeline's own sampler, without the rest of it."""
        import diffusers

        name = diffusers.DiffusionPipeline.load_config(self.near)["scheduler"][1]
        return getattr(diffusers, name).from_pretrained(self.near, subfolder="scheduler")

    def student_pipeline(self, student: Denoiser, **components: Any) -> Any:
        """A stock pipeline around `student` with the few-step scheduler."""
        components = {self.denoiser_name: student.network, "scheduler": self.student_scheduler(), **components}
        return self.pipeline(**components)

    @cached_property
    def call(self) -> dict[str, Any]:
        """The arguments this pipeline's folder says it is to be called with; empty for foreign pipelines."""
        return self._own.get("call", {})

    @cached_property
    def calls(self) -> dict[str, dict[str, Any]]:
        """For an exported student: call arguments by number of steps; empty for others."""
        return self._own.get("calls", {})

    @cached_property
    def _own(self) -> dict[str, Any]:
        """What this package wrote beside the pipeline, on disk or on the hub."""
        file = Path(self.path) / CALL_FILE
        if not Path(self.path).is_dir():
            from huggingface_hub import hf_hub_download, try_to_load_from_cache
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

            try:
                file = Path(hf_hub_download(self.path, CALL_FILE))
            except LocalEntryNotFoundError:
                if try_to_load_from_cache(self.path, CALL_FILE) is None:  # which has never been asked either
                    warnings.warn(
                        f"the hub cannot be asked whether '{self.path}' has a {CALL_FILE}, so it is taken for a "
                        "pipeline of others; if this package exported it, run "
                        f"`hf download {self.path} {CALL_FILE}` where there is a network",
                        stacklevel=2,
                    )
                return {}
            except EntryNotFoundError:  # a pipeline that is not of ours
                return {}
        return read_json(file) if file.is_file() else {}

    @property
    def fingerprint(self) -> str:
        """Name and digest of the denoiser's configuration and weights; the id itself for a hub pipeline."""
        folder = Path(self.path) / self.denoiser_name
        if not folder.is_dir():
            return self.path
        return f"{Path(self.path).name}@{_digest(folder, (folder / 'config.json').read_bytes())}"

    @property
    def autoencoder_fingerprint(self) -> str:
        """Digest of the autoencoder's configuration and weights, alike in every pipeline that has it; the id itself for
        a hub pipeline.
        """
        folder = Path(self.path) / "vae"
        if not folder.is_dir():
            return self.path
        config = {name: value for name, value in read_json(folder / "config.json").items() if name[0] != "_"}
        return _digest(folder, json.dumps(config, sort_keys=True).encode())

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """`(C, h, w)` of the latents of a picture in pixels; of the pipeline's own size if none is given.

        Raises:
            ConfigError: as `check_size`.
        """
        self.check_size(height, width)
        denoiser = self.config()
        own = denoiser["sample_size"]
        return denoiser["in_channels"], *(own if side is None else side // self.factor for side in (height, width))

    def check_size(self, height: int | None, width: int | None) -> None:
        """Refuses pictures that are no whole number of latents high and wide; None is the pipeline's own side.

        Raises:
            ConfigError: one of these.
        """
        sides = [side for side in (height, width) if side is not None]
        if any(side < 1 or side % self.multiple for side in sides):
            raise ConfigError(
                f"'{self.path}' takes pictures whose height and width are positive multiples of {self.multiple} "
                f"pixels; got {' x '.join(map(str, sides))}"
            )

    @property
    def multiple(self) -> int:
        """Of which the sides of pictures are multiples, in pixels."""
        return self.factor

    @cached_property
    def factor(self) -> int:
        """Pixels per latent, each way."""
        from diffusers import AutoencoderKL

        return 2 ** (len(AutoencoderKL.load_config(self.near, subfolder="vae")["block_out_channels"]) - 1)

    def config(self) -> dict[str, Any]:
        """The denoiser's configuration."""
        raise NotImplementedError

    def save(self, pipeline: Any, folder: str | Path, card: str, calls: dict[str, Any]) -> None:
        """Writes a pipeline that stock diffusers loads: safetensors, scheduler, model card, and how it is called.

        Args:
            pipeline: of this family.
            folder: replaced as a whole.
            card: the text of its README.md.
            calls: content of the call file, `{"call": ..., "calls": ...}`.
        """
        with written_whole(folder) as part:
            pipeline.save_pretrained(part, safe_serialization=True)
            _say_how(part, card, calls)

    def save_adapters(
        self, pipeline: Any, adapters: dict[str, Tensor], folder: str | Path, card: str, calls: dict[str, Any]
    ) -> None:
        """Writes what stock diffusers loads into the teacher's pipeline: adapters of its denoiser, and the scheduler.

        Args:
            pipeline, folder, card, calls: as in `save`.
            adapters: weights by name, as `distill.diffusion.lora.portable` gives them.
        """
        with written_whole(folder) as part:
            part.mkdir()
            pipeline.save_lora_weights(part, **{f"{self.denoiser_name}_lora_layers": adapters}, weight_name=ADAPTERS)
            pipeline.scheduler.save_pretrained(part / "scheduler")
            _say_how(part, card, calls)


def is_half(name: str) -> bool:
    """Whether a file of weights is one of the variant `fp16`, whole or a shard."""
    return ".fp16." in name or ".fp16-" in name


def same_network(one: str | None, other: str | None) -> bool:
    """Whether two fingerprints are of the same network, whatever its folders are called."""
    if one is None or other is None or ("@" in one) != ("@" in other):
        return one == other
    return one.split("@")[-1] == other.split("@")[-1]


def _say_how(folder: Path, card: str, calls: dict[str, Any]) -> None:
    (folder / "README.md").write_text(card)
    save_json(calls, folder / CALL_FILE)


def _digest(folder: Path, config: bytes) -> str:
    """Of a network's configuration and the weights in its folder that diffusers reads: safetensors if it can, and no
    variant beside them.
    """
    digest, found = hashlib.sha256(config), sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in [file for file in found if not is_half(file.name)] or found:
        digest.update(pieces(file))
    return digest.hexdigest()[:12]
