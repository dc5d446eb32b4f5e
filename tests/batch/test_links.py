"""The links of the scheduler's pages lead to the reports, in a real browser, and to nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch.settings import BatchSettings
from batch.tasks import report_url
from headrace.errors import ConfigError
from headrace.settings import load
from tests.batch.place import Place, good_rides
from tests.servers import Browser, UnavailableError, free_port
from tests.servers.browser import inaccessible
from tests.servers.luigi import Luigid, Reports

YESTERDAY = datetime.now(UTC).date() - timedelta(days=1)
REPORT = f"rides/run={YESTERDAY}/day={YESTERDAY}/report.html"


@pytest.fixture
def luigid() -> Iterator[Luigid]:
    with Luigid() as server:
        yield server


@pytest.fixture
def reports(place: Place) -> Iterator[Reports]:
    try:
        with Reports(place.root / "data" / "batch") as server:
            yield server
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_who_clicks_in_luigis_pages_sees_the_report(
    place: Place, luigid: Luigid, reports: Reports, browser: Browser
) -> None:
    place.insert("rides", good_rides(YESTERDAY))
    command = ("--scheduler-port", str(luigid.port), "ExploreAndValidate", "--view", "rides")
    place.run(*command, report_url=f"{reports.url}/")

    page = browser.page()
    page.goto(f"{luigid.url}/static/visualiser/index.html#tab=tasks&search__search=ExploreAndValidate")
    link = page.locator("#taskTable a[title='Track Progress']")
    assert link.get_attribute("href") == f"{reports.url}/{REPORT}"
    with page.expect_popup() as opened:
        link.click()
    report = opened.value
    assert report.url == f"{reports.url}/{REPORT}"
    assert "rides" in report.inner_text("body")
    assert report.evaluate("getComputedStyle(document.body).maxWidth") != "none"  # the page has its style
    assert inaccessible(report) == []


@pytest.mark.slow
def test_the_pages_alone_are_served(place: Place, reports: Reports) -> None:
    place.insert("rides", good_rides(YESTERDAY))
    place.run("ExploreAndValidate", "--view", "rides", "--local-scheduler")
    place.run("History", "--local-scheduler")
    folder = f"{reports.url}/{REPORT.removesuffix('report.html')}"
    assert status(f"{reports.url}/{REPORT}") == 200
    assert status(f"{reports.url}/") == 200  # the page that says what ran
    assert status(f"{reports.url}/health") == 204
    (place.root / "data" / "batch" / ".secret.html").touch()
    (place.root / "data" / "private.html").touch()
    (place.root / "data" / "batch" / "rides" / "folder.html").mkdir()
    for path in (
        folder,
        *(folder + name for name in ("raw.parquet", "rejects.parquet", "kept.parquet", "raw.json", "report.json")),
        f"{reports.url}/rides/",
        f"{reports.url}/.secret.html",
        f"{reports.url}/%2e%2e/private.html",
        f"{reports.url}/rides/folder.html/",
        f"{reports.url}/history/headrace_batch.prom",
    ):
        assert status(path) == 404, path
    log = reports.log.read_text(encoding="utf-8")
    assert '"level":"error"' not in log


def test_the_demonstrations_server_has_the_same_links(place: Place) -> None:
    """Python's own, as the Procfile starts it: on the loopback alone."""
    line = next(
        line.removeprefix("reports: exec python ")
        for line in (Path(__file__).parents[2] / "Procfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("reports: ")
    )
    port = free_port()
    report = place.root / "data" / "batch" / REPORT
    report.parent.mkdir(parents=True)
    report.write_text("here", encoding="utf-8")
    arguments = line.replace("${REPORTS_PORT}", str(port)).split()
    assert arguments[arguments.index("--bind") + 1] == "127.0.0.1"
    server = subprocess.Popen([sys.executable, *arguments], cwd=place.root, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if status(f"http://127.0.0.1:{port}/{REPORT}") == 200:
                break
            time.sleep(0.1)
        else:
            pytest.fail("it did not serve the report")
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.parametrize(
    ("folder", "link"),
    [
        ("rides/day=2026-01-31", "rides/day=2026-01-31"),
        ("a%20b%3F", "a%2520b%253F"),
        ("%C3%A4%22%3Cb%3E", "%25C3%25A4%2522%253Cb%253E"),
    ],
)
def test_a_link_leads_to_the_folder_whatever_its_name(
    folder: str, link: str, here: Place, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders have the view's name quoted; what is quoted has to be quoted again."""
    report = here.root / "data" / "batch" / folder / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("here", encoding="utf-8")
    monkeypatch.setattr("batch.tasks.settings", lambda: load(BatchSettings))
    monkeypatch.setenv("HEADRACE_REPORT_URL", reports.url)
    assert report_url(report) == f"{reports.url}/{link}/report.html"
    assert status(report_url(report)) == 200
    monkeypatch.delenv("HEADRACE_REPORT_URL")
    assert report_url(report) == report.as_uri()


@pytest.mark.parametrize(
    "url", ["reports.example/r", "javascript:alert(1)", "file:///srv", "http://me:s3cret@reports.example"]
)
def test_a_report_url_that_is_none_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_REPORT_URL", url)
    with pytest.raises(
        ConfigError, match=r"HEADRACE_REPORT_URL.*expected a URL that begins with https:// or http://"
    ) as error:
        load(BatchSettings)
    assert "s3cret" not in str(error.value)


def status(url: str) -> int | None:
    """The answer's status; None where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - addresses of our own servers
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
