"""What an online store holds can be read back whole, and replaced by compare-and-set alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feast import FeatureStore, ValueType

from headrace.contract import ViewContract
from headrace.encode import EncodedRows, encode
from headrace.online import NewestWinsStore, StoredRows, online_store, write_online
from tests.headrace.views import EPOCH_US, applied, redis_online, rows, sqlite_online, view


@pytest.fixture(params=["sqlite", "valkey"])
def online(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return sqlite_online()
    database: Iterator[int] = request.getfixturevalue("valkey_databases")
    return redis_online(request.getfixturevalue("valkey"), next(database))


@pytest.fixture
def store_and_contract(tmp_path: Path, online: dict[str, Any]) -> tuple[FeatureStore, ViewContract]:
    store, (contract,) = applied(tmp_path, online)
    return store, contract


def encoded(contract: ViewContract, *values: dict[str, Any]) -> EncodedRows:
    """One row a key, in the order given."""
    return encode(contract, rows(contract, values))


def read(store: FeatureStore, contract: ViewContract, keys: list[bytes]) -> StoredRows:
    target: NewestWinsStore = online_store(store)
    return target.read_stored(store.config, contract.feature_view, keys)


def replace(store: FeatureStore, contract: ViewContract, seen: StoredRows, new: EncodedRows | None) -> list[bool]:
    target: NewestWinsStore = online_store(store)
    return target.replace_exact(store.config, contract.feature_view, seen, new)


def stored_keys(store: FeatureStore, contract: ViewContract) -> list[bytes]:
    target: NewestWinsStore = online_store(store)
    return sorted({key for keys in target.stored_keys(store.config, contract.feature_view) for key in keys})


def test_what_was_written_is_read_back(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    written = encoded(
        contract,
        {"id": 1, "at": 5, "made": 2, "value": 1.5, "count": 2**62},
        {"id": -2, "at": -EPOCH_US - 7, "value": None, "count": 0},
    )
    write_online(store, contract, rows(contract, [{"id": 1, "at": 5, "made": 2, "value": 1.5, "count": 2**62}]))
    write_online(store, contract, rows(contract, [{"id": -2, "at": -EPOCH_US - 7, "value": None, "count": 0}]))
    (absent,) = encoded(contract, {"id": 3, "at": 0}).keys
    found = read(store, contract, [written.keys[0], absent, written.keys[1]])
    assert found.keys == [written.keys[0], absent, written.keys[1]]
    assert found.order == [written.order[0], None, written.order[1]]
    assert found.event_us == [EPOCH_US + 5, None, -7]
    assert found.values == {
        name: [column[0].as_py(), b"", column[1].as_py()] for name, column in written.values.items()
    }
    assert stored_keys(store, contract) == sorted(written.keys)
    assert found.take(np.array([2, 1], dtype=np.int64)).keys == [written.keys[1], absent]


def test_only_what_was_seen_is_replaced(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    newer = [{"id": n, "at": 9, "value": 9.0, "count": n} for n in range(4)]
    write_online(store, contract, rows(contract, newer[:3]))
    older = encoded(contract, *({"id": n, "at": 4, "value": 4.0, "count": n} for n in range(4)))
    seen = read(store, contract, older.keys)
    write_online(store, contract, rows(contract, [{**newer[1], "at": 10}]))
    assert replace(store, contract, seen, older) == [True, False, True, True]
    found = read(store, contract, older.keys)
    assert found.event_us == [EPOCH_US + 4, EPOCH_US + 10, EPOCH_US + 4, EPOCH_US + 4]
    assert found.order[0] == older.order[0]
    assert replace(store, contract, seen, older) == [False] * 4
    assert replace(store, contract, found, None) == [True] * 4
    assert read(store, contract, older.keys).order == [None] * 4
    assert stored_keys(store, contract) == []


def test_views_of_one_entity_are_apart(tmp_path: Path, online: dict[str, Any]) -> None:
    store, (one, two) = applied(tmp_path, online, view("one"), view("two"))
    row = {"id": 1, "at": 9, "value": 1.0, "count": 1}
    write_online(store, one, rows(one, [row]))
    assert stored_keys(store, two) == []
    write_online(store, two, rows(two, [row]))
    keys = encoded(one, row).keys
    assert replace(store, one, read(store, one, keys), None) == [True]
    assert read(store, one, keys).order == [None]
    assert read(store, two, keys).event_us == [EPOCH_US + 9]


def test_other_keys_of_a_view_with_several(tmp_path: Path, online: dict[str, Any]) -> None:
    shape = view("wide", {"name": ValueType.STRING, "shard": ValueType.INT32})
    store, (contract,) = applied(tmp_path, online, shape)
    values = [{"name": name, "shard": n, "at": n, "value": 1.0} for n, name in enumerate(["", "é", "x" * 300])]
    write_online(store, contract, rows(contract, values))
    assert stored_keys(store, contract) == sorted(encoded(contract, *values).keys)
