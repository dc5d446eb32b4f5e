"""A campaign of faults: workers of one group under load, a seeded schedule of what goes wrong, an outside reader."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from confluent_kafka import KafkaError, KafkaException, Producer

from streaming.emit import Made, Maker, Plan
from tests.servers import Kafka, Mode, Valkey
from tests.streaming.conftest import Network, Stream
from tests.streaming.oracle import contract_of, read_online
from tests.streaming.process import Worker

REGULARS = 3
"""Workers that are there all the time; one more joins and leaves."""

KEYS = 200
FIRST_KEY = 1001
ROUND_S = float(os.environ.get("HEADRACE_TEST_CHAOS_ROUND_SECONDS", "35"))
STOP_S = 120.0
"""How long a worker may take to end when asked to, beside all that goes on."""

A_ROUND = {
    "kill -9": 5,
    "SIGTERM": 1,
    "zombie": 1,
    "join and leave": 1,
    "broker restart": 1,
    "store frozen": 1,
    "store network": 1,
    "broker network": 2,
}
"""Faults of each kind in a round."""


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


def schedule(seed: int, rounds: int) -> list[Fault]:
    """Faults in the order of their times. The same seed gives the same."""
    chance = random.Random(seed)
    ways = {
        "kill -9": ("serving", "serving", "serving", "serving", "at any moment"),
        "broker restart": ("kill", "stop"),
        "store network": (Mode.STALLED, Mode.MUTE, Mode.CUT),
        "broker network": (Mode.STALLED, Mode.MUTE, Mode.CUT, "drop"),
    }
    faults = [
        Fault(
            at_s=round(ROUND_S * (number + chance.random()), 1),
            kind=kind,
            slot=chance.randrange(REGULARS),
            seconds=round(chance.uniform(1.0, 4.0), 1),
            how=str(getattr(way := chance.choice(ways.get(kind, ("",))), "value", way)),
        )
        for number in range(rounds)
        for kind, count in A_ROUND.items()
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
        """Events; of some the times are rounded up, so that they tie with others."""
        plan = Plan(0, None, bad_fraction=0.05, late_fraction=0.1, duplicate_fraction=0.03, seed=seed, keys=KEYS)
        maker = Maker([self._contract], plan)
        chance = random.Random(seed)

        def make() -> list[Made]:
            return [
                _rounded(made, chance.random()) if made.fault is None and chance.random() < 0.1 else made
                for made in maker.make(count, datetime.now(UTC))
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


def _rounded(made: Made, chance: float) -> Made:
    event = json.loads(made.value)
    second = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    event["datetime"] = second.isoformat()
    event["created"] = None if chance < 0.3 else second.isoformat()
    return Made(made.key, json.dumps(event).encode(), None, is_late=False, is_doubled=made.is_doubled)


class Reader:
    """Somebody who asks Feast for every driver, again and again, and notes what changes. By a way of its own."""

    def __init__(self, repo: Path) -> None:
        self._repo = repo
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(1, "reader")
        self._work: Future[None] | None = None
        self.seen: dict[int, list[tuple[Any, ...]]] = {}
        self.polls = 0

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
        while not self._is_over.wait(0.05):
            for key, features in read_online(self._repo, keys).items():
                if all(feature is None for feature in features):
                    continue
                values = self.seen.setdefault(key, [])
                if not values or values[-1] != features:
                    values.append(features)
            self.polls += 1


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
    """Runs a schedule. Whoever starts the workers again does so at once, as a supervisor does."""

    stream: Stream
    network: Network
    kafka: Kafka
    valkey: Valkey
    logs: Path
    done: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.members = [
            Member(Worker(self.stream.environment, self.logs / f"worker-{number}.log"))
            for number in range(REGULARS + 1)
        ]
        self.members[-1].is_wanted = False
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._restarts = ThreadPoolExecutor(1, "broker")
        self._restarting: list[Future[None]] = []
        self._begun_s = 0.0

    def run(self, faults: Sequence[Fault]) -> None:
        """Let everything go wrong that is scheduled, and return when all of it is over."""
        for member in self.members[:REGULARS]:
            member.worker.start()
        for member in self.members[:REGULARS]:
            member.worker.wait_ready(120)
        self._begun_s = time.monotonic()
        for fault in faults:
            self._at(fault.at_s, lambda fault=fault: self._apply(fault))  # type: ignore[misc]
        while self._due or not all(work.done() for work in self._restarting):
            self._supervise()
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()
            time.sleep(0.05)
        for work in self._restarting:
            work.result()

    def settle(self, timeout_s: float = 300.0) -> None:
        """Wait until every worker serves and the ledgers end where the logs do; then end the workers."""
        ends = self.stream.ends()
        deadline = time.monotonic() + timeout_s
        while True:
            self._supervise()
            states = [member.worker.state() for member in self.members[:REGULARS]]
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
        for member in self.members[:REGULARS]:
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
                    self._say(f"{worker.log.stem} ended with {code}: {why}")
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
            "store frozen": self._freeze_store,
            "store network": self._break_network,
            "broker network": self._break_network,
        }[fault.kind]
        action(fault)

    def _kill(self, fault: Fault) -> None:
        member = self.members[fault.slot]
        if member.worker.is_over or (fault.how == "serving" and not member.has_served):
            self._again(fault)
            return
        self._note(fault)
        member.killed = True
        member.worker.kill()

    def _stop(self, fault: Fault) -> None:
        member = self.members[fault.slot]
        if member.worker.is_over or not member.has_served or member.is_frozen or member.asked_s is not None:
            self._again(fault)
            return
        self._note(fault)
        self._terminate(member)

    def _freeze(self, fault: Fault) -> None:
        member = self.members[fault.slot]
        if member.worker.is_over or not member.has_served or member.is_frozen or member.asked_s is not None:
            self._again(fault)
            return
        self._note(fault)
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
        self._note(fault)
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
        self._note(fault)

        def restart() -> None:
            (self.kafka.kill if fault.how == "kill" else self.kafka.stop)()
            time.sleep(fault.seconds)
            self.kafka.start()

        self._restarting.append(self._restarts.submit(restart))

    def _freeze_store(self, fault: Fault) -> None:
        self._note(fault)
        self.valkey.freeze()
        self._at(self._now_s + fault.seconds, self.valkey.thaw)

    def _break_network(self, fault: Fault) -> None:
        self._note(fault)
        proxy = self.network.store if fault.kind == "store network" else self.network.broker
        if fault.how == "drop":
            proxy.drop()
            return
        proxy.set(Mode(fault.how))
        self._at(self._now_s + fault.seconds, lambda: proxy.set(Mode.OPEN))

    def _terminate(self, member: Member) -> None:
        member.asked_s = time.monotonic()
        member.worker.process.send_signal(signal.SIGTERM)

    def _note(self, fault: Fault) -> None:
        self.done[fault.kind] += 1
        where = "" if "network" in fault.kind or "broker" in fault.kind else f" worker {fault.slot}"
        self._say(f"{fault.kind}{where} {fault.how} {fault.seconds} s")

    def _again(self, fault: Fault) -> None:
        """The worker is not there to be hit: a little later, another one."""
        moved = Fault(fault.at_s, fault.kind, (fault.slot + 1) % REGULARS, fault.seconds, fault.how)
        self._at(self._now_s + fault.seconds, lambda: self._apply(moved))

    def _at(self, after_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self._begun_s + after_s, next(self._numbers), action))

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._begun_s

    def _say(self, text: str) -> None:
        say(f"{self._now_s:7.1f} s  {text}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restarts.shutdown(wait=True)
        self.valkey.thaw()
        self.kafka.start()
        for member in self.members:
            if member.worker.has_started and not member.worker.is_over:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(member.worker.process.pid, signal.SIGKILL)
                member.worker.process.wait()


def copy_for_reader(repo: Path, valkey: Valkey, network: Network) -> Path:
    """The repository of somebody who goes to the store directly."""
    copy = repo.parent.parent / "reader" / repo.name
    shutil.copytree(repo, copy)
    data = repo.parent / "data"
    if data.exists():
        shutil.copytree(data, copy.parent / "data")
    file = copy / "feature_store.yaml"
    text = file.read_text(encoding="utf-8")
    assert network.store.address in text
    file.write_text(text.replace(network.store.address, valkey.address), encoding="utf-8")
    return copy


def say(text: str) -> None:
    """A line of the campaign's protocol."""
    print(text, flush=True)  # noqa: T201 - for whoever runs a campaign


def table(rows: Mapping[str, object]) -> str:
    """Two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
