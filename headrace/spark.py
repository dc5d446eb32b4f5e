"""Feast on Spark over the same repository and folders, for what one machine no longer takes.

    offline_store: {type: headrace.spark.HeadraceSparkOfflineStore, spark_conf: {spark.master: "..."}}
    batch_engine: {type: headrace.spark.HeadraceSparkEngine}

Nothing is converted: the stream, the batch chain and this read and write the same segments. Feast's own Spark store
takes no `FileSource`, and its SQL loses or doubles rows where times tie; so the questions are asked by
`headrace.spark_scan`, and only what surrounds them (session, jobs, saved datasets, other sources) is Feast's.
Needs `pip install headrace[spark]` and Java 17, here and on the executors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureView, OnDemandFeatureView, RepoConfig
from feast.data_source import DataSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.common.serde import SerializedArtifacts
from feast.infra.compute_engines.spark.compute import SparkComputeEngine, SparkComputeEngineConfig
from feast.infra.compute_engines.spark.job import SparkMaterializationJob
from feast.infra.offline_stores.contrib.spark_offline_store.spark import (
    SparkOfflineStore,
    SparkOfflineStoreConfig,
    SparkRetrievalJob,
    _get_entity_schema,
    get_spark_session_or_start_new_with_repoconfig,
)
from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SavedDatasetSparkStorage
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import (
    DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL,
    infer_event_timestamp_from_entity_df,
)
from feast.infra.registry.base_registry import BaseRegistry
from feast.saved_dataset import SavedDatasetStorage
from feast.utils import compute_non_entity_date_range
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_type
from pyspark.sql.types import (
    ByteType,
    DataType,
    DateType,
    IntegerType,
    LongType,
    ShortType,
    TimestampNTZType,
    TimestampType,
)

from headrace import spark_worker
from headrace.chains import Folder
from headrace.contract import TIMESTAMP, ViewContract
from headrace.errors import ConfigError
from headrace.offline import (
    AskedView,
    HeadraceOfflineStore,
    HeadraceRetrievalJob,
    contract_of,
    entities_of,
    is_parquet,
    wanted_columns,
    with_files,
)
from headrace.online import NewestWinsStore
from headrace.place import File
from headrace.scan import AS_OF, PointInTime, Window, reading
from headrace.segments import time_bounds
from headrace.spark_scan import FOUND, as_of, gathered, history, moments, newest

_ROW = "row"
_FEW_ENTITIES = 1_000_000
"""Entity frames up to here are broadcast: some tens of megabytes."""

_INTEGERS: dict[type[DataType], int] = {ByteType: 8, ShortType: 16, IntegerType: 32, LongType: 64}


class HeadraceSparkOfflineStoreConfig(SparkOfflineStoreConfig):
    """Configuration of `HeadraceSparkOfflineStore`; the fields are those of Feast's Spark store."""

    type: Literal["headrace.spark.HeadraceSparkOfflineStore"] = "headrace.spark.HeadraceSparkOfflineStore"


