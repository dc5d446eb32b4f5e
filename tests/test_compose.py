"""The Compose deployment, without an engine: each service's own command, and Prometheus with the dashboard's queries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from tests.servers import UnavailableError
from tests.servers.compose import Compose
from tests.servers.repository import ROOT

PASSWORD = "s3cret-of-the-test"
SERVICES = ["kafka", "worker", "luigid", "reports", "serve", "ui"]

GET = "import sys,urllib.request as u; sys.stdout.write(u.urlopen(sys.argv[1], timeout=10).read().decode())"
POST = (
    "import sys,urllib.request as u; r=u.Request(sys.argv[1], sys.argv[2].encode(), "
    "{'Content-Type': 'application/json'}); sys.stdout.write(u.urlopen(r, timeout=10).read().decode())"
)


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


def done(compose: Compose, name: str, *command: str, timeout_s: float = 60) -> str:
    ran = compose.exec(name, command, timeout_s=timeout_s)
    assert ran.returncode == 0, f"{command}: {ran.stdout[-1500:]}{ran.stderr[-1500:]}"
    return ran.stdout
