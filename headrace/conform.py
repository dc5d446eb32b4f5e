"""Make a table conform to its view: transform, cast, rules. The one place of it, for the stream and the batch chain.

Everything is columnar: each check yields a mask of bad rows; only rejected rows become Python objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from feast.types import Array, Decimal, FeastType, Json, Map, Set, Struct, TimeUuid, UnixTimestamp, Uuid

from headrace.contract import TIMESTAMP, Transform, ViewContract
from headrace.rules import Rule, Severity
from headrace.values import one_array, parse_map, parse_maps

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_ISO = (
    r"^(?P<day>\d{4}-\d{2}-\d{2})[T ](?P<time>\d{2}:\d{2}:\d{2})(?P<fraction>\.\d{1,9})?"
    r"(?P<zone>Z|z|[+-]\d{2}:?\d{2})?$"
)
_SHOWN_CHARACTERS = 60


class Reason(StrEnum):
    """Why a row was rejected.

    Attributes:
        UNDECODABLE: it cannot be read at all.
        MISSING_FIELD: it lacks a field that is not tagged `nullable: "true"`.
        WRONG_TYPE: a value is not of the view's type.
        NULL: a join key, the event time, or a value tagged `nullable: "false"` is null.
        OUT_OF_RANGE: a value breaks a rule: `ge`, `le`, `gt`, `lt` or `isin`.
        BAD_TIMESTAMP: a time cannot be read, or no calendar has it.
        FUTURE_EVENT: it is dated further ahead of the clock than the settings allow.
        TRANSFORM: the view's transformation failed on it.
    """

    UNDECODABLE = "undecodable"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    NULL = "null"
    OUT_OF_RANGE = "out_of_range"
    BAD_TIMESTAMP = "bad_timestamp"
    FUTURE_EVENT = "future_event"
    TRANSFORM = "transform"


@dataclass(frozen=True)
class Reject:
    """A row that was turned away.

    Attributes:
        row: its index in the input.
        field: the field at fault; None when it is the whole row.
        message: expected and found, the value shortened.
    """

    row: int
    reason: Reason
    field: str | None
    message: str


@dataclass(frozen=True)
class Conformed:
    """The outcome. Every input row is in exactly one of the three.

    Attributes:
        table: the accepted rows in input order, in the contract's schema.
        rows: the input index of each accepted row.
        rejects: one per rejected row, its first fault, by row.
        skipped: the input indices of rows that the transformation marked to be skipped.
    """

    table: pa.Table
    rows: Rows
    rejects: list[Reject]
    skipped: Rows


class _Faults:
    """The first fault of each row; later ones of the same row are not kept."""

    def __init__(self, rows: int) -> None:
        self.bad: Mask = np.zeros(rows, dtype=bool)
        self.found: list[Reject] = []

    def add(self, mask: Mask, reason: Reason, field: str | None, message: Callable[[int], str]) -> None:
        for row in np.flatnonzero(mask & ~self.bad):
            self.found.append(Reject(int(row), reason, field, message(int(row))))
        self.bad |= mask

    def sorted(self) -> list[Reject]:
        return sorted(self.found, key=lambda reject: reject.row)


def conform(
    contract: ViewContract,
    table: pa.Table,
    *,
    now_us: int,
    max_future_us: int | None,
    transform: Transform | None = None,
    rules: bool = True,
) -> Conformed:
    """Transform, cast and check the rows of a table. Pure. Bad data never raises.

    Columns may be of the target type; of a wider numeric type (a fraction or an overflow is a fault); text for
    timestamps (`YYYY-MM-DD HH:MM:SS` or ISO 8601 with fraction and offset; without an offset it is UTC; beyond
    microseconds it is cut); timestamps of any unit and zone. A number is no timestamp, text is no number. Maps and JSON
    may be JSON text or whatever has a JSON form, UUIDs and decimals text or what they are. Lists and structs are cast
    part by part. Columns that the view does not know are dropped, one that it wants and the table lacks is a fault of
    each row.

    Args:
        now_us: now, in microseconds since the epoch.
        max_future_us: how far ahead of now an event may be dated, inclusive; None is unbounded.
        rules: whether the tagged rules hold, those on nulls included. Feast's own writes know none.
    """
    rows = table.num_rows
    faults = _Faults(rows)
    skipped: Mask = np.zeros(rows, dtype=bool)
    if transform is not None:
        table, skipped = _transformed(table, transform, faults)
    columns: list[pa.Array] = []
    for field in contract.schema:
        rule = contract.rule(field.name) if rules else Rule(field.name)
        column = _cast(contract, table, field, rule, faults)
        _check_nulls(contract, column, field, rule, faults)
        _check_rule(column, rule, faults)
        columns.append(column)
    if max_future_us is not None:
        _check_future(contract, columns, now_us, max_future_us, faults)
    keep: Rows = np.flatnonzero(~faults.bad & ~skipped).astype(np.int64)
    out = pa.Table.from_arrays(columns, schema=contract.schema)
    if len(keep) != rows:
        out = out.take(pa.array(keep))
    rejects = [reject for reject in faults.sorted() if not skipped[reject.row]]
    return Conformed(out, keep, rejects, np.flatnonzero(skipped).astype(np.int64))


def parse_timestamps(text: pa.Array) -> tuple[pa.Array, Mask]:
    """Text to `timestamp[us, UTC]`; the mask tells which could not be read (they are null in the result).

    Nulls stay null and are not marked. Accepts what `conform` says of text.
    """
    uniform = _parse_uniform(text)
    if uniform is not None:
        none: Mask = np.zeros(len(text), dtype=bool)
        return uniform, none
    parts = pc.extract_regex(text, _ISO)
    shaped = parts.is_valid()
    zone = pc.struct_field(parts, "zone")
    zone = pc.if_else(pc.is_in(zone, pa.array(["", "z"])), "Z", zone)
    fraction = pc.utf8_slice_codeunits(pc.struct_field(parts, "fraction"), 0, 7)
    plain = pc.binary_join_element_wise(
        pc.struct_field(parts, "day"), "T", pc.struct_field(parts, "time"), fraction, zone, ""
    )
    plain = pc.if_else(shaped, plain, pa.scalar(None, pa.string()))
    parsed = _cast_or_null(plain, TIMESTAMP)
    bad: Mask = _to_mask(pc.and_(text.is_valid(), pc.is_null(parsed)))
    return parsed, bad


def _parse_uniform(text: pa.Array) -> pa.Array | None:
    """The fast path: all with a zone or all without, none shorter than to the second; else None.

    Arrow's own parser takes dates and minutes too, and zones of hours, which are no event times here: hence the look at
    the lengths, and where there are zones at the whole form.
    """
    shortest = pc.min(pc.binary_length(text)).as_py()
    if shortest is None or shortest < len("2026-01-31 12:00:00"):
        return None
    try:
        return pc.assume_timezone(text.cast(pa.timestamp("us")), "UTC")
    except pa.ArrowInvalid:
        pass
    try:
        moments = text.cast(TIMESTAMP)
    except pa.ArrowInvalid:
        return None
    return moments if pc.all(pc.match_substring_regex(text, _ISO)).as_py() else None


def _transformed(table: pa.Table, transform: Transform, faults: _Faults) -> tuple[pa.Table, Mask]:
    """The transformed table and the mask of rows to skip. A transformation that fails rejects every row."""
    rows = table.num_rows
    none: Mask = np.zeros(rows, dtype=bool)
    try:
        result = transform.function(table)
        if result.num_rows != rows:
            msg = f"returned {result.num_rows} rows for {rows}; it must keep rows and order"
            raise ValueError(msg)
    except Exception as error:  # noqa: BLE001 - user code: whatever it raises is a fault of the rows given to it
        text = f"transformation {transform.name}: {type(error).__name__}: {error}"
        faults.add(~none, Reason.TRANSFORM, None, lambda _: text)
        return table, none
    if Transform.SKIP_COLUMN not in result.column_names:
        return result, none
    marks = result.column(Transform.SKIP_COLUMN).combine_chunks().fill_null(False)
    return result.drop_columns([Transform.SKIP_COLUMN]), _to_mask(marks)


def _cast(contract: ViewContract, table: pa.Table, field: pa.Field, rule: Rule, faults: _Faults) -> pa.Array:
    """One column in its target type; rows that cannot be cast are faults and null."""
    if field.name not in table.column_names:
        if rule.nullable is not True:
            every: Mask = np.ones(table.num_rows, dtype=bool)
            faults.add(every, Reason.MISSING_FIELD, field.name, lambda _: f"field `{field.name}` is missing")
        return pa.nulls(table.num_rows, field.type)
    column = one_array(table.column(field.name))
    is_time = field.name in (contract.timestamp_field, contract.created_field)
    dtype = UnixTimestamp if is_time else contract.dtype(field.name)
    result, bad = _converted(column, field.type, dtype)
    if bad.any():
        reason = Reason.BAD_TIMESTAMP if dtype == UnixTimestamp else Reason.WRONG_TYPE
        wanted = _WANTED.get(dtype) or (str(dtype) if _is_nested(field.type) else str(field.type))
        faults.add(
            bad,
            reason,
            field.name,
            lambda row: f"field `{field.name}`: expected {wanted}, found {_shown(column[row])}",
        )
        result = pc.if_else(pa.array(bad), None, result)
    return result


_WANTED: Mapping[FeastType, str] = {
    UnixTimestamp: "a time such as 2026-01-31 12:00:00 or 2026-01-31T12:00:00.5+01:00",
    Map: "a JSON object, its integers within 64 bits",
    Array(Map): "a JSON array of objects, their integers within 64 bits",
    Json: "JSON",
    Uuid: "a UUID",
    TimeUuid: "a UUID",
    Decimal: "a decimal number",
}


def _converted(column: pa.Array, target: pa.DataType, dtype: FeastType) -> tuple[pa.Array, Mask]:
    """A column in another type, and which rows cannot be; a null stays null and is no fault."""
    none: Mask = np.zeros(len(column), dtype=bool)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), target), none
    if dtype in _JSON:
        return _json_text(column, _JSON[dtype])
    if dtype in _TEXTS:
        return _checked_text(column, _TEXTS[dtype])
    if pa.types.is_timestamp(target):
        return _timestamps(column)
    if isinstance(dtype, Array | Set) and _is_list(column.type):
        return _converted_items(column, target, dtype.base_type)
    if isinstance(dtype, Struct) and pa.types.is_struct(column.type):
        return _converted_fields(column, target, dtype)
    if column.type == target:
        return column, none
    if not _may_cast(column.type, target):
        return pa.nulls(len(column), target), _to_mask(column.is_valid())
    result = _cast_or_null(column, target)
    is_whole = result.null_count == column.null_count
    bad = none if is_whole else _to_mask(pc.and_(column.is_valid(), result.is_null()))
    if pa.types.is_floating(target) and pa.types.is_floating(column.type):
        # A finite double that becomes an infinite float has not been stored but lost.
        bad = bad | np.isfinite(_as_numbers(column)) & ~np.isfinite(_as_numbers(result))
    return result, bad


def _converted_items(column: pa.Array, target: pa.DataType, dtype: FeastType) -> tuple[pa.Array, Mask]:
    """Lists item by item. A list with a bad item is bad, and one with a null that no client could read."""
    items = column.flatten()
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    converted, bad = _converted(items, target.value_type, dtype)
    if dtype in _TEXTS or isinstance(dtype, Struct):
        bad = bad | _to_mask(items.is_null())
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    lists = pa.ListArray.from_arrays(offsets, converted, mask=column.is_null())
    bad_lists: Mask = np.zeros(len(column), dtype=bool)
    if bad.any():
        bad_lists[np.repeat(np.arange(len(column)), lengths)[bad]] = True
    return lists, bad_lists


def _converted_fields(column: pa.Array, target: pa.DataType, dtype: Struct) -> tuple[pa.Array, Mask]:
    """Structs field by field: one that is not there is null, one that is unknown is dropped."""
    known = {field.name: part for field, part in zip(column.type, column.flatten(), strict=True)}
    bad: Mask = np.zeros(len(column), dtype=bool)
    parts = []
    for field in target:
        part, wrong = _converted(known.get(field.name, pa.nulls(len(column))), field.type, dtype.fields[field.name])
        parts.append(part)
        bad |= wrong
    return pa.StructArray.from_arrays(parts, fields=list(target), mask=column.is_null()), bad


def _json_text(column: pa.Array, parse: Callable[[str], Any]) -> tuple[pa.Array, Mask]:
    """JSON: text that is parsed to see that it is, anything else as its JSON."""
    texts: list[str | None] = []
    bad: Mask = np.zeros(len(column), dtype=bool)
    for row, scalar in enumerate(column):
        try:
            value = scalar.as_py(maps_as_pydicts="strict")
            text = value if value is None or isinstance(value, str) else json.dumps(value)
            if text is not None:
                parse(text)
            texts.append(text)
        except (
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            RecursionError,
        ):  # a key twice, no JSON form, no JSON, too deep
            texts.append(None)
            bad[row] = True
    return pa.array(texts, pa.string()), bad


_JSON: Mapping[FeastType, Callable[[str], Any]] = {Map: parse_map, Array(Map): parse_maps, Json: json.loads}


def _checked_text(column: pa.Array, pattern: str) -> tuple[pa.Array, Mask]:
    """Text of a form, or what has it when it is written out: UUIDs, decimals and integers."""
    if _is_text(column.type):
        text = column.cast(pa.string())
    elif isinstance(column.type, pa.UuidType) or pa.types.is_decimal(column.type) or pa.types.is_integer(column.type):
        text = pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    else:
        return pa.nulls(len(column), pa.string()), _to_mask(column.is_valid())
    return text, ~_to_mask(pc.match_substring_regex(text, pattern).fill_null(True))


_UUID = r"^[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}$"
_DECIMAL = r"^[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,9})?|Infinity|NaN)$"
_TEXTS: Mapping[FeastType, str] = {Uuid: _UUID, TimeUuid: _UUID, Decimal: _DECIMAL}


def _timestamps(column: pa.Array) -> tuple[pa.Array, Mask]:
    """Times of any form that is one, within the years 1 to 9999, which are all that Python has."""
    if pa.types.is_timestamp(column.type):
        if column.type.tz is None:
            column = pc.assume_timezone(column, "UTC")
        moments, bad = column.cast(TIMESTAMP, safe=False), np.zeros(len(column), dtype=bool)
    elif _is_text(column.type):
        moments, bad = parse_timestamps(column.cast(pa.string()))
    else:
        return pa.nulls(len(column), TIMESTAMP), _to_mask(column.is_valid())
    microseconds = moments.view(pa.int64())
    extremes = pc.min_max(microseconds).as_py()
    if extremes["min"] is None or (extremes["min"] >= _EARLIEST_US and extremes["max"] <= _LATEST_US):
        return moments, bad
    within = pc.and_(pc.greater_equal(microseconds, _EARLIEST_US), pc.less_equal(microseconds, _LATEST_US))
    return moments, bad | ~_to_mask(within.fill_null(True))


_EARLIEST_US = pa.scalar(datetime(1, 1, 1, tzinfo=UTC), TIMESTAMP).value
_LATEST_US = pa.scalar(datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), TIMESTAMP).value


def _may_cast(source: pa.DataType, target: pa.DataType) -> bool:
    """Whether values of one type can stand for another: numbers for numbers, text for text."""
    kinds: list[Callable[[pa.DataType], bool]] = [
        lambda t: pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t),
        _is_text,
        lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_fixed_size_binary(t),
        pa.types.is_boolean,
    ]
    return any(kind(source) and kind(target) for kind in kinds)


def _cast_or_null(column: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast; where the whole column cannot be cast, halve it until the bad values stand alone and become null."""
    try:
        return column.cast(target, safe=not _narrows_float(column.type, target))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if len(column) <= 1:
            return pa.nulls(len(column), target)
        middle = len(column) // 2
        return pa.concat_arrays([_cast_or_null(column[:middle], target), _cast_or_null(column[middle:], target)])


