"""Many days at once, by the literal command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from datetime import date, timedelta

import pytest
from feast import FeatureStore
from luigi.execution_summary import LuigiStatusCode

from batch import Backfill, Ingest
from headrace.errors import ConfigError
from tests.batch.place import D, Place, build, good_rides

DAYS = [D + timedelta(days=number) for number in range(4)]
START, STOP = str(DAYS[0]), str(DAYS[-1] + timedelta(days=1))
RANGE = ("--view", "rides", "--start", START, "--stop", STOP, "--local-scheduler")


def fill(place: Place, rows: int = 5) -> None:
    for day in DAYS:
        place.insert("rides", good_rides(day, rows))


def steps_run(text: str) -> Counter[str]:
    """How many tasks of each kind were run, from Luigi's log."""
    return Counter(re.findall(r"running\s+(\w+)\(", text))


def served(place: Place, rider: str, city: int) -> float | None:
    """`distance_km` from the online store."""
    store = FeatureStore(repo_path=str(place.repo))
    found = store.get_online_features(["rides:distance_km"], [{"rider": rider, "city_id": city}]).to_dict()
    value: float | None = found["distance_km"][0]
    return value


def test_what_is_missing_is_done_and_nothing_else(place: Place) -> None:
    fill(place)
    place.run("OfflineStore", "--view", "rides", "--date", str(DAYS[2]), "--local-scheduler")
    plan = place.run("Backfill", *RANGE, "--dry-run").stderr
    assert f"would do 3 of 4 days: {DAYS[0]}, {DAYS[1]}, {DAYS[3]}" in plan
    assert not steps_run(plan)["Ingest"]
    first = place.run("Backfill", *RANGE, "--workers", "2").stderr
    of_days = ["Ingest", "Clean", "ExploreAndValidate", "OfflineStore", "BackfillDay"]
    assert steps_run(first) == dict.fromkeys(of_days, 3) | {"Backfill": 1}
    assert "4 of 4 days" in first
    assert re.search(r"[23] of 4 days, about \d:\d\d:\d\d left", first)
    assert place.offline("rides").num_rows == 5 * len(DAYS)
    assert served(place, "rider 4", 1) == 1.0
    assert not steps_run(place.run("Backfill", *RANGE).stderr)


def test_a_day_that_fails_keeps_no_other_from_being_done(place: Place) -> None:
    fill(place)
    place.insert("rides", [{**row, "distance_km": -1} for row in good_rides(DAYS[3], 20)])
    failed = place.run("Backfill", *RANGE, "--workers", "2", expect=30)
    assert f"the gate is closed for view `rides`, {DAYS[3]}" in failed.stderr
    assert place.offline("rides").num_rows == 5 * (len(DAYS) - 1)
    assert served(place, "rider 4", 1) is None
    mended = place.run("Backfill", *RANGE, max_reject_share=1)
    assert steps_run(mended.stderr) == {"ExploreAndValidate": 1, "OfflineStore": 1, "BackfillDay": 1, "Backfill": 1}
    assert served(place, "rider 4", 1) == 1.0


def test_a_backfill_that_was_killed_goes_on(place: Place) -> None:
    fill(place)
    running = subprocess.Popen(
        place.command("Backfill", *RANGE), cwd=place.root, env=place.environment(), start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(place.root.glob("data/batch/rides/run=*/day=*/offline.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    done = len(list(place.root.glob("data/batch/rides/run=*/day=*/offline.json")))
    again = place.run("Backfill", *RANGE)
    assert steps_run(again.stderr)["OfflineStore"] == len(DAYS) - done
    assert place.offline("rides").num_rows == 5 * len(DAYS)
    assert len(place.day_files("rides")) == len(DAYS), "no day twice"


def test_by_force_days_are_redone_from_a_step_on(place: Place) -> None:
    """From the rows that were read last: the day's own run did not see the late one yet."""
    fill(place)
    place.run("Backfill", *RANGE)
    place.insert("rides", [{**good_rides(DAYS[1], 1)[0], "rider": "late", "distance_km": 77}])
    place.run("Materialize", "--view", "rides", "--date", str(DAYS[2]), "--local-scheduler")  # reads DAYS[1] again
    assert served(place, "late", 0) == 77.0
    dry = place.run("Backfill", *RANGE, "--force-from", "Clean", "--dry-run").stderr
    assert "would redo 4 days from Clean on, 4 of them published" in dry
    assert (steps_run(dry)["Clean"], steps_run(dry)["Backfill"]) == (0, 1)
    redone = steps_run(place.run("Backfill", *RANGE, "--force-from", "Clean").stderr)
    assert (redone["Ingest"], redone["Clean"], redone["OfflineStore"]) == (0, 4, 4)
    assert place.offline("rides").num_rows == 5 * len(DAYS) + 1
    place.insert("rides", [{**good_rides(DAYS[3], 1)[0], "rider": "later", "distance_km": 55}])
    redone = steps_run(place.run("Backfill", *RANGE, "--force-from", "Ingest").stderr)
    assert (redone["Ingest"], redone["OfflineStore"]) == (4, 4)
    assert served(place, "later", 0) == 55.0
    assert place.offline("rides").num_rows == 5 * len(DAYS) + 2
    assert not steps_run(place.run("Backfill", *RANGE).stderr)


def test_a_day_that_another_run_reads_meanwhile_is_done_all_the_same(here: Place) -> None:
    """The other run has read it later, and has not published it yet."""
    fill(here)
    backfill = Backfill(view="rides", start=DAYS[0], stop=DAYS[1])  # type: ignore[call-arg]
    (day,) = backfill.requires()
    assert build(Ingest(view="rides", date=DAYS[0], run_date=DAYS[2])) == LuigiStatusCode.SUCCESS
    assert build(day) == LuigiStatusCode.SUCCESS
    assert build(backfill) == LuigiStatusCode.SUCCESS
    assert here.receipt("rides", DAYS[0], "offline.json")["rows"] == 5


@pytest.mark.parametrize(
    ("start", "stop", "says"),
    [
        (DAYS[1], DAYS[0], "no day lies from the first to before the second"),
        (DAYS[0], DAYS[0], "no day lies from the first to before the second"),
        (DAYS[0], date.max, r"at most \(UTC\); that day is not over yet"),
    ],
)
@pytest.mark.parametrize("way", [{}, {"force_from": "Clean"}, {"dry_run": True}])
def test_a_range_that_cannot_be_done_is_refused(
    here: Place, start: date, stop: date, says: str, way: dict[str, object]
) -> None:
    assert here.repo.is_dir()
    with pytest.raises(ConfigError, match=says):
        Backfill(view="rides", start=start, stop=stop, **way).complete()  # type: ignore[call-arg]


def test_every_view_is_done_where_none_is_named(place: Place) -> None:
    fill(place)
    plan = place.run("Backfill", "--start", START, "--stop", STOP, "--local-scheduler", "--dry-run").stderr
    assert "Backfill of `rides`: would do 4 of 4 days" in plan
    assert "Backfill of `zones`: would do 4 of 4 days" in plan
    place.run("Backfill", "--start", START, "--stop", STOP, "--local-scheduler", "--workers", "2")
    forced = place.run(
        "Backfill", "--start", START, "--stop", STOP, "--local-scheduler", "--force-from", "OfflineStore"
    ).stderr
    assert steps_run(forced)["OfflineStore"] == 2 * len(DAYS)
