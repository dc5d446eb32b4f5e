"""Reading history with Spark: the same answers as `headrace.scan`, for more than one machine holds.

The same three stages: keys, times and nothing else find the event and created time of each winner; the rows of these
times, which are few, are fetched; where several tie, the order of `headrace.encode` decides, computed by its own code
in Python workers. So wide rows are never shuffled, and hardly any row goes through Python but those of the files that
Python workers read.

Columns are called `c0`, `c1`, ... in the order of the contract's schema, so that no name of a view meets Spark's rules
for names; `file` and `position` are the place of a row, and `times` its event and created time, which decide. Times are
compared as instants, whatever the session's zone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import Window as Over
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import BinaryType, StructField, StructType

from headrace import spark_worker
from headrace.contract import TIMESTAMP, ViewContract
from headrace.place import File, stat_of
from headrace.scan import AS_OF, PointInTime, Window, microseconds, parts_of, window_of
from headrace.spark_worker import FILE, POSITION, TAIL

FOUND = "found"
"""The struct of the features that a row has as of its time, in the order wanted."""

_TIMES, _NOBODY = "times", "nobody"
_TIMES_TYPE = from_arrow_schema(pa.schema([("event", TIMESTAMP), ("made", TIMESTAMP)]))
_MAX_TTL_US = 1 << 61
_TASK_BYTES = 64 << 20
"""How much Python workers read in a task, where files are smaller."""


def history(session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window) -> DataFrame:
    """The rows of some files within a window: `c0`, ..., `file`, `position`."""
    return _History(session, contract, files, window).rows()


def newest(session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window) -> DataFrame:
    """The newest row of each key within a window, by the total order: `c0`, ..., and `tail`, the last of that order.

    Rows without a key or an event time belong to nobody and are left out.
    """
    found = _History(session, contract, files, window)
    best = found.deciding().groupBy(*found.keys).agg(F.max(_TIMES).alias(_TIMES))
    return _winners(found, best.where(f"{_TIMES} IS NOT NULL"), are_few=False).drop(_NOBODY, _TIMES)


def moments(session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window) -> DataFrame:
    """Each join key and event time that any row within a window has, once; positional, in the contract's order."""
    found = _History(session, contract, files, window)
    return found.deciding().select(*contract_keys(contract), found.time).distinct()


def contract_keys(contract: ViewContract) -> list[str]:
    """What the join keys are called here; none for a view without an entity."""
    return [_column(contract, key) for key in contract.join_keys]


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
    within = window_of(pa.table({AS_OF: pa.array(bounds, TIMESTAMP)}), join)
    history = _History(session, contract, files if within is not None else [], within or Window())
    rows = history.deciding()
    own = [entities[key] for key in keys] or [F.lit(True)]
    asked = [column.alias(name) for column, name in zip(own, history.keys, strict=True)]
    lines = entities.select(F.struct("*").alias("payload"), *asked, AS_OF)
    if are_few:
        rows = rows.join(F.broadcast(lines.select(*history.keys).distinct()), history.keys, "left_semi")
    by_created = join.by_created and contract.created_field is not None
    hits = _hits(history, rows, lines, join.ttl_us, by_created=by_created)
    best = hits.where(f"{_TIMES} IS NOT NULL").select(*history.keys, _TIMES).distinct()
    features = [F.col(_column(contract, name)).alias(f"f{i}") for i, name in enumerate(join.features)]
    winners = _winners(history, best, are_few=are_few)
    wanted = winners.select(*history.keys, _TIMES, F.struct(*features).alias(FOUND))
    lost = F.raise_error(
        F.lit(f"feature view `{contract.name}`: the entity rows differ each time they are computed; store them first")
    )
    is_lost = F.col(_TIMES).isNotNull() & F.col(FOUND).isNull()
    found = F.when(is_lost, lost.cast(wanted.schema[FOUND].dataType)).otherwise(F.col(FOUND))
    return hits.join(wanted, [*history.keys, _TIMES], "left").select("payload.*", found.alias(FOUND))


