"""`kill -9` at every numbered step of what changes the online store: materialize, repair, withdraw."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from feast import FeatureStore

from headrace import audit as auditing
from headrace import scan, sqlite
from headrace.chains import StreamLedger, push, replace_day
from headrace.contract import ViewContract
from headrace.encode import Origin, encode, stream_tails
from headrace.materialize import materialize_arrived
from headrace.online import NewestWinsStore, online_store, write_online
from headrace.repair import repair, withdraw
from tests.headrace.crashes import Scenario, explore, forked, in_clean_process, show
from tests.headrace.views import config, redis_online, rows, sqlite_online, view
from tests.servers import Valkey

DAY = date(2026, 1, 31)
KEYS = (*range(10), 50, 51)
VALKEY_PORT = "HEADRACE_TEST_CRASH_PORT"
"""Where the online store of all folders is, a database each; without it each has a SQLite file of its own."""


def opened(home: Path) -> tuple[FeatureStore, ViewContract]:
    """The store in a folder; chunks of three keys, so that there are steps between them."""
    scan.ROWS_A_CHUNK = sqlite._ROWS_A_WRITE = 3
    auditing.KEYS_A_READ = 3
    online = redis_online(f"127.0.0.1:{port}", database(home)) if (port := valkey_port()) else sqlite_online()
    store = FeatureStore(config=config(home, online))
    contract = ViewContract.from_feast(view()[1], store.config)
    online_store(store).update(store.config, [], [contract.feature_view], [], [], partial=True)
    return store, contract


def event(key: int, at: int) -> dict[str, Any]:
    return {"id": key, "at": at, "made": at, "value": float(at), "count": key}


def arrived(home: Path) -> None:
    """Days and pushes that no Materialize has seen; some keys have an older row online."""
    store, contract = opened(home)
    write_online(store, contract, rows(contract, [event(key, 1) for key in range(0, 10, 3)]))
    replace_day(contract, DAY, rows(contract, [event(key, 10 + key) for key in range(8)]))
    push(contract, rows(contract, [event(key, 20) for key in range(6, 10)]))


def diverged(home: Path) -> None:
    """A stream of ten keys, of which some are lost online, older, newer than anything, or of nowhere."""
    store, contract = opened(home)
    table, offsets = rows(contract, [event(key, 10) for key in range(10)]), np.arange(10, dtype=np.int64)
    write_online(store, contract, table, tails=stream_tails(Origin(0, 0, offsets)))
    StreamLedger(contract, "stats", 0).append(0, 0, 10, table, accepted=offsets)
    target: NewestWinsStore = online_store(store)
    for key, new in ((1, None), (2, event(2, 5)), (4, None), (5, event(5, 3)), (7, event(7, 99)), (8, event(8, 77))):
        seen = target.read_stored(store.config, contract.feature_view, encode(contract, table.slice(key, 1)).keys)
        put = None if new is None else encode(contract, rows(contract, [new]))
        assert target.replace_exact(store.config, contract.feature_view, seen, put) == [True]
    write_online(store, contract, rows(contract, [event(key, 1) for key in (50, 51)]))


def withdrawn(home: Path) -> None:
    """A day was materialized, and then corrected to fewer rows."""
    store, contract = opened(home)
    replace_day(contract, DAY, rows(contract, [event(key, at) for key in range(6) for at in (1, 9)]))
    materialize_arrived(store, contract)
    replace_day(contract, DAY, rows(contract, [event(key, 1) for key in range(4)]))
    materialize_arrived(store, contract)


def withdraw_again(home: Path) -> None:
    store, contract = opened(home)
    gone = [event(key, 9) for key in range(6)] + [event(key, 1) for key in (4, 5)]
    withdraw(store, contract, rows(contract, gone))


def stored(home: Path) -> dict[str, Any]:
    """By key what is online, and its order, as the store has it."""
    found: dict[str, Any] = {f"key {key}": None for key in KEYS}
    for key, order, feature, value in cells_of_valkey(home) if valkey_port() else cells_of_sqlite(home):
        unit = f"key {int.from_bytes(key[-8:], 'little')}"
        found[unit] = {**(found[unit] or {"order": order}), feature: value}
    return found


def cells_of_sqlite(home: Path) -> Iterator[tuple[bytes, bytes, str, bytes]]:
    with closing(sqlite3.connect(home / "data/online.db")) as connection:
        orders = dict(connection.execute("SELECT entity_key, ord FROM test_stats__headrace"))
        for key, feature, value in connection.execute("SELECT entity_key, feature_name, value FROM test_stats"):
            yield key, orders[key], feature, value


def cells_of_valkey(home: Path) -> Iterator[tuple[bytes, bytes, str, bytes]]:
    with redis.Redis(port=valkey_port(), db=database(home)) as client:
        for key in client.scan_iter("*id*"):
            cells = client.hgetall(key)
            for field, value in cells.items():
                yield key.removesuffix(b"test"), cells[b"_hr:stats"], field.hex(), value


def valkey_port() -> int:
    return int(os.environ.get(VALKEY_PORT, "0"))


def database(home: Path) -> int:
    """The number of a folder's database; the copy of a folder gets a copy."""
    note = home / "database.json"
    known = json.loads(note.read_text()) if note.exists() else {"number": 0}
    if known.get("home") != str(home):
        with redis.Redis(port=valkey_port()) as counter, redis.Redis(port=valkey_port(), db=known["number"]) as source:
            number = counter.incr("databases")
            for key in source.scan_iter() if known["number"] else ():
                source.copy(key, key, destination_db=number)
        known = {"home": str(home), "number": number}
        note.write_text(json.dumps(known))
    return int(known["number"])


def apart(work: Callable[[Path], None]) -> Callable[[Path], None]:
    """Work in a process of its own: this one must hold no threads when it forks."""

    def work_apart(home: Path) -> None:
        assert os.waitpid(forked(lambda: work(home)), 0)[1] == 0

    return work_apart


materialize_scenario = Scenario(apart(arrived), lambda home: void(materialize_arrived(*opened(home))), stored)
repair_scenario = Scenario(apart(diverged), lambda home: void(repair(*opened(home), backwards=True)), stored)
withdraw_scenario = Scenario(apart(withdrawn), withdraw_again, stored)

SCENARIOS = {"materialize_scenario": 2, "repair_scenario": 5, "withdraw_scenario": 3}


def void(_: object) -> None:
    """Nothing: scenarios return none."""


def every(home: str) -> dict[str, Any]:
    return {name: asdict(explore(globals()[name], Path(home) / name)) for name in SCENARIOS}


@pytest.fixture(scope="module", params=["sqlite", "valkey"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with Valkey(("--databases", "1000")) as server, pytest.MonkeyPatch.context() as environment:
        if request.param == "valkey":
            environment.setenv(VALKEY_PORT, str(server.port))
        found = in_clean_process(f"{__name__}:every", tmp_path_factory.mktemp("crashes"))
    yield found
    show(request.config, {f"{name}, {request.param}": one for name, one in found.items()})


@pytest.mark.parametrize("name", SCENARIOS)
def test_kill_minus_nine_at_every_step(name: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[name]["losses"] == []
    assert len(outcomes[name]["points"]) >= SCENARIOS[name], outcomes[name]["points"]
