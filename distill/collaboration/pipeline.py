"""Adaptive collaboration of a student and its teacher (Starodubcev et al. 2023, https://arxiv.org/abs/2312.10835)."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distill.backbones.base import absent_components
from distill.collaboration.calibration import Calibration, parts, plain
from distill.collaboration.judges import Judge, open_judge
from distill.data.loading import batches
from distill.diffusion.sampling import own_noise
from distill.errors import ConfigError
from distill.files import read_json, save_json, written_whole

KEPT, REFINED, REGENERATED = "kept", "refined", "regenerated"
MODES = ("refine", "regenerate")
SIDES = ("height", "width")
OUTPUTS = ("pil", "pt", "np")
FILE = "adaptive.json"
WATCHED = "callback_on_step_end"  # the argument of most pipelines that is told of every step
GIVEN_HERE = ("prompt", "generator", "output_type", "return_dict", WATCHED)  # to every batch, so by no call
OWN_LEVELS = ("timesteps", "sigmas", "denoising_start", "denoising_end")  # that set a number of steps of their own


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


class Decided(NamedTuple):
    """An image that is finished.

    Attributes:
        index: of its prompt.
        image: `[3, H, W]` in [0, 1], float32 on the CPU.
        score: of the student's image, by the judge; NaN where the student's is no picture.
        decision: `kept`, `refined` or `regenerated`.
        steps: network steps spent, guidance not counted twice.
    """

    index: int  # type: ignore[assignment]  # and not what tuples have by that name
    image: Tensor
    score: float
    decision: str
    steps: int

    def without_image(self) -> Decided:
        """The same, small."""
        return self._replace(image=self.image.new_empty(0))


class Judged(NamedTuple):
    """A batch of a student's images.

    Attributes:
        part: indices of the B prompts.
        images: `[B, 3, H, W]` in [0, 1].
        latents: of these, where the pipeline tells them.
        scores: B, by the judge.
        steps: network steps of each.
    """

    part: list[int]
    images: Tensor
    latents: Tensor | None
    scores: list[float]
    steps: int


@dataclass(frozen=True)
class Rejected:
    """An image that waits for the teacher: what it begins with when refined, and its score and steps so far."""

    index: int
    start: Tensor
    score: float
    steps: int


class AdaptivePipeline(DiffusionPipeline):
    """A student paints, a judge scores, and the teacher improves what scores below a threshold.

    Either by *refining*, adding noise to the student's latent and going on with the teacher's schedule from there, or
    by *regenerating* with the teacher from the same noise. Takes two diffusers pipelines that are called alike: text to
    image, image to image (SDEdit), inpainting, ControlNet. Tried are those of SD, SDXL and SD3.

    Images have the teacher's size where `teacher_call` gives `height` and `width`, and the student's where it does not.
    A score that is no number, as of a picture that overflowed in half precision, counts as rejected.

    Args:
        student, teacher: pipelines, their schedulers in place.
        judge: what scores images, see `distill.collaboration.judges`.
        calibration: of this student at `student_call` by this judge; needed where a budget rather than a threshold is
            given.
        student_call, teacher_call: arguments of every call, such as `num_inference_steps` and `guidance_scale`; of the
            teacher's, the number of steps comes with the call.

    Raises:
        ConfigError: a calibration of another set-up, also where one is assigned later, or a call with what every batch
            is given here.
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
        check_calls(self.student_call, self.teacher_call)
        self.calibration = calibration
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

    @property
    def calibration(self) -> Calibration | None:
        """Of this student at its call by this judge."""
        return self._calibration

    @calibration.setter
    def calibration(self, made: Calibration | None) -> None:
        if made is not None:
            teacher = parts(self.teacher) if made.choice else None
            made.check(self.student_call, self.judge, self.teacher_call, parts(self.student), teacher)
        self._calibration = made

    def to(self, *args: Any, **kwargs: Any) -> AdaptivePipeline:
        """Moves both pipelines, and the judge where it can be moved.

        Raises:
            ConfigError: another precision than the one the calibration was made in.
        """
        for pipeline in (self.student, self.teacher):
            pipeline.to(*args, **kwargs)
        self._refiner = None
        if "device" in kwargs or any(not isinstance(value, torch.dtype) for value in args):
            if hasattr(self.judge, "to"):
                self.judge.to(self.device)
        if "dtype" in kwargs or any(isinstance(value, torch.dtype) for value in args):
            self.calibration = self._calibration
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
            teacher_steps: of the teacher per improved image, N_T: as many are left of its schedule when it refines, or
                when it begins with an image that it edits.
            generator: one for all, or one per prompt; the global one if not given.
            batch_size: of student and teacher; rejected images are gathered until the teacher's batch is full.
            inputs: more arguments of both pipelines with one value per prompt, such as `image` or `mask_image`.
            output_type: `pil`, `pt` (`[N, 3, H, W]` in [0, 1]) or `np` (`[N, H, W, 3]`).
            return_dict: `AdaptiveOutput` rather than a tuple.

        `mode`, `variance`, `teacher_steps` and, if there is no budget, the threshold are the calibration's choice where
        they are not given. `stream` gives the images one by one, so that not all have to be held.

        Raises:
            ConfigError: neither budget nor threshold, a budget without calibration, or settings out of range.
        """
        if output_type not in OUTPUTS:
            raise ConfigError(f"output_type is pil, pt or np; got '{output_type}'")
        prompts = _prompts(prompt)
        stream = self.stream(
            prompts, budget, threshold, mode, variance, strength, teacher_steps, generator, batch_size, inputs
        )
        images, decided = _Images(len(prompts), output_type), []
        for one in stream:
            images.keep(one.index, one.image)
            decided.append(one.without_image())
        _, _, scores, decisions, steps = map(list, zip(*sorted(decided), strict=True))
        answer = images.all()
        return AdaptiveOutput(answer, scores, decisions, steps) if return_dict else (answer, scores, decisions, steps)

    def stream(
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
    ) -> Iterator[Decided]:
        """Paints prompts and gives each image as soon as it is decided: kept ones at once, improved ones when the
        teacher's batch is full. Images own their memory, and of those that wait no more than two batches are held.

        Args:
            prompt, budget, threshold, mode, variance, strength, teacher_steps, generator, batch_size, inputs: as in the
                call.

        Raises:
            ConfigError: as the call, before anything is painted.
        """
        plan = self.plan(budget, threshold, mode, variance, strength, teacher_steps)
        asked = self._asked(prompt, generator, batch_size, inputs)
        return self._stream(plan, asked)

    def judged(
        self,
        prompt: str | Sequence[str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 16,
        inputs: dict[str, Sequence[Any] | Tensor] | None = None,
    ) -> Iterator[Judged]:
        """The student's images and their scores, batch by batch; no teacher is asked.

        Args:
            prompt, generator, batch_size, inputs: as in the call.

        Raises:
            ConfigError: as the call, before anything is painted.
        """
        return self._judged(self._asked(prompt, generator, batch_size, inputs))

    def _asked(self, prompt: Any, generator: Any, batch_size: int, inputs: dict[str, Any] | None) -> _Asked:
        prompts = _prompts(prompt)
        if not prompts or batch_size < 1:
            raise ConfigError(f"give one prompt or more, and batches of 1 or more; got {len(prompts)} and {batch_size}")
        check_calls(self.student_call, self.teacher_call)
        _check_inputs(inputs or {}, len(prompts), self.student)
        return _Asked(prompts, inputs or {}, _starts(generator, len(prompts), self.device), batch_size)

    @torch.no_grad()
    def _judged(self, asked: _Asked) -> Iterator[Judged]:
        with self.progress_bar(total=len(asked.prompts)) as bar:  # type: ignore[attr-defined]
            for part in batches(range(len(asked.prompts)), asked.batch_size):
                prompts, given, generators = asked.of(part)
                images, latents, steps = paint(self.student, {**self.student_call, **given}, prompts, generators)
                yield Judged(part, images, latents, self.scored(prompts, images), steps)
                bar.update(len(part))

    @torch.no_grad()
    def _stream(self, plan: Plan, asked: _Asked) -> Iterator[Decided]:
        rejected: list[Rejected] = []
        size: dict[str, int] = {}
        for batch in self._judged(asked):
            own = batch.images.shape[-2:]
            size = {name: self.teacher_call.get(name) or n for name, n in zip(SIDES, own, strict=True)}
            images = fit(batch.images, size)
            starts = images.nan_to_num(0.5, 1.0, 0.0)  # a teacher may still make a picture of what is none
            if plan.latent and batch.latents is not None and batch.latents.ndim == 4 and images is batch.images:
                starts = batch.latents
            for index, image, score, start in zip(batch.part, images, batch.scores, starts, strict=True):
                if score >= plan.threshold:
                    yield Decided(index, image.clone(), score, KEPT, batch.steps)
                else:  # also where the score is no number
                    rejected.append(Rejected(index, start.clone(), score, batch.steps))
            while len(rejected) >= asked.batch_size:
                yield from self._improved(plan, rejected[: asked.batch_size], asked, size)
                rejected = rejected[asked.batch_size :]
        if rejected:
            yield from self._improved(plan, rejected, asked, size)

    def _improved(self, plan: Plan, some: list[Rejected], asked: _Asked, size: dict[str, int]) -> Iterator[Decided]:
        """What the teacher makes of them."""
        prompts, given, generators = asked.of([one.index for one in some])
        better, spent = self._improve(plan, [one.start for one in some], prompts, generators, given | size)
        word = REFINED if plan.refines else REGENERATED
        for one, image in zip(some, fit(better, size), strict=True):
            yield Decided(one.index, image.clone(), one.score, word, one.steps + spent)

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
        check_calls(self.student_call, self.teacher_call)
        threshold = self._threshold(budget, threshold, count)
        check_steps(self.teacher.scheduler, count)
        if mode == "regenerate":
            return Plan(threshold, count, whole(self.teacher, count, self.teacher_call))
        if (variance is None) == (strength is None):
            raise ConfigError("to refine, give either variance, such as 0.4, or strength")
        name, value = ("variance", variance) if variance is not None else ("strength", strength)
        if value is None or not 0 < value < 1:
            raise ConfigError(f"{name} must lie between 0 and 1; got {value}")
        schedule = cut(self.refiner.scheduler, count, variance, strength)  # the teacher's, if it can refine at all
        if self._one_latent_space is None:
            self._one_latent_space = same_autoencoder(self.student, self.teacher)
        latent = self._one_latent_space and "mask_image" not in _arguments(self.teacher)
        return Plan(threshold, count, schedule, count / schedule, latent)

    def _threshold(self, budget: float | None, threshold: float | None, teacher_steps: int) -> float:
        if threshold is not None and budget is not None:
            raise ConfigError("give either a budget or a threshold, not both")
        if threshold is not None:
            if threshold != threshold:
                raise ConfigError("the threshold is no number, so no score could reach it; give one")
            return threshold
        if self.calibration is None:
            raise ConfigError("a budget needs a calibration of this student; `distill calibrate` makes one")
        self.calibration.check(self.student_call, self.judge, self.teacher_call)  # which may have been changed
        if budget is None and "budget" not in self.calibration.choice:
            raise ConfigError("give a budget, the average number of steps per image, or a threshold of the score")
        budget = self.calibration.choice["budget"] if budget is None else budget
        return self.calibration.threshold(self.calibration.share(budget, teacher_steps))

    def scored(self, prompts: list[str], images: Tensor) -> list[float]:
        """The judge's scores of B prompts and images `[B, 3, H, W]`; NaN for an image that is none.

        Raises:
            ConfigError: not one per image.
        """
        scores = self.judge(prompts, images)
        if scores.shape != (len(prompts),):
            raise ConfigError(
                f"the judge '{self.judge.spec}' gave scores of shape {tuple(scores.shape)} for {len(prompts)} images; "
                "it must give one per image"
            )
        pictures = images.flatten(1).isfinite().all(1)  # a judge may make a number of what is none
        return scores.masked_fill(~pictures.to(scores.device), float("nan")).tolist()

    def _improve(
        self,
        plan: Plan,
        starts: list[Tensor],
        prompts: list[str],
        generators: list[torch.Generator],
        given: dict[str, Any],
    ) -> tuple[Tensor, int]:
        """The teacher's images, anew or from the student's, and the steps they took.

        Raises:
            ConfigError: they took others than were asked for.
        """
        call = {**self.teacher_call, **given, "num_inference_steps": plan.schedule}
        if plan.refines:
            images, spent = self._refine(call | {"strength": plan.strength}, torch.stack(starts), prompts, generators)
        else:
            images, _, spent = paint(self.teacher, _accepted(self.teacher, call), prompts, generators)
        if spent != plan.teacher_steps and WATCHED in _arguments(self.teacher):
            raise ConfigError(
                f"the teacher took {spent} steps, not the {plan.teacher_steps} it was to take, so no budget could be "
                "kept; see what teacher_call asks for"
            )
        return images, plan.teacher_steps

    def _refine(
        self, call: dict[str, Any], start: Tensor, prompts: list[str], generators: list[torch.Generator]
    ) -> tuple[Tensor, int]:
        """The student's images, or their latents, under noise and through what is left of the teacher's schedule."""
        for one in generators:  # another noise than the student began with
            one.manual_seed(int(torch.randint(2**62, (1,), generator=one, device=one.device)))
        if "control_image" in _arguments(self.refiner) and "image" in call:  # a ControlNet's input beside an image
            call = call | {"control_image": call["image"]}
        call = call | {"image": start.to(self.device, self.teacher.dtype)}
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

        Raises:
            ConfigError: a call with something that JSON does not keep.
        """
        with written_whole(save_directory) as part:
            part.mkdir()
            self.student.save_pretrained(part / "student", **kwargs)
            self.teacher.save_pretrained(part / "teacher", **kwargs)
            kept = {
                "judge": self.judge.spec,
                "student_call": _written(self.student_call),
                "teacher_call": _written(self.teacher_call),
                "dtypes": {"student": _dtypes(self.student), "teacher": _dtypes(self.teacher)},
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
            judge: where the judge is one of your own, which cannot be found by its name; others are opened where the
                student is.
            kwargs: of both pipelines' own `from_pretrained`. Without `torch_dtype` every part has the precision it was
                saved in; a calibration holds for that alone.

        Raises:
            ConfigError: no such folder, an unknown judge, or weights the calibration was not made for.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / FILE).is_file():
            raise ConfigError(f"'{folder}' is no adaptive pipeline: it has no {FILE}; give a folder it was saved to")
        kept = read_json(folder / FILE)
        calls = (_read(kept["student_call"]), _read(kept["teacher_call"]))
        student, teacher = (
            open_pipeline(folder / name, **_precision(kept.get("dtypes", {}).get(name), kwargs))
            for name in ("student", "teacher")
        )
        calibration = Calibration.read(kept["calibration"], folder / FILE) if kept["calibration"] else None
        return cls(student, teacher, judge or open_judge(kept["judge"], student.device), calibration, *calls)


