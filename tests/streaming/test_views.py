"""Several views in one worker: each with its ledger, its rules and its faults. Real Kafka and Valkey."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as Place
from confluent_kafka.admin import AdminClient
from feast import FeatureView, Field, FileSource, KafkaSource
from feast.data_format import JsonFormat, ParquetFormat

from headrace.audit import audit
from headrace.chains import StreamLedger
from headrace.contract import ViewContract
from headrace.repository import contracts, open_store
from streaming.decode import Decoded, JsonDecoder
from streaming.health import Health
from streaming.intake import StreamIntake
from streaming.slices import Slice, TopicPartition
from tests.conftest import TopicFactory
from tests.streaming.conftest import Stream, StreamFactory
from tests.streaming.oracle import Origin, Truth, judge, read_offline, read_topic
from tests.streaming.process import Worker, config_of, emit
from tests.streaming.test_intake import Places
from tests.streaming.test_lane import Fake

STRICT = 0.5
"""What `conv_rate` may be at most in the second view."""


def add_view(stream: Stream, name: str, topic: str, *, most: float = 1.0, transform: str = "") -> None:
    """Another view with the columns of the first one."""
    store = open_store(stream.repo)
    first = store.get_feature_view("driver_stats")
    history = FileSource(
        name=f"{name}_history",
        path=f"../data/offline/{name}",
        file_format=ParquetFormat(),
        timestamp_field="datetime",
        created_timestamp_column="created",
    )
    source = KafkaSource(
        name=f"{name}_events",
        kafka_bootstrap_servers=stream.broker,
        topic=topic,
        timestamp_field="datetime",
        created_timestamp_column="created",
        message_format=JsonFormat(schema_json=""),
        batch_source=history,
    )
    schema = [
        Field(name=f.name, dtype=f.dtype, tags={**f.tags, "le": str(most)} if f.name == "conv_rate" else f.tags)
        for f in (*first.entity_columns, *first.features)
    ]
    entities = [store.get_entity(entity) for entity in first.entities]
    tags = {"transform": transform} if transform else {}
    store.apply([FeatureView(name=name, entities=entities, ttl=first.ttl, schema=schema, source=source, tags=tags)])


def contract_of(stream: Stream, name: str) -> ViewContract:
    return contracts(open_store(stream.repo), [name])[0]


def truth_of(stream: Stream) -> Truth:
    return judge(read_topic(stream.broker, stream.topic))


def kept(truth: Truth, most: float) -> dict[Origin, tuple[object, ...]]:
    return {origin: row for origin, row in truth.accepted.items() if row[1] <= most}


def wait_ends(worker: Worker, stream: Stream, *views: str) -> None:
    """Wait until the ledgers of some views end where the logs do."""
    wanted = {(view, partition): end for view in views for partition, end in stream.ends().items()}

    def is_there() -> bool:
        found = {(p["view"], p["partition"]): p["ledger_end"] for p in worker.state().get("partitions", [])}
        return all(found.get(place) == end for place, end in wanted.items())

    worker.wait(is_there, 60, f"at {wanted}")


def assert_is_whole(stream: Stream, name: str, most: float) -> None:
    contract, truth = contract_of(stream, name), truth_of(stream)
    offline = read_offline(contract, stream.topic)
    assert not offline.doubled
    assert offline.rows == kept(truth, most)
    letters = read_topic(stream.broker, f"{stream.topic}.dlq")
    own = {
        (int(m.headers["headrace.partition"]), int(m.headers["headrace.offset"]))
        for m in letters
        if m.headers["headrace.view"].decode() == name
    }
    assert own == truth.bad | (truth.accepted.keys() - kept(truth, most).keys())
    assert audit(open_store(stream.repo), contract).diverged == 0


def test_two_views_of_a_topic_have_their_own_rules_and_transformations(stream: Stream, tmp_path: Path) -> None:
    """The second one is stricter, and sees half the trips."""
    (stream.repo / "halves.py").write_text(
        "import pyarrow as pa\n"
        "import pyarrow.compute as pc\n\n\n"
        "def halve(table: pa.Table) -> pa.Table:\n"
        "    place = table.schema.get_field_index('avg_daily_trips')\n"
        "    return table.set_column(place, 'avg_daily_trips', pc.divide(table.column(place), 2))\n"
    )
    add_view(stream, "strict", stream.topic, most=STRICT, transform="halves:halve")
    emit(stream.environment, count=3000, seed=3, bad_fraction=0.1, late_fraction=0.1, duplicate_fraction=0.05, keys=50)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        wait_ends(worker, stream, "driver_stats", "strict")
        worker.stop()
    assert_is_whole(stream, "driver_stats", 1.0)
    truth = truth_of(stream)
    offline = read_offline(contract_of(stream, "strict"), stream.topic)
    halved = {origin: (*row[:3], int(str(row[3])) // 2, *row[4:]) for origin, row in kept(truth, STRICT).items()}
    assert offline.rows == halved
    assert not offline.doubled


def test_a_view_whose_folder_fails_is_left_out_and_taken_in_again(make_stream: StreamFactory, tmp_path: Path) -> None:
    stream = make_stream(store_retry_seconds=3)
    add_view(stream, "strict", stream.topic, most=STRICT)
    folder = contract_of(stream, "strict").directory
    emit(stream.environment, count=1000, seed=3, bad_fraction=0.1)
    values = [message.value for message in read_topic(stream.broker, stream.topic)]
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        wait_ends(worker, stream, "driver_stats", "strict")
        aside = folder.rename(folder.with_name("aside"))
        folder.symlink_to(folder)  # "too many levels of symbolic links": as good as a disk that fails
        producer = Producer({"bootstrap.servers": stream.broker})
        for value in values:
            producer.produce(stream.topic, value=value)
        assert producer.flush(10) == 0
        wait_ends(worker, stream, "driver_stats")
        worker.wait(lambda: "`strict` is left out" in worker.tail(), 30, "left out")
        assert "strict" in " ".join(worker.state()["faults"])
        assert worker.get("/healthz")[0] == 200
        folder.unlink()
        aside.rename(folder)
        wait_ends(worker, stream, "driver_stats", "strict")
        worker.wait_ready()
        worker.stop()
    assert_is_whole(stream, "driver_stats", 1.0)
    assert_is_whole(stream, "strict", STRICT)


@pytest.mark.parametrize("step", ["decode", "append"])
def test_a_view_that_hangs_does_not_keep_the_others_waiting(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As where its folder is on a network that is gone, or its schema registry does not answer."""
    add_view(stream, "hanging", stream.topic)
    config, fatal = config_of(stream.environment), list[BaseException]()
    partition, goes_on = TopicPartition(stream.topic, 0), threading.Event()
    emit(stream.environment, count=200, seed=3)
    messages = [message for message in read_topic(stream.broker, stream.topic) if message.partition == 0]
    end = messages[-1].offset + 1
    records = [Fake(message.offset, message.value, message.timestamp_ms) for message in messages]
    append = StreamLedger.append

    class HangingDecoder(JsonDecoder):
        def __call__(self, values: Sequence[bytes | None]) -> Decoded:
            goes_on.wait(30)
            return super().__call__(values)

    def hanging_append(self: StreamLedger, *given: Any, **more: Any) -> Any:
        if self._contract.name == "hanging":
            goes_on.wait(30)
        return append(self, *given, **more)

    async def scenario() -> None:
        intake = StreamIntake(config, Health(), fatal.append)
        intake.mover = Places()
        if step == "decode":
            intake._steps["hanging"]._decoder = HangingDecoder(contract_of(stream, "hanging"))
        assert await intake.assign(1, {partition}) == {partition: 0}
        intake.deliver(Slice(partition, 0, end, records, 1_000, time.monotonic()), 1)
        ledgers = [StreamLedger(contract_of(stream, name), *partition) for name in ("driver_stats", "hanging")]
        async with asyncio.timeout(20):
            while ledgers[0].end().end < end:
                await asyncio.sleep(0.05)
        assert ledgers[1].end().end == 0
        goes_on.set()
        await intake.release()
        assert ledgers[1].end().end == end
        intake.close()

    monkeypatch.setattr(StreamLedger, "append", hanging_append if step == "append" else append)
    asyncio.run(scenario())
    assert fatal == []


