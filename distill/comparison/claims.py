"""Orderings that somebody claims, and whether measured values bear them out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student_t

from distill.errors import ConfigError
from distill.files import read_json

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
SIGN = r" ([<>~]) "  # between two names
COLUMNS = ("claim", "source", "measured", "verdict")


@dataclass(frozen=True)
class Source:
    """A value in a result file.

    Attributes:
        file: as `benchmarks/results` has them.
        value: path of its keys, with `/` between; with `{seed}` in it there is one value for each of the file's seeds.
        low, high: paths of the bounds of a single value.

    Raises:
        ConfigError: one bound alone.
    """

    file: str
    value: str
    low: str | None = None
    high: str | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ConfigError(f"a value of {self.file} has both bounds, low and high, or none")


@dataclass(frozen=True)
class Claim:
    """One ordering.

    Attributes:
        claim: in words.
        source: where it is claimed.
        order: names between `<`, `>` and `~` (alike), such as `LADD@1 > consistency@1`: an entry and its steps. A
            number stands for itself.
        metric: of the entries.
        values: names in `order` that are read from a result file.
        within: largest difference of what is alike.
        note: what was found out about it.

    Raises:
        ConfigError: an order without two different names, that goes up and down, or without a bound for what is alike.
    """

    claim: str
    source: str
    order: str
    metric: str | None = None
    values: dict[str, Source] = field(default_factory=dict)
    within: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.names) < 2 or not all(self.names) or len(set(self.names)) < len(self.names) or "=" in self.order:
            raise ConfigError(
                f"the claim '{self.claim}' needs an order of different names, such as 'a@1 < b@1'; got '{self.order}'"
            )
        if {"<", ">"} <= set(self.signs):
            raise ConfigError(f"the claim '{self.claim}' goes up and down: '{self.order}'; use one of < and >")
        if "~" in self.signs and self.within is None:
            raise ConfigError(f"the claim '{self.claim}' says ~ (alike); give within, the largest difference")
        if self.within is not None and not 0 <= self.within < math.inf:
            raise ConfigError(f"the claim '{self.claim}': within is a difference, 0 or more; got {self.within}")
        if self.metric is None and self.entries:
            raise ConfigError(f"the claim '{self.claim}' names entries; give the metric they are compared by")

    @property
    def names(self) -> list[str]:
        """What is ordered, from left to right."""
        return [name.strip() for name in re.split(SIGN, self.order)[::2]]

    @property
    def entries(self) -> list[str]:
        """The names that are entries and their steps."""
        return [name for name in self.names if name not in self.values and _number(name) is None]

    @property
    def signs(self) -> list[str]:
        """What stands between the names."""
        return re.findall(SIGN, self.order)


@dataclass(frozen=True)
class Estimate:
    """A measured value.

    Attributes:
        runs: one value for each seed.
        bounds: of the 95 % interval of a single run, such as a bootstrap's; None where there is none.
    """

    runs: dict[int, float]
    bounds: tuple[float, float] | None = None

    @property
    def value(self) -> float:
        """The mean."""
        return mean(self.runs.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean over seeds (Student's t); of one seed its own; None where nothing says how sure it is."""
        count = len(self.runs)
        if count == 1:
            return self.bounds
        half = float(student_t.ppf(0.975, count - 1)) * stdev(self.runs.values()) / count**0.5
        return self.value - half, self.value + half

    def above(self, other: Estimate) -> Estimate:
        """How much larger it is.

        Seeds that both have are paired: they share data, prompts and noise. Where there are not two of them, the
        distances from value to bound add as the root of their squares.
        """
        both = sorted(set(self.runs) & set(other.runs))
        if len(both) > 1:
            return Estimate({seed: self.runs[seed] - other.runs[seed] for seed in both})
        difference, mine, others = self.value - other.value, self.interval, other.interval
        if mine is None or others is None:
            return Estimate({0: difference})
        down = math.hypot(self.value - mine[0], others[1] - other.value)
        up = math.hypot(mine[1] - self.value, other.value - others[0])
        return Estimate({0: difference}, (difference - down, difference + up))


