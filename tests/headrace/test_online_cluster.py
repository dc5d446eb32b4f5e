"""The Redis store on a cluster of three masters: the same promises, a script call a key, whatever the slots do."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feast import FeatureStore
from redis import Redis
from redis.crc import key_slot

from headrace.audit import Kind, audit
from headrace.chains import StreamLedger
from headrace.contract import ViewContract
from headrace.days import replace_day
from headrace.encode import EncodedRows, Origin, encode, stream_tails
from headrace.errors import TransientError
from headrace.materialize import apply_newest, materialize_arrived
from headrace.online import NewestWinsStore, online_store, server_ids, write_online
from headrace.repair import repair, withdraw
from tests.headrace.views import applied, examples, rows
from tests.servers.valkey import Valkey, ValkeyCluster

KEYS = 300
BOUND_S = 30.0
"""Within which a writer that repeats goes on."""

Place = tuple[FeatureStore, ViewContract]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster(is_replicated=True) as servers:
        yield servers


def options(cluster: ValkeyCluster, **more: Any) -> dict[str, Any]:
    """Who waits for replicas does so for a second."""
    return {
        "type": "headrace.redis.HeadraceRedisOnlineStore",
        "redis_type": "redis_cluster",
        "connection_string": cluster.address + ",socket_timeout=2" * ("replicas_to_wait" in more),
        **more,
    }


@pytest.fixture
def place(tmp_path: Path, cluster: ValkeyCluster) -> Iterator[Place]:
    store, (contract,) = applied(tmp_path, options(cluster))
    yield store, contract
    online_store(store).teardown(store.config, [contract.feature_view], [])


def events(contract: ViewContract, at: int) -> Any:
    return rows(contract, [{"id": n, "at": at + n % 3, "value": float(at), "count": n} for n in range(KEYS)])


def hashes(store: FeatureStore, encoded: EncodedRows) -> list[bytes]:
    return [key + store.config.project.encode() for key in encoded.keys]


def another(cluster: ValkeyCluster, slot: int) -> Valkey:
    """A master that does not have a slot."""
    owner = cluster.owner(slot)
    return next(node for node in cluster.nodes if node is not owner)


def insist(write: Callable[[], Any]) -> Any:
    """Repeat what fails for a reason that may pass, as the worker does, within its bound."""
    deadline = time.monotonic() + BOUND_S
    while True:
        try:
            return write()
        except TransientError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def counts(cluster: ValkeyCluster, kind: str) -> int:
    """How many errors of a kind the servers have answered with."""
    every = [node for node in (*cluster.nodes, cluster.spare) if node is not None and node.is_running]
    infos: list[Any] = [Redis(port=node.port).info("errorstats") for node in every]
    return sum(int(info.get(f"errorstat_{kind}", {"count": 0})["count"]) for info in infos)


def test_newest_wins_on_every_master(place: Place) -> None:
    store, contract = place
    assert len(server_ids(store)) == 3
    assert write_online(store, contract, events(contract, 1)) == KEYS
    client: Any = online_store(store)._get_client(store.config.online_store)
    client.execute_command("SCRIPT FLUSH", target_nodes="primaries")
    assert write_online(store, contract, events(contract, 0)) == 0
    assert write_online(store, contract, events(contract, 5)) == KEYS
    answer = store.get_online_features(
        features=["stats:value", "stats:count"], entity_rows=[{"id": n} for n in range(KEYS)]
    ).to_dict()
    assert answer["value"] == [5.0] * KEYS
    assert answer["count"] == list(range(KEYS))


def test_what_is_stored_is_read_listed_replaced_and_deleted(place: Place) -> None:
    store, contract = place
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


# -- slots that are moved --------------------------------------------------------------------------------------------


def test_newest_wins_while_slots_are_moved(cluster: ValkeyCluster, place: Place) -> None:
    """Writers of old and new values, readers and listings, while slots go to and fro."""
    store, contract = place
    target: NewestWinsStore = online_store(store)
    chance = random.Random(3)
    first = encode(contract, events(contract, 1))
    target.write_newest(store.config, contract.feature_view, first)
    slots = sorted({key_slot(key) for key in hashes(store, first)})
    moving = [*chance.sample(slots, examples(8)), *chance.sample(slots, 2)]
    written: list[EncodedRows] = [first]
    is_over = threading.Event()
    before = counts(cluster, "ASK"), counts(cluster, "MOVED")

    def write(seed: int) -> None:
        own = random.Random(seed)
        while not is_over.is_set():
            values = [
                {"id": n, "at": own.randrange(1000), "value": own.random(), "count": own.randrange(9)}
                for n in own.sample(range(KEYS), 200)
            ]
            encoded = encode(contract, rows(contract, values))
            written.append(encoded)
            target.write_newest(store.config, contract.feature_view, encoded)

    def look() -> None:
        known: list[bytes] = list(first.order)
        while not is_over.is_set():
            now = target.read_stored(store.config, contract.feature_view, first.keys).order
            assert all(order is not None and order >= former for former, order in zip(known, now, strict=True))
            known = [order or b"" for order in now]
            listed = {key for keys in target.stored_keys(store.config, contract.feature_view) for key in keys}
            assert listed == set(first.keys)

    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(write, 1), pool.submit(write, 2), pool.submit(look)]
        try:
            for number, slot in enumerate(moving):
                if number % 3 == 2:
                    cluster.migrate_slot(slot, another(cluster, slot))
                else:
                    cluster.move_slot(slot, another(cluster, slot), pause_s=0.02)
        finally:
            is_over.set()
        for one in work:
            one.result()
    assert counts(cluster, "ASK") > before[0]
    assert counts(cluster, "MOVED") > before[1]
    newest: dict[bytes, bytes] = {}
    values: dict[bytes, list[bytes]] = {}
    for encoded in written:
        columns = [column.to_pylist() for column in encoded.values.values()]
        for i, (key, order) in enumerate(zip(encoded.keys, encoded.order, strict=True)):
            if key not in newest or order >= newest[key]:
                newest[key], values[key] = order, [column[i] for column in columns]
    stored = target.read_stored(store.config, contract.feature_view, first.keys)
    assert dict(zip(stored.keys, stored.order, strict=True)) == newest
    found = list(zip(*stored.values.values(), strict=True))
    assert {key: list(row) for key, row in zip(stored.keys, found, strict=True)} == values


def test_a_new_master_gets_its_first_slots(cluster: ValkeyCluster, place: Place, tmp_path: Path) -> None:
    """It is in no list of who has slots, and has no script; what it is asked for is there all the same."""
    store, contract = place
    target: NewestWinsStore = online_store(store)
    view = contract.feature_view
    encoded = encode(contract, events(contract, 1))
    target.write_newest(store.config, view, encoded)
    newcomer = cluster.add()
    slot = key_slot(hashes(store, encoded)[7])
    mark = key_slot(f"headrace:mark:{store.config.project}:{view.name}".encode())
    former = {one: cluster.owner(one) for one in (slot, mark)}
    for one in former:
        cluster.open_slot(one, newcomer)
    assert cluster.move_keys(slot, newcomer) == 1
    assert write_online(store, contract, events(contract, 2)) == KEYS
    assert write_online(store, contract, events(contract, 1)) == 0
    assert target.swap_mark(store.config, view, None, {"version": 1})
    assert target.read_mark(store.config, view) == {"version": 1}
    assert {key for keys in target.stored_keys(store.config, view) for key in keys} == set(encoded.keys)
    asked = {"features": ["stats:value"], "entity_rows": [{"id": n} for n in range(KEYS)]}
    assert store.get_online_features(**asked).to_dict()["value"] == [2.0] * KEYS

    async def served() -> Any:
        try:
            return (await store.get_online_features_async(**asked)).to_dict()["value"]
        finally:
            await store._get_provider().close()

    assert asyncio.run(served()) == [2.0] * KEYS
    waiting, (same,) = applied(tmp_path / "waiting", options(cluster, replicas_to_wait=1))
    with pytest.raises(TransientError, match=f"0 of 1 replicas of {newcomer.address} acknowledged"):
        write_online(waiting, same, events(same, 2))
    cluster.close_slot(slot, newcomer)
    assert write_online(store, contract, events(contract, 3)) == KEYS
    for one, owner in former.items():
        if one == mark:
            cluster.move_keys(one, newcomer)
            cluster.close_slot(one, newcomer)
        cluster.move_slot(one, owner)
    assert len(server_ids(store)) == 4


def test_audit_repair_materialize_and_withdraw_across_slots_that_move(cluster: ValkeyCluster, place: Place) -> None:
    store, contract = place
    ledger = StreamLedger(contract, "stats", 0)
    table, offsets = events(contract, 1), np.arange(KEYS)
    ledger.append(0, 0, KEYS, table, accepted=offsets)
    target: NewestWinsStore = online_store(store)
    slots = [key_slot(key) for key in hashes(store, encode(contract, table))]
    chance = random.Random(5)

    def while_slots_move(work: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(work)
            for slot in chance.sample(slots, 2):
                cluster.move_slot(slot, another(cluster, slot), pause_s=0.01)
            return under_way.result()

    while_slots_move(lambda: materialize_arrived(store, contract))
    assert while_slots_move(lambda: audit(store, contract)).diverged == 0
    seen = target.read_stored(store.config, contract.feature_view, encode(contract, table).keys[:40])
    assert all(target.replace_exact(store.config, contract.feature_view, seen, None))
    assert while_slots_move(lambda: audit(store, contract)).diverged == 40
    while_slots_move(lambda: repair(store, contract))
    assert audit(store, contract).diverged == 0
    gone = while_slots_move(lambda: withdraw(store, contract, table.slice(0, 10)))
    assert sum(gone.values()) == 0  # the history still has them
    assert audit(store, contract).diverged == 0
    days = {number: date(2026, 3, number) for number in (1, 2)}
    older, newer = (rows(contract, [{"id": 1000 + n, "at": at, "value": 1.0} for n in range(60)]) for at in (1, 2))
    replace_day(contract, days[1], older.slice(0, 20))
    replace_day(contract, days[2], newer)
    while_slots_move(lambda: materialize_arrived(store, contract))
    replace_day(contract, days[2], newer.slice(30))
    gone = while_slots_move(lambda: withdraw(store, contract, newer.slice(0, 30)))
    assert gone == {Kind.AHEAD: 20, Kind.EXTRA: 10}
    assert audit(store, contract).diverged == 0


# -- masters that are lost -------------------------------------------------------------------------------------------


def test_each_master_waits_for_its_replica(cluster: ValkeyCluster, tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, options(cluster, replicas_to_wait=1))
    assert write_online(store, contract, events(contract, 1)) == KEYS
    copies: list[Any] = [Redis(port=replica.port) for replica in cluster.replicas]
    sizes = [len(copy.keys("*id*")) for copy in copies]
    assert min(sizes) > KEYS / 4
    assert sum(sizes) == KEYS
    cluster.replicas[1].freeze()
    try:
        for at in (2, 0):  # of those that are turned away nothing is written
            with pytest.raises(TransientError, match=rf"0 of 1 replicas of {cluster.nodes[1].address} acknowledged"):
                write_online(store, contract, events(contract, at))
    finally:
        cluster.replicas[1].thaw()
    assert insist(lambda: write_online(store, contract, events(contract, 3))) == KEYS
    online_store(store).teardown(store.config, [contract.feature_view], [])


def test_what_was_acknowledged_outlives_a_master_that_is_killed(cluster: ValkeyCluster, tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, options(cluster, replicas_to_wait=1))
    target: NewestWinsStore = online_store(store)
    keys = encode(contract, events(contract, 0)).keys
    acknowledged, is_over, ids = 0, threading.Event(), server_ids(store)
    write_online(store, contract, events(contract, 0))

    def write() -> None:
        nonlocal acknowledged
        at = 0
        while not is_over.is_set():
            at += 10
            insist(lambda at=at: write_online(store, contract, events(contract, at)))  # type: ignore[misc]
            acknowledged = at

    def look() -> None:
        while not is_over.is_set():
            least = acknowledged
            orders = insist(lambda: target.read_stored(store.config, contract.feature_view, keys)).event_us
            assert min(orders) % 1_000_000 >= least

    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(write), pool.submit(look)]
        try:
            cluster._await(lambda: acknowledged >= 50)
            cluster.lose(1)
            cluster.nodes[1].start()  # without a replica nothing is acknowledged
            went_on = acknowledged
            cluster._await(lambda: acknowledged > went_on + 50 or any(one.done() for one in work))
            assert set(server_ids(store)) != set(ids)
            cluster.take_back(1)
        finally:
            is_over.set()
        for one in work:
            one.result()
    online_store(store).teardown(store.config, [contract.feature_view], [])


def test_what_an_asynchronous_replica_lacked_is_mended(cluster: ValkeyCluster, place: Place) -> None:
    """Rows of the stream by its tail, those of a day by a repair."""
    store, contract = place
    ledger = StreamLedger(contract, "stats", 0)
    replica, ids = cluster.replicas[1], server_ids(store)

    def stream(at: int, first: int) -> None:
        table, offsets = events(contract, at), np.arange(first, first + KEYS)
        write_online(store, contract, table, tails=stream_tails(Origin(0, 0, offsets)))
        ledger.append(0, first, first + KEYS, table, accepted=offsets, servers=ids)

    stream(1, 0)
    master: Any = Redis(port=cluster.nodes[1].port)
    master.execute_command("WAIT", 1, 2000)
    replica.freeze()
    try:
        master.execute_command("CLIENT KILL TYPE replica")  # else it reads from its socket what was sent
        stream(5, KEYS)
        day = rows(contract, [{"id": 1000 + n, "at": n, "value": float(n)} for n in range(KEYS)])
        replace_day(contract, date(2026, 3, 1), day)
        materialize_arrived(store, contract)
        cluster.nodes[1].kill()
    finally:
        replica.thaw()
    cluster.promote(replica)
    try:
        lacking = insist(lambda: audit(store, contract)).diverged
        present = server_ids(store)
        assert set(present) != set(ids)
        apply_newest(store, contract, ledger.recent(0, present, 600))
        left = audit(store, contract)
        assert lacking - KEYS / 4 > left.diverged > KEYS / 4
        repair(store, contract)
        assert audit(store, contract).diverged == 0
    finally:
        cluster.take_back(1)
