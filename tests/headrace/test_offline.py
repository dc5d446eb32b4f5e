"""Feast's own interface to history: writes, pulls, saved datasets, logging; the lesson's example passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureService, FeatureStore, FeatureView, Field, FileSource, OnDemandFeatureView, PushSource
from feast.data_source import PushMode
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_logging import FeatureServiceLoggingSource, LoggingConfig
from feast.feature_view import DUMMY_ENTITY_ID
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64

from headrace.chains import Folder, push
from headrace.contract import ViewContract
from headrace.errors import SchemaError
from headrace.offline import HeadraceOfflineStore, latest
from tests.conftest import RepositoryFactory
from tests.headrace.test_online import served
from tests.headrace.test_retrieval import entityless, mapped
from tests.headrace.test_scan import moment
from tests.headrace.views import applied, rows, view


@pytest.mark.parametrize("online", ["sqlite", "valkey"])
def test_the_lessons_worked_example(feature_repo_copy: RepositoryFactory, online: Any) -> None:
    """Materialize up to a time serves the newest row before it: not the last in the file, not the newest of all."""
    repo = feature_repo_copy(online)
    store = FeatureStore(repo_path=str(repo))
    frame = pd.DataFrame(
        [
            (1001, 0.852406, 0.059147, 340, "2021-07-13 11:00:00+00:00"),
            (1001, 0.571599, 0.244896, 752, "2021-08-10 12:00:00+00:00"),
            (1001, 0.929023, 0.479821, 716, "2021-07-13 13:00:00+00:00"),
        ],
        columns=["driver_id", "conv_rate", "acc_rate", "avg_daily_trips", "datetime"],
    )
    frame["datetime"] = pd.to_datetime(frame["datetime"])
    frame["created"] = pd.Timestamp("2021-07-28 11:08:04.802", tz="UTC")
    store.write_to_offline_store("driver_stats", frame)

    def feast(*arguments: str) -> str:
        command = [sys.executable, "-m", "feast.cli.cli", "-c", str(repo), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=repo.parent.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "driver_stats" in feast("feature-views", "list")
    feast("materialize", "2021-07-01T00:00:00", "2021-08-07T00:00:00")
    answer = feast(
        "get-online-features", "-e", "driver_id=1001",
        "-f", "driver_stats:conv_rate", "-f", "driver_stats:acc_rate", "-f", "driver_stats:avg_daily_trips",
    )  # fmt: skip
    found = json.loads(answer[answer.index("{") :])
    assert found["conv_rate"] == pytest.approx([0.929023])
    assert found["acc_rate"] == pytest.approx([0.479821])
    assert found["avg_daily_trips"] == [716]


@pytest.fixture
def store_and_contract(tmp_path: Path) -> tuple[FeatureStore, ViewContract]:
    store, (contract,) = applied(tmp_path)
    return store, contract


@pytest.mark.filterwarnings("ignore:On demand feature view is an experimental feature")
@pytest.mark.filterwarnings("ignore:Retrieving datasets is an experimental feature")
@pytest.mark.filterwarnings("ignore:Saving dataset is an experimental feature")
def test_on_demand_views_and_saved_datasets(tmp_path: Path) -> None:
    entities, feature_view = view()
    store, (contract,) = applied(tmp_path, None, (entities, feature_view))

    @on_demand_feature_view(  # type: ignore[untyped-decorator]
        sources=[store.get_feature_view("stats")], schema=[Field(name="double", dtype=Float64)], mode="pandas"
    )
    def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"double": inputs["value"] * 2})

    assert isinstance(doubled, OnDemandFeatureView)
    store.apply([doubled])
    push(contract, rows(contract, [{"id": 1, "at": 0, "value": 1.5, "count": 1}]))
    frame = pd.DataFrame({"id": [1], "event_timestamp": [moment(0)]})
    job = store.get_historical_features(entity_df=frame, features=["doubled:double", "stats:value"])
    assert job.to_df()["double"].tolist() == [3.0]
    storage = SavedDatasetFileStorage(path=str(tmp_path / "saved.parquet"))
    job = store.get_historical_features(entity_df=frame, features=["stats:value"])
    assert store.create_saved_dataset(from_=job, name="saved", storage=storage).to_df()["value"].tolist() == [1.5]
    assert store.get_saved_dataset("saved").to_df()["value"].tolist() == [1.5]


@pytest.mark.parametrize("path", ["data/saved.parquet", "data/saved"])
def test_a_saved_dataset_is_replaced_whole(store_and_contract: tuple[FeatureStore, ViewContract], path: str) -> None:
    store, contract = store_and_contract
    push(contract, rows(contract, [{"id": 1, "at": 0, "value": 1.5, "count": 1}]))
    storage = SavedDatasetFileStorage(path=path)
    frame = pd.DataFrame({"id": [1, 2], "event_timestamp": [moment(0)] * 2})
    job = store.get_historical_features(entity_df=frame, features=["stats:value"])
    job.persist(storage)
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)
    assert pq.read_table(contract.directory.parent.parent / path).num_rows == 2


def test_a_mapped_and_an_entityless_view_go_the_whole_way(tmp_path: Path) -> None:
    """By `write_to_offline_store`, in the names of the source, and Feast's own engine to online values."""
    store, contracts = applied(tmp_path, None, entityless("none", 0), mapped("mapped", 0))
    table = rows(contracts[0], [{"at": 1, "made": 1, "value": 2.5, "count": 3}])
    store.write_to_offline_store("none", table.to_pandas())
    table = rows(contracts[1], [{"src_id": 1, "src_at": n, "src_made": 0, "src_count": n} for n in (2, 4, 3)])
    store.write_to_offline_store("mapped", table.to_pandas())
    store.materialize(moment(0), moment(9))
    features = ["none:value", "none:count", "mapped:count"]
    found = store.get_online_features(features, [{"id": 1, DUMMY_ENTITY_ID: ""}], full_feature_names=True).to_dict()
    assert (found["none__value"], found["none__count"], found["mapped__count"]) == ([2.5], [3], [4])


