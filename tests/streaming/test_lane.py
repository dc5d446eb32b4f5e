"""The bookkeeping of slices and ledgers without servers: exactly once whatever is delivered, fails, or dies."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.chains import Folder, StreamLedger, accepted_offsets
from headrace.conform import Reason, Reject
from headrace.errors import LostRaceError, TerminalError
from streaming.batches import Batch, Int64s
from streaming.deadletters import Letter
from streaming.decode import JsonDecoder
from streaming.health import Health
from streaming.lane import Budget, Lane, StoreDownError, TopicReplacedError
from streaming.settings import StreamSettings, View
from streaming.share import LetterShare
from streaming.slices import Position, Record, Slice, TopicPartition, Unread
from streaming.threads import Pools
from streaming.view_steps import ViewSteps
from tests.streaming.test_decode import VIEW, changed

PARTITION = TopicPartition("topic", 0)


@pytest.fixture(autouse=True)
def _appends_are_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first append waits for a random part of `append_seconds`; here for all of it: no test depends on luck."""
    monkeypatch.setattr("streaming.lane.random.random", lambda: 1.0)


class CrashError(TerminalError):
    """The process ends here."""


@dataclass(frozen=True)
class Fake:
    """A record."""

    offset: int
    value: bytes | None
    timestamp: int = 1_700_000_000_000
    key: bytes | None = b"k"
    headers: Sequence[tuple[str, bytes | None]] = ()


class FakeStores:
    """Stores in memory; `fail` is asked before each call."""

    def __init__(self) -> None:
        self.letters: list[int] = []
        self.online: dict[int, int] = {}
        self.topic = "id-1"
        self.servers: tuple[str, ...] = ("server",)
        self.fail: Callable[[str], None] = lambda step: None

    def write_letters(self, letters: Sequence[Letter]) -> None:
        self.fail("letters")
        self.letters += [letter.record.offset for letter in letters]

    def write_online(self, view: View, batches: Sequence[Batch]) -> int:
        self.fail("online")
        return sum(self._write(batch.table, batch.offsets) for batch in batches)

    def _write(self, table: pa.Table, offsets: Int64s) -> int:
        for key, offset in zip(table.column("id").to_pylist(), offsets.tolist(), strict=True):
            self.online[key] = max(offset, self.online.get(key, -1))
        return len(offsets)

    def heard_server_ids(self) -> tuple[str, ...] | None:
        return None

    def server_ids(self) -> tuple[str, ...]:
        self.fail("servers")
        return self.servers

    def apply_recent(self, view: View, paths: Sequence[Path]) -> int:
        self.fail("recent")
        tables = [(pq.read_table(path), accepted_offsets(path)) for path in paths]
        return sum(self._write(table, offsets) for table, offsets in tables)

    def topic_id(self, topic: str, not_before_s: float) -> str | None:
        self.fail("topic")
        return self.topic


def record(offset: int) -> Fake:
    """Every fifth is bad, every seventh a tombstone."""
    if offset % 5 == 4:
        return Fake(offset, b"bad")
    return Fake(offset, None if offset % 7 == 6 else changed(id=offset))


def piece(first: int, next_: int, records: Sequence[Record] | None = None) -> Slice:
    found = [record(offset) for offset in range(first, next_)] if records is None else records
    return Slice(PARTITION, first, next_, found, 10 * len(found), 0.0)


class Bench:
    """A view in a folder, and lanes on it."""

    def __init__(self, folder: Path, **chosen: object) -> None:
        self.view = View(replace(VIEW, directory=folder), None)
        self.stores = FakeStores()
        self.health = Health()
        self.settings = StreamSettings.model_validate({"append_seconds": 0.01, "store_retry_seconds": 5, **chosen})
        self.share = LetterShare("view", self.settings)
        self.budget = Budget(1_000_000)
        self.ledger = StreamLedger(self.view.contract, *PARTITION)
        self.faults: list[BaseException] = []
        self.pools = Pools.of([self.view])[self.view.contract.name]
        decoder = JsonDecoder(self.view.contract)
        self.steps = ViewSteps(self.view, decoder, self.stores, self.pools, self.health, self.settings, self.share)

    def steps_of(self, step: str) -> tuple[float, float]:
        """How many batches went through a step, and how many rows."""
        labels = {"view": self.view.contract.name, "step": step}
        name, metrics = "headrace_step_batch_rows", self.health.registry
        count, rows = (metrics.get_sample_value(f"{name}_{what}", labels) for what in ("count", "sum"))
        return count or 0.0, rows or 0.0

    def lane(self, partition: TopicPartition = PARTITION) -> Lane:
        ledger = StreamLedger(self.view.contract, *partition)
        return Lane(
            self.steps,
            partition,
            start=ledger.end(),
            topic_id="id-1",
            ledger=ledger,
            stores=self.stores,
            budget=self.budget,
            health=self.health,
            settings=self.settings,
            on_fault=lambda lane, error: self.faults.append(error),
        )

    def offsets(self) -> list[int]:
        """The offsets of all rows, from the footers, in the order of the segments."""
        folder = Folder(self.view.contract.directory)
        chain = folder.chain("stream-topic-0-0")
        found = [accepted_offsets(folder.path_of(segment)) for segment in chain.valid]
        return list(np.concatenate(found).tolist()) if found else []

    def assert_complete(self, end: int) -> None:
        """Everything below `end` is where it belongs, once."""
        good = [n for n in range(end) if record(n).value not in (None, b"bad")]
        assert self.ledger.end().end == end
        assert self.offsets() == good
        assert set(self.stores.letters) == {n for n in range(end) if record(n).value == b"bad"}
        assert set(self.stores.online) == set(good)


