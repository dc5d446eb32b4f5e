"""Containers without an engine: each a local process that sees what its container would see.

A read-only root, its volumes at their paths, an ordinary user, its variables and no others, and the names of the other
containers. All share one network of their own, so that their ports are those of the files and clash with nothing
outside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.servers.postgres import PROGRAMS
from tests.servers.process import ServerError, Startable, UnavailableError
from tests.servers.repository import ROOT

OURS = Path("/opt/headrace/bin")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")
SCRIPTS = Path(__file__).with_name("stand_ins")


@dataclass(frozen=True)
class Mount:
    """A file or folder of this machine, and where the container sees it."""

    source: Path
    target: str
    is_read_only: bool = False


@dataclass(frozen=True)
class Container:
    """What a process sees.

    Attributes:
        user: number of user and group.
        environment: its variables, all of them.
        folder: where it starts.
    """

    mounts: Sequence[Mount]
    environment: Mapping[str, str]
    user: tuple[str, str] = ("10001", "10001")
    folder: str = "/srv"


def image_environment() -> dict[str, str]:
    """The variables that our image sets, and where our programs are here."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    line = re.findall(r"^ENV (.*)$", text, flags=re.MULTILINE)[-1]
    path = f"{OURS}:/usr/local/bin:/usr/bin:/bin"
    return {**dict(re.findall(r"(\w+)=(\S+)", line)), "PATH": path, "PYTHONPATH": str(ROOT)}


class Sandbox(Startable):
    """A network, and the containers in it.

    Args:
        names: of the hosts in it; all are the loopback of the network.

    Attributes:
        folder: for volumes and logs; removed at the end.
    """

    def __init__(self, names: Iterable[str]) -> None:
        for program, package in {"bwrap": "bubblewrap", "caddy": "caddy", "redis-cli": "redis-tools"}.items():
            if shutil.which(program) is None:
                raise UnavailableError(f"no {program}; install it (Debian: apt-get install {package})")
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-sandbox-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._network = 0
        self.write("hosts", f"127.0.0.1 {' '.join(['localhost', *names])}\n")
        users = Path("/etc/passwd").read_text(encoding="utf-8")
        for user, number in {"headrace": 10001, "valkey-image": 999, "postgres-image": 70}.items():
            users += f"{user}:x:{number}:{number}::/srv:/usr/sbin/nologin\n"
        self.write("passwd", users)

    def start(self) -> Self:
        """Make the network."""
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
        return self

    def close(self) -> None:
        """End the containers, the last started first, and remove what they wrote."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in reversed(self._processes.values()):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, container: Container, command: Sequence[str], *, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        sandboxed = self._sandboxed(container, command)
        return subprocess.run(sandboxed, capture_output=True, text=True, timeout=timeout_s, check=False)

    def begin(self, name: str, container: Container, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command, and end it with all others."""
        sandboxed = self._sandboxed(container, command)
        with (self.folder / f"{name}.log").open("wb") as log:
            process = self._processes[name] = subprocess.Popen(sandboxed, stdout=log, stderr=log)
        return process

    def log(self, name: str) -> str:
        """What a container that was started has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def write(self, name: str, content: str) -> Path:
        """Make a file of this folder."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        return file

    def volume(self, name: str) -> Path:
        """The folder of a volume, made when first asked for."""
        path = self.folder / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _sandboxed(self, container: Container, command: Sequence[str]) -> list[str]:
        user, group = container.user
        words = ["nsenter", "-t", str(self._network), "-U", "-n", "--preserve-credentials", "bwrap"]
        words += ["--die-with-parent", "--unshare-user", "--uid", user, "--gid", group, "--unshare-pid"]
        words += ["--unshare-ipc", "--new-session", "--cap-drop", "ALL", "--tmpfs", "/", "--proc", "/proc"]
        words += ["--dev", "/dev"]
        for path in [*SYSTEM, sys.base_prefix, sys.prefix, str(ROOT), str(PROGRAMS.parent)]:
            words += ["--ro-bind-try", path, path]
        for mount in container.mounts:
            parent = str(Path(mount.target).parent)
            if mount.target.startswith("/etc/") and not mount.source.is_dir() and parent not in words:
                words += ["--tmpfs", parent]
            words += ["--ro-bind" if mount.is_read_only else "--bind", str(mount.source), mount.target]
        for file in ("hosts", "passwd"):
            words += ["--ro-bind", str(self.folder / file), f"/etc/{file}"]
        words += ["--ro-bind", str(SCRIPTS), "/stand_ins", "--ro-bind", str(SCRIPTS / "bin"), "/opt/kafka/bin"]
        words += ["--ro-bind", str(Path(sys.prefix) / "bin"), str(OURS)]
        words += ["--dir", "/srv", "--remount-ro", "/", "--chdir", container.folder, "--clearenv"]
        for variable, value in container.environment.items():
            words += ["--setenv", variable, value]
        return [*words, *command]
