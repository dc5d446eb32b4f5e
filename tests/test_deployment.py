"""The Compose file, the image and the monitoring hold to what the documentation says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
MONITORING = ROOT / "deploy" / "monitoring"
HOW_TO = ROOT / "docs" / "how-to"
Service = dict[str, Any]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


def test_every_published_port_is_on_the_loopback(services: dict[str, Service]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []


def test_secrets_are_files_alone(services: dict[str, Service]) -> None:
    text = COMPOSE.read_text(encoding="utf-8").replace("$$", "")
    assert re.findall(r"^[^#\n]*\$\{?\w+", text, flags=re.MULTILINE) == []
    secrets = {secret: entry["file"] for secret, entry in yaml.safe_load(text)["secrets"].items()}
    assert secrets == {name: f"./secrets/{name}" for name in secrets}
    for name, service in services.items():
        assert set(service.get("secrets", [])) <= set(secrets), name
        for variable, value in service.get("environment", {}).items():
            is_file = str(value).startswith("/run/secrets/")
            assert "PASSWORD" not in variable or is_file, f"{name}: {variable}"


def test_every_service_is_confined_and_bounded(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"mem_limit", "cpus", "pids_limit", "restart"} <= set(service), name
        assert "healthcheck" in service or service["restart"] == "no" or name == "batch", name


def test_images_are_pinned_by_full_version(services: dict[str, Service]) -> None:
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    images = {*bases, *(service["image"] for service in services.values())}
    assert [image for image in sorted(images) if not re.search(r":v?\d+\.\d+\.?\d*", image)] == []


def test_what_is_waited_for_can_be_reached(services: dict[str, Service]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            condition = how["condition"]
            assert other in services, f"{name} waits for {other}"
            if condition == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for the health of {other}"
            else:
                assert services[other].get("restart", "no") == "no", f"{name} waits for the end of {other}"


def test_mounted_files_exist(services: dict[str, Service]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    sources = {mount.split(":")[0] for mount in mounts if mount.startswith(".")}
    assert sources
    assert [source for source in sorted(sources) if not (ROOT / source).exists()] == []


def test_the_image_copies_what_is_there_and_not_ignored() -> None:
    kept = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = set[str]()
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied.update(line.split()[1:-1])
    assert copied <= kept
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []


def test_the_two_locks_agree_and_have_hashes() -> None:
    def pins(name: str) -> dict[str, str]:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "://" not in text, f"{name} names an address"
        entries = re.findall(r"^(\S+==\S+)[^\n]*\\\n((?:\s+--hash=\S+.*\n)+)", text, flags=re.MULTILINE)
        assert len(entries) == len(re.findall(r"^\w", text, flags=re.MULTILINE)), f"{name} has an entry without hash"
        return {pin.split("==")[0]: pin for pin, _ in entries}

    everything, runtime = pins("requirements.lock"), pins("requirements-runtime.lock")
    assert {name: pin for name, pin in runtime.items() if everything.get(name) != pin} == {}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool") or pytest.skip("no promtool (Debian: apt-get install prometheus)")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus.compose.yml"])
def test_prometheus_takes_the_configuration(name: str) -> None:
    checked = promtool("check", "config", MONITORING / name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_when_it_should_and_not_else() -> None:
    files = [MONITORING / name for name in ("rules_test.yml", "rules_days_test.yml")]
    tried = promtool("test", "rules", *files)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    expected = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [name for name in alerts() if not re.search(rf'labels: .*alertname="{name}"', expected)] == []


def test_each_alert_has_its_section_and_its_row() -> None:
    runbook = (HOW_TO / "runbook.md").read_text(encoding="utf-8")
    anchors = {heading.lower() for heading in re.findall(r"^## (\w+)$", runbook, flags=re.MULTILINE)}
    table = (HOW_TO / "monitoring.md").read_text(encoding="utf-8")
    for name, alert in alerts().items():
        assert {"summary", "description", "runbook_url"} == set(alert["annotations"]), name
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert (page, anchor in anchors) == ("docs/how-to/runbook.md", True), name
        assert f"`{name}`" in table, name
    assert anchors <= {name.lower() for name in alerts()}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}
