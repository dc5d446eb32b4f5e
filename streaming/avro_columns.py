"""Avro values to the columns of a view: for each column one Arrow type, whatever schema wrote it.

The types are those that `headrace.conform` takes: integers as int64, numbers as float64, times as `timestamp[us, UTC]`,
UUIDs, decimals, maps and JSON as text.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal as PyDecimal
from typing import Any

import msgspec
import pyarrow as pa
from feast.types import Array, Decimal, FeastType, Json, Map, Set, Struct, TimeUuid, UnixTimestamp, Uuid

from headrace.conform import parse_timestamps
from headrace.contract import TIMESTAMP
from streaming.avro_schema import AvroSchemaError, Convert, Node

_DAY_US = 86_400_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_DECIMAL_BYTES = 64
"""A decimal's bytes are of any length, and to write out very many takes time that grows with their square."""


@dataclass(frozen=True)
class Form:
    """How values of an Avro type become Arrow's.

    Attributes:
        arrow: the Arrow type.
        convert: of a value that is not null; raises ValueError or OverflowError if it cannot. None: as it is.
    """

    arrow: pa.DataType
    convert: Convert | None = None


def form_of(node: Node, dtype: FeastType, kind: pa.DataType) -> Form:
    """The form in which values of an Avro type go to a column of the view.

    Args:
        dtype, kind: the column's types, Feast's and the segments'.

    Raises:
        AvroSchemaError: they can never fit.
    """
    if dtype in (Map, Array(Map), Json):
        return _json_form(node, dtype)
    one = _only_branch(node, dtype)
    if one is None:
        return Form(_empty_arrow(dtype, kind))
    if dtype in (UnixTimestamp, Uuid, TimeUuid, Decimal):
        return _text_or_time_form(one, dtype)
    if isinstance(dtype, Struct):
        return _struct_form(one, dtype, kind)
    if isinstance(dtype, Array | Set):
        return _list_form(one, dtype, kind)
    if pa.types.is_integer(kind):
        return _integer_form(one, dtype)
    if pa.types.is_floating(kind):
        return _float_form(one, dtype, may_be_whole=len(node.branches) > 1)
    if pa.types.is_boolean(kind) and one.kind == "boolean":
        return Form(pa.bool_())
    if pa.types.is_binary(kind) and one.kind in ("bytes", "fixed") and one.logical != "decimal":
        return Form(pa.binary())
    if pa.types.is_string(kind):
        return _string_form(one, dtype)
    raise _unfit(one, dtype)


def _only_branch(node: Node, dtype: FeastType) -> Node | None:
    """The one type of values that are not null; numbers, or texts, count as one. None if all are null."""
    branches = node.branches
    if len(branches) <= 1:
        return branches[0] if branches else None
    kinds = {branch.kind for branch in branches}
    plain = all(branch.logical is None for branch in branches)
    if plain and kinds <= {"int", "long"}:
        return Node("long")
    if plain and kinds <= {"int", "long", "float", "double"}:
        return Node("double")
    if plain and kinds <= {"string", "enum"}:
        return Node("string")
    msg = f"{node} is a choice of several types, of which no column of type {dtype} can be made"
    raise AvroSchemaError(msg)


def _empty_arrow(dtype: FeastType, kind: pa.DataType) -> pa.DataType:
    """The type that a column of nothing but nulls has, the same as it has with values."""
    if isinstance(dtype, Struct):
        return pa.struct([(part.name, _empty_arrow(dtype.fields[part.name], part.type)) for part in kind])
    if isinstance(dtype, Array | Set) and dtype != Array(Map):
        return pa.list_(_empty_arrow(dtype.base_type, kind.value_type))
    if pa.types.is_integer(kind):
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else kind


def _integer_form(node: Node, dtype: FeastType) -> Form:
    if node.logical == "decimal":
        decimal = _decimal_reader(node)
        return Form(pa.int64(), lambda value: _whole(decimal(value)))
    if node.kind in ("int", "long"):
        return Form(pa.int64())
    if node.kind in ("float", "double"):
        return Form(pa.int64(), _whole)
    raise _unfit(node, dtype)


def _float_form(node: Node, dtype: FeastType, *, may_be_whole: bool) -> Form:
    if node.logical == "decimal":
        decimal = _decimal_reader(node)
        return Form(pa.float64(), lambda value: float(decimal(value)))
    if node.kind in ("float", "double"):
        return Form(pa.float64(), float if may_be_whole else None)  # Arrow itself takes no integer that must be rounded
    if node.kind in ("int", "long") and node.logical is None:
        return Form(pa.float64(), float)
    raise _unfit(node, dtype)


def _string_form(node: Node, dtype: FeastType) -> Form:
    if node.kind in ("string", "enum"):
        return Form(pa.string())
    if _is_uuid(node):
        return Form(pa.string(), _uuid_text)
    if node.kind == "int" and node.logical == "date":
        return Form(pa.string(), _date_text)
    raise _unfit(node, dtype)


def _text_or_time_form(node: Node, dtype: FeastType) -> Form:
    if dtype == UnixTimestamp:
        if node.kind == "string":
            return Form(TIMESTAMP, parse_time)
        scale = _microseconds(node)
        if scale is not None:
            return Form(TIMESTAMP, scale[0])
    elif dtype == Decimal:
        if node.logical == "decimal":
            decimal = _decimal_reader(node)
            return Form(pa.string(), lambda value: format(decimal(value), "f"))
        if node.kind in ("int", "long") and node.logical is None:
            return Form(pa.string(), str)
        if node.kind == "string":
            return Form(pa.string())
    elif node.kind == "string":
        return Form(pa.string())
    elif _is_uuid(node):
        return Form(pa.string(), _uuid_text)
    raise _unfit(node, dtype)


