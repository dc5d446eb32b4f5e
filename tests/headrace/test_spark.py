"""Spark over the same folders gives what ours gives and what a brute-force oracle says; it writes online newest-wins.

One session for all of it, whose zone is not UTC, in a process whose zone is another.
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Bytes, FeastType, Float32, Float64, Int32, Int64, String, Struct, UnixTimestamp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from headrace import spark_scan
from headrace.audit import audit
from headrace.chains import StreamLedger, push, replace_day
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.encode import encode_keys, encode_values
from headrace.errors import ConfigError
from headrace.online import online_store
from headrace.retain import retain
from tests.headrace.test_online import served
from tests.headrace.test_retrieval import KEYS, TTLS_US, as_of, as_source, asked, entityless, frame_of, mapped, source
from tests.headrace.test_scan import events, moment, write_foreign, write_history
from tests.headrace.views import EPOCH_US, applied, config, examples, redis_online, rows, sqlite_online, view
from tests.servers import ObjectStore
from tests.servers.repository import ROOT

SPARK = "headrace.spark.HeadraceSparkOfflineStore"
ENGINE = "headrace.spark.HeadraceSparkEngine"
# A small session that starts and warms quickly: its plans are many and its data few.
CONF = {
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.master": "local[1]",
    "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.sql.session.timeZone": "America/New_York",
    "spark.sql.shuffle.partitions": "2",
    "spark.default.parallelism": "2",
    "spark.log.level": "ERROR",
    "spark.ui.showConsoleProgress": "false",
}


@pytest.fixture(scope="module")
def spark(object_store: ObjectStore) -> Iterator[SparkSession]:
    """The session that Feast's Spark parts find. Its workers have the object store's credentials, as this process."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    builder = SparkSession.builder
    for name, value in CONF.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    yield session
    session.stop()
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def on_spark(store: FeatureStore, engine: str = ENGINE, online: Mapping[str, Any] | None = None) -> FeatureStore:
    """The same repository with Spark as offline store and batch engine."""
    made = config(
        Path(str(store.config.repo_path)),
        online or store.config.online_store.model_dump(),
        engine={"type": engine, "spark_conf": CONF},
        offline={"type": SPARK, "spark_conf": CONF},
    )
    return FeatureStore(config=made)


@dataclass(repr=False)  # Hypothesis shows it with each example
class Repository:
    """One repository, with our stores and with Spark."""

    ours: FeatureStore
    on_spark: FeatureStore
    contracts: Mapping[str, ViewContract]


