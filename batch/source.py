"""Read one day of a database table as Arrow, in chunks, through SQLAlchemy; read-only, with bounded memory.

SQLite keeps times as text and lets any column hold any value. So that a single odd value costs one row and
not the day, a column is read in its wide type (int64, double, text, ...), and a value that does not fit it
is null there and goes, as text, to the column `__odd__`: a JSON object of the row's odd values by column.
`Clean` puts it back before it judges.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, NoSuchTableError

from batch.settings import BatchSettings
from headrace.contract import TIMESTAMP, ViewContract
from headrace.errors import ConfigError, SchemaError, TransientError

ODD = "__odd__"
"""The extra column of raw Parquet: JSON text, null for a row whose values all fit their columns."""


@dataclass(frozen=True)
class Source:
    """A view's table, looked at and found fit. Holds no connection.

    Attributes:
        schema: of the rows that `read` yields: the columns wanted, in wide types, and `__odd__`.
        window_column: the column whose time says to which day a row belongs.
        ignored: columns of the table that the view does not know.
    """

    engine: sa.Engine
    table: str
    schema: pa.Schema
    window_column: str
    ignored: tuple[str, ...]

    def read(self, day: date, chunk_rows: int) -> Iterator[pa.Table]:
        """Yield the rows of a day, `[day 00:00, next day 00:00)` UTC, in chunks.

        All are of one state of the table. Memory: one chunk.

        Raises:
            TransientError: the database cannot be reached or ended the read.
        """
        wanted = self.schema.names[:-1]
        columns: list[sa.ColumnElement[Any]] = [sa.column(name) for name in wanted]
        statement = sa.select(*columns).select_from(self._from).where(self._of(day))
        with self._connected() as connection:
            streamed = connection.execution_options(stream_results=True, max_row_buffer=chunk_rows)
            for rows in streamed.execute(statement).partitions(chunk_rows):
                yield to_arrow(rows, self.schema)

    def rows_of_no_day(self) -> int:
        """How many rows of the table no day reads: those without a time in the window's column."""
        column: sa.ColumnElement[Any] = sa.column(self.window_column)
        unreadable: sa.ColumnElement[bool] = column.is_(None)
        if self.engine.dialect.name == "sqlite":
            dated = column.op("GLOB")("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*")
            unreadable = unreadable | (sa.func.typeof(column) != "text") | ~dated
        with self._connected() as connection:
            statement = sa.select(sa.func.count()).select_from(self._from).where(unreadable)
            return int(connection.execute(statement).scalar_one())

    @property
    def _from(self) -> sa.TableClause:
        schema, name = split_table(self.table)
        return sa.table(name, schema=schema)

    def _connected(self) -> _Connection:
        return _Connection(self.engine)

    def _of(self, day: date) -> sa.ColumnElement[bool]:
        """The condition for a row to be of a day.

        SQLite compares times as text. The range of prefixes, a day wider on both sides, can use an index
        whatever the offsets in the text; `datetime` then decides. Text that begins like the day but is no
        time is read with it, so that `Clean` can say what is wrong with it.
        """
        column: sa.ColumnElement[Any] = sa.column(self.window_column)
        start, stop = day, day + timedelta(days=1)
        if self.engine.dialect.name != "sqlite":
            lower = datetime(start.year, start.month, start.day, tzinfo=UTC)
            upper = lower + timedelta(days=1)
            if not self._window_has_zone():
                lower, upper = lower.replace(tzinfo=None), upper.replace(tzinfo=None)
            return (column >= lower) & (column < upper)
        moment = sa.func.datetime(column)
        near = (column >= str(start - timedelta(days=1))) & (column < str(stop + timedelta(days=1)))
        within = (moment >= f"{start} 00:00:00") & (moment < f"{stop} 00:00:00")
        unreadable = moment.is_(None) & (column >= str(start)) & (column < str(stop))
        return near & (within | unreadable)

    def _window_has_zone(self) -> bool:
        schema, name = split_table(self.table)
        columns = sa.inspect(self.engine).get_columns(name, schema=schema)
        return any(bool(getattr(c["type"], "timezone", False)) for c in columns if c["name"] == self.window_column)


