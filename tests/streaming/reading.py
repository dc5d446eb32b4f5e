"""What an event in JSON must become, by brute force: the standard library's parser made strict, and the rules by type.

Nothing here uses the stream's own code. What is wrong with an event raises a `ValueError`; which fault comes first does
not matter.
"""

from __future__ import annotations

import binascii
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pyarrow as pa
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
from headrace.rules import Rule

Row = tuple[Any, ...]


class Verdict(NamedTuple):
    """What a value becomes.

    Attributes:
        row: None for a dead letter.
        is_open: whether it may be a dead letter nevertheless: a name comes twice, and no rule says what that means.
    """

    row: Row | None
    is_open: bool = False


Judge = Callable[[bytes], Verdict]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LARGEST_US = (datetime.max.replace(tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
_SMALLEST_US = (datetime.min.replace(tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:(Z|z)|([+-])(\d\d):?(\d\d))?", re.ASCII
)
_UUID = re.compile(r"[0-9a-f]{8}(?:-?[0-9a-f]{4}){3}-?[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_DECIMAL = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,9})?|Infinity|NaN)", re.ASCII)
_MOST_DIGITS = 4000
"""Python reads no longer integers from text."""


class Pairs(list[tuple[str, Any]]):
    """An object: its names and values in order, those that come twice too."""


def parse(value: bytes) -> Any:
    """One JSON value, strictly: UTF-8 without a mark, no NaN, no halves of pairs, nothing behind it."""
    try:
        text = value.decode("utf-8")
        parsed = json.loads(text, parse_constant=_refuse, parse_int=_integer, object_pairs_hook=Pairs)
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("too deep") from error
    return parsed


def judge_of(contract: ViewContract, latest_us: int) -> Judge:
    """The judge of a view's events; latest is how late one may be dated."""

    def judge(value: bytes) -> Verdict:
        try:
            event = parse(value)
            if not isinstance(event, Pairs):
                return Verdict(None)
            given = dict(event)  # of names that come twice the last counts
            cells = {
                name: None if given[name] is None else _top(dtype_of(contract, name), given[name])
                for name in contract.schema.names
                if name in given
            }
            return Verdict(row_of(contract, cells, latest_us), _has_doubles(event))
        except (ValueError, OverflowError):
            return Verdict(None)

    return judge


def row_of(contract: ViewContract, cells: Mapping[str, Any], latest_us: int) -> Row:
    """The row of an event whose values are read already, its times in microseconds."""
    row = []
    for field in contract.schema:
        rule = contract.rule(field.name)
        if field.name not in cells and rule.nullable is not True:
            raise ValueError(f"{field.name} is missing")
        result = cells.get(field.name)
        is_wanted = field.name in (*contract.join_keys, contract.timestamp_field) or rule.nullable is False
        if result is None and is_wanted:
            raise ValueError(f"{field.name} is null")
        if result is not None:
            _check(rule, result)
            if field.name == contract.timestamp_field and result > latest_us:
                raise ValueError("future")
        row.append(result)
    return tuple(row)


def rows_of(contract: ViewContract, table: pa.Table) -> list[Row]:
    """The rows of a stored table in the same form."""
    columns = []
    for name in contract.schema.names:
        dtype = dtype_of(contract, name)
        values = table.column(name).to_pylist()
        columns.append([None if value is None else _stored(dtype, value) for value in values])
    return list(zip(*columns, strict=True))


def _stored(dtype: FeastType, value: Any) -> Any:
    if value is None:
        return None
    if dtype in (Json, Map, Array(Map)):
        return json.loads(value)
    if isinstance(dtype, Array | Set):
        return [_stored(dtype.base_type, item) for item in value]
    if isinstance(dtype, Struct):
        return {name: _stored(dtype.fields[name], item) for name, item in value.items()}
    return (value - EPOCH) // timedelta(microseconds=1) if dtype == UnixTimestamp else value


def same(one: Row, other: Row) -> bool:
    """Whether two rows are the same to the bit; the order of names in JSON does not count."""
    return repr(one) == repr(other) or _ordered(one) == _ordered(other)


def _ordered(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=repr)


def _has_doubles(value: Any) -> bool:
    left = [value]
    while left:  # no recursion: an event may be nested about as deep as Python can go
        item = left.pop()
        if isinstance(item, Pairs):
            names = [name for name, _ in item]
            if len(set(names)) < len(names):
                return True
            left += [part for _, part in item]
        elif isinstance(item, list):
            left += item
    return False


def dtype_of(contract: ViewContract, name: str) -> FeastType:
    """The type of a column."""
    is_time = name in (contract.timestamp_field, contract.created_field)
    return UnixTimestamp if is_time else contract.dtype(name)


def _check(rule: Rule, value: Any) -> None:
    good = (
        rule.ge is None or value >= rule.ge,
        rule.le is None or value <= rule.le,
        rule.gt is None or value > rule.gt,
        rule.lt is None or value < rule.lt,
    )
    if not all(good):
        raise ValueError(f"{value} is out of range")


def _refuse(text: str) -> None:
    raise ValueError(text)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else math.inf


def _top(dtype: FeastType, value: Any) -> Any:
    """A field's value: whole numbers may be written as floats there."""
    if dtype in (Int32, Int64) and type(value) is float:
        if not value.is_integer() or abs(value) >= 2**63:
            raise ValueError(value)
        value = int(value)
    return read(dtype, value)


def read(dtype: FeastType, value: Any) -> Any:
    """A value that is no null, by its type."""
    if isinstance(dtype, Array | Set) and dtype != Array(Map):
        if type(value) is not list:
            raise ValueError(value)
        base = dtype.base_type
        has_no_null = base in (Uuid, TimeUuid, Decimal) or isinstance(base, Struct)
        if has_no_null and None in value:
            raise ValueError("a null item")
        return [None if item is None else read(base, item) for item in value]
    if isinstance(dtype, Struct):
        return _struct(dtype, value)
    return _READ[dtype](value)


def _struct(dtype: Struct, value: Any) -> dict[str, Any]:
    if not isinstance(value, Pairs):
        raise ValueError(value)
    given = dict(value)
    return {
        name: None if (item := given.get(name)) is None else read(part, item) for name, part in dtype.fields.items()
    }


def _whole(bits: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise ValueError(value)
        return value

    return check


def _double(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(value)
    number = float(value)
    if math.isinf(number):
        raise ValueError(value)
    return number


def _single(value: Any) -> float:
    return float(struct.unpack("<f", struct.pack("<f", _double(value)))[0])


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(value)
    value.encode()  # half of a pair has no bytes
    return value


def _bytes(value: Any) -> bytes:
    if len(_text(value)) % 4:
        raise ValueError(value)
    return binascii.a2b_base64(value, strict_mode=True)


def _form(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if pattern.fullmatch(_text(value)) is None:
            raise ValueError(value)
        return str(value)

    return check


def moment(value: Any) -> int:
    """A time as microseconds; beyond them it is cut."""
    found = _TIME.fullmatch(_text(value))
    if found is None:
        raise ValueError(value)
    *parts, fraction, _, sign, hours, minutes = found.groups()
    year, month, day, hour, minute, second = map(int, parts)
    naive = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    us = (naive - EPOCH) // timedelta(microseconds=1) + int((fraction or "").ljust(6, "0")[:6])
    if sign:
        if int(hours) > 23 or int(minutes) > 59:
            raise ValueError(value)
        us -= (1 if sign == "+" else -1) * (int(hours) * 60 + int(minutes)) * 60_000_000
    return in_calendar(us)


def in_calendar(us: int) -> int:
    """Microseconds that are a time of the years 1 to 9999."""
    if not _SMALLEST_US <= us <= _LARGEST_US:
        raise ValueError(us)
    return us


def plain(value: Any) -> Any:
    """A parsed value as Python's own: of names that come twice the last counts."""
    if isinstance(value, Pairs):
        return {_text(name): plain(item) for name, item in value}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(value)
    return value


def _any(value: Any) -> Any:
    """JSON, or text that holds JSON: compared by what it means."""
    return json.loads(value) if isinstance(value, str) and _text(value) is not None else plain(value)


def within(value: Any) -> Any:
    """Integers of maps have 64 bits."""
    if isinstance(value, dict):
        return {_text(name): within(item) for name, item in value.items()}
    if isinstance(value, list):
        return [within(item) for item in value]
    if type(value) is int:
        return _whole(64)(value)
    return _text(value) if isinstance(value, str) else value


def _map(value: Any) -> dict[str, Any]:
    found = _any(value)
    if not isinstance(found, dict):
        raise ValueError(value)
    return dict(within(found))


def _maps(value: Any) -> list[Any]:
    found = _any(value)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(value)
    return list(within(found))


_READ: dict[FeastType, Callable[[Any], Any]] = {
    Int32: _whole(32),
    Int64: _whole(64),
    Float32: _single,
    Float64: _double,
    Bool: _bool,
    String: _text,
    Bytes: _bytes,
    UnixTimestamp: moment,
    Uuid: _form(_UUID),
    TimeUuid: _form(_UUID),
    Decimal: _form(_DECIMAL),
    Json: _any,
    Map: _map,
    Array(Map): _maps,
}
