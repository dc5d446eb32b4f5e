"""Hostile records through a real worker: each becomes the row it says or a dead letter, and the worker goes on.

`make fuzz` sends a million.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer
from fastavro import parse_schema, schemaless_reader
from feast import Field, KafkaSource
from feast.data_format import AvroFormat, JsonFormat, StreamFormat
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
from streaming import avro
from streaming.avro import AvroDecoder
from streaming.decode import JsonDecoder
from streaming.formats import Decoder, patiently
from streaming.schema_registry import SchemaRegistry
from tests.headrace.views import config, view
from tests.servers import Kafka
from tests.servers.schema_registry import SchemaRegistryServer
from tests.streaming.conftest import Stream, StreamFactory, read_from, set_format
from tests.streaming.mutate import JsonCorpus, Sent, fuzzed
from tests.streaming.mutate_avro import Forms, Framed, Records, Schema, Schemas
from tests.streaming.oracle import Message, read_online, read_topic
from tests.streaming.process import Worker
from tests.streaming.reading import Judge, Row, Verdict, judge_of, rows_of, same
from tests.streaming.reading_avro import Reader, Value, judge_of_avro

MESSAGES = int(os.environ.get("HEADRACE_TEST_FUZZ", "20000"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(2**32)))
SHARES = (0.70, 0.03, 0.12, 0.01, 0.13, 0.01)
"""Of the messages: JSON, Avro by the view's schema, framed Avro; of each a few columns, and every type there is."""
DECODER_SHARE = 0.05
"""And more, to each decoder by itself."""

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


VIEWS: Mapping[str, Callable[[], list[Field]]] = {
    "numbers": lambda: [
        Field(name="share", dtype=Float32, tags={"ge": "0", "le": "1", "nullable": "false"}),
        Field(name="count", dtype=Int32, tags={"ge": "0", "nullable": "false"}),
    ],
    "simple": lambda: FIELDS[: len(SIMPLE)],
    "everything": lambda: FIELDS,
}


def _time(unit: str) -> Schema:
    return {"type": "long", "logicalType": f"timestamp-{unit}"}


def _record(name: str, **fields: Schema) -> Schema:
    return {"type": "record", "name": name, "fields": [{"name": n, "type": kind} for n, kind in fields.items()]}


KEY, COUNT, RATE = ({"type": kind, "of": of} for kind, of in (("int", "key"), ("int", "count"), ("float", "share")))
WIDE_RATE, WHOLE_RATE = ({"type": kind, "of": "share"} for kind in ("double", "int"))
FLOATS = {"type": "array", "items": "float"}
MILLIS, MICROS, NANOS = map(_time, ("millis", "micros", "nanos"))
LOCAL = {"type": "long", "logicalType": "local-timestamp-millis"}
DATE = {"type": "int", "logicalType": "date"}
DRIVER_STATS: Schema = _record(
    "Drivers", created=["null", MICROS], datetime=MICROS, driver_id="long", avg_daily_trips=["null", "long"],
    acc_rate=["null", "double"], conv_rate="double",
)  # fmt: skip
DRIVER_STATS["fields"][0]["default"] = None
DRIVER_STATS["fields"][3]["aliases"] = ["trips"]
DRIVER_STATS["fields"][5]["default"] = 0.5
DRIVER_VERSIONS: Sequence[Schema] = (
    _record("Drivers1", driver_id=KEY, conv_rate=RATE, acc_rate=RATE, trips=COUNT, datetime=MILLIS,
            created=["null", MILLIS]),
    _record("Drivers2", source=["null", "string"], created=["null", MICROS], datetime=MICROS,
            driver_id={**KEY, "type": "long"}, avg_daily_trips=COUNT, acc_rate=["null", WIDE_RATE],
            conv_rate=WIDE_RATE),
    _record("Drivers3", datetime=NANOS, driver_id=KEY, trips=[COUNT, "null"], acc_rate=WHOLE_RATE, more=FLOATS),
    _record("Drivers4", map={"type": "map", "values": FLOATS}, acc_rate=[WIDE_RATE, "null"], driver_id=KEY,
            avg_daily_trips=COUNT, conv_rate=RATE, datetime=DATE, created="null"),
    _record("Drivers5", created=NANOS, driver_id=KEY, conv_rate=WHOLE_RATE, acc_rate=WIDE_RATE, trips=COUNT,
            datetime=LOCAL, raw="bytes"),
)  # fmt: skip
"""How the events of `driver_stats` were written in the course of time; the view's own schema is another one yet."""


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


def latest_us() -> int:
    """How late an event may be dated."""
    return time.time_ns() // 1000 + SKEW_US


def json_case(contract: ViewContract, topic: str, count: int, seed: int) -> Case:
    """Events of a view in JSON."""
    return Case(contract, topic, fuzzed(JsonCorpus(contract), count, seed), judge_of(contract, latest_us()))


def plain_case(contract: ViewContract, topic: str, schema: Schema, count: int, seed: int) -> Case:
    """Events of a view in Avro, of the view's own schema."""
    return Case(contract, topic, fuzzed(Records(schema), count, seed), judge_of_avro(contract, latest_us(), schema))


