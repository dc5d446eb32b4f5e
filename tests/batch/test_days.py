"""Days as they come: dirty, late, corrected, withdrawn, empty, missed; at clock changes and year ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from itertools import count
from pathlib import Path

import feast
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from luigi.execution_summary import LuigiStatusCode

from batch import Audit, Backfill, Materialize
from tests.batch.conftest import forget
from tests.batch.place import Place, build, place_in
from tests.batch.source_days import (
    FAULTS,
    TYPED,
    Expected,
    Row,
    Table,
    at,
    expected,
    newest,
    reasons,
)
from tests.headrace.views import examples
from tests.servers import Postgres, UnavailableError

STARTS = [
    date(2026, 3, 27),  # clocks go forward in Berlin on the 29th
    date(2026, 10, 23),  # and back on the 25th
    date(2024, 2, 27),  # a leap day
    date(2025, 12, 30),
]
DAYS = 4
RIDERS = ["ann", "bob", "cid"]

Change = tuple[str, int, int, int, str]
"""What, which rider or row, at which hour, written how, with which fault."""

changes = st.lists(
    st.tuples(
        st.sampled_from(["new", "new", "new", "late", "again", "newer", "correct", "withdraw", "dirty"]),
        st.integers(0, 5),
        st.integers(0, 23),
        st.integers(0, 3),
        st.sampled_from(list(FAULTS)),
    ),
    max_size=7,
)
days = st.lists(st.tuples(changes, st.booleans()), min_size=DAYS, max_size=DAYS)
EVERY_FAULT: list[Change] = [("dirty", n, 5 + n % 18, n % 4, fault) for n, fault in enumerate(FAULTS)]
NIGHTS: list[Change] = [("new", hour, hour, 2, "far") for hour in (0, 1, 2, 3, 22, 23)]
CORRECTED: list[Change] = [
    *(("late", which, 3, 1, "far") for which in range(3)),
    *(("correct", which, 7, 0, "far") for which in range(6)),
    *(("withdraw", which, 0, 0, "far") for which in range(6)),
    *(("again", which, 0, 0, "far") for which in range(3)),
]
homes = count()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """Its sessions are of a zone that no row is of."""
    try:
        with Postgres({"timezone": "Asia/Kathmandu"}) as server:
            yield server
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
@pytest.mark.parametrize("window", ["arrival", "event"])
@settings(
    max_examples=examples(4),
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(start=STARTS[2], schedule=[(EVERY_FAULT[number::DAYS], True) for number in range(DAYS)])
@example(start=STARTS[0], schedule=[(NIGHTS, True), (NIGHTS, False), (NIGHTS, True), (CORRECTED, True)])
@given(start=st.sampled_from(STARTS), schedule=days)
def test_whatever_becomes_of_the_rows_both_stores_hold_what_they_should(
    database: str,
    window: str,
    start: date,
    schedule: list[tuple[list[Change], bool]],
    template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configure: object,
    request: pytest.FixtureRequest,
) -> None:
    place = place_in(tmp_path / f"place-{next(homes)}", template)
    chosen: dict[str, object] = {"window": window, "max_reject_share": 1, "reread_days": 2}
    connection = None
    if database == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        connection = server.connect()
        chosen["source_url"] = server.url
    for name, value in place.settings(**chosen).items():
        monkeypatch.setenv(name, value)
    forget()
    table = Table(str(place.database), connection)
    offline: dict[date, Expected] = {}
    for number, (wanted, is_run) in enumerate(schedule):
        day = start + timedelta(days=number)
        for change in wanted:
            apply(table, change, day, is_typed=database == "postgres")
        if not is_run and number < DAYS - 1:
            continue  # the run was missed
        for back in range(3):
            keep_gate_open(table, day - timedelta(days=back), window)
        assert build(Materialize(view="rides", date=day)) == LuigiStatusCode.SUCCESS
        for back in range(3):
            read = day - timedelta(days=back)
            offline[read] = expected(table.rows.values(), read, window)
            check_counts(place, read, day, offline[read])
        check_stores(place, offline)
    stop = start + timedelta(days=DAYS)
    for day in (start + timedelta(days=number) for number in range(DAYS)):
        if day not in offline:
            keep_gate_open(table, day, window)
            offline[day] = expected(table.rows.values(), day, window)
    assert build(Backfill(view="rides", start=start, stop=stop)) == LuigiStatusCode.SUCCESS  # type: ignore[call-arg]
    check_stores(place, offline)
    assert build(Audit(view="rides", at=datetime(2026, 11, 1, 0, 0))) == LuigiStatusCode.SUCCESS  # noqa: DTZ001
    if connection is not None:
        connection.close()
    shutil.rmtree(place.root)


def apply(table: Table, change: Change, day: date, *, is_typed: bool) -> None:
    """Let something happen before a day's run."""
    what, which, hour, writing, fault = change
    rows = sorted(table.rows)
    value = float(len(rows) + 100 * hour % 1000) / 4
    made = at(day, hour, 30)
    fresh = Row(0, RIDERS[which % 3], value, at(day, hour), made, writing=writing)
    if what == "new":
        add_apart(table, fresh)
    elif what == "late":  # it says that it was made when its day was read already
        before = day - timedelta(days=1 + which % 3)
        add_apart(table, Row(0, fresh.rider, value, at(before, hour), at(before, hour, 45), writing=writing))
    elif what == "dirty" and not (is_typed and fault not in TYPED):
        table.add(Row(0, fresh.rider, value, fresh.happened, made, fault=fault, writing=writing))
    elif rows:
        row = table.rows[rows[which % len(rows)]]
        if what == "again":
            table.add(row)
        elif what == "newer" and row.fault is None:  # of the same moment, made later
            add_apart(table, Row(0, row.rider, value, row.happened, made + timedelta(seconds=which), writing=writing))
        elif what == "correct":
            for number in [n for n in rows if is_twin(table.rows[n], row)]:
                table.correct(number, value)
        elif what == "withdraw":
            table.withdraw(row.number)


