"""Every value type of Feast: its bytes are Feast's, it survives a segment, and a stock client is served the same."""

from __future__ import annotations

import json
import math
import struct
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Field, ValueType
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.type_map import feast_value_type_to_python_type
from feast.types import (
    Array,
    Bool,
    Bytes,
    Decimal,
    FeastType,
    Float32,
    Float64,
    ImageBytes,
    Int32,
    Int64,
    Json,
    Map,
    PdfBytes,
    ScalarMap,
    Set,
    String,
    Struct,
    TimeUuid,
    UnixTimestamp,
    Uuid,
    ZonedTimestamp,
)
from feast.utils import _convert_arrow_to_proto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.contract import ViewContract
from headrace.encode import encode_values
from headrace.errors import ConfigError
from headrace.online import write_online
from headrace.values import canonical
from tests.headrace.views import applied, config, examples, rows, view

EARLY, LATE = datetime(1, 1, 2), datetime(9999, 12, 30)  # noqa: DTZ001 - Hypothesis wants naive bounds
Strategy = st.SearchStrategy[Any]

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(2**53, 2**53 + 9), st.integers(-3, 300))
TIMES = st.datetimes(EARLY, LATE).map(lambda moment: moment.replace(tzinfo=UTC))
ALL_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), INT64, st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
# What Feast takes within a map: lists of one type, neither empty nor with nulls.
FLAT_LISTS = st.one_of(
    *(st.lists(item, min_size=1, max_size=3) for item in (st.booleans(), INT64, st.floats(), st.text()))
)
MAPS = st.dictionaries(
    st.text(),
    st.recursive(
        st.one_of(st.none(), st.booleans(), INT64, st.floats(), st.text(), FLAT_LISTS),
        lambda inner: st.one_of(
            st.dictionaries(st.text(), inner, max_size=3),
            st.lists(st.dictionaries(st.text(), inner, max_size=3), min_size=1, max_size=2),
        ),
        max_leaves=4,
    ),
    max_size=3,
)

ITEMS: dict[FeastType, Strategy] = {
    Bool: st.booleans(),
    Int32: INT32,
    Int64: INT64,
    Float32: st.floats(width=32),
    Float64: st.floats(),
    String: st.text(),
    Bytes: st.binary(max_size=200),
    UnixTimestamp: TIMES,
    Uuid: st.uuids().map(str),
    TimeUuid: st.integers(0, 2**48).map(lambda node: str(uuid.UUID(int=node | 1 << 76 | 1 << 63))),
    Decimal: st.decimals(allow_nan=False).map(str),
    Json: ALL_JSON.map(json.dumps),
}
STRUCT = Struct(
    {"n": Int32, "x": Float64, "t": String, "at": UnixTimestamp, "l": Array(Int64), "s": Struct({"b": Bool})}
)
STRUCTS: Strategy = st.fixed_dictionaries(
    {
        "n": st.none() | INT32,
        "x": st.none() | st.floats(),
        "t": st.none() | st.text(),
        "at": st.none() | TIMES,
        "l": st.none() | st.lists(INT64, min_size=1, max_size=3),
        "s": st.none() | st.fixed_dictionaries({"b": st.none() | st.booleans()}),
    }
)
FULL_STRUCT = {"n": 1, "x": 0.5, "t": "x", "at": datetime(2020, 1, 1, tzinfo=UTC), "l": [1], "s": {"b": True}}


def lists(items: Strategy) -> Strategy:
    return st.lists(items, max_size=4)


NULL_ITEMS = (Float32, Float64, String, Bytes, Bool, UnixTimestamp, Uuid, TimeUuid, Decimal, Json)
"""Where Feast takes nulls among the items of a list."""

