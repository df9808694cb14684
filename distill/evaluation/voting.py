"""Tables of pairwise votes: written and read as CSV, cast by a judge, counted; see `distill.evaluation.preference`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.loading import batches
from distill.errors import ConfigError
from distill.evaluation.preference import Vote, elo, win_rate
from distill.files import written_whole
from distill.inference import numbered, read_png
from distill.progress import tracked

COLUMNS = ("first", "second", "outcome", "prompt", "voter")
NAMED = ", ".join(COLUMNS)
OUTCOMES = (0.0, 0.5, 1.0)
PEOPLE = "people"
JUDGE = "judge:"  # how the voter of a judge's vote begins, and of nobody else's
Scores = Callable[[list[str], Tensor], Tensor]


def read_votes(path: str | Path) -> list[Vote]:
    """The votes of a table, in its order.

    Args:
        path: a CSV file whose first line names its columns, in any order: `first` and `second`, the names of what is
            compared; `outcome`, 1 if the first was preferred, 0 if the second, 0.5 for a tie; `prompt`; `voter`, a
            name or nothing for people, `judge:SPEC` for a judge. Other columns are not looked at.

    Raises:
        ConfigError: no such file, no table, a column that is missing, or a line that is no vote; or none at all.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no table of votes at '{path}'; it is a CSV file with the columns {NAMED}")
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin UTF-8 with a mark
            rows = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise ConfigError(f"'{path}' has no column {', '.join(missing)}; votes have the columns {NAMED}")
            votes = [_vote(row, f"line {rows.line_num} of '{path}'") for row in rows]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is no CSV file in UTF-8 ({error})") from error
    if not votes:
        raise ConfigError(f"'{path}' holds no votes, only the names of its columns")
    return votes


def _vote(row: dict[str, Any], where: str) -> Vote:
    first, second, outcome, prompt, voter = (row[name] for name in COLUMNS)
    if None in (first, second, outcome, prompt, voter):
        raise ConfigError(f"{where} ends before its last column; a vote has {NAMED}")
    try:
        value = float(outcome)
    except ValueError:
        value = float("nan")
    if value not in OUTCOMES:
        raise ConfigError(
            f"the outcome in {where} is '{outcome}'; 1 means that the first was preferred, 0 the second, 0.5 a tie"
        )
    if not first or not second or first == second:
        raise ConfigError(f"{where} compares '{first}' with '{second}'; a vote is between two names")
    return Vote(first, second, value, prompt, voter)


def save_votes(votes: Sequence[Vote], path: str | Path) -> None:
    """Writes a table that `read_votes` reads, whole."""
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows((v.first, v.second, f"{v.outcome:g}", v.prompt, v.voter) for v in votes)


def electorate(vote: Vote) -> str:
    """Whose vote it is: `judge:SPEC`, or `people`, whatever their names."""
    return vote.voter if vote.voter.startswith(JUDGE) else PEOPLE


def check_own(path: str | Path, spec: str) -> None:
    """Refuses a table of anybody else's votes where a judge's are to be written; one that is not there is fine.

    Raises:
        ConfigError: it is one, or no table of votes.
    """
    if Path(path).is_file():
        others = sorted({electorate(vote) for vote in read_votes(path)} - {JUDGE + spec})
        if others:
            raise ConfigError(
                f"'{path}' holds votes of {', '.join(others)}, which would be lost; write to another file"
            )


def common_prompts(folders: Mapping[str, str | Path]) -> list[str]:
    """The prompts that all folders' images have in common.

    Args:
        folders: by name, as `distill sample` writes them: 00000.png, ..., and prompts.txt.

    Raises:
        ConfigError: less than two names, a folder without prompts or with an image missing, or prompts that differ.
    """
    if len(folders) < 2 or not all(folders):
        names = ", ".join(f"'{name}'" for name in folders) or "none"
        raise ConfigError(f"votes are between two names or more, each with a folder of images; got {names}")
    found = {name: _prompts(Path(folder)) for name, folder in folders.items()}
    (one, prompts), *rest = found.items()
    for other, theirs in rest:
        if prompts != theirs:
            equal = [mine == its for mine, its in zip(prompts, theirs, strict=False)]
            number = equal.index(False) if False in equal else len(equal)
            raise ConfigError(
                f"'{one}' has {len(prompts)} prompts and '{other}' {len(theirs)}, which differ from {number:05d}.png "
                "on; give distill sample the same --prompts for both"
            )
    return prompts


