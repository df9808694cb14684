"""The house: which room may import which, and what may be imported where."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import distill.strategies  # noqa: F401
from distill.backbones import sd, sd3, sdxl  # noqa: F401  (so that all kinds are known)
from distill.backbones.base import Backbone
from distill.strategies.base import Strategy
from tests.runs import ROOT

PACKAGE = ROOT / "distill"
FLOORS = [
    {"errors", "files", "identity", "progress", "provenance", "batch", "frozen", "diffusion", "perceptual"},
    {"backbones", "adversarial"},
    {"strategies", "data"},
    {"evaluation", "inference", "export"},
    {"collaboration", "comparison"},
    {"training", "tiny"},
    {"commands"},
    {"cli", "__main__"},
]
HEAVY = {"diffusers", "transformers", "timm", "open_clip", "datasets", "torchvision"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor(name: str) -> int:
    return next(index for index, floor in enumerate(FLOORS) if name in floor)


def imports(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = node.module == "distill"
            found += [f"distill.{alias.name}" for alias in node.names] if package else [node.module]
    return found


def kinds(base: type) -> list[type]:
    """Subclasses that are this package's, at any depth."""
    found = [kind for kind in base.__subclasses__() if kind.__module__.startswith("distill.")]
    return found + [deeper for kind in found for deeper in kinds(kind)]


def words(tree: ast.AST) -> set[str]:
    """Names that are used, as variables, attributes or imports."""
    nodes = list(ast.walk(tree))
    aliases = [a for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names]
    return (
        {node.id for node in nodes if isinstance(node, ast.Name)}
        | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        | {name for alias in aliases for name in (alias.name, alias.asname) if name}
    )


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_room_reaches_up(file: Path) -> None:
    here = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if here == "__init__":
        return
    for module in imports(ast.parse(file.read_text())):
        if module.startswith("distill."):
            assert floor(room(module)) <= floor(here), f"{file} imports {module}"


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(file: Path) -> None:
    tree = ast.parse(file.read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for node in top for name in imports(node)}
    pipeline = file == PACKAGE / "collaboration" / "pipeline.py"  # it is a diffusers pipeline
    assert not names & (HEAVY - {"diffusers"} if pipeline else HEAVY)
    if "lightning" in names:
        assert file.relative_to(PACKAGE).parts[0] in {"training", "data", "tiny"}


def test_training_names_no_strategy_and_no_backbone() -> None:
    named = {kind.__name__ for base in (Strategy, Backbone) for kind in kinds(base)}
    assert {"PixelAdversarial", "SD3Backbone"} <= named
    for file in (PACKAGE / "training").glob("*.py"):
        assert not words(ast.parse(file.read_text())) & named, file


@pytest.mark.parametrize("use", ["from a import Named", "from a import b as Named", "a.Named", "Named"])
def test_a_name_is_seen_however_it_is_used(use: str) -> None:
    assert "Named" in words(ast.parse(use))


def test_no_files_import_one_another_in_a_circle() -> None:
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files()}
    edges = {
        name: {m for m in imports(ast.Module([n for n in ast.parse(file.read_text()).body], [])) if m in names}
        for name, file in names.items()
    }
    TopologicalSorter({name: targets - {name} for name, targets in edges.items()}).prepare()  # raises at a circle
