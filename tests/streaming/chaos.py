"""A campaign of faults: workers of one group under load, a seeded schedule of what goes wrong, an outside reader.

What the workers keep their data in, and how that may fail, is in `tests.streaming.chaos_places`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from confluent_kafka import KafkaError, KafkaException, Producer
from redis.exceptions import RedisClusterException, RedisError

from headrace.repository import open_store
from streaming.emit import Made, Maker, Plan
from tests.servers import Kafka, Mode, Proxy
from tests.streaming.conftest import Stream
from tests.streaming.oracle import Features, Forgotten, Seen, contract_of, served_by
from tests.streaming.process import Worker

KEYS = 200
FIRST_KEY = 1001
TIPS = ("tips_0", "tips_1", "tips_2")
"""Fields of half of the events each, which the view does not have, or not yet."""

ROUND_S = os.environ.get("HEADRACE_TEST_CHAOS_ROUND_SECONDS")
STOP_S = 120.0
"""How long a worker may take to end when asked to, beside all that goes on."""

WAYS = {
    "kill -9": ("serving", "serving", "serving", "serving", "at any moment"),
    "broker restart": ("kill", "stop"),
    "broker network": (Mode.STALLED.value, Mode.MUTE.value, Mode.CUT.value, "drop"),
}
"""In which ways workers and broker fail, where there are several."""


@dataclass(frozen=True, order=True)
class Fault:
    """What goes wrong, when, for how long.

    Attributes:
        at_s: seconds after the start.
        slot: which worker, where it is one.
        how: of a network or a broker in which way, of a kill when.
    """

    at_s: float
    kind: str
    slot: int
    seconds: float
    how: str = ""


class Place(Protocol):
    """What the workers of a campaign keep their data in.

    Attributes:
        stream: what they serve.
        reader_repo: the repository of somebody who goes to the online store directly.
        workers: how many are there all the time; one more may join and leave.
        round_s: how long a round is, if nothing else is said.
        a_round: faults of each kind in a round.
        ways: in which ways the stores fail, where there are several.
    """

    stream: Stream
    reader_repo: Path
    workers: int
    round_s: float
    a_round: Mapping[str, int]
    ways: Mapping[str, Sequence[str]]

    def apply(self, fault: Fault, campaign: Campaign) -> None:
        """Let a store fail, and see to it that it ends. Returns at once."""

    def mend(self) -> None:
        """Let everything serve again, whatever happened."""

    def forgotten(self, polls: Sequence[tuple[float, float]]) -> list[Forgotten]:
        """What the online store lost, by the reader's polls: when each began and ended."""

    def check(self) -> None:
        """What holds here beside what the oracle says, at the end."""

    def figures(self) -> Mapping[str, object]:
        """For the table."""


def schedule(seed: int, rounds: int, place: Place) -> list[Fault]:
    """Faults in the order of their times. The same seed gives the same."""
    chance = random.Random(seed)
    ways = {**WAYS, **place.ways}
    round_s = place.round_s if ROUND_S is None else float(ROUND_S)
    faults = [
        Fault(
            at_s=round(round_s * (number + chance.random()), 1),
            kind=kind,
            slot=chance.randrange(place.workers),
            seconds=round(chance.uniform(1.0, 4.0), 1),
            how=chance.choice(ways.get(kind, ("",))),
        )
        for number in range(rounds)
        for kind, count in place.a_round.items()
        for _ in range(count)
    ]
    return sorted(faults)


