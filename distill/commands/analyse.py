"""`distill analyse`."""

from __future__ import annotations

import json

from distill.errors import ConfigError, at_least_one, check_seeds
from distill.files import check_folder
from distill.provenance import typed_command


def analyse(
    student: str,
    teacher: str,
    output: str = "analysis",
    judge: str = "small-shapes",
    votes: str = "shapes",
    distance: str = "tiny-lpips",
    prompts: str | None = None,
    count: int = 1000,
    student_steps: int | None = None,
    student_guidance: float | None = None,
    teacher_steps: int = 25,
    teacher_guidance: float | None = None,
    solver: str | None = "DPMSolverMultistepScheduler",
    seed: int = 0,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Shows where a student differs from its teacher, and how well a judge of the student alone tells who is better.

    Args:
        student: exported folder, hub id, or a checkpoint of `distill fit`.
        teacher: shipped pipeline, folder or hub id.
        output: folder for images.csv (a row per image), findings.json and figures.png (the paper's Figures 3 to 7).
        judge: whose scores decide, as in `distill calibrate`.
        votes: another judge, in the place of people's votes.
        distance: tiny-lpips or shapes for drawn shapes; vgg, alex or squeeze for LPIPS from the hub; dreamsim.
        prompts: a file of prompts or a set's name, see `distill.data.prompts`; captions of drawn images if not given.
        count: how many captions of drawn images.
        student_steps, student_guidance, teacher_guidance, solver: as in `distill calibrate`.
        teacher_steps: of the teacher's images.
        seed: image i starts from the noise of seed + i.
        batch_size: images per call.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    from distill.backbones import dtype_of
    from distill.collaboration import analysis
    from distill.collaboration.calibrate import CALIBRATION
    from distill.collaboration.judges import open_judge
    from distill.collaboration.opening import open_pair, prompts_of
    from distill.evaluation.distances import open_distance
    from distill.inference import pick_device

    at_least_one(student_steps=student_steps, batch_size=batch_size)
    check_seeds(seed=seed)
    check_folder(output)
    asked = prompts_of(prompts, count, seed=CALIBRATION)
    if teacher_steps < 3 or len(asked) < 10:
        raise ConfigError(
            f"an analysis needs 3 teacher steps and 10 prompts or more; got {teacher_steps} and {len(asked)}"
        )
    pair = open_pair(
        student, teacher, judge, None, student_steps, student_guidance, teacher_guidance, solver, device,
        dtype_of(dtype, half=True)
    )  # fmt: skip
    other, apart = open_judge(votes, pick_device(device)), open_distance(distance, pick_device(device))
    rows = analysis.analyse(pair, asked, other, apart, teacher_steps, seed, batch_size)
    command = typed_command()
    print(json.dumps(analysis.save(rows, asked, output, command, seed), indent=2))
