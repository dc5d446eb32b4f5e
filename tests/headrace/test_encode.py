"""Columnar encoding equals Feast's own serializers, byte for byte; and the order is the order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.field import from_value_type
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Float64
from feast.utils import _convert_arrow_to_proto
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.contract import ViewContract
from headrace.encode import (
    Origin,
    encode,
    encode_keys,
    encode_timestamps,
    encode_values,
    hash_tails,
    is_older,
    order_keys,
    schema_id,
    stream_tails,
)
from headrace.errors import SchemaError
from headrace.segments import decode_ranges, encode_ranges
from headrace.values import BINARY
from tests.headrace.views import EPOCH_US, config, examples, rows, view

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TIMES = st.integers(-(2**50), 2**50)
KEYS: dict[ValueType, st.SearchStrategy[Any]] = {
    ValueType.INT32: INT32,
    ValueType.INT64: INT64,
    ValueType.STRING: st.text(),
    ValueType.BYTES: st.binary(),
    ValueType.UNIX_TIMESTAMP: TIMES,
}
FULL = {"INT32": 1, "INT64": 1, "STRING": "x", "BYTES": b"x", "UNIX_TIMESTAMP": 1}
"""Feast makes nulls of empty bytes where a column has no others; this row sees to it that it has."""


def binary(*values: bytes) -> pa.Array:
    """Serialized values, as columns of them are."""
    return pa.array(values, BINARY)


def column_of(kind: ValueType) -> str:
    """Names whose order is not that of the types, and not that of the source's columns."""
    return f"k{kind.value * 7 % 10}_{kind.name}"


def mapped(folder: Path, kinds: Sequence[ValueType]) -> ViewContract:
    """A view with a join key of each kind; the source has other names for them, in the opposite order."""
    names = [column_of(kind) for kind in kinds]
    mapping = {f"source_{9 - index}": name for index, name in enumerate(sorted(names))}
    source = FileSource(name="history", path="data/stats", timestamp_field="at", field_mapping=mapping)
    entities = [
        Entity(name=f"{name}_entity", join_keys=[name], value_type=kind)
        for name, kind in zip(names, kinds, strict=True)
    ]
    fields = [Field(name=name, dtype=from_value_type(kind)) for name, kind in zip(names, kinds, strict=True)]
    made = FeatureView(
        name="stats", entities=entities, schema=[*fields, Field(name="value", dtype=Float64)], source=source
    )
    return ViewContract.from_feast(made, config(folder))


@pytest.mark.parametrize(
    "kinds", [*((kind,) for kind in KEYS), tuple(KEYS)], ids=lambda kinds: f"{len(kinds)} {kinds[0]}"
)
def test_keys_equal_feasts(tmp_path: Path, kinds: tuple[ValueType, ...]) -> None:
    contract = mapped(tmp_path, kinds)
    columns = {contract.view_name(name): name for name in contract.join_keys}
    assert set(columns) == {column_of(kind) for kind in kinds} != set(contract.join_keys)

    @settings(max_examples=examples(60), deadline=None)
    @given(st.lists(st.tuples(*(KEYS[kind] for kind in kinds)), min_size=1, max_size=5))
    def check(values: list[tuple[Any, ...]]) -> None:
        given_rows = [*values, tuple(FULL[kind.name] for kind in kinds)]
        names = [columns[column_of(kind)] for kind in kinds]
        table = rows(contract, [{"at": 0, **dict(zip(names, row, strict=True))} for row in given_rows])
        renamed = table.rename_columns([contract.view_name(name) for name in table.column_names])
        keys = {column_of(kind): kind for kind in kinds}
        theirs = _convert_arrow_to_proto(renamed.combine_chunks(), contract.feature_view, keys)
        assert encode_keys(contract, table).to_pylist() == [serialize_entity_key(row[0], 3) for row in theirs]

    check()


def test_a_view_without_an_entity_has_feasts_key(tmp_path: Path) -> None:
    source = FileSource(name="history", path="data/stats", timestamp_field="at")
    made = FeatureView(name="stats", entities=[], schema=[Field(name="value", dtype=Float64)], source=source)
    contract = ViewContract.from_feast(made, config(tmp_path))
    key = EntityKey(join_keys=["__dummy_id"], entity_values=[Value(string_val="")])
    table = rows(contract, [{"at": 2, "value": 1.0}, {"at": 3, "value": 2.0}, {"at": 1, "value": 3.0}])
    assert encode_keys(contract, table).to_pylist() == [serialize_entity_key(key, 3)] * 3
    encoded = encode(contract, table)
    assert (encoded.keys, encoded.event_us) == ([serialize_entity_key(key, 3)], [EPOCH_US + 3])


def test_a_row_without_key_or_time_is_refused(tmp_path: Path) -> None:
    contract = ViewContract.from_feast(view()[1], config(tmp_path))
    for column in ("id", "at"):
        table = rows(contract, [{"id": 1, "at": 0, column: None}])
        with pytest.raises(SchemaError, match=f"column `{column}` is null in 1 rows"):
            encode(contract, table)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([("id",), ("id", "name")]))
