"""Historical retrieval equals a brute-force oracle: several views, keys of every kind, ties, nulls, late rows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float64, Int64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import scan
from headrace.chains import push
from headrace.contract import ViewContract
from headrace.errors import ConfigError
from tests.headrace.test_scan import FEW_FILES, KEY_VALUES, best, events, moment, write_history
from tests.headrace.views import EPOCH_US, applied, examples, rows, view

KEYS: Mapping[str, dict[str, ValueType]] = {
    "one": {"id": ValueType.INT64},
    "two": {"a": ValueType.STRING, "b": ValueType.INT32},
    "three": {"a": ValueType.STRING, "id": ValueType.INT64, "c": ValueType.BYTES},
    "none": {},
    "mapped": {"id": ValueType.INT64},
}
TTLS_US: Mapping[str, int] = {"one": 0, "two": 2, "three": 0, "none": 3, "mapped": 1}
FRAME_KEYS = {"id": ValueType.INT64, "a": ValueType.STRING, "b": ValueType.INT32, "c": ValueType.BYTES}


def entityless(name: str, ttl_us: int) -> tuple[list[Entity], FeatureView]:
    """A view whose one row is everybody's."""
    _, made = view(name)
    ttl = timedelta(microseconds=ttl_us)
    return [], FeatureView(name=name, entities=[], ttl=ttl, schema=made.features, source=made.stream_source)


def mapped(name: str, ttl_us: int) -> tuple[list[Entity], FeatureView]:
    """A view that calls nothing as its source does."""
    names = {"src_id": "id", "src_value": "value", "src_count": "count", "src_at": "at", "src_made": "made"}
    source = FileSource(
        name=f"{name}_history",
        path=f"data/{name}",
        file_format=ParquetFormat(),
        timestamp_field="at",
        created_timestamp_column="made",
        field_mapping=names,
    )
    entity = Entity(name="id_entity", join_keys=["id"], value_type=ValueType.INT64)
    schema = [Field(name="id", dtype=Int64), Field(name="value", dtype=Float64), Field(name="count", dtype=Int64)]
    ttl = timedelta(microseconds=ttl_us)
    return [entity], FeatureView(name=name, entities=[entity], ttl=ttl, schema=schema, source=source)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, dict[str, ViewContract]]:
    made = []
    for name, keys in KEYS.items():
        if name in ("none", "mapped"):
            made.append((entityless if name == "none" else mapped)(name, TTLS_US[name]))
        else:
            ttl = timedelta(microseconds=TTLS_US[name])
            made.append(view(name, keys, ttl=ttl, created=name != "three"))
    store, contracts = applied(tmp_path_factory.mktemp("retrieval"), None, *made)
    return store, {contract.name: contract for contract in contracts}


def asked() -> st.SearchStrategy[dict[str, Any]]:
    keys = {key: st.one_of(st.none(), st.sampled_from(KEY_VALUES[kind])) for key, kind in FRAME_KEYS.items()}
    return st.fixed_dictionaries({**keys, "time": st.integers(-1, 11)})


