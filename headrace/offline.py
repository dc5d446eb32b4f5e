"""The Feast offline store over a folder of segments.

It reads through the one list of valid files, so compaction and corrected days are never seen twice, and appends
without touching what is there. Sources that are not Headrace's (plain Parquet files, saved datasets) are read too;
other formats go to Feast's DuckDB store, from which this one derives.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, TypeGuard, TypeVar

import ibis
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FeatureStore, FeatureView, OnDemandFeatureView, RepoConfig
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig, _write_data_source
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import (
    DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL,
    infer_event_timestamp_from_entity_df,
)
from feast.infra.registry.base_registry import BaseRegistry
from feast.saved_dataset import SavedDatasetStorage
from feast.utils import compute_non_entity_date_range

from headrace import objects
from headrace import registry as _registry  # noqa: F401 - resolves relative registries
from headrace.chains import Folder, push
from headrace.conform import conform
from headrace.contract import TIMESTAMP, ViewContract, directory_of
from headrace.errors import ConfigError, SchemaError
from headrace.objects import ObjectPath
from headrace.place import File, place_of, readable
from headrace.scan import (
    AS_OF,
    PointInTime,
    Window,
    all_rows,
    connection,
    moments,
    newest_rows,
    point_in_time,
    reading,
    rows_within,
)
from headrace.segments import parse_name

_SHOWN_REJECTS = 5

Result = TypeVar("Result")


class HeadraceOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """Configuration of `HeadraceOfflineStore`.

    Attributes:
        memory_limit: how much memory a query may use before it spills to disk, as DuckDB writes it (`4GB`, `25%`);
            by default half of the machine's.
    """

    type: Literal["headrace.offline.HeadraceOfflineStore"] = "headrace.offline.HeadraceOfflineStore"
    memory_limit: str | None = None


class HeadraceRetrievalJob(RetrievalJob):
    """A retrieval that runs when its result is asked for, each time anew."""

    def __init__(
        self,
        run: Callable[[], pa.Table],
        config: RepoConfig,
        *,
        full_feature_names: bool = False,
        on_demand: Sequence[OnDemandFeatureView] = (),
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._run = run
        self._config = config
        self._full_feature_names = full_feature_names
        self._on_demand = list(on_demand)
        self._metadata = metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._run()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame

    @property
    def full_feature_names(self) -> bool:
        """Whether features are named `<view>__<feature>`."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """The on-demand views to compute from the result."""
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """What was asked for; None for the pulls."""
        return self._metadata

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Write the result as a saved dataset, on-demand features included. A local file or folder is replaced whole.

        Raises:
            SavedDatasetLocationAlreadyExists: there is one already, and it may not be overwritten.
        """
        source, table = storage.to_data_source(), self.to_arrow(timeout=timeout)
        if not is_parquet(source):
            repo_path = str(self._config.repo_path)
            _write_data_source(ibis.memtable(table), source, repo_path, "overwrite", allow_overwrite)
            return
        path = directory_of(source, self._config)
        if path.exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=source.path)
        _replace(path, table)


