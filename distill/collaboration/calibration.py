"""From the judge's scores of a student's images to a threshold that keeps a promised average number of steps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import identity
from distill.collaboration.judges import SCORES, Judge
from distill.errors import ConfigError
from distill.files import read_json, save_json

PERCENTILES = range(101)
VERSION = 2  # of what a calibration keeps; raised whenever one that was kept says too little to be trusted
SHIPPED = {"shapes": "shapes_judge", "small-shapes": "small_judge"}  # the weights behind a judge's name


@dataclass(frozen=True)
class Calibration:
    """What a judge makes of a student's images, at exactly the steps and guidance they will be made with.

    Attributes:
        student: digests of the parts of its pipeline, by their names.
        call: arguments of the student's call, as JSON has them.
        steps: network steps of one image of the student's, N_S.
        judge: its spec.
        prompts: how many held-out prompts were scored.
        prompts_hash: of these.
        percentiles: scores at 0, 1, ..., 100 percent (NumPy's linear interpolation).
        choice: how rejected images are to be improved: `mode`, `variance`, `teacher_steps`, `share`; for which
            `budget`, `teacher` (as `student`) and `teacher_call`, the `value` this had, and all that was `tried`. Empty
            if nothing was chosen.
        judged_by: digest of the judge's weights and its way of scoring, see `judge_identity`.
        version: of this list.
    """

    student: dict[str, str]
    call: dict[str, Any]
    steps: int
    judge: str
    prompts: int
    prompts_hash: str
    percentiles: list[float]
    choice: dict[str, Any] = field(default_factory=dict)
    judged_by: str = ""
    version: int = VERSION

    def threshold(self, share: float) -> float:
        """The score below which `share` of the student's images lie; fewer where many have the same score.

        Args:
            share: in [0, 1]. Below 1 % and above 99 % scores are interpolated on a line to the lowest and the highest,
                so that the share kept there is a rough one.
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

        k = max(share * (self.prompts - 1) + 1, 1e-9)
        tail = (1 - confidence) / 2
        low, high = (float(beta.ppf(q, k, self.prompts + 1 - k)) for q in (tail, 1 - tail))
        return self.steps + low * teacher_steps, self.steps + high * teacher_steps

    def check(
        self,
        call: dict[str, Any],
        judge: Judge,
        teacher_call: dict[str, Any],
        student: dict[str, str] | None = None,
        teacher: dict[str, str] | None = None,
    ) -> None:
        """Refuses another set-up than the one that was scored, and where a way was chosen, another teacher.

        Args:
            call, teacher_call: of student and teacher.
            judge: that is to decide.
            student, teacher: their `parts`, whose precision is part of them; None is not looked at.

        Raises:
            ConfigError: what differs.
        """
        chosen = self.choice if "teacher" in self.choice else {}
        pairs = {
            "student": _parts_apart(self.student, student),
            "call of the student": _calls_apart(self.call, call),
            "judge": self._judge_apart(judge),
            "teacher": _parts_apart(chosen["teacher"], teacher) if chosen else "",
            "call of the teacher": _calls_apart(chosen["teacher_call"], teacher_call) if chosen else "",
        }
        if apart := [f"{name} ({how})" for name, how in pairs.items() if how]:
            raise ConfigError(
                f"the calibration was made for another {' and another '.join(apart)}; make one for this with "
                "`distill calibrate`"
            )

    def _judge_apart(self, judge: Judge) -> str:
        if self.judge != judge.spec:
            return f"{_short(self.judge)}, not {_short(judge.spec)}"
        return "" if self.judged_by == judge_identity(judge.spec) else f"{_short(self.judge)} scores otherwise by now"

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        save_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            ConfigError: no such file, one of something else, or one of an earlier version.
        """
        if not Path(path).is_file():
            raise ConfigError(f"there is no calibration at '{path}'; `distill calibrate` makes one")
        try:
            facts = read_json(path)
        except ValueError as error:
            raise ConfigError(f"'{path}' is no calibration; give a file that `distill calibrate` wrote") from error
        return cls.read(facts, path)

    @classmethod
    def read(cls, facts: Any, path: str | Path) -> Calibration:
        """A calibration from what JSON kept of it.

        Args:
            facts: of all attributes.
            path: where they were kept.

        Raises:
            ConfigError: they are of something else, or of an earlier version.
        """
        if isinstance(facts, dict) and "percentiles" in facts and facts.get("version") != VERSION:
            raise ConfigError(
                f"the calibration '{path}' is of another version of distill, which kept other things; make it again "
                "with `distill calibrate`"
            )
        try:
            made = cls(**facts)
        except TypeError as error:
            raise ConfigError(f"'{path}' is no calibration; give a file that `distill calibrate` wrote") from error
        if wrong := _wrong(made):
            raise ConfigError(f"'{path}' is no calibration ({wrong}); give a file that `distill calibrate` wrote")
        return made


def _wrong(made: Calibration) -> str:
    """What is wrong with a calibration that was read."""
    scores, choice = made.percentiles, made.choice
    if not (isinstance(scores, list) and len(scores) == len(PERCENTILES) and all(map(_number, scores))):
        return f"its percentiles are not {len(PERCENTILES)} numbers"
    if any(high < low - 1e-9 * abs(low) for low, high in zip(scores, scores[1:], strict=False)):  # but for rounding
        return "its percentiles fall"
    if not all(isinstance(value, int) and value > 0 for value in (made.steps, made.prompts)):
        return f"it was made with {made.steps} steps and {made.prompts} prompts"
    if not all(isinstance(value, dict) for value in (made.student, made.call, choice)):
        return "its student, call and choice are no groups"
    if not all(isinstance(value, str) for value in (made.judge, made.prompts_hash, made.judged_by)):
        return "its judge has no name"
    lacking = {"mode", "teacher_steps", "share", "budget", "teacher", "teacher_call"} - choice.keys() if choice else {}
    if lacking:
        return f"its choice lacks {', '.join(sorted(lacking))}"
    if choice and not all(_number(choice[name]) for name in ("teacher_steps", "share", "budget")):
        return "its choice is not of numbers"
    if choice and not all(isinstance(choice[name], dict) for name in ("teacher", "teacher_call")):
        return "its choice names no teacher"
    return ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers(scores: Tensor, spec: str) -> Tensor:
    """Scores `[N]`, of which those that are no number, as of a picture that overflowed, are as low as the lowest.

    Raises:
        ConfigError: none of them is a number.
    """
    known = scores[scores.isfinite()]
    if not len(known):
        raise ConfigError(f"the judge '{spec}' gave no score that is a number; see what the student paints")
    low, high = known.min().item(), known.max().item()
    return scores.nan_to_num(low, neginf=low, posinf=high)


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


def parts(pipeline: Any) -> dict[str, str]:
    """Digests of all parts of a pipeline by their names, wherever they were loaded from."""
    return {name: identity.digest(_about(part)) for name, part in pipeline.components.items() if part is not None}


def _about(part: Any) -> Any:
    """What a part of a pipeline is: weights, a vocabulary, settings."""
    if hasattr(part, "get_vocab"):
        return [type(part).__name__, part.get_vocab(), part.model_max_length]
    config = getattr(part, "config", None)
    known = config if isinstance(config, dict) else {}  # of diffusers; what begins with _ says where it came from
    settings = {name: value for name, value in known.items() if not name.startswith("_")}
    if isinstance(part, nn.Module):
        return [digest(part), settings]
    return [type(part).__name__, settings or repr(part)]


def judge_identity(spec: str) -> str:
    """A digest of what scores under a judge's name: its files' contents, wherever they lie, and the way of scoring."""
    return identity.digest([identity.named(SHIPPED.get(spec, spec), identity.contents), SCORES])


def plain(call: dict[str, Any]) -> dict[str, Any]:
    """A call as JSON keeps it, which knows no tuples.

    Raises:
        ConfigError: it has something that cannot be kept.
    """
    for name, value in call.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a call with {name} of the type {type(value).__name__} cannot be kept; give one of numbers and texts, "
                "or what differs by prompt in inputs"
            ) from error
    return json.loads(json.dumps(call))


def _parts_apart(ours: dict[str, str], given: dict[str, str] | None) -> str:
    """Which parts differ; empty if none do."""
    if given is None:
        return ""
    names = [name for name in {**ours, **given} if ours.get(name) != given.get(name)]
    return f"its {', '.join(names)}" if names else ""


def _calls_apart(ours: dict[str, Any], given: dict[str, Any]) -> str:
    """Which arguments differ; empty if none do."""
    ours, given = plain(ours), plain(given)
    names = [name for name in {**ours, **given} if (name in ours, ours.get(name)) != (name in given, given.get(name))]
    sides = (", ".join(f"{name}={call[name]}" for name in names if name in call) for call in (ours, given))
    return ", not ".join(_short(side or "without " + ", ".join(names)) for side in sides) if names else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."
