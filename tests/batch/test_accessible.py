"""The pages of the batch chain in a real browser: axe finds nothing serious, light and dark, and a phone shows them."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from batch.audit_report import write_audit
from batch.history import write_page
from headrace.audit import Audit, Example, Kind
from headrace.runs import Run
from headrace.sample import Sample
from tests.batch.days import D, Days
from tests.batch.test_report import HOSTILE, MIXED, mixed_rows
from tests.servers import Browser
from tests.servers.browser import inaccessible

NOW = datetime(2026, 3, 11, 5, tzinfo=UTC)


def pages(folder: Path) -> dict[str, Path]:
    """One of each kind, with as much on it as there can be."""
    days = Days.of(folder, MIXED)
    day = D - timedelta(days=1)
    days.look_at(mixed_rows(40, day=day), day)
    days.publish(day)
    rows = mixed_rows(40)
    days.look_at([*rows, *({**rows[n], "id": 100 + n, "text": text, "number": 1e9} for n, text in enumerate(HOSTILE))])
    about: dict[str, Any] = {"host": "etl", "pid": 1, "parent_pid": 1, "attempt": 2, "versions": {}, "task_id": "x"}
    runs = [
        Run(task="Clean", parameters={"view": "v", "date": "2026-03-10"}, start=NOW, end=NOW, outcome=outcome, **about)
        for outcome in ("done", "failed", "killed", None)
    ]
    runs.append(Run(task="Audit", parameters={"view": "v"}, start=NOW, report="r.html", error="why", **about))
    write_page(folder / "history.html", runs, days=7, view="v", now=NOW)
    example = Example({"id": 1}, {"x": 1.0}, {"x": 2.0}, NOW, NOW)
    found = Audit("v", NOW, Sample(0.5, 0), 9, Counter({Kind.EQUAL: 8, Kind.STALE: 1}), {Kind.STALE: [example]}, 0.1)
    (folder / "audit").mkdir()
    write_audit(found, "project", folder / "audit")
    return {
        "report": days.folder(D).report,
        "rejects": days.folder(D).rejects_page,
        "history": folder / "history.html",
        "audit": folder / "audit" / "report.html",
    }


def test_the_pages_are_for_everybody(browser: Browser, tmp_path: Path) -> None:
    light, dark = browser.page(), browser.page(width=360, height=740, color_scheme="dark")
    for name, path in pages(tmp_path).items():
        for page in (light, dark):
            page.goto(path.as_uri())
            assert inaccessible(page) == [], name
            assert page.locator("main, header, h1").count() == 3, name
        width, most = dark.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= most, name
    assert browser.problems == []
