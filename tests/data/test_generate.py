"""Generated folders: killed runs continue, damaged shards are made again, other settings are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import backbones
from distill.cli import main
from distill.data import latents
from distill.data.generate import (
    Generation,
    PairGeneration,
    TeacherLatents,
    TeacherPairs,
    make_here,
)
from distill.data.latents import LatentsData, PairsData
from distill.data.shards import LatentsDataset
from distill.diffusion.sampling import own_noise
from distill.errors import ConfigError
from distill.files import checksum, read_json, save_json
from tests.runs import Forked, distill, forked
from tests.training.test_module import Pull, fit, module

SETTINGS = Generation(count=40, steps=2, guidance=3.0, shard_size=8, batch_size=4)


def maker(teacher: Path, folder: Path, **changes: object) -> TeacherLatents:
    return TeacherLatents(backbones.load(str(teacher)), folder, dataclasses.replace(SETTINGS, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_here(maker(sd3_folder, folder), "latents")
    return folder


def shards(folder: Path) -> dict[str, str]:
    return json.loads((folder / "manifest.json").read_text())["shards"]


class Noted(TeacherLatents):
    """Whose writers leave their process numbers in the folder."""

    def write(self, *arguments: Any) -> None:
        (self.folder / f"pid-{os.getpid()}").touch()
        super().write(*arguments)


def test_made_here_by_two_processes_it_is_the_same(
    whole: Path, sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_here(Noted(backbones.load(str(sd3_folder)), tmp_path, SETTINGS), "latents", processes=2)
    writers = {path.name for path in tmp_path.glob("pid-*")}
    assert len(writers) == 2 and f"pid-{os.getpid()}" not in writers
    one, two = LatentsDataset(whole), LatentsDataset(tmp_path)
    assert len(two) == len(one) == 40
    assert two.__getitems__([0, 39])["prompts"] == one.__getitems__([0, 39])["prompts"]
    torch.testing.assert_close(two.__getitems__([0, 39])["x0"], one.__getitems__([0, 39])["x0"], rtol=0, atol=2e-3)


class FullDisk(TeacherLatents):
    def write(self, *_: Any) -> None:
        raise ConfigError("the disk is full")


class Killed(TeacherLatents):
    def write(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("writer", "sentence"),
    [
        (FullDisk, "^the disk is full$"),
        (Killed, "^a process that made latents was killed.*goes on from the last whole"),
    ],
)
def test_what_stops_a_process_that_shares_is_one_sentence(
    writer: type[TeacherLatents], sentence: str, sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=sentence):
        make_here(writer(backbones.load(str(sd3_folder)), tmp_path, SETTINGS), "latents", processes=2)


def test_a_shipped_teachers_latents_are_made_on_every_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(latents, "make_here", lambda maker, title, processes: asked.append(processes))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    LatentsData(str(tmp_path), "tiny-sd3").prepare_data()
    assert asked == [5]


def test_latents_are_the_pipelines_own(whole: Path, sd3_folder: Path) -> None:
    """A row equals a plain call of the stock pipeline on the same noise."""
    from distill.batch import Draws
    from distill.data import shapes

    backbone = backbones.load(str(sd3_folder))
    row = LatentsDataset(whole).__getitems__([5])
    noise = Draws(0, 0, 5, 1, torch.device("cpu")).normal("generate/noise", 16, 8, 8)
    (prompt,) = shapes.captions(1000, [5])
    pipeline = backbone.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        prompt, latents=noise, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=4, output_type="latent"
    ).images
    assert row["prompts"] == [prompt]
    assert (row["x0"].float() - plain).abs().max() < 5e-3  # stored as float16


@pytest.mark.parametrize("family", ["tiny-sd", "tiny-sd3"])
def test_latents_of_a_bfloat16_teacher_are_not_rounded_at_every_step(family: str, tmp_path: Path) -> None:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        teacher = TeacherLatents(backbones.load(family, dtype), tmp_path / str(dtype), Generation(2, 30, 2.5))
        made.append(teacher.make(list(range(2)), torch.device("cpu"))[0]["x0"])
    assert made[1].dtype == torch.float32
    assert (made[1] - made[0]).norm() < 0.025 * made[0].norm()


def test_damaged_and_missing_shards_are_made_again(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    (folder / "shard-000001.arrow").write_bytes(b"damaged")
    (folder / "shard-000003.arrow").unlink()
    with pytest.warns(UserWarning, match="shard-000001.arrow is damaged and is made again"):
        assert maker(sd3_folder, folder).missing() == [1, 3]
    make_here(maker(sd3_folder, folder), "latents")
    assert shards(folder) == shards(whole)


def test_checksums_are_those_of_the_files_and_none_lies_around(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    """Each writer sums what it wrote; whoever completes the folder reads no shard again, but one that is not summed."""
    assert shards(whole) == {path.name: checksum(path) for path in whole.glob("shard-*")}
    assert not list(whole.glob(".shard-*"))
    made = maker(sd3_folder, tmp_path)
    made.begin()
    for shard in made.shards:
        made.write(shard, torch.device("cpu"))
    (tmp_path / ".shard-000002.arrow.sha256").unlink()  # killed before it was there
    (tmp_path / "shard-000001.arrow").write_bytes(b"not read")
    made.finish()
    assert shards(tmp_path) == shards(whole)


def kill_and_go_on(arguments: list[str], folder: Path, count: int) -> None:
    """Kills a command that makes `count` shards when one is there, and runs it again, which leaves what is there."""
    run = Forked(arguments)
    while not list(folder.glob("shard-*")):
        assert not run.ended
        time.sleep(0.005)
    run.kill()
    times = {shard: shard.stat().st_mtime_ns for shard in folder.glob("shard-*")}
    assert len(times) < count, "the kill came too late to test anything"
    main(arguments)
    assert all(shard.stat().st_mtime_ns == then for shard, then in times.items())


def test_killed_generation_continues_to_the_same_result(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", "latents", "--teacher", str(sd3_folder), "--output", str(tmp_path), "--count", "40"]
    arguments += ["--steps", "2", "--guidance", "3.0", "--shard_size", "8", "--batch_size", "4"]
    arguments += ["--accelerator", "cpu", "--devices", "1"]
    kill_and_go_on(arguments, tmp_path, 5)
    assert shards(tmp_path) == shards(whole)


def test_killed_making_of_pairs_goes_on_to_the_same_pairs(sd_folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["generate", "pairs", "--teacher", str(sd_folder), "--count", "44", "--steps", "6", "--shard_size", "8"]
    arguments += ["--batch_size", "4", "--embeddings", "true", "--accelerator", "cpu", "--devices", "1"]
    main([*arguments, "--output", str(whole)])
    kill_and_go_on([*arguments, "--output", str(parts)], parts, 6)
    assert shards(parts) == shards(whole) and len(shards(parts)) == 6
    ours, others = (LatentsDataset(folder).__getitems__([0, 19, 43]) for folder in (parts, whole))
    assert ours.keys() == others.keys() == {"prompts", "x0", "noise", "cond.text", "cond.pooled"}
    assert ours["prompts"] == others["prompts"]
    assert all(torch.equal(ours[name], others[name]) for name in ours if name != "prompts")


def test_two_processes_share_the_work(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", "latents", "--teacher", str(sd3_folder), "--output", str(tmp_path), "--count", "40"]
    arguments += ["--steps", "2", "--guidance", "3.0", "--shard_size", "8", "--batch_size", "4"]
    arguments += ["--accelerator", "cpu", "--devices", "2"]
    assert distill(arguments).returncode == 0
    assert shards(tmp_path) == shards(whole)
    codes, said = Forked([*arguments, "--guidance", "5.0"], ranks=2).wait()
    assert codes[0] == 2 and all(codes) and "made with other settings" in said, "both processes stop"
    (tmp_path / "shard-000002.arrow").unlink()  # fewer shards left than processes
    forked(arguments, ranks=2)
    assert shards(tmp_path) == shards(whole)


def test_other_settings_are_refused(whole: Path, sd3_folder: Path) -> None:
    with pytest.raises(ConfigError, match="guidance=3.0 there, 5.0 asked"):
        maker(sd3_folder, whole, guidance=5.0).begin()


def test_a_folder_in_which_nothing_is_yet_says_so(sd3_folder: Path, tmp_path: Path) -> None:
    maker(sd3_folder, tmp_path).begin()
    with pytest.raises(
        ConfigError, match="begun with other settings .guidance.*remove it, in which nothing is yet, or"
    ):
        maker(sd3_folder, tmp_path, guidance=5.0).begin()


@pytest.mark.parametrize(
    ("wrong", "sentence"), [({"height": 33}, "multiples of"), ({"solver": "Nope"}, "no scheduler")]
)
def test_what_the_pipeline_cannot_be_asked_is_refused_before_a_folder_is_made(
    wrong: dict[str, Any], sentence: str, sd3_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        maker(sd3_folder, tmp_path / "latents", **wrong).begin()
    assert not (tmp_path / "latents").exists()


def test_latents_are_their_teachers_whatever_its_folder_is_called(
    whole: Path, sd3_folder: Path, sd_folder: Path, tmp_path: Path
) -> None:
    renamed = shutil.copytree(sd3_folder, tmp_path / "renamed")
    maker(renamed, whole).begin()
    LatentsData(str(whole), str(renamed), SETTINGS).check()
    with pytest.raises(ConfigError, match=rf"which this makes: distill generate latents .* --output {whole}-sd "):
        LatentsData(str(whole), str(sd_folder), SETTINGS).check()


def test_a_larger_count_adds_to_a_folder(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    """20 samples end inside a shard, which is made anew as a whole one; whole shards stay as they are."""
    make_here(maker(sd3_folder, tmp_path, count=20), "latents")
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in shards(tmp_path)}
    make_here(maker(sd3_folder, tmp_path), "latents")
    assert shards(tmp_path) == shards(whole)
    assert [name for name, then in times.items() if (tmp_path / name).stat().st_mtime_ns != then] == [
        "shard-000002.arrow"
    ]
    assert LatentsDataset.read_settings(tmp_path)["count"] == 40
    with pytest.raises(ConfigError, match="holds 40 samples, 20 are asked for; ask for 40 or more"):
        maker(sd3_folder, tmp_path, count=20).begin()
    maker(sd3_folder, tmp_path, count=50).begin()
    with pytest.raises(ConfigError, match="is unfinished and is to hold 50 samples, 20 are asked for; ask for 50"):
        maker(sd3_folder, tmp_path, count=20).begin()


def test_that_a_folder_is_added_to_is_said(sd3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_here(maker(sd3_folder, tmp_path, count=8), "latents")
    make_here(maker(sd3_folder, tmp_path, count=8), "latents")
    assert "holds" not in capsys.readouterr().out
    maker(sd3_folder, tmp_path, count=16).begin()
    assert "holds 8 latents and 16 are asked for: the rest is made; ask for 8 to keep" in capsys.readouterr().out


def pairs(teacher: Path, folder: Path, **changes: object) -> TeacherPairs:
    generation = PairGeneration(count=12, steps=3, shard_size=8, batch_size=4)
    return TeacherPairs(backbones.load(str(teacher)), folder, dataclasses.replace(generation, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_pairs_are_what_the_pipeline_makes_of_the_stored_noise(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    maker = pairs(folder, tmp_path, embeddings=True)
    make_here(maker, "pairs")
    used = maker.pipeline(torch.device("cpu")).components
    shared = maker.text_encoder.components
    assert all(used[name] is part for name, part in shared.items()), "the text encoders are in memory once"
    rows = LatentsDataset(tmp_path).__getitems__([0, 9])
    backbone = backbones.load(str(folder))
    pipeline = backbone.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    if family != "sd3":
        pipeline.scheduler = backbones.solver("DDIMScheduler", pipeline.scheduler)
    call = {**backbone.call, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    plain = pipeline(rows["prompts"], latents=rows["noise"].clone(), **call).images
    assert (rows["x0"] - plain).abs().max() < 2e-3 * plain.abs().max()  # stored as float16
    embedded = backbone.text_encoder()(rows["prompts"])
    for name, tensor in embedded.items():
        assert torch.allclose(rows[f"cond.{name}"], tensor.float(), atol=1e-2, rtol=1e-2)


def test_a_run_on_latents_with_embeddings_reads_no_text_encoder(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path
) -> None:
    """And is the run on the same latents without, but for what float16 rounds."""
    embedded = tmp_path / "embedded"
    settings = LatentsDataset.read_settings(sd3_latents)
    made = Generation(**{name: settings[name] for name in Generation.__dataclass_fields__} | {"embeddings": True})
    make_here(TeacherLatents(backbones.load(str(sd3_folder)), embedded, made), "latents")
    answers = []
    for folder in (sd3_latents, embedded):
        data = LatentsData(str(folder), str(sd3_folder), made, batch_size=8)
        model = module(sd3_folder, [Pull()])
        fit(model, folder, 1)
        data.setup("fit")
        assert (model._text_encoder is None) == (folder == embedded)
        batch = next(iter(data.train_dataloader()))
        with torch.no_grad():
            answers.append(model.student(batch["x0"], torch.full((8,), 0.5), model.encode(batch).cond))  # type: ignore[misc]
    torch.testing.assert_close(answers[0], answers[1], atol=2e-3, rtol=2e-3)


def test_latents_of_an_earlier_version_are_added_to(sd3_folder: Path, tmp_path: Path) -> None:
    """Their manifest does not say that they have no embeddings."""

    def maker(**changes: Any) -> TeacherLatents:
        made = dataclasses.replace(Generation(count=4, steps=1, shard_size=4, batch_size=4), **changes)
        return TeacherLatents(backbones.load(str(sd3_folder)), tmp_path, made)

    make_here(maker(), "latents")
    manifest = read_json(tmp_path / "manifest.json")
    del manifest["settings"]["embeddings"]
    save_json(manifest, tmp_path / "manifest.json")
    make_here(maker(count=8), "latents")
    assert len(LatentsDataset(tmp_path)) == 8
    with pytest.raises(ConfigError, match="made with other settings .*embeddings=False there, True asked"):
        maker(count=8, embeddings=True).begin()


def test_embeddings_that_are_missing_are_told_of_and_others_used_unsaid(sd3_latents: Path, sd3_folder: Path) -> None:
    made = {name: value for name, value in LatentsDataset.read_settings(sd3_latents).items() if name != "embeddings"}
    asked = Generation(**{name: made[name] for name in Generation.__dataclass_fields__ if name in made})
    for earlier in (made, made | {"embeddings": False}):
        data = LatentsData(str(sd3_latents), str(sd3_folder), dataclasses.replace(asked, embeddings=True))
        assert data._others(earlier) == ["embeddings=False, not True"]
    data = LatentsData(str(sd3_latents), str(sd3_folder), asked)
    assert data._others(made | {"embeddings": True}) == data._others(made) == []


@pytest.mark.parametrize("family", ["sd_folder", "sd3_folder"])
def test_stored_noise_is_what_a_low_precision_teacher_saw(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    generation = PairGeneration(count=4, steps=1, shard_size=4, batch_size=4)
    backbone = backbones.load(str(request.getfixturevalue(family)), torch.bfloat16)
    maker = TeacherPairs(backbone, tmp_path, generation)
    seen: list[torch.Tensor] = []

    def see(_: Any, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        seen.append((inputs[0] if inputs else named["hidden_states"])[:4])

    getattr(maker.pipeline(torch.device("cpu")), backbone.denoiser_name).register_forward_pre_hook(
        see, with_kwargs=True
    )
    tensors, _ = maker.make([0, 1, 2, 3], torch.device("cpu"))
    assert torch.equal(tensors["noise"].half().float(), seen[0].float())


def test_pairs_data_reads_noise_beside_latents(sd_folder: Path, sd_pairs: Path) -> None:
    data = PairsData(str(sd_pairs), str(sd_folder), batch_size=4)
    data.setup("fit")
    batch = data.dataset.__getitems__([3, 1])
    assert batch["noise"].shape == batch["x0"].shape == (2, 4, 8, 8)
    assert data.description == f"64 pairs of {backbones.load(str(sd_folder)).fingerprint} (2 steps, guidance 3.0)"


def test_pairs_that_cannot_be_used_are_refused(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="latents without the noise they came from; set data.folder to pairs, which this makes: distill gen",
    ):
        PairsData(str(sd3_latents), str(sd3_folder)).check()
    generation = PairGeneration(count=3000000, guidance=8.0, embeddings=True)
    with pytest.raises(ConfigError, match="there are no pairs at .*--count 3000000 --guidance 8.0 --embeddings True"):
        PairsData(str(tmp_path), str(sd3_folder), generation).check()


def test_guidance_doubles_the_batch_and_not_the_calls(sd_folder: Path, tmp_path: Path) -> None:
    maker = pairs(sd_folder, tmp_path)
    asked: list[int] = []
    network = maker.pipeline(torch.device("cpu")).unet
    network.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    maker.make([0, 1, 2, 3], torch.device("cpu"))
    assert asked == [8, 8, 8]


def test_progress_is_told_in_samples(sd_folder: Path, tmp_path: Path) -> None:
    told: list[int] = []
    pairs(sd_folder, tmp_path).write(1, torch.device("cpu"), told.append)
    assert told == [4]
    pairs(sd_folder, tmp_path).write(0, torch.device("cpu"), told.append)
    assert told == [4, 4, 4]


ANCESTRAL = "EulerAncestralDiscreteScheduler"


def test_pairs_need_a_solver_without_noise_of_its_own(sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{ANCESTRAL} draws noise on its way.*deterministic solver, such as DDIM"):
        make_here(pairs(sd_folder, tmp_path / "none", solver=ANCESTRAL), "pairs")
    assert not (tmp_path / "none").exists(), "a manifest would refuse the next, right call"


def test_latents_of_a_sampler_with_noise_are_the_same_again(sd_folder: Path, tmp_path: Path) -> None:
    """Whatever was drawn before, and with whichever others in a call."""
    made = []
    for batch_size in (4, 2):
        torch.manual_seed(batch_size)
        one = maker(sd_folder, tmp_path / str(batch_size), solver=ANCESTRAL, count=4, batch_size=batch_size)
        make_here(one, "latents")
        made.append(LatentsDataset(tmp_path / str(batch_size)).__getitems__([0, 1, 2, 3])["x0"].float())
    assert (made[0] - made[1]).abs().max() < 5e-3 * made[0].abs().max()


def test_the_noise_between_steps_is_that_of_the_seed_and_the_sample(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sample of a folder gets that of another sample, or of another folder's."""
    from distill.data import generate

    given: list[int] = []

    def watched(scheduler: Any, generators: list[torch.Generator]) -> Any:
        given.extend(generator.initial_seed() for generator in generators)
        return own_noise(scheduler, generators)

    monkeypatch.setattr(generate, "own_noise", watched)
    for seed in (0, 1):
        one = maker(sd_folder, tmp_path / str(seed), solver=ANCESTRAL, seed=seed, steps=1, count=4, batch_size=2)
        one.solve(["a red ring"] * 4, one.noise([0, 1, 2, 3], torch.device("cpu")), [0, 1, 2, 3])
    assert len(given) == len(set(given)) == 8


