"""What conforms to a view, what does not, and what is said of it."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal as PythonDecimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from feast import Field
from feast.types import (
    Array,
    Bool,
    Bytes,
    Decimal,
    FeastType,
    Float32,
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
from hypothesis import given
from hypothesis import strategies as st

from headrace.conform import Reason, conform, parse_timestamps
from headrace.contract import Transform, ViewContract
from headrace.errors import ConfigError
from headrace.rules import Rule
from tests.headrace.views import config, view

EARLY, LATE = datetime(1900, 1, 1), datetime(2200, 1, 1)  # noqa: DTZ001 - Hypothesis wants naive bounds
NOW_US = 1_800_000_000_000_000
FEATURES = [
    Field(name="rate", dtype=Float32, tags={"ge": "0", "le": "1", "nullable": "false"}),
    Field(name="trips", dtype=Int32, tags={"ge": "0"}),
    Field(name="kind", dtype=String, tags={"isin": "a, b", "nullable": "true"}),
]
GOOD: dict[str, Any] = {
    "id": 1,
    "rate": 0.5,
    "trips": 3,
    "kind": "a",
    "at": "2026-01-31 12:00:00",
    "made": "2026-01-31T12:00:00.25+01:00",
}


@pytest.fixture
def contract(tmp_path: Path) -> ViewContract:
    return ViewContract.from_feast(view(features=FEATURES)[1], config(tmp_path))


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{**GOOD, **row} for row in rows])


def test_a_good_row_is_cast_to_the_schema(contract: ViewContract) -> None:
    done = conform(contract, table({}), now_us=NOW_US, max_future_us=0)
    assert done.rejects == []
    assert done.table.schema == contract.schema
    assert done.table.to_pylist() == [
        {
            "id": 1,
            "rate": 0.5,
            "trips": 3,
            "kind": "a",
            "at": datetime(2026, 1, 31, 12, tzinfo=UTC),
            "made": datetime(2026, 1, 31, 11, 0, 0, 250_000, tzinfo=UTC),
        }
    ]


@pytest.mark.parametrize(
    ("fault", "reason", "field", "message"),
    [
        ({"id": None}, Reason.NULL, "id", "must not be null"),
        ({"at": None}, Reason.NULL, "at", "must not be null"),
        ({"rate": None}, Reason.NULL, "rate", "must not be null"),
        ({"rate": 1.5}, Reason.OUT_OF_RANGE, "rate", "expected >= 0 and <= 1, found 1.5"),
        ({"rate": float("nan")}, Reason.OUT_OF_RANGE, "rate", "found nan"),
        ({"trips": -1}, Reason.OUT_OF_RANGE, "trips", "expected >= 0, found -1"),
        ({"trips": 2**31}, Reason.WRONG_TYPE, "trips", "expected int32, found 2147483648"),
        ({"kind": "c"}, Reason.OUT_OF_RANGE, "kind", "expected one of a, b, found 'c'"),
        ({"at": "yesterday"}, Reason.BAD_TIMESTAMP, "at", "found 'yesterday'"),
        ({"at": "2026-02-30 00:00:00"}, Reason.BAD_TIMESTAMP, "at", "found '2026-02-30"),
        ({"at": "2026-01-31"}, Reason.BAD_TIMESTAMP, "at", "found '2026-01-31'"),
        ({"at": "2027-01-15 08:00:01"}, Reason.FUTURE_EVENT, "at", "ahead of the clock"),
    ],
)
def test_one_bad_row_goes_alone(
    contract: ViewContract, fault: dict[str, Any], reason: Reason, field: str, message: str
) -> None:
    done = conform(contract, table({}, fault, {"id": 3}), now_us=NOW_US, max_future_us=0)
    assert [(r.row, r.reason, r.field) for r in done.rejects] == [(1, reason, field)]
    assert re.search(re.escape(message), done.rejects[0].message)
    assert done.table.column("id").to_pylist() == [1, 3]
    assert done.rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("column", "values", "bad"),
    [
        ("id", pa.array([1.0, 1.5, 2.0**63]), [1, 2]),
        ("id", pa.array(["1", "2", "3"]), [0, 1, 2]),
        ("trips", pa.array([1, 2**40, 3]), [1]),
        ("rate", pa.array([0.5, 0.25, 1e300]), [2]),
        ("rate", pa.array([True, False, True]), [0, 1, 2]),
        ("at", pa.array([1_700_000_000, 1_700_000_000_000, 0]), [0, 1, 2]),
        ("at", pa.array([1e9, 1e12, 0.5]), [0, 1, 2]),
        ("kind", pa.array([1, 2, 3]), [0, 1, 2]),
    ],
)
def test_a_column_of_another_type(contract: ViewContract, column: str, values: pa.Array, bad: list[int]) -> None:
    given_table = table({}, {}, {})
    index = given_table.column_names.index(column)
    done = conform(contract, given_table.set_column(index, column, values), now_us=NOW_US, max_future_us=None)
    assert [r.row for r in done.rejects] == bad
    assert {r.field for r in done.rejects} == {column}


def test_missing_and_unknown_columns(contract: ViewContract) -> None:
    given_table = table({}).drop_columns(["kind"]).append_column("new", pa.array(["x"]))
    assert conform(contract, given_table, now_us=NOW_US, max_future_us=None).rejects == []
    done = conform(contract, given_table.drop_columns(["trips"]), now_us=NOW_US, max_future_us=None)
    assert [(r.reason, r.field) for r in done.rejects] == [(Reason.MISSING_FIELD, "trips")]


def test_a_transformation_runs_before_the_cast_and_may_skip(contract: ViewContract) -> None:
    def function(rows: pa.Table) -> pa.Table:
        skip = pa.array([value == 2 for value in rows.column("id").to_pylist()])
        index = rows.column_names.index("trips")
        return rows.set_column(index, "trips", pa.array([7] * len(rows))).append_column("__skip__", skip)

    done = conform(
        contract,
        table({}, {"id": 2, "rate": 9.0}, {"id": 3}),
        now_us=NOW_US,
        max_future_us=None,
        transform=Transform("m:f", function, "00"),
    )
    assert done.skipped.tolist() == [1]
    assert done.rejects == []
    assert done.table.column("trips").to_pylist() == [7, 7]


def test_a_transformation_that_fails_or_loses_rows_rejects_them_all(contract: ViewContract) -> None:
    def fails(_: pa.Table) -> pa.Table:
        msg = "no such thing"
        raise KeyError(msg)

    for function in (fails, lambda rows: rows[:1]):
        done = conform(
            contract,
            table({}, {}),
            now_us=NOW_US,
            max_future_us=None,
            transform=Transform("m:f", function, "00"),
        )
        assert [r.reason for r in done.rejects] == [Reason.TRANSFORM, Reason.TRANSFORM]


def test_lists_are_cast_item_by_item(tmp_path: Path) -> None:
    fields = [Field(name="last", dtype=Array(Int64)), Field(name="on", dtype=Bool)]
    lists = ViewContract.from_feast(view(features=fields)[1], config(tmp_path))
    given_table = pa.Table.from_pylist(
        [{"id": 1, "last": [1, 2], "on": True, "at": GOOD["at"], "made": None}, {"id": 2, "last": [], "on": None}]
    )
    done = conform(lists, given_table, now_us=NOW_US, max_future_us=None)
    assert [(r.row, r.reason) for r in done.rejects] == [(1, Reason.NULL)]
    assert done.table.column("last").to_pylist() == [[1, 2]]


SHAPE = Struct({"n": Int32, "at": UnixTimestamp})
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
KEY = uuid.UUID(int=7)
GIVEN: list[tuple[FeastType, pa.Array, list[Any], list[int]]] = [
    (Map, pa.array(['{"a": 1}', "[1]", "x", None]), ['{"a": 1}', None], [1, 2]),
    (Map, pa.array([{"a": 1, "b": None}, None]), ['{"a": 1, "b": null}', None], []),
    (Map, pa.array([[("a", 1)], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), ['{"a": 1}'], [1]),
    (Map, pa.array([f'{{"a": {2**63}}}', '{"a": "\\ud800"}', "{}"]), ["{}"], [0, 1]),
    (Map, pa.array([{"at": AT}]), [], [0]),
    (Array(Map), pa.array([[{"a": 1}], None, []]), ['[{"a": 1}]', None, "[]"], []),
    (Array(Map), pa.array(["[{}]", "{}"]), ["[{}]"], [1]),
    (Json, pa.array(["1", "", "{", '{"a": []}']), ["1", '{"a": []}'], [1, 2]),
    (Json, pa.array([1.5, None]), ["1.5", None], []),
    (Array(Json), pa.array([["1", None], ["{"]]), [["1", None]], [1]),
    (Uuid, pa.array([str(KEY), KEY.hex, "x", ""]), [str(KEY), KEY.hex], [2, 3]),
    (Uuid, pa.array([KEY.bytes, None], pa.uuid()), [str(KEY), None], []),
    (TimeUuid, pa.array([1.5]), [], [0]),
    (Array(Uuid), pa.array([[str(KEY)], [None], None]), [[str(KEY)], None], [1]),
    (Decimal, pa.array(["1.10", "-1E-30", "1,5", "NaN"]), ["1.10", "-1E-30", "NaN"], [2]),
    (Decimal, pa.array([PythonDecimal("1.10"), None]), ["1.10", None], []),
    (Decimal, pa.array([7]), ["7"], []),
    (UnixTimestamp, pa.array(["2026-01-31 12:00:00", "x"]), [AT], [1]),
    (UnixTimestamp, pa.array([2**60, 0]).cast(pa.timestamp("us")), [datetime(1970, 1, 1, tzinfo=UTC)], [0]),
    (Array(UnixTimestamp), pa.array([["2026-01-31 12:00:00", None], ["x"]]), [[AT, None]], [1]),
    (Set(Int32), pa.array([[1, None], [2**40], []]), [[1, None], []], [1]),
    (Array(Array(Int32)), pa.array([[[1], None], [[2**40]], None]), [[[1], None], None], [1]),
    (Array(Float32), pa.array([[0.5], [1e300]]), [[0.5]], [1]),
    (Array(Int64), pa.array([1, 2]), [], [0, 1]),
    (SHAPE, pa.array([{"at": "2026-01-31 12:00:00", "more": 1}, {"at": "x", "more": 1}]), [{"n": None, "at": AT}], [1]),
    (SHAPE, pa.array([{"n": 2**40}, None]), [None], [0]),
    (Array(SHAPE), pa.array([[{"n": 1}], [None], [{"n": 2**40}]]), [[{"n": 1, "at": None}]], [1, 2]),
    (Bytes, pa.array([b"", None]), [b"", None], []),
]


@pytest.mark.parametrize(("dtype", "column", "kept", "bad"), GIVEN, ids=lambda value: str(value)[:20])
def test_each_type_takes_what_it_can_and_tells_what_it_cannot(
    tmp_path: Path, dtype: FeastType, column: pa.Array, kept: list[Any], bad: list[int]
) -> None:
    contract = ViewContract.from_feast(view(features=[Field(name="x", dtype=dtype)])[1], config(tmp_path))
    given_table = table(*({} for _ in column)).append_column("x", column)
    done = conform(contract, given_table, now_us=NOW_US, max_future_us=None)
    assert [reject.row for reject in done.rejects] == bad
    assert all(re.match("field `x`: expected .*, found ", reject.message) for reject in done.rejects)
    assert done.table.column("x").to_pylist() == kept
    assert done.table.schema == contract.schema


@pytest.mark.parametrize("tags", [{"ge": "0"}, {"isin": "a"}])
def test_a_rule_that_its_type_cannot_keep_is_refused(tmp_path: Path, tags: dict[str, str]) -> None:
    fields = [Field(name="x", dtype=Array(Int64), tags=tags)]
    with pytest.raises(ConfigError, match=r"`x`: tag (ge|isin) .* of type Array\(Int64\)"):
        ViewContract.from_feast(view(features=fields)[1], config(tmp_path))


def test_an_empty_table_conforms(contract: ViewContract) -> None:
    done = conform(contract, table({})[:0], now_us=NOW_US, max_future_us=0)
    assert done.table.num_rows == 0
    assert done.table.schema == contract.schema


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.datetimes(EARLY, LATE).flatmap(
                lambda moment: st.sampled_from(
                    [moment.isoformat(sep=" ", timespec="seconds"), moment.isoformat(), moment.isoformat() + "Z"]
                )
            ),
            st.datetimes(EARLY, LATE, timezones=st.timezones()).map(lambda moment: moment.isoformat()),
            st.text(max_size=30),
        ),
        max_size=8,
    )
)
def test_timestamps_are_read_as_python_reads_them(texts: list[str | None]) -> None:
    parsed, bad = parse_timestamps(pa.array(texts, pa.string()))
    for text, moment, wrong in zip(texts, parsed.cast(pa.int64()).to_pylist(), bad.tolist(), strict=True):
        if text is None or wrong:
            assert moment is None
            continue
        expected = datetime.fromisoformat(text)
        expected = expected if expected.tzinfo else expected.replace(tzinfo=UTC)
        assert moment == (expected - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@pytest.mark.parametrize("zone", ["", "Z", "+01:00"])
@pytest.mark.parametrize(
    "text", ["2026-01-31T12:00:00+05", "2026-01-31 12:00+01:00", "2026-01-31 12:00:00.5-01", "2026-01-31 12+01:00"]
)
def test_what_is_no_time_is_none_whatever_stands_beside_it(text: str, zone: str) -> None:
    for texts in ([text], [text, f"2026-01-31 12:00:00{zone}"]):
        _, bad = parse_timestamps(pa.array(texts, pa.string()))
        assert bad.tolist() == [True, False][: len(texts)]


def test_a_tag_that_cannot_be_understood_is_named(tmp_path: Path) -> None:
    for tags, message in (({"ge": "low"}, r"`rate`: tag ge='low' is no number"), ({"nullable": "no"}, "nullable='no'")):
        bad = view(features=[Field(name="rate", dtype=Float32, tags=tags)])[1]
        with pytest.raises(ConfigError, match=message):
            ViewContract.from_feast(bad, config(tmp_path))


def test_a_rule_reads_well() -> None:
    assert str(Rule("x", ge=0, lt=1.5)) == ">= 0 and < 1.5"
