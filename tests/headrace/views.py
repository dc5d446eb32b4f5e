"""Feature repositories made for a test: a store of ours, one view of any shape."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, KafkaSource, RepoConfig, ValueType
from feast.data_format import JsonFormat, ParquetFormat
from feast.field import from_value_type
from feast.types import Float64, Int64

from headrace.contract import ViewContract

EPOCH_US = 1_700_000_000_000_000


def examples(default: int) -> int:
    """How many examples a property test tries: few each day, thousands in a campaign."""
    return int(os.environ.get("HEADRACE_TEST_EXAMPLES", default))


def sqlite_online() -> dict[str, Any]:
    return {"type": "headrace.sqlite.HeadraceSqliteOnlineStore", "path": "data/online.db"}


def redis_online(address: str, database: int = 0) -> dict[str, Any]:
    return {
        "type": "headrace.redis.HeadraceRedisOnlineStore",
        "connection_string": f"{address},db={database}",
    }


def config(
    home: Path,
    online: Mapping[str, Any] | None = None,
    project: str = "test",
    engine: Mapping[str, Any] | None = None,
    offline: Mapping[str, Any] | None = None,
) -> RepoConfig:
    """The configuration of a repository in `home`, with an SQL registry of its own."""
    (home / "data").mkdir(parents=True, exist_ok=True)
    made = RepoConfig(
        project=project,
        provider="local",
        registry={"registry_type": "sql", "path": f"sqlite:///{home}/data/registry.db"},
        offline_store=dict(offline or {"type": "headrace.offline.HeadraceOfflineStore"}),
        online_store=dict(online or sqlite_online()),
        batch_engine=dict(engine or {"type": "local"}),
        entity_key_serialization_version=3,
    )
    made.repo_path = home
    return made


def view(
    name: str = "stats",
    keys: Mapping[str, ValueType] | None = None,
    features: Sequence[Field] | None = None,
    *,
    ttl: timedelta = timedelta(0),
    created: bool = True,
    tags: Mapping[str, str] | None = None,
    path: str | None = None,
    endpoint: str | None = None,
) -> tuple[list[Entity], FeatureView]:
    """A view on a Kafka topic of its name, its history in `data/<name>`, or behind a URL at an S3 endpoint."""
    keys = keys or {"id": ValueType.INT64}
    entities = [Entity(name=f"{key}_entity", join_keys=[key], value_type=kind) for key, kind in keys.items()]
    source = FileSource(
        name=f"{name}_history",
        path=path or f"data/{name}",
        s3_endpoint_override=endpoint,
        file_format=ParquetFormat(),
        timestamp_field="at",
        created_timestamp_column="made" if created else "",
    )
    events = KafkaSource(
        name=f"{name}_events",
        kafka_bootstrap_servers="127.0.0.1:9092",
        topic=name,
        timestamp_field="at",
        created_timestamp_column="made" if created else "",
        message_format=JsonFormat(schema_json=""),
        batch_source=source,
    )
    columns = [Field(name=key, dtype=from_value_type(kind)) for key, kind in keys.items()]
    fields = list(features or [Field(name="value", dtype=Float64), Field(name="count", dtype=Int64)])
    return entities, FeatureView(
        name=name, entities=entities, ttl=ttl, schema=columns + fields, source=events, tags=dict(tags or {})
    )


def applied(
    home: Path, online: Mapping[str, Any] | None = None, *views: tuple[list[Entity], FeatureView]
) -> tuple[FeatureStore, list[ViewContract]]:
    """A store with these views applied, and their contracts as the registry gives them, in the order given."""
    store = FeatureStore(config=config(home, online))
    made = views or (view(),)
    things: list[Any] = [thing for entities, feature_view in made for thing in (*entities, feature_view)]
    store.apply(things)
    contracts = [
        ViewContract.from_feast(store.get_feature_view(feature_view.name), store.config) for _, feature_view in made
    ]
    return store, contracts


def rows(contract: ViewContract, values: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows in a contract's schema; times as whole numbers are microseconds after `EPOCH_US`."""
    columns = []
    for field in contract.schema:
        column = [row.get(field.name) for row in values]
        if pa.types.is_timestamp(field.type):
            numbers = [EPOCH_US + v if isinstance(v, int) else v for v in column]
            columns.append(pa.array(numbers, pa.int64()).cast(field.type))
        else:
            columns.append(pa.array(column, field.type))
    return pa.Table.from_arrays(columns, schema=contract.schema)
