"""The commands; nothing else. What one does is in `distill.commands`, imported when called: `--help` stays quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

HELP = """\
usage: distill COMMAND [options]

Turns a slow diffusion pipeline into a 1-4 step one.

  fit        train a student              distill fit --config recipes/tiny_ladd.yaml
  validate   metrics of a checkpoint      distill validate --config RECIPE --ckpt_path CHECKPOINT
  test       the same on the test set     distill test --config RECIPE --ckpt_path CHECKPOINT
  generate   data made once               distill generate latents|pairs|encoded --teacher PIPELINE --output FOLDER
  export     checkpoint to pipeline       distill export --checkpoint CHECKPOINT --output FOLDER
  sample     images from prompts          distill sample --pipeline FOLDER --prompt "a red ring" --steps 1
  evaluate   metrics of a pipeline        distill evaluate --pipeline FOLDER --steps 1
  compare    methods side by side         distill compare --config benchmarks/methods_tiny.yaml
  calibrate  when to ask the teacher      distill calibrate --student FOLDER --teacher PIPELINE --output FILE
  collaborate  student and teacher        distill collaborate --student FOLDER --teacher PIPELINE --calibration FILE
  analyse    where the two differ         distill analyse --student FOLDER --teacher PIPELINE
  vote       win rates and ELO            distill vote --votes FILE.csv

`distill COMMAND --help` lists a command's options."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; a mistake of the user's ends in one sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    from distill.commands.parsing import fail
    from distill.errors import INTERRUPTED, ConfigError, check_recipes, sentence_of

    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        fail(f"'{command}' is no command; choose one of {', '.join(COMMANDS)}")
    quiet()
    try:
        check_recipes(rest)
        COMMANDS[command](command, rest)
    except ConfigError as error:
        fail(sentence_of(error))
    except FloatingPointError as error:
        fail(str(error))
    except KeyboardInterrupt:
        _end(command, "interrupted", INTERRUPTED)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # as Lightning ends, with code 1
            _end(command, "interrupted", INTERRUPTED)
        raise
    except OSError as error:  # a full disk, a file in a folder's place, damaged weights: the place says what to do
        fail(" ".join(str(error).split()) or type(error).__name__)


def _train(command: str, arguments: list[str]) -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from omegaconf.errors import OmegaConfBaseException

    from distill.errors import ENDED, ConfigError
    from distill.training.cli import DistillCLI
    from distill.training.ending import Requeued

    try:
        DistillCLI([command, *arguments])
    except OmegaConfBaseException as error:  # a ${...} that leads nowhere
        raise ConfigError(str(error)) from error
    except Requeued:
        _end(command, "ended, to be run again by Slurm,", ENDED)
    except SIGTERMException:  # an exit of code 0 by itself, after which a script would go on with half a student
        _end(command, "ended by SIGTERM", ENDED)


def _generate(command: str, arguments: list[str]) -> None:
    from distill.commands import generate
    from distill.commands.parsing import call, fail

    kinds = ("latents", "pairs", "encoded")
    if arguments and arguments[0] in ("-h", "--help"):
        print("".join(f"distill generate {kind} --help lists the options of {kind}\n" for kind in kinds), end="")
        return
    if not arguments or arguments[0] not in kinds:
        given = f"'{arguments[0]}'" if arguments else "nothing"
        fail(f"distill generate makes {' or '.join(kinds)}; got {given}")
    call(getattr(generate, arguments[0]), f"generate {arguments[0]}", arguments[1:])


def _call(command: str, arguments: list[str]) -> None:
    """The function of the command's name, in its module."""
    from distill.commands.parsing import call

    call(getattr(import_module(f"distill.commands.{command}"), command), command, arguments)


def _end(command: str, how: str, code: int) -> NoReturn:
    again = "; --ckpt_path last goes on from its last checkpoint" if command == "fit" else ""
    print(f"distill: {how} before {command} was through{again}", file=sys.stderr)
    sys.exit(code)


def quiet() -> None:
    """Keeps the libraries' own progress bars and advice out of ours."""
    import logging
    import os
    import warnings

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    advice = (  # on what is meant to be so here
        ".*is deprecated.*",
        ".*many workers.*",
        ".*This DataLoader will create .* worker processes.*",
        ".*LightningCLI's args parameter.*",
        ".*in eval mode at the start of training.*",
        "(?s).*ModelCheckpoint with manual optimization.*",
        ".*no `val_dataloader`.*",
        ".*predict returned None.*",
        ".*not supported by the model summary.*",
        ".*no last checkpoint available.*",
        ".*Total length of .* across ranks is zero.*",  # of validation data, without `data.reference`
        ".*is smaller than the logging interval.*",  # it counts the batches of an epoch; ours are many short ones
    )
    for message in advice:
        warnings.filterwarnings("ignore", message=message)


def _no_tip(record: Any) -> bool:
    return "Tip:" not in record.getMessage()


COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    "fit": _train,
    "validate": _train,
    "test": _train,
    "generate": _generate,
    "export": _call,
    "sample": _call,
    "evaluate": _call,
    "compare": _call,
    "calibrate": _call,
    "collaborate": _call,
    "analyse": _call,
    "vote": _call,
}
