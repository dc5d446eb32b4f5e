"""Hostile records through a real worker: each becomes the row it says or a dead letter, and the worker goes on.

`make fuzz` sends a million.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer
from feast import Field, KafkaSource
from feast.types import (
    Array,
    Bool,
    Bytes,
    Decimal,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    Json,
    Map,
    Set,
    String,
    Struct,
    TimeUuid,
    UnixTimestamp,
    Uuid,
)

from headrace.chains import Folder, accepted_offsets, footer
from headrace.conform import conform
from headrace.contract import ViewContract
from headrace.repository import contracts, open_store
from streaming.decode import JsonDecoder
from tests.headrace.views import config, view
from tests.servers import Kafka
from tests.streaming.conftest import StreamFactory, read_from
from tests.streaming.mutate import Corpus, JsonCorpus, Sent, fuzzed
from tests.streaming.oracle import Message, read_online, read_topic
from tests.streaming.process import Worker
from tests.streaming.reading import Judge, Row, judge_of, rows_of, same

MESSAGES = int(os.environ.get("HEADRACE_TEST_FUZZ", "20000"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(2**32)))
EVERYTHING_SHARE = 20
"""One of so many messages is of the view with every type, which is ten times as large."""

TOPIC = {"message.timestamp.after.max.ms": str(2**63 - 1), "retention.ms": "-1"}
"""A topic that takes timestamps of any time."""

SKEW_US = 300_000_000

SIMPLE: list[FeastType] = [
    Bool, Int32, Int64, Float32, Float64, String, Bytes, UnixTimestamp, Uuid, TimeUuid, Decimal,
]  # fmt: skip
STRUCT = Struct(
    {"n": Int32, "x": Float64, "t": String, "at": UnixTimestamp, "l": Array(Int64), "s": Struct({"b": Bool})}
)
TYPES: list[FeastType] = [
    *SIMPLE, Json, Map, STRUCT, *map(Array, SIMPLE), Array(Json), Array(Map), Array(STRUCT), *map(Set, SIMPLE),
    Array(Array(Int64)), Array(Set(String)), Array(Array(Array(Int32))),
]  # fmt: skip
FIELDS = [Field(name=f"f{number}", dtype=dtype, tags={"nullable": "true"}) for number, dtype in enumerate(TYPES)]


@dataclass(frozen=True)
class Case:
    """Records for one view on one topic, and who says what must become of them."""

    contract: ViewContract
    topic: str
    records: Iterable[Sent]
    judge: Judge


@dataclass
class Outcome:
    """What became of the records of a case; a record is a partition and an offset."""

    rows: dict[tuple[int, int], Row] = field(default_factory=dict)
    rejected: int = 0
    skipped: int = 0
    letters: dict[tuple[int, int], Message] = field(default_factory=dict)


def json_case(contract: ViewContract, topic: str, count: int, seed: int) -> Case:
    """Events of a view in JSON."""
    return case(
        contract, topic, JsonCorpus(contract), count, seed, judge_of(contract, time.time_ns() // 1000 + SKEW_US)
    )


def case(contract: ViewContract, topic: str, corpus: Corpus, count: int, seed: int, judge: Judge) -> Case:
    """Records of any corpus, damaged."""
    return Case(contract, topic, fuzzed(corpus, count, seed), judge)


@pytest.mark.timeout(7200)
def test_hostile_records_harm_nothing(make_stream: StreamFactory, kafka_server: Kafka, tmp_path: Path) -> None:
    print(f"HEADRACE_TEST_SEED={SEED}")  # noqa: T201 - to do it again
    topics = [kafka_server.create_topic(f"fuzz-{n}-{uuid.uuid4().hex[:8]}", config=TOPIC) for n in range(2)]
    stream = make_stream(session_seconds=30, store_retry_seconds=120)
    read_from(stream.repo, stream.broker, topics[0])
    add_everything(stream.repo, stream.broker, topics[1])
    found = {contract.topic: contract for contract in contracts(open_store(stream.repo))}
    counts = [MESSAGES, MESSAGES // EVERYTHING_SHARE]
    cases = [json_case(found[t], t, n, SEED + i) for i, (t, n) in enumerate(zip(topics, counts, strict=True))]
    begun_s = time.monotonic()
    sent = {case.topic: send(stream.broker, case) for case in cases}
    sent_s = time.monotonic() - begun_s
    with Worker(stream.environment, tmp_path / "worker.log") as worker:
        worker.start().wait_ready(300)
        worker.wait(lambda: ends_of(worker) == sent, 300 + MESSAGES / 500, "drained")
        drained_s = time.monotonic() - begun_s - sent_s
        worker.wait_ready()
        assert worker.get("/healthz")[0] == 200
        metrics = worker.get("/metrics")[1].decode()
        assert worker.stop()[0] == 0
    for case in cases:
        messages = read_topic(stream.broker, case.topic, timeout_s=300)
        outcome = outcome_of(case.contract, stream.broker, case.topic)
        check_counts(case.contract.name, metrics, messages, outcome)
        check_rows(case, messages, outcome)
        check_letters(messages, outcome)
        if case is cases[0]:
            check_online(stream.repo, case.contract, outcome)
        reasons = Counter(letter.headers["headrace.reason"].decode() for letter in outcome.letters.values())
        print(  # noqa: T201 - the figures of a campaign
            f"{case.contract.name}: {len(messages)} sent, {len(outcome.rows)} accepted, {outcome.skipped} skipped, "
            f"{outcome.rejected} dead: {dict(reasons)}"
        )
    print(f"sent in {sent_s:.0f} s, done in {drained_s:.0f} s more")  # noqa: T201


def add_everything(repo: Path, broker: str, topic: str) -> None:
    """A view with every type beside those that a repository has."""
    store = open_store(repo)
    entities, everything = view("everything", features=FIELDS)
    assert isinstance(everything.stream_source, KafkaSource)
    everything.stream_source.kafka_options.topic = topic
    everything.stream_source.kafka_options.kafka_bootstrap_servers = broker
    store.apply([*entities, everything])


def send(broker: str, case: Case) -> dict[int, int]:
    """Send the records of a case; where each partition ends then."""
    producer = Producer({"bootstrap.servers": broker, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000})
    ends = dict.fromkeys(range(4), 0)
    failed: list[Any] = []

    def note(error: Any, _: Any) -> None:
        if error is not None:
            failed.append(error)

    for number, record in enumerate(case.records):
        more: dict[str, Any] = {} if record.timestamp_ms is None else {"timestamp": record.timestamp_ms}
        while True:
            try:
                producer.produce(
                    case.topic, record.value, record.key, number % 4, headers=record.headers, on_delivery=note, **more
                )
                break
            except BufferError:
                producer.poll(0.1)
        ends[number % 4] += 1
        if number % 1000 == 0:
            producer.poll(0)
    assert producer.flush(120) == 0
    assert not failed, failed[0]
    return ends


def ends_of(worker: Worker) -> dict[str, dict[int, int]]:
    """The ends of the ledgers by topic and partition."""
    found: dict[str, dict[int, int]] = {}
    for part in worker.state().get("partitions", []):
        found.setdefault(part["topic"], {})[part["partition"]] = part["ledger_end"]
    return found


def outcome_of(contract: ViewContract, broker: str, topic: str) -> Outcome:
    """What is in the offline store and in the dead letters."""
    outcome = Outcome()
    folder = Folder.of(contract)
    for name, chain in folder.chains().items():
        partition = int(name.split("-")[-2])
        for path in map(folder.path_of, chain.valid):
            outcome.rejected += footer(path).rejected
            outcome.skipped += footer(path).skipped
            for offset, row in zip(
                accepted_offsets(path).tolist(), rows_of(contract, pq.read_table(path)), strict=True
            ):
                assert (partition, offset) not in outcome.rows
                outcome.rows[partition, offset] = row
    for letter in read_topic(broker, f"{topic}.dlq", timeout_s=300):
        origin = int(letter.headers["headrace.partition"]), int(letter.headers["headrace.offset"])
        outcome.letters[origin] = letter
    return outcome


def check_counts(name: str, metrics: str, messages: list[Message], outcome: Outcome) -> None:
    """Accepted and dead and skipped are sent: by the metrics, by the footers, and by the letters."""
    assert len(outcome.rows) + outcome.rejected + outcome.skipped == len(messages)
    assert len(outcome.letters) == outcome.rejected
    assert outcome.skipped == sum(message.value is None for message in messages)
    told: Counter[str] = Counter()
    for line in metrics.splitlines():
        if line.startswith("headrace_events_") and f'view="{name}"' in line and "_created{" not in line:
            told[line.split("{")[0]] += int(float(line.split()[-1]))
    wanted = {
        "headrace_events_received_total": len(messages),
        "headrace_events_accepted_total": len(outcome.rows),
        "headrace_events_rejected_total": outcome.rejected,
        "headrace_events_skipped_total": outcome.skipped,
    }
    received, *parts = (told[counter] for counter in wanted)
    assert received == sum(parts)
    # On a machine so busy that the group lost the worker for a moment, it read some twice, and counted them twice.
    assert told == wanted or (received > len(messages) and all(told[name] >= wanted[name] for name in wanted))


def check_rows(case: Case, messages: list[Message], outcome: Outcome) -> None:
    """Every record is what its judge says."""
    for message in messages:
        origin = (message.partition, message.offset)
        if message.value is None:
            assert origin not in outcome.rows
            assert origin not in outcome.letters
            continue
        verdict = case.judge(message.value)
        found = outcome.rows.get(origin)
        if found is None:
            assert verdict.row is None or verdict.is_open, f"{why(outcome, origin)}, but it is good: {message.value!r}"
        else:
            assert verdict.row is not None, f"accepted as {found}, but it is bad: {message.value!r}"
            assert same(verdict.row, found), f"expected {verdict.row}, found {found}: {message.value!r}"


def why(outcome: Outcome, origin: tuple[int, int]) -> str:
    """Why a record was turned away, in the letter's own words."""
    return outcome.letters[origin].headers["headrace.message"].decode()


