"""A student, a teacher and a judge on small random pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
)
from torch import Tensor

from distill import backbones
from distill.collaboration.calibrate import calibrate, seeded
from distill.collaboration.calls import same_autoencoder
from distill.collaboration.judges import NetworkJudge
from distill.collaboration.pipeline import KEPT, REFINED, REGENERATED, AdaptivePipeline
from distill.collaboration.schedules import noise_variances
from distill.errors import ConfigError
from distill.inference import Painter

PROMPTS = [f"a {size} {colour} ring" for size in ("small", "large") for colour in ("red", "green", "blue", "cyan")] * 2
FAMILIES = ["sd", "sdxl", "sd3"]
GUIDANCE = 3.0


def redness(prompts: list[str], images: Tensor) -> Tensor:
    return images[:, 0].mean((1, 2))


class Pair:
    """A student of four steps and its teacher, with everything they are called with."""

    def __init__(self, folder: Path, judge: Any = redness):
        backbone = backbones.load(str(folder))
        student = backbone.denoiser()
        torch.manual_seed(7)
        for parameter in student.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        calls = {n: backbone.student_call([1.0, 0.75, 0.5, 0.25][:: 4 // n]) for n in (1, 4)}
        teacher = backbone.pipeline()
        teacher.scheduler = backbones.solver("DPMSolverMultistepScheduler", teacher.scheduler)
        kept = {"guidance_scale": GUIDANCE, **{k: v for k, v in calls[4].items() if k == "max_sequence_length"}}
        self.pipe = AdaptivePipeline(
            backbone.student_pipeline(student), teacher, NetworkJudge(judge, "redness"), None, calls[4], kept
        )

    def painted(self, count: int = len(PROMPTS), seed: int = 0, **options: Any):
        return seeded(self.pipe, PROMPTS[:count], seed, **{"teacher_steps": 3, "variance": 0.5, **options})

    def median(self, count: int = len(PROMPTS)) -> float:
        return float(torch.tensor(self.painted(count, threshold=-1.0).scores).median()) + 1e-6


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.getfixturevalue(f"{request.param}_folder"))


@pytest.mark.parametrize("mode", ["refine", "regenerate"])
def test_images_do_not_depend_on_the_batch(mode: str, pair: Pair) -> None:
    threshold = pair.median()
    answers = [pair.painted(mode=mode, threshold=threshold, batch_size=size) for size in (1, 7, 32)]
    for answer in answers[1:]:
        assert answer.decisions == answers[0].decisions and answer.steps == answers[0].steps
        torch.testing.assert_close(answer.images, answers[0].images, atol=1e-4, rtol=0)
    word = REFINED if mode == "refine" else REGENERATED
    expected = [word if score < threshold else KEPT for score in answers[0].scores]
    assert answers[0].decisions == expected and {word, KEPT} == set(expected)
    assert answers[0].steps == [4 if decision == KEPT else 7 for decision in expected]


def test_kept_and_regenerated_images_are_the_pipelines_own(pair: Pair) -> None:
    """Of the same noise: those that are kept are the student's, the others the teacher's."""
    threshold = pair.median(6)
    answer = pair.painted(6, seed=5, threshold=threshold, mode="regenerate", batch_size=4)
    teacher = Painter(pair.pipe.teacher, {**pair.pipe.teacher_call, "num_inference_steps": 3})(PROMPTS[:6], seed=5)
    student = pair.painted(6, seed=5, threshold=-1.0).images
    assert {KEPT, REGENERATED} == set(answer.decisions)
    for index, decision in enumerate(answer.decisions):
        expected = (student if decision == KEPT else teacher)[index]
        torch.testing.assert_close(answer.images[index], expected, atol=1e-4, rtol=0)


def test_student_begins_at_its_generators_noise(pair: Pair) -> None:
    """At one step nothing else is drawn, so it is what the pipeline alone paints of the same seeds."""
    pair.pipe.student_call = dict(pair.pipe.student_call)
    for name in ("timesteps", "sigmas"):
        if name in pair.pipe.student_call:
            pair.pipe.student_call[name] = pair.pipe.student_call[name][:1]
    pair.pipe.student_call["num_inference_steps"] = 1
    alone = Painter(pair.pipe.student, pair.pipe.student_call)(PROMPTS[:4], seed=3)
    answer = pair.painted(4, seed=3, threshold=-1.0, batch_size=3)
    torch.testing.assert_close(answer.images, alone, atol=1e-4, rtol=0)
    assert answer.steps == [1] * 4


@pytest.mark.parametrize("variance", [0.3, 0.7])
def test_refining_goes_on_from_the_students_latent_under_noise(variance: float, pair: Pair) -> None:
    """The teacher's first question is sqrt(1 - v) x + sqrt(v) z on a VP schedule, (1 - t) x + t z on a flow."""
    pipe = pair.pipe
    asked: list[Tensor] = []
    network = getattr(pipe.teacher, "transformer", None) or pipe.teacher.unet
    network.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
        with_kwargs=True,
    )
    pipe.student_call |= {"num_inference_steps": 1} | (
        {"timesteps": [999]} if "timesteps" in pipe.student_call else {"sigmas": [1.0]}
    )
    latents = pipe.student(PROMPTS[:1], generator=[torch.Generator().manual_seed(0)], output_type="latent",
                           **pipe.student_call).images  # fmt: skip
    seeded(pipe, PROMPTS[:1], 0, threshold=9.0, variance=variance, teacher_steps=3)
    plan = pipe.plan(threshold=9.0, variance=variance, teacher_steps=3)
    reached = noise_variances(pipe.teacher.scheduler, plan.schedule)[plan.schedule - 3]
    assert abs(reached - variance) < 0.03 and len(asked) == 3
    draw = torch.Generator().manual_seed(0)
    draw.manual_seed(int(torch.randint(2**62, (1,), generator=draw)))
    noise = torch.randn(latents.shape, generator=draw)
    if hasattr(pipe.teacher, "transformer"):
        t = reached**0.5 / (reached**0.5 + (1 - reached) ** 0.5)
        expected = (1 - t) * latents + t * noise
    else:
        expected = (1 - reached) ** 0.5 * latents + reached**0.5 * noise
    torch.testing.assert_close(asked[0][:1], expected, atol=1e-4, rtol=1e-4)


