"""`distill vote`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distill.errors import ConfigError, at_least_one
from distill.files import check_file, save_json
from distill.provenance import stamped, typed_command


def vote(
    votes: str,
    images: dict[str, str] | None = None,
    judge: str | None = None,
    output: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Counts pairwise votes of people or judges as win rates and ELO; with images, a judge casts them first.

    Args:
        votes: a CSV file with the columns first, second, outcome (1, 0 or 0.5), prompt and voter; with images it is
            written, and a table of other voters is not replaced.
        images: folders of `distill sample` with the same prompts by name, as '{"a": "FOLDER", "b": "FOLDER"}'.
        judge: who votes on them, as in `distill calibrate`; the table names it as judge:SPEC.
        output: a JSON file to write win rates and ELO to as well, with command and machine.
        batch_size: images per call of the judge.
        device: of the judge: auto, cpu, cuda, ...
    """
    from distill.collaboration.judges import check_judge, open_judge
    from distill.evaluation.voting import cast_votes, check_own, common_prompts, read_votes, save_votes, tally
    from distill.inference import pick_device

    at_least_one(batch_size=batch_size)
    check_file(output)
    if output and Path(output).resolve() == Path(votes).resolve():
        raise ConfigError(f"'{output}' is the table of votes; give another --output for what they come to")
    if (images is None) != (judge is None):
        raise ConfigError("a judge votes on images; give --images and --judge, or only --votes to count a table")
    if images is not None and judge is not None:
        check_file(votes)
        check_judge(judge)
        check_own(votes, judge)
        common_prompts(images)  # before a judge is loaded
        cast = cast_votes(images, open_judge(judge, pick_device(device)), judge, batch_size)
        save_votes(cast, votes)
        print(f"{len(cast)} votes of the judge {judge} are in {votes}", file=sys.stderr)
    found = tally(read_votes(votes))
    print(json.dumps(found, indent=2))
    if output:
        save_json(stamped(found, [0], typed_command()), output)
