"""From the judge's scores of a student's images to a threshold that keeps a promised average number of steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.files import read_json, save_json

PERCENTILES = range(101)


@dataclass(frozen=True)
class Calibration:
    """What a judge makes of a student's images, at exactly the steps and guidance they will be made with.

    Attributes:
        student: digest of the student's weights.
        call: arguments of the student's call.
        steps: network steps of one image of the student's, N_S.
        judge: its spec.
        prompts: how many held-out prompts were scored.
        prompts_hash: of these.
        percentiles: scores at 0, 1, ..., 100 percent (NumPy's linear interpolation).
        choice: how rejected images are to be improved: `mode`, `variance`, `teacher_steps`, `share`; for which
            `budget` and `teacher` (a digest of its weights), the `value` this had, and all that was `tried`. Empty if
            nothing was chosen.
    """

    student: str
    call: dict[str, Any]
    steps: int
    judge: str
    prompts: int
    prompts_hash: str
    percentiles: list[float]
    choice: dict[str, Any] = field(default_factory=dict)

    def threshold(self, share: float) -> float:
        """The score below which `share` of the student's images lie; fewer where many have the same score.

        Args:
            share: in [0, 1].
        """
        return float(torch.quantile(torch.tensor(self.percentiles, dtype=torch.float64), share))

    def share(self, budget: float, teacher_steps: int) -> float:
        """The share of images the teacher may improve with `teacher_steps` each, for `budget` steps on average.

        Raises:
            ConfigError: a budget below the student's own steps, or above what improving every image takes.
        """
        share = (budget - self.steps) / teacher_steps
        if not 0 <= share <= 1:
            raise ConfigError(
                f"{budget} steps on average cannot be kept by a student of {self.steps} and a teacher of "
                f"{teacher_steps}; ask for {self.steps} to {self.steps + teacher_steps}"
            )
        return share

    def interval(self, share: float, teacher_steps: int, confidence: float = 0.95) -> tuple[float, float]:
        """Average steps on fresh prompts that a threshold at `share` leads to, given how few prompts it was set by.

        The share of fresh images below the k-th smallest of n scores is distributed as Beta(k, n + 1 - k).

        Returns:
            The bounds of the central interval.
        """
        from scipy.stats import beta

        if share in (0, 1):
            return (self.steps + share * teacher_steps,) * 2
        k = max(share * (self.prompts - 1) + 1, 1e-9)
        tail = (1 - confidence) / 2
        low, high = (float(beta.ppf(q, k, self.prompts + 1 - k)) for q in (tail, 1 - tail))
        return self.steps + low * teacher_steps, self.steps + high * teacher_steps

    def check(self, student: str, call: dict[str, Any], judge: str, teacher: str | None) -> None:
        """Refuses another set-up than the one that was scored.

        Args:
            student: digest of its weights, whose precision is part of it.
            call: of the student.
            judge: its spec.
            teacher: as `student`; not looked at where no way was chosen.

        Raises:
            ConfigError: another student, call or judge; another teacher than the one a way was chosen with.
        """
        for name, ours, given in (
            ("student", self.student, student),
            ("call of the student", self.call, call),
            ("judge", self.judge, judge),
            ("teacher", self.choice.get("teacher", teacher), teacher),
        ):
            if ours != given:
                raise ConfigError(
                    f"the calibration was made for another {name} ({_short(ours)}, not {_short(given)}); make one for "
                    "this with `distill calibrate`"
                )

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        save_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            ConfigError: no such file, or one of something else.
        """
        if not Path(path).is_file():
            raise ConfigError(f"there is no calibration at '{path}'; `distill calibrate` makes one")
        try:
            return cls(**read_json(path))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"'{path}' is no calibration; give a file that `distill calibrate` wrote") from error


def percentiles(scores: Tensor) -> list[float]:
    """Of scores `[N]`, at `PERCENTILES`."""
    at = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    return torch.quantile(scores.double(), at).tolist()


def prompts_hash(prompts: Sequence[str]) -> str:
    """A digest of the prompts, in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]


def digest(network: Any) -> str:
    """A digest of a network's weights as they are in memory: their names, shapes and up to 64 values of each."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(len(flat) // 64, 1)][:64].float().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + some.numpy().tobytes())
    return sha.hexdigest()[:12]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."
