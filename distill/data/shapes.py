"""Captioned images drawn by code: one or two coloured shapes on a plain ground, at any resolution and aspect ratio.

Everything about sample `index` of `seed` is a function of those two numbers alone, so any batch, order or number of
processes sees the same picture. A caption names a random subset of what is in the picture: the rest stays open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "purple")
SIZES = ("small", "large")
POSITIONS = ("in the centre", "at the top", "at the bottom", "on the left", "on the right")
BACKGROUNDS = ("white", "black", "gray", "tan")
LAYOUTS = ("single", "row", "column")
RELATIONS = {"left of": (1, False), "right of": (1, True), "above": (2, False), "below": (2, True)}  # (layout, swapped)

# One column each of an attribute table; columns of the first and the second object follow each other.
ATTRIBUTES = {
    "layout": len(LAYOUTS),
    "background": len(BACKGROUNDS),
    "position": len(POSITIONS),
    "shape_1": len(SHAPES),
    "colour_1": len(COLOURS),
    "size_1": len(SIZES),
    "shape_2": len(SHAPES),
    "colour_2": len(COLOURS),
    "size_2": len(SIZES),
}
LAYOUT, BACKGROUND, POSITION = 0, 1, 2
FIRST, SECOND = slice(3, 6), slice(6, 9)
UNNAMED = -1

_COLOUR_RGB = torch.tensor(
    [
        [0.90, 0.08, 0.10],
        [0.10, 0.62, 0.15],
        [0.12, 0.25, 0.95],
        [0.98, 0.90, 0.10],
        [0.10, 0.85, 0.90],
        [0.92, 0.15, 0.80],
        [1.00, 0.52, 0.05],
        [0.48, 0.12, 0.72],
    ]
)
_BACKGROUND_RGB = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.80, 0.70, 0.50]])
_POSITION_XY = torch.tensor([[0.0, 0.0], [0.0, -0.48], [0.0, 0.48], [-0.48, 0.0], [0.48, 0.0]])
_LAYOUT_XY = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[-0.5, 0.0], [0.5, 0.0]], [[0.0, -0.5], [0.0, 0.5]]])
_RADIUS = torch.tensor([0.29, 0.46])  # of half the shorter side: read apart after an 8x8 autoencoder
_NAMED_SHARE = {"shape": 0.85, "colour": 0.75, "size": 0.4, "position": 0.4, "background": 0.4, "second": 0.6}
_DRAWS = 32


@dataclass(frozen=True)
class Scenes:
    """What is in each picture.

    Attributes:
        attributes: `[B, 9]` int64, columns as in `ATTRIBUTES`; `UNNAMED` where a single object leaves a column empty.
        centre: `[B, 2, 2]` x, y of both objects; the picture spans [-1, 1] on both axes.
        radius: `[B, 2]` of both objects, in halves of the shorter side.
        tint: `[B, 3]` brightness offsets of ground, first and second object.
    """

    attributes: Tensor
    centre: Tensor
    radius: Tensor
    tint: Tensor


def scenes(seed: int, indices: Sequence[int]) -> Scenes:
    """The scenes of samples `indices` under `seed`."""
    u = _uniforms(seed, indices)
    layout = torch.bucketize(u[:, 0].contiguous(), torch.tensor([0.5, 0.75]))
    columns = [layout, *(_pick(u[:, 1 + i], size) for i, size in enumerate(list(ATTRIBUTES.values())[1:]))]
    attributes = torch.stack(columns, dim=1)
    single = layout == 0
    position = attributes[:, POSITION].clone()
    attributes[~single, POSITION] = UNNAMED
    attributes[single, SECOND] = UNNAMED
    at = _POSITION_XY[position][:, None].expand(-1, 2, -1)
    centre = torch.where(single[:, None, None], at, _LAYOUT_XY[layout])
    centre = centre + 0.12 * (u[:, 9:13].view(-1, 2, 2) - 0.5)
    sizes = attributes[:, [5, 8]].clamp(min=0)
    radius = _RADIUS[sizes] * (0.92 + 0.16 * u[:, 13:15])
    return Scenes(attributes, centre, radius, 0.10 * (u[:, 15:18] - 0.5))


def render(scene: Scenes, height: int, width: int) -> Tensor:
    """The pictures of `scene`, anti-aliased: `[B, 3, height, width]` in [-1, 1]."""
    half = min(height, width) / 2
    x = (torch.arange(width) + 0.5) / half - width / (2 * half)
    y = (torch.arange(height) + 0.5) / half - height / (2 * half)
    extent = torch.tensor([width, height]) / (2 * half)
    ground = _BACKGROUND_RGB[scene.attributes[:, BACKGROUND]] + scene.tint[:, :1]
    image = ground[:, :, None, None].expand(-1, 3, height, width)
    for slot, columns in enumerate((FIRST, SECOND)):
        shape, colour, _ = scene.attributes[:, columns].unbind(1)
        centre = scene.centre[:, slot] * extent
        radius = scene.radius[:, slot, None, None]
        px = (x[None, None, :] - centre[:, 0, None, None]) / radius
        py = (y[None, :, None] - centre[:, 1, None, None]) / radius
        distance = _signed_distance(shape.clamp(min=0), px, py) * radius * half
        cover = ((0.5 - distance).clamp(0, 1) * (shape != UNNAMED)[:, None, None])[:, None]
        paint = _COLOUR_RGB[colour.clamp(min=0)] + scene.tint[:, 1 + slot, None]
        image = image + cover * (paint[:, :, None, None] - image)
    return image.clamp(0, 1) * 2 - 1


def captions(seed: int, indices: Sequence[int], scene: Scenes | None = None) -> list[str]:
    """One caption per sample, naming a random subset of its attributes."""
    attributes = (scene or scenes(seed, indices)).attributes.tolist()
    return [_describe(row, u) for row, u in zip(attributes, _uniforms(seed, indices)[:, 18:].tolist(), strict=True)]


@dataclass(frozen=True)
class Named:
    """What captions ask for.

    Attributes:
        attributes: `[B, 9]` int64, `UNNAMED` where the caption leaves a column open.
        ordered: `[B]` bool, whether the objects' places are fixed; if not, the first object may be either one.
    """

    attributes: Tensor
    ordered: Tensor


def parse(prompts: Sequence[str]) -> Named:
    """Read captions of this module's grammar back.

    Raises:
        ValueError: a prompt that is not of this grammar.
    """
    rows, ordered = zip(*(_parse(prompt) for prompt in prompts), strict=True)
    return Named(torch.tensor(rows), torch.tensor(ordered))


def _uniforms(seed: int, indices: Sequence[int]) -> Tensor:
    """`[B, _DRAWS]` in [0, 1): a counter-based generator (SplitMix64), so each row depends on (seed, index) alone."""
    with np.errstate(over="ignore"):
        counter = np.asarray(indices, np.uint64)[:, None] * np.uint64(_DRAWS) + np.arange(_DRAWS, dtype=np.uint64)
        z = _mix(counter + _mix(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)))
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))


def _mix(z: Any) -> Any:
    with np.errstate(over="ignore"):
        z = np.asarray(z, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _pick(u: Tensor, count: int) -> Tensor:
    return (u * count).long().clamp(max=count - 1)


def _signed_distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of each sample's unit shape, negative inside; `[B, H, W]`."""
    ax, ay = x.abs(), y.abs()
    norm = (x.square() + y.square()).sqrt()
    bars = torch.minimum(torch.maximum(ax - 0.34, ay - 1), torch.maximum(ay - 0.34, ax - 1))
    outlines = (
        norm - 1,
        torch.maximum(ax, ay) - 0.86,
        torch.maximum(y - 0.8, (1.8 * ax - 0.95 * (y + 1)) / 2.035),
        (norm - 0.72).abs() - 0.28,
        bars,
        (ax + ay - 1.1) / 2**0.5,
    )
    return torch.stack(outlines, dim=1)[torch.arange(len(shape)), shape]


