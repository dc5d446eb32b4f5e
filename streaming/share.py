"""The share of events that go to the dead letters: too large a one is looked at before the topic is through."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.conform import Reject
from headrace.errors import TerminalError
from streaming.settings import StreamSettings

RECOVERED = 0.8
"""A view recovers below this part of the bound, so that a share close to it does not flap."""


class DeadLetterShareError(TerminalError):
    """Too large a share of a view's events was turned away, and the settings say to stop then."""


@dataclass(frozen=True)
class _Batch:
    """What was judged at one moment."""

    at_s: float
    events: int
    rejected: Counter[tuple[str, str]]
    """By reason and field, "" for the whole record."""


class LetterShare:
    """The share of one view. Thread-safe.

    Looked at are the events of the last `dead_letter_window_seconds`, and always the last `dead_letter_min_events` at
    least: fewer than that ever are no fault, and a topic without events stays what it was.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, view: str, settings: StreamSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._bound = settings.dead_letter_share
        self._window_s = settings.dead_letter_window_seconds
        self._least = settings.dead_letter_min_events
        self._clock = clock
        self._batches: deque[_Batch] = deque()
        self._events = 0
        self._rejected: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.fault: str | None = None

    def note(self, events: int, rejects: Sequence[Reject]) -> None:
        """Take in a batch of events, accepted and rejected ones. Costs the same whatever the window."""
        if events == 0:
            return
        rejected = Counter((reject.reason.value, reject.field or "") for reject in rejects)
        with self._lock:
            self._batches.append(_Batch(self._clock(), events, rejected))
            self._events += events
            self._rejected.update(rejected)
            self._forget()
            self._judge()

    def _forget(self) -> None:
        oldest_s = self._clock() - self._window_s
        while self._batches[0].at_s < oldest_s and self._events - self._batches[0].events >= self._least:
            gone = self._batches.popleft()
            self._events -= gone.events
            self._rejected -= gone.rejected

    def _judge(self) -> None:
        dead = self._rejected.total()
        share = dead / self._events
        bound = self._bound if self.fault is None else self._bound * RECOVERED
        if self._events < self._least or share <= bound:
            self.fault = None
            return
        (reason, field), count = self._rejected.most_common(1)[0]
        where = f" of `{field}`" if field else ""
        self.fault = (
            f"view `{self._view}`: {dead:,} of its last {self._events:,} events ({share:.0%}) are bad, more than "
            f"HEADRACE_DEAD_LETTER_SHARE={self._bound:g}; mostly {reason}{where} ({count:,}); look at them with "
            "`faust -A streaming dead-letters`, and repair the producer or the view"
        )
