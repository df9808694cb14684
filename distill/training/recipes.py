"""Recipes as they are written: lists that replace earlier ones, and the `${...}` by which values follow one another."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.errors import ConfigError, recipes_of

Place = tuple[str | int, ...]  # names and indices that lead to a value
LISTS: dict[str, Place] = {
    "model.strategies": ("model", "init_args", "strategies"), "trainer.callbacks": ("trainer", "callbacks")
}  # fmt: skip
ENTRY = re.compile(r"--(model\.strategies|trainer\.callbacks)\.(\d+)\.(.+)")


def linked(settings: dict[str, Any], recipes: list[str]) -> dict[str, Any]:
    """Settings whose values follow one another again as in the recipes they came from.

    A value that a recipe writes as `${...}` is written so again if that leads to the value it has, so that a run which
    begins from the settings and changes one of them changes the others with it.

    Args:
        settings: plain ones, in which every `${...}` has been replaced by its value.
        recipes: files, the later ones over the earlier.
    """
    held: Any = {}
    for recipe in recipes:
        held = _over(held, _held(recipe) or {})
    made = copy.deepcopy(settings)
    for place, text in _links(held):
        there = _at(settings, place)
        found = None if there is None else _value(_put(settings, place, text), place)
        if found is not None and (found, type(found)) == (there, type(there)):
            made = _put(made, place, text)
    try:
        return made if OmegaConf.to_container(OmegaConf.create(made), resolve=True) == settings else settings
    except OmegaConfBaseException:  # values that follow one another in a circle
        return settings


def _over(below: Any, above: Any) -> Any:
    """What two files come to together: mappings are merged, all else is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _over(below.get(name), value) for name, value in above.items()}


def _put(settings: Any, place: Place, value: Any) -> Any:
    """A copy of nested settings with another value at a place that is there."""
    if not place:
        return value
    made = copy.copy(settings)
    made[place[0]] = _put(settings[place[0]], place[1:], value)
    return made


def _value(settings: dict[str, Any], place: Place) -> Any:
    """What a place comes to; nothing where its `${...}` leads nowhere."""
    try:
        return _at(OmegaConf.to_container(OmegaConf.create(settings), resolve=True), place)
    except OmegaConfBaseException:
        return None


def numbered_entries(args: list[str]) -> list[str]:
    """Arguments in which `--model.strategies.0.weight 2` has become the whole list with that change, at the end.

    jsonargparse sets the last entry of a list alone, as `--model.strategies.weight`.

    Raises:
        ConfigError: a list that no recipe has, or one without that entry.
    """
    made, changed, words = [], dict[str, list[Any]](), iter(args)
    for arg in words:
        name, equals, value = arg.partition("=")
        found = ENTRY.fullmatch(name)
        if found is None:
            made.append(arg)
            continue
        option, number, rest = found[1], int(found[2]), found[3]
        value = value if equals else next(words, "")
        entries = changed.setdefault(option, _list_at(option, args))
        if number >= len(entries):
            raise ConfigError(f"{name}: {option} has {len(entries)} entries in this recipe, counted from 0")
        entries[number] = _changed(entries[number], rest.split("."), yaml.safe_load(value))
    return made + [word for option, entries in changed.items() for word in (f"--{option}", json.dumps(entries))]


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


def _list_at(option: str, args: list[str]) -> list[Any]:
    """The list that the recipes of a command line, or it itself, end at; a copy."""
    found = [_at(_held(recipe), LISTS[option]) for recipe in recipes_of(args)]
    given = [value for name, value in zip(args, args[1:], strict=False) if name == f"--{option}"]
    lists = [one for one in [*found, *map(yaml.safe_load, given)] if isinstance(one, list)]
    return copy.deepcopy(lists[-1]) if lists else []


def _changed(entry: Any, names: list[str], value: Any) -> Any:
    """A class and its arguments, or a value, with another value at nested names, where `init_args` need not be said."""
    if not names:
        return value
    held = {"class_path": entry} if isinstance(entry, str) else dict(entry or {})
    if "class_path" in held and names[0] not in ("class_path", "init_args"):
        names = ["init_args", *names]
    return held | {names[0]: _changed(held.get(names[0]), names[1:], value)}


def _lists_of(file: str) -> set[str]:
    """The options by which a recipe's lists are replaced."""
    return {option for option, place in LISTS.items() if isinstance(_at(_held(file), place), list)}


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
