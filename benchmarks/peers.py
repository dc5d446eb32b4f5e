"""The sides of each comparison: a Feast store with our plug-ins, and one with Feast's own, of the same view."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_format import ParquetFormat
from feast.types import Bool, Float32, Float64, Int32, Int64, String

OURS, STOCK, SPARK = "ours", "stock", "spark"
VIEW, KEY, TIME, CREATED = "events", "customer", "event_time", "created"
FEATURE_TYPES = (Float32, Float64, Int32, Int64, String, Bool)
"""Features take these types in turn."""

STOCK_WRITE_ROWS = 10_000
"""`online_write_batch_size` of the stock store: without one it makes a single batch of everything."""


def feature_names(features: int) -> list[str]:
    """The names of a view's features."""
    return [f"f{index:02d}" for index in range(features)]


def open_side(side: str, folder: Path, history: Path, features: int, online: str) -> FeatureStore:
    """Open and apply a store, in a folder that is its repository for Feast's commands too.

    Args:
        side: `OURS`, `STOCK`, or `SPARK`, which is ours with Spark on two threads of this machine.
        folder: for `feature_store.yaml` and the registry.
        history: the folder of segments, or the Parquet file (stock).
        online: `sqlite:<file>` or `redis:<connection string>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "project": side,
        "provider": "local",
        "registry": str(folder / "registry.db"),
        "entity_key_serialization_version": 3,
        **{OURS: _ours, STOCK: _stock, SPARK: _spark}[side](online),
    }
    (folder / "feature_store.yaml").write_text(json.dumps(settings), encoding="utf-8")  # which is YAML too
    store = FeatureStore(config=RepoConfig(repo_path=folder, **settings))
    entity = Entity(name=KEY, join_keys=[KEY], value_type=ValueType.INT64)
    view = FeatureView(
        name=VIEW,
        entities=[entity],
        ttl=timedelta(0),
        schema=[
            Field(name=KEY, dtype=Int64),
            *(
                Field(name=name, dtype=FEATURE_TYPES[index % len(FEATURE_TYPES)])
                for index, name in enumerate(feature_names(features))
            ),
        ],
        source=FileSource(
            name=f"{VIEW}_history",
            path=str(history),
            file_format=ParquetFormat(),
            timestamp_field=TIME,
            created_timestamp_column=CREATED,
        ),
    )
    store.apply([entity, view])
    return store


def _ours(online: str) -> dict[str, Any]:
    stores = {
        "sqlite": ("headrace.sqlite.HeadraceSqliteOnlineStore", "path"),
        "redis": ("headrace.redis.HeadraceRedisOnlineStore", "connection_string"),
    }
    kind, _, place = online.partition(":")
    return {
        "offline_store": {"type": "headrace.offline.HeadraceOfflineStore"},
        "online_store": {"type": stores[kind][0], stores[kind][1]: place},
        "batch_engine": {"type": "headrace.engine.HeadraceEngine"},
    }


def _spark(online: str) -> dict[str, Any]:
    conf = {"spark.master": "local[2]", "spark.driver.memory": "4g", "spark.driver.host": "127.0.0.1"}
    conf |= {"spark.driver.bindAddress": "127.0.0.1", "spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "8"}
    return {
        **_ours(online),
        "offline_store": {"type": "headrace.spark.HeadraceSparkOfflineStore", "spark_conf": conf},
        "batch_engine": {"type": "headrace.spark.HeadraceSparkEngine", "spark_conf": conf},
    }


def _stock(online: str) -> dict[str, Any]:
    kind, _, place = online.partition(":")
    return {
        "offline_store": {"type": "duckdb"},
        "online_store": {"type": kind, "path" if kind == "sqlite" else "connection_string": place},
        "materialization": {"online_write_batch_size": STOCK_WRITE_ROWS},
    }
