"""The training step: turns, steps that count, failures that do not, and what a run keeps."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from distill.batch import Sample
from distill.data.latents import LatentsData
from distill.data.shapes_data import ShapesData
from distill.diffusion.levels import Discrete
from distill.errors import ConfigError
from distill.strategies import LatentAdversarial, NoisedData, PixelAdversarial, ScoreDistillation, Strategy
from distill.training.callbacks import Checkpoint
from distill.training.module import DistillModule
from tests import tiny
from tests.runs import ROOT


class Pull(Strategy):
    """Pulls the answer towards zero; a critic that learns the answer's mean; NaN on demand."""

    def __init__(self, weight: float = 1.0, poisoned: tuple[int, ...] = ()):
        super().__init__(weight)
        self.poisoned, self.calls = poisoned, 0

    def configure(self, backbone: Any, teacher: Any) -> None:
        self.critic = nn.Linear(1, 1)

    def student_loss(self, sample: Any, batch: Any, step: int) -> Tensor:
        self.calls += 1
        poison = float("nan") if self.calls in self.poisoned else 1.0
        return sample.x0.square().mean() * poison

    def critic_loss(self, sample: Any, batch: Any, step: int) -> dict[str, Tensor]:
        assert self.critic is not None
        return {"fit": (self.critic(sample.x0.detach().mean().view(1, 1)) - 1).square().sum()}


def module(teacher: Path, strategies: list[Strategy], **options: Any) -> DistillModule:
    return DistillModule(
        str(teacher),
        strategies,
        NoisedData(Discrete([1.0, 0.5])),
        student_optimizer=lambda p: torch.optim.SGD(p, 0.1),
        critic_optimizer=lambda p: torch.optim.SGD(p, 0.1),
        **options,
    )


def fit(model: DistillModule, latents: Path, steps: int, callbacks: list[L.Callback] | None = None, **options: Any):
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, callbacks=callbacks, **options,
    )  # fmt: skip
    data = LatentsData(str(latents), model.teacher_name, batch_size=8)
    trainer.fit(model, data)
    return trainer


