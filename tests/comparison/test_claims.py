"""Orderings and what measured values say to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.comparison.claims import Claim, Estimate, Source, judge, markdown
from distill.errors import ConfigError
from distill.files import save_json


def rows(name: str, values: list[float], steps: int = 1) -> list[dict[str, Any]]:
    return [{"name": name, "steps": steps, "train_seed": n, "quality": value} for n, value in enumerate(values)]


def claim(order: str, **settings: Any) -> Claim:
    return Claim("one is better", "a paper, section 1", order, **{"metric": "quality", **settings})


MEASURED = rows("good", [9.0, 9.1, 8.9]) + rows("bad", [1.0, 1.1, 0.9]) + rows("wild", [1.0, 9.0, 5.0])


@pytest.mark.parametrize(
    ("order", "within", "verdict"),
    [
        ("good@1 > bad@1", None, "holds"),
        ("bad@1 < good@1", None, "holds"),
        ("good@1 < bad@1", None, "does not hold"),
        ("good@1 > wild@1", None, "undecided"),
        ("good@1 > wild@1 > bad@1", None, "undecided"),
        ("wild@1 < bad@1 < good@1", None, "undecided"),
        ("bad@1 > good@1 > wild@1", None, "does not hold"),
        ("good@1 ~ bad@1", 1.0, "does not hold"),
        ("good@1 ~ bad@1", 9.0, "holds"),
        ("good@1 ~ wild@1", 4.0, "undecided"),
        ("good@1 > 8.5", None, "holds"),
        ("good@1 > nowhere@1", None, "undecided"),
        ("good@1 > bad@2", None, "undecided"),
    ],
)
def test_verdicts(order: str, within: float | None, verdict: str) -> None:
    assert judge(claim(order, within=within), MEASURED)["verdict"] == verdict


def test_interval_over_seeds_is_students() -> None:
    found = Estimate({0: 1.0, 1: 2.0, 2: 6.0})
    half = 4.303 * float(torch.tensor([1.0, 2.0, 6.0]).std()) / 3**0.5
    assert found.value == 3 and found.interval == pytest.approx((3 - half, 3 + half), rel=1e-3)
    assert Estimate({0: 1.0}).interval is None, "one seed says nothing of seeds"


def test_seeds_are_paired() -> None:
    """Each seed moves both alike: what differs between them is far surer than either."""
    both = rows("a", [1.0, 5.0, 9.0]) + rows("b", [1.5, 5.51, 9.4])
    assert judge(claim("a@1 < b@1"), both)["verdict"] == "holds"
    assert judge(claim("a@1 < b@1"), both[:-1])["verdict"] == "holds", "two seeds are left"
    shifted = rows("a", [1.0, 5.0]) + [
        {"name": "b", "steps": 1, "train_seed": n + 1, "quality": q} for n, q in ((0, 1.5), (1, 5.51))
    ]
    assert judge(claim("a@1 < b@1"), shifted)["verdict"] == "undecided", "one seed in common: nothing to pair"


def test_one_run_has_the_interval_of_its_images() -> None:
    one = [{"name": "a", "steps": 4, "train_seed": None, "quality": 5.0, "quality_interval": [4.9, 6.1]}]
    found = judge(claim("a@4 < 6.0"), one)
    assert found["verdict"] == "undecided", "the number lies within"
    assert found["values"]["a@4"] == {"value": 5.0, "interval": (4.9, 6.1), "runs": [5.0]}
    assert judge(claim("a@4 > 4.8"), one)["verdict"] == "holds", "the lower side is near"


def test_sides_of_two_intervals_add_as_squares() -> None:
    apart = Estimate({0: 5.0}, (4.0, 8.0)).above(Estimate({0: 1.0}, (0.0, 3.0)))
    assert apart.value == 4.0 and apart.interval == pytest.approx((4 - 5**0.5, 4 + 10**0.5))


def test_values_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    values = {"one_0": 1.9, "one_1": 2.1, "other": 9.0, "bounds": {"low": 8.9, "high": 9.3}}
    save_json({"seeds": [0, 1], "values": values}, file)
    named = {
        "one": Source(str(file), "values/one_{seed}"),
        "other": Source(str(file), "values/other", "values/bounds/low", "values/bounds/high"),
        "gone": Source(str(tmp_path / "gone.json"), "values"),
    }
    found = judge(claim("one < other", values=named, metric=None), [])
    assert found["verdict"] == "holds" and found["values"]["other"]["interval"] == (8.9, 9.3)
    assert judge(claim("one < gone", values=named, metric=None), [])["verdict"] == "undecided"
    for path in ("values/nothing", "values/bounds", "values/other/deeper"):
        with pytest.raises(ConfigError, match=f"there is no number at '{path}' in"):
            judge(claim("one < other", values=named | {"one": Source(str(file), path)}, metric=None), [])
    save_json({"values": values}, tmp_path / "bare.json")
    bare = Source(str(tmp_path / "bare.json"), "values/one_{seed}")
    with pytest.raises(ConfigError, match="asks for a value per seed, and .*bare.json has no seeds"):
        judge(claim("one < other", values=named | {"one": bare}, metric=None), [])
    with pytest.raises(ConfigError, match="has both bounds, low and high, or none"):
        Source("file", "value", low="low")


def test_table_says_what_was_measured() -> None:
    table = markdown([judge(claim("good@1 > bad@1 > gone@1", note="tried twice"), MEASURED)])
    alike = markdown([judge(claim("good@1 ~ 9.05", within=0.5), MEASURED)])
    assert "| quality: good@1 9 (8.752 to 9.248) ~ 9.05 (alike within 0.5) | **holds** |" in alike
    bad = "bad@1 1 (0.7516 to 1.248)"
    assert (
        f"| quality: good@1 9 (8.752 to 9.248) > {bad} > gone@1 (not measured); tried twice | **undecided** |" in table
    )


@pytest.mark.parametrize(
    ("order", "settings", "sentence"),
    [
        ("good@1", {}, "needs an order of different names"),
        ("a@1 < b@1 < a@1", {}, "needs an order of different names"),
        ("a@1 = b@1 < c@1", {}, "needs an order of different names"),
        ("a@1 < b@1 > c@1", {}, "goes up and down"),
        ("a@1 ~ b@1", {}, "give within, the largest difference"),
        ("a@1 < b@1", {"metric": None}, "give the metric they are compared by"),
    ],
)
def test_bad_claims_get_a_sentence(order: str, settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        claim(order, **settings)
