"""Many days at once: those that are not done yet, or, by force, all of them from a step on.

    luigi --module batch Backfill --start 2026-01-01 --stop 2026-02-01 [--view V] [--workers 4]
    luigi --module batch Backfill --start … --stop … --force-from Clean [--dry-run]

Each day of `[start, stop)` is done by itself, in any order and side by side; the online store is brought up to date
once, at the end. A day is done when any run has published it; one that is not is taken up in the run that read it last.
A day that fails keeps no other day from being done, but nothing is brought online until it is mended. To go on after
that, or after a kill, repeat the command without `--force-from`.
"""

from __future__ import annotations

import logging
import multiprocessing
import secrets
import time
from collections.abc import Collection, Iterator
from datetime import date as Date  # the tasks have a parameter of that name
from datetime import timedelta
from pathlib import Path
from typing import Any

import luigi

from batch.folder import DayFolder, locked, read_json, write_json
from batch.tasks import ChainTask, DayParameter, OfflineStore, ViewTask, today
from headrace.errors import ConfigError

logger = logging.getLogger("luigi-interface")

STEPS = ("Ingest", "Clean", "ExploreAndValidate", "OfflineStore")

_invocation = secrets.token_hex(8)
"""Of this process, and of those that it forks."""

_begun: dict[tuple[str, Date, Date], tuple[float, int]] = {}
"""When this process first looked at a backfill, and how many days were done then; forked processes know it."""


class RangeTask(ChainTask):
    """What is about the days from `start` to before `stop`."""

    date: Any = None  # no parameter of these tasks
    start = DayParameter(description="the first day")
    stop = DayParameter(description="the day after the last; today (UTC) at most")

    @property
    def dates(self) -> list[Date]:
        """The days, ascending."""
        return [self.start + timedelta(days=number) for number in range((self.stop - self.start).days)]

    def days(self) -> list[DayFolder]:
        """Those days, each in the run that read it last."""
        return [self.view_folder.day(self.run_of(day), day) for day in self.dates]

    def run_of(self, day: Date) -> Date:
        """The run that read a day last; the day's own if none did."""
        receipts = [folder.raw_receipt for folder in self.view_folder.runs_of(day)]
        reads = [read_json(receipt) for receipt in receipts if receipt.exists()]
        last = max(reads, key=lambda receipt: int(receipt["read_us"]), default=None)
        return day if last is None else Date.fromisoformat(last["run_date"])

    def published(self) -> list[Date]:
        """The days that are done."""
        found = {path.parent.name for path in self.view_folder.path.glob("run=*/day=*/offline.json")}
        return [day for day in self.dates if f"day={day}" in found]

    def moment(self) -> dict[str, Any]:
        """The range."""
        return {"start": self.start, "stop": self.stop}

    def check_request(self) -> None:
        """Refuse a range without days or beyond yesterday, and a view or a source that does not fit."""
        if not self.dates:
            msg = f"--start {self.start} --stop {self.stop}: no day lies from the first to before the second"
            raise ConfigError(msg)
        if self.stop > today():
            msg = f"--stop {self.stop}: {today()} at most (UTC); that day is not over yet"
            raise ConfigError(msg)
        self._check_source()


class BackfillDay(RangeTask):
    """One day of a backfill: done with `OfflineStore`; it tells how far the whole is."""

    date = DayParameter(description="the day")
    run_date = DayParameter(description="the run that does it: another may read the day meanwhile")
    is_recorded = False

    def receipt(self) -> Path:
        """That of `OfflineStore`."""
        return self.view_folder.day(self.run_date, self.date).offline_receipt

    def upstream(self) -> list[ViewTask]:
        """`OfflineStore`."""
        return [OfflineStore(view=self.view, date=self.date, run_date=self.run_date)]

    def run(self) -> None:
        """Say how many days are done, and how long the others may take."""
        if not self.view:
            return
        done, total = len(self.published()), len(self.dates)
        begun_s, before = _begun.get((self.view, self.start, self.stop), (time.monotonic(), done))
        text = f"{done} of {total} days"
        if before < done < total:
            left_s = (time.monotonic() - begun_s) / (done - before) * (total - done)
            text += f", about {timedelta(seconds=round(left_s))} left"
        logger.info("Backfill of `%s`: %s", self.view, text)
        self.say(text, 100)
        self._tell_backfill(text, 100 * done / total)

    def _tell_backfill(self, text: str, progress: float) -> None:
        """Show it in the scheduler's pages at the backfill, which waits meanwhile. Outside a worker: nothing."""
        reporter = getattr(self.set_status_message, "__self__", None)
        if reporter is not None:
            backfill = self.clone(Backfill)  # type: ignore[no-untyped-call]
            reporter._scheduler.set_task_status_message(backfill.task_id, text)
            reporter._scheduler.set_task_progress_percentage(backfill.task_id, round(progress, 1))


