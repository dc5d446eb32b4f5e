"""What a record in Avro must become, by brute force: a reader made from the specification, and the rules by type.

Nothing here uses the stream's own code, nor the library that it decodes with.
Source: Apache Avro 1.12, https://avro.apache.org/docs/1.12.0/specification/
"""

from __future__ import annotations

import base64
import math
import struct
import uuid
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from fractions import Fraction
from typing import Any, NamedTuple

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

from headrace.contract import ViewContract
from tests.streaming.mutate_avro import DAY_US, Schema, Schemas
from tests.streaming.reading import EPOCH, Judge, Verdict, dtype_of, in_calendar, read, row_of, within

_LONGEST_VARINT = 10
_LONGEST_DECIMAL = 64


class Value(NamedTuple):
    """A value, with the type that it was written as: of a union the branch, and each part has its own."""

    schema: Schema
    data: Any

    @property
    def kind(self) -> str:
        """The name of its type."""
        return str(self.schema if isinstance(self.schema, str) else self.schema["type"])

    @property
    def logical(self) -> str | None:
        """The name of its logical type."""
        return None if isinstance(self.schema, str) else self.schema.get("logicalType")


class Reader:
    """Reads a record.

    Attributes:
        is_open: whether there was something in it that may be refused, or be taken as it is here: a number of 32 bits
            that has more, a boolean that is neither 0 nor 1, a key that comes twice in a map.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.is_open = False

    def record(self, schema: Schema) -> dict[str, Value]:
        """A record to its last byte."""
        fields: dict[str, Value] = self._value(schema).data
        if self._at != len(self._data):
            raise ValueError("bytes are left")
        return fields

    def _take(self, size: int) -> bytes:
        if not 0 <= size <= len(self._data) - self._at:
            raise ValueError(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _long(self) -> int:
        number = 0
        for index in range(_LONGEST_VARINT):
            byte = self._take(1)[0]
            number |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                number &= 2**64 - 1
                return (number >> 1) ^ -(number & 1)
        raise ValueError("a number without end")

    def _value(self, schema: Schema) -> Value:
        if isinstance(schema, list):
            index = self._long()
            if not 0 <= index < len(schema):
                raise ValueError(index)
            return self._value(schema[index])
        kind = schema if isinstance(schema, str) else schema["type"]
        return Value(schema, self._data_of(kind, {} if isinstance(schema, str) else schema))

    def _data_of(self, kind: str, about: Mapping[str, Any]) -> Any:
        if kind == "null":
            return None
        if kind == "boolean":
            byte = self._take(1)[0]
            self.is_open |= byte > 1
            return byte != 0
        if kind in ("int", "long"):
            number = self._long()
            self.is_open |= kind == "int" and not -(2**31) <= number < 2**31
            return number
        if kind in ("float", "double"):
            return struct.unpack("<f" if kind == "float" else "<d", self._take(4 if kind == "float" else 8))[0]
        if kind == "bytes":
            return self._take(self._long())
        if kind == "string":
            return self._take(self._long()).decode()
        if kind == "fixed":
            return self._take(about["size"])
        if kind == "enum":
            return dict(enumerate(about["symbols"])).get(index := self._long()) or _fail(index)
        if kind == "record":
            return {field["name"]: self._value(field["type"]) for field in about["fields"]}
        return self._blocks(kind, about)

    def _blocks(self, kind: str, about: Mapping[str, Any]) -> Any:
        items: list[Value] = []
        entries: dict[str, Value] = {}
        while (count := self._long()) != 0:
            if count < 0:
                self._long()  # how many bytes the block has; who reads its items need not know
            for _ in range(abs(count)):
                if kind == "array":
                    items.append(self._value(about["items"]))
                    continue
                key = self._value("string").data
                self.is_open |= key in entries
                entries[key] = self._value(about["values"])
        return items if kind == "array" else entries


def _fail(value: object) -> Any:
    raise ValueError(value)


def judge_of_avro(
    contract: ViewContract, latest_us: int, schemas: Schema | Schemas, own: Schema | None = None
) -> Judge:
    """The judge of a view's events; latest is how late one may be dated.

    Args:
        schemas: by id, if records are framed; else the one schema.
        own: the view's own schema, to which those by id are resolved.
    """

    def judge(value: bytes) -> Verdict:
        try:
            schema, data = schemas, value
            if "fields" not in schemas:
                schema, data = schemas.get(int.from_bytes(value[1:5], "big")), value[5:]
                if len(value) < 5 or value[0] != 0 or schema is None:
                    return Verdict(None)
            reader = Reader(data)
            given = reader.record(schema)
            if own is not None:
                given = _resolved(given, own)
            cells = {
                name: None if given[name].data is None else cell(dtype_of(contract, name), given[name])
                for name in contract.schema.names
                if name in given
            }
            return Verdict(row_of(contract, cells, latest_us), reader.is_open)
        except (ValueError, OverflowError):
            return Verdict(None)

    return judge


def _resolved(given: Mapping[str, Value], own: Schema) -> dict[str, Value]:
    """By name or alias; for the types that are used with a schema of the view's own nothing else changes."""
    found = {}
    for field in own["fields"]:
        names = (field["name"], *field.get("aliases", ()))
        value = next((given[name] for name in names if name in given), None)
        found[field["name"]] = Value(field["type"], field["default"]) if value is None else value
    return found


