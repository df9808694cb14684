"""From a checkpoint to a pipeline that stock diffusers loads without this package."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill import backbones
from distill.backbones.base import ADAPTERS, CALL_FILE, Backbone, same_network
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.lora import LoRA, portable
from distill.diffusion.process import alike, told
from distill.errors import ConfigError
from distill.files import read_json

PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
SAID = "meta.pt"  # in a sharded checkpoint's folder, what Lightning writes beside the shards
PREFIX = "state_dict."  # of the names of weights there


@dataclass
class Student:
    """A trained network and what its checkpoint says about it.

    Attributes:
        backbone: the teacher's pipeline.
        denoiser: the student.
        facts: `teacher`, `strategies`, `strategy_configs`, `levels`, `schedule`, `lora`, `size`, `steps`, `data` as the
            run stored them.
    """

    backbone: Backbone
    denoiser: Denoiser
    facts: dict[str, Any]

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        """Call arguments by number of steps: 1 to 8 and on by doubling, as far as it has levels, and all of them; empty
        for a teacher.
        """
        from distill.diffusion.levels import Discrete

        levels = self.facts["levels"]
        usual = (*range(1, 9), *(2**power for power in range(4, 10)), len(levels))
        counts = [n for n in range(1, len(levels) + 1) if n in usual]
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


def load_student(checkpoint: str | Path, teacher: str | None = None, raw: bool = False, merged: bool = True) -> Student:
    """The student of a checkpoint: its moving average where there is one.

    Args:
        checkpoint: a Lightning checkpoint of `DistillModule`, file or sharded folder.
        teacher: where the teacher's pipeline is now, if not where it was.
        raw: the trained weights rather than their moving average.
        merged: whether adapters (LoRA) that were trained become part of the weights, or stay beside them.

    Raises:
        ConfigError: no such checkpoint, or one of something else; missing or unexpected weights.
    """
    facts, weights = read_checkpoint(checkpoint, ["student."] if raw else ["ema.", "student."])
    try:
        backbone = backbones.load(teacher or facts["teacher"], schedule=facts.get("schedule"))
    except ConfigError as error:
        if teacher:
            raise
        raise ConfigError(f"the teacher of '{checkpoint}': {error}; export --teacher says where it is now") from error
    _check_teacher(backbone, facts, checkpoint)
    denoiser = backbone.denoiser()
    if facts.get("lora"):
        denoiser.adapt(LoRA(**facts["lora"]), seed=0)
    given = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    try:
        denoiser.load_state_dict(given)
    except RuntimeError as error:
        other = sorted(denoiser.state_dict().keys() ^ given.keys())
        reason = f"{len(other)} weights are in one of them alone, such as {other[0]}" if other else "other shapes"
        raise ConfigError(f"'{checkpoint}' does not fit the teacher '{backbone.path}': {reason}") from error
    if denoiser.adapted and merged:
        denoiser.merge()
    return Student(backbone, denoiser.eval(), facts)


def _check_teacher(backbone: Backbone, facts: dict[str, Any], checkpoint: str | Path) -> None:
    """Refuses a pipeline in which the trained weights mean another thing, and tells of one with other weights, whose
    autoencoder and text encoders may be others too. Of earlier checkpoints, and between a folder and a hub id, nothing
    can be told.
    """
    now = backbone.process().facts
    if not alike(facts.get("process", now), now):
        raise ConfigError(
            f"the network of '{checkpoint}' was trained as {told(facts['process'])}, and the scheduler of "
            f"'{backbone.path}' says {told(now)}; export --teacher says where the pipeline is that it was trained with"
        )
    before, here = facts.get("fingerprint") or "", backbone.fingerprint
    if not ("@" in before and "@" in here) or same_network(before, here):
        return
    kept = "all of the student but its adapters" if facts.get("lora") else "the student's autoencoder and text encoders"
    warnings.warn(
        f"'{checkpoint}' was trained from {before}, and '{backbone.path}' is {here}, a copy with other files or "
        f"another pipeline: of it {'is' if facts.get('lora') else 'are'} {kept} now",
        stacklevel=3,
    )


def export(
    checkpoint: str | Path,
    output: str | Path,
    teacher: str | None = None,
    raw: bool = False,
    half: bool = False,
    metrics: str | Path | None = None,
    lora: bool = False,
) -> Student:
    """Writes the student of a checkpoint as a diffusers folder with scheduler, call arguments and a model card.

    Args:
        checkpoint, teacher, raw: as in `load_student`.
        output: the folder; replaced as a whole.
        half: store float16.
        metrics: a JSON file of measured metrics for the card.
        lora: write the adapters that were trained and the scheduler, for the teacher's pipeline to load, rather than a
            whole pipeline they are merged into.

    Raises:
        ConfigError: as `load_student`; no adapters where they are asked for.
    """
    _check_output(Path(output), Path(checkpoint))
    values = _measured(Path(metrics)) if metrics else None
    student = load_student(checkpoint, teacher, raw, merged=not lora)
    if Path(student.backbone.path).resolve() == Path(output).resolve():
        raise ConfigError(f"'{output}' is the student's teacher, which would be lost; give a new folder")
    if lora and not student.denoiser.adapted:
        raise ConfigError(
            f"'{checkpoint}' is of a run without adapters (model.lora), which trained all weights; leave --lora out"
        )
    pipeline = student.pipeline(**(student.backbone.without_others if lora else {}))
    if half:
        pipeline.to(torch.float16)
    calls = student.calls
    own = {"call": calls["1"], "calls": calls} if calls else {"call": student.backbone.call}
    card = model_card(student, pipeline, values, half)
    if lora:
        adapters = portable(student.denoiser.network, LoRA(**student.facts["lora"]))
        student.backbone.save_adapters(pipeline, adapters, output, card, own)
    else:
        student.backbone.save(pipeline, output, card, own)
    return student


def _measured(metrics: Path) -> Any:
    try:
        return read_json(metrics)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--metrics {metrics} is no JSON file; give one that `distill evaluate --output` wrote"
        ) from error


def _check_output(output: Path, checkpoint: Path) -> None:
    """Refuses to replace anything but an earlier export."""
    inside = output.resolve() in checkpoint.resolve().parents
    others = _not_exported(output) if output.exists() else []
    if inside or others:
        some = f", such as {others[0]}," if others else ""
        raise ConfigError(
            f"'{output}' holds something{some} that no export wrote and that would be lost; give a new folder, or one "
            "that an earlier export wrote"
        )


def _not_exported(folder: Path) -> list[str]:
    """The names in a folder that no export wrote: all of them unless it is a pipeline, or adapters, with the file that
    says how it is called, which only exports have.
    """
    names, index = {path.name for path in folder.iterdir()}, folder / "model_index.json"
    made: set[str] = set()
    if CALL_FILE in names and (index.is_file() or ADAPTERS in names):
        components = read_json(index) if index.is_file() else {}
        made = {"README.md", CALL_FILE, ADAPTERS, index.name, "scheduler", *components}
    return sorted(names - made)


def model_card(student: Student, pipeline: Any, metrics: Any = None, half: bool = False) -> str:
    """The README of an exported student: what it is, and the exact calls that visit its trained levels, first that of
    four steps or of as many below as there are. Of one that is still adapted it says how its teacher loads them.
    """
    facts, calls = student.facts, student.calls
    kind, scheduler = type(pipeline).__name__, type(pipeline.scheduler).__name__
    adapted = student.denoiser.adapted
    # An exported folder says itself which optional components it has not; the teacher's may say that it has them.
    untold = [name for name in student.backbone.absent if adapted or name not in pipeline._optional_components]
    loaded = "".join(f", {name}=None" for name in untold)
    if adapted and student.backbone.half_alone:
        loaded += ', variant="fp16"'
    if half:  # without it diffusers reads float32, and transformers what the files hold
        loaded += ", torch_dtype=torch.float16"
    teacher, local = student.backbone.path, Path(student.backbone.path).exists()
    about = "tags:\n- lora\n" + ("" if local else f"base_model: {teacher}\n") if adapted else ""
    teacher = str(Path(teacher).resolve()) if local else teacher
    lines = [
        f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n{about}---\n",
        f"# {'Few-step student' if calls else 'Network'} of {facts['teacher']}\n",
        f"- method: {' + '.join(facts['strategies'])}",
        f"- training: {facts['steps']} updates on {facts['data'] or 'unnamed data'}",
    ]
    if facts.get("lora"):
        lines.append(f"- adapters (LoRA) of rank {facts['lora']['rank']}, {'alone' if adapted else 'merged'}")
    if calls:
        lines += [f"- trained levels: {facts['levels']}", f"- sampling: {', '.join(calls)} steps, guidance 0 (none)"]
    few = [count for count in calls if int(count) <= 4]  # as a student of many levels has many numbers of steps
    call = calls[max(few, key=int)] if calls else student.backbone.call
    lines += [
        f"\n```python\nimport torch\nfrom diffusers import {', '.join([scheduler, kind] if adapted else [kind])}\n"
    ]
    if adapted:
        lines += [
            f'pipe = {kind}.from_pretrained("{teacher}"{loaded})',
            'pipe.load_lora_weights("THIS_FOLDER")  # by the package peft',
            f'pipe.scheduler = {scheduler}.from_pretrained("THIS_FOLDER", subfolder="scheduler")',
        ]
    else:
        lines += [f'pipe = {kind}.from_pretrained("THIS_FOLDER"{loaded})']
    lines += [
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


def read_checkpoint(checkpoint: str | Path, parts: Sequence[str] = ("",)) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of its run, and weights by name.

    Args:
        checkpoint: file or sharded folder.
        parts: beginnings of names; the weights are those of the first that any name has. All if not given.

    Raises:
        ConfigError: no such checkpoint, or one of something else.
    """
    state = _gathered(Path(checkpoint), parts) if is_sharded(Path(checkpoint)) else open_checkpoint(Path(checkpoint))
    if "distill" not in state:
        raise ConfigError(f"'{checkpoint}' is no checkpoint of a DistillModule; give one that `distill fit` wrote")
    weights = state["state_dict"]
    return state["distill"], {name: weights[name] for name in _first_part(list(weights), parts)}