class _Connection:
    """A read-only connection with one snapshot; what the driver raises becomes ours."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def __enter__(self) -> sa.Connection:
        try:
            connection = self._engine.connect()
        except DBAPIError as error:
            raise _unreachable(error) from None
        if self._engine.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        elif self._engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA query_only = 1")
        self._connection = connection
        return connection

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._connection.close()
        if isinstance(error, DBAPIError):
            raise _unreachable(error) from None


def open_source(settings: BatchSettings, contract: ViewContract) -> Source:
    """Look at a view's table before anything is read.

    Raises:
        ConfigError: no URL, no database, no such table, or no column that tells the day.
        SchemaError: the table lacks columns that the view wants.
        TransientError: the database does not answer.
    """
    table = contract.source_table
    if table is None:
        msg = (
            f"feature view `{contract.name}` has no source table; "
            'name it in the view\'s tags, as in tags={"source_table": "<table>"}, and apply'
        )
        raise ConfigError(msg)
    engine = _engine(settings.source_url)
    schema, name = split_table(table)
    inspector_error: DBAPIError | None = None
    try:
        inspector = sa.inspect(engine)
        columns = {c["name"]: c["type"] for c in inspector.get_columns(name, schema=schema)}
    except NoSuchTableError:
        columns = {}
    except DBAPIError as error:
        inspector_error = error
    if inspector_error is not None:
        raise _unreachable(inspector_error)
    if not columns:
        known = sorted([*inspector.get_table_names(schema=schema), *inspector.get_view_names(schema=schema)])
        msg = (
            f"feature view `{contract.name}` reads table `{table}`, which the source database does not have; "
            f"it has: {', '.join(known) or 'no table at all'}; "
            "correct the view's tag source_table or HEADRACE_SOURCE_URL"
        )
        raise ConfigError(msg)
    window_column = _window_column(settings, contract)
    return _fit(engine, contract, table, columns, window_column)


def _fit(engine: sa.Engine, contract: ViewContract, table: str, columns: dict[str, Any], window_column: str) -> Source:
    """Hold the table's columns against the view's.

    A transformation may make columns, and may want any that exist: all are read, none is missed.
    """
    transformed = contract.transform is not None
    missing = [name for name in contract.schema.names if name not in columns]
    if window_column not in columns or (missing and not transformed):
        lacks = missing if window_column in columns else sorted({*missing, window_column})
        msg = (
            f"table `{table}` does not fit feature view `{contract.name}`: "
            f"the view wants {', '.join(contract.schema.names)}; "
            f"the table has {', '.join(columns)}; it lacks {', '.join(lacks)}; nothing was read: "
            "add the columns to the table, or change the view and apply"
        )
        raise SchemaError(msg)
    is_sqlite = engine.dialect.name == "sqlite"
    if not is_sqlite and not isinstance(columns[window_column], sa.DateTime):
        msg = (
            f"column `{window_column}` of table `{table}` tells the day of a row, but its type is "
            f"{columns[window_column]}; expected a timestamp"
        )
        raise ConfigError(msg)
    fields = []
    ignored = []
    for name, kind in columns.items():
        if transformed:
            fields.append(pa.field(name, _declared(kind, is_sqlite)))
        elif name in contract.schema.names:
            fields.append(pa.field(name, _wide(contract.schema.field(name).type, is_sqlite)))
        else:
            ignored.append(name)
    return Source(engine, table, pa.schema([*fields, pa.field(ODD, pa.string())]), window_column, tuple(ignored))


def to_arrow(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    """Rows of Python values to a table of `schema`, whose last column is `__odd__`. No value is lost."""
    odd: dict[int, dict[str, str]] = {}
    arrays = []
    for field, values in zip(schema, zip(*rows, strict=True), strict=False):
        array, misfits = _column(values, field.type)
        arrays.append(array)
        for row, text in misfits.items():
            odd.setdefault(row, {})[field.name] = text
    notes = [json.dumps(odd[row]) if row in odd else None for row in range(len(rows))]
    return pa.Table.from_arrays([*arrays, pa.array(notes, pa.string())], schema=schema)


def split_table(table: str) -> tuple[str | None, str]:
    """`schema.table` or `table`."""
    schema, _, name = table.rpartition(".")
    return schema or None, name


_NO_LIST = 0
"""Fits no list, whatever its items."""


def _column(values: Sequence[Any], kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """A column in its type, and the text of the values that do not fit it, by row."""
    prepared = values if pa.types.is_string(kind) else [_prepare(value, kind) for value in values]
    try:
        return pa.array(prepared, kind), {}
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        OverflowError,
        TypeError,
        ValueError,
    ):
        pass
    fitting: list[Any] = []
    misfits: dict[int, str] = {}
    for row, value in enumerate(prepared):
        try:
            fitting.append(pa.array([value], kind)[0].as_py())
        except (
            pa.ArrowInvalid,
            pa.ArrowTypeError,
            pa.ArrowNotImplementedError,
            OverflowError,
            TypeError,
            ValueError,
        ):
            fitting.append(None)
            misfits[row] = _text(values[row])
    return pa.array(fitting, kind), misfits


def _prepare(value: Any, kind: pa.DataType) -> Any:
    """What stands in for a value in a database without the type: 0 and 1 for a boolean, JSON for a list.

    Arrow cuts a fraction and takes a boolean for a number without a word: such values become text, which is odd.
    """
    if pa.types.is_boolean(kind):
        return bool(value) if type(value) is int and value in (0, 1) else value
    if pa.types.is_integer(kind) and isinstance(value, float | Decimal):
        return int(value) if math.isfinite(value) and value == int(value) else str(value)
    if pa.types.is_floating(kind) and isinstance(value, int | Decimal):
        return str(value) if isinstance(value, bool) else float(value)
    if pa.types.is_list(kind) and value is not None:
        return _prepare_list(value, kind.value_type)
    return value


def _prepare_list(value: Any, kind: pa.DataType) -> Any:
    """A list of prepared items, from JSON where it is text. What is no list is odd: Arrow would take letters."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return _NO_LIST
    return [_prepare(item, kind) for item in value] if isinstance(value, list | tuple) else _NO_LIST


