"""The workers of a verification: real processes, ended and started again at random if asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from headrace.errors import TerminalError, TransientError
from streaming.settings import StreamConfig
from streaming.verify_place import VIEW, Place

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
_ANSWER_TIMEOUT_S = 1.0

PAUSE_S = (2.0, 7.0)
"""Between two interventions at least, at random within."""

PATIENCE_S = 6.0
"""How much longer an intervention waits for the workers to be ready again, so that events flow in between."""

HASTE_SHARE = 0.3
"""Of the interventions, that do not wait: they meet workers that start and a group that is rebalancing."""

FREEZE_SHARE = 0.25
"""Of the interventions; the others are kills."""

FREEZE_SESSIONS = (1.2, 1.8)
"""How long a worker is frozen, in sessions: long enough for the group to give its partitions to others."""


class Worker:
    """One worker process on a port of its own."""

    def __init__(self, environment: Mapping[str, str], home: Path, log: Path, port: int) -> None:
        self.log = log
        self._environment = dict(environment)
        self._page = f"http://127.0.0.1:{port}/readyz"
        # Nothing is written there; it makes the process known by name, should we be killed ourselves.
        self._command = [sys.executable, "-m", "faust", "-A", "streaming", "--datadir", str(home)]
        self._process: subprocess.Popen[bytes] | None = None
        self.thaw_at_s: float | None = None

    def start(self) -> None:
        """Start it; return at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "worker", "-l", "info"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for us alone, who then end it
            )

    def check(self) -> None:
        """Check that it runs.

        Raises:
            TerminalError: it ended by itself.
        """
        if self._process is not None and self._process.poll() is not None:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            msg = f"a worker ended by itself, with {self._process.returncode}: {last} (its log: {self.log})"
            raise TerminalError(msg)

    def freeze(self, seconds: float) -> None:
        """Stop it in its tracks for so long."""
        self._signal(signal.SIGSTOP)
        self.thaw_at_s = time.monotonic() + seconds

    def thaw(self) -> None:
        """Let it go on, if it is frozen."""
        if self.thaw_at_s is not None:
            self._signal(signal.SIGCONT)
            self.thaw_at_s = None

    def kill(self) -> None:
        """End it as a crash does; frozen or not, running or not."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self.thaw_at_s = None

    def ask_to_end(self) -> None:
        """End it as an operator does; return at once."""
        self.thaw()
        self._signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> None:
        """Wait until it has ended; kill it then."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()

    def state(self) -> tuple[int, Mapping[str, Any]]:
        """What `/readyz` says, and its status; 0 and nothing if nobody answers."""
        try:
            with self._answer() as answer:
                return answer.status, json.load(answer)
        except (OSError, ValueError):
            return 0, {}

    def _answer(self) -> Any:
        try:
            return urllib.request.urlopen(self._page, timeout=_ANSWER_TIMEOUT_S)  # noqa: S310 - our own page
        except urllib.error.HTTPError as error:
            return error  # 503, which is an answer too

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class Fleet:
    """All workers. Leaving the context ends them.

    Args:
        seed: of when whom what happens to; None: nothing happens to them.
    """

    def __init__(self, place: Place, config: StreamConfig, count: int, seed: int | None) -> None:
        ports = _free_ports(count)
        self.workers = [
            Worker(place.environment(config, port), place.home, place.logs / f"worker-{number}.log", port)
            for number, port in enumerate(ports, 1)
        ]
        self.kills = self.freezes = 0
        self.freshness: dict[str, dict[str, float]] = {}
        self._session_s = place.session_s
        self._random = None if seed is None else np.random.default_rng(seed)
        self._next_s, self._patience_s = 0.0, 0.0

    def start(self) -> None:
        """Start all, and wait until they are ready.

        Raises:
            TerminalError: one ends.
            TransientError: one is not ready in time.
        """
        for worker in self.workers:
            worker.start()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not all(worker.state()[0] == 200 for worker in self.workers):
            self.check()
            if time.monotonic() > deadline:
                msg = f"the workers are not ready after {READY_TIMEOUT_S:g} s; their logs: {self.workers[0].log.parent}"
                raise TransientError(msg)
            time.sleep(0.2)
        self._plan_next(time.monotonic())

    def check(self) -> None:
        """Check that all run, but for what we did to them.

        Raises:
            TerminalError: one ended by itself.
        """
        for worker in self.workers:
            worker.check()

    def intervene(self) -> None:
        """Kill one and start it again, or freeze it, if it is time to; let go on what was frozen long enough."""
        now_s = time.monotonic()
        for worker in self.workers:
            if worker.thaw_at_s is not None and worker.thaw_at_s <= now_s:
                worker.thaw()
        if self._random is None or not self._is_time(now_s):
            return
        self._plan_next(now_s)
        worker = self.workers[int(self._random.integers(len(self.workers)))]
        if self._random.random() < FREEZE_SHARE and worker.thaw_at_s is None:
            worker.freeze(self._session_s * self._random.uniform(*FREEZE_SESSIONS))
            self.freezes += 1
        else:
            worker.kill()
            worker.start()
            self.kills += 1

    def go_on(self) -> None:
        """Let all of them work, undisturbed from now on."""
        self._random = None
        for worker in self.workers:
            worker.thaw()

    def look(self) -> None:
        """Note the worst freshness that any worker tells of itself now."""
        for worker in self.workers:
            stores = {} if worker.thaw_at_s is not None else worker.state()[1].get("freshness", {}).get(VIEW, {})
            for store, quantiles in stores.items():
                worst = self.freshness.setdefault(store, {})
                for name, seconds in quantiles.items():
                    if seconds is not None:
                        worst[name] = max(worst.get(name, 0.0), round(seconds, 3))

    def stop(self) -> None:
        """End all, as an operator does; those that do not end are killed."""
        for worker in self.workers:
            worker.ask_to_end()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for worker in self.workers:
            worker.wait(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.kill()

    def _plan_next(self, now_s: float) -> None:
        if self._random is not None:
            self._next_s = now_s + self._random.uniform(*PAUSE_S)
            self._patience_s = 0.0 if self._random.random() < HASTE_SHARE else PATIENCE_S

    def _is_time(self, now_s: float) -> bool:
        if now_s < self._next_s:
            return False
        awake = [worker for worker in self.workers if worker.thaw_at_s is None]
        return now_s >= self._next_s + self._patience_s or all(worker.state()[0] == 200 for worker in awake)


def _free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
