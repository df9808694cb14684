"""What travels through a training step: the batch, its random numbers, the student's one answer and its two cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# Conditioning tensors, each [B, ...]; every backbone gives "text" [B, L, D] and "pooled" [B, P].
Cond = dict[str, Tensor]
# At the leaves of a sample, "x0" and "pixels", as far as they were used.
Gradient = dict[str, Tensor]


def no_autocast(device: torch.device) -> torch.autocast:
    """For backward passes: autocast is meant for forward ones, and Lightning's spans the whole training step.

    Under it a backward pass casts again what the forward pass had chosen the precision of, and is slower.
    """
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch: a function of (seed, batch, purpose, sample) and of nothing else.

    Each sample has its own stream, so the same global batch gets the same numbers on any number of processes, a resumed
    run repeats them exactly, and one strategy's draws never shift another's.

    Attributes:
        seed: of the run.
        batch: number of the batch within the run.
        first: index of this process's first sample within the global batch.
        size: number of samples of this process, B.
        device: where the numbers are wanted.
        owner: whose numbers they are, where two of one kind draw for the same purposes.
    """

    seed: int
    batch: int
    first: int
    size: int
    device: torch.device
    owner: str = ""

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal, `[B, *shape]` float32."""
        return self._each(purpose, shape, torch.Tensor.normal_)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), `[B, *shape]` float32."""
        return self._each(purpose, shape, torch.Tensor.uniform_)

    def like(self, purpose: str, x: Tensor) -> Tensor:
        """Standard normal in the shape of `x`, `[B, ...]`."""
        return self.normal(purpose, *x.shape[1:])

    def common(self, purpose: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), `shape`: one draw for the whole global batch, the same on every process."""
        generator = torch.Generator(self.device).manual_seed(self._key(purpose, "all"))
        return torch.rand(shape, generator=generator, device=self.device)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One generator per sample, B in all, for code that draws by itself, such as a sampler between its steps."""
        samples = range(self.first, self.first + self.size)
        return [torch.Generator(self.device).manual_seed(self._key(purpose, sample)) for sample in samples]

    def _each(self, purpose: str, shape: tuple[int, ...], fill: Callable[..., Tensor]) -> Tensor:
        numbers = torch.empty(self.size, *shape, device=self.device)
        for row, generator in zip(numbers.unbind(), self.generators(purpose), strict=True):
            fill(row, generator=generator)
        return numbers

    def _key(self, purpose: str, sample: int | str) -> int:
        key = f"{self.seed}/{self.batch}/{self.owner}{purpose}/{sample}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class SameDraws(Draws):
    """One sample's numbers for all of the batch, wherever they stand in it: for judging rather than training."""

    def generators(self, purpose: str) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(self._key(purpose, 0)) for _ in range(self.size)]


