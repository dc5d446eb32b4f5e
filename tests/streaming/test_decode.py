"""Decoding: every kind of bad input has its reason and field, and the rest of the slice goes on."""

from __future__ import annotations

import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from feast import Field
from feast.types import Array, Bool, Bytes, FeastType, Float32, Int32, Int64, Json, Map, String, Struct, UnixTimestamp
from hypothesis import given
from hypothesis import strategies as st

from headrace.conform import Reason, conform
from headrace.contract import ViewContract
from streaming.decode import JsonDecoder
from tests.headrace.views import config, view


def contract(*fields: Field) -> ViewContract:
    return ViewContract.from_feast(view(features=fields)[1], config(Path(tempfile.mkdtemp())))


VIEW = contract(
    Field(name="rate", dtype=Float32, tags={"ge": "0", "le": "1"}),
    Field(name="trips", dtype=Int32, tags={"ge": "0", "nullable": "false"}),
    Field(name="note", dtype=String, tags={"nullable": "true"}),
)
GOOD = {"id": 1, "rate": 0.5, "trips": 3, "note": "n", "at": "2026-01-31 12:00:00", "made": None}


def changed(**values: Any) -> bytes:
    return json.dumps({**GOOD, **values}).encode()


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD.items() if key != name}).encode()


BAD: dict[str, tuple[bytes, Reason, str | None]] = {
    "no json": (b"\xff\xfe", Reason.UNDECODABLE, None),
    "empty": (b"", Reason.UNDECODABLE, None),
    "cut": (changed()[:-1], Reason.UNDECODABLE, None),
    "two objects": (changed() + changed(), Reason.UNDECODABLE, None),
    "array": (b"[1,2]", Reason.UNDECODABLE, None),
    "text": (b'"text"', Reason.UNDECODABLE, None),
    "null itself": (b"null", Reason.UNDECODABLE, None),
    "deep": (b'{"x":' * 100_000, Reason.UNDECODABLE, None),
    "not utf-8": (changed(note="N").replace(b"N", b"\xff"), Reason.UNDECODABLE, None),
    "not utf-8 where nobody looks": (changed(other="N").replace(b"N", b"\xff"), Reason.UNDECODABLE, None),
    "lone surrogate": (changed(note="N").replace(b"N", b"\\ud800"), Reason.UNDECODABLE, None),
    "nan": (changed().replace(b"0.5", b"NaN"), Reason.UNDECODABLE, None),
    "text for a float": (changed(rate="0.5"), Reason.WRONG_TYPE, "rate"),
    "text for an integer": (changed(trips="3"), Reason.WRONG_TYPE, "trips"),
    "number for a text": (changed(note=3), Reason.WRONG_TYPE, "note"),
    "fraction for an integer": (changed(trips=3.5), Reason.WRONG_TYPE, "trips"),
    "true for an integer": (changed(trips=True), Reason.WRONG_TYPE, "trips"),
    "too large for int32": (changed(trips=2**31), Reason.WRONG_TYPE, "trips"),
    "too large for int64": (changed(id=2**63), Reason.WRONG_TYPE, "id"),
    "far too large": (changed(id=10**30), Reason.WRONG_TYPE, "id"),
    "infinite": (changed().replace(b"0.5", b"1e999"), Reason.WRONG_TYPE, "rate"),
    "object for a float": (changed(rate={}), Reason.WRONG_TYPE, "rate"),
    "missing feature": (without("rate"), Reason.MISSING_FIELD, "rate"),
    "missing key": (without("id"), Reason.MISSING_FIELD, "id"),
    "missing time": (without("at"), Reason.MISSING_FIELD, "at"),
    "null key": (changed(id=None), Reason.NULL, "id"),
    "null time": (changed(at=None), Reason.NULL, "at"),
    "null where not allowed": (changed(trips=None), Reason.NULL, "trips"),
    "above its rule": (changed(rate=1.5), Reason.OUT_OF_RANGE, "rate"),
    "below its rule": (changed(trips=-1), Reason.OUT_OF_RANGE, "trips"),
    "time without meaning": (changed(at="soon"), Reason.BAD_TIMESTAMP, "at"),
    "no such day": (changed(at="2026-02-30 00:00:00"), Reason.BAD_TIMESTAMP, "at"),
    "date only": (changed(at="2026-02-03"), Reason.BAD_TIMESTAMP, "at"),
    "epoch seconds": (changed(at=1_767_000_000), Reason.BAD_TIMESTAMP, "at"),
    "epoch milliseconds": (changed(at=1_767_000_000_000), Reason.BAD_TIMESTAMP, "at"),
    "epoch as text": (changed(at="1767000000"), Reason.BAD_TIMESTAMP, "at"),
    "epoch for created": (changed(made=1_767_000_000.5), Reason.BAD_TIMESTAMP, "made"),
    "future": (changed(at="2126-01-01 00:00:00"), Reason.FUTURE_EVENT, "at"),
}


