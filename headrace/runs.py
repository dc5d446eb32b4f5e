"""What the batch chain ran, as its run ledger tells: the files that `batch.ledger` writes, read.

    <batch_folder>/history/day=<d>/<start in µs>-<task id>-<random>.json      a run that started on the UTC day d

Whoever wants to know reads the files: the batch chain need not run, nor be installed.
"""

from __future__ import annotations

import fcntl
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import msgspec

HISTORY = "history"
"""The folder of the run ledger in the batch folder."""

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


@dataclass(frozen=True)
class History:
    """The runs in a folder."""

    folder: Path

    def runs(self, days: int, now: datetime) -> list[Run]:
        """The runs that started today or in the days before, so many days in all, oldest first.

        Files that are no run, torn or of somebody else, are passed over.
        """
        return [run for path in self.paths(days, now) if (run := run_of(path)) is not None]

    def paths(self, days: int, now: datetime) -> list[Path]:
        """Their files, oldest first. Costs a listing of each day."""
        return [
            path
            for back in reversed(range(days))
            for path in sorted(self.day(now - timedelta(days=back)).glob("*.json"))
        ]

    def day(self, moment: datetime) -> Path:
        """The folder of the runs that started on the UTC day of a moment."""
        return self.folder / f"day={moment.astimezone(UTC).date()}"


def run_of(path: Path) -> Run | None:
    """The run that a file tells of, `killed` if nobody will ever write its end; None if it tells of none."""
    with suppress(OSError, msgspec.DecodeError):
        run, is_abandoned = look(path)
        return msgspec.structs.replace(run, outcome="killed") if is_abandoned else run
    return None


def look(path: Path) -> tuple[Run, bool]:
    """A run, and whether it was abandoned: it tells of no end, and the process that would write it is gone.

    Raises:
        OSError, msgspec.DecodeError: the file cannot be read, or is no run.
    """
    run = _decode(path)
    if run.outcome is not None or _is_locked(path):
        return run, False
    run = _decode(path)  # it may have ended in between
    return run, run.outcome is None


def report_link(base: str | None, report: str) -> str | None:
    """Where a report is served, by its path in the batch folder; None if it is served nowhere.

    Args:
        base: `HEADRACE_REPORT_URL`.
    """
    return f"{base.rstrip('/')}/{quote(report, safe='/=')}" if base else None


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _decode(path: Path) -> Run:
    return msgspec.json.decode(path.read_bytes(), type=Run)