class Backfill(RangeTask):
    """See the module."""

    force_from = luigi.ChoiceParameter(choices=["", *STEPS], default="", description="redo every day from this step on")
    dry_run = luigi.BoolParameter(default=False, description="say what would be done, and do nothing")

    resources = {"online_store": 1}  # noqa: RUF012 - as Luigi declares it

    def receipt(self) -> Path:
        """Written when all days are published and online; else when it is said, or undone, what is to be done."""
        name = "plan.json" if self.dry_run else "forced.json" if self.force_from else "materialize.json"
        return self.view_folder.path / f"backfill={self.start}..{self.stop}" / name

    def complete(self) -> bool:
        """Whether it is done; one that is forced or dry is done anew by each call."""
        if not self.view or not (self.force_from or self.dry_run):
            return super().complete()
        if self._was_here():
            return self.dry_run or self._unforced().complete()
        if multiprocessing.parent_process() is None:
            self.check_request()
        return False

    def upstream(self) -> list[ViewTask]:
        """The days that no run has published; none if it is forced or dry."""
        if self.force_from or self.dry_run:
            return []
        published = self.published()
        _begun.setdefault((self.view, self.start, self.stop), (time.monotonic(), len(published)))
        return [
            self.clone(BackfillDay, date=day, run_date=self.run_of(day))  # type: ignore[no-untyped-call]
            for day in self.dates
            if day not in published
        ]

    @property
    def is_recorded(self) -> bool:  # type: ignore[override]
        """Of one that is forced, what it makes undone and redone is."""
        return not (self.force_from or self.dry_run)

    def lock(self) -> str:
        """As `Materialize`: one at a time for a view."""
        return "materialize"

    def run(self) -> Iterator[luigi.Task] | None:  # type: ignore[override]
        """Bring what was published online; or, by force, make undone what is to be redone, and go on from there."""
        if self.view and self.dry_run:
            self._say_plan()
        elif self.view and self.force_from:
            return self._redo()
        else:
            super().run()
        return None

    def work(self) -> dict[str, Any]:
        """Apply what arrived."""
        from batch import steps  # noqa: PLC0415 - as the docstring of `batch.tasks` says

        return steps.materialize(self.view, self)

    def _redo(self) -> Iterator[luigi.Task]:
        if not self._was_here():
            self._unforced().receipt().unlink(missing_ok=True)
            for day in self.dates:
                with locked(self.view_folder.lock(f"day={day}"), lambda: self.say("waiting for another run")):
                    undo(self.view_folder.runs_of(day), self.force_from)
            write_json(self.receipt(), {"invocation": _invocation, "from": self.force_from})
        yield self._unforced()

    def _say_plan(self) -> None:
        published = self.published()
        if self.force_from:
            text = f"would redo {len(self.dates)} days from {self.force_from} on, {len(published)} of them published"
        else:
            missing = [str(day) for day in self.dates if day not in published]
            text = f"would do {len(missing)} of {len(self.dates)} days: {', '.join(missing) or 'all are done'}"
        logger.info("Backfill of `%s`: %s", self.view, text)
        self.say(text, 100)
        write_json(self.receipt(), {"invocation": _invocation, "plan": text})

    def _was_here(self) -> bool:
        """Whether this call has said, or undone, what is to be done."""
        receipt = self.receipt()
        return receipt.exists() and bool(read_json(receipt)["invocation"] == _invocation)

    def _unforced(self) -> Backfill:
        return self.clone(force_from="")  # type: ignore[no-any-return,no-untyped-call]


def undo(runs: Collection[DayFolder], step: str) -> None:
    """Remove the receipts of a day from a step on, the last step's first. The steps' own files stay until replaced."""
    for run in runs:
        receipts = (run.raw_receipt, run.clean_receipt, run.passed, run.offline_receipt)
        for receipt in reversed(receipts[STEPS.index(step) :]):
            receipt.unlink(missing_ok=True)
