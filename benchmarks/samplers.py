"""One student of a variance-preserving teacher under the samplers it could be exported with, at 1, 2 and 4 steps.

`LCMScheduler` noises each answer afresh, as the student was trained; `EulerAncestralDiscreteScheduler` with trailing
spacing, which SD-Turbo ships with, keeps part of the noise it had. The better one is what students are exported with.
"""

from __future__ import annotations

import argparse
from typing import Any

import diffusers
import results

from distill.cli import quiet
from distill.evaluation.evaluate import evaluate_on_shapes
from distill.export import load_student
from distill.inference import Painter

SAMPLERS = ("LCMScheduler", "EulerAncestralDiscreteScheduler")


def main() -> None:
    """Measures and writes benchmarks/results/NAME.json."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--name", default="samplers")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for sampler in SAMPLERS:
        for steps in (1, 2, 4):
            rows[f"{sampler}, {steps} steps"] = evaluate_on_shapes(
                painter(options.checkpoint, sampler, steps), options.samples
            )
            print(sampler, steps, rows[f"{sampler}, {steps} steps"], flush=True)
    print(results.save(options.name, {"rows": rows}, [0]))


def painter(checkpoint: str, sampler: str, steps: int) -> Painter:
    """The student under a sampler that visits its trained levels."""
    student = load_student(checkpoint)
    pipeline = student.pipeline()
    call = dict(student.calls[str(steps)])
    if sampler != type(pipeline.scheduler).__name__:
        kind = getattr(diffusers, sampler)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        levels = call.pop("timesteps")
        pipeline.scheduler.set_timesteps(steps)
        if pipeline.scheduler.timesteps.tolist() != levels:
            raise SystemExit(f"{sampler} visits {pipeline.scheduler.timesteps.tolist()}, the student knows {levels}")
    pipeline.set_progress_bar_config(disable=True)
    return Painter(pipeline, call)


if __name__ == "__main__":
    main()
