"""Stores that fail in the middle: what is stored is whole rows, the error says what to do, a repeat completes it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from feast import FeatureStore, Field
from feast.types import Int64
from pydantic import ValidationError

from headrace import faults
from headrace import sqlite as sqlite_module
from headrace.contract import ViewContract
from headrace.encode import encode, encode_keys
from headrace.errors import ConfigError, TransientError
from headrace.online import NewestWinsStore, online_store, server_ids, write_online
from tests.headrace.views import EPOCH_US, applied, config, redis_online, rows, sqlite_online, view
from tests.servers import Valkey, ValkeySentinel
from tests.servers.valkey import ValkeyCluster

KEYS = 5_000


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def wide(count: int) -> Any:
    return view("stats", None, [Field(name=f"f{n}", dtype=Int64) for n in range(count)])


def many(contract: ViewContract, keys: int, at: int) -> pa.Table:
    """Rows whose features all hold `at`, so that a torn one shows."""
    return rows(contract, [{"id": n, "at": at, **dict.fromkeys(contract.features, at)} for n in range(keys)])


def versions(store: FeatureStore, contract: ViewContract, table: pa.Table) -> set[int | None]:
    """Which versions are stored; asserts that every row is whole."""
    target: NewestWinsStore = online_store(store)
    encoded = encode(contract, table)
    stored = target.read_stored(store.config, contract.feature_view, encoded.keys)
    for row in zip(*stored.values.values(), strict=True):
        assert len(set(row)) == 1
    return set(stored.event_us)


def test_redis_out_of_memory(tmp_path: Path, own_valkey: Valkey) -> None:
    store, (contract,) = applied(tmp_path, redis_online(own_valkey.address), wide(3))
    client: Any = redis.Redis(port=own_valkey.port)
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 600_000)
    table = many(contract, KEYS, 1)
    with pytest.raises(TransientError, match=r"Redis at 127\.0\.0\.1:\d+ failed: OutOfMemoryError.* no harm"):
        write_online(store, contract, table)
    assert len(versions(store, contract, table)) == 2  # a part of them
    client.config_set("maxmemory", 0)
    assert write_online(store, contract, table) == KEYS
    assert None not in versions(store, contract, table)


def test_redis_restarted_between_chunks(tmp_path: Path, own_valkey: Valkey) -> None:
    store, (contract,) = applied(tmp_path, redis_online(own_valkey.address), wide(3))
    table = many(contract, KEYS, 1)
    write_online(store, contract, table)
    own_valkey.kill()
    target: NewestWinsStore = online_store(store)
    for call in (
        lambda: write_online(store, contract, table),
        lambda: target.read_mark(store.config, contract.feature_view),
    ):
        with pytest.raises(TransientError, match=r"Redis at 127\.0\.0\.1:\d+ failed: ConnectionError"):
            call()
    own_valkey.start()  # it has forgotten everything, the scripts too
    assert versions(store, contract, table) == {None}
    assert write_online(store, contract, table) == KEYS
    assert len(versions(store, contract, table)) == 1


def test_a_sentinel_fails_over_between_writes(tmp_path: Path, own_valkey: Valkey) -> None:
    master: Any = redis.Redis(port=own_valkey.port)
    master.config_set("repl-diskless-sync-delay", 0)
    replica_of = ("--replicaof", "127.0.0.1", str(own_valkey.port))
    with Valkey(replica_of) as replica, ValkeySentinel(own_valkey) as sentinel:
        promoted: Any = redis.Redis(port=replica.port)
        watch: Any = redis.Redis(port=sentinel.port)
        online = {**redis_online(sentinel.address), "redis_type": "redis_sentinel"}
        store, (contract,) = applied(tmp_path, online, wide(3))
        first, last = many(contract, KEYS, 1), many(contract, KEYS, 2)
        assert write_online(store, contract, first) == KEYS
        before = server_ids(store)
        assert master.wait(1, 10_000) == 1
        until(lambda: watch.sentinel_slaves("mymaster"))
        watch.sentinel_failover("mymaster")
        until(lambda: promoted.info("replication")["role"] == "master")
        own_valkey.kill()
        until(lambda: writes(store, contract, last))  # not at once: it has connections to the old master
        assert len(versions(store, contract, last)) == 1
        assert server_ids(store) != before


@pytest.fixture
def own_replica(own_valkey: Valkey) -> Iterator[Valkey]:
    """Of `own_valkey`, in step with it."""
    master: Any = redis.Redis(port=own_valkey.port)
    master.config_set("repl-diskless-sync-delay", 0)
    with Valkey(("--replicaof", "127.0.0.1", str(own_valkey.port))) as replica:
        master.set("known", "")
        until(lambda: master.wait(1, 100) == 1)
        yield replica


def waiting(server: Valkey, replicas: int = 1) -> dict[str, Any]:
    return {**redis_online(server.address), "replicas_to_wait": replicas}


@pytest.mark.parametrize("how", ["transactions", "script"])
def test_a_write_is_done_when_the_replica_has_it(
    tmp_path: Path, own_valkey: Valkey, own_replica: Valkey, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store, (contract,) = applied(tmp_path, waiting(own_valkey), wide(3))
    copy = FeatureStore(config=config(tmp_path, redis_online(own_replica.address)))
    client: Any = redis.Redis(port=own_valkey.port)
    one = many(contract, 1, 0)
    if how == "script":  # another changes a key of each chunk
        key = encode_keys(contract, one)[0].as_py() + store.project.encode()
        monkeypatch.setattr(faults, "hook", lambda step: client.hset(key, "other", ""))
    for at in (1, 2):
        assert write_online(store, contract, many(contract, 200, at)) == 200
        assert versions(copy, contract, many(contract, 200, at)) == {EPOCH_US + at}
    monkeypatch.setattr(faults, "hook", None)
    assert write_online(store, contract, many(contract, KEYS, 3)) == KEYS
    assert versions(copy, contract, many(contract, KEYS, 3)) == {EPOCH_US + 3}
    assert not [key for key in client.keys("*id*") if client.hexists(key, "_hr")]


@pytest.mark.parametrize("at", [3, 2, 1])
def test_a_write_that_the_replica_does_not_have_is_not_done(
    tmp_path: Path, own_valkey: Valkey, own_replica: Valkey, at: int
) -> None:
    """Nor is one that wrote nothing, because a newer row is there of which the replica does not know."""
    unknowing, (contract,) = applied(tmp_path, redis_online(own_valkey.address), wide(3))
    store = FeatureStore(config=config(tmp_path, waiting(own_valkey)))
    table = many(contract, 300, at)
    assert write_online(store, contract, table) == 300
    own_replica.freeze()
    assert write_online(unknowing, contract, many(contract, 300, 2)) == (300 if at <= 2 else 0)
    for _ in range(2):
        begun_s = time.monotonic()
        with pytest.raises(
            TransientError, match=r"0 of 1 replicas of 127\.0\.0\.1:\d+ ack.*`replicas_to_wait` in .*no harm"
        ):
            write_online(store, contract, table)
        assert 1.9 < time.monotonic() - begun_s < 4
    own_replica.thaw()
    assert write_online(store, contract, table) == (300 if at >= 2 else 0)
    copy = FeatureStore(config=config(tmp_path, redis_online(own_replica.address)))
    assert versions(copy, contract, table) == {EPOCH_US + max(at, 2)}


def test_a_replica_that_is_not_there_is_waited_for_in_vain(tmp_path: Path, own_valkey: Valkey) -> None:
    online = waiting(own_valkey)
    online["connection_string"] += ",socket_timeout=1"
    store, (contract,) = applied(tmp_path, online, wide(3))
    with pytest.raises(TransientError, match=r"`stats`.*0 of 1 replicas .* acknowledged within 0\.5 s"):
        write_online(store, contract, many(contract, 3, 1))
    assert write_online(store, contract, many(contract, 0, 1)) == 0
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        config(tmp_path, waiting(own_valkey, -1)).online_store  # noqa: B018 - it is made when asked for


@pytest.mark.parametrize("kind", ["redis", "redis_sentinel", "redis_cluster"])
def test_a_server_that_hangs_is_not_waited_for_without_end(tmp_path: Path, kind: str) -> None:
    """Unless the connection string says otherwise. Cluster and Sentinel have a server behind the client's back."""
    with ExitStack() as stack:
        if kind == "redis_cluster":
            address = stack.enter_context(ValkeyCluster(1)).address
        else:
            server = stack.enter_context(Valkey())
            address = server.address
            if kind == "redis_sentinel":
                address = stack.enter_context(ValkeySentinel(server)).address
        for text, limits in (("", (5.0, 2.0)), (",socket_timeout=1,socket_connect_timeout=3", (1, 3))):
            online = {**redis_online(address), "connection_string": f"{address}{text}", "redis_type": kind}
            store = FeatureStore(config=config(tmp_path, online))
            client = online_store(store)._get_client(store.config.online_store)
            client = client.get_default_node().redis_connection if kind == "redis_cluster" else client
            client.ping()
            connection = client.connection_pool.get_connection()
            assert (connection.socket_timeout, connection.socket_connect_timeout) == limits


