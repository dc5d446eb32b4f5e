"""The work folder: where each step leaves its files, and how a file appears there all at once or not at all.

    <batch_folder>/<view>/run=<D>/                       what the run for date D did
                          materialize.json               receipt of Materialize
                          day=<d>/                       D itself, and each recent day that the run read again
                              raw.parquet     raw.json       Ingest
                              kept.parquet    clean.json     Clean
                              rejects.parquet
                              report.html     report.json    ExploreAndValidate, whatever the verdict
                              rejects.html
                                              passed.json    ExploreAndValidate, only if the gate is open
                              withdrawn.parquet              OfflineStore, if the day lost rows
                                              offline.json   OfflineStore
    <batch_folder>/<view>/<task>=<T>/                    an upkeep task that was asked for at the minute T
                          compact=<T>/compact.json
                          audit=<T>/report.html  report.json     Audit, whatever it found; audit-sample-<s>=<T>/
                                                 passed.json     Audit, only if the stores agree
                          repair=<T>/repair.json                 or repair-backwards=<T>/
                          retain=<T>/retain.json                 or retain-dry-run=<T>/
    <batch_folder>/<view>/withdrawn/                     what Materialize is still to take back (`batch.withdrawals`)
    <batch_folder>/<view>/source.json                    the columns of the source as Ingest took them last
    <batch_folder>/<view>/backfill=<A>..<B>/             Backfill: materialize.json, or plan.json, forced.json
    <batch_folder>/<view>/profiles/<d>.json              what the day's features look like, for the days after it
    <batch_folder>/history/, history.html                what ran (`batch.ledger`, `headrace.runs`, `batch.history`)

The JSON receipt of a step is written last, so it is what says that the step is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

_LOCK_POLL_S = 0.2
_LONGEST_WRITE_S = 86_400
"""In folders that many write to at once, what is older was left by a killed process."""


@dataclass(frozen=True)
class ViewFolder:
    """The part of the work folder that belongs to one view."""

    root: Path
    view: str

    @property
    def path(self) -> Path:
        """The view's own folder."""
        return self.root / quote(self.view, safe="")

    @property
    def source(self) -> Path:
        """The columns of the source as they were taken last."""
        return self.path / "source.json"

    def materialized(self, run: date) -> Path:
        """The receipt of `Materialize` for a run."""
        return self.path / f"run={run}" / "materialize.json"

    def day(self, run: date, day: date) -> DayFolder:
        """Where a run works on a day."""
        return DayFolder(self.path / f"run={run}" / f"day={day}")

    def upkeep(self, name: str, minute: str) -> Path:
        """Where an upkeep task that was asked for at a minute leaves its files."""
        return self.path / f"{name}={minute}"

    @property
    def withdrawals(self) -> Path:
        """Where `OfflineStore` tells `Materialize` which rows a day has lost."""
        return self.path / "withdrawn"

    def runs_of(self, day: date) -> list[DayFolder]:
        """What every run so far left of a day, by run."""
        return [DayFolder(path) for path in sorted(self.path.glob(f"run=*/day={day}"))]

    def lock(self, name: str) -> Path:
        """The lock file of that name."""
        return self.path / ".locks" / f"{name}.lock"


@dataclass(frozen=True)
class DayFolder:
    """The files of one day in one run."""

    path: Path

    @property
    def raw(self) -> Path:
        """Rows as read from the source."""
        return self.path / "raw.parquet"

    @property
    def raw_receipt(self) -> Path:
        """Written last by `Ingest`."""
        return self.path / "raw.json"

    @property
    def kept(self) -> Path:
        """Clean rows in the view's schema."""
        return self.path / "kept.parquet"

    @property
    def rejects(self) -> Path:
        """Rejected rows with their reasons."""
        return self.path / "rejects.parquet"

    @property
    def clean_receipt(self) -> Path:
        """Written last by `Clean`."""
        return self.path / "clean.json"

    @property
    def report(self) -> Path:
        """For people."""
        return self.path / "report.html"

    @property
    def rejects_page(self) -> Path:
        """The first of the rejected rows, for people."""
        return self.path / "rejects.html"

    @property
    def verdict(self) -> Path:
        """The report for machines."""
        return self.path / "report.json"

    @property
    def passed(self) -> Path:
        """Written last by `ExploreAndValidate`, and only if the gate is open."""
        return self.path / "passed.json"

    @property
    def withdrawn(self) -> Path:
        """Rows that the day's former snapshot had and this one lacks."""
        return self.path / "withdrawn.parquet"

    @property
    def offline_receipt(self) -> Path:
        """Written last by `OfflineStore`."""
        return self.path / "offline.json"


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, its file is `path`, durably; else nothing stays.

    Atomic: a reader finds the old file, none, or the whole new one. The temporary file lies in a `.staging`
    folder beside `path`, which dataset readers pass over.
    """
    staging = path.parent / ".staging"
    staging.mkdir(parents=True, exist_ok=True)
    clear_staging(path.parent, _LONGEST_WRITE_S)
    temporary = staging / f"{path.name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically and durably."""
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically and durably. Dates and paths become text."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def clear_staging(folder: Path, older_than_s: float = 0) -> None:
    """Remove what killed processes left in a folder's staging.

    Call it with the folder's lock held, or with an age that no file reaches before it is whole.
    """
    for leftover in (folder / ".staging").glob("*"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime >= older_than_s:
                leftover.unlink()


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on this machine; `waiting` is called once if another process has it.

    The kernel lets go of it when the process ends, however it ends. The file stays: removing it would let
    two in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    waiting()
                    told = True
                time.sleep(_LOCK_POLL_S)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
