"""The processes of the demonstration: each in a session of its own, with a log, and ended come what may."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType, TracebackType

STOP_TIMEOUT_S = 15.0
KILL_TIMEOUT_S = 2.0
LOG_TAIL_LINES = 15
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """The demonstration cannot go on; the message says why and what to do."""


class Interrupt(BaseException):
    """A signal asked the demonstration to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def raise_on_signals() -> None:
    """Turn the signals that end a program into `Interrupt`."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupt(number)

    for number in ENDING_SIGNALS:
        signal.signal(number, interrupt)


@dataclass
class Children:
    """Child processes and their logs; leaving the context ends them all, the last started first.

    Args:
        logs: the folder of the logs, `<name>.log`.
        environment: the whole environment of every child.
        folder: the working directory of every child.
    """

    logs: Path
    environment: Mapping[str, str]
    folder: Path
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process that is to stay, or that is waited for later by `finish`."""
        with self.log(name).open("wb") as log:
            process = self._spawn(command, log)
        self._running[name] = process
        return process

    def finish(self, name: str, *, timeout_s: float) -> None:
        """Wait for a started process to end well.

        Raises:
            DemoError: It failed or took too long; the message has the end of its log.
        """
        process = self._running[name]
        deadline = time.monotonic() + timeout_s
        while process.poll() is None:
            self.check(apart_from=name)
            if time.monotonic() > deadline:
                raise DemoError(f"`{name}` did not end within {timeout_s:.0f} s.{self.tail(name)}")
            time.sleep(0.05)
        del self._running[name]
        if process.returncode != 0:
            raise DemoError(f"`{name}` exited with {process.returncode}.{self.tail(name)}")

    def run(self, name: str, command: Sequence[str], *, timeout_s: float = 60.0) -> None:
        """Run a process to its end; see `finish`."""
        self.start(name, command)
        self.finish(name, timeout_s=timeout_s)

    def wait(self, name: str, is_ready: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
        """Wait until a started process serves.

        Raises:
            DemoError: It, or another one that is to stay, ended, or it took too long.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"`{name}` did not serve within {timeout_s:.0f} s.{self.tail(name)}")
            time.sleep(0.05)

    def check(self, *, apart_from: str | None = None) -> None:
        """Look whether every process that is to stay does.

        Raises:
            DemoError: One failed; the message has the end of its log.
        """
        for name, process in self._running.items():
            if name != apart_from and process.poll() not in {None, 0}:
                raise DemoError(f"`{name}` ended with {process.returncode}.{self.tail(name)}")

    def text(self, name: str) -> str:
        """Return what a process has written so far."""
        return self.log(name).read_text(encoding="utf-8", errors="replace")

    def tail(self, name: str) -> str:
        """Return the last lines of a process's log, indented, and where the rest is."""
        lines = self.text(name).splitlines()[-LOG_TAIL_LINES:]
        return "".join(f"\n    {line}" for line in [*lines, f"(all of it: {self.log(name)})"])

    def stop(self) -> None:
        """End every process and what it started: SIGTERM to its session, and SIGKILL if it is still there.

        One after the other, the last started first, so that a worker still finds its broker.
        Signals that would interrupt it wait; a second Ctrl-C leaves nothing behind either.
        """
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            self._stop()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _stop(self) -> None:
        for process in reversed(self._running.values()):
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            _signal_group(process, signal.SIGKILL)
            process.wait()
            _await_group_end(process)
        self._running.clear()

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log(self, name: str) -> Path:
        """Return the log of a process."""
        return self.logs / f"{name.replace(' ', '-')}.log"

    def _spawn(self, command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            list(command),
            cwd=self.folder,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a child's session; the group outlives a leader that ended before its own children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _await_group_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until a killed session is gone: its ports are free only then (bounded, an init may reap orphans late)."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
