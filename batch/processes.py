"""The processes of a `luigi` command: how they end, and how a task's failure is counted.

**Every process** ends at once by Ctrl-C, SIGTERM or SIGHUP, also within a call of a library that never comes back, and
by the signal itself, so that a shell and a supervisor see which (130, 143, 129). When the parent is gone, however it
went, the kernel ends its children: none works on behind the next run. That is safe because nothing which counts is ever
half made: files appear by a rename or a link, and the receipt comes last. An orderly end, by an exception, can be
swallowed, and does not reach a task that waits for a database.

**Failures.** Luigi's own worker tries a task again whatever it failed of, and may count the end of one process twice.
`Worker` tells the scheduler, whichever it is, what is not to be tried again, and counts each end once.
"""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import time
from types import FrameType
from typing import Any

import luigi
import luigi.interface
from luigi.task_status import DONE, FAILED, RUNNING
from luigi.worker import TaskProcess

from batch import failures
from headrace import progress

logger = logging.getLogger("luigi-interface")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
_parent = os.getpid()


def guard() -> None:
    """Make this process, a `luigi` command, and all that it forks end as the module says."""
    global _parent  # noqa: PLW0603 - a fact about the process
    if multiprocessing.parent_process() is not None:  # it was spawned, not forked
        _parent = os.getppid()
        _begin_child()
        return
    _parent = os.getpid()
    os.register_at_fork(after_in_child=_begin_child)
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, _stop)
    luigi.interface._WorkerSchedulerFactory = Factory  # type: ignore[misc]


class Worker(luigi.worker.Worker):
    """Luigi's worker, with each failure counted once and for what it is."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._ended: set[TaskProcess] = set()

    def _add_task(self, *args: Any, **kwargs: Any) -> None:
        """Before a failure is told, tell how often the task may fail: the scheduler judges by what it knew before.

        What it knew may also be wrong: a task that sets its link is registered anew, with the scheduler's own policy.
        """
        task = self._scheduled_tasks.get(kwargs["task_id"])
        if task is not None and kwargs["status"] == FAILED:
            explanation = str(json.loads(kwargs["expl"]))
            failures.note(task, explanation)
            is_final = explanation.endswith(failures.NOT_AGAIN)
            policy = {**kwargs["retry_policy_dict"], **({"retry_count": 1} if is_final else {})}
            kwargs["retry_policy_dict"] = policy
            self._scheduler.add_task(worker=self._id, task_id=task.task_id, status=RUNNING, retry_policy_dict=policy)
        elif kwargs["status"] == DONE:
            failures.forget(kwargs["task_id"])
        super()._add_task(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _announce_scheduling_failure(self, task: luigi.Task, expl: str) -> None:
        failures.note(task, expl)
        super()._announce_scheduling_failure(task, expl)  # type: ignore[no-untyped-call]

    def _purge_children(self) -> None:
        """As Luigi's, but a process that died or took too long is reported once and not at each look.

        A report too many could be taken for one of the next try.
        """
        for task_id, process in self._running_tasks.items():
            if process in self._ended:
                continue
            if not process.is_alive() and process.exitcode:
                event = luigi.Event.PROCESS_FAILURE
                text = f"Task {task_id} died unexpectedly with exit code {process.exitcode}"
            elif process.is_alive() and process.timeout_time is not None and time.time() > process.timeout_time:
                process.terminate()
                event = luigi.Event.TIMEOUT
                text = f"Task {task_id} timed out after {process.worker_timeout} seconds and was terminated."
            else:
                continue
            self._ended.add(process)
            process.task.trigger_event(event, process.task, text)
            logger.info(text)
            self._task_result_queue.put((task_id, FAILED, text, [], []))


class Factory(luigi.interface._WorkerSchedulerFactory):
    """Luigi's schedulers with our worker; for `luigi.build(..., worker_scheduler_factory=Factory())`."""

    def create_worker(self, scheduler: Any, worker_processes: int, assistant: bool = False) -> Worker:  # noqa: D102 - Luigi's
        return Worker(scheduler=scheduler, worker_processes=worker_processes, assistant=assistant)


def _begin_child() -> None:
    global _parent  # noqa: PLW0603 - a fact about the process
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != _parent:  # it died before the kernel was asked
        os._exit(1)
    _parent = os.getpid()


def _stop(signum: int, _: FrameType | None) -> None:
    """In the parent, to say what happened."""
    progress.end()
    # Not by the logger: it may be what was interrupted.
    os.write(2, f"ended by {signal.Signals(signum).name}; no task is left running\n".encode())
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # the first process of a container does not die of a signal
