"""A source's columns held against the view's: which are read, in which type, and which cannot be meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa
from feast.types import (
    Array,
    Bool,
    Bytes,
    Decimal,
    FeastType,
    ImageBytes,
    Json,
    Map,
    PdfBytes,
    Set,
    String,
    Struct,
    TimeUuid,
    UnixTimestamp,
    Uuid,
)

from batch.sources.odd import ODD
from headrace.contract import TIMESTAMP, ViewContract
from headrace.errors import ConfigError, SchemaError


class Kind(StrEnum):
    """What a column of a source is meant to hold."""

    NUMBER = "a number"
    TEXT = "a text"
    BOOLEAN = "a boolean"
    TIME = "a time"
    BINARY = "bytes"
    JSON = "JSON"
    LIST = "a list"
    OTHER = "something else"


@dataclass(frozen=True)
class Column:
    """A column of a source.

    Attributes:
        declared: its type, as the source has it.
        kind: what it is meant to hold; None where the source does not say.
        wide: the Arrow type in which a transformation gets it: the widest of its kind, so that what is out of the
            view's range is seen as such and named. Text for times that the source keeps as text.
    """

    name: str
    declared: str
    kind: Kind | None
    wide: pa.DataType


@dataclass(frozen=True)
class Chosen:
    """What is read of a source.

    Attributes:
        schema: of the rows: the columns wanted, in wide types, and `__odd__`.
        ignored: columns of the source that the view does not know.
    """

    schema: pa.Schema
    ignored: tuple[str, ...]


def choose(
    contract: ViewContract, what: str, columns: Sequence[Column], window_column: str | None, *, times_are_text: bool
) -> Chosen:
    """Hold the columns of a source, called `what` in messages, against the view's.

    A transformation may make columns, and may want any that exist: all are read, none is missed or judged.

    Args:
        window_column: the column that tells the day of a row; None if none does.
        times_are_text: whether a text may stand for a time, as where the source has no type for times.

    Raises:
        SchemaError: the source lacks columns that the view wants, or has one that cannot be what the view wants.
        ConfigError: the window's column is no time.
    """
    transformed = contract.transform is not None
    by_name = {column.name: column for column in columns}
    missing = [name for name in contract.schema.names if name not in by_name and not transformed]
    if window_column is not None and window_column not in by_name and window_column not in missing:
        missing.append(window_column)
    if missing:
        msg = (
            f"{what} does not fit feature view `{contract.name}`: "
            f"the view wants {', '.join(contract.schema.names)}; "
            f"it has {', '.join(by_name) or 'no column'}; it lacks {', '.join(missing)}; nothing was read: "
            "add the columns to the source, or change the view and apply"
        )
        raise SchemaError(msg)
    if window_column is not None and not _may_be(by_name[window_column], UnixTimestamp, times_are_text):
        msg = (
            f"column `{window_column}` of {what} tells the day of a row, but its type is "
            f"{by_name[window_column].declared}; expected a timestamp"
        )
        raise ConfigError(msg)
    if not transformed:
        _judge(contract, what, by_name, times_are_text)
    fields = [
        pa.field(name, column.wide if transformed else _wide(column, contract))
        for name, column in by_name.items()
        if transformed or name in contract.schema.names
    ]
    ignored = () if transformed else tuple(name for name in by_name if name not in contract.schema.names)
    return Chosen(pa.schema([*fields, pa.field(ODD, pa.string())]), ignored)


def _judge(contract: ViewContract, what: str, columns: dict[str, Column], times_are_text: bool) -> None:
    wrong = [
        f"`{name}` is {columns[name].declared} ({columns[name].kind}) there and {_dtype(contract, name)} in the view"
        for name in contract.schema.names
        if not _may_be(columns[name], _dtype(contract, name), times_are_text)
    ]
    if wrong:
        msg = (
            f"{what} does not fit feature view `{contract.name}`: column {', column '.join(wrong)}; nothing was read: "
            "change the type of the column, or the view and apply"
        )
        raise SchemaError(msg)


def _may_be(column: Column, dtype: FeastType, times_are_text: bool) -> bool:
    """Whether values of a column can stand for a Feast type."""
    if column.kind is None or (dtype == UnixTimestamp and column.kind == Kind.TEXT and times_are_text):
        return True
    return column.kind in _kinds(dtype)


def _kinds(dtype: FeastType) -> set[Kind]:
    if dtype == UnixTimestamp:
        return {Kind.TIME}
    if dtype == Bool:
        return {Kind.BOOLEAN, Kind.NUMBER}
    if dtype == Json:
        return set(Kind) - {Kind.BINARY, Kind.TIME}
    if dtype in (Map, Array(Map)) or isinstance(dtype, Array | Set | Struct):
        return {Kind.JSON, Kind.LIST, Kind.TEXT, Kind.OTHER}
    if dtype == Decimal:
        return {Kind.TEXT, Kind.NUMBER}
    if dtype in (String, Uuid, TimeUuid):
        return {Kind.TEXT, Kind.JSON, Kind.OTHER}
    return {Kind.BINARY} if dtype in (Bytes, ImageBytes, PdfBytes) else {Kind.NUMBER}


def _dtype(contract: ViewContract, name: str) -> FeastType:
    is_time = name in (contract.timestamp_field, contract.created_field)
    return UnixTimestamp if is_time else contract.dtype(name)


def _wide(column: Column, contract: ViewContract) -> pa.DataType:
    """The type in which a column that the view knows is read."""
    target = contract.schema.field(column.name).type
    if pa.types.is_timestamp(target):
        return TIMESTAMP if column.wide == TIMESTAMP else pa.string()
    if pa.types.is_string(target) and pa.types.is_integer(column.wide) and column.kind == Kind.NUMBER:
        return column.wide  # for a Decimal, which takes integers
    return widest(target)


def widest(target: pa.DataType) -> pa.DataType:
    """The widest type of a kind. Times in lists are text, which is what JSON has for them."""
    if pa.types.is_integer(target):
        return pa.int64()
    if pa.types.is_floating(target):
        return pa.float64()
    if pa.types.is_list(target):
        inner = target.value_type
        return pa.list_(pa.string() if pa.types.is_timestamp(inner) else widest(inner))
    return target
