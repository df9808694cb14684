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

INTERRUPT, END, REQUEUE = 1, 2, 3  # what a process can be told; the greater wins


class Told:
    """What any process of a run was told, by Ctrl-C or a cluster, for all of them to agree on between two batches.

    Lightning's own handler broadcasts amid whatever the process does together with others, where a signal that does not
    reach all of them at once makes them wait for each other for good; a process that ends by itself does so too.

    Args:
        trainer: of the run. Lightning puts back the handlers from before it when the run ends.
    """

    def __init__(self, trainer: L.Trainer):
        self._trainer, self._here = trainer, 0
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other one handle signals
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._handler(END))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signal.signal(environment.requeue_signal or signal.SIGUSR1, self._handler(REQUEUE))

    def _handler(self, what: int) -> Any:
        def note(number: int, frame: Any) -> None:
            self._here = max(self._here, what)

        return note

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._here:
            raise KeyboardInterrupt
        self._here = INTERRUPT
        if self._trainer.is_global_zero:
            print("\nEnding after this batch; once more Ctrl-C ends at once and loses what is not saved.", flush=True)

    def anywhere(self) -> int:
        """0, INTERRUPT, END or REQUEUE, the same on all processes; to be asked by all of them."""
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
