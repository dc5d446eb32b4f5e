"""How the worker ends: on a signal within a bound, on a second one at once, with 0 after a signal and 1 after a fault.

Nothing needs an orderly end: what is not appended is read again by whoever is next. An orderly one lets go of the
partitions, so that others have them in a moment and not when the session has run out.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, NoReturn

import click

from headrace import progress
from headrace.terminal import say_error

logger = logging.getLogger(__name__)

LONGEST_ENDING_S = 9.0
"""Docker kills after 10 s."""


class Refused(click.ClickException):
    """What Faust's command line shows in one line, as ours are shown, before it ends with 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the line to stderr."""
        say_error(self.message)


def leave(code: int) -> NoReturn:
    """End the process now. Python would wait for the thread of a call that hangs; what it does is harmless."""
    logging.shutdown()
    progress.end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def give_up(error: BaseException) -> NoReturn:
    """One line to the person, and a non-zero exit."""
    say_error(error)
    leave(1)


def leave_on_signals() -> None:
    """Until there is an event loop: nothing has begun, so a signal ends the process at once.

    Python's own answer to SIGTERM is none at all in the first process of a container.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, frame: Any) -> None:
    leave(0)


def while_signals_are_heard(work: Callable[[], None]) -> None:
    """Do blocking work in a thread: a signal waits for the end of what its own thread does.

    Raises:
        HeadraceError: as the work raised it.
    """
    faults: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            faults.append(error)

    thread = threading.Thread(target=guarded, name="headrace-check", daemon=True)
    thread.start()
    thread.join()
    if faults:
        raise faults[0]


class Deadline:
    """Ends the process when an orderly end takes too long, whatever hangs. May be set again and again."""

    def __init__(self, code: Callable[[], int]) -> None:
        self._code = code
        self._timer: threading.Timer | None = None

    def set(self) -> None:
        """From now on there are `LONGEST_ENDING_S` left."""
        if self._timer is None:
            self._timer = threading.Timer(LONGEST_ENDING_S, self._expire)
            self._timer.daemon = True
            self._timer.start()

    def _expire(self) -> None:
        logger.warning(
            "not ended after %g s, ends now; what was not appended is read again by the next worker, and the group "
            "may miss this one until its session has run out",
            LONGEST_ENDING_S,
        )
        leave(self._code())
