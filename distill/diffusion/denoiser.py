"""The one contract of all networks: `(x_t, t, cond) -> x0`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.batch import Cond
from distill.diffusion import lora
from distill.diffusion.process import Process
from distill.errors import ConfigError


class Denoiser(nn.Module):
    """A diffusers network that answers in x0. Subclasses say how their family is called and where its blocks are.

    Args:
        network: the diffusers model.
        process: what its checkpoint fixes.
    """

    def __init__(self, network: Any, process: Process):
        super().__init__()
        self.network, self.process = network, process
        self._asked = False
        self._hooks: list[Any] = []  # which keep frozen weights out of the state dict of an adapted network

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and nothing else."""
        return bool(self._hooks)

    @property
    def weights(self) -> list[nn.Parameter]:
        """What training changes and a checkpoint keeps: all weights, or those of the adapters."""
        return [weight for name, weight in self.named_parameters() if not self.adapted or lora.MARK in name]

    @property
    def blocks(self) -> list[nn.Module]:
        """What is tapped, sharded, checkpointed and compiled, in the order of the forward pass."""
        raise NotImplementedError

    @property
    def widths(self) -> list[int]:
        """Channels of each block's output as `grid` gives it."""
        raise NotImplementedError

    def grid(self, output: Any, x_t: Tensor) -> Tensor:
        """A block's output as a 2-D grid of features, `[B, D, h, w]`, for an input `x_t` of any aspect ratio."""
        raise NotImplementedError

    def predict(self, x_t: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The network's own output, `[B, C, H, W]`, in its own parametrisation."""
        raise NotImplementedError

    @contextmanager
    def twice_differentiable(self) -> Iterator[None]:
        """Inside, a forward pass can be gone back through twice: plain attention, nothing that is compiled, and nothing
        that is recomputed, for that would happen outside.
        """
        recomputed = self.network.is_gradient_checkpointing
        if recomputed:
            self.network.disable_gradient_checkpointing()
        try:
            with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            if recomputed:
                self.network.enable_gradient_checkpointing()

    def forget(self, seed: int) -> None:
        """Puts random weights, a function of `seed`, in place of the trained ones."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = type(self.network).from_config(self.network.config)
        self.network.load_state_dict(fresh.state_dict())

    def twin(self, process: Process) -> Denoiser:
        """A network of its own, for adapters or hooks of its own, with the very tensors of this one as weights."""
        shared = {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())}
        other = copy.deepcopy(self, shared)
        other.process = process
        return other

    def adapt(self, asked: lora.LoRA, seed: int) -> None:
        """Freezes the weights and puts adapters beside them, whose first values are a function of `seed`. From then on
        the state dict is theirs alone.

        Raises:
            ConfigError: as `LoRA.adapt`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # that of the CPU, where they begin
            asked.adapt(self.network, self.blocks)
        self._hooks = [
            self.register_state_dict_post_hook(_drop_frozen),
            self.register_load_state_dict_pre_hook(_keep_frozen),
        ]

    def merge(self) -> None:
        """Makes a plain network of an adapted one. Its weights change, and with them those of twins."""
        lora.merge(self.network)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """`x_t` `[B, C, H, W]`, `t` `[B]` in [0, 1] (0 is data) -> the clean latent `[B, C, H, W]` in float32."""
        if not self._asked:  # once: an accelerator is waited for
            self._asked = True
            _check_levels(t)
        with attention(x_t.device, self.network.is_gradient_checkpointing):
            output = self.predict(x_t, self.process.timestep(t), cond)
        return self.process.to_x0(output, x_t, t)


def _check_levels(t: Tensor) -> None:
    """Refuses timesteps in the place of noise levels.

    Raises:
        ConfigError: some are outside [0, 1].
    """
    if not bool(((t >= 0) & (t < 1 + 1e-4)).all()):
        raise ConfigError(
            f"noise levels lie in [0, 1], 0 is data; a network was asked at {t.min().item():g} to {t.max().item():g}"
        )


def attention(device: torch.device, recomputed: bool = False) -> AbstractContextManager[None]:
    """Which attention kernel a forward pass on `device` is to use; PyTorch's choice but for one case.

    The fused kernel for CPUs (PyTorch 2.15) goes back in bfloat16 four to eight times slower than in float32, slower
    than plain attention there and back. A pass that the backward pass recomputes, outside this context, keeps it.
    """
    slow = device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if slow and not recomputed else nullcontext()


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and lora.MARK not in name]:
        del state[name]


def _keep_frozen(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Gives the weights that are there already as those to be loaded, and refuses others."""
    own = chain(module.named_parameters(), module.named_buffers())
    frozen = {prefix + name: tensor for name, tensor in own if lora.MARK not in name}
    unexpected += sorted(frozen.keys() & state.keys())
    state.update(frozen)