def check_letters(messages: list[Message], outcome: Outcome) -> None:
    """A letter is the record: its bytes, its key, and its headers before our own."""
    by_origin = {(message.partition, message.offset): message for message in messages}
    for origin, letter in outcome.letters.items():
        source = by_origin[origin]
        own = len(source.all_headers)
        assert (letter.key, letter.value, letter.all_headers[:own]) == (source.key, source.value, source.all_headers)
        assert {name.split(".")[0] for name, _ in letter.all_headers[own:]} == {"headrace"}
        assert letter.headers["headrace.timestamp_ms"] == b"%d" % source.timestamp_ms
        assert origin not in outcome.rows


def check_online(repo: Path, contract: ViewContract, outcome: Outcome) -> None:
    """The newest row of each key is served: by event time, created time, partition, offset."""
    names = contract.schema.names
    key, at, made = (
        names.index(n) for n in (contract.join_keys[0], contract.timestamp_field, str(contract.created_field))
    )
    newest: dict[int, tuple[tuple[Any, ...], Row]] = {}
    for origin, row in outcome.rows.items():
        order = (row[at], row[made] is not None, row[made] or 0, *origin)
        if row[key] not in newest or order > newest[row[key]][0]:
            newest[row[key]] = (order, row)
    served = read_online(repo, sorted(newest))
    assert served == {number: row[1:4] for number, (_, row) in newest.items()}


