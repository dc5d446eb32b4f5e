"""Reading history with DuckDB: the newest row of each key, and point-in-time joins. Ties are broken by the total order.

Two stages each. SQL finds the rows by event and created time, which settles all but exact ties; what still ties is a
handful of rows, and those are compared by where they come from (see `headrace.encode`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract import TIMESTAMP, ViewContract
from headrace.encode import Int64s, Origin, encode_values, hash_tails, stream_tails
from headrace.segments import SegmentName, parse_name, parse_stream_chain, read_accepted

ROW = "__headrace_row"
FILE = "__headrace_file"
POSITION = "__headrace_position"


@dataclass(frozen=True)
class Window:
    """A range of event times, inclusive at both ends as Feast's are; None is unbounded."""

    start: datetime | None = None
    end: datetime | None = None

    def condition(self, column: str) -> str:
        """The window as SQL over a column that is quoted already."""
        parts = [
            f"{column} {sign} {timestamp_literal(bound)}"
            for sign, bound in ((">=", self.start), ("<=", self.end))
            if bound is not None
        ]
        return " AND ".join(parts) or "true"


@dataclass(frozen=True)
class PointInTime:
    """A point-in-time join of one view.

    Attributes:
        features: which, in the order wanted.
        keys: for each join key of the view the column of the entities that holds it.
        timestamp_column: the entities' time.
        ttl_us: how old a value may be, inclusive, microseconds; None is for ever.
        by_created: whether rows created after the entity's time are unknown to it.
    """

    features: Sequence[str]
    keys: dict[str, str]
    timestamp_column: str
    ttl_us: int | None
    by_created: bool = False


