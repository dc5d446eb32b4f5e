"""The newest row of each key equals a brute-force oracle, whatever files the rows are in; older and foreign files."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Field, ValueType
from feast.types import Array, Float64, Int64, String
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import objects, scan
from headrace.chains import Folder, StreamLedger, push
from headrace.contract import ViewContract
from headrace.encode import Origin, encode_values, hash_tails, order_keys, schema_id, stream_tails
from headrace.errors import SchemaError
from headrace.objects import ObjectPath
from headrace.place import File, clear
from headrace.scan import ROWS_A_CHUNK, Window, newest
from headrace.segments import DayName, Footer, SegmentName, create, stream_chain, time_bounds
from tests.headrace.views import EPOCH_US, applied, examples, rows, view

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
KEY_VALUES: Mapping[ValueType, list[Any]] = {
    ValueType.INT64: [1, 2, 2**53 + 1],
    ValueType.INT32: [-1, 7],
    ValueType.STRING: ["", "a", "é"],
    ValueType.BYTES: [b"", b"\xff"],
}
FEW_FILES = st.sampled_from([0, 1000])
"""Beyond how many small files they are read into a table first: any, or none."""

ORIGINS = ("stream-0", "stream-1", "other-topic", "push", "day", "foreign")


def moment(us: int) -> datetime:
    return EPOCH + timedelta(microseconds=EPOCH_US + us)


def events(keys: Mapping[str, ValueType], **more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A row of a history, and which file it comes by."""
    return st.fixed_dictionaries(
        {
            **{key: st.sampled_from(KEY_VALUES[kind]) for key, kind in keys.items()},
            "at": st.integers(0, 9),
            "made": st.one_of(st.none(), st.integers(0, 3)),
            "value": st.sampled_from([None, math.nan, -0.0, 0.0, 1.5]),
            "count": st.one_of(st.none(), st.integers(0, 3)),
            "origin": st.sampled_from(ORIGINS),
            **more,
        }
    )


def write_history(
    contract: ViewContract, history: Sequence[Mapping[str, Any]]
) -> list[tuple[bytes, Mapping[str, Any]]]:
    """Write rows by origin, each in several files; return each with its place in the total order.

    Streams have gaps between their offsets; the first half of each has been merged.
    """
    clear(contract.directory)
    ranked: list[tuple[bytes, Mapping[str, Any]]] = []
    for origin in ORIGINS:
        own = [row for row in history if row["origin"] == origin]
        if not own:
            continue
        table = rows(contract, own)
        offsets = np.arange(len(own), dtype=np.int64) * 2 + (origin == "other-topic")
        if origin in ("stream-0", "stream-1", "other-topic"):
            partition = int(origin == "stream-1")
            topic = "old" if origin == "other-topic" else contract.name
            _write_chain(contract, stream_chain(topic, partition, 0), table, offsets)
            tails = stream_tails(Origin(0, partition, offsets))
        else:
            values = {contract.view_name(f): encode_values(contract, table, f) for f in contract.features}
            tails = hash_tails(values, schema_id(contract.feature_view))
            if origin == "push":
                _write_chain(contract, "push", table, None)
            elif origin == "day":
                name = DayName(date(2026, 1, 1), 1)
                low, high = time_bounds(table, contract.timestamp_field)
                create(
                    contract.directory / str(name), table, Footer(next=len(own), min_us=low, max_us=high, append="d")
                )
            else:
                write_foreign(contract, table)
        ranked += zip(_orders(contract, own, tails), own, strict=True)
    return ranked


def write_foreign(contract: ViewContract, table: pa.Table, name: str = "sub/foreign.parquet") -> None:
    """As pandas would: nanoseconds, columns in another order, one more."""
    for column in (contract.timestamp_field, contract.created_field):
        if column is not None:
            stamps = table.column(column).cast(pa.timestamp("ns", "UTC"))
            table = table.set_column(table.column_names.index(column), column, stamps)
    table = table.append_column("extra", pa.repeat(1, len(table)))
    write_file(contract.directory / name, table.select(table.column_names[::-1]))


def write_file(path: File, table: pa.Table) -> None:
    """A file of somebody else's."""
    if isinstance(path, ObjectPath):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        objects.write(path, memoryview(sink.getvalue()))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)