def test_slices_go_through_all_steps(tmp_path: Path) -> None:
    async def scenario() -> None:
        lane = bench.lane()
        for first in range(0, 100, 10):
            lane.put(piece(first, first + 10))
        await lane.finish(5)
        assert lane.end == 100

    bench = Bench(tmp_path)
    asyncio.run(scenario())
    assert bench.faults == []
    bench.assert_complete(100)
    assert not bench.budget.is_spent


@pytest.mark.parametrize("seed", range(40))
def test_exactly_once_whatever_is_delivered_again_or_dies(tmp_path: Path, seed: int) -> None:
    """Assignments come and go, with crashes at any step; slices of any cut come from the ledger's end on.

    What an assignment leaves undone is delivered again to the next; what a position turns away is never taken.
    """
    total = 60
    chance = random.Random(seed)

    async def assignment(bench: Bench) -> None:
        lane = bench.lane()
        position = Position(lane.end)
        die_at = chance.randint(0, 12)
        calls = 0

        def fail(step: str) -> None:
            nonlocal calls
            calls += 1
            if calls > die_at:
                raise CrashError(step)

        bench.stores.fail = fail if chance.random() < 0.5 else lambda step: None
        at = lane.end
        while at < total:
            size = chance.randint(1, 25)
            stale = piece(max(0, at - chance.randint(1, 9)), min(total, at + 3))
            for offer in (stale, piece(at + 1, min(total, at + 1 + size)), piece(at, min(total, at + size))):
                if position.take(offer):
                    lane.put(offer)
            at = position.expected
            if chance.random() < 0.5:
                await asyncio.sleep(0.002)
        if chance.random() < 0.5:
            lane.drop()
        else:
            await lane.finish(5)

    bench = Bench(tmp_path)
    for _ in range(chance.randint(1, 4)):
        asyncio.run(assignment(bench))
        for pool in (bench.pools.decode, bench.pools.letters, bench.pools.online, bench.pools.offline):
            pool.submit(lambda: None).result()
    bench.stores.fail = lambda step: None
    bench.faults.clear()

    async def last() -> None:
        lane = bench.lane()
        if lane.end < total:
            lane.put(piece(lane.end, total))
        await lane.finish(10)

    asyncio.run(last())
    assert bench.faults == []
    bench.assert_complete(total)


def test_a_position_takes_only_what_continues_it() -> None:
    position = Position(10)
    assert not position.take(piece(0, 10))
    assert not position.take(piece(11, 12))
    assert position.take(piece(10, 15))
    assert position.take(Slice(PARTITION, 15, 20, [record(18)], 0, 0.0))  # a gap inside a fetch
    assert position.take(Slice(PARTITION, 20, 23, [], 0, 0.0))  # markers only
    assert position.expected == 23


def test_a_slice_that_does_not_follow_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        lane = bench.lane()
        lane.put(piece(0, 10))
        with pytest.raises(AssertionError, match="at 11 does not follow 10"):
            lane.put(piece(11, 20))
        await lane.finish(5)

    bench = Bench(tmp_path)
    asyncio.run(scenario())
    bench.assert_complete(10)


def test_a_view_that_has_more_skips_what_it_has(tmp_path: Path) -> None:
    async def scenario() -> None:
        lane = bench.lane()
        lane.put(piece(0, 10))
        await lane.finish(5)
        again = bench.lane()
        again.put(piece(0, 5))
        again.put(piece(5, 25))
        await again.finish(5)

    bench = Bench(tmp_path)
    asyncio.run(scenario())
    assert bench.faults == []
    bench.assert_complete(25)


def test_a_zombie_s_append_loses(tmp_path: Path) -> None:
    async def scenario() -> None:
        zombie, owner = bench.lane(), bench.lane()
        owner.put(piece(0, 30))
        await owner.finish(5)
        zombie.put(piece(0, 20))
        await zombie.finish(5)

    bench = Bench(tmp_path)
    asyncio.run(scenario())
    assert isinstance(bench.faults[0], LostRaceError)
    bench.assert_complete(30)


