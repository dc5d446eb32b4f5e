"""The run ledger: what ran, kept beside the receipts for as long as nobody deletes it.

    <batch_folder>/history/day=<d>/<start in µs>-<task id>-<random>.json      a run that started on the UTC day d

A file a run, and not lines of a shared file: it appears whole and is replaced whole, by a rename, so any
number of processes write at once, on any number of hosts (an append is not atomic on a network file system),
and no crash leaves half a line. A run costs the same whatever the history; a day's folder may be deleted
whenever one likes.

Who runs a task holds a lock on its file, and the kernel lets go of it however the process ends. So a file
that tells of no end and is not locked is of a run that was killed.
"""

from __future__ import annotations

import fcntl
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec

from batch.folder import staged

Outcome = Literal["done", "failed", "killed"]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One try of a task.

    Attributes:
        parameters: the task's, as on the command line.
        parent_pid: the process of the `luigi` command.
        attempt: 1, and one more for each try that failed before it.
        outcome: None while it runs. `killed`: it started and never came to an end of its own.
        rows: rows, or keys of `Materialize`, as the receipt has them; None where it counts none.
        error: in one line.
        is_final: it failed, and is not tried again by itself.
        report: the day's report if there is one, relative to the work folder.
    """

    task: str
    task_id: str
    parameters: dict[str, str]
    start: Moment
    host: str
    pid: int
    parent_pid: int
    attempt: int
    versions: dict[str, str]
    outcome: Outcome | None = None
    end: Moment | None = None
    rows: int | None = None
    error: str | None = None
    is_final: bool = False
    report: str | None = None

    @property
    def view(self) -> str:
        """The feature view."""
        return self.parameters.get("view", "")

    @property
    def sample(self) -> str:
        """The share of the keys that an audit looked at; empty for all, and of other tasks."""
        share = self.parameters.get("sample", "")
        return "" if share == "1" else share

    @property
    def is_reread(self) -> bool:
        """Whether a later run read the day again."""
        return self.parameters.get("run_date") not in {None, self.parameters.get("date")}

    @property
    def duration_s(self) -> float | None:
        """Seconds from start to end; None without an end."""
        return None if self.end is None else (self.end - self.start).total_seconds()


@dataclass
class Entry:
    """A run and its file.

    Attributes:
        is_abandoned: it tells of no end, and the process that would write it is gone.
    """

    path: Path
    run: Run
    is_abandoned: bool = False
    _lock: BinaryIO | None = field(default=None, repr=False)

    def open(self) -> None:
        """Write the run's file; from now on it counts as running for as long as this process lives."""
        with staged(self.path) as temporary:
            self._lock = temporary.open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # does not wait: nobody knows the file yet
            self._lock.write(_encode(self.run))
            self._lock.flush()

    def close(self, run: Run) -> None:
        """Replace what the file says by how the run ended."""
        self.run = run
        with staged(self.path) as temporary:
            temporary.write_bytes(_encode(run))
        if self._lock is not None:
            self._lock.close()


@dataclass(frozen=True)
class Ledger:
    """The runs in a folder."""

    folder: Path

    def entry(self, run: Run) -> Entry:
        """A file for a new run; nothing is written yet."""
        start_us = round(run.start.timestamp() * 1_000_000)
        name = f"{start_us:016}-{run.task_id}-{secrets.token_hex(4)}.json"
        return Entry(self._day(run.start) / name, run)

    def newest(self, task_id: str, now: datetime) -> Entry | None:
        """The last run of a task that started today or yesterday. Costs a listing of the two days."""
        for day in (now, now - timedelta(days=1)):
            for path in sorted(self._day(day).glob(f"*-{task_id}-*.json"), reverse=True):
                with suppress(OSError, msgspec.DecodeError):
                    return Entry(path, *_look(path))
        return None

    def runs(self, days: int, now: datetime) -> list[Run]:
        """The runs that started today or in the days before, so many days in all, oldest first.

        Files that are no run, torn or of somebody else, are passed over.
        """
        found = []
        for back in reversed(range(days)):
            for path in sorted(self._day(now - timedelta(days=back)).glob("*.json")):
                with suppress(OSError, msgspec.DecodeError):
                    run, is_abandoned = _look(path)
                    found.append(msgspec.structs.replace(run, outcome="killed") if is_abandoned else run)
        return found

    def _day(self, moment: datetime) -> Path:
        return self.folder / f"day={moment.astimezone(UTC).date()}"


def _encode(run: Run) -> bytes:
    """As JSON for people, too: indented, with the duration."""
    content = {**msgspec.to_builtins(run), "duration_s": run.duration_s}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _look(path: Path) -> tuple[Run, bool]:
    """A run, and whether it was abandoned."""
    run = _decode(path)
    if run.outcome is not None or _is_locked(path):
        return run, False
    run = _decode(path)  # it may have ended in between
    return run, run.outcome is None


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _decode(path: Path) -> Run:
    return msgspec.json.decode(path.read_bytes(), type=Run)