def check(claims: list[Claim], rows: list[str], metrics: Sequence[str]) -> None:
    """Refuses claims that could never be judged, before anything is measured for them.

    Args:
        claims: of a list.
        rows: its entries with their steps, as `name@steps`.
        metrics: that rows have.

    Raises:
        ConfigError: a name or a metric that is not there.
    """
    for claim in claims:
        if unknown := [name for name in claim.entries if name not in rows]:
            raise ConfigError(
                f"the claim '{claim.claim}' names {', '.join(unknown)}; the list has {', '.join(rows) or 'no entries'}"
            )
        if claim.entries and claim.metric not in metrics:
            raise ConfigError(f"the claim '{claim.claim}' asks for '{claim.metric}'; rows have {', '.join(metrics)}")


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
        name: None if one is None else {"value": one.value, "interval": one.interval, "runs": list(one.runs.values())}
        for name, one in found.items()
    }
    return {"claim": claim.claim, "source": claim.source, "metric": claim.metric, "order": claim.order,
            "within": claim.within, "values": values, "verdict": verdict, "note": claim.note}  # fmt: skip


def markdown(judged: list[dict[str, Any]]) -> str:
    """A table of claims."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for claim, source, measured, verdict in map(cells, judged):
        lines.append(f"| {claim} | {source} | {measured} | **{verdict}** |")
    return "\n".join(lines) + "\n"


def cells(judged: dict[str, Any]) -> tuple[str, str, str, str]:
    """One claim's line of a table, in the order of `COLUMNS`."""
    signs = [*re.findall(SIGN, judged["order"]), ""]
    values = [name if _number(name) is not None else f"{name} {_shown(v)}" for name, v in judged["values"].items()]
    measured = " ".join(f"{value} {sign}".strip() for value, sign in zip(values, signs, strict=True))
    if judged["metric"]:
        measured = f"{judged['metric']}: {measured}"
    if judged["within"] is not None:
        measured += f" (alike within {judged['within']:g})"
    if judged["note"]:
        measured += f"; {judged['note']}"
    return judged["claim"], judged["source"], measured, judged["verdict"]


def _shown(value: dict[str, Any] | None) -> str:
    if value is None:
        return "(not measured)"
    bounds = "" if value["interval"] is None else " ({:.4g} to {:.4g})".format(*value["interval"])
    return f"{value['value']:.4g}{bounds}"


def _pair(first: Estimate | None, sign: str, second: Estimate | None, within: float | None) -> str:
    if first is None or second is None:
        return UNDECIDED
    interval = second.above(first).interval
    if interval is None:
        return UNDECIDED
    low, high = interval if sign != ">" else (-interval[1], -interval[0])
    if sign == "~":
        assert within is not None
        return HOLDS if -within <= low and high <= within else FAILS if low > within or high < -within else UNDECIDED
    return HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED


def _estimate(name: str, claim: Claim, rows: list[dict[str, Any]]) -> Estimate | None:
    if name in claim.values:
        return _from_file(claim.values[name], claim)
    if (number := _number(name)) is not None:
        return Estimate({0: number}, (number, number))
    entry, _, steps = name.rpartition("@")
    metric = str(claim.metric)
    of_entry = [row for row in rows if row["name"] == entry.strip() and str(row["steps"]) == steps.strip()]
    some = [row for row in of_entry if metric in row]  # not every row has every number
    if not some:
        return None
    runs = {row["train_seed"] or 0: float(row[metric]) for row in some}
    return Estimate(runs, tuple(some[0][f"{metric}_interval"]) if f"{metric}_interval" in some[0] else None)


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def _from_file(source: Source, claim: Claim) -> Estimate | None:
    """What a result file says; None if the file is not there."""
    if not Path(source.file).is_file():
        return None
    kept = read_json(source.file)

    def look(path: str) -> float:
        value = kept
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            raise ConfigError(f"the claim '{claim.claim}': there is no number at '{path}' in {source.file}")
        return float(value)

    if "{seed}" in source.value:
        if not kept.get("seeds"):
            raise ConfigError(f"the claim '{claim.claim}' asks for a value per seed, and {source.file} has no seeds")
        return Estimate({seed: look(source.value.replace("{seed}", str(seed))) for seed in kept["seeds"]})
    bounds = (look(source.low), look(source.high)) if source.low and source.high else None
    return Estimate({0: look(source.value)}, bounds)
