"""Reading history with Spark: the same answers as `headrace.scan`, for more than one machine holds.

The same three stages: keys, times and nothing else find the event and created time of each winner; the rows of these
times, which are few, are fetched; where several tie, the order of `headrace.encode` decides, computed by its own code
in Python workers. So wide rows are never shuffled, and hardly any row goes through Python.

Columns are called `c0`, `c1`, ... in the order of the contract's schema, so that no name of a view meets Spark's rules
for names; `file` and `position` are the place of a row. Times are compared as instants, whatever the session's zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import Window as Over
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import BinaryType, LongType, StringType, StructField, StructType

from headrace.contract import ViewContract
from headrace.errors import ConfigError
from headrace.objects import ObjectPath
from headrace.place import File
from headrace.scan import AS_OF, ROWS_A_CHUNK, History, PointInTime, Window, connection, microseconds, window_of
from headrace.segments import columns_id, parse_name, read_footer

TAIL = "tail"
FOUND = "found"
"""The struct of the features that a row has as of its time, in the order wanted."""

_FILE, _POSITION = "file", "position"
_MAX_TTL_US = 1 << 61
_WORKER_MEMORY = "1GB"
"""Of a Python worker's DuckDB; it holds a batch or streams a file."""


def history(session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window) -> DataFrame:
    """The rows of some files within a window: `c0`, ..., `file`, `position`. Files without such rows are not opened.

    Spark reads the segments that have the view's very columns. Older schemas and files of others are read by DuckDB in
    Python workers, a task a file, so that both engines cast, fill and refuse alike.
    """
    native: list[Path] = []
    others: list[Path] = []
    own_columns = columns_id(contract.schema)
    plain = _is_plain(contract.schema.names)
    for path in files:
        if isinstance(path, ObjectPath):
            msg = f"{path}: Spark reads folders, and this is in an object store; read the view by HeadraceOfflineStore"
            raise ConfigError(msg)
        if path.parent != contract.directory or parse_name(path.name) is None:
            others.append(path)
            continue
        footer = read_footer(path)
        if footer.min_us is not None and footer.max_us is not None and window.meets(footer.min_us, footer.max_us):
            (native if plain and footer.columns == own_columns else others).append(path)
    if native and others:
        rows = _read_native(session, contract, native).unionByName(_read_others(session, contract, others, window))
    elif native:
        rows = _read_native(session, contract, native)
    else:
        rows = _read_others(session, contract, others, window)
    return rows.where(_within(window, _Columns(contract).time))


def newest(session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window) -> DataFrame:
    """The newest row of each key within a window, by the total order: `c0`, ..., and `tail`, the last of that order.

    Rows without a key or an event time belong to nobody and are left out.
    """
    columns = _Columns(contract)
    rows = history(session, contract, files, window).where(columns.are_present)
    best = rows.groupBy(*columns.keys).agg(F.max(columns.times).alias("best")).where("best IS NOT NULL")
    return _winners(contract, rows, best.select(*columns.keys, "best.*"), broadcast=False)


def moments(session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window) -> DataFrame:
    """Each join key and event time that any row within a window has, once; positional, in the contract's order."""
    columns = _Columns(contract)
    rows = history(session, contract, files, window).where(columns.are_present)
    return rows.select(*contract_keys(contract), columns.time).distinct()


def contract_keys(contract: ViewContract) -> list[str]:
    """What the join keys are called here; none for a view without an entity."""
    return [f"c{contract.schema.get_field_index(key)}" for key in contract.join_keys]


def as_of(
    session: SparkSession,
    contract: ViewContract,
    files: Sequence[File],
    entities: DataFrame,
    keys: Sequence[str],
    join: PointInTime,
    bounds: tuple[int | None, int | None],
    *,
    are_few: bool,
) -> DataFrame:
    """The entities with a column `FOUND`: the newest features at or before their time, null where there are none.

    Every row of the entities stays, in no order, its columns as they are.

    Args:
        entities: with the time as `AS_OF`, a timestamp.
        keys: its columns that hold the join keys, in the contract's order and types.
        bounds: the least and the greatest time of the entities, microseconds.
        are_few: whether the entities' keys fit into the memory of each executor.
    """
    columns = _Columns(contract)
    within = window_of(pa.table({AS_OF: pa.array(bounds, pa.timestamp("us", "UTC"))}), join)
    rows = history(session, contract, files if within is not None else [], within or Window())
    rows = rows.where(columns.are_present)
    lines = entities.select(F.struct("*").alias("payload"), *_keys_of(entities, keys, columns), F.col(AS_OF))
    relevant = rows
    if are_few:
        relevant = rows.join(F.broadcast(lines.select(*columns.keys).distinct()), columns.keys, "left_semi")
    by_created = join.by_created and contract.created_field is not None
    hits = _hits(columns, relevant, lines, join.ttl_us, by_created=by_created)
    best = hits.where("best IS NOT NULL").select(*columns.keys, "best.*").distinct()
    winners = _winners(contract, rows, best, broadcast=are_few)
    features = [
        F.col(f"c{contract.schema.get_field_index(name)}").alias(f"f{i}") for i, name in enumerate(join.features)
    ]
    wanted = winners.select(
        *(F.col(key).alias(f"w{i}") for i, key in enumerate(columns.keys)),
        F.col(columns.time).alias("event"),
        columns.created.alias("made"),
        F.struct(*features).alias(FOUND),
    )
    same = (F.col("best.event") == F.col("event")) & F.col("best.made").eqNullSafe(F.col("made"))
    for i, key in enumerate(columns.keys):
        same = same & (F.col(key) == F.col(f"w{i}"))
    lost = F.raise_error(
        F.lit(f"feature view `{contract.name}`: the entity rows differ each time they are computed; store them first")
    )
    found = F.when(F.col("best").isNotNull() & F.col(FOUND).isNull(), lost.cast(wanted.schema[FOUND].dataType))
    return hits.join(wanted, same, "left").select("payload.*", found.otherwise(F.col(FOUND)).alias(FOUND))


