"""What ran, for people: a table at the terminal and a page beside the reports."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import luigi
from luigi.parameter import ParameterVisibility

from batch.folder import write_text
from batch.pages import template
from batch.recording import ledger
from batch.settings import settings
from headrace.errors import ConfigError
from headrace.runs import Run

_HEADINGS = ("start, UTC", "task", "view", "day", "outcome", "try", "time", "rows", "error")
_TO_THE_RIGHT = {"try", "time", "rows"}
_MOMENT = "%Y-%m-%dT%H:%M:%S.%f"


class History(luigi.Task):
    """Show what ran in the last days, newest last, and write `history.html` in the work folder."""

    days = luigi.IntParameter(default=7, description="how many days, today (UTC) included")
    view = luigi.Parameter(default="", description="the feature view; default: every view")
    # Two who ask at once are two tasks, so that each is shown something.
    asked = luigi.Parameter(default=datetime.now(UTC).strftime(_MOMENT), visibility=ParameterVisibility.HIDDEN)
    retry_count = 1
    _is_shown = False

    def complete(self) -> bool:
        """Never before it ran: who asks again is shown again."""
        return self._is_shown

    def run(self) -> None:
        """Show and write.

        Raises:
            ConfigError: there is no feature repository, or not one day was asked for.
        """
        if self.days < 1:
            msg = f"--days {self.days}: expected 1 or more"
            raise ConfigError(msg)
        if not settings().feature_repo.is_dir():
            msg = f"no folder {settings().feature_repo.resolve()}; set HEADRACE_FEATURE_REPO to the feature repository"
            raise ConfigError(msg)
        now = datetime.now(UTC)
        runs = [run for run in ledger().runs(self.days, now) if self.view in {"", run.view}]
        path = settings().folder / "history.html"
        write_page(path, runs, days=self.days, view=self.view, now=now)
        sys.stdout.write(f"{table(runs)}\n{path.as_uri()}\n")
        self._is_shown = True


def table(runs: list[Run]) -> str:
    """The runs as text, a line each."""
    if not runs:
        return "No runs."
    rows = [_HEADINGS, *map(_cells, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if heading in _TO_THE_RIGHT else cell.ljust(width)
            for heading, cell, width in zip(_HEADINGS, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_page(path: Path, runs: list[Run], *, days: int, view: str, now: datetime) -> None:
    """The runs as a page, newest first. It appears whole."""
    outcomes = Counter(run.outcome or "running" for run in runs)
    page = template("history.html.j2")
    words: dict[str, Any] = {"subject": subject, "seconds": seconds, "link": quote}
    write_text(path, page.render(runs=runs[::-1], outcomes=outcomes, days=days, view=view, now=now, **words))


def subject(run: Run) -> str:
    """Which day, or what else its parameters say; options that were not taken are left out."""
    others = {
        name: value
        for name, value in run.parameters.items()
        if name not in {"view", "date", "run_date"} and value not in {"", "False"}
    }
    day = run.parameters.get("date", "")
    if run.is_reread:
        day += f" (run {run.parameters['run_date']})"
    return ", ".join(filter(None, [day, *(f"{name} {value}" for name, value in others.items())]))


def seconds(duration_s: float | None) -> str:
    """A duration, short."""
    if duration_s is None:
        return ""
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, rest = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} m" if hours else f"{minutes} m {rest:02} s"


def _cells(run: Run) -> tuple[str, ...]:
    return (
        f"{run.start.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
        run.task,
        run.view,
        subject(run),
        run.outcome or "running",
        str(run.attempt),
        seconds(run.duration_s),
        "" if run.rows is None else f"{run.rows:,}",
        run.error or "",
    )
