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
import mmap
import multiprocessing
import secrets
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date as Date  # the tasks have a parameter of that name
from datetime import timedelta
from pathlib import Path
from typing import Any

import luigi

from batch.folder import DayFolder, locked, read_json, write_json
from batch.tasks import ChainTask, DayParameter, OfflineStore, ViewTask, today
from headrace.errors import ConfigError
from headrace.progress import watch

logger = logging.getLogger("luigi-interface")

STEPS = ("Ingest", "Clean", "ExploreAndValidate", "OfflineStore")

_invocation = secrets.token_hex(8)
"""Of this process, and of those that it forks."""


@dataclass
class Progress:
    """How far a backfill is, as this process and those that it forks know together.

    Attributes:
        begun_s: when this process first looked at it, by the monotonic clock.
        before: how many days were done then.
        done: a byte a day, in memory that all share; 1 for one that was done since.
    """

    begun_s: float
    before: int
    done: mmap.mmap


_progress: dict[tuple[str, Date, Date], Progress] = {}


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
        return [self.view_folder.day(_run_of(day, runs), day) for day, runs in self.runs().items()]

    def runs(self) -> dict[Date, list[DayFolder]]:
        """What every run so far left of each day, by run. One scan of the work folder, however many days."""
        found: dict[str, list[DayFolder]] = {}
        for path in sorted(self.view_folder.path.glob("run=*/day=*")):
            found.setdefault(path.name, []).append(DayFolder(path))
        return {day: found.get(f"day={day}", []) for day in self.dates}

    def title(self) -> str:
        """With the range."""
        return f"{self.task_family} {self.view} {self.start}..{self.stop}"

    def moment(self) -> dict[str, Any]:
        """The range."""
        return {"start": self.start, "stop": self.stop}

    def check_request(self) -> None:
        """Refuse a range without days or beyond yesterday, and a view or a source that does not fit."""
        if self.start >= self.stop:
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

    def days(self) -> list[DayFolder]:
        """Its own."""
        return [self.view_folder.day(self.run_date, self.date)]

    def run(self) -> None:
        """Say how many days are done, and how long the others may take."""
        if not self.view:
            return
        total = (self.stop - self.start).days
        progress = _progress.get((self.view, self.start, self.stop))
        if progress is None:  # another process's backfill
            return
        progress.done[(self.date - self.start).days] = 1
        since = progress.done[:].count(1)
        done = progress.before + since
        text = f"{done} of {total} days"
        if done < total:
            left_s = (time.monotonic() - progress.begun_s) / since * (total - done)
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
    """Do many days: those of `[start, stop)` that are not done yet or, by force, all of them from a step on."""

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
        runs = self.runs()
        left = [day for day in runs if not _is_published(runs[day])]
        name = (self.view, self.start, self.stop)
        if name not in _progress:
            known = _progress[name] = Progress(time.monotonic(), len(runs) - len(left), mmap.mmap(-1, len(runs)))
            watch(self.title(), "days", lambda: (known.before + known.done[:].count(1), len(runs)))
        return [
            self.clone(BackfillDay, date=day, run_date=_run_of(day, runs[day]))  # type: ignore[no-untyped-call]
            for day in left
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
            for day, runs in self.runs().items():
                with locked(self.view_folder.lock(f"day={day}"), lambda: self.say("waiting for another run")):
                    undo(runs, self.force_from)
            write_json(self.receipt(), {"invocation": _invocation, "from": self.force_from})
        yield self._unforced()

    def _say_plan(self) -> None:
        runs = self.runs()
        missing = [str(day) for day in runs if not _is_published(runs[day])]
        if self.force_from:
            published = len(runs) - len(missing)
            text = f"would redo {len(runs)} days from {self.force_from} on, {published} of them published"
            gone = sum(_is_to_be_read(found, self.force_from) for found in runs.values())
            if gone:
                text += f"; {gone} must be read from the source again, as their rows are no longer kept"
        else:
            text = f"would do {len(missing)} of {len(runs)} days: {', '.join(missing) or 'all are done'}"
        logger.info("Backfill of `%s`: %s", self.view, text)
        self.say(text, 100)
        write_json(self.receipt(), {"invocation": _invocation, "plan": text})

    def _was_here(self) -> bool:
        """Whether this call has said, or undone, what is to be done."""
        receipt = self.receipt()
        return receipt.exists() and bool(read_json(receipt)["invocation"] == _invocation)

    def _unforced(self) -> Backfill:
        return self.clone(force_from="")  # type: ignore[no-any-return,no-untyped-call]


def _run_of(day: Date, runs: Collection[DayFolder]) -> Date:
    """The run that read a day last; the day's own if none did."""
    reads = [read_json(run.raw_receipt) for run in runs if run.raw_receipt.exists()]
    last = max(reads, key=lambda receipt: int(receipt["read_us"]), default=None)
    return day if last is None else Date.fromisoformat(last["run_date"])


def _is_published(runs: Collection[DayFolder]) -> bool:
    return any(run.offline_receipt.exists() for run in runs)


def _is_to_be_read(runs: Collection[DayFolder], step: str) -> bool:
    """Whether a day that was read must be read again, as the rows from which the step would start are gone."""
    read = [run for run in runs if run.raw_receipt.exists()]
    return bool(read) and step != "Ingest" and all(_first(run, step) == "Ingest" for run in read)


def _first(run: DayFolder, step: str) -> str:
    """The step from which a day can be redone: the one asked for, or an earlier one whose input is still there."""
    if step in {"ExploreAndValidate", "OfflineStore"} and not run.kept.exists():
        step = "Clean"
    return "Ingest" if step == "Clean" and not run.raw.exists() else step


def undo(runs: Collection[DayFolder], step: str) -> None:
    """Remove the receipts of a day from a step on, the last step's first. The steps' own files stay until replaced.

    From an earlier step, where the rows from which the step would start are gone.
    """
    for run in runs:
        receipts = (run.raw_receipt, run.clean_receipt, run.passed, run.offline_receipt)
        for receipt in reversed(receipts[STEPS.index(_first(run, step)) :]):
            receipt.unlink(missing_ok=True)
