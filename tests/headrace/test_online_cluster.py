"""The Redis store on a cluster of three masters: the same promises, a script call a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feast import FeatureStore
from redis import Redis

from headrace.contract import ViewContract
from headrace.encode import encode
from headrace.errors import TransientError
from headrace.online import NewestWinsStore, online_store, server_ids, write_online
from tests.headrace.views import applied, rows
from tests.servers.valkey import ValkeyCluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster() as servers:
        yield servers


@pytest.fixture
def store_and_contract(tmp_path: Path, cluster: ValkeyCluster) -> Iterator[tuple[FeatureStore, ViewContract]]:
    online = {
        "type": "headrace.redis.HeadraceRedisOnlineStore",
        "redis_type": "redis_cluster",
        "connection_string": cluster.address,
    }
    store, (contract,) = applied(tmp_path, online)
    yield store, contract
    online_store(store).teardown(store.config, [contract.feature_view], [])


def events(contract: ViewContract, at: int) -> Any:
    return rows(contract, [{"id": n, "at": at + n % 3, "value": float(at), "count": n} for n in range(300)])


def test_newest_wins_on_every_master(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    assert len(server_ids(store)) == 3
    assert write_online(store, contract, events(contract, 1)) == 300
    client: Any = online_store(store)._get_client(store.config.online_store)
    client.execute_command("SCRIPT FLUSH", target_nodes="primaries")
    assert write_online(store, contract, events(contract, 0)) == 0
    assert write_online(store, contract, events(contract, 5)) == 300
    answer = store.get_online_features(
        features=["stats:value", "stats:count"], entity_rows=[{"id": n} for n in range(300)]
    ).to_dict()
    assert answer["value"] == [5.0] * 300
    assert answer["count"] == list(range(300))


def test_what_is_stored_is_read_listed_replaced_and_deleted(
    store_and_contract: tuple[FeatureStore, ViewContract],
) -> None:
    store, contract = store_and_contract
    target: NewestWinsStore = online_store(store)
    encoded = encode(contract, events(contract, 9))
    target.write_newest(store.config, contract.feature_view, encoded)
    seen = target.read_stored(store.config, contract.feature_view, encoded.keys)
    assert seen.order == encoded.order
    assert seen.values == {name: column.to_pylist() for name, column in encoded.values.items()}
    older = encode(contract, events(contract, 4))
    assert all(target.replace_exact(store.config, contract.feature_view, seen, older))
    assert not any(target.replace_exact(store.config, contract.feature_view, seen, older))
    listed = {key for keys in target.stored_keys(store.config, contract.feature_view) for key in keys}
    assert listed == set(encoded.keys)
    assert target.swap_mark(store.config, contract.feature_view, None, {"version": 1})
    online_store(store).update(store.config, [contract.feature_view], [], [], [], partial=True)
    assert list(target.stored_keys(store.config, contract.feature_view)) == []
    assert target.read_mark(store.config, contract.feature_view) is None


def test_each_master_waits_for_its_replica(tmp_path: Path) -> None:
    with ValkeyCluster(2, is_replicated=True) as cluster:
        online = {
            "type": "headrace.redis.HeadraceRedisOnlineStore",
            "redis_type": "redis_cluster",
            "connection_string": cluster.address,
            "replicas_to_wait": 1,
        }
        store, (contract,) = applied(tmp_path, online)
        assert write_online(store, contract, events(contract, 1)) == 300
        copies: list[Any] = [Redis(port=replica.port) for replica in cluster.replicas]
        sizes = [len(copy.keys("*id*")) for copy in copies]
        assert min(sizes) > 100
        assert sum(sizes) == 300
        cluster.replicas[1].freeze()
        for at in (2, 0):  # of those that are turned away nothing is written
            with pytest.raises(TransientError, match=rf"0 of 1 replicas of {cluster.nodes[1].address} acknowledged"):
                write_online(store, contract, events(contract, at))
        cluster.replicas[1].thaw()
        assert write_online(store, contract, events(contract, 2)) == 300
