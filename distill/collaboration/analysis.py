"""How a student differs from its teacher, image by image (Starodubcev et al. 2023, arXiv 2312.10835, section 3.1)."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from distill.collaboration.calibration import numbers
from distill.collaboration.calls import SIDES, fit, paint
from distill.collaboration.judges import Judge
from distill.collaboration.pipeline import AdaptivePipeline
from distill.collaboration.schedules import check_levels, whole
from distill.data.loading import batches
from distill.evaluation.distances import Distance
from distill.files import save_json, written_whole
from distill.progress import tracked
from distill.provenance import stamped

RANGES = {"low": (0.0, 0.2), "medium": (0.4, 0.6), "high": (0.8, 1.0)}  # of the distances, as in Figure 3c
VOTED = ("votes for the student", "votes for the teacher")
COLUMNS = ("distance", "student", "teacher", "vote", "words", "curvature", "complexity")


def analyse(
    pair: AdaptivePipeline,
    prompts: list[str],
    votes: Judge,
    distance: Distance,
    teacher_steps: int,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, list[float]]:
    """Paints every prompt with student and teacher from the same noise and measures both.

    Args:
        pair: student, teacher, and the judge whose scores decide.
        prompts: any.
        votes: another judge, in the place of the people who voted in the paper.
        distance: between two images, DreamSim in the paper.
        teacher_steps: of the teacher, 3 or more.
        seed: image i starts from the noise of seed + i.
        batch_size: images per call.

    The smaller of both images is brought to the larger's size for the distance and the votes. A score that is no number
    counts as the lowest.

    Raises:
        ConfigError: more teacher steps than the teacher's schedule can have.

    Returns:
        By column, a value per prompt: `distance`; the judge's scores `student` and `teacher`; `vote`, how much better
        the other judge finds the student's; `words`, the prompt's tokens; `curvature` of the teacher's path from its
        first step to the image (its length over the distance of its ends, less 1); `complexity` of the teacher's image
        (kilobytes as a JPEG of quality 90, in the place of the paper's network).
    """
    check_levels(pair.teacher.scheduler, teacher_steps)
    schedule = whole(pair.teacher, teacher_steps, pair.teacher_call)
    call = {**pair.teacher_call, "num_inference_steps": schedule}
    found: dict[str, list[Tensor]] = {name: [] for name in (*COLUMNS, *VOTED)}
    for part in tracked(batches(range(len(prompts)), batch_size), "analysing"):
        asked, path = [prompts[index] for index in part], _Path()
        one, _, _ = paint(pair.student, pair.student_call, asked, _seeded(pair, seed, part))
        other, _, _ = paint(pair.teacher, call, asked, _seeded(pair, seed, part), path)
        for name, images in (("student", one), ("teacher", other)):
            found[name].append(torch.tensor(pair.scored(asked, images), dtype=torch.float64))
        found["complexity"].append(torch.tensor([_jpeg(image) for image in other]))
        one, other = _of_one_size(one, other)
        found["distance"].append(distance(one, other).float().cpu())
        for name, images in zip(VOTED, (one, other), strict=True):
            found[name].append(votes(asked, images))
        found["words"].append(torch.tensor([len(pair.teacher.tokenizer(prompt).input_ids) - 2.0 for prompt in asked]))
        found["curvature"].append(path.curvature())
    return _rows({name: torch.cat(values) for name, values in found.items() if values}, pair.judge.spec, votes.spec)


def _rows(found: dict[str, Tensor], judge: str, votes: str) -> dict[str, list[float]]:
    """The columns, from the scores of both images."""
    count = len(found["distance"])
    student, teacher = numbers(torch.cat([found["student"], found["teacher"]]), judge).split(count)
    for_student, for_teacher = numbers(torch.cat([found[name] for name in VOTED]), votes).split(count)
    found |= {"student": student, "teacher": teacher, "vote": for_student - for_teacher}
    return {name: found[name].tolist() for name in COLUMNS}


def _of_one_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of images, the smaller made as large as the larger."""
    larger = max(one, other, key=lambda images: images.shape[-2] * images.shape[-1])
    size = dict(zip(SIDES, larger.shape[-2:], strict=True))
    return fit(one, size), fit(other, size)


def _seeded(pair: AdaptivePipeline, seed: int, part: list[int]) -> list[torch.Generator]:
    return [torch.Generator(pair.device).manual_seed(seed + index) for index in part]


class _Path:
    """The path of a batch's latents."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []

    def __call__(self, step: int, latents: Tensor) -> None:
        self.points.append(latents.detach().float().cpu().flatten(1))

    def curvature(self) -> Tensor:
        """Length over the distance of the ends, less 1: `[B]`."""
        pairs = zip(self.points[1:], self.points[:-1], strict=True)
        length = torch.stack([(here - there).norm(dim=1) for here, there in pairs]).sum(0)
        return length / (self.points[-1] - self.points[0]).norm(dim=1).clamp(min=1e-12) - 1


def findings(rows: dict[str, list[float]]) -> dict[str, Any]:
    """What the paper reads off its Figures 1 and 3 to 7.

    Args:
        rows: as `analyse` returns them.
    """
    found = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    wins, gap = found["vote"] > 0, (found["student"] - found["teacher"]).abs()
    rank = found["distance"].argsort().argsort() / max(len(wins) - 1, 1)
    return {
        "images": len(wins),
        "student_wins": float(wins.float().mean()),
        "student_wins_by_distance": {
            name: float(wins[(rank >= low) & (rank <= high)].float().mean()) for name, (low, high) in RANGES.items()
        },
        "correlations": {
            f"{one} ~ {other}": _correlation(one_values, other_values)
            for one, one_values, other, other_values in (
                ("quality gap", gap, "distance", found["distance"]),
                ("distance", found["distance"], "complexity", found["complexity"]),
                ("quality gap", gap, "complexity", found["complexity"]),
                ("distance", found["distance"], "words", found["words"]),
                ("quality gap", gap, "words", found["words"]),
                ("distance", found["distance"], "curvature", found["curvature"]),
                ("quality gap", gap, "curvature", found["curvature"]),
                ("curvature", found["curvature"], "complexity", found["complexity"]),
            )
        },
        "agreement": agreement(found),
    }


def agreement(found: dict[str, Tensor]) -> dict[str, Any]:
    """How often a decision agrees with the votes (Figure 7): by comparing scores of student and teacher, and by the
    student's score alone against its k-th percentile.
    """
    teacher_better = found["vote"] < 0
    full = (found["student"] < found["teacher"]) == teacher_better
    alone = {
        k: float(((found["student"] < torch.quantile(found["student"], k / 100)) == teacher_better).float().mean())
        for k in range(10, 100, 10)
    }
    best = max(alone.values())
    return {
        "full_reference": float(full.float().mean()),
        "percentile": alone,
        "best": max(alone, key=alone.__getitem__),
        "threshold": best,
        "lost": float(full.float().mean()) - best,
    }


def intervals(rows: dict[str, list[float]], draws: int = 200, seed: int = 0) -> dict[str, Any]:
    """95 % intervals of all findings, `low` and `high` in the place of each, by a bootstrap over images."""
    table = torch.tensor([rows[name] for name in COLUMNS], dtype=torch.float64)
    generator, count = torch.Generator().manual_seed(seed), table.shape[1]
    resampled = [table[:, torch.randint(count, (count,), generator=generator)].tolist() for _ in range(draws)]
    return _bounds([findings(dict(zip(COLUMNS, columns, strict=True))) for columns in resampled])


def _bounds(found: list[Any]) -> Any:
    if isinstance(found[0], dict):
        return {name: _bounds([one[name] for one in found]) for name in found[0]}
    values = torch.tensor([one for one in found if one is not None], dtype=torch.float64)
    if not len(values):
        return None
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"low": low, "high": high}


def save(rows: dict[str, list[float]], prompts: list[str], folder: str | Path, command: str, seed: int) -> Any:
    """Writes `images.csv`, `findings.json` (with intervals, command and machine) and `figures.png`.

    Returns:
        The findings.
    """
    folder, found = Path(folder), findings(rows)
    with written_whole(folder / "images.csv") as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*COLUMNS, "prompt"])
        table.writerows(zip(*(rows[name] for name in COLUMNS), prompts, strict=True))
    save_json(stamped(found | {"intervals": intervals(rows)}, [seed], command), folder / "findings.json")
    with written_whole(folder / "figures.png") as part:
        draw(rows, found).savefig(part, dpi=110, format="png")
    return found


def draw(rows: dict[str, list[float]], found: dict[str, Any]) -> Any:
    """The paper's Figures 3 to 7 as plots."""
    from matplotlib.figure import Figure

    gap = [one - other for one, other in zip(rows["student"], rows["teacher"], strict=True)]
    tokens, bent, size = "tokens of the prompt", "curvature of teacher's path", "complexity of teacher's image, kB"
    better = "score of student - teacher"
    scattered = [
        ("Figure 3b", "distance", rows["distance"], better, gap),
        ("Figure 4a", size, rows["complexity"], "distance", rows["distance"]),
        ("Figure 4b", size, rows["complexity"], better, gap),
        ("Figure 5a", tokens, rows["words"], "distance", rows["distance"]),
        ("section 3.1, length", tokens, rows["words"], better, gap),
        ("Figure 6a", bent, rows["curvature"], "distance", rows["distance"]),
        ("Figure 6b", bent, rows["curvature"], size, rows["complexity"]),
        ("section 3.1, curvature", bent, rows["curvature"], better, gap),
    ]
    figure = Figure(figsize=(18, 7), layout="constrained")
    *spread, won, agreeing = figure.subplots(2, 5).flatten()
    for axis, (title, x_name, x, y_name, y) in zip(spread, scattered, strict=True):
        axis.scatter(x, y, s=4, alpha=0.4)
        axis.set(title=title, xlabel=x_name, ylabel=y_name)
    wins = found["student_wins_by_distance"]
    won.bar(list(wins), list(wins.values()))
    won.set(title="Figure 3c", xlabel="distance to the teacher's image", ylabel="share of student wins")
    agreed = found["agreement"]
    agreeing.plot(list(agreed["percentile"]), list(agreed["percentile"].values()), marker="o", label="student alone")
    agreeing.axhline(agreed["full_reference"], linestyle="--", color="k", label="student and teacher")
    agreeing.set(title="Figure 7", xlabel="percentile", ylabel="agreement with the votes")
    agreeing.legend()
    return figure


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's; None where one of both is constant."""
    value = float(spearmanr(one.numpy(), other.numpy()).statistic)
    return value if value == value else None


def _jpeg(image: Tensor) -> float:
    from torchvision.transforms.functional import to_pil_image

    file = io.BytesIO()
    to_pil_image(image.clamp(0, 1)).save(file, "JPEG", quality=90)
    return len(file.getvalue()) / 1000
