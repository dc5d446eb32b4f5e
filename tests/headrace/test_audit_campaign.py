"""Known differences among many keys: an audit finds just these, a repair mends just these, beside a stream.

20,000 keys each day; `HEADRACE_TEST_KEYS=1000000` in a campaign. Audits and repairs run in another process, in a
campaign each in one of its own; their time and the greatest memory of the process are told at the end.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import redis
from feast import FeatureStore

from headrace.audit import Audit, Kind, audit
from headrace.chains import StreamLedger, replace_day
from headrace.contract import ViewContract
from headrace.encode import EncodedRows, Origin, encode, stream_tails
from headrace.materialize import materialize_arrived
from headrace.online import NewestWinsStore, online_store, write_online
from headrace.repair import Repair, repair
from headrace.sample import Sample
from tests.headrace.views import EPOCH_US, applied, config, redis_online, sqlite_online
from tests.reporting import tables

KEYS = int(os.environ.get("HEADRACE_TEST_KEYS", "20000"))
KEYS_A_FAULT = 10_000
FAULTS = max(1, KEYS // KEYS_A_FAULT)
KEYS_OF_THE_STREAM = 97
"""Each so-manieth key is the stream's while the stores are mended."""

WRONG = (Kind.DIFFERENT, Kind.MISSING, Kind.STALE, Kind.EXTRA)
SPAWN = multiprocessing.get_context("spawn")
Result = TypeVar("Result")
Snapshot = dict[bytes, bytes]


@dataclass(frozen=True)
class Stores:
    """A view on disk and in one of the online stores; any process can open it."""

    home: Path
    online: Mapping[str, Any]

    def open(self) -> tuple[FeatureStore, ViewContract]:
        store = FeatureStore(config=config(self.home, self.online))
        return store, ViewContract.from_feast(store.get_feature_view("stats"), store.config)

    def snapshot(self) -> Snapshot:
        """A digest of all that is stored of each key, byte for byte."""
        if self.online["type"].endswith("SqliteOnlineStore"):
            return _snapshot_of_sqlite(self.home / "data" / "online.db")
        return _snapshot_of_valkey(self.online["connection_string"])