def gathered(frame: DataFrame, schema: pa.Schema) -> pa.Table:
    """A Spark frame on the driver, its columns by position named and typed as in a schema; times as the instants."""
    return frame.toArrow().rename_columns(schema.names).cast(schema)


class _History:
    """The rows of some files within a window. Files without such rows are not opened.

    Spark reads the segments in folders that have the view's very columns. Older schemas, files of others, and objects
    are read by DuckDB in Python workers, so that both engines cast, fill and refuse alike, and an object store is asked
    by the client, endpoint and credentials by which everything else asks it.

    Attributes:
        keys: the columns of the join keys; a constant where there are none, as all rows are one key's then.
        time: the column of the event time.
        created: the created time.
    """

    def __init__(self, session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window) -> None:
        self.contract, self.files = contract, files
        self.keys = contract_keys(contract) or [_NOBODY]
        self.time = _column(contract, contract.timestamp_field)
        made = contract.created_field
        self.created = F.lit(None).cast("timestamp") if made is None else F.col(_column(contract, made))
        self._session, self._window = session, window
        parts = parts_of(contract, files, window)
        native = {part.path: None for part in parts if part.is_as_is and isinstance(part.path, Path)}
        self._native = _read_native(session, contract, list(native)) if native else None
        self._others = [part.path for part in parts if part.path not in native]

    def rows(self, columns: Sequence[str] | None = None) -> DataFrame:
        """Their columns, all or these, then `position` and `file`."""
        names = columns or [f"c{i}" for i in range(len(self.contract.schema))]
        if self._native is None:
            rows = _read_others(self._session, self.contract, self._others, self._window, names)
        else:
            rows = self._native.select(*names, POSITION, FILE)
            if self._others:
                rows = rows.unionAll(_read_others(self._session, self.contract, self._others, self._window, names))
        return rows.where(_within(self._window, self.time))

    def deciding(self) -> DataFrame:
        """The columns that decide which row is the newest, see `decided`."""
        made = self.contract.created_field
        names = [*contract_keys(self.contract), self.time, *([_column(self.contract, made)] if made else [])]
        return self.decided(self.rows(list(dict.fromkeys(names))))

    def decided(self, rows: DataFrame) -> DataFrame:
        """The rows that have their keys and their event time, with `nobody` and `times`.

        In `times` an absent created time is the least, as nulls in structs are, and equal to itself.
        """
        times = F.struct(F.col(self.time).alias("event"), self.created.alias("made"))
        rows = rows.withColumns({_NOBODY: F.lit(True), _TIMES: times})
        return rows.where(" AND ".join(f"{name} IS NOT NULL" for name in [*self.keys, self.time]))


def _column(contract: ViewContract, name: str) -> str:
    return f"c{contract.schema.get_field_index(name)}"


def _hits(history: _History, rows: DataFrame, lines: DataFrame, ttl_us: int | None, *, by_created: bool) -> DataFrame:
    """The lines with the `times` of the newest row known by then and young enough; null where there is none."""
    known = F.greatest(F.col(history.time), history.created) if by_created else F.col(history.time)
    facts = rows.where(history.created.isNotNull()) if by_created else rows
    nothing = F.lit(None).cast(lines.schema["payload"].dataType)
    no_times = F.lit(None).cast(_TIMES_TYPE)
    timeline = facts.select(nothing.alias("payload"), *history.keys, known.alias(AS_OF), _TIMES).unionAll(
        lines.select("payload", *history.keys, AS_OF, no_times.alias(_TIMES))
    )
    order = [F.col(AS_OF).asc_nulls_first(), F.col("payload").isNotNull().asc()]
    until = Over.partitionBy(*history.keys).orderBy(*order).rowsBetween(Over.unboundedPreceding, Over.currentRow)
    asked = timeline.withColumn(_TIMES, F.max(_TIMES).over(until)).where("payload IS NOT NULL")
    if ttl_us is None:
        return asked
    is_young = F.unix_micros("times.event") >= F.unix_micros(AS_OF) - F.lit(min(ttl_us, _MAX_TTL_US)).cast("long")
    return asked.withColumn(_TIMES, F.when(is_young, F.col(_TIMES)))