def _struct_form(node: Node, dtype: Struct, kind: pa.DataType) -> Form:
    if node.kind != "record":
        raise _unfit(node, dtype)
    given = {field.name: field.node for field in node.fields}
    forms = {
        part.name: form_of(given.get(part.name, Node("null")), dtype.fields[part.name], part.type) for part in kind
    }
    arrow = pa.struct([(name, form.arrow) for name, form in forms.items()])
    converts = {name: form.convert for name, form in forms.items() if form.convert is not None}
    if not converts:
        return Form(arrow)

    def convert(record: Mapping[str, Any]) -> dict[str, Any]:
        changed = {n: change(value) for n, change in converts.items() if (value := record.get(n)) is not None}
        return {**record, **changed}

    return Form(arrow, convert)


def _list_form(node: Node, dtype: Array | Set, kind: pa.DataType) -> Form:
    if node.kind != "array":
        raise _unfit(node, dtype)
    item = form_of(node.parts[0], dtype.base_type, kind.value_type)
    convert = item.convert
    if convert is None:
        return Form(pa.list_(item.arrow))
    return Form(pa.list_(item.arrow), lambda items: [None if value is None else convert(value) for value in items])


def _json_form(node: Node, dtype: FeastType) -> Form:
    """JSON text; text is taken to be JSON already."""
    kinds = {branch.kind for branch in node.branches}
    if dtype == Map and not kinds <= {"map", "record", "string"}:
        raise _unfit(node, dtype)
    if dtype == Array(Map) and not kinds <= {"array", "string"}:
        raise _unfit(node, dtype)
    plain = _plain(node)
    holds_json = "string" in kinds  # a symbol of an enum is text too, but no JSON

    def convert(value: Any) -> str:
        if holds_json and isinstance(value, str):
            return value
        return msgspec.json.encode(value if plain is None else plain(value)).decode()

    return Form(pa.string(), convert)


def _plain(node: Node) -> Convert | None:
    """Values, null included, to what has a JSON form: logical types as text, the rest as msgspec writes it."""
    if node.kind == "union":
        changes = [(branch, _plain(branch)) for branch in node.branches]
        if all(change is None for _, change in changes):
            return None
        if len(changes) > 1:
            msg = f"{node} is a choice of several types with logical or named ones among them; no JSON is made of it"
            raise AvroSchemaError(msg)
        change = changes[0][1]
        return None if change is None else (lambda value: None if value is None else change(value))
    if node.kind == "record":
        parts = {field.name: change for field in node.fields if (change := _plain(field.node)) is not None}
        return (lambda record: {**record, **{n: change(record[n]) for n, change in parts.items()}}) if parts else None
    if node.kind in ("array", "map"):
        part = _plain(node.parts[0])
        if part is None:
            return None
        if node.kind == "array":
            return lambda items: [part(item) for item in items]
        return lambda entries: {key: part(value) for key, value in entries.items()}
    if node.logical == "decimal":
        decimal = _decimal_reader(node)
        return lambda value: format(decimal(value), "f")
    if _is_uuid(node):
        return _uuid_text
    if node.logical == "date":
        return _date_text
    scale = _microseconds(node)
    if scale is None:
        return None
    to_us = scale[0]
    return lambda value: (_EPOCH + timedelta(microseconds=value if to_us is None else to_us(value))).isoformat()


def _microseconds(node: Node) -> tuple[Convert | None] | None:
    """How a time becomes microseconds since the epoch; None if the type is no time."""
    if node.logical == "date":
        return (lambda days: days * _DAY_US,)
    if node.kind != "long" or node.logical is None:
        return None
    scales: dict[str, Convert | None] = {"millis": lambda ms: ms * 1000, "micros": None, "nanos": lambda ns: ns // 1000}
    name = node.logical.removeprefix("local-")
    unit = name.removeprefix("timestamp-")
    return (scales[unit],) if name != unit and unit in scales else None


def _decimal_reader(node: Node) -> Convert:
    """Bytes, big-endian and signed, to a decimal."""
    scale = node.scale

    def read(value: bytes) -> PyDecimal:
        if len(value) > _LONGEST_DECIMAL_BYTES:
            msg = f"a decimal of {len(value)} bytes; expected at most {_LONGEST_DECIMAL_BYTES}"
            raise ValueError(msg)
        unscaled = int.from_bytes(value, "big", signed=True)
        digits = tuple(int(digit) for digit in str(abs(unscaled)))
        return PyDecimal((int(unscaled < 0), digits, -scale))

    return read


def _whole(value: float | PyDecimal) -> int:
    number = int(value) if -(2**63) <= value < 2**63 else None  # NaN is in no interval
    if number is None or number != value:
        msg = f"expected an integer, found {value}"
        raise ValueError(msg)
    return number


def parse_time(text: str) -> Any:
    """Text to microseconds since the epoch. Slow: whole columns go to `headrace.conform.parse_timestamps`."""
    moments, bad = parse_timestamps(pa.array([text], pa.string()))
    if bad[0]:
        msg = f"expected a time such as 2026-01-31T12:00:00Z, found {text[:60]!r}"
        raise ValueError(msg)
    return moments.cast(pa.int64())[0].as_py()


def _date_text(days: int) -> str:
    return (date(1970, 1, 1) + timedelta(days=days)).isoformat()


def _uuid_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else str(uuid.UUID(bytes=value))


def _is_uuid(node: Node) -> bool:
    return node.kind == "fixed" and node.logical == "uuid" and node.size == 16


def _unfit(node: Node, dtype: FeastType) -> AvroSchemaError:
    return AvroSchemaError(f"the Avro type {node} cannot become {dtype}")
