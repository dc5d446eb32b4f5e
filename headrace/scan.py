"""Reading history with DuckDB: the newest row of each key, and point-in-time joins. Ties are broken by the total order.

Three stages each, so that wide rows never go through a sort and memory stays within DuckDB's limit: SQL finds the
places of the winners by keys, times and places alone; the few that still tie are compared by the hash of their values
(see `headrace.encode`); then the wanted columns of the winners are fetched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.contract import ViewContract
from headrace.encode import Int64s, Origin, Tails, encode_values, hash_tails, schema_id, stream_tails
from headrace.errors import SchemaError
from headrace.objects import ObjectPath
from headrace.place import File, readable, stands, stat_of
from headrace.sample import Sample
from headrace.segments import (
    REPLAY,
    Offsets,
    SegmentName,
    columns_id,
    parse_name,
    parse_stream_chain,
    read_accepted,
    read_footer,
    read_origins,
    time_bounds,
)

Found = TypeVar("Found")
Result = TypeVar("Result")

ROWS_A_CHUNK = 100_000
_VALUES_A_CHUNK = 1_000_000
_READINGS = 5
DEFAULT_MEMORY_LIMIT = "50%"
"""Of the machine's memory: what Feast and the caller make of a result needs the other half."""

AS_OF = "__as_of"
"""The entities' time."""

_MAX_FILTER_BITS = 26
_FEW_FILES, _SMALL_FILE_BYTES = 64, 65_536  # to open a small file costs more than to read it
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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

    def meets(self, low_us: int, high_us: int) -> bool:
        """Whether any time of `[low_us, high_us]` is within."""
        after_start = self.start is None or high_us >= microseconds(self.start)
        return after_start and (self.end is None or low_us <= microseconds(self.end))


@dataclass(frozen=True)
class PointInTime:
    """A point-in-time join of one view.

    Attributes:
        features: which columns, in the order wanted.
        ttl_us: how old a value may be, inclusive, microseconds; None is for ever.
        by_created: whether rows created after the entity's time are unknown to it, as are those without such a time.
        since: rows before it do not count.
    """

    features: Sequence[str]
    ttl_us: int | None
    by_created: bool = False
    since: datetime | None = None


@contextmanager
def connection(memory_limit: str | None = None, files: Iterable[File] = ()) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own, in UTC: never shared across a fork or by two threads.

    What exceeds the memory limit (as DuckDB writes it; by default `DEFAULT_MEMORY_LIMIT`) spills to a folder that is
    removed afterwards.

    Args:
        files: those of an object store among them can be read by their URLs.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-") as spill, duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        con.execute("SET memory_limit = ?", [memory_limit or DEFAULT_MEMORY_LIMIT])
        con.execute("SET temp_directory = ?", [spill])
        con.execute("SET preserve_insertion_order = false")
        con.execute("SET parquet_metadata_cache = true")
        if remote := [file for file in files if isinstance(file, ObjectPath)]:
            from headrace.object_files import ObjectFiles  # noqa: PLC0415 - only who has an object store pays for it

            con.register_filesystem(ObjectFiles(remote))
        yield con


class Newest:
    """The newest row of each key, to be read while the context that made it is open.

    Attributes:
        keys: how many keys there are.
    """

    def __init__(self, history: History, keys: int, rows_a_chunk: int | None) -> None:
        self._history = history
        self._rows_a_chunk = rows_a_chunk
        self.keys = keys

    def __iter__(self) -> Iterator[tuple[pa.Table, Tails]]:
        """Chunks of rows in the contract's schema, in no order, with the tails of the rows.

        Raises:
            SchemaError: a value in an older or foreign file cannot be cast to the type that the view has now.
        """
        for table in self._history.fetch("SELECT file, position FROM found", rows_a_chunk=self._rows_a_chunk):
            yield self._history.named(table), self._history.tails(table)


