"""Columnar encoding equals Feast's own serializers, byte for byte; and the order is the order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from feast import Field, ValueType
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp
from feast.utils import _convert_arrow_to_proto
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.contract import ViewContract
from headrace.encode import Origin, encode_keys, encode_timestamps, encode_values, hash_tails, order_keys, stream_tails
from headrace.segments import decode_ranges, encode_ranges
from tests.headrace.views import config, rows, view

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TIMES = st.integers(-(2**50), 2**50)
VALUES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "f32": (Float32, st.one_of(st.none(), st.floats(width=32))),
    "f64": (Float64, st.one_of(st.none(), st.floats())),
    "i32": (Int32, INT32),
    "i64": (Int64, INT64),
    "flag": (Bool, st.one_of(st.none(), st.booleans())),
    "text": (String, st.one_of(st.none(), st.text())),
    "raw": (Bytes, st.one_of(st.none(), st.binary())),
    "list": (Array(Int64), st.lists(INT64, max_size=3)),
    "when": (UnixTimestamp, st.integers(0, 2**40)),
}


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> ViewContract:
    fields = [Field(name=name, dtype=dtype) for name, (dtype, _) in VALUES.items()]
    keys = {"b_id": ValueType.INT64, "a_id": ValueType.STRING, "c_id": ValueType.INT32}
    return ViewContract.from_feast(view(keys=keys, features=fields)[1], config(tmp_path_factory.mktemp("encode")))


ROW = st.fixed_dictionaries(
    {
        "a_id": st.text(),
        "b_id": INT64,
        "c_id": INT32,
        "at": st.integers(0, 10**12),
        "made": st.integers(0, 10**12),
        **{name: strategy for name, (_, strategy) in VALUES.items()},
    }
)


# Feast makes nulls of empty lists and bytes where the batch has no other; this row sees to it that it has.
FULL = {"a_id": "a", "b_id": 1, "c_id": 1, "at": 0, "made": 0, "raw": b"1", "list": [1], "i32": 1, "i64": 1, "when": 1}


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ROW, min_size=1, max_size=6))
def test_keys_and_values_equal_feasts(contract: ViewContract, values: list[dict[str, Any]]) -> None:
    table = rows(contract, [*values, FULL])
    keys = {field.name: field.dtype.to_value_type() for field in contract.feature_view.entity_columns}
    theirs = _convert_arrow_to_proto(table.combine_chunks(), contract.feature_view, keys)
    assert encode_keys(contract, table) == [serialize_entity_key(row[0], 3) for row in theirs]
    for name in contract.features:
        ours = encode_values(contract, table, name)
        assert ours == [row[1][name].SerializeToString() for row in theirs], name


@given(st.lists(TIMES, max_size=5))
def test_timestamps_equal_protobufs(times: list[int]) -> None:
    expected = [Timestamp(seconds=us // 10**6, nanos=us % 10**6 * 1000).SerializeToString() for us in times]
    assert encode_timestamps(times) == expected


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
    other = order_keys(times, times, has, hash_tails({"x": [b"1"]}))
    assert stream[0] > other[0]
    assert len(stream[0]) == len(other[0]) == 33


@given(st.sets(st.integers(0, 2**62), max_size=50))
def test_ranges_of_offsets_come_back(offsets: set[int]) -> None:
    given_offsets = np.array(sorted(offsets), dtype=np.int64)
    assert decode_ranges(encode_ranges(given_offsets)).tolist() == sorted(offsets)


def test_ranges_are_small() -> None:
    every_twentieth_bad = np.array([n for n in range(1_000_000) if n % 20], dtype=np.int64)
    assert len(encode_ranges(every_twentieth_bad)) < 2_000


def test_empty_lists_stay_lists_in_a_batch_of_them(contract: ViewContract) -> None:
    alone = rows(contract, [{**FULL, "list": []}, {**FULL, "list": None}])
    among = rows(contract, [{**FULL, "list": []}, {**FULL, "list": None}, FULL])
    encoded = encode_values(contract, alone, "list")
    assert encoded == encode_values(contract, among, "list")[:2]
    assert encoded[0] != encoded[1] == b""
