"""What the commands are given by name: a student with its teacher and judge, prompts, and what is to be best."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distill.collaboration.calibrate import MeanScore, Target
from distill.collaboration.calibration import Calibration
from distill.collaboration.calls import at_own_size
from distill.collaboration.judges import open_judge
from distill.collaboration.pipeline import AdaptivePipeline
from distill.data import shapes
from distill.data.prompts import read_prompts
from distill.inference import open_painter, open_student_painter, pick_device


def open_pair(
    student: str,
    teacher: str,
    judge: str,
    calibration: str | None = None,
    student_steps: int | None = None,
    student_guidance: float | None = None,
    teacher_guidance: float | None = None,
    solver: str | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> AdaptivePipeline:
    """A student and a teacher by name, called as their folders say; a teacher of another size than the student's paints
    at its own.

    Raises:
        ConfigError: no such pipeline, judge or calibration, or one of another set-up.
    """
    if student.endswith(".ckpt"):
        painter = open_student_painter(student, student_steps, student_guidance, None, device, dtype)
    else:
        painter = open_painter(student, student_steps, student_guidance, None, device, dtype)
    other = open_painter(teacher, None, teacher_guidance, solver, device, dtype)
    made = Calibration.load(calibration) if calibration else None
    decides = open_judge(judge, pick_device(device))
    call = at_own_size((painter.pipeline, painter.call), (other.pipeline, other.call))
    pair = AdaptivePipeline(painter.pipeline, other.pipeline, decides, made, painter.call, call)
    pair.set_progress_bar_config(desc="painting", unit="image")  # type: ignore[attr-defined]
    return pair


def prompts_of(file: str | None, count: int, seed: int) -> list[str]:
    """The lines of a file, or captions of drawn images."""
    return read_prompts(file) if file else shapes.captions(seed, range(count))


class NearDrawn:
    """How near images are to drawn ones: the negative `fid_shapes`."""

    def __init__(self) -> None:
        from distill.evaluation.evaluate import held_out

        self.distance = copy.deepcopy(held_out(10000))

    def update(self, prompts: list[str], images: Tensor) -> None:
        """B prompts and their images."""
        self.distance.update(images, real=False)

    def value(self) -> float:
        """The higher, the nearer."""
        return -float(self.distance.compute())


def target_of(name: str | None, device: str = "auto") -> Callable[[], Target] | None:
    """What makes the target of a search: a judge's mean score, or the negative `fid_shapes`.

    Raises:
        ConfigError: an unknown judge.
    """
    if name is None:
        return None
    return NearDrawn if name == "fid_shapes" else partial(MeanScore, open_judge(name, pick_device(device)))
