from __future__ import annotations

from pathlib import Path

import pytest

from distill.data import shapes
from distill.evaluation.evaluate import HELD_OUT, evaluate_on_shapes, fid_of_shapes
from distill.evaluation.metrics import Alignment
from distill.inference import open_painter


def test_painted_shapes_are_measured_by_their_own_captions(sd_folder: Path) -> None:
    """In parts of any size, all images, with the noise of the seed, against the captions they were painted from."""
    painter = open_painter(str(sd_folder), 1, 1.0, device="cpu")
    found = evaluate_on_shapes(painter, samples=7, seed=3, batch_size=4, reference=50)
    prompts, alignment = shapes.captions(HELD_OUT, range(7)), Alignment()
    images = painter(prompts, seed=3, batch_size=7)
    alignment.update(images, prompts)
    assert found["alignment"] == pytest.approx(alignment.compute().item(), abs=1e-5)
    assert found["fid_shapes"] == pytest.approx(fid_of_shapes(images, reference=50), rel=1e-3)
    assert (found["samples"], found["seed"], found["reference"]) == (7, 3, "50 held-out drawn images")
