"""Features of a network's blocks, read by hooks that record only while asked to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.batch import Cond
from distill.diffusion.denoiser import Denoiser
from distill.errors import ConfigError


class Taps:
    """Reads the outputs of a denoiser's blocks as 2-D grids of features. Make it before the network is compiled.

    Args:
        denoiser: the network to read; its forward is used as it is.
        blocks: indices of the blocks; all if not given.

    Raises:
        ConfigError: no index, or one that the denoiser does not have.
    """

    def __init__(self, denoiser: Denoiser, blocks: list[int] | None = None):
        count = len(denoiser.blocks)
        self.indices = list(range(count)) if blocks is None else blocks
        known = all(0 <= index < count for index in self.indices)
        if not self.indices or not known or len(set(self.indices)) < len(self.indices):
            raise ConfigError(
                f"this network has the blocks 0 to {count - 1}, of which one or more are read, each once; got "
                f"{self.indices}"
            )
        self.denoiser = denoiser
        self._recorded: dict[int, Any] | None = None
        for index in self.indices:
            denoiser.blocks[index].register_forward_hook(self._hook(index))

    @property
    def widths(self) -> list[int]:
        """Channels of each grid."""
        return [self.denoiser.widths[index] for index in self.indices]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The features at `x_t` `[B, C, H, W]`, one `[B, D, h, w]` per tapped block, with their graph."""
        self._recorded = {}
        try:
            self.denoiser(x_t, t, cond)
            return [self.denoiser.grid(self._recorded[index], x_t) for index in self.indices]
        finally:
            self._recorded = None

    def _hook(self, index: int) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._recorded is not None:
                self._recorded[index] = output

        return record