VIEWS: Mapping[str, Callable[[], list[Field]]] = {
    "numbers": lambda: [
        Field(name="share", dtype=Float32, tags={"ge": "0", "le": "1", "nullable": "false"}),
        Field(name="count", dtype=Int32, tags={"ge": "0", "nullable": "false"}),
    ],
    "everything": lambda: FIELDS,
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_decoder_and_an_independent_one_agree(name: str, tmp_path: Path) -> None:
    """Batches of any size give the same as each record by itself."""
    print(f"HEADRACE_TEST_SEED={SEED}")  # noqa: T201 - to do it again
    contract = ViewContract.from_feast(view(features=VIEWS[name]())[1], config(tmp_path))
    now_us = time.time_ns() // 1000
    decode, judge = JsonDecoder(contract), judge_of(contract, now_us + SKEW_US)
    count = MESSAGES // EVERYTHING_SHARE
    values = [record.value for record in fuzzed(JsonCorpus(contract), count, SEED)]
    sizes = random.Random(SEED)
    while values:
        size = sizes.choice((1, 2, 30, 1000))
        batch, values = values[:size], values[size:]
        decoded = decode(batch)
        done = conform(contract, decoded.table, now_us=now_us, max_future_us=SKEW_US)
        rows = dict(zip(decoded.rows[done.rows].tolist(), rows_of(contract, done.table), strict=True))
        for index, value in enumerate(batch):
            verdict = judge(value) if value is not None else None
            row = rows.get(index)
            if verdict is None or verdict.row is None:
                assert row is None, f"accepted as {row}, but it is bad: {value!r}"
            elif row is None:
                assert verdict.is_open, f"turned away, but it is good: {value!r}"
            else:
                assert same(verdict.row, row), f"expected {verdict.row}, found {row}: {value!r}"
