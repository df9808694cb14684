"""How a run of many processes ends when one of them is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

END, REQUEUE = 1, 2  # what a process can be told; the greater wins


class Told:
    """What a cluster has told any process of a run, for all of them to agree on between two batches.

    Lightning's own handler broadcasts amid whatever the process does together with others, where a signal that does not
    reach all of them at once makes them wait for each other for good; a process that ends by itself does so too.

    Args:
        trainer: of the run. Lightning puts back the handlers from before it when the run ends.
    """

    def __init__(self, trainer: L.Trainer):
        self._trainer, self._here = trainer, 0
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other one handle signals
        signal.signal(signal.SIGTERM, self._handler(END))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signal.signal(environment.requeue_signal or signal.SIGUSR1, self._handler(REQUEUE))

    def _handler(self, what: int) -> Any:
        def note(number: int, frame: Any) -> None:
            launcher = self._trainer.strategy.launcher
            if launcher is not None and not self._here:
                launcher.kill(number)  # type: ignore[arg-type]  # those it has launched
            self._here = max(self._here, what)

        return note

    def anywhere(self) -> int:
        """0, END or REQUEUE, the same on all processes; to be asked by all of them."""
        if self._trainer.world_size == 1:
            return self._here
        told = torch.tensor(self._here, device=self._trainer.strategy.root_device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return int(told)


def requeue() -> None:
    """Asks Slurm to run this job again; says so if it will not."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    command = ["scontrol", "requeue", f"{job}_{task}" if job else os.environ["SLURM_JOB_ID"]]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"distill: the job is not requeued: {error}", file=sys.stderr)
