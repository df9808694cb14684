"""The `distill` command."""

from __future__ import annotations

import sys
from collections.abc import Callable

HELP = """\
usage: distill COMMAND [options]

Turns a slow diffusion pipeline into a 1-4 step one.

  fit        train a student:             distill fit --config recipes/tiny_ladd.yaml
  validate   metrics of a checkpoint:     distill validate --config RECIPE --ckpt_path CHECKPOINT
  test       the same on the test set
  generate   teacher-made training data:  distill generate latents --teacher PIPELINE --output FOLDER
  sample     images from prompts:         distill sample --pipeline FOLDER --prompt "a red ring" --steps 1
  evaluate   metrics of a pipeline:       distill evaluate --pipeline FOLDER --steps 1
  export     checkpoint to pipeline:      distill export --checkpoint CHECKPOINT --output FOLDER

`distill COMMAND --help` lists a command's options."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; a mistake of the user's ends in one sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    from distill.errors import ConfigError

    commands = {name: _train for name in ("fit", "validate", "test")} | _others()
    if arguments[0] not in commands:
        _fail(f"'{arguments[0]}' is no command of distill; choose one of {', '.join(commands)}")
    try:
        commands[arguments[0]](arguments)
    except ConfigError as error:
        _fail(str(error))


def _others() -> dict[str, Callable[[list[str]], None]]:
    return {}


def _train(arguments: list[str]) -> None:
    from distill.training.cli import DistillCLI

    DistillCLI(args=arguments)


def _fail(message: str) -> None:
    print(f"distill: error: {message}", file=sys.stderr)
    raise SystemExit(2)