@pytest.mark.parametrize("fault", ["a loop", "a link to nowhere", "a file"])
def test_a_view_that_cannot_begin_does_not_keep_the_others_waiting(
    make_stream: StreamFactory, tmp_path: Path, fault: str
) -> None:
    """Its folder cannot be read, or not be made. The head is gone, so that a ledger begins with a file."""
    stream = make_stream(store_retry_seconds=120)
    emit(stream.environment, count=100, seed=3)
    admin = AdminClient({"bootstrap.servers": stream.broker})
    for deleted in admin.delete_records([Place(stream.topic, 0, 1)]).values():
        deleted.result(10)
    add_view(stream, "other", stream.topic)
    config, folder = config_of(stream.environment), contract_of(stream, "other").directory
    folder.parent.mkdir(parents=True, exist_ok=True)
    if fault == "a file":
        folder.write_text("")
    else:
        folder.symlink_to(folder if fault == "a loop" else tmp_path / "nowhere")
    partition, fatal = TopicPartition(stream.topic, 0), list[BaseException]()

    async def scenario() -> None:
        intake = StreamIntake(config, Health(), fatal.append)
        intake.mover = Places()
        async with asyncio.timeout(60):
            assert await intake.assign(1, {partition}) == {partition: 1}
        assert ["other is left out" in found.text for found in intake.faults()] == [True]
        await intake.release()
        intake.close()

    asyncio.run(scenario())
    assert fatal == []