def framed_case(
    contract: ViewContract, topic: str, schemas: Schemas, own: Schema | None, count: int, seed: int
) -> Case:
    """Events of a view in Avro, of many schemas, which are resolved to the view's own if it has one."""
    judge = judge_of_avro(contract, latest_us(), schemas, own)
    return Case(contract, topic, fuzzed(Framed(schemas), count, seed), judge)


@pytest.fixture
def registry() -> Iterator[SchemaRegistryServer]:
    with SchemaRegistryServer() as server:
        yield server


@pytest.mark.timeout(7200)
def test_hostile_records_harm_nothing(make_stream: StreamFactory, kafka_server: Kafka, tmp_path: Path) -> None:
    """JSON and Avro without a registry."""
    stream = make_stream(session_seconds=30, store_retry_seconds=120)
    chance = random.Random(SEED)
    topics = [new_topic(kafka_server) for _ in SHARES[:4]]
    read_from(stream.repo, stream.broker, topics[0])
    add_view(stream, "everything", topics[1], JsonFormat(""))
    schemas = {}
    for name, topic in zip(("simple", "everything"), topics[2:], strict=True):
        contract = contract_of_fields(VIEWS[name](), tmp_path)
        schemas[topic] = Forms(chance, is_flat=name == "simple").schema(contract)
        add_view(stream, f"{name}_avro", topic, AvroFormat(json.dumps(schemas[topic])), VIEWS[name]())
    found = {contract.topic: contract for contract in contracts(open_store(stream.repo))}
    cases = [json_case(found[topic], topic, share_of(n), SEED + n) for n, topic in enumerate(topics[:2])]
    cases += [
        plain_case(found[topic], topic, schema, share_of(n), SEED + n)
        for n, (topic, schema) in enumerate(schemas.items(), 2)
    ]
    run_cases(stream, cases, tmp_path / "worker.log")


@pytest.mark.timeout(7200)
def test_hostile_framed_records_harm_nothing(
    make_stream: StreamFactory, kafka_server: Kafka, registry: SchemaRegistryServer, tmp_path: Path
) -> None:
    """Avro of many schemas, framed as a registry wants it."""
    stream = make_stream(session_seconds=30, store_retry_seconds=120, schema_registry_url=registry.url)
    topics = [new_topic(kafka_server) for _ in SHARES[4:]]
    read_from(stream.repo, stream.broker, topics[0])
    set_format(stream.repo, AvroFormat(json.dumps(DRIVER_STATS)))
    add_view(stream, "everything", topics[1], AvroFormat(""))
    found = {contract.topic: contract for contract in contracts(open_store(stream.repo))}
    drivers, everything = (found[topic] for topic in topics)
    registered = {registry.register(schema): schema for schema in DRIVER_VERSIONS}
    schemas = {**registered, **register_useless(registry, drivers)}
    versions = versions_of(everything, registry, Forms(random.Random(SEED)))
    cases = [
        framed_case(drivers, topics[0], schemas, DRIVER_STATS, share_of(4), SEED + 4),
        framed_case(everything, topics[1], versions, None, share_of(5), SEED + 5),
    ]
    run_cases(stream, cases, tmp_path / "worker.log")


def new_topic(kafka: Kafka) -> str:
    """A topic that takes anything."""
    return kafka.create_topic(f"fuzz-{uuid.uuid4().hex[:8]}", config=TOPIC)


def share_of(case: int) -> int:
    """How many of the messages are of a case."""
    return math.ceil(MESSAGES * SHARES[case])


def run_cases(stream: Stream, cases: Sequence[Case], log: Path) -> None:
    """Send all, let a worker work, and check what became of each; the first case is of `driver_stats`."""
    print(f"HEADRACE_TEST_SEED={SEED}")  # noqa: T201 - to do it again
    begun_s = time.monotonic()
    sent = {case.topic: send(stream.broker, case) for case in cases}
    sent_s = time.monotonic() - begun_s
    with Worker(stream.environment, log) as worker:
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


def add_view(
    stream: Stream, name: str, topic: str, message_format: StreamFormat, fields: Sequence[Field] = FIELDS
) -> None:
    """A view beside those that a repository has."""
    store = open_store(stream.repo)
    entities, added = view(name, features=fields)
    assert isinstance(added.stream_source, KafkaSource)
    options = added.stream_source.kafka_options
    options.topic, options.kafka_bootstrap_servers, options.message_format = topic, stream.broker, message_format
    store.apply([*entities, added])


def contract_of_fields(fields: Sequence[Field], home: Path) -> ViewContract:
    """The contract of a view that is applied nowhere."""
    return ViewContract.from_feast(view(features=fields)[1], config(home))


def versions_of(contract: ViewContract, registry: SchemaRegistryServer, forms: Forms) -> Schemas:
    """Registered schemas of a view, and some that it cannot use."""
    made = [forms.schema(contract) for _ in range(10)]
    return {**{registry.register(schema): schema for schema in made}, **register_useless(registry, contract)}


