"""A source that is not what it was: refused once, by name, and taken when it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import luigi
import pytest
from luigi.execution_summary import LuigiStatusCode

from batch import Ingest, OfflineStore, folder
from batch.folder import ViewFolder
from batch.settings import settings
from batch.source import Source, open_source
from batch.sources import drift
from headrace.contract import ViewContract
from headrace.errors import SchemaError, TransientError
from headrace.repository import contracts, open_store
from tests.batch.conftest import forget
from tests.batch.place import D, Place, build, good_rides, zone_rows
from tests.servers.luigi import Luigid

NEXT = D + timedelta(days=1)
FLAG = "--Ingest-accept-schema"


def test_the_first_run_remembers_the_columns(here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    remembered = _remembered(here)
    assert remembered["source"] == "rides"
    assert remembered["columns"] == {
        "rider": "TEXT",
        "city_id": "INTEGER",
        "distance_km": "REAL",
        "stops": "INTEGER",
        "streets": "TEXT",
        "is_shared": "BOOLEAN",
        "grade": "TEXT",
        "happened": "TIMESTAMP",
        "made": "TIMESTAMP",
        "remark": "TEXT",
    }
    taken_once = (here.root / "data" / "batch" / "rides" / "source.json").stat().st_mtime_ns
    assert build(Ingest(view="rides", date=NEXT)) == LuigiStatusCode.SUCCESS
    assert (here.root / "data" / "batch" / "rides" / "source.json").stat().st_mtime_ns == taken_once


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("ALTER TABLE rides ADD COLUMN extra TEXT", r"column `extra` \(TEXT\) is new, and the view does not know it"),
        ("ALTER TABLE rides DROP COLUMN remark", r"column `remark` \(TEXT\) is gone"),
        (
            "ALTER TABLE rides DROP COLUMN stops; ALTER TABLE rides ADD COLUMN stops BIGINT",
            r"column `stops` was INTEGER and is BIGINT",
        ),
    ],
)
def test_a_table_that_changed_fails_until_it_is_taken(statement: str, said: str, here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    for part in statement.split(";"):
        here.execute(part)
    forget()
    errors = _failures_of(Ingest(view="rides", date=NEXT))
    assert len(errors) == 1
    assert isinstance(errors[0], SchemaError)
    assert errors[0].args[0].startswith("source `rides` of feature view `rides` is not what it was")
    with pytest.raises(SchemaError, match=said + r".*; nothing was read: .* --Ingest-accept-schema"):
        raise errors[0]
    assert not here.folder("rides", NEXT).joinpath("raw.parquet").exists()
    assert build(Ingest(view="rides", date=NEXT, accept_schema=True)) == LuigiStatusCode.SUCCESS
    forget()
    assert build(Ingest(view="rides", date=NEXT + timedelta(days=1))) == LuigiStatusCode.SUCCESS


def test_a_column_that_the_view_wants_is_no_difference(here: Place) -> None:
    here.insert("rides", good_rides(D))
    path = here.root / "data" / "batch" / "rides" / "source.json"
    assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    before = _remembered(here)
    del before["columns"]["grade"]
    path.write_text(json.dumps(before), encoding="utf-8")
    assert build(Ingest(view="rides", date=NEXT)) == LuigiStatusCode.SUCCESS
    assert "grade" in _remembered(here)["columns"]


def test_a_view_that_reads_another_table_begins_anew(here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    path = here.root / "data" / "batch" / "rides" / "source.json"
    path.write_text(json.dumps({"source": "trips", "columns": {"x": "TEXT"}}), encoding="utf-8")
    assert build(Ingest(view="rides", date=NEXT)) == LuigiStatusCode.SUCCESS


def test_each_view_remembers_its_own(here: Place) -> None:
    here.insert("rides", good_rides(D))
    here.insert("zones", zone_rows(D))
    assert build(Ingest(date=D)) == LuigiStatusCode.SUCCESS
    here.execute("ALTER TABLE zones ADD COLUMN wide INTEGER")
    forget()
    assert build(OfflineStore(date=NEXT)) == LuigiStatusCode.FAILED
    assert OfflineStore(view="rides", date=NEXT).complete()
    assert not OfflineStore(view="zones", date=NEXT).complete()


def test_a_kill_before_the_receipt_leaves_the_columns_taken(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    here.insert("rides", good_rides(D))
    task = Ingest(view="rides", date=D)
    with monkeypatch.context() as patch:
        patch.setattr("batch.tasks.write_json", _killed)
        assert build(task) == LuigiStatusCode.FAILED
    assert _remembered(here)["columns"]
    assert not task.complete()
    assert build(task) == LuigiStatusCode.SUCCESS


def test_a_kill_while_the_columns_are_taken_leaves_those_before(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    here.insert("rides", good_rides(D))
    assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    before = _remembered(here)
    here.execute("ALTER TABLE rides ADD COLUMN extra TEXT")
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_sync", _killed)
        assert build(Ingest(view="rides", date=NEXT, accept_schema=True)) == LuigiStatusCode.FAILED
    assert _remembered(here) == before
    assert not list(here.root.glob("data/batch/rides/.staging/*"))


def test_of_two_first_runs_at_once_both_take_the_same(source: Callable[[], Source], here: Place) -> None:
    of_view = ViewFolder(settings().folder, "rides")
    threads = [threading.Thread(target=drift.take, args=(of_view, source(), None)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _remembered(here)["columns"] == source().columns


def test_who_read_before_another_took_a_change_looks_again(source: Callable[[], Source], here: Place) -> None:
    of_view = ViewFolder(settings().folder, "rides")
    drift.take(of_view, source(), None)
    early = source()
    before = drift.taken(of_view, early)
    here.execute("ALTER TABLE rides ADD COLUMN extra TEXT")
    drift.take(of_view, source(), before)
    here.execute("ALTER TABLE rides DROP COLUMN extra")
    here.execute("ALTER TABLE rides ADD COLUMN other TEXT")
    with pytest.raises(TransientError, match="another run took other columns of source `rides` meanwhile"):
        drift.take(of_view, source(), before)


RANGE = ("RangeDailyBase", "--of", "Materialize", "--param-name", "date", "--start", str(NEXT), "--days-back", "10000")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "command"),
    [
        ("luigid", ("Materialize", "--view", "rides", "--date", str(NEXT))),
        ("local", (*RANGE, "--stop", str(NEXT + timedelta(days=1)))),
        ("local", ("Backfill", "--view", "rides", "--start", str(D), "--stop", str(NEXT + timedelta(days=1)))),
        (
            "luigid",
            ("Backfill", "--start", str(NEXT), "--stop", str(NEXT + timedelta(days=1)), "--force-from", "Ingest"),
        ),
    ],
    ids=["one day", "range", "backfill", "forced backfill"],
)
def test_the_word_reaches_the_task_from_every_command(
    scheduler: str, command: tuple[str, ...], place: Place, request: pytest.FixtureRequest
) -> None:
    options = ["--no-lock", "--local-scheduler"]
    if scheduler == "luigid":
        options = ["--no-lock", "--scheduler-port", str(request.getfixturevalue("luigid"))]
    for day in (D, NEXT):
        place.insert("rides", good_rides(day))
        place.insert("zones", zone_rows(day))
    place.run("Ingest", "--date", str(D), *options, reread_days=0)
    for table in ("rides", "zones"):
        place.execute(f"ALTER TABLE {table} ADD COLUMN extra TEXT")
    failed = place.run(*command, *options, expect=30, reread_days=0)
    assert "is not what it was when it was last read: column `extra` (TEXT) is new" in failed.stderr
    assert (failed.stdout + failed.stderr).count(" failed    Ingest(view=rides") >= 1
    assert "Traceback" not in failed.stderr
    if scheduler == "luigid":
        threading.Event().wait(5.5)  # disable_persist of luigi.cfg
    place.run(*command, *options, FLAG, reread_days=0)
    assert "extra" in _remembered(place)["columns"]
    assert (place.folder("rides", NEXT) / "offline.json").exists()


class _Luigid(Luigid):
    """One that opens failed tasks again at once."""

    def __init__(self, config: Path) -> None:
        super().__init__()
        self._config = config
        config.write_text(config.read_text("utf-8").replace("retry_delay=60", "retry_delay=1"), encoding="utf-8")

    def environment(self) -> dict[str, str]:
        return {"LUIGI_CONFIG_PATH": str(self._config)}


@pytest.fixture
def luigid(place: Place) -> Iterator[int]:
    """The port of a scheduler."""
    with _Luigid(place.root / "luigi.cfg") as server:
        yield server.port


@pytest.fixture
def source(here: Place) -> Callable[[], Source]:
    """Look at the source of `rides`."""
    contract: ViewContract = contracts(open_store(here.repo), ["rides"])[0]
    return lambda: open_source(settings(), contract)


def _remembered(place: Place) -> dict[str, Any]:
    path = place.root / "data" / "batch" / "rides" / "source.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _failures_of(task: luigi.Task) -> list[BaseException]:
    """Run a task, and return what it failed with, each time."""
    errors: list[BaseException] = []

    def remember(failed: luigi.Task, error: BaseException) -> None:
        errors.append(error)

    type(task).event_handler(luigi.Event.FAILURE)(remember)
    try:
        assert build(task) == LuigiStatusCode.FAILED
    finally:
        type(task).remove_event_handler(luigi.Event.FAILURE, remember)
    return errors


def _killed(*_: object) -> None:
    raise OSError("killed")
