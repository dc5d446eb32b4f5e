"""Avro: what other writers wrote is read as they meant it, and what nobody meant has its reason."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal as PyDecimal
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastavro import parse_schema, schemaless_reader, schemaless_writer
from feast import Field
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
    String,
    Struct,
    UnixTimestamp,
    Uuid,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.conform import Reason, conform
from headrace.contract import ViewContract
from headrace.errors import ConfigError, TransientError
from streaming import avro
from streaming.avro import AvroDecoder
from streaming.avro_flat import FlatReader
from streaming.avro_schema import AvroSchemaError, read_schema, resolve
from streaming.formats import decoder_of
from streaming.schema_registry import RegistryError, SchemaRegistry, UnknownSchemaError
from tests.headrace.views import config, examples, view
from tests.servers.schema_registry import SchemaRegistryServer

Schema = dict[str, Any]


def contract(fields: dict[str, FeastType | Field], schema: Schema | str = "") -> ViewContract:
    """A view of these fields and of `id`, `at` and `made`, whose records are Avro of a schema."""
    made = [dtype if isinstance(dtype, Field) else Field(name=name, dtype=dtype) for name, dtype in fields.items()]
    plain = ViewContract.from_feast(view(features=made)[1], config(Path(tempfile.mkdtemp())))
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return replace(plain, message_format="avro", message_schema=text)


def logical(base: str, name: str, **more: Any) -> Schema:
    return {"type": base, "logicalType": name, **more}


MICROS = logical("long", "timestamp-micros")


def record(*fields: tuple[str, Any] | dict[str, Any], name: str = "Event") -> Schema:
    """A schema of a record."""
    return {
        "type": "record",
        "name": name,
        "fields": [field if isinstance(field, dict) else {"name": field[0], "type": field[1]} for field in fields],
    }


def event_schema(*fields: tuple[str, Any] | dict[str, Any]) -> Schema:
    """The same, with `id`, `at` and `made`."""
    return record(("id", "long"), *fields, ("at", MICROS), ("made", ["null", MICROS]))


def written(schema: Schema, value: dict[str, Any], schema_id: int | None = None) -> bytes:
    """A record as fastavro's own writer writes it, framed if there is an id."""
    data = BytesIO()
    if schema_id is not None:
        data.write(b"\0" + schema_id.to_bytes(4, "big"))
    schemaless_writer(data, parse_schema(schema), value)
    return data.getvalue()


NOW = datetime(2026, 1, 31, 12, 0, 0, 123_456, tzinfo=UTC)
BASE = {"id": 1, "at": NOW, "made": None}


