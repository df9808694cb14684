"""Which family a pipeline belongs to."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from distill.backbones.base import ADAPTERS, Backbone, Schedule
from distill.diffusion.sampling import on_same_noise
from distill.errors import ConfigError
from distill.files import ASSETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
TINY = ("tiny-sd3", "tiny-sd")  # the pipelines in distill/assets


def load(name: str, dtype: torch.dtype = torch.float32, schedule: Schedule | None = None) -> Backbone:
    """The backbone of a shipped tiny pipeline, a folder in the diffusers layout, or a hub id; see `Backbone`.

    Raises:
        ConfigError: no pipeline there, one of a family that is not supported, or a change its schedule does not know.
    """
    from distill.backbones.sd import SDBackbone
    from distill.backbones.sd3 import SD3Backbone
    from distill.backbones.sdxl import SDXLBackbone

    families: dict[str, type[Backbone]] = {
        "StableDiffusionPipeline": SDBackbone,
        "StableDiffusionXLPipeline": SDXLBackbone,
        "StableDiffusion3Pipeline": SD3Backbone,
    }
    path = str(ASSETS / name) if name in TINY else name
    pipeline = _pipeline_class(path)
    if pipeline not in families:
        raise ConfigError(f"'{name}' is a {pipeline}; a teacher must be one of {', '.join(families)}")
    return families[pipeline](path, dtype, schedule)


def dtype_of(name: str, half: bool = False) -> torch.dtype:
    """The precision of a pipeline's weights by its name.

    Args:
        name: one of `DTYPES`.
        half: also float16, which has no room for the gradients and the 50 steps that training asks a teacher for.

    Raises:
        ConfigError: another name.
    """
    known = [one for one in DTYPES if half or one != "float16"]
    if name not in known:
        raise ConfigError(f"a {'pipeline' if half else 'teacher'}'s dtype is one of {', '.join(known)}; got {name}")
    return DTYPES[name]


def solver(name: str, scheduler: Any) -> Any:
    """The diffusers scheduler called `name`, on the noise schedule of `scheduler`.

    None clips: that is DDIM's default, among others', and right for pixels, while these are latents.

    Raises:
        ConfigError: diffusers has no such scheduler, or it cannot follow this noise schedule.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ConfigError(f"diffusers has no scheduler '{name}'; name one such as DPMSolverMultistepScheduler")
    is_flow = _is_flow(type(scheduler))
    known = inspect.signature(kind).parameters
    given: dict[str, Any] | None = {"clip_sample": False} if "clip_sample" in known else {}
    if is_flow and not _is_flow(kind):
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": scheduler.config.shift}
        given = flow if "use_flow_sigmas" in known else None
    try:
        made = None if given is None else kind.from_config(scheduler.config, **given)
    except (TypeError, ValueError):  # a setting that this pipeline has not, or has otherwise
        made = None
    if made is None or not (is_flow or _follows(made, scheduler)):
        raise ConfigError(
            f"{name} cannot follow this pipeline's {'rectified flow' if is_flow else 'noise schedule'}; "
            "name one such as DPMSolverMultistepScheduler"
        )
    return made


def _follows(made: Any, own: Any) -> bool:
    """Whether a scheduler goes down the noise levels of another, variance-preserving one, as a sampler is called."""
    if not on_same_noise(made, own) or not hasattr(made, "step"):
        return False
    _, _, _, *more = inspect.signature(made.step).parameters.values()  # after the answer, the timestep and the sample
    made.set_timesteps(4)
    goes_down = float(made.timesteps[0]) > float(made.timesteps[-1])
    return goes_down and all(option.default is not option.empty or option.kind in VARIADIC for option in more)


def _is_flow(kind: type) -> bool:
    return kind.__name__.startswith("FlowMatch")


def _pipeline_class(path: str) -> str:
    from diffusers import DiffusionPipeline

    where = f"give a folder with a model_index.json, a hub id, or the shipped {', '.join(TINY)}"
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    looks_local = looks_local or path.startswith("runs/")  # where this package's commands write; no need to ask the hub
    if not Path(path).exists() and looks_local:
        raise ConfigError(f"there is no pipeline at '{path}'; {where}")
    if Path(path).suffix == ".ckpt" and Path(path).exists():
        raise ConfigError(
            f"'{path}' is a checkpoint and no pipeline; `distill export` makes one of it, sample and evaluate take it "
            "as --checkpoint"
        )
    is_pipeline = (Path(path) / "model_index.json").is_file()
    if (Path(path) / ADAPTERS).is_file() and not is_pipeline:
        raise ConfigError(
            f"'{path}' holds adapters and no pipeline; export their checkpoint without --lora for one they are merged "
            "into"
        )
    if Path(path).exists() and not is_pipeline:
        raise ConfigError(f"'{path}' is no diffusers pipeline: it has no model_index.json; {where}")
    try:
        name = DiffusionPipeline.load_config(path)["_class_name"]
    except OSError as error:
        reason = str(error).splitlines()[0]
        here = "" if Path(path).exists() else f"there is no folder '{path}' here, and "
        raise ConfigError(f"{here}the pipeline '{path}' cannot be read ({reason}); {where}") from error
    return name if isinstance(name, str) else name[-1]  # a pipeline's own code comes as its file and its class
