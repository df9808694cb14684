"""`distill compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distill.comparison import compare as comparing
from distill.comparison import report
from distill.comparison.claims import Claim, check, judge, markdown
from distill.comparison.measures import Drawn, Measure
from distill.comparison.rows import NOTHING, Comparison, Entry, rows_of
from distill.errors import ConfigError
from distill.files import check_file, check_folder, read_json, save_json
from distill.provenance import stamped, typed_command


def compare(
    entries: list[Entry],
    output: str,
    samples: int = 1000,
    seeds: list[int] = [0],  # noqa: B006  (jsonargparse shows it)
    seed: int = 0,
    batch_size: int = 64,
    runs: str = "runs",
    results: str | None = None,
    claims: list[Claim] = [],  # noqa: B006
    missing: str = "measure",
    prompts: str | None = None,
    measures: list[Measure] = [],  # noqa: B006
) -> None:
    """Trains, paints and measures a list of entries, and writes table, plots and a report.

    Args:
        entries: each with a name and one of recipe, checkpoint and pipeline.
        output: folder of the report.
        samples: images of each row.
        seeds: of training; a recipe has a row for each.
        seed: of the images' noise.
        batch_size: images per call.
        runs: where recipes are trained and finished rows are kept, so it can be killed and continued, and several
            processes may share the work.
        results: the JSON file of all rows; `results.json` in the output if not given. Rows that it has are finished,
            and those that this list does not name stay in it as `unlisted`.
        claims: orderings that are judged by what was measured, see `distill.comparison.claims.Claim`.
        missing: `measure` rows that are not there, or `skip` them.
        prompts: a file of prompts or a set's name, see `distill.data.prompts`; captions of drawn images if not given.
        measures: what rows are measured by, see `distill.comparison.measures`; `Drawn` if not given.
    """
    file = Path(results or Path(output) / "results.json")
    check_folder(output)
    check_file(file)
    before = comparing.kept_rows(file)
    command, rows, table = typed_command(), [], []
    comparison = None
    if entries:
        by = measures or [Drawn()]
        comparison = Comparison(
            entries, output, samples, seeds, seed, batch_size, runs, missing, prompts, str(file), by
        )
    names = [f"{row.entry.name}@{row.steps}" for row in rows_of(comparison)] if comparison else []
    check(claims, names, comparison.names if comparison else [])
    failed: comparing.Unfinished | None = None
    if comparison is not None:
        try:
            rows = comparing.compare(comparison)
        except comparing.Unfinished as error:
            rows, failed = error.rows, error
    if failed and not rows:
        raise failed
    if not rows and not claims:
        raise ConfigError(
            "no row of the list has been measured yet; leave out missing=skip to do so" if entries else NOTHING
        )
    judged = [judge(claim, rows) for claim in claims]
    if rows and comparison:
        columns = [*comparison.names, report.COST]
        table = report.write(rows, columns, comparison.setting.prompts[: comparing.SHOWN], output, command, judged)
        print(report.markdown(table, columns))
        if elsewhere := sum(not Path(row["images"]).is_dir() for row in rows):
            print(
                f"{elsewhere} of {len(rows)} rows are taken from {file} and have no images here; to measure them, "
                "give another --results",
                file=sys.stderr,
            )
        print(f"the report is {output}/report.html", file=sys.stderr)
    listed = {Path(row["images"]).name for row in rows}
    unlisted = [row for name, row in before.items() if name not in listed]
    kept = {"table": table, "rows": rows, "claims": judged} | ({"unlisted": unlisted} if unlisted else {})
    if not file.is_file() or read_json(file).get("values") != json.loads(json.dumps(kept)):  # else it is from before
        save_json(stamped(kept, seeds, command), file)
    print(markdown(judged) if judged else "", end="")
    if failed:
        raise failed
