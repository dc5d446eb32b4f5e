"""What the status page has to ask for: the broker, the folders, the dead letters, the run ledger.

Asked only while somebody looks, in threads, at most once in some seconds whatever the number of viewers, and never so
often that it takes more than a twentieth of a thread's time. What fails or hangs is told with since when, and hinders
neither the page nor the stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from headrace.runs import HISTORY, History, Run, run_of
from streaming.broker import Broker, Group, Log
from streaming.deadletters import topic_of
from streaming.letters import StoredLetter, between
from streaming.settings import StreamConfig

REST = 20
"""So many times as long as it took a look-up rests."""

LATE_S = 10.0
"""An answer that takes longer is not waited for."""

KEPT_LETTERS = 5
"""How many of the newest dead letters of each partition are looked at, and twice as many shown."""

LETTERS_AT_ONCE = 20
SHOWN_BYTES = 300
RUN_DAYS = 7
MOST_RUNS = 2000

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer(Generic[Result]):
    """What is known.

    Attributes:
        value: the last answer; None before the first.
        at_s: when it was asked for, seconds since the epoch.
        unknown_since_s: since when there is no newer one though it was asked for; None where the answer is current.
        why: what stands against it.
    """

    value: Result | None
    at_s: float | None
    unknown_since_s: float | None
    why: str | None


class LookUp(Generic[Result]):
    """One question, asked again and again. Thread-safe.

    Args:
        ask: blocking; may raise, or hang.
        every_s: how often at most.
    """

    def __init__(self, name: str, ask: Callable[[], Result], every_s: float) -> None:
        self._name = name
        self._ask = ask
        self._every_s = every_s
        self._due_s = 0.0
        self._asking: tuple[float, float] | None = None
        self._value: Result | None = None
        self._at_s: float | None = None
        self._first_s: float | None = None
        self._why: str | None = None
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Ask, if it is time and nobody does. Returns at once."""
        with self._lock:
            now_s = time.monotonic()
            if self._asking is not None or now_s < self._due_s:
                return
            self._asking = now_s, time.time()
            self._first_s = self._first_s or self._asking[1]
            asked_s = self._asking[1]
        threading.Thread(target=self._run, args=(now_s, asked_s), name=f"headrace-{self._name}", daemon=True).start()

    @property
    def is_awaited(self) -> bool:
        """Whether an answer may come in a moment: the question is asked, not for long, and did not fail before."""
        with self._lock:
            return self._asking is not None and self._why is None and time.monotonic() - self._asking[0] < LATE_S

    def answer(self) -> Answer[Result]:
        """What is known now."""
        with self._lock:
            why = self._why
            if self._asking is not None and (spent_s := time.monotonic() - self._asking[0]) >= LATE_S:
                why = f"no answer for {spent_s:.0f} s"
            elif why is None and self._at_s is None:
                why = "being looked up"
            since_s = None if why is None else self._at_s or self._first_s or time.time()
            return Answer(self._value, self._at_s, since_s, why)

    def _run(self, begun_s: float, asked_s: float) -> None:
        value, why = None, None
        try:
            value = self._ask()
        except Exception as error:  # noqa: BLE001 - whatever it is, the page tells of it
            why = f"{type(error).__name__}: {error}"
        with self._lock:
            now_s = time.monotonic()
            self._asking = None
            self._due_s = now_s + max(self._every_s, REST * (now_s - begun_s) if why is None else self._every_s)
            self._why = why
            if why is None:
                self._value, self._at_s = value, asked_s


@dataclass(frozen=True)
class Topics:
    """What the broker says of the served topics.

    Attributes:
        partitions: how many each has.
        logs: their ends; what has no leader is not in it.
        group: None where the broker does not tell.
    """

    partitions: Mapping[str, int]
    logs: Mapping[tuple[str, int], Log]
    group: Group | None


def topics(config: StreamConfig, broker: Broker) -> Topics:
    """Ask for the logs and the owners of every partition of the served topics: four questions, whatever their number.

    Raises:
        BrokerError: it does not answer.
    """
    present = broker.partitions()
    served = {topic: present[topic] for topic in config.views if topic in present}
    return Topics(served, broker.logs(served), None if broker.is_embedded() else broker.group())


@dataclass(frozen=True)
class Letters:
    """The dead letters.

    Attributes:
        count: how many records the dead-letter topics have now, whoever wrote them.
        newest: the latest letters, the latest first.
    """

    count: int
    newest: tuple[StoredLetter, ...]


class LetterWatch:
    """The newest dead letters. Reads only what came since the last time, and of that the last few of each partition.

    Args:
        broker: asked for when there is something to ask.
    """

    def __init__(self, config: StreamConfig, broker: Callable[[], Broker]) -> None:
        self._config = config
        self._broker = broker
        self._ends: dict[tuple[str, int], int] = {}
        self._newest: tuple[StoredLetter, ...] = ()

    def __call__(self) -> Letters:
        """Look.

        Raises:
            BrokerError: the broker does not answer, or does not let us read.
        """
        broker = self._broker()
        present = broker.partitions()
        wanted = {name: present[name] for topic in self._config.views if (name := topic_of(topic)) in present}
        logs = broker.logs(wanted)
        starts = {
            place: max(log.earliest, log.latest - KEPT_LETTERS, self._seen(place, log)) for place, log in logs.items()
        }
        ends = {place: log.latest for place, log in logs.items() if starts[place] < log.latest}
        came = [_shortened(one) for one in between(self._config, starts, ends, at_once=LETTERS_AT_ONCE)]
        newest = sorted([*self._newest, *came], key=lambda letter: letter.written_ms, reverse=True)
        self._newest = tuple(newest[: 2 * KEPT_LETTERS])
        self._ends = {place: log.latest for place, log in logs.items()}
        return Letters(sum(log.latest - log.earliest for log in logs.values()), self._newest)

    def _seen(self, place: tuple[str, int], log: Log) -> int:
        """Where the last look ended; 0 if the topic is another one now."""
        end = self._ends.get(place, 0)
        return end if end <= log.latest else 0


def _shortened(letter: StoredLetter) -> StoredLetter:
    """With the beginning of its record alone; `size` tells of the whole."""
    return replace(letter, value=None if letter.value is None else letter.value[:SHOWN_BYTES])


@dataclass(frozen=True)
class Runs:
    """What the batch chain ran in the last days.

    Attributes:
        folder: the batch folder.
        runs: the newest, oldest first; None where the chain never ran.
    """

    folder: Path
    runs: tuple[Run, ...] | None


class RunWatch:
    """The run ledger. A run that ended is read once."""

    def __init__(self, config: StreamConfig) -> None:
        self._folder = config.settings.folder
        self._ended: dict[Path, Run] = {}

    def __call__(self) -> Runs:
        """Look. Costs a listing of a few days, and what is new in them."""
        folder = self._folder / HISTORY
        if not folder.is_dir():
            return Runs(self._folder, None)
        paths = History(folder).paths(RUN_DAYS, datetime.now(UTC))[-MOST_RUNS:]
        found = {path: run for path in paths if (run := self._ended.get(path) or run_of(path)) is not None}
        self._ended = {path: run for path, run in found.items() if run.outcome in ("done", "failed")}
        return Runs(self._folder, tuple(found.values()))
