"""The literal command line in the background, a luigid for it, and what is recorded of both."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from batch.ledger import Ledger
from headrace.runs import Run
from tests.batch.place import Place
from tests.servers import free_port

SETTINGS = {"reread_days": 0}

HEARING = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Becomes a command that hears Ctrl-C and the end of its terminal: where the tests run in the background, or by
`nohup`, what they start would ignore them."""


@dataclass(frozen=True)
class Luigid:
    """A luigid on the loopback."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def option(self) -> tuple[str, str]:
        """What makes a command ask it."""
        return "--scheduler-port", str(self.port)


@contextmanager
def started(
    place: Place,
    *arguments: str,
    sleep_s: float = 0,
    local: bool = True,
    lock: bool = False,
    before: Sequence[str] = (),
    path: Path | None = None,
    **variables: object,
) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, of which nothing outlives the test."""
    options = ([] if lock else ["--no-lock"]) + (["--local-scheduler"] if local else [])
    environment = place.environment(**SETTINGS) | {"TRANSFORM_SLEEP_S": str(sleep_s)}
    environment |= {name: str(value) for name, value in variables.items()}
    if path is not None:
        environment["PYTHONPATH"] += f":{path}"
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING, *before, *place.command(*arguments, *options)],
        cwd=place.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextmanager
def luigid(place: Place, forgets_after_s: int = 1) -> Iterator[Luigid]:
    """A real luigid on a free port, which opens a task anew so long after it failed too often."""
    port = free_port()
    folder = place.root / "luigid"
    folder.mkdir()
    text = (place.root / "luigi.cfg").read_text(encoding="utf-8")
    for name, value in (("disable_persist", forgets_after_s), ("retry_count", 3), ("retry_delay", 0)):
        text = re.sub(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
    (folder / "luigi.cfg").write_text(text, encoding="utf-8")
    (folder / "data").mkdir()
    program = str(Path(place.command()[0]).with_name("luigid"))
    command = [program, "--address", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: _answers(port), 20)
        yield Luigid(port, process)
    finally:
        process.terminate()
        process.wait(10)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def recorded(place: Place) -> list[Run]:
    return Ledger(place.root / "data" / "batch" / "history").runs(2, datetime.now(UTC))


def tries(place: Place, task: str) -> list[tuple[str | None, bool]]:
    return [(run.outcome, run.is_final) for run in recorded(place) if run.task == task]


def running(place: Place, task: str, number: int = 1) -> int:
    """Wait until a task was started so often and runs; its process."""
    found: list[Run] = []

    def look() -> bool:
        found[:] = [run for run in recorded(place) if run.task == task]
        return len(found) >= number and found[-1].outcome is None

    assert wait_for(look, 60)
    return found[-1].pid


def wait_for(is_so: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.05)
    return False


def lives(pid: int) -> bool:
    """Whether a process exists and is no mere remainder of one."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