class Watch(L.Callback):
    """Keeps what each batch left."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, model: Any, *_: Any) -> None:
        row = {name: value.item() for name, value in trainer.callback_metrics.items()}
        weights = torch.cat([p.detach().flatten() for p in model.student.parameters()])
        average = torch.cat([p.flatten() for p in model.ema.parameters()]) if model.ema else None
        self.rows.append(row | {"step": trainer.global_step, "student": weights.clone(), "ema": average})


class AsksTarget(Pull):
    """Keeps what the target network answers, and the student there."""

    def student_loss(self, sample: Any, batch: Any, step: int) -> Tensor:
        self.target, self.student = sample.target(sample.x_t, sample.t, batch.cond), sample.x0.detach()
        assert not self.target.requires_grad
        return super().student_loss(sample, batch, step)


def test_target_is_a_moving_average_of_its_own_or_the_student(sd3_folder: Path, sd3_latents: Path) -> None:
    alone, averaged = AsksTarget(), AsksTarget()
    fit(module(sd3_folder, [alone]), sd3_latents, 2)
    torch.testing.assert_close(alone.target, alone.student)
    model = module(sd3_folder, [averaged], ema=0.02, target_ema=0.01)
    watch = Watch()
    fit(model, sd3_latents, 3, [watch])
    assert not torch.allclose(averaged.target, averaged.student)
    assert model.target is not None and model.ema is not None
    flat = torch.cat([p.detach().flatten() for p in model.target.parameters()])
    first = torch.cat([p.flatten() for p in model.backbone.denoiser().parameters()])
    expected = first.detach()
    for row in watch.rows:
        expected = 0.01 * expected + 0.99 * row["student"]
    torch.testing.assert_close(flat, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(flat, watch.rows[-1]["ema"], atol=1e-7)


@pytest.mark.parametrize(("accumulate", "critic_updates"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_steps_are_student_updates(accumulate: int, critic_updates: int, sd3_folder: Path, sd3_latents: Path) -> None:
    watch = Watch()
    model = module(sd3_folder, [Pull()], accumulate=accumulate, critic_updates=critic_updates)
    trainer = fit(model, sd3_latents, 3, [watch])
    batches = accumulate * critic_updates
    assert trainer.global_step == 3
    assert [row["step"] for row in watch.rows] == [i // batches for i in range(1, 3 * batches + 1)]


def test_checkpoints_are_named_by_their_own_step(sd3_folder: Path, sd3_latents: Path, tmp_path: Path) -> None:
    keep = Checkpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    trainer = L.Trainer(
        max_steps=3, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=2, callbacks=[keep],
    )  # fmt: skip
    trainer.fit(module(sd3_folder, [Pull()]), LatentsData(str(sd3_latents), str(sd3_folder), batch_size=8))
    assert [file.name for file in tmp_path.iterdir()] == ["epoch=0-step=3.ckpt"]


def test_accumulated_batches_are_one_larger_batch(sd3_folder: Path, sd3_latents: Path) -> None:
    """Two batches of 8 move the student as their mean gradient does."""

    class Fixed(NoisedData):
        def __call__(self, batch: Any, process: Any, step: int) -> tuple[Tensor, Tensor]:
            return torch.ones_like(batch.x0), torch.full((len(batch.x0),), 0.5)

    watched = []
    for accumulate in (1, 2):
        watch = Watch()
        model = module(sd3_folder, [Pull()], accumulate=accumulate, student_clip=None)
        model.inputs = Fixed(Discrete([1.0]))
        model.encode = lambda raw, encode=model.encode: _same_prompts(encode, raw)  # type: ignore[method-assign]
        fit(model, sd3_latents, 1, [watch])
        watched.append(watch.rows[-1]["student"])
    assert torch.allclose(watched[0], watched[1], atol=1e-7)


@pytest.mark.parametrize("critic_updates", [1, 2])
def test_an_update_of_several_batches_loses_none_where_an_epoch_ends(
    critic_updates: int, sd3_folder: Path, sd3_latents: Path
) -> None:
    """Lightning empties gradients before every validation, and there is one, of nothing, at every epoch's end."""

    class Ones(Pull):
        """Every batch moves the critic's weight by a gradient of 1."""

        def critic_loss(self, sample: Any, batch: Any, step: int) -> dict[str, Tensor]:
            assert self.critic is not None
            return {"one": self.critic.weight.sum()}

    model = module(sd3_folder, [Ones()], accumulate=3, critic_updates=critic_updates, student_clip=None)
    model.configure_model()
    before = model.critics[0].weight.item()  # type: ignore[union-attr]
    trainer = L.Trainer(
        max_steps=5, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_train_batches=4,
    )  # fmt: skip
    trainer.fit(model, LatentsData(str(sd3_latents), model.teacher_name, batch_size=8))
    assert trainer.current_epoch > 2
    moved = before - model.critics[0].weight.item()  # type: ignore[union-attr]
    assert moved == pytest.approx(5 * critic_updates * 0.1, rel=1e-4)


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [1, 2]), (3, [0, 0, 0, 1, 1, 1])])
def test_all_batches_of_an_update_meet_the_same_critic(
    accumulate: int, expected: list[int], sd3_folder: Path, sd3_latents: Path
) -> None:
    class Met(Pull):
        def configure(self, backbone: Any, teacher: Any) -> None:
            self.critic = nn.Linear(1, 1)
            nn.init.zeros_(self.critic.weight)
            self.met: list[int] = []

        def student_loss(self, sample: Any, batch: Any, step: int) -> Tensor:
            self.met.append(round(self.critic.weight.item() * -10))  # type: ignore[union-attr]
            return super().student_loss(sample, batch, step)

        def critic_loss(self, sample: Any, batch: Any, step: int) -> dict[str, Tensor]:
            return {"one": self.critic.weight.sum()}  # type: ignore[union-attr]

    strategy = Met()
    fit(module(sd3_folder, [strategy], accumulate=accumulate), sd3_latents, 2)
    assert strategy.met == expected


def test_a_lazy_penalty_counts_the_critics_own_updates(sd3_folder: Path, sd3_latents: Path) -> None:
    class Counts(Pull):
        def critic_loss(self, sample: Any, batch: Any, step: int) -> dict[str, Tensor]:
            steps.append(step)
            return super().critic_loss(sample, batch, step)

    steps: list[int] = []
    fit(module(sd3_folder, [Counts()], accumulate=2, critic_updates=3), sd3_latents, 2)
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_two_terms_of_a_kind_draw_numbers_of_their_own(sd3_folder: Path, sd3_latents: Path) -> None:
    class Draw(Pull):
        def student_loss(self, sample: Any, batch: Any, step: int) -> Tensor:
            self.drawn = batch.draws.uniform("pull/t")
            self.made = batch.once("pull/made", lambda: self.drawn.clone())
            return super().student_loss(sample, batch, step)

    one, other, alone = Draw(), Draw(), Draw()
    fit(module(sd3_folder, [one, other]), sd3_latents, 1)
    assert not torch.isclose(one.drawn, other.drawn).any() and not torch.isclose(one.made, other.made).any()
    fit(module(sd3_folder, [alone]), sd3_latents, 1)
    assert alone.drawn.tolist() not in (one.drawn.tolist(), other.drawn.tolist())


