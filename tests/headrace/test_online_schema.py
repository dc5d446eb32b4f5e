"""A view that changes, goes or shares its entity: no value of another definition, view or project shows or is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
import redis
from feast import FeatureStore, FeatureView, Field, FileSource
from feast.data_format import ParquetFormat
from feast.types import Float64, Int64, String

from headrace.contract import ViewContract
from headrace.days import replace_day
from headrace.encode import Origin, stream_tails
from headrace.errors import TransientError
from headrace.materialize import materialize_arrived, materialize_window
from headrace.online import NewestWinsStore, online_store, write_online
from headrace.repair import repair, withdraw
from headrace.scan import Window
from tests.headrace.views import applied, config, redis_online, rows, sqlite_online, view

VALUE, COUNT = Field(name="value", dtype=Float64), Field(name="count", dtype=Int64)


@pytest.fixture(params=["sqlite", "valkey"])
def online(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return sqlite_online()
    database: Iterator[int] = request.getfixturevalue("valkey_databases")
    return redis_online(request.getfixturevalue("valkey"), next(database))


def apply(home: Path, online: dict[str, Any], fields: Sequence[Field]) -> tuple[FeatureStore, ViewContract]:
    store, (contract,) = applied(home, online, view("stats", None, fields))
    return store, contract


def served(store: FeatureStore, contract: ViewContract) -> dict[str, Any]:
    refs = [f"{contract.name}:{feature}" for feature in contract.features]
    answer = store.get_online_features(features=refs, entity_rows=[{"id": 1}]).to_dict()
    return {feature: answer[feature][0] for feature in contract.features}


def test_an_added_feature_is_null_until_it_is_written(tmp_path: Path, online: dict[str, Any]) -> None:
    store, contract = apply(tmp_path, online, [VALUE])
    write_online(store, contract, rows(contract, [{"id": 1, "at": 1, "value": 1.0}]))
    store, contract = apply(tmp_path, online, [VALUE, COUNT])
    assert served(store, contract) == {"value": 1.0, "count": None}
    row = {"id": 1, "at": 1, "value": 1.0, "count": 5}
    write_online(store, contract, rows(contract, [{**row, "at": 0}]))
    assert served(store, contract) == {"value": 1.0, "count": None}
    offsets = pa.array([3]).to_numpy()
    write_online(store, contract, rows(contract, [row]), tails=stream_tails(Origin(0, 0, offsets)))
    assert served(store, contract) == {"value": 1.0, "count": 5}


@pytest.mark.parametrize("is_written_between", [False, True])
def test_a_removed_feature_comes_back_empty(tmp_path: Path, online: dict[str, Any], is_written_between: bool) -> None:
    store, contract = apply(tmp_path, online, [VALUE, COUNT])
    write_online(store, contract, rows(contract, [{"id": 1, "at": 1, "value": 1.0, "count": 5}]))
    store, contract = apply(tmp_path, online, [VALUE])
    if is_written_between:
        write_online(store, contract, rows(contract, [{"id": 1, "at": 2, "value": 2.0}]))
    store, contract = apply(tmp_path, online, [VALUE, COUNT])
    assert served(store, contract) == {"value": 2.0 if is_written_between else 1.0, "count": None}


def test_a_writer_that_does_not_know_a_feature_yet_leaves_no_older_value_of_it(
    tmp_path: Path, online: dict[str, Any]
) -> None:
    old_store, old_contract = apply(tmp_path, online, [VALUE])
    store, contract = apply(tmp_path, online, [VALUE, COUNT])
    write_online(store, contract, rows(contract, [{"id": 1, "at": 1, "value": 1.0, "count": 5}]))
    write_online(old_store, old_contract, rows(old_contract, [{"id": 1, "at": 2, "value": 2.0}]))
    assert served(store, contract) == {"value": 2.0, "count": None}


def test_a_changed_view_is_not_filled_before_its_apply_has_ended(
    tmp_path: Path, online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The apply would empty the new feature of what was filled in, and the mark would say that it is there."""
    store, contract = apply(tmp_path, online, [VALUE])
    with monkeypatch.context() as patch:
        patch.setattr(type(online_store(store)), "update", lambda *_, **__: None)  # as if it was about to begin
        store, contract = apply(tmp_path, online, [VALUE, COUNT])
    table = rows(contract, [{"id": 1, "at": 1, "value": 1.0, "count": 5}])
    replace_day(contract, date(2026, 3, 1), table)
    fillings: list[Callable[[], Any]] = [
        lambda: materialize_arrived(store, contract),
        lambda: materialize_window(store, contract, Window()),
        lambda: repair(store, contract),
        lambda: withdraw(store, contract, table),
    ]
    for fill in fillings:
        with pytest.raises(TransientError, match="`stats` changed in the registry, and the online store has not taken"):
            fill()
    store, contract = apply(tmp_path, online, [VALUE, COUNT])
    for fill in fillings:
        fill()
    assert served(store, contract) == {"value": 1.0, "count": 5}


