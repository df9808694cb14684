"""`distill compare`."""

from __future__ import annotations

import sys

from distill.comparison import compare as comparing
from distill.comparison import report
from distill.comparison.compare import Entry
from distill.data import shapes
from distill.evaluation.evaluate import HELD_OUT


def compare(
    entries: list[Entry],
    output: str,
    samples: int = 1000,
    seeds: list[int] = [0],  # noqa: B006  (jsonargparse shows it)
    seed: int = 0,
    batch_size: int = 64,
    runs: str = "runs",
) -> None:
    """Trains, paints and measures a list of entries on drawn shapes, and writes table, plots and a report.

    Args:
        entries: each with a name and one of recipe, checkpoint and pipeline.
        output: folder of rows, images and report; finished rows are kept, so it can be killed and continued.
        samples: images of each row.
        seeds: of training; a recipe has a row for each.
        seed: of the images' noise.
        batch_size: images per call.
        runs: where recipes are trained.
    """
    comparison = comparing.Comparison(entries, output, samples, seeds, seed, batch_size, runs)
    results = comparing.compare(comparison)
    prompts = shapes.captions(HELD_OUT, range(comparing.SHOWN))
    table = report.write(results, prompts, output, " ".join(["distill", *sys.argv[1:]]))
    print(report.markdown(table), end="")
    print(f"the report is {output}/report.html", file=sys.stderr)
