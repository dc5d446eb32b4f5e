"""What ran: the ledger, History, the metrics file, the webhook. The chain is run by its literal command line."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import pytest
from luigi.execution_summary import LuigiStatusCode
from prometheus_client.parser import text_string_to_metric_families

from batch import Clean, Ingest, Materialize, history, metrics, notice
from batch.ledger import Ledger
from batch.recording import in_one_line
from headrace.errors import ConfigError
from headrace.runs import Outcome, Run
from tests.batch.place import GOOD, D, Place, build, good_rides, place_in, zone_rows

STEPS = ["Ingest", "Clean", "ExploreAndValidate", "OfflineStore", "Materialize"]
ALONE = {"reread_days": 0}


@dataclass
class Hook:
    """A webhook that ran: where, and what it was told."""

    url: str
    told: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def two_ran(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Hook]:
    """A place where the chains of two views ran at once: of `zones` well, of `rides` to a closed gate."""
    place = place_in(tmp_path_factory.mktemp("two") / "place", template)
    place.insert("zones", zone_rows(D))
    place.insert("rides", [{**GOOD, "stops": -1}])
    with webhook() as hook:
        settings = {"batch_webhook_url": hook.url, "report_url": "http://reports.example/r"}
        with (
            started(place, "Materialize", "--view", "zones", "--date", str(D), **settings) as good,
            started(place, "Materialize", "--view", "rides", "--date", str(D), **settings) as bad,
        ):
            assert (good.wait(100), bad.wait(100)) == (0, 30)
    return place, hook


def test_a_chain_that_ran_is_recorded(two_ran: tuple[Place, Hook]) -> None:
    place, _ = two_ran
    runs = recorded(place, "zones")
    rows = [3, 2, None, 2, 2]  # one is skipped
    assert [(run.task, run.outcome, run.rows) for run in runs] == [
        (task, "done", count) for task, count in zip(STEPS, rows, strict=True)
    ]
    for run in runs:
        assert (run.parameters["date"], run.attempt, run.error) == (str(D), 1, None)
        assert run.end is not None
        assert 0 <= (datetime.now(UTC) - run.end).total_seconds() < 300
        assert run.start < run.end
        assert run.pid != run.parent_pid
        assert set(run.versions) == {"headrace", "feast", "luigi"}
    place.run("Materialize", "--view", "zones", "--date", str(D), "--local-scheduler", **ALONE)
    assert recorded(place, "zones") == runs  # complete: nothing ran


def test_a_closed_gate_is_recorded_and_told_once(two_ran: tuple[Place, Hook]) -> None:
    place, hook = two_ran
    runs = recorded(place, "rides")
    assert [(run.task, run.outcome) for run in runs] == list(zip(STEPS[:3], ["done", "done", "failed"], strict=True))
    assert runs[-1].error is not None
    assert runs[-1].error.startswith(f"GateClosedError: the gate is closed for view `rides`, {D}: ")
    assert hook.told == [
        {
            "task": "ExploreAndValidate",
            "view": "rides",
            "date": str(D),
            "outcome": "failed",
            "error": runs[-1].error,
            "attempt": 1,
            "start": runs[-1].start.isoformat(),
            "host": runs[-1].host,
            "report": f"http://reports.example/r/rides/run={D}/day={D}/report.html",
        }
    ]


def test_history_shows_what_ran_each_time(two_ran: tuple[Place, Hook]) -> None:
    place, _ = two_ran
    folder = ledger(place).folder / f"day={recorded(place)[0].start.date()}"
    (folder / "9-torn.json").write_text('{"task": "Ing', encoding="utf-8")
    (folder / "9-other.json").write_text('{"task": "Ingest"}', encoding="utf-8")
    for _ in range(2):
        shown = place.run("History", "--view", "zones", "--local-scheduler").stdout
        assert re.findall(rf"^[\d-]+ [\d:]+ +(\w+) +zones +{D} +done ", shown, re.MULTILINE) == STEPS  # newest last
    page = place.root / "data" / "batch" / "history.html"
    assert page.as_uri() in shown
    links = re.findall(r'href="([^"]+)"', page.read_text(encoding="utf-8"))
    assert len(links) == 2  # those that ran once the report was there
    assert all((page.parent / unquote(link)).is_file() for link in links)
    assert "No runs." in place.run("History", "--view", "notes", "--local-scheduler").stdout


def test_what_ran_is_measured(two_ran: tuple[Place, Hook]) -> None:
    place, _ = two_ran
    found = measured(place)
    assert {key[1:]: value for key, value in found.items() if key[0] == "headrace_batch_runs_total"} == {
        **{(task, "zones", "done"): 1 for task in STEPS},
        **{(task, "rides", "done"): 1 for task in STEPS[:2]},
        ("ExploreAndValidate", "rides", "failed"): 1,
    }
    last = recorded(place, "zones")[-1]
    assert last.end is not None
    name = ("Materialize", "zones", None)
    assert found["headrace_batch_last_success_timestamp_seconds", *name] == pytest.approx(last.end.timestamp())
    assert found["headrace_batch_last_duration_seconds", *name] == last.duration_s
    assert found["headrace_batch_last_rows", *name] == 2
    assert ("headrace_batch_last_success_timestamp_seconds", "ExploreAndValidate", "rides", None) not in found


def test_what_cannot_be_done_is_told_and_was_no_run(here: Place, configure: Callable[..., None]) -> None:
    with webhook() as hook:
        configure(batch_webhook_url=hook.url)
        assert build(Materialize(view="nope", date=D)) == LuigiStatusCode.SCHEDULING_FAILED
    assert [(told["outcome"], told["view"]) for told in hook.told] == [("refused", "nope")]
    assert hook.told[0]["error"].startswith("ConfigError: unknown feature view `nope`")
    assert not recorded(here)


def test_killed_with_its_luigi_it_is_killed_and_the_next_try_is_the_second(here: Place) -> None:
    here.insert("zones", zone_rows(D))
    with started(here, "Materialize", "--view", "zones", "--date", str(D), sleep_s=60) as process:
        running = wait_for(lambda: [run for run in recorded(here) if run.task == "Clean"])
        assert running[0].outcome is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shown = here.run("History", "--local-scheduler").stdout
    assert re.findall(r"(Ingest|Clean).* (done|running|killed)", shown) == [("Ingest", "done"), ("Clean", "killed")]

    assert build(Clean(view="zones", date=D)) == LuigiStatusCode.SUCCESS
    assert [(run.task, run.outcome, run.attempt) for run in recorded(here)[1:]] == [
        ("Clean", "killed", 1),
        ("Clean", "done", 2),
    ]
    found = measured(here)
    assert found["headrace_batch_runs_total", "Clean", "zones", "killed"] == 1
    assert found["headrace_batch_runs_total", "Clean", "zones", "done"] == 1


def test_a_task_whose_process_dies_is_killed_and_told(place: Place) -> None:
    place.insert("zones", zone_rows(D))
    with webhook() as hook:
        options = ("--view", "zones", "--date", str(D), "--scheduler-retry-count", "1")
        with started(place, "Clean", *options, sleep_s=60, batch_webhook_url=hook.url) as process:
            running = wait_for(lambda: [run for run in recorded(place) if run.task == "Clean"])
            os.kill(running[0].pid, signal.SIGKILL)
            assert process.wait(60) == 30
    run = recorded(place)[-1]
    assert (run.outcome, run.attempt, run.is_final) == ("killed", 1, True)
    assert run.error is not None
    assert run.error.endswith("died unexpectedly with exit code -9")
    assert [(told["outcome"], told["error"]) for told in hook.told] == [("killed", run.error)]


def test_no_run_is_lost_among_many_that_end_together(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_run_many, [tmp_path] * 4))
    assert len(Ledger(tmp_path).runs(1, datetime.now(UTC))) == 80
    assert _values(tmp_path / metrics.FILE)["headrace_batch_runs_total", "Ingest", "rides", "done"] == 80


def test_only_the_last_failure_is_told(
    here: Place, configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ingest, "retry_count", 3)
    with webhook() as hook:
        configure(batch_webhook_url=hook.url)
        monkeypatch.setattr(Ingest, "work", _broken)
        assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.FAILED
    assert [(run.attempt, run.is_final, run.error) for run in recorded(here)] == [
        (attempt, attempt == 3, "OSError: no route") for attempt in (1, 2, 3)
    ]
    assert [told["attempt"] for told in hook.told] == [3]


def test_a_ledger_that_cannot_be_written_fails_no_task(here: Place, caplog: pytest.LogCaptureFixture) -> None:
    here.insert("rides", good_rides(D))
    folder = here.root / "data" / "batch" / "history"
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way", encoding="utf-8")
    assert build(Ingest(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    assert f"the run ledger in {folder} cannot be written: Not a directory" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("answer", "found"),
    [(500, "HTTP 500"), (302, "HTTP 302"), ("hang", "ReadTimeout"), ("refuse", "ConnectionError"), (204, None)],
)
def test_a_webhook_that_fails_is_logged_once_and_hides_its_url(
    answer: int | str, found: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "TIMEOUT_S", 0.3)
    caplog.set_level(logging.DEBUG)
    with webhook(answer) as hook:
        url = hook.url
        if answer != "refuse":
            notice.post(url, {"task": "Ingest"})
    if answer == "refuse":
        notice.post(url, {"task": "Ingest"})
    wanted = [] if found is None else [f"no notice of the failure reached the webhook at 127.0.0.1: {found}"]
    assert [record.getMessage() for record in caplog.records] == wanted


@pytest.mark.parametrize("url", ["hooks.example/s3cret", "file:///s3cret", "https:///s3cret"])
def test_a_webhook_is_a_url(url: str, here: Place, configure: Callable[..., None]) -> None:
    assert here.repo.is_dir()
    configure(batch_webhook_url=url)
    with pytest.raises(ConfigError, match=r"HEADRACE_BATCH_WEBHOOK_URL .*expected a URL that begins with") as raised:
        Materialize(view="rides", date=D).complete()
    assert "s3cret" not in str(raised.value)


def test_an_error_is_one_line_without_secrets_and_controls(here: Place, configure: Callable[..., None]) -> None:
    assert here.repo.is_dir()
    url = "postgresql://etl:p%40ss@db/x"
    configure(source_url=url, batch_webhook_url="https://hooks.example/s3cret")
    assert in_one_line(OSError(f"\nno {url}, p@ss, p%40ss\x1b[31m\nmore")) == "OSError: no ***, ***, *** [31m"
    assert in_one_line(OSError("at https://hooks.example/s3cret")) == "OSError: at ***"
    assert in_one_line(OSError("at http://me:s3cret@luigid:8082/a@b")) == "OSError: at http://***@luigid:8082/a@b"
    assert in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line(ValueError("x" * 10_000))) == 500


def test_a_page_escapes_what_it_shows(tmp_path: Path) -> None:
    error = "<script>alert(1)</script>"
    run = msgspec.structs.replace(a_run(), outcome="failed", error=error, report="a%20b/report.html")
    history.write_page(tmp_path / "history.html", [run], days=1, view="<b>", now=run.start)
    page = (tmp_path / "history.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'href="a%2520b/report.html"' in page
    assert not re.search(r"(src|href)=.?(https?:)?//", page)


@pytest.mark.parametrize(
    ("duration_s", "text"), [(None, ""), (0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 m 00 s"), (7322, "2 h 02 m")]
)
def test_a_duration_is_short(duration_s: float | None, text: str) -> None:
    assert history.seconds(duration_s) == text


def test_history_goes_back_by_days_and_shows_what_a_task_was_for(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    for back, parameters in ((0, {"date": f"{D}", "run_date": "2026-03-12"}), (2, {"at": "12:00"})):
        run = msgspec.structs.replace(a_run(), start=now - timedelta(days=back), parameters=parameters)
        Ledger(tmp_path).entry(run).close(run)
    assert [history.subject(run) for run in Ledger(tmp_path).runs(3, now)] == ["at 12:00", f"{D} (run 2026-03-12)"]
    assert len(Ledger(tmp_path).runs(2, now)) == 1


def test_history_needs_a_day_and_a_repository(place: Place) -> None:
    done = place.run("History", "--days", "0", "--local-scheduler", expect=30)
    assert "--days 0: expected 1 or more" in done.stderr
    done = place.run("History", "--local-scheduler", expect=30, feature_repo=place.root / "nowhere" / "repo")
    assert "set HEADRACE_FEATURE_REPO" in done.stderr
    assert not (place.root / "nowhere").exists()


@pytest.mark.parametrize(
    "content", ["headrace_batch_runs_total{task=", "other 1\n", "headrace_batch_runs_total 1\n", ""]
)
def test_a_torn_metrics_file_is_made_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    path.write_text(content, encoding="utf-8")
    run = msgspec.structs.replace(a_run(), outcome="failed")
    metrics.count(path, run)
    assert _values(path) == {
        ("headrace_batch_runs_total", "Ingest", "rides", "failed"): 1,
        ("headrace_batch_failure_timestamp_seconds", "Ingest", "rides", None): run.start.timestamp(),
    }


def test_a_day_that_was_read_again_is_not_the_last_success(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    run = msgspec.structs.replace(a_run(), outcome="done", end=datetime.now(UTC), rows=7)
    metrics.count(path, run)
    again = {**run.parameters, "run_date": "2026-03-12"}
    metrics.count(path, msgspec.structs.replace(run, rows=0, parameters=again))
    found = _values(path)
    assert found["headrace_batch_last_rows", "Ingest", "rides", None] == 7
    assert found["headrace_batch_runs_total", "Ingest", "rides", "done"] == 2


def test_a_failure_is_told_of_until_the_same_day_is_done(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    now = datetime.now(UTC)
    ends: dict[str, Outcome] = {"2026-03-10": "failed", "2026-03-11": "killed"}
    for day, outcome in ends.items():
        parameters = {**a_run().parameters, "date": day, "run_date": "2026-03-11"}
        metrics.count(path, msgspec.structs.replace(a_run(), outcome=outcome, end=now, parameters=parameters))
    assert _failing(path) == {"2026-03-10": now.timestamp(), "2026-03-11": now.timestamp()}
    parameters = {**a_run().parameters, "date": "2026-03-10", "run_date": "2026-03-14"}
    metrics.count(path, msgspec.structs.replace(a_run(), outcome="done", end=now, parameters=parameters))
    assert _failing(path) == {"2026-03-11": now.timestamp()}


def test_diverged_keys_stay_until_all_were_compared_or_mended(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE

    def after(task: str, outcome: Outcome, diverged: int | None = None, sample: str = "1") -> float:
        parameters = {"view": "rides", "at": "2026-03-10T0815", **({"sample": sample} if task == "Audit" else {})}
        run = msgspec.structs.replace(a_run(), task=task, outcome=outcome, parameters=parameters)
        metrics.count(path, run, diverged=diverged)
        return _values(path).get(("headrace_batch_audit_diverged_keys", None, "rides", None), -1)

    assert after("Audit", "failed") == -1
    assert after("Audit", "done", sample="0.01") == 0
    assert after("Audit", "failed", 3, sample="0.01") == 3
    assert after("Audit", "done", sample="0.01") == 3
    assert after("Audit", "failed") == 3
    assert after("Repair", "done") == 0
    assert after("Audit", "failed", 5) == 5
    assert after("Audit", "done") == 0


def _failing(path: Path) -> dict[str, float]:
    return {
        sample.labels["date"]: sample.value
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8"))
        for sample in family.samples
        if sample.name == "headrace_batch_failure_timestamp_seconds"
    }


@contextmanager
def webhook(answer: int | str = 200) -> Iterator[Hook]:
    """A real HTTP server on the loopback; its path is a secret."""
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/json"
            hook.told.append(json.loads(body))
            if answer == "hang":
                done.wait(10)
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hook = Hook(f"http://127.0.0.1:{server.server_port}/s3cret")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hook
        finally:
            done.set()
            server.shutdown()
            thread.join()


@contextmanager
def started(
    place: Place, *arguments: str, sleep_s: object = 0, **settings: object
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, which does not outlive the test."""
    process = subprocess.Popen(
        place.command(*arguments, "--local-scheduler"),
        cwd=place.root,
        env=place.environment(**ALONE, **settings) | {"TRANSFORM_SLEEP_S": str(sleep_s)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(found: Callable[[], list[Run]], timeout_s: float = 60) -> list[Run]:
    """Wait until there is some."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        runs = found()
        if runs:
            return runs
        time.sleep(0.05)
    raise AssertionError("nothing came")


def ledger(place: Place) -> Ledger:
    return Ledger(place.root / "data" / "batch" / "history")


def recorded(place: Place, view: str = "") -> list[Run]:
    return [run for run in ledger(place).runs(2, datetime.now(UTC)) if view in {"", run.view}]


def measured(place: Place) -> dict[tuple[str, str | None, str, str | None], float]:
    return _values(ledger(place).folder / metrics.FILE)


def _values(path: Path) -> dict[tuple[str, str | None, str, str | None], float]:
    """By name, task, view and outcome."""
    return {
        (sample.name, sample.labels.get("task"), sample.labels["view"], sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8"))
        for sample in family.samples
    }


def a_run() -> Run:
    return Run(
        task="Ingest",
        task_id="Ingest_1",
        parameters={"view": "rides", "date": str(D), "run_date": str(D)},
        start=datetime.now(UTC),
        host="here",
        pid=1,
        parent_pid=1,
        attempt=1,
        versions={},
    )


def _run_many(folder: Path) -> None:
    for _ in range(20):
        entry = Ledger(folder).entry(a_run())
        entry.open()
        run = msgspec.structs.replace(entry.run, outcome="done", end=datetime.now(UTC))
        entry.close(run)
        metrics.count(folder / metrics.FILE, run)


def _broken(_: Ingest) -> dict[str, Any]:
    raise OSError("no route")
