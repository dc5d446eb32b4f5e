"""The five tasks of the chain, and how they fit together.

**What is complete.** A task is complete when its JSON receipt exists; the receipt is written last, so a
killed task leaves nothing that counts, and a second run of the same command starts no task. `complete()`,
`output()` and `requires()` only stat files, so that nothing that must not cross a fork is ever opened in
the parent (`batch.plan` has the reasons).

**Reading recent days again.** A commit can be late: its rows carry yesterday's `created` but were not there
when yesterday was read. So the run for date D does D and, as tasks of their own, the `HEADRACE_REREAD_DAYS`
days before it (2). Paths are keyed by run and day, `run=<D>/day=<d>`: within one run each target is made
once, and the next day's run, being another run, reads the day anew. `OfflineStore` hands the day to
`replace_day`, which writes a new snapshot only if the content changed; `Materialize` then applies what
arrived, by content hash, so an unchanged day costs a read and no write. A run that was missed is made good
by the next ones while its day is recent.

**Order.** Runs may finish out of order or at the same time, so each raw file remembers when it was read:
`OfflineStore` never replaces a day by rows that were read before those of another run's receipt. Work on
one day, and materializing one view, are under a lock of this machine; who waited for it finds the receipt
and does nothing.

**Failures.** Errors that a retry cannot mend are said before anything starts where possible, and are not
retried. A closed gate fails `ExploreAndValidate` once; the report is there, the pass marker is not, nothing
downstream runs.
"""

from __future__ import annotations

import html
import logging
import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import luigi

from batch.failures import NOT_AGAIN
from batch.folder import DayFolder, ViewFolder, clear_staging, locked, read_json, write_json
from batch.plan import Find, Plan, find_all_views, find_views, look_up
from batch.settings import settings
from headrace.errors import ConfigError, HeadraceError, SchemaError, TerminalError
from headrace.progress import Meter, shown
from headrace.runs import report_link

logger = logging.getLogger("luigi-interface")

_STATUS_INTERVAL_S = 0.5
_plans: dict[Find, Plan] = {}


class GateClosedError(SchemaError):
    """The day's data did not pass. The report says why."""


def today() -> date:
    """The day it is, UTC."""
    return datetime.now(UTC).date()


class DayParameter(luigi.DateParameter):
    """A day; a date that cannot be read is an error of one line."""

    def parse(self, text: str) -> date:  # noqa: D102 - Luigi's
        try:
            return date.fromisoformat(text)
        except ValueError:
            msg = f"--date {text!r}: expected a day such as 2026-01-31"
            raise ConfigError(msg) from None


