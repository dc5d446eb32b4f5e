"""Assignments that cross each other: what Faust's recovery and its fetcher ask for at the same time."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from headrace import objects
from headrace.chains import StreamLedger
from headrace.objects import Bucket, ObjectPath
from streaming.broker import Broker, BrokerError, Log
from streaming.health import Health
from streaming.intake import StreamIntake
from streaming.slices import Slice, TopicPartition
from tests.streaming.conftest import Stream
from tests.streaming.oracle import contract_of
from tests.streaming.process import config_of, emit


class Places:
    """The consumer, as far as partitions are moved: notes what it was asked."""

    def __init__(self) -> None:
        self.moves: list[tuple[TopicPartition, int]] = []
        self.held: list[TopicPartition] = []

    async def hold(self, partition: TopicPartition) -> None:
        self.held.append(partition)

    async def move(self, partition: TopicPartition, offset: int) -> None:
        self.moves.append((partition, offset))

    def high_water(self, partition: TopicPartition) -> int | None:
        return None

    def silence_s(self) -> dict[TopicPartition, float]:
        return {}


def lanes_at_work() -> int:
    """The tasks of lanes that have not ended, three a lane."""
    return sum("Lane." in repr(task.get_coro()) for task in asyncio.all_tasks())


@pytest.mark.parametrize("seed", range(5))
def test_of_crossing_assignments_the_last_counts(stream: Stream, seed: int) -> None:
    chance = random.Random(seed)
    faults: list[BaseException] = []

    async def scenario() -> None:
        intake = StreamIntake(config_of(stream.environment), Health(), faults.append)
        intake.mover = Places()
        everything = {TopicPartition(stream.topic, number) for number in range(4)}

        async def later(generation: int, partitions: set[TopicPartition]) -> None:
            await asyncio.sleep(chance.random() * 0.05)
            if chance.random() < 0.2:
                await intake.release()
            await intake.assign(generation, partitions)

        for generation in range(15):
            own = set(chance.sample(sorted(everything), chance.randint(1, 4)))
            await asyncio.gather(*(later(generation, own) for _ in range(3)))
        starts = await intake.assign(99, everything)
        assert starts == dict.fromkeys(everything, 0)
        assert lanes_at_work() == 3 * 4
        intake.deliver(Slice(TopicPartition(stream.topic, 2), 0, 5, [], 0, 0.0), 99)
        assert (await intake.assign(99, everything))[TopicPartition(stream.topic, 2)] == 5  # as before, no new lanes
        await intake.release()
        assert lanes_at_work() == 0
        assert intake.committable() == {TopicPartition(stream.topic, 2): 5}
        assert await intake.assign(100, everything) == {p: 5 if p.partition == 2 else 0 for p in everything}
        await intake.release()
        intake.close()

    emit(stream.environment, count=100)
    asyncio.run(scenario())
    assert faults == []


def test_of_assignments_in_one_moment_the_last_counts(stream: Stream) -> None:
    async def scenario() -> None:
        intake = StreamIntake(config_of(stream.environment), Health(), faults.append)
        intake.mover = Places()
        everything = [TopicPartition(stream.topic, number) for number in range(4)]
        wanted = (set(everything), set(everything[:3]), set(everything[1:]))
        starts = await asyncio.gather(*(intake.assign(n, partitions) for n, partitions in enumerate(wanted)))
        assert starts == [{}, {}, dict.fromkeys(everything[1:], 0)]
        assert lanes_at_work() == 3 * 3
        await intake.release()
        assert lanes_at_work() == 0
        intake.close()

    faults: list[BaseException] = []
    asyncio.run(scenario())
    assert faults == []


def test_a_log_that_is_too_short_is_told_of_while_it_is_ours(stream: Stream) -> None:
    async def scenario() -> None:
        intake = StreamIntake(config_of(stream.environment), Health(), faults.append)
        intake.mover = places = Places()
        partition = TopicPartition(stream.topic, 0)
        StreamLedger(contract_of(stream.repo), *partition).begin(10, None)
        assert await intake.assign(1, {partition}) == {}
        assert places.held == [partition]
        assert "ends at 0, the ledger of `driver_stats` at 10" in " ".join(fault.text for fault in intake.faults())
        await intake.release()
        assert intake.faults() == []
        intake.close()

    faults: list[BaseException] = []
    asyncio.run(scenario())
    assert faults == []


def test_a_partition_without_a_leader_does_not_keep_the_others_waiting(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaderless = TopicPartition(stream.topic, 2)
    asked = Broker.log
    has_leader = False

    def log(self: Broker, topic: str, partition: int) -> Log:
        if (topic, partition) == leaderless and not has_leader:
            raise BrokerError("no leader")
        return asked(self, topic, partition)

    async def scenario() -> None:
        nonlocal has_leader
        intake = StreamIntake(config_of(stream.environment), Health(), faults.append)
        intake.mover = places = Places()
        everything = {TopicPartition(stream.topic, number) for number in range(4)}
        assert await intake.assign(1, everything) == dict.fromkeys(everything - {leaderless}, 0)
        assert places.held == [leaderless]
        assert lanes_at_work() == 3 * 3
        assert any("no leader" in fault.text for fault in intake.faults())
        has_leader = True
        while not places.moves:
            await asyncio.sleep(0.01)
        assert places.moves == [(leaderless, 0)]
        assert lanes_at_work() == 3 * 4
        assert intake.faults() == []
        has_leader = False
        assert leaderless not in await intake.assign(2, everything)
        await intake.release()
        assert lanes_at_work() == 0
        has_leader = True
        await asyncio.sleep(1.0)
        assert len(places.moves) == 1, "what an ended assignment left to begin is not begun"
        intake.close()

    monkeypatch.setattr(Broker, "log", log)
    faults: list[BaseException] = []
    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert faults == []


def test_a_slice_of_an_earlier_assignment_is_not_taken(stream: Stream) -> None:
    async def scenario() -> None:
        intake = StreamIntake(config_of(stream.environment), Health(), faults.append)
        intake.mover = places = Places()
        partition = TopicPartition(stream.topic, 0)
        await intake.assign(1, {partition})
        await intake.assign(2, {partition})
        intake.deliver(Slice(partition, 0, 5, [], 0, 0.0), 1)
        intake.deliver(Slice(partition, 3, 5, [], 0, 0.0), 2)  # a hole before it
        await asyncio.sleep(0.05)
        assert places.moves == [(partition, 0)]
        await intake.release()
        intake.deliver(Slice(partition, 0, 5, [], 0, 0.0), 2)
        assert await intake.assign(3, {partition}) == {partition: 0}
        await intake.release()
        intake.close()

    faults: list[BaseException] = []
    asyncio.run(scenario())
    assert faults == []


def test_a_store_that_is_away_does_not_end_the_watch_of_a_view(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An object store raises another error than a disk."""
    monkeypatch.setattr("streaming.intake.SECOND_LOOK_S", 0.01)
    monkeypatch.setattr(objects, "_RETRIES", 0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "not asked for")
    objects._client.cache_clear()
    faults: list[BaseException] = []

    async def scenario() -> None:
        intake = StreamIntake(config_of(stream.environment), Health(), faults.append)
        view, partition = intake._views[stream.topic][0], TopicPartition(stream.topic, 0)
        away = ObjectPath(Bucket("s3", "views", "http://127.0.0.1:9"), "stats")
        there = replace(view, contract=replace(view.contract, directory=away))
        intake._behind[partition, view.contract.name] = "it is behind"
        intake._spawn(intake._watch_behind(partition, there, intake._assignment))
        async with asyncio.timeout(10):
            while not faults and caplog.text.count("connection refused") < 2:
                await asyncio.sleep(0.01)
        intake._behind.clear()
        intake.close()

    asyncio.run(scenario())
    objects._client.cache_clear()
    assert faults == []