def _write_chain(contract: ViewContract, chain: str, table: pa.Table, offsets: np.ndarray[Any, Any] | None) -> None:
    half, first = len(table) // 2, 0
    pieces = [(0, half, 1), *((n, n + 1, 0) for n in range(half, len(table)))]
    for start, stop, level in pieces:
        if start == stop:
            continue
        piece = table.slice(start, stop - start)
        end = stop if offsets is None else int(offsets[stop - 1]) + 2
        low, high = time_bounds(piece, contract.timestamp_field)
        note = Footer(next=end, min_us=low, max_us=high, append=f"{start}")
        own = None if offsets is None else offsets[start:stop]
        assert create(contract.directory / str(SegmentName(chain, level, first)), piece, note, own)
        first = end


def _orders(contract: ViewContract, own: Sequence[Mapping[str, Any]], tails: Any) -> list[bytes]:
    made = [row[contract.created_field] if contract.created_field else None for row in own]
    return order_keys(
        np.array([EPOCH_US + row[contract.timestamp_field] for row in own]),
        np.array([EPOCH_US + (m or 0) for m in made]),
        np.array([m is not None for m in made]),
        tails,
    )


def best(ranked: Iterable[tuple[bytes, Mapping[str, Any]]]) -> Mapping[str, Any] | None:
    """The row with the greatest order."""
    found = None
    for order, row in ranked:
        if found is None or order >= found[0]:
            found = (order, row)
    return found[1] if found else None


def shown(row: Mapping[str, Any], contract: ViewContract) -> str:
    """The features of a row, NaN and the sign of zero included."""
    return repr([row.get(name) for name in contract.features])


KEYS: list[dict[str, ValueType]] = [
    {"id": ValueType.INT64},
    {"a": ValueType.STRING, "b": ValueType.INT32},
    {"a": ValueType.STRING, "id": ValueType.INT64, "c": ValueType.BYTES},
    {},
]


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory) -> list[ViewContract]:
    views = [view(f"view{n}", keys) if keys else _entityless(f"view{n}") for n, keys in enumerate(KEYS)]
    return applied(tmp_path_factory.mktemp("scan"), None, *views)[1]


def _entityless(name: str) -> Any:
    _, made = view(name)
    return [], type(made)(name=name, entities=[], ttl=timedelta(0), schema=made.features, source=made.stream_source)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_newest_equals_the_oracle(contracts: list[ViewContract], data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(KEYS) - 1))
    contract = contracts[number]
    history = data.draw(st.lists(events(KEYS[number]), max_size=10))
    window = data.draw(st.sampled_from([Window(), Window(moment(3), moment(7)), Window(end=moment(5))]))
    low, high = (3, 7) if window.start else (0, 5) if window.end else (0, 9)
    ranked = write_history(contract, history)
    expected = {
        key: shown(
            best((o, r) for o, r in ranked if _key(contract, r) == key and low <= r["at"] <= high) or {}, contract
        )
        for key in {_key(contract, r) for _, r in ranked if low <= r["at"] <= high}
    }
    only: set[tuple[Any, ...]] | None = None
    if data.draw(st.booleans()):
        only = {key for key in sorted(expected) if data.draw(st.booleans())}
    keys = None
    if only is not None and contract.join_keys:
        keys = rows(contract, [dict(zip(contract.join_keys, key, strict=True)) for key in only])
        expected = {key: expected[key] for key in only}
    few_files = data.draw(FEW_FILES)
    with (
        patch.object(scan, "_FEW_FILES", few_files),
        newest(contract, Folder(contract.directory).files(), window, keys=keys) as found,
    ):
        got: dict[tuple[Any, ...], str] = {}
        for table, tails in found:
            assert table.schema == contract.schema
            assert len(tails) == len(table)
            for row in table.to_pylist():
                assert _key(contract, row) not in got
                got[_key(contract, row)] = shown(row, contract)
        assert found.keys == len(got)
    assert got == expected


def _key(contract: ViewContract, row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in contract.join_keys)