def _narrows_float(source: pa.DataType, target: pa.DataType) -> bool:
    """Rounding to a narrower float is what the view asks for, so a safe cast would be wrong there."""
    numeric = pa.types.is_floating(source) or pa.types.is_integer(source)
    return bool(numeric and pa.types.is_floating(target))


def _check_nulls(contract: ViewContract, column: pa.Array, field: pa.Field, rule: Rule, faults: _Faults) -> None:
    if column.null_count == 0:
        return
    if must_not_be_null(contract, field.name) or (rule.nullable is False and rule.severity is Severity.ERROR):
        faults.add(
            _to_mask(column.is_null()), Reason.NULL, field.name, lambda _: f"field `{field.name}` must not be null"
        )


def _check_rule(column: pa.Array, rule: Rule, faults: _Faults) -> None:
    if rule.severity is Severity.WARNING:
        return
    bad = broken(column, rule)
    if bad is not None and bad.any():
        wanted = str(rule)
        faults.add(
            bad,
            Reason.OUT_OF_RANGE,
            rule.column,
            lambda row: f"field `{rule.column}`: expected {wanted}, found {_shown(column[row])}",
        )


def must_not_be_null(contract: ViewContract, column: str) -> bool:
    """Whether a null is an error whatever the rules say: join keys and the event time make a row what it is."""
    return column in (*contract.join_keys, contract.timestamp_field)