class ViewTask(luigi.Task):
    """What the tasks have in common. Without a view a task stands for itself of every view."""

    view = luigi.Parameter(default="", description="the feature view; default: every view")
    find = staticmethod(find_all_views)
    is_recorded = True
    """Whether its runs are told of in the history; without a view none is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._views: tuple[str, ...] | None = None
        self._last_status_s = 0.0
        self._meter: Meter | None = None

    # What a task is: the subclasses say it.

    def receipt(self) -> Path:
        """The file that says that the task is complete."""
        raise NotImplementedError

    def upstream(self) -> list[ViewTask]:
        """The tasks that must be complete before."""
        return []

    def check_request(self) -> None:
        """Refuse what cannot be done, before anything starts.

        Raises:
            ConfigError: says what, and why.
        """
        _planned(self.find, self.view)

    def moment(self) -> dict[str, Any]:
        """Which run it is, for the receipt."""
        raise NotImplementedError

    def title(self) -> str:
        """What it is, in a few words for people."""
        return f"{self.task_family} {self.view}"

    def page(self) -> Path | None:
        """The report that it leaves for people; None if it leaves none."""
        return None

    def lock(self) -> str:
        """The name of the lock, within the view, under which the task works."""
        raise NotImplementedError

    def work(self) -> dict[str, Any]:
        """Do it, and return what the receipt shall say. Must be safe to repeat."""
        raise NotImplementedError

    # Luigi's side.

    def output(self) -> list[luigi.LocalTarget]:
        """The receipt; for every view, those of all."""
        if self.view:
            return [luigi.LocalTarget(str(self.receipt()))]
        return [target for task in self._of_every_view() for target in task.output()]

    def requires(self) -> list[ViewTask]:
        """The same task of every view, or what comes before it."""
        return self.upstream() if self.view else self._of_every_view()

    def complete(self) -> bool:
        """Whether the receipt exists.

        Raises:
            ConfigError: in the parent, if it does not and what was asked for cannot be done.
        """
        if not self.view:
            return all(task.complete() for task in self._of_every_view())
        done = self.receipt().exists()
        if not done and multiprocessing.parent_process() is None:
            self.check_request()
        return done

    def run(self) -> None:
        """Do the work under the lock, unless another run just did it, and write the receipt."""
        if not self.view:
            return
        with shown(self.title()) as self._meter:
            try:
                with locked(
                    self.view_folder.lock(self.lock()), lambda: self.say("waiting for another run's work on it")
                ):
                    self._work_once()
            except TerminalError as error:
                self.say(str(error))
                raise

    def _work_once(self) -> None:
        started = time.monotonic()
        receipt = self.receipt()
        if receipt.exists():
            self.say("done by another run", 100)
            return
        clear_staging(receipt.parent)
        content = self.work()
        write_json(
            receipt,
            {
                "task": type(self).__name__,
                "task_id": self.task_id,
                "view": self.view,
                **self.moment(),
                **content,
                "duration_s": round(time.monotonic() - started, 3),
                "finished": datetime.now(UTC),
                "versions": {name: version(name) for name in ("feast", "luigi", "pyarrow")},
            },
        )

    def on_failure(self, exception: BaseException) -> str:
        """What the scheduler's page shows: the message alone, if the error is one of ours; and if it is final."""
        if isinstance(exception, HeadraceError):
            text = f"{type(exception).__name__}: {exception}"
            return f"{text}\n{NOT_AGAIN}" if isinstance(exception, TerminalError) else text
        return "".join(traceback.format_exception(exception))

    # Towards the person who watches.

    def say(self, message: str, progress: float | None = None) -> None:
        """Show a status, and how far it is in percent, in the scheduler's pages and at a terminal.

        Outside a worker there are no pages. They put the text in as HTML, therefore it is escaped.
        """
        if self._meter is not None:
            self._meter.say(message)
        self._tell_scheduler(message, progress)

    def _tell_scheduler(self, message: str, progress: float | None = None) -> None:
        set_message: Callable[[str], None] | None = self.set_status_message
        if set_message is not None:
            set_message(html.escape(message))
        set_progress: Callable[[float], None] | None = self.set_progress_percentage
        if set_progress is not None and progress is not None:
            set_progress(round(progress, 1))
        self._last_status_s = time.monotonic()

    def say_progress(self, done: int, total: int | None, what: str) -> None:
        """As `say`, but not more often than it can be read."""
        if self._meter is not None:
            self._meter.update(done, total, what)
        if time.monotonic() - self._last_status_s < _STATUS_INTERVAL_S:
            return
        if total:
            self._tell_scheduler(f"{done:,} of {total:,} {what}", 100 * done / total)
        else:
            self._tell_scheduler(f"{done:,} {what}")

    def link(self, url: str) -> None:
        """Show a link in the scheduler's pages. Outside a worker: nothing."""
        set_url: Callable[[str], None] | None = self.set_tracking_url
        if set_url is not None:
            set_url(url)

    # Views.

    @property
    def view_folder(self) -> ViewFolder:
        """The view's part of the work folder."""
        return ViewFolder(settings().folder, self.view)

    def _of_every_view(self) -> list[ViewTask]:
        if self._views is None:
            self._views = tuple(_planned(self.find, "").problems)
        return [self.clone(view=view) for view in self._views]  # type: ignore[no-untyped-call]