@pytest.fixture
def url(object_store: ObjectStore) -> str:
    """A prefix of its own in a bucket."""
    object_store.bucket("views")
    return f"s3://views/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def repository(spark: SparkSession, object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Five views: one, two, three and no join keys, with and without ttl and created time, and one all mapped.

    One is in an object store: files that merge and vanish, streams, pushes, days, files of others, as in the folders.
    """
    made = []
    object_store.bucket("spark")
    bucket = {"path": "s3://spark/two", "endpoint": object_store.url}
    for name, keys in KEYS.items():
        if name in ("none", "mapped"):
            made.append((entityless if name == "none" else mapped)(name, TTLS_US[name]))
        else:
            ttl = timedelta(microseconds=TTLS_US[name])
            made.append(view(name, keys, ttl=ttl, created=name != "three", **(bucket if name == "two" else {})))
    # Characters that mean something in a pattern of paths, or in a URL.
    store, contracts = applied(tmp_path_factory.mktemp("spark") / "a [b] {c} %20 ü", None, *made)
    return Repository(store, on_spark(store), {contract.name: contract for contract in contracts})


def histories_of(views: int) -> st.SearchStrategy[dict[str, list[dict[str, Any]]]]:
    """The rows of some views, by name."""
    names = st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=views, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {name: st.lists(events(KEYS[name]), min_size=1, max_size=15) for name in chosen}
        )
    )


@settings(
    max_examples=examples(60) // 20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    histories=histories_of(2),
    wanted=st.lists(asked(), min_size=1, max_size=12),
    by_created=st.booleans(),
    also_as_spark_frame=st.booleans(),
)
def test_point_in_time_equals_ours_and_the_oracle(
    spark: SparkSession,
    repository: Repository,
    histories: dict[str, list[dict[str, Any]]],
    wanted: list[dict[str, Any]],
    by_created: bool,
    also_as_spark_frame: bool,
) -> None:
    ours, store, contracts = repository.ours, repository.on_spark, repository.contracts
    expected: dict[str, list[str]] = {}
    for name, history in histories.items():
        ranked = write_history(contracts[name], [as_source(contracts[name], row) for row in history])
        for feature in ("value", "count"):
            expected[f"{name}__{feature}"] = [
                repr(as_of(contracts[name], ranked, row, by_created).get(source(contracts[name], feature)))
                for row in wanted
            ]
    references = [f"{name}:{feature}" for name in histories for feature in ("value", "count")]
    more: dict[str, Any] = {"full_feature_names": True, "filter_by_created_timestamp": by_created}
    frame = frame_of(wanted)
    by_ours = ours.get_historical_features(frame, references, **more).to_arrow()
    found = store.get_historical_features(frame, references, **more).to_arrow()
    assert found.schema == by_ours.schema
    assert repr(found.to_pylist()) == repr(by_ours.to_pylist())
    assert {column: [repr(value) for value in found.column(column).to_pylist()] for column in expected} == expected
    if also_as_spark_frame:
        large = store.get_historical_features(spark_frame(spark, frame), references, **more).to_arrow()
        assert repr(large.sort_by("label").to_pylist()) == repr(by_ours.cast(large.schema).to_pylist())


def spark_frame(spark: SparkSession, frame: pd.DataFrame) -> Any:  # Feast's types know no Spark frame
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return spark.createDataFrame(table.cast(pa.schema([_plain(field) for field in table.schema])))


def _plain(field: pa.Field) -> pa.Field:
    if pa.types.is_null(field.type):
        return field.with_type({"id": pa.int64(), "b": pa.int32(), "c": pa.binary()}.get(field.name, pa.string()))
    return field.with_type(pa.timestamp("us", "UTC")) if pa.types.is_timestamp(field.type) else field


@settings(
    max_examples=examples(40) // 20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(histories=histories_of(1))
def test_materialized_is_the_newest_by_the_oracle(
    repository: Repository, histories: dict[str, list[dict[str, Any]]]
) -> None:
    ours, store, contracts = repository.ours, repository.on_spark, repository.contracts
    ((name, history),) = histories.items()
    contract = contracts[name]
    ranked = write_history(contract, [as_source(contract, row) for row in history])
    forget(ours, contract)
    store.materialize(moment(0), moment(7), feature_views=[name])
    winners: dict[tuple[Any, ...], tuple[bytes, Mapping[str, Any]]] = {}
    for order, row in ranked:
        key = tuple(row[k] for k in contract.join_keys)
        if row[contract.timestamp_field] <= 7 and (key not in winners or order >= winners[key][0]):
            winners[key] = (order, row)
    table = rows(contract, [row for _, row in winners.values()])
    stored = online_store(ours).read_stored(
        ours.config, contract.feature_view, encode_keys(contract, table).to_pylist()
    )
    assert stored.order == [order for order, _ in winners.values()]
    for feature in contract.features:
        expected = encode_values(contract, table, feature).to_pylist()
        assert stored.values[contract.view_name(feature)] == expected
    # What arrives late and is older does not win, whoever writes; and the audit agrees with what Spark wrote.
    store.materialize(moment(0), moment(9), feature_views=[name])
    assert audit(ours, contract).diverged == 0


def forget(store: FeatureStore, contract: ViewContract) -> None:
    with sqlite3.connect(Path(str(store.config.repo_path)) / "data/online.db") as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if table.startswith(f"{store.project}_{contract.name}"):
                connection.execute(f'DELETE FROM "{table}"')


def event(key: int, at: int, value: float | None = None) -> dict[str, Any]:
    return {"id": key, "at": at, "made": at, "value": float(at) if value is None else value, "count": at}


def pulled(store: FeatureStore, contract: ViewContract) -> list[tuple[int, int]]:
    """Each row of the history, as `(key, at)`."""
    provider: Any = store._get_provider()
    job = provider.offline_store.pull_all_from_table_or_query(
        store.config, contract.feature_view.batch_source, ["id"], ["count"], "at", "made"
    )
    table = job.to_arrow()
    assert table.schema.field("at").type == pa.timestamp("us", "UTC")
    return sorted(zip(table.column("id").to_pylist(), table.column("count").to_pylist(), strict=True))


def test_each_row_counts_once_whatever_was_merged_replaced_and_retained(spark: SparkSession, tmp_path: Path) -> None:
    ours, (contract,) = applied(tmp_path)
    store = on_spark(ours)
    assert pulled(store, contract) == []
    ledger = StreamLedger(contract, "stats", 0)
    for n in range(40):
        ledger.append(0, n, n + 1, rows(contract, [event(n % 3, n)]), accepted=np.array([n]))
    replace_day(contract, date(2026, 1, 1), rows(contract, [event(7, 1), event(7, 2)]), read_us=1)
    replace_day(contract, date(2026, 1, 1), rows(contract, [event(7, 3)]), read_us=2)
    store.write_to_offline_store("stats", pd.DataFrame([{**event(8, 5), "at": moment(5), "made": moment(5)}]))
    before = sorted([(n % 3, n) for n in range(40)] + [(7, 3), (8, 5)])
    assert pulled(store, contract) == before
    compact(contract, grace_s=3600)
    assert len(list(contract.directory.glob("stream-*-0-*.parquet"))) >= 40
    assert len(list(contract.directory.glob("stream-*-1-*.parquet"))) >= 1
    assert pulled(store, contract) == before == pulled(ours, contract)
    compact(contract, grace_s=0)
    retain(contract, moment(30))
    assert pulled(store, contract) == pulled(ours, contract)
    assert 0 < len(pulled(store, contract)) < len(before)


TYPES: dict[str, tuple[FeastType, list[Any]]] = {
    "flag": (Bool, [True, None, False]),
    "small": (Int32, [-(2**31), None, 7]),
    "large": (Int64, [2**53 + 1, None, -(2**63)]),
    "single": (Float32, [1.5, None, math.inf]),
    "text": (String, ["é", None, ""]),
    "raw": (Bytes, [b"\xff\x00", None, b""]),
    "when": (UnixTimestamp, [-(10**6) * 4_500_000_000 - EPOCH_US, None, 1]),  # of 1827
    "texts": (Array(String), [["a", "b"], None, []]),
    "numbers": (Array(Float64), [[1.0, math.inf], None, []]),
    "times": (Array(UnixTimestamp), [[datetime(1500, 1, 1, tzinfo=UTC)], None, []]),
    "nested": (Struct({"x": Int64, "y": String}), [{"x": 1, "y": "é"}, None, {"x": None, "y": None}]),
}


def test_values_of_every_kind_come_as_they_are_and_names_of_any_spelling(
    spark: SparkSession, object_store: ObjectStore, url: str, tmp_path: Path
) -> None:
    """Two views: one that Spark reads itself; one that Python workers read.

    It is in an object store, and has names that mean something to Spark and to SQL.
    """
    plain = [Field(name=name, dtype=kind) for name, (kind, _) in TYPES.items()]
    odd = [*plain, *(Field(name=name, dtype=Int64) for name in ("_metadata", "c0", "select"))]
    in_bucket = view("odd", features=odd, path=url, endpoint=object_store.url)
    ours, contracts = applied(tmp_path, None, view("plain", features=plain), in_bucket)
    store = on_spark(ours)
    for contract in contracts:
        made = [{name: some[n] for name, (_, some) in TYPES.items()} for n in range(3)]
        more = [{"id": n, "at": n, "_metadata": n, "c0": -n, "select": 0} for n in range(3)]
        push(contract, rows(contract, [{**values, **rest} for values, rest in zip(made, more, strict=True)]))
    frame = pd.DataFrame({"id": [2, 0, 1, 9], "event_timestamp": [moment(5)] * 4})
    references = [f"{c.name}:{name}" for c in contracts for name in c.features]
    by_ours = ours.get_historical_features(frame, references, full_feature_names=True)
    job = store.get_historical_features(frame, references, full_feature_names=True)
    found = job.to_arrow()
    assert found.schema == by_ours.to_arrow().schema
    assert repr(found.to_pylist()) == repr(by_ours.to_arrow().to_pylist())
    pd.testing.assert_frame_equal(found.to_pandas(), by_ours.to_df())
    keys = [{"id": n} for n in range(3)]
    store.materialize(moment(0), moment(9))
    found_online = [served(ours, contract, keys) for contract in contracts]
    odds = [[row.pop(name) for name in ("_metadata", "c0", "select")] for row in found_online[1]]
    assert odds == [[0, 0, 0], [1, -1, 0], [2, -2, 0]]
    assert repr(found_online[1]) == repr(found_online[0])
    assert audit(ours, contracts[1]).diverged == 0
    # Feast's own engine gives the same, but for whole numbers beside a null, which it
    # takes for floats.
    stock = on_spark(ours, "spark.engine", {**sqlite_online(), "path": "data/stock-engine.db"})
    stock.apply([stock.get_feature_view("plain")])
    stock.materialize(moment(0), moment(9), feature_views=["plain"])
    by_stock = served(stock, contracts[0], keys)
    assert [row.pop("large") for row in by_stock] == [2**53, None, -(2**63)]
    assert [row.pop("large") for row in found_online[0]] == TYPES["large"][1]
    assert by_stock == found_online[0]  # where 1.0 is 1
    assert audit(ours, contracts[0]).diverged == 0


def test_a_range_of_time_without_entities_and_entities_from_sql(spark: SparkSession, tmp_path: Path) -> None:
    ours, (one, two) = applied(tmp_path, None, view("one"), view("two", ttl=timedelta(microseconds=2)))
    store = on_spark(ours)
    push(one, rows(one, [{"id": 1, "at": n, "value": float(n), "count": n} for n in (0, 3, 6, 6, 20)]))
    push(two, rows(two, [{"id": 1, "at": 2, "count": 20}, {"id": 2, "at": 4, "count": 40}]))
    asked_for: dict[str, Any] = {"features": ["one:count", "two:count"], "full_feature_names": True}
    span: dict[str, Any] = {"start_date": moment(1), "end_date": moment(9)}
    found = store.get_historical_features(**asked_for, **span).to_arrow().sort_by("event_timestamp")
    expected = ours.get_historical_features(**asked_for, **span).to_arrow().select(found.column_names)
    assert found.cast(expected.schema) == expected
    naive = [f"TIMESTAMP_NTZ '{moment(n):%Y-%m-%d %H:%M:%S.%f}'" for n in (0, 5)]
    sql = f"SELECT * FROM VALUES (1, {naive[0]}), (1, {naive[1]}), (1, NULL), (7, {naive[1]}) AS t(id, event_timestamp)"
    job = store.get_historical_features(sql, **asked_for)
    assert sorted(map(repr, counts(job))) == ["(0, None)", "(3, None)", "(None, None)", "(None, None)"]
    midnight = f"SELECT 1L AS id, DATE '{moment(0).date() + timedelta(days=1)}' AS event_timestamp"
    assert job.metadata is not None
    assert job.metadata.keys == ["id"]
    path = tmp_path / "saved"
    at_midnight = store.get_historical_features(midnight, **asked_for)
    at_midnight.persist(SavedDatasetFileStorage(path=str(path), file_format=ParquetFormat()))
    assert pq.read_table(path, columns=["one__count", "two__count"]).to_pylist() == [
        {"one__count": 20, "two__count": None}
    ]


@pytest.mark.filterwarnings("ignore:On demand feature view")
def test_views_that_grew_services_and_functions_on_demand(spark: SparkSession, tmp_path: Path) -> None:
    """Keys and values at the bounds of their type; entity rows that come twice, with times of another zone."""
    count = Field(name="count", dtype=Int64)
    ours, (old, _) = applied(tmp_path, None, view(features=[count]), view("empty"))
    low, high = -(2**63), 2**63 - 1
    push(old, rows(old, [{"id": low, "at": 1, "count": high}, {"id": high, "at": 1, "count": low}]))
    later = [Field(name="value", dtype=Float64), Field(name="tags", dtype=Array(String))]
    entities, grown = view(features=[count, *later])

    def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"twice": inputs["value"] * 2})

    on_demand = on_demand_feature_view(
        sources=[grown], schema=[Field(name="twice", dtype=Float64)], mode="pandas", name="doubled"
    )(doubled)
    ends = [grown.with_name(end).with_join_key_map({"id": f"{end}_id"})[["count"]] for end in ("first", "last")]
    ours.apply([*entities, grown, on_demand, FeatureService(name="trip", features=ends)])
    new = ViewContract.from_feast(ours.get_feature_view("stats"), ours.config)
    push(new, rows(new, [{"id": high, "at": 4, "count": 1, "value": -0.0, "tags": ["é", ""]}]))
    store = on_spark(ours)
    times = pd.to_datetime([moment(n) for n in (5, 3, 5, 0, 5)]).tz_convert("Asia/Kolkata")
    frame = pd.DataFrame({"id": [high, high, high, low, low], "event_timestamp": times})
    references = ["stats:count", "stats:value", "stats:tags", "empty:value", "doubled:twice"]
    asked_for: dict[str, Any] = {"features": references, "full_feature_names": True}
    found = store.get_historical_features(frame, **asked_for).to_arrow()
    expected = ours.get_historical_features(frame, **asked_for).to_arrow()
    assert found.schema == expected.schema
    assert repr(found.to_pylist()) == repr(expected.to_pylist())
    assert found.column("stats__count").to_pylist() == [1, low, 1, None, high]
    pairs = pd.DataFrame({"first_id": [low, high], "last_id": [high, 1], "event_timestamp": [moment(2)] * 2})
    service = store.get_feature_service("trip")
    trips = store.get_historical_features(pairs, service, full_feature_names=True).to_arrow()
    assert trips.select(["first__count", "last__count"]).to_pydict() == {
        "first__count": [high, low],
        "last__count": [low, None],
    }
    store.materialize(moment(0), moment(9), feature_views=["stats"])
    assert [row["count"] for row in served(ours, new, [{"id": low}, {"id": high}])] == [high, 1]
    assert audit(ours, new).diverged == 0


def test_files_that_vanish_before_spark_reads_them_are_looked_for_again(
    spark: SparkSession, object_store: ObjectStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the session would pass over them."""
    in_bucket = view("bucket", path=url, endpoint=object_store.url)
    ours, contracts = applied(tmp_path, None, view(), in_bucket)
    store = on_spark(ours)
    provider: Any = store._get_provider()  # `feast apply` asks it so
    provider.validate_data_source(store.config, in_bucket[1].batch_source)
    lost = view(path="s3://nowhere/lost", endpoint=object_store.url)[1].batch_source
    with pytest.raises(ConfigError, match="there is no bucket `nowhere`"):
        provider.validate_data_source(store.config, lost)
    frame = pd.DataFrame({"id": [0, 1, 2], "event_timestamp": [moment(99)] * 3})
    vanished: dict[str, bool] = {}

    def merging(real: Any) -> Any:
        def then(session: Any, contract: ViewContract, files: Any, *more: Any, **named: Any) -> Any:
            made = real(session, contract, files, *more, **named)
            if contract.name not in vanished:
                compact(contract, grace_s=0)
                replace_day(contract, date(2026, 1, 1), rows(contract, [event(7, 2)]), read_us=2)
                vanished[contract.name] = not any(file.exists() for file in files[:-2])
            return made

        return then

    monkeypatch.setattr("headrace.spark.newest", merging(spark_scan.newest))
    monkeypatch.setattr("headrace.spark.as_of", merging(spark_scan.as_of))
    spark.conf.set("spark.sql.files.ignoreMissingFiles", "true")
    try:
        for contract in contracts:
            ledger = StreamLedger(contract, contract.name, 0)
            for n in range(12):
                ledger.append(0, n, n + 1, rows(contract, [event(n % 3, n)]), accepted=np.array([n]))
            replace_day(contract, date(2026, 1, 1), rows(contract, [event(7, 1)]), read_us=1)
        found = store.get_historical_features(frame, ["stats:count"]).to_arrow()
        assert found.column("count").to_pylist() == [9, 10, 11]
        store.materialize(moment(0), moment(99), feature_views=["bucket"])
        assert audit(ours, contracts[1]).diverged == 0
    finally:
        spark.conf.unset("spark.sql.files.ignoreMissingFiles")
    assert vanished == {"stats": True, "bucket": True}