@contextmanager
def newest(
    contract: ViewContract,
    files: Sequence[File],
    window: Window | None = None,
    *,
    memory_limit: str | None = None,
    keys: pa.Table | None = None,
    sample: Sample | None = None,
    rows_a_chunk: int | None = None,
) -> Iterator[Newest]:
    """The newest row of each key within a window, by the total order, ties included.

    Rows without a key or an event time belong to nobody and are left out. Memory is bounded by the limit.

    Args:
        files: valid files of the view; those of an older schema, and of others, are cast, their columns by name.
        keys: only these join keys, in the contract's types.
        sample: only the keys in it; where there are no join keys, the one that there is.
        rows_a_chunk: how many rows a chunk has at most; by default `ROWS_A_CHUNK`, and of wide views fewer.

    Raises:
        SchemaError: a value in an older or foreign file cannot be cast to the type that the view has now.
    """
    within = window or Window()
    with connection(memory_limit, files) as con:
        history = History(con, contract, files, within)
        yield Newest(history, history.find_newest(within, keys, sample), rows_a_chunk)


def newest_rows(
    contract: ViewContract, files: Sequence[File], window: Window | None = None, *, memory_limit: str | None = None
) -> pa.Table:
    """The same as one table."""
    with newest(contract, files, window, memory_limit=memory_limit) as rows:
        return pa.concat_tables([contract.schema.empty_table(), *(table for table, _ in rows)])


def rows_within(
    contract: ViewContract, files: Sequence[File], window: Window, *, memory_limit: str | None = None
) -> pa.Table:
    """Every row within a window, in the contract's schema; in no order."""
    with connection(memory_limit, files) as con:
        history = History(con, contract, files, window)
        return history.named(con.sql(f"FROM history WHERE {window.condition(history.time)}").to_arrow_table())


def moments(
    contract: ViewContract, files: Sequence[File], window: Window, *, memory_limit: str | None = None
) -> pa.Table:
    """Each join key and event time that any row within a window has, once: the contract's columns of them."""
    with connection(memory_limit, files) as con:
        history = History(con, contract, files, window)
        names = [*contract.join_keys, contract.timestamp_field]
        columns = [history.column(name) for name in names]
        condition = f"{_present(columns)} AND {window.condition(history.time)}"
        found = con.sql(f"SELECT DISTINCT {', '.join(columns)} FROM history WHERE {condition}")
        return found.to_arrow_table().rename_columns(names)


def all_rows(files: Sequence[File], columns: Sequence[str], timestamp_field: str, window: Window) -> pa.Table:
    """Every row of any Parquet files within a window, in their own types; the columns wanted, or all."""
    listed = ", ".join(_text(str(path)) for path in files)
    time = quoted(timestamp_field)
    wanted = ", ".join(quoted(name) for name in columns) or "*"
    with connection(None, files) as con:
        return con.sql(
            f"SELECT {wanted} FROM (SELECT * REPLACE (CAST({time} AS TIMESTAMPTZ) AS {time}) "
            f"FROM read_parquet([{listed}], union_by_name = true, hive_partitioning = false)) "
            f"WHERE {window.condition(time)}"
        ).to_arrow_table()


def point_in_time(
    contract: ViewContract,
    files: Sequence[File],
    entities: pa.Table,
    join: PointInTime,
    *,
    memory_limit: str | None = None,
) -> pa.Table:
    """For each entity row the newest feature values at or before its time: same length and order as `entities`.

    Null where there is no such row, where it is older than the ttl, and where a key or the time is null.

    Args:
        entities: the join keys, in the contract's types, and the time as `AS_OF`, `timestamp[us, UTC]`.

    Raises:
        SchemaError: a value in an older or foreign file cannot be cast to the type that the view has now.
    """
    schema = pa.schema([contract.schema.field(name) for name in join.features])
    window = window_of(entities, join)
    if window is None:
        return pa.table({f.name: pa.nulls(entities.num_rows, f.type) for f in schema}, schema=schema)
    with connection(memory_limit, files) as con:
        history = History(con, contract, files, window)
        history.find_as_of(entities, join, window)
        found = con.sql("SELECT row, file << 32 | position AS place FROM found").to_arrow_table()
        columns = [history.column(name) for name in join.features]
        chunks = list(history.fetch("SELECT DISTINCT file, position FROM found", columns))
    rows, places = found.column("row").to_numpy(), found.column("place").to_numpy()
    fetched = [c.column("file").to_numpy() << 32 | c.column("position").to_numpy() for c in chunks]
    by_place = np.concatenate([*fetched, np.empty(0, dtype=np.int64)])
    order = np.argsort(by_place)
    indices = np.full(entities.num_rows, -1, dtype=np.int64)
    indices[rows] = order[np.searchsorted(by_place, places, sorter=order)] if len(order) else -1
    values = [chunk.select(columns).rename_columns(schema.names).cast(schema) for chunk in chunks]
    return pa.concat_tables([schema.empty_table(), *values]).take(pa.array(indices, mask=indices < 0))


