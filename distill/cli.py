"""The commands; nothing else. Each imports what it needs, so that `distill --help` stays quick."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

HELP = """\
usage: distill COMMAND [options]

Turns a slow diffusion pipeline into a 1-4 step one.

  fit        train a student              distill fit --config recipes/tiny_ladd.yaml
  validate   metrics of a checkpoint      distill validate --config RECIPE --ckpt_path CHECKPOINT
  test       the same on the test set     distill test --config RECIPE --ckpt_path CHECKPOINT
  generate   data made once               distill generate latents|pairs|encoded --teacher PIPELINE --output FOLDER
  export     checkpoint to pipeline       distill export --checkpoint CHECKPOINT --output FOLDER
  sample     images from prompts          distill sample --pipeline FOLDER --prompt "a red ring" --steps 1
  evaluate   metrics of a pipeline        distill evaluate --pipeline FOLDER --steps 1
  compare    methods side by side         distill compare --config benchmarks/methods_tiny.yaml
  calibrate  when to ask the teacher      distill calibrate --student FOLDER --teacher PIPELINE --output FILE
  collaborate  student and teacher        distill collaborate --student FOLDER --teacher PIPELINE --calibration FILE
  analyse    where the two differ         distill analyse --student FOLDER --teacher PIPELINE
  vote       win rates and ELO            distill vote --votes FILE.csv

