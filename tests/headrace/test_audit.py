"""Audit and repair: every key against the newest offline, value by value, and just the wrong ones mended."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import redis
from feast import FeatureStore, FeatureView
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headrace import faults, scan
from headrace.audit import Audit, Kind, audit
from headrace.chains import StreamLedger, push, replace_day
from headrace.contract import ViewContract
from headrace.encode import Origin, encode, stream_tails
from headrace.errors import ConfigError
from headrace.materialize import materialize_arrived
from headrace.online import NewestWinsStore, online_store, write_online
from headrace.repair import repair, withdraw
from tests.headrace.test_online import clear, served
from tests.headrace.views import applied, examples, redis_online, rows, sqlite_online, view

TOPIC = "stats"


@pytest.fixture(params=["sqlite", "valkey"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FeatureStore, ViewContract]:
    online = sqlite_online()
    if request.param == "valkey":
        databases: Iterator[int] = request.getfixturevalue("valkey_databases")
        online = redis_online(request.getfixturevalue("valkey"), next(databases))
    store, (contract,) = applied(tmp_path, online)
    return store, contract


def row(key: int, at: int, value: float, count: int = 0) -> dict[str, Any]:
    return {"id": key, "at": at, "made": at, "value": value, "count": count}


def stream(store: FeatureStore, contract: ViewContract, events: list[dict[str, Any]], *, online: bool = True) -> None:
    """What the worker does: online first, then the append."""
    ledger = StreamLedger(contract, TOPIC, 0)
    first = ledger.end().end
    offsets = np.arange(first, first + len(events), dtype=np.int64)
    table = rows(contract, events)
    if online:
        write_online(store, contract, table, tails=stream_tails(Origin(0, 0, offsets)))
    ledger.append(0, first, first + len(events), table, accepted=offsets)


def write(store: FeatureStore, contract: ViewContract, event: dict[str, Any], offset: int | None = None) -> None:
    tails = None if offset is None else stream_tails(Origin(0, 0, np.array([offset], dtype=np.int64)))
    write_online(store, contract, rows(contract, [event]), tails=tails)


def faults_of(result: Audit) -> dict[Kind, int]:
    return {kind: count for kind, count in result.counts.items() if kind is not Kind.EQUAL}


def test_each_kind_is_told_from_the_others(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    stream(store, contract, [row(key, 10, 1.0) for key in range(1, 7)])
    assert audit(store, contract).counts == {Kind.EQUAL: 6}
    target: NewestWinsStore = online_store(store)
    view = contract.feature_view

    def force(key: int, new: dict[str, Any] | None) -> None:
        (encoded,) = [encode(contract, rows(contract, [row(key, 10, 1.0)]))]
        seen = target.read_stored(store.config, view, encoded.keys)
        put = None if new is None else encode(contract, rows(contract, [new]))
        assert target.replace_exact(store.config, view, seen, put) == [True]

    force(1, None)  # lost
    force(2, row(2, 5, 5.0))  # older
    force(3, row(3, 20, 9.0))  # newer than anything offline, of no stream
    write(store, contract, row(4, 30, 2.0), offset=6)  # the stream's next
    write(store, contract, row(77, 1, 2.0), offset=7)  # the same, of a key that is new
    write(store, contract, row(88, 1, 2.0))  # of nowhere
    result = audit(store, contract)
    assert faults_of(result) == {
        Kind.MISSING: 1, Kind.STALE: 1, Kind.AHEAD: 1, Kind.IN_FLIGHT: 2, Kind.EXTRA: 1,
    }  # fmt: skip
    assert (result.keys, result.diverged) == (8, 4)
    (stale,) = result.examples[Kind.STALE]
    assert stale.key == {"id": 2}
    assert (stale.offline, stale.online) == ({"value": 1.0, "count": 0}, {"value": 5.0, "count": 0})

    done = repair(store, contract)
    assert done.mended == {Kind.MISSING: 1, Kind.STALE: 1}
    assert faults_of(audit(store, contract)) == {Kind.AHEAD: 1, Kind.IN_FLIGHT: 2, Kind.EXTRA: 1}
    done = repair(store, contract, backwards=True)
    assert done.mended == {Kind.AHEAD: 1, Kind.EXTRA: 1}
    assert faults_of(audit(store, contract)) == {Kind.IN_FLIGHT: 2}
    keys = [{"id": key} for key in (1, 2, 3, 4, 77, 88)]
    assert [answer["value"] for answer in served(store, contract, keys)] == [1.0, 1.0, 1.0, 2.0, 2.0, None]


def test_what_no_materialize_applied_yet_is_pending(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    replace_day(contract, date(2026, 1, 1), rows(contract, [row(1, 10, 1.0), row(2, 10, 1.0)]))
    assert faults_of(audit(store, contract)) == {Kind.PENDING: 2}
    assert repair(store, contract).mended == {}  # but it materializes
    assert faults_of(audit(store, contract)) == {}
    replace_day(contract, date(2026, 1, 2), rows(contract, [row(1, 20, 2.0)]))
    push(contract, rows(contract, [row(3, 20, 2.0)]))
    assert faults_of(audit(store, contract)) == {Kind.PENDING: 2}
    materialize_arrived(store, contract)
    assert audit(store, contract).counts == {Kind.EQUAL: 3}

    # What another push waits for explains nothing of what an earlier one brought.
    push(contract, rows(contract, [row(4, 20, 2.0)]))
    stored = encode(contract, rows(contract, [row(3, 20, 2.0)]))
    target: NewestWinsStore = online_store(store)
    seen = target.read_stored(store.config, contract.feature_view, stored.keys)
    assert target.replace_exact(store.config, contract.feature_view, seen, None) == [True]
    assert faults_of(audit(store, contract)) == {Kind.PENDING: 1, Kind.MISSING: 1}
    assert repair(store, contract).mended == {Kind.MISSING: 1}
    assert audit(store, contract).counts == {Kind.EQUAL: 4}


def test_a_value_changed_in_place_is_different_and_mended(
    tmp_path: Path, valkey: str, valkey_databases: Iterator[int]
) -> None:
    database = next(valkey_databases)
    store, (contract,) = applied(tmp_path, redis_online(valkey, database))
    stream(store, contract, [row(1, 10, 1.0), row(2, 10, 1.0)])
    host, port = valkey.split(":")
    client = redis.Redis(host, int(port), database)
    key = next(k for k in cast("list[bytes]", client.keys("*test")) if b"\x02\0\0\0\0\0\0\0" in k)
    fields = cast("dict[bytes, bytes]", client.hgetall(key))
    client.hset(key, next(f for f, v in fields.items() if len(f) == 4 and v[:1] == b"\x29"), b"\x29" + b"\0" * 8)
    result = audit(store, contract)
    assert faults_of(result) == {Kind.DIFFERENT: 1}
    assert repair(store, contract).mended == {Kind.DIFFERENT: 1}
    assert audit(store, contract).counts == {Kind.EQUAL: 2}


def test_expired_keys_are_no_fault(tmp_path: Path, valkey: str, valkey_databases: Iterator[int]) -> None:
    online = {**redis_online(valkey, next(valkey_databases)), "key_ttl_seconds": 3600}
    store, (contract,) = applied(tmp_path, online)
    stream(store, contract, [row(1, 10, 1.0)], online=False)  # years ago
    assert faults_of(audit(store, contract)) == {Kind.EXPIRED: 1}
    assert repair(store, contract).mended == {}


def test_a_store_without_orders_is_refused(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, {"type": "sqlite", "path": "data/online.db"})
    with pytest.raises(ConfigError, match="HeadraceSqliteOnlineStore"):
        audit(store, contract)


def test_a_wrong_newer_value_taken_back_gives_way_to_what_it_turned_away(
    place: tuple[FeatureStore, ViewContract],
) -> None:
    """The stream goes on between each two steps of the repair, and the newest is online in the end."""
    store, contract = place
    stream(store, contract, [row(1, 10, 1.0), row(2, 10, 1.0)])
    write(store, contract, row(1, 1000, 666.0))
    materialize_arrived(store, contract)
    clock = iter(range(11, 100))

    def more(step: str) -> None:
        if not step.startswith(("repair", "materialize")):
            return
        at = next(clock)
        stream(store, contract, [row(1, at, float(at))])
        write(store, contract, row(2, at, 1.0 + at), offset=10_000 + at)  # and is not appended yet

    faults.hook = more
    try:
        done = repair(store, contract, backwards=True)
    finally:
        faults.hook = None
    assert done.mended[Kind.AHEAD] == 1
    last = next(clock) - 1
    assert served(store, contract, [{"id": 1}])[0]["value"] == float(last)
    assert set(faults_of(audit(store, contract))) <= {Kind.IN_FLIGHT}


def test_rows_that_a_day_no_longer_has_leave_the_online_store(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    day = date(2026, 1, 1)
    before = rows(contract, [row(1, 10, 1.0), row(1, 20, 2.0), row(2, 10, 1.0), row(3, 10, 1.0)])
    replace_day(contract, day, before)
    materialize_arrived(store, contract)
    stream(store, contract, [row(3, 30, 3.0)])
    replace_day(contract, day, rows(contract, [row(1, 10, 1.0)]))
    taken = withdraw(store, contract, rows(contract, [row(1, 20, 2.0), row(2, 10, 1.0), row(3, 10, 1.0)]))
    assert taken == {Kind.AHEAD: 1, Kind.EXTRA: 1}
    values = [answer["value"] for answer in served(store, contract, [{"id": key} for key in (1, 2, 3)])]
    assert values == [1.0, None, 3.0]
    assert withdraw(store, contract, rows(contract, [row(1, 20, 2.0)])) == Counter()
    assert faults_of(audit(store, contract)) == {}


@pytest.mark.parametrize("work", [audit, repair])
def test_a_day_that_is_replaced_meanwhile_starts_it_over(
    place: tuple[FeatureStore, ViewContract], monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any]
) -> None:
    store, contract = place
    monkeypatch.setattr(scan, "ROWS_A_CHUNK", 1)
    days = [date(2026, 1, number) for number in range(1, 13)]
    for key, day in enumerate(days):
        replace_day(contract, day, rows(contract, [row(key, 10, 1.0)]))
    materialize_arrived(store, contract)
    for key, day in enumerate(days):
        replace_day(contract, day, rows(contract, [row(key, 10, 1.0), row(100 + key, 10, 1.0)]))  # all is pending
    turns = iter([True])

    def replace_all(done: int, keys: int) -> None:
        del done, keys
        if next(turns, False):
            for key, day in enumerate(days):
                replace_day(contract, day, rows(contract, [row(key, 10, 1.0), row(200 + key, 10, 1.0)]))

    found = work(store, contract, progress=replace_all)
    result = found if work is audit else found.audit
    assert result.counts == {Kind.EQUAL: 12, Kind.PENDING: 12}


def test_a_view_without_an_entity(tmp_path: Path) -> None:
    whole = view()[1]
    alone = FeatureView(name="stats", entities=[], ttl=timedelta(0), schema=whole.features, source=whole.stream_source)
    store, (contract,) = applied(tmp_path, sqlite_online(), ([], alone))
    day = date(2026, 1, 1)
    first, second = ({"at": at, "made": at, "value": float(at), "count": at} for at in (1, 2))
    replace_day(contract, day, rows(contract, [first, second]))
    assert faults_of(audit(store, contract)) == {Kind.PENDING: 1}
    materialize_arrived(store, contract)
    assert audit(store, contract).counts == {Kind.EQUAL: 1}
    replace_day(contract, day, rows(contract, [first]))
    assert withdraw(store, contract, rows(contract, [second])) == {Kind.AHEAD: 1, Kind.EXTRA: 0}
    assert served(store, contract, [{"__dummy_id": ""}]) == [{"value": 1.0, "count": 1}]


ACTIONS = st.lists(st.tuples(st.sampled_from("sswpdxlomr"), st.integers(0, 4), st.integers(0, 6)), max_size=14)


@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=ACTIONS, seed=st.integers(0, 2**16))
@example(actions=[("p", 1, 0), ("m", 0, 0), ("p", 0, 0), ("x", 1, 0)], seed=0)
def test_after_any_history_repair_leaves_the_newest_of_offline(
    place: tuple[FeatureStore, ViewContract], actions: list[tuple[str, int, int]], seed: int
) -> None:
    """Streams, pushes, days, values lost, overwritten or made up online: after a repair backwards both stores agree."""
    store, contract = place
    empty(store, contract)
    chance = random.Random(seed)
    target: NewestWinsStore = online_store(store)
    newest: dict[int, tuple[Any, ...]] = {}
    days: dict[date, list[dict[str, Any]]] = {}
    offline: list[tuple[int, dict[str, Any]]] = []  # 1 of the stream, 0 of another; a day's are in `days`
    for number, (action, key, at) in enumerate(actions):
        event = row(key, at, float(number), number)
        encoded = encode(contract, rows(contract, [event]))
        if action in "sw":  # the stream, with and without an online store that was up
            stream(store, contract, [event], online=action == "s")
            offline.append((1, event))
        elif action == "p":
            push(contract, rows(contract, [event]))
            offline.append((0, event))
        elif action == "d":
            day = date(2026, 1, 1 + chance.randint(0, 1))
            days[day] = [event] if chance.random() < 0.3 else [*days.get(day, []), event]
            replace_day(contract, day, rows(contract, days[day]))
        elif action == "m":
            materialize_arrived(store, contract)
        elif action == "r":
            repair(store, contract)
        elif action == "o":  # somebody writes online alone
            write(store, contract, event)
        else:  # lost, or overwritten
            seen = target.read_stored(store.config, contract.feature_view, encoded.keys)
            target.replace_exact(store.config, contract.feature_view, seen, None if action == "l" else encoded)
    repair(store, contract, backwards=True)
    result = audit(store, contract)
    assert faults_of(result) == {}
    for kind, event in [*offline, *((0, event) for day in days.values() for event in day)]:
        order = (event["at"], event["made"], kind, event["count"] if kind else tail(contract, event))
        if event["id"] not in newest or newest[event["id"]][0] < order:
            newest[event["id"]] = (order, event["value"], event["count"])
    expected = [
        {"value": newest[k][1], "count": newest[k][2]} if k in newest else dict.fromkeys(("value", "count"))
        for k in range(5)
    ]
    assert served(store, contract, [{"id": key} for key in range(5)]) == expected
    assert result.keys == len(newest)


def tail(contract: ViewContract, event: dict[str, Any]) -> bytes:
    return encode(contract, rows(contract, [event])).order[0][17:]


def empty(store: FeatureStore, contract: ViewContract) -> None:
    clear(store, contract)
    for path in contract.directory.glob("*.parquet"):
        path.unlink()
