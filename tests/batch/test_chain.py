"""The tasks in this process: what each makes, and what it leaves when it fails."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import feast
import luigi
import pyarrow.parquet as pq
import pytest
from luigi.execution_summary import LuigiStatusCode

from batch import Audit, Backfill, Clean, ExploreAndValidate, Ingest, Materialize, OfflineStore, folder, tasks
from batch.backfill import undo
from batch.folder import DayFolder, read_json
from batch.tasks import ChainTask
from headrace.audit import audit
from headrace.errors import ConfigError
from headrace.repository import contracts, open_store
from tests.batch.conftest import forget
from tests.batch.place import GOOD, D, Place, build, good_rides, without_cache, zone_rows
from tests.servers.repository import feast_apply

STEPS: list[type[ChainTask]] = [Ingest, Clean, ExploreAndValidate, OfflineStore, Materialize]
RECEIPTS = ["raw.json", "clean.json", "passed.json", "offline.json"]


@pytest.mark.parametrize("step", STEPS)
def test_a_task_is_complete_once_it_ran_and_never_runs_again(
    step: type[ChainTask], here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.insert("rides", good_rides(D))
    task = step(view="rides", date=D)
    assert not task.complete()
    assert build(task) == LuigiStatusCode.SUCCESS
    assert task.complete()
    output = task.output()[0].path
    assert "rides" in output
    assert f"run={D}" in output
    forget()
    monkeypatch.setattr(ChainTask, "run", _unwanted)
    assert build(step(view="rides", date=D)) == LuigiStatusCode.SUCCESS


@pytest.mark.parametrize("step", STEPS[:4])
def test_a_task_that_dies_before_its_receipt_leaves_nothing_that_counts(
    step: type[ChainTask], here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.insert("rides", good_rides(D))
    task = step(view="rides", date=D)
    for before in task.requires():
        assert build(before) == LuigiStatusCode.SUCCESS
    real = folder.write_json

    def dies(path: Path, content: dict[str, Any]) -> None:
        if path == Path(task.output()[0].path):
            raise OSError("no space left")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_json", dies)
        patch.setattr(step, "retry_count", 1)
        assert build(task) == LuigiStatusCode.FAILED
    assert not task.complete()
    assert not list(here.folder("rides", D).glob(".staging/*"))
    assert build(task) == LuigiStatusCode.SUCCESS
    assert task.complete()


def test_what_a_killed_task_left_in_staging_is_cleared(here: Place) -> None:
    here.insert("rides", good_rides(D))
    leftover = here.folder("rides", D) / ".staging" / "raw.parquet-1-abc"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half", encoding="utf-8")
    assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    assert not leftover.exists()


def test_where_many_write_only_what_is_old_is_cleared(tmp_path: Path) -> None:
    staging = tmp_path / ".staging"
    staging.mkdir()
    for name, age_s in (("old", 90_000), ("new", 60)):
        (staging / name).touch()
        os.utime(staging / name, (time.time() - age_s,) * 2)
    folder.write_text(tmp_path / "a", "b")
    assert [path.name for path in staging.iterdir()] == ["new"]


def test_the_requirements_are_the_chain(here: Place) -> None:
    assert here.repo.is_dir()
    top = Materialize(view="rides", date=D)
    days = [D, D - timedelta(days=1), D - timedelta(days=2)]
    assert [(t.date, t.run_date) for t in top.requires()] == [(day, D) for day in days]  # type: ignore[attr-defined]
    below: luigi.Task = top.requires()[1]
    families = []
    while below.requires():
        below = below.requires()[0]
        families.append((below.task_family, below.date, below.run_date))  # type: ignore[attr-defined]
    assert families == [(name, days[1], D) for name in ("ExploreAndValidate", "Clean", "Ingest")]


def test_without_a_view_it_is_every_view_with_a_source_table(here: Place) -> None:
    here.insert("rides", good_rides(D))
    here.insert("zones", zone_rows(D))
    task = Materialize(date=D)
    assert [t.view for t in task.requires()] == ["rides", "zones"]
    assert build(task) == LuigiStatusCode.SUCCESS
    assert task.complete()
    counts = here.receipt("zones", D, "clean.json")["counts"]
    assert (counts["read"], counts["kept"], counts["skipped"]) == (3, 2, 1)
    assert here.offline("zones").column("level").to_pylist() == [2, 4]


def test_every_kind_of_dirty_row_is_told_from_the_good(here: Place, configure: Callable[..., None]) -> None:
    configure(max_reject_share=0.9, window="arrival")
    dirty: dict[tuple[str, str], dict[str, Any]] = {
        ("wrong_type", "distance_km"): {"distance_km": "far"},
        ("out_of_range", "distance_km"): {"distance_km": 1000.5},
        ("wrong_type", "stops"): {"stops": 1.5},
        ("out_of_range", "stops"): {"stops": -1},
        ("null", "stops"): {"stops": None},
        ("null", "rider"): {"rider": None},
        ("wrong_type", "rider"): {"rider": b"\xff\xfe"},
        ("wrong_type", "city_id"): {"city_id": "seven"},
        ("wrong_type", "streets"): {"streets": '["High St", 5]'},
        ("wrong_type", "is_shared"): {"is_shared": 7},
        ("out_of_range", "grade"): {"grade": "<b>z</b>"},
        ("bad_timestamp", "happened"): {"happened": "yesterday"},
        ("future_event", "happened"): {"happened": "2999-01-01 00:00:00"},
        ("null", "happened"): {"happened": None},
        ("bad_timestamp", "made"): {"made": f"{D} 99:99:99"},
    }
    here.insert("rides", ({**GOOD, **fault} for fault in dirty.values()))
    here.insert("rides", [{**GOOD, "stops": 3_000_000_000}, {**GOOD, "streets": "[1,", "grade": b"\x00"}])
    here.insert("rides", good_rides(D, 20))
    here.insert("rides", good_rides(D, 1))
    here.insert("rides", [{**good_rides(D, 1)[0], "made": f"{D} 11:00:00", "distance_km": 99}])
    next_day, day_before = D + timedelta(days=1), D - timedelta(days=1)
    here.insert(
        "rides",
        [
            {**GOOD, "rider": "offset in", "made": f"{next_day}T00:30:00+01:00"},
            {**GOOD, "rider": "offset out", "made": f"{D}T00:30:00+01:00"},
            {**GOOD, "rider": "next", "made": f"{next_day} 00:00:00"},
            {**GOOD, "rider": "before", "made": f"{day_before} 23:59:59.999"},
            {**GOOD, "rider": "of no day", "made": None},
            {**GOOD, "rider": "of no day", "made": 1_700_000_000},
        ],
    )
    assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    counts = here.receipt("rides", D, "clean.json")["counts"]
    assert counts["read"] == len(dirty) + 2 + 20 + 1 + 1 + 1
    assert counts["kept"] == 21
    assert (counts["duplicate_exact"], counts["duplicate_key_time"]) == (1, 1)
    rejected = pq.read_table(here.folder("rides", D) / "rejects.parquet").to_pylist()
    found = [(row["reason"], row["field"]) for row in rejected]
    assert sorted(found) == sorted([*dirty, ("wrong_type", "stops"), ("wrong_type", "streets")])
    far = next(row for row in rejected if row["reason"] == "wrong_type" and row["field"] == "distance_km")
    assert json.loads(far["record"])["distance_km"] == "far"
    assert "found 'far'" in far["message"]
    raw = here.receipt("rides", D, "raw.json")
    assert raw["rows_of_no_day"] == 2
    assert raw["ignored_columns"] == ["remark"]
    kept = here.offline("rides")
    assert {"offset in"} == set(kept.column("rider").to_pylist()) - {row["rider"] for row in good_rides(D)}
    first = next(row for row in kept.to_pylist() if row["rider"] == "rider 0")
    assert first["distance_km"] == 0.0
    assert first["streets"] == ["High St", "Low St"]
    assert first["is_shared"] is True
    page = (here.folder("rides", D) / "report.html").read_text(encoding="utf-8")
    assert "<b>z</b>" not in page
    assert "&lt;b&gt;z&lt;/b&gt;" in page


def test_the_online_store_serves_what_was_read(here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    store = feast.FeatureStore(str(here.repo))
    answer = store.get_online_features(
        features=["rides:distance_km", "rides:streets", "rides:is_shared"],
        entity_rows=[{"rider": "rider 5", "city_id": 2}, {"rider": "nobody", "city_id": 2}],
    ).to_dict()
    assert answer["distance_km"] == [1.25, None]
    assert answer["streets"] == [["High St", "Low St"], None]
    assert answer["is_shared"] == [True, None]
    receipt = json.loads((here.folder("rides", D).parent / "materialize.json").read_text(encoding="utf-8"))
    assert (receipt["keys"], receipt["keys_written"], receipt["days"]) == (20, 20, [str(D)])


def test_late_corrected_and_deleted_rows_come_with_the_next_run(here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    before = here.day_files("rides")
    here.insert("rides", [{**GOOD, "rider": "late"}])
    here.execute("UPDATE rides SET distance_km = 77 WHERE rider = 'rider 3'")
    here.execute("DELETE FROM rides WHERE rider = 'rider 4'")
    run = D + timedelta(days=1)
    assert build(Materialize(view="rides", date=run)) == LuigiStatusCode.SUCCESS
    after = here.day_files("rides")
    assert len(after) == 1
    assert after != before
    rows = {row["rider"]: row for row in here.offline("rides").to_pylist()}
    assert len(rows) == 20
    assert rows["rider 3"]["distance_km"] == 77
    assert "late" in rows
    withdrawn = pq.read_table(here.folder("rides", D, run) / "withdrawn.parquet")
    assert sorted(withdrawn.column("rider").to_pylist()) == ["rider 3", "rider 4"]
    assert here.receipt("rides", D, "offline.json", run)["withdrawn"] == 2
    store = feast.FeatureStore(str(here.repo))
    riders = [{"rider": rider, "city_id": city} for rider, city in (("late", 7), ("rider 3", 0), ("rider 4", 1))]
    answer = store.get_online_features(["rides:stops", "rides:distance_km"], riders).to_dict()
    assert answer["stops"] == [1, 1, None]
    assert answer["distance_km"][1] == 77
    folder = here.root / "data" / "batch" / "rides"
    assert read_json(folder / f"run={run}" / "materialize.json")["keys_taken_back"] in {1, 2}
    assert not list(folder.glob("withdrawn/*.parquet"))
    assert build(Materialize(view="rides", date=run + timedelta(days=1))) == LuigiStatusCode.SUCCESS
    assert here.day_files("rides") == after
    assert here.receipt("rides", D, "offline.json", run + timedelta(days=1))["changed"] is False


def test_an_older_read_never_replaces_a_newer_one(here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(ExploreAndValidate(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    here.insert("rides", [{**GOOD, "rider": "late"}])
    run = D + timedelta(days=1)
    assert build(Materialize(view="rides", date=run)) == LuigiStatusCode.SUCCESS
    newest = here.day_files("rides")
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    assert here.day_files("rides") == newest
    assert here.receipt("rides", D, "offline.json")["superseded_by"] == str(run)


def test_a_snapshot_that_outlived_a_kill_goes_with_the_repeat(here: Place) -> None:
    """It had published the newer one: whoever reads the folder as it is would see the day twice."""
    here.insert("rides", good_rides(D))
    assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    (former,) = here.day_files("rides")
    content = former.read_bytes()
    here.insert("rides", [{**GOOD, "rider": "late"}])
    task = OfflineStore(view="rides", date=D, run_date=D + timedelta(days=1))
    assert build(task) == LuigiStatusCode.SUCCESS
    former.write_bytes(content)
    Path(task.output()[0].path).unlink()
    assert build(task) == LuigiStatusCode.SUCCESS
    assert len(here.day_files("rides")) == 1
    assert here.offline("rides").num_rows == 21


def test_rows_are_taken_back_online_by_a_later_run_if_not_by_their_own(here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    here.execute("DELETE FROM rides WHERE rider = 'rider 4'")
    first, second = (OfflineStore(view="rides", date=D, run_date=D + timedelta(days=days)) for days in (1, 2))
    assert build(first) == LuigiStatusCode.SUCCESS  # and its `Materialize` never comes
    here.execute("DELETE FROM rides WHERE rider = 'rider 5'")
    assert build(second) == LuigiStatusCode.SUCCESS
    assert build(Materialize(view="rides", date=D + timedelta(days=3))) == LuigiStatusCode.SUCCESS
    riders = [{"rider": f"rider {n}", "city_id": n % 3} for n in (3, 4, 5)]
    store = feast.FeatureStore(str(here.repo))
    answer = store.get_online_features(["rides:distance_km"], riders).to_dict()
    assert answer["distance_km"] == [0.75, None, None]


def test_what_is_redone_before_it_was_taken_back_is_taken_back_too(here: Place) -> None:
    here.insert("rides", good_rides(D))
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    for rider in (4, 5, 5):
        here.execute(f"DELETE FROM rides WHERE rider = 'rider {rider}'")
        undo([DayFolder(here.folder("rides", D))], "Ingest")
        forget()
        assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    assert build(Materialize(view="rides", date=D + timedelta(days=3))) == LuigiStatusCode.SUCCESS
    store = feast.FeatureStore(str(here.repo))
    riders = [{"rider": f"rider {n}", "city_id": n % 3} for n in (3, 4, 5)]
    assert store.get_online_features(["rides:distance_km"], riders).to_dict()["distance_km"] == [0.75, None, None]


@pytest.mark.parametrize("older_comes_last", [True, False])
def test_of_two_work_folders_the_later_read_counts(
    older_comes_last: bool, here: Place, configure: Callable[..., None]
) -> None:
    """Two machines that see the same stores, and nothing else of each other."""
    here.insert("rides", good_rides(D))
    configure(batch_folder=here.root / "a")
    assert build(ExploreAndValidate(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    here.insert("rides", [{**GOOD, "rider": "late"}])
    here.execute("DELETE FROM rides WHERE rider = 'rider 4'")
    order = ["b", "a"] if older_comes_last else ["a", "b"]
    for name in order:
        configure(batch_folder=here.root / name)
        assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    receipts = {
        name: json.loads((here.root / name / f"rides/run={D}/day={D}/offline.json").read_text()) for name in order
    }
    assert ("superseded_by" in receipts["a"], "superseded_by" in receipts["b"]) == (older_comes_last, False)
    assert len(here.day_files("rides")) == 1
    riders = here.offline("rides").column("rider").to_pylist()
    assert ("late" in riders, "rider 4" in riders, len(riders)) == (True, False, 20)
    assert build(Audit(view="rides", at=datetime(2026, 3, 12, 0, 0))) == LuigiStatusCode.SUCCESS  # noqa: DTZ001


def test_a_crash_between_publishing_and_the_receipt_keeps_the_withdrawn_rows(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.insert("rides", good_rides(D))
    assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    here.execute("DELETE FROM rides WHERE rider = 'rider 4'")
    task = OfflineStore(view="rides", date=D, run_date=D + timedelta(days=1))
    assert build(*task.requires()) == LuigiStatusCode.SUCCESS
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_json", _unwanted)
        patch.setattr(OfflineStore, "retry_count", 1)
        assert build(task) == LuigiStatusCode.FAILED
    assert len(here.offline("rides")) == 19
    assert build(task) == LuigiStatusCode.SUCCESS
    assert here.receipt("rides", D, "offline.json", D + timedelta(days=1))["withdrawn"] == 1
    assert build(Materialize(view="rides", date=D + timedelta(days=1))) == LuigiStatusCode.SUCCESS
    assert build(Audit(view="rides")) == LuigiStatusCode.SUCCESS


def test_a_row_withdrawn_and_brought_again_is_online(here: Place) -> None:
    """The note of a try that never replaced the snapshot does not count, nor one that comes late."""
    here.insert("rides", good_rides(D))
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    for run, change in (
        (1, "DELETE FROM rides WHERE rider = 'rider 4'"),
        (2, "UPDATE rides SET stops = 9 WHERE rider = 'rider 5'"),
    ):
        here.execute(change)
        assert build(OfflineStore(view="rides", date=D, run_date=D + timedelta(days=run))) == LuigiStatusCode.SUCCESS
    row = next(row for row in good_rides(D) if row["rider"] == "rider 4")
    here.insert("rides", [row])
    assert len(list((here.root / "data" / "batch" / "rides" / "withdrawn").glob("*.parquet"))) == 2
    backfill: Any = Backfill  # Luigi's parameters are no arguments that a type checker knows
    again = backfill(view="rides", start=D, stop=D + timedelta(days=1), force_from="Ingest")
    assert build(again) == LuigiStatusCode.SUCCESS
    assert build(Audit(view="rides")) == LuigiStatusCode.SUCCESS
    store = feast.FeatureStore(str(here.repo))
    riders = [{"rider": f"rider {number}", "city_id": number % 3} for number in (4, 5)]
    assert store.get_online_features(["rides:stops"], riders).to_dict()["stops"] == [1, 9]


def test_a_closed_gate_leaves_the_report_and_stops_the_chain(here: Place) -> None:
    here.insert("rides", [*good_rides(D, 8), {**GOOD, "stops": -1}])
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.FAILED
    left = without_cache(here.folder("rides", D))
    assert left == [
        "clean.json",
        "kept.parquet",
        "raw.json",
        "raw.parquet",
        "rejects.html",
        "rejects.parquet",
        "report.html",
        "report.json",
    ]
    verdict = here.receipt("rides", D, "report.json")
    assert verdict["passed"] is False
    assert [c["name"] for c in verdict["checks"] if not c["passed"]] == ["share of rejected rows"]
    assert "gate closed" in (here.folder("rides", D) / "report.html").read_text(encoding="utf-8")
    assert str(D) not in "".join(path.name for path in here.day_files("rides"))
    assert not (here.folder("rides", D).parent / "materialize.json").exists()


def test_a_gate_opens_when_its_bound_is_raised(here: Place, configure: Callable[..., None]) -> None:
    here.insert("rides", [*good_rides(D, 8), {**GOOD, "stops": -1}])
    assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.FAILED
    configure(max_reject_share=0.2)
    assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    assert len(here.offline("rides")) == 8


@pytest.mark.parametrize(("allowed", "status"), [(True, LuigiStatusCode.SUCCESS), (False, LuigiStatusCode.FAILED)])
def test_an_empty_day_passes_only_if_allowed(
    allowed: bool, status: LuigiStatusCode, here: Place, configure: Callable[..., None]
) -> None:
    configure(allow_empty_day=allowed)
    assert build(Materialize(view="rides", date=D)) == status
    assert not here.day_files("rides")
    assert "gate" in (here.folder("rides", D) / "report.html").read_text(encoding="utf-8")


def test_a_day_by_event_time(here: Place, configure: Callable[..., None]) -> None:
    configure(window="event")
    here.insert("rides", [{**GOOD, "made": "2026-05-01 00:00:00"}, {**GOOD, "happened": "2026-03-11 00:00:00"}])
    assert build(OfflineStore(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    assert len(here.offline("rides")) == 1


@pytest.mark.parametrize(
    ("settings", "view", "message"),
    [
        ({}, "nope", r"unknown feature view `nope`; the registry has: notes, rides, zones"),
        ({}, "notes", r"`notes` has no source; name its table or its files"),
        ({"feature_repo": "/nowhere"}, "rides", r"HEADRACE_FEATURE_REPO"),
        (
            {"source_url": "sqlite:///nowhere.db"},
            "rides",
            r"nowhere\.db, which does not exist; create it",
        ),
        ({"source_url": "s3cret"}, "rides", r"HEADRACE_SOURCE_URL is no SQLAlchemy URL"),
        ({"source_url": "nodb://u:s3cret@h/x"}, "rides", r"SQLAlchemy knows no `nodb`"),
        (
            {"reread_days": "x", "window": "y"},
            "rides",
            r"HEADRACE_WINDOW .*; HEADRACE_REREAD_DAYS ",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_starts(
    settings: dict[str, str], view: str, message: str, here: Place, configure: Callable[..., None]
) -> None:
    configure(**settings)
    with pytest.raises(ConfigError, match=message) as raised:
        Materialize(view=view, date=D).complete()
    assert "s3cret" not in str(raised.value)
    assert not (here.root / "data" / "batch").exists()


def test_a_table_that_is_not_there_is_named_with_those_that_are(here: Place) -> None:
    here.execute("DROP TABLE rides")
    with pytest.raises(ConfigError, match=r"reads table `rides`.* it has: zones; correct"):
        Materialize(view="rides", date=D).complete()


def test_a_table_without_a_column_names_both_sides(here: Place) -> None:
    here.execute("ALTER TABLE rides DROP COLUMN grade")
    with pytest.raises(
        ConfigError,
        match=r"the view wants rider, .*grade.*; it has .*; it lacks grade; nothing was read",
    ):
        Materialize(view="rides", date=D).complete()
    assert not (here.root / "data" / "batch").exists()


def test_one_broken_table_does_not_stop_the_other_views(here: Place) -> None:
    here.execute("DROP TABLE rides")
    here.insert("zones", zone_rows(D))
    assert build(Materialize(date=D)) == LuigiStatusCode.FAILED
    assert Materialize(view="zones", date=D).complete()


def test_a_day_that_is_not_over_is_refused(here: Place) -> None:
    assert here.repo.is_dir()
    with pytest.raises(ConfigError, match=r"is not over yet \(UTC\); the newest day that can be done is"):
        Materialize(view="rides", date=tasks.today()).complete()


def test_days_before_the_start_are_not_read_again(here: Place, configure: Callable[..., None]) -> None:
    assert here.repo.is_dir()
    configure(start_date=D - timedelta(days=1))
    assert [t.date for t in Materialize(view="rides", date=D).requires()] == [D, D - timedelta(days=1)]  # type: ignore[attr-defined]


def test_a_date_is_a_day() -> None:
    with pytest.raises(ConfigError, match=r"--date '2026-02-30': expected a day such as 2026-01-31"):
        tasks.DayParameter().parse("2026-02-30")  # type: ignore[attr-defined]
    assert tasks.DayParameter().parse("2026-02-28") == date(2026, 2, 28)  # type: ignore[attr-defined]


def _unwanted(*_: object, **__: object) -> None:
    raise AssertionError("must not run")


def test_a_view_that_changes_goes_on(place: Place, postgres: str) -> None:
    """A day that was published with other columns is replaced; rows that it lost leave both stores."""
    settings = place.repo / "feature_store.yaml"
    former = "sqlite:///../data/registry.db"
    settings.write_text(settings.read_text(encoding="utf-8").replace(former, postgres), encoding="utf-8")
    definitions = place.repo / "definitions.py"
    remark, shared = (f'        Field(name="{name}"' for name in ("remark", "is_shared"))
    for number, (old, now) in enumerate([("", ""), (shared, f"{remark}, dtype=String),\n{shared}"), (shared, "#")]):
        text = definitions.read_text(encoding="utf-8")
        definitions.write_text(text.replace(old, now) if old else text, encoding="utf-8")
        feast_apply(place.repo)
        if number == 0:
            place.insert("rides", good_rides(D))
        else:
            place.execute(f"UPDATE rides SET remark = 'x' WHERE rider = 'rider {2 + number}'")
            place.execute(f"DELETE FROM rides WHERE rider = 'rider {10 + number}'")
        run = D + timedelta(days=number)
        place.run("Materialize", "--view", "rides", "--date", str(run), "--local-scheduler")
        kept = [n for n in range(20) if not 10 < n <= 10 + number]
        remarks = [None if n not in (3, 4) or n > 2 + number else "x" for n in kept]
        rows = {row["rider"]: row.get("remark") for row in place.offline("rides").to_pylist()}
        assert rows == {f"rider {n}": remark for n, remark in zip(kept, remarks, strict=True)}
        store = open_store(place.repo)
        asked = [{"rider": f"rider {n}", "city_id": n % 3} for n in range(20)]
        names = ["rides:distance_km", *(["rides:remark"] if number else [])]
        answer = store.get_online_features(features=names, entity_rows=asked).to_dict()
        assert answer["distance_km"] == [n / 4 if n in kept else None for n in range(20)]
        assert not number or [answer["remark"][n] for n in kept] == remarks
        assert audit(store, contracts(store, ["rides"])[0]).diverged == 0