def test_encode_keeps_the_newest_of_each_key(tmp_path: Path, data: st.DataObject, keys: tuple[str, ...]) -> None:
    """Against the total order, row by row: event, created, then a stream row by its origin, then any by its hash."""
    kinds = {"id": ValueType.INT64, "name": ValueType.STRING}
    contract = ViewContract.from_feast(view(keys={key: kinds[key] for key in keys})[1], config(tmp_path))
    few = st.integers(0, 2)
    row = st.tuples(few, st.sampled_from(["", "a"]), few, st.none() | few, st.none() | few, st.none() | few)
    given_rows = data.draw(st.lists(row, max_size=12))
    table = rows(
        contract,
        [{"id": i, "name": name, "at": at, "made": made, "count": count} for i, name, at, made, count, _ in given_rows],
    )
    tails = np.zeros((len(given_rows), 17), dtype=np.uint8)
    for place, (*_, partition) in enumerate(given_rows):
        if partition is not None:
            tails[place] = stream_tails(Origin(0, partition, np.array([place])))
    values = {name: encode_values(contract, table, name) for name in contract.features}
    hashes = hash_tails(values, schema_id(contract.feature_view))

    def order(place: int) -> tuple[int, int, bytes]:
        _, _, at, made, _, partition = given_rows[place]
        return at, -1 if made is None else made, (hashes if partition is None else tails)[place].tobytes()

    best: dict[bytes, tuple[int, int, bytes]] = {}
    for place, key in enumerate(encode_keys(contract, table).to_pylist()):
        best[key] = max(best.get(key, order(place)), order(place))
    encoded = encode(contract, table, tails)
    found = {
        key: (event - EPOCH_US, -1 if created is None else created - EPOCH_US, whole[16:])
        for key, event, created, whole in zip(
            encoded.keys, encoded.event_us, encoded.created_us, encoded.order, strict=True
        )
    }
    assert len(encoded) == len(best)
    assert found == best


def test_the_hash_does_not_change() -> None:
    """Stored hashes outlive a version of pandas. These two are by a SipHash-2-4 of our own, checked by its vectors."""
    tails = hash_tails({"b": binary(b"\x18\x01", b""), "a": binary(b"", b"\x18\x01")}, b"kind")
    assert [row[:5].tobytes() for row in tails] == [b"\0kind"] * 2
    assert [row[5:].tobytes().hex() for row in tails] == ["fc2b69d960c10beeef0bdd0e", "b6e014a3579a07c886ff4967"]


def test_hashes_of_other_schemas_say_nothing() -> None:
    times, has = np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool)

    def order(value: bytes, schema: bytes, at: int = 0) -> bytes:
        return order_keys(times + at, times, has, hash_tails({"x": binary(value)}, schema))[0]

    low, high = sorted((order(b"\x18\x01", b"here"), order(b"\x18\x02", b"here")))
    assert is_older(low, high)
    assert not is_older(high, low)
    assert not is_older(low, low)
    there = order(b"\x18\x01", b"else")
    assert not is_older(low, there)
    assert not is_older(there, low)
    assert is_older(there, order(b"\x18\x01", b"here", at=1))
    stream = order_keys(times, times, has, stream_tails(Origin(0, 0, times)))[0]
    assert is_older(there, stream)
    assert not is_older(stream, there)
    assert not is_older(low, b"")


@given(st.lists(TIMES, max_size=5))
def test_timestamps_equal_protobufs(times: list[int]) -> None:
    expected = [Timestamp(seconds=us // 10**6, nanos=us % 10**6 * 1000).SerializeToString() for us in times]
    assert encode_timestamps(times).to_pylist() == expected


@given(st.lists(st.tuples(TIMES, st.one_of(st.none(), TIMES), st.integers(0, 2**40)), min_size=2, max_size=2))
def test_the_order_of_stream_rows(pair: list[tuple[int, int | None, int]]) -> None:
    event, created, offsets = (np.array([row[i] or 0 for row in pair], dtype=np.int64) for i in range(3))
    has = np.array([row[1] is not None for row in pair])
    first, second = order_keys(event, created, has, stream_tails(Origin(3, 7, offsets)))

    def plain(row: tuple[int, int | None, int]) -> tuple[int, float, int]:
        return row[0], -math.inf if row[1] is None else row[1], row[2]

    assert (first < second) == (plain(pair[0]) < plain(pair[1]))
    assert (first == second) == (plain(pair[0]) == plain(pair[1]))


def test_a_stream_row_is_newer_than_another_of_the_same_times() -> None:
    times, has = np.zeros(1, dtype=np.int64), np.ones(1, dtype=bool)
    stream = order_keys(times, times, has, stream_tails(Origin(0, 0, times)))
    other = order_keys(times, times, has, hash_tails({"x": binary(b"1")}, b"kind"))
    assert stream[0] > other[0]
    assert len(stream[0]) == len(other[0]) == 33


@given(st.sets(st.integers(0, 2**62), max_size=50))
def test_ranges_of_offsets_come_back(offsets: set[int]) -> None:
    given_offsets = np.array(sorted(offsets), dtype=np.int64)
    assert decode_ranges(encode_ranges(given_offsets)).tolist() == sorted(offsets)


def test_ranges_are_small() -> None:
    every_twentieth_bad = np.array([n for n in range(1_000_000) if n % 20], dtype=np.int64)
    assert len(encode_ranges(every_twentieth_bad)) < 2_000