def test_a_topic_made_anew_is_not_appended(tmp_path: Path) -> None:
    async def scenario() -> None:
        lane = bench.lane()
        bench.stores.topic = "id-2"
        lane.put(piece(0, 20))
        await lane.finish(5)

    bench = Bench(tmp_path)
    asyncio.run(scenario())
    assert isinstance(bench.faults[0], TopicReplacedError)
    assert "start --topic topic --new-epoch" in str(bench.faults[0])
    assert bench.offsets() == []


@pytest.mark.parametrize("step", ["letters", "servers", "online", "topic"])
def test_a_step_that_fails_for_a_while_is_tried_again(tmp_path: Path, step: str) -> None:
    left = 2

    def fail(now: str) -> None:
        nonlocal left
        if now == step and left:
            left -= 1
            raise ConnectionError("refused")

    async def scenario() -> None:
        lane = bench.lane()
        lane.put(piece(0, 20))
        async with asyncio.timeout(5):
            while not any("refused" in why for why in bench.health.failing.values()):
                await asyncio.sleep(0.001)
        await lane.finish(5)

    bench = Bench(tmp_path)
    bench.stores.fail = fail
    asyncio.run(scenario())
    assert bench.faults == []
    assert bench.health.failing == {}
    bench.assert_complete(20)


def test_a_step_that_fails_for_too_long_is_a_fault(tmp_path: Path) -> None:
    def fail(now: str) -> None:
        raise ConnectionError("refused")

    async def scenario() -> None:
        lane = bench.lane()
        lane.put(piece(0, 20))
        while not bench.faults:
            await asyncio.sleep(0.01)
        lane.drop()

    bench = Bench(tmp_path, store_retry_seconds=0.3)
    bench.stores.fail = fail
    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert isinstance(bench.faults[0], StoreDownError)
    assert "HEADRACE_STORE_RETRY_SECONDS" in str(bench.faults[0])


def test_to_wait_for_other_partitions_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is quick enough, and the last lane waits for many of them, for longer than it may fail."""
    monkeypatch.setattr("streaming.lane.SLOW_S", 0.3)

    async def scenario() -> None:
        lanes = [bench.lane(TopicPartition("topic", number)) for number in range(10)]
        for number, lane in enumerate(lanes):
            lane.put(replace(piece(0, 3), partition=TopicPartition("topic", number)))
        await asyncio.gather(*(lane.finish(10) for lane in lanes))
        assert [lane.end for lane in lanes] == [3] * 10

    bench = Bench(tmp_path, store_retry_seconds=0.5, slice_records=1)
    bench.stores.fail = lambda step: time.sleep(0.1) if step == "online" else None
    asyncio.run(scenario())
    assert bench.faults == []
    assert b'step_retries_total{step="online"' not in bench.health.exposition()


def test_a_store_that_does_not_answer_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.lane.SLOW_S", 0.1)
    hanging = threading.Event()

    async def scenario() -> None:
        lanes = [bench.lane(TopicPartition("topic", number)) for number in range(2)]
        for number, lane in enumerate(lanes):
            lane.put(replace(piece(0, 3), partition=TopicPartition("topic", number)))
        await until(lambda: len(bench.health.failing) == 2)
        await until(lambda: len(bench.faults) == 2)
        for lane in lanes:
            lane.drop()

    bench = Bench(tmp_path, store_retry_seconds=0.5, slice_records=1)
    bench.stores.fail = lambda step: (hanging.wait(5), None)[1] if step == "online" else None
    asyncio.run(scenario())
    hanging.set()
    assert {str(fault) for fault in bench.faults} == {
        f"stats topic[{number}]: step online failed for 0.5 s (HEADRACE_STORE_RETRY_SECONDS): no answer"
        for number in range(2)
    }


def test_a_lane_that_cannot_finish_is_dropped_in_time(tmp_path: Path) -> None:
    hanging = threading.Event()

    async def scenario() -> None:
        lane = bench.lane()
        lane.put(piece(0, 20))
        await asyncio.wait_for(lane.finish(0.2), 2)

    bench = Bench(tmp_path)
    bench.stores.fail = lambda step: (hanging.wait(5), None)[1]
    asyncio.run(scenario())
    hanging.set()
    assert not bench.budget.is_spent
    assert bench.offsets() == []


def test_a_spent_budget_makes_room_by_appending(tmp_path: Path) -> None:
    async def scenario() -> None:
        lane = bench.lane()
        lane.put(piece(0, 50))
        assert bench.budget.is_spent
        assert await bench.budget.wait(5)
        assert lane.end == 50
        lane.drop()

    bench = Bench(tmp_path, append_seconds=1000)
    bench.budget = Budget(100)
    asyncio.run(scenario())


def test_letters_carry_their_origin() -> None:
    source = Fake(7, b"x", headers=[("own", b"1")])
    decoded = JsonDecoder(VIEW)([b"x"])
    headers = dict(Letter("view", PARTITION, "id-1", source, decoded.rejects[0]).headers())
    assert headers["own"] == b"1"
    assert headers["headrace.reason"] == b"undecodable"
    assert (headers["headrace.topic"], headers["headrace.partition"], headers["headrace.offset"]) == (
        b"topic",
        b"0",
        b"7",
    )
    assert headers["headrace.timestamp_ms"] == b"1700000000000"
    assert json.dumps([key for key in headers if key.startswith("headrace.")])


def test_a_store_that_forgot_is_given_again_what_is_recent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was appended under the former server, and what waits to be appended; also on an idle partition."""
    monkeypatch.setattr("streaming.lane.SERVERS_AGE_S", 0.05)

    async def scenario() -> None:
        bench = Bench(tmp_path, append_seconds=0.01)
        lane = bench.lane()
        lane.put(piece(0, 20))
        await until(lambda: lane.end == 20)
        bench.settings = bench.settings.model_copy(update={"append_seconds": 60.0})
        await lane.finish(1)
        lane = bench.lane()
        lane.put(replace(piece(20, 40), fetched_s=time.monotonic()))
        await until(lambda: max(bench.stores.online, default=0) >= 38)
        before = dict(bench.stores.online)
        bench.stores.online.clear()
        bench.stores.servers = ("another",)
        await until(lambda: bench.stores.online == before)
        assert lane.end == 20
        lane.drop()

    asyncio.run(scenario())


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_record_that_could_not_be_read_is_a_letter(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path)
        lane = bench.lane()
        lane.put(piece(0, 3, [record(0), Fake(1, Unread.because("too large")), record(2)]))
        await lane.finish(5)
        assert bench.offsets() == [0, 2]
        assert bench.stores.letters == [1]

    asyncio.run(scenario())
    unread = Fake(1, Unread.because("too large"))
    headers = dict(Letter("view", PARTITION, None, unread, Reject(0, Reason.UNDECODABLE, None, "x")).headers())
    assert headers["headrace.size"] == b"1"