def judge(view_: ViewContract, decoder: AvroDecoder, values: Sequence[bytes | None]) -> tuple[dict[int, Any], Any, Any]:
    """Rows accepted, rejects as reason and field, skipped: by record."""
    decoded = decoder(values)
    assert [reject.row for reject in decoded.rejects] == sorted(reject.row for reject in decoded.rejects)
    done = conform(view_, decoded.table, now_us=time.time_ns() // 1000, max_future_us=None)
    rejects = {reject.row: (reject.reason, reject.field) for reject in decoded.rejects}
    rejects |= {int(decoded.rows[reject.row]): (reject.reason, reject.field) for reject in done.rejects}
    rows = dict(zip(decoded.rows[done.rows].tolist(), done.table.to_pylist(), strict=True))
    return rows, rejects, decoded.skipped.tolist()


@pytest.fixture(scope="module")
def registry_server() -> Iterator[SchemaRegistryServer]:
    with SchemaRegistryServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[SchemaRegistryServer]:
    with SchemaRegistryServer() as server:
        yield server


# -- types, nulls and versions, against fastavro's own writer ---------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to write a column: its Avro type, values of it, and what they must become."""

    schema: Any
    values: st.SearchStrategy[Any]
    expected: Callable[[Any], Any] = lambda value: value


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _milliseconds(moment: datetime) -> datetime:
    return _utc(moment).replace(microsecond=moment.microsecond // 1000 * 1000)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


FIRST = datetime(1900, 1, 1)  # noqa: DTZ001 - a local timestamp has no zone
NAIVE = st.datetimes(FIRST, FIRST.replace(year=2200))
MOMENTS = NAIVE.map(_utc)
TEXT = st.text(max_size=8)
INT32, INT64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
FLOAT32, FLOAT64 = st.floats(width=32, allow_nan=False), st.floats(allow_nan=False)
CENTS = st.integers(-(10**8), 10**8).map(lambda cents: PyDecimal(cents).scaleb(-2))
MONEY = logical("bytes", "decimal", precision=12, scale=2)
INNER = record(("n", "int"), ("at", ["null", logical("long", "timestamp-millis")]), name="Inner")

COLUMNS: dict[str, tuple[FeastType, list[Variant]]] = {
    "whole": (
        Int64,
        [
            Variant("long", INT64),
            Variant("int", INT32),
            Variant(["int", "long"], INT64),
            Variant(logical("long", "timestamp-micros-of-ours"), INT64),
            Variant("double", INT32.map(float), int),
        ],
    ),
    "small": (Int32, [Variant("int", INT32), Variant("long", INT32)]),
    "number": (
        Float64,
        [
            Variant("double", FLOAT64),
            Variant("float", FLOAT32),
            Variant("int", INT32, float),
            Variant(["long", "double"], INT64 | FLOAT64, float),
            Variant(MONEY, CENTS, float),
        ],
    ),
    "rate": (Float32, [Variant("float", FLOAT32), Variant("double", FLOAT32), Variant(["int", "float"], FLOAT32)]),
    "yes": (Bool, [Variant("boolean", st.booleans())]),
    "text": (
        String,
        [
            Variant("string", TEXT),
            Variant({"type": "enum", "name": "E", "symbols": ["A", "B"]}, st.sampled_from("AB")),
            Variant(logical("int", "date"), st.dates(), lambda day: day.isoformat()),
        ],
    ),
    "raw": (
        Bytes,
        [
            Variant("bytes", st.binary(max_size=8)),
            Variant({"type": "fixed", "name": "F", "size": 3}, st.binary(min_size=3, max_size=3)),
        ],
    ),
    "when": (
        UnixTimestamp,
        [
            Variant(MICROS, MOMENTS),
            Variant(logical("long", "timestamp-millis"), MOMENTS, _milliseconds),
            Variant(logical("long", "local-timestamp-micros"), NAIVE, _utc),
            Variant(logical("int", "date"), st.dates(), _midnight),
            Variant("string", MOMENTS.map(datetime.isoformat), datetime.fromisoformat),
        ],
    ),
    "money": (
        Decimal,
        [
            Variant(MONEY, CENTS, str),
            Variant({**logical("fixed", "decimal", precision=12, scale=2), "name": "D", "size": 8}, CENTS, str),
            Variant("long", INT64, str),
            Variant("string", CENTS.map(str)),
        ],
    ),
    "ident": (Uuid, [Variant(logical("string", "uuid"), st.uuids(), str), Variant("string", st.uuids().map(str))]),
    "words": (Array(String), [Variant({"type": "array", "items": "string"}, st.lists(TEXT, max_size=3))]),
    "times": (
        Array(UnixTimestamp),
        [
            Variant({"type": "array", "items": ["null", MICROS]}, st.lists(st.none() | MOMENTS, max_size=3)),
            Variant(
                {"type": "array", "items": logical("long", "timestamp-millis")},
                st.lists(MOMENTS, max_size=3),
                lambda moments: [_milliseconds(moment) for moment in moments],
            ),
        ],
    ),
    "form": (
        Struct({"n": Int64, "at": UnixTimestamp}),
        [
            Variant(
                INNER,
                st.fixed_dictionaries({"n": INT32, "at": st.none() | MOMENTS}),
                lambda form: {**form, "at": None if form["at"] is None else _milliseconds(form["at"])},
            ),
            Variant(
                record(("n", "long"), ("more", "string"), name="Inner"),
                st.fixed_dictionaries({"n": INT64, "more": TEXT}),
                lambda form: {"n": form["n"], "at": None},
            ),
        ],
    ),
    "any": (
        Json,
        [
            Variant(
                {"type": "enum", "name": "Symbols", "symbols": ["A", "B"]}, st.sampled_from("AB"), lambda s: f'"{s}"'
            ),
            Variant(
                {"type": "array", "items": ["null", "long", "string"]},
                st.lists(st.none() | INT64 | TEXT, max_size=3),
                lambda items: json.dumps(items, separators=(",", ":"), ensure_ascii=False),
            ),
            Variant(
                record(("day", logical("int", "date")), ("cost", MONEY), name="Any"),
                st.fixed_dictionaries({"day": st.dates(), "cost": CENTS}),
                lambda some: f'{{"day":"{some["day"].isoformat()}","cost":"{some["cost"]}"}}',
            ),
        ],
    ),
    "map": (
        Map,
        [
            Variant(
                {"type": "map", "values": "long"},
                st.dictionaries(st.sampled_from("abc"), INT64),
                lambda entries: json.dumps(entries, separators=(",", ":")),
            )
        ],
    ),
}
OPTIONAL = {"nullable": "true"}
NOTE = Field(name="note", dtype=String, tags=OPTIONAL)
EVERY = contract({name: Field(name=name, dtype=dtype, tags=OPTIONAL) for name, (dtype, _) in COLUMNS.items()})


@st.composite
def versions(draw: st.DrawFn) -> list[tuple[Schema, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """Schemas, each with records: what is written, and what must be in the columns."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        chosen = draw(st.lists(st.sampled_from(sorted(COLUMNS)), unique=True))
        variants = {name: draw(st.sampled_from(COLUMNS[name][1])) for name in chosen}
        nullable = {name for name in chosen if not isinstance(variants[name].schema, list) and draw(st.booleans())}
        fields: list[tuple[str, Any]] = [
            (name, ["null", variant.schema] if name in nullable else variant.schema)
            for name, variant in variants.items()
        ]
        fields.append(("unknown", draw(st.sampled_from(["null", "string", {"type": "array", "items": "float"}]))))
        schema = event_schema(*draw(st.permutations(fields)))
        blank = {"null": None, "string": "x"}
        records = []
        for number in range(draw(st.integers(0, 3))):
            value: dict[str, Any] = {**BASE, "id": number}
            expected: dict[str, Any] = {**BASE, **dict.fromkeys(COLUMNS), "id": number}
            for name, variant in variants.items():
                drawn = draw(st.none() | variant.values) if name in nullable else draw(variant.values)
                value[name] = drawn
                expected[name] = None if drawn is None else variant.expected(drawn)
            kind = dict(fields)["unknown"]
            value["unknown"] = blank[kind] if isinstance(kind, str) else [1.5]
            records.append((value, expected))
        made.append((schema, records))
    return made


@pytest.mark.parametrize("fewest", [0, 100])
@settings(deadline=None, max_examples=examples(40))
@given(versions(), st.randoms(use_true_random=False))
def test_every_type_null_and_version_is_what_was_written(
    registry_server: SchemaRegistryServer, fewest: int, drawn: Any, chance: Any
) -> None:
    """Whether records that may be read together are, or not."""
    decoder = AvroDecoder(EVERY, SchemaRegistry(registry_server.url))
    records: list[tuple[bytes | None, Any]] = [(None, None)]
    for schema, values in drawn:
        number = registry_server.register(schema)
        records += [(written(schema, value, number), expected) for value, expected in values]
    chance.shuffle(records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avro, "FEWEST", fewest)
        rows, rejects, skipped = judge(EVERY, decoder, [value for value, _ in records])
    assert rejects == {}
    assert skipped == [index for index, (value, _) in enumerate(records) if value is None]
    assert rows == {index: expected for index, (value, expected) in enumerate(records) if value is not None}


RESOLVED: dict[str, tuple[list[Any], list[Any]]] = {
    "n": (["int"], ["int", "long", "float", "double", ["null", "int"], ["null", "long"]]),
    "l": (["long"], ["long", "double", ["string", "long"]]),
    "t": (["string", ["null", "string"]], ["string", ["null", "string"]]),
    "b": (["bytes"], ["bytes", ["null", "bytes"]]),
    "e": (
        [{"type": "enum", "name": "E", "symbols": ["A", "B", "C"]}],
        [{"type": "enum", "name": "E", "symbols": ["B", "A"], "default": "A"}],
    ),
    "a": ([{"type": "array", "items": "int"}], [{"type": "array", "items": "double"}]),
    "m": ([{"type": "map", "values": "int"}], [{"type": "map", "values": ["null", "long"]}]),
    "r": (
        [record(("x", "int"), ("gone", "string"), name="R")],
        [
            record({"name": "new", "type": "string", "default": "d"}, ("x", "long"), name="R"),
            record({"name": "y", "type": "int", "aliases": ["x"]}, name="R"),
        ],
    ),
}
SAMPLES = {"n": 7, "l": 2**40, "t": "t", "b": b"b", "e": "C", "a": [1, 2], "m": {"k": 1}, "r": {"x": 1, "gone": "g"}}


@settings(deadline=None, max_examples=examples(60))
@given(st.data())
def test_schemas_resolve_as_fastavro_resolves_them(data: st.DataObject) -> None:
    """Its own is not used, for it skips fields without noticing the end of a record; on good records it is right."""
    names = data.draw(st.lists(st.sampled_from(sorted(RESOLVED)), unique=True, min_size=1))
    writer = record(*((name, data.draw(st.sampled_from(RESOLVED[name][0]))) for name in names))
    kept = data.draw(st.lists(st.sampled_from(names), unique=True))
    reader = record(
        {"name": "added", "type": ["null", "int"], "default": None},
        *((name, data.draw(st.sampled_from(RESOLVED[name][1]))) for name in kept),
    )
    value = {name: SAMPLES[name] for name in names}
    expected: Any = schemaless_reader(BytesIO(written(writer, value)), parse_schema(writer), parse_schema(reader))
    w, r = read_schema(json.dumps(writer)), read_schema(json.dumps(reader))
    _, convert = resolve(w.root, r.root)
    found: Any = schemaless_reader(BytesIO(written(writer, value)), w.decoding, None)
    found = found if convert is None else convert(found)
    assert found == expected
    assert [type(v) for v in found.values()] == [type(expected[name]) for name in found]


@pytest.mark.parametrize(
    ("writer", "reader"), [("string", "int"), ("long", "int"), ("double", "long"), (["null", "string"], "long")]
)
def test_schemas_that_do_not_resolve_are_told(writer: Any, reader: Any) -> None:
    w, r = (read_schema(json.dumps(record(("x", kind)))).root for kind in (writer, reader))
    with pytest.raises(AvroSchemaError, match=r"field `x`: the writer's .* cannot be read as"):
        resolve(w, r)


def test_the_view_s_schema_is_the_reader_s_and_units_are_the_writer_s(server: SchemaRegistryServer) -> None:
    """A column that went from milliseconds to microseconds is right in every version; defaults and aliases hold."""
    newest = event_schema(
        {"name": "rate", "type": "double", "default": 0.5},
        {"name": "text", "type": "string", "aliases": ["was"]},
    )
    oldest = record(("id", "int"), ("was", "string"), ("at", logical("long", "timestamp-millis")), ("made", "null"))
    both = contract({"rate": Float64, "text": String}, newest)
    decoder = AvroDecoder(both, SchemaRegistry(server.url))
    first, second = server.register(oldest), server.register(newest)
    values = [
        written(oldest, {**BASE, "was": "old"}, first),
        written(newest, {**BASE, "rate": 1.0, "text": "new"}, second),
    ]
    rows, rejects, _ = judge(both, decoder, values)
    assert rejects == {}
    assert rows == {
        0: {"id": 1, "rate": 0.5, "text": "old", "at": _milliseconds(NOW), "made": None},
        1: {"id": 1, "rate": 1.0, "text": "new", "at": NOW, "made": None},
    }


def test_a_date_is_read_as_midnight_where_the_view_s_schema_has_a_timestamp(server: SchemaRegistryServer) -> None:
    oldest = record(("id", "long"), ("at", logical("int", "date")), ("made", "null"))
    newest = contract({"note": NOTE}, event_schema())
    value = written(oldest, {**BASE, "at": NOW.date()}, server.register(oldest))
    rows, rejects, _ = judge(newest, AvroDecoder(newest, SchemaRegistry(server.url)), [value])
    assert (rows[0]["at"], rejects) == (_midnight(NOW.date()), {})


def test_a_plain_long_is_a_time_if_the_view_s_schema_says_so(server: SchemaRegistryServer) -> None:
    bare = record(("id", "long"), ("at", "long"), ("made", ["null", "long"]))
    number = server.register(bare)
    moment = int(NOW.timestamp() * 1000)
    value = written(bare, {"id": 1, "at": moment, "made": None}, number)
    times = (("at", logical("long", "timestamp-millis")), ("made", ["null", MICROS]))
    told = contract({"note": NOTE}, record(("id", "long"), *times))
    rows, rejects, _ = judge(told, AvroDecoder(told, SchemaRegistry(server.url)), [value])
    assert (rows[0]["at"], rejects) == (_milliseconds(NOW), {})
    untold = contract({"note": NOTE})
    _, rejects, _ = judge(untold, AvroDecoder(untold, SchemaRegistry(server.url)), [value])
    assert rejects == {0: (Reason.BAD_TIMESTAMP, "at")}


FLAT = event_schema(
    ("n", ["null", "int"]),
    ("l", ["long", "null"]),
    ("f", "float"),
    ("d", ["null", "double"]),
    ("yes", "boolean"),
    ("text", ["null", "string"]),
    ("raw", "bytes"),
    ("fixed", {"type": "fixed", "name": "F", "size": 3}),
    ("kind", ["null", {"type": "enum", "name": "K", "symbols": ["A", "B", "C"]}]),
)
FLAT_TYPES: dict[str, FeastType] = {
    "n": Int64, "l": Int64, "f": Float64, "d": Float64, "yes": Bool, "text": String, "raw": Bytes, "fixed": Bytes,
    "kind": String,
}  # fmt: skip
FLAT_VIEW = contract({name: Field(name=name, dtype=dtype, tags=OPTIONAL) for name, dtype in FLAT_TYPES.items()}, FLAT)
FLAT_VALUES = st.fixed_dictionaries(
    {
        "id": INT64,
        "n": st.none() | INT32,
        "l": st.none() | INT64,
        "f": FLOAT32,
        "d": st.none() | FLOAT64,
        "yes": st.booleans(),
        "text": st.none() | TEXT,
        "raw": st.binary(max_size=8) | st.just(b"long" * 200),
        "fixed": st.binary(min_size=3, max_size=3),
        "kind": st.none() | st.sampled_from("ABC"),
        "at": MOMENTS,
        "made": st.none() | MOMENTS,
    }
)


@settings(deadline=None, max_examples=examples(60))
@given(st.data())
def test_records_read_together_are_what_they_are_when_read_alone(data: st.DataObject) -> None:
    """Good ones, good ones with other bytes in them, cut ones, and any bytes."""
    good = [written(FLAT, value) for value in data.draw(st.lists(FLAT_VALUES, min_size=1, max_size=5))]
    base = st.sampled_from(good)
    changed = st.builds(
        lambda value, where, other: value[: where % len(value)] + other + value[where % len(value) + len(other) :],
        base,
        st.integers(0, 100),
        st.binary(min_size=1, max_size=3),
    )
    cut = st.builds(lambda value, size: value[: size % len(value)], base, st.integers(0, 100))
    values = data.draw(st.lists(base | changed | cut | st.binary(max_size=20), max_size=10))
    decoder = AvroDecoder(FLAT_VIEW, None)
    alone = judge(FLAT_VIEW, decoder, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avro, "FEWEST", 0)
        together = judge(FLAT_VIEW, decoder, values)
    assert repr(together) == repr(alone)  # NaN is not itself


@pytest.mark.parametrize(
    ("schema", "values", "good"),
    [
        ("long", [b"\x80", b"\x02", b"\x80"], [False, True, False]),  # what follows would end the first
        ("double", [b"1234", b"12345678"], [False, True]),
        ("float", [b"\x01\x00\x80\x7f", b"123", b"\x00\x00\x80\x7f"], [True, False, True]),  # a signalling NaN
        ("string", [b"\x04a", b"\x04ab", b"\x04\xff\xff", b"\x01"], [False, True, False, False]),
        ("bytes", [b"\x04a", b"\x04ab", b"\x80\x80\x80\x80\x80\x80\x01"], [False, True, False]),
        ({"type": "enum", "name": "E", "symbols": ["A"]}, [b"\x02", b"\x00", b"\x01"], [False, True, False]),
        (["null", "long"], [b"\x02", b"\x02\x02", b"\x00", b"\x04\x02", b"\x01"], [False, True, True, False, False]),
        ("boolean", [b"", b"\x01", b"\x01\x00"], [False, True, False]),
    ],
)
def test_a_record_read_together_with_others_ends_where_it_ends(
    schema: Any, values: list[bytes], good: list[bool]
) -> None:
    _, found = FlatReader(read_schema(json.dumps(record(("a", schema)))).root, values, 0).read()
    assert found.tolist() == good


# -- hostile bytes -----------------------------------------------------------------------------------------------------

RICH = event_schema(
    ("text", "string"),
    ("raw", "bytes"),
    ("words", {"type": "array", "items": "string"}),
    ("map", {"type": "map", "values": "long"}),
    ("kind", {"type": "enum", "name": "K", "symbols": ["A", "B"]}),
    ("extra", {"type": "array", "items": "float"}),
    ("fixed", {"type": "fixed", "name": "F", "size": 4}),
)
RICH_VIEW = contract({"text": String, "raw": Bytes, "words": Array(String), "map": Map, "kind": String}, RICH)
RICH_VALUE = {
    **BASE,
    "text": "t",
    "raw": b"raw",
    "words": ["a", "b"],
    "map": {"k": 1},
    "kind": "B",
    "extra": [1.0, 2.0],
    "fixed": b"1234",
}
GOOD = written(RICH, RICH_VALUE)


def varint(number: int) -> bytes:
    """A long as Avro writes it."""
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*out, rest])


HUGE = varint(2**40)
LEAST = varint(-(2**63)) + varint(0)
WORDS, ENTRIES = b"\x04\x02a\x02b\0", b"\x02\x02k\x02\0"
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "a byte more": GOOD + b"\0",
    "two records": GOOD + GOOD,
    "text of a terabyte": b"\x02" + HUGE + GOOD,
    "text of less than nothing": b"\x02" + varint(-5) + GOOD,
    "bytes of a terabyte": b"\x02\x02t" + HUGE + GOOD,
    "bytes of less than nothing": b"\x02\x02t" + varint(-(2**62)),
    "an array of a trillion": b"\x02\x02t\x00" + HUGE + GOOD,
    "an array of minus a trillion": b"\x02\x02t\x00" + varint(-(2**40)) + HUGE + GOOD,
    "an array of as little as can be": b"\x02\x02t\x00" + varint(-(2**63)) + varint(-(2**63)) + GOOD,
    "a block of less than nothing": b"\x02\x02t\x00" + varint(-1) + varint(-100) + b"\x00" + GOOD,
    "a map of a trillion": b"\x02\x02t\x00\x00" + HUGE + GOOD,
    "a symbol that is none": b"\x02\x02t\x00\x00\x00\x04" + GOOD,
    "a symbol below zero": b"\x02\x02t\x00\x00\x00\x01\x00" + b"1234" + varint(1) + b"\x00",
    "a trillion floats that no column wants": b"\x02\x02t\x00\x00\x00\x02" + HUGE + b"\0" * 40,
    "a branch below zero": written(RICH, RICH_VALUE)[:-1] + b"\x03",
    "no utf-8": GOOD.replace(b"\x02t", b"\x02\xff", 1),
    "a number of twelve bytes": b"\x82" + b"\x80" * 10 + b"\0" + GOOD[1:],
    "a list of as little as can be before another": GOOD.replace(WORDS, LEAST + WORDS, 1),
    "a map of as little as can be before another": GOOD.replace(ENTRIES, LEAST + ENTRIES, 1),
    "a number without end": b"\xff" * 5000,
    "a number without end, ended": b"\xff" * 5000 + b"\0",
}


def test_many_high_bytes_are_no_fault() -> None:
    """Text of other alphabets, and numbers and blocks that are as long as they may be."""
    value = {**RICH_VALUE, "id": -(2**63), "text": "ключ доступа", "raw": b"\xff" * 40, "fixed": b"\xff" * 4}
    good = written(RICH, value)
    block = varint(-1) + varint(3)
    padded = good.replace(WORDS, block + b"\x82\x80\x80\x80\x80\x80\x80\x80\x80\0a" + block + b"\x02b\0", 1)
    rows, rejects, _ = judge(RICH_VIEW, AvroDecoder(RICH_VIEW, None), [good, padded])
    assert rejects == {}
    assert rows[0] == rows[1]
    assert (rows[0]["id"], rows[0]["text"], rows[0]["words"]) == (value["id"], value["text"], ["a", "b"])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bytes_are_dead_letters_at_once(kind: str) -> None:
    decoder = AvroDecoder(RICH_VIEW, None)
    tracemalloc.start()
    try:
        rows, rejects, skipped = judge(RICH_VIEW, decoder, [GOOD, HOSTILE[kind], None, GOOD])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(rows) == [0, 3]
    assert rejects == {1: (Reason.UNDECODABLE, None)}
    assert skipped == [2]
    assert peak < 50_000_000


def test_every_beginning_of_a_record_is_a_fault() -> None:
    cut = [GOOD[:size] for size in range(len(GOOD))]
    rows, rejects, _ = judge(RICH_VIEW, AvroDecoder(RICH_VIEW, None), [*cut, GOOD])
    assert list(rows) == [len(GOOD)]
    assert set(rejects.values()) == {(Reason.UNDECODABLE, None)}


@settings(deadline=None, max_examples=examples(60))
@given(st.lists(st.none() | st.binary(max_size=60) | st.just(GOOD)))
def test_no_bytes_raise_and_every_record_has_one_outcome(values: list[bytes | None]) -> None:
    rows, rejects, skipped = judge(RICH_VIEW, AvroDecoder(RICH_VIEW, None), values)
    assert sorted([*rows, *rejects, *skipped]) == list(range(len(values)))


@settings(deadline=None, max_examples=examples(100))
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=12))
def test_a_good_record_with_other_bytes_in_it_does_not_raise(where: int, other: bytes) -> None:
    value = GOOD[:where] + other + GOOD[where + len(other) :]
    rows, rejects, _ = judge(RICH_VIEW, AvroDecoder(RICH_VIEW, None), [GOOD, value, GOOD])
    assert sorted([*rows, *rejects]) == [0, 1, 2]
    assert {0, 2} <= rows.keys()


NODE = record(("next", ["null", "Node"]), name="Node")
UNSAFE: dict[str, tuple[Any, str]] = {
    "recursive": (event_schema(("list", NODE)), "recursive in `Node`"),
    "recursive through others": (
        event_schema(("a", record(("b", {"type": "array", "items": "A"}), name="A"))),
        "recursive in `A`",
    ),
    "nulls": (event_schema(("many", {"type": "array", "items": "null"})), "array of null, which takes no bytes"),
    "empty records": (
        event_schema(("many", {"type": "array", "items": record(("a", "null"), name="Nothing")})),
        "array of record, which takes no bytes",
    ),
    "empty fixed": (
        event_schema(("many", {"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}})),
        "takes no bytes",
    ),
    "a scale": (event_schema(("money", logical("bytes", "decimal", precision=10**9, scale=10**9))), "scale"),
    "no record": ({"type": "array", "items": "long"}, "expected a record, found array of long"),
    "no schema": ("[}", "no Avro schema: JSONDecodeError"),
    "unknown type": (record(("id", "number")), "no Avro schema: UnknownType: number"),
    "deep": ('{"type":"array","items":' * 50_000, "no Avro schema: RecursionError"),
    "no fields": ({"type": "record", "name": "R", "fields": 3}, "no Avro schema"),
    "a bad default": (record({"name": "a", "type": "int", "default": "x"}), "no Avro schema: SchemaParseException"),
}


def nested(levels: int) -> Schema:
    """Lists of lists of lists."""
    inner: Any = "long"
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return event_schema(("deep", inner))


def doubled(levels: int) -> Schema:
    """A record that takes a line a level, and has `2**levels` parts."""
    inner: Any = "long"
    for level in range(levels):
        inner = record(("a", inner), ("b", inner if isinstance(inner, str) else inner["name"]), name=f"R{level}")
    return event_schema(("big", inner))


@pytest.mark.parametrize("kind", UNSAFE)
def test_unsafe_and_wrong_schemas_are_refused(kind: str, server: SchemaRegistryServer) -> None:
    schema, words = UNSAFE[kind]
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(ConfigError, match=r"^feature view `stats`: the schema_json of its AvroFormat: .*") as caught:
        AvroDecoder(contract({"note": NOTE}, text), None)
    assert words in str(caught.value)
    any_view = contract({"note": NOTE})
    number = server.register(text)
    decoded = AvroDecoder(any_view, SchemaRegistry(server.url))([b"\0" + number.to_bytes(4, "big") + b"\0" * 30])
    assert decoded.rejects[0].reason is Reason.UNDECODABLE
    assert f"schema id {number}: " in decoded.rejects[0].message
    assert words in decoded.rejects[0].message


def test_a_small_schema_of_very_many_parts_is_refused() -> None:
    assert read_schema(json.dumps(doubled(5))).root.kind == "record"
    with pytest.raises(AvroSchemaError, match="more than 20000 parts"):
        read_schema(json.dumps(doubled(30)))


@pytest.mark.parametrize("levels", [65, 150, 300])
def test_a_schema_that_is_nested_too_deep_is_refused(levels: int) -> None:
    deepest = contract({"deep": Json}, nested(60))
    value: Any = [1]
    for _ in range(59):
        value = [value]
    full = nested(60)
    rows, rejects, _ = judge(deepest, AvroDecoder(deepest, None), [written(full, {**BASE, "deep": value})])
    assert (json.loads(rows[0]["deep"]), rejects) == (value, {})
    with pytest.raises(AvroSchemaError, match="nested deeper than 64 levels"):
        read_schema(json.dumps(nested(levels)))


# -- values that do not fit their column -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "schema", "good", "bad", "reason"),
    [
        (Int32, "long", 1, 2**31, Reason.WRONG_TYPE),
        (Int64, "double", 3.0, 3.5, Reason.WRONG_TYPE),
        (Int64, "double", 3.0, float("nan"), Reason.WRONG_TYPE),
        (Int64, MONEY, PyDecimal("3.00"), PyDecimal("3.01"), Reason.WRONG_TYPE),
        (Float32, "double", 1.5, 1e300, Reason.WRONG_TYPE),
        (Uuid, "string", str(uuid.UUID(int=1)), "no uuid", Reason.WRONG_TYPE),
        (Decimal, "string", "1.5", "much", Reason.WRONG_TYPE),
        (UnixTimestamp, "string", "2026-01-31T12:00:00Z", "soon", Reason.BAD_TIMESTAMP),
        (UnixTimestamp, "string", "2026-01-31 12:00:00", "2026-02-30 12:00:00", Reason.BAD_TIMESTAMP),
        (Json, "string", "[1]", "[1", Reason.WRONG_TYPE),
        (Map, "string", "{}", "[]", Reason.WRONG_TYPE),
        (Array(UnixTimestamp), {"type": "array", "items": "string"}, ["2026-01-31 12:00:00"], ["x"], Reason.WRONG_TYPE),
    ],
)
def test_a_value_that_does_not_fit_is_a_fault_of_its_field(
    dtype: FeastType, schema: Any, good: Any, bad: Any, reason: Reason
) -> None:
    full = event_schema(("f", schema))
    one = contract({"f": dtype}, full)
    values = [written(full, {**BASE, "f": value}) for value in (good, bad, good)]
    rows, rejects, _ = judge(one, AvroDecoder(one, None), values)
    assert sorted(rows) == [0, 2]
    assert rejects == {1: (reason, "f")}


@pytest.mark.parametrize("kind", ["timestamp-millis", "timestamp-micros", "timestamp-nanos", "date"])
@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**50 * 1000])
def test_a_time_that_no_calendar_has_is_a_fault(kind: str, value: int) -> None:
    base = "int" if kind == "date" else "long"
    full = record(("id", "long"), ("at", logical(base, kind)), ("made", "null"))
    plain = record(("id", "long"), ("at", "long"), ("made", "null"))
    one = contract({"note": NOTE}, full)
    rows, rejects, _ = judge(one, AvroDecoder(one, None), [written(plain, {"id": 1, "at": value, "made": None})])
    if kind == "timestamp-nanos":  # which end in the year 2262
        assert rows[0]["at"] == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value // 1000)
    else:
        assert rejects == {0: (Reason.BAD_TIMESTAMP, "at")}


def test_a_decimal_of_a_megabyte_is_a_fault_at_once() -> None:
    full = event_schema(("f", MONEY))
    one = contract({"f": Decimal}, full)
    data = written(event_schema(("f", "bytes")), {**BASE, "f": b"\x7f" * 1_000_000})
    _, rejects, _ = judge(one, AvroDecoder(one, None), [data])
    assert rejects == {0: (Reason.WRONG_TYPE, "f")}


def test_a_null_where_the_view_allows_none_is_a_fault() -> None:
    full = record(("id", ["null", "long"]), ("rate", ["null", "float"]), ("at", ["null", MICROS]), ("made", "null"))
    one = contract({"rate": Field(name="rate", dtype=Float32, tags={"nullable": "false"})}, full)
    good = {**BASE, "rate": 0.5}
    values = [written(full, {**good, **change}) for change in ({}, {"id": None}, {"rate": None}, {"at": None})]
    rows, rejects, _ = judge(one, AvroDecoder(one, None), values)
    assert list(rows) == [0]
    assert rejects == {1: (Reason.NULL, "id"), 2: (Reason.NULL, "rate"), 3: (Reason.NULL, "at")}


# -- what is refused at start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("", "is empty; write the schema there, or set HEADRACE_SCHEMA_REGISTRY_URL"),
        (record(("id", "long"), ("made", "null")), "field `rate` is missing, and the view does not tag it nullable"),
        (event_schema(("rate", "string")), "field `rate`: the Avro type string cannot become Float32"),
        (event_schema(("rate", ["int", "string"])), "is a choice of several types, of which no column of type Float32"),
        (event_schema(("rate", logical("int", "date"))), "the Avro type int (date) cannot become Float32"),
        (record(("id", "long"), ("rate", "float"), ("at", "long"), ("made", "null")), "field `at`: the Avro type long"),
    ],
)
def test_a_schema_that_does_not_give_what_the_view_needs_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decoder_of(contract({"rate": Float32}, schema), None)
    assert str(caught.value).startswith("feature view `stats`: the schema_json of its AvroFormat")
    assert words in str(caught.value)


def test_protobuf_is_refused_with_the_reason() -> None:
    proto = replace(contract({"rate": Float32}), message_format="proto", message_schema="com.example.Event")
    with pytest.raises(ConfigError, match=r"message format `proto`; a ProtoFormat names a Java class.* AvroFormat"):
        decoder_of(proto, None)


# -- the registry ------------------------------------------------------------------------------------------------------

SIMPLE = event_schema(("n", "long"))
SIMPLE_VIEW = contract({"n": Int64})


def simple(number: int, n: int = 1) -> bytes:
    return written(SIMPLE, {**BASE, "n": n}, number)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown id is doubted for a moment only, and asked for again soon."""
    monkeypatch.setattr(avro, "DOUBT_S", 0.2)
    monkeypatch.setattr(avro, "UNKNOWN_S", 0.5)


def insist(decoder: AvroDecoder, values: Sequence[bytes | None], seconds: float = 10.0) -> Any:
    """What a lane does: again until it passes."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return judge(SIMPLE_VIEW, decoder, values)
        except TransientError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_known_id_is_asked_for_once(server: SchemaRegistryServer) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url))
    number = server.register(SIMPLE)
    for _ in range(3):
        assert len(judge(SIMPLE_VIEW, decoder, [simple(number), simple(number)])[0]) == 2
    server.stop()
    assert len(judge(SIMPLE_VIEW, decoder, [simple(number)])[0]) == 1
    assert server.asked == [f"/schemas/ids/{number}"]


def test_what_is_not_framed_is_a_fault_where_records_are(server: SchemaRegistryServer) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url))
    number = server.register(SIMPLE)
    plain = written(SIMPLE, {**BASE, "n": 1})
    decoded = decoder([plain, b"\0\0\0", b"", simple(number)])
    assert [reject.row for reject in decoded.rejects] == [0, 1, 2]
    assert decoded.rejects[0].message.startswith("expected the magic byte 0 and a schema's id, found 02")
    assert decoded.rows.tolist() == [3]


def test_a_registry_that_is_down_is_asked_again_and_nothing_is_lost(server: SchemaRegistryServer) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url, timeout_s=2))
    number = server.register(SIMPLE)
    server.stop()
    with pytest.raises(RegistryError, match=rf"schema registry {server.url}/schemas/ids/{number}: ConnectionError"):
        decoder([simple(number)])
    server.start()
    for status in (500, 503, 429, 401):
        server.status = status
        with pytest.raises(RegistryError, match=f"HTTP {status}"):
            decoder([simple(number)])
    server.status = None
    assert judge(SIMPLE_VIEW, decoder, [simple(number)])[0].keys() == {0}


def test_a_404_of_something_else_is_no_word_on_the_schema(server: SchemaRegistryServer) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(f"{server.url}/wrong/path"))
    with pytest.raises(RegistryError, match="HTTP 404, which is no answer of a schema registry"):
        decoder([simple(1)])


@pytest.mark.usefixtures("impatient")
def test_an_unknown_id_is_doubted_then_a_fault_then_asked_for_again(server: SchemaRegistryServer) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url))
    number = server.register(SIMPLE)
    values = [simple(number), simple(number + 1)]
    with pytest.raises(TransientError, match=f"does not know schema id {number + 1}"):
        decoder(values)
    rows, rejects, _ = insist(decoder, values)
    assert (list(rows), rejects) == ([0], {1: (Reason.UNDECODABLE, None)})
    message = decoder(values).rejects[0].message
    assert message == f"schema id {number + 1} is not known to the schema registry"
    asked = len(server.asked)
    decoder(values)
    assert len(server.asked) == asked
    assert server.register(SIMPLE) == number + 1
    time.sleep(0.6)
    assert len(judge(SIMPLE_VIEW, decoder, values)[0]) == 2


def test_a_schema_that_a_replica_has_a_moment_later_costs_no_record(server: SchemaRegistryServer) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url))
    with pytest.raises(TransientError):
        decoder([simple(1)])
    server.register(SIMPLE)
    assert judge(SIMPLE_VIEW, decoder, [simple(1)])[0].keys() == {0}


@pytest.mark.usefixtures("impatient")
def test_a_flood_of_unknown_ids_is_bounded_and_what_most_records_name_is_asked_for_first(
    server: SchemaRegistryServer,
) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url))
    number = server.register(SIMPLE)
    values: list[bytes | None] = [b"\0" + (1000 + n).to_bytes(4, "big") for n in range(500)]
    values += [simple(number), simple(number)]
    with pytest.raises(TransientError):
        decoder(values)
    assert len(server.asked) == avro.MOST_UNKNOWN + 1
    rows, rejects, _ = insist(decoder, values)
    assert sorted(rows) == [500, 501]
    assert len(rejects) == 500


def test_references_are_followed(server: SchemaRegistryServer) -> None:
    server.register(record(("deep", "long"), name="a.Deep"), subject="deep")
    link = [{"name": "a.Deep", "subject": "deep", "version": 1}]
    server.register(record(("inner", "a.Deep"), name="b.Inner"), subject="inner", references=link)
    main = event_schema(("form", "b.Inner"))
    number = server.register(main, subject="main", references=[{"name": "b.Inner", "subject": "inner", "version": 1}])
    full = event_schema(("form", record(("inner", record(("deep", "long"), name="Deep")), name="Inner")))
    nested = contract({"form": Struct({"inner": Struct({"deep": Int64})})})
    value = written(full, {**BASE, "form": {"inner": {"deep": 5}}}, number)
    rows, rejects, _ = judge(nested, AvroDecoder(nested, SchemaRegistry(server.url)), [value])
    assert rejects == {}
    assert rows[0]["form"] == {"inner": {"deep": 5}}


@pytest.mark.parametrize(
    ("schema", "reason", "field"),
    [
        (record(("id", "long"), ("at", MICROS), ("made", "null")), Reason.MISSING_FIELD, "n"),
        (event_schema(("n", "string")), Reason.WRONG_TYPE, "n"),
    ],
)
def test_a_registered_schema_that_the_view_cannot_use_names_its_id_and_field(
    server: SchemaRegistryServer, schema: Schema, reason: Reason, field: str
) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url))
    good, bad = server.register(SIMPLE), server.register(schema)
    value = written(schema, {**BASE, "n": "x"}, bad)
    decoded = decoder([value, simple(good)])
    assert [(reject.reason, reject.field) for reject in decoded.rejects] == [(reason, field)]
    assert decoded.rejects[0].message.startswith(f"schema id {bad}: field `n`")
    assert decoded.rows.tolist() == [1]


def test_schemas_of_other_formats_are_told(server: SchemaRegistryServer) -> None:
    decoder = AvroDecoder(SIMPLE_VIEW, SchemaRegistry(server.url))
    number = server.register('syntax = "proto3";', kind="PROTOBUF")
    decoded = decoder([b"\0" + number.to_bytes(4, "big")])
    assert decoded.rejects[0].message == f"schema id {number} is PROTOBUF, the view expects AVRO"


def test_a_login_is_used_and_never_told(server: SchemaRegistryServer) -> None:
    server.login = "me:se cret-ü"
    server.register(SIMPLE, subject="topic-value")
    registry = SchemaRegistry(server.url, username="me", password="se cret-ü")  # noqa: S106 - of a server of the test
    assert registry.latest("topic-value").id == 1
    with pytest.raises(UnknownSchemaError):
        registry.latest("other-value")
    with pytest.raises(RegistryError, match="turns the login away") as caught:
        SchemaRegistry(server.url, username="me", password="wrong-one").check()  # noqa: S106 - as above
    assert "wrong-one" not in str(caught.value)


def test_a_slice_of_nothing_and_of_tombstones() -> None:
    decoder = AvroDecoder(RICH_VIEW, None)
    assert judge(RICH_VIEW, decoder, []) == ({}, {}, [])
    assert judge(RICH_VIEW, decoder, [None, None]) == ({}, {}, [0, 1])
    assert decoder([]).table.column_names == RICH_VIEW.schema.names
    assert decoder([None]).rows.dtype == np.int64