@dataclass(frozen=True)
class Plan:
    """What is done with images that score below `threshold`.

    Attributes:
        threshold: of the score.
        teacher_steps: for each.
        schedule: steps of the teacher's whole schedule, of which the last `teacher_steps` are done.
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
    longest = min(50 * teacher_steps, levels(scheduler))
    counts = [n for n in range(teacher_steps, longest + 1) if n * (teacher_steps / n) == teacher_steps]
    # (other n: diffusers would find one step more or less in `n * strength`, by rounding)
    if strength is not None:
        return min(counts, key=lambda n: abs(teacher_steps / n - strength))
    assert variance is not None

    def begins_at(n: int) -> float:
        return noise_variances(scheduler, n)[n - teacher_steps]

    place = bisect_left(counts, -variance, key=lambda n: -begins_at(n))  # the longer, the lower the last steps begin
    return min(counts[max(place - 1, 0) : place + 1], key=lambda n: abs(begins_at(n) - variance))


def whole(pipeline: Any, steps: int, call: dict[str, Any]) -> int:
    """How many steps a pipeline's schedule must have so that it takes `steps`: more where it begins with an image.

    Args:
        pipeline: whose scheduler's timesteps are set anew.
        steps: that are taken.
        call: its arguments, of which `strength` is the share of the schedule that is taken.

    Raises:
        ConfigError: a strength out of range, or so small that the schedule would have more steps than there are levels.
    """
    if "strength" not in _arguments(pipeline):
        return steps
    strength = call.get("strength", _arguments(pipeline)["strength"].default)
    if strength is None or not 0 < strength <= 1:
        raise ConfigError(f"the strength of the teacher's call must lie between 0 and 1; got {strength}")
    nearest = steps / strength
    counts = range(max(steps, int(nearest) - 1), int((steps + 1) / strength) + 2)
    right = [n for n in counts if n <= levels(pipeline.scheduler) and _taken(pipeline, n, strength) == steps]
    if not right:
        raise ConfigError(
            f"teacher_steps={steps} at a strength of {strength} are {nearest:.0f} of a whole schedule, and the teacher "
            f"has {levels(pipeline.scheduler)} levels; ask for fewer"
        )
    return min(right, key=lambda n: abs(n - nearest))


def _taken(pipeline: Any, schedule: int, strength: float) -> int:
    """Steps of a schedule that diffusers takes at a strength; pipelines round differently."""
    pipeline.scheduler.set_timesteps(schedule)
    if not hasattr(pipeline, "get_timesteps"):
        return int(schedule * strength)
    return len(pipeline.get_timesteps(schedule, strength, "cpu")[0])


def levels(scheduler: Any) -> int:
    """The most steps that a schedule can have."""
    return scheduler.config.num_train_timesteps


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


def check_calls(student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Refuses calls with what every batch is given here, and those of a teacher with a number of steps of its own.

    Raises:
        ConfigError: one of these.
    """
    for who, call in (("student", student), ("teacher", teacher)):
        if named := [name for name in GIVEN_HERE if name in call]:
            raise ConfigError(f"the {who}'s call names {', '.join(named)}, which every batch is given; leave it out")
        if (count := call.get("num_images_per_prompt")) not in (None, 1):
            raise ConfigError(
                f"the {who}'s call asks for num_images_per_prompt={count}, and every prompt gets one image here; name "
                "the prompt more than once"
            )
    if named := [name for name in OWN_LEVELS if teacher.get(name) is not None]:
        raise ConfigError(
            f"the teacher's call names {', '.join(named)}, which would set its number of steps in the place of "
            "teacher_steps; leave that out, and take no few-step student for a teacher"
        )