def test_columns_that_came_later_and_types_that_changed(tmp_path: Path) -> None:
    fields = [
        Field(name="value", dtype=Float64),
        Field(name="count", dtype=Int64),
        Field(name="tags", dtype=Array(String)),
    ]
    _, (contract,) = applied(tmp_path, None, view(features=fields))
    push(contract, rows(contract, [{"id": 1, "at": 1, "value": 2.5, "count": 3, "tags": ["a"]}]))
    old = {"id": pa.array([2, 3], pa.int32()), "at": [moment(2), moment(3)], "count": pa.array(["4", None])}
    pq.write_table(pa.table(old), contract.directory / "old.parquet")
    with newest(contract, Folder(contract.directory).files()) as found:
        table = pa.concat_tables(chunk for chunk, _ in found).sort_by("id")
    assert table.select(["id", "value", "count", "tags", "made"]).to_pydict() == {
        "id": [1, 2, 3],
        "value": [2.5, None, None],
        "count": [3, 4, None],
        "tags": [["a"], None, None],
        "made": [None, None, None],
    }
    old["count"] = pa.array(["4", "many"])
    pq.write_table(pa.table(old), contract.directory / "old.parquet")
    with (
        newest(contract, Folder(contract.directory).files()) as found,
        pytest.raises(SchemaError, match=r"`stats`.*old\.parquet.*\"count\" from type VARCHAR to BIGINT.*many"),
    ):
        list(found)

    old["count"] = pa.array([4.0, 5.7])
    pq.write_table(pa.table(old), contract.directory / "old.parquet")
    with (
        pytest.raises(SchemaError, match=r"`stats`.*old\.parquet: column `count` has 5.7, which is no BIGINT"),
        newest(contract, Folder(contract.directory).files()),
    ):
        pass
    old["count"] = pa.array([4.0, None])
    pq.write_table(pa.table(old), contract.directory / "old.parquet")
    with newest(contract, Folder(contract.directory).files()) as found:
        assert sorted(str(v) for t, _ in found for v in t.column("count").to_pylist()) == ["3", "4", "None"]


def test_a_folder_that_was_filled_anew_is_read_anew(tmp_path: Path) -> None:
    _, (contract,) = applied(tmp_path)
    for count in (1, 3):
        shutil.rmtree(contract.directory, ignore_errors=True)
        table = rows(contract, [{"id": key, "at": 1, "value": float(count)} for key in range(count)])
        StreamLedger(contract, "stats", 0).append(0, 0, 2 * count, table, accepted=np.arange(count) * 2)
        with newest(contract, Folder(contract.directory).files()) as found:
            ((chunk, tails),) = found
        assert chunk.column("value").to_pylist() == [float(count)] * count
        assert {bytes(tail[9:]) for tail in tails} == {struct.pack(">Q", 2 * n) for n in range(count)}


def test_rows_without_a_key_or_a_time_are_nobodys(tmp_path: Path) -> None:
    _, (contract,) = applied(tmp_path)
    foreign = {"id": [None, 1, 2], "at": [moment(1), None, moment(1)], "value": [1.0, 1.0, 2.0]}
    contract.directory.mkdir()
    pq.write_table(pa.table(foreign), contract.directory / "foreign.parquet")
    with newest(contract, Folder(contract.directory).files()) as found:
        assert [chunk.column("id").to_pylist() for chunk, _ in found] == [[2]]


def test_many_keys_come_in_chunks_within_the_memory_limit(tmp_path: Path) -> None:
    """Every row is there twice, as after a repeated push: all tie, and each key comes once."""
    _, (contract,) = applied(tmp_path)
    count = 2 * ROWS_A_CHUNK + 1
    numbers = pa.array(np.arange(count))
    times = pa.array(np.full(count, EPOCH_US)).cast(pa.timestamp("us", "UTC"))
    table = pa.table([numbers, numbers.cast(pa.float64()), numbers, times, times], schema=contract.schema)
    push(contract, table)
    push(contract, table)
    seen = np.zeros(count, dtype=int)
    with newest(contract, Folder(contract.directory).files(), memory_limit="100MB") as found:
        assert found.keys == count
        for chunk, tails in found:
            assert 0 < len(chunk) <= ROWS_A_CHUNK
            assert not tails.any()
            seen[chunk.column("id").to_numpy()] += 1
    assert (seen == 1).all()


def test_tails_of_stream_rows_are_their_places(tmp_path: Path) -> None:
    _, (contract,) = applied(tmp_path)
    history = [{"id": n, "at": 1, "made": None, "value": 1.0, "count": n, "origin": "stream-1"} for n in range(5)]
    write_history(contract, history)
    with newest(contract, Folder(contract.directory).files()) as found:
        places = {row["id"]: tail for table, tails in found for row, tail in zip(table.to_pylist(), tails, strict=True)}
    expected = stream_tails(Origin(0, 1, np.arange(5, dtype=np.int64) * 2))
    assert all((places[n] == expected[n]).all() for n in range(5))


def test_no_file_at_all(tmp_path: Path) -> None:
    _, (contract,) = applied(tmp_path)
    with newest(contract, []) as found:
        assert (found.keys, list(found)) == (0, [])