class Load:
    """Producers in threads of their own: plain events of every kind, and transactions of which some are aborted.

    Args:
        rate: plain events a second.
    """

    def __init__(self, stream: Stream, *, seed: int, rate: float) -> None:
        self._stream = stream
        self._rate = rate
        self._contract = contract_of(stream.repo)
        self._seed = seed
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(2, "load")
        self._work: list[Future[None]] = []
        self.sent: Counter[str] = Counter()

    def start(self) -> None:
        """Begin."""
        self._work = [self._pool.submit(work) for work in (self._send_plain, self._send_transactions)]

    def finish(self) -> None:
        """End, and wait until the broker has everything."""
        self._is_over.set()
        for work in self._work:
            work.result()

    def _made(self, seed: int, count: int) -> Callable[[], list[Made]]:
        """Events; of some the times are rounded up, so that they tie with others; good ones have more fields."""
        plan = Plan(0, None, bad_fraction=0.05, late_fraction=0.1, duplicate_fraction=0.03, seed=seed, keys=KEYS)
        maker = Maker([self._contract], plan)
        chance = random.Random(seed)

        def make() -> list[Made]:
            return [
                _varied(made, chance) if made.fault is None else made for made in maker.make(count, datetime.now(UTC))
            ]

        return make

    def _send_plain(self) -> None:
        chance = random.Random(self._seed)
        # What a broker that restarts takes twice is two events, and what it never took is none: the topic is the truth.
        producer = Producer({"bootstrap.servers": self._stream.broker, "acks": "all", "log_level": 0})
        pause_s = 0.05
        make = self._made(self._seed, max(1, round(self._rate * pause_s)))

        def settle(error: KafkaError | None, _: object) -> None:
            self.sent["taken" if error is None else "not taken"] += 1

        while not self._is_over.wait(pause_s):
            for made in make():
                for _ in range(2 if made.is_doubled else 1):
                    value = None if chance.random() < 0.01 else made.value
                    producer.produce(self._stream.topic, value, made.key, on_delivery=settle)
            producer.poll(0)
        self.sent["not taken"] += producer.flush(120)

    def _send_transactions(self) -> None:
        chance = random.Random(self._seed + 1)
        make = self._made(self._seed + 1, 40)
        while not self._is_over.is_set():
            producer = Producer(
                {
                    "bootstrap.servers": self._stream.broker,
                    "transactional.id": self._stream.topic,
                    "transaction.timeout.ms": 10_000,
                    "log_level": 0,
                }
            )
            # Of a broker that restarts: the next producer ends what this one began.
            with contextlib.suppress(KafkaException):
                producer.init_transactions(20)
                while not self._is_over.wait(0.4):
                    producer.begin_transaction()
                    for made in make():
                        producer.produce(self._stream.topic, made.value, made.key)
                    producer.flush(5)
                    if chance.random() < 0.3:
                        producer.abort_transaction(20)
                        self.sent["aborted"] += 1
                    else:
                        producer.commit_transaction(20)
                        self.sent["transactions"] += 1
        self._end_transactions()

    def _end_transactions(self) -> None:
        """A transaction left open would keep readers from all that follows it."""
        producer = Producer({"bootstrap.servers": self._stream.broker, "transactional.id": self._stream.topic})
        producer.init_transactions(60)


def _varied(made: Made, chance: random.Random) -> Made:
    event = json.loads(made.value)
    event |= {name: chance.randrange(1000) / 8 for name in TIPS if chance.random() < 0.5}
    is_rounded = chance.random() < 0.1
    if is_rounded:
        second = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
        event["datetime"] = second.isoformat()
        event["created"] = None if chance.random() < 0.3 else second.isoformat()
    return replace(made, value=json.dumps(event).encode(), is_late=made.is_late and not is_rounded)


class Reader:
    """Somebody who asks Feast for every driver, again and again, and notes what changes. By a way of its own.

    Attributes:
        seen: of each driver.
        polls: when each of them began and ended, by the monotonic clock.
        failed: how many did, while a server was away.
    """

    def __init__(self, repo: Path) -> None:
        self._repo = repo
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(1, "reader")
        self._work: Future[None] | None = None
        self.seen: dict[int, list[Seen]] = {}
        self.polls: list[tuple[float, float]] = []
        self.failed = 0

    def start(self) -> None:
        """Begin."""
        self._work = self._pool.submit(self._read)

    def finish(self) -> None:
        """End."""
        self._is_over.set()
        if self._work is not None:
            self._work.result()

    def _read(self) -> None:
        keys = list(range(FIRST_KEY, FIRST_KEY + KEYS))
        store = open_store(self._repo)
        while not self._is_over.wait(0.05):
            begun_s = time.monotonic()
            try:
                found = served_by(store, keys)
            except (RedisError, RedisClusterException, OSError):
                self.failed += 1
                continue
            self._note(found)
            self.polls.append((begun_s, time.monotonic()))

    def _note(self, found: Mapping[int, Features]) -> None:
        for key, features in found.items():
            values = self.seen.get(key, [])
            is_there = any(feature is not None for feature in features)
            if values[-1].features != features if values else is_there:
                self.seen.setdefault(key, []).append(Seen(features, len(self.polls)))