class HeadraceOfflineStore(DuckDBOfflineStore):
    """Feast's offline interface over segments. Times are `timestamp[us, UTC]` throughout."""

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
        """The newest row of each key within the window, both ends inclusive; no feature named means all columns."""
        contract = contract_of(config, data_source, [*join_key_columns, *feature_name_columns])
        if contract is None:
            return DuckDBOfflineStore.pull_latest_from_table_or_query(
                config,
                data_source,
                join_key_columns,
                feature_name_columns,
                timestamp_field,
                created_timestamp_column,
                start_date,
                end_date,
            )
        columns = wanted_columns(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)

        def run(files: list[File]) -> pa.Table:
            limit = config.offline_store.memory_limit
            rows = newest_rows(contract, files, Window(start_date, end_date), memory_limit=limit)
            return _pulled(rows, columns, dummy=not join_key_columns)

        return HeadraceRetrievalJob(lambda: with_files(contract.directory, run), config)

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
        """Every row within the window, both ends inclusive; no feature named means all columns."""
        if not is_parquet(data_source):
            return DuckDBOfflineStore.pull_all_from_table_or_query(
                config,
                data_source,
                join_key_columns,
                feature_name_columns,
                timestamp_field,
                created_timestamp_column,
                start_date,
                end_date,
            )
        columns = wanted_columns(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)

        contract = contract_of(config, data_source, [*join_key_columns, *feature_name_columns])
        window = Window(start_date, end_date)

        def run(files: list[File]) -> pa.Table:
            if contract is not None and columns:
                rows = rows_within(contract, files, window, memory_limit=config.offline_store.memory_limit)
            elif files:
                rows = all_rows(files, columns, timestamp_field, window)
            else:
                rows = contract.schema.empty_table() if contract is not None else pa.table({})
            return _pulled(rows, columns, dummy=contract is not None and not join_key_columns)

        return HeadraceRetrievalJob(lambda: with_files(directory_of(data_source, config), run), config)

    @staticmethod
    def get_historical_features(  # type: ignore[override]
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **kwargs: Any,
    ) -> RetrievalJob:
        """Point-in-time features: every row of `entity_df`, in its order, with the newest values at or before its time.

        The ttl is inclusive; ties go by the total order of `headrace.encode`. Without an `entity_df` there is a row for
        each join key and event time that any of the views has from `start_date` to `end_date`, both inclusive (by
        default the longest ttl, else 30 days, up to now), with the values as of then; what is older than `start_date`
        does not count.

        Args:
            entity_df: a frame; or SQL, which DuckDB runs, in which relative paths are relative to the repository.
            **kwargs: `start_date`, `end_date`; `filter_by_created_timestamp`, by which a row is not known before it was
                created.

        Raises:
            ConfigError: the entities lack a join key, or have it in another type, or a time that is none.
        """
        if not all(is_parquet(view.batch_source) for view in feature_views):
            return DuckDBOfflineStore.get_historical_features(
                config,
                feature_views,
                feature_refs,
                entity_df,  # type: ignore[arg-type]
                registry,
                project,
                full_feature_names,
                **kwargs,
            )
        views = [AskedView.of(view, config, feature_refs, full_feature_names) for view in feature_views]
        limit = config.offline_store.memory_limit
        since: datetime | None = None
        if entity_df is None:
            since, end = compute_non_entity_date_range(feature_views, kwargs.get("start_date"), kwargs.get("end_date"))
            entities, time = _moments(views, Window(since, end), limit), DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL
        else:
            entities, time = entities_of(entity_df, config)
        by_created = bool(kwargs.get("filter_by_created_timestamp"))
        asked = [
            (view, view.typed(entities, time), PointInTime(view.columns, view.ttl_us, by_created, since))
            for view in views
        ]

        def run() -> pa.Table:
            result = entities
            for view, typed, join in asked:
                find = partial(point_in_time, view.contract, entities=typed, join=join, memory_limit=limit)
                joined = view.reading(find)
                for name, values in zip(view.names, joined.columns, strict=True):
                    result = result.append_column(name, values)
            return result

        bounds = pc.min_max(entities.column(time).cast(TIMESTAMP, safe=False))
        metadata = RetrievalMetadata(
            features=feature_refs,
            keys=[name for name in entities.column_names if name != time],
            min_event_timestamp=bounds["min"].as_py(),
            max_event_timestamp=bounds["max"].as_py(),
        )
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        return HeadraceRetrievalJob(
            run, config, full_feature_names=full_feature_names, on_demand=on_demand, metadata=metadata
        )

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Append rows to the view's `push` chain. Atomic; at least once: a repeated call doubles them.

        Args:
            table: with the names of the view, as Feast applies the field mapping.

        Raises:
            SchemaError: a row does not fit the view. Nothing is written.
        """
        if not is_parquet(feature_view.batch_source):
            DuckDBOfflineStore.offline_write_batch(config, feature_view, table, progress)
            return
        contract = ViewContract.from_feast(feature_view, config)
        columns = {name: column for column, name in contract.field_mapping.items()}
        table = table.rename_columns([columns.get(name, name) for name in table.column_names])
        conformed = conform(contract, table, now_us=0, max_future_us=None, rules=False)
        if conformed.rejects:
            shown = "; ".join(f"row {r.row}: {r.message}" for r in conformed.rejects[:_SHOWN_REJECTS])
            msg = (
                f"feature view `{contract.name}`: {len(conformed.rejects)} of {table.num_rows} rows do not fit: {shown}"
            )
            raise SchemaError(msg)
        push(contract, conformed.table)
        if progress:
            progress(table.num_rows)

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """See that the store of a source can be asked, for `feast apply`; Feast itself would not ask its endpoint.

        Raises:
            ConfigError: it has no such bucket, or refuses the credentials.
            TransientError: it does not answer.
        """
        if is_parquet(data_source) and isinstance(folder := directory_of(data_source, config), ObjectPath):
            objects.check(folder)
        else:
            super().validate_data_source(config, data_source)

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Column names and Arrow types: of the view that the source belongs to, else of the files."""
        contract = contract_of(config, data_source)
        if contract is not None:
            return [(field.name, str(field.type)) for field in contract.schema]
        if is_parquet(data_source) and (files := _files_at(directory_of(data_source, config))):
            return [(field.name, str(field.type)) for field in pq.read_schema(readable(files[-1]))]
        return super().get_table_column_names_and_types_from_data_source(config, data_source)