class HeadraceSparkRetrievalJob(SparkRetrievalJob):
    """A retrieval by Spark that runs when its result is asked for, each time anew.

    Args:
        frame: makes the Spark frame.
        table: makes the result on the driver. Times are `timestamp[us, UTC]` in it.
    """

    def __init__(
        self,
        session: SparkSession,
        config: RepoConfig,
        *,
        frame: Callable[[], DataFrame],
        table: Callable[[], pa.Table],
        full_feature_names: bool = False,
        on_demand: Sequence[OnDemandFeatureView] = (),
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        super().__init__(session, "", full_feature_names, config, list(on_demand), metadata)
        self._frame = frame
        self._table = table

    def to_spark_df(self) -> DataFrame:
        """The result as a Spark frame over the files that count now; it fails if they are removed before it runs."""
        return self._frame()

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._table()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._table().to_pandas()
        return frame

    def persist(
        self, storage: SavedDatasetStorage, allow_overwrite: bool | None = False, timeout: int | None = None
    ) -> None:
        """Write the result as a saved dataset: into Spark's storage by Spark, into files as `HeadraceOfflineStore`."""
        if isinstance(storage, SavedDatasetSparkStorage):
            super().persist(storage, allow_overwrite, timeout)
            return
        local = HeadraceRetrievalJob(
            self._table,
            self._config,
            full_feature_names=self.full_feature_names,
            on_demand=self.on_demand_feature_views,
            metadata=self.metadata,
        )
        local.persist(storage, bool(allow_overwrite), timeout)


class HeadraceSparkOfflineStore(SparkOfflineStore):
    """Feast's offline interface over segments, answered by Spark as `HeadraceOfflineStore` answers it.

    Views on a `SparkSource` or `IcebergSource` go to Feast's Spark store, from which this one derives.
    """

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row of each key within the window, both ends inclusive; no feature named means all columns.

        The columns have the view's names, as Feast's Spark engine wants them.
        """
        contract = contract_of(config, data_source, [*join_key_columns, *feature_name_columns])
        arguments = (join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)
        if contract is None:
            other = HeadraceOfflineStore if is_parquet(data_source) else SparkOfflineStore
            return other.pull_latest_from_table_or_query(config, data_source, *arguments, start_date, end_date)
        return _pull(config, contract, wanted_columns(*arguments), newest, Window(start_date, end_date))

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Every row within the window, both ends inclusive; no feature named means all columns.

        The columns have the view's names, as Feast's Spark engine wants them.
        """
        contract = contract_of(config, data_source, [*join_key_columns, *feature_name_columns])
        arguments = (join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)
        if contract is None:
            other = HeadraceOfflineStore if is_parquet(data_source) else SparkOfflineStore
            return other.pull_all_from_table_or_query(config, data_source, *arguments, start_date, end_date)
        return _pull(config, contract, wanted_columns(*arguments), history, Window(start_date, end_date))

    @staticmethod
    def get_historical_features(  # type: ignore[override]
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **kwargs: Any,
    ) -> RetrievalJob:
        """Point-in-time features: every row of `entity_df` with the newest values at or before its time.

        As `HeadraceOfflineStore.get_historical_features`. A pandas frame keeps its order; a Spark frame, and what
        there is without an `entity_df`, has none.

        Args:
            entity_df: a pandas frame; a Spark frame, or SQL, which Spark runs, for more entities than the driver holds.
            **kwargs: `start_date`, `end_date`; `filter_by_created_timestamp`.

        Raises:
            ConfigError: the entities lack a join key, or have it in another type, or a time that is none; or some of
                the views are in files and others in Spark's tables.
        """
        ours = [is_parquet(view.batch_source) for view in feature_views]
        if not any(ours):
            return SparkOfflineStore.get_historical_features(
                config, feature_views, feature_refs, entity_df, registry, project, full_feature_names, **kwargs
            )
        if not all(ours):
            others = ", ".join(view.name for view, is_ours in zip(feature_views, ours, strict=True) if not is_ours)
            msg = (
                f"expected views that all have a FileSource of Parquet, found others among them: {others}; "
                "ask for these by themselves"
            )
            raise ConfigError(msg)
        session = _for_ours(get_spark_session_or_start_new_with_repoconfig(config.offline_store))
        views = [AskedView.of(view, config, feature_refs, full_feature_names) for view in feature_views]
        by_created = bool(kwargs.get("filter_by_created_timestamp"))
        since: datetime | None = None
        if entity_df is None:
            since, end = compute_non_entity_date_range(feature_views, kwargs.get("start_date"), kwargs.get("end_date"))
            entity_df = _all_moments(session, views, Window(since, end))
        joins = [PointInTime(view.columns, view.ttl_us, by_created, since) for view in views]
        asked: _LocalEntities | _SparkEntities
        if isinstance(entity_df, pd.DataFrame):
            asked = _LocalEntities(session, config, views, joins, entity_df)
        else:
            entities = session.sql(entity_df) if isinstance(entity_df, str) else entity_df
            asked = _SparkEntities(session, views, joins, entities)
        return HeadraceSparkRetrievalJob(
            session,
            config,
            frame=asked.frame,
            table=asked.table,
            full_feature_names=full_feature_names,
            on_demand=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            metadata=RetrievalMetadata(feature_refs, asked.keys, *asked.bounds),
        )

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Append rows to the view's `push` chain, without Spark; see `HeadraceOfflineStore.offline_write_batch`."""
        store = HeadraceOfflineStore if is_parquet(feature_view.batch_source) else SparkOfflineStore
        store.offline_write_batch(config, feature_view, table, progress)

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """For `feast apply`; see `HeadraceOfflineStore.validate_data_source`."""
        if is_parquet(data_source):
            HeadraceOfflineStore().validate_data_source(config, data_source)
        else:
            super().validate_data_source(config, data_source)

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Column names and types: of the view that the source belongs to, else of the files, else as Spark has them."""
        if is_parquet(data_source):
            return HeadraceOfflineStore().get_table_column_names_and_types_from_data_source(config, data_source)
        return super().get_table_column_names_and_types_from_data_source(config, data_source)


class HeadraceSparkEngineConfig(SparkComputeEngineConfig):
    """Configuration of `HeadraceSparkEngine`; the fields are those of Feast's Spark engine."""

    type: Literal["headrace.spark.HeadraceSparkEngine"] = "headrace.spark.HeadraceSparkEngine"  # type: ignore[assignment]


class HeadraceSparkEngine(SparkComputeEngine):
    """Materialize the newest row of each key within the window, both ends inclusive, in the order that it has offline.

    The executors write, each its keys. A failing write fails the materialization, and Feast then records no interval.
    Idempotent; safe beside a running stream. Other views, and online stores that are not ours, go through Feast's Spark
    engine, from which this one derives.
    """

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, from_offline_store: bool = False, **kwargs: Any
    ) -> MaterializationJob:
        view = task.feature_view
        if not self._takes(view):
            return super()._materialize_one(registry, task, from_offline_store, **kwargs)
        name = f"{view.name}-{task.start_time}-{task.end_time}"
        session = _for_ours(self._get_feature_view_spark_session(view))
        contract = ViewContract.from_feast(view, self.repo_config)
        artifacts = SerializedArtifacts.serialize(view, self.repo_config)  # type: ignore[no-untyped-call]
        window = Window(task.start_time, task.end_time)

        def work(files: list[File]) -> None:
            rows = newest(session, contract, files, window)
            if self.repo_config.batch_engine.partitions:
                rows = rows.repartition(self.repo_config.batch_engine.partitions)
            rows.mapInArrow(partial(spark_worker.write, artifacts), "written long").count()

        try:
            reading(Folder.of(contract).files, lambda files: files, work)
        except Exception as error:  # noqa: BLE001 - Feast raises what the job holds
            return SparkMaterializationJob(name, MaterializationJobStatus.ERROR, error)
        return SparkMaterializationJob(name, MaterializationJobStatus.SUCCEEDED)

    def _takes(self, view: Any) -> bool:
        """Whether a view is plain rows of a folder of Parquet files, and both stores are ours."""
        if type(view) is not FeatureView or view.source_views or view.enable_validation:
            return False
        ours = isinstance(self.offline_store, HeadraceSparkOfflineStore) and isinstance(
            self.online_store, NewestWinsStore
        )
        return ours and is_parquet(view.batch_source)