@dataclass
class Batch:
    """One batch of data, encoded.

    Attributes:
        x0: clean latents `[B, C, H, W]`.
        cond: conditioning tensors.
        prompts: the B captions behind `cond`.
        draws: this batch's random numbers.
        noise: what the teacher made `x0` from, `[B, C, H, W]`; None where the data are no pairs.
        pictures: what `x0` was encoded from, `[B, 3, 8H, 8W]` in [-1, 1]; None where the data are latents.
        decode: latents to pictures.
        constant: one prompt, the same batch after batch, to its conditioning tensors `[1, ...]`.
        others: what else the data's batches hold, by its names there.
    """

    x0: Tensor
    cond: Cond
    prompts: list[str]
    draws: Draws
    noise: Tensor | None = None
    pictures: Tensor | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    constant: Callable[[str], Cond] | None = None
    others: dict[str, Any] = field(default_factory=dict)
    _made: dict[str, Tensor] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` answers, without gradient, made when it is first asked for: what the batch alone decides is the
        same in all players' turns.

        Args:
            name: that no other kind of strategy gives to another tensor.
        """
        return self._once(self.draws.owner + name, make)

    def owned(self, owner: str) -> Batch:
        """The same batch with random numbers of `owner`'s own."""
        return replace(self, draws=replace(self.draws, owner=f"{owner}/"))

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._made:
            with torch.no_grad():
                self._made[name] = make()
        return self._made[name]

    @property
    def pixels(self) -> Tensor:
        """The real pictures, `[B, 3, 8H, 8W]` in [-1, 1]; latents are decoded, once, on first use."""
        if self.pictures is not None:
            return self.pictures
        assert self.decode is not None
        decode = self.decode
        return self._once("pixels", lambda: decode(self.x0))

    def cond_of(self, prompt: str) -> Cond:
        """The conditioning of one prompt for every sample, such as the empty one for guidance."""
        assert self.constant is not None
        return {name: tensor.expand(len(self.x0), *tensor.shape[1:]) for name, tensor in self.constant(prompt).items()}


class Sample:
    """The student's one answer to a batch, cut off from its graph twice: at the latent and at the decoded image.

    Strategies see the leaves `x0` and `pixels` only. `gradient` differentiates one loss towards them and frees its
    graph; `gather` adds it up; `backward` sends the sum through the decoder (once, if pixels were asked for) and the
    student (once).

    Args:
        answer: the student's `x0`, `[B, C, H, W]`, with its graph.
        x_t, t: what the student was asked, `[B, C, H, W]` and `[B]`.
        decode: latents to pixels in [-1, 1], `[B, 3, 8H, 8W]` for most autoencoders.
        target: a network like the student, for terms that compare its answers with another of its own.
    """

    def __init__(
        self,
        answer: Tensor,
        x_t: Tensor,
        t: Tensor,
        decode: Callable[[Tensor], Tensor],
        target: Callable[[Tensor, Tensor, Cond], Tensor] | None = None,
    ):
        self.answer, self.x_t, self.t = answer, x_t, t
        self.x0 = answer.detach().requires_grad_()
        self._decode, self._target = decode, target
        self._decoded: Tensor | None = None
        self._pixels: Tensor | None = None
        self.gathered: Gradient = {}

    @property
    def pixels(self) -> Tensor:
        """The decoded answer in [-1, 1], a leaf, decoded on first use."""
        if self._pixels is None:
            with torch.set_grad_enabled(self.answer.requires_grad):  # nothing is sent back where critics alone learn
                self._decoded = self._decode(self.x0)
            self._pixels = self._decoded.detach().requires_grad_()
        return self._pixels

    def target(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the student's faster moving average, or without one the student itself, answers elsewhere, `[B, C, H,
        W]`; without gradient.
        """
        assert self._target is not None
        with torch.no_grad():
            return self._target(x_t, t, cond)

    def gradient(self, loss: Tensor) -> Gradient:
        """The gradient of `loss` at the leaves it used; the loss's graph is freed."""
        leaves = {"x0": self.x0} | ({"pixels": self._pixels} if self._pixels is not None else {})
        with no_autocast(self.x0.device):
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}

    def gather(self, gradient: Gradient, weight: float | Tensor = 1.0) -> None:
        """Adds a weighted gradient to what was gathered so far."""
        for name, part in gradient.items():
            part = part * weight
            self.gathered[name] = self.gathered[name] + part if name in self.gathered else part

    def at_latent(self, gradient: Gradient, again: bool = True) -> Tensor:
        """A gradient at the leaves as one at the latent `x0`: what lies at the pixels goes back through the decoder.

        Args:
            again: whether the decoder's graph is still needed afterwards.
        """
        total = gradient.get("x0", torch.zeros_like(self.x0))
        if "pixels" not in gradient:
            return total
        assert self._decoded is not None
        with no_autocast(self.x0.device):
            (through,) = torch.autograd.grad(self._decoded, self.x0, gradient["pixels"], retain_graph=again)
        return total + through

    def backward(self, scale: float = 1.0) -> None:
        """One backward pass through the decoder if it was used, and one through the student."""
        total = self.at_latent(self.gathered, again=False)
        with no_autocast(self.x0.device):
            self.answer.backward(total * scale)


def length(gradient: Gradient) -> Tensor:
    """Its norm, 0-dim; over both leaves where a loss used both."""
    return torch.stack([part.float().square().sum() for part in gradient.values()]).sum().sqrt()