def _first_part(names: list[str], parts: Sequence[str]) -> list[str]:
    found = ([name for name in names if name.startswith(part)] for part in parts)
    return next(filter(None, found), [])


def _gathered(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """A sharded checkpoint whole, without what is not asked for: the optimizers' part alone is twice the student's."""
    from torch.distributed.checkpoint import FileSystemReader, load

    try:
        said, stored = _stored(folder)
        names = _first_part(list(stored), parts)
        empty = {PREFIX + n: torch.empty(stored[n].size, dtype=stored[n].properties.dtype) for n in names}
        load(empty, storage_reader=FileSystemReader(folder), no_dist=True)
    except Exception as error:
        raise _damaged(folder) from error
    return said | {"state_dict": {name: empty[PREFIX + name] for name in names}}


def read_outline(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """What a sharded checkpoint says of its run, and the shapes of its weights by name; none of them is read.

    Raises:
        ConfigError: a folder that is no checkpoint, or a damaged one.
    """
    try:
        said, stored = _stored(folder)
        return said.get("distill", {}), {name: about.size for name, about in stored.items()}
    except Exception as error:
        raise _damaged(folder) from error


def _stored(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What lies beside a sharded checkpoint's weights, and PyTorch's description of each of them."""
    from torch.distributed.checkpoint import FileSystemReader

    _Metadata.check(folder)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    said = torch.load(folder / SAID, map_location="cpu", weights_only=True)
    return said, {name.removeprefix(PREFIX): about for name, about in stored.items() if name.startswith(PREFIX)}


class _Metadata(pickle.Unpickler):
    """Reads what PyTorch keeps beside the shards, a pickle, and refuses one that names anything but its own classes: a
    checkpoint of somebody else's runs no code.
    """

    @classmethod
    def check(cls, folder: Path) -> None:
        with open(folder / ".metadata", "rb") as file:
            cls(file).load()

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.split(".")[0] in ("torch", "pathlib") else None
        own = module.startswith("torch.distributed.checkpoint.") and isinstance(found, type)
        plain = isinstance(found, torch.dtype) or found in (torch.Size, torch.serialization._get_layout)
        if not plain and not (own and found.__module__ == module) and not (module == "pathlib" and name in PATHS):
            raise pickle.UnpicklingError(f"{module}.{name} is none of PyTorch's metadata")
        return found


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint is a folder, as FSDP2 writes them.

    Raises:
        ConfigError: a folder that is no checkpoint.
    """
    if checkpoint.is_dir() and not (checkpoint / SAID).is_file():
        raise ConfigError(f"'{checkpoint}' is a folder and no checkpoint; give one, such as RUN/checkpoints/last.ckpt")
    return checkpoint.is_dir()


def open_checkpoint(path: Path) -> dict[str, Any]:
    """All that a checkpoint's file holds; its weights stay there until they are used.

    Raises:
        ConfigError: no such checkpoint, or one that cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint at '{path}'; `distill fit` writes them under its run's folder")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> ConfigError:
    return ConfigError(
        f"'{path}' is no checkpoint, or a damaged one; give one that `distill fit` wrote, such as last.ckpt"
    )