class _LocalEntities:
    """A pandas frame of entities: Spark gets its keys and times alone, and the driver puts the features beside it.

    Attributes:
        keys: the columns besides the time.
        bounds: the least and the greatest time.
    """

    def __init__(
        self,
        session: SparkSession,
        config: RepoConfig,
        views: Sequence[AskedView],
        joins: Sequence[PointInTime],
        entity_df: pd.DataFrame,
    ) -> None:
        self._session = session
        self._entities, time = entities_of(entity_df, config)
        self._asked = [(view, view.typed(self._entities, time), join) for view, join in zip(views, joins, strict=True)]
        self.keys = [name for name in self._entities.column_names if name != time]
        bounds = pc.min_max(self._entities.column(time).cast(TIMESTAMP, safe=False))
        self.bounds = bounds["min"].as_py(), bounds["max"].as_py()

    def frame(self) -> DataFrame:
        return self._session.createDataFrame(self.table())

    def table(self) -> pa.Table:
        result = self._entities
        for view, typed, join in self._asked:
            found = view.reading(partial(self._features, view, typed, join))
            for i, name in enumerate(view.names):
                result = result.append_column(name, pc.struct_field(found, i))
        return result

    def _features(self, view: AskedView, typed: pa.Table, join: PointInTime, files: list[File]) -> pa.ChunkedArray:
        """The features as structs, aligned with the entities."""
        kind = pa.struct(
            [pa.field(f"f{i}", view.contract.schema.field(name).type) for i, name in enumerate(view.columns)]
        )
        if not len(typed):
            return pa.chunked_array([], kind)
        keys = [f"k{i}" for i in range(len(view.keys))]
        asked = typed.rename_columns([*keys, AS_OF]).append_column(_ROW, pa.array(np.arange(len(typed))))
        joined = as_of(
            self._session,
            view.contract,
            files,
            self._session.createDataFrame(asked),
            keys,
            join,
            time_bounds(typed, AS_OF),
            are_few=len(typed) <= _FEW_ENTITIES,
        )
        found = gathered(joined.select(_ROW, FOUND), pa.schema([(_ROW, pa.int64()), (FOUND, kind)]))
        return found.sort_by(_ROW).column(FOUND)


