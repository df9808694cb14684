"""Adaptive collaboration of a student and its teacher (Starodubcev et al. 2023, https://arxiv.org/abs/2312.10835)."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn.functional import interpolate

from distill.backbones.base import absent_components
from distill.collaboration.calibration import Calibration, digest
from distill.collaboration.judges import Judge, open_judge
from distill.data.loading import batches
from distill.diffusion.sampling import own_noise
from distill.errors import ConfigError
from distill.files import read_json, save_json, written_whole

KEPT, REFINED, REGENERATED = "kept", "refined", "regenerated"
MODES = ("refine", "regenerate")
SIDES = ("height", "width")
FILE = "adaptive.json"


@dataclass
class AdaptiveOutput(BaseOutput):
    """Images in the order of the prompts, with what happened to each.

    Attributes:
        images: as `output_type` says.
        scores: of the student's images, by the judge.
        decisions: `kept`, `refined` or `regenerated`.
        steps: network steps spent, guidance not counted twice.
    """

    images: Any
    scores: list[float]
    decisions: list[str]
    steps: list[int]


class AdaptivePipeline(DiffusionPipeline):
    """A student paints, a judge scores, and the teacher improves what scores below a threshold.

    Either by *refining*, adding noise to the student's latent and going on with the teacher's schedule from there, or
    by *regenerating* with the teacher from the same noise. Takes two diffusers pipelines that are called alike: text to
    image, image to image (SDEdit), inpainting, ControlNet. Tried are those of SD, SDXL and SD3.

    Images have the teacher's size where `teacher_call` gives `height` and `width`, and the student's where it does not.

    Args:
        student, teacher: pipelines, their schedulers in place.
        judge: what scores images, see `distill.collaboration.judges`.
        calibration: of this student at `student_call` by this judge; needed where a budget rather than a threshold is
            given.
        student_call, teacher_call: arguments of every call, such as `num_inference_steps` and `guidance_scale`; of the
            teacher's, the number of steps comes with the call.

    Raises:
        ConfigError: a calibration of another set-up.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        judge: Judge,
        calibration: Calibration | None = None,
        student_call: dict[str, Any] | None = None,
        teacher_call: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_to_config(_name_or_path="")  # type: ignore[attr-defined]  # diffusers asks every pipeline for one
        self.student, self.teacher, self.judge = student, teacher, judge
        self.student_call, self.teacher_call = dict(student_call or {}), dict(teacher_call or {})
        self.teacher_call.pop("num_inference_steps", None)
        self.calibration = calibration
        if calibration is not None:
            named = digest(network_of(teacher)) if "teacher" in calibration.choice else None
            calibration.check(digest(network_of(student)), self.student_call, judge.spec, named)
        for pipeline in (student, teacher):
            pipeline.set_progress_bar_config(disable=True)
        self._refiner: Any = None
        self._one_latent_space: bool | None = None  # compared once: an autoencoder is large

    # What a pipeline is asked for -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the student."""
        return self.student.dtype

    @property
    def components(self) -> dict[str, Any]:
        """Both pipelines, the judge and the calibration."""
        return {
            "student": self.student, "teacher": self.teacher, "judge": self.judge, "calibration": self.calibration
        }  # fmt: skip

    def to(self, *args: Any, **kwargs: Any) -> AdaptivePipeline:
        """Moves both pipelines."""
        for pipeline in (self.student, self.teacher):
            pipeline.to(*args, **kwargs)
        self._refiner = None
        return self

    # Painting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        budget: float | None = None,
        threshold: float | None = None,
        mode: str | None = None,
        variance: float | None = None,
        strength: float | None = None,
        teacher_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 16,
        inputs: dict[str, Sequence[Any] | Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AdaptiveOutput | tuple[Any, ...]:
        """Paints prompts.

        A sample's result depends on its prompt and generator alone, not on the batch it is painted in.

        Args:
            prompt: one or many.
            budget: average steps per image; with the calibration it sets the threshold.
            threshold: images that score below it are improved.
            mode: `refine` or `regenerate`.
            variance: of the noise a refined latent gets, in (0, 1): `sqrt(1 - variance) x + sqrt(variance) z` (the
                paper's sigma), or the same ratio of noise to data on a rectified flow. The teacher's schedule is cut at
                the level that comes closest.
            strength: the share of the teacher's schedule instead, as in diffusers' image to image.
            teacher_steps: of the teacher per improved image; as many are left of its schedule when it refines.
            generator: one for all, or one per prompt; the global one if not given.
            batch_size: of student and teacher; rejected images are gathered until the teacher's batch is full.
            inputs: more arguments of both pipelines with one value per prompt, such as `image` or `mask_image`.
            output_type: `pil`, `pt` (`[N, 3, H, W]` in [0, 1]) or `np` (`[N, H, W, 3]`).
            return_dict: `AdaptiveOutput` rather than a tuple.

        `mode`, `variance`, `teacher_steps` and, if there is no budget, the threshold are the calibration's choice where
        they are not given.

        Raises:
            ConfigError: neither budget nor threshold, a budget without calibration, or settings out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or batch_size < 1:
            raise ConfigError(f"give one prompt or more, and batches of 1 or more; got {len(prompts)} and {batch_size}")
        plan = self.plan(budget, threshold, mode, variance, strength, teacher_steps)
        starts_of = _starts(generator, len(prompts), self.device)
        inputs = inputs or {}
        images: list[Any] = [None] * len(prompts)
        scores, decisions, steps = [0.0] * len(prompts), [KEPT] * len(prompts), [0] * len(prompts)
        rejected: list[tuple[int, Tensor]] = []
        size: dict[str, int] = {}

        def improve(some: list[tuple[int, Tensor]]) -> None:
            part = [index for index, _ in some]
            asked, given = [prompts[index] for index in part], _pick(inputs, part) | size
            generators = [starts_of[index]() for index in part]
            better, spent = self._improve(plan, [start for _, start in some], asked, generators, given)
            for index, image in zip(part, _fit(better, size), strict=True):
                images[index], steps[index] = image, steps[index] + spent
                decisions[index] = REFINED if plan.refines else REGENERATED

        with self.progress_bar(total=len(prompts)) as bar:  # type: ignore[attr-defined]
            for part in batches(range(len(prompts)), batch_size):
                asked = [prompts[index] for index in part]
                generators = [starts_of[index]() for index in part]
                call = {**self.student_call, **_pick(inputs, part)}
                painted, latents, spent = paint(self.student, call, asked, generators)
                judged, own = self._scored(asked, painted), painted.shape[-2:]
                size |= {name: self.teacher_call.get(name) or n for name, n in zip(SIDES, own, strict=True)}
                same = plan.latent and latents is not None and latents.ndim == 4 and tuple(size.values()) == tuple(own)
                painted = _fit(painted, size)
                starts = latents if same and latents is not None else painted
                for index, image, score, start in zip(part, painted, judged, starts, strict=True):
                    images[index], scores[index], steps[index] = image, score, spent
                    if score < plan.threshold:
                        rejected.append((index, start))
                while len(rejected) >= batch_size:
                    improve(rejected[:batch_size])
                    rejected = rejected[batch_size:]
                bar.update(len(part))
            if rejected:
                improve(rejected)
        answer = _as(torch.stack(images), output_type)
        return AdaptiveOutput(answer, scores, decisions, steps) if return_dict else (answer, scores, decisions, steps)

    def plan(
        self,
        budget: float | None = None,
        threshold: float | None = None,
        mode: str | None = None,
        variance: float | None = None,
        strength: float | None = None,
        teacher_steps: int | None = None,
    ) -> Plan:
        """What a call with these arguments will do.

        Raises:
            ConfigError: as the call.
        """
        chosen = self.calibration.choice if self.calibration else {}
        mode = mode or chosen.get("mode", "refine")
        if variance is None and strength is None:
            variance = chosen.get("variance")
        count = teacher_steps if teacher_steps is not None else chosen.get("teacher_steps")
        if mode not in MODES:
            raise ConfigError(f"adaptive collaboration improves by {' or '.join(MODES)}; got mode='{mode}'")
        if count is None or count < 1:
            raise ConfigError(f"give teacher_steps, how many steps the teacher improves an image with; got {count}")
        threshold = self._threshold(budget, threshold, count)
        _check_steps(self.teacher.scheduler, count)
        if mode == "regenerate":
            return Plan(threshold, count, count)
        if (variance is None) == (strength is None):
            raise ConfigError("to refine, give either variance, such as 0.4, or strength")
        name, value = ("variance", variance) if variance is not None else ("strength", strength)
        if value is None or not 0 < value < 1:
            raise ConfigError(f"{name} must lie between 0 and 1; got {value}")
        schedule = cut(self.teacher.scheduler, count, variance, strength)
        if self._one_latent_space is None:
            self._one_latent_space = same_autoencoder(self.student, self.teacher)
        latent = self._one_latent_space and "mask_image" not in _arguments(self.teacher)
        return Plan(threshold, count, schedule, count / schedule, latent)

    def _threshold(self, budget: float | None, threshold: float | None, teacher_steps: int) -> float:
        if threshold is not None and budget is not None:
            raise ConfigError("give either a budget or a threshold, not both")
        if threshold is not None:
            return threshold
        if self.calibration is None:
            raise ConfigError("a budget needs a calibration of this student; `distill calibrate` makes one")
        if budget is None and "budget" not in self.calibration.choice:
            raise ConfigError("give a budget, the average number of steps per image, or a threshold of the score")
        budget = self.calibration.choice["budget"] if budget is None else budget
        return self.calibration.threshold(self.calibration.share(budget, teacher_steps))

    def _scored(self, prompts: list[str], images: Tensor) -> list[float]:
        scores = self.judge(prompts, images)
        if scores.shape != (len(prompts),):
            raise ConfigError(
                f"the judge '{self.judge.spec}' gave scores of shape {tuple(scores.shape)} for {len(prompts)} images; "
                "it must give one per image"
            )
        return scores.tolist()

    def _improve(
        self,
        plan: Plan,
        starts: list[Tensor],
        prompts: list[str],
        generators: list[torch.Generator],
        given: dict[str, Any],
    ) -> tuple[Tensor, int]:
        """The teacher's images, anew or from the student's, and the steps they took."""
        call = {**self.teacher_call, **given, "num_inference_steps": plan.schedule}
        if plan.refines:
            return self._refine(call | {"strength": plan.strength}, torch.stack(starts), prompts, generators)
        images, _, spent = paint(self.teacher, _accepted(self.teacher, call), prompts, generators)
        return images, spent

    def _refine(
        self, call: dict[str, Any], start: Tensor, prompts: list[str], generators: list[torch.Generator]
    ) -> tuple[Tensor, int]:
        """The student's images, or their latents, under noise and through what is left of the teacher's schedule."""
        for one in generators:  # another noise than the student began with
            one.manual_seed(int(torch.randint(2**62, (1,), generator=one, device=one.device)))
        if "control_image" in _arguments(self.refiner) and "image" in call:  # a ControlNet's input beside an image
            call = call | {"control_image": call["image"]}
        call = call | {"image": start.to(self.device, self.teacher.dtype)}
        with scaled_noise(self.teacher.scheduler):
            images, _, spent = paint(self.refiner, _accepted(self.refiner, call), prompts, generators)
        return images, spent

    @property
    def refiner(self) -> Any:
        """The teacher as a pipeline that begins with an image.

        Raises:
            ConfigError: there is none, or it begins with an image already.
        """
        if self._refiner is None:
            arguments = _arguments(self.teacher)
            if "mask_image" in arguments:
                self._refiner = self.teacher
            elif "strength" in arguments:
                raise ConfigError(
                    f"a {type(self.teacher).__name__} begins with the image that is edited, so it cannot refine "
                    "another; use mode='regenerate'"
                )
            else:
                try:
                    self._refiner = AutoPipelineForImage2Image.from_pipe(self.teacher)
                except ValueError as error:
                    raise ConfigError(
                        f"diffusers has no image-to-image form of a {type(self.teacher).__name__}; use "
                        "mode='regenerate'"
                    ) from error
                self._refiner.set_progress_bar_config(disable=True)
        self._refiner.scheduler = self.teacher.scheduler  # it may have been exchanged
        return self._refiner

    # What is kept ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes both pipelines, each a folder that stock diffusers loads, the judge's name and the calibration.

        Args:
            save_directory: replaced as a whole.
            kwargs: of both pipelines' own `save_pretrained`.
        """
        with written_whole(save_directory) as part:
            part.mkdir()
            self.student.save_pretrained(part / "student", **kwargs)
            self.teacher.save_pretrained(part / "teacher", **kwargs)
            kept = {
                "judge": self.judge.spec,
                "student_call": self.student_call,
                "teacher_call": self.teacher_call,
                "calibration": asdict(self.calibration) if self.calibration else None,
            }
            save_json(kept, part / FILE)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, judge: Judge | None = None, **kwargs: Any
    ) -> AdaptivePipeline:
        """Reads what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: the folder.
            judge: where the judge is one of your own, which cannot be found by its name.
            kwargs: of both pipelines' own `from_pretrained`, such as `torch_dtype`; a calibration holds for the weights
                in the precision they were scored in.

        Raises:
            ConfigError: no such folder, an unknown judge, or weights the calibration was not made for.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / FILE).is_file():
            raise ConfigError(f"'{folder}' is no adaptive pipeline: it has no {FILE}; give a folder it was saved to")
        kept = read_json(folder / FILE)
        student, teacher = (open_pipeline(folder / name, **kwargs) for name in ("student", "teacher"))
        calibration = Calibration(**kept["calibration"]) if kept["calibration"] else None
        judge = judge or open_judge(kept["judge"])
        return cls(student, teacher, judge, calibration, kept["student_call"], kept["teacher_call"])


@dataclass(frozen=True)
class Plan:
    """What is done with images that score below `threshold`.

    Attributes:
        threshold: of the score.
        teacher_steps: for each.
        schedule: steps of the teacher's whole schedule, of which refining does the last `teacher_steps`.
        strength: their share; None regenerates.
        latent: refine the latent itself rather than the decoded image.
    """

    threshold: float
    teacher_steps: int
    schedule: int
    strength: float | None = None
    latent: bool = False

    @property
    def refines(self) -> bool:
        """Rather than regenerates."""
        return self.strength is not None


def open_pipeline(folder: str | Path, **kwargs: Any) -> Any:
    """A diffusers pipeline from a folder, its absent components named as diffusers wants them to be."""
    return DiffusionPipeline.from_pretrained(folder, **absent_components(folder), **kwargs)


def cut(scheduler: Any, teacher_steps: int, variance: float | None = None, strength: float | None = None) -> int:
    """How many steps a schedule must have so that its last `teacher_steps` begin nearest to a noise level.

    Args:
        scheduler: the teacher's; its timesteps are set anew.
        teacher_steps: that are left.
        variance: of the noise where they begin, of a total of 1.
        strength: the share of the schedule that is left, in place of a variance.
    """
    longest = min(50 * teacher_steps, scheduler.config.num_train_timesteps)
    counts = [n for n in range(teacher_steps, longest + 1) if n * (teacher_steps / n) == teacher_steps]
    # (other n: diffusers would find one step more or less in `n * strength`, by rounding)
    if strength is not None:
        return min(counts, key=lambda n: abs(teacher_steps / n - strength))
    assert variance is not None

    def begins_at(n: int) -> float:
        return noise_variances(scheduler, n)[n - teacher_steps]

    place = bisect_left(counts, -variance, key=lambda n: -begins_at(n))  # the longer, the lower the last steps begin
    return min(counts[max(place - 1, 0) : place + 1], key=lambda n: abs(begins_at(n) - variance))


def noise_variances(scheduler: Any, steps: int) -> list[float]:
    """Of the noise at every step of a schedule, of a total variance of 1: from nearly 1 down to nearly 0."""
    scheduler.set_timesteps(steps)
    if not hasattr(scheduler, "sigmas") or len(scheduler.sigmas) < len(scheduler.timesteps):
        kept = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()]
        return (1 - kept).tolist()
    noise = scheduler.sigmas[: len(scheduler.timesteps) : scheduler.order].double().cpu()
    flows = type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False)
    data = 1 - noise if flows else torch.ones_like(noise)  # others count noise in units of the data
    return (noise**2 / (noise**2 + data**2)).tolist()


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


def _check_steps(scheduler: Any, steps: int) -> None:
    """Refuses a scheduler whose schedule cannot be made from a number of steps, or takes another number of them."""
    name = type(scheduler).__name__
    if scheduler.config.get("use_dynamic_shifting", False):
        raise ConfigError(
            f"the teacher's {name} shifts its schedule by the picture's size, which is not supported here"
        )
    scheduler.set_timesteps(steps)
    if (taken := len(scheduler.timesteps)) != steps:
        raise ConfigError(
            f"the teacher's {name} asks the network {taken} times in {steps} steps, so no budget could be kept; set "
            "one that asks once a step, such as DPMSolverMultistepScheduler"
        )


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

    watched = {"callback_on_step_end": note} if "callback_on_step_end" in _arguments(pipeline) else {}
    with own_noise(pipeline.scheduler, generators):
        answer = pipeline(prompt=prompts, generator=generators, output_type="pt", **{**call, **watched})
    return answer.images.float().cpu(), seen["latents"], seen["steps"] or len(pipeline.scheduler.timesteps)


def _arguments(pipeline: Any) -> Any:
    return inspect.signature(pipeline.__call__).parameters


def network_of(pipeline: Any) -> Any:
    """The denoiser of a pipeline."""
    return getattr(pipeline, "transformer", None) or pipeline.unet


def _accepted(pipeline: Any, call: dict[str, Any]) -> dict[str, Any]:
    """A call without the height and width, or the rest of another pipeline's arguments, that this one does not take."""
    known = _arguments(pipeline)
    return {name: value for name, value in call.items() if name in known}


