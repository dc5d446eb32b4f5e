"""The Compose file and the image hold to what the documentation says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
Service = dict[str, Any]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


def test_every_published_port_is_on_the_loopback(services: dict[str, Service]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []


def test_no_password_has_a_default() -> None:
    variables = re.findall(r"\$\{(\w+)([^}]*)\}", COMPOSE.read_text(encoding="utf-8"))
    assert {name for name, _ in variables} == {"POSTGRES_PASSWORD", "VALKEY_PASSWORD"}
    assert [name for name, rest in variables if not rest.startswith(":?")] == []


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