class History:
    """The files of a view that may have rows within a window, as one DuckDB view `history`.

    Its columns are `c0`, `c1`, ... in the order of the contract's schema and in its types, whatever the files have,
    then `file` and `position`, the place of a row. The files are listed so that among rows of streams a later place is
    a greater tail: then SQL breaks their ties. Only from `_ranked_from` on does that hold: not for rows of other
    origin, not where two topics share a partition number, and for no row where there are replays.

    Where the files are many and small, as appends leave them before they are merged, it is a table: each is opened
    once, not once a stage. Like all of DuckDB's, it spills beyond the memory limit.

    What is looked for is left in the table `found`, with `file` and `position`.
    """

    def __init__(
        self, con: duckdb.DuckDBPyConnection, contract: ViewContract, files: Sequence[File], window: Window
    ) -> None:
        self._con = con
        self._contract = contract
        self._filters = 0
        self._types = [str(kind) for kind in con.from_arrow(contract.schema.empty_table()).types]
        self._parts = parts = parts_of(contract, files, window)
        streams = [part.stream for part in parts if part.stream is not None]
        one_topic = len({s[:3] for s in streams}) == len({s[:2] for s in streams})
        is_ranked = one_topic and not any(part.is_replay for part in parts)
        self._ranked_from = len(parts) - len(streams) if is_ranked else len(parts)
        self._is_held = len(parts) > _FEW_FILES and (
            sum(stat_of(part.path).size for part in parts) < len(parts) * _SMALL_FILE_BYTES
        )
        self._refuse_fractions()
        kind = "TABLE" if self._is_held else "VIEW"
        self._execute(f"CREATE TEMP {kind} history AS {self._select(range(len(parts)))}")

    def column(self, name: str) -> str:
        """A column of the contract's schema in SQL."""
        return f"c{self._contract.schema.get_field_index(name)}"

    @property
    def time(self) -> str:
        """The event time in SQL."""
        return self.column(self._contract.timestamp_field)

    def named(self, table: pa.Table) -> pa.Table:
        """See `named`."""
        return named(self._contract, table)

    def find_newest(self, window: Window, keys: pa.Table | None, sample: Sample | None = None) -> int:
        """Find the newest row of each key, or of these keys or a sample alone; return how many there are."""
        same = ", ".join(self._keys)
        if not self._contract.join_keys:
            keys = sample = None  # all rows are of the one key there is
        if keys is not None:
            self._con.register("wanted", keys.select(self._contract.join_keys).rename_columns(self._keys))
        sampled = "true" if sample is None else sample.condition(self._contract, self._keys)
        self._execute(
            f"""CREATE TEMP TABLE latest AS
            SELECT {same}, max({self.time}) AS {self.time}
            FROM history {"" if keys is None else f"SEMI JOIN wanted USING ({same})"}
            WHERE {_present(self._keys)} AND {window.condition(self.time)} AND {sampled} GROUP BY ALL"""
        )
        likely = self._likely("latest", [*self._keys, self.time])
        self._execute(
            f"""CREATE TEMP TABLE best AS
            WITH candidates AS (
                SELECT {same}, file, position
                FROM (FROM history WHERE {likely}) JOIN latest USING ({same}, {self.time})
                QUALIFY rank() OVER (PARTITION BY {same} ORDER BY {self._newest_first(self._created)}) = 1
            )
            SELECT min(file << 32 | position) OVER tied AS row, file, position, count(*) OVER tied > 1 AS tied
            FROM candidates WINDOW tied AS (PARTITION BY {same})"""
        )
        self._settle()
        counted = self._con.execute("SELECT count(*) FROM found").fetchone()
        return int(counted[0]) if counted else 0

    def find_as_of(self, entities: pa.Table, join: PointInTime, window: Window) -> None:
        """Find for each entity row, by its number `row`, the newest row at or before its time and within the ttl."""
        nobody = pa.repeat(pa.scalar(True), entities.num_rows)
        keys = [entities.column(key) for key in self._contract.join_keys] or [nobody]
        rows = pa.array(np.arange(entities.num_rows, dtype=np.int64))
        asked = pa.table([*keys, entities.column(AS_OF), rows], [*self._keys, "as_of", "row"])
        self._con.register("entities", asked)
        self._execute(f"CREATE TEMP TABLE asked AS FROM entities WHERE {_present([*self._keys, 'as_of'])}")
        same = ", ".join(self._keys)
        self._execute(
            f"""CREATE TEMP TABLE relevant AS
            SELECT {same}, {self.time} AS event, {self._created} AS created, file, position
            FROM (FROM history WHERE {self._likely("asked", self._keys)}) SEMI JOIN asked USING ({same})
            WHERE {window.condition(self.time)}"""
        )
        timeline, known = "SELECT *, event AS known FROM relevant", "true"
        if join.by_created and self._contract.created_field is not None:
            # A row is known from when it was made; what is newest of those known by then is a running maximum.
            known = "created <= as_of"
            timeline = (
                f"SELECT {same}, greatest(event, created) AS known, max(event) OVER (PARTITION BY {same} "
                "ORDER BY greatest(event, created)) AS event FROM relevant WHERE created IS NOT NULL"
            )
        young = "true" if join.ttl_us is None else f"event >= as_of - to_microseconds({join.ttl_us})"
        self._execute(
            f"""CREATE TEMP TABLE best AS
            WITH hits AS (
                SELECT asked.*, event FROM asked ASOF JOIN ({timeline}) t
                ON {" AND ".join(f"asked.{key} = t.{key}" for key in self._keys)} AND as_of >= known
                WHERE {young}
            ), candidates AS (
                SELECT row, file, position FROM hits JOIN relevant USING ({same}, event) WHERE {known}
                QUALIFY rank() OVER (PARTITION BY row ORDER BY {self._newest_first("created")}) = 1
            )
            SELECT row, file, position, count(*) OVER (PARTITION BY row) > 1 AS tied FROM candidates"""
        )
        self._settle()

    def fetch(
        self, places: str, columns: Sequence[str] | None = None, order: str = "", rows_a_chunk: int | None = None
    ) -> Iterator[pa.Table]:
        """The rows at the places that a query gives, in chunks: columns of `history`, and what else the query gives.

        Files that have none of the places are not opened.
        """
        files = [row[0] for row in self._con.execute(f"SELECT DISTINCT file FROM ({places}) ORDER BY file").fetchall()]
        if not files:
            return
        wanted = columns or [f"c{i}" for i in range(len(self._types))]
        likely = self._likely(f"({places})", ["file", "position"])
        source = "history" if self._is_held else f"({self._select(files)})"
        rows = self._con.sql(
            f"SELECT {', '.join(wanted)}, p.* FROM (FROM {source} WHERE {likely}) h "
            f"JOIN ({places}) p ON h.file = p.file AND h.position = p.position {order}"
        )
        with self._naming_casts():
            default = max(1, min(ROWS_A_CHUNK, _VALUES_A_CHUNK // len(wanted)))
            for batch in rows.to_arrow_reader(rows_a_chunk or default):
                if batch.num_rows:
                    yield pa.Table.from_batches([batch])

    def tails(self, table: pa.Table, *, hashed: bool = False) -> Tails:
        """See `tails_of`."""
        files, positions = table.column("file").to_numpy(), table.column("position").to_numpy()
        return tails_of(self._contract, self._parts, files, positions, self.named(table) if hashed else None)

    def _likely(self, table: str, columns: Sequence[str]) -> str:
        """A condition that holds for every row whose columns are in a table, and for few others: a Bloom filter.

        Before a join with a small part of the history it spares looking up nearly all of it.
        """
        counted = self._con.execute(f"SELECT count(*) FROM {table}").fetchone()
        bits = 1 << min(max(int(counted[0] if counted else 0) * 16, 1 << 12).bit_length(), _MAX_FILTER_BITS)
        hashed = f"CAST(hash({', '.join(columns)}) & {bits - 1} AS INTEGER)"
        name = f"filter_{self._filters}"
        self._filters += 1
        self._con.execute(f"SET VARIABLE {name} = (SELECT bitstring_agg({hashed}, 0, {bits - 1}) FROM {table})")
        return f"get_bit(getvariable('{name}'), {hashed}) = 1"

    def _settle(self) -> None:
        """Make `found` of `best`: of rows that tie as far as SQL knows, keep the one with the greatest tail."""
        best = [pa.schema([("row", pa.int64()), ("file", pa.int64()), ("position", pa.int64())]).empty_table()]
        held: pa.Table | None = None
        for chunk in self.fetch("SELECT row, file, position FROM best WHERE tied", order="ORDER BY p.row"):
            table = chunk if held is None else pa.concat_tables([held, chunk])
            rows = table.column("row").to_numpy()
            tails = np.ascontiguousarray(self.tails(table, hashed=True)).view("S17").ravel()
            by = np.lexsort((tails, rows))
            last = by[np.append(rows[by][1:] != rows[by][:-1], True)]
            best.append(table.select(best[0].column_names).take(pa.array(last[:-1])))
            held = table.slice(last[-1], 1)
        if held is not None:
            best.append(held.select(best[0].column_names))
        self._con.register("settled", pa.concat_tables(best))
        self._con.execute("CREATE TEMP TABLE found AS SELECT row, file, position FROM best WHERE NOT tied")
        self._con.execute("INSERT INTO found FROM settled")

    @property
    def _keys(self) -> list[str]:
        """The join keys in SQL; a constant where there are none, as all rows are one key's then."""
        return [self.column(key) for key in self._contract.join_keys] or ["nobody"]

    @property
    def _created(self) -> str:
        """The created time in SQL."""
        return self.column(self._contract.created_field) if self._contract.created_field else "NULL::TIMESTAMPTZ"

    def _newest_first(self, created: str) -> str:
        """The order of rows with equal event times, as far as SQL knows it."""
        ranked = f"file >= {self._ranked_from}"
        return (
            f"{created} DESC NULLS LAST, CASE WHEN {ranked} THEN file ELSE -1 END DESC, "
            f"CASE WHEN {ranked} THEN position END DESC"
        )

    def _select(self, files: Sequence[int]) -> str:
        """The rows of some of the files. The reader casts, and fills columns that a file lacks with nulls.

        Files that all have the view's very columns are read without that, which is twice as fast.
        """
        names = [f"c{i}" for i in range(len(self._types))]
        if not files:
            nulls = ", ".join(f"NULL::{kind} AS {name}" for name, kind in zip(names, self._types, strict=True))
            return f"SELECT {nulls}, true AS nobody, 0::BIGINT AS file, 0::BIGINT AS position WHERE false"
        owns = self._contract.schema.names
        parts = [self._parts[number] for number in files]
        mapped = ""
        selected = [f"{quoted(own)} AS {name}" for own, name in zip(owns, names, strict=True)]
        if not all(part.is_as_is for part in parts):
            columns = ", ".join(
                f"{_text(own)}: {{name: '{name}', type: {_text(kind)}, default_value: NULL}}"
                for own, name, kind in zip(owns, names, self._types, strict=True)
            )
            mapped, selected = f"schema = MAP {{{columns}}}, ", names
        listed = ", ".join(_text(str(part.path)) for part in parts)
        every = len(files) == len(self._parts)
        number = "file_index" if every else f"[{', '.join(map(str, files))}][CAST(file_index AS BIGINT) + 1]"
        return (
            f"SELECT {', '.join(selected)}, true AS nobody, CAST({number} AS BIGINT) AS file, "
            f"file_row_number AS position FROM read_parquet([{listed}], {mapped}hive_partitioning = false)"
        )

    def _refuse_fractions(self) -> None:
        """Where a column of whole numbers is one of floats in a file: DuckDB would round what has a fraction."""
        others = [part.path for part in self._parts if not part.is_as_is]
        for number, field in enumerate(self._contract.schema):
            if not pa.types.is_integer(field.type):
                continue
            paths = [str(path) for path in others if field.name in _float_columns(path, stat_of(path).mtime_ns)]
            if not paths:
                continue
            column, listed = quoted(field.name), ", ".join(map(_text, paths))
            found = self._con.execute(
                f"SELECT filename, {column} FROM read_parquet([{listed}], hive_partitioning = false) "
                f"WHERE {column} <> trunc({column}) LIMIT 1"
            ).fetchone()
            if found is not None:
                msg = (
                    f"feature view `{self._contract.name}`: {found[0]}: column `{field.name}` has {found[1]}, "
                    f"which is no {self._types[number]}; give the field its former type again, "
                    "or the new values a new field"
                )
                raise SchemaError(msg)

    def _execute(self, sql: str) -> None:
        with self._naming_casts():
            self._con.execute(sql)

    @contextmanager
    def _naming_casts(self) -> Iterator[None]:
        """DuckDB names file, column and both types; add the view and what to do."""
        try:
            yield
        except (duckdb.ConversionException, OSError) as error:  # as an OSError where the rows are streamed
            if isinstance(error, OSError) and not str(error).startswith("Conversion Error"):
                raise
            msg = (
                f"feature view `{self._contract.name}`: {str(error).splitlines()[0]}; "
                "give the field its former type again, or the new values a new field"
            )
            raise SchemaError(msg) from error


def named(contract: ViewContract, table: pa.Table) -> pa.Table:
    """Rows in the contract's schema, from a table with the columns of `History`."""
    schema = contract.schema
    return table.select([f"c{i}" for i in range(len(schema))]).rename_columns(schema.names).cast(schema)


def reading(
    find: Callable[[], Found], files_of: Callable[[Found], Sequence[File]], work: Callable[[Found], Result]
) -> Result:
    """Find files and work on them; do so again where one is gone or another meanwhile (a new snapshot, a merge)."""
    for attempt in range(_READINGS):
        found = find()
        try:
            return work(found)
        except Exception:
            if attempt == _READINGS - 1 or all(map(stands, files_of(found))):
                raise
    raise AssertionError  # the loop returns or raises


def timestamp_literal(moment: datetime) -> str:
    """A time as SQL; a naive one is UTC, as Feast means it."""
    return f"TIMESTAMPTZ '{_aware(moment).isoformat(sep=' ')}'"


def window_of(entities: pa.Table, join: PointInTime) -> Window | None:
    """The event times that can matter to any of the entities; None if none can."""
    low, high = time_bounds(entities, AS_OF)
    if low is None or high is None:
        return None
    start = join.since
    if join.ttl_us is not None and (oldest := _moment(low - join.ttl_us)) is not None:
        start = oldest if start is None else max(start, oldest)
    return Window(start, _moment(high))


@dataclass(frozen=True)
class Part:
    """A file that may have rows within a window.

    Attributes:
        stream: `(epoch, partition, topic, first)` of a stream's segment.
        is_replay: it is a replay's segment, each row of which has an origin of its own.
        is_as_is: its columns are the very columns of the contract.
    """

    path: File
    stream: tuple[int, int, str, int] | None = None
    is_replay: bool = False
    is_as_is: bool = False


def parts_of(contract: ViewContract, files: Sequence[File], window: Window) -> list[Part]:
    """The files that may have rows within a window; of streams a later one has the rows of greater tails."""
    own_columns = columns_id(contract.schema)
    parts = (_part(contract, path, window, own_columns) for path in files)
    return sorted((part for part in parts if part is not None), key=lambda part: part.stream or ())


def tails_of(
    contract: ViewContract, parts: Sequence[Part], files: Int64s, positions: Int64s, rows: pa.Table | None
) -> Tails:
    """The tails of rows, by the number of their file among the parts and their position in it.

    Args:
        rows: in the contract's schema, aligned; of those that no record was, the hash is taken. Without it zeros.
    """
    tails = np.zeros((len(files), 17), dtype=np.uint8)
    for number in np.unique(files):
        part, here = parts[number], np.flatnonzero(files == number)
        if part.stream is not None:
            epoch, partition, _, _ = part.stream
            stat = stat_of(part.path)
            accepted = _accepted(part.path, stat.size, stat.mtime_ns, stat.identity)
            tails[here] = stream_tails(Origin(epoch, partition, accepted[positions[here]]))
        elif part.is_replay:
            origins = [stream_tails(Origin(*origin)) for origin in read_origins(read_footer(part.path))]
            tails[here] = np.concatenate(origins)[positions[here]]
    others = np.flatnonzero(tails[:, 0] == 0)
    if rows is not None and len(others):
        taken = rows.take(pa.array(others))
        values = {contract.view_name(name): encode_values(contract, taken, name) for name in contract.features}
        tails[others] = hash_tails(values, schema_id(contract.feature_view))
    return tails


def _part(contract: ViewContract, path: File, window: Window, own_columns: str) -> Part | None:
    """A file as its name and footer have it; None if it has no rows within. One of somebody else may have any."""
    name = parse_name(path.name) if path.parent == contract.directory else None
    if name is None:
        return Part(path)
    footer = read_footer(path)
    if footer.min_us is None or footer.max_us is None or not window.meets(footer.min_us, footer.max_us):
        return None
    stream = None
    if isinstance(name, SegmentName) and (chain := parse_stream_chain(name.chain)) is not None:
        topic, partition, epoch = chain
        stream = epoch, partition, topic, name.first
    is_replay = isinstance(name, SegmentName) and name.chain.startswith(REPLAY)
    return Part(path, stream, is_replay, footer.columns == own_columns)


@lru_cache(maxsize=64)
def _accepted(path: File, size: int, mtime_ns: int, identity: int | str) -> Offsets:
    """The offsets of a segment's rows."""
    del size, mtime_ns, identity  # part of the key: where a folder was removed and filled anew, names come again
    return read_accepted(path)


@lru_cache(maxsize=16_384)
def _float_columns(path: File, mtime_ns: int) -> frozenset[str]:
    """The columns of a file that hold floats."""
    del mtime_ns  # part of the key: a file of somebody else may change
    return frozenset(field.name for field in pq.read_schema(readable(path)) if pa.types.is_floating(field.type))


def _present(columns: Sequence[str]) -> str:
    return " AND ".join(f"{column} IS NOT NULL" for column in columns)


def _aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def microseconds(moment: datetime) -> int:
    """A time in microseconds since the epoch; a naive one is UTC."""
    return (_aware(moment) - _EPOCH) // timedelta(microseconds=1)


def _moment(us: int) -> datetime | None:
    """A time, given in microseconds; None beyond the years that Python knows."""
    try:
        return _EPOCH + timedelta(microseconds=us)
    except OverflowError:
        return None


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    """An SQL string."""
    return "'" + value.replace("'", "''") + "'"
