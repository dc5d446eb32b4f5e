"""History: point-in-time joins equal a brute-force oracle, Feast's own interface works, the lesson's example passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from feast import FeatureStore, FeatureView, Field, FileSource, OnDemandFeatureView, PushSource
from feast.data_source import PushMode
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.chains import Folder, StreamLedger, push, replace_day
from headrace.contract import ViewContract
from headrace.encode import encode
from headrace.errors import ConfigError, SchemaError
from headrace.materialize import materialize_arrived, pending
from headrace.offline import latest
from headrace.scan import Window, newest_rows
from tests.conftest import RepositoryFactory
from tests.headrace.test_online import served
from tests.headrace.views import EPOCH_US, applied, redis_online, rows, sqlite_online, view

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(us: int) -> datetime:
    return EPOCH + timedelta(microseconds=EPOCH_US + us)


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


EVENT = st.fixed_dictionaries(
    {
        "id": st.integers(0, 2),
        "at": st.integers(0, 12),
        "made": st.one_of(st.none(), st.integers(0, 2)),
        "value": st.one_of(st.none(), st.integers(0, 5).map(float)),
    }
)
ASKED = st.fixed_dictionaries({"id": st.one_of(st.none(), st.integers(0, 3)), "at": st.integers(-1, 14)})


@pytest.fixture
def store_and_contract(tmp_path: Path) -> tuple[FeatureStore, ViewContract]:
    store, (contract,) = applied(tmp_path)
    return store, contract


@pytest.fixture(scope="module")
def stores_by_ttl(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[FeatureStore, ViewContract]]:
    made = {}
    for ttl in (0, 1, 3):
        store, (contract,) = applied(tmp_path_factory.mktemp("pit"), None, view(ttl=timedelta(microseconds=ttl)))
        made[ttl] = (store, contract)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    stream=st.lists(EVENT, max_size=6),
    day=st.lists(EVENT, max_size=4),
    pushed=st.lists(EVENT, max_size=4),
    asked=st.lists(ASKED, min_size=1, max_size=6),
    ttl=st.sampled_from([0, 1, 3]),
)
def test_point_in_time_equals_the_oracle(
    stores_by_ttl: dict[int, tuple[FeatureStore, ViewContract]],
    stream: list[dict[str, Any]],
    day: list[dict[str, Any]],
    pushed: list[dict[str, Any]],
    asked: list[dict[str, Any]],
    ttl: int,
) -> None:
    store, contract = stores_by_ttl[ttl]
    shutil.rmtree(contract.directory, ignore_errors=True)
    everything = [{**event, "count": n} for n, event in enumerate([*stream, *day, *pushed])]
    stream, day, pushed = (
        everything[: len(stream)],
        everything[len(stream) : len(stream) + len(day)],
        everything[len(stream) + len(day) :],
    )
    ledger = StreamLedger(contract, "stats", 0)
    for number, event in enumerate(stream):
        ledger.append(0, number, number + 1, rows(contract, [event]), accepted=np.array([number], dtype=np.int64))
    if day:
        replace_day(contract, date(2026, 1, 1), rows(contract, day))
    push(contract, rows(contract, pushed))
    ranked = ranks(contract, stream, [*day, *pushed])
    frame = pd.DataFrame(
        {
            "id": pd.array([row["id"] for row in asked], dtype="Int64"),
            "event_timestamp": [moment(row["at"]) for row in asked],
            "extra": range(len(asked)),
        }
    )
    found = (
        store.get_historical_features(entity_df=frame, features=["stats:count", "stats:value"]).to_arrow().to_pylist()
    )
    for row, got in zip(asked, found, strict=True):
        known = [(rank, event) for rank, event in ranked if event["id"] == row["id"] and event["at"] <= row["at"]]
        _, best = max(known, key=lambda pair: pair[0], default=(None, {"at": -(10**9)}))
        if ttl and best["at"] < row["at"] - ttl:
            best = {"at": 0}
        assert (got["count"], got["value"]) == (best.get("count"), best.get("value"))
    assert [got["extra"] for got in found] == list(range(len(asked)))
    for window in (Window(), Window(moment(3), moment(9))):
        low, high = (3, 9) if window.start else (-(10**9), 10**9)
        newest = {
            r["id"]: r["count"] for r in newest_rows(contract, Folder(contract.directory).files(), window).to_pylist()
        }
        expected: dict[int, Any] = {}
        for rank, event in ranked:
            if low <= event["at"] <= high and (event["id"] not in expected or expected[event["id"]][0] <= rank):
                expected[event["id"]] = (rank, event["count"])
        assert newest == {key: count for key, (_, count) in expected.items()}


def ranks(
    contract: ViewContract, stream: list[dict[str, Any]], others: list[dict[str, Any]]
) -> list[tuple[Any, dict[str, Any]]]:
    def times(event: dict[str, Any]) -> tuple[int, int]:
        return event["at"], -1 if event["made"] is None else event["made"]

    out: list[tuple[Any, dict[str, Any]]] = [((*times(e), 1, e["count"], b""), e) for e in stream]
    out += [((*times(e), 0, 0, encode(contract, rows(contract, [e])).order[0][17:]), e) for e in others]
    return out


def test_an_entity_frame_keeps_its_shape_types_and_order(
    store_and_contract: tuple[FeatureStore, ViewContract],
) -> None:
    store, contract = store_and_contract
    push(contract, rows(contract, [{"id": 1, "at": 0, "value": 1.0, "count": 1}]))
    frame = pd.DataFrame(
        {"id": [2.0, 1.0, 1.0], "when": [moment(1).replace(tzinfo=None)] * 3, "label": ["a", "b", "c"]}
    )
    job = store.get_historical_features(
        entity_df=frame.rename(columns={"when": "event_timestamp"}),
        features=["stats:value"],
        full_feature_names=True,
    )
    found = job.to_df()
    assert found["label"].tolist() == ["a", "b", "c"]
    assert found["stats__value"].fillna(-1).tolist() == [-1, 1, 1]
    assert job.metadata is not None


def test_entities_from_sql(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    push(contract, rows(contract, [{"id": 1, "at": 0, "value": 1.5, "count": 1}]))
    sql = f"SELECT 1 AS id, make_timestamp({EPOCH_US + 5}) AS event_timestamp"
    assert store.get_historical_features(entity_df=sql, features=["stats:value"]).to_df()["value"].tolist() == [1.5]


def test_no_history_is_all_null(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, _ = store_and_contract
    frame = pd.DataFrame({"id": [1], "event_timestamp": [moment(0)]})
    assert store.get_historical_features(entity_df=frame, features=["stats:value"]).to_df()["value"].isna().all()


def test_a_frame_without_the_key_is_refused(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, _ = store_and_contract
    frame = pd.DataFrame({"other": [1], "event_timestamp": [moment(0)]})
    with pytest.raises(ConfigError, match="lacks id, it has other"):
        store.get_historical_features(entity_df=frame, features=["stats:value"]).to_df()


@pytest.mark.filterwarnings("ignore:On demand feature view is an experimental feature")
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
    saved = store.create_saved_dataset(
        from_=store.get_historical_features(entity_df=frame, features=["stats:value"]), name="saved", storage=storage
    )
    assert saved.to_df()["value"].tolist() == [1.5]


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


@pytest.fixture(params=["sqlite", "valkey", "stock"])
def any_store(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[FeatureStore, ViewContract]:
    online = {"type": "sqlite", "path": "data/stock.db"} if request.param == "stock" else sqlite_online()
    if request.param == "valkey":
        databases = request.getfixturevalue("valkey_databases")
        online = redis_online(request.getfixturevalue("valkey"), next(databases))
    store, (contract,) = applied(tmp_path, online)
    return store, contract


def test_materialize_what_arrived(any_store: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = any_store
    is_ours = "headrace" in store.config.online_store.type
    ledger = StreamLedger(contract, "stats", 0)

    def event(key: int, at: int) -> dict[str, Any]:
        return {"id": key, "at": at, "made": at, "value": float(at), "count": at}

    assert materialize_arrived(store, contract).already
    ledger.append(0, 0, 3, rows(contract, [event(1, 5), event(2, 5)]), accepted=np.array([0, 2]), rejected=1)
    replace_day(contract, date(2026, 1, 1), rows(contract, [event(1, 9), event(3, 1)]))
    push(contract, rows(contract, [event(4, 4)]))
    done = materialize_arrived(store, contract)
    if is_ours:
        assert (done.rows, done.days, sorted(done.chains)) == (5, ["2026-01-01"], ["push", "stream-stats-0-0"])
    keys = [{"id": n} for n in (1, 2, 3, 4)]
    assert [row["count"] for row in served(store, contract, keys)] == [9, 5, 1, 4]
    if not is_ours:
        return  # a store without a mark is given everything each time
    assert materialize_arrived(store, contract).already
    assert not pending(store, contract)
    replace_day(contract, date(2025, 12, 31), rows(contract, [event(2, 4), event(3, 2)]))  # late
    ledger.append(0, 3, 4, rows(contract, [event(4, 6)]), accepted=np.array([3]))
    assert pending(store, contract)
    shown: list[tuple[int, int]] = []
    done = materialize_arrived(store, contract, progress=lambda part, total: shown.append((part, total)))
    assert (done.rows, done.keys_written, done.days) == (3, 2, ["2025-12-31"])
    assert done.chains == {"stream-stats-0-0": (3, 4)}
    assert shown[-1] == (3, 3)
    assert [row["count"] for row in served(store, contract, keys)] == [9, 5, 2, 6]


def test_feast_materialize_goes_by_event_time(any_store: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = any_store
    push(contract, rows(contract, [{"id": 1, "at": n, "made": 0, "value": 1.0, "count": n} for n in (1, 3, 2, 9)]))
    store.materialize(moment(0), moment(3))
    assert served(store, contract, [{"id": 1}])[0]["count"] == 3


def test_a_table_beyond_a_chunk_arrives_whole(
    store_and_contract: tuple[FeatureStore, ViewContract], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.materialize.ROWS_A_CHUNK", 7)
    store, contract = store_and_contract
    ids = list(range(50))
    table = rows(contract, [{"id": n, "at": 1, "made": 1, "value": 0.5, "count": n} for n in ids])
    ledger = StreamLedger(contract, "stats", 0)
    ledger.append(0, 0, 100, table, accepted=np.arange(0, 100, 2), rejected=50)
    done = materialize_arrived(store, contract)
    assert (done.rows, done.keys_written) == (50, 50)
    assert [row["count"] for row in served(store, contract, [{"id": n} for n in ids])] == ids