def gathered(frame: DataFrame, schema: pa.Schema) -> pa.Table:
    """A Spark frame on the driver, its columns by position named and typed as in a schema; times as the instants."""
    return frame.toArrow().rename_columns(schema.names).cast(schema)


class _Columns:
    """How expressions name the columns of a view that decide.

    Attributes:
        keys: the join keys; a constant where there are none, as all rows are one key's then.
        time: the event time.
    """

    def __init__(self, contract: ViewContract) -> None:
        self.keys = contract_keys(contract) or ["nobody"]
        self.time = f"c{contract.schema.get_field_index(contract.timestamp_field)}"
        made = contract.created_field
        self.created = (
            F.lit(None).cast("timestamp") if made is None else F.col(f"c{contract.schema.get_field_index(made)}")
        )

    @property
    def times(self) -> Column:
        """Event and created time: what SQL compares. An absent created time is the least, as nulls in structs are."""
        return F.struct(F.col(self.time).alias("event"), self.created.alias("made"))

    @property
    def are_present(self) -> Column:
        """Whether a row has its keys and its event time."""
        condition = F.col(self.time).isNotNull()
        for key in self.keys:
            condition = condition & F.col(key).isNotNull()
        return condition


def _keys_of(entities: DataFrame, keys: Sequence[str], columns: _Columns) -> list[Column]:
    if not keys:
        return [F.lit(True).alias("nobody")]
    return [entities[key].alias(name) for key, name in zip(keys, columns.keys, strict=True)]


def _hits(columns: _Columns, rows: DataFrame, lines: DataFrame, ttl_us: int | None, *, by_created: bool) -> DataFrame:
    """The lines with a column `best`: event and created time of the newest row known by then and young enough."""
    known = F.greatest(F.col(columns.time), columns.created) if by_created else F.col(columns.time)
    facts = rows.where(columns.created.isNotNull()) if by_created else rows
    nothing = F.lit(None).cast(lines.schema["payload"].dataType)
    timeline = facts.select(
        nothing.alias("payload"), *columns.keys, known.alias(AS_OF), columns.times.alias("best")
    ).unionAll(lines.select("payload", *columns.keys, AS_OF, F.lit(None).cast(_times_type()).alias("best")))
    order = [F.col(AS_OF).asc_nulls_first(), F.col("payload").isNotNull().asc()]
    until = Over.partitionBy(*columns.keys).orderBy(*order).rowsBetween(Over.unboundedPreceding, Over.currentRow)
    best = F.max("best").over(until)
    asked = timeline.select("payload", *columns.keys, AS_OF, best.alias("best")).where("payload IS NOT NULL")
    if ttl_us is None:
        return asked
    is_young = F.unix_micros("best.event") >= F.unix_micros(AS_OF) - F.lit(min(ttl_us, _MAX_TTL_US)).cast("long")
    return asked.withColumn("best", F.when(is_young, F.col("best")))


def _times_type() -> StructType:
    schema = pa.schema([("event", pa.timestamp("us", "UTC")), ("made", pa.timestamp("us", "UTC"))])
    return from_arrow_schema(schema)


