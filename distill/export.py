"""From a checkpoint to a pipeline that stock diffusers loads without this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill import backbones
from distill.backbones.base import Backbone
from distill.diffusion.denoiser import Denoiser
from distill.errors import ConfigError
from distill.files import read_json


@dataclass
class Student:
    """A trained network and what its checkpoint says about it.

    Attributes:
        backbone: the teacher's pipeline.
        denoiser: the student.
        facts: `teacher`, `strategies`, `strategy_configs`, `levels`, `schedule`, `size`, `steps`, `data` as the run
            stored them.
    """

    backbone: Backbone
    denoiser: Denoiser
    facts: dict[str, Any]

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        """Call arguments by number of steps, at 1, 2 and 4 as far as it was trained for them; empty for a teacher."""
        from distill.diffusion.levels import Discrete

        levels = self.facts["levels"]
        counts = [steps for steps in (1, 2, 4) if steps <= len(levels)]
        size = self.facts["size"]
        return {str(n): self.backbone.student_call(Discrete(levels).visited(n), size) for n in counts}

    def pipeline(self, **components: Any) -> Any:
        """A stock pipeline: with the few-step scheduler for a student, the teacher's own for a pretrained network.

        Args:
            components: in place of the teacher's.
        """
        if self.facts["levels"]:
            return self.backbone.student_pipeline(self.denoiser, **components)
        return self.backbone.pipeline(**{self.backbone.denoiser_name: self.denoiser.network}, **components)


def load_student(checkpoint: str | Path, teacher: str | None = None, raw: bool = False) -> Student:
    """The student of a checkpoint: its moving average where there is one.

    Args:
        checkpoint: a Lightning checkpoint of `DistillModule`, file or sharded folder.
        teacher: where the teacher's pipeline is now, if not where it was.
        raw: the trained weights rather than their moving average.

    Raises:
        ConfigError: no such checkpoint, or one of something else; missing or unexpected weights.
    """
    facts, weights = read_checkpoint(checkpoint)
    backbone = backbones.load(teacher or facts["teacher"], schedule=facts.get("schedule"))
    denoiser = backbone.denoiser()
    prefix = "student." if raw or not any(name.startswith("ema.") for name in weights) else "ema."
    found = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        denoiser.load_state_dict(found)
    except RuntimeError as error:
        raise ConfigError(f"'{checkpoint}' does not fit the teacher '{backbone.path}': {error}") from error
    return Student(backbone, denoiser.eval(), facts)


def export(
    checkpoint: str | Path,
    output: str | Path,
    teacher: str | None = None,
    raw: bool = False,
    half: bool = False,
    metrics: str | Path | None = None,
) -> Student:
    """Writes the student of a checkpoint as a diffusers folder with scheduler, call arguments and a model card.

    Args:
        checkpoint, teacher, raw: as in `load_student`.
        output: the folder; replaced as a whole.
        half: store float16.
        metrics: a JSON file of measured metrics for the card.

    Raises:
        ConfigError: as `load_student`.
    """
    _check_output(Path(output), Path(checkpoint))
    values = _measured(Path(metrics)) if metrics else None
    student = load_student(checkpoint, teacher, raw)
    pipeline = student.pipeline()
    if half:
        pipeline.to(torch.float16)
    calls = student.calls
    own = {"call": calls["1"], "calls": calls} if calls else {"call": student.backbone.call}
    student.backbone.save(pipeline, output, model_card(student, type(pipeline).__name__, values), own)
    return student


def _measured(metrics: Path) -> Any:
    try:
        return read_json(metrics)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--metrics {metrics} is no JSON file; give one that `distill evaluate --output` wrote"
        ) from error


def _check_output(output: Path, checkpoint: Path) -> None:
    """Refuses to replace anything but a pipeline."""
    inside = output.resolve() in checkpoint.resolve().parents
    if inside or (output.exists() and not (output / "model_index.json").is_file() and any(output.iterdir())):
        raise ConfigError(
            f"'{output}' holds something that is no pipeline and would be lost; give a new folder, or one that an "
            "earlier export wrote"
        )


def model_card(student: Student, pipeline: str, metrics: Any = None) -> str:
    """The README of an exported student: what it is, and the exact call that visits its trained levels."""
    facts, calls = student.facts, student.calls
    absent = "".join(f", {name}=None" for name in student.backbone.absent)
    lines = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n",
        f"# {'Few-step student' if calls else 'Network'} of {facts['teacher']}\n",
        f"- method: {' + '.join(facts['strategies'])}",
        f"- training: {facts['steps']} updates on {facts['data'] or 'unnamed data'}",
    ]
    if calls:
        lines += [f"- trained levels: {facts['levels']}", f"- sampling: {', '.join(calls)} steps, guidance 0 (none)"]
    call = calls[max(calls)] if calls else student.backbone.call
    lines += [
        "\n```python\nimport torch\nfrom diffusers import " + pipeline + "\n",
        f'pipe = {pipeline}.from_pretrained("THIS_FOLDER"{absent})',
        "torch.manual_seed(0)  # of all noise; a generator of the same seed would give the first noise twice",
        'image = pipe(\n    "YOUR PROMPT",',
        *[f"    {name}={value!r}," for name, value in call.items()],
        ").images[0]\n```\n",
    ]
    if calls:
        lines += ["Other numbers of steps, as arguments of the same call:\n"]
        lines += [f"- {count}: `{arguments}`" for count, arguments in calls.items()]
    if metrics:
        import json

        lines += ["\n## Metrics\n", "```json", json.dumps(metrics, indent=2), "```"]
    return "\n".join(lines) + "\n"


def read_checkpoint(checkpoint: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of its run, and its weights by name.

    Raises:
        ConfigError: no such checkpoint, or one of something else.
    """
    state = open_checkpoint(Path(checkpoint))
    if "distill" not in state:
        raise ConfigError(f"'{checkpoint}' is no checkpoint of a DistillModule; give one that `distill fit` wrote")
    return state["distill"], state["state_dict"]


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint is a folder, as FSDP2 writes them.

    Raises:
        ConfigError: a folder that is no checkpoint.
    """
    if checkpoint.is_dir() and not (checkpoint / "meta.pt").is_file():
        raise ConfigError(f"'{checkpoint}' is a folder and no checkpoint; give one, such as RUN/checkpoints/last.ckpt")
    return checkpoint.is_dir()


def open_checkpoint(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds; a file's weights stay in the file until they are used.

    Raises:
        ConfigError: no such checkpoint, or one that cannot be read.
    """
    if is_sharded(path):
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        return _load_distributed_checkpoint(path)
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint at '{path}'; `distill fit` writes them under its run's folder")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"'{path}' is no checkpoint, or a damaged one; give one that `distill fit` wrote, such as last.ckpt"
        ) from error