class _SparkEntities:
    """A Spark frame of entities, view after view joined by Spark alone.

    Attributes:
        keys: the columns besides the time.
        bounds: the least and the greatest time.
    """

    def __init__(
        self, session: SparkSession, views: Sequence[AskedView], joins: Sequence[PointInTime], entities: DataFrame
    ) -> None:
        self._session = session
        self._views = list(zip(views, joins, strict=True))
        self._names = entities.columns
        schema = _get_entity_schema(session, entities)  # type: ignore[arg-type]
        time = infer_event_timestamp_from_entity_df(schema)
        self.keys = [name for name in self._names if name != time]
        for view in views:
            view.check(self._names)
        inner = entities.toDF(*(f"e{i}" for i in range(len(self._names))))
        number = self._names.index(time)
        times = _instant(inner, f"e{number}", f"the entity_df's column `{time}`")
        self._frame = inner.withColumns({f"e{number}": times, AS_OF: times})
        low, high = self._frame.select(F.unix_micros(F.min(AS_OF)), F.unix_micros(F.max(AS_OF))).collect()[0]
        self._bounds_us = low, high
        self.bounds = tuple(pa.scalar(us, pa.int64()).cast(TIMESTAMP).as_py() for us in (low, high))

    def frame(self) -> DataFrame:
        return self._over([view.reading(lambda files: files) for view, _ in self._views])

    def table(self) -> pa.Table:
        files: list[list[File]] = []

        def find() -> list[list[File]]:
            files[:] = [view.reading(lambda found: found) for view, _ in self._views]
            return files

        return reading(
            find, lambda lists: list(chain.from_iterable(lists)), lambda lists: self._gathered(self._over(lists))
        )

    def _gathered(self, frame: DataFrame) -> pa.Table:
        table = frame.toArrow()
        zones = [
            pa.field(f.name, TIMESTAMP if pa.types.is_timestamp(f.type) and f.type.tz else f.type) for f in table.schema
        ]
        kinds = {
            name: view.contract.schema.field(column).type
            for view, _ in self._views
            for name, column in zip(view.names, view.columns, strict=True)
        }
        return table.cast(pa.schema([field.with_type(kinds.get(field.name, field.type)) for field in zones]))

    def _over(self, files: Sequence[Sequence[File]]) -> DataFrame:
        frame, features = self._frame, []
        for i, ((view, join), found) in enumerate(zip(self._views, files, strict=True)):
            keys = []
            for j, (key, column) in enumerate(view.keys.items()):
                name, inner = f"v{i}k{j}", f"e{self._names.index(column)}"
                where = f"join key `{column}` of feature view `{view.contract.name}`"
                typed = _typed(frame, inner, from_arrow_type(view.contract.schema.field(key).type), where)
                frame = frame.withColumn(name, typed)
                keys.append(name)
            if i:  # what each view adds is asked for twice by the next one, and so on
                frame = frame.localCheckpoint(eager=False)
            joined = as_of(self._session, view.contract, found, frame, keys, join, self._bounds_us, are_few=False)
            frame = joined.withColumnRenamed(FOUND, f"v{i}").drop(*keys)
            features += [F.col(f"v{i}.f{j}") for j in range(len(view.names))]
        names = [name for view, _ in self._views for name in view.names]
        return frame.select(*(f"e{i}" for i in range(len(self._names))), *features).toDF(*self._names, *names)


