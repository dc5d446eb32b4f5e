"""Processes that go one step at a time, on a disk whose clock is the number of steps: deterministic, and quick.

A process is a thread that stops at each numbered step of `headrace.faults` and in the middle of each listing, and goes
on only when it is told to. One that is killed does nothing more, and leaves the folder as it was at that moment.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace import compact as compaction
from headrace import faults
from headrace import folder as folders

PATIENCE_S = 60.0
"""A process that does not come to its next step within this hangs."""

_own = threading.local()


class KilledError(BaseException):
    """Ends the thread of a process that was killed."""


class Process:
    """Does one piece of work at a time, and may be killed at every step of it."""

    def __init__(self, name: str, disk: Disk) -> None:
        self.name = name
        self._error: BaseException | None = None
        self._step = ""
        self._disk = disk
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._is_killed = False
        self._is_done = False

    @property
    def is_busy(self) -> bool:
        """Whether a piece of work is begun and not done."""
        return self._thread is not None

    def begin(self, work: Callable[[], None]) -> None:
        """Begin a piece of work; nothing of it is done yet."""
        assert self._thread is None
        self._is_killed = self._is_done = False
        self._thread = threading.Thread(target=self._run, args=(work,), name=self.name, daemon=True)
        self._thread.start()

    def go(self, how_far: int | str | None = None) -> int:
        """Go on by so many steps, to the next step whose name ends so, or to the end of the work; how many it were.

        Raises:
            BaseException: what the work raised, if it ended so.
        """
        steps = 0
        while self._thread is not None and steps != how_far:
            steps += 1
            self._disk.tick += 1
            self._go.release()
            assert self._stopped.acquire(timeout=PATIENCE_S), f"{self.name} hangs"
            if self._is_done:
                self._thread.join(PATIENCE_S)
                self._thread = None
            elif isinstance(how_far, str) and self._step.endswith(how_far):
                break
        error, self._error = self._error, None
        if error is not None:
            raise error
        return steps

    def kill(self) -> None:
        """End the work as SIGKILL does."""
        if self._thread is None:
            return
        with self._disk.kept():
            self._is_killed = True
            self._go.release()
            assert self._stopped.acquire(timeout=PATIENCE_S), f"{self.name} hangs"
            self._thread.join(PATIENCE_S)
        self._thread = None
        self._disk.listing.pop(self.name, None)

    def pause(self, step: str) -> None:
        """Called by the process itself: stop at a step until it is told to go on."""
        self._step = step
        self._stopped.release()
        self._go.acquire()
        if self._is_killed:
            raise KilledError

    def _run(self, work: Callable[[], None]) -> None:
        _own.process = self
        try:
            self._go.acquire()
            if not self._is_killed:
                work()
        except KilledError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error
        self._is_done = True
        self._stopped.release()


def current() -> Any:
    """The process that calls this; None for whoever tells the processes to go on."""
    return getattr(_own, "process", None)


class Disk:
    """The folder's file system, as the processes see it.

    Its clock is `tick`, and files have its times, so that a grace is exact and two files never share a time. A write to
    the disk waits for nothing: a process that ends loses no write, only a machine that stops does.

    Attributes:
        listing: since when each process that lists or reads does so; the grace of compaction is longer than that.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.tick = 1
        self.listing: dict[str, int] = {}
        self._changed: dict[int, int] = {}
        self._ids = 0
        self._link, self._stat, self._unlink, self._listdir = os.link, Path.stat, Path.unlink, os.listdir

    def attach(self, patch: pytest.MonkeyPatch) -> None:
        """Put the disk, its clock and the steps in place of the machine's."""
        patch.setattr(faults, "hook", self._reached)
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(os, "link", self._linked)
        patch.setattr(os, "listdir", self._torn)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: self._unlinked(path, missing_ok))
        patch.setattr(Path, "stat", lambda path, *, follow_symlinks=True: self._status(path, follow_symlinks))
        patch.setattr(uuid, "uuid4", self._id)
        patch.setattr(compaction, "time", SimpleNamespace(time=self._now, monotonic=time.monotonic))
        patch.setattr(folders, "_LISTING_PAUSE_S", 0)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """While a process reads: what was there when it began stays as long as the grace says."""
        name = current().name
        is_outer = name not in self.listing
        self.listing.setdefault(name, self.tick)
        self.tick += 1
        try:
            yield
        finally:
            if is_outer:
                self.listing.pop(name, None)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever goes meanwhile comes back: what a dying thread tidies up, a killed process would have left."""
        hold = self.home.with_suffix(".kept")
        hold.mkdir()
        there = [entry for entry in self._listdir(self.home) if entry.endswith(".tmp")] if self.home.exists() else []
        for entry in there:
            self._link(self.home / entry, hold / entry)
        yield
        for entry in there:
            if not os.path.exists(self.home / entry):
                self._link(hold / entry, self.home / entry)
        shutil.rmtree(hold)

    def _reached(self, step: str) -> None:
        if (process := current()) is not None:
            process.pause(step)

    def _now(self) -> float:
        return min([self.tick, *self.listing.values()])

    def _id(self) -> uuid.UUID:
        self._ids += 1
        return uuid.UUID(int=self._ids)

    def _fsync(self, handle: int) -> None:
        found = os.fstat(handle)
        if not stat.S_ISDIR(found.st_mode):
            self.tick += 1
            self._changed[found.st_ino] = self.tick
            os.utime(handle, ns=(self.tick, self.tick))

    def _linked(self, source: Path, target: Path) -> None:
        self._link(source, target)
        self.tick += 1
        self._changed[os.stat(target).st_ino] = self.tick

    def _unlinked(self, path: Path, missing_ok: bool) -> None:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            if missing_ok:
                return
            raise
        self._unlink(path)
        self.tick += 1
        if found.st_nlink > 1:
            self._changed[found.st_ino] = self.tick
        else:
            self._changed.pop(found.st_ino, None)

    def _status(self, path: Path, follow_symlinks: bool) -> Any:
        found = self._stat(path, follow_symlinks=follow_symlinks)
        return _Status(found, self._changed.setdefault(found.st_ino, self.tick))

    def _torn(self, path: Any = ".") -> list[str]:
        """A listing that takes a while: of what comes or goes meanwhile, every second one is in it."""
        if current() is None or Path(path) != self.home:
            return self._listdir(path)
        with self.pinned():
            before = sorted(self._listdir(path))
            current().pause("listing")
            after = sorted(self._listdir(path))
        both = set(before) & set(after)
        moved = sorted({*before, *after} - both)
        return sorted(both | {entry for entry in moved if (hash_of(entry) + self.tick) % 2})


class _Status:
    """What `stat` says, with the disk's time of the last change."""

    def __init__(self, found: os.stat_result, changed: int) -> None:
        self._found = found
        self.st_ctime = float(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


def hash_of(entry: str) -> int:
    """A number of a name, the same in every run."""
    return sum(entry.encode())