def _describe(row: list[int], u: list[float]) -> str:
    shares = _NAMED_SHARE
    first = _phrase(row[FIRST], u[0:3])
    if row[LAYOUT] == 0:
        place = f" {POSITIONS[row[POSITION]]}" if u[6] < shares["position"] else ""
    elif u[6] < shares["second"]:
        relation = [name for name, (layout, _) in RELATIONS.items() if layout == row[LAYOUT]][u[7] < 0.5]
        objects = first, _phrase(row[SECOND], u[3:6])
        first, second = reversed(objects) if RELATIONS[relation][1] else objects
        place = f" {relation} {second}"
    else:
        first, place = (first if u[7] < 0.5 else _phrase(row[SECOND], u[3:6])), ""
    ground = f" on a {BACKGROUNDS[row[BACKGROUND]]} background" if u[8] < shares["background"] else ""
    return first + place + ground


def _phrase(columns: list[int], u: list[float]) -> str:
    shape, colour, size = columns
    words = ["a"]
    if u[0] < _NAMED_SHARE["size"]:
        words.append(SIZES[size])
    if u[1] < _NAMED_SHARE["colour"]:
        words.append(COLOURS[colour])
    words.append(SHAPES[shape] if u[2] < _NAMED_SHARE["shape"] else "shape")
    return " ".join(words)


def _parse(prompt: str) -> tuple[list[int], bool]:
    row, rest = [UNNAMED] * len(ATTRIBUTES), prompt.strip().lower()
    for index, background in enumerate(BACKGROUNDS):
        if rest.endswith(f" on a {background} background"):
            row[BACKGROUND], rest = index, rest.removesuffix(f" on a {background} background")
    for index, position in enumerate(POSITIONS):
        if rest.endswith(" " + position):
            row[LAYOUT], row[POSITION], rest = 0, index, rest.removesuffix(" " + position)
    for relation, (layout, swapped) in RELATIONS.items():
        left, found, right = rest.partition(f" {relation} ")
        if found:
            row[LAYOUT] = layout
            row[FIRST], row[SECOND] = (_read(right), _read(left)) if swapped else (_read(left), _read(right))
            return row, True
    row[FIRST] = _read(rest)
    return row, row[LAYOUT] == 0


def _read(phrase: str) -> list[int]:
    columns = [UNNAMED] * 3
    for word in phrase.removeprefix("a ").split():
        for column, names in enumerate((SHAPES, COLOURS, SIZES)):
            if word in names:
                columns[column] = names.index(word)
                break
        else:
            if word != "shape":
                raise ValueError(
                    f"'{word}' in '{phrase}' is no word of the shapes captions; write for example 'a small red ring "
                    "left of a blue square on a gray background'"
                )
    return columns