def cell(dtype: FeastType, value: Value) -> Any:
    """A value that is no null, by the type of its column."""
    if value.kind == "string" and dtype != String:
        return read(dtype, value.data)
    if isinstance(dtype, Array | Set) and dtype != Array(Map):
        base = dtype.base_type
        has_no_null = base in (Uuid, TimeUuid, Decimal) or isinstance(base, Struct)
        if has_no_null and any(item.data is None for item in value.data):
            raise ValueError("a null item")
        return [None if item.data is None else cell(base, item) for item in value.data]
    if isinstance(dtype, Struct):
        return {
            name: None if (item := value.data.get(name)) is None or item.data is None else cell(part, item)
            for name, part in dtype.fields.items()
        }
    return _CELLS[dtype](value)


def _unscaled(value: Value) -> int:
    if len(value.data) > _LONGEST_DECIMAL:
        raise ValueError("a long decimal")
    return int.from_bytes(value.data, "big", signed=True)


def _exact(value: Value) -> Fraction:
    """A number; neither of those that are none."""
    return (
        Fraction(_unscaled(value), 10 ** value.schema["scale"]) if value.logical == "decimal" else Fraction(value.data)
    )


def _whole(bits: int) -> Callable[[Value], int]:
    def check(value: Value) -> int:
        number = _exact(value)
        if number.denominator != 1 or not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
            raise ValueError(value)
        return int(number)

    return check


def _double(value: Value) -> float:
    return value.data if value.kind in ("float", "double") else float(_exact(value))


def _single(value: Value) -> float:
    return float(struct.unpack("<f", struct.pack("<f", _double(value)))[0])


def _decimal(value: Value) -> str:
    if value.logical != "decimal":
        return str(value.data)
    unscaled, scale = _unscaled(value), value.schema["scale"]
    digits = str(abs(unscaled)).rjust(scale + 1, "0")
    text = f"{digits[:-scale]}.{digits[-scale:]}" if scale else digits
    return f"-{text}" if unscaled < 0 else text


def _moment(value: Value) -> int:
    logical = value.logical or ""
    if logical == "date":
        return in_calendar(value.data * DAY_US)
    scales: dict[str, Callable[[int], int]] = {
        "millis": lambda ms: ms * 1000, "micros": lambda us: us, "nanos": lambda ns: ns // 1000,
    }  # fmt: skip
    return in_calendar(scales[logical.rpartition("-")[2]](value.data))


def _text(value: Value) -> str:
    if value.logical == "date":
        return (date(1970, 1, 1) + timedelta(days=value.data)).isoformat()
    return str(uuid.UUID(bytes=value.data)) if value.kind == "fixed" else value.data


def _any(value: Value) -> Any:
    """As JSON has it."""
    if isinstance(value.data, list):
        return [_any(item) for item in value.data]
    if isinstance(value.data, dict):
        return {name: _any(item) for name, item in value.data.items()}
    if value.logical == "decimal":
        return _decimal(value)
    if value.logical in ("date", "uuid"):
        return _text(value)
    if value.logical is not None and "timestamp" in value.logical:
        return (EPOCH + timedelta(microseconds=_moment(value))).isoformat()
    if isinstance(value.data, bytes):
        return base64.b64encode(value.data).decode()
    return None if isinstance(value.data, float) and not math.isfinite(value.data) else value.data


def _as_is(value: Value) -> Any:
    return value.data


_CELLS: dict[FeastType, Callable[[Value], Any]] = {
    Int32: _whole(32),
    Int64: _whole(64),
    Float32: _single,
    Float64: _double,
    Bool: _as_is,
    String: _text,
    Bytes: _as_is,
    UnixTimestamp: _moment,
    Uuid: _text,
    TimeUuid: _text,
    Decimal: _decimal,
    Json: _any,
    Map: lambda value: within(_any(value)),
    Array(Map): lambda value: within(_any(value)),
}