def _winners(history: _History, best: DataFrame, *, are_few: bool) -> DataFrame:
    """The one row of each key and `times` in `best`, ties decided: `c0`, ..., `tail`, `nobody` and `times`.

    Args:
        best: each key and `times` once.
        are_few: whether they fit into the memory of each executor.
    """
    contract = history.contract
    names = [f"c{i}" for i in range(len(contract.schema))]
    rows = history.decided(history.rows())
    candidates = rows.join(F.broadcast(best) if are_few else best, [*history.keys, _TIMES])
    tailed = history.decided(_with_tails(contract, history.files, candidates.select(*names, FILE, POSITION)))
    every = F.max_by(F.struct(*names, TAIL, _NOBODY, _TIMES), F.col(TAIL)).alias("row")
    return tailed.groupBy(*contract_keys(contract), _TIMES).agg(every).select("row.*")


def _with_tails(contract: ViewContract, files: Sequence[File], candidates: DataFrame) -> DataFrame:
    """Rows with what breaks their ties, see `headrace.encode.Tails`; `file` and `position` are gone."""
    names = [f"c{i}" for i in range(len(contract.schema))]
    schema = StructType([*(candidates.schema[name] for name in names), StructField(TAIL, BinaryType())])
    by_path = {str(file): file for file in files}
    return candidates.mapInArrow(partial(spark_worker.add_tails, contract, by_path), schema)


def _read_native(session: SparkSession, contract: ViewContract, files: Sequence[Path]) -> DataFrame:
    """Segments that have the view's very columns. Whatever the session says, no file is passed over or shifted."""
    reader = session.read.schema(from_arrow_schema(contract.schema)).options(
        ignoreMissingFiles=False, ignoreCorruptFiles=False, datetimeRebaseMode="CORRECTED", __globPaths__=False
    )
    rows = reader.parquet(*(f"file://{path}" for path in files))
    names = [f"c{i}" for i in range(len(contract.schema))]
    place = rows.metadataColumn("_metadata")
    placed = rows.select("*", place["row_index"], place["file_name"]).toDF(*names, POSITION, FILE)
    return placed.withColumn(FILE, F.concat(F.lit(f"{contract.directory}/"), F.col(FILE)))


def _read_others(
    session: SparkSession, contract: ViewContract, files: Sequence[File], window: Window, names: Sequence[str]
) -> DataFrame:
    """Files that Spark would read otherwise than we do, or not at all."""
    kinds = [(name, contract.schema.types[int(name.removeprefix("c"))]) for name in names]
    schema = pa.schema([*kinds, (POSITION, pa.int64()), (FILE, pa.string())])
    tasks = _tasks(files)
    numbers = session.range(0, len(tasks), 1, max(1, len(tasks)))
    return numbers.mapInArrow(partial(spark_worker.read, contract, tasks, window, schema), from_arrow_schema(schema))


def _tasks(files: Sequence[File]) -> list[list[File]]:
    """The files in groups of about `_TASK_BYTES`, or of one."""
    tasks: list[list[File]] = []
    size = _TASK_BYTES
    for file in files:
        if size >= _TASK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(file)
        size += stat_of(file).size
    return tasks


def _within(window: Window, column: str) -> Column:
    """Whether a time is in a window, both ends inclusive."""
    condition = F.lit(True)
    if window.start is not None:
        condition = condition & (F.col(column) >= F.timestamp_micros(F.lit(microseconds(window.start)).cast("long")))
    if window.end is not None:
        condition = condition & (F.col(column) <= F.timestamp_micros(F.lit(microseconds(window.end)).cast("long")))
    return condition
