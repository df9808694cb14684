"""What a user can put right."""

from __future__ import annotations

import re


class ConfigError(Exception):
    """A setting, path or combination that cannot work: says what was given, what is accepted and what to do.

    The command line prints the sentence without a traceback and ends with exit code 2.
    """


def parsers_sentence(message: str) -> str:
    """What jsonargparse found wrong, without the types it tried; other messages as they are."""
    message = re.sub(r"<class '(?:[^']*\.)?(\w+)'>", r"\1", " ".join(message.split()))
    key = (re.match(r'Parser key "([^"]+)"', message) or ["", ""])[1]
    if key and (option := re.search(r"Option '([^']+)' is not accepted", message)):
        return f"{key} has no option '{option[1]}'; --print_config and --help show those it has"
    tried = re.search(r"Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value type: .*? Given value: (.*)", message)
    tried = tried or re.search(r"Expected a (\w+)\. Got value: (.*)", message)
    if not key or not tried:
        return message
    accepted = [name for name in tried[1].split(", ") if name != "NoneType"]
    return f"{key} is {' or '.join(accepted)}, and {tried[2]!r} is none"
