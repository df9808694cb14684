"""Pipelines of diffusers as collaboration calls them: batches of prompts, each with inputs and noise of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distill.diffusion.sampling import own_noise
from distill.errors import ConfigError

SIDES = ("height", "width")
WATCHED = "callback_on_step_end"  # the argument of most pipelines that is told of every step
GIVEN_HERE = ("prompt", "generator", "output_type", "return_dict", WATCHED)  # to every batch, so by no call
TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")  # of every sample
OWN_LEVELS = ("timesteps", "sigmas", "denoising_start", "denoising_end")  # that set a number of steps of their own


def paint(
    pipeline: Any,
    call: dict[str, Any],
    prompts: list[str],
    generators: list[torch.Generator],
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None, int]:
    """One batch of a pipeline, every sample with noise of its own alone.

    Args:
        pipeline: of diffusers.
        call: its arguments besides prompts and generators.
        prompts, generators: B of each.
        watch: gets the number of each step, from 0, and the latents `[B, C, H, W]` after it.

    Returns:
        Images `[B, 3, H, W]` in [0, 1] on the CPU, their latents where the pipeline tells them, and the steps taken.
    """
    seen: dict[str, Any] = {"steps": 0, "latents": None}

    def note(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if watch is not None:
            watch(seen["steps"], tensors["latents"])
        seen["steps"] += 1
        seen["latents"] = tensors["latents"]
        return {}

    texts = {name: [call[name]] * len(prompts) for name in TEXTS if isinstance(call.get(name), str)}
    watched = {WATCHED: note} if WATCHED in arguments(pipeline) else {}
    with scaled_noise(pipeline.scheduler), own_noise(pipeline.scheduler, generators):
        answer = pipeline(prompt=prompts, generator=generators, output_type="pt", **{**call, **texts, **watched})
    return answer.images.float().cpu(), seen["latents"], seen["steps"] or len(pipeline.scheduler.timesteps)


@contextmanager
def scaled_noise(scheduler: Any) -> Iterator[None]:
    """Inside, a scheduler has `scale_noise`, what pipelines of a flow ask for; other solvers call it `add_noise`."""
    if hasattr(scheduler, "scale_noise"):
        yield
        return
    scheduler.scale_noise = lambda sample, timestep, noise: scheduler.add_noise(sample, noise, timestep)
    try:
        yield
    finally:
        del scheduler.scale_noise


def arguments(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline can be called with, by name."""
    return inspect.signature(pipeline.__call__).parameters


def accepted(pipeline: Any, call: dict[str, Any]) -> dict[str, Any]:
    """A call without the height and width, or the rest of another pipeline's arguments, that this one does not take."""
    known = arguments(pipeline)
    return {name: value for name, value in call.items() if name in known}


def check_calls(student: tuple[Any, dict[str, Any]], teacher: tuple[Any, dict[str, Any]]) -> None:
    """Refuses calls with what every batch is given here or what a pipeline does not take, and those of a teacher with
    a number of steps of its own.

    Args:
        student, teacher: each a pipeline and its call.

    Raises:
        ConfigError: one of these.
    """
    for who, (pipeline, call) in (("student", student), ("teacher", teacher)):
        if named := [name for name in GIVEN_HERE if name in call]:
            raise ConfigError(f"the {who}'s call names {', '.join(named)}, which every batch is given; leave it out")
        if (count := call.get("num_images_per_prompt")) not in (None, 1):
            raise ConfigError(
                f"the {who}'s call asks for num_images_per_prompt={count}, and every prompt gets one image here; name "
                "the prompt more than once"
            )
        sized = SIDES if who == "teacher" else ()  # the images' size, which not every teacher is asked for
        if named := [name for name in call if name not in (*arguments(pipeline), *sized)]:
            raise ConfigError(
                f"the {who}'s call names {', '.join(named)}, which a {type(pipeline).__name__} does not take; leave it "
                "out"
            )
    if named := [name for name in OWN_LEVELS if teacher[1].get(name) is not None]:
        raise ConfigError(
            f"the teacher's call names {', '.join(named)}, which would set its number of steps in the place of "
            "teacher_steps; leave that out, and take no few-step student for a teacher"
        )


def check_inputs(inputs: dict[str, Any], count: int, *pipelines: Any) -> None:
    """Refuses inputs without a value for each of `count` prompts, or that one of the pipelines does not take.

    Raises:
        ConfigError: one of these.
    """
    for name, values in inputs.items():
        for pipeline in pipelines:
            if name not in arguments(pipeline) or name in GIVEN_HERE:
                raise ConfigError(f"inputs name {name}, which a {type(pipeline).__name__} does not take; leave it out")
        many = hasattr(values, "__getitem__") and not isinstance(values, str | dict)
        if not many or len(values) != count:
            got = len(values) if many else type(values).__name__
            raise ConfigError(f"inputs give one {name} for each of the {count} prompts, as a list; got {got}")
        if any(value is None for value in values):
            raise ConfigError(f"inputs give one {name} for each of the {count} prompts, and one of them is None")


