"""Schedules of a teacher, also of one that begins with an image: where they are cut, and that N_T are really taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from distill.collaboration import pipeline as pipelines
from distill.collaboration.calibrate import calibrate, check_search, search, seeded
from distill.collaboration.calls import network_of, paint
from distill.collaboration.pipeline import AdaptivePipeline
from distill.collaboration.schedules import cut, noise_variances, whole
from distill.errors import ConfigError
from tests.collaboration.test_pipeline import GUIDANCE, PROMPTS, Pair

MANY = PROMPTS * 2
FORMS = {"edit": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}


def formed(folder: Path, kind: str, **call: Any) -> tuple[AdaptivePipeline, dict[str, Any]]:
    """Student and teacher of a kind, with what they begin with for `MANY` prompts."""
    pipe = Pair(folder).pipe
    form = FORMS[kind].from_pipe
    student_call = {"num_inference_steps": 4, "guidance_scale": 0.0, **call}
    pair = [form(pipeline) for pipeline in (pipe.student, pipe.teacher)]
    generator = torch.Generator().manual_seed(1)
    inputs = {"image": torch.rand(len(MANY), 3, 32, 32, generator=generator)}
    if kind == "inpaint":
        inputs["mask_image"] = (torch.rand(len(MANY), 1, 32, 32, generator=generator) > 0.5).float()
    return AdaptivePipeline(*pair, pipe.judge, None, student_call, {"guidance_scale": GUIDANCE, **call}), inputs


def some(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    return {name: values[:count] for name, values in inputs.items()}


@pytest.mark.parametrize(
    ("family", "kind", "strength"),
    [
        ("sd", "edit", 0.8),  # its own, if none is named
        ("sd", "edit", 0.3),
        ("sdxl", "edit", 0.55),
        ("sd3", "edit", 0.7),  # it rounds up where the others round down
        ("sdxl", "inpaint", 0.9999),  # its own: 6 of 6 would be 5
        ("sd", "inpaint", 1.0),
    ],
)
def test_steps_taken_are_those_asked_for(
    family: str, kind: str, strength: float, request: pytest.FixtureRequest
) -> None:
    own = (family, kind, strength) in {("sd", "edit", 0.8), ("sdxl", "inpaint", 0.9999), ("sd", "inpaint", 1.0)}
    call = {} if own else {"strength": strength}
    pipe, inputs = formed(request.getfixturevalue(f"{family}_folder"), kind, **call)
    network, asked = network_of(pipe.teacher), []
    network.register_forward_pre_hook(lambda *_: asked.append(1))
    options: dict[str, Any] = {"threshold": 9.0, "mode": "regenerate", "inputs": some(inputs, 2)}
    for steps in (1, 6, 7):
        asked.clear()
        answer = seeded(pipe, MANY[:2], 0, teacher_steps=steps, **options)
        (alone, *_), spent = answer.steps, len(asked)
        given = {**pipe.student_call, **some(inputs, 2)}
        _, _, student = paint(pipe.student, given, MANY[:2], [torch.Generator().manual_seed(i) for i in range(2)])
        assert (spent, alone) == (steps, student + steps)
        schedule = pipe.plan(threshold=9.0, mode="regenerate", teacher_steps=steps).schedule
        assert abs(schedule * strength - steps) < 1, "the share of the schedule that the strength says"


def test_budgets_of_an_edit_are_kept(sd_folder: Path) -> None:
    """Two steps of the student's four at a strength of .5, and half of its images with four of the teacher's."""
    pipe, inputs = formed(sd_folder, "edit", strength=0.5)
    pipe.calibration = calibrate(pipe, MANY, batch_size=32, inputs=inputs)
    assert pipe.calibration.steps == 2
    check_search(pipe, MANY, 4.0, ["regenerate"], inputs)
    pipe.calibration = search(pipe, MANY, 4.0, ["regenerate"], shares=(0.5,), batch_size=32, inputs=inputs)
    answer = seeded(pipe, MANY, 0, batch_size=32, inputs=inputs)
    assert sum(answer.steps) / len(MANY) == pytest.approx(4.0, abs=0.1)
    (tried,) = pipe.calibration.choice["tried"]
    scores = pipe.judge(MANY, answer.images)
    assert tried["value"] == pytest.approx(float(scores.mean()), abs=1e-5)


def test_inpainting_is_calibrated(sd_folder: Path) -> None:
    pipe, inputs = formed(sd_folder, "inpaint")
    pipe.calibration = calibrate(pipe, MANY, batch_size=32, inputs=inputs)
    made = search(pipe, MANY, 6.0, variances=(0.5,), shares=(0.5,), batch_size=32, inputs=inputs)
    assert {way["mode"] for way in made.choice["tried"]} == {"refine", "regenerate"}
    with pytest.raises(ConfigError, match="one image for each of the 32 prompts, as a list; got 3"):
        calibrate(pipe, MANY, inputs={"image": inputs["image"][:3]})


def test_a_controlnet_is_calibrated(sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    control = ControlNetModel.from_unet(pipe.teacher.unet, conditioning_embedding_out_channels=(4, 4, 4))
    pair = [AutoPipelineForText2Image.from_pipe(one, controlnet=control) for one in (pipe.student, pipe.teacher)]
    pipe = AdaptivePipeline(*pair, pipe.judge, None, pipe.student_call, pipe.teacher_call)
    inputs = {"image": torch.rand(len(MANY), 3, 32, 32)}
    pipe.calibration = calibrate(pipe, MANY, batch_size=32, inputs=inputs)
    made = search(pipe, MANY, 6.0, variances=(0.5,), shares=(0.5,), batch_size=32, inputs=inputs)
    assert {way["mode"] for way in made.choice["tried"]} == {"refine", "regenerate"}
    network = next(control.parameters())
    network.data.mul_(1.01)
    with pytest.raises(ConfigError, match=r"another student \(its controlnet\) and another teacher \(its controlnet\)"):
        pipe.calibration = made


@pytest.mark.parametrize(
    ("strength", "steps", "sentence"),
    [
        (0.0, 3, "the strength of the teacher's call must lie between 0 and 1; got 0.0"),
        (1.5, 3, "the strength of the teacher's call must lie between 0 and 1; got 1.5"),
        (0.3, 600, "teacher_steps=600 at a strength of 0.3 are 2000 of a whole schedule, and the teacher has 1000"),
    ],
)
def test_strengths_that_cannot_be_get_a_sentence(strength: float, steps: int, sentence: str, sd_folder: Path) -> None:
    pipe, inputs = formed(sd_folder, "edit")
    pipe.teacher_call["strength"] = strength
    with pytest.raises(ConfigError, match=sentence):
        pipe(MANY[:1], threshold=0.0, mode="regenerate", teacher_steps=steps, inputs=some(inputs, 1))


def test_an_edit_that_is_to_be_refined_is_refused_before_anything_is_painted(sd_folder: Path) -> None:
    pipe, inputs = formed(sd_folder, "edit", strength=0.5)
    with pytest.raises(ConfigError, match="begins with the image that is edited"):
        pipe.plan(threshold=0.0, variance=0.5, teacher_steps=3)
    pipe.calibration = calibrate(pipe, MANY, batch_size=32, inputs=inputs)
    pipe.student.unet.register_forward_pre_hook(lambda *_: pytest.fail("it was painted"))
    with pytest.raises(ConfigError, match="begins with the image that is edited.*use mode='regenerate'"):
        search(pipe, MANY, 4.0, ["regenerate", "refine"], inputs=inputs)


def test_a_pipeline_that_begins_with_noise_takes_its_whole_schedule(sd_folder: Path) -> None:
    assert whole(Pair(sd_folder).pipe.teacher, 7, {"strength": 0.5}) == 7


def test_a_teacher_that_takes_other_steps_is_refused(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pair(sd_folder).pipe
    monkeypatch.setattr(pipelines, "whole", lambda pipeline, steps, call: steps + 1)
    with pytest.raises(ConfigError, match="the teacher took 4 steps, not the 3 it was to take"):
        pipe(PROMPTS[:1], threshold=9.0, mode="regenerate", teacher_steps=3)


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),
    "dpm": lambda: DPMSolverMultistepScheduler(beta_schedule="scaled_linear"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-dpm": lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_variances_are_those_of_what_the_scheduler_makes(name: str) -> None:
    """Measured on noised zeros and ones: the noise's share of the total."""
    scheduler = SCHEDULERS[name]()
    told = noise_variances(scheduler, 10)
    add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
    for index, timestep in enumerate(scheduler.timesteps):
        one, at = torch.ones(1, 1, 1, 1), timestep[None]
        noise, data = (
            float(add(one * 0, at, one) if name == "flow" else add(one * 0, one, at)),
            float(add(one, at, one * 0) if name == "flow" else add(one, one * 0, at)),
        )
        assert told[index] == pytest.approx(noise**2 / (noise**2 + data**2), abs=1e-3)
    assert told == sorted(told, reverse=True)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_cut_finds_the_nearest_level(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    for variance in (0.2, 0.5, 0.8):
        count = cut(scheduler, 4, variance=variance)
        assert abs(noise_variances(scheduler, count)[count - 4] - variance) < 0.06
    assert cut(scheduler, 4, strength=0.4) == 10
    assert cut(scheduler, 3, strength=0.3) == 10