def test_replicas_of_another_server_than_was_written_to_do_not_count(
    tmp_path: Path, own_valkey: Valkey, own_replica: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is replaced between two chunks of one write, by one that has the replicas and not the first chunk."""
    client: Any = redis.Redis(port=own_valkey.port)
    store, (contract,) = applied(tmp_path, waiting(own_valkey), wide(3))
    table = many(contract, 300, 1)

    def replace(step: str) -> None:
        if step == "write.2.written":
            monkeypatch.setattr(faults, "hook", None)
            own_valkey.kill()
            own_valkey.start()
            client.config_set("repl-diskless-sync-delay", 0)
            until(lambda: client.info("replication").get("slave0", {}).get("state") == "online")

    monkeypatch.setattr(faults, "hook", replace)
    with pytest.raises(TransientError, match="is not the primary that was written to first"):
        write_online(store, contract, table)
    assert len(versions(store, contract, table)) == 2  # a part of them
    until(lambda: writes(store, contract, table))
    assert versions(store, contract, table) == {EPOCH_US + 1}


def writes(store: FeatureStore, contract: ViewContract, table: pa.Table) -> bool:
    """Whether a write is done; if not it must say so."""
    try:
        write_online(store, contract, table)
    except TransientError:
        return False
    return True


def until(holds: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("fault", ["newer", "older", "deleted", "flushed", "dropped", "another type"])
@pytest.mark.parametrize("chunk", range(3))
def test_redis_changes_between_comparing_and_writing(
    tmp_path: Path, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch, fault: str, chunk: int
) -> None:
    """Of the first chunk, of one that was looked at together with the write of the one before, and of the last."""
    store, (contract,) = applied(tmp_path, redis_online(own_valkey.address), wide(3))
    client: Any = redis.Redis(port=own_valkey.port)
    table = many(contract, 500, 5)
    write_online(store, contract, many(contract, 500, 1))
    keys: list[bytes] = client.keys("*id*")
    row, compared = 200 * chunk, 0
    its_key = encode_keys(contract, table.slice(row, 1))[0].as_py() + store.project.encode()

    def interfere(step: str) -> None:
        nonlocal compared
        if step != "write.1.compared":
            return
        compared += 1
        if compared <= chunk:
            return
        monkeypatch.setattr(faults, "hook", None)
        if fault in ("newer", "older"):
            assert write_online(store, contract, many(contract, 500, 9 if fault == "newer" else 3).slice(row, 1)) == 1
        elif fault == "deleted":
            client.delete(*keys)
        elif fault == "flushed":
            client.flushall()
        elif fault == "dropped":
            client.client_kill_filter(_type="normal", skipme=True)
        else:
            client.delete(its_key)
            client.set(its_key, "not a hash")

    monkeypatch.setattr(faults, "hook", interfere)
    if fault == "another type":
        with pytest.raises(TransientError, match="WRONGTYPE"):
            write_online(store, contract, table)
        client.delete(its_key)
    else:
        assert write_online(store, contract, table) == (499 if fault == "newer" else 500)
    assert write_online(store, contract, table) == (499 if fault == "newer" else 500)
    assert versions(store, contract, table.slice(row, 1)) == {EPOCH_US + (9 if fault == "newer" else 5)}
    others = pa.concat_tables([table.slice(0, row), table.slice(row + 1)])
    assert versions(store, contract, others) == {EPOCH_US + 5}


def test_a_connection_that_is_checked_keeps_what_it_watches(
    tmp_path: Path, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks in a pause, and is due for a check: were it opened anew, nothing would be watched."""
    online = redis_online(own_valkey.address)
    online["connection_string"] += ",health_check_interval=1"
    store, (contract,) = applied(tmp_path, online, wide(3))
    client: Any = redis.Redis(port=own_valkey.port)
    write_online(store, contract, many(contract, 3, 1))

    def interfere(step: str) -> None:
        if step == "write.1.compared":
            monkeypatch.setattr(faults, "hook", None)
            assert write_online(store, contract, many(contract, 3, 9)) == 3
            time.sleep(1.1)
            client.client_kill_filter(_type="normal", skipme=True)

    monkeypatch.setattr(faults, "hook", interfere)
    assert write_online(store, contract, many(contract, 3, 5)) == 0
    assert versions(store, contract, many(contract, 3, 9)) == {EPOCH_US + 9}


def test_redis_is_filled_with_some_of_the_keys_there(tmp_path: Path, own_valkey: Valkey) -> None:
    """Chunks of which nothing, some or all is stored, newer or older, in any order."""
    store, (contract,) = applied(tmp_path, redis_online(own_valkey.address), wide(3))
    old, mid, new = (many(contract, 2_000, at) for at in (1, 5, 9))
    there = [*range(450, 460), *range(800, 1_300), 1_999]
    newer = [455, *range(900, 1_000)]
    assert write_online(store, contract, old.take(there)) == len(there)
    assert write_online(store, contract, new.take(newer)) == len(newer)
    assert write_online(store, contract, mid) == 2_000 - len(newer)
    assert versions(store, contract, new.take(newer)) == {EPOCH_US + 9}
    rest = sorted(set(range(2_000)) - set(newer))
    assert versions(store, contract, mid.take(rest)) == {EPOCH_US + 5}


@pytest.mark.parametrize("kind", ["sqlite", "valkey"])
def test_a_killed_writer_leaves_whole_rows(tmp_path: Path, kind: str, own_valkey: Valkey) -> None:
    online = sqlite_online() if kind == "sqlite" else redis_online(own_valkey.address)
    store, (contract,) = applied(tmp_path, online, wide(20))
    write_online(store, contract, many(contract, KEYS, 1))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    begun = context.Event()
    process = context.Process(target=write_for_ever, args=(tmp_path, online, begun))
    process.start()
    assert begun.wait(60)
    time.sleep(0.2)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    versions(store, contract, many(contract, KEYS, 1))
    last = many(contract, KEYS, 10**6)
    assert write_online(store, contract, last) == KEYS
    assert len(versions(store, contract, last)) == 1


def write_for_ever(home: Path, online: dict[str, Any], begun: Any) -> None:
    store = FeatureStore(config=config(home, online))
    contract = ViewContract.from_feast(store.get_feature_view("stats"), store.config)
    for at in range(2, 10**6):
        write_online(store, contract, many(contract, KEYS, at))
        begun.set()


def test_a_row_lives_anew_only_when_it_is_newer(tmp_path: Path, own_valkey: Valkey) -> None:
    store, (contract,) = applied(tmp_path, {**redis_online(own_valkey.address), "key_ttl_seconds": 100}, wide(1))
    client: Any = redis.Redis(port=own_valkey.port)

    def lives_after(at: int) -> int:
        write_online(store, contract, many(contract, 1, at))
        (key,) = client.keys("*id*")
        left: int = client.ttl(key)
        client.expire(key, 50)
        return left

    assert lives_after(5) > 90
    assert lives_after(5) <= 50
    assert lives_after(4) <= 50
    assert lives_after(6) > 90


def test_a_row_of_thousands_of_features(tmp_path: Path, own_valkey: Valkey) -> None:
    store, (contract,) = applied(tmp_path, redis_online(own_valkey.address), wide(3_100))
    for at in (1, 2):
        table = many(contract, 3, at)
        assert write_online(store, contract, table) == 3
        assert len(versions(store, contract, table)) == 1


def test_sqlite_locked_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online(), wide(1))
    write_online(store, contract, many(contract, 1, 1))
    monkeypatch.setattr(sqlite_module, "_LOCK_TIMEOUT_S", 0.3)
    other = sqlite3.connect(tmp_path / "data/online.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TransientError, match=r"online\.db: another process held the write lock for .*repeat"):
        write_online(store, contract, many(contract, 1, 2))
    other.execute("COMMIT")
    assert write_online(store, contract, many(contract, 1, 2)) == 1


def test_sqlite_lets_others_in_during_a_large_write(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online(), wide(3))
    table = many(contract, 4, 9)
    write_online(store, contract, table)
    bulk = encode(contract, many(contract, 200_000, 1))
    other = FeatureStore(config=config(tmp_path))
    target: NewestWinsStore = online_store(store)
    thread = threading.Thread(target=target.write_newest, args=(store.config, contract.feature_view, bulk))
    thread.start()
    write_online(other, contract, many(contract, 4, 10))
    assert thread.is_alive()  # the small one did not wait for the whole of the large one
    thread.join()
    assert len(versions(store, contract, table)) == 1


def test_sqlite_in_a_forked_process(tmp_path: Path) -> None:
    """The child opens connections of its own; those of the parent go on."""
    store, (contract,) = applied(tmp_path, sqlite_online(), wide(2))
    table = many(contract, 4, 1)
    write_online(store, contract, table)
    target: Any = online_store(store)
    with target._lock:  # as if another thread was writing
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if write_online(store, contract, many(contract, 4, 2)) == 4 else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    assert write_online(store, contract, table) == 0
    assert write_online(store, contract, many(contract, 4, 3)) == 4
    assert len(versions(store, contract, table)) == 1


def test_a_view_that_is_not_applied_is_named(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online(), wide(1))
    online_store(store).teardown(store.config, [contract.feature_view], [])
    with pytest.raises(ConfigError, match="not applied"):
        write_online(store, contract, many(contract, 1, 1))


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata"])
def test_sqlite_understands_stock_rows_in_any_time_zone(tmp_path: Path, zone: str) -> None:
    """Around both changes of the clock; stock Feast stores local whole seconds."""
    script = textwrap.dedent(
        """
        import sys
        from datetime import UTC, datetime, timedelta
        from pathlib import Path
        import pandas as pd
        from headrace.encode import encode
        from headrace.online import online_store, write_online
        from tests.headrace.views import applied, rows, sqlite_online
        store, (contract,) = applied(Path(sys.argv[1]), sqlite_online())
        other, (same,) = applied(Path(sys.argv[1]), {**sqlite_online(), "type": "sqlite"})
        def row(id, at, value):
            return rows(contract, [{"id": id, "at": None, "value": value, "count": 1}]).set_column(
                3, contract.schema.field("at"), [[at]])
        def value(id):
            return store.get_online_features(features=["stats:value"], entity_rows=[{"id": id}]).to_dict()["value"][0]
        summer, spring, autumn = (datetime(2024, *day, tzinfo=UTC) for day in ((7, 1), (3, 10, 4), (11, 3, 0, 30)))
        for id, start in enumerate((summer, spring, autumn)):
            for hour in range(6):
                at = start + timedelta(hours=hour)
                write_online(store, contract, row(id, at, 1.0))
                assert write_online(store, contract, row(id, at - timedelta(minutes=1), 2.0)) == 0
                keys = encode(contract, row(id, at, 1.0)).keys
                stored = online_store(store).read_stored(store.config, contract.feature_view, keys)
                assert stored.event_us == [int(at.timestamp()) * 10**6], (at, stored)
        for id, at in ((10, summer), (11, autumn - timedelta(days=30)), (12, autumn + timedelta(days=30))):
            frame = pd.DataFrame([{"id": id, "value": 3.0, "count": 1, "at": at, "made": at}])
            other.write_to_online_store("stats", frame)
            assert write_online(store, contract, row(id, at - timedelta(seconds=1), 4.0)) == 0
            assert value(id) == 3.0
            assert write_online(store, contract, row(id, at + timedelta(seconds=1), 4.0)) == 1
            assert value(id) == 4.0
            older = at - timedelta(days=1)
            other.write_to_online_store("stats", frame.assign(at=older, made=older, value=5.0))
            assert write_online(store, contract, row(id, older - timedelta(seconds=1), 6.0)) == 0
            assert value(id) == 5.0
            assert write_online(store, contract, row(id, older + timedelta(seconds=1), 6.0)) == 1
        """
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "TZ": zone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
