"""The run ledger, written: what ran, kept beside the receipts for as long as nobody deletes it.

    <batch_folder>/history/day=<d>/<start in µs>-<task id>-<random>.json      a run that started on the UTC day d

A file a run, and not lines of a shared file: it appears whole and is replaced whole, by a rename, so any
number of processes write at once, on any number of hosts (an append is not atomic on a network file system),
and no crash leaves half a line. A run costs the same whatever the history; a day's folder may be deleted
whenever one likes.

Who runs a task holds a lock on its file, and the kernel lets go of it however the process ends. So a file
that tells of no end and is not locked is of a run that was killed. `headrace.runs` reads the files.
"""

from __future__ import annotations

import fcntl
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import msgspec

from batch.folder import staged
from headrace.runs import History, Run, look


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
class Ledger(History):
    """The runs in a folder, and more of them."""

    def entry(self, run: Run) -> Entry:
        """A file for a new run; nothing is written yet."""
        start_us = round(run.start.timestamp() * 1_000_000)
        name = f"{start_us:016}-{run.task_id}-{secrets.token_hex(4)}.json"
        return Entry(self.day(run.start) / name, run)

    def newest(self, task_id: str, now: datetime) -> Entry | None:
        """The last run of a task that started today or yesterday. Costs a listing of the two days."""
        for day in (now, now - timedelta(days=1)):
            for path in sorted(self.day(day).glob(f"*-{task_id}-*.json"), reverse=True):
                with suppress(OSError, msgspec.DecodeError):
                    return Entry(path, *look(path))
        return None


def _encode(run: Run) -> bytes:
    """As JSON for people, too: indented, with the duration."""
    content = {**msgspec.to_builtins(run), "duration_s": run.duration_s}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