def check_steps(scheduler: Any, steps: int) -> None:
    """Refuses a scheduler whose schedule cannot be made from a number of steps, or takes another number of them.

    Raises:
        ConfigError: one of these, or more steps than levels.
    """
    name = type(scheduler).__name__
    if scheduler.config.get("use_dynamic_shifting", False):
        raise ConfigError(
            f"the teacher's {name} shifts its schedule by the picture's size, which is not supported here"
        )
    check_levels(scheduler, steps)
    scheduler.set_timesteps(steps)
    if (taken := len(scheduler.timesteps)) != steps:
        raise ConfigError(
            f"the teacher's {name} asks the network {taken} times in {steps} steps, so no budget could be kept; set "
            "one that asks once a step, such as DPMSolverMultistepScheduler"
        )


def check_levels(scheduler: Any, steps: int) -> None:
    """Refuses more steps than a scheduler has levels; its timesteps are set anew.

    Raises:
        ConfigError: there are more, or the scheduler has no schedule of so many.
    """
    name = type(scheduler).__name__
    if steps > levels(scheduler):
        raise ConfigError(f"the teacher's {name} has {levels(scheduler)} levels, fewer than teacher_steps={steps}")
    if scheduler.config.get("use_dynamic_shifting", False):  # it wants to know the picture's size first
        return
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the teacher's {name} has no schedule of teacher_steps={steps} ({reason})") from error


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

    watched = {WATCHED: note} if WATCHED in _arguments(pipeline) else {}
    with scaled_noise(pipeline.scheduler), own_noise(pipeline.scheduler, generators):
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