def _winners(contract: ViewContract, rows: DataFrame, best: DataFrame, *, broadcast: bool) -> DataFrame:
    """The one row of each key that has the event and created time in `best`, ties decided: `c0`, ..., and `tail`.

    Args:
        best: the keys, `event` and `made`, each key and pair of times once.
    """
    columns = _Columns(contract)
    wanted = best.select(
        *(F.col(key).alias(f"w{i}") for i, key in enumerate(columns.keys)), F.col("event"), F.col("made")
    )
    same = (F.col(columns.time) == F.col("event")) & columns.created.eqNullSafe(F.col("made"))
    for i, key in enumerate(columns.keys):
        same = same & (F.col(key) == F.col(f"w{i}"))
    names = [f"c{i}" for i in range(len(contract.schema))]
    candidates = rows.join(F.broadcast(wanted) if broadcast else wanted, same).select(*names, _FILE, _POSITION)
    tailed = _with_tails(contract, candidates)
    every = F.max_by(F.struct(*names, TAIL), F.col(TAIL)).alias("row")
    grouped = [*contract_keys(contract), columns.time]
    if contract.created_field is not None:
        grouped.append(f"c{contract.schema.get_field_index(contract.created_field)}")
    winners = tailed.groupBy(*grouped).agg(every).select("row.*")
    return winners if contract.join_keys else winners.withColumn("nobody", F.lit(True))


def _with_tails(contract: ViewContract, candidates: DataFrame) -> DataFrame:
    """Rows with what breaks their ties, see `headrace.encode.Tails`; `file` and `position` are gone."""
    names = [f"c{i}" for i in range(len(contract.schema))]
    schema = StructType([*(candidates.schema[name] for name in names), StructField(TAIL, BinaryType())])

    def add(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if not batch.num_rows:
                continue
            table = pa.Table.from_batches([batch])
            paths = table.column(_FILE).to_pylist()
            with connection(_WORKER_MEMORY) as con:
                read = History(con, contract, [Path(path) for path in sorted(set(paths))], Window())
                place = table.column_names.index(_FILE)
                numbered = table.set_column(place, _FILE, pa.array(read.numbers(paths)))
                tails = read.tails(numbered, hashed=True)
            bytes_of = pa.array([tail.tobytes() for tail in np.ascontiguousarray(tails)], pa.binary())
            yield from table.select(names).append_column(TAIL, bytes_of).to_batches()

    return candidates.mapInArrow(add, schema)


def _read_native(session: SparkSession, contract: ViewContract, files: Sequence[Path]) -> DataFrame:
    """Segments that have the view's very columns. Whatever the session says, no file is passed over or shifted."""
    reader = session.read.schema(from_arrow_schema(contract.schema)).options(
        ignoreMissingFiles=False, ignoreCorruptFiles=False, datetimeRebaseMode="CORRECTED", __globPaths__=False
    )
    rows = reader.parquet(*(f"file://{path}" for path in files))
    names = [f"c{i}" for i in range(len(contract.schema))]
    placed = rows.select("*", "_metadata.file_name", "_metadata.row_index").toDF(*names, _FILE, _POSITION)
    path = F.concat(F.lit(f"{contract.directory}/"), F.col(_FILE))
    return placed.withColumns({_FILE: path, "nobody": F.lit(True)})


def _read_others(session: SparkSession, contract: ViewContract, files: Sequence[Path], window: Window) -> DataFrame:
    """Files that Spark would read otherwise than we do, or not at all."""
    names = [f"c{i}" for i in range(len(contract.schema))]
    kinds = from_arrow_schema(pa.schema(list(zip(names, contract.schema.types, strict=True))))
    schema = StructType([*kinds.fields, StructField(_FILE, StringType()), StructField(_POSITION, LongType())])
    if not files:
        return session.createDataFrame([], schema).withColumn("nobody", F.lit(True))

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for path in (Path(text) for batch in batches for text in batch.column(0).to_pylist()):
            with connection(_WORKER_MEMORY) as con:
                reader = History(con, contract, [path], window)
                for batch in con.sql("FROM history").to_arrow_reader(ROWS_A_CHUNK):
                    rows = reader.named(pa.Table.from_batches([batch])).rename_columns(names)
                    placed = rows.append_column(_FILE, pa.repeat(str(path), len(rows)))
                    position = pa.Table.from_batches([batch]).column(_POSITION)
                    yield from placed.append_column(_POSITION, position).combine_chunks().to_batches()

    listed = session.createDataFrame([(str(path),) for path in files], StructType([StructField("path", StringType())]))
    return listed.repartition(len(files)).mapInArrow(read, schema).withColumn("nobody", F.lit(True))


def _is_plain(names: Sequence[str]) -> bool:
    """Whether Spark can tell the columns of a file apart, which it does without regard to case."""
    return len({name.lower() for name in names} | {"_metadata"}) == len(names) + 1


def _within(window: Window, column: str) -> Column:
    """Whether a time is in a window, both ends inclusive."""
    condition = F.lit(True)
    if window.start is not None:
        condition = condition & (F.col(column) >= F.timestamp_micros(F.lit(microseconds(window.start)).cast("long")))
    if window.end is not None:
        condition = condition & (F.col(column) <= F.timestamp_micros(F.lit(microseconds(window.end)).cast("long")))
    return condition
