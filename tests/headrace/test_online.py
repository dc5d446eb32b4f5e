"""Newest wins online: any order, batching and writers give what a brute-force oracle says; stock clients read it."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import redis
from feast import FeatureStore, Field, ValueType
from feast.filter_models import ComparisonFilter
from feast.types import Array, Float64, Int64, String
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.contract import ViewContract
from headrace.encode import Origin, encode, stream_tails
from headrace.online import NewestWinsStore, online_store, server_ids, write_online
from tests.headrace.views import EPOCH_US, applied, config, examples, redis_online, rows, sqlite_online, view
from tests.servers import Valkey

Row = Mapping[str, Any]
Oracle = dict[tuple[Any, ...], tuple[Any, ...]]


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


def served(store: FeatureStore, contract: ViewContract, keys: Sequence[Row]) -> list[dict[str, Any]]:
    refs = [f"{contract.name}:{feature}" for feature in contract.features]
    answer = store.get_online_features(features=refs, entity_rows=[dict(key) for key in keys]).to_dict()
    return [{feature: answer[feature][i] for feature in contract.features} for i in range(len(keys))]


EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.integers(0, 3),
            "at": st.integers(0, 2),
            "made": st.one_of(st.none(), st.integers(0, 1)),
            "value": st.one_of(st.none(), st.integers(0, 3).map(float)),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(events=EVENTS, seed=st.integers(0, 2**16), stream=st.integers(0, 12))
def test_any_order_and_batching_equals_the_oracle(
    store_and_contract: tuple[FeatureStore, ViewContract],
    events: list[dict[str, Any]],
    seed: int,
    stream: int,
) -> None:
    """The first `stream` events come from a partition in offset order, the others by Feast's own interface."""
    store, contract = store_and_contract
    clear(store, contract)
    events = [{**event, "count": number} for number, event in enumerate(events)]
    from_stream, others = events[:stream], events[stream:]
    chance = random.Random(seed)
    writes: list[tuple[bool, list[dict[str, Any]]]] = [(False, batch) for batch in batches(chance, others)]
    writes += [(True, sorted(batch, key=lambda e: int(e["count"]))) for batch in batches(chance, from_stream)]
    chance.shuffle(writes)
    writes += writes[: len(writes) // 2]  # redelivery
    for is_stream, batch in writes:
        table = rows(contract, batch)
        if is_stream:
            offsets = np.array([event["count"] for event in batch], dtype=np.int64)
            write_online(store, contract, table, tails=stream_tails(Origin(0, 0, offsets)))
        elif chance.random() < 0.5:
            write_online(store, contract, table)
        else:
            store._get_provider().ingest_df(contract.feature_view, table.to_pandas())
    keys = sorted({event["id"] for event in events})
    expected = [oracle(contract, key, from_stream, others) for key in keys]
    assert served(store, contract, [{"id": key} for key in keys]) == expected


def batches(chance: random.Random, events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    events = events[:]
    chance.shuffle(events)
    out = []
    while events:
        size = chance.randint(1, len(events))
        out.append(events[:size])
        events = events[size:]
    return out


def oracle(
    contract: ViewContract, key: int, stream: list[dict[str, Any]], others: list[dict[str, Any]]
) -> dict[str, Any]:
    """The greatest by event time, created time, stream before others, offset; else by the hash of the values."""

    def times(event: Row) -> tuple[int, int]:
        return event["at"], -1 if event["made"] is None else event["made"]

    best: tuple[Any, ...] | None = None
    chosen: Row = {}
    for is_stream, events in ((1, stream), (0, others)):
        for event in events:
            if event["id"] != key:
                continue
            tail = encode(contract, rows(contract, [event])).order[0][17:]
            rank = (*times(event), is_stream, event["count"] if is_stream else 0, b"" if is_stream else tail)
            if best is None or rank >= best:
                best, chosen = rank, event
    return {"value": chosen["value"], "count": chosen["count"]}


def clear(store: FeatureStore, contract: ViewContract) -> None:
    target = online_store(store)
    target.update(store.config, [contract.feature_view], [], [], [], True)
    target.update(store.config, [], [contract.feature_view], [], [], True)


@dataclass(frozen=True)
class Race:
    """A store, and processes that write to it: each takes batches from its pipe and answers None, or what failed."""

    store: FeatureStore
    contract: ViewContract
    pipes: list[Connection]

    def run(self, batches_of: Sequence[list[tuple[bool, list[dict[str, Any]]]]]) -> None:
        """Let every process write its batches, all at once."""
        for pipe, batches_of_one in zip(self.pipes, batches_of, strict=True):
            pipe.send(batches_of_one)
        assert [pipe.recv() for pipe in self.pipes] == [None] * len(self.pipes)


WRITERS = 8


@pytest.fixture(scope="module", params=["sqlite", "valkey"])
def racing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Race]:
    home = tmp_path_factory.mktemp("race")
    online = sqlite_online()
    if request.param == "valkey":
        server: Valkey = request.getfixturevalue("valkey_server")
        online = redis_online(server.start().address, next(request.getfixturevalue("valkey_databases")))
    store, (contract,) = applied(home, online)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pairs = [context.Pipe() for _ in range(WRITERS)]
    processes = [context.Process(target=write_batches, args=(home, online, theirs)) for _, theirs in pairs]
    for process in processes:
        process.start()
    yield Race(store, contract, [ours for ours, _ in pairs])
    for (ours, _), process in zip(pairs, processes, strict=True):
        ours.send(None)
        process.join()


def write_batches(home: Path, online: dict[str, Any], pipe: Connection) -> None:
    store = FeatureStore(config=config(home, online))
    contract = ViewContract.from_feast(store.get_feature_view("stats"), store.config)
    while (batches_of_one := pipe.recv()) is not None:
        try:
            for is_stream, batch in batches_of_one:
                write(store, contract, is_stream, batch)
            pipe.send(None)
        except Exception as error:  # noqa: BLE001 - the test shows what it was
            pipe.send(repr(error))


def write(store: FeatureStore, contract: ViewContract, is_stream: bool, batch: list[dict[str, Any]]) -> None:
    offsets = np.array([event["count"] for event in batch], dtype=np.int64)
    tails = stream_tails(Origin(0, 0, offsets)) if is_stream else None
    write_online(store, contract, rows(contract, batch), tails=tails)


@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(events=EVENTS, seed=st.integers(0, 2**32))
def test_eight_racing_processes_equal_the_oracle(racing: Race, events: list[dict[str, Any]], seed: int) -> None:
    """Each event goes to one process or several, from the stream or another way; each example has keys of its own."""
    first_key = next(KEYS_OF_EXAMPLES)
    chance = random.Random(seed)
    events = [{**event, "id": first_key + event["id"], "count": number} for number, event in enumerate(events)]
    cut = chance.randint(0, len(events))
    from_stream, others = events[:cut], events[cut:]
    shares: list[list[tuple[bool, list[dict[str, Any]]]]] = [[] for _ in range(WRITERS)]
    for is_stream, some in ((True, from_stream), (False, others)):
        for share in shares:
            mine = chance.sample(some, chance.randint(0, len(some)))
            share += [(is_stream, batch) for batch in batches(chance, mine)]
        chance.choice(shares).append((is_stream, some))  # none is forgotten
    for share in shares:
        chance.shuffle(share)
    racing.run(
        [[(is_stream, sorted(batch, key=lambda e: int(e["count"]))) for is_stream, batch in s if batch] for s in shares]
    )
    keys = sorted({event["id"] for event in events})
    expected = [oracle(racing.contract, key, from_stream, others) for key in keys]
    assert served(racing.store, racing.contract, [{"id": key} for key in keys]) == expected


KEYS_OF_EXAMPLES = itertools.count(0, 10)


@settings(
    max_examples=examples(10),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_a_repair_under_racing_writers_never_takes_back_what_it_has_not_seen(racing: Race, seed: int) -> None:
    """Each key is set back from what was seen, or a writer came first and its newest row stays."""
    first_key = next(KEYS_OF_EXAMPLES)
    store, contract = racing.store, racing.contract
    target: NewestWinsStore = online_store(store)
    events = [{"id": first_key + n, "at": 5, "made": 0, "value": 5.0, "count": n} for n in range(5)]
    write_online(store, contract, rows(contract, events))
    wanted = encode(contract, rows(contract, [{**event, "at": 1} for event in events]))
    seen = target.read_stored(store.config, contract.feature_view, wanted.keys)
    chance = random.Random(seed)
    for pipe in racing.pipes:
        some = chance.sample(events, 3)
        pipe.send([(False, [{**event, "at": chance.randint(6, 9)}]) for event in some])
    done = target.replace_exact(store.config, contract.feature_view, seen, wanted)
    assert [pipe.recv() for pipe in racing.pipes] == [None] * WRITERS
    after = target.read_stored(store.config, contract.feature_view, wanted.keys)
    for place, is_done in enumerate(done):
        at = cast("int", after.event_us[place]) - EPOCH_US
        assert at >= 6 or (is_done and at == 1)


def test_a_write_says_how_many_were_taken(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    table = rows(contract, [{"id": 1, "at": 5, "value": 1.0}, {"id": 2, "at": 5, "value": 2.0}, {"id": 1, "at": 4}])
    assert write_online(store, contract, table) == 2
    assert write_online(store, contract, table) == 2  # not smaller is written again: harmless
    assert write_online(store, contract, rows(contract, [{"id": 1, "at": 4}, {"id": 3, "at": 0}])) == 1
    assert write_online(store, contract, table[:0]) == 0


def test_wide_rows_of_many_types_and_keys(tmp_path: Path, online: dict[str, Any]) -> None:
    fields = [Field(name=f"f{n}", dtype=Float64) for n in range(150)]
    fields += [Field(name="tags", dtype=Array(String)), Field(name="big", dtype=Int64)]
    shape = view("wide", {"name": ValueType.STRING, "shard": ValueType.INT32}, fields)
    store, (contract,) = applied(tmp_path, online, shape)
    one = {f"f{n}": n / 7 for n in range(150)} | {"tags": ["a", "é"], "big": 2**62 + 1}
    key = {"name": "naïve 鍵", "shard": -3}
    write_online(store, contract, rows(contract, [{**key, **one, "at": 1, "made": 1}]))
    assert served(store, contract, [key]) == [one]


def test_stock_clients_read_it_and_what_they_wrote_counts(tmp_path: Path, online: dict[str, Any]) -> None:
    store, (contract,) = applied(tmp_path, online)
    stock = {
        "headrace.sqlite.HeadraceSqliteOnlineStore": "sqlite",
        "headrace.redis.HeadraceRedisOnlineStore": "redis",
    }[online["type"]]
    other, (same,) = applied(tmp_path, {**online, "type": stock})
    assert not isinstance(online_store(other), NewestWinsStore)
    at = 10_000_000
    write_online(store, contract, rows(contract, [{"id": 1, "at": at, "made": at, "value": 1.0, "count": 1}]))
    assert served(other, same, [{"id": 1}]) == [{"value": 1.0, "count": 1}]

    def frame(us: int, value: float) -> pd.DataFrame:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=EPOCH_US + us)
        return pd.DataFrame([{"id": 1, "value": value, "count": 9, "at": moment, "made": moment}])

    other.write_to_online_store("stats", frame(3 * at, 2.0))  # a stock client, later
    write_online(store, contract, rows(contract, [{"id": 1, "at": 2 * at, "made": at, "value": 3.0, "count": 3}]))
    assert served(store, contract, [{"id": 1}]) == [{"value": 2.0, "count": 9}]
    write_online(store, contract, rows(contract, [{"id": 1, "at": 4 * at, "made": at, "value": 4.0, "count": 4}]))
    assert served(other, same, [{"id": 1}]) == [{"value": 4.0, "count": 4}]


def test_text_search_finds_what_stock_feast_finds(tmp_path: Path) -> None:
    search = {"text_search_enabled": True, "enable_openai_compatible_store": True}
    place = Field(name="place", dtype=Array(Float64), vector_index=True, vector_length=1)  # Feast wants one
    shape = view(features=[Field(name="title", dtype=String), Field(name="size", dtype=Int64), place])
    ours, (contract,) = applied(tmp_path / "ours", {**sqlite_online(), **search}, shape)
    stock, _ = applied(tmp_path / "stock", {**sqlite_online(), "type": "sqlite", **search}, shape)
    texts = ["a red fox", "the red herring", "blue", None]
    same = {"at": 10**6, "made": 10**6, "place": [1.0]}
    events = [{**same, "id": n, "title": text, "size": n} for n, text in enumerate(texts)]
    write_online(ours, contract, rows(contract, [{**event, "at": 1, "title": "red, once"} for event in events]))
    write_online(ours, contract, rows(contract, events))
    stock.write_to_online_store("stats", rows(contract, events).to_pandas())
    found = [
        store.retrieve_online_documents_v2(
            features=["stats:title", "stats:size"], query_string="red", top_k=9, filters=filters
        ).to_dict()
        for store in (ours, stock)
        for filters in (None, ComparisonFilter(type="gte", key="size", value=1))
    ]
    assert sorted(found[0]["title"]) == ["a red fox", "the red herring"]
    assert found[:2] == found[2:]


def test_feasts_own_write_is_newest_wins_too(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract

    def frame(*events: tuple[int, float]) -> pd.DataFrame:
        table = rows(contract, [{"id": 7, "at": at, "made": at, "value": v, "count": 1} for at, v in events])
        made: pd.DataFrame = table.to_pandas()
        return made

    store.write_to_online_store("stats", frame((3, 3.0), (9, 9.0), (5, 5.0)))
    store.write_to_online_store("stats", frame((8, 8.0)))
    assert served(store, contract, [{"id": 7}])[0]["value"] == 9.0


def test_deleting_a_view_takes_its_own_and_nothing_else(tmp_path: Path, online: dict[str, Any]) -> None:
    store, (one, two) = applied(tmp_path, online, view("one"), view("two"))
    for contract in (one, two):
        write_online(store, contract, rows(contract, [{"id": 1, "at": 9, "value": 1.0, "count": 1}]))
        assert online_store(store).swap_mark(store.config, contract.feature_view, None, {"version": 1})
    target = online_store(store)
    target.update(store.config, [one.feature_view], [two.feature_view], [], [], True)
    target.update(store.config, [], [one.feature_view, two.feature_view], [], [], True)
    assert served(store, one, [{"id": 1}]) == [{"value": None, "count": None}]
    assert served(store, two, [{"id": 1}]) == [{"value": 1.0, "count": 1}]
    assert target.read_mark(store.config, one.feature_view) is None
    assert target.read_mark(store.config, two.feature_view) == {"version": 1}
    assert write_online(store, one, rows(one, [{"id": 1, "at": 1, "value": 2.0, "count": 2}])) == 1
    target.teardown(store.config, [one.feature_view, two.feature_view], [])


def test_a_mark_changes_only_by_compare_and_set(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    target, feature_view = online_store(store), contract.feature_view
    assert target.swap_mark(store.config, feature_view, None, {"version": 1})
    assert not target.swap_mark(store.config, feature_view, None, {"version": 2})
    assert not target.swap_mark(store.config, feature_view, {"version": 9}, {"version": 2})
    assert target.swap_mark(store.config, feature_view, {"version": 1}, {"version": 2})
    assert target.read_mark(store.config, feature_view) == {"version": 2}


def test_the_server_has_an_id(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, _ = store_and_contract
    assert server_ids(store) == server_ids(store) != ()


def test_the_script_survives_a_flush_and_keys_live_as_told(
    tmp_path: Path, valkey: str, valkey_databases: Iterator[int]
) -> None:
    database = next(valkey_databases)
    store, (contract,) = applied(tmp_path, {**redis_online(valkey, database), "key_ttl_seconds": 50})
    table = rows(contract, [{"id": 1, "at": 1, "value": 1.0, "count": 1}])
    write_online(store, contract, table)
    host, port = valkey.split(":")
    client = redis.Redis(host, int(port), database)
    client.script_flush()
    assert write_online(store, contract, table) == 1
    (key,) = cast("list[bytes]", client.keys("*test"))
    assert 0 < cast("int", client.ttl(key)) <= 50


def test_a_store_of_another_kind_gets_the_newest_of_each_batch(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, {"type": "sqlite", "path": "data/online.db"})
    table = rows(contract, [{"id": 1, "at": 9, "value": 9.0, "count": 9}, {"id": 1, "at": 4, "value": 4.0, "count": 4}])
    assert write_online(store, contract, table) == 1
    assert server_ids(store) == ()
    assert served(store, contract, [{"id": 1}]) == [{"value": 9.0, "count": 9}]


def test_sqlite_writes_after_a_write_that_failed(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online())
    good = encode(contract, rows(contract, [{"id": 1, "at": 0, "value": 1.0}]))
    target = cast("NewestWinsStore", online_store(store))
    bad = replace(good, order=[object()])  # type: ignore[list-item]
    with pytest.raises(sqlite3.Error):
        target.write_newest(store.config, contract.feature_view, bad)
    assert target.write_newest(store.config, contract.feature_view, good) == 1


def test_sqlite_writes_after_another_process_made_the_view_anew(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online())
    table = rows(contract, [{"id": 1, "at": 0, "value": 1.0}])
    assert write_online(store, contract, table) == 1
    other = FeatureStore(config=config(tmp_path))
    online_store(other).teardown(other.config, [contract.feature_view], [])
    online_store(other).update(other.config, [], [contract.feature_view], [], [], partial=False)
    assert write_online(store, contract, table) == 1


def test_sqlite_waits_for_another_writer(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path)
    table = rows(contract, [{"id": 1, "at": 1, "value": 1.0, "count": 1}])
    write_online(store, contract, table)
    connection = sqlite3.connect(tmp_path / "data/online.db", isolation_level=None)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.execute("BEGIN IMMEDIATE")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_one, args=(str(tmp_path),))
    process.start()
    process.join(timeout=6)
    assert process.is_alive()  # it waits
    connection.execute("COMMIT")
    process.join(timeout=60)
    assert process.exitcode == 0
    assert served(store, contract, [{"id": 1}]) == [{"value": 2.0, "count": 2}]


def write_one(home: str) -> None:
    store, (contract,) = applied(Path(home))
    write_online(store, contract, rows(contract, [{"id": 1, "at": 2, "value": 2.0, "count": 2}]))


def test_stream_rows_keep_their_place(store_and_contract: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = store_and_contract
    tied = [{"id": 1, "at": 1, "made": 1, "value": float(n), "count": n} for n in range(3)]
    encoded = encode(contract, rows(contract, tied), stream_tails(Origin(0, 0, np.array([5, 6, 7], dtype=np.int64))))
    assert len(encoded) == 1
    write_online(
        store, contract, rows(contract, tied), tails=stream_tails(Origin(0, 0, np.array([5, 6, 7], dtype=np.int64)))
    )
    write_online(
        store, contract, rows(contract, tied[:1]), tails=stream_tails(Origin(0, 0, np.array([5], dtype=np.int64)))
    )
    assert served(store, contract, [{"id": 1}]) == [{"value": 2.0, "count": 2}]
