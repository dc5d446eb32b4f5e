"""The Feast offline store over a folder of segments.

It reads through the one list of valid files, so compaction and corrected days are never seen twice, and appends
without touching what is there. Sources that are not Headrace's (plain Parquet files, saved datasets) are read too;
other formats go to Feast's DuckDB store, from which this one derives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeGuard

import ibis
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore, FeatureView, OnDemandFeatureView, RepoConfig
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig, _write_data_source
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.saved_dataset import SavedDatasetStorage

from headrace import registry as _registry  # noqa: F401 - resolves relative registries
from headrace.chains import Folder, push
from headrace.conform import conform
from headrace.contract import ViewContract, directory_of
from headrace.errors import ConfigError, SchemaError
from headrace.scan import PointInTime, Window, all_rows, connection, newest_rows, point_in_time, to_utc
from headrace.segments import parse_name

_SHOWN_REJECTS = 5


class HeadraceOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """Configuration of `HeadraceOfflineStore`.

    Attributes:
        memory_limit: how much memory a query may use before it spills to disk, as DuckDB writes it (`4GB`).
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
        """Write the result as a saved dataset, on-demand features included."""
        _write_data_source(
            ibis.memtable(self.to_arrow(timeout=timeout)),
            storage.to_data_source(),
            str(self._config.repo_path),
            "overwrite",
            allow_overwrite,
        )


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
        contract = _contract_of(config, data_source)
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
        columns = _wanted(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)

        def run() -> pa.Table:
            files = Folder(contract.directory).files()
            limit = config.offline_store.memory_limit
            rows = newest_rows(contract, files, Window(start_date, end_date), memory_limit=limit)
            return rows.select(columns) if columns else rows

        return HeadraceRetrievalJob(run, config)

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
        columns = _wanted(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)

        def run() -> pa.Table:
            files = _files(config, data_source)
            if not files:
                contract = _contract_of(config, data_source)
                empty = contract.schema.empty_table() if contract is not None else pa.table({})
                return empty.select(columns) if columns else empty
            return all_rows(files, columns, timestamp_field, Window(start_date, end_date))

        return HeadraceRetrievalJob(run, config)

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

        The ttl is inclusive; ties go by the total order of `headrace.encode`.
        """
        if not all(is_parquet(view.batch_source) for view in feature_views) and entity_df is not None:
            return DuckDBOfflineStore.get_historical_features(
                config, feature_views, feature_refs, entity_df, registry, project, full_feature_names, **kwargs
            )
        if entity_df is None:
            msg = "retrieval by start_date/end_date without an entity_df is not supported; pass an entity_df"
            raise NotImplementedError(msg)
        entities, timestamp_column = _entities(entity_df)
        by_created = bool(kwargs.get("filter_by_created_timestamp"))

        def run() -> pa.Table:
            result = entities
            for view in feature_views:
                contract = ViewContract.from_feast(view, config)
                names = _requested(view, feature_refs)
                join = PointInTime(
                    names, _entity_columns(contract, view, entities), timestamp_column, _ttl_us(view), by_created
                )
                files = _files(config, view.batch_source) if is_parquet(view.batch_source) else []
                joined = point_in_time(
                    contract,
                    files,
                    to_utc(entities, timestamp_column),
                    join,
                    memory_limit=config.offline_store.memory_limit,
                )
                prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
                for name in names:
                    result = result.append_column(prefix + name, joined.column(name))
            return result

        times = to_utc(entities, timestamp_column).column(timestamp_column).to_pandas()
        metadata = RetrievalMetadata(
            features=feature_refs,
            keys=[name for name in entities.column_names if name != timestamp_column],
            min_event_timestamp=times.min().to_pydatetime() if len(times) else None,
            max_event_timestamp=times.max().to_pydatetime() if len(times) else None,
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

        Raises:
            SchemaError: a row does not fit the view. Nothing is written.
        """
        contract = ViewContract.from_feast(feature_view, config)
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

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Column names and Arrow types: of the view that the source belongs to, else of the files."""
        contract = _contract_of(config, data_source)
        if contract is not None:
            return [(field.name, str(field.type)) for field in contract.schema]
        if is_parquet(data_source) and (files := _files(config, data_source)):
            return [(field.name, str(field.type)) for field in pq.read_schema(files[-1])]
        return super().get_table_column_names_and_types_from_data_source(config, data_source)


def latest(store: FeatureStore, contract: ViewContract) -> pa.Table:
    """The newest row of each key of everything offline, by the total order. What the online store should serve."""
    limit = getattr(store.config.offline_store, "memory_limit", None)
    return newest_rows(contract, Folder(contract.directory).files(), Window(), memory_limit=limit)


def _contract_of(config: RepoConfig, source: DataSource) -> ViewContract | None:
    """The contract of the registered view whose history a source is; None for a source of another kind."""
    if not is_parquet(source):
        return None
    directory = directory_of(source, config)
    for view in FeatureStore(config=config).list_feature_views():
        if isinstance(view.batch_source, FileSource) and directory_of(view.batch_source, config) == directory:
            return ViewContract.from_feast(view, config)
    return None


def is_parquet(source: DataSource | None) -> TypeGuard[FileSource]:
    """Whether a source is Parquet on a local path."""
    if not isinstance(source, FileSource) or "://" in source.path:
        return False
    return source.file_format is None or isinstance(source.file_format, ParquetFormat)


def _files(config: RepoConfig, source: FileSource) -> list[Path]:
    """The files of a source: the valid ones of a folder of segments, else whatever Parquet lies there."""
    path = directory_of(source, config)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*.parquet") if not p.name.startswith((".", "_")))
    if any(p.parent == path and parse_name(p.name) is not None for p in found):
        return Folder(path).files()
    return found


def _wanted(keys: Sequence[str], features: Sequence[str], timestamp: str, created: str | None) -> list[str]:
    """The columns to select; none when no feature is named, which to Feast means all."""
    if not features:
        return []
    return list(dict.fromkeys([*keys, *features, timestamp, *([created] if created else [])]))


def _requested(view: FeatureView, feature_refs: Sequence[str]) -> list[str]:
    prefix = f"{view.projection.name_to_use()}:"  # type: ignore[no-untyped-call]
    return [ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix)]


def _ttl_us(view: FeatureView) -> int | None:
    return view.ttl // timedelta(microseconds=1) if view.ttl else None


def _entities(entity_df: pd.DataFrame | str) -> tuple[pa.Table, str]:
    """The entities as Arrow, with real times, and the name of their time column."""
    if isinstance(entity_df, str):
        with connection() as con:
            frame = con.sql(entity_df).df()
    else:
        frame = entity_df.copy(deep=False)
    column = infer_event_timestamp_from_entity_df(dict(zip(frame.columns, frame.dtypes, strict=True)))
    if not pd.api.types.is_datetime64_any_dtype(frame[column]):
        frame[column] = pd.to_datetime(frame[column], utc=True)
    return pa.Table.from_pandas(frame, preserve_index=False), column


def _entity_columns(contract: ViewContract, view: FeatureView, entities: pa.Table) -> dict[str, str]:
    """For each join key the column of the entities that holds it.

    Raises:
        ConfigError: there is no such column.
    """
    columns = {key: view.projection.join_key_map.get(key, key) for key in contract.join_keys}
    missing = sorted(set(columns.values()) - set(entities.column_names))
    if missing:
        msg = (
            f"feature view `{contract.name}` joins on {', '.join(columns.values())}; the entity_df lacks "
            f"{', '.join(missing)}, it has {', '.join(entities.column_names)}"
        )
        raise ConfigError(msg)
    return columns
