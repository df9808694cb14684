"""`distill calibrate`."""

from __future__ import annotations

from distill.errors import ConfigError, at_least_one, check_seeds
from distill.files import check_file


def calibrate(
    student: str,
    teacher: str,
    output: str,
    judge: str = "small-shapes",
    prompts: str | None = None,
    count: int = 1000,
    student_steps: int | None = None,
    student_guidance: float | None = None,
    teacher_guidance: float | None = None,
    solver: str | None = "DPMSolverMultistepScheduler",
    budget: float | None = None,
    modes: tuple[str, ...] = ("refine", "regenerate"),
    target: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Scores a student's images of held-out prompts, and finds the best way to spend a budget of steps.

    Args:
        student: exported folder, hub id, or a checkpoint of `distill fit`.
        teacher: shipped pipeline, folder or hub id.
        output: the JSON file that `distill collaborate` reads.
        judge: small-shapes, shapes, clip:ARCHITECTURE:WEIGHTS, image-reward:NAME, preference:MODEL, critic:CHECKPOINT.
        prompts: a file of prompts or a set's name, see `distill.data.prompts`; captions of drawn images if not given.
        count: how many captions of drawn images.
        student_steps, student_guidance: of the student's sampler; what its folder says if not given.
        teacher_guidance: what the teacher's folder says if not given.
        solver: the teacher's scheduler.
        budget: average steps per image to find the best way for; only scores if not given.
        modes: that are tried, refine and regenerate.
        target: what is to be best: a judge, or fid_shapes; the deciding judge if not given.
        seed: of the noise.
        batch_size: images per call.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    from distill.backbones import dtype_of
    from distill.collaboration import calibrate as calibrating
    from distill.collaboration.opening import open_pair, prompts_of, target_of
    from distill.collaboration.pipeline import MODES

    if unknown := [mode for mode in modes if mode not in MODES] or not modes:
        raise ConfigError(f"modes are some of {', '.join(MODES)}; got {unknown if modes else 'none'}")
    at_least_one(count=count, student_steps=student_steps, batch_size=batch_size)
    check_seeds(seed=seed)
    check_file(output)
    asked, best_by = prompts_of(prompts, count, seed=calibrating.CALIBRATION), target_of(target, device)
    pair = open_pair(
        student, teacher, judge, None, student_steps, student_guidance, teacher_guidance, solver, device,
        dtype_of(dtype, half=True)
    )  # fmt: skip
    if budget is not None:
        calibrating.check_search(pair, asked, budget, modes)
    made = calibrating.calibrate(pair, asked, seed, batch_size)
    made.save(output)
    if budget is not None:
        pair.calibration = made
        made = calibrating.search(pair, asked, budget, modes, best_by, seed, batch_size)
        made.save(output)
    shown = ", ".join(f"{share} % below {made.threshold(share / 100):.4g}" for share in range(10, 100, 20))
    print(f"scores of {made.prompts} images by {made.judge}: {shown}")
    if best := made.choice:
        low, high = made.interval(best["share"], best["teacher_steps"])
        variance = f" from a variance of {best['variance']}" if "variance" in best else ""
        print(
            f"best for {budget:g} steps on average ({low:.2f} to {high:.2f} on fresh prompts): {best['mode']} the "
            f"worst {best['share']:.0%} with {best['teacher_steps']} steps of the teacher{variance}; "
            f"{target or made.judge} {best['value']:.4g}"
        )
    print(f"the calibration is in {output}")