def judge(values: list[bytes | None]) -> tuple[list[int], dict[int, tuple[Reason, str | None]], list[int]]:
    """Accepted, rejected, skipped: by record."""
    decoded = JsonDecoder(VIEW)(values)
    done = conform(VIEW, decoded.table, now_us=time.time_ns() // 1000, max_future_us=300_000_000)
    rejects = {reject.row: (reject.reason, reject.field) for reject in decoded.rejects}
    rejects |= {int(decoded.rows[reject.row]): (reject.reason, reject.field) for reject in done.rejects}
    return decoded.rows[done.rows].tolist(), rejects, decoded.skipped.tolist()


@pytest.mark.parametrize("kind", BAD)
def test_each_bad_input_has_its_reason_and_field(kind: str) -> None:
    value, reason, field = BAD[kind]
    accepted, rejects, skipped = judge([changed(), value, None, changed()])
    assert accepted == [0, 3]
    assert rejects == {1: (reason, field)}
    assert skipped == [2]


def test_all_of_them_in_one_slice() -> None:
    values: list[bytes | None] = [changed()]
    for value, _, _ in BAD.values():
        values += [value, changed()]
    accepted, rejects, _ = judge(values)
    assert accepted == list(range(0, len(values), 2))
    assert list(rejects.values()) == [(reason, field) for _, reason, field in BAD.values()] or rejects == {
        2 * index + 1: (reason, field) for index, (_, reason, field) in enumerate(BAD.values())
    }


@pytest.mark.parametrize(
    "value",
    [
        changed(unknown=1, more={"x": [1]}),
        without("note"),
        changed(note=None, rate=None),
        changed(trips=3.0),
        changed(rate=1),
        changed(at="2026-01-31T12:00:00.123456789+05:30"),
        changed(at="2026-01-31T12:00:00Z", made="2026-01-31 12:00:00.5"),
        changed(id=-(2**63)),
    ],
)
def test_what_is_good(value: bytes) -> None:
    assert judge([value]) == ([0], {}, [])


def test_a_name_with_dots_and_quotes_is_found() -> None:
    dotted = contract(Field(name="a.b", dtype=Array(Int64)), Field(name="a", dtype=Int64))
    decode = JsonDecoder(dotted)
    event = {"id": 1, "a.b": [1], "a": 1, "at": "x", "made": "x"}
    found = decode([json.dumps({**event, "a.b": [1, "x"]}).encode(), json.dumps({**event, "a": "x"}).encode()])
    assert [reject.field for reject in found.rejects] == ["a.b", "a"]


def test_lists_bytes_and_booleans() -> None:
    mixed = contract(
        Field(name="many", dtype=Array(Float32)), Field(name="raw", dtype=Bytes), Field(name="yes", dtype=Bool)
    )
    event = {"id": 1, "many": [1, 2.5, None], "raw": "aGk=", "yes": True, "at": "2026-01-01 00:00:00", "made": None}
    decoded = JsonDecoder(mixed)([json.dumps(event).encode()])
    row = conform(mixed, decoded.table, now_us=time.time_ns() // 1000, max_future_us=None).table.to_pylist()[0]
    assert (row["many"], row["raw"], row["yes"]) == ([1.0, 2.5, None], b"hi", True)


def test_maps_json_and_structs_are_taken_as_they_come_or_as_text() -> None:
    shape = Struct({"n": Int32, "at": UnixTimestamp})
    types: dict[str, FeastType] = {
        "map": Map,
        "any": Json,
        "maps": Array(Map),
        "some": Array(Json),
        "form": shape,
        "forms": Array(shape),
    }
    nested = contract(*(Field(name=name, dtype=dtype) for name, dtype in types.items()))
    given_row = {"id": 1, "at": "2026-01-01 00:00:00", "made": None}
    inline: dict[str, Any] = {
        "map": {"a": [1, {"b": None}]},
        "any": [1.5, "x"],
        "maps": [{"a": 1}, {}],
        "some": [True, {"a": None}, None],
        "form": {"n": 3, "at": "2026-01-01 00:00:00", "more": 1},
        "forms": [{"n": None}],
    }
    text = {**inline, **{name: json.dumps(inline[name], separators=(",", ":")) for name in ("map", "any", "maps")}}
    decoded = JsonDecoder(nested)([json.dumps({**given_row, **row}).encode() for row in (inline, text)])
    first, second = conform(nested, decoded.table, now_us=time.time_ns() // 1000, max_future_us=None).table.to_pylist()
    assert first == second
    assert first["map"] == '{"a":[1,{"b":null}]}'
    assert first["some"] == ["true", '{"a":null}', None]
    assert first["form"] == {"n": 3, "at": datetime(2026, 1, 1, tzinfo=UTC)}
    assert first["forms"] == [{"n": None, "at": None}]


@given(st.lists(st.one_of(st.none(), st.binary(max_size=40), st.sampled_from([changed(), changed(rate=2)]))))
def test_no_bytes_raise_and_every_record_has_one_outcome(values: list[bytes | None]) -> None:
    accepted, rejects, skipped = judge(values)
    assert sorted([*accepted, *rejects, *skipped]) == list(range(len(values)))