def test_more_updates_of_a_critic_need_one(sd3_folder: Path) -> None:
    class Alone(Strategy):
        """Has none."""

    with pytest.raises(ConfigError, match="critic_updates=2 asks for more updates of a critic, and none of"):
        module(sd3_folder, [Alone()], critic_updates=2)


@pytest.mark.parametrize("changed", ["teacher", "schedule"])
def test_a_run_is_not_gone_on_with_under_another_teacher_or_schedule(
    changed: str, sd_folder: Path, tmp_path: Path
) -> None:
    teacher, schedule = tmp_path / "moved", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    copytree(sd_folder, teacher)
    model = module(sd_folder, [Pull()])
    checkpoint: dict[str, Any] = {}
    model._trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=3, datamodule=None, strategy=None, optimizers=[], lr_scheduler_configs=[]
    )
    model.on_save_checkpoint(checkpoint)
    module(teacher, [Pull()]).on_load_checkpoint(checkpoint)  # the same in another place
    if changed == "teacher":
        config = teacher / "unet" / "config.json"
        config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": 16'))
    other = module(teacher, [Pull()], schedule=schedule if changed == "schedule" else None)
    sentence = {
        "teacher": "with the teacher sd@.*, and model.teacher is moved@",
        "schedule": "with model.schedule={}, ",
    }
    with pytest.raises(ConfigError, match=sentence[changed]):
        other.on_load_checkpoint(checkpoint)


def test_teachers_on_the_hub_are_compared_by_name(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module(sd_folder, [Pull()])
    of_folder = model.backbone.fingerprint
    about: dict[str, Any] = {"strategies": ["Pull"], "averages": ["ema"], "schedule": {}}
    monkeypatch.setattr(type(model.backbone), "fingerprint", "org/model-b")
    model.on_load_checkpoint({"distill": about | {"fingerprint": "org/model-b"}})
    with pytest.raises(ConfigError, match="with the teacher org/model-a, and model.teacher is org/model-b"):
        model.on_load_checkpoint({"distill": about | {"fingerprint": "org/model-a"}})
    with pytest.warns(UserWarning, match="cannot be told"):
        model.on_load_checkpoint({"distill": about | {"fingerprint": of_folder}})


@pytest.mark.parametrize(("accumulate", "critic_updates", "last"), [(3, 1, 5), (3, 1, 6), (2, 2, 7), (1, 3, 5)])
def test_an_update_that_a_run_ended_amid_begins_anew(
    accumulate: int, critic_updates: int, last: int, sd3_folder: Path, sd3_latents: Path, tmp_path: Path
) -> None:
    """Every batch moves the critic's weight by a gradient of 1, so its way counts the batches of its updates."""

    class Ones(Pull):
        def critic_loss(self, sample: Any, batch: Any, step: int) -> dict[str, Tensor]:
            return {"one": self.critic.weight.sum()}  # type: ignore[union-attr]

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[float, int]:
        model = module(sd3_folder, [Ones()], accumulate=accumulate, critic_updates=critic_updates, student_clip=None)
        model.configure_model()
        before = model.critics[0].weight.item()  # type: ignore[union-attr]
        trainer = L.Trainer(
            max_steps=3 if ckpt_path else -1, max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, limit_train_batches=last,
            callbacks=[Checkpoint(tmp_path, every_n_train_steps=100, save_last=True)],
        )  # fmt: skip
        trainer.fit(model, LatentsData(str(sd3_latents), model.teacher_name, batch_size=8), ckpt_path=ckpt_path)
        return before - model.critics[0].weight.item(), trainer.fit_loop.total_batch_idx + 1  # type: ignore[union-attr]

    run(1)
    moved, batches = run(-1, tmp_path / "last.ckpt")
    lost = last % accumulate
    assert moved == pytest.approx(3 * critic_updates * 0.1, rel=1e-4)
    assert batches == 3 * accumulate * critic_updates + lost


def test_a_run_that_logs_nothing_runs(sd3_folder: Path, sd3_latents: Path) -> None:
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, log_every_n_steps=0,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module(sd3_folder, [Pull()]), LatentsData(str(sd3_latents), str(sd3_folder), batch_size=8))
    assert trainer.global_step == 2


