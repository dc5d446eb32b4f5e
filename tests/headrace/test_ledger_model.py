"""The protocol of the ledger against a model: any interleaving of its steps keeps every offset once, and in order.

Two workers, two compactors, retention, two operators who open new epochs, and two readers share one partition. Each
goes step by step as Hypothesis says, is frozen as long as nobody lets it go on, and may be killed at any step; listings
are torn. What is real: all code of `headrace`, and the files. What is not: time, and the waiting for the disk. What is
taken for granted: the grace of compaction is longer than any one listing, and than any reading.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from headrace import compact as compaction
from headrace import segments
from headrace.chains import StreamEnd, StreamLedger, files
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.errors import ChainClosedError, LedgerError, LostRaceError, TransientError
from headrace.folder import Folder
from headrace.retain import retain
from headrace.segments import SegmentName, parse_name, parse_stream_chain, read_accepted, read_footer
from streaming.slices import Position, Slice, TopicPartition
from tests.headrace.lockstep import Disk, Process, current
from tests.headrace.views import EPOCH_US, config, examples, rows, view

pytestmark = [pytest.mark.slow, pytest.mark.timeout(24 * 3600)]

PARTITION = TopicPartition("events", 0)
STEPS = 60
"""Rules an example; each lets a process go on by any number of its own steps."""

TOPICS = 3
"""How many topics of the one name there are at most, one after the other."""

counts: Counter[str] = Counter()


def is_accepted(offset: int) -> bool:
    """Whether the record of an offset is good; the others are dead letters."""
    return offset % 3 != 0


def moment_of(offset: int) -> int:
    """The event time of a record, microseconds after `EPOCH_US`: not quite in the order of offsets."""
    return offset + offset * 7 % 4


@dataclass
class Attempt:
    """One call of `append` for the records `[first, next)` of a topic.

    Attributes:
        outcome: what became of it as far as its caller was told: `done`, `lost`, `merged` (see `_append`), or nothing
            (None) because it died or got another error.
    """

    topic: int
    epoch: int
    first: int
    next: int
    outcome: str | None = None


@dataclass
class Sight:
    """What a reader sees of an epoch.

    Attributes:
        rows: offset, topic and attempt of each row, in the order of the chain.
        gone: the end of what retention removed.
        end: of the chain, where the reader looked at it.
        topics: what the footers say of whose offsets they are.
        successor: the topic of the next epoch, where this one is closed.
    """

    rows: list[tuple[int, int, int]] = field(default_factory=list)
    gone: int = 0
    end: int = 0
    rejected: int = 0
    topics: set[str | None] = field(default_factory=set)
    successor: str | None = None


@dataclass
class Worker:
    """What a worker remembers of its assignment; a position of None is none."""

    ledger: StreamLedger
    epoch: int = 0
    topic: int = 0
    position: Position | None = None
    late: list[Slice] = field(default_factory=list)


WORKERS = st.sampled_from(["worker-1", "worker-2"])
COMPACTORS = st.sampled_from(["compactor-1", "compactor-2"])
OPERATORS = st.sampled_from(["operator-1", "operator-2"])
READERS = st.sampled_from(["reader-1", "reader-2"])
NAMES = ["worker-1", "worker-2", "compactor-1", "compactor-2", "retention", "operator-1", "operator-2", "reader-1"]
NAMES += ["reader-2"]
FETCHES = st.lists(
    st.tuples(st.sampled_from(["next"] * 5 + ["again", "ahead", "late"]), st.integers(1, 5)),
    min_size=1,
    max_size=6,
)
HOW_FAR = st.one_of(
    st.none(),
    st.none(),
    st.integers(1, 16),
    st.sampled_from(["temporary-written", "fsynced", "linked", "temporary-removed", "checked", "listing", "removed"]),
)
"""How far a process goes on at once: to the end of its work, by so many steps, or to the next step that ends so."""


class Partition(RuleBasedStateMachine):
    """One partition of one view, and everybody who works on it."""

    contract: ViewContract
    homes: Iterator[Path]

    def __init__(self) -> None:
        super().__init__()
        self.contract = replace(type(self).contract, directory=next(self.homes))
        self.folder = Folder.of(self.contract)
        self.disk = Disk(self.contract.directory)
        self.patch = pytest.MonkeyPatch()
        self.disk.attach(self.patch)
        self.processes = {name: Process(name, self.disk) for name in NAMES}
        self.workers = {name: self._new_worker() for name in NAMES if name.startswith("worker")}
        self.starts = [0]
        self.attempts: list[Attempt] = []
        self.horizon = 0
        self.seen: dict[tuple[int, int], int] = {}
        self.counted: set[int] = set()
        self.ends: dict[int, int] = {}
        self.tables: dict[tuple[int, int], tuple[list[tuple[int, int, int]], int]] = {}
        counts["examples"] += 1

    @initialize(start=st.sampled_from([0, 0, 5]), sizes=st.lists(st.integers(1, 3), max_size=10))
    def topic_begins(self, start: int, sizes: list[int]) -> None:
        """With what a worker did before anybody disturbed it."""
        self.starts = [start]
        self._go("worker-1", lambda: self._work(self.workers["worker-1"], [("next", size) for size in sizes]), None)

    @rule(name=WORKERS, fetches=FETCHES, how_far=HOW_FAR)
    def work(self, name: str, fetches: list[tuple[str, int]], how_far: int | str | None) -> None:
        self._go(name, lambda: self._work(self.workers[name], fetches), how_far)

    @rule(name=COMPACTORS, cap=st.sampled_from([1, 1 << 20]), how_far=HOW_FAR)
    def compaction(self, name: str, cap: int, how_far: int | str | None) -> None:
        self._go(name, lambda: self._compact(cap), how_far)

    @rule(age=st.integers(0, 20), how_far=HOW_FAR)
    def retention(self, age: int, how_far: int | str | None) -> None:
        self._go("retention", lambda: self._retain(age), how_far)

    @rule(name=READERS, how_far=HOW_FAR)
    def reading(self, name: str, how_far: int | str | None) -> None:
        self._go(name, self._read, how_far)

    @rule(name=OPERATORS, start=st.none() | st.sampled_from([0, 5]), how_far=HOW_FAR)
    def new_epoch(self, name: str, start: int | None, how_far: int | str | None) -> None:
        """The topic is made anew, if a start is given; then, or once more, a new epoch is begun for the newest.

        Not while an operator is at it: one who sleeps with the id of a topic that is no more would open its epoch.
        """
        is_free = not any(self.processes[other].is_busy for other in ("operator-1", "operator-2"))
        if start is not None and len(self.starts) < TOPICS and is_free:
            self.starts.append(start)
        if len(self.starts) > 1:
            self._go(name, self._close, how_far)

    @rule(name=st.sampled_from(NAMES), how_far=HOW_FAR)
    def going_on(self, name: str, how_far: int | str | None) -> None:
        self._go(name, None, how_far)

    @rule(name=st.sampled_from(NAMES))
    def kill(self, name: str) -> None:
        counts["kills"] += self.processes[name].is_busy
        self.processes[name].kill()
        if name in self.workers:
            self.workers[name] = self._new_worker()

    @rule(name=WORKERS, distance=st.integers(1, 5))
    def leap(self, name: str, distance: int) -> None:
        """Whoever lost count of the offsets is refused."""
        worker = self.workers[name]
        if self.processes[name].is_busy or worker.position is None:
            return
        first = self.ends.get(worker.epoch, 0) + distance
        with pytest.raises(LedgerError, match="would leave a hole"):
            self._append(worker, first, first + 1)
        worker.position = None

    @invariant()
    def everything_is_there_once(self) -> None:
        """A reader whom nobody disturbs."""
        self._judge(self._sights(self.folder.files()), is_undisturbed=True)

    def teardown(self) -> None:
        """All go on to their end; then what is left is what counts, and nothing else."""
        try:
            self._go_home()
        finally:
            for process in self.processes.values():
                process.kill()
            self.patch.undo()
            segments._read_footer.cache_clear()
            shutil.rmtree(self.contract.directory, ignore_errors=True)

    def _go_home(self) -> None:
        for name in self.processes:
            self._go(name, None, None)
        self.everything_is_there_once()
        before = self._sights(self.folder.files())
        for _ in range(4):
            compact(self.contract, grace_s=0)
        assert self._sights(self.folder.files()) == before
        self.everything_is_there_once()
        valid = {str(name) for chain in self.folder.chains().values() for name in chain.valid}
        assert set(os.listdir(self.folder.path) if self.folder.path.exists() else ()) == valid
        counts["offsets"] += sum(self.ends.values())

    def _go(self, name: str, work: Callable[[], None] | None, how_far: int | str | None) -> None:
        process = self.processes[name]
        if not process.is_busy and work is not None:
            process.begin(work)
        counts["steps"] += process.go(how_far)

    def _new_worker(self) -> Worker:
        return Worker(StreamLedger(self.contract, *PARTITION))

    def _work(self, worker: Worker, fetches: Iterable[tuple[str, int]]) -> None:
        """What a worker does with what it fetches. Errors that may pass make it begin anew."""
        for kind, size in fetches:
            try:
                if worker.position is None and not self._assigned(worker):
                    return
                piece = self._fetched(worker, kind, size)
                if worker.position is not None and not worker.position.take(piece):
                    worker.position = None
                    continue
                self._append(worker, piece.first, piece.next)
            except (LostRaceError, ChainClosedError):
                counts["lost"] += 1
                worker.position = None
            except (FileNotFoundError, TransientError):
                counts["failed"] += 1
                worker.position = None

    def _assigned(self, worker: Worker) -> bool:
        """Read the ledger, and begin it where there is none; False where the topic is not the ledger's."""
        topic = len(self.starts) - 1
        worker.ledger = StreamLedger(self.contract, *PARTITION)
        end: StreamEnd = worker.ledger.end()
        if end.exists and end.topic_id != f"t{topic}":
            return False
        if not end.exists:
            end = worker.ledger.begin(self.starts[topic], f"t{topic}")
        worker.epoch, worker.topic, worker.position = end.epoch, topic, Position(end.end)
        return True

    @staticmethod
    def _fetched(worker: Worker, kind: str, size: int) -> Slice:
        """What a fetch brings: what is wanted; what was there before; what comes later; what another fetch was for."""
        assert worker.position is not None
        place = worker.position.expected
        if kind == "late" and worker.late:
            return worker.late[-1]
        first = max(0, place + {"next": 0, "late": 0, "again": -size, "ahead": size}[kind])
        piece = Slice(PARTITION, first, first + size, (), 0, 0.0)
        worker.late = [*worker.late[-3:], replace(piece, first=place, next=place + size + 1)]
        return piece

    def _append(self, worker: Worker, first: int, after: int) -> None:
        attempt = Attempt(worker.topic, worker.epoch, first, after)
        self.attempts.append(attempt)
        number = len(self.attempts) - 1
        accepted = [n for n in range(first, after) if is_accepted(n)]
        table = rows(self.contract, [self._row(n, worker.topic, number) for n in accepted])
        try:
            worker.ledger.append(
                worker.epoch,
                first,
                after,
                table,
                accepted=np.array(accepted, dtype=np.int64),
                rejected=after - first - len(accepted),
                topic_id=f"t{worker.topic}",
            )
        except (LostRaceError, ChainClosedError, LedgerError):
            # Who sleeps between creating its file and asking whether that counts may find it merged already, and cannot
            # tell that from a name that was free for having been merged: then it is told that it lost, and did not.
            attempt.outcome = "merged" if number in self.counted else "lost"
            counts["merged meanwhile"] += attempt.outcome == "merged"
            raise
        attempt.outcome = "done"
        counts["appends"] += 1

    @staticmethod
    def _row(offset: int, topic: int, attempt: int) -> dict[str, int]:
        return {"id": offset, "value": topic, "count": attempt, "at": moment_of(offset), "made": offset}

    def _compact(self, cap: int) -> None:
        done = compact(self.contract, grace_s=0, level_cap_bytes=cap)
        for chain in done.chains.values():
            counts["merged"] += chain.files_merged
            counts["linked"] += chain.files_linked
            counts["deleted"] += chain.files_deleted

    def _retain(self, age: int) -> None:
        horizon = max(self.ends.values(), default=0) - age
        if horizon > 0:
            self.horizon = max(self.horizon, horizon)
            moment = datetime.fromtimestamp(EPOCH_US // 10**6, UTC) + timedelta(microseconds=horizon)
            counts["retained"] += retain(self.contract, moment).rows

    def _close(self) -> None:
        topic = len(self.starts) - 1
        ledger = StreamLedger(self.contract, *PARTITION)
        if ledger.end().exists:
            end = ledger.close(f"t{topic}", self.starts[topic])
            assert (end.topic_id, end.closed) == (f"t{topic}", False)
            counts["closed"] += 1

    def _read(self) -> None:
        """A reader that others disturb: what is committed when it begins it must see."""
        with self.disk.pinned():
            done = [attempt for attempt in self.attempts if attempt.outcome == "done"]
            floor = {a.epoch: max(b.next for b in done if b.epoch == a.epoch) for a in done}
            for _ in range(5):
                with contextlib.suppress(FileNotFoundError):
                    sights = self._sights(self._paused(files(self.contract)))
                    break
        self._judge(sights, is_undisturbed=False)
        assert all(sights[epoch].end >= end for epoch, end in floor.items())
        counts["readings"] += 1

    def _paused(self, paths: Iterable[Path]) -> Iterator[Path]:
        for path in paths:
            yield path
            current().pause("opened")

    def _sights(self, paths: Iterable[Path]) -> dict[int, Sight]:
        """What the files hold, by epoch."""
        found: dict[int, Sight] = {}
        for path in paths:
            name = parse_name(path.name)
            assert isinstance(name, SegmentName)
            parsed = parse_stream_chain(name.chain)
            assert parsed is not None
            sight = found.setdefault(parsed[2], Sight())
            held, gone = self._content(path)
            footer = read_footer(path)
            sight.rows += held
            sight.gone = max(sight.gone, gone)
            sight.rejected += footer.rejected
            sight.end = max(sight.end, footer.next)
            sight.topics.add(footer.topic_id)
            if footer.successor is not None:
                sight.successor = footer.successor[0]
        return found

    def _content(self, path: Path) -> tuple[list[tuple[int, int, int]], int]:
        """The rows of a file, and the end of what it says is gone. Files never change, so each is read once."""
        status = os.stat(path)
        key = (status.st_ino, status.st_mtime_ns)
        if key not in self.tables:
            table = pq.read_table(path, use_threads=False)
            ids, topics, attempts = (table.column(n).to_pylist() for n in ("id", "value", "count"))
            assert read_accepted(path).tolist() == ids
            assert table.column("at").cast(pa.int64()).to_pylist() == [EPOCH_US + moment_of(n) for n in ids]
            footer = read_footer(path)
            gone = footer.next if footer.mark == "retained" else 0
            self.tables[key] = (list(zip(ids, map(int, topics), attempts, strict=True)), gone)
        return self.tables[key]

    def _judge(self, sights: dict[int, Sight], *, is_undisturbed: bool) -> None:
        owners: dict[tuple[int, int], int] = {}
        topics: dict[int, int] = {}
        for epoch, sight in sorted(sights.items()):
            held = {topic for _, topic, _ in sight.rows}
            assert len(sight.topics) == 1, f"epoch {epoch} is of {sight.topics}"
            assert {f"t{topic}" for topic in held} <= sight.topics
            former = sights.get(epoch - 1, Sight()).successor
            assert former is None or former in sight.topics, f"epoch {epoch} is of {sight.topics}, not of {former}"
            for topic in held:
                assert topics.setdefault(topic, epoch) == epoch, f"topic {topic} is in two epochs"
                wanted = [n for n in range(max(self.starts[topic], sight.gone), sight.end) if is_accepted(n)]
                assert [offset for offset, _, _ in sight.rows] == wanted
                bad = [n for n in range(self.starts[topic], sight.end) if not is_accepted(n)]
                assert sight.rejected == len(bad)
            lost = [n for n in range(sight.gone) if is_accepted(n) and moment_of(n) >= self.horizon]
            assert not lost, f"{lost} are gone, and not older than {self.horizon}"
            owners.update({(epoch, offset): attempt for offset, _, attempt in sight.rows})
            if is_undisturbed:
                assert sight.end >= self.ends.get(epoch, 0)
                self.ends[epoch] = sight.end
        for number, attempt in enumerate(self.attempts):
            own = [n for n in range(attempt.first, attempt.next) if is_accepted(n)]
            present = [n for n in own if owners.get((attempt.epoch, n)) == number]
            gone = sights[attempt.epoch].gone if attempt.epoch in sights else 0
            assert not (attempt.outcome == "lost" and present), f"{attempt} was lost and is there"
            if is_undisturbed and attempt.outcome in ("done", "merged"):
                assert present == [n for n in own if n >= gone], f"{attempt} was done and is not there"
        changed = {key for key in owners.keys() & self.seen.keys() if owners[key] != self.seen[key]}
        assert not changed, f"{changed} are of other appends than before"
        if is_undisturbed:
            vanished = {n for n in self.seen.keys() - owners.keys() if n[1] >= sights[n[0]].gone}
            assert not vanished, f"{vanished} were there and are not"
            self.seen = owners
            self.counted.update(owners.values())


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder in memory where there is one: the files are small, and many."""
    memory = Path("/dev/shm")  # noqa: S108 - a name that nobody can guess is made in it
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def test_any_interleaving_keeps_every_offset_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compaction, "FILES_A_MERGE", {1: 2, 2: 2})
    monkeypatch.setattr(Partition, "contract", ViewContract.from_feast(view()[1], config(home)), raising=False)
    monkeypatch.setattr(Partition, "homes", (home / f"example-{n}" for n in itertools.count()), raising=False)
    counts.clear()
    chosen = settings(
        max_examples=examples(100),
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        report_multiple_bugs=False,
    )
    try:
        run_state_machine_as_test(Partition, settings=chosen)
    finally:
        with capsys.disabled():
            print(f"\n{dict(counts)}")  # noqa: T201 - the figures of a campaign