def test_one_side_alone_is_a_size(sdxl_folder: Path, tmp_path: Path) -> None:
    """The network is told the size that it paints."""
    generation = Generation(count=1, steps=1, width=64, batch_size=1)
    one = TeacherLatents(backbones.load(str(sdxl_folder)), tmp_path, generation)
    told: list[list[float]] = []

    def note(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
        told.append(kwargs["added_cond_kwargs"]["time_ids"][0].tolist())

    one.pipeline(torch.device("cpu")).unet.register_forward_pre_hook(note, with_kwargs=True)
    assert one.make([0], torch.device("cpu"))[0]["x0"].shape[2:] == (8, 16)
    assert told[0] == [32, 64, 0, 0, 32, 64]


@pytest.mark.parametrize("wrong", [{"count": 0}, {"steps": 0}, {"shard_size": 0}, {"batch_size": -1}])
def test_numbers_of_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* is too few; give 1 or more"):
        Generation(**wrong)


def test_what_a_recipe_says_of_latents_that_are_there_is_told_to_be_unused(sd3_folder: Path, sd3_latents: Path) -> None:
    data = LatentsData(str(sd3_latents), str(sd3_folder), Generation(count=100, guidance=25.0, batch_size=3))
    said = "were made with .*guidance=3.0, not 25.0, count=64, not 100 as data.generation says; they are"
    with pytest.warns(UserWarning, match=said):
        data.prepare_data()


def test_a_finished_folder_of_a_shipped_teacher_is_used_as_it_is(tmp_path: Path) -> None:
    """What `distill generate` made otherwise than the recipe says is neither refused nor added to."""
    made = Generation(count=4, steps=1, guidance=2.0, shard_size=4, batch_size=4)
    make_here(TeacherLatents(backbones.load("tiny-sd3"), tmp_path, made), "latents")
    before = (tmp_path / "manifest.json").read_text()
    data = LatentsData(str(tmp_path), "tiny-sd3", Generation(count=8, steps=1, guidance=1.75, shard_size=4))
    with pytest.warns(
        UserWarning,
        match="were made with guidance=2.0, not 1.75, count=4, not 8 as data.generation says; they are used",
    ):
        data.prepare_data()
    assert (tmp_path / "manifest.json").read_text() == before
    make_here(TeacherLatents(backbones.load("tiny-sd3"), tmp_path, dataclasses.replace(made, count=5)), "latents")
    LatentsData(str(tmp_path), "tiny-sd3", dataclasses.replace(made, count=6)).prepare_data()
    assert len(LatentsDataset(tmp_path)) == 6, "made by the same settings, it grows to what is asked"
    LatentsData(str(tmp_path), "tiny-sd3", made).prepare_data()
    assert len(LatentsDataset(tmp_path)) == 6, "and more are used as they are"
    LatentsData(str(tmp_path), "tiny-sd3", dataclasses.replace(made, count=8, batch_size=3)).prepare_data()
    assert len(LatentsDataset(tmp_path)) == 8, "also in other batches, for memory that was not enough for these"
    with pytest.raises(ConfigError, match="steps=1 there, 2 asked"):
        TeacherLatents(backbones.load("tiny-sd3"), tmp_path, dataclasses.replace(made, count=9, steps=2)).begin()


def test_a_damaged_manifest_gets_a_sentence(whole: Path, sd3_folder: Path, tmp_path: Path) -> None:
    """Which, followed, leads back to the folder as it was."""
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(whole), str(folder)], check=True)
    (folder / "manifest.json").write_text("{")
    for ask in (maker(sd3_folder, folder).begin, lambda: LatentsDataset(folder)):
        with pytest.raises(ConfigError, match="manifest.json' is damaged; remove it and make the folder again by the"):
            ask()
    (folder / "manifest.json").unlink()
    make_here(maker(sd3_folder, folder), "latents")
    assert shards(folder) == shards(whole)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_cannot_be_stored_is_not_called_made(
    value: float, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = TeacherLatents(backbones.load(str(sd_folder)), tmp_path / "latents", Generation(count=4, steps=1))
    make = maker.make

    def broken(indices: list[int], device: torch.device) -> Any:
        tensors, prompts = make(indices, device)
        tensors["x0"][2] = value
        return tensors, prompts

    monkeypatch.setattr(maker, "make", broken)
    with pytest.raises(FloatingPointError, match="x0 of 1 of 4 samples is not finite .*, the first is number 2"):
        make_here(maker, "latents")
    assert not list((tmp_path / "latents").glob("shard-*"))