def _same_prompts(encode: Any, raw: dict[str, Any]) -> Any:
    return encode({**raw, "prompts": ["a red ring"] * len(raw["prompts"])})


def test_every_student_parameter_that_matters_gets_a_gradient_and_critics_get_none_in_its_turn(
    sd3_folder: Path, sd3_latents: Path
) -> None:
    seen: dict[str, Any] = {}

    class Spy(DistillModule):
        def _update(self, player: int, parameters: list[nn.Parameter]) -> bool:
            assert self.student is not None
            critics = [p.grad is not None for critic in self.critics for p in critic.parameters()]
            student = [p.grad is not None for p in self.student.parameters()]
            seen[("student", "critic")[player]] = (student, critics)
            return super()._update(player, parameters)

    model = Spy(
        str(sd3_folder), [LatentAdversarial()], NoisedData(Discrete([1.0, 0.5])),
        student_optimizer=torch.optim.SGD, critic_optimizer=torch.optim.SGD,
    )  # fmt: skip
    fit(model, sd3_latents, 1)
    assert all(seen["student"][0]) and not any(seen["student"][1])
    assert not any(seen["critic"][0]) and all(seen["critic"][1])


def test_not_finite_update_is_skipped_and_counted(sd3_folder: Path, sd3_latents: Path) -> None:
    watch = Watch()
    trainer = fit(module(sd3_folder, [Pull(poisoned=(2,))]), sd3_latents, 3, [watch])
    first, second, third, fourth = watch.rows
    assert torch.equal(first["student"], second["student"]) and torch.equal(first["ema"], second["ema"])
    assert not torch.equal(second["student"], third["student"])
    assert trainer.global_step == 3 and [row["step"] for row in watch.rows] == [1, 1, 2, 3]
    assert second["skipped_updates"] == 1 and fourth["student"].isfinite().all()


def test_run_stops_with_advice_after_too_many_in_a_row(sd3_folder: Path, sd3_latents: Path) -> None:
    model = module(sd3_folder, [Pull(poisoned=tuple(range(2, 99)))], patience=3)
    with pytest.raises(ConfigError, match="3 updates of the student in a row .* lower the learning rates"):
        fit(model, sd3_latents, 50)
    assert int(model.skipped[0]) == 3