def latest(store: FeatureStore, contract: ViewContract) -> pa.Table:
    """The newest row of each key of everything offline, by the total order. What the online store should serve."""
    limit = getattr(store.config.offline_store, "memory_limit", None)
    return with_files(contract.directory, lambda files: newest_rows(contract, files, memory_limit=limit))


@dataclass(frozen=True)
class AskedView:
    """What a request wants of a view.

    Attributes:
        columns: the features, as the history calls them.
        names: the same in the result.
        keys: for each join key, as the history calls it, the column of the entities that holds it.
        ttl_us: how old a value may be, microseconds; None is for ever.
    """

    contract: ViewContract
    columns: list[str]
    names: list[str]
    keys: dict[str, str]
    ttl_us: int | None

    @classmethod
    def of(
        cls, view: FeatureView, config: RepoConfig, feature_refs: Sequence[str], full_feature_names: bool
    ) -> AskedView:
        """What `feature_refs` want of a view."""
        contract = ViewContract.from_feast(view, config)
        column_of = {contract.view_name(column): column for column in contract.features}
        prefix = f"{view.projection.name_to_use()}:"  # type: ignore[no-untyped-call]
        features = list(dict.fromkeys(ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix)))
        shown = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
        names = {key: contract.view_name(key) for key in contract.join_keys}
        return cls(
            contract,
            columns=[column_of[name] for name in features],
            names=[shown + name for name in features],
            keys={key: view.projection.join_key_map.get(name, name) for key, name in names.items()},
            ttl_us=view.ttl // timedelta(microseconds=1) if view.ttl else None,
        )

    def reading(self, work: Callable[[list[File]], Result]) -> Result:
        """Work on the files of the history."""
        return with_files(self.contract.directory, work)

    def check(self, columns: Sequence[str]) -> None:
        """Whether an entity frame of these columns has the join keys, and no column of the name of a wanted feature.

        Raises:
            ConfigError: it is not so.
        """
        missing = sorted(set(self.keys.values()) - set(columns))
        where = f"feature view `{self.contract.name}`"
        if missing:
            msg = (
                f"{where} joins on {', '.join(self.keys.values())}; the entity_df lacks {', '.join(missing)}, "
                f"it has {', '.join(columns)}"
            )
            raise ConfigError(msg)
        if taken := sorted(set(self.names) & set(columns)):
            msg = (
                f"{where}: the entity_df has a column of the name of a wanted feature: {', '.join(taken)}; "
                "rename it, or use full_feature_names=True"
            )
            raise ConfigError(msg)

    def typed(self, entities: pa.Table, time: str) -> pa.Table:
        """The entities' keys, named and typed as in the history, and their times.

        Raises:
            ConfigError: a key is not there, or of a type that cannot be cast; or a column has the name of a feature.
        """
        self.check(entities.column_names)
        where = f"feature view `{self.contract.name}`"
        columns = {}
        for key, column in self.keys.items():
            wanted, values = self.contract.schema.field(key).type, entities.column(column)
            try:
                columns[key] = (
                    _as_times(values, column).cast(wanted) if pa.types.is_timestamp(wanted) else values.cast(wanted)
                )
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                msg = (
                    f"{where}: expected {wanted} as join key `{column}`, found {values.type} in the entity_df: {error}"
                )
                raise ConfigError(msg) from error
        return pa.table({**columns, AS_OF: entities.column(time).cast(TIMESTAMP, safe=False)})


def contract_of(config: RepoConfig, source: DataSource, columns: Iterable[str] = ()) -> ViewContract | None:
    """The contract of the registered view whose history a source is, and which has these columns; None without one."""
    if not is_parquet(source):
        return None
    directory = directory_of(source, config)
    for view in FeatureStore(config=config).list_feature_views():
        if isinstance(view.batch_source, FileSource) and directory_of(view.batch_source, config) == directory:
            contract = ViewContract.from_feast(view, config)
            if set(columns) <= set(contract.schema.names):
                return contract
    return None


def is_parquet(source: DataSource | None) -> TypeGuard[FileSource]:
    """Whether a source is Parquet, on a local path or in an object store."""
    if not isinstance(source, FileSource):
        return False
    scheme, mark, _ = source.path.partition("://")
    if mark and scheme not in objects.SCHEMES:
        return False
    return source.file_format is None or isinstance(source.file_format, ParquetFormat)


