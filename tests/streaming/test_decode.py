"""Decoding: every kind of bad input has its reason and field, and the rest of the slice goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
from feast import FeatureView
from hypothesis import given
from hypothesis import strategies as st

from headrace.conform import Reason, conform
from headrace.contract import Rule, ViewContract
from headrace.errors import ConfigError
from streaming.decode import JsonDecoder

US = pa.timestamp("us", tz="UTC")


def contract(*fields: pa.Field, rules: tuple[Rule, ...] = ()) -> ViewContract:
    schema = pa.schema([pa.field("id", pa.int64()), *fields, pa.field("at", US), pa.field("made", US)])
    return ViewContract(
        name="view",
        project="tests",
        feature_view=cast("FeatureView", None),
        join_keys=("id",),
        features=tuple(field.name for field in fields),
        timestamp_field="at",
        created_field="made",
        schema=schema,
        field_mapping={},
        rules=rules,
        directory=Path("nowhere"),
        topic="topic",
        bootstrap_servers=None,
        message_format="json",
        message_schema=None,
        source_table=None,
        transform=None,
    )


VIEW = contract(
    pa.field("rate", pa.float32()),
    pa.field("trips", pa.int32()),
    pa.field("note", pa.string()),
    rules=(Rule("rate", ge=0, le=1), Rule("trips", ge=0, nullable=False), Rule("note", nullable=True)),
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
    view = contract(pa.field("a.b", pa.list_(pa.int64())), pa.field("a", pa.int64()))
    decode = JsonDecoder(view)
    event = {"id": 1, "a.b": [1], "a": 1, "at": "x", "made": "x"}
    found = decode([json.dumps({**event, "a.b": [1, "x"]}).encode(), json.dumps({**event, "a": "x"}).encode()])
    assert [reject.field for reject in found.rejects] == ["a.b", "a"]


def test_lists_bytes_and_booleans() -> None:
    view = contract(pa.field("many", pa.list_(pa.float32())), pa.field("raw", pa.binary()), pa.field("yes", pa.bool_()))
    event = {"id": 1, "many": [1, 2.5, None], "raw": "aGk=", "yes": True, "at": "2026-01-01 00:00:00", "made": None}
    decoded = JsonDecoder(view)([json.dumps(event).encode()])
    row = conform(view, decoded.table, now_us=time.time_ns() // 1000, max_future_us=None).table.to_pylist()[0]
    assert (row["many"], row["raw"], row["yes"]) == ([1.0, 2.5, None], b"hi", True)


def test_a_type_without_a_json_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="`odd` of type"):
        JsonDecoder(contract(pa.field("odd", pa.duration("s"))))


@given(st.lists(st.one_of(st.none(), st.binary(max_size=40), st.sampled_from([changed(), changed(rate=2)]))))
def test_no_bytes_raise_and_every_record_has_one_outcome(values: list[bytes | None]) -> None:
    accepted, rejects, skipped = judge(values)
    assert sorted([*accepted, *rejects, *skipped]) == list(range(len(values)))
