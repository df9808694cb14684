"""Orderings that somebody claims, and whether measured values bear them out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from distill.errors import ConfigError
from distill.files import read_json

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # two-sided 95 %, by degrees of freedom


@dataclass(frozen=True)
class Claim:
    """One ordering.

    Attributes:
        claim: in words.
        source: where it is claimed.
        order: names between `<`, `>` and `~` (alike), such as `LADD@1 > consistency@1`: an entry and its steps. A
            number stands for itself.
        metric: of the entries.
        values: names in `order` that are read from a result file: `{file: ..., value: path/of/keys}`. With `{seed}` in
            the path it is one value for each of the file's seeds. Of a single value `low` and `high` are the paths of
            its bounds.
        within: largest difference of what is alike.
        note: what was found out about it.

    Raises:
        ConfigError: an order that names nothing, mixes directions, or has no bound for what is alike.
    """

    claim: str
    source: str
    order: str
    metric: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    within: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.names) < 2 or not all(self.names):
            raise ConfigError(f"the claim '{self.claim}' needs an order such as 'a@1 < b@1'; got '{self.order}'")
        if {"<", ">"} <= set(self.signs):
            raise ConfigError(f"the claim '{self.claim}' goes up and down: '{self.order}'; use one of < and >")
        if "~" in self.signs and self.within is None:
            raise ConfigError(f"the claim '{self.claim}' says ~ (alike); give within, the largest difference")
        entries = [name for name in self.names if name not in self.values and _number(name) is None]
        if self.metric is None and entries:
            raise ConfigError(f"the claim '{self.claim}' names entries; give the metric they are compared by")

    @property
    def names(self) -> list[str]:
        """What is ordered, from left to right."""
        return [name.strip() for name in re.split(r" [<>~] ", self.order)]

    @property
    def signs(self) -> list[str]:
        """What stands between the names."""
        return re.findall(r" ([<>~]) ", self.order)


@dataclass(frozen=True)
class Estimate:
    """A measured value.

    Attributes:
        runs: one value for each seed.
        own: half-width of the 95 % interval of a single run, such as a bootstrap's; None where there is none.
    """

    runs: list[float]
    own: float | None = None

    @property
    def value(self) -> float:
        """The mean."""
        return mean(self.runs)

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval over seeds (Student's t); of one seed its own; None where nothing says how sure."""
        count = len(self.runs)
        return _student_t(count) * stdev(self.runs) / count**0.5 if count > 1 else self.own

    def above(self, other: Estimate) -> tuple[float, float | None]:
        """How much larger it is, and the half-width of that.

        Seeds are paired where both have as many: they share data, prompts and noise. Otherwise half-widths add as the
        root of their squares.
        """
        if len(self.runs) == len(other.runs) > 1:
            apart = Estimate([a - b for a, b in zip(self.runs, other.runs, strict=True)])
            return apart.value, apart.half_width
        unsure = [self.half_width, other.half_width]
        known = [one for one in unsure if one is not None]
        return self.value - other.value, sum(one**2 for one in known) ** 0.5 if len(known) == 2 else None


def judge(claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim with the measured values, their intervals, and the verdict.

    Neighbours in the order are compared two by two. The order holds if every difference is surely as claimed, does not
    if one surely is not, and is undecided otherwise, as where a value has no interval or was not measured.
    """
    found = {name: _estimate(name, claim, rows) for name in claim.names}
    verdicts = [
        _pair(found[a], sign, found[b], claim.within)
        for (a, b), sign in zip(pairwise(claim.names), claim.signs, strict=True)
    ]
    verdict = FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    values = {
        name: None if one is None else {"value": one.value, "half_width": one.half_width, "runs": one.runs}
        for name, one in found.items()
    }
    return {"claim": claim.claim, "source": claim.source, "metric": claim.metric, "order": claim.order,
            "within": claim.within, "values": values, "verdict": verdict, "note": claim.note}  # fmt: skip


def markdown(judged: list[dict[str, Any]]) -> str:
    """A table of claims."""
    lines = ["| claim | source | measured | verdict |", "|---|---|---|---|"]
    for one in judged:
        signs = [*re.findall(r" ([<>~]) ", one["order"]), ""]
        values = (name if _number(name) is not None else f"{name} {_shown(value)}"
                  for name, value in one["values"].items())  # fmt: skip
        measured = " ".join(f"{value} {sign}".strip() for value, sign in zip(values, signs, strict=True))
        metric = f"{one['metric']}: " if one["metric"] else ""
        measured += f" (alike within {one['within']:g})" if one["within"] is not None else ""
        note = f"; {one['note']}" if one["note"] else ""
        lines.append(f"| {one['claim']} | {one['source']} | {metric}{measured} | **{one['verdict']}**{note} |")
    return "\n".join(lines) + "\n"


def _shown(value: dict[str, Any] | None) -> str:
    if value is None:
        return "(not measured)"
    half = "" if value["half_width"] is None else f" ± {value['half_width']:.2g}"
    return f"{value['value']:.4g}{half}"


def _pair(first: Estimate | None, sign: str, second: Estimate | None, within: float | None) -> str:
    if first is None or second is None:
        return UNDECIDED
    difference, unsure = second.above(first)
    if unsure is None:
        return UNDECIDED
    if sign == "~":
        assert within is not None
        if abs(difference) + unsure <= within:
            return HOLDS
        return FAILS if abs(difference) - unsure > within else UNDECIDED
    difference = difference if sign == "<" else -difference
    return HOLDS if difference > unsure else FAILS if difference < -unsure else UNDECIDED


def _estimate(name: str, claim: Claim, rows: list[dict[str, Any]]) -> Estimate | None:
    if name in claim.values:
        return _from_file(claim.values[name], claim)
    if (number := _number(name)) is not None:
        return Estimate([number], 0.0)
    entry, _, steps = name.rpartition("@")
    some = [row for row in rows if row["name"] == entry.strip() and str(row["steps"]) == steps.strip()]
    if not some:
        return None
    metric = str(claim.metric)
    if metric not in some[0]:
        raise ConfigError(f"the claim '{claim.claim}' asks for '{metric}'; rows have {', '.join(_numbers(some[0]))}")
    if len(some) == 1 and f"{metric}_interval" in some[0]:
        low, high = some[0][f"{metric}_interval"]
        return Estimate([some[0][metric]], (high - low) / 2)
    return Estimate([row[metric] for row in some])


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def _numbers(row: dict[str, Any]) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, float)]


def _student_t(count: int) -> float:
    return STUDENT_T[min(count - 1, len(STUDENT_T)) - 1]


def _from_file(where: dict[str, Any], claim: Claim) -> Estimate | None:
    """What a result file says; None if the file is not there."""
    if not Path(where["file"]).is_file():
        return None
    kept = read_json(where["file"])

    def look(path: str) -> float:
        value = kept
        for key in path.split("/"):
            if not isinstance(value, dict) or key not in value:
                raise ConfigError(f"the claim '{claim.claim}': there is no '{path}' in {where['file']}")
            value = value[key]
        return float(value)

    if "{seed}" in where["value"]:
        return Estimate([look(where["value"].replace("{seed}", str(seed))) for seed in kept["seeds"]])
    own = (look(where["high"]) - look(where["low"])) / 2 if "low" in where else None
    return Estimate([look(where["value"])], own)