def test_rejected_images_fill_the_teachers_batches(pair: Pair) -> None:
    sizes: list[int] = []
    network = getattr(pair.pipe.teacher, "transformer", None) or pair.pipe.teacher.unet
    network.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(
            len(kwargs["hidden_states"] if kwargs.get("hidden_states") is not None else args[0])
        ),
        with_kwargs=True,
    )
    answer = pair.painted(threshold=pair.median(), batch_size=4)
    rejected = sum(decision == REFINED for decision in answer.decisions)
    whole, rest = divmod(rejected, 4)
    assert sizes == [8] * 3 * whole + [2 * rest] * (3 if rest else 0)  # guidance doubles them


def test_budget_is_kept_by_a_calibration(pair: Pair) -> None:
    prompts = [f"a {word} ring" for word in ("red", "green", "blue", "yellow", "cyan", "magenta")] * 4
    pair.pipe.calibration = calibrate(pair.pipe, prompts, seed=0, batch_size=24)
    answer = seeded(pair.pipe, prompts, 0, budget=5.5, teacher_steps=3, mode="regenerate", batch_size=24)
    assert sum(answer.steps) / len(prompts) == pytest.approx(5.5, abs=0.1)


def test_round_trip(pair: Pair, tmp_path: Path) -> None:
    pair.pipe.calibration = calibrate(pair.pipe, PROMPTS + PROMPTS, batch_size=32)
    pair.pipe.save_pretrained(tmp_path / "pair")
    judge = NetworkJudge(redness, "redness")
    again = AdaptivePipeline.from_pretrained(tmp_path / "pair", judge=judge)
    options = {"budget": 5.0, "teacher_steps": 2, "variance": 0.4}
    one, two = (seeded(pipe, PROMPTS[:4], 0, **options) for pipe in (pair.pipe, again))
    assert one.decisions == two.decisions
    torch.testing.assert_close(one.images, two.images)
    with pytest.raises(ConfigError, match="the judge 'redness' is unknown; name one of shapes"):
        AdaptivePipeline.from_pretrained(tmp_path / "pair")
    with pytest.raises(ConfigError, match="is no adaptive pipeline"):
        AdaptivePipeline.from_pretrained(tmp_path)


