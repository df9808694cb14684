"""`DistillModule`: owns the student, borrows the teacher, asks the student once per batch, gives all players turns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distill import backbones
from distill.backbones.base import same_network
from distill.batch import Batch, Cond, Draws, Gradient, Sample, length, no_autocast
from distill.diffusion.denoiser import Denoiser
from distill.diffusion.lora import LoRA
from distill.diffusion.process import alike, told
from distill.errors import ConfigError, check_seeds
from distill.export import load_student, read_outline
from distill.frozen import Frozen
from distill.strategies.base import BALANCED, Strategy, named_numbers, one_number
from distill.strategies.inputs import Inputs
from distill.training import parallel, schedules
from distill.training.ema import ema_decay, update_ema

READ = ("x0", "pixels", "prompts", "noise")  # of a loader's batch, beside `cond.`
BALANCE_DECAY = 0.99  # of the moving averages behind a weight that is `balanced`


class DistillModule(L.LightningModule):
    """Distils a teacher pipeline into a few-step student by any mixture of strategies.

    Args:
        teacher: a diffusers pipeline: hub id, folder, or the name of a shipped tiny one.
        strategies: the terms of the student's objective.
        inputs: what the student is asked.
        student_optimizer: of the student.
        critic_optimizer: of all critics together.
        student_schedule, critic_schedule: learning-rate schedules, stepped with their optimizer.
        student_clip, critic_clip: largest gradient norm of each player; None does not clip.
        ema: decay of the student's moving average, which is what is sampled and exported; None keeps none.
        target_ema: decay of a second, faster moving average, which strategies use as a target (`Sample.target`); None
            keeps none, and the target is the student itself.
        accumulate: batches per update of each player; with more than one, the critics step after the student's turn, so
            that all batches of an update meet the same critics.
        critic_updates: critic updates per student update; the extra ones draw fresh batches.
        seed: of every random number in training; that of `seed_everything` if not given.
        schedule: what the student's noise schedule changes of the teacher's, for a variance-preserving one:
            `rescale_betas_zero_snr: true` ends it at pure noise (arXiv 2305.08891, section 3.1), `prediction_type`
            makes the network answer something else, which it then has to learn from the teacher's weights.
        student_init: where the student's weights begin: `teacher`, a checkpoint of an earlier run with the same teacher
            and schedule, or `random` for comparison.
        teacher_dtype: of the teacher's weights, `float32` or `bfloat16`; where the student is adapters on them, of its
            text encoders alone.
        checkpoint: recompute the activations of student, teacher and the autoencoder's decoder in the backward pass.
        compiled: compile student and teacher per block.
        patience: stop after this many updates in a row that were not finite.
        lora: train low-rank adapters in place of the student's weights. Student, moving averages and teacher then share
            one copy of these, in float32, except where they are sharded. Of an adapter's two matrices each is averaged.

    Raises:
        ConfigError: a teacher or setting that cannot work.
    """

    skipped: Tensor
    lengths: Tensor
    latent: Tensor

    def __init__(
        self,
        teacher: str,
        strategies: list[Strategy],
        inputs: Inputs,
        student_optimizer: OptimizerCallable = torch.optim.AdamW,
        critic_optimizer: OptimizerCallable = torch.optim.AdamW,
        student_schedule: LRSchedulerCallable | None = None,
        critic_schedule: LRSchedulerCallable | None = None,
        student_clip: float | None = 1.0,
        critic_clip: float | None = None,
        ema: float | None = 0.999,
        target_ema: float | None = None,
        accumulate: int = 1,
        critic_updates: int = 1,
        seed: int | None = None,
        schedule: dict[str, Any] | None = None,
        student_init: str = "teacher",
        teacher_dtype: str = "float32",
        checkpoint: bool = False,
        compiled: bool = False,
        patience: int = 20,
        lora: LoRA | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        if not strategies:
            raise ConfigError("model.strategies is empty; name at least one, such as LatentAdversarial")
        if all(strategy.weight == BALANCED for strategy in strategies):
            raise ConfigError(
                f"a weight that is {BALANCED} follows the terms whose weight is a number, and there is none; give one "
                "of model.strategies a number"
            )
        if all(strategy.begins or strategy.weight == BALANCED for strategy in strategies):
            raise ConfigError(
                "the terms that begin later leave none with a number as its weight to train the student from update 0; "
                "let one of model.strategies have begins=0"
            )
        if not all(decay is None or 0 <= decay < 1 for decay in (ema, target_ema)):
            raise ConfigError(
                f"a moving average's decay is a number from 0 to below 1, or null for none; got model.ema={ema}, "
                f"model.target_ema={target_ema}"
            )
        if not all(clip is None or clip > 0 for clip in (student_clip, critic_clip)):
            raise ConfigError(
                f"gradients are clipped to a positive length, or null for none; got model.student_clip={student_clip}, "
                f"model.critic_clip={critic_clip}"
            )
        self._given_seed = seed
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed  # where Lightning keeps its own
        check_seeds(**{"model.seed": seed})
        if min(accumulate, critic_updates, patience) < 1:
            raise ConfigError("model.accumulate, model.critic_updates and model.patience must be 1 or more")
        if critic_updates > 1 and not any(strategy.has_critic for strategy in strategies):
            raise ConfigError(
                f"model.critic_updates={critic_updates} asks for more updates of a critic, and none of "
                "model.strategies has one; leave it out"
            )
        if student_init not in ("teacher", "random") and not Path(student_init).exists():
            raise ConfigError(
                f"model.student_init={student_init} is neither teacher nor random, and there is no checkpoint of that "
                "name; train the recipe that leaves it first, or give another"
            )
        if lora is not None and student_init == "random":
            raise ConfigError(
                "model.lora puts adapters on the teacher's weights, and model.student_init=random asks for others; "
                "leave one of them out"
            )
        for strategy in strategies:
            strategy.check_levels(inputs.few_levels)
        self.backbone = backbones.load(teacher, schedule=schedule)
        self.backbone.process()  # refuses a schedule that cannot be trained
        self.teacher_name, self.teacher_dtype = teacher, backbones.dtype_of(teacher_dtype)
        self.strategies: Any = nn.ModuleList(strategies)
        self.inputs = inputs
        self.optimizer_makers = student_optimizer, critic_optimizer
        self.schedule_makers = student_schedule, critic_schedule
        self.clips = (student_clip, critic_clip)
        self.decays = (ema, target_ema)
        self.accumulate, self.critic_updates = accumulate, critic_updates
        self.student_init, self.lora = student_init, lora
        self.seed, self.checkpoint, self.compiled, self.patience = seed, checkpoint, compiled, patience
        self.register_buffer("skipped", torch.zeros(3, dtype=torch.long))  # updates: in all; in a row, per player
        self.register_buffer("lengths", torch.zeros(len(strategies), 2))  # of gradients: own, and all with a number
        self.register_buffer("latent", torch.zeros(2, dtype=torch.long))  # height and width of the last batch
        self.strategy_configs: list[dict[str, Any]] | None = None  # what they were made from, where a recipe says it
        self.sharded_beginning: Path | None = None  # to go on from; Lightning loads it before it shows what it says
        self._scalars: dict[str, Tensor] = {}
        self._constants: dict[str, Cond] = {}  # of prompts that do not change
        self._losses: tuple[list[Tensor], list[Tensor]] = [], []  # of student and critics, since their last update
        self._autoencoder: Frozen | None = None
        self._text_encoder: Frozen | None = None
        self.decoded = 0  # latents, by training steps of this process
        self._asked: list[schedules.Settings] = []  # of the optimizers, before they have schedules
        self._before: dict[str, Any] = {}  # what the checkpoint that a run goes on from says of its optimizers
        self.lost = 0  # batches, by runs that ended amid an update
        self.student: Denoiser | None = None
        self.ema: Denoiser | None = None
        self.target: Denoiser | None = None

    # Setting up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        parallel.check_strategy(self.trainer.strategy, str(self.trainer.precision))

    def configure_model(self) -> None:
        """Reads the weights, builds the critics, and shards; Lightning may call it more than once.

        All begin on the CPU, whatever device Lightning makes the default one here, so that what a critic begins with is
        the same under every strategy; Lightning, or sharding, moves them.
        """
        if self.student is None:
            with torch.device("cpu"):
                self._configure()

    def _configure(self) -> None:
        mesh = self.device_mesh["data_parallel"] if self._sharded() else None  # type: ignore[index]
        earlier = self._earlier()  # sharded one after the other, so that few networks are whole at a time
        teacher = self.backbone.plain(self.teacher_dtype)
        shares = self.lora is not None and mesh is None
        base = self.backbone.plain(torch.float32).denoiser() if shares else None  # whose weights all networks have
        self.student = self._begun(earlier, base).train()
        parallel.prepare(self.student, mesh, self.checkpoint, self.compiled, bfloat16=self._mixed)
        low = (False, self._mixed)  # what is sampled is sampled in float32
        self.ema, self.target = (
            None if decay is None else self._average(earlier, base, mesh, bfloat16)
            for decay, bfloat16 in zip(self.decays, low, strict=True)
        )
        del earlier
        self.teacher = Frozen(teacher.denoiser() if base is None else base)
        if not self._embedded:
            _ = self.text_encoder  # read now, not amid the first step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # the critics begin alike on every process
            for strategy in self.strategies:
                strategy.configure(self.backbone, self.teacher)
                strategy.check_parts()
        parallel.prepare(self.teacher.network, mesh, self.checkpoint, self.compiled, tapped=True, bfloat16=self._mixed)
        self._prepare_critics(mesh)
        if self.sharded_beginning is not None:
            self._check_begun(*read_outline(self.sharded_beginning))
        if self._trainer is not None:
            parallel.average_alone(self, self.trainer.strategy)

    def on_train_start(self) -> None:
        """Begins an update that the run ended amid anew, as its gradients are kept nowhere.

        What draws from torch's own generators, such as dropout in a critic, gets other numbers on each process and
        after each resume. What is to be repeated exactly draws from `Batch.draws`.
        """
        self.lost += self.begun(self.trainer.fit_loop.total_batch_idx + 1) % self.accumulate
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.global_step:
            self._follow_recipe()
        draws = Draws(self.seed, self.global_step, self.global_rank, 1, torch.device("cpu"))
        torch.manual_seed(draws.generators("torch's own")[0].initial_seed())

    @property
    def batches(self) -> int:
        """Per update of the student."""
        return self.accumulate * self.critic_updates

    def begun(self, number: int) -> int:
        """How many batches of its update have gone before batch `number` of the run, counted from 0."""
        return (number - self.lost) % self.batches

    def _averages(self) -> dict[Denoiser, float]:
        """The moving averages of the student that are kept, with their decays."""
        pairs = zip((self.ema, self.target), self.decays, strict=True)
        return {average: decay for average, decay in pairs if average is not None and decay is not None}

    def _prepare_critics(self, mesh: DeviceMesh | None) -> None:
        """A critic that is a whole network is sharded as the student is; heads stay whole."""
        for strategy in self.strategies:
            networks = [part for part in (strategy.critic or nn.Module()).modules() if isinstance(part, Denoiser)]
            if networks and mesh is not None:
                strategy.check_sharded()
            for network in networks:
                parallel.prepare(network, mesh, self.checkpoint, self.compiled, tapped=True, bfloat16=self._mixed)

    def _begun(self, earlier: dict[str, Tensor] | None, base: Denoiser | None) -> Denoiser:
        """A network with the weights the student begins with; fresh from the backbone it has the teacher's, which are
        those of `base` themselves if it is given.
        """
        network = self.backbone.denoiser() if base is None else base.twin(self.backbone.process())
        if self.lora is not None:
            network.adapt(self.lora, self.seed)
        if self.student_init == "random":
            network.forget(self.seed)
        elif earlier is not None:
            network.load_state_dict(earlier)
        return network

    def _average(
        self, earlier: dict[str, Tensor] | None, base: Denoiser | None, mesh: DeviceMesh | None, bfloat16: bool
    ) -> Denoiser:
        average = self._begun(earlier, base).requires_grad_(False).eval()
        parallel.prepare(average, mesh, bfloat16=bfloat16)
        return average

    def _earlier(self) -> dict[str, Tensor] | None:
        """The weights of the earlier run's student that this one begins with; None for another beginning.

        Raises:
            ConfigError: a student of another teacher or noise schedule, or to train adapters one without the same.
        """
        if self.student_init in ("teacher", "random"):
            return None
        earlier = load_student(self.student_init, self.teacher_name, merged=self.lora is None)
        if self.lora is not None and earlier.facts.get("lora") != self.lora.settings():
            raise ConfigError(
                f"model.student_init={self.student_init} was trained {_adapters(earlier.facts.get('lora'))}, this "
                f"recipe is one {_adapters(self.lora.settings())}; set model.lora to the same, or to null to train all "
                "weights"
            )
        if (earlier.facts.get("schedule") or {}) != self.backbone.schedule:
            raise ConfigError(
                f"model.student_init={self.student_init} was trained with the schedule "
                f"{earlier.facts.get('schedule') or 'of the teacher'}; set model.schedule to the same"
            )
        return earlier.denoiser.state_dict()

    @property
    def autoencoder(self) -> Frozen:
        """The pipeline's autoencoder, read when it is first needed: a latent method never does."""
        if self._autoencoder is None:
            autoencoder = self.backbone.autoencoder()
            if self.checkpoint:  # its decoder keeps more for the backward pass than any other network
                autoencoder.network.enable_gradient_checkpointing()
            self._autoencoder = Frozen(autoencoder).to(self.device)
        return self._autoencoder

    @property
    def text_encoder(self) -> Frozen:
        """The teacher's text encoders. Where the data has embeddings they are read when something else needs them: a
        picture that is painted, or the empty prompt of guidance.
        """
        if self._text_encoder is None:
            with torch.device("cpu"):
                self._text_encoder = Frozen(self.backbone.plain(self.teacher_dtype).text_encoder()).to(self.device)
        return self._text_encoder

    @property
    def _embedded(self) -> bool:
        """Whether the batches bring their prompts' embeddings."""
        data = None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]
        return getattr(data, "embedded", False)

    def _decode(self, latents: Tensor) -> Tensor:
        self.decoded += len(latents)
        return self.autoencoder(latents)

    def _sharded(self) -> bool:
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    @property
    def _mixed(self) -> bool:
        return self._trainer is not None and self.trainer.precision == "bf16-mixed"

    @property
    def critics(self) -> list[nn.Module]:
        """The trained parts of all strategies that have one."""
        return [strategy.critic for strategy in self.strategies if strategy.critic is not None]

    @property
    def _critic_weights(self) -> list[nn.Parameter]:
        return [weight for critic in self.critics for weight in critic.parameters() if weight.requires_grad]

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """Height and width of the latents this run trains on; None before the first batch."""
        return tuple(self.latent.tolist()) if int(self.latent[0]) else None  # type: ignore[return-value]

    @property
    def sampled(self) -> Denoiser:
        """The network that is sampled and exported: the moving average where there is one."""
        network = self.student if self.ema is None else self.ema
        assert network is not None
        return network

    def configure_optimizers(self) -> Any:
        assert self.student is not None
        players = [self.student.weights]
        if self.critics:
            players.append(self._critic_weights)
        makers_and_players = zip(self.optimizer_makers, players, strict=False)
        try:
            optimizers = [make(parallel.grouped(parameters)) for make, parameters in makers_and_players]
            self._asked = [schedules.settings(optimizer) for optimizer in optimizers]
            makers = zip(self.schedule_makers, optimizers, strict=False)
            made = [make(optimizer) for make, optimizer in makers if make is not None]
        except ValueError as error:  # how torch refuses rates, betas, ...
            raise ConfigError(f"an optimizer or schedule of this recipe cannot be made: {error}") from error
        if any(isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) for schedule in made):
            raise ConfigError(
                "ReduceLROnPlateau follows a measured value, and the losses of two players say nothing of progress; "
                "choose a schedule of updates, such as LinearLR"
            )
        return optimizers, made

    # One batch ----------------------------------------------------------------------------------------------------

    def training_step(self, raw: dict[str, Any], batch_idx: int) -> None:
        """Critic turns on the student's detached answer, then the student's turn; see `Sample` for the two cuts."""
        try:
            self._turns(raw)
        except StopIteration as error:  # which Lightning would take for the end of the data, over and over
            raise RuntimeError("a StopIteration came out of a strategy or a network it asked") from error

    def _turns(self, raw: dict[str, Any]) -> None:
        position = self.begun(self.trainer.fit_loop.total_batch_idx)
        asks_student = position >= self.accumulate * (self.critic_updates - 1)
        updates = (position + 1) % self.accumulate == 0
        batch, step = self.encode(raw), self.global_step
        self.check_batch(len(batch.prompts))
        with torch.set_grad_enabled(asks_student):
            sample = self.ask(batch, step)
        if self.critics:
            self._critic_turn(sample, batch, step * self.critic_updates + position // self.accumulate)
        last = updates and asks_student and self.accumulate > 1  # of several batches, which all meet the same critics
        if updates and not last:
            self._update_critics()
        if asks_student:
            self._student_turn(sample, batch, step, updates)
        if last:
            self._update_critics()
        self._log_scalars()

    def check_batch(self, size: int) -> None:
        """Refuses a number of samples per process that a strategy cannot work with.

        Raises:
            ConfigError: as `Strategy.check`.
        """
        for strategy in self.strategies:
            strategy.check(size)

    def encode(self, raw: dict[str, Any]) -> Batch:
        """A batch as the loader gives it: `prompts` and either `x0` (latents) or `pixels`; in pairs `noise` too, and
        `cond.text` and so on where the prompts' embeddings are stored.
        """
        with torch.no_grad():
            stored = {name.removeprefix("cond."): value for name, value in raw.items() if name.startswith("cond.")}
            cond = stored or self.conditioning(raw["prompts"])
            if "x0" not in raw:
                self.backbone.check_size(*raw["pixels"].shape[2:])  # the autoencoder would cut what is over
            x0 = raw["x0"].float() if "x0" in raw else self.autoencoder.network.encode(raw["pixels"]).float()
        self.latent[0], self.latent[1] = x0.shape[2:]
        number = self.trainer.fit_loop.total_batch_idx
        draws = Draws(self.seed, number, self.global_rank * len(x0), len(x0), x0.device)
        pictures, noise = raw.get("pixels"), raw.get("noise")
        others = {name: value for name, value in raw.items() if name not in READ and not name.startswith("cond.")}
        return Batch(x0, cond, raw["prompts"], draws, noise, pictures, self._decode, self.constant, others)

    def conditioning(self, prompts: list[str]) -> Cond:
        """What the frozen text encoders say of B prompts, in float32."""
        with torch.no_grad():
            return {name: tensor.float() for name, tensor in self.text_encoder(prompts).items()}

    def constant(self, prompt: str) -> Cond:
        """The same of one prompt that batch after batch needs, such as none for guidance, `[1, ...]`; made once."""
        if prompt not in self._constants:
            self._constants[prompt] = self.conditioning([prompt])
        return self._constants[prompt]

    def ask(self, batch: Batch, step: int) -> Sample:
        """The student's one answer to a batch."""
        assert self.student is not None
        x_t, t = self.inputs(batch, self.student.process, step)
        return Sample(self.student(x_t, t, batch.cond), x_t, t, self._decode, self.target or self.student)

    def on_validation_model_zero_grad(self) -> None:
        """Nothing: Lightning would empty the gradients at every epoch's end, amid an update of several batches."""

    def _critic_turn(self, sample: Sample, batch: Batch, step: int) -> None:
        for name, strategy in self._named():
            if strategy.critic is not None:
                terms = named_numbers(strategy, strategy.critic_loss(sample, _own(batch, name, strategy), step))
                loss = torch.stack(list(terms.values())).sum()
                with no_autocast(loss.device):
                    (loss / self.accumulate).backward()
                self._losses[1].append(loss.detach())
                self._scalars |= {f"critic/{name}/{term}": value for term, value in terms.items()}
                self._scalars |= {f"critic/{name}/D({what})": value for what, value in strategy.report.items()}

    def _update_critics(self) -> None:
        if self.critics:
            self._update(1, self._critic_weights)

    def _student_turn(self, sample: Sample, batch: Batch, step: int, updates: bool) -> None:
        assert self.student is not None
        named = self._named()
        if len(batch.x0) > 1:  # near 0: all prompts get one answer
            self._scalars["student/spread"] = sample.x0.detach().std(0).mean() / batch.x0.std(0).mean()
        numbered: Gradient = {}
        for index in sorted(range(len(named)), key=lambda index: named[index][1].weight == BALANCED):
            name, strategy = named[index]
            if step < strategy.begins:
                continue
            own = _own(batch, name, strategy)
            loss = one_number(strategy, strategy.student_loss(sample, own, step))
            gradient = sample.gradient(loss)
            weight: Any = strategy.weight
            if weight == BALANCED:
                weight = self._scalars[f"weight/{name}"] = self._balance(index, sample, gradient, numbered)
            norm = parallel.joint_norm(length(gradient))
            sample.gather(gradient, weight)
            if strategy.weight != BALANCED:
                numbered = dict(sample.gathered)
            self._losses[0].append(loss.detach())
            self._scalars |= {f"student/{name}": loss, f"gradient_at_sample/{name}": norm * abs(weight)}
        sample.backward(1 / self.accumulate)
        if updates and self._update(0, self.student.weights):
            for average, decay in self._averages().items():
                update_ema(average, self.student, ema_decay(decay, step))

    def _balance(self, index: int, sample: Sample, gradient: Gradient, numbered: Gradient) -> Tensor:
        """The weight that makes a gradient at the latent `balance` times as long as `numbered`, what the terms with a
        number have gathered there, by moving averages of both lengths.
        """
        lengths = [parallel.joint_norm(sample.at_latent(g).norm()) for g in (gradient, numbered)]
        now, kept = torch.stack(lengths), self.lengths[index]
        if now.isfinite().all():  # an update that is skipped leaves no trace
            kept.copy_(torch.where(kept == 0, now, kept.lerp(now, 1 - BALANCE_DECAY)))
        return self.strategies[index].balance * kept[1] / kept[0].clamp(min=1e-12)

    def _update(self, player: int, parameters: list[nn.Parameter]) -> bool:
        """Steps one player's optimizer unless its gradient is not finite; returns whether it did."""
        optimizers = self.optimizers()
        optimizer: Any = optimizers[player] if isinstance(optimizers, list) else optimizers
        if self._sharded():
            self._check_reached(parameters)
        parallel.average_gradients(parameters)
        norm = parallel.clip_gradients(parameters, self.clips[player])
        self._scalars[("student" if player == 0 else "critic") + "/gradient_norm"] = norm
        losses = torch.stack(self._losses[player]).sum()
        self._losses[player].clear()
        finite = bool(parallel.average(losses).isfinite() & norm.isfinite())
        self._count_skipped(player, finite)
        if finite:
            if player:  # only student updates count as steps (Lightning issue 17958)
                optimizer._on_before_step = optimizer._on_after_step = _nothing
            optimizer.step()
            self._step_schedule(optimizer.optimizer)
        optimizer.zero_grad(set_to_none=True)
        return finite

    def _check_reached(self, parameters: list[nn.Parameter]) -> None:
        """Refuses weights without a gradient where they are sharded: an optimizer keeps nothing for them, and a sharded
        checkpoint that lacks something is refused when a run is to go on from it.
        """
        without = {id(weight) for weight in parameters if weight.grad is None}
        if without:
            names = [name for name, weight in self.named_parameters() if id(weight) in without]
            raise ConfigError(
                f"{len(names)} weights are trained and got no gradient, such as {names[0]}; a sharded run (FSDP2) "
                "could not go on from its checkpoints: freeze them where they are made, by requires_grad_(False)"
            )

    def _count_skipped(self, player: int, finite: bool) -> None:
        row = 1 + player
        if finite:
            self.skipped[row] = 0
            return
        name = ("student", "critic")[player]
        self.skipped[row] += 1
        self.skipped[0] += 1
        rank_zero_warn(
            f"an update of the {name} after step {self.global_step} was skipped: its loss or gradient is not finite"
        )
        if int(self.skipped[row]) >= self.patience:
            raise ConfigError(
                f"{self.patience} updates of the {name} in a row had a loss or gradient that is not finite; lower the "
                "learning rates, set model.student_clip and model.critic_clip, or use trainer.precision=32-true, then "
                "continue from the last checkpoint (--ckpt_path last)"
            )

    def _step_schedule(self, optimizer: torch.optim.Optimizer) -> None:
        if (config := self._schedule_of(optimizer)) is not None:
            schedules.step(config.scheduler)  # type: ignore[arg-type]

    def _schedule_of(self, optimizer: torch.optim.Optimizer) -> LRSchedulerConfig | None:
        configs = self.trainer.lr_scheduler_configs
        return next((config for config in configs if config.scheduler.optimizer is optimizer), None)

    def _follow_recipe(self) -> None:
        """Gives a run that goes on the rates and other settings this recipe has after as many updates, as Lightning has
        brought back the checkpoint's; says which differ.
        """
        updates = self.global_step, self.global_step * self.critic_updates
        for player, (optimizer, asked) in enumerate(zip(self.trainer.optimizers, self._asked, strict=True)):
            restored, config = schedules.settings(optimizer), self._schedule_of(optimizer)
            steps, before = (self._before.get(what, {}).get(player) for what in ("steps", "settings"))
            count = updates[player] if steps is None else steps  # fewer, if some were skipped
            made = schedules.replay(optimizer, asked, self.schedule_makers[player], count, before)
            if config is not None and made is not None:
                config.scheduler = made
            if changed := schedules.changes(restored, schedules.settings(optimizer)):
                name = ("student", "critic")[player]
                rank_zero_warn(f"the {name}'s optimizer goes on with {', '.join(changed)}, as this recipe says")

    def _named(self) -> list[tuple[str, Strategy]]:
        """Strategies with the names their scalars go by; a second one of a class gets a number."""
        names = [type(strategy).__name__ for strategy in self.strategies]
        return [
            (name if names.count(name) == 1 else f"{name}_{index}", strategy)
            for index, (name, strategy) in enumerate(zip(names, self.strategies, strict=True))
        ]

    def _log_scalars(self) -> None:
        """Logs what the turns since the last time left, where it is due: averaged over all processes in one reduction.

        Of what every batch computes that is this batch's; a lazy penalty's is its last.
        """
        self._scalars = {name: value.detach() for name, value in self._scalars.items()}
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 is never
        if not every or (self.trainer.fit_loop.total_batch_idx + 1) % every:
            return
        scalars, self._scalars = self._scalars, {}
        values = parallel.average(torch.stack([value.float() for value in scalars.values()]))
        for name, value in zip(scalars, values, strict=True):
            self.log(name, value, prog_bar=name.startswith("student/"))
        self.log("skipped_updates", self.skipped[0].float())
        self.log("step", float(self.global_step))  # loggers take this for the x axis: student updates, not batches

    def validation_step(self, raw: dict[str, Any], batch_idx: int) -> None:
        """Nothing of its own: the `Evaluation` callback paints and measures."""

    test_step = validation_step

    # What is kept -------------------------------------------------------------------------------------------------

    def _kept(self) -> list[str]:
        """The names of the moving averages this run keeps."""
        return [name for name, decay in zip(("ema", "target"), self.decays, strict=True) if decay is not None]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other networks than the run began with: their weights are not there, or mean another
        thing.

        Raises:
            ConfigError: another teacher, noise schedule, strategies or moving averages.
        """
        about = checkpoint.get("distill", {})
        self.lost, self._before = about.get("lost", 0), about.get("optimizers", {})
        if not self._before:  # of an earlier version
            states = checkpoint.get("lr_schedulers", [])
            self._before = {"steps": {player: state.get("last_epoch") for player, state in enumerate(states)}}
        self._go_on_with(about.get("seed", 0))
        checkpoint["lr_schedulers"] = []  # which Lightning would load into schedules of other classes
        if self.sharded_beginning is None:  # looked at already
            self._check_begun(about, {name: tensor.shape for name, tensor in checkpoint.get("state_dict", {}).items()})
        self._tell_changes(about.get("strategy_configs"))

    def _check_begun(self, about: dict[str, Any], before: dict[str, torch.Size]) -> None:
        """By what a checkpoint says of its run, and by the shapes of its critics' weights."""
        self._check_teacher(about.get("fingerprint", ""))
        self._check_process(about)
        if about.get("schedule", self.backbone.schedule) != self.backbone.schedule:
            raise ConfigError(
                f"the checkpoint is of a run with model.schedule={about['schedule']}, this recipe has "
                f"{self.backbone.schedule}, and its network would be read otherwise; go on with the same, or begin a "
                "new run"
            )
        lora = None if self.lora is None else self.lora.settings()
        if about.get("lora") != lora:
            raise ConfigError(
                f"the checkpoint is of a run {_adapters(about.get('lora'))}, this recipe is one {_adapters(lora)}; go "
                "on with the same model.lora, or begin a new run with its student (model.student_init)"
            )
        kept = about.get("averages", self._kept())
        if kept != self._kept():
            raise ConfigError(
                f"the checkpoint keeps the moving averages {', '.join(kept) or 'none'}, this recipe "
                f"{', '.join(self._kept()) or 'none'}; go on with the same of model.ema and model.target_ema, or begin "
                "a new run with its student (model.student_init)"
            )
        began = about.get("strategies", [])
        if began != (now := [name for name, _ in self._named()]):
            raise ConfigError(
                f"the checkpoint is of a run with model.strategies {', '.join(began) or 'unknown'}, this recipe has "
                f"{', '.join(now)}; go on with the same, or begin a new run with its student (model.student_init)"
            )
        self._check_critics({name: shape for name, shape in before.items() if name.startswith("strategies.")})

    def _check_critics(self, weights: dict[str, torch.Size]) -> None:
        """Those of a sharded checkpoint are not among what Lightning shows of it."""
        now = {name: tensor.shape for name, tensor in self.state_dict().items() if name.startswith("strategies.")}
        if not weights or weights == now:
            return
        index = next(n for n in [*weights, *now] if weights.get(n) != now.get(n)).split(".")[1]
        name, _ = self._named()[int(index)]
        raise ConfigError(
            f"the critic of {name} has other layers than in the checkpoint; go on with the settings of "
            "model.strategies that the run began with, or begin a new run with its student (model.student_init)"
        )

    def _go_on_with(self, seed: int) -> None:
        """The run's own random numbers, unless others are asked for; earlier versions began with 0 where none were."""
        if self._given_seed is None:
            self.seed = seed
        elif self._given_seed != seed and seed:
            rank_zero_warn(f"the run began with model.seed={seed} and goes on with {self._given_seed}: other numbers")

    def _tell_changes(self, before: list[dict[str, Any]] | None) -> None:
        """Which strategies have other settings than the run began with, which may be meant."""
        for old, new, (name, _) in zip(before or [], self.strategy_configs or [], self._named(), strict=False):
            was, now = old.get("init_args") or {}, new.get("init_args") or {}
            if changed := [key for key in {**was, **now} if was.get(key) != now.get(key)]:
                rank_zero_warn(f"{name} goes on with other {', '.join(changed)} than in the checkpoint")

    def _check_teacher(self, before: str) -> None:
        """By the digests of weights where both are folders, by the names of both where both are on the hub."""
        now = self.backbone.fingerprint
        if not before:
            return
        if ("@" in before) != ("@" in now):
            rank_zero_warn(
                f"the checkpoint is of a run with the teacher {before}, and model.teacher is {now}; whether they are "
                "the same cannot be told, as only one is a folder"
            )
        elif not same_network(before, now):
            raise ConfigError(
                f"the checkpoint is of a run with the teacher {before}, and model.teacher is {now}; go on with the "
                "same, or begin a new run"
            )

    def _check_process(self, about: dict[str, Any]) -> None:
        """Whether the scheduler in the teacher's folder still says what the network was trained as."""
        now = self.backbone.process().facts
        if about.get("schedule") == self.backbone.schedule and not alike(about.get("process", now), now):
            raise ConfigError(
                f"the checkpoint is of a network of {told(about['process'])}, and the scheduler in the teacher's "
                f"folder now says {told(now)}; put the earlier one back, or begin a new run"
            )

    def _optimizers(self) -> dict[str, Any]:
        """By player what an optimizer was made with, and how many steps its schedule has made."""
        configs = {player: self._schedule_of(optimizer) for player, optimizer in enumerate(self.trainer.optimizers)}
        steps = {player: schedules.steps_of(config.scheduler) for player, config in configs.items() if config}  # type: ignore[arg-type]
        return {"settings": dict(enumerate(self._asked)), "steps": steps}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["distill"] = {
            "teacher": self.teacher_name,
            "fingerprint": self.backbone.fingerprint,
            "process": self.backbone.process().facts,
            "seed": self.seed,
            "strategies": [name for name, _ in self._named()],
            "averages": self._kept(),
            "strategy_configs": self.strategy_configs,
            "levels": self.inputs.few_levels,
            "schedule": self.backbone.schedule,
            "lora": None if self.lora is None else self.lora.settings(),
            "steps": self.global_step,
            "lost": self.lost,
            "optimizers": self._optimizers(),
            "size": self.latent_size,
            "sharded": self._sharded(),
            "data": getattr(self.trainer.datamodule, "description", ""),  # type: ignore[attr-defined]
        }


def _own(batch: Batch, name: str, strategy: Strategy) -> Batch:
    """The batch for one strategy: of two of a class, each has random numbers of its own."""
    return batch if name == type(strategy).__name__ else batch.owned(name)


def _adapters(lora: dict[str, Any] | None) -> str:
    return f"with the adapters model.lora={lora}" if lora else "without adapters (model.lora: null)"


def _nothing() -> None:
    return None