def _for_ours(session: SparkSession) -> SparkSession:
    """A session whose workers on this machine run the Python that we run, not whatever `python3` is on the path."""
    context = session.sparkContext
    if (context.master or "").startswith("local") and "PYSPARK_PYTHON" not in os.environ:
        context.pythonExec = sys.executable
    return session


def _pull(
    config: RepoConfig,
    contract: ViewContract,
    columns: Sequence[str],
    read: Callable[[SparkSession, ViewContract, Sequence[File], Window], DataFrame],
    window: Window,
) -> RetrievalJob:
    """A job over the columns wanted, or all, of what `read` finds; for a view without an entity with Feast's dummy."""
    session = _for_ours(get_spark_session_or_start_new_with_repoconfig(config.offline_store))
    names = list(columns) or contract.schema.names
    schema = pa.schema([contract.schema.field(name) for name in names])
    schema = schema.empty_table().rename_columns([contract.view_name(name) for name in names]).schema
    if not contract.join_keys:
        schema = schema.append(pa.field(DUMMY_ENTITY_ID, pa.string()))

    def frame(files: list[File]) -> DataFrame:
        inner = [f"c{contract.schema.get_field_index(name)}" for name in names]
        rows = read(session, contract, files, window).select(*inner)
        if not contract.join_keys:
            rows = rows.withColumn("dummy", F.lit(DUMMY_ENTITY_VAL))
        return rows.toDF(*schema.names)

    with_them = partial(with_files, contract.directory)
    return HeadraceSparkRetrievalJob(
        session,
        config,
        frame=lambda: with_them(frame),
        table=lambda: with_them(lambda files: gathered(frame(files), schema)),
    )


def _all_moments(session: SparkSession, views: Sequence[AskedView], window: Window) -> DataFrame:
    """An entity frame of each join key and event time that any of the views has within a window."""
    frames = [
        view.reading(partial(moments, session, view.contract, window=window)).toDF(
            *view.keys.values(), DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL
        )
        for view in views
    ]
    every = frames[0]
    for frame in frames[1:]:
        every = every.unionByName(frame, allowMissingColumns=True)
    return every.distinct()


def _instant(frame: DataFrame, column: str, where: str) -> Column:
    """A column of times as instants; those without a zone, and dates, are UTC, whatever the session's zone.

    Raises:
        ConfigError: it is of no such type.
    """
    kind = frame.schema[column].dataType
    if isinstance(kind, TimestampType):
        return F.col(column)
    if isinstance(kind, TimestampNTZType | DateType):
        epoch = "TIMESTAMP_NTZ '1970-01-01 00:00:00'"
        return F.timestamp_micros(F.expr(f"timestampdiff(MICROSECOND, {epoch}, CAST({column} AS TIMESTAMP_NTZ))"))
    msg = f"{where}: expected times, found {kind.simpleString()}; cast it to a timestamp"
    raise ConfigError(msg)


def _typed(frame: DataFrame, column: str, wanted: DataType, where: str) -> Column:
    """A join key in the history's type. A whole number that the history's type cannot hold is nobody's: null.

    Raises:
        ConfigError: it is of another kind.
    """
    kind = frame.schema[column].dataType
    if isinstance(wanted, TimestampType):
        return _instant(frame, column, where)
    if kind == wanted:
        return F.col(column)
    if type(kind) in _INTEGERS and type(wanted) in _INTEGERS:
        limit = 1 << (_INTEGERS[type(wanted)] - 1)
        return F.when(F.col(column).between(-limit, limit - 1), F.col(column).cast(wanted))
    msg = f"{where}: expected {wanted.simpleString()}, found {kind.simpleString()} in the entity_df; cast it"
    raise ConfigError(msg)
