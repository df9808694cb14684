"""How a command's options are read, and what is said of wrong ones."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from typing import NoReturn


def call(function: Callable[..., None], command: str, arguments: list[str]) -> None:
    """Calls a function with a command line's options, which are its parameters as its docstring tells them.

    Args:
        function: what the command does.
        command: its name in the help.
        arguments: what follows the name.
    """
    from jsonargparse import ArgumentParser

    description = (function.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"distill {command}", description=description, allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign,assignment]
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_function_arguments(function, as_positional=False)
    options = parser.parse_args(arguments)
    options.pop("config", None)
    function(**parser.instantiate_classes(options).as_dict())


def fail(message: str, *_: object) -> NoReturn:
    """One sentence, and exit code 2."""
    print(f"distill: error: {parsers_sentence(message)}", file=sys.stderr)
    raise SystemExit(2)


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
