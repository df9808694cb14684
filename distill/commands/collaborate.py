"""`distill collaborate`."""

from __future__ import annotations

from distill.errors import ConfigError, at_least_one, check_seeds
from distill.files import check_folder


def collaborate(
    student: str,
    teacher: str,
    output: str = "collaboration",
    judge: str = "small-shapes",
    calibration: str | None = None,
    prompt: list[str] | str | None = None,
    prompts: str | None = None,
    budget: float | None = None,
    threshold: float | None = None,
    mode: str | None = None,
    variance: float | None = None,
    strength: float | None = None,
    teacher_steps: int | None = None,
    student_steps: int | None = None,
    student_guidance: float | None = None,
    teacher_guidance: float | None = None,
    solver: str | None = "DPMSolverMultistepScheduler",
    compare: int = 8,
    scale: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Paints prompts with a student and lets its teacher improve what a judge rejects.

    Args:
        student: exported folder, hub id, or a checkpoint of `distill fit`.
        teacher: shipped pipeline, folder or hub id.
        output: folder for 00000.png, ..., prompts.txt, decisions.csv and grid.png (rows: teacher, student, adaptive).
        judge: as in `distill calibrate`.
        calibration: the file `distill calibrate` wrote.
        prompt: one, or several as '["a red ring", "a blue square"]'.
        prompts: a text file with one prompt per line, or another set: see `distill.data.prompts`.
        budget: average steps per image; or give a threshold.
        threshold: images that score below it are improved.
        mode: refine or regenerate.
        variance: of the noise a refined latent gets, between 0 and 1; or give a strength.
        strength: share of the teacher's schedule that refines.
        teacher_steps: for each improved image.
        student_steps, student_guidance, teacher_guidance, solver: as in `distill calibrate`.
        compare: how many prompts the grid shows.
        scale: enlargement of each pixel in the grid.
        seed: image i starts from the noise of seed + i.
        batch_size: images per call.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    from distill.backbones import dtype_of
    from distill.collaboration.opening import open_pair
    from distill.collaboration.painting import paint
    from distill.data.prompts import given_prompts
    from distill.inference import check_samples

    at_least_one(student_steps=student_steps, batch_size=batch_size, compare=compare, scale=scale)
    check_seeds(seed=seed)
    if mode == "regenerate" and not (variance is None and strength is None):
        raise ConfigError("--variance and --strength are of --mode refine; leave them out to regenerate")
    check_folder(output)
    lines = given_prompts(prompt, prompts)
    check_samples(output, len(lines))
    pair = open_pair(
        student, teacher, judge, calibration, student_steps, student_guidance, teacher_guidance, solver, device,
        dtype_of(dtype, half=True)
    )  # fmt: skip
    how = {"budget": budget, "threshold": threshold, "mode": mode, "variance": variance, "strength": strength,
           "teacher_steps": teacher_steps}  # fmt: skip
    print(paint(pair, lines, output, how, seed, batch_size, compare, scale))