def test_pulling_every_row_and_the_newest(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    push(contract, rows(contract, [{"id": 1, "at": n, "value": 1.5, "count": n} for n in range(5)]))
    source = contract.feature_view.batch_source
    assert source is not None
    everything = source, ["id"], ["count"], "at", "made", moment(1), moment(3)
    job = HeadraceOfflineStore.pull_all_from_table_or_query(store.config, *everything)
    assert sorted(job.to_df()["count"]) == [1, 2, 3]
    job = HeadraceOfflineStore.pull_latest_from_table_or_query(store.config, *everything)
    assert job.to_arrow().column_names == ["id", "count", "at", "made"]
    assert job.to_df()["count"].tolist() == [3]


def test_served_features_are_logged(store_and_contract: tuple[FeatureStore, ViewContract], tmp_path: Path) -> None:
    """By the DuckDB store's own way, which wants the folder to be there."""
    store, _ = store_and_contract
    logs = LoggingConfig(FileLoggingDestination(path=str(tmp_path / "logs")))
    service = FeatureService(name="served", features=[store.get_feature_view("stats")], logging_config=logs)
    store.apply([service])
    schema = FeatureServiceLoggingSource(feature_service=service, project=store.project).get_schema(store.registry)
    (tmp_path / "logs").mkdir()
    store.write_logged_features(pa.table({f.name: pa.nulls(1, f.type) for f in schema}, schema=schema), service)
    assert len(list((tmp_path / "logs").glob("*.parquet"))) == 1


def test_writing_offline_by_feast(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    frame = rows(contract, [{"id": 1, "at": 0, "made": 0, "value": 1.0, "count": 1}]).to_pandas()
    store.write_to_offline_store("stats", frame)
    store.write_to_offline_store("stats", frame[["count", "made", "at", "id", "value"]])
    assert latest(store, contract).to_pylist()[0]["count"] == 1
    assert Folder(contract.directory).chain("push").end == 2
    with pytest.raises(SchemaError, match=r"1 of 1 rows do not fit: row 0: field `count`: expected int64, found 5.7"):
        store.write_to_offline_store("stats", frame.assign(count=5.7))
    with pytest.raises(ValueError, match="missing_expected_columns"):
        store.write_to_offline_store("stats", frame.drop(columns=["count"]))
    assert Folder(contract.directory).chain("push").end == 2


def test_pushing_to_both_stores(tmp_path: Path) -> None:
    (driver,), feature_view = view("pushed")
    assert isinstance(feature_view.batch_source, FileSource)
    source = PushSource(name="door", batch_source=feature_view.batch_source)
    columns = [*feature_view.entity_columns, *feature_view.features]
    store, (contract,) = applied(
        tmp_path, None, ([driver], FeatureView(name="pushed", entities=[driver], schema=columns, source=source))
    )
    frame = rows(contract, [{"id": 1, "at": 5, "made": 0, "value": 1.0, "count": 1}]).to_pandas()
    store.push("door", frame, to=PushMode.ONLINE_AND_OFFLINE)
    assert served(store, contract, [{"id": 1}]) == [{"value": 1.0, "count": 1}]
    assert latest(store, contract).num_rows == 1
