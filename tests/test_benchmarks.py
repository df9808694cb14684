"""The benchmarks' arithmetic, and that the step they time is the step they compare it with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.files import read_json
from tests.runs import ROOT, checkpoint, fit_arguments, forked

sys.path.insert(0, str(ROOT / "benchmarks"))


def test_plain_loop_is_the_same_mathematics(sd3_folder: Path) -> None:
    """What `step_time.py` compares with moves the student exactly as our step does."""
    import step_time

    options = argparse.Namespace(teacher=str(sd3_folder), batch_size=8, rounds=1, steps=1)
    assert max(step_time.check(options).values()) <= 1e-5


@pytest.mark.parametrize("lora", [None, 4])
def test_plain_sum_of_adds_terms_moves_the_student_as_ours(lora: int | None, tmp_path: Path) -> None:
    """What `add_step.py` compares the memory with is the same step."""
    import add_step
    import torch

    options = argparse.Namespace(
        teacher="tiny-sd", vision="tiny-vit", size=32, batch_size=4, precision="32-true", steps=1, checkpoint=False,
        lora=lora,
    )  # fmt: skip
    weights = []
    make = add_step.make
    for name in ("add", "add_summed"):
        kept = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(add_step, "make", lambda o, n, kept=kept: kept.append(make(o, n)) or kept[0])
            add_step.one(options, name)
        assert kept[0].student.adapted == bool(lora)
        weights.append(torch.cat([p.detach().flatten() for p in kept[0].student.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=0)


def test_areas_of_a_critic_are_those_of_the_runs_own(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import critic_auc
    import torch

    main(fit_arguments("ladd_sd3.yaml", sd3_folder, sd3_latents, tmp_path, trainer__max_steps=1))
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    table = critic_auc.areas(last, str(sd3_latents), count=16, seed=0)
    assert list(table) == list(critic_auc.LEVELS) and all(0 <= value <= 1 for pair in table.values() for value in pair)
    held = checkpoint(tmp_path)["state_dict"]
    found = critic_auc.Critic(last).strategy.critic.state_dict()
    assert all(torch.equal(tensor, held[f"strategies.0.critic.{name}"]) for name, tensor in found.items())
    assert critic_auc.area(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])) == 0.75

    real = critic_auc.LatentsDataset(str(sd3_latents)).__getitems__(list(range(16)))["x0"].float()
    own: list[torch.Tensor] = []  # the first conditioning that is asked about is that of the captions

    def knowing(self: object, latents: torch.Tensor, t: object, noise: object, cond: dict) -> torch.Tensor:
        """2 for a real latent with its caption, 1 for a painted one, 0 for a real one with another caption."""
        own.append(cond["pooled"])
        belongs = torch.equal(cond["pooled"], own[0])
        return torch.full((16,), (2.0 if belongs else 0.0) if torch.equal(latents, real) else 1.0)

    monkeypatch.setattr(critic_auc.Critic, "__call__", knowing)
    assert set(critic_auc.areas(last, str(sd3_latents), count=16, seed=0).values()) == {(1.0, 1.0)}


def test_parts_of_the_distance_add_up_and_shares_are_those_read_off() -> None:
    import attributes

    from distill.data.shapes_data import ShapesDataset
    from distill.evaluation.metrics import FidShapes

    images = [ShapesDataset(96, seed=seed).__getitems__(list(range(96)))["pixels"] / 2 + 0.5 for seed in (1, 5)]
    metric = FidShapes()
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    real, painted = attributes.drawn(96), attributes.looked_at(images[1])
    assert sum(attributes.distance(painted[0], real[0])) == pytest.approx(metric.compute().item(), rel=1e-3)
    assert attributes.distance(real[0] + 1.0, real[0])[0] == pytest.approx(64.0)

    moved = real[1].clone()
    moved[:, attributes.shapes.LAYOUT] = 2
    changes = attributes.shifts(moved, real[1])
    assert changes["layout"][2] > 0.3 and sum(changes["layout"]) == pytest.approx(0.0, abs=1e-9)
    assert all(change == 0 for name in ("background", "shape_1") for change in changes[name])
    told = attributes.describe(lambda prompts, seed, batch_size: images[0], real, 96, 0)  # the drawn ones themselves
    assert told.startswith("fid_shapes ") and "alignment 1.0000" in told and "-" not in told.replace("-0.0", "")


def test_results_page_is_what_the_files_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tables

    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.main()
    assert (tmp_path / "docs" / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()


def test_summary_of_collaboration_keeps_the_promise_beside_what_was_spent() -> None:
    import collaboration

    from distill.collaboration.calibration import Calibration

    calibrations = [
        Calibration("", {}, 1, "", 2000, "", [(index + shift) / 100 for index in range(101)]) for shift in (0, 10, 40)
    ]  # half of the images lie below .5, .6 and .9
    row = {"judge": 0.8, "fid_shapes": 200.0, "alignment": 0.9}
    rows: dict[str, Any] = {"way_refine_5": {"budget": 5, "share": 0.5, "teacher_steps": 8}}
    rows |= {f"refine_5_seed_{seed}": {**row, "steps": 4.9 + 0.1 * seed} for seed in (0, 1, 2)}
    rows |= {f"counted_seed_{seed}": [0.1, 0.55, 0.8, 0.95] for seed in (0, 1, 2)}
    found = collaboration.summary(rows, calibrations)["refine_5"]
    assert found["steps"]["mean"] == pytest.approx(5.0)
    assert found["steps"]["half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)  # Student's t of 2 degrees
    assert found["counted_steps"]["mean"] == pytest.approx((3 + 5 + 7) / 3)  # one, two and three of four below
    budget, low, high = found["promised_steps"]
    assert budget == 5 and 4.8 < low < 5 < high < 5.2


def test_a_teacher_alone_asks_no_student_and_students_have_images_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import collaboration
    import torch

    from distill.collaboration.calibration import Calibration

    asked = []

    def seeded(pair: Any, prompts: list[str], seed: int, **call: Any) -> Any:
        asked.append((prompts, seed, call["threshold"]))
        return argparse.Namespace(images=torch.zeros(len(prompts), 3, 32, 32), steps=[5] * len(prompts), scores=[0.0])

    monkeypatch.setattr(collaboration, "seeded", seeded)
    monkeypatch.setattr(collaboration, "fid_of_shapes", lambda images: 1.0)
    pair = argparse.Namespace(calibration=Calibration("", {}, 4, "", 100, "", [i / 100 for i in range(101)]))
    way = {"mode": "regenerate", "teacher_steps": 1, "share": 1.0}  # all that a budget of 5 leaves a student of 4
    assert collaboration.measured(pair, way, 0, 20)["steps"] == 5
    assert collaboration.measured(pair, {**way, "alone": True}, 1, 20)["steps"] == 1
    collaboration.measured(pair, {**way, "share": 0.0}, 0, 20)
    collaboration.measured(pair, {**way, "share": 0.3}, 0, 20)
    assert [limit for *_, limit in asked] == [float("inf"), float("inf"), -float("inf"), pytest.approx(0.3)]
    assert asked[0][0] != asked[1][0] and asked[0][1] + 20 <= asked[1][1]
    for index in (0, 1):
        collaboration.scores(pair, index, 20)
    assert asked[-1][0] != asked[-2][0] and asked[-2][1] + 20 <= asked[-1][1]
    assert collaboration.counted([0.2, 2.0], pair.calibration, way) == 5


@pytest.mark.parametrize("name", ["LADD, SD3 Medium", "ADD, SDXL", "Diffusion2GAN, SD 1.5", "consistency, SD 1.5"])
def test_recipes_at_paper_size_are_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """With small networks in place of those of the released sizes; the command is the same."""
    import full_size

    monkeypatch.setattr(full_size, "said_by", lambda *arguments: forked([*arguments]))  # a start takes no seconds
    case = full_size.CASES[name]
    kind = case["family"].removesuffix("15")
    (tmp_path / case["family"]).symlink_to(request.getfixturevalue(f"{kind}_folder"))
    vit = str(request.getfixturevalue("vit_folder"))
    monkeypatch.setattr(full_size, "vits", lambda folder: (vit, vit))
    monkeypatch.setitem(full_size.CASES, name, case | {"batch": 4, "pixels": 32})
    found = full_size.run(name, tmp_path, steps=4)
    assert "failed" not in found and found["images_per_second"] > 0 and found["peak_memory_GiB"] > 0
    assert found["last_values"]


def test_a_case_at_paper_size_that_fails_is_kept_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd3_folder: Path
) -> None:
    import full_size
    import results

    for module in (full_size, results):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    full_size.keep("before", {"images_per_second": 1.0})
    name = "LADD, SD3 Medium"
    (tmp_path / "sd3").symlink_to(sd3_folder)
    monkeypatch.setitem(full_size.CASES, name, full_size.CASES[name] | {"pixels": 13})
    monkeypatch.setattr(sys, "argv", ["full_size.py", "--cases", name, "--folder", str(tmp_path), "--note", "alone"])
    full_size.main()
    kept = read_json(tmp_path / "full_size.json")["values"]["cases"]
    assert kept["before"]["images_per_second"] == 1.0 and kept["before"]["machine"]["cores"]
    assert "13" in kept[name]["failed"] and kept[name]["note"] == "alone"
