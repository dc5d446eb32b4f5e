"""What a `luigi` command that failed ends with: after all else a line for each task, why, and what to do.

Of the parent, which hears of the end of every task. One that succeeded when it was tried again is not told of.
"""

from __future__ import annotations

import re

import luigi

from headrace.terminal import say_error

NOT_AGAIN = "It is not tried again."
"""How the explanation of a failure ends that a retry cannot mend. `batch.processes.Worker` goes by it."""

OURS = re.compile(r"^headrace\.errors\.\w+: (?P<message>.*)\Z", re.DOTALL | re.MULTILINE)
"""The end of a traceback of an error that Headrace raised on purpose."""

_BEFORE = re.compile(r"^(\w+Error: |Task \w+ (?=timed out|died))")
_MOST = 10

_failed: dict[str, str] = {}


def note(task: luigi.Task, explanation: str) -> None:
    """Remember why a task failed.

    Args:
        explanation: what its `on_failure` said, or the traceback of what kept it from being scheduled.
    """
    title = getattr(task, "title", None)
    _failed[task.task_id] = f"{task if title is None else title().strip()}: {_message(explanation)}"


def note_of_all(message: str) -> None:
    """Remember why no task could be started."""
    _failed[""] = message


def forget(task_id: str) -> None:
    """It succeeded."""
    _failed.pop(task_id, None)


def tell() -> None:
    """Say why each task failed, to stderr."""
    for line in list(_failed.values())[:_MOST]:
        say_error(line)
    if len(_failed) > _MOST:
        say_error(f"and {len(_failed) - _MOST} tasks more; `luigi --module batch History` lists them")


def _message(explanation: str) -> str:
    text = explanation.removesuffix(NOT_AGAIN).strip()
    found = OURS.search(text)
    if found is not None:
        return found["message"].strip()
    if text.startswith("Traceback "):
        return text.splitlines()[-1]
    return _BEFORE.sub("", text)
