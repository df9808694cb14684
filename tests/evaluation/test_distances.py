from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from distill.errors import ConfigError
from distill.evaluation.distances import open_distance
from distill.evaluation.shapes_judge import load_shapes_judge
from distill.perceptual.lpips import load_lpips


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 32, 32, generator=generator), torch.rand(3, 3, 32, 32, generator=generator)


def test_shapes_is_a_cosine_of_judge_features() -> None:
    one, other = pictures()
    judge = load_shapes_judge()
    with torch.no_grad():
        a, b = judge.features(one * 2 - 1), judge.features(other * 2 - 1)
    expected = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(open_distance("shapes")(one, other), expected)


def test_lpips_is_the_packages() -> None:
    one, other = pictures()
    with torch.no_grad():
        expected = load_lpips("squeeze", "tiny-lpips")(one * 2 - 1, other * 2 - 1).flatten()
    torch.testing.assert_close(open_distance("tiny-lpips")(one, other), expected)


@pytest.mark.parametrize("name", ["shapes", "tiny-lpips"])
def test_nothing_is_apart_from_itself(name: str) -> None:
    one, other = pictures()
    distance = open_distance(name)
    assert distance(one, one).abs().max() < 1e-5 and distance(one, other).min() > 0.01


def test_distances_that_cannot_be_opened_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match="the distance 'beauty' is unknown; choose one of shapes, tiny-lpips, vgg"):
        open_distance("beauty")


@pytest.fixture
def no_dreamsim(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is installed here, nothing is imported so far."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "dreamsim"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    sys.modules.pop("dreamsim", None)


def test_a_missing_package_is_named(no_dreamsim: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.meta_path", [finder for finder in sys.meta_path if finder is not PathFinder])
    with pytest.raises(ConfigError, match=r"'dreamsim' needs a package: pip install 'distill\[dreamsim\]'$"):
        open_distance("dreamsim")


def test_the_package_is_an_extra_of_this_one() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["name"] == "distill" and project["optional-dependencies"]["dreamsim"] == ["dreamsim"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("from torch import no_such_name", "cannot import name 'no_such_name' from 'torch'"),
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("raise RuntimeError('peft is too old')", "peft is too old"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)
def test_a_package_that_fails_to_import_says_why(
    tmp_path: Path, no_dreamsim: None, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    (tmp_path / "dreamsim.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"its package is installed and fails to import .{reason}") as raised:
        open_distance("dreamsim")
    assert "pip install" not in str(raised.value)
