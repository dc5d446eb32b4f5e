"""A PostgreSQL table as a source, through ADBC: Arrow straight from the stream of `COPY ... (FORMAT binary)`.

Everything is read in a read-only transaction of one snapshot. A large day is read as several ranges of the window's
column at once, each by a connection of its own that takes over the snapshot; in what the server counts its own work,
the ranges together must cost hardly more than the whole, which without an index on that column they would.

The table is locked (ACCESS SHARE, as any SELECT does) *before* the snapshot is taken. Else an ALTER TABLE or TRUNCATE
that is under way could end between the two, and the table would look empty.

What ADBC cannot give exactly, the server gives as text, and `batch.sources.odd` reads it: numerics, UUIDs, JSON,
enums. Arrays of more than one dimension, which ADBC would flatten, are odd where a list is wanted, infinite times where
a time is.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from batch.sources.columns import Column, Kind, choose
from batch.sources.odd import ODD, fit, one_chunk
from batch.sources.table import LOOKED_AT, no_such_table, split_table, unreachable
from headrace.contract import TIMESTAMP, ViewContract
from headrace.errors import ConfigError, HeadraceError, TransientError
from headrace.scan import quoted

_LARGE = 1_000_000
"""From how many rows, in the planner's estimate, a day is read as several ranges."""
_STREAMS = min(4, os.cpu_count() or 1)
"""How many ranges are read at once."""
_RANGES_PER_STREAM = 4
"""Rows are not even over a day: who is done early takes another range."""
_SESSION = """
    SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY{snapshot};
    SET LOCAL client_encoding = 'UTF8';
    SET LOCAL TimeZone = 'UTC';
    SET LOCAL DateStyle = 'ISO';
    SET LOCAL extra_float_digits = 3
"""
_COLUMNS = """
    WITH RECURSIVE base(attnum, oid) AS (
        SELECT attnum, atttypid FROM pg_attribute WHERE attrelid = {table} AND attnum > 0 AND NOT attisdropped
        UNION ALL
        SELECT base.attnum, t.typbasetype FROM base JOIN pg_type t ON t.oid = base.oid WHERE t.typtype = 'd'
    )
    SELECT
        a.attname::text, format_type(a.atttypid, a.atttypmod),
        CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN t.typname::text ELSE t.typtype::text END,
        CASE WHEN i.typnamespace = 'pg_catalog'::regnamespace THEN i.typname::text ELSE i.typtype::text END,
        t.typcategory::text,
        EXISTS (SELECT FROM pg_index x WHERE x.indrelid = {table} AND x.indkey[0] = a.attnum AND x.indisvalid
            AND x.indpred IS NULL)
    FROM base
    JOIN pg_type t ON t.oid = base.oid AND t.typtype <> 'd'
    JOIN pg_attribute a ON a.attrelid = {table} AND a.attnum = base.attnum
    LEFT JOIN pg_type i ON i.oid = t.typelem AND t.typcategory = 'A'
    ORDER BY a.attnum
"""
_INTEGERS = ("int2", "int4", "int8", "oid")
_FLOATS = ("float4", "float8")
_TEXTS = ("text", "varchar", "bpchar", "name")
_TIMES = ("timestamptz", "timestamp")
_NATIVE_ITEMS = ("int2", "int4", "int8", "float4", "float8", "bool", "text", "varchar", "bpchar", "name", "bytea")
_EPOCH_US = 946_684_800_000_000
"""PostgreSQL counts from 2000-01-01."""
_EARLIEST = pa.scalar(-210_866_803_200_000_000, pa.int64())
"""The earliest time that PostgreSQL has, 4713 BC: what is before it has gone round the end of 64 bits."""
_CYCLE_US = 146_097 * 86_400_000_000
"""400 years, after which the calendar repeats."""


@dataclass(frozen=True)
class _Field:
    """A column as the catalog has it: `base` is the name of its type, or its kind where it is no built-in one."""

    name: str
    declared: str
    base: str
    item: str | None
    category: str
    is_indexed: bool


