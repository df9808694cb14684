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
from lightning.pytorch.utilities.exceptions import SIGTERMException

INTERRUPT, END, REQUEUE = 1, 2, 3  # what a process can be told; the greater wins


class Requeued(SIGTERMException):
    """Ends a run that Slurm has queued again."""


class Told:
    """What any process of a run was told, by Ctrl-C or a cluster, for all of them to agree on between two batches.

    Lightning's own handler broadcasts amid whatever the process does together with others, where a signal that does not
    reach all of them at once makes them wait for each other for good; a process that ends by itself does so too.

    Args:
        trainer: of the run. Lightning puts back the handlers from before it when the run ends; of these that of SIGTERM
            is called as well.
    """

    def __init__(self, trainer: L.Trainer):
        self._trainer, self._here = trainer, 0
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other one handle signals
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of a run that a script has put in the background
            signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._terminated)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            asked = environment.requeue_signal or signal.SIGUSR1
            if not callable(self._earlier(asked)):  # Lightning, too, leaves that of others
                signal.signal(asked, self._asked_to_requeue)

    def anywhere(self) -> int:
        """0, INTERRUPT, END or REQUEUE, the same on all processes; to be asked by all of them."""
        if self._trainer.world_size == 1:
            return self._here
        told = torch.tensor(self._here, device=self._trainer.strategy.root_device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return int(told)

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._here:
            raise KeyboardInterrupt
        self._here = INTERRUPT
        if self._trainer.is_global_zero:
            print("\nEnding after this batch; once more Ctrl-C ends at once and loses what is not saved.", flush=True)

    def _terminated(self, number: int, frame: Any) -> None:
        self._here = max(self._here, END)
        if callable(earlier := self._earlier(number)):
            earlier(number, frame)

    def _asked_to_requeue(self, number: int, frame: Any) -> None:
        self._here = REQUEUE

    def _earlier(self, number: int) -> Any:
        return self._trainer._signal_connector._original_handlers.get(signal.Signals(number))


def end(told: int, requeues: bool) -> None:
    """Ends this process as it was told.

    Args:
        told: as `Told.anywhere` answers, not 0.
        requeues: whether it is this process that asks Slurm to run the job again.

    Raises:
        KeyboardInterrupt: of a Ctrl-C.
        SIGTERMException: otherwise.
    """
    if told == INTERRUPT:
        raise KeyboardInterrupt
    if told == REQUEUE:
        if requeues:
            _requeue()
        raise Requeued
    raise SIGTERMException


def _requeue() -> None:
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    command = ["scontrol", "requeue", f"{job}_{task}" if job else os.environ["SLURM_JOB_ID"]]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"distill: the job is not requeued: {error}", file=sys.stderr)
