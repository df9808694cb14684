"""Prompt sets in the forms they are handed out in."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.data.prompts import LADD, read_prompts
from distill.errors import ConfigError
from distill.files import save_json


def test_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two  and   three \n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two and three"]


def test_cocos_first_caption_of_each_image(tmp_path: Path) -> None:
    rows = [(9, 3, "late"), (9, 2, "a dog\n"), (4, 7, "a cat")]
    annotations = [{"image_id": image, "id": number, "caption": caption} for image, number, caption in rows]
    save_json({"images": [], "annotations": annotations}, tmp_path / "captions.json")
    assert read_prompts(tmp_path / "captions.json") == ["a cat", "a dog"]


def test_tables_of_parti_and_drawbench(tmp_path: Path) -> None:
    (tmp_path / "parti.tsv").write_text('Prompt\tCategory\na "red" ring\tAbstract\nb, c\tWorld\n')
    assert read_prompts(tmp_path / "parti.tsv") == ['a "red" ring', "b, c"]
    (tmp_path / "draw.csv").write_text('Category,Prompts\nColors,"a red, red car"\n')
    assert read_prompts(tmp_path / "draw.csv") == ["a red, red car"]


def test_objects_on_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a red ring"}\n\n{"prompt": "a blue square", "seed": 3}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["a red ring", "a blue square"]


def test_the_mark_some_editors_begin_a_file_with_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red ring\u2028and more\na blue square", encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text("Prompt\na red ring\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "a.txt") == ["a red ring and more", "a blue square"]
    assert read_prompts(tmp_path / "a.csv") == ["a red ring"]
    (tmp_path / "b.txt").write_text("café", encoding="latin-1")
    with pytest.raises(ConfigError, match="is not UTF-8 .*; save it as UTF-8 text"):
        read_prompts(tmp_path / "b.txt")


def test_data_set(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict({"Prompt": ["one", "two"], "Category": ["a", "b"]}).to_parquet(folder / "train.parquet")
    assert read_prompts(f"hub:{folder}") == ["one", "two"]


def test_ladds_list() -> None:
    prompts = read_prompts(LADD)
    assert len(prompts) == len(set(prompts)) == 128
    assert prompts[0] == "A city in 4-dimensional space-time"
    assert prompts[2].endswith("standing up with its paws on the chair.")
    assert all(prompt.count('"') % 2 == 0 for prompt in prompts), "a quotation mark of the list's own"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("empty.txt", "\n", "holds no prompts"),
        ("none.txt", None, "there is no file of prompts at .*none.txt'; give a text file"),
        ("other.json", '{"a": 1}', "is no file of COCO captions"),
        ("broken.json", "{", "is no file of COCO captions"),
        ("other.csv", "a,b\n1,2\n", "has the columns a, b; one must be named prompt"),
        ("empty.tsv", "", "has the columns none"),
        ("long.csv", f"prompt\n{'a' * 200_000}\n", "cannot be read as a table"),
        ("no.jsonl", "a red ring\n", "is to hold an object with a prompt on each line"),
        ("other.jsonl", '{"a": 1}\n', "has the columns a; one must be named prompt"),
    ],
)
def test_bad_sets_get_a_sentence(name: str, text: str | None, sentence: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_prompts(tmp_path / name)


def test_unknown_data_set_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="the data set .*nothing' cannot be opened"):
        read_prompts(f"hub:{tmp_path / 'nothing'}")
