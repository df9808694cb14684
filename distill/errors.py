"""What a user can put right."""

from __future__ import annotations

from pathlib import Path

LARGEST_SEED = 2**32 - 1  # that NumPy and Lightning take
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended, as a shell has it
ENDED = 143  # the exit code of a process that a SIGTERM ended, as a shell has it


class ConfigError(Exception):
    """A setting, path or combination that cannot work: says what was given, what is accepted and what to do.

    The command line prints the sentence without a traceback and ends with exit code 2.
    """


def sentence_of(error: ConfigError) -> str:
    """What is to be put right. An error of a loader's process comes with its traceback in front of the sentence."""
    return str(error).rpartition(f"{ConfigError.__module__}.{ConfigError.__name__}: ")[2].strip()


def recipes_of(arguments: list[str]) -> list[str]:
    """The files that a command line names by `--config` or `-c`, in their order."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name in ("-c", "--config"):
            found.append(value if equals else following)
    return found


def check_recipes(arguments: list[str]) -> None:
    """Refuses `--config` files that are no YAML mapping, each by its own name; those that are not there are left to the
    parser.

    Raises:
        ConfigError: one of these.
    """
    import yaml

    for name in recipes_of(arguments):
        if not Path(name).is_file():
            continue
        try:
            held = yaml.safe_load(Path(name).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            reason = getattr(error, "problem", None) or str(error)
            raise ConfigError(f"'{name}' is no YAML{place}: {reason}; put that right or give another file") from error
        if not isinstance(held, dict):
            what = "is empty" if held is None else "holds no options"
            raise ConfigError(f"'{name}' {what}; a recipe is a YAML mapping of options to values")


def at_least_one(**values: int | None) -> None:
    """Refuses numbers of things that are none.

    Raises:
        ConfigError: one that is below 1; None is not looked at.
    """
    if wrong := ", ".join(f"{name}={value}" for name, value in values.items() if value is not None and value < 1):
        raise ConfigError(f"{wrong} is too few; give 1 or more")


def none_or_more(**values: int) -> None:
    """Refuses numbers of things that are fewer than none.

    Raises:
        ConfigError: one that is below 0.
    """
    if wrong := ", ".join(f"{name}={value}" for name, value in values.items() if value < 0):
        raise ConfigError(f"{wrong} is too few; give 0 for none, or more")


def check_seeds(**values: int) -> None:
    """Refuses seeds that not every generator takes.

    Raises:
        ConfigError: one below 0 or above `LARGEST_SEED`.
    """
    if wrong := ", ".join(f"{name}={value}" for name, value in values.items() if not 0 <= value <= LARGEST_SEED):
        raise ConfigError(f"{wrong}: a seed is a whole number from 0 to {LARGEST_SEED}")
