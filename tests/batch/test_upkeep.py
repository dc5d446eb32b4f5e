"""Compact, Audit, Repair and Retain: as tasks in this process, and as the literal command line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import luigi
import pytest
from luigi.execution_summary import LuigiStatusCode
from luigi.scheduler import Scheduler
from luigi.worker import Worker

from batch import Audit, Compact, Repair, Retain
from batch.upkeep import MinuteParameter, ShareParameter, now
from headrace.contract import ViewContract
from headrace.errors import ConfigError
from tests.batch.conftest import forget
from tests.batch.place import Place, build, without_cache
from tests.batch.upkeep import History
from tests.headrace.views import EPOCH_US, config, view
from tests.servers import use_valkey

AT = datetime(2026, 3, 10, 8, 15)  # noqa: DTZ001 - as Luigi has it
LATER = datetime(2026, 3, 10, 9, 15)  # noqa: DTZ001 - as Luigi has it
LOCAL = "--local-scheduler"
KEYS = 12

CRASH = """
import os, signal
from headrace import faults

def end(step):
    if step == os.environ["END_AT"]:
        os.killpg(0, signal.SIGKILL)

if "END_AT" in os.environ:
    faults.hook = end
"""
"""Loaded by Python itself when it starts: the process and all of its group end at a step."""

BREAK: dict[str, Callable[[History], None]] = {
    "different": lambda history: history.force((1, 1, 99)),
    "missing online": lambda history: history.force((1, 1, 1), is_removed=True),
    "stale": lambda history: history.force((1, -5, 1), is_older=True),
    "ahead": lambda history: history.write((1, 500, 7)),
    "missing offline": lambda history: history.write((77, 1, 7)),
}
BACKWARD = {"ahead", "missing offline"}


@pytest.fixture(params=["sqlite", "valkey"])
def stores(request: pytest.FixtureRequest, place: Place) -> Place:
    """The place with each of the online stores."""
    if request.param == "valkey":
        databases: Iterator[int] = request.getfixturevalue("valkey_databases")
        use_valkey(place.repo, request.getfixturevalue("valkey"), next(databases))
    return place


def filled(place: Place, view: str) -> History:
    """A view with some appends in both stores."""
    history = History.of(place, view)
    for key in range(KEYS):
        history.stream((key, key, key))
    return history


def left(place: Place, view: str, run: str, name: str) -> dict[str, Any]:
    """What a run left, as JSON."""
    content: dict[str, Any] = json.loads((place.root / "data/batch" / view / run / name).read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("kind", list(BREAK))
def test_an_audit_fails_on_each_difference_and_repair_mends_it(
    kind: str, stores: Place, configure: Callable[..., None]
) -> None:
    configure()
    history = filled(stores, "notes")
    BREAK[kind](history)
    assert build(Audit(view="notes", at=AT)) == LuigiStatusCode.FAILED
    run = stores.root / "data/batch/notes/audit=2026-03-10T0815"
    assert without_cache(run) == ["report.html", "report.json"]
    report = left(stores, "notes", run.name, "report.json")
    assert (report["diverged"], report["counts"][kind]) == (1, 1)
    assert set(report["counts"]) == {"equal", kind}
    assert report["examples"][kind][0]["key"] == {"zone": "77" if kind == "missing offline" else "1"}
    command = "luigi --module batch Repair --view notes" + (" --backwards" if kind in BACKWARD else "")
    assert report["repair"] == command
    page = (run / "report.html").read_text(encoding="utf-8")
    assert command in page
    assert "stores differ" in page

    forget()
    assert build(Repair(view="notes", at=AT, backwards=kind in BACKWARD)) == LuigiStatusCode.SUCCESS
    run_of_repair = "repair-backwards=2026-03-10T0815" if kind in BACKWARD else "repair=2026-03-10T0815"
    receipt = left(stores, "notes", run_of_repair, "repair.json")
    assert receipt["before"]["counts"] == report["counts"]
    assert receipt["mended"] == {kind: 1}
    assert receipt["after"] == {"keys": KEYS, "counts": {"equal": KEYS}}

    forget()
    again = Audit(view="notes", at=AT)
    assert not again.complete()
    assert build(again) == LuigiStatusCode.SUCCESS
    assert again.complete()
    assert left(stores, "notes", run.name, "passed.json")["counts"] == {"equal": KEYS}
    assert "stores agree" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_every_view(stores: Place) -> None:
    """Each view differs in its own way; `notes` has no source table, and no source is asked."""
    stores.database.unlink()
    kinds = {"notes": "different", "rides": "missing online", "zones": "stale"}
    for name, kind in kinds.items():
        BREAK[kind](filled(stores, name))
    failed = stores.run("Audit", LOCAL, expect=30)
    for name, kind in kinds.items():
        line = next(line for line in failed.stderr.splitlines() if f": view `{name}`" in line)
        assert re.search(
            rf"1 of {KEYS} keys differ: 1 {kind}; see file://\S+/{name}/audit\S+/report.html; "
            rf"to mend it: luigi --module batch Repair --view {name}$",
            line,
        )
    assert "Traceback" not in failed.stderr
    mended = stores.run("Repair", LOCAL)
    assert mended.stderr.count(": 1 keys mended, 0 still differ") == len(kinds)
    agreed = stores.run("Audit", LOCAL)
    assert agreed.stderr.count(f": {KEYS} keys compared, none differs") == len(kinds)


def test_a_repair_leaves_what_only_online_has_unless_told(here: Place) -> None:
    history = filled(here, "notes")
    BREAK["missing offline"](history)
    assert build(Repair(view="notes", at=AT)) == LuigiStatusCode.SUCCESS
    receipt = left(here, "notes", "repair=2026-03-10T0815", "repair.json")
    assert receipt["after"]["counts"] == {"equal": KEYS, "missing offline": 1}
    assert not Repair(view="notes", at=AT, backwards=True).complete()


def test_a_difference_is_no_reason_to_retry_and_a_store_that_is_away_is(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    luigi.configuration.get_config().set("scheduler", "retry_count", "3")
    BREAK["stale"](filled(here, "notes"))
    tries: list[luigi.Task] = []
    monkeypatch.setattr(Audit, "_event_callbacks", {Audit: {luigi.Event.FAILURE: {lambda task, _: tries.append(task)}}})
    assert build(Audit(view="notes", at=AT)) == LuigiStatusCode.FAILED
    assert len(tries) == 1
    tries.clear()
    for file in (here.root / "data").glob("online.db*"):
        file.unlink()
    (here.root / "data" / "online.db").mkdir()
    assert build(Audit(view="notes", at=LATER)) == LuigiStatusCode.FAILED
    assert len(tries) == 3


def test_a_sample_is_another_each_minute_and_says_what_it_looked_at(here: Place) -> None:
    """What is wrong with one key of twelve is found by the samples that have it, and by no other; repair mends it."""
    BREAK["stale"](filled(here, "notes"))
    found: dict[bool, int] = {True: 0, False: 0}
    for minute in range(24):
        at = AT + timedelta(minutes=minute)
        done = build(Audit(view="notes", at=at, sample=0.25)) == LuigiStatusCode.SUCCESS
        run = f"audit-sample-0.25={at:%Y-%m-%dT%H%M}"
        report = left(here, "notes", run, "report.json")
        assert report["sample"] == 0.25
        assert (report["diverged"] == 0) == done
        assert report["keys_compared"] == sum(report["counts"].values()) < KEYS
        page = (here.root / "data/batch/notes" / run / "report.html").read_text(encoding="utf-8")
        assert "<dt>share of all keys in the sample</dt><dd>0.25</dd>" in page
        assert ("luigi --module batch Repair --view notes" in page) != done
        if done:
            assert left(here, "notes", run, "passed.json")["sample"] == 0.25
        found[done] += 1
    assert all(found.values())
    forget()
    assert not Audit(view="notes", at=AT).complete()
    assert build(Repair(view="notes", at=AT), Audit(view="notes", at=AT)) == LuigiStatusCode.SUCCESS
    assert left(here, "notes", "audit=2026-03-10T0815", "passed.json")["sample"] == 1


def test_the_command_says_that_it_was_a_sample_and_the_metrics_tell_it_from_all(place: Place) -> None:
    filled(place, "notes")
    at = ("--view", "notes", "--at", "2026-03-10T0815", LOCAL)
    sampled = place.run("Audit", *at, "--sample", "0.50")
    keys = left(place, "notes", "audit-sample-0.5=2026-03-10T0815", "passed.json")["keys"]
    assert f"view `notes`: {keys} keys of a sample (0.5 of all) compared, none differs" in sampled.stderr
    assert place.run("Audit", *at, "--sample", "0.5").stderr.count("compared, none differs") == 0  # it is complete
    text = (place.root / "data/batch/history/headrace_batch.prom").read_text(encoding="utf-8")
    assert f'headrace_batch_last_rows{{sample="0.5",task="Audit",view="notes"}} {keys}.0' in text
    assert 'sample="",task="Audit"' not in text
    place.run("Audit", *at)
    text = (place.root / "data/batch/history/headrace_batch.prom").read_text(encoding="utf-8")
    assert f'headrace_batch_last_rows{{sample="",task="Audit",view="notes"}} {KEYS}.0' in text


@pytest.mark.parametrize("share", ["0", "-0.1", "1.01", "nan", "inf", "1%", ""])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match=rf"--sample '{share}': expected a share of the keys above 0 and at most 1"):
        ShareParameter().parse(share)  # type: ignore[attr-defined]


def test_two_compactions_at_once_are_one(place: Place) -> None:
    history = filled(place, "notes")
    before, rows = history.files(), history.offline()
    at = ("Compact", "--at", "2026-03-10T0815", LOCAL)
    both = [
        subprocess.Popen(
            place.command(*arguments),
            cwd=place.root,
            env=place.environment(compact_grace_s=0),
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in (at, (*at, "--view", "notes"))
    ]
    said = "".join(process.communicate(timeout=120)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert said.count("view `notes`: ") == 1
    assert f"view `notes`: {before - 1} files merged" in said
    assert said.count("view `rides`: nothing to merge or to remove") == 1
    assert history.files() == 2
    assert history.offline() == rows
    receipt = left(place, "notes", "compact=2026-03-10T0815", "compact.json")
    assert receipt["chains"]["stream-events-0-0"]["files_after"] == 2


def test_retention_removes_what_is_older_than_the_tag_allows(here: Place, configure: Callable[..., None]) -> None:
    """`notes` is tagged, `zones` is not."""
    history, other = filled(here, "notes"), filled(here, "zones")
    recent = time.time_ns() // 1000 - EPOCH_US
    history.stream((100, recent, 1))
    history.stream((101, recent, 1))
    kept = [row for row in history.offline() if row["zone"] in {"100", "101"}]
    assert build(Retain(at=now(), dry_run=True)) == LuigiStatusCode.SUCCESS
    assert len(history.offline()) == KEYS + 2
    done = here.run("Retain", LOCAL)
    assert re.search(rf"view `notes`: before [-\d: ]+: {KEYS} rows of {KEYS} files are gone", done.stderr)
    assert "view `zones`: everything is kept: the view has no tag `retain_days`" in done.stderr
    assert history.offline() == kept
    assert len(other.offline()) == KEYS
    configure(compact_grace_s=0)
    assert build(Compact(view="notes", at=AT), Audit(view="notes", at=AT)) == LuigiStatusCode.SUCCESS
    assert history.files() == 3  # one that says what went, and those of the two rows
    assert history.offline() == kept
    assert left(here, "notes", "audit=2026-03-10T0815", "passed.json")["counts"] == {"equal": 2, "retired": KEYS}


@pytest.mark.parametrize(("task", "step"), [("Compact", "compact.3.linked"), ("Repair", "repair.2.chunk mended")])
def test_a_task_that_was_killed_is_done_by_the_next(task: str, step: str, place: Place) -> None:
    history = filled(place, "notes")
    rows = history.offline()
    BREAK["different"](history)
    (place.root / "sitecustomize.py").write_text(CRASH, encoding="utf-8")
    command = (task, "--view", "notes", "--at", "2026-03-10T0815", LOCAL)
    environment = place.environment(compact_grace_s=0)
    environment["PYTHONPATH"] += f":{place.root}"
    killed = subprocess.run(
        place.command(*command),
        cwd=place.root,
        env={**environment, "END_AT": step},
        capture_output=True,
        check=False,
        timeout=120,
        start_new_session=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    receipt = place.root / f"data/batch/notes/{task.lower()}=2026-03-10T0815/{task.lower()}.json"
    assert not receipt.exists()
    place.run(*command, compact_grace_s=0)
    assert receipt.exists()
    assert history.offline() == rows
    if task == "Compact":
        assert history.files() == 2
    else:
        assert json.loads(receipt.read_text(encoding="utf-8"))["after"]["counts"] == {"equal": KEYS}


def test_a_run_is_complete_and_the_next_minute_is_another(here: Place) -> None:
    filled(here, "notes")
    assert build(Compact(view="notes", at=AT)) == LuigiStatusCode.SUCCESS
    forget()
    assert Compact(view="notes", at=AT).complete()
    assert not Compact(view="notes", at=LATER).complete()


def test_what_cannot_be_done_is_refused_before_anything_starts(here: Place) -> None:
    future = datetime.now(UTC).replace(tzinfo=None, year=2999)
    with pytest.raises(ConfigError, match=r"--at 2999-\S+ has not come yet: it is "):
        Audit(view="notes", at=future).complete()
    with pytest.raises(ConfigError, match=r"unknown feature view `nope`; the registry has: notes, rides, zones"):
        Audit(view="nope", at=AT).complete()
    with pytest.raises(ConfigError, match=r"--at 'noon': expected a minute, UTC, such as 2026-01-31T0815"):
        MinuteParameter().parse("noon")  # type: ignore[attr-defined]
    assert not (here.root / "data" / "batch").exists()


@pytest.mark.parametrize("days", ["0", "-1", "1.5", "ten", "", "100000"])
def test_a_tag_that_is_no_number_of_days_is_refused(days: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`stats`: tag retain_days='.*' is no whole number of days from 1 to 99999"):
        ViewContract.from_feast(view(tags={"retain_days": days})[1], config(tmp_path))
    assert ViewContract.from_feast(view(tags={"retain_days": "90"})[1], config(tmp_path)).retain_days == 90


def test_the_page_of_the_scheduler_has_the_report_and_what_came_of_it(here: Place) -> None:
    BREAK["stale"](filled(here, "notes"))
    failed, done = Audit(view="notes", at=AT), Compact(view="notes", at=AT)
    scheduler = Scheduler()
    with Worker(scheduler=scheduler, worker_id="here") as worker:
        worker.add(failed)
        worker.add(done)
        worker.run()
    tasks = scheduler.task_list("", "")
    report = here.root / "data/batch/notes/audit=2026-03-10T0815/report.html"
    assert tasks[failed.task_id]["tracking_url"] == report.as_uri()
    message = scheduler.get_task_status_message(failed.task_id)["statusMessage"]
    assert message.startswith(f"view `notes`: 1 of {KEYS} keys differ: 1 stale; see file:")
    assert scheduler.get_task_progress_percentage(done.task_id)["progressPercentage"] == 100
    message = scheduler.get_task_status_message(done.task_id)["statusMessage"]
    assert message == f"{KEYS - 1} files merged, 0 removed; {KEYS} files of chains before, {KEYS + 1} after"