TYPES: dict[str, tuple[FeastType, Strategy]] = {
    **{f"one_{dtype}": (dtype, values) for dtype, values in ITEMS.items()},
    "one_pdf": (PdfBytes, st.binary()),
    "one_image": (ImageBytes, st.binary()),
    "one_map": (Map, MAPS.map(json.dumps)),
    "one_struct": (STRUCT, STRUCTS),
    **{
        f"list_{dtype}": (Array(dtype), lists(st.none() | values if dtype in NULL_ITEMS else values))
        for dtype, values in ITEMS.items()
    },
    "list_map": (Array(Map), lists(MAPS).map(json.dumps)),
    "list_struct": (Array(STRUCT), lists(STRUCTS.filter(lambda row: row["n"] is not None))),
    **{f"set_{dtype}": (Set(dtype), lists(values)) for dtype, values in ITEMS.items() if dtype != Json},
    **{f"nested_{dtype}": (Array(Array(dtype)), lists(st.none() | lists(values))) for dtype, values in ITEMS.items()},
    "nested_set": (Set(Array(Int64)), lists(lists(INT64))),
    "nested_sets": (Array(Set(String)), lists(lists(st.text()))),
    "deep": (Array(Array(Array(Int32))), lists(lists(lists(INT32)).filter(bool))),
}


def make(folder: Path, *names: str) -> ViewContract:
    fields = [Field(name=name, dtype=TYPES[name][0]) for name in names]
    return ViewContract.from_feast(view(features=fields)[1], config(folder))


def table_of(contract: ViewContract, name: str, values: list[Any]) -> pa.Table:
    """One feature's values, the rows of keys 0, 1, 2."""
    table = rows(contract, [{"id": index, "at": index, "made": 0} for index in range(len(values))])
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, contract.schema.field(name).type)).combine_chunks()


FULL_ITEMS = {
    Bool: True,
    Int32: 1,
    Int64: 1,
    Float32: 0.5,
    Float64: 0.5,
    String: "x",
    Bytes: b"x",
    UnixTimestamp: datetime(2020, 1, 1, tzinfo=UTC),
    Uuid: str(uuid.UUID(int=1)),
    TimeUuid: str(uuid.UUID(int=1)),
    Decimal: "1.5",
    Json: "{}",
    PdfBytes: b"x",
    ImageBytes: b"x",
    Map: '{"x": 1}',
    Array(Map): '[{"x": 1}]',
}


def full(dtype: FeastType) -> Any:
    """A value with something in it, from which Feast learns the type of the column."""
    if isinstance(dtype, Struct):
        return FULL_STRUCT
    if dtype in FULL_ITEMS:
        return FULL_ITEMS[dtype]
    assert isinstance(dtype, Array | Set)
    return [full(dtype.base_type)]


def feasts(contract: ViewContract, name: str, value: Any) -> bytes:
    """What Feast makes of a value. Beside it is a full one, so that its type is known and nothing else changes."""
    table = table_of(contract, name, [value, full(TYPES[name][0])])
    first = _convert_arrow_to_proto(table, contract.feature_view, {"id": ValueType.INT64})[0]
    return canonical(first[1][name])


@pytest.mark.parametrize("name", ["set_Float32", "set_Float64"])
def test_of_several_nans_a_set_keeps_the_same_one_in_any_order(tmp_path: Path, name: str) -> None:
    contract = make(tmp_path, name)
    nans = [struct.unpack(">d", bytes.fromhex(bits))[0] for bits in ("fff8000020000000", "7ff8000040000000")]
    encoded = []
    for items in ([1.0, *nans, -0.0, 0.0], [*nans[::-1], 1.0, -0.0, 0.0]):
        (value,) = encode_values(contract, table_of(contract, name, [items]), name).to_pylist()
        assert value == feasts(contract, name, items)
        encoded.append(value)
    assert encoded[0] == encoded[1]


@pytest.mark.parametrize("name", TYPES)
def test_values_are_feasts(tmp_path: Path, name: str) -> None:
    contract = make(tmp_path, name)

    @settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.none() | TYPES[name][1], min_size=1, max_size=4))
    def check(values: list[Any]) -> None:
        theirs = [feasts(contract, name, value) for value in values]
        assert encode_values(contract, table_of(contract, name, values), name).to_pylist() == theirs

    check()


