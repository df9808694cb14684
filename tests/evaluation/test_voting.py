"""Tables of votes, a judge that casts them, and `distill vote`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.cli import main
from distill.collaboration.judges import open_judge
from distill.data.shapes_data import ShapesDataset
from distill.errors import ConfigError
from distill.evaluation.preference import Vote, elo, win_rate
from distill.evaluation.voting import cast_votes, read_votes, save_votes, tally
from distill.inference import save_samples
from tests.runs import mistake

HEADER = "first,second,outcome,prompt,voter\n"
PEOPLE = [
    Vote("a", "b", 1.0, 'a "red" ring, left\nof a square', "Ada"),
    Vote("b", "a", 0.5, "", ""),
    Vote("c", "a", 0.0, "ein grüner Ring", "Судья"),
]


def brightness(prompts: list[str], images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def painted(folder: Path, levels: Sequence[float], prompts: Sequence[str] | None = None) -> Path:
    """A folder as `distill sample` writes it, of plain images."""
    images = torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8)
    save_samples(images, list(prompts or (f"prompt {index}" for index in range(len(levels)))), folder)
    return folder


def drawn(folder: Path, shift: int, count: int = 12) -> Path:
    """Drawn shapes, each beside its caption or, shifted, beside another's."""
    batch = ShapesDataset(count, seed=3).__getitems__(list(range(count)))
    save_samples(batch["pixels"].roll(shift, 0) / 2 + 0.5, batch["prompts"], folder)
    return folder


def test_a_table_keeps_every_vote(tmp_path: Path) -> None:
    save_votes(PEOPLE, tmp_path / "votes.csv")
    assert read_votes(tmp_path / "votes.csv") == PEOPLE
    assert [file.name for file in tmp_path.iterdir()] == ["votes.csv"]
    assert (tmp_path / "votes.csv").read_text().splitlines()[0] == HEADER.strip()