def frame_of(wanted: list[dict[str, Any]]) -> pd.DataFrame:
    """An entity frame with an index of its own and a column to tell rows by."""
    columns: dict[str, Any] = {key: [row[key] for row in wanted] for key in FRAME_KEYS}
    columns["id"] = pd.array(columns["id"], dtype="Int64")
    columns["b"] = pd.array(columns["b"], dtype="Int32")
    times = pd.to_datetime([moment(row["time"]) for row in wanted])
    return pd.DataFrame(
        {**columns, "event_timestamp": times, "label": range(len(wanted))}, index=range(9, 9 + len(wanted))
    )


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=2, unique=True),
    data=st.data(),
    wanted=st.lists(asked(), min_size=1, max_size=8),
    by_created=st.booleans(),
    few_files=FEW_FILES,
)
def test_point_in_time_equals_the_oracle(
    repository: tuple[FeatureStore, dict[str, ViewContract]],
    names: list[str],
    data: st.DataObject,
    wanted: list[dict[str, Any]],
    by_created: bool,
    few_files: int,
) -> None:
    store, contracts = repository
    expected = {}
    for name in names:
        history = data.draw(st.lists(events(KEYS[name]), max_size=10))
        ranked = write_history(contracts[name], [as_source(contracts[name], row) for row in history])
        for feature in ("value", "count"):
            expected[f"{name}__{feature}"] = [
                repr(as_of(contracts[name], ranked, row, by_created).get(source(contracts[name], feature)))
                for row in wanted
            ]
    job = store.get_historical_features(
        entity_df=frame_of(wanted * 2),
        features=[f"{name}:{feature}" for name in names for feature in ("value", "count")],
        full_feature_names=True,
        filter_by_created_timestamp=by_created,
    )
    with patch.object(scan, "_FEW_FILES", few_files):
        found = job.to_arrow().to_pydict()
    assert found["label"] == list(range(2 * len(wanted)))
    assert {column: [repr(value) for value in found[column]] for column in expected} == {
        column: values * 2 for column, values in expected.items()
    }


def as_of(
    contract: ViewContract, ranked: list[tuple[bytes, Mapping[str, Any]]], row: Mapping[str, Any], by_created: bool
) -> Mapping[str, Any]:
    """The row of the history that an entity row gets; empty if none."""
    ttl, now = TTLS_US[contract.name], row["time"]

    def known(event: Mapping[str, Any]) -> bool:
        at, made = event[contract.timestamp_field], event.get(contract.created_field or "")
        same = all(event[key] == row[contract.view_name(key)] for key in contract.join_keys)
        in_time = at <= now and (not ttl or at >= now - ttl)
        return same and in_time and (not by_created or not contract.created_field or (made is not None and made <= now))

    return best((order, event) for order, event in ranked if known(event)) or {}


def source(contract: ViewContract, name: str) -> str:
    return next((c for c in contract.schema.names if contract.view_name(c) == name), name)


def as_source(contract: ViewContract, row: Mapping[str, Any]) -> dict[str, Any]:
    return {source(contract, name): value for name, value in row.items()}


@pytest.fixture
def place(tmp_path: Path) -> tuple[FeatureStore, ViewContract]:
    store, (contract,) = applied(tmp_path)
    push(contract, rows(contract, [{"id": 1, "at": n, "made": n, "value": float(n), "count": n} for n in (0, 4)]))
    return store, contract


def values(store: FeatureStore, entity_df: pd.DataFrame | str | None, **more: Any) -> list[Any]:
    """What a retrieval of `stats:count` gives."""
    found = store.get_historical_features(entity_df=entity_df, features=["stats:count"], **more).to_arrow()
    return list(found.column("count").to_pylist())


@pytest.mark.parametrize(
    "stamp",
    [
        pd.Timestamp(moment(2)),
        pd.Timestamp(moment(2)).tz_localize(None),
        pd.Timestamp(moment(2)).tz_convert("America/New_York"),
        pd.Timestamp(moment(2)).as_unit("ns"),
        moment(2),
        moment(2).isoformat(),
        moment(2).isoformat(" ").removesuffix("+00:00"),
    ],
)
def test_times_of_any_kind(place: tuple[FeatureStore, ViewContract], stamp: Any) -> None:
    store, _ = place
    assert values(store, pd.DataFrame({"id": [1, 2], "event_timestamp": [stamp, stamp]})) == [0, None]


def test_dates_begin_at_midnight(place: tuple[FeatureStore, ViewContract]) -> None:
    store, _ = place
    day = moment(0).date()
    assert values(store, pd.DataFrame({"id": [1, 1], "event_timestamp": [day, day + timedelta(days=1)]})) == [None, 4]