def counts(job: RetrievalJob) -> list[tuple[int | None, int | None]]:
    found = job.to_arrow()
    return list(zip(found["one__count"].to_pylist(), found["two__count"].to_pylist(), strict=True))


def test_what_does_not_fit_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    ours, (contract,) = applied(tmp_path)
    store = on_spark(ours)
    push(contract, rows(contract, [event(1, 1)]))
    for sql, message in (
        ("SELECT 'a' AS id, current_timestamp() AS event_timestamp", "join key `id` .* expected bigint, found string"),
        ("SELECT 1 AS id, '2026-01-01' AS event_timestamp", "column `event_timestamp`: expected times, found string"),
        ("SELECT 1 AS other, current_timestamp() AS event_timestamp", "lacks id, it has other"),
    ):
        with pytest.raises(ConfigError, match=message):
            store.get_historical_features(sql, ["stats:count"]).to_arrow()
    with pytest.raises(ConfigError, match="expected int64 as join key `id`, found double"):
        store.get_historical_features(pd.DataFrame({"id": [1.5], "event_timestamp": [moment(0)]}), ["stats:count"])


@pytest.fixture(params=["sqlite", "valkey"])
def online(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return sqlite_online()
    databases: Iterator[int] = request.getfixturevalue("valkey_databases")
    return redis_online(request.getfixturevalue("valkey"), next(databases))


def test_an_older_row_that_arrives_later_never_wins(
    spark: SparkSession, tmp_path: Path, online: dict[str, Any]
) -> None:
    ours, (contract,) = applied(tmp_path, online)
    push(contract, rows(contract, [event(1, 9), event(2, 1)]))
    for engine in (ENGINE, "spark.engine")[: 2 if "sqlite" in online["type"] else 1]:
        store = on_spark(ours, engine)
        store.materialize(moment(0), moment(9))
        assert [row["count"] for row in served(ours, contract, [{"id": 1}, {"id": 2}])] == [9, 1]
        push(contract, rows(contract, [event(1, 4, value=-1.0)]))
        store.materialize(moment(0), moment(5))
        assert [row["count"] for row in served(ours, contract, [{"id": 1}, {"id": 2}])] == [9, 1]
    assert audit(ours, contract).diverged == 0


PAGE = ROOT / "docs" / "how-to" / "spark.md"


def test_a_repository_switches_there_and_back_by_the_blocks_of_the_page(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    # The page's session is the one that is active here, as Feast takes it.
    before, after, *_ = re.findall(r"```yaml\n(.+?)```", text, re.DOTALL)
    (example,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    base = (
        "project: trips\nprovider: local\nregistry: data/registry.db\nentity_key_serialization_version: 3\n"
        "online_store: {type: headrace.sqlite.HeadraceSqliteOnlineStore, path: data/online.db}\n"
    )

    def opened(block: str) -> FeatureStore:
        (tmp_path / "feature_store.yaml").write_text(base + block, encoding="utf-8")
        return FeatureStore(repo_path=str(tmp_path))

    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
    source = FileSource(
        name="history",
        path="data/driver_stats",
        file_format=ParquetFormat(),
        timestamp_field="at",
        created_timestamp_column="made",
    )
    schema = [Field(name="driver_id", dtype=Int64), Field(name="conv_rate", dtype=Float64)]
    opened(before).apply([driver, FeatureView(name="driver_stats", entities=[driver], schema=schema, source=source)])
    times = pd.to_datetime([moment(0), moment(1)])
    opened(before).write_to_offline_store(
        "driver_stats", pd.DataFrame({"driver_id": [1, 2], "conv_rate": [0.5, 0.25], "at": times, "made": times})
    )
    wanted = pd.DataFrame({"driver_id": [2, 1], "event_timestamp": pd.to_datetime([moment(5)] * 2)})
    wanted.astype({"event_timestamp": "datetime64[us, UTC]"}).to_parquet("data/wanted")
    found = []
    for number, block in enumerate((before, after, before)):
        store = opened(block)
        frame = store.get_historical_features(wanted.copy(), ["driver_stats:conv_rate"]).to_df()
        store.materialize(moment(0), moment(number))
        online = store.get_online_features(["driver_stats:conv_rate"], [{"driver_id": 1}, {"driver_id": 2}]).to_dict()
        found.append((frame["conv_rate"].tolist(), online["conv_rate"]))
        if block is after:
            exec(example.replace("/shared", str(tmp_path / "data")), {"store": store})  # noqa: S102 - the page's own
    assert found == [([0.25, 0.5], [0.5, None]), ([0.25, 0.5], [0.5, 0.25]), ([0.25, 0.5], [0.5, 0.25])]
    assert sorted(pq.read_table("data/training").column("conv_rate").to_pylist()) == [0.25, 0.5]


# What fails in a worker ends it, and the next one starts by importing everything: so these come last.


def test_files_of_others_and_of_an_older_schema(spark: SparkSession, tmp_path: Path) -> None:
    ours, (contract,) = applied(tmp_path)
    store = on_spark(ours)
    push(contract, rows(contract, [event(1, 1)]))
    write_foreign(contract, rows(contract, [event(2, 4)]))
    pq.write_table(pa.table({"id": pa.array([3], pa.int32()), "at": [moment(2)], "made": [moment(2)], "count": ["4"]}),
                   contract.directory / "old.parquet")  # fmt: skip
    assert pulled(store, contract) == [(1, 1), (2, 4), (3, 4)]
    pq.write_table(pa.table({"id": [3], "at": [moment(2)], "made": [moment(2)], "count": [5.7]}),
                   contract.directory / "old.parquet")  # fmt: skip
    with pytest.raises(Exception, match=r"column `count` has 5.7, which is no BIGINT"):
        pulled(store, contract)


def test_a_failing_write_fails_the_run_and_records_nothing(spark: SparkSession, tmp_path: Path) -> None:
    ours, (contract,) = applied(tmp_path)
    store = on_spark(ours)
    push(contract, rows(contract, [event(1, 1)]))
    with sqlite3.connect(tmp_path / "data/online.db") as connection:
        connection.execute(
            f"CREATE TRIGGER full BEFORE INSERT ON {ours.project}_stats BEGIN SELECT raise(ABORT, 'no room left'); END"
        )
    with pytest.raises(Exception, match="no room left"):
        store.materialize(moment(0), moment(9))
    assert store.get_feature_view("stats").materialization_intervals == []
