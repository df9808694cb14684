"""What long work says of itself where no terminal shows a bar."""

from __future__ import annotations

import pytest

from distill.progress import counted, tracked


def test_lines_take_the_place_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("latents", 4, "latents", seconds=0) as advance:
        for _ in range(2):
            advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("latents: 2/4") and lines[1].startswith("latents: 4/4") and "latents/s" in lines[1]


def test_short_work_says_nothing_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked("abc", "painting")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