def _files_at(path: File) -> list[File]:
    """A file; or of a folder of segments the valid ones, of another whatever Parquet lies there."""
    if isinstance(path, ObjectPath):
        return Folder(path).files()
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*.parquet") if not p.name.startswith((".", "_")))
    if any(p.parent == path and parse_name(p.name) is not None for p in found):
        return Folder(path).files()
    return list(found)


def with_files(directory: File, work: Callable[[list[File]], Result]) -> Result:
    """Work on the files that are there; see `headrace.scan.reading`."""
    return reading(lambda: _files_at(directory), lambda files: files, work)


def wanted_columns(keys: Sequence[str], features: Sequence[str], timestamp: str, created: str | None) -> list[str]:
    """The columns to select; none when no feature is named, which to Feast means all."""
    if not features:
        return []
    return list(dict.fromkeys([*keys, *features, timestamp, *([created] if created else [])]))


def _pulled(rows: pa.Table, columns: Sequence[str], *, dummy: bool) -> pa.Table:
    """The columns wanted; for a view without an entity the key that Feast has it by."""
    wanted = rows.select(columns) if columns else rows
    return wanted.append_column(DUMMY_ENTITY_ID, pa.repeat(DUMMY_ENTITY_VAL, len(wanted))) if dummy else wanted


def _replace(path: File, table: pa.Table) -> None:
    """Write a file, or a folder of one, in the place of what is there."""
    if isinstance(path, ObjectPath):
        _replace_objects(path, table)
        return
    folder = path.parent if path.suffix == ".parquet" else path
    folder.mkdir(parents=True, exist_ok=True)
    old = [] if folder != path else list(folder.glob("*.parquet"))
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path if folder != path else folder / f"{uuid.uuid4().hex}.parquet")
    finally:
        temporary.unlink(missing_ok=True)
    for former in old:
        former.unlink()


def _replace_objects(path: ObjectPath, table: pa.Table) -> None:
    is_file = path.suffix == ".parquet"
    old = [] if is_file else place_of(path).foreign(lambda _: False)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    objects.write(path if is_file else path / f"{uuid.uuid4().hex}.parquet", memoryview(sink.getvalue()))
    for former in old:
        if isinstance(former, ObjectPath):
            objects.remove(former)


def entities_of(entity_df: pd.DataFrame | str, config: RepoConfig) -> tuple[pa.Table, str]:
    """The entities as Arrow, with times in UTC, and the name of their time column."""
    if isinstance(entity_df, str):
        with connection(config.offline_store.memory_limit) as con:
            con.execute("SET preserve_insertion_order = true")
            con.execute("SET file_search_path = ?", [str(config.repo_path)])
            table = con.sql(entity_df).to_arrow_table()
    else:
        table = pa.Table.from_pandas(entity_df, preserve_index=False).replace_schema_metadata(None)
    dtypes = table.schema.empty_table().to_pandas().dtypes
    column = infer_event_timestamp_from_entity_df(dtypes.to_dict())
    times = _as_times(table.column(column), column)
    return table.set_column(table.column_names.index(column), column, times), column


def _as_times(values: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    """Times in UTC, from times with or without a zone (which are UTC), dates, or text.

    Raises:
        ConfigError: they are nothing of that.
    """
    kind = values.type
    if pa.types.is_date(kind) or pa.types.is_null(kind):
        values = values.cast(pa.timestamp("us"))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            times = pd.to_datetime(values.to_pandas(), utc=True, format="mixed")
        except ValueError as error:
            msg = f"expected times in the entity_df's column `{column}`, found text that is none: {error}"
            raise ConfigError(msg) from error
        values = pa.chunked_array([pa.array(times, TIMESTAMP, safe=False)])
    elif not pa.types.is_timestamp(kind):
        msg = (
            f"expected times in the entity_df's column `{column}`, found {kind}; "
            "convert numbers by pandas.to_datetime(..., unit=..., utc=True)"
        )
        raise ConfigError(msg)
    if values.type.tz is None:
        return pc.assume_timezone(values, "UTC")
    return values.cast(pa.timestamp(values.type.unit, "UTC"))


def _moments(views: Sequence[AskedView], window: Window, memory_limit: str | None) -> pa.Table:
    """An entity frame of each join key and event time that any of the views has within a window, by time."""
    frames = []
    for view in views:
        found = view.reading(partial(moments, view.contract, window=window, memory_limit=memory_limit))
        frames.append(found.rename_columns([*view.keys.values(), DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL]))
    every = pa.concat_tables(frames, promote_options="permissive")
    columns = [DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL]
    columns += [name for name in every.column_names if name not in columns]
    distinct = every.group_by(columns).aggregate([]).select(columns)
    return distinct.sort_by([(name, "ascending") for name in columns])
