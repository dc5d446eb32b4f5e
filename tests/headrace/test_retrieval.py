"""Historical retrieval equals a brute-force oracle: several views, keys of every kind, ties, nulls, late rows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pandas as pd
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import Float64, Int64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.contract import ViewContract
from tests.headrace.test_scan import KEY_VALUES, best, events, moment, write_history
from tests.headrace.views import applied, examples, view

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
)
def test_point_in_time_equals_the_oracle(
    repository: tuple[FeatureStore, dict[str, ViewContract]],
    names: list[str],
    data: st.DataObject,
    wanted: list[dict[str, Any]],
    by_created: bool,
) -> None:
    store, contracts = repository
    expected = {}
    for name in names:
        history = data.draw(st.lists(events(KEYS[name]), max_size=10))
        ranked = write_history(contracts[name], [_as_source(contracts[name], row) for row in history])
        for feature in ("value", "count"):
            expected[f"{name}__{feature}"] = [
                repr(_as_of(contracts[name], ranked, row, by_created).get(_source(contracts[name], feature)))
                for row in wanted
            ]
    job = store.get_historical_features(
        entity_df=frame_of(wanted * 2),
        features=[f"{name}:{feature}" for name in names for feature in ("value", "count")],
        full_feature_names=True,
        filter_by_created_timestamp=by_created,
    )
    found = job.to_arrow().to_pydict()
    assert found["label"] == list(range(2 * len(wanted)))
    assert {column: [repr(value) for value in found[column]] for column in expected} == {
        column: values * 2 for column, values in expected.items()
    }


def _as_of(
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


def _source(contract: ViewContract, name: str) -> str:
    return next((c for c in contract.schema.names if contract.view_name(c) == name), name)


def _as_source(contract: ViewContract, row: Mapping[str, Any]) -> dict[str, Any]:
    return {_source(contract, name): value for name, value in row.items()}