def register_useless(registry: SchemaRegistryServer, contract: ViewContract) -> Schemas:
    """Registered schemas that a view cannot use."""
    key, at = contract.join_keys[0], contract.timestamp_field
    node = _record("Node", next=["null", "Node"])
    nulls = {"type": "array", "items": "null"}
    fields: Sequence[dict[str, Schema]] = ({}, {key: "string"}, {at: "long"}, {"list": node}, {"many": nulls})
    texts = [json.dumps(_record("Useless", **kinds)) for kinds in fields]
    others = [registry.register('syntax = "proto3";', kind="PROTOBUF"), registry.register("[}")]
    return dict.fromkeys([*map(registry.register, texts), *others])


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
        letter = outcome.letters.get(origin)
        why = "" if letter is None else letter.headers["headrace.message"].decode()
        check_row(case.judge, message.value, outcome.rows.get(origin), why)


def check_row(judge: Judge, value: bytes | None, found: Row | None, why: str) -> None:
    """A record is what its judge says; why is what was said of one that was turned away."""
    verdict = Verdict(None) if value is None else judge(value)
    if found is None:
        assert verdict.row is None or verdict.is_open, f"{why}, but it is good: {value!r}"
    else:
        assert verdict.row is not None, f"accepted as {found}, but it is bad: {value!r}"
        assert same(verdict.row, found), f"expected {verdict.row}, found {found}: {value!r}"


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


@pytest.mark.parametrize("name", ["numbers", "everything"])
def test_the_json_decoder_and_an_independent_one_agree(name: str, tmp_path: Path) -> None:
    print(f"HEADRACE_TEST_SEED={SEED}")  # noqa: T201 - to do it again
    contract = contract_of_fields(VIEWS[name](), tmp_path)
    count = int(MESSAGES * DECODER_SHARE)
    check_decoder(JsonDecoder(contract), json_case(contract, "", count, SEED))


@pytest.mark.parametrize("is_framed", [False, True])
@pytest.mark.parametrize("name", ["simple", "everything"])
def test_the_avro_decoder_and_an_independent_one_agree(
    name: str, is_framed: bool, tmp_path: Path, registry: SchemaRegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"HEADRACE_TEST_SEED={SEED}")  # noqa: T201 - to do it again
    monkeypatch.setattr(avro, "DOUBT_S", 0.0)
    contract = contract_of_fields(VIEWS[name](), tmp_path)
    count = int(MESSAGES * DECODER_SHARE)
    forms = Forms(random.Random(SEED), is_flat=name == "simple")
    if is_framed:
        schemas = versions_of(contract, registry, forms)
        case = framed_case(contract, "", schemas, None, count, SEED)
        text = ""
    else:
        schema = forms.schema(contract)
        case = plain_case(contract, "", schema, count, SEED)
        text = json.dumps(schema)
    told = replace(contract, message_format="avro", message_schema=text)
    decoder = AvroDecoder(told, SchemaRegistry(registry.url) if is_framed else None)
    check_decoder(patiently(decoder), case)


def check_decoder(decode: Decoder, case: Case) -> None:
    """Batches of any size give the same as each record by itself."""
    values = [record.value for record in case.records]
    sizes = random.Random(SEED)
    while values:
        size = sizes.choice((1, 2, 30, 1000))
        batch, values = values[:size], values[size:]
        decoded = decode(batch)
        done = conform(case.contract, decoded.table, now_us=time.time_ns() // 1000, max_future_us=SKEW_US)
        rows = dict(zip(decoded.rows[done.rows].tolist(), rows_of(case.contract, done.table), strict=True))
        rejects = {reject.row: reject.message for reject in decoded.rejects}
        rejects |= {int(decoded.rows[reject.row]): reject.message for reject in done.rejects}
        for index, value in enumerate(batch):
            check_row(case.judge, value, rows.get(index), rejects.get(index, ""))


@pytest.mark.parametrize("name", ["simple", "everything"])
def test_the_reading_of_avro_is_that_of_another_library(name: str, tmp_path: Path) -> None:
    """On all that both take: fastavro has no bounds in some places."""
    contract = contract_of_fields(VIEWS[name](), tmp_path)
    chance = random.Random(SEED)
    schema = Forms(chance).schema(contract)
    records, parsed = Records(schema), parse_schema(without_logical_types(schema))
    read = 0
    for _ in range(500):
        value = records(chance)
        with contextlib.suppress(ValueError):
            found = bare(Reader(value).record(schema))
            read += 1
            assert repr(found) == repr(schemaless_reader(BytesIO(value), parsed, None))
    assert read > 200


def bare(value: Any) -> Any:
    """A value without the types that it was written as."""
    data = value.data if isinstance(value, Value) else value
    if isinstance(data, dict):
        return {name: bare(item) for name, item in data.items()}
    return [bare(item) for item in data] if isinstance(data, list) else data


def without_logical_types(schema: Any) -> Any:
    """A schema whose values fastavro leaves as they were written."""
    if isinstance(schema, dict):
        return {name: without_logical_types(part) for name, part in schema.items() if name != "logicalType"}
    return [without_logical_types(part) for part in schema] if isinstance(schema, list) else schema
