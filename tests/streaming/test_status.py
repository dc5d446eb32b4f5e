"""The status page in a real browser, of a real worker on a real Kafka: idle, busy, lagging, broken, gone."""

from __future__ import annotations

import json
import re
import urllib.request
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
from confluent_kafka import Producer
from playwright.sync_api import Page, expect

from headrace.repository import open_store
from headrace.runs import Run
from tests.servers import Browser, Mode
from tests.servers.browser import inaccessible
from tests.streaming.conftest import Network, Stream, StreamFactory
from tests.streaming.process import Worker, emit

HOSTILE = [
    b"<script>document.title = 'taken'</script><img src=http://evil.example/x onerror=alert(1)>",
    "\u202egnp.exe\u200f\u0000\u001b[31m".encode(),
    b"\xff\xfe\x00</bdi></table><h1>taken</h1>",
    b'{"driver_id": ' + b"9" * 300_000 + b"}",
    b'{"driver_id": 1, "conv_rate": "</td><style>*{display:none}</style>", "datetime": "2026-01-01 00:00:00"}',
]


def expect_within(stream: Stream, online_s: int, offline_s: int) -> None:
    """Objectives that a machine with much else to do meets."""
    store = open_store(stream.repo)
    view = store.get_feature_view("driver_stats")
    view.tags |= {"online_within_s": str(online_s), "offline_within_s": str(offline_s)}
    store.apply([view])


def status(worker: Worker) -> dict[str, Any]:
    code, body = worker.get("/status.json")
    assert code == 200
    found: dict[str, Any] = json.loads(body)
    return found


def ask_as(worker: Worker, path: str, host: str) -> tuple[int, str]:
    """What a worker answers to whom its name led there."""
    connection = HTTPConnection("127.0.0.1", worker.port, timeout=20)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def record_runs(stream: Stream) -> None:
    """Runs as the batch chain records them: a closed gate with a report, and an audit."""
    now = datetime.now(UTC)
    folder = stream.repo.parent / "data" / "batch" / "history" / f"day={now.date()}"
    folder.mkdir(parents=True)
    about = {"task_id": "x", "start": now, "end": now, "host": "etl", "pid": 1, "parent_pid": 1, "attempt": 1}
    parameters = {"view": "driver_stats", "date": "2026-01-31"}
    runs = [
        Run(task="Audit", outcome="done", parameters=parameters, versions={}, **about),
        Run(
            task="ExploreAndValidate",
            outcome="failed",
            error="GateClosedError: <b>closed</b>",
            report="driver_stats/day=2026-01-31/report.html",
            parameters=parameters,
            versions={},
            **about,
        ),
    ]
    for number, run in enumerate(runs):
        (folder / f"{number}.json").write_bytes(msgspec.json.encode(run))


