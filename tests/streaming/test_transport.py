"""What the transport overrides and reads in Faust and aiokafka is there, and is what it is taken for."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import time
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import aiokafka
import pytest
from aiokafka.consumer import fetcher
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from confluent_kafka import Producer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streaming.records import ParsedRecords, Records, install
from streaming.slices import Unread
from streaming.transport import (
    CALM_S,
    FETCH_WAIT_MS,
    LINGER_BYTES,
    LINGER_MS,
    BulkConsumer,
    BulkThread,
    ForgetfulOffsets,
    Linger,
)
from tests.conftest import TopicFactory


def own_methods(kind: type[Any]) -> list[str]:
    """The methods that a class defines itself."""
    return [name for name, value in vars(kind).items() if inspect.isfunction(value)]


@pytest.mark.parametrize(
    ("ours", "theirs", "added"),
    [
        (
            BulkThread,
            driver.AIOKafkaConsumerThread,
            {
                "_positions",
                "_states",
                "heard_ms",
                "_note_out_of_range",
                "hold",
                "move",
                "_hold",
                "_move",
                "_seek",
                "_beat",
            },
        ),
        (
            BulkConsumer,
            driver.Consumer,
            {"hold", "move", "high_water", "silence_s", "coordinator_failed", "thread_failed", "_if_assigned"},
        ),
    ],
)
def test_what_is_overridden_is_called_alike(ours: type[Any], theirs: type[Any], added: set[str]) -> None:
    for name in set(own_methods(ours)) - added - {"__init__"}:
        base = getattr(theirs, name, None)
        assert base is not None, f"{theirs.__name__} has no {name} any more"
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(inspect.signature(base).parameters), name
        assert inspect.iscoroutinefunction(getattr(ours, name)) == inspect.iscoroutinefunction(base), name
    assert not [name for name in added if hasattr(theirs, name)], "a name of ours is taken now"


def test_aiokafka_keeps_positions_and_the_coordinator_where_we_look(kafka: str, topic: TopicFactory) -> None:
    partition = aiokafka.TopicPartition(topic("positions", partitions=1), 0)

    async def alone() -> None:
        consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="none")
        await consumer.start()
        try:
            assert BulkThread._positions(consumer) == {}
            consumer.assign([partition])
            assert BulkThread._positions(consumer) == {}  # assigned, and nobody knows where yet
            consumer.seek(partition, 0)
            assert BulkThread._positions(consumer) == {partition: 0}
            state = BulkThread._states(consumer)[partition]
            assert (state.paused, state.timestamp) == (False, None)
            before_ms = int(time.time() * 1000)
            await consumer.getmany(timeout_ms=1000)
            assert state.timestamp >= before_ms
        finally:
            await consumer.stop()

    async def of_a_group() -> None:
        consumer = aiokafka.AIOKafkaConsumer(partition.topic, bootstrap_servers=kafka, group_id="positions")
        await consumer.start()
        task: asyncio.Task[None] = consumer._coordinator._coordination_task
        assert not task.done()
        await consumer.stop()
        assert task.done()

    asyncio.run(alone())
    asyncio.run(of_a_group())


@pytest.mark.parametrize(("fetched", "sought"), [(10, 2), (4, 7)])
def test_what_comes_while_a_partition_is_moved_is_fetched_again_from_there(
    kafka: str, topic: TopicFactory, fetched: int, sought: int
) -> None:
    """Else it would pass for what follows the place before: rows would come again, or be missing."""
    partition = TP(topic("moved", partitions=1), 0)
    producer = Producer({"bootstrap.servers": kafka})
    for number in range(10):
        producer.produce(partition.topic, b"%d" % number, partition=0)
    assert producer.flush(10) == 0

    async def scenario() -> None:
        consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="none")
        await consumer.start()
        thread = BulkThread.__new__(BulkThread)  # of Faust's services it needs none
        thread.consumer = SimpleNamespace(flow_active=True)  # type: ignore[assignment]
        thread._consumer, thread._linger, thread._sought = consumer, Linger(), {}

        async def fetch() -> dict[Any, Any]:
            return await thread._fetch_records(consumer, {partition}, timeout=20.0, max_records=fetched)

        try:
            consumer.assign([aiokafka.TopicPartition(*partition)])
            await thread._move(partition, 0)
            (first,) = (await fetch())[partition]
            assert (first.first, first.next) == (0, fetched)
            consumer.pause(aiokafka.TopicPartition(*partition))
            fetching = asyncio.create_task(fetch())
            await asyncio.sleep(0.1)
            await thread._move(partition, sought)  # and resumes
            slices = (await fetching).get(partition) or (await fetch())[partition]
        finally:
            await consumer.stop()
        assert [(one.first, one.next) for one in slices] == [(sought, 10)]
        assert [record.offset for record in slices[0].records] == list(range(sought, 10))

    asyncio.run(scenario())


def test_a_fetch_waits_for_more_until_it_is_calm(kafka: str, topic: TopicFactory) -> None:
    partition = aiokafka.TopicPartition(topic("linger", partitions=1), 0)

    async def scenario() -> None:
        consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="none", fetch_max_wait_ms=1)
        asked: list[tuple[int, int]] = []
        send = consumer._client.send

        async def noting(node: Any, request: Any, **more: Any) -> Any:
            if isinstance(request, FetchRequest):
                asked.append((request._min_bytes, request._max_wait_ms))
            return await send(node, request, **more)

        consumer._client.send = noting
        await consumer.start()
        try:
            consumer.assign([partition])
            consumer.seek(partition, 0)
            await consumer.getmany(timeout_ms=100)
            begun = len(asked)
            Linger().note(consumer._fetcher)
            await consumer.getmany(timeout_ms=int(CALM_S * 1000) + 2 * FETCH_WAIT_MS)
        finally:
            await consumer.stop()
        later = [found for found, _ in groupby(asked[begun:])]
        assert later[-2:] == [(LINGER_BYTES, LINGER_MS), (1, FETCH_WAIT_MS)]

    asyncio.run(scenario())


def test_an_offset_that_was_read_is_not_remembered() -> None:
    offsets = ForgetfulOffsets()
    offsets["partition"] = 5
    assert offsets["partition"] is None


@pytest.mark.parametrize("compression", [0, 1])
def test_a_header_whose_name_is_no_utf_8_is_read(compression: int) -> None:
    def batch(first: int) -> bytes:
        builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 100_000)
        for number in range(3):
            headers = [("ok", b"1"), ("ZZ", b"\xff")] if number == 1 else [("\u00fc", None)]
            builder.append(number, 5, b"k%d" % number, b"v", headers)
        data = bytearray(bytes(builder.build()).replace(b"ZZ", b"\xff\xfe"))
        if compression:
            data[22] |= compression
            data[61:] = gzip.compress(bytes(data[61:]))
            data[8:12] = (len(data) - 12).to_bytes(4, "big")
        data[:8] = first.to_bytes(8, "big")
        return bytes(data)

    install(1 << 20)
    assert fetcher.MemoryRecords is Records
    records = Records(batch(0) + batch(3) + batch(6)[:40])
    partition = aiokafka.TopicPartition("topic", 0)
    found = list(ParsedRecords(partition, records, [], 1, None, None, False, fetcher.READ_COMMITTED))
    assert [record.offset for record in found] == [1, 2, 3, 4, 5]
    assert [record.key for record in found] == [b"k1", b"k2", b"k0", b"k1", b"k2"]
    assert tuple(found[0].headers) == tuple(found[3].headers) == (("ok", b"1"), ("\ufffd\ufffd", b"\xff"))
    assert tuple(found[1].headers) == (("\u00fc", None),)
    assert not records.has_next()
    assert records.next_batch() is None


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [10, 900_000, 3_000_000])
def test_a_batch_that_unpacks_to_too_much_is_not_read(codec: int, size: int) -> None:
    """Each of its records is there, unread; the records of other batches are read."""
    install(1 << 20)

    def batch(first: int, size: int) -> bytes:
        builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 100_000_000)
        for number in range(3):
            builder.append(number, 5, b"k", bytes(size // 3), [])
        data = bytearray(builder.build())
        data[:8] = first.to_bytes(8, "big")
        return bytes(data)

    partition = aiokafka.TopicPartition("topic", 0)
    records = Records(batch(7, size) + batch(10, 3))
    found = list(ParsedRecords(partition, records, [], 7, None, None, False, fetcher.READ_COMMITTED))
    assert [record.offset for record in found] == list(range(7, 13))
    assert [record.value for record in found[3:]] == [b"\0"] * 3
    is_bounded = codec != 2  # snappy cannot pack so much into little
    for record in found[:3]:
        assert isinstance(record.value, Unread) == (size > 1 << 20 and is_bounded)
        assert record.timestamp == 5
        if isinstance(record.value, Unread):
            assert "HEADRACE_IN_FLIGHT_BYTES" in record.value.reason
        else:
            assert record.value == bytes(size // 3)