@pytest.mark.parametrize(("left", "is_appended"), [(0, True), (7, False)])
def test_at_the_end_of_the_log_what_is_worth_a_file_is_appended(tmp_path: Path, left: int, is_appended: bool) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, append_seconds=60, append_rows=100)
        lane = bench.lane()
        lane.put(replace(piece(0, 20), fetched_s=time.monotonic(), left=left))
        await until(lambda: len(bench.stores.online) == 14)
        if is_appended:
            await until(lambda: lane.end == 20)
        else:
            await asyncio.sleep(0.3)
            assert lane.end == 0
        lane.drop()

    asyncio.run(scenario())


def test_on_a_backlog_a_batch_waits_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that come one by one are decoded together, and those at the end of the log at once."""
    monkeypatch.setattr("streaming.lane.BACKLOG_WAIT_S", 5.0)
    taken: list[int] = []

    async def scenario() -> None:
        bench = Bench(tmp_path, slice_records=30)
        monkeypatch.setattr(bench.stores, "fail", lambda step: taken.append(step == "online"))
        lane = bench.lane()
        for first in range(0, 30, 10):
            lane.put(replace(piece(first, first + 10), left=1000))
            await asyncio.sleep(0.05)
        await until(lambda: sum(taken) == 1)
        lane.put(replace(piece(30, 40), left=0))
        await until(lambda: lane.end == 40)
        assert sum(taken) == 2
        await lane.finish(5)

    asyncio.run(scenario())


def test_what_comes_while_the_online_thread_has_others_to_serve_is_decoded_together(tmp_path: Path) -> None:
    """Each batch costs every step: the next is not made while the one before waits for its turn."""

    async def scenario() -> None:
        bench = Bench(tmp_path)
        free = threading.Event()
        others = bench.pools.online.submit(free.wait, 10)
        try:
            lane = bench.lane()
            lane.put(piece(0, 1, [Fake(0, changed(id=0))]))
            await until(lambda: bench.steps_of("decode") == (1, 1))
            for first in range(1, 6):
                lane.put(piece(first, first + 1, [Fake(first, changed(id=first))]))
                await asyncio.sleep(0.01)
            assert bench.steps_of("decode") == (1, 1)
        finally:
            free.set()
        assert others.result(10)
        await until(lambda: bench.steps_of("online") == (2, 6))
        assert bench.steps_of("decode") == (2, 6)
        await lane.finish(5)
        assert bench.stores.online == {number: number for number in range(6)}
        assert lane.end == 6

    asyncio.run(scenario())