@pytest.mark.parametrize("name", TYPES)
def test_a_segment_keeps_what_it_is_given(tmp_path: Path, name: str) -> None:
    """Through Parquet and DuckDB, with both orders of the rows, since DuckDB and Feast look at the first ones."""
    contract = make(tmp_path, name)

    @settings(max_examples=examples(5), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.none() | TYPES[name][1], min_size=1, max_size=4))
    def check(values: list[Any]) -> None:
        table = table_of(contract, name, values)
        pq.write_table(table, tmp_path / "segment.parquet")
        with duckdb.connect() as con:
            read = con.sql(f"FROM read_parquet('{tmp_path}/segment.parquet') ORDER BY id").to_arrow_table()
        back = read.select(contract.schema.names).cast(contract.schema)
        assert encode_values(contract, back, name) == encode_values(contract, table, name)

    check()


# What Feast cannot take as a column, or takes differently in other company: what it is here.
ALONE: list[tuple[FeastType, list[Any], list[Any]]] = [
    (Int64, [2**53 + 1, None], [2**53 + 1, None]),
    (Int32, [None, 7], [None, 7]),
    (Bytes, [b"", None], [b"", None]),
    (Array(Int64), [[2**53 + 1, None], [None], [], None], [[2**53 + 1, 0], [0], [], None]),
    (Array(Int32), [[None, -1]], [[0, -1]]),
    (Array(Float32), [[], None], [[], None]),
    (Array(String), [[]], [[]]),
    (Set(Int64), [[3, None, 1, 3]], [{0, 1, 3}]),
    (Set(String), [["b", None, "a", "b"], []], [{"", "a", "b"}, set()]),
    (Set(Bytes), [[b"", b"x", b""]], [{b"", b"x"}]),
    (Array(Array(Int64)), [[[2**53 + 1, None], [], None]], [[[2**53 + 1, 0], None, None]]),
    (Array(Array(Bool)), [[[True, None]]], [[[True, False]]]),
    (
        Map,
        ['{"a": []}', '{"a": [1, 2.5, null, [true], {"b": 1}]}'],
        [{"a": []}, {"a": [1, 2.5, None, [True], {"b": 1}]}],
    ),
    (Struct({"n": Array(Int64)}), [{"n": []}, {"n": [1, None]}], [{"n": []}, {"n": [1, None]}]),
    (Array(Struct({"n": Int64})), [[{"n": 2**53 + 1}, {"n": None}]], [[{"n": 2**53 + 1}, {"n": None}]]),
]


@pytest.mark.parametrize(("dtype", "values", "served"), ALONE, ids=[str(case[0]) for case in ALONE])
def test_a_value_does_not_hang_on_its_neighbours(
    tmp_path: Path, dtype: FeastType, values: list[Any], served: list[Any]
) -> None:
    contract = ViewContract.from_feast(view(features=[Field(name="x", dtype=dtype)])[1], config(tmp_path))
    encoded = encode_values(contract, table_of(contract, "x", values), "x").to_pylist()
    assert [feast_value_type_to_python_type(ValueProto.FromString(value)) for value in encoded] == served
    for value, alone in zip(encoded, values, strict=True):
        assert encode_values(contract, table_of(contract, "x", [alone]), "x").to_pylist() == [value]


def test_bytes_do_not_hang_on_the_order_of_sets_and_maps(tmp_path: Path) -> None:
    contract = ViewContract.from_feast(
        view(features=[Field(name="s", dtype=Set(String)), Field(name="m", dtype=Map)])[1], config(tmp_path)
    )
    table = rows(contract, [{"s": ["b", "a"], "m": '{"x": 1, "y": 2}'}, {"s": ["a", "b"], "m": '{"y": 2, "x": 1}'}])
    for name in contract.features:
        assert len(set(encode_values(contract, table, name).to_pylist())) == 1


