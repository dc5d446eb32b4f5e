"""All that a report says of a clean day."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch.columns import Column, look_at
from batch.coverage import Coverage, Freshness, coverage, freshness
from batch.folder import DayFolder, ViewFolder, read_json
from batch.gate import Check, RuleResult, checks, first_rejects, rule_results
from batch.reference import days_before, keep_profiles
from batch.settings import BatchSettings
from headrace.contract import ViewContract


@dataclass(frozen=True)
class DayBefore:
    """A published day that this one is held against.

    Attributes:
        report: its newest report, relative to this one; None where there is none.
    """

    day: date
    rows: int
    report: str | None


@dataclass(frozen=True)
class Findings:
    """All that the report says. `docs/how-to/gate.md` has the fields of its JSON, which are these.

    Attributes:
        window: which day a row belongs to, and by which column.
        read, made: when the source was read, and when this was found.
        before: the days of the reference, the newest first; empty: no reference yet.
        rejects: the first rejected rows of each kind.
        ignored_columns: columns of the table that the view does not know.
    """

    view: str
    project: str
    day: date
    window: str
    table: str
    read: datetime
    made: datetime
    counts: dict[str, Any]
    checks: tuple[Check, ...]
    rules: tuple[RuleResult, ...]
    columns: tuple[Column, ...]
    coverage: Coverage
    freshness: Freshness
    before: tuple[DayBefore, ...]
    rejects: tuple[dict[str, Any], ...]
    ignored_columns: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the gate is open."""
        return not self.failed("error")

    def failed(self, severity: str) -> list[Check]:
        """The checks of a severity that did not pass."""
        return [check for check in self.checks if check.severity == severity and not check.passed]


def explore(
    contract: ViewContract, view: ViewFolder, folder: DayFolder, settings: BatchSettings, day: date
) -> Findings:
    """Look at the rows that `Clean` left in a folder, hold them against the days before, and judge.

    Keeps the profile of the day for the days to come. Memory: some columns of the day.
    """
    raw, cleaned = read_json(folder.raw_receipt), read_json(folder.clean_receipt)
    read = datetime.fromtimestamp(raw["read_us"] / 1e6, UTC)
    before = days_before(contract, view, day)
    rejects = first_rejects(folder)
    columns: list[Column] = []
    profiles = {}
    with pq.ParquetFile(folder.kept) as file:

        def column(name: str) -> pa.ChunkedArray:
            return file.read([name]).column(0).cast(contract.schema.field(name).type)

        times = column(contract.timestamp_field)
        created = column(contract.created_field) if contract.created_field is not None else None
        for name in contract.schema.names:
            of_days = [day.profiles[name] for day in before if name in day.profiles]
            found, profile = look_at(contract, name, column(name), times, of_days)
            columns.append(found)
            if found.role == "feature":
                profiles[name] = profile
        rules = tuple(rule_results(contract, cleaned["counts"], rejects, column))
    keep_profiles(contract, view, day, cleaned["content_hash"], profiles)
    fresh = freshness(day, read, times, created)
    return Findings(
        view=contract.name,
        project=contract.project,
        day=day,
        window=f"{raw['window']} ({raw['window_column']})" if raw["window_column"] else raw["window"],
        table=raw["table"],
        read=read,
        made=datetime.now(UTC),
        counts=cleaned["counts"],
        checks=tuple(
            checks(
                contract,
                settings,
                cleaned["counts"],
                raw["rows_of_no_day"],
                raw["window_column"],
                columns,
                fresh,
                rules,
            )
        ),
        rules=rules,
        columns=tuple(columns),
        coverage=coverage(day, times, created),
        freshness=fresh,
        before=tuple(DayBefore(d.day, d.rows, _report_of(view, folder, d.day, settings)) for d in before),
        rejects=tuple(row for rows in rejects.values() for row in rows),
        ignored_columns=tuple(raw["ignored_columns"]),
    )


def _report_of(view: ViewFolder, folder: DayFolder, day: date, settings: BatchSettings) -> str | None:
    """The report of the latest run that read a day, if it still is there; only the day's own and rereading runs may."""
    for later in range(settings.reread_days, -1, -1):
        report = view.day(day + timedelta(days=later), day).report
        if report.exists():
            return Path(os.path.relpath(report, folder.path)).as_posix()
    return None
