"""Recipes as they are written: lists that replace earlier ones, and the `${...}` by which values follow one another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Place = tuple[str | int, ...]  # names and indices that lead to a value


def recipes_of(args: list[str]) -> list[str]:
    """The files a command line names, in their order."""
    made = [value for name, value in zip(args, args[1:], strict=False) if name in ("-c", "--config")]
    return made + [arg.partition("=")[2] for arg in args if arg.startswith(("--config=", "-c="))]


def linked(settings: dict[str, Any], recipes: list[str]) -> dict[str, Any]:
    """Settings whose values follow one another again as in the recipes they came from.

    A value that a recipe writes as `${...}` is written so again if that leads to the value it has, so that a run which
    begins from the settings and changes one of them changes the others with it.

    Args:
        settings: plain ones, in which every `${...}` has been replaced by its value.
        recipes: files, the later ones over the earlier.
    """
    made = copy.deepcopy(settings)
    for recipe in recipes:
        for place, text in _links(_held(recipe)):
            *way, last = place
            holder = _at(made, tuple(way))
            if _at(settings, place) is not None and _leads_to(text, settings) == _at(settings, place):
                holder[last] = text
    return made


def whole_lists(args: list[str]) -> list[str]:
    """Arguments whose lists of strategies and callbacks, in words or in a file, take the place of an earlier file's.

    jsonargparse lets each class of a list keep what the list of the same length before it said of the same class, so
    that a setting which is left out would be the recipe's instead of its default. After an empty list there is none.
    """
    made, known = [], set[str]()
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        value = value if equals else following
        if name in ("-c", "--config"):
            lists = _lists_of(value)
            made += [word for option in sorted(lists & known) for word in (f"--{option}", "[]")]
            known |= lists
        elif name.endswith((".strategies", ".callbacks")) and value.lstrip().startswith("["):
            made += [name, "[]"]
        made.append(arg)
    return made


def _lists_of(file: str) -> set[str]:
    """The options by which a recipe's lists are replaced."""
    places = {"model.strategies": ("model", "init_args", "strategies"), "trainer.callbacks": ("trainer", "callbacks")}
    return {option for option, place in places.items() if isinstance(_at(_held(file), place), list)}


def _held(file: str) -> Any:
    """What is in a recipe; nothing in one that cannot be read, of which others tell."""
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        return None


def _links(held: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every `${...}` and where it is."""
    if isinstance(held, str) and "${" in held:
        yield place, held
    if isinstance(held, list):
        held = dict(enumerate(held))
    for name, value in held.items() if isinstance(held, dict) else ():
        yield from _links(value, (*place, name))


def _at(settings: Any, place: Place) -> Any:
    """What lies in nested settings; nothing where a name is missing."""
    for name in place:
        known = isinstance(settings, dict) and name in settings
        known = known or (isinstance(settings, list) and isinstance(name, int) and name < len(settings))
        settings = settings[name] if known else None
    return settings


def _leads_to(text: str, settings: dict[str, Any]) -> Any:
    try:
        return OmegaConf.select(OmegaConf.create({**settings, "_here": text}), "_here")
    except OmegaConfBaseException:
        return None
