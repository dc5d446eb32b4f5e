"""Headrace's own processes in tests: the worker and the commands, as a person starts them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from streaming import emit as emitting
from streaming.settings import StreamConfig, read_config
from tests.servers.process import free_port

FAUST = [sys.executable, "-m", "faust", "-A", "streaming"]


def run(environment: Mapping[str, str], *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a command of the stream to its end."""
    return subprocess.run(
        [*FAUST, *arguments], env=dict(environment), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def emit(environment: Mapping[str, str], **plan: Any) -> dict[str, Any]:
    """Emit events as `faust -A streaming emit` does, but in this process, which takes no seconds to start."""
    chosen = {"rate": 0.0, "count": 1000, "seed": 1, **plan}
    return dict(emitting.emit(config_of(environment), emitting.Plan(**chosen), view=None, anywhere=False))


def config_of(environment: Mapping[str, str]) -> StreamConfig:
    """Settings and registry as a process with this environment reads them."""
    own = {name: value for name, value in environment.items() if name.startswith("HEADRACE_")}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
            patch.delenv(name)
        for name, value in own.items():
            patch.setenv(name, value)
        return read_config()


class Worker:
    """A worker process. Leaving the context ends it."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.port = free_port()
        self.log = log
        self.environment = {**environment, "HEADRACE_WEB_PORT": str(self.port)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, level: str = "info") -> Self:
        """Start the process; return at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*FAUST, "worker", "-l", level],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        assert self._process is not None
        return self._process

    @property
    def has_started(self) -> bool:
        """Whether it was started at all."""
        return self._process is not None

    @property
    def is_over(self) -> bool:
        """Whether there is no running process."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 15.0) -> tuple[int, float]:
        """End it as an operator does: exit code, and seconds that it took."""
        begun_s = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout_s)
        return code, time.monotonic() - begun_s

    def get(self, page: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """A page; status 0 if nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{page}", timeout=timeout_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def state(self) -> dict[str, Any]:
        """What `/readyz` says; empty if nobody answers."""
        _, body = self.get("/readyz")
        with contextlib.suppress(ValueError):
            found: dict[str, Any] = json.loads(body)
            return found
        return {}

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Wait until `/readyz` says 200."""
        self.wait(lambda: self.get("/readyz")[0] == 200, timeout_s, "ready")

    def wait_drained(self, ends: Mapping[int, int], timeout_s: float = 180.0) -> None:
        """Wait until the ledgers end where the logs end."""

        def is_drained() -> bool:
            found = {p["partition"]: p["ledger_end"] for p in self.state().get("partitions", [])}
            return all(found.get(number) == end for number, end in ends.items())

        self.wait(is_drained, timeout_s, f"drained to {dict(ends)}")

    def wait(self, is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something is so; fail if the worker ends or the time does."""
        deadline = time.monotonic() + timeout_s
        while not is_done():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"not {what}: {self.state()}\n{self.tail()}"
            time.sleep(0.1)

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-4000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