def fit(images: Tensor, size: dict[str, int]) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] at a height and width."""
    wished = (size["height"], size["width"])
    if images.shape[-2:] == wished:
        return images
    return interpolate(images, wished, mode="bicubic", antialias=True).clamp(0, 1)


def own_size(pipeline: Any) -> dict[str, int]:
    """The height and width that a pipeline paints where its call names none; empty where it does not tell."""
    side = getattr(pipeline, "default_sample_size", None) or network_of(pipeline).config.get("sample_size")
    factor = getattr(pipeline, "vae_scale_factor", None)
    if side is None or factor is None:
        return {}
    pair = (side, side) if isinstance(side, int) else side
    return {name: n * factor for name, n in zip(SIDES, pair, strict=True)}


def at_own_size(student: Any, teacher: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The teacher's call, with its own size where the two pipelines' own sizes differ and it names none."""
    size = own_size(teacher)
    return call if size == own_size(student) else {**size, **call}


def _pick(inputs: dict[str, Any], part: list[int]) -> dict[str, Any]:
    return {
        name: values[part] if isinstance(values, Tensor) else [values[index] for index in part]
        for name, values in inputs.items()
    }


@dataclass(frozen=True)
class _Asked:
    """N prompts, inputs with a value for each, and what makes each one's generator in the state it begins with."""

    prompts: list[str]
    inputs: dict[str, Any]
    starts: list[Callable[[], torch.Generator]]
    batch_size: int

    def of(self, part: list[int]) -> tuple[list[str], dict[str, Any], list[torch.Generator]]:
        """Prompts, inputs and generators of some."""
        prompts = [self.prompts[index] for index in part]
        return prompts, _pick(self.inputs, part), [self.starts[index]() for index in part]


