"""Adaptive collaboration of a student and its teacher (Starodubcev et al. 2023, https://arxiv.org/abs/2312.10835)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from distill.backbones.base import absent_components
from distill.collaboration.calibration import Calibration, parts, plain
from distill.collaboration.calls import (
    SIDES,
    WATCHED,
    Asked,
    Pictures,
    accepted,
    arguments,
    as_prompts,
    check_calls,
    check_inputs,
    fit,
    paint,
    same_autoencoder,
    starts_of,
)
from distill.collaboration.judges import Judge, open_judge
from distill.collaboration.schedules import check_steps, cut, whole
from distill.data.loading import batches
from distill.errors import ConfigError
from distill.files import read_json, save_json, written_whole

KEPT, REFINED, REGENERATED = "kept", "refined", "regenerated"
MODES = ("refine", "regenerate")
OUTPUTS = ("pil", "pt", "np")
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
        check_calls((self.student, self.student_call), (self.teacher, self.teacher_call))
        self.calibration = calibration
        for pipeline in (student, teacher):
            pipeline.set_progress_bar_config(disable=True)
        self._refiner: Any = None
        self._refiner_of: list[Any] = []  # the teacher and its parts that the refiner was made of
        self._compared: tuple[Any, Any, bool] | None = None  # autoencoders, once: they are large

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
        prompts = as_prompts(prompt)
        stream = self.stream(
            prompts, budget, threshold, mode, variance, strength, teacher_steps, generator, batch_size, inputs
        )
        images, decided = Pictures(len(prompts), output_type), []
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

    def _asked(self, prompt: Any, generator: Any, batch_size: int, inputs: dict[str, Any] | None) -> Asked:
        prompts = as_prompts(prompt)
        if not prompts or batch_size < 1:
            raise ConfigError(f"give one prompt or more, and batches of 1 or more; got {len(prompts)} and {batch_size}")
        check_calls((self.student, self.student_call), (self.teacher, self.teacher_call))
        check_inputs(inputs or {}, len(prompts), self.student, self.teacher)
        return Asked(prompts, inputs or {}, starts_of(generator, len(prompts), self.device), batch_size)

    @torch.no_grad()
    def _judged(self, asked: Asked) -> Iterator[Judged]:
        with self.progress_bar(total=len(asked.prompts)) as bar:  # type: ignore[attr-defined]
            for part in batches(range(len(asked.prompts)), asked.batch_size):
                prompts, given, generators = asked.of(part)
                images, latents, steps = paint(self.student, {**self.student_call, **given}, prompts, generators)
                yield Judged(part, images, latents, self.scored(prompts, images), steps)
                bar.update(len(part))

    @torch.no_grad()
    def _stream(self, plan: Plan, asked: Asked) -> Iterator[Decided]:
        rejected: list[Rejected] = []
        size: dict[str, int] = {}
        for batch in self._judged(asked):
            own = batch.images.shape[-2:]
            size = {name: self.teacher_call.get(name) or n for name, n in zip(SIDES, own, strict=True)}
            images = fit(batch.images, size)
            starts = images.nan_to_num(0.5, 1.0, 0.0)  # a teacher may still make a picture of what is none
            if plan.latent and batch.latents is not None and batch.latents.ndim == 4 and images is batch.images:
                starts = batch.latents.nan_to_num(0.0, 0.0, 0.0)
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

    def _improved(self, plan: Plan, some: list[Rejected], asked: Asked, size: dict[str, int]) -> Iterator[Decided]:
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
        check_calls((self.student, self.student_call), (self.teacher, self.teacher_call))
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
        latent = self._one_latent_space() and "mask_image" not in arguments(self.teacher)
        return Plan(threshold, count, schedule, count / schedule, latent)

    def _one_latent_space(self) -> bool:
        """Whether student and teacher mean the same by latents."""
        one, other = (getattr(pipeline, "vae", None) for pipeline in (self.student, self.teacher))
        if self._compared is None or self._compared[0] is not one or self._compared[1] is not other:
            self._compared = one, other, same_autoencoder(self.student, self.teacher)
        return self._compared[2]

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
            images, _, spent = paint(self.teacher, accepted(self.teacher, call), prompts, generators)
        if spent != plan.teacher_steps and WATCHED in arguments(self.teacher):
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
        if "control_image" in arguments(self.refiner) and "image" in call:  # a ControlNet's input beside an image
            call = call | {"control_image": call["image"]}
        call = call | {"image": start.to(self.device, self.teacher.dtype)}
        images, _, spent = paint(self.refiner, accepted(self.refiner, call), prompts, generators)
        return images, spent

    @property
    def refiner(self) -> Any:
        """The teacher as a pipeline that begins with an image.

        Raises:
            ConfigError: there is none, or it begins with an image already.
        """
        now = [self.teacher, *(part for name, part in self.teacher.components.items() if name != "scheduler")]
        same = len(now) == len(self._refiner_of) and all(map(operator.is_, now, self._refiner_of))
        if self._refiner is None or not same:  # either may have been exchanged
            self._refiner, self._refiner_of = self._new_refiner(), now
        self._refiner.scheduler = self.teacher.scheduler
        return self._refiner

    def _new_refiner(self) -> Any:
        known = arguments(self.teacher)
        if "mask_image" in known:
            return self.teacher
        if "strength" in known:
            raise ConfigError(
                f"a {type(self.teacher).__name__} begins with the image that is edited, so it cannot refine another; "
                "use mode='regenerate'"
            )
        try:
            refiner = AutoPipelineForImage2Image.from_pipe(self.teacher)
        except ValueError as error:
            raise ConfigError(
                f"diffusers has no image-to-image form of a {type(self.teacher).__name__}; use mode='regenerate'"
            ) from error
        refiner.set_progress_bar_config(disable=True)
        return refiner

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