def test_a_view_with_a_broken_ledger_is_left_out(stream: Stream, tmp_path: Path) -> None:
    add_view(stream, "strict", stream.topic, most=STRICT)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        for seed in range(3):
            emit(stream.environment, count=100, seed=seed)
            wait_ends(worker, stream, "driver_stats", "strict")
        worker.stop()
        contract = contract_of(stream, "strict")
        second = sorted(contract.directory.glob("stream-*-0-0-0-*.parquet"))[1]
        hidden = shutil.move(second, tmp_path / second.name)
        emit(stream.environment, count=100, seed=4)
        worker.start()
        wait_ends(worker, stream, "driver_stats")
        worker.stop()
        shutil.move(hidden, second)
        worker.start().wait_ready()
        wait_ends(worker, stream, "driver_stats", "strict")
        worker.stop()
    assert_is_whole(stream, "driver_stats", 1.0)
    assert_is_whole(stream, "strict", STRICT)


def test_a_view_far_behind_catches_up_in_a_worker_of_its_own(make_stream: StreamFactory, tmp_path: Path) -> None:
    stream = make_stream(view_gap_offsets=200)
    emit(stream.environment, count=2000, seed=3)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        wait_ends(worker, stream, "driver_stats")
        worker.stop()
        add_view(stream, "late", stream.topic)
        emit(stream.environment, count=100, seed=4)
        worker.start()
        wait_ends(worker, stream, "driver_stats")
        fault = " ".join(worker.state()["faults"])
        assert worker.get("/readyz")[0] == 503
        assert "HEADRACE_VIEWS=late faust -A streaming worker" in fault
        alone = replace(stream, environment={**stream.environment, "HEADRACE_VIEWS": "late"})
        with Worker(alone.environment, tmp_path / "alone.log") as helper:
            helper.start().wait_ready()
            wait_ends(helper, stream, "late")
            helper.stop()
        worker.wait_ready()
        emit(stream.environment, count=100, seed=5)
        wait_ends(worker, stream, "driver_stats", "late")
        worker.stop()
    assert_is_whole(stream, "driver_stats", 1.0)
    assert_is_whole(stream, "late", 1.0)


def test_fifty_views_on_twenty_topics(stream: Stream, topic: TopicFactory, tmp_path: Path) -> None:
    emit(stream.environment, count=200, seed=1)
    topics = [topic("many", partitions=2) for _ in range(19)]
    for number in range(49):
        add_view(stream, f"view_{number}", topics[number % 19])
    values = [message.value for message in read_topic(stream.broker, stream.topic)]
    producer = Producer({"bootstrap.servers": stream.broker})
    for place, name in enumerate(topics):
        for value in values[place * 5 :]:
            producer.produce(name, value=value)
    assert producer.flush(10) == 0
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready(120)

        def are_done() -> bool:
            parts = worker.state().get("partitions", [])
            return len(parts) == 4 + 2 * 49 and all(part["lag"] == 0 for part in parts)

        worker.wait(are_done, 60, "at the ends of all logs")
        worker.stop()
    for number in range(49):
        offline = read_offline(contract_of(stream, f"view_{number}"), topics[number % 19])
        expected = len(values) - (number % 19) * 5
        assert (len(offline.rows), len(offline.doubled)) == (expected, 0)