def _prompts(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if strange := [one for one in prompts if not isinstance(one, str)]:
        raise ConfigError(f"prompts are texts; got {strange[0]!r}")
    return prompts


def _check_inputs(inputs: dict[str, Any], count: int, pipeline: Any) -> None:
    """Refuses inputs without a value for each of `count` prompts, or that a pipeline does not take."""
    for name, values in inputs.items():
        if name not in _arguments(pipeline) or name in GIVEN_HERE:
            raise ConfigError(f"inputs name {name}, which a {type(pipeline).__name__} does not take; leave it out")
        many = hasattr(values, "__getitem__") and not isinstance(values, str | dict)
        if not many or len(values) != count:
            got = len(values) if many else type(values).__name__
            raise ConfigError(f"inputs give one {name} for each of the {count} prompts, as a list; got {got}")
        if any(value is None for value in values):
            raise ConfigError(f"inputs give one {name} for each of the {count} prompts, and one of them is None")


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
    return [partial(_seeded, device, seed) for seed in seeds]


def _in_state(device: torch.device, state: Tensor) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


class _Images:
    """Images as they come, as `output_type` says, none of them twice in memory."""

    def __init__(self, count: int, output_type: str):
        self.count, self.output_type = count, output_type
        self.tensor: Tensor | None = None
        self.pictures: list[Any] = [None] * count

    def keep(self, index: int, image: Tensor) -> None:
        """`[3, H, W]` in [0, 1]."""
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


def _dtypes(pipeline: Any) -> dict[str, str]:
    """The precision of every network of a pipeline."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: str(network.dtype).removeprefix("torch.") for name, network in networks.items()}


def _precision(kept: dict[str, str] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline's loading, with what `_dtypes` found where they say nothing of it."""
    if not kept or {"torch_dtype", "dtype"} & given.keys():
        return given
    return {"torch_dtype": {name: getattr(torch, dtype) for name, dtype in kept.items()}, **given}


def _written(call: dict[str, Any]) -> dict[str, Any]:
    """A call for a JSON file, its tuples marked: diffusers adds sizes up as tuples."""
    kept = plain(call)
    return {name: {"tuple": kept[name]} if isinstance(value, tuple) else kept[name] for name, value in call.items()}


def _read(call: dict[str, Any]) -> dict[str, Any]:
    """The call again."""
    marked = {name: isinstance(value, dict) and value.keys() == {"tuple"} for name, value in call.items()}
    return {name: tuple(value["tuple"]) if marked[name] else value for name, value in call.items()}
