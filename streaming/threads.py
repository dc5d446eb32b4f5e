"""Threads for blocking calls: few, however many callers there are, and a call that hangs holds up its own caller only.

A thread costs memory, and of threads that compute only one goes on at a time: each that takes its turn makes the others
wait, and to change turns costs more than a small call does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from headrace.objects import ObjectPath
from streaming.settings import View

LONG_S = 0.03
"""For a call that takes longer another thread comes in."""

REQUESTS_AT_ONCE = 16
"""Appends to an object store: they wait for answers, and for Python's lock hardly ever."""

_NO_BOUND = 1_000_000

Call = tuple[Future[Any], Callable[[], Any]]


class Crew:
    """The threads of some callers (`Thread`), each of which has one call made at a time.

    Args:
        at_once: how many calls are made at once, those not counted that take longer than `LONG_S`.
    """

    def __init__(self, name: str, at_once: int = 1) -> None:
        self._at_once = at_once
        self._pool = ThreadPoolExecutor(_NO_BOUND, name)  # it starts a thread where none is idle
        self._lock = threading.Lock()
        self._ready: deque[Thread] = deque()
        self._at_work: set[Thread] = set()
        self._is_watched = False
        self._is_closed = False

    def put(self, caller: Thread, call: Call) -> None:
        """Have a call made, after those that the caller has put before.

        Raises:
            RuntimeError: the crew is closed.
        """
        with self._lock:
            if self._is_closed:
                msg = "the crew makes no more calls"
                raise RuntimeError(msg)
            caller.calls.append(call)
            if caller not in self._at_work and len(caller.calls) == 1:
                self._ready.append(caller)
            self._begin()

    def close(self) -> None:
        """Begin no more calls. Idempotent."""
        with self._lock:
            self._is_closed = True
            for caller in (*self._ready, *self._at_work):
                for future, _ in caller.calls:
                    future.cancel()
            self._ready.clear()
        self._pool.shutdown(wait=False)

    def _begin(self) -> None:
        """Begin what may be begun, and have somebody look again while something waits. Under the lock."""
        while (caller := self._next()) is not None:
            self._pool.submit(self._work, caller)
        if self._ready and not self._is_watched:
            self._is_watched = True
            self._pool.submit(self._watch)

    def _next(self) -> Thread | None:
        """Who has a call made now; None if nobody may. Under the lock."""
        if not self._ready or sum(one.busy_s < LONG_S for one in self._at_work) >= self._at_once:
            return None
        caller = self._ready.popleft()
        self._at_work.add(caller)
        return caller

    def _work(self, caller: Thread | None) -> None:
        """Make a call, and then what waits. In a thread."""
        while caller is not None:
            caller.make_call()
            with self._lock:
                self._at_work.remove(caller)
                if caller.calls and not self._is_closed:
                    self._ready.append(caller)
                caller = self._next()
                self._begin()

    def _watch(self) -> None:
        """While something waits, see whether the calls under way have become long ones. In a thread."""
        while self._is_watched:
            time.sleep(LONG_S)
            with self._lock:
                self._begin()
                self._is_watched = bool(self._ready)


class Thread(Executor):
    """A caller of a crew, to which it is one thread: its calls are made one by one, in order. Thread-safe."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.calls: deque[Call] = deque()
        self._begun_s: float | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`."""
        future: Future[Any] = Future()
        self.crew.put(self, (future, partial(fn, *args, **kwargs)))
        return future

    @property
    def busy_s(self) -> float:
        """Since when it makes the call that it makes now, in seconds; 0: it makes none. From any thread."""
        begun_s = self._begun_s
        return 0.0 if begun_s is None else time.monotonic() - begun_s

    def make_call(self) -> None:
        """Make the next call, if it is wanted still. Of the crew."""
        future, work = self.calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        self._begun_s = time.monotonic()
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - of whoever asked
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            self._begun_s = None


@dataclass(frozen=True)
class Pools:
    """The threads of a view: one a kind of work, so that each store sees one caller.

    Attributes:
        decode, offline: the view's own: a schema registry or a folder that hangs holds up no other view.
        letters, online: shared by all views, as are the producer and the store.
        compute: for decoding that waits for nothing; shared by all views.
    """

    decode: Thread
    letters: Thread
    online: Thread
    offline: Thread
    compute: Thread

    @classmethod
    def of(cls, views: Iterable[View]) -> dict[str, Pools]:
        """The threads of some views, by name, none of them started yet."""
        letters, online, compute = (Thread(Crew(f"headrace-{what}")) for what in ("letters", "online", "compute"))
        decoding, files = Crew("headrace-decode"), Crew("headrace-offline")
        objects = Crew("headrace-objects", REQUESTS_AT_ONCE)
        found = {}
        for view in views:
            appending = objects if isinstance(view.contract.directory, ObjectPath) else files
            found[view.contract.name] = cls(Thread(decoding), letters, online, Thread(appending), compute)
        return found

    def close(self) -> None:
        """Begin no more work, of whatever view."""
        for one in (self.decode, self.letters, self.online, self.offline, self.compute):
            one.crew.close()
