"""The benchmarks' arithmetic, and that the step they time is the step they compare it with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


def test_summary_of_ladd() -> None:
    import ladd_tiny

    rows = {
        "teacher_50": {"fid_shapes": 100.0, "alignment": 0.94},
        "teacher_1_unguided": {"fid_shapes": 900.0, "alignment": 0.8},
        "teacher_1_guided": {"fid_shapes": 800.0, "alignment": 0.8},
    } | {
        f"student_{steps}_seed_{seed}": {"fid_shapes": 100.0 + 20 * seed, "alignment": 0.93}
        for steps in (1, 2, 4)
        for seed in (0, 1)
    }
    summary = ladd_tiny.summary(rows, [0, 1])
    assert summary["teacher_1_over_teacher_50"] == 8.0
    assert summary["student_1"]["fid_over_teacher_50"] == {"mean": 1.1, "min": 1.0, "max": 1.2}
    assert summary["student_1"]["fid_over_teacher_1"]["max"] == 0.15
    assert summary["student_4"]["alignment_points_below_teacher_50"]["mean"] == pytest.approx(1.0)


def test_plain_loop_is_the_same_mathematics(sd3_folder: Path) -> None:
    """What `step_time.py` compares with moves the student exactly as our step does."""
    import step_time

    options = argparse.Namespace(teacher=str(sd3_folder), batch_size=8, rounds=1, steps=1)
    assert max(step_time.check(options).values()) <= 1e-5