@pytest.fixture(params=["sqlite", "valkey"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    online = sqlite_online()
    if request.param == "valkey":
        online = redis_online(request.getfixturevalue("valkey"), next(request.getfixturevalue("valkey_databases")))
    applied(tmp_path, online)
    made = Stores(tmp_path, online)
    yield made
    if request.param == "valkey":  # the server is shared
        _client(online["connection_string"]).flushdb()


@dataclass
class Measured:
    """Does work on the stores in another process, and notes how long it took and its greatest memory."""

    stores: Stores
    pool: ProcessPoolExecutor
    figures: list[str] = field(default_factory=list)

    def __call__(self, what: str, work: Callable[[Stores, Any], Result], argument: object) -> Result:
        result, seconds, mebibytes = self.pool.submit(_measured, work, self.stores, argument).result()
        self.figures.append(f"  {what:28} {seconds:7.1f} s  {mebibytes:6.0f} MiB")
        return result


@pytest.fixture
def measured(stores: Stores) -> Iterator[Measured]:
    with ProcessPoolExecutor(1, SPAWN, max_tasks_per_child=1 if KEYS >= 100_000 else None) as pool:
        yield Measured(stores, pool)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_known_differences_are_found_and_mended_and_nothing_else(
    stores: Stores, measured: Measured, request: pytest.FixtureRequest
) -> None:
    fill(stores)
    broken = damage(stores)
    before = stores.snapshot()

    found: Audit = measured("full audit", _audit, None)
    assert (found.keys, found.counts) == (
        KEYS + FAULTS,
        {Kind.EQUAL: KEYS - 3 * FAULTS, **dict.fromkeys(WRONG, FAULTS)},
    )
    assert keys_found(found) == broken

    for seed, share in enumerate((0.5, 0.1, 0.01)):
        sample = Sample(share, seed)
        part: Audit = measured(f"audit of a sample, {share:g}", _audit, sample)
        expected = {kind: chosen(stores, sample, keys) for kind, keys in broken.items()}
        assert keys_found(part) == {kind: keys for kind, keys in expected.items() if keys}
        assert part.counts[Kind.EQUAL] == len(
            chosen(stores, sample, set(range(KEYS)) - set().union(*(broken[kind] for kind in WRONG[:3])))
        )
    assert stores.snapshot() == before

    written: dict[int, tuple[int, float]]
    with streaming(stores) as written:
        mended: Repair = measured("repair, beside a stream", _repair, False)
    streamed = set(written)
    assert streamed
    for kind in WRONG[:3]:
        assert len(broken[kind] - streamed) <= mended.mended[kind] <= FAULTS
    after = stores.snapshot()
    changed = changed_keys(stores, before, after)
    assert changed - streamed == set().union(*(broken[kind] for kind in WRONG[:3])) - streamed
    again: Audit = measured("full audit after it", _audit, None)
    assert keys_found(again) == {Kind.EXTRA: broken[Kind.EXTRA]}
    assert again.counts[Kind.EQUAL] == KEYS
    assert newest_values(stores, streamed) == written

    measured("repair --backwards", _repair, True)
    last = stores.snapshot()
    assert changed_keys(stores, after, last) == broken[Kind.EXTRA]
    assert _audit(stores, None).counts == {Kind.EQUAL: KEYS}
    name = "SQLite" if "Sqlite" in stores.online["type"] else "Valkey"
    tables(request.config).append("\n".join([f"{name}, {KEYS:,} keys, {4 * FAULTS} of them wrong", *measured.figures]))


def fill(stores: Stores) -> None:
    """Three rows of some keys, two or one of others, by two days and a stream; and the newest of each online."""
    store, contract = stores.open()
    keys = np.arange(KEYS)
    replace_day(contract, date(2026, 1, 1), table_of(contract, keys, 10))
    replace_day(contract, date(2026, 1, 2), table_of(contract, keys[::2], 20))
    append(contract, keys[::3], 30)
    materialize_arrived(store, contract)


def damage(stores: Stores) -> dict[Kind, set[int]]:
    """Of each 10,000 keys make one wrong, remove one, put an older row in place of one; and add one."""
    store, contract = stores.open()
    chance = random.Random(KEYS)
    broken: dict[Kind, set[int]] = defaultdict(set)
    size = min(KEYS, KEYS_A_FAULT)
    for block in range(FAULTS):
        wrong, missing, stale = chance.sample(range(block * size // 6, (block + 1) * size // 6), 3)
        broken[Kind.DIFFERENT].add(6 * wrong)
        broken[Kind.MISSING].add(6 * missing)
        broken[Kind.STALE].add(6 * stale)  # each sixth key has all three rows
        broken[Kind.EXTRA].add(KEYS + chance.randrange(10**12))
    force(store, contract, broken[Kind.DIFFERENT], lambda rows, seen: replace(rows, order=seen))
    force(store, contract, broken[Kind.MISSING], None)
    force(store, contract, broken[Kind.STALE], lambda rows, _: rows)
    write_online(store, contract, table_of(contract, np.array(sorted(broken[Kind.EXTRA])), 5))
    return dict(broken)


def force(
    store: FeatureStore,
    contract: ViewContract,
    keys: set[int],
    change: Callable[[EncodedRows, list[bytes]], EncodedRows] | None,
) -> None:
    """Put the row of the first day, or something made of it, in the place of what is online."""
    target: NewestWinsStore = online_store(store)
    rows = encode(contract, table_of(contract, np.array(sorted(keys)), 10))
    seen = target.read_stored(store.config, contract.feature_view, rows.keys)
    orders = [order for order in seen.order if order is not None]
    assert len(orders) == len(keys)
    new = None if change is None else change(rows, orders)
    assert all(target.replace_exact(store.config, contract.feature_view, seen, new))


def table_of(contract: ViewContract, keys: np.ndarray[Any, Any], at: int) -> pa.Table:
    """A row of each key; what it says is told by key and time."""
    times = pa.array(np.full(len(keys), EPOCH_US + at)).cast(pa.timestamp("us", "UTC"))
    columns = {"id": pa.array(keys), "value": pa.array(keys * 1000.0 + at), "count": pa.array(keys + at)}
    return pa.table({**columns, "at": times, "made": times}).select(contract.schema.names).cast(contract.schema)


def append(contract: ViewContract, keys: np.ndarray[Any, Any], at: int) -> None:
    ledger = StreamLedger(contract, "stats", 0)
    first = ledger.end().end
    offsets = np.arange(first, first + len(keys), dtype=np.int64)
    ledger.append(0, first, first + len(keys), table_of(contract, keys, at), accepted=offsets)


@contextmanager
def streaming(stores: Stores) -> Iterator[dict[int, tuple[int, float]]]:
    """Another process writes newer values of some keys, as the worker does: online first, then the append.

    The dictionary has the count and value that each was given last, once the block has ended.
    """
    end, begun = SPAWN.Event(), SPAWN.Event()
    written: dict[int, tuple[int, float]] = {}
    with ProcessPoolExecutor(1, SPAWN, initializer=_share, initargs=(end, begun)) as pool:
        going = pool.submit(_stream, stores)
        begun.wait(60)
        yield written
        end.set()
        written.update(going.result())


def _share(end: Event, begun: Event) -> None:
    globals().update(_end=end, _begun=begun)


def _stream(stores: Stores) -> dict[int, tuple[int, float]]:
    store, contract = stores.open()
    end, begun = globals()["_end"], globals()["_begun"]
    ledger, chance = StreamLedger(contract, "stats", 0), random.Random(1)
    written: dict[int, tuple[int, float]] = {}
    at = 1000
    while not end.is_set() or at < 1003:
        at += 1
        some = chance.sample(range(0, KEYS, KEYS_OF_THE_STREAM), min(200, KEYS // KEYS_OF_THE_STREAM))
        keys = np.array(sorted(some))
        first = ledger.end().end
        offsets = np.arange(first, first + len(keys), dtype=np.int64)
        table = table_of(contract, keys, at)
        write_online(store, contract, table, tails=stream_tails(Origin(0, 0, offsets)))
        ledger.append(0, first, first + len(keys), table, accepted=offsets)
        written.update({key: (key + at, key * 1000.0 + at) for key in some})
        begun.set()
    return written


def _measured(work: Callable[[Stores, Any], Result], stores: Stores, argument: object) -> tuple[Result, float, float]:
    stores.open()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is of this work, not of what was before
    begun = time.monotonic()
    result = work(stores, argument)
    seconds = time.monotonic() - begun
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return result, seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _audit(stores: Stores, sample: Sample | None) -> Audit:
    return audit(*stores.open(), sample=sample, examples=FAULTS)


def _repair(stores: Stores, backwards: bool) -> Repair:
    return repair(*stores.open(), backwards=backwards)


def keys_found(found: Audit) -> dict[Kind, set[int]]:
    return {kind: {example.key["id"] for example in shown} for kind, shown in found.examples.items() if shown}


def chosen(stores: Stores, sample: Sample, keys: set[int]) -> set[int]:
    """Those of the keys that are in a sample."""
    _, contract = stores.open()
    with duckdb.connect() as con:
        con.register("keys", pa.table({"id": pa.array(sorted(keys), pa.int64())}))
        return {key for (key,) in con.sql(f"FROM keys WHERE {sample.condition(contract, ['id'])}").fetchall()}


def changed_keys(stores: Stores, before: Snapshot, after: Snapshot) -> set[int]:
    """The keys of which something else is stored now."""
    hashes = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    return {int.from_bytes(key[key.index(b"id") + 10 :][:8], "little", signed=True) for key in hashes}


def newest_values(stores: Stores, keys: set[int]) -> dict[int, tuple[int, float]]:
    store, _ = stores.open()
    asked = sorted(keys)
    answer = store.get_online_features(
        features=["stats:value", "stats:count"], entity_rows=[{"id": key} for key in asked]
    ).to_dict()
    return dict(zip(asked, zip(answer["count"], answer["value"], strict=True), strict=True))


def _snapshot_of_sqlite(path: Path) -> Snapshot:
    digests: dict[bytes, Any] = defaultdict(hashlib.blake2b)
    with sqlite3.connect(path) as connection:
        for table in ("test_stats", "test_stats__headrace"):
            for key, *row in connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2"):
                digests[key].update(repr(row).encode())
    connection.close()
    return {key: digest.digest()[:16] for key, digest in digests.items()}


def _snapshot_of_valkey(connection_string: str) -> Snapshot:
    client = _client(connection_string)
    found: Snapshot = {}
    keys: list[bytes] = [key for key in client.scan_iter(count=5000) if not key.startswith(b"headrace:")]
    for start in range(0, len(keys), 5000):
        chunk = keys[start : start + 5000]
        pipeline = client.pipeline(transaction=False)
        for key in chunk:
            pipeline.hgetall(key)
        for key, fields in zip(chunk, pipeline.execute(), strict=True):
            found[key] = hashlib.blake2b(repr(sorted(fields.items())).encode()).digest()[:16]
    return found


def _client(connection_string: str) -> Any:
    address, _, database = connection_string.partition(",db=")
    host, port = address.split(":")
    return redis.Redis(host, int(port), int(database))