@dataclass
class Member:
    """A worker and what was done to it."""

    worker: Worker
    is_wanted: bool = True
    has_served: bool = False
    is_frozen: bool = False
    asked_s: float | None = None
    killed: bool = False


@dataclass
class Campaign:
    """Runs a schedule. Whoever starts the workers again does so at once, as a supervisor does.

    Attributes:
        way: of the workers to the broker.
    """

    place: Place
    kafka: Kafka
    way: Proxy
    logs: Path
    done: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.stream = self.place.stream
        self.members = [
            Member(Worker(self.stream.environment, self.logs / f"worker-{number}.log"))
            for number in range(self.place.workers + 1)
        ]
        self._regulars = self.members[:-1]
        self.members[-1].is_wanted = False
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._under_way: list[Future[None]] = []
        self._begun_s = 0.0

    def run(self, faults: Sequence[Fault]) -> None:
        """Let everything go wrong that is scheduled, and return when all of it is over."""
        for member in self._regulars:
            member.worker.start()
        for member in self._regulars:
            member.worker.wait_ready(120)
        self._begun_s = time.monotonic()
        for fault in faults:
            self._at(fault.at_s, lambda fault=fault: self._apply(fault))  # type: ignore[misc]
        while self._due or not all(work.done() for work in self._under_way):
            self._supervise()
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()
            time.sleep(0.05)
        for work in self._under_way:
            work.result()

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something after so long, between other faults. It must not take long."""
        self._at(self._now_s + seconds, action)

    def beside(self, thread: str, work: Callable[[], None]) -> None:
        """Do what takes long in a thread of that name, which does one thing after the other."""
        pool = self._threads.setdefault(thread, ThreadPoolExecutor(1, thread))
        self._under_way.append(pool.submit(work))

    def note(self, fault: Fault) -> None:
        """It begins."""
        self.done[fault.kind] += 1
        is_worker = fault.kind in {"kill -9", "SIGTERM", "zombie", "join and leave"}
        where = f" worker {fault.slot}" if is_worker else ""
        self.say(f"{fault.kind}{where} {fault.how} {fault.seconds} s")

    def say(self, text: str) -> None:
        """A line of the protocol, with the time."""
        say(f"{self._now_s:7.1f} s  {text}")

    def settle(self, timeout_s: float = 300.0) -> None:
        """Wait until every worker serves and the ledgers end where the logs do; then end the workers."""
        ends = self.stream.ends()
        deadline = time.monotonic() + timeout_s
        while True:
            self._supervise()
            states = [member.worker.state() for member in self._regulars]
            parts = {p["partition"]: p for state in states for p in state.get("partitions", [])}
            settled = (
                {number: part["ledger_end"] for number, part in parts.items()} == ends
                and all(part["lag"] == 0 for part in parts.values())
                and all(state.get("ok") for state in states)
                and self.members[-1].worker.is_over
            )
            if settled:
                break
            assert time.monotonic() < deadline, f"not settled at {ends}: {json.dumps(states, indent=1)}"
            time.sleep(0.2)
        for member in self._regulars:
            code, _ = member.worker.stop()
            assert code == 0, member.worker.tail()

    def _supervise(self) -> None:
        for member in self.members:
            worker = member.worker
            if not worker.is_over:
                if not member.has_served and not member.is_frozen:
                    member.has_served = worker.get("/readyz", timeout_s=0.5)[0] == 200
                if member.asked_s is not None and not member.is_frozen:
                    slow = time.monotonic() - member.asked_s
                    assert slow < STOP_S, f"a worker did not end {slow:.0f} s after SIGTERM:\n{worker.tail()}"
                continue
            if worker.has_started and not member.killed:
                code = worker.process.returncode
                if member.asked_s is None or (code != 0 and member.has_served):
                    why = worker.tail().strip().splitlines()[-1]
                    self.say(f"{worker.log.stem} ended with {code}: {why}")
                    self.ended["while serving" if member.has_served else "while starting"] += 1
            if member.is_wanted:
                worker.start()
                member.has_served = member.is_frozen = member.killed = False
                member.asked_s = None
            elif worker.has_started:
                member.killed = True  # its end is noted

    def _apply(self, fault: Fault) -> None:
        action = {
            "kill -9": self._kill,
            "SIGTERM": self._stop,
            "zombie": self._freeze,
            "join and leave": self._join,
            "broker restart": self._restart_broker,
            "broker network": self._break_network,
        }.get(fault.kind)
        if action is not None:
            action(fault)
        else:
            self.note(fault)
            self.place.apply(fault, self)

    def _kill(self, fault: Fault) -> None:
        member = self.members[fault.slot]
        if member.worker.is_over or (fault.how == "serving" and not member.has_served):
            self._again(fault)
            return
        self.note(fault)
        member.killed = True
        member.worker.kill()

    def _stop(self, fault: Fault) -> None:
        member = self.members[fault.slot]
        if member.worker.is_over or not member.has_served or member.is_frozen or member.asked_s is not None:
            self._again(fault)
            return
        self.note(fault)
        self._terminate(member)

    def _freeze(self, fault: Fault) -> None:
        member = self.members[fault.slot]
        if member.worker.is_over or not member.has_served or member.is_frozen or member.asked_s is not None:
            self._again(fault)
            return
        self.note(fault)
        frozen = member.worker.process
        frozen.send_signal(signal.SIGSTOP)
        member.is_frozen = True

        def thaw() -> None:
            if frozen.poll() is None:
                frozen.send_signal(signal.SIGCONT)
                member.is_frozen = False

        session_s = float(self.stream.environment["HEADRACE_SESSION_SECONDS"])
        self._at(self._now_s + session_s + fault.seconds, thaw)

    def _join(self, fault: Fault) -> None:
        member = self.members[-1]
        if member.is_wanted or not member.worker.is_over:
            self._again(fault)
            return
        self.note(fault)
        member.is_wanted = True
        left_s = time.monotonic() + 120.0

        def leave() -> None:
            if not member.has_served and time.monotonic() < left_s:
                self._at(self._now_s + 0.5, leave)
                return
            member.is_wanted = False
            if not member.worker.is_over:
                self._terminate(member)

        self._at(self._now_s + fault.seconds, leave)

    def _restart_broker(self, fault: Fault) -> None:
        self.note(fault)

        def restart() -> None:
            (self.kafka.kill if fault.how == "kill" else self.kafka.stop)()
            time.sleep(fault.seconds)
            self.kafka.start()

        self.beside("broker", restart)

    def _break_network(self, fault: Fault) -> None:
        self.note(fault)
        if fault.how == "drop":
            self.way.drop()
            return
        self.way.set(Mode(fault.how))
        self.later(fault.seconds, lambda: self.way.set(Mode.OPEN))

    def _terminate(self, member: Member) -> None:
        member.asked_s = time.monotonic()
        member.worker.process.send_signal(signal.SIGTERM)

    def _again(self, fault: Fault) -> None:
        """The worker is not there to be hit: a little later, another one."""
        moved = Fault(fault.at_s, fault.kind, (fault.slot + 1) % self.place.workers, fault.seconds, fault.how)
        self._at(self._now_s + fault.seconds, lambda: self._apply(moved))

    def _at(self, after_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self._begun_s + after_s, next(self._numbers), action))

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._begun_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._threads.values():
            pool.shutdown(wait=True, cancel_futures=True)
        self.place.mend()
        self.kafka.start()
        for member in self.members:
            if member.worker.has_started and not member.worker.is_over:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(member.worker.process.pid, signal.SIGKILL)
                member.worker.process.wait()


def say(text: str) -> None:
    """A line of the campaign's protocol."""
    print(text, flush=True)  # noqa: T201 - for whoever runs a campaign


def table(rows: Mapping[str, object]) -> str:
    """Two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
