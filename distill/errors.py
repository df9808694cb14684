"""What a user can put right."""

from __future__ import annotations

import ast
import re
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


def parsers_sentence(message: str) -> str:
    """What jsonargparse found wrong with the innermost option, without the types it tried; others' as they are."""
    message = re.sub(r"<class '(?:[^']*\.)?(\w+)'>", r"\1", _innermost(message))
    message = " ".join(message.split())
    within = re.match(r'Parser key "([^"]+)": Problem with given class_path \S+ Parser key "([^"]+)": (.*)', message)
    if within:
        message = f'Parser key "{within[1]}.{within[2]}": {within[3]}'
    if lacking := re.match(r"the following arguments are required: (?:fit|validate|test)\.(.*)", message):
        names = re.sub(r"\b(?:fit|validate|test)\.", "", lacking[1])
        return f"nothing says what {names} is; a recipe does, such as --config recipes/tiny_ladd.yaml"
    if lost := re.match(r'Parser key "config": File does not exist: (.*)', message):
        return f"there is no file {lost[1]}; --config is the path of a YAML file"
    if broken := re.match(r"Problems parsing config: (.*)", message):
        place = broken[1].replace('in "<unicode string>", ', "at ")
        return f"what --config names is no YAML: {place}"
    if other := re.match(r"Subcommand '(\w+)' does not accept option '([\w.]+)'", message):
        return f"{other[1]} has no option '{other[2]}'; --print_config and --help show those it has"
    nowhere = re.match(r"Interpolation key .* \(resolved to '\w+\.(.*)'\) full_key: \w+\.(\S+)", message)
    if nowhere:
        return f"{nowhere[2]} refers to ${{{nowhere[1]}}}, and the recipe has no such option"
    if strange := re.match(r"unrecognized arguments: (\S+)", message):
        return f"there is no option {strange[1]}; --help shows those there are"
    if absent := re.match(r"No supported (\w+) backend found", message):
        return f"the accelerator is to be {absent[1]}, and none is found on this machine; auto takes what there is"
    key = (re.match(r'Parser key "([^"]+)"', message) or ["", ""])[1]
    if "must be a mapping, not NoneType" in message:
        empty = re.findall(r"(\w+)=None", message.partition("Given value: ")[2])
        group = empty[0] if len(empty) == 1 else f"one of {', '.join(empty)}"
        return f"{group} holds options of its own and was given as null; leave it out for its defaults"
    if key and (missing := re.search(r"the following arguments are required: ([\w, ]+?) -", message)):
        return f"{key} needs {missing[1]}, and none was given; --print_config shows what there is"
    if key and (unknown := re.search(r"Option '([^']+)' is not accepted|NestedArg\(key='([^']+)'", message)):
        name = unknown[1] or unknown[2]
        owners = _owners(message.partition("Given value: ")[2], name.partition(".")[0])
        who, name = (f"{key}: {owners[0]}", name.partition(".")[0]) if len(owners) == 1 else (key, name)
        return f"{who} has no option '{name}'; --print_config and --help show those it has"
    own = "give the name of one of this package or the import path of your own, such as my_module.MyClass"
    if key and (unknown := re.search(r"Expected a dot import path string: (\S+)", message)):
        return f"{key}: there is no class '{unknown[1]}'; {own}"
    broken = re.search(r"Problem with given class_path '([^']+)': (.*?)(?= - Expected| Given value|$)", message)
    if key and broken:
        path = "; a module of your own has to be on PYTHONPATH" if "No module named" in broken[2] else ""
        return f"{key}: the class '{broken[1]}' cannot be had ({broken[2]}); {own}{path}"
    tried = re.search(r"Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value type: .*? Given value: (.*)", message)
    tried = tried or re.search(r"Expected a (typing\.Literal\[.*?\]|\w+)\. Got value: (.*)", message)
    if not key or not tried:
        return message
    named = re.sub(r"typing\.Literal\[(.*?)\]", lambda literal: literal[1].replace("'", ""), tried[1])
    accepted = [name for name in dict.fromkeys(re.split(r", (?![^\[]*\])", named)) if name != "NoneType"]
    return f"{key} is {' or '.join(accepted)}, and {tried[2]!r} is none"


def _owners(given: str, option: str) -> list[str]:
    """The classes in a printed group of options that are given this option."""
    try:
        left, found = [ast.literal_eval(re.sub(r"^NestedArg\(key='[^']*', val=(.*)\)$", r"\1", given))], []
    except (SyntaxError, ValueError):
        return []
    while left:
        value = left.pop()
        if isinstance(value, dict):
            arguments = value.get("init_args")
            if isinstance(arguments, dict) and option in arguments:
                found.append(str(value.get("class_path")).rpartition(".")[2])
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return found


def _innermost(message: str) -> str:
    """What is said of the option that was refused, out of what is said of all options it lies in."""
    while inner := re.search(r'^( *)- (Parser key ".*\n(?:\1   .*\n|\n)*)', message + "\n", re.MULTILINE):
        message = inner[2]
    return message
