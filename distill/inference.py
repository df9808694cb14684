"""Images from pipelines: the one place that says how a teacher or a student of ours is called."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill import backbones
from distill.data.loading import batches
from distill.diffusion.sampling import own_noise
from distill.errors import ConfigError
from distill.identity import contents, digest
from distill.progress import tracked
from distill.provenance import versions

T = TypeVar("T")
SOFTWARE = ("Software", "distill")  # what the PNG files written here say of themselves
MADE = "Made from"  # and the name of the digest there


@dataclass
class Painter:
    """A diffusers pipeline and the arguments it is called with.

    Attributes:
        pipeline: any text-to-image pipeline.
        call: arguments of every call besides prompts and seeds.
        encode: prompts to the pipeline's embedding arguments, where its own text encoders are not to be used.
        teacher: the pipeline that a checkpoint's student was made from.
        sources: where its weights are: a folder or hub id, before it a checkpoint.
    """

    pipeline: Any
    call: dict[str, Any]
    encode: Callable[[list[str]], dict[str, Any]] | None = None
    teacher: str | None = None
    sources: tuple[str, ...] = ()

    def __call__(self, prompts: list[str], seed: int = 0, batch_size: int = 64) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1], float32 on the CPU.

        All noise of image i, the first and what a sampler draws between its steps, is that of the seed `seed + i`, so
        an image does not depend on its batch.
        """
        return torch.cat([images for _, images in self.stream(prompts, seed, batch_size)])

    def stream(self, prompts: list[str], seed: int = 0, batch_size: int = 64) -> Iterator[tuple[list[int], Tensor]]:
        """The same, batch by batch, with the indices of the prompts."""
        device = self.pipeline.device
        for part in batches(range(len(prompts)), batch_size):
            generators = [torch.Generator(device).manual_seed(seed + index) for index in part]
            with own_noise(getattr(self.pipeline, "scheduler", None), generators), torch.no_grad():
                asked = [prompts[index] for index in part]
                text = self.encode(asked) if self.encode else {"prompt": asked}
                answer = self._called(**text, generator=generators)
            yield part, answer.images.float().cpu()

    def finite(self, prompts: list[str], seed: int = 0, batch_size: int = 64) -> Iterator[tuple[list[int], Tensor]]:
        """As `stream`, for what is kept or measured, where a picture of nothing would pass for a black one.

        Raises:
            FloatingPointError: a pixel is no finite number.
        """
        for part, images in self.stream(prompts, seed, batch_size):
            if not images.isfinite().all():
                raise FloatingPointError(
                    "the pipeline paints pictures that are no finite numbers; its weights have diverged, its dtype has "
                    "not the range, or it is called with numbers that are none"
                )
            yield part, images

    def digests(self, prompts: list[str], seed: int = 0) -> list[str]:
        """What tells each of these images from any other: the weights, the call, the prompt and the noise."""
        device, scheduler = self.pipeline.device.type, dict(getattr(self.pipeline.scheduler, "config", {}))
        weights = [[source, contents(Path(source))] for source in self.sources]
        about = digest([weights, self.call, scheduler, str(self.pipeline.dtype), device, versions()])
        return [digest([about, prompt, seed + index]) for index, prompt in enumerate(prompts)]

    def _called(self, **given: Any) -> Any:
        try:
            return self.pipeline(**given, output_type="pt", **self.call)
        except ValueError as error:  # how diffusers refuses sizes, numbers of steps, ...
            raise ConfigError(f"{type(self.pipeline).__name__} cannot be called so: {error}") from error

    def seconds_per_image(self, prompts: list[str]) -> float:
        """Time of one call with all prompts, decoding included, over their number; after one call to warm up."""
        self(prompts[:1], batch_size=1)
        start = time.perf_counter()
        self(prompts, batch_size=len(prompts))
        return (time.perf_counter() - start) / len(prompts)


