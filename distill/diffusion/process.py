"""What a checkpoint fixes: `x_t = alpha x0 + sigma noise`, what the network predicts, and how it was shown the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.errors import ConfigError

# The network's output is a x0 + b noise; each entry maps (alpha, sigma) to (a, b).
PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),  # arXiv 2202.00512, appendix D
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),  # arXiv 2403.03206, Eq. 4
}


class Process:
    """A noise schedule and a prediction type; computes in float32.

    `t` is `[B]` in [0, 1], 0 is data and 1 is noise. `x0`, `x_t`, `noise` and `output` are `[B, C, H, W]`.

    Args:
        prediction: what the network was trained to answer, a key of `PREDICTIONS`.

    Raises:
        ValueError: an unknown prediction type.
    """

    def __init__(self, prediction: str):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction type '{prediction}' is unknown; known are {', '.join(PREDICTIONS)}")
        self.prediction = prediction

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Share of data and of noise at `t`, each `[B]`."""
        raise NotImplementedError

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, of plain values: see `alike`."""
        alpha, _ = self.alpha_sigma(torch.tensor([0.001, 0.25, 0.5, 0.75, 1.0]))
        return {"prediction": self.prediction, "kept": alpha.tolist()}

    def timestep(self, t: Tensor) -> Tensor:
        """`t` as the network was trained to see it, `[B]`."""
        raise NotImplementedError

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """`alpha x0 + sigma noise`."""
        alpha, sigma = self._columns(t)
        return alpha * x0.float() + sigma * noise.float()

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent a network output stands for, from `x_t = alpha x0 + sigma eps` and `out = a x0 + b eps`."""
        if self.prediction == "sample":  # at t = 0 the system is singular, the answer is not
            return output.float()
        alpha, sigma, a, b = self._system(t)
        return (b * x_t.float() - sigma * output.float()) / (alpha * b - sigma * a)

    def to_noise(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that `x_t` holds beside `x0`; `t` must be above 0."""
        alpha, sigma = self._columns(t)
        return (x_t.float() - alpha * x0.float()) / sigma

    def to_output(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What a network must answer at `x_t` to say `x0`; `t` must be above 0."""
        _, _, a, b = self._system(t)
        return a * x0.float() + b * self.to_noise(x0, x_t, t)

    def step(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """From `t` to `s` along the deterministic path: DDIM (arXiv 2010.02502, Eq. 12), which for a flow is Euler."""
        return self.add_noise(x0, s, self.to_noise(x0, x_t, t))

    def _columns(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t.float())
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def _system(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = self._columns(t)
        return alpha, sigma, *PREDICTIONS[self.prediction](alpha, sigma)


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a network means the same in two processes, by their `facts`."""
    apart = zip(one["kept"], other["kept"], strict=True)
    return one["prediction"] == other["prediction"] and all(abs(a - b) < 1e-4 for a, b in apart)


def told(facts: dict[str, Any]) -> str:
    """A process's `facts` in a sentence."""
    kept = ", ".join(f"{share:.3g}" for share in facts["kept"])
    return f"{facts['prediction']} (alpha {kept} at levels from 0 to 1)"


class RectifiedFlow(Process):
    """Straight paths, `x_t = (1 - t) x0 + t noise` (arXiv 2403.03206, section 2).

    Args:
        timesteps: the network sees `t` times this number.
        prediction: as in `Process`.
    """

    def __init__(self, timesteps: int = 1000, prediction: str = "flow"):
        super().__init__(prediction)
        self.timesteps = timesteps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.timesteps


class VariancePreserving(Process):
    """A discrete schedule of N steps; `t = (k + 1) / N` is its step k, in between the nearest counts. `t = 0` alone is
    data: what is above holds noise, at least that of step 0.

    Args:
        alphas_cumprod: `[N]`, the schedule's cumulated product of 1 - beta.
        prediction: as in `Process`.

    Raises:
        ConfigError: noise prediction on a schedule that ends at pure noise, whose noise says nothing of the picture.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str = "epsilon"):
        super().__init__(prediction)
        if prediction == "epsilon" and alphas_cumprod[-1] < 1e-6:  # diffusers stores 2^-24 for 0
            raise ConfigError(
                "a noise schedule with zero terminal SNR cannot be trained with prediction_type=epsilon: at pure noise "
                "the answer would hold nothing of the picture; set model.schedule.prediction_type to v_prediction or "
                "sample"
            )
        self.table = torch.cat([torch.ones(1, device="cpu"), alphas_cumprod.float().cpu()])

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        self.table = self.table.to(t.device)
        kept = self.table[self._index(t)]
        return kept.sqrt(), (1 - kept).sqrt()

    def timestep(self, t: Tensor) -> Tensor:
        return (self._index(t) - 1).clamp(min=0)

    def _index(self, t: Tensor) -> Tensor:
        index = (t * (len(self.table) - 1)).round().long()
        return torch.where(t > 0, index.clamp(min=1), index)