@dataclass(frozen=True)
class Asked:
    """N prompts, inputs with a value for each, and what makes each one's generator in the state it begins with."""

    prompts: list[str]
    inputs: dict[str, Any]
    starts: list[Callable[[], torch.Generator]]
    batch_size: int

    def of(self, part: list[int]) -> tuple[list[str], dict[str, Any], list[torch.Generator]]:
        """Prompts, inputs and generators of some."""
        prompts = [self.prompts[index] for index in part]
        return prompts, _pick(self.inputs, part), [self.starts[index]() for index in part]


def _pick(inputs: dict[str, Any], part: list[int]) -> dict[str, Any]:
    return {
        name: values[part] if isinstance(values, Tensor) else [values[index] for index in part]
        for name, values in inputs.items()
    }


def as_prompts(prompt: Any) -> list[str]:
    """One prompt or many as a list.

    Raises:
        ConfigError: one of them is no text.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if strange := [one for one in prompts if not isinstance(one, str)]:
        raise ConfigError(f"prompts are texts; got {strange[0]!r}")
    return prompts


def starts_of(generator: Any, count: int, device: torch.device) -> list[Callable[[], torch.Generator]]:
    """For each sample, what makes a generator in the state its own begins with; on any device, as diffusers allows.

    Raises:
        ConfigError: another number of generators than of samples.
    """
    if isinstance(generator, list):
        if len(generator) != count:
            raise ConfigError(
                f"give one generator for all, or one for each of the {count} prompts; got {len(generator)}"
            )
        return [partial(_in_state, one.device, one.get_state()) for one in generator]
    where = generator.device if generator else "cpu"
    seeds = torch.randint(2**62, (count,), generator=generator, device=where).tolist()
    return [partial(_seeded, device, seed) for seed in seeds]


def _in_state(device: torch.device, state: Tensor) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def network_of(pipeline: Any) -> Any:
    """The denoiser of a pipeline."""
    return getattr(pipeline, "transformer", None) or pipeline.unet


def own_size(pipeline: Any) -> dict[str, int]:
    """The height and width that a pipeline paints where its call names none; empty where it does not tell."""
    side = getattr(pipeline, "default_sample_size", None) or network_of(pipeline).config.get("sample_size")
    factor = getattr(pipeline, "vae_scale_factor", None)
    if side is None or factor is None:
        return {}
    pair = (side, side) if isinstance(side, int) else side
    return {name: n * factor for name, n in zip(SIDES, pair, strict=True)}


def at_own_size(student: tuple[Any, dict[str, Any]], teacher: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    """The teacher's call, with the teacher's own size where that is another than what the student paints and the call
    names none; not where the student paints another format, which would be squeezed.

    Args:
        student, teacher: each a pipeline and its call.
    """
    painted = own_size(student[0]) | {side: student[1][side] for side in SIDES if student[1].get(side)}
    size, call = own_size(teacher[0]), teacher[1]
    high, wide = (size.get(side, 1) / painted.get(side, size.get(side, 1)) for side in SIDES)
    return call if size == painted or high != wide else {**size, **call}


def fit(images: Tensor, size: dict[str, int]) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] at a height and width."""
    wished = (size["height"], size["width"])
    if images.shape[-2:] == wished:
        return images
    return interpolate(images, wished, mode="bicubic", antialias=True).clamp(0, 1)


def same_autoencoder(one: Any, other: Any) -> bool:
    """Whether two pipelines' latents mean the same."""
    first, second = getattr(one, "vae", None), getattr(other, "vae", None)
    if first is None or second is None:
        return False
    if first is second:
        return True
    states = first.state_dict(), second.state_dict()
    meant = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    if any(first.config.get(name) != second.config.get(name) for name in meant) or states[0].keys() != states[1].keys():
        return False
    pairs = ((tensor, states[1][name]) for name, tensor in states[0].items())
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float().cpu(), other.float().cpu(), atol=1e-2, rtol=1e-2)


class Pictures:
    """Images as they come, as `output_type` says, none of them twice in memory."""

    def __init__(self, count: int, output_type: str):
        self.count, self.output_type = count, output_type
        self.tensor: Tensor | None = None
        self.pictures: list[Any] = [None] * count

    def keep(self, index: int, image: Tensor) -> None:
        """`[3, H, W]` in [0, 1]."""
        from diffusers import DiffusionPipeline

        if self.output_type == "pil":
            array = image[None].nan_to_num().permute(0, 2, 3, 1).numpy()
            (self.pictures[index],) = DiffusionPipeline.numpy_to_pil(array)
            return
        if self.tensor is None:
            self.tensor = image.new_empty(self.count, *image.shape)
        self.tensor[index] = image

    def all(self) -> Any:
        """All of them."""
        if self.tensor is None:
            return self.pictures
        return self.tensor if self.output_type == "pt" else self.tensor.permute(0, 2, 3, 1).numpy()