@dataclass(frozen=True)
class PostgresTable:
    """A view's table, looked at and found fit. Holds no connection. The attributes are those of `batch.source.Source`.

    Attributes:
        streams: how many connections read a large day.
    """

    login: _Login = field(repr=False)
    table: str
    fields: Mapping[str, _Field]
    can_lock: bool
    schema: pa.Schema
    window_column: str
    ignored: tuple[str, ...]
    streams: int = _STREAMS

    @property
    def name(self) -> str:
        """The table's."""
        return self.table

    @property
    def columns(self) -> dict[str, str]:
        """All, with their types."""
        return {name: found.declared for name, found in self.fields.items()}

    def read(self, day: date, chunk_rows: int) -> Iterator[pa.Table]:
        """As `Source.read`. Memory: two batches a connection, of the 16 MB that ADBC makes them."""
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        with _transaction(self.login) as cursor:
            if self.can_lock:
                cursor.executescript(f"LOCK TABLE {self._from} IN ACCESS SHARE MODE")
            if _fields(cursor, self._from) != self.fields:
                msg = f"table `{self.table}` was altered while it was looked at; it is looked at again"
                raise TransientError(msg)
            ranges = self._ranges(cursor, start, start + timedelta(days=1))
            batches = (
                self._batches(cursor, *ranges[0]) if len(ranges) == 1 else self._read_at_once(_export(cursor), ranges)
            )
            for batch in batches:
                for first in range(0, batch.num_rows, chunk_rows):
                    yield fit(_unwrapped(batch.slice(first, chunk_rows)), self.schema)

    def rows_of_no_day(self) -> int | None:
        """As `Source.rows_of_no_day`. Costs a look at an index, or at `LOOKED_AT` rows at most."""
        window = self.fields[self.window_column]
        name = quoted(self.window_column)
        lost = f"{name} IS NULL OR {name} IN ('infinity', '-infinity')"
        with _transaction(self.login) as cursor:
            if window.is_indexed:
                one = f"SELECT 1 FROM {self._from} WHERE {lost} LIMIT {LOOKED_AT}"
                return int(_rows(cursor, f"SELECT count(*) FROM ({one}) AS lost")[0][0])
            part = f"SELECT {name} FROM {self._from} LIMIT {LOOKED_AT + 1}"
            rows, found = _rows(cursor, f"SELECT count(*), count(*) FILTER (WHERE {lost}) FROM ({part}) AS part")[0]
            return int(found) if rows <= LOOKED_AT else None

    def describe(self) -> dict[str, Any]:
        """For the receipt: nothing more than the name."""
        return {}

    @property
    def _from(self) -> str:
        return _quoted_table(self.table)

    def _select(self, start: datetime, stop: datetime) -> str:
        wanted = [name for name in self.schema.names if name != ODD]
        parts = [f"{_value(self.fields[name], self.schema.field(name).type)} AS {quoted(name)}" for name in wanted]
        odd = _odd_arrays([name for name in wanted if _is_flat(self.fields[name], self.schema.field(name).type)])
        if odd is not None:
            parts.append(f"{odd} AS {quoted(ODD)}")
        window = quoted(self.window_column)
        lower, upper = (_moment(edge, self.fields[self.window_column].base) for edge in (start, stop))
        return f"SELECT {', '.join(parts)} FROM {self._from} WHERE {window} >= {lower} AND {window} < {upper}"

    def _ranges(self, cursor: Any, start: datetime, stop: datetime) -> list[tuple[datetime, datetime]]:
        """The day as one range, or as several if it is large and they cost hardly more, each found by an index."""
        rows, cost = _estimate(cursor, self._select(start, stop))
        count = self.streams * _RANGES_PER_STREAM
        if self.streams < 2 or rows < _LARGE:
            return [(start, stop)]
        edges = [start + (stop - start) * number / count for number in range(count + 1)]
        middle = count // 2
        _, part = _estimate(cursor, self._select(edges[middle], edges[middle + 1]))
        if part * count > 2 * cost:
            return [(start, stop)]
        return list(itertools.pairwise(edges))

    def _batches(self, cursor: Any, start: datetime, stop: datetime) -> Iterator[pa.RecordBatch]:
        cursor.execute(self._select(start, stop))
        yield from cursor.fetch_record_batch()

    def _read_at_once(self, snapshot: str, ranges: Sequence[tuple[datetime, datetime]]) -> Iterator[pa.RecordBatch]:
        """The batches of all ranges, as they come. What fails in one connection ends all."""
        left = queue.SimpleQueue[tuple[datetime, datetime]]()
        for part in ranges:
            left.put(part)
        done = queue.Queue[pa.RecordBatch | BaseException | None](maxsize=self.streams)
        stopped = threading.Event()

        def hand_over(item: pa.RecordBatch | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    done.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return

        def work() -> None:
            try:
                with _transaction(self.login, snapshot) as cursor:
                    while not stopped.is_set():
                        for batch in self._batches(cursor, *left.get_nowait()):
                            hand_over(batch)
                            if stopped.is_set():
                                return
            except queue.Empty:
                hand_over(None)
            except BaseException as error:  # noqa: BLE001 - it is raised by who reads
                hand_over(error)

        threads = [threading.Thread(target=work, daemon=True, name=f"headrace-read-{n}") for n in range(self.streams)]
        for thread in threads:
            thread.start()
        try:
            running = len(threads)
            while running:
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            stopped.set()
            for thread in threads:
                thread.join()


def open_postgres(url: sa.URL, contract: ViewContract, table: str, window_column: str) -> PostgresTable:
    """Look at a view's table before anything is read.

    Raises:
        ConfigError: ADBC's driver is missing, no such table, or no column that tells the day.
        SchemaError: as `choose`.
        TransientError: the database does not answer.
    """
    login = _Login(_conninfo(url), str(url.password or ""))
    name = _quoted_table(table)
    with _transaction(login) as cursor:
        found = _rows(
            cursor,
            "SELECT c.relkind IN ('r', 'p', 'v') AND has_table_privilege(c.oid, 'SELECT') "
            f"FROM pg_class c WHERE c.oid = to_regclass({_literal(name)})",
        )
        if not found:
            schema = split_table(table)[0]
            where = "current_schema()" if schema is None else _literal(schema)
            listed = f"SELECT table_name::text FROM information_schema.tables WHERE table_schema = {where} ORDER BY 1"
            raise no_such_table(contract, table, [row[0] for row in _rows(cursor, listed)])
        fields = _fields(cursor, name)
    columns = [_column(one) for one in fields.values()]
    chosen = choose(contract, f"table `{table}`", columns, window_column, times_are_text=False)
    return PostgresTable(login, table, fields, bool(found[0][0]), chosen.schema, window_column, chosen.ignored)


@dataclass(frozen=True)
class _Login:
    """How to connect, in libpq's words, and what no message may show."""

    conninfo: str
    password: str


@contextmanager
def _transaction(login: _Login, snapshot: str | None = None) -> Iterator[Any]:
    """A cursor in a read-only transaction of one snapshot, which begins with the first query or is another's."""
    try:
        from adbc_driver_manager import Error  # noqa: PLC0415 - an extra
        from adbc_driver_postgresql import dbapi  # noqa: PLC0415
    except ModuleNotFoundError:
        msg = "HEADRACE_SOURCE_URL: no driver for PostgreSQL; run: pip install 'headrace[postgres]'"
        raise ConfigError(msg) from None
    try:
        with dbapi.connect(login.conninfo) as connection, connection.cursor() as cursor:
            taken = "" if snapshot is None else f"; SET TRANSACTION SNAPSHOT {_literal(snapshot)}"
            cursor.executescript(_SESSION.format(snapshot=taken))
            yield cursor
    except HeadraceError:
        raise
    except (Error, OSError, pa.ArrowException) as error:
        raise _failure(str(error), login) from None


def _failure(text: str, login: _Login) -> HeadraceError:
    """The server's own words or the library's, without the statement and the password."""
    said = re.search(r"(?:ERROR|FATAL|PANIC):\s+(.*)", text)
    reason = (
        said[1] if said is not None else text.partition("Query was:")[0].removeprefix("IO: [libpq] Failed to connect: ")
    )
    if login.password:
        reason = reason.replace(login.password, "***")
    if "invalid connection option" in reason:
        return ConfigError(f"HEADRACE_SOURCE_URL: libpq says: {' '.join(reason.split())}; correct the URL")
    return unreachable(reason)


def _rows(cursor: Any, query: str) -> list[tuple[Any, ...]]:
    cursor.execute(query)
    rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


def _export(cursor: Any) -> str:
    return str(_rows(cursor, "SELECT pg_export_snapshot()")[0][0])


def _fields(cursor: Any, table: str) -> dict[str, _Field]:
    rows = _rows(cursor, _COLUMNS.format(table=f"to_regclass({_literal(table)})"))
    return {row[0]: _Field(*row) for row in rows}


def _estimate(cursor: Any, query: str) -> tuple[int, float]:
    """The planner's estimate: rows, and cost in its own unit."""
    # EXPLAIN cannot be copied.
    cursor.adbc_statement.set_options(**{"adbc.postgresql.use_copy": "false"})
    plan = json.loads(_rows(cursor, f"EXPLAIN (FORMAT JSON) {query}")[0][0])[0]["Plan"]
    cursor.adbc_statement.set_options(**{"adbc.postgresql.use_copy": "true"})
    return int(plan["Plan Rows"]), float(plan["Total Cost"])


def _column(found: _Field) -> Column:
    """What a column is meant to hold."""
    kind, wide = _meaning(found.base, found.declared)
    if found.item is not None and found.category == "A":
        item = pa.string() if found.item in _TIMES else _meaning(found.item, found.item)[1]
        kind, wide = Kind.LIST, pa.list_(item)
    elif found.category == "S":
        kind = Kind.TEXT
    return Column(found.name, found.declared, kind, wide)


def _meaning(base: str, declared: str) -> tuple[Kind, pa.DataType]:
    if base in _INTEGERS or (base == "numeric" and re.fullmatch(r"numeric\(\d+(,0)?\)", declared)):
        return Kind.NUMBER, pa.int64()
    if base in _FLOATS or base == "numeric":
        return Kind.NUMBER, pa.float64()
    if base == "bool":
        return Kind.BOOLEAN, pa.bool_()
    if base in _TIMES:
        return Kind.TIME, TIMESTAMP
    if base == "bytea":
        return Kind.BINARY, pa.binary()
    if base in ("json", "jsonb"):
        return Kind.JSON, pa.string()
    # e: an enum, of any schema
    return Kind.TEXT if base in (*_TEXTS, "char", "uuid", "e") else Kind.OTHER, pa.string()


def _value(found: _Field, wide: pa.DataType) -> str:
    """The expression that gives a column exactly, in a type that ADBC reads exactly."""
    name, base = quoted(found.name), found.base
    if _is_flat(found, wide):
        items = name if found.item in _NATIVE_ITEMS else f"{name}::text[]"
        return f"CASE WHEN array_ndims({name}) > 1 THEN NULL ELSE {items} END"
    if base == "oid":
        return f"{name}::int8"
    if base in (*_INTEGERS, *_FLOATS, "bool") and not pa.types.is_string(wide):
        return name
    if base in (*_TEXTS, "bytea") or (base in _TIMES and pa.types.is_timestamp(wide)):
        return name
    return f"to_json({name})::text" if found.item is not None or base == "c" else f"{name}::text"


def _is_flat(found: _Field, wide: pa.DataType) -> bool:
    """Whether an array is read as one. Others are read as JSON: what is nested, and times, whose text is ISO 8601."""
    is_list = pa.types.is_list(wide) and found.item is not None
    return bool(is_list and found.item not in _TIMES and not pa.types.is_nested(wide.value_type))


def _odd_arrays(names: Sequence[str]) -> str | None:
    """What is odd in arrays, as `__odd__` has it: those of more than one dimension."""
    if not names:
        return None
    is_odd = {name: f"array_ndims({quoted(name)}) > 1" for name in names}
    parts = [
        f"jsonb_build_object({_literal(name)}, CASE WHEN {condition} THEN to_json({quoted(name)})::text END)"
        for name, condition in is_odd.items()
    ]
    return f"CASE WHEN {' OR '.join(is_odd.values())} THEN ({' || '.join(parts)})::text END"


def _unwrapped(batch: pa.RecordBatch) -> pa.Table:
    """A batch whose times beyond Arrow's range, infinite ones among them, are odd.

    ADBC adds the difference of the epochs, and they go round the end of 64 bits.
    """
    table = pa.Table.from_batches([batch])
    odd: dict[int, dict[str, str]] = {}
    for index, column in enumerate(table.schema):
        if not pa.types.is_timestamp(column.type):
            continue
        times = one_chunk(table.column(index)).cast(pa.int64())
        wrapped = pc.less(times, _EARLIEST).fill_null(False)
        if not pc.any(wrapped).as_py():
            continue
        for row in np.flatnonzero(wrapped.to_numpy(zero_copy_only=False)).tolist():
            odd.setdefault(row, {})[column.name] = _beyond(times[row].as_py())
        kept = pc.if_else(wrapped, pa.scalar(None, pa.int64()), times).cast(column.type)
        table = table.set_column(index, column, kept)
    if not odd:
        return table
    if ODD in table.column_names:
        for row, text in enumerate(table.column(ODD).to_pylist()):
            if text is not None:
                odd[row] = json.loads(text) | odd.get(row, {})
        table = table.drop_columns([ODD])
    notes = [json.dumps(odd[row]) if row in odd else None for row in range(table.num_rows)]
    return table.append_column(ODD, pa.array(notes, pa.string()))


def _beyond(wrapped_us: int) -> str:
    """A time that has gone round, as PostgreSQL writes it."""
    since_2000_us = wrapped_us - _EPOCH_US
    if since_2000_us == -(2**63):
        return "-infinity"
    since_2000_us += 2**64
    if since_2000_us == 2**63 - 1:
        return "infinity"
    cycles, rest_us = divmod(since_2000_us, _CYCLE_US)
    moment = datetime(2000, 1, 1, tzinfo=UTC) + timedelta(microseconds=rest_us)
    return f"{moment.year + 400 * cycles}-{moment:%m-%d %H:%M:%S.%f}"


def _quoted_table(table: str) -> str:
    return ".".join(quoted(part) for part in split_table(table) if part is not None)


def _literal(text: str) -> str:
    """A text as SQL has it, whatever `standard_conforming_strings` says."""
    escaped = text.replace("'", "''")
    return f"E'{escaped.replace(chr(92), chr(92) * 2)}'" if "\\" in text else f"'{escaped}'"


def _moment(moment: datetime, kind: str) -> str:
    """A time as SQL has it, in a type with or without a zone."""
    text = moment if kind == "timestamptz" else moment.replace(tzinfo=None)
    return f"{kind} {_literal(text.isoformat(' '))}"


def _conninfo(url: sa.URL) -> str:
    """A SQLAlchemy URL in libpq's words. Several hosts as SQLAlchemy has them: `?host=a:5432&host=b:5432`."""
    options: dict[str, str] = {}
    hosts = [host for value in _several(url.query.get("host")) for host in value.split(",")]
    ports = [port for value in _several(url.query.get("port")) for port in value.split(",")]
    if hosts:
        parts = [(host, "") if host.startswith("/") else host.partition(":")[::2] for host in hosts]
        options["host"] = ",".join(host for host, _ in parts)
        if any(port for _, port in parts):
            ports = [port for _, port in parts]
    elif url.host:
        options["host"] = url.host
    if ports or url.port is not None:
        options["port"] = ",".join(ports) if ports else str(url.port)
    for key, value in (("user", url.username), ("password", url.password), ("dbname", url.database)):
        if value:
            options[key] = str(value)
    options |= {key: ",".join(_several(value)) for key, value in url.query.items() if key not in ("host", "port")}
    return " ".join(f"{key}={_conninfo_value(value)}" for key, value in options.items())


def _several(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value


def _conninfo_value(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
