"""Reading history with DuckDB: the newest row of each key, and point-in-time joins. Ties are broken by the total order.

Two stages each. SQL finds the rows by event and created time, which settles all but exact ties; what still ties is a
handful of rows, and those are compared by where they come from (see `headrace.encode`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract import TIMESTAMP, ViewContract
from headrace.encode import Int64s, Origin, Tails, encode_values, hash_tails, stream_tails
from headrace.errors import SchemaError
from headrace.segments import Offsets, SegmentName, parse_name, parse_stream_chain, read_accepted

ROWS_A_CHUNK = 100_000
DEFAULT_MEMORY_LIMIT = "50%"
"""Of the machine's memory: what Feast and the caller make of a result needs the other half."""

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
    """A DuckDB of its own, in UTC: never shared across a fork or by two threads.

    What exceeds the memory limit (as DuckDB writes it; by default `DEFAULT_MEMORY_LIMIT`) spills to a folder that is
    removed afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-") as spill, duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        con.execute("SET memory_limit = ?", [memory_limit or DEFAULT_MEMORY_LIMIT])
        con.execute("SET temp_directory = ?", [spill])
        con.execute("SET preserve_insertion_order = false")
        yield con


class Newest:
    """The newest row of each key, to be read once, while the context that made it is open.

    Attributes:
        keys: how many keys there are.
    """

    def __init__(self, history: History | None, keys: int) -> None:
        self._history = history
        self.keys = keys

    def __iter__(self) -> Iterator[tuple[pa.Table, Tails]]:
        """Chunks of at most `ROWS_A_CHUNK` rows in the contract's schema, in no order, with the tails of the rows.

        Raises:
            SchemaError: a value in an older or foreign file cannot be cast to the type that the view has now.
        """
        if self._history is None or not self.keys:
            return
        for table, tails in self._history.winners():
            tails[tails[:, 0] == 0] = 0
            yield self._history.named(table), tails


@contextmanager
def newest(
    contract: ViewContract,
    files: Sequence[Path],
    window: Window | None = None,
    *,
    memory_limit: str | None = None,
    keys: pa.Table | None = None,
) -> Iterator[Newest]:
    """The newest row of each key within a window, by the total order, ties included.

    Reads keys and times of all rows, then the features of the winners alone. Memory is bounded by the limit. Rows
    without a key or an event time belong to nobody and are left out.

    Args:
        files: valid files of the view; those of an older schema, and of others, are cast, their columns by name.
        keys: only these join keys, in the contract's types.

    Raises:
        SchemaError: a key or time in an older or foreign file cannot be cast to the type that the view has now.
    """
    with connection(memory_limit) as con:
        if not files:
            yield Newest(None, 0)
            return
        history = History(con, contract, files)
        yield Newest(history, history.find_winners(window or Window(), keys))


class History:
    """The files of a view as one DuckDB view `history`.

    Its columns are `c0`, `c1`, ... in the order of the contract's schema and in its types, whatever the files have,
    then `file` and `position`, the place of a row. The files are listed so that among rows of streams a later place is
    a greater tail: then SQL breaks their ties. Only from `ranked_from` on does that hold: not for rows of other origin,
    and not where two topics share a partition number.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, contract: ViewContract, files: Sequence[Path]) -> None:
        self._con = con
        self._contract = contract
        self._places = sorted(((_stream_of(contract, path), path) for path in files), key=lambda place: place[0] or ())
        chains = {stream[:3] for stream, _ in self._places if stream is not None}
        others = sum(stream is None for stream, _ in self._places)
        one_topic = len(chains) == len({(epoch, partition) for epoch, partition, *_ in chains})
        self._ranked_from = others if one_topic else len(files)
        con.execute(f"CREATE TEMP VIEW history AS {self._select(range(len(files)))}")

    def column(self, name: str) -> str:
        """A column of the contract's schema in SQL."""
        return f"c{self._contract.schema.get_field_index(name)}"

    @property
    def keys(self) -> list[str]:
        """The join keys in SQL; a constant where there are none, as all rows are one key's then."""
        return [self.column(key) for key in self._contract.join_keys] or ["nobody"]

    @property
    def time(self) -> str:
        """The event time in SQL."""
        return self.column(self._contract.timestamp_field)

    @property
    def newest_first(self) -> str:
        """The order of rows with equal event times, as far as SQL knows it."""
        created = self._contract.created_field
        first = f"{self.column(created)} DESC NULLS LAST, " if created else ""
        ranked = f"file >= {self._ranked_from}"
        return f"{first}CASE WHEN {ranked} THEN file ELSE -1 END DESC, CASE WHEN {ranked} THEN position END DESC"

    def named(self, table: pa.Table) -> pa.Table:
        """Rows in the contract's schema, from a table with the columns of `history`."""
        schema = self._contract.schema
        return table.select([f"c{i}" for i in range(len(schema))]).rename_columns(schema.names).cast(schema)

    def find_winners(self, window: Window, keys: pa.Table | None) -> int:
        """Make the table `winners` of the places of the newest row of each key; return the count of keys.

        Rows that tie as far as SQL knows are all in it, with the same number as their `tie`.
        """
        conditions = [f"{column} IS NOT NULL" for column in self.keys] + [window.condition(self.time)]
        if keys is not None:
            asked = keys.select(self._contract.join_keys).rename_columns(self.keys)
            self._con.register("asked", asked)
            conditions.append(f"({', '.join(self.keys)}) IN (FROM asked)")
        same = ", ".join(self.keys)
        with _naming_casts(self._contract):
            self._con.execute(
                f"""CREATE TEMP TABLE winners AS
                WITH latest AS (
                    SELECT {same}, max({self.time}) AS {self.time} FROM history
                    WHERE {" AND ".join(conditions)} GROUP BY ALL
                ), best AS (
                    SELECT {same}, file, position FROM history JOIN latest USING ({same}, {self.time})
                    QUALIFY rank() OVER (PARTITION BY {same} ORDER BY {self.newest_first}) = 1
                )
                SELECT file, position,
                    CASE WHEN count(*) OVER tied > 1 THEN min(file << 32 | position) OVER tied END AS tie
                FROM best WINDOW tied AS (PARTITION BY {same})"""
            )
        counted = self._con.execute("SELECT count(*) - count(tie) + count(DISTINCT tie) FROM winners").fetchone()
        return int(counted[0]) if counted else 0

    def winners(self) -> Iterator[tuple[pa.Table, Tails]]:
        """The whole row of each winner, in the columns of `history`, and its tail."""
        for table in self._rows_at("winners.tie IS NULL"):
            yield table, self.tails(table)
        held: pa.Table | None = None
        for chunk in self._rows_at("winners.tie IS NOT NULL ORDER BY tie"):
            table = chunk if held is None else pa.concat_tables([held, chunk])
            ties = table.column("tie").to_numpy()
            tails = self.tails(table, hashed=True)
            by = np.lexsort((_sortable(tails), ties))
            best = by[np.append(ties[by][1:] != ties[by][:-1], True)]
            if len(best) > 1:
                yield table.take(pa.array(best[:-1])), tails[best[:-1]]
            held = table.slice(best[-1], 1)
        if held is not None:
            yield held, self.tails(held)

    def tails(self, table: pa.Table, *, hashed: bool = False) -> Tails:
        """The tails of rows in the columns of `history`; zeros for rows that are no stream's, or, if asked, hashes."""
        files, positions = table.column("file").to_numpy(), table.column("position").to_numpy()
        tails = np.zeros((len(files), 17), dtype=np.uint8)
        for number in np.unique(files):
            stream, path = self._places[number]
            if stream is not None:
                rows = np.flatnonzero(files == number)
                tails[rows] = stream_tails(Origin(stream[0], stream[1], _accepted(path)[positions[rows]]))
        others = np.flatnonzero(tails[:, 0] == 0)
        if hashed and len(others):
            rows = self.named(table).take(pa.array(others))
            values = {
                self._contract.view_name(name): encode_values(self._contract, rows, name)
                for name in self._contract.features
            }
            tails[others] = hash_tails(values)
        return tails

    def _rows_at(self, which: str) -> Iterator[pa.Table]:
        """Rows of `history` at the places in `winners`, in chunks. Files without a winner are not opened."""
        found = self._con.execute(f"SELECT DISTINCT file FROM winners WHERE {which.partition(' ORDER')[0]}").fetchall()
        if not found:
            return
        rows = self._con.sql(
            f"SELECT h.*, tie FROM ({self._select(sorted(row[0] for row in found))}) h "
            f"JOIN winners USING (file, position) WHERE {which}"
        )
        with _naming_casts(self._contract):
            for batch in rows.to_arrow_reader(ROWS_A_CHUNK):
                if batch.num_rows:
                    yield pa.Table.from_batches([batch])

    def _select(self, files: Sequence[int]) -> str:
        """The rows of some of the files. The reader casts, and fills columns that a file lacks with nulls."""
        schema = self._contract.schema
        types = self._con.from_arrow(schema.empty_table()).types
        columns = ", ".join(
            f"{_text(name)}: {{name: 'c{i}', type: {_text(str(kind))}, default_value: NULL}}"
            for i, (name, kind) in enumerate(zip(schema.names, types, strict=True))
        )
        listed = ", ".join(_text(str(self._places[number][1])) for number in files)
        number = (
            f"[{', '.join(map(str, files))}][CAST(file_index AS BIGINT) + 1]"
            if len(files) < len(self._places)
            else "file_index"
        )
        return (
            f"SELECT {', '.join(f'c{i}' for i in range(len(schema)))}, true AS nobody, "
            f"CAST({number} AS BIGINT) AS file, file_row_number AS position "
            f"FROM read_parquet([{listed}], schema = MAP {{{columns}}}, hive_partitioning = false)"
        )


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


def _stream_of(contract: ViewContract, path: Path) -> tuple[int, int, str, int] | None:
    """`(epoch, partition, topic, first)` of a stream segment in the view's folder; None for any other file."""
    name = parse_name(path.name) if path.parent == contract.directory else None
    stream = parse_stream_chain(name.chain) if isinstance(name, SegmentName) else None
    return (
        None if stream is None or not isinstance(name, SegmentName) else (stream[2], stream[1], stream[0], name.first)
    )


@lru_cache(maxsize=64)
def _accepted(path: Path) -> Offsets:
    return read_accepted(path)


@contextmanager
def _naming_casts(contract: ViewContract) -> Iterator[None]:
    """DuckDB names file, column and both types; add the view and what to do."""
    try:
        yield
    except duckdb.ConversionException as error:
        msg = (
            f"feature view `{contract.name}`: {str(error).splitlines()[0]}; "
            "give the field its former type, or a new name"
        )
        raise SchemaError(msg) from error


def _sortable(tails: Tails) -> np.ndarray[tuple[int, ...], np.dtype[np.bytes_]]:
    return np.ascontiguousarray(tails).view("S17").ravel()


def _text(value: str) -> str:
    """An SQL string."""
    return "'" + value.replace("'", "''") + "'"


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