def test_moving_average_follows_the_student(sd3_folder: Path, sd3_latents: Path) -> None:
    watch = Watch()
    fit(module(sd3_folder, [Pull()], ema=0.9), sd3_latents, 4, [watch])
    average = watch.rows[0]["ema"]
    for step, row in enumerate(watch.rows[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * row["student"]
        assert torch.allclose(row["ema"], average, atol=1e-6)


def test_student_may_begin_at_random_weights(sd3_folder: Path) -> None:
    def weights(**options: Any) -> dict[str, Tensor]:
        model = module(sd3_folder, [Pull()], **options)
        model.configure_model()
        assert model.student is not None and model.ema is not None
        for ours, average in zip(model.student.parameters(), model.ema.parameters(), strict=True):
            assert torch.equal(ours, average), "the average begins elsewhere"
        return {name: tensor for name, tensor in model.student.named_parameters()}

    taught, first, again, other = weights(), *(weights(student_init="random", seed=seed) for seed in (1, 1, 2))
    name = "network.transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name]) and not torch.equal(first[name], taught[name])
    with pytest.raises(
        ConfigError, match="student_init=zero is neither teacher nor random, and there is no checkpoint"
    ):
        module(sd3_folder, [Pull()], student_init="zero")


def test_student_is_asked_once_per_batch(sd3_folder: Path, sd3_latents: Path) -> None:
    calls = []

    class Count(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, model: Any) -> None:
            model.student.register_forward_hook(lambda *_: calls.append("student"))
            model.teacher.network.register_forward_hook(lambda *_: calls.append("teacher"))

    fit(module(sd3_folder, [LatentAdversarial()]), sd3_latents, 2, [Count()])
    assert calls == ["student", "teacher", "teacher"] * 2


def test_both_terms_of_add_share_one_pass_of_the_decoder_there_and_back(sd_folder: Path, vit_folder: Path) -> None:
    """Per step: once forward with a graph, once backward; and once without a graph for the teacher's target."""
    terms: list[Strategy] = [PixelAdversarial(vision=str(vit_folder), image=None), ScoreDistillation()]
    model = module(sd_folder, terms)
    passes = {"with a graph": 0, "without": 0, "backward": 0}
    decode = model.autoencoder.network.decode

    def counted(latents: Tensor) -> Tensor:
        pictures = decode(latents)
        passes["with a graph" if pictures.requires_grad else "without"] += 1
        if pictures.requires_grad:
            pictures.register_hook(lambda _: passes.update(backward=passes["backward"] + 1))
        return pictures

    model.autoencoder.network.forward = counted
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, ShapesData(batch_size=4))
    assert passes == {"with a graph": 2, "without": 2, "backward": 2}


@pytest.mark.parametrize("family", ["sd_folder", "sd3_folder"])
def test_networks_begin_on_the_cpu_whatever_device_is_the_default(
    family: str, vit_folder: Path, request: pytest.FixtureRequest
) -> None:
    """Lightning makes a GPU the default device while it builds them; `meta` shows here what would land there."""
    terms: list[Strategy] = [LatentAdversarial(), PixelAdversarial(vision=str(vit_folder), image=None)]
    model = module(request.getfixturevalue(family), [*terms, ScoreDistillation()])
    with torch.device("meta"):
        model.configure_model()
        on_meta = torch.empty(0).device.type
    assert on_meta == "meta"
    assert model.student is not None
    networks = [model, model.teacher.network, model.text_encoder.network, model.student]
    tensors = [tensor for network in networks for tensor in [*network.parameters(), *network.buffers()]]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    answer = model.student(
        torch.zeros(1, *model.backbone.latent_shape(None, None)), torch.ones(1), model.conditioning(["a"])
    )
    assert answer.device.type == "cpu"


def test_torchs_own_numbers_are_others_on_each_process_and_after_a_resume(sd3_folder: Path) -> None:
    def drawn(rank: int, step: int) -> Tensor:
        model = module(sd3_folder, [Pull()], ema=None)
        torch.manual_seed(7)
        model.configure_model()
        beside = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(beside, torch.rand(3)), "building the networks leaves them as they were"
        model._trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank,
            global_step=step,
            strategy=None,
            fit_loop=SimpleNamespace(total_batch_idx=-1),
            optimizers=[],
            lr_scheduler_configs=[],
        )
        model.on_train_start()
        return torch.rand(3)

    assert torch.equal(drawn(0, 0), drawn(0, 0))
    assert not torch.equal(drawn(0, 0), drawn(1, 0)) and not torch.equal(drawn(0, 0), drawn(0, 5))


def test_a_prompt_that_stays_is_encoded_once(sd3_folder: Path) -> None:
    """The empty one of guidance costs as much as the batch's own with the text encoders of SD3, and never changes."""
    model = module(sd3_folder, [Pull()], ema=None)
    model.configure_model()
    asked: list[list[str]] = []
    model.text_encoder.network.register_forward_pre_hook(lambda _, given: asked.append(*given))
    first, again = model.constant(""), model.constant("")
    assert asked == [[""]]
    for name, tensor in model.conditioning(["", "a red ring"]).items():
        assert torch.equal(first[name], again[name])
        torch.testing.assert_close(first[name], tensor[:1], atol=1e-5, rtol=0)
    batch = tiny.batch(3)
    batch.constant = model.constant
    assert {len(tensor) for tensor in batch.cond_of("").values()} == {3}


def test_checkpointing_reaches_the_decoder(sd_folder: Path) -> None:
    """Whose graph is the largest: kept for the backward pass are less values, and the gradient is the same."""
    kept, gradients = [], []
    for checkpoint in (False, True):
        model = module(sd_folder, [Pull()], checkpoint=checkpoint)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            pictures = model._decode(latents)
        kept.append(count)
        gradients.append(torch.autograd.grad(pictures.square().mean(), latents)[0])
    assert kept[1] < kept[0] / 2
    torch.testing.assert_close(gradients[0], gradients[1])


def test_terms_are_weighted_and_named(sd3_folder: Path, sd3_latents: Path) -> None:
    watch = Watch()
    fit(module(sd3_folder, [Pull(weight=1.0), Pull(weight=3.0)]), sd3_latents, 1, [watch])
    row = watch.rows[0]
    assert row["gradient_at_sample/Pull_1"] == pytest.approx(3 * row["gradient_at_sample/Pull_0"], rel=1e-5)
    assert row["student/Pull_0"] == pytest.approx(row["student/Pull_1"], rel=1e-6)


class PullPixels(Pull):
    """As `Pull`, from the decoded picture."""

    def student_loss(self, sample: Any, batch: Any, step: int) -> Tensor:
        return sample.pixels.square().mean()


