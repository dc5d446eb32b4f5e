"""The Compose deployment, without an engine: each service's own command, environment, files and health check."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.servers import UnavailableError
from tests.servers.compose import Compose
from tests.servers.repository import ROOT

PASSWORD = "s3cret-of-the-test"  # noqa: S105
SERVICES = ["kafka", "worker", "luigid", "reports", "serve", "ui"]

GET = "import sys,urllib.request as u; sys.stdout.write(u.urlopen(sys.argv[1], timeout=10).read().decode())"
POST = (
    "import sys,urllib.request as u; r=u.Request(sys.argv[1], sys.argv[2].encode(), "
    "{'Content-Type': 'application/json'}); sys.stdout.write(u.urlopen(r, timeout=10).read().decode())"
)
ASK = (
    "import json,sys; from urllib.request import urlopen; from urllib.parse import quote\n"
    "ask = lambda q: json.load(urlopen('http://prometheus:9090/api/v1/query?query=' + quote(q), timeout=10))\n"
    "print(json.dumps([ask(q) for q in json.loads(sys.argv[1])]))"
)
MONITORING = ROOT / "deploy" / "monitoring"
RIGHTLY_EMPTY = ("headrace_events_skipped", "headrace_step_retries", "partition_resyncs", "failure_timestamp")
"""No event was skipped, and nothing failed."""


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    """The deployment with a day in its source table and events in its topic."""
    try:
        with Compose(SERVICES, dict.fromkeys(("postgres_password", "valkey_password"), PASSWORD)) as found:
            yield found
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def filled(compose: Compose) -> Compose:
    """After an emitter, and the first line of the schedule."""
    day = datetime.now(UTC).date() - timedelta(days=1)
    rows = (
        f"INSERT INTO driver_stats SELECT n, 0.5, 0.5, n, '{day} 12:00Z', '{day} 13:00Z' FROM generate_series(1, 50) n"
    )
    done(compose, "postgres", "psql", "-h", "/var/run/postgresql", "-U", "headrace", "-c", rows)
    emit = ["faust", "-A", "streaming", "emit", "--rate", "0", "--count", "2000", "--bad-fraction", "0.02", "--yes"]
    done(compose, "worker", *emit)
    line = next(line for line in (ROOT / "deploy" / "crontab").read_text().splitlines() if line.endswith("Materialize"))
    done(compose, "batch", "sh", "-c", " ".join(line.split()[5:]), timeout_s=120)
    return compose


def test_every_service_is_healthy_and_shows_no_password(filled: Compose) -> None:
    """After work was done."""
    for name, service in filled.model["services"].items():
        if name in {*SERVICES, "valkey", "postgres"} and "healthcheck" in service:
            assert filled.is_healthy(name), filled.log(name)[-2000:]
    assert not filled.is_healthy("grafana")
    for log in filled.folder.glob("*.log"):
        assert PASSWORD not in log.read_text(errors="replace"), log.name


def test_the_root_of_our_services_cannot_be_written(filled: Compose) -> None:
    assert "Read-only file system" in filled.exec("worker", ["touch", "/srv/x"]).stderr


def test_features_are_served_over_http(filled: Compose) -> None:
    question = {"feature_service": "driver_activity", "entities": {"driver_id": [1, 2, 99_999_999]}}
    said = done(filled, "serve", "python", "-c", POST, "http://serve:6566/get-online-features", json.dumps(question))
    answer = json.loads(said)
    columns = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
    assert columns["driver_id"]["values"] == [1, 2, 99_999_999]
    assert columns["avg_daily_trips"]["values"][2] is None
    assert columns["avg_daily_trips"]["statuses"][:2] == ["PRESENT", "PRESENT"]


def test_reports_and_metrics_are_served_and_no_data(filled: Compose) -> None:
    metrics = done(filled, "worker", "python", "-c", GET, "http://reports:8083/metrics")
    assert 'headrace_batch_last_success_timestamp_seconds{sample="",task="Materialize",view="driver_stats"}' in metrics
    assert filled.exec("worker", ["python", "-c", GET, "http://reports:8083/driver_stats/"]).returncode != 0


def test_every_query_of_the_dashboard_gives_data_of_a_worker_and_a_batch_run(filled: Compose) -> None:
    """Prometheus with the configuration for one machine, where all are on the loopback, but at shorter intervals."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus (Debian: apt-get install prometheus)")
    folder = filled.volume("prometheus")
    for name in ("prometheus.yml", "rules.yml"):
        text = (MONITORING / name).read_text(encoding="utf-8").replace("interval: 15s", "interval: 1s")
        (folder / name).write_text(text, encoding="utf-8")
    filled.spawn(
        "prometheus", ["prometheus", "--config.file=/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
    )
    wait_for(lambda: filled.is_healthy("prometheus"))
    wait_for(lambda: len(asked(filled, ["up == 1"])[0]) == 3)
    emit = ["faust", "-A", "streaming", "emit", "--rate", "0", "--count", "2000", "--bad-fraction", "0.02", "--yes"]
    done(filled, "worker", *emit)
    done(filled, "batch", "luigi", "--module", "batch", "--scheduler-host", "luigid", "Audit")
    wanted = dashboard_queries()
    assert len(wanted) > 30
    expected = {query for query in wanted if not any(name in query for name in RIGHTLY_EMPTY)}

    def all_there() -> bool:
        found = asked(filled, list(wanted))
        return {query for query, result in zip(wanted, found, strict=True) if result} >= expected

    try:
        wait_for(all_there)
    except AssertionError:
        found = asked(filled, list(wanted))
        pytest.fail("no data: " + "; ".join(q for q, r in zip(wanted, found, strict=True) if not r and q in expected))
    assert asked(filled, ['ALERTS{alertstate="firing"}'])[0] == []


def dashboard_queries() -> list[str]:
    """As Grafana sends them, for every view."""
    dashboard = json.loads((MONITORING / "grafana" / "dashboards" / "headrace.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [query.replace("$view", ".*").replace("$__rate_interval", "1m") for query in queries]


def asked(compose: Compose, queries: list[str]) -> list[list[Any]]:
    """What Prometheus answers to each; it must be able to."""
    answers = json.loads(done(compose, "worker", "python", "-c", ASK, json.dumps(queries)))
    assert [answer for answer in answers if answer["status"] != "success"] == []
    return [answer["data"]["result"] for answer in answers]


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def done(compose: Compose, name: str, *command: str, timeout_s: float = 60) -> str:
    ran = compose.exec(name, command, timeout_s=timeout_s)
    assert ran.returncode == 0, f"{command}: {ran.stdout[-1500:]}{ran.stderr[-1500:]}"
    return ran.stdout