def _text(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return repr(bytes(value))
    return value if isinstance(value, str) else str(value)


def _wide(target: pa.DataType, is_sqlite: bool) -> pa.DataType:
    """The widest type of a kind, so that what is out of the view's range is seen as such and named."""
    if pa.types.is_timestamp(target):
        return pa.string() if is_sqlite else TIMESTAMP
    if pa.types.is_integer(target):
        return pa.int64()
    if pa.types.is_floating(target):
        return pa.float64()
    if pa.types.is_list(target):
        inner = target.value_type
        return pa.list_(pa.string() if pa.types.is_timestamp(inner) else _wide(inner, is_sqlite))
    return target


def _declared(kind: sa.types.TypeEngine[Any], is_sqlite: bool) -> pa.DataType:
    """The Arrow type of a column as the table declares it, for a transformation."""
    if isinstance(kind, sa.Boolean):
        return pa.bool_()
    if isinstance(kind, sa.Integer):
        return pa.int64()
    if isinstance(kind, sa.Numeric):
        return pa.float64()
    if isinstance(kind, sa.DateTime):
        return pa.string() if is_sqlite else TIMESTAMP
    if isinstance(kind, sa.LargeBinary):
        return pa.binary()
    return pa.string()


def _window_column(settings: BatchSettings, contract: ViewContract) -> str:
    if settings.window == "event":
        return contract.timestamp_field
    if contract.created_field is None:
        msg = (
            f"feature view `{contract.name}` has no created timestamp, by which the day of arrival is told; "
            "give its FileSource a created_timestamp_column, or set HEADRACE_WINDOW=event"
        )
        raise ConfigError(msg)
    return contract.created_field


def _engine(url: SecretStr | None) -> sa.Engine:
    """An engine that keeps no connection. A SQLite file is opened read-only: never made by accident."""
    if url is None:
        msg = "no source database: set HEADRACE_SOURCE_URL, for example to sqlite:///data/source.db"
        raise ConfigError(msg)
    try:
        parsed = sa.make_url(url.get_secret_value())
    except ArgumentError:
        msg = (
            "HEADRACE_SOURCE_URL is no SQLAlchemy URL, such as sqlite:///data/source.db or postgresql://user@host/name"
        )
        raise ConfigError(msg) from None
    if parsed.get_backend_name() == "sqlite":
        path = Path(parsed.database or "").resolve()
        if not path.is_file():
            msg = (
                f"HEADRACE_SOURCE_URL names the SQLite database {path}, which does not exist; "
                "create it, or correct the path (a relative one starts in the working directory)"
            )
            raise ConfigError(msg)
        address = f"file:{quote(str(path))}?mode=ro"
        return sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=sa.NullPool)
    try:
        return sa.create_engine(parsed, poolclass=sa.NullPool)
    except NoSuchModuleError:
        msg = f"HEADRACE_SOURCE_URL: SQLAlchemy knows no `{parsed.drivername}`; correct the URL's first part"
        raise ConfigError(msg) from None
    except ModuleNotFoundError as error:
        msg = f"HEADRACE_SOURCE_URL: no driver for `{parsed.drivername}`; run: pip install {error.name}"
        raise ConfigError(msg) from None


def _unreachable(error: DBAPIError) -> TransientError:
    """The driver's own words, without the statement, its values, or the URL."""
    reason = " ".join(str(error.orig).split())
    return TransientError(f"the source database at HEADRACE_SOURCE_URL could not be read: {reason}; it is tried again")