def test_the_page_tells_how_it_goes_and_stays_live(
    make_stream: StreamFactory, network: Network, browser: Browser, tmp_path: Path
) -> None:
    stream = make_stream(network=network, report_url="http://127.0.0.1:9/reports")
    expect_within(stream, 6, 30)
    expect.set_options(timeout=20_000)
    with Worker(stream.environment, tmp_path / "log") as worker:
        worker.start().wait_ready()
        url = f"http://127.0.0.1:{worker.port}/"
        page = browser.page()
        page.goto(url)

        # Idle.
        expect(page.locator(".state")).to_have_text("✓ ready")
        expect(page).to_have_title(re.compile("^Ready: Headrace worker"))
        expect(page.locator(".verdict").first).to_have_text("no events")
        expect(page.locator("section:has(#batch)")).to_contain_text("No batch chain has run in")
        assert inaccessible(page) == []

        # Busy, without a reload: what was unfolded or folded by hand stays so.
        page.evaluate("window.isSame = true")
        page.locator("summary").first.click()
        record_runs(stream)
        emit(stream.environment, count=400)
        expect(page.locator(".verdict").first).to_have_text("✓ met")
        expect(page.locator("#page")).to_contain_text("lag 0")
        assert page.evaluate("window.isSame && !document.querySelector('details').open")
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        ends = stream.ends()
        expect(page.locator("details tbody tr")).to_have_count(4)
        cells = page.locator("details tbody tr").first.locator("th, td").all_inner_texts()
        assert cells == ["0", "0", str(ends[0]), str(ends[0]), "this worker"]
        expect(page.locator("section:has(#batch)")).to_contain_text("✗ gate closed", timeout=30_000)
        expect(page.locator("section:has(#batch)")).to_contain_text("✓ stores agree")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        expect(page.locator("section:has(#batch)")).to_contain_text("GateClosedError: <b>closed</b>")
        link = "http://127.0.0.1:9/reports/driver_stats/day=2026-01-31/report.html"
        assert page.locator("section:has(#batch) a").first.get_attribute("href") == link

        # Dead letters, hostile ones.
        producer = Producer({"bootstrap.servers": stream.broker})
        for value in HOSTILE:
            producer.produce(stream.topic, value, partition=0)
        producer.flush()
        expect(page.locator(".letters tbody tr")).to_have_count(len(HOSTILE), timeout=40_000)
        text = page.locator(".letters").inner_text()
        assert "<script>document.title = 'taken'</script>" in text
        assert "\\u202egnp.exe\\u200f\\x00\\x1b[31m" in text
        assert "\\xff\\xfe\\x00</bdi></table>" in text
        assert "300,015 bytes" in text
        assert page.locator("h1").count() == 1
        assert page.title().startswith("Ready")
        assert inaccessible(page) == []
        assert is_narrow(browser, url)

        # The store is away: events wait, and the page says so, and since when.
        network.store.set(Mode.CUT)
        emit(stream.environment, count=400, seed=2)
        expect(page.locator(".state")).to_have_text("✗ not ready")
        expect(page.locator(".faults")).to_contain_text("step online fails")
        expect(page.locator(".verdict").first).to_contain_text("✗ missed")
        expect(page.locator(".verdict").first).to_contain_text("an event has waited")
        assert sum(row["lag"] for row in status(worker)["partitions"]["values"]) == 400
        assert inaccessible(page) == []
        network.store.set(Mode.OPEN)
        worker.wait_ready()
        expect(page.locator(".state")).to_have_text("✓ ready")
        assert page.evaluate("window.isSame")
        assert browser.problems == []

        # The worker is killed.
        worker.kill()
        expect(page.locator("#silence")).to_contain_text("has not answered since 20")
        expect(page).to_have_title(re.compile("^No answer: Headrace worker"))
        assert page.evaluate("getComputedStyle(document.querySelector('h2'), '::after').content") == '" (old)"'
        assert inaccessible(page) == []


def is_narrow(browser: Browser, url: str) -> bool:
    """Whether the page fits a phone, in the dark."""
    page: Page = browser.page(width=360, height=740, color_scheme="dark")
    page.goto(url)
    assert inaccessible(page) == []
    width: int = page.evaluate("document.documentElement.scrollWidth")
    page.context.close()
    return width == 360


def test_partitions_of_every_worker_are_told_and_so_is_a_broker_that_does_not_answer(
    make_stream: StreamFactory, network: Network, tmp_path: Path
) -> None:
    stream = make_stream(network=network)
    with Worker(stream.environment, tmp_path / "log1") as one, Worker(stream.environment, tmp_path / "log2") as two:
        for worker in (one, two):
            worker.start()
        for worker in (one, two):
            worker.wait_ready()
            worker.wait(lambda worker=worker: len(worker.state().get("partitions", [])) == 2, 60, "shared")  # type: ignore[misc]
        emit(stream.environment, count=400)
        ends = stream.ends()
        for worker in (one, two):

            def told(worker: Worker = worker) -> bool:
                found = status(worker)
                rows = found["partitions"]["values"]
                owners = [row["owner"] for row in rows]
                return (
                    {row["partition"]: row["ledger_end"] for row in rows} == ends
                    and {row["partition"]: row["log_end"] for row in rows} == ends
                    and all(row["lag"] == 0 for row in rows)
                    and owners.count("this worker") == 2
                    and all(owners)
                    and (found["worker"]["workers"], found["worker"]["group_state"]) == (2, "stable")
                )

            worker.wait(told, 40, "told")
        with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/") as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "Set-Cookie" not in answer.headers
            body = answer.read().decode()
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?! src=\"status.js\")|<style| style=| on\w+=", body)
        for host, code in {f"LOCALHOST:{one.port}": 200, "[::1]": 200, "worker": 200, "evil.example": 421}.items():
            assert ask_as(one, "/", host)[0] == ask_as(one, "/status.json", host)[0] == code, host
        refusal = ask_as(one, "/status.json", f"evil.example:{one.port}")[1]
        assert "localhost" in refusal
        assert "evil.example" in refusal
        assert "lag" not in refusal
        network.broker.set(Mode.STALLED)
        one.wait(lambda: status(one)["partitions"]["not_known_since"] is not None, 40, "not known")
        found = status(one)["partitions"]
        assert found["as_of"] == found["not_known_since"]
        assert found["why"]
        assert len(found["values"]) == 4
