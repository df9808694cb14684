"""The house: which room may import which, and what may be imported where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.runs import ROOT

PACKAGE = ROOT / "distill"
FLOORS = [
    {"errors", "files", "progress", "provenance", "batch", "frozen", "diffusion", "perceptual"},
    {"backbones", "adversarial"},
    {"strategies", "data"},
    {"evaluation", "inference", "export"},
    {"collaboration", "comparison"},
    {"training", "tiny"},
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
    named = {"LatentAdversarial", "DiffusionPretraining", "SD3", "SDBackbone"}
    for file in (PACKAGE / "training").glob("*.py"):
        words = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert not words & named, file


def test_no_two_files_import_each_other() -> None:
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files()}
    edges = {
        name: {m for m in imports(ast.Module([n for n in ast.parse(file.read_text()).body], [])) if m in names}
        for name, file in names.items()
    }
    for name, targets in edges.items():
        for target in targets - {name}:
            assert name not in edges[target], f"{name} and {target} import each other"
