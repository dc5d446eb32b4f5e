"""A database table as a source, through SQLAlchemy: of every database but PostgreSQL (`batch.sources.postgres`)."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, NoSuchModuleError, NoSuchTableError

from batch.sources.columns import Column, Kind, choose
from batch.sources.odd import to_arrow
from headrace.contract import TIMESTAMP, ViewContract
from headrace.errors import ConfigError, TransientError

LOOKED_AT = 1_000_000
"""How many rows are looked at to count those of no day, where no index tells them."""


@dataclass(frozen=True)
class Table:
    """A view's table, looked at and found fit; a `batch.source.Source`. Holds no connection.

    Attributes:
        has_zone, has_null, is_indexed: of the window's column: whether its times have a zone, whether it may lack a
            time, and whether an index begins with it.
    """

    engine: sa.Engine
    table: str
    columns: dict[str, str]
    schema: pa.Schema
    window_column: str
    ignored: tuple[str, ...]
    has_zone: bool
    has_null: bool
    is_indexed: bool

    @property
    def name(self) -> str:
        """The table's."""
        return self.table

    def read(self, day: date, chunk_rows: int) -> Iterator[pa.Table]:
        """As `Source.read`, with one statement."""
        columns: list[sa.ColumnElement[Any]] = [sa.column(name) for name in self.schema.names[:-1]]
        statement = sa.select(*columns).select_from(self._from).where(self._of(day))
        with self._connected() as connection:
            chunks = _sqlite_chunks if self._is_sqlite else _chunks
            for rows in chunks(connection, statement, chunk_rows):
                yield to_arrow(rows, self.schema)

    def rows_of_no_day(self) -> int | None:
        """As `Source.rows_of_no_day`. Costs a look at an index, or at `LOOKED_AT` rows at most."""
        if not self.has_null:
            return 0
        column: sa.ColumnElement[Any] = sa.column(self.window_column)
        with self._connected() as connection:
            if self.is_indexed:
                found = sa.select(sa.literal(1)).select_from(self._from).where(self._out_of_order(column))
                return int(connection.execute(_count(found.limit(LOOKED_AT))).scalar_one())
            some = sa.select(column).select_from(self._from).limit(LOOKED_AT + 1).subquery()
            unreadable = sa.func.sum(sa.case((self._is_of_no_day(column), 1), else_=0))
            rows, lost = connection.execute(sa.select(sa.func.count(), unreadable).select_from(some)).one()
            return int(lost or 0) if rows <= LOOKED_AT else None

    def describe(self) -> dict[str, Any]:
        """For the receipt: nothing more than the name."""
        return {}

    @property
    def _from(self) -> sa.TableClause:
        schema, name = split_table(self.table)
        return sa.table(name, schema=schema)

    @property
    def _is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

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
        if not self._is_sqlite:
            lower = datetime(start.year, start.month, start.day, tzinfo=UTC)
            if not self.has_zone:
                lower = lower.replace(tzinfo=None)
            return (column >= lower) & (column < lower + timedelta(days=1))
        moment = sa.func.datetime(column)
        near = (column >= str(start - timedelta(days=1))) & (column < str(stop + timedelta(days=1)))
        within = (moment >= f"{start} 00:00:00") & (moment < f"{stop} 00:00:00")
        unreadable = moment.is_(None) & (column >= str(start)) & (column < str(stop))
        return near & (within | unreadable)

    def _is_of_no_day(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        if not self._is_sqlite:
            return column.is_(None)
        dated = column.op("GLOB")("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*")
        return column.is_(None) | (sa.func.typeof(column) != "text") | ~dated

    def _out_of_order(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        """What an index finds of it: SQLite has nulls before numbers before texts before bytes.

        The bounds are the texts around those that begin with a digit. Neither looks like a number, to which SQLite
        would turn it in a column that it takes for numeric, as it does one of times.
        """
        if not self._is_sqlite:
            return column.is_(None)
        return column.is_(None) | (column < "/\U0010ffff") | (column >= ":")


def _chunks(connection: sa.Connection, statement: sa.Select[Any], rows: int) -> Iterator[Sequence[Sequence[Any]]]:
    streamed = connection.execution_options(stream_results=True, max_row_buffer=rows)
    return streamed.execute(statement).partitions(rows)


def _sqlite_chunks(
    connection: sa.Connection, statement: sa.Select[Any], rows: int
) -> Iterator[Sequence[Sequence[Any]]]:
    """As `_chunks`, past SQLAlchemy, which makes an object of each row and takes as long for it as reading does."""
    cursor = connection.connection.cursor()
    cursor.execute(str(statement.compile(connection, compile_kwargs={"literal_binds": True})))
    while chunk := cursor.fetchmany(rows):
        yield chunk


def _count(statement: sa.Select[Any]) -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(statement.subquery())


class _Connection:
    """A read-only connection with one snapshot, as far as the database can; what the driver raises becomes ours."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def __enter__(self) -> sa.Connection:
        connection = None
        try:
            connection = self._engine.connect()
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA query_only = 1")
            elif self._engine.dialect.name in ("mysql", "mariadb"):
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
                connection.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")
                connection.rollback()  # the transaction that follows is one
        except DBAPIError as error:
            if connection is not None:
                connection.close()
            raise _unreachable(error) from None
        self._connection = connection
        return connection

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._connection.close()
        if isinstance(error, DBAPIError):
            raise _unreachable(error) from None
        if isinstance(error, sqlite3.Error):
            raise unreachable(str(error)) from None


def open_table(url: sa.URL, contract: ViewContract, table: str, window_column: str) -> Table:
    """Look at a view's table before anything is read.

    Raises:
        ConfigError: no database, no such table, or no column that tells the day.
        SchemaError: as `choose`.
        TransientError: the database does not answer.
    """
    engine = _engine(url)
    schema, name = split_table(table)
    inspector_error: DBAPIError | None = None
    is_indexed = False
    try:
        inspector = sa.inspect(engine)
        found = inspector.get_columns(name, schema=schema)
        indexes = [index["column_names"] for index in inspector.get_indexes(name, schema=schema)]
        primary: list[str | None] = [*inspector.get_pk_constraint(name, schema=schema)["constrained_columns"]]
        is_indexed = any(index[:1] == [window_column] for index in [*indexes, primary])
    except NoSuchTableError:
        found = []
    except DBAPIError as error:
        inspector_error = error
    if inspector_error is not None:
        raise _unreachable(inspector_error)
    if not found:
        known = sorted([*inspector.get_table_names(schema=schema), *inspector.get_view_names(schema=schema)])
        raise no_such_table(contract, table, known)
    is_sqlite = engine.dialect.name == "sqlite"
    columns = [_column(c["name"], c["type"], engine.dialect, is_sqlite) for c in found]
    chosen = choose(contract, f"table `{table}`", columns, window_column, times_are_text=is_sqlite)
    window = next(c for c in found if c["name"] == window_column)
    return Table(
        engine=engine,
        table=table,
        columns={column.name: column.declared for column in columns},
        schema=chosen.schema,
        window_column=window_column,
        ignored=chosen.ignored,
        has_zone=bool(getattr(window["type"], "timezone", False)),
        # SQLite keeps in a column that is not null whatever else is no time.
        has_null=is_sqlite or bool(window.get("nullable", True)),
        is_indexed=is_indexed,
    )


def no_such_table(contract: ViewContract, table: str, known: list[str]) -> ConfigError:
    """Names the tables that there are."""
    return ConfigError(
        f"feature view `{contract.name}` reads table `{table}`, which the source database does not have; "
        f"it has: {', '.join(known) or 'no table at all'}; "
        "correct the view's tag source_table or HEADRACE_SOURCE_URL"
    )


def split_table(table: str) -> tuple[str | None, str]:
    """`schema.table` or `table`."""
    schema, _, name = table.rpartition(".")
    return schema or None, name


def unreachable(reason: str) -> TransientError:
    """The driver's own words, in one line."""
    reason = " ".join(reason.split())
    return TransientError(f"the source database at HEADRACE_SOURCE_URL could not be read: {reason}; it is tried again")


def _unreachable(error: DBAPIError) -> TransientError:
    """Without the statement, its values, or the URL."""
    return unreachable(str(error.orig))


def _column(name: str, kind: sa.types.TypeEngine[Any], dialect: sa.Dialect, is_sqlite: bool) -> Column:
    """What a table's column is meant to hold.

    SQLite keeps anything in a column without a type, and any text in one whose type it does not know, which is numeric
    to it.
    """
    try:
        declared = str(kind.compile(dialect))
    except sa.exc.CompileError:
        declared = str(kind)
    loose = is_sqlite and (isinstance(kind, sa.types.NullType | sa.Boolean) or type(kind) is sa.NUMERIC)
    means, wide = _meaning(kind, is_sqlite)
    return Column(name, declared, None if loose or isinstance(kind, sa.types.NullType) else means, wide)


def _meaning(kind: sa.types.TypeEngine[Any], is_sqlite: bool) -> tuple[Kind, pa.DataType]:
    if isinstance(kind, sa.Boolean):
        return Kind.BOOLEAN, pa.bool_()
    if isinstance(kind, sa.Integer):
        return Kind.NUMBER, pa.int64()
    if isinstance(kind, sa.Float):  # no longer a Numeric since SQLAlchemy 2.1
        return Kind.NUMBER, pa.float64()
    if isinstance(kind, sa.Numeric):
        return Kind.NUMBER, pa.int64() if kind.scale == 0 and not is_sqlite else pa.float64()
    if isinstance(kind, sa.DateTime):
        return Kind.TIME, pa.string() if is_sqlite else TIMESTAMP
    if isinstance(kind, sa.LargeBinary | sa.types.BINARY | sa.types.VARBINARY):
        return Kind.BINARY, pa.binary()
    if isinstance(kind, sa.JSON):
        return Kind.JSON, pa.string()
    if isinstance(kind, sa.ARRAY):
        return Kind.LIST, pa.string()
    if isinstance(kind, sa.String | sa.Uuid) or (is_sqlite and isinstance(kind, sa.Date)):
        return Kind.TEXT, pa.string()
    return Kind.OTHER, pa.string()


def _engine(url: sa.URL) -> sa.Engine:
    """An engine that keeps no connection. A SQLite file is opened read-only: never made by accident."""
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "").resolve()
        if not path.is_file():
            msg = (
                f"HEADRACE_SOURCE_URL names the SQLite database {path}, which does not exist; "
                "create it, or correct the path (a relative one starts in the working directory)"
            )
            raise ConfigError(msg)
        return sa.create_engine("sqlite://", creator=functools.partial(_open_sqlite, path), poolclass=sa.NullPool)
    try:
        return sa.create_engine(url, poolclass=sa.NullPool)
    except NoSuchModuleError:
        msg = f"HEADRACE_SOURCE_URL: SQLAlchemy knows no `{url.drivername}`; correct the URL's first part"
        raise ConfigError(msg) from None
    except ModuleNotFoundError as error:
        msg = f"HEADRACE_SOURCE_URL: no driver for `{url.drivername}`; run: pip install {error.name}"
        raise ConfigError(msg) from None


def _open_sqlite(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
    # What is no UTF-8 costs its row and not the day.
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    return connection
