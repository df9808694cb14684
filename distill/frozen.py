"""A borrowed network: used and moved like a submodule, but never trained, counted, sharded or saved with its holder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network outside the module tree, in eval mode and without gradients for its parameters.

    It is not among the holder's parameters, state dict or children, stays in eval mode when the holder trains, and
    follows the holder's `.to()`. Gradients do flow through it to its input.

    Args:
        network: the network to borrow.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self._held = (network.eval().requires_grad_(False),)  # a tuple: nn.Module does not look inside

    @property
    def network(self) -> Any:
        """The borrowed network itself."""
        return self._held[0]

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)
