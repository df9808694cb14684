"""Prompt sets: text files, caption files, tables, data sets of the hub, and LADD's list."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.errors import ConfigError
from distill.files import ASSETS, read_json

LADD = "ladd-128"  # PartiPrompts without Basic, every fourth: arXiv 2403.12015, appendix A.1
COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
HUB = "hub:"
ENCODING = "utf-8-sig"  # with or without the mark that some editors begin a file with


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a set, in its order.

    Args:
        source: a text file with one prompt per line; a `.json` of COCO's captions (the first caption of each image, by
            image id); a `.csv`, `.tsv` or `.jsonl` with a column named prompt, caption or text, as PartiPrompts and
            DrawBench are handed out; `ladd-128`; or `hub:NAME` for the `train` split of a data set that
            `datasets.load_dataset` finds, on the hub or in a folder, such as `hub:nateraw/parti-prompts`.

    Raises:
        ConfigError: no such set, or one without prompts.
    """
    name = str(source)
    if name.startswith(HUB):
        prompts = _hub(name.removeprefix(HUB))
    else:
        path = ASSETS / "ladd_prompts.txt" if name == LADD else Path(source)
        if not path.is_file():
            raise ConfigError(
                f"there is no file of prompts at '{name}'; give a text file with one prompt per line, COCO's captions "
                f"(.json), a table (.csv, .tsv), {LADD}, or {HUB}NAME"
            )
        try:
            prompts = READERS.get(path.suffix.lower(), _lines)(path)
        except UnicodeDecodeError as error:
            raise ConfigError(f"'{name}' is not UTF-8 ({error.reason}); save it as UTF-8 text") from error
    prompts = [" ".join(prompt.split()) for prompt in prompts if prompt and prompt.strip()]
    if not prompts:
        raise ConfigError(f"'{name}' holds no prompts")
    return prompts


def given_prompts(prompt: list[str] | str | None, prompts: str | None) -> list[str]:
    """What a command is to paint.

    Args:
        prompt: one, or several.
        prompts: a set, as `read_prompts` takes it, that follows these.

    Raises:
        ConfigError: nothing at all, a list that is broken off, or as `read_prompts`.
    """
    if isinstance(prompt, str) and prompt.lstrip().startswith("["):
        raise ConfigError(
            f"--prompt {prompt} begins as a list and is none; several prompts are a JSON list in single quotes, such "
            'as \'["a red ring", "a blue square"]\', and --prompts FILE takes one per line'
        )
    lines = [*([prompt] if isinstance(prompt, str) else prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not lines:
        raise ConfigError('nothing to paint; give --prompt "a red ring" or --prompts FILE')
    return lines


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding=ENCODING).split("\n")


def _coco(path: Path) -> list[str]:
    try:
        first: dict[int, tuple[int, str]] = {}
        for row in read_json(path)["annotations"]:
            image, caption = row["image_id"], (row["id"], row["caption"])
            first[image] = min(first.get(image, caption), caption)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is no file of COCO captions: 'annotations' with image_id, id, caption") from error
    return [first[image][1] for image in sorted(first)]


def _table(path: Path) -> list[str]:
    with path.open(newline="", encoding=ENCODING) as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            column = _column(list(rows.fieldnames or []), str(path))
            return [row[column] for row in rows]
        except csv.Error as error:
            raise ConfigError(f"'{path}' cannot be read as a table ({error}); put that right or give text") from error


def _json_lines(path: Path) -> list[str]:
    try:
        rows = [json.loads(line) for line in _lines(path) if line.strip()]
        column = _column(list(rows[0]) if rows else [], str(path))
        return [str(row[column]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' is to hold an object with a prompt on each line ({error})") from error


def _hub(name: str) -> list[str]:
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the data set '{name}' cannot be opened ({reason}); give a name of the hub or a folder"
        ) from error
    return list(rows[_column(rows.column_names, name)])


def _column(names: list[str], where: str) -> str:
    for wanted in COLUMNS:
        for name in names:
            if name.lower() == wanted:
                return name
    raise ConfigError(f"'{where}' has the columns {', '.join(names) or 'none'}; one must be named {', '.join(COLUMNS)}")


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".json": _coco, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table
}  # fmt: skip