def keep_gate_open(table: Table, day: date, window: str) -> None:
    """A day of which no row survives is not published: let one."""
    found = expected(table.rows.values(), day, window)
    if found.read and not found.rows:
        table.add(Row(0, RIDERS[0], 1.5, at(day, 12), at(day, 12, 30)))


def add_apart(table: Table, row: Row) -> None:
    """Add a row unless it would tie with another: the same key, times, and other values."""
    if not any(is_twin(other, row) for other in table.rows.values()):
        table.add(row)


def is_twin(one: Row, other: Row) -> bool:
    return (one.key_time, one.made, one.fault) == (other.key_time, other.made, other.fault)


def check_counts(place: Place, day: date, run: date, wanted: Expected) -> None:
    """Of one day of one run, by its receipts."""
    counts = place.receipt("rides", day, "clean.json", run)["counts"]
    assert place.receipt("rides", day, "raw.json", run)["rows"] == counts["read"] == wanted.read
    assert reasons(counts) == wanted.rejected
    assert (counts["kept"], counts["duplicate_exact"], counts["duplicate_key_time"]) == (
        len(wanted.rows),
        wanted.exact,
        wanted.key_time,
    )
    together = counts["kept"] + counts["rejected"] + counts["duplicate_exact"] + counts["duplicate_key_time"]
    assert counts["read"] == together + counts["skipped"]


def check_stores(place: Place, offline: dict[date, Expected]) -> None:
    """Offline day by day, and what is served."""
    found = {path.name.split("batch-")[1][:10]: path for path in place.day_files("rides")}
    assert len(found) == len(place.day_files("rides"))
    for day, wanted in offline.items():
        rows = place.rows_of(found[str(day)]) if str(day) in found else []
        assert {(row["rider"], row["happened"]): row["distance_km"] for row in rows} == {
            key: row.value for key, row in wanted.rows.items()
        }
        assert len(rows) == len(wanted.rows)
    store = feast.FeatureStore(str(place.repo))
    keys = [{"rider": rider, "city_id": 7} for rider in RIDERS]
    served = store.get_online_features(["rides:distance_km"], keys).to_dict()["distance_km"]
    assert {rider: value for rider, value in zip(RIDERS, served, strict=True) if value is not None} == newest(
        offline.values()
    )
