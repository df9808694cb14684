"""Rates of a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from distill.cli import main
from distill.errors import ConfigError
from distill.training import schedules
from tests.runs import fit_arguments

Make = Callable[[Optimizer], LRScheduler]


def warmed_up(optimizer: Optimizer) -> LRScheduler:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 3), CosineAnnealingLR(optimizer, 9)], [3])


def chained(optimizer: Optimizer) -> LRScheduler:
    return ChainedScheduler([LinearLR(optimizer, 0.1, 1.0, 3), ExponentialLR(optimizer, 0.9)])


KINDS: dict[str, Make] = {
    "linear": partial(LinearLR, start_factor=1.0, end_factor=0.1, total_iters=9),
    "cosine": partial(CosineAnnealingLR, T_max=9),
    "exponential": partial(ExponentialLR, gamma=0.9),
    "constant": partial(ConstantLR, factor=0.5, total_iters=4),
    "lambda": partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "cycle": partial(OneCycleLR, max_lr=0.3, total_steps=20),
    "warmed up": warmed_up,
    "chained": chained,
}


def optimizer_of(rate: float = 0.1, **other: Any) -> Optimizer:
    return AdamW([torch.nn.Parameter(torch.ones(2))], lr=rate, **other)


def walked(make: Make, count: int, rate: float = 0.1, **other: Any) -> tuple[Optimizer, LRScheduler]:
    optimizer = optimizer_of(rate, **other)
    schedule = make(optimizer)
    for _ in range(count):
        optimizer.step()
        schedule.step()
    return optimizer, schedule


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_to_the_last_bit(kind: str) -> None:
    """Whatever the checkpoint had, the rate is that of a run which had this recipe from the beginning, and stays so."""
    asked = schedules.settings(optimizer_of())
    straight, schedule = walked(KINDS[kind], 7)
    before: dict[str, Any] = {"betas": (0.5, 0.9), "weight_decay": 0.3}
    other, _ = walked(KINDS["cosine"], 5, 0.02, **before)
    replayed = schedules.replay(other, asked, KINDS[kind], 7, schedules.settings(optimizer_of(0.02, **before)))
    assert replayed is not None and schedules.steps_of(replayed) == schedules.steps_of(schedule) == 7
    for _ in range(3):
        assert schedules.settings(other) == schedules.settings(straight)
        schedules.step(replayed)
        schedule.step()


def test_without_a_schedule_the_rate_is_the_recipes() -> None:
    optimizer, _ = walked(KINDS["linear"], 5)
    assert schedules.replay(optimizer, schedules.settings(optimizer_of(0.02)), None, 5) is None
    assert schedules.settings(optimizer) == schedules.settings(optimizer_of(0.02))


def test_what_an_optimizer_has_learnt_stays() -> None:
    optimizer = optimizer_of()
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(2)
    optimizer.step()
    before = optimizer.state[parameter]["exp_avg"].clone()
    schedules.replay(optimizer, schedules.settings(optimizer_of(0.5)), KINDS["linear"], 3)
    assert optimizer.param_groups[0]["params"] == [parameter]
    assert torch.equal(optimizer.state[parameter]["exp_avg"], before) and before.any()


def test_what_an_optimizer_keeps_among_its_settings_stays() -> None:
    """As those that need no schedule keep their steps and averages; nothing of them is the recipe's to set."""

    def counting(decay: float) -> Optimizer:
        optimizer = optimizer_of(weight_decay=decay)
        optimizer.param_groups[0]["k"] = 0
        return optimizer

    optimizer = counting(0.1)
    optimizer.param_groups[0]["k"] = 5
    schedules.replay(optimizer, schedules.settings(counting(0.2)), None, 5, schedules.settings(counting(0.1)))
    assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["weight_decay"]) == (5, 0.2)
    schedules.replay(optimizer, schedules.settings(counting(0.3)), None, 5)
    assert (optimizer.param_groups[0]["k"], optimizer.param_groups[0]["weight_decay"]) == (5, 0.2), "of what is unknown"


def test_a_schedule_that_ends_before_gets_a_sentence() -> None:
    with pytest.raises(ConfigError, match="schedule has come to its end"):
        schedules.replay(optimizer_of(), schedules.settings(optimizer_of()), KINDS["cycle"], 30)


def test_changes_are_told_by_name() -> None:
    before, now = optimizer_of(), SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert schedules.changes(schedules.settings(before), schedules.settings(before)) == []
    assert schedules.changes(schedules.settings(optimizer_of(0.2)), schedules.settings(before)) == [
        "lr 0.1 (in the checkpoint 0.2)"
    ]
    assert schedules.changes(schedules.settings(before), schedules.settings(now)) == [
        "weight_decay 0 (in the checkpoint 0.01)"
    ]


def test_a_run_goes_on_at_the_rates_of_the_recipe(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    """And at those of the checkpoint where the recipe is the same."""

    def fit(steps: int, **options: Any) -> list[dict[str, Any]]:
        given = {"trainer__max_steps": steps, "ckpt_path": "last", "data__batch_size": 4} | options
        main(fit_arguments("tiny_ladd.yaml", sd3_folder, sd3_latents, tmp_path, **given))
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
        return [optimizer["param_groups"][0] for optimizer in saved["optimizer_states"]]

    linear = "torch.optim.lr_scheduler.LinearLR"
    schedule = {"model__student_schedule": linear, "model__student_schedule__start_factor": 1.0,
                "model__student_schedule__end_factor": 0.0, "model__student_schedule__total_iters": 4}  # fmt: skip
    rates = {"model__student_optimizer__lr": 1e-3, "model__critic_optimizer__lr": 1e-3}
    constant = {"model__critic_schedule": "null"}
    student, critic = fit(1, **schedule, **rates, **constant)
    assert (student["lr"], critic["lr"]) == (pytest.approx(0.75e-3), 1e-3)
    lower = {"model__student_optimizer__lr": 1e-5, "model__critic_optimizer__lr": 1e-4}
    changed = {**schedule, **lower, **constant, "model__critic_optimizer__weight_decay": 0.5}
    with pytest.warns(UserWarning, match="the student's optimizer goes on with lr 7.5.*e-06 .in the checkpoint 0.0007"):
        student, critic = fit(2, **changed)
    assert (student["lr"], critic["lr"], critic["weight_decay"]) == (pytest.approx(0.5e-5), 1e-4, 0.5)
    longer = {**changed, "model__student_schedule__total_iters": 8}
    student, _ = fit(3, **longer)
    assert student["lr"] == pytest.approx(5 / 8 * 1e-5)
    critics = {name.replace("student", "critic"): value for name, value in schedule.items()}
    student, critic = fit(4, **{**longer, **critics, "model__critic_schedule__total_iters": 16})
    assert (student["lr"], critic["lr"]) == (pytest.approx(4 / 8 * 1e-5), pytest.approx(12 / 16 * 1e-4))
    cycle = {"model__student_schedule": "torch.optim.lr_scheduler.CyclicLR", "model__student_schedule__base_lr": 1e-6,
             "model__student_schedule__max_lr": 2e-6, "model__student_schedule__step_size_up": 10,
             "model__student_schedule__cycle_momentum": False}  # fmt: skip
    student, _ = fit(5, **lower, **cycle)  # a class that could not read the earlier one's state
    assert student["lr"] == pytest.approx(1.5e-6)