class ChainTask(ViewTask):
    """A task of the chain, which is run for a date."""

    view = luigi.Parameter(default="", description="the feature view; default: every view with a source")
    date = DayParameter(default=today() - timedelta(days=1), description="the day; default: yesterday, UTC")
    find = staticmethod(find_views)

    def days(self) -> list[DayFolder]:
        """The days whose data the task rests on."""
        raise NotImplementedError

    def check_request(self) -> None:
        """Refuse a day that is not over, and a view or a source that does not fit."""
        if self.date >= today():
            newest = today() - timedelta(days=1)
            msg = f"{self.date} is not over yet (UTC); the newest day that can be done is {newest}"
            raise ConfigError(msg)
        self._check_source()

    def _check_source(self) -> None:
        """Refuse a view whose source cannot be read, if it must be."""
        plan = _planned(self.find, self.view)
        problem = plan.problems.get(self.view)
        if plan.is_single and problem is not None and any(_needs_source(day) for day in self.days()):
            raise ConfigError(problem)

    def title(self) -> str:
        """With the day."""
        return f"{super().title()} {self.date}"

    def moment(self) -> dict[str, Any]:
        """The day, and the run for which it is done."""
        return {"date": self.date, "run_date": getattr(self, "run_date", self.date)}


class DayTask(ChainTask):
    """A step of one day in one run.

    The parameter `run_date` is the run for which the day is done: its own date, unless a later run reads it
    again.
    """

    run_date = DayParameter(default=None, description="the run that does the day; default: the day's own")

    @classmethod
    def get_param_values(cls, params: Any, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        """Luigi's, with the default of `run_date` filled in: the same work is the same task."""
        values = dict(super().get_param_values(params, args, kwargs))  # type: ignore[no-untyped-call]
        if values["run_date"] is None:
            values["run_date"] = values["date"]
        return list(values.items())

    @property
    def folder(self) -> DayFolder:
        """Where the step works."""
        return self.view_folder.day(self.run_date, self.date)

    def days(self) -> list[DayFolder]:
        """Its own."""
        return [self.folder]

    def page(self) -> Path:
        """The day's report, whichever step it is."""
        return self.folder.report

    def lock(self) -> str:
        """All runs that work on a day take turns."""
        return f"day={self.date}"


class Ingest(DayTask):
    """Read a day from the source to raw Parquet.

    From the command line of any task of the chain: `--Ingest-accept-schema`.
    """

    accept_schema = luigi.BoolParameter(
        default=False, significant=False, description="take the source's columns as they are, if they changed"
    )

    @property
    def retry_count(self) -> int | None:
        """What the look-up found wrong with the source is wrong for good; else as `luigi.cfg` says."""
        plan = _plans.get(self.find)
        return 1 if plan is not None and plan.problems.get(self.view) is not None else None

    def receipt(self) -> Path:
        """`raw.json`."""
        return self.folder.raw_receipt

    def work(self) -> dict[str, Any]:
        """Read the source's rows of the day, in chunks."""
        from batch import steps  # noqa: PLC0415 - as the module's docstring says

        accept: bool = self.accept_schema
        return steps.ingest(self.view, self.date, self.folder, self, accept_schema=accept)


class Clean(DayTask):
    """Types, rules, the view's transformation, duplicates. Rejected rows are kept with their reason."""

    def receipt(self) -> Path:
        """`clean.json`."""
        return self.folder.clean_receipt

    def upstream(self) -> list[ViewTask]:
        """`Ingest`."""
        return [self.clone(Ingest)]  # type: ignore[no-untyped-call]

    def work(self) -> dict[str, Any]:
        """Write the clean and the rejected rows."""
        from batch import steps  # noqa: PLC0415 - as the module's docstring says

        return steps.clean_day(self.view, self.folder, self)


class ExploreAndValidate(DayTask):
    """The report, and the gate: the pass marker appears only if every check passes."""

    retry_count = 1

    def receipt(self) -> Path:
        """`passed.json`, the pass marker."""
        return self.folder.passed

    def upstream(self) -> list[ViewTask]:
        """`Clean`."""
        return [self.clone(Clean)]  # type: ignore[no-untyped-call]

    def work(self) -> dict[str, Any]:
        """Write the report, link it, and fail if the gate is closed."""
        from batch import steps  # noqa: PLC0415 - as the module's docstring says

        url = report_url(self.folder.report)
        findings = steps.report(self.view, self.date, self.folder, self)
        self.link(url)
        reasons = "; ".join(
            f"{check.name}: {check.found}, expected {check.expected}" for check in findings.failed("error")
        )
        if reasons:
            msg = f"the gate is closed for view `{self.view}`, {self.date}: {reasons}; what to do: {url}"
            raise GateClosedError(msg)
        warnings = len(findings.failed("warning"))
        self.say(f"passed, {warnings} warnings" if warnings else "passed", 100)
        return {"report": url, "warnings": warnings}


class OfflineStore(DayTask):
    """Publish the day in the offline store, all at once."""

    def receipt(self) -> Path:
        """`offline.json`."""
        return self.folder.offline_receipt

    def upstream(self) -> list[ViewTask]:
        """`ExploreAndValidate`."""
        return [self.clone(ExploreAndValidate)]  # type: ignore[no-untyped-call]

    def work(self) -> dict[str, Any]:
        """Replace the day's snapshot if its content changed and nobody published a later read of it."""
        from batch import steps  # noqa: PLC0415 - as the module's docstring says

        read_us: int = read_json(self.folder.clean_receipt)["read_us"]
        newer = newer_read(self.view_folder, self.date, read_us)
        if newer is not None:
            self.say(f"left as it is: run {newer} read the day later", 100)
            return {"read_us": read_us, "superseded_by": newer}
        return {"read_us": read_us, **steps.publish_day(self.view, self.date, self.folder, self)}


class Materialize(ChainTask):
    """Bring to the online store what arrived in the offline store since the last time."""

    resources = {"online_store": 1}  # noqa: RUF012 - as Luigi declares it

    def receipt(self) -> Path:
        """`materialize.json`."""
        return self.view_folder.materialized(self.date)

    def upstream(self) -> list[ViewTask]:
        """`OfflineStore` of the day and of the recent days, which are read again."""
        return [OfflineStore(view=self.view, date=day, run_date=self.date) for day in self._dates()]

    def days(self) -> list[DayFolder]:
        """The day and the recent ones."""
        return [self.view_folder.day(self.date, day) for day in self._dates()]

    def lock(self) -> str:
        """One at a time for a view."""
        return "materialize"

    def work(self) -> dict[str, Any]:
        """Apply what arrived."""
        from batch import steps  # noqa: PLC0415 - as the module's docstring says

        return steps.materialize(self.view, self)

    def _dates(self) -> list[date]:
        recent = [self.date - timedelta(days=back) for back in range(1, settings().reread_days + 1)]
        first = settings().start_date
        return [self.date, *(day for day in recent if first is None or day >= first)]


def report_url(report: Path) -> str:
    """Where a person finds a report."""
    link = report_link(settings().report_url, report.relative_to(settings().folder).as_posix())
    return link or report.as_uri()


def newer_read(folder: ViewFolder, day: date, read_us: int) -> str | None:
    """The run that published the day from rows that were read later than `read_us`."""
    for other in folder.runs_of(day):
        if other.offline_receipt.exists():
            receipt = read_json(other.offline_receipt)
            if receipt["read_us"] > read_us and "superseded_by" not in receipt:
                return str(receipt["run_date"])
    return None


def _planned(find: Find, view: str) -> Plan:
    """The look-up of this process, made when it is first needed, once; children inherit it."""
    if find not in _plans:
        _plans[find] = look_up(settings(), view, find)
    return _plans[find]


def _needs_source(day: DayFolder) -> bool:
    """Whether a day still has to be read: none of its steps is complete (Luigi does not look before one)."""
    steps = (day.raw_receipt, day.clean_receipt, day.passed, day.offline_receipt)
    return not any(receipt.exists() for receipt in steps)