`distill COMMAND --help` lists a command's options."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; a mistake of the user's ends in one sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    from distill.errors import INTERRUPTED, ConfigError, check_recipes, sentence_of

    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        _fail(f"'{command}' is no command; choose one of {', '.join(COMMANDS)}")
    quiet()
    try:
        check_recipes(rest)
        COMMANDS[command](command, rest)
    except ConfigError as error:
        _fail(sentence_of(error))
    except FloatingPointError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _end(command, "interrupted", INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # as Lightning ends, with code 1
            _end(command, "interrupted", INTERRUPTED)
        raise
    except OSError as error:  # a full disk, a file in a folder's place, damaged weights: the place says what to do
        _fail(" ".join(str(error).split()) or type(error).__name__)


def sample(
    pipeline: str | None = None,
    checkpoint: str | None = None,
    output: str = "samples",
    prompt: list[str] | str | None = None,
    prompts: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
    columns: int = 8,
    scale: int = 1,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Paints prompts: single PNG files and one grid.

    Args:
        pipeline: shipped pipeline, folder or hub id.
        checkpoint: a checkpoint of `distill fit`, in place of a pipeline.
        output: folder for 00000.png, ..., prompts.txt and, of the first eight rows, grid.png, in place of an earlier
            call's; others' pictures are not replaced. A call that was killed is continued by the same call.
        prompt: one, or several as '["a red ring", "a blue square"]'.
        prompts: a text file with one prompt per line, or another set: see `distill.data.prompts`.
        steps: of the sampler; what the pipeline's folder says if not given.
        guidance: classifier-free guidance; what the folder says if not given.
        solver: a diffusers scheduler in place of the pipeline's own.
        seed: image i starts from the noise of seed + i.
        batch_size: images per call.
        columns: of the grid.
        scale: enlargement of each pixel in the grid.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    from pathlib import Path

    import torch

    from distill.backbones import dtype_of
    from distill.data.prompts import given_prompts
    from distill.errors import at_least_one, check_seeds
    from distill.files import check_folder
    from distill.inference import check_samples, grid, open_either, paint, save_png

    at_least_one(steps=steps, batch_size=batch_size, columns=columns, scale=scale)
    check_seeds(seed=seed)
    check_folder(output)
    lines = given_prompts(prompt, prompts)
    check_samples(output, len(lines))
    painter = open_either(pipeline, checkpoint, steps, guidance, solver, device, dtype_of(dtype, half=True))
    shown, kept = paint(painter, lines, output, seed, batch_size, columns * 8)
    save_png(grid(torch.stack(shown), columns, scale), Path(output) / "grid.png")
    some = "their grid" if len(shown) == len(lines) else f"a grid of the first {len(shown)}"
    before = f"; {kept} of them were there from the same call before" if kept else ""
    print(f"{len(lines)} images and {some} are in {output}{before}")


def evaluate(
    pipeline: str | None = None,
    checkpoint: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    samples: int = 10000,
    seed: int = 0,
    batch_size: int = 128,
    reference: str = "shapes",
    prompts: str | None = None,
    inception: str | None = None,
    clip: str | None = None,
    clip_weights: str = "laion2b_s34b_b88k",
    output: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Measures a pipeline or a checkpoint's student against a reference set and prints the values as JSON.

    Args:
        pipeline: shipped pipeline, folder or hub id.
        checkpoint: a checkpoint of `distill fit`, in place of a pipeline.
        steps: of the sampler; what the pipeline's folder says if not given.
        guidance: classifier-free guidance; what the folder says if not given.
        solver: a diffusers scheduler in place of the pipeline's own.
        samples: number of images.
        seed: of their noise.
        batch_size: images per call.
        reference: `shapes` (fid_shapes, alignment) or a folder of real images (Inception FID, CLIP score).
        prompts: for a folder of real images, a text file with one prompt per line.
        inception: Inception weight file; downloaded if not given.
        clip: open_clip architecture for the CLIP score, such as ViT-g-14; none if not given.
        clip_weights: its open_clip tag or weight file.
        output: a JSON file to write the values to as well.
        dtype: of the weights, float32, bfloat16 or float16; half the memory, and latents rounded between the steps.
        device: auto, cpu, cuda, ...
    """
    from distill.backbones import dtype_of
    from distill.data.prompts import read_prompts
    from distill.errors import ConfigError, at_least_one, check_seeds
    from distill.evaluation.evaluate import evaluate_on_images, evaluate_on_shapes
    from distill.files import check_file, save_json
    from distill.inference import open_either, pick_device

    for name, given in (("prompts", prompts), ("inception", inception), ("clip", clip)):
        if reference == "shapes" and given is not None:
            raise ConfigError(f"--{name} is for real images; give --reference FOLDER with it, or leave it out")
    at_least_one(steps=steps, batch_size=batch_size)
    check_seeds(seed=seed)
    precision = dtype_of(dtype, half=True)
    check_file(output)
    if samples < 2:
        raise ConfigError(f"a distance between distributions needs 2 images or more; got --samples {samples}")
    painter = open_either(pipeline, checkpoint, steps, guidance, solver, device, precision)
    if reference == "shapes":
        values = evaluate_on_shapes(painter, samples, seed, batch_size)
    else:
        if prompts is None:
            raise ConfigError("real images need captions to paint; give --prompts FILE with one per line")
        tower = (clip, clip_weights) if clip else None
        values = evaluate_on_images(
            painter, read_prompts(prompts), reference, samples, seed, batch_size, inception, tower, pick_device(device)
        )
    print(json.dumps(values, indent=2))
    if samples < 2000:
        note = f"distances of {samples} images are larger than those of many; compare with the same number only"
        print(f"distill: {note}", file=sys.stderr)
    if output:
        save_json(values, output)


def export(
    checkpoint: str,
    output: str,
    teacher: str | None = None,
    raw: bool = False,
    half: bool = False,
    metrics: str | None = None,
    lora: bool = False,
) -> None:
    """Writes a checkpoint's student as a pipeline that stock diffusers loads.

    Args:
        checkpoint: as `distill fit` wrote it, file or sharded folder.
        output: the diffusers folder; replaced as a whole.
        teacher: where the teacher's pipeline is now, if not where it was.
        raw: the trained weights rather than their moving average.
        half: store float16.
        metrics: a JSON file of measured metrics for the model card.
        lora: of a run with model.lora: write its adapters alone, which the teacher's pipeline loads, rather than a
            pipeline they are merged into.
    """
    from distill import export as exporting

    student = exporting.export(checkpoint, output, teacher, raw, half, metrics, lora)
    print(f"{output}: student of {student.facts['teacher']} after {student.facts['steps']} updates")


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
    from distill.collaboration.commands import open_pair, prompts_of, target_of
    from distill.collaboration.pipeline import MODES
    from distill.errors import ConfigError, at_least_one, check_seeds
    from distill.files import check_file

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
    from distill.collaboration.commands import collaborate as collaborating
    from distill.collaboration.commands import open_pair
    from distill.data.prompts import given_prompts
    from distill.errors import at_least_one, check_seeds
    from distill.files import check_folder
    from distill.inference import check_samples

    at_least_one(student_steps=student_steps, batch_size=batch_size, compare=compare, scale=scale)
    check_seeds(seed=seed)
    check_folder(output)
    lines = given_prompts(prompt, prompts)
    check_samples(output, len(lines))
    pair = open_pair(
        student, teacher, judge, calibration, student_steps, student_guidance, teacher_guidance, solver, device,
        dtype_of(dtype, half=True)
    )  # fmt: skip
    how = {"budget": budget, "threshold": threshold, "mode": mode, "variance": variance, "strength": strength,
           "teacher_steps": teacher_steps}  # fmt: skip
    print(collaborating(pair, lines, output, how, seed, batch_size, compare, scale))


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
    from distill.collaboration.commands import open_pair, prompts_of
    from distill.collaboration.judges import open_judge
    from distill.errors import ConfigError, at_least_one, check_seeds
    from distill.evaluation.distances import open_distance
    from distill.files import check_folder
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
    command = shlex.join(["distill", *sys.argv[1:]])
    print(json.dumps(analysis.save(rows, asked, output, command, seed), indent=2))


def vote(
    votes: str,
    images: dict[str, str] | None = None,
    judge: str | None = None,
    output: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Counts pairwise votes of people or judges as win rates and ELO; with images, a judge casts them first.

    Args:
        votes: a CSV file with the columns first, second, outcome (1, 0 or 0.5), prompt and voter; with images it is
            written, and a table of other voters is not replaced.
        images: folders of `distill sample` with the same prompts by name, as '{"a": "FOLDER", "b": "FOLDER"}'.
        judge: who votes on them, as in `distill calibrate`; the table names it as judge:SPEC.
        output: a JSON file to write win rates and ELO to as well, with command and machine.
        batch_size: images per call of the judge.
        device: of the judge: auto, cpu, cuda, ...
    """
    from pathlib import Path

    from distill.collaboration.judges import check_judge, open_judge
    from distill.errors import ConfigError, at_least_one
    from distill.evaluation.voting import cast_votes, check_own, common_prompts, read_votes, save_votes, tally
    from distill.files import check_file, save_json
    from distill.inference import pick_device
    from distill.provenance import stamped

    at_least_one(batch_size=batch_size)
    check_file(output)
    if output and Path(output).resolve() == Path(votes).resolve():
        raise ConfigError(f"'{output}' is the table of votes; give another --output for what they come to")
    if (images is None) != (judge is None):
        raise ConfigError("a judge votes on images; give --images and --judge, or only --votes to count a table")
    if images is not None and judge is not None:
        check_file(votes)
        check_judge(judge)
        check_own(votes, judge)
        common_prompts(images)  # before a judge is loaded
        cast = cast_votes(images, open_judge(judge, pick_device(device)), judge, batch_size)
        save_votes(cast, votes)
        print(f"{len(cast)} votes of the judge {judge} are in {votes}", file=sys.stderr)
    found = tally(read_votes(votes))
    print(json.dumps(found, indent=2))
    if output:
        save_json(stamped(found, [0], shlex.join(["distill", *sys.argv[1:]])), output)


def _generate(command: str, arguments: list[str]) -> None:
    from distill.training.generating import generate_encoded, generate_latents, generate_pairs

    kinds: dict[str, Callable[..., None]] = {
        "latents": generate_latents, "pairs": generate_pairs, "encoded": generate_encoded
    }  # fmt: skip
    if arguments and arguments[0] in ("-h", "--help"):
        print("".join(f"distill generate {kind} --help lists the options of {kind}\n" for kind in kinds), end="")
        return
    if not arguments or arguments[0] not in kinds:
        given = f"'{arguments[0]}'" if arguments else "nothing"
        _fail(f"distill generate makes {' or '.join(kinds)}; got {given}")
    _call(kinds[arguments[0]], f"generate {arguments[0]}", arguments[1:])


def _compare(command: str, arguments: list[str]) -> None:
    from distill.comparison.command import compare

    _call(compare, command, arguments)


def _train(command: str, arguments: list[str]) -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from omegaconf.errors import OmegaConfBaseException

    from distill.errors import ENDED, ConfigError
    from distill.training.cli import DistillCLI
    from distill.training.ending import Requeued

    try:
        DistillCLI([command, *arguments])
    except OmegaConfBaseException as error:  # a ${...} that leads nowhere
        raise ConfigError(str(error)) from error
    except Requeued:
        _end(command, "ended, to be run again by Slurm,", ENDED)
    except SIGTERMException:  # an exit of code 0 by itself, after which a script would go on with half a student
        _end(command, "ended by SIGTERM", ENDED)


def _end(command: str, how: str, code: int) -> NoReturn:
    again = "; --ckpt_path last goes on from its last checkpoint" if command == "fit" else ""
    print(f"distill: {how} before {command} was through{again}", file=sys.stderr)
    sys.exit(code)


def _function(function: Callable[..., None]) -> Callable[[str, list[str]], None]:
    return lambda command, arguments: _call(function, command, arguments)


def _call(function: Callable[..., None], command: str, arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser

    description = (function.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"distill {command}", description=description, allow_abbrev=False)
    parser.error = _fail  # type: ignore[method-assign,assignment]
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_function_arguments(function, as_positional=False)
    options = parser.parse_args(arguments)
    options.pop("config", None)
    function(**parser.instantiate_classes(options).as_dict())


def quiet() -> None:
    """Keeps the libraries' own progress bars and advice out of ours."""
    import logging
    import os
    import warnings

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    advice = (  # on what is meant to be so here
        ".*is deprecated.*",
        ".*many workers.*",
        ".*This DataLoader will create .* worker processes.*",
        ".*LightningCLI's args parameter.*",
        ".*in eval mode at the start of training.*",
        "(?s).*ModelCheckpoint with manual optimization.*",
        ".*no `val_dataloader`.*",
        ".*predict returned None.*",
        ".*not supported by the model summary.*",
        ".*no last checkpoint available.*",
        ".*Total length of .* across ranks is zero.*",  # of validation data, without `data.reference`
        ".*is smaller than the logging interval.*",  # it counts the batches of an epoch; ours are many short ones
    )
    for message in advice:
        warnings.filterwarnings("ignore", message=message)


def _no_tip(record: Any) -> bool:
    return "Tip:" not in record.getMessage()


def _fail(message: str, *_: Any) -> None:
    from distill.errors import parsers_sentence

    print(f"distill: error: {parsers_sentence(message)}", file=sys.stderr)
    raise SystemExit(2)


COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    "fit": _train,
    "validate": _train,
    "test": _train,
    "generate": _generate,
    "export": _function(export),
    "sample": _function(sample),
    "evaluate": _function(evaluate),
    "compare": _compare,
    "calibrate": _function(calibrate),
    "collaborate": _function(collaborate),
    "analyse": _function(analyse),
    "vote": _function(vote),
}