def open_painter(
    name: str,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Painter:
    """A pipeline ready to be called: a teacher with its own sampler, an exported student at its trained levels.

    Args:
        name: shipped pipeline, folder or hub id.
        steps, guidance: of the sampler; what the pipeline's folder says if not given.
        solver: a diffusers scheduler in place of the pipeline's own.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the weights.

    Raises:
        ConfigError: no such pipeline, or a number of steps its student was not trained for.
    """
    backbone = backbones.load(name, dtype)
    pipeline = backbone.pipeline(**backbone.unchecked).to(pick_device(device))
    painter = _painter(backbone.path, pipeline, dict(backbone.call), backbone.calls, steps, guidance, solver)
    return replace(painter, sources=(backbone.near,))


def open_student_painter(
    checkpoint: str,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Painter:
    """A checkpoint's student, as it would be exported.

    Args:
        checkpoint: of `distill fit`.
        steps: of the sampler; 1 if not given, for a few-step student.
        guidance, solver: as in `open_painter`, of a network that is no few-step student: that has its own.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the weights.

    Raises:
        ConfigError: no such checkpoint, or a number of steps, guidance or solver its student was not trained for.
    """
    from distill.export import load_student

    student = load_student(checkpoint)
    backbone = student.backbone
    pipeline = student.pipeline(**backbone.unchecked).to(pick_device(device), dtype)
    call, calls = (student.calls["1"], student.calls) if student.calls else (dict(backbone.call), backbone.calls)
    painter = _painter(checkpoint, pipeline, call, calls, steps, guidance, solver)
    return replace(painter, teacher=student.facts["teacher"], sources=(checkpoint, backbone.near))


def open_either(pipeline: str | None, checkpoint: str | None, *how: Any) -> Painter:
    """What a command is to ask, by `open_painter` or `open_student_painter`, which say what else is given.

    Raises:
        ConfigError: both are named, or neither; or as these two.
    """
    if pipeline is not None and checkpoint is None:
        return open_painter(pipeline, *how)
    if checkpoint is not None and pipeline is None:
        return open_student_painter(checkpoint, *how)
    raise ConfigError("give either --pipeline or --checkpoint")


def _painter(
    name: str,
    pipeline: Any,
    call: dict[str, Any],
    calls: dict[str, dict[str, Any]],
    steps: int | None,
    guidance: float | None,
    solver: str | None,
) -> Painter:
    """What `call` says, changed as asked; of a few-step student, whose `calls` say how each number of steps is made,
    only the steps can be."""
    if guidance is not None and not math.isfinite(guidance):
        raise ConfigError(f"a guidance of {guidance} is no scale; give a finite number, of which 1 is none")
    if calls and (guidance, solver) != (None, None):
        raise ConfigError(f"the student '{name}' has its own guidance and solver; leave both out")
    if calls and steps is not None and str(steps) not in calls:
        raise ConfigError(f"'{name}' samples in {', '.join(calls)} steps, not in {steps}")
    if solver:
        pipeline.scheduler = backbones.solver(solver, pipeline.scheduler)
    if steps is not None:
        call = {**call, **calls.get(str(steps), {"num_inference_steps": steps})}
    if guidance is not None:
        call = {**call, "guidance_scale": guidance}
    pipeline.set_progress_bar_config(disable=True)
    return Painter(pipeline, call)


def pick_device(device: str) -> torch.device:
    """`auto` is the accelerator if there is one.

    Raises:
        ConfigError: no such device, or none of it here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"there is no device '{device}' ({reason}); choose auto, cpu, cuda or cuda:1") from error


def grid(images: Tensor, columns: int, scale: int = 1, rows: Sequence[str] = ()) -> Tensor:
    """Images `[N, 3, H, W]` as one picture, `columns` in a row, each pixel enlarged `scale` times; `rows` names each
    row, at its left."""
    from torchvision.utils import make_grid

    assert not rows or len(rows) == -(-len(images) // columns), "a name for each row"
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    picture = make_grid(enlarged, nrow=columns, padding=2 * scale, pad_value=1.0)
    return torch.cat([_names(rows, picture.shape[1]), picture], dim=2) if rows else picture


def _names(rows: Sequence[str], height: int) -> Tensor:
    """A white strip `[3, height, width]` with a name in the middle of each row, as wide as the longest needs."""
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import to_tensor

    font = ImageFont.load_default(min(48, max(8, height // len(rows) // 6)))
    strip = Image.new("RGB", (8 + max(int(font.getlength(name)) for name in rows), height), "white")
    for index, name in enumerate(rows):
        middle = (strip.width - 4, height * (2 * index + 1) / (2 * len(rows)))
        ImageDraw.Draw(strip).text(middle, name, fill="black", font=font, anchor="rm")
    return to_tensor(strip)


def paint(
    painter: Painter, prompts: list[str], folder: str | Path, seed: int = 0, batch_size: int = 64, shown: int = 0
) -> tuple[list[Tensor], int]:
    """Paints N prompts into a folder, as `save_samples` writes them, under a bar with the time that is left.

    Pictures that the same call left there when it was ended are not painted again: a killed one is continued.

    Returns:
        The first `shown` pictures, and how many were there.
    """
    made = painter.digests(prompts, seed)
    kept = painted(folder, made)
    if kept < len(prompts):
        kept -= kept % batch_size  # so that the batches are those of one call, and the pictures to the last bit
    stream = painter.finite(prompts[kept:], seed + kept, batch_size)
    coming = tracked(stream, "painting", -(-(len(prompts) - kept) // batch_size))
    return save_samples((image for _, images in coming for image in images), prompts, folder, shown, made, kept), kept


def save_samples(
    images: Iterable[Tensor],
    prompts: list[str],
    folder: str | Path,
    shown: int = 0,
    made: Sequence[str] | None = None,
    kept: int = 0,
) -> list[Tensor]:
    """Writes N prompts as prompts.txt, and each picture, as it comes, as 00000.png and so on.

    Of another call into the same folder nothing is left: its pictures are those that say they are this package's.

    Args:
        images: the pictures from number `kept` on, `[3, H, W]` in [0, 1]; none but the first `shown` is held.
        prompts: N.
        folder: where they are written.
        shown: how many to return.
        made: N digests of what the pictures come from, for them to keep; see `painted`.
        kept: how many pictures are left in the folder as they are.
    """
    coming = begun(images)
    remove_samples(folder, kept)
    save_prompts(prompts, folder)
    first = [read_png(numbered(folder, index)) for index in range(min(kept, shown))]
    for index, image in enumerate(coming, kept):
        save_png(image, numbered(folder, index), prompts[index], made[index] if made else None)
        if index < shown:
            first.append(image)
    return first


def painted(folder: str | Path, made: Sequence[str]) -> int:
    """How many pictures, from the first one on, a folder has that say they come from the same as those of `made`."""
    here = (_about(numbered(folder, index)).get(MADE) == one for index, one in enumerate(made))
    return sum(takewhile(bool, here))


def begun(items: Iterable[T]) -> Iterator[T]:
    """The items, of which the first is made already: what cannot be made fails before anything is done with it."""
    coming = iter(items)
    return chain(list(islice(coming, 1)), coming)


def check_samples(folder: str | Path, count: int) -> None:
    """Refuses a folder where `count` pictures and their grid would take the place of pictures of others.

    Raises:
        ConfigError: one of them is there, and this package has not written it.
    """
    for path in (*(numbered(folder, index) for index in range(count)), Path(folder) / "grid.png"):
        if path.is_file() and not _painted_here(path):
            raise ConfigError(f"'{path}' was not written by distill and would be lost; give another --output")


def remove_samples(folder: str | Path, kept: int = 0) -> None:
    """Removes an earlier call's pictures from number `kept` on, and its grid, from a folder; others' stay."""
    later = (path for path in Path(folder).glob("[0-9]" * 5 + ".png") if int(path.stem) >= kept)
    for path in (*later, Path(folder) / "grid.png"):
        if path.is_file() and _painted_here(path):
            path.unlink()


def save_prompts(prompts: list[str], folder: str | Path) -> None:
    """Writes prompts.txt, a line for each."""
    from distill.files import written_whole

    with written_whole(Path(folder) / "prompts.txt") as part:
        part.write_text("".join(" ".join(prompt.split()) + "\n" for prompt in prompts))


def save_png(image: Tensor, path: Any, prompt: str | None = None, made: str | None = None) -> None:
    """Writes a picture `[3, H, W]` in [0, 1]; its prompt, and the digest of what it comes from, go into the file."""
    from PIL.PngImagePlugin import PngInfo
    from torchvision.transforms.functional import to_pil_image

    from distill.files import written_whole

    about = PngInfo()
    for name, value in (SOFTWARE, ("Description", prompt), (MADE, made)):
        if value is not None:
            about.add_text(name, value)
    with written_whole(path) as part:
        to_pil_image((255 * image + 0.5).clamp(0, 255).byte()).save(part, format="png", pnginfo=about)


def read_png(path: Path) -> Tensor:
    """A picture `[3, H, W]` in [0, 1]."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    with Image.open(path) as picture:
        return to_tensor(picture.convert("RGB"))


def numbered(folder: str | Path, index: int) -> Path:
    """Where a folder of samples has picture number `index`."""
    return Path(folder) / f"{index:05d}.png"


def _painted_here(path: Path) -> bool:
    """Whether `save_png` wrote a file."""
    name, value = SOFTWARE
    return _about(path).get(name) == value


def _about(path: Path) -> Mapping[Any, Any]:
    """What a picture says of itself; nothing where there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.info
    except (FileNotFoundError, UnidentifiedImageError):
        return {}