def test_an_entity_frame_keeps_its_shape_types_and_order(place: tuple[FeatureStore, ViewContract]) -> None:
    store, _ = place
    frame = pd.DataFrame({"id": [2.0, 1.0, None], "when": pd.to_datetime([moment(1)] * 3), "label": ["a", "b", "c"]})
    job = store.get_historical_features(entity_df=frame, features=["stats:value"], full_feature_names=True)
    found = job.to_df()
    assert found.columns.tolist() == ["id", "when", "label", "stats__value"]
    assert found["label"].tolist() == ["a", "b", "c"]
    assert found["stats__value"].fillna(-1).tolist() == [-1, 0, -1]
    assert job.metadata is not None
    assert job.metadata.min_event_timestamp == moment(1)
    assert sorted(job.metadata.keys) == ["id", "label"]


def test_entities_from_sql(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    assert values(store, f"SELECT 1 AS id, make_timestamp({EPOCH_US + 5}) AS event_timestamp") == [4]
    wanted = pd.DataFrame({"id": [1], "event_timestamp": [moment(1)]})
    wanted.to_parquet(contract.directory.parent / "wanted.parquet")
    assert values(store, "SELECT * FROM 'data/wanted.parquet'") == [0]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"other": [1], "event_timestamp": [moment(0)]}, "lacks id, it has other"),
        ({"id": [1.5], "event_timestamp": [moment(0)]}, "expected int64 as join key `id`, found double"),
        ({"id": [1], "event_timestamp": [1_700_000_000]}, "expected times in the entity_df's column `event_timestamp`"),
        ({"id": [1], "event_timestamp": ["soon"]}, "found text that is none"),
        ({"id": [1], "event_timestamp": [moment(0)], "count": [1]}, "a column of the name of a wanted feature: count"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(
    place: tuple[FeatureStore, ViewContract], frame: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        values(place[0], pd.DataFrame(frame))


def test_no_history_and_no_rows(tmp_path: Path) -> None:
    store, _ = applied(tmp_path)
    frame = pd.DataFrame({"id": [1], "event_timestamp": [moment(0)]})
    assert values(store, frame) == [None]
    assert values(store, frame.iloc[:0]) == []


def test_one_view_under_two_names_by_two_columns(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    push(contract, rows(contract, [{"id": 2, "at": 1, "made": 1, "value": 7.0, "count": 7}]))
    stats = store.get_feature_view("stats")
    ends = [stats.with_name(name).with_join_key_map({"id": f"{name}_id"})[["count"]] for name in ("origin", "target")]
    store.apply([FeatureService(name="trip", features=ends)])
    frame = pd.DataFrame({"origin_id": [1, 2], "target_id": [2, 1], "event_timestamp": [moment(9)] * 2})
    job = store.get_historical_features(frame, store.get_feature_service("trip"), full_feature_names=True)
    assert job.to_df()[["origin__count", "target__count"]].to_numpy().tolist() == [[4, 7], [7, 4]]


def test_a_range_of_time_without_entities(tmp_path: Path) -> None:
    """A row for each key and time that a view has in the range, with what is known then; nothing from before it."""
    store, (one, two) = applied(tmp_path, None, view("one"), view("two", ttl=timedelta(microseconds=2)))
    push(one, rows(one, [{"id": 1, "at": n, "value": float(n), "count": n} for n in (0, 3, 6, 6, 20)]))
    push(two, rows(two, [{"id": 1, "at": 2, "count": 20}, {"id": 2, "at": 4, "count": 40}]))
    job = store.get_historical_features(
        features=["one:count", "two:count"], full_feature_names=True, start_date=moment(1), end_date=moment(9)
    )
    assert [tuple(row.values()) for row in job.to_arrow().to_pylist()] == [
        (moment(2), 1, None, 20),
        (moment(3), 1, 3, 20),
        (moment(4), 2, None, 40),
        (moment(6), 1, 6, None),
    ]