def test_calibration_of_another_set_up_is_refused(pair: Pair) -> None:
    pipe = pair.pipe
    made = calibrate(pipe, PROMPTS + PROMPTS, batch_size=32)
    parts = pipe.student, pipe.teacher
    judge, call = pipe.judge, pipe.student_call
    AdaptivePipeline(*parts, judge, made, call)
    with pytest.raises(ConfigError, match=r"made for another judge \(redness, not other\)"):
        AdaptivePipeline(*parts, NetworkJudge(redness, "other"), made, call)
    with pytest.raises(
        ConfigError, match=r"another call of the student \(guidance_scale=0.0, not guidance_scale=2.0\)"
    ):
        AdaptivePipeline(*parts, judge, made, call | {"guidance_scale": 2.0})
    network = next(name for name in ("transformer", "unet") if name in pipe.student.components)
    next(pipe.student.components[network].parameters()).data.mul_(1.01)
    with pytest.raises(ConfigError, match=rf"another student \(its {network}\); make one for this with `distill calib"):
        AdaptivePipeline(*parts, judge, made, call)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"variance": 1.0}, "variance must lie between 0 and 1; got 1.0"),
        ({"variance": None, "strength": 0.0}, "strength must lie between 0 and 1; got 0.0"),
        ({"variance": None}, "give either variance, such as 0.4, or strength"),
        ({"strength": 0.4}, "give either variance, such as 0.4, or strength"),
        ({"mode": "improve"}, "by refine or regenerate; got mode='improve'"),
        ({"teacher_steps": 0}, "how many steps the teacher improves an image with; got 0"),
        ({"threshold": None, "budget": 5.0}, "a budget needs a calibration"),
        ({"budget": 5.0}, "either a budget or a threshold, not both"),
        ({"batch_size": 0}, "one prompt or more, and batches of 1 or more; got 1 and 0"),
        ({"output_type": "latent"}, "output_type is pil, pt or np; got 'latent'"),
        ({"teacher_steps": 1500}, "has 1000 levels, fewer than teacher_steps=1500"),
        ({"threshold": float("nan")}, "the threshold is no number"),
        ({"inputs": {"latents": None}}, "one latents for each of the 1 prompts, as a list; got NoneType"),
        ({"inputs": {"latents": [None]}}, "one latents for each of the 1 prompts, and one of them is None"),
        ({"inputs": {"latents": torch.zeros(2, 4, 8, 8)}}, "for each of the 1 prompts, as a list; got 2"),
        ({"inputs": {"picture": [1]}}, "inputs name picture, which a StableDiffusionPipeline does not take"),
        ({"inputs": {"prompt": ["a"]}}, "inputs name prompt, which a StableDiffusionPipeline does not take"),
    ],
)
def test_bad_input_gets_a_sentence_before_anything_is_painted(options: dict, sentence: str, sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    pipe.student.unet.register_forward_pre_hook(lambda *_: pytest.fail("it was painted"))
    with pytest.raises(ConfigError, match=sentence):
        pipe(PROMPTS[:1], **{"threshold": 0.0, "variance": 0.5, "teacher_steps": 3, **options})


@pytest.mark.parametrize(
    ("who", "call", "sentence"),
    [
        (
            "student",
            {"num_images_per_prompt": 2},
            "the student's call asks for num_images_per_prompt=2, and every prom",
        ),
        (
            "teacher",
            {"num_images_per_prompt": 2},
            "the teacher's call asks for num_images_per_prompt=2, and every prom",
        ),
        ("student", {"output_type": "pil"}, "the student's call names output_type, which every batch is given"),
        ("teacher", {"sigmas": [1.0]}, "the teacher's call names sigmas, which would set its number of steps in the p"),
        ("teacher", {"timesteps": [999]}, "the teacher's call names timesteps, .* take no few-step student for a teac"),
        ("teacher", {"denoising_end": 0.8}, "the teacher's call names denoising_end"),
        (
            "teacher",
            {"guidance": 1.0},
            "the teacher's call names guidance, which a StableDiffusionPipeline does not take",
        ),
        (
            "student",
            {"guidance": 1.0},
            "the student's call names guidance, which a StableDiffusionPipeline does not take",
        ),
    ],
)
def test_bad_calls_get_a_sentence(who: str, call: dict, sentence: str, sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    with pytest.raises(ConfigError, match=sentence):
        AdaptivePipeline(pipe.student, pipe.teacher, pipe.judge, **{f"{who}_call": call})
    getattr(pipe, f"{who}_call").update(call)
    with pytest.raises(ConfigError, match=sentence):
        pipe(PROMPTS[:1], threshold=0.0, mode="regenerate", teacher_steps=3)


def test_inputs_that_the_teacher_does_not_take_are_refused(sd_folder: Path) -> None:
    """Instead of being the student's alone."""
    pipe = Pair(sd_folder).pipe
    editing = AutoPipelineForImage2Image.from_pipe(pipe.student)
    pair = AdaptivePipeline(editing, pipe.teacher, pipe.judge, student_call={"strength": 0.5})
    with pytest.raises(ConfigError, match="inputs name image, which a StableDiffusionPipeline does not take"):
        pair(
            PROMPTS[:1], threshold=0.0, mode="regenerate", teacher_steps=3, inputs={"image": torch.zeros(1, 3, 32, 32)}
        )


@pytest.mark.parametrize("mode", ["refine", "regenerate"])
def test_a_teacher_makes_a_picture_of_what_is_none(mode: str, sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    pipe.student.unet.conv_out.bias.data.fill_(float("nan"))
    made = seeded(
        pipe,
        PROMPTS[:2],
        0,
        threshold=0.0,
        mode=mode,
        teacher_steps=3,
        **({"variance": 0.5} if mode == "refine" else {}),
    )
    assert made.decisions == [REFINED if mode == "refine" else REGENERATED] * 2
    assert all(torch.as_tensor(image).isfinite().all() for image in made.images)


def test_prompts_that_are_no_texts_are_refused(sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    for prompts, sentence in ((None, "one prompt or more"), ([None], "prompts are texts; got None")):
        with pytest.raises(ConfigError, match=sentence):
            pipe(prompts, threshold=0.0, mode="regenerate", teacher_steps=3)


def test_a_budget_out_of_reach_is_refused(sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    pipe.calibration = calibrate(pipe, PROMPTS + PROMPTS, batch_size=32)
    with pytest.raises(ConfigError, match="3.0 steps on average cannot be kept.*ask for 4 to 7"):
        pipe.plan(budget=3.0, teacher_steps=3, mode="regenerate")
    with pytest.raises(ConfigError, match="give a budget"):
        pipe.plan(teacher_steps=3, mode="regenerate")


def test_generators(sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    options: dict[str, Any] = {"threshold": 0.0, "teacher_steps": 1, "mode": "regenerate", "output_type": "pt"}
    one, two = (pipe(PROMPTS[:3], generator=torch.Generator().manual_seed(4), **options).images for _ in range(2))
    torch.testing.assert_close(one, two)
    images, scores, decisions, steps = pipe("a red ring", return_dict=False, **options | {"output_type": "pil"})
    assert images[0].size == (32, 32) and len(scores) == len(decisions) == len(steps) == 1
    with pytest.raises(ConfigError, match="one for each of the 3 prompts; got 2"):
        pipe(PROMPTS[:3], generator=[torch.Generator()] * 2, **options)


def test_a_judge_that_gives_no_score_per_image_is_refused(sd_folder: Path) -> None:
    pipe = Pair(sd_folder, judge=lambda prompts, images: images.mean()).pipe
    with pytest.raises(ConfigError, match=r"gave scores of shape \(\) for 2 images; it must give one per image"):
        pipe(PROMPTS[:2], threshold=0.0, teacher_steps=1, mode="regenerate")


def test_pixels_carry_over_where_autoencoders_differ(sd_folder: Path) -> None:
    pair = Pair(sd_folder)
    assert same_autoencoder(pair.pipe.student, pair.pipe.teacher)
    pair.pipe.plan(threshold=0.0, mode="regenerate", teacher_steps=3)  # asks nothing of the autoencoders
    next(pair.pipe.teacher.vae.decoder.parameters()).data.add_(1.0)
    assert not pair.pipe.plan(threshold=0.0, variance=0.5, teacher_steps=3).latent
    answer = pair.painted(3, threshold=9.0)
    assert answer.decisions == [REFINED] * 3 and answer.images.isfinite().all()


def test_editing_regenerates_from_the_same_noised_image(sd_folder: Path) -> None:
    """SDEdit (section 4.2): both pipelines begin with the image that is edited."""
    pair = Pair(sd_folder)
    forms = [AutoPipelineForImage2Image.from_pipe(pipeline) for pipeline in (pair.pipe.student, pair.pipe.teacher)]
    student_call = {"num_inference_steps": 4, "guidance_scale": 0.0, "strength": 0.5}
    pipe = AdaptivePipeline(*forms, pair.pipe.judge, None, student_call, {"guidance_scale": GUIDANCE, "strength": 0.5})
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"teacher_steps": 6, "inputs": {"image": pictures}}
    answer = seeded(pipe, PROMPTS[:3], 0, threshold=9.0, mode="regenerate", **options)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    call: dict[str, Any] = {"guidance_scale": GUIDANCE, "strength": 0.5, "num_inference_steps": 12}
    expected = forms[1](PROMPTS[:3], image=pictures, generator=generators, output_type="pt", **call).images
    torch.testing.assert_close(answer.images, expected, atol=1e-4, rtol=0)
    assert answer.steps == [2 + 6] * 3
    with pytest.raises(ConfigError, match="begins with the image that is edited.*use mode='regenerate'"):
        seeded(pipe, PROMPTS[:3], 0, threshold=9.0, variance=0.5, **options)


def test_inpainting(sd_folder: Path) -> None:
    """What is not masked stays, kept or improved either way."""
    pair = Pair(sd_folder)
    forms = [AutoPipelineForInpainting.from_pipe(pipeline) for pipeline in (pair.pipe.student, pair.pipe.teacher)]
    student_call = {"num_inference_steps": 4, "guidance_scale": 0.0}
    pipe = AdaptivePipeline(*forms, pair.pipe.judge, None, student_call, {"guidance_scale": GUIDANCE})
    generator = torch.Generator().manual_seed(1)
    pictures, masks = torch.rand(2, 3, 32, 32, generator=generator), torch.zeros(2, 1, 32, 32)
    masks[..., :16] = 1.0
    inputs = {"image": pictures, "mask_image": masks}
    vae = forms[1].vae
    kept = vae.encode(pictures * 2 - 1).latent_dist
    decode, seen = vae.decode, []
    vae.decode = lambda latents, *rest, **options: seen.append(latents) or decode(latents, *rest, **options)
    for mode in ("refine", "regenerate"):
        answer = seeded(pipe, PROMPTS[:2], 0, threshold=9.0, mode=mode, variance=0.5, teacher_steps=3, inputs=inputs)
        assert answer.images.shape == (2, 3, 32, 32) and KEPT not in answer.decisions
        apart = ((seen[-1] - kept.mean) / kept.std).square()  # of a sample of the autoencoder's posterior: about 1
        assert apart[..., 4:].mean() < 1.3 < apart[..., :4].mean()


def test_controlnet_is_plugged_into_both(sd_folder: Path) -> None:
    """Section 4.3: the teacher's ControlNet, as it is, in the student too."""
    pair = Pair(sd_folder)
    torch.manual_seed(0)
    network = pair.pipe.teacher.unet
    control = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 4, 4))
    forms = [
        StableDiffusionControlNetPipeline(
            **{**pipeline.components, "controlnet": control}, requires_safety_checker=False
        )
        for pipeline in (pair.pipe.student, pair.pipe.teacher)
    ]
    pipe = AdaptivePipeline(*forms, pair.pipe.judge, None, pair.pipe.student_call, {"guidance_scale": GUIDANCE})
    edges = torch.rand(3, 3, 32, 32)
    for mode, word in (("refine", REFINED), ("regenerate", REGENERATED)):
        answer = seeded(pipe, PROMPTS[:3], 0, threshold=9.0, mode=mode, variance=0.5, teacher_steps=3, batch_size=2,
                        inputs={"image": edges})  # fmt: skip
        assert answer.decisions == [word] * 3 and answer.steps == [7] * 3


def test_images_have_the_size_of_the_teachers_call(sd_folder: Path) -> None:
    """A student of 32 pixels beside a teacher of 64: what is kept is made larger, what is refined is so in pixels."""
    pair = Pair(sd_folder)
    pair.pipe.teacher_call |= {"height": 64, "width": 64}
    threshold = pair.median(6)
    for mode in ("refine", "regenerate"):
        answer = pair.painted(6, threshold=threshold, mode=mode, batch_size=4)
        assert answer.images.shape == (6, 3, 64, 64) and len(set(answer.decisions)) == 2


def test_an_exchanged_scheduler_refines_too(sd3_folder: Path) -> None:
    pair = Pair(sd3_folder)
    before = pair.painted(2, threshold=9.0).images
    solver = pair.pipe.teacher.scheduler
    assert not hasattr(solver, "scale_noise"), "what was lent is taken back"
    pair.pipe.teacher.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    after = pair.painted(2, threshold=9.0).images
    assert pair.pipe.refiner.scheduler is pair.pipe.teacher.scheduler
    assert not torch.allclose(before, after, atol=1e-3)


def test_an_exchanged_teacher_or_network_refines_too(sd_folder: Path) -> None:
    pair, other = Pair(sd_folder), Pair(sd_folder).pipe.teacher
    for parameter in other.unet.parameters():
        parameter.data.mul_(0.5)
    before = pair.painted(2, threshold=9.0).images
    first, pair.pipe.teacher = pair.pipe.teacher, other
    after = pair.painted(2, threshold=9.0).images
    fresh = AdaptivePipeline(
        pair.pipe.student, other, pair.pipe.judge, None, pair.pipe.student_call, pair.pipe.teacher_call
    )
    pair.pipe, exchanging = fresh, pair.pipe
    assert torch.equal(after, pair.painted(2, threshold=9.0).images) and not torch.equal(after, before)
    exchanging.teacher = first
    first.unet = other.unet
    pair.pipe = exchanging
    assert torch.equal(after, pair.painted(2, threshold=9.0).images)


def test_one_negative_prompt_is_every_samples(pair: Pair) -> None:
    """Pipelines of SD take a list of prompts with a list of these alone."""
    answers = []
    for teacher_call in ({}, {"negative_prompt": "blurred"}):
        pair.pipe.teacher_call |= teacher_call
        answers.append(pair.painted(3, threshold=9.0, mode="regenerate", batch_size=2).images)
    assert not torch.equal(*answers)


def test_schedulers_that_ask_more_than_once_a_step_are_refused(sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    for name in ("PNDMScheduler", "HeunDiscreteScheduler"):
        pipe.teacher.scheduler = backbones.solver(name, pipe.teacher.scheduler)
        with pytest.raises(ConfigError, match=f"{name} asks the network 19 times in 10 steps"):
            pipe.plan(threshold=0.0, mode="regenerate", teacher_steps=10)


def test_without_a_generator_the_global_one_decides(sd_folder: Path) -> None:
    pipe = Pair(sd_folder).pipe
    options: dict[str, Any] = {"threshold": 0.0, "teacher_steps": 1, "mode": "regenerate", "output_type": "pt"}
    images, after = [], []
    for _ in range(2):
        torch.manual_seed(3)
        images.append(pipe(PROMPTS[:2], **options).images)
        after.append(torch.rand(1))
    torch.testing.assert_close(images[0], images[1])
    assert torch.equal(after[0], after[1])
