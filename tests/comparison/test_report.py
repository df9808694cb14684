"""The HTML report as a reader uses it: opened in headless Chromium, sorted, two rows side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.comparison.report import pareto, summary, write
from distill.inference import save_png

PROMPTS = ["a red ring", 'a <b>"blue"</b> square']
COLUMNS = ["fid_shapes", "alignment", "kid", "precision", "recall", "seconds_per_image", "training_minutes"]
FIDS = {"teacher": 20.0, "LADD": 100.0, "ADD & more": 3.0}


def measured(name: str, fid: float, images: Path) -> dict[str, Any]:
    row = {"name": name, "steps": 1, "fid_shapes": fid, "images": str(images), "samples": 100, "seed": 0}
    row |= dict.fromkeys(("alignment", "kid", "precision", "recall", "seconds_per_image"), 0.5)
    return row | {"reference": "drawn images"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows: list[dict[str, Any]] = []
    for shade, (name, fid) in enumerate(FIDS.items()):
        images = folder / f"images {shade}"
        images.mkdir()
        for index in range(len(PROMPTS)):
            save_png(torch.full((3, 4 + shade, 4), float(index)), images / f"{index:02d}.png")
        rows.append(measured(name, fid, images))
    rows[1]["training"] = {"device_seconds": 600.0}
    rows[2]["training"] = {"device_seconds": 60.0}
    write(rows, COLUMNS, PROMPTS, folder / "out", "distill compare --config list.yaml", [])
    return folder / "out" / "report.html"


def in_browser(file: Path, script: str) -> Any:
    """What `script` returns in the page; the page says nothing on its console and fetches nothing but itself."""
    pytest.importorskip("PySide6.QtWebEngineCore", reason="Chromium's libraries are missing", exc_type=ImportError)
    tool = Path(__file__).with_name("browser.py")
    run = subprocess.run([sys.executable, str(tool), str(file), script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["console"] == [], "errors of the page's script"
    assert said["requests"] == [file.resolve().as_uri()], "it needs nothing else"
    return said["answer"]


ORDER = "const order = () => [...document.querySelectorAll('#table tbody tr')].map(row => row.cells[0].textContent);"
CLICK = "const click = n => document.querySelectorAll('#table th')[n].click();"


def test_titles_sort_the_table(report: Path) -> None:
    """Numbers as numbers, names as names; the second click turns the order, what is unknown is last in both."""
    script = f"""{ORDER} {CLICK}
        const seen = [order()];
        for (const column of [3, 3, 0, 9, 9]) {{ click(column); seen.push(order()); }}
        return [seen, document.querySelectorAll('#table th')[9].textContent];"""
    (first, fid, fid_turned, names, minutes, minutes_turned), title = in_browser(report, script)
    assert first == list(FIDS)
    assert fid == ["ADD & more", "teacher", "LADD"] and fid_turned == fid[::-1]
    assert names == ["ADD & more", "LADD", "teacher"]
    assert title == "training_minutes"
    assert minutes == ["ADD & more", "LADD", "teacher"] and minutes_turned == ["LADD", "ADD & more", "teacher"]


def test_two_rows_stand_side_by_side(report: Path) -> None:
    """Each prompt as text, with the pictures of the two chosen rows; pictures are decoded from the page itself."""
    script = """
        const chosen = [document.getElementById('left'), document.getElementById('right')];
        const look = () => [...document.querySelectorAll('#pairs > div')].map(box => [
            [...box.querySelectorAll('img')].map(image => image.alt.split(':')[0]),
            [...box.querySelectorAll('img')].map(image => image.src.length > 100), box.lastChild.textContent]);
        const before = look();
        chosen[0].value = 'ADD & more, 1 steps';
        chosen[0].dispatchEvent(new Event('change'));
        const sources = [...document.querySelectorAll('#pairs img')].map(image => image.src);
        return [before, look(), [...chosen[0].options].map(option => option.text), new Set(sources).size];"""
    before, after, choices, pictures = in_browser(report, script)
    assert choices == [f"{name}, 1 steps" for name in FIDS]
    assert before == [[["teacher, 1 steps", "LADD, 1 steps"], [True, True], prompt] for prompt in PROMPTS]
    assert after == [[["ADD & more, 1 steps", "LADD, 1 steps"], [True, True], prompt] for prompt in PROMPTS]
    assert pictures == 4


def test_what_is_shown_has_a_size(report: Path) -> None:
    """Plot and pictures are whole PNG files, and the script of the page ran to its end."""
    script = """
        const plot = document.querySelector('.plot');
        return [plot.naturalWidth, document.title, getComputedStyle(document.querySelector('th')).cursor];"""
    width, title, cursor = in_browser(report, script)
    assert width > 500 and title == "distill compare" and cursor == "pointer"


def test_rows_measured_elsewhere_have_no_images_to_show(tmp_path: Path) -> None:
    rows = [measured(name, fid, tmp_path / "elsewhere") for name, fid in FIDS.items()]
    write(rows, COLUMNS, PROMPTS, tmp_path, "distill compare --config list.yaml", [])
    shown = in_browser(tmp_path / "report.html", "return document.querySelectorAll('#left option').length;")
    assert shown == 0 and (tmp_path / "grid.png").is_file()


def test_plots_show_the_cost_of_training_where_there_was_any(tmp_path: Path) -> None:
    rows = [measured(name, fid, tmp_path) for name, fid in FIDS.items()]
    assert len(pareto(summary(rows, COLUMNS), COLUMNS[:2]).axes) == 4, "against steps and seconds"
    rows[0]["training"] = {"device_seconds": 60.0}
    assert len(pareto(summary(rows, COLUMNS), COLUMNS[:2]).axes) == 6