def _fit(images: Tensor, size: dict[str, int]) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] at a height and width."""
    wished = (size["height"], size["width"])
    if images.shape[-2:] == wished:
        return images
    return interpolate(images, wished, mode="bicubic", antialias=True).clamp(0, 1)


def _pick(inputs: dict[str, Any], part: list[int]) -> dict[str, Any]:
    return {
        name: values[part] if isinstance(values, Tensor) else [values[index] for index in part]
        for name, values in inputs.items()
    }


def _starts(generator: Any, count: int, device: torch.device) -> list[Callable[[], torch.Generator]]:
    """For each sample, what makes a generator in the state its own begins with; on any device, as diffusers allows."""
    if isinstance(generator, list):
        if len(generator) != count:
            raise ConfigError(
                f"give one generator for all, or one for each of the {count} prompts; got {len(generator)}"
            )
        return [partial(_in_state, one.device, one.get_state()) for one in generator]
    where = generator.device if generator else "cpu"
    seeds = torch.randint(2**62, (count,), generator=generator, device=where).tolist()
    return [partial(_in_state, device, torch.Generator(device).manual_seed(seed).get_state()) for seed in seeds]


def _in_state(device: torch.device, state: Tensor) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _as(images: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return array
    if output_type != "pil":
        raise ConfigError(f"output_type is pil, pt or np; got '{output_type}'")
    return DiffusionPipeline.numpy_to_pil(array)
