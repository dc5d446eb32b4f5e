"""One server process: started, awaited, frozen, killed, started again, and always ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

STOP_TIMEOUT_S = 20.0
LOG_TAIL_BYTES = 4_000


class ServerError(Exception):
    """A server did not start, or ended when it should not have."""


class UnavailableError(ServerError):
    """A program that the server needs is not installed; the message says what to install."""


def free_port() -> int:
    """Return a loopback TCP port that nobody listened on a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Return whether something accepts connections on this loopback port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


class Startable(ABC):
    """What is started by a context, and closed by its end; also where it did not start."""

    @abstractmethod
    def start(self) -> Self:
        """Start, and return when it serves."""

    @abstractmethod
    def close(self) -> None:
        """Stop, and leave nothing behind."""

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Server(Startable):
    """A process with a folder of its own, that keeps its address and data over a restart.

    Subclasses say how to start it (`command`) and when it serves (`is_ready`). `start` and `stop` may be
    repeated; leaving the context stops the process and removes the folder.
    """

    name = "server"
    start_timeout_s = 30.0

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"headrace-{self.name}-"))
        self.log = self.folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        """Return the command line; called at each start."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Return variables to set beside the inherited ones."""
        return {}

    def is_ready(self) -> bool:
        """Return whether the server answers now; asked again and again, so it must not block long."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise ServerError(f"{self.name} is not running")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process lives (a frozen one does)."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start the process and return when it serves.

        Raises:
            ServerError: It ended early or did not serve in time; the message holds the end of its log.
        """
        if self.is_running:
            return self
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                list(self.command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment()},
                start_new_session=True,
            )
        deadline = time.monotonic() + self.start_timeout_s
        while not self.is_ready():
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} ended with {self._process.returncode} at start:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"{self.name} did not serve within {self.start_timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        """End the process: SIGTERM, and SIGKILL if it is still there after a while."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once, as a crash does."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop the process's clock (SIGSTOP): it holds its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if self.log.exists() else ""

    def close(self) -> None:
        """Stop the process and remove its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, sign: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.send_signal(sign)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