def broken(column: pa.Array, rule: Rule) -> Mask | None:
    """Which values break the bounds and the list of a rule, whatever its severity; None where it has neither.

    A null breaks none, NaN every bound.
    """
    limits = ((rule.ge, np.greater_equal), (rule.le, np.less_equal), (rule.gt, np.greater), (rule.lt, np.less))
    bounds = [(bound, satisfies) for bound, satisfies in limits if bound is not None]
    bad: Mask | None = None
    if bounds:
        numbers = _as_numbers(column)
        bad = ~np.logical_and.reduce([satisfies(numbers, bound) for bound, satisfies in bounds])
    if rule.isin is not None:
        foreign = ~_to_mask(pc.is_in(column.cast(pa.string()), pa.array(rule.isin, pa.string())))
        bad = foreign if bad is None else bad | foreign
    return bad if bad is None or column.null_count == 0 else bad & _to_mask(column.is_valid())


def _check_future(
    contract: ViewContract, columns: list[pa.Array], now_us: int, max_future_us: int, faults: _Faults
) -> None:
    times = columns[contract.schema.get_field_index(contract.timestamp_field)]
    microseconds, bound_us = times.view(pa.int64()), now_us + max_future_us
    latest_us = pc.max(microseconds).as_py()
    if latest_us is not None and latest_us > bound_us:
        bad = _to_mask(pc.greater(microseconds, bound_us).fill_null(False))
        faults.add(
            bad,
            Reason.FUTURE_EVENT,
            contract.timestamp_field,
            lambda row: (
                f"field `{contract.timestamp_field}`: dated {times[row].as_py()}, "
                f"more than {max_future_us / 1e6:g} s ahead of the clock"
            ),
        )


def _shown(value: pa.Scalar) -> str:
    """A value for a message: its repr, shortened."""
    try:
        text = repr(value.as_py())
    except (OverflowError, ValueError):  # a time that Python does not have
        text = f"a value of {value.type} that is out of range"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_nested(kind: pa.DataType) -> bool:
    return _is_list(kind) or pa.types.is_struct(kind)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _as_numbers(column: pa.Array) -> npt.NDArray[np.float64]:
    """Numbers of any type as `float64`; NaN for null."""
    numbers: npt.NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers


def _to_mask(values: pa.Array) -> Mask:
    """A boolean Arrow array without nulls as a NumPy mask."""
    mask: Mask = np.asarray(values.to_numpy(zero_copy_only=False), dtype=bool)
    return mask