@pytest.mark.parametrize("kind", [Pull, PullPixels])
def test_balanced_term_pulls_as_hard_as_the_others_together(
    kind: type[Pull], sd3_folder: Path, sd3_latents: Path
) -> None:
    """At the latent, wherever the term is computed; listed first, it still follows the others."""
    watch = Watch()
    model = module(sd3_folder, [kind(weight="balanced"), Pull(weight=2.0), PullPixels(weight=0.5)])  # type: ignore[arg-type]
    fit(model, sd3_latents, 3, [watch])
    own, others = model.lengths[0].tolist()
    name = f"{kind.__name__}_0" if kind is Pull else "PullPixels_0"
    assert watch.rows[-1][f"weight/{name}"] == pytest.approx(others / own, rel=1e-5)
    assert model.lengths[1:].abs().sum() == 0, "terms with a number need no average"
    if kind is Pull:  # the fixed terms' sum at the latent, against the lengths seen at the leaves
        first = watch.rows[0]
        assert first["gradient_at_sample/Pull_0"] == pytest.approx(others, rel=0.05)


def test_balance_is_a_moving_average_that_starts_at_once_and_passes_over_what_is_not_finite(
    sd3_folder: Path, sd3_latents: Path
) -> None:
    model = module(sd3_folder, [Pull(weight="balanced"), Pull(weight=1.0)])  # type: ignore[arg-type]
    sample = Sample(torch.zeros(1, 1, 1, 2, requires_grad=True), torch.zeros(1), torch.zeros(1), lambda x: x)

    def balance(own: float, other: float) -> float:
        sample.gathered = {"x0": torch.tensor([[[[other, 0.0]]]])}
        return float(model._balance(0, sample, {"x0": torch.tensor([[[[0.0, own]]]])}, sample.gathered))

    assert balance(2.0, 6.0) == pytest.approx(3.0)
    assert balance(float("nan"), 6.0) == pytest.approx(3.0)
    assert balance(4.0, 6.0) == pytest.approx(6.0 / 2.02)
    model.strategies[0].balance = 0.1
    assert balance(2.02, 6.0) == pytest.approx(0.1 * 6.0 / 2.02)


def test_balance_needs_a_term_with_a_number(sd3_folder: Path) -> None:
    with pytest.raises(ConfigError, match="follows the terms whose weight is a number, and there is none"):
        module(sd3_folder, [Pull(weight="balanced")])  # type: ignore[arg-type]


def late(strategy: Strategy) -> Strategy:
    strategy.begins = 2
    return strategy


def test_term_that_begins_later_trains_its_critic_from_the_start(sd3_folder: Path, sd3_latents: Path) -> None:
    watch = Watch()
    fit(module(sd3_folder, [Pull(), late(LatentAdversarial())]), sd3_latents, 4, [watch])
    assert ["student/LatentAdversarial" in row for row in watch.rows] == [False, False, True, True]
    assert all("critic/LatentAdversarial/game" in row and "student/Pull" in row for row in watch.rows)


def test_balance_of_a_late_term_is_of_what_it_sees_once_it_begins(sd3_folder: Path, sd3_latents: Path) -> None:
    watch = Watch()
    model = module(sd3_folder, [Pull(), late(Pull(weight="balanced"))])  # type: ignore[arg-type]
    fit(model, sd3_latents, 2, [watch])
    assert model.lengths.abs().sum() == 0
    fit(model, sd3_latents, 3, [watch])
    own, others = model.lengths[1].tolist()
    assert own > 0 and watch.rows[-1]["weight/Pull_1"] == pytest.approx(others / own, rel=1e-5)


def test_some_term_trains_the_student_from_the_start(sd3_folder: Path) -> None:
    for first in (late(Pull()), Pull(weight="balanced")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="leave none with a number as its weight to train the student from u"):
            module(sd3_folder, [first, late(Pull())])
    with pytest.raises(ConfigError, match="begins at an update of the student, 0 or later, got begins=-1"):
        Strategy(begins=-1)