@contextmanager
def connection(memory_limit: str | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own, in UTC: never shared across a fork or by two threads."""
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        if memory_limit is not None:
            con.execute("SET memory_limit = ?", [memory_limit])
        yield con


def newest_rows(
    contract: ViewContract, files: Sequence[Path], window: Window, *, memory_limit: str | None = None
) -> pa.Table:
    """The newest row of each key within a window, in the contract's schema; keys in no order."""
    if not files:
        return contract.schema.empty_table()
    keys = ", ".join(quoted(key) for key in contract.join_keys)
    with connection(memory_limit) as con:
        found = con.sql(
            f"SELECT {_columns(contract.schema.names)}, {FILE}, {POSITION} FROM {_rows_of(contract, files)} "
            f"WHERE {window.condition(quoted(contract.timestamp_field))} "
            f"QUALIFY rank() OVER (PARTITION BY {keys} ORDER BY {_newest_first(contract)}) = 1"
        ).to_arrow_table()
    found = _last_of_ties(contract, found, list(contract.join_keys))
    return found.select(contract.schema.names).cast(contract.schema)


def all_rows(files: Sequence[Path], columns: Sequence[str], timestamp_field: str, window: Window) -> pa.Table:
    """Every row within a window; the columns wanted, or all."""
    wanted = _columns(columns) if columns else f"* EXCLUDE ({FILE}, {POSITION})"
    with connection() as con:
        return con.sql(
            f"SELECT {wanted} FROM {_source(files, timestamp_field)} WHERE {window.condition(quoted(timestamp_field))}"
        ).to_arrow_table()


def point_in_time(
    contract: ViewContract,
    files: Sequence[Path],
    entities: pa.Table,
    join: PointInTime,
    *,
    memory_limit: str | None = None,
) -> pa.Table:
    """For each entity row the newest feature values at or before its time: same length and order as `entities`.

    Null where there is no such row, where it is older than the ttl, and where a key or the time is null.
    """
    schema = pa.schema([contract.schema.field(name) for name in join.features])
    if not files or entities.num_rows == 0:
        return pa.table({f.name: pa.nulls(entities.num_rows, f.type) for f in schema}, schema=schema)
    asked = _asked(contract, entities, join)
    with connection(memory_limit) as con:
        con.register("asked", asked)
        matched = con.sql(_as_of_sql(contract, files, join)).to_arrow_table()
    matched = _last_of_ties(contract, matched, [ROW])
    rows = matched.column(ROW).to_numpy()
    places = np.full(entities.num_rows, -1, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    taken = matched.select(list(join.features)).cast(schema)
    return taken.take(pa.array(places, mask=places < 0))


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def timestamp_literal(moment: datetime) -> str:
    """A time as SQL; a naive one is UTC, as Feast means it."""
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return f"TIMESTAMPTZ '{aware.strftime('%Y-%m-%d %H:%M:%S.%f')}+00'"


def _as_of_sql(contract: ViewContract, files: Sequence[Path], join: PointInTime) -> str:
    """Find each entity's event time by an ASOF join of keys and times alone, then fetch the rows that have it."""
    source, time = _rows_of(contract, files), quoted(contract.timestamp_field)
    keys = [quoted(key) for key in contract.join_keys]
    same_keys = " AND ".join(f"a.{key} = f.{key}" for key in keys)
    created = quoted(contract.created_field) if contract.created_field else None
    known = f"{created} IS NULL OR {created} <= {ROW}_time" if join.by_created and created else None
    columns = ", ".join([*keys, time])
    hit_time = f"{ROW}_hit"
    bounds = (
        f"{time} <= (SELECT max({ROW}_time) FROM asked)"
        if join.ttl_us is None
        else f"{time} BETWEEN (SELECT min({ROW}_time) FROM asked) - to_microseconds({join.ttl_us}) "
        f"AND (SELECT max({ROW}_time) FROM asked)"
    )
    if known is None:
        hits = (
            f"SELECT a.*, f.{time} AS {hit_time} FROM asked a "
            f"ASOF JOIN (SELECT {columns} FROM {source} WHERE {bounds}) f ON {same_keys} AND a.{ROW}_time >= f.{time}"
        )
    else:  # what is known depends on the row, which an ASOF join cannot express
        hits = (
            f"SELECT a.*, max(f.{time}) AS {hit_time} FROM asked a JOIN {source} f "
            f"ON {same_keys} AND a.{ROW}_time >= f.{time} AND ({known}) GROUP BY ALL"
        )
    fresh = "" if join.ttl_us is None else f" WHERE {hit_time} >= {ROW}_time - to_microseconds({join.ttl_us})"
    features = ", ".join(f"f.{quoted(name)}" for name in join.features)
    newest = f"f.{created} DESC NULLS LAST" if created else "1"
    return (
        f"WITH hits AS (SELECT * FROM ({hits}){fresh}) "
        f"SELECT a.{ROW}, {features}, f.{FILE}, f.{POSITION} FROM hits a "
        f"JOIN (SELECT * FROM {source} WHERE {bounds}) f ON {same_keys} AND f.{time} = a.{hit_time}"
        + (f" AND ({known})" if known else "")
        + f" QUALIFY rank() OVER (PARTITION BY a.{ROW} ORDER BY {newest}) = 1"
    )


def _asked(contract: ViewContract, entities: pa.Table, join: PointInTime) -> pa.Table:
    """The entities' keys in the view's types, their times, and their row numbers."""
    columns = {key: entities.column(column) for key, column in join.keys.items()}
    cast = {key: values.cast(contract.schema.field(key).type) for key, values in columns.items()}
    return pa.table(
        {
            **cast,
            f"{ROW}_time": entities.column(join.timestamp_column),
            ROW: pa.array(np.arange(entities.num_rows, dtype=np.int64)),
        }
    )


def _source(files: Sequence[Path], *times: str | None) -> str:
    """The rows of files with their places; `times` name the columns that may be in nanoseconds in files of others."""
    casts = ", ".join(f"CAST({quoted(t)} AS TIMESTAMPTZ) AS {quoted(t)}" for t in times if t is not None)
    replace = f"REPLACE ({casts})" if casts else ""
    listed = ", ".join("'" + str(path).replace("'", "''") + "'" for path in files)
    return (
        f"(SELECT * EXCLUDE (filename, file_row_number) {replace}, filename AS {FILE}, file_row_number AS {POSITION} "
        f"FROM read_parquet([{listed}], filename = true, file_row_number = true, "
        "union_by_name = true, hive_partitioning = false))"
    )


def _rows_of(contract: ViewContract, files: Sequence[Path]) -> str:
    return _source(files, contract.timestamp_field, contract.created_field)


def _columns(names: Sequence[str]) -> str:
    return ", ".join(quoted(name) for name in names)


def _newest_first(contract: ViewContract) -> str:
    order = f"{quoted(contract.timestamp_field)} DESC"
    return order if contract.created_field is None else f"{order}, {quoted(contract.created_field)} DESC NULLS LAST"


def _last_of_ties(contract: ViewContract, table: pa.Table, group: list[str]) -> pa.Table:
    """Of rows with equal group columns, which tie in both times, the last by the rest of the total order."""
    codes = np.zeros(table.num_rows, dtype=np.int64)
    for name in group:
        encoded = pa.chunked_array(table.column(name)).combine_chunks().dictionary_encode(null_encoding="encode")
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        numbers = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        codes = np.unique(codes * max(len(encoded.dictionary), 1) + numbers, return_inverse=True)[1]
    counts = np.bincount(codes) if len(codes) else np.empty(0, dtype=np.int64)
    if not len(counts) or counts.max() == 1:
        return table
    best: dict[int, tuple[bytes, int]] = {}
    tied = np.flatnonzero(counts[codes] > 1)
    for row, tail in zip(tied.tolist(), _tails(contract, table, tied), strict=True):
        code = int(codes[row])
        if code not in best or best[code][0] <= tail:
            best[code] = (tail, row)
    keep = np.concatenate((np.flatnonzero(counts[codes] == 1), [row for _, row in best.values()]))
    return table.take(pa.array(np.sort(keep.astype(np.int64))))


def _tails(contract: ViewContract, table: pa.Table, rows: Int64s) -> list[bytes]:
    """The part of the order behind the times, for a few rows."""
    tails: list[bytes] = [b""] * len(rows)
    paths = [Path(path) for path in table.column(FILE).take(pa.array(rows)).to_pylist()]
    positions: list[int] = table.column(POSITION).take(pa.array(rows)).to_pylist()
    for path in set(paths):
        own = [i for i, other in enumerate(paths) if other == path]
        there = np.array([positions[i] for i in own], dtype=np.int64)
        name = parse_name(path.name)
        stream = parse_stream_chain(name.chain) if isinstance(name, SegmentName) else None
        if stream is not None:
            matrix = stream_tails(Origin(stream[2], stream[1], read_accepted(path)[there]))
        else:
            matrix = _hashes(contract, path, there)
        for i, row in zip(own, matrix, strict=True):
            tails[i] = row.tobytes()
    return tails


def _hashes(contract: ViewContract, path: Path, positions: Int64s) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The hashes of rows of one file: over all features of the view, whichever were asked for."""
    with connection() as con:
        con.register("wanted", pa.table({POSITION: positions, ROW: np.arange(len(positions), dtype=np.int64)}))
        rows = con.sql(
            f"SELECT f.* FROM {_source([path])} f JOIN wanted w ON f.{POSITION} = w.{POSITION} ORDER BY w.{ROW}"
        ).to_arrow_table()
    schema = pa.schema([contract.schema.field(name) for name in contract.features])
    present = pa.table(
        {
            f.name: rows.column(f.name).cast(f.type) if f.name in rows.column_names else pa.nulls(len(rows), f.type)
            for f in schema
        }
    )
    return hash_tails({contract.view_name(name): encode_values(contract, present, name) for name in contract.features})


def to_utc(table: pa.Table, column: str) -> pa.Table:
    """A table whose column of times is `timestamp[us, UTC]`; naive times are UTC."""
    values = table.column(column)
    if pa.types.is_timestamp(values.type) and values.type.tz is None:
        values = pc.assume_timezone(values, "UTC")
    return table.set_column(table.column_names.index(column), column, values.cast(TIMESTAMP, safe=False))