@pytest.mark.parametrize(
    "dtype",
    [
        ScalarMap,
        ZonedTimestamp,
        Set(Json),
        Array(PdfBytes),
        Array(Array(Map)),
        Struct({"m": Map}),
        Struct({"s": Set(Int32)}),
        Struct({"l": Array(Array(Int32))}),
        Array(Struct({"z": ZonedTimestamp})),
    ],
    ids=str,
)
def test_a_type_that_feast_cannot_take_is_refused(tmp_path: Path, dtype: FeastType) -> None:
    with pytest.raises(ConfigError, match=r"field `x` has type .*, which Feast cannot take"):
        ViewContract.from_feast(view(features=[Field(name="x", dtype=dtype)])[1], config(tmp_path))


@pytest.mark.parametrize("kind", [ValueType.DOUBLE, ValueType.BOOL, ValueType.UUID, ValueType.FLOAT], ids=str)
def test_a_key_of_another_type_is_refused(tmp_path: Path, kind: ValueType) -> None:
    with pytest.raises(ConfigError, match=r"`id` is a join key of type"):
        ViewContract.from_feast(view(keys={"id": kind})[1], config(tmp_path))


def test_columns_that_differ_by_case_alone_are_refused(tmp_path: Path) -> None:
    """DuckDB gives the values of the first of them for both."""
    fields = [Field(name=name, dtype=Int64) for name in ("value", "other", "Value")]
    with pytest.raises(ConfigError, match="found `value` and `Value`"):
        ViewContract.from_feast(view(features=fields)[1], config(tmp_path))


SPECIAL: dict[FeastType, Any] = {
    Bool: False,
    Int32: -(2**31),
    Int64: 2**53 + 1,
    Float32: -0.0,
    Float64: math.inf,
    String: "",
    Bytes: b"\xff\x00",
    UnixTimestamp: datetime(1969, 12, 31, 23, 59, 58, 500_000, tzinfo=UTC),
    Uuid: str(uuid.UUID(int=2**128 - 1)),
    TimeUuid: str(uuid.uuid1()),
    Decimal: "-1E-30",
    Json: '[1, {"é": null}]',
    PdfBytes: b"%PDF",
    ImageBytes: b"\x89PNG",
    Map: '{"a": {"b": [1, 2]}, "": "💧", "c": null, "d": [{"e": 1.5}]}',
    Array(Map): '[{"a": 1}, {}]',
}


def special(dtype: FeastType) -> Any:
    """Another value of each type, at the edge of what it holds."""
    if isinstance(dtype, Struct):
        return {"n": -1, "x": -math.inf, "t": "", "at": None, "l": [2**53 + 1, 2], "s": None}
    if dtype in SPECIAL:
        return SPECIAL[dtype]
    assert isinstance(dtype, Array | Set)
    return [special(dtype.base_type), full(dtype.base_type)]


def test_a_client_is_served_what_stock_feast_serves(tmp_path: Path) -> None:
    fields = [Field(name=name, dtype=dtype) for name, (dtype, _) in TYPES.items()]
    stock, _ = applied(tmp_path / "stock", {"type": "sqlite", "path": "data/online.db"}, view(features=fields))
    ours, (contract,) = applied(tmp_path / "ours", None, view(features=fields))
    columnar, _ = applied(tmp_path / "columnar", None, view(features=fields))
    # No null beside 2**53 + 1: pandas would make a float of it before Feast sees it.
    for first, make_values in ((0, (full, special)), (2, (full, lambda _: None))):
        table = rows(contract, [{"id": first + index, "at": index, "made": 0} for index in range(2)])
        for place, field in enumerate(contract.schema):
            if field.name in TYPES:
                values = [value(TYPES[field.name][0]) for value in make_values]
                table = table.set_column(place, field.name, pa.array(values, field.type))
        stock.write_to_online_store("stats", table.to_pandas())
        ours.write_to_online_store("stats", table.to_pandas())
        assert write_online(columnar, contract, table) == 2
    asked: dict[str, Any] = {
        "features": [f"stats:{name}" for name in TYPES],
        "entity_rows": [{"id": index} for index in range(4)],
    }
    expected = stock.get_online_features(**asked).to_dict()
    for store in (ours, columnar):
        served = store.get_online_features(**asked).to_dict()
        for name in TYPES:
            assert served[name] == expected[name], name
            assert list(map(type, served[name])) == list(map(type, expected[name])), name