def test_other_columns_and_orders_of_columns_are_read(tmp_path: Path) -> None:
    """As a page on which people vote may write it, or a spreadsheet, with its byte order mark and 1.0 for 1."""
    text = "\ufeffseconds,voter,outcome,second,first,prompt,browser\n3.5,Ada,1.0,b,a,a ring,x\n\n2,,.5,b,a,,\n"
    (tmp_path / "votes.csv").write_text(text, encoding="utf-8")
    assert read_votes(tmp_path / "votes.csv") == [Vote("a", "b", 1.0, "a ring", "Ada"), Vote("a", "b", 0.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no table of votes at '"),
        ("", "has no column first, second, outcome, prompt, voter"),
        ("first,second,outcome\na,b,1\n", "has no column prompt, voter; votes have the columns first, second"),
        (HEADER, "holds no votes"),
        (HEADER + "a,b,1,,\na,b,2,,\n", "the outcome in line 3 of"),
        (HEADER + "a,b,a,,\n", "is 'a'; 1 means that the first was preferred, 0 the second, 0.5 a tie"),
        (HEADER + "a,b,,,\n", "is ''; 1 means"),
        (HEADER + "a,b,nan,,\n", "is 'nan'; 1 means"),
        (HEADER + "a,b,1\n", "line 2 of"),
        (HEADER + "a,a,1,,\n", "compares 'a' with 'a'; a vote is between two names"),
        (HEADER + ",b,1,,\n", "compares '' with 'b'"),
        (HEADER + "a,b,1,\udcff,\n", "is no CSV file in UTF-8"),
    ],
)
def test_a_table_that_is_none_gets_one_sentence(
    text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "votes.csv"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    assert words in mistake(capsys, ["vote", "--votes", str(file)])


def test_no_votes_have_no_rating() -> None:
    for count in (elo, tally):
        with pytest.raises(ConfigError, match="there are no votes to"):
            count([])


def test_a_judge_votes_for_the_higher_score(tmp_path: Path) -> None:
    """On every prompt between each two names, in batches or not."""
    levels = {"a": [0.2, 0.4, 0.6, 0.8], "b": [0.4, 0.4, 0.2, 1.0], "c": [0.0, 1.0, 0.6, 0.2]}
    folders = {name: painted(tmp_path / name, values) for name, values in levels.items()}
    expected = [
        Vote(one, other, 1.0 if x > y else 0.0 if x < y else 0.5, f"prompt {index}", "judge:brightness")
        for one, other in combinations(levels, 2)
        for index, (x, y) in enumerate(zip(levels[one], levels[other], strict=True))
    ]
    for batch_size in (1, 3, 64):
        assert cast_votes(folders, brightness, "brightness", batch_size) == expected
    assert {vote.outcome for vote in expected} == {0.0, 0.5, 1.0}


def test_a_judge_sees_the_images_and_prompts_of_the_folder(tmp_path: Path) -> None:
    seen: list[tuple[list[str], Tensor]] = []

    def judge(prompts: list[str], images: Tensor) -> Tensor:
        seen.append((prompts, images))
        return brightness(prompts, images)

    images, prompts = torch.rand(3, 3, 8, 8), ["a", "b", "c"]
    for name in ("one", "other"):
        save_samples(images, prompts, tmp_path / name)
    votes = cast_votes({name: tmp_path / name for name in ("one", "other")}, judge, "mine")
    assert [asked for asked, _ in seen] == [prompts, prompts]
    torch.testing.assert_close(seen[0][1], images, atol=0.5 / 255 + 1e-6, rtol=0)
    assert [vote.outcome for vote in votes] == [0.5] * 3


def test_a_score_that_is_no_number_is_no_vote(tmp_path: Path) -> None:
    folders = {name: painted(tmp_path / name, [0.0, 1.0]) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="the judge 'zero' has no score for '.*a/00000.png'; its answer is nan"):
        cast_votes(folders, lambda prompts, images: brightness(prompts, images) / brightness(prompts, images), "zero")


def test_people_and_judges_are_counted_apart() -> None:
    judged = [Vote("a", "b", 0.0, "", "judge:shapes")] * 5 + [Vote("b", "a", 0.0, "", "judge:clip:x:y")] * 2
    found = tally([*PEOPLE, *judged])
    assert {who: counted["votes"] for who, counted in found.items()} == {
        "people": 3, "judge:shapes": 5, "judge:clip:x:y": 2,
    }  # fmt: skip
    for who, votes in (("people", PEOPLE), ("judge:shapes", judged[:5]), ("judge:clip:x:y", judged[5:])):
        for pair in found[who]["win_rates"]:
            of = [v for v in votes if {v.first, v.second} == {pair["first"], pair["second"]}]
            assert pair["votes"] == len(of)
            assert (pair["rate"], pair["low"], pair["high"]) == win_rate(of, pair["first"], pair["second"])
        assert {n: (r["rating"], r["low"], r["high"]) for n, r in found[who]["elo"].items()} == elo(votes)
    assert [(pair["first"], pair["second"]) for pair in found["people"]["win_rates"]] == [("a", "b"), ("c", "a")]
    assert list(found["judge:shapes"]["elo"]) == ["b", "a"], "the best comes first"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge of drawn shapes prefers those of the caption, and its table is counted by itself."""
    right, wrong = drawn(tmp_path / "right", 0), drawn(tmp_path / "wrong", 1)
    table, counted = tmp_path / "made" / "votes.csv", tmp_path / "votes.json"
    images = json.dumps({"right": str(right), "wrong": str(wrong)})
    cast = ["vote", "--images", images, "--judge", "small-shapes", "--votes", str(table), "--device", "cpu"]
    main(cast)
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "12 votes of the judge small-shapes are in" in said.err
    assert list(found) == ["judge:small-shapes"] and found["judge:small-shapes"]["votes"] == 12
    (pair,) = found["judge:small-shapes"]["win_rates"]
    assert (pair["first"], pair["second"], pair["votes"]) == ("right", "wrong", 12)
    assert pair["rate"] > 0.9 and pair["low"] < pair["rate"] <= pair["high"] + 1e-9
    assert found["judge:small-shapes"]["elo"]["right"]["low"] > 1000
    rows = list(csv.DictReader(table.open()))
    assert {row["voter"] for row in rows} == {"judge:small-shapes"}
    assert [row["prompt"] for row in rows] == (right / "prompts.txt").read_text().splitlines()
    assert read_votes(table) == cast_votes(
        {"right": right, "wrong": wrong}, open_judge("small-shapes"), "small-shapes", 5
    )
    main(["vote", "--votes", str(table), "--output", str(counted)])
    assert json.loads(capsys.readouterr().out) == found
    kept = json.loads(counted.read_text())
    assert kept["values"] == found and kept["machine"]["cores"] and kept["command"].startswith("distill")
    main(cast)  # its own table it may write again


def test_a_judge_writes_over_nobody_elses_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: str(painted(tmp_path / name, [0.5])) for name in ("a", "b")}
    table = tmp_path / "votes.csv"
    cast = ["vote", "--images", json.dumps(folders), "--judge", "small-shapes", "--votes", str(table)]
    for votes, whose in ((PEOPLE, "people"), ([Vote("a", "b", 1.0, "", "judge:shapes")], "judge:shapes")):
        save_votes(votes, table)
        assert f"holds votes of {whose}, which would be lost" in mistake(capsys, cast)
        assert read_votes(table) == votes
    table.write_text("a recipe: of something\n")
    assert "has no column first" in mistake(capsys, cast)
    save_votes(PEOPLE, table)
    assert "is the table of votes" in mistake(capsys, ["vote", "--votes", str(table), "--output", str(table)])
    assert read_votes(table) == PEOPLE


def alone(folder: Path) -> dict[str, Path]:
    return {"a": painted(folder / "a", [0.1])}


def nameless(folder: Path) -> dict[str, Path]:
    return {"a": painted(folder / "a", [0.1]), "": painted(folder / "b", [0.1])}


def nowhere(folder: Path) -> dict[str, Path]:
    return {"a": painted(folder / "a", [0.1]), "b": folder / "b"}


def other_prompts(folder: Path) -> dict[str, Path]:
    prompts = ["prompt 0", "another"]
    return {"a": painted(folder / "a", [0.1, 0.2]), "b": painted(folder / "b", [0.1, 0.2], prompts)}


def more_prompts(folder: Path) -> dict[str, Path]:
    return {"a": painted(folder / "a", [0.1, 0.2]), "b": painted(folder / "b", [0.1, 0.2, 0.3])}


def without_an_image(folder: Path) -> dict[str, Path]:
    folders = {name: painted(folder / name, [0.1, 0.2, 0.3]) for name in ("a", "b")}
    (folders["b"] / "00001.png").unlink()
    return folders


def of_two_sizes(folder: Path) -> dict[str, Path]:
    folders = {name: painted(folder / name, [0.1, 0.2], ["a red ring", "a blue ring"]) for name in ("a", "b")}
    save_samples(torch.zeros(1, 3, 16, 16), ["a red ring"], folder / "c")
    (folder / "c" / "00000.png").rename(folders["b"] / "00001.png")
    return folders


def broken(folder: Path) -> dict[str, Path]:
    folders = {name: painted(folder / name, [0.1], ["a red ring"]) for name in ("a", "b")}
    (folders["b"] / "00000.png").write_text("half a")
    return folders


def of_no_shapes(folder: Path) -> dict[str, Path]:
    return {name: painted(folder / name, [0.1], ["a cat"]) for name in ("a", "b")}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (alone, "votes are between two names or more, each with a folder of images; got 'a'"),
        (nameless, "got 'a', ''"),
        (nowhere, "b' has no prompts.txt with prompts; give folders that distill sample wrote"),
        (other_prompts, "'a' has 2 prompts and 'b' 2, which differ from 00001.png on"),
        (more_prompts, "'a' has 2 prompts and 'b' 3, which differ from 00002.png on"),
        (without_an_image, "prompts.txt' names 1 are missing, the first is 00001.png"),
        (of_two_sizes, "b' differ in size"),
        (broken, "cannot identify image file"),
        (of_no_shapes, "the judge 'small-shapes' scores drawn shapes only"),
    ],
)
def test_folders_a_judge_cannot_vote_on(
    make: Callable[[Path], dict[str, Path]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = json.dumps({name: str(folder) for name, folder in make(tmp_path).items()})
    table = tmp_path / "votes.csv"
    arguments = ["vote", "--images", images, "--judge", "small-shapes", "--votes", str(table), "--device", "cpu"]
    assert words in mistake(capsys, arguments)
    assert not table.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--judge", "shapes"], "give --images and --judge, or only --votes to count a table"),
        (["--images", '{"a": "x", "b": "y"}'], "give --images and --judge"),
        (["--images", '{"a": "x", "b": "y"}', "--judge", "beauty"], "the judge 'beauty' is unknown"),
        (["--images", "folder", "--judge", "shapes"], "images"),
        (["--batch_size", "0"], "batch_size=0 is too few"),
        (["--output", "."], "this is a folder"),
    ],
)
def test_options_that_do_not_fit(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in mistake(capsys, ["vote", "--votes", "nowhere.csv", *options])
