"""Materialize: by what arrived and by event time, whole, resumable, and never a word of what was not written."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, ValueType
from feast.types import Float64, Int64, String

from headrace.chains import StreamLedger, push, replace_day
from headrace.contract import ViewContract
from headrace.materialize import holdings, materialize_arrived, pending, set_back
from headrace.online import online_store
from tests.headrace.test_online import served
from tests.headrace.views import EPOCH_US, applied, config, redis_online, rows, sqlite_online, view
from tests.servers import environment
from tests.terminal import at_terminal

ENGINE = {"type": "headrace.engine.HeadraceEngine"}


@pytest.fixture(params=["sqlite", "valkey", "stock"])
def online(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "stock":
        return {"type": "sqlite", "path": "data/stock.db"}
    if request.param == "sqlite":
        return sqlite_online()
    databases: Iterator[int] = request.getfixturevalue("valkey_databases")
    return redis_online(request.getfixturevalue("valkey"), next(databases))


@pytest.fixture
def place(tmp_path: Path, online: dict[str, Any]) -> tuple[FeatureStore, ViewContract]:
    store, (contract,) = applied(tmp_path, online)
    return with_engine(store), contract


def with_engine(store: FeatureStore) -> FeatureStore:
    made = config(Path(str(store.config.repo_path)), store.config.online_store.model_dump(), engine=ENGINE)
    return FeatureStore(config=made)


def event(key: int, at: int, made: int | None = None) -> dict[str, Any]:
    return {"id": key, "at": at, "made": at if made is None else made, "value": float(at), "count": at}


def moment(at: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=EPOCH_US + at)


def counts(store: FeatureStore, contract: ViewContract, keys: list[int]) -> list[int | None]:
    return [row["count"] for row in served(store, contract, [{"id": key} for key in keys])]


def test_what_arrived(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    is_ours = "headrace" in store.config.online_store.type
    ledger = StreamLedger(contract, "stats", 0)
    assert materialize_arrived(store, contract).already
    ledger.append(0, 0, 3, rows(contract, [event(1, 5), event(2, 5)]), accepted=np.array([0, 2]), rejected=1)
    replace_day(contract, date(2026, 1, 1), rows(contract, [event(1, 9), event(3, 1)]))
    push(contract, rows(contract, [event(4, 4)]))
    done = materialize_arrived(store, contract)
    assert (done.keys, done.keys_written) == (4, 4)
    assert (done.days, sorted(done.chains)) == (["2026-01-01"], ["push", "stream-stats-0-0"])
    assert counts(store, contract, [1, 2, 3, 4]) == [9, 5, 1, 4]
    if not is_ours:
        return  # a store without a mark is given everything each time
    assert materialize_arrived(store, contract).already
    assert not pending(store, contract)
    replace_day(contract, date(2025, 12, 31), rows(contract, [event(2, 4), event(3, 2)]))  # late
    ledger.append(0, 3, 4, rows(contract, [event(4, 6)]), accepted=np.array([3]))
    assert pending(store, contract)
    shown: list[tuple[int, int]] = []
    done = materialize_arrived(store, contract, progress=lambda part, total: shown.append((part, total)))
    assert (done.keys, done.keys_written, done.days) == (3, 2, ["2025-12-31"])
    assert done.chains == {"stream-stats-0-0": (3, 4)}
    assert shown[-1] == (3, 3)
    assert counts(store, contract, [1, 2, 3, 4]) == [9, 5, 2, 6]


def test_files_of_others_arrive_and_change(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    (contract.directory / "2025").mkdir(parents=True)
    path = contract.directory / "2025" / "old.parquet"
    pq.write_table(rows(contract, [event(1, 5)]), path)
    assert materialize_arrived(store, contract).files == ["2025/old.parquet"]
    assert counts(store, contract, [1, 2]) == [5, None]
    pq.write_table(rows(contract, [event(1, 5), event(2, 2)]), path)
    assert materialize_arrived(store, contract).keys == 2
    assert counts(store, contract, [1, 2]) == [5, 2]


def test_feast_materialize_goes_by_event_time(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    push(contract, rows(contract, [event(1, n) for n in (1, 3, 2, 9)]))
    store.materialize(moment(0), moment(3))
    assert counts(store, contract, [1]) == [3]
    store.materialize_incremental(moment(8))
    assert counts(store, contract, [1]) == [3]
    store.materialize_incremental(moment(9))
    assert counts(store, contract, [1]) == [9]


def test_a_date_in_the_future_wedges_nothing(place: tuple[FeatureStore, ViewContract]) -> None:
    store, contract = place
    store.materialize(moment(0), datetime.now(UTC) + timedelta(days=3650))
    push(contract, rows(contract, [event(1, 1)]))
    assert materialize_arrived(store, contract).keys_written == 1
    assert counts(store, contract, [1]) == [1]


def test_a_failing_write_fails_the_run_and_records_nothing(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online())
    store = with_engine(store)
    push(contract, rows(contract, [event(1, 1)]))
    table = f"{store.project}_{contract.name}"
    with sqlite3.connect(tmp_path / "data/online.db") as connection:
        connection.execute(
            f"CREATE TRIGGER full BEFORE INSERT ON {table} BEGIN SELECT raise(ABORT, 'no room left'); END"
        )
    for run in (lambda: store.materialize(moment(0), moment(9)), lambda: materialize_arrived(store, contract)):
        with pytest.raises(Exception, match="no room left"):
            run()
    assert store.get_feature_view(contract.name).materialization_intervals == []
    assert pending(store, contract)
    with sqlite3.connect(tmp_path / "data/online.db") as connection:
        connection.execute("DROP TRIGGER full")
    assert materialize_arrived(store, contract).keys_written == 1
    assert counts(store, contract, [1]) == [1]


def test_a_table_beyond_a_chunk_arrives_whole(place: tuple[FeatureStore, ViewContract]) -> None:
    """More keys than a chunk has, so that no chunk is lost and the last is not the only one."""
    store, contract = place
    ids = np.arange(250_000 if "headrace" in store.config.online_store.type else 2_500)
    at = pa.array(EPOCH_US + ids, pa.int64()).cast(contract.schema.field("at").type)
    table = pa.table([pa.array(ids), pa.array(ids / 2), pa.array(ids), at, at], schema=contract.schema)
    StreamLedger(contract, "stats", 0).append(0, 0, 2 * len(ids), table, accepted=ids * 2)
    done = materialize_arrived(store, contract)
    assert (done.keys, done.keys_written) == (len(ids), len(ids))
    asked = [0, 1, len(ids) // 2, len(ids) - 1]
    assert counts(store, contract, asked) == asked


def test_a_mark_of_other_types_or_features_is_void(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online())
    push(contract, rows(contract, [event(1, 1), event(2, 2)]))
    assert materialize_arrived(store, contract).keys_written == 2
    fields = [Field(name="value", dtype=Float64), Field(name="count", dtype=Int64), Field(name="note", dtype=String)]
    store, (contract,) = applied(tmp_path, sqlite_online(), view(features=fields))
    assert materialize_arrived(store, contract).keys_written == 2
    assert materialize_arrived(store, contract).already
    store, (contract,) = applied(tmp_path, sqlite_online(), view(features=fields[:2]))
    assert materialize_arrived(store, contract).already  # a feature less changes nothing
    fields[1] = Field(name="count", dtype=Float64)
    store, (contract,) = applied(tmp_path, sqlite_online(), view(features=fields[:2]))
    assert materialize_arrived(store, contract).keys_written == 2
    assert counts(store, contract, [1, 2]) == [1.0, 2.0]


def test_a_mark_that_was_set_back_lets_everything_after_arrive_again(tmp_path: Path) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online())
    push(contract, rows(contract, [event(1, 1)]))
    replace_day(contract, date(2026, 1, 1), rows(contract, [event(2, 2)]))
    before = holdings(contract)
    set_back(store, contract, before)  # no mark: nothing to do
    materialize_arrived(store, contract)
    push(contract, rows(contract, [event(1, 3)]))
    replace_day(contract, date(2026, 1, 1), rows(contract, [event(2, 4)]))
    replace_day(contract, date(2026, 1, 2), rows(contract, [event(3, 5)]))
    materialize_arrived(store, contract)
    set_back(store, contract, before)
    done = materialize_arrived(store, contract)
    assert (done.chains, done.days) == ({"push": (1, 2)}, ["2026-01-01", "2026-01-02"])


def test_views_without_an_entity_and_with_several_keys(tmp_path: Path, online: dict[str, Any]) -> None:
    many = view("many", keys={"shop": ValueType.STRING, "day": ValueType.INT32})
    whole = view("whole", keys={"id": ValueType.INT64})[1]
    alone = FeatureView(name="whole", entities=[], ttl=timedelta(0), schema=whole.features, source=whole.stream_source)
    store, (first, second) = applied(tmp_path, online, many, (cast("list[Entity]", []), alone))
    store = with_engine(store)
    push(first, rows(first, [{"shop": s, "day": d, "at": 1, "value": 1.0, "count": d} for s in "ab" for d in (1, 2)]))
    push(second, rows(second, [{"at": 1, "value": 1.0, "count": 1}, {"at": 3, "value": 3.0, "count": 3}]))
    store.materialize(moment(0), moment(5))
    assert served(store, first, [{"shop": "b", "day": 2}]) == [{"value": 1.0, "count": 2}]
    assert served(store, second, [{"__dummy_id": ""}]) == [{"value": 3.0, "count": 3}]
    push(second, rows(second, [{"at": 4, "value": 4.0, "count": 4}]))
    assert materialize_arrived(store, second).keys_written == 1
    assert served(store, second, [{"__dummy_id": ""}]) == [{"value": 4.0, "count": 4}]


AT_A_TERMINAL = """
import sys
from pathlib import Path
from headrace import progress
progress.LONG_S, progress._TICK_S = 0, 0.005
from tests.headrace.test_materialize import applied, event, moment, push, rows, sqlite_online, with_engine
store, (contract,) = applied(Path(sys.argv[1]), sqlite_online())
push(contract, rows(contract, [event(key, 1) for key in range(10)]))
with_engine(store).materialize(moment(0), moment(5))
"""


def test_progress_is_shown_at_a_terminal_and_in_no_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, (contract,) = applied(tmp_path, sqlite_online())
    push(contract, rows(contract, [event(key, 1) for key in range(10)]))
    with_engine(store).materialize(moment(0), moment(5))
    assert capfd.readouterr().err == ""
    seen = at_terminal([sys.executable, "-c", AT_A_TERMINAL, str(tmp_path / "seen")], environment=environment())
    assert seen.code == 0, seen.raw
    assert f"materialize {contract.name}: looking for the newest rows, 00:0" in seen.raw
    assert "materialize" not in "".join(seen.screen)


def test_two_runs_at_once_do_no_harm(tmp_path: Path) -> None:
    """The one that loses the mark starts over, and finds nothing more to do."""
    store, (contract,) = applied(tmp_path, sqlite_online())
    push(contract, rows(contract, [event(1, 1)]))
    done: list[Any] = []

    def other(_: int, __: int) -> None:
        if not done:
            done.append(None)
            done[0] = materialize_arrived(FeatureStore(config=store.config), contract)

    first = materialize_arrived(store, contract, progress=other)
    assert first.already
    assert done[0].keys_written == 1
    mark = online_store(store).read_mark(store.config, contract.feature_view)
    assert mark["chains"] == {"push": 1}