def test_a_feature_of_another_type_is_null_until_it_is_written(tmp_path: Path, online: dict[str, Any]) -> None:
    store, contract = apply(tmp_path, online, [VALUE, COUNT])
    write_online(store, contract, rows(contract, [{"id": 1, "at": 2, "value": 1.0, "count": 5}]))
    store, contract = apply(tmp_path, online, [VALUE, Field(name="count", dtype=String)])
    assert served(store, contract) == {"value": 1.0, "count": None}
    write_online(store, contract, rows(contract, [{"id": 1, "at": 1, "value": 0.0, "count": "older"}]))
    assert served(store, contract) == {"value": 1.0, "count": None}
    write_online(store, contract, rows(contract, [{"id": 1, "at": 3, "value": 3.0, "count": "five"}]))
    assert served(store, contract) == {"value": 3.0, "count": "five"}


def test_projects_whose_names_end_alike_are_apart(tmp_path: Path, online: dict[str, Any]) -> None:
    stores = []
    for project in ("test", "a_test"):
        store = FeatureStore(config=config(tmp_path, online, project))
        entities, shape = view("stats")
        store.apply([*entities, shape])
        contract = ViewContract.from_feast(store.get_feature_view("stats"), store.config)
        write_online(store, contract, rows(contract, [{"id": 1, "at": 1, "value": 1.0, "count": 5}]))
        stores.append((store, contract))
    (store, contract), (other, same) = stores
    target = cast("NewestWinsStore", online_store(store))
    assert [len(keys) for keys in target.stored_keys(store.config, contract.feature_view)] == [1]
    online_store(store).update(store.config, [contract.feature_view], [], [], [], partial=True)
    assert served(other, same) == {"value": 1.0, "count": 5}
    online_store(store).teardown(store.config, [contract.feature_view], [])
    assert served(other, same) == {"value": 1.0, "count": 5}


def test_what_is_not_ours_in_redis_stays(tmp_path: Path, valkey: str, valkey_databases: Iterator[int]) -> None:
    database = next(valkey_databases)
    online = redis_online(valkey, database)
    store, (one, two) = applied(tmp_path, online, view("one"), view("two"))
    for contract in (one, two):
        write_online(store, contract, rows(contract, [{"id": 1, "at": 1, "value": 1.0, "count": 5}]))
    host, port = valkey.split(":")
    client: Any = redis.Redis(host, int(port), database)
    (key,) = client.keys("*id*test")
    client.hset(key, "mine", "1")
    client.set(key + b"test", "mine")
    before = client.hgetall(key)
    online_store(store).teardown(store.config, [one.feature_view], [])
    after = client.hgetall(key)
    assert {field: before[field] for field in after} == after
    assert len(before) - len(after) == 4
    assert client.get(key + b"test") == b"mine"
    online_store(store).teardown(store.config, [two.feature_view], [])
    assert client.hgetall(key) == {b"mine": b"1"}


@pytest.mark.parametrize("kind", ["sqlite", "headrace.sqlite.HeadraceSqliteOnlineStore"])
def test_mapped_fields_and_no_entity_in_any_store(tmp_path: Path, kind: str) -> None:
    source = FileSource(
        name="history",
        path="data/plain",
        file_format=ParquetFormat(),
        timestamp_field="at",
        created_timestamp_column="made",
        field_mapping={"val": "value"},
    )
    shape = FeatureView(name="plain", entities=[], schema=[VALUE, COUNT], source=source)
    store, (contract,) = applied(tmp_path, {"type": kind, "path": "data/online.db"}, ([], shape))
    assert contract.features == ("val", "count")
    older, newest, untimed = (
        rows(contract, [{"val": float(at), "count": at if made else 9, "at": at, "made": made}])
        for at, made in ((1, 1), (2, 1), (2, None))
    )
    assert write_online(store, contract, pa.concat_tables([older, newest, untimed])) == 1  # three chunks
    answer = store.get_online_features(
        features=["plain:value", "plain:count"], entity_rows=[{"__dummy_id": ""}]
    ).to_dict()
    assert (answer["value"], answer["count"]) == ([2.0], [2])