def test_page_about_strategies_is_true(
    sd3_folder: Path, sd3_latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategy the docs show trains from YAML by its import path, in 40 lines or fewer."""
    import re

    from distill.cli import main
    from tests.runs import checkpoint, fit_arguments, logged

    page = (ROOT / "docs" / "write_a_strategy.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    recipe = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert code and recipe and len(code[1].splitlines()) <= 40
    (tmp_path / "my_strategy.py").write_text(code[1])
    (tmp_path / "mine.yaml").write_text(recipe[1])
    monkeypatch.syspath_prepend(tmp_path)
    arguments = fit_arguments("tiny_ladd.yaml", sd3_folder, sd3_latents, tmp_path / "run")
    main([*arguments[:3], "--config", str(tmp_path / "mine.yaml"), *arguments[3:]])
    assert checkpoint(tmp_path / "run")["distill"]["strategies"] == ["FeatureMatching", "LatentAdversarial"]
    assert all(value > 0 for value in logged(tmp_path / "run")["student/FeatureMatching"])


def test_a_strategy_that_runs_out_of_something_does_not_end_the_epoch(sd3_folder: Path, sd3_latents: Path) -> None:
    """Lightning would begin another one, again and again."""

    class Empty(Pull):
        def student_loss(self, sample: Any, batch: Any, step: int) -> Tensor:
            return next(iter([]))

    with pytest.raises(RuntimeError, match="a StopIteration came out of a strategy"):
        fit(module(sd3_folder, [Empty()]), sd3_latents, 2)


def test_weights_without_a_gradient_are_refused_where_they_are_sharded(
    sd3_folder: Path, sd3_latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spare(Pull):
        def configure(self, backbone: Any, teacher: Any) -> None:
            self.critic = nn.ModuleDict({"read": nn.Linear(1, 1), "spare": nn.Linear(1, 1)})

        def critic_loss(self, sample: Any, batch: Any, step: int) -> dict[str, Tensor]:
            return {"fit": self.critic["read"](sample.x0.detach().mean().view(1, 1)).square().sum()}  # type: ignore[index]

    fit(module(sd3_folder, [Spare()]), sd3_latents, 1)
    update = DistillModule._update

    def sharded(self: DistillModule, player: int, parameters: list[nn.Parameter]) -> bool:
        self._check_reached(parameters)
        return update(self, player, parameters)

    monkeypatch.setattr(DistillModule, "_update", sharded)
    fit(module(sd3_folder, [Pull()]), sd3_latents, 1)
    with pytest.raises(ConfigError, match=r"2 weights .* got no gradient, such as strategies.0.critic.spare"):
        fit(module(sd3_folder, [Spare()]), sd3_latents, 1)


def test_terms_that_balance_follow_the_numbers_alone(sd3_folder: Path, sd3_latents: Path) -> None:
    """Not each other."""
    watch, terms = Watch(), [Pull(weight="balanced"), Pull(weight=1.0), Pull(weight="balanced")]  # type: ignore[arg-type]
    fit(module(sd3_folder, terms), sd3_latents, 1, [watch])  # type: ignore[arg-type]
    pulls = [watch.rows[-1][f"gradient_at_sample/Pull_{index}"] for index in range(3)]
    assert pulls == pytest.approx([pulls[1]] * 3)


def test_schedule_that_has_an_end_says_so(sd3_folder: Path, sd3_latents: Path) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=2)

    fit(module(sd3_folder, [Pull()], student_schedule=schedule), sd3_latents, 2)
    with pytest.raises(ConfigError, match=r"has come to its end \(Tried to step 3 times.*\); give it as many steps as"):
        fit(module(sd3_folder, [Pull()], student_schedule=schedule), sd3_latents, 3)


def test_other_averages_than_a_run_kept_are_refused(sd3_folder: Path) -> None:
    model = module(sd3_folder, [Pull()], ema=None, target_ema=0.9)
    with pytest.raises(ConfigError, match="keeps the moving averages ema, this recipe target; go on with the same"):
        model.on_load_checkpoint({"distill": {"strategies": ["Pull"], "averages": ["ema"]}})
    model.on_load_checkpoint({"distill": {"strategies": ["Pull"], "averages": ["target"]}})


def test_answers_that_are_alike_have_no_spread(
    sd3_folder: Path, sd3_latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, model = Watch(), module(sd3_folder, [Pull()])
    fit(model, sd3_latents, 1, [watch])
    assert watch.rows[-1]["student/spread"] > 0.01
    ask = model.ask

    def alike(batch: Any, step: int) -> Sample:
        sample = ask(batch, step)
        one = sample.answer.mean(0, keepdim=True).expand_as(sample.answer)
        return Sample(one, sample.x_t, sample.t, model._decode)

    monkeypatch.setattr(model, "ask", alike)
    fit(model, sd3_latents, 2, [watch])
    assert watch.rows[-1]["student/spread"] < 1e-4


@pytest.mark.parametrize(("accumulate", "critic_updates"), [(2, 1), (1, 3), (2, 2)])
def test_averages_move_with_the_student_alone(
    accumulate: int, critic_updates: int, sd3_folder: Path, sd3_latents: Path
) -> None:
    """Neither in batches that critics alone learn from nor amid an update."""
    watch, batches = Watch(), accumulate * critic_updates
    terms: list[Strategy] = [Pull()]
    model = module(sd3_folder, terms, ema=0.9, target_ema=0.05, accumulate=accumulate, critic_updates=critic_updates)
    fit(model, sd3_latents, 3, [watch])
    assert model.target is not None
    first = torch.cat([p.detach().flatten() for p in model.backbone.denoiser().parameters()])
    average = target = first
    for number, row in enumerate(watch.rows):
        if (number + 1) % batches == 0:
            step = number // batches
            average = average.lerp(row["student"], 1 - min(0.9, (1 + step) / (10 + step)))
            target = target.lerp(row["student"], 0.95)
        torch.testing.assert_close(row["ema"], average, atol=1e-7, rtol=1e-6)
    assert not torch.allclose(average, first, atol=1e-5)
    found = torch.cat([p.flatten() for p in model.target.parameters()])
    torch.testing.assert_close(found, target, atol=1e-7, rtol=1e-6)


def test_further_updates_of_critics_ask_for_nothing_of_the_students_turn(sd3_folder: Path, sd3_latents: Path) -> None:
    calls: list[str] = []

    class Count(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, model: Any) -> None:
            model.student.register_forward_hook(lambda *_: calls.append("student"))
            model.teacher.network.register_forward_hook(lambda *_: calls.append("teacher"))

    terms: list[Strategy] = [LatentAdversarial(), ScoreDistillation(space="latents")]
    fit(module(sd3_folder, terms, critic_updates=3), sd3_latents, 2, [Count()])
    assert calls == (["student", "teacher"] * 3 + ["teacher"] * 2) * 2


def test_teacher_is_kept_in_the_precision_asked_for(sd3_folder: Path) -> None:
    model = module(sd3_folder, [Pull()], teacher_dtype="bfloat16")
    model.configure_model()
    assert model.student is not None and model.ema is not None
    for network in (model.teacher.network, model.text_encoder.network):
        assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    for network in (model.student, model.ema):
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("given", [None, 3])
def test_the_seed_is_that_of_everything_unless_it_is_given(
    given: int | None, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or runs of several seeds would be one run several times."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert module(sd3_folder, [Pull()], seed=given).seed == (given or 7)


@pytest.mark.parametrize(("given", "goes_on"), [(None, 7), (3, 3)])
def test_a_run_goes_on_with_its_own_numbers(
    given: int | None, goes_on: int, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is the seed of everything now; those of a run of before that were 0."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    for about, expected in (({"seed": 7}, goes_on), ({}, given or 0)):
        model = module(sd3_folder, [Pull()], seed=given)
        about |= {"fingerprint": model.backbone.fingerprint, "strategies": ["Pull"], "averages": model._kept()}
        model.on_load_checkpoint({"distill": about})
        assert model.seed == expected


def test_what_else_the_data_holds_reaches_strategies(
    sd3_folder: Path, sd3_latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Looks(Pull):
        def student_loss(self, sample: Any, batch: Any, step: int) -> Tensor:
            seen.append(batch.others)
            return super().student_loss(sample, batch, step)

    model = module(sd3_folder, [Looks()])
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda raw: encode({**raw, "mask": torch.ones(len(raw["prompts"]))}))
    fit(model, sd3_latents, 1)
    assert set(seen[0]) == {"mask"}


def test_a_scheduler_that_says_another_thing_is_not_gone_on_with(sd_folder: Path, tmp_path: Path) -> None:
    teacher = Path(copytree(sd_folder, tmp_path / "sd"))
    model, checkpoint = module(teacher, [Pull()]), {}
    model.configure_model()
    about = {"fingerprint": model.backbone.fingerprint, "strategies": ["Pull"], "schedule": {}, "lora": None,
             "averages": model._kept(), "process": model.backbone.process().facts}  # fmt: skip
    checkpoint = {"distill": about}
    model.on_load_checkpoint(dict(checkpoint))
    file = teacher / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(ConfigError, match="of a network of epsilon .*, and the scheduler .* now says v_prediction"):
        module(teacher, [Pull()]).on_load_checkpoint(dict(checkpoint))