def _prompts(folder: Path) -> list[str]:
    listing = folder / "prompts.txt"
    prompts = listing.read_text().splitlines() if listing.is_file() else []
    if not prompts:
        raise ConfigError(f"'{folder}' has no prompts.txt with prompts; give folders that distill sample wrote")
    missing = [index for index in range(len(prompts)) if not numbered(folder, index).is_file()]
    if missing:
        raise ConfigError(
            f"of the {len(prompts)} images that '{listing}' names {len(missing)} are missing, the first is "
            f"{numbered(folder, missing[0]).name}; paint them again with distill sample"
        )
    return prompts


def cast_votes(folders: Mapping[str, str | Path], judge: Scores, spec: str, batch_size: int = 64) -> list[Vote]:
    """A judge's vote on each prompt between each two names: for the higher score, a tie where both are equal.

    Args:
        folders: as in `common_prompts`.
        judge: `(prompts, images [B, 3, H, W] in [0, 1]) -> [B]`, higher is better.
        spec: what the judge is called; the voter is `judge:` and this.
        batch_size: images per call.

    Raises:
        ConfigError: as `common_prompts`; images of one folder that differ in size, or a score that is no number.
    """
    prompts = common_prompts(folders)
    scores = {name: _scores(folder, prompts, judge, spec, batch_size) for name, folder in folders.items()}
    return [
        Vote(first, second, (1 + (one > other) - (one < other)) / 2, prompt, JUDGE + spec)
        for first, second in combinations(folders, 2)
        for prompt, one, other in zip(prompts, scores[first], scores[second], strict=True)
    ]


def _scores(folder: str | Path, prompts: list[str], judge: Scores, spec: str, batch_size: int) -> list[float]:
    found: list[float] = []
    for part in tracked(batches(range(len(prompts)), batch_size), f"judging {folder}"):
        pictures = [read_png(numbered(folder, index)) for index in part]
        if len({picture.shape for picture in pictures}) > 1:
            raise ConfigError(f"the images in '{folder}' differ in size; paint them again with distill sample")
        found += judge([prompts[index] for index in part], torch.stack(pictures)).double().tolist()
    for index, score in enumerate(found):
        if score != score:
            raise ConfigError(f"the judge '{spec}' has no score for '{numbered(folder, index)}'; its answer is nan")
    return found


def tally(votes: Sequence[Vote]) -> dict[str, Any]:
    """Win rates and ELO of the votes of people and of each judge, which are never counted together.

    Returns:
        By `people` or `judge:SPEC`: `votes`, their number; `win_rates`, of each pair that was compared how often the
        first was preferred, `low` and `high` being Wilson's 95 %; `elo`, by name the mean over orders of the votes,
        `low` and `high` being the central 95 % of these orders.

    Raises:
        ConfigError: no votes.
    """
    if not votes:
        raise ConfigError("there are no votes to count")
    groups: dict[str, list[Vote]] = {}
    for vote in votes:
        groups.setdefault(electorate(vote), []).append(vote)
    return {who: {"votes": len(cast), "win_rates": _win_rates(cast), "elo": _elo(cast)} for who, cast in groups.items()}


def _win_rates(votes: list[Vote]) -> list[dict[str, Any]]:
    pairs: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        pair, turned = (vote.first, vote.second), (vote.second, vote.first)
        pairs.setdefault(turned if turned in pairs else pair, []).append(vote)
    rates = []
    for (first, second), cast in pairs.items():
        rate, low, high = win_rate(cast, first, second)
        rates.append({"first": first, "second": second, "votes": len(cast), "rate": rate, "low": low, "high": high})
    return rates


def _elo(votes: list[Vote]) -> dict[str, dict[str, float]]:
    best = sorted(elo(votes).items(), key=lambda item: -item[1][0])
    return {name: {"rating": rating, "low": low, "high": high} for name, (rating, low, high) in best}
