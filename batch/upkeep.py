"""The tasks that keep the stores in order: `Compact`, `Audit`, `Repair` and `Retain`.

**What is complete.** These tasks have no day; each looks at the stores as they are now. What makes two runs of a
schedule two tasks is the minute at which each was asked for, `--at`: a run is complete when the receipt of its minute
exists. So the same command may be started each hour, and started twice in one minute it works once. Runs of different
minutes take turns, a view and task at a time.

**Failures.** As in the chain: what a retry cannot mend is not retried. An audit that finds a difference fails so, and
leaves its report but no receipt: the same command looks again.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import luigi

from batch.tasks import ViewTask, report_url
from headrace.errors import ConfigError, TerminalError


class DivergedError(TerminalError):
    """The stores differ. The report says where.

    Attributes:
        keys: how many keys differ.
    """

    def __init__(self, message: str, keys: int) -> None:
        super().__init__(message)
        self.keys = keys

    def __reduce__(self) -> tuple[type[DivergedError], tuple[str, int]]:
        return (type(self), (str(self), self.keys))


def now() -> datetime:
    """The present moment, UTC, without a zone as Luigi wants it."""
    return datetime.now(UTC).replace(tzinfo=None)


def in_short(share: float) -> str:
    """A share as on the command line, one text for one number."""
    return f"{share:.12g}"


class MinuteParameter(luigi.DateMinuteParameter):
    """A minute; one that cannot be read is an error of one line."""

    def parse(self, text: str) -> datetime:  # noqa: D102 - Luigi's
        try:
            return datetime.strptime(text, self.date_format)  # noqa: DTZ007 - as Luigi has it
        except ValueError:
            msg = f"--at {text!r}: expected a minute, UTC, such as 2026-01-31T0815"
            raise ConfigError(msg) from None


class ShareParameter(luigi.FloatParameter):
    """A share of all, above 0 and at most 1; one that cannot be read is an error of one line."""

    def parse(self, text: str) -> float:  # noqa: D102 - Luigi's
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            msg = f"--sample {text!r}: expected a share of the keys above 0 and at most 1, such as 0.01"
            raise ConfigError(msg)
        return share

    def serialize(self, share: float) -> str:  # noqa: D102 - Luigi's
        return in_short(share)


class UpkeepTask(ViewTask):
    """What the four tasks have in common."""

    at = MinuteParameter(default=now(), description="the minute that names the run, UTC; default: the present one")

    @property
    def name(self) -> str:
        """The task with what else was asked for, as its folder is called."""
        return self.lock()

    @property
    def folder(self) -> Path:
        """Where the run leaves its files."""
        return self.view_folder.upkeep(self.name, f"{self.at:%Y-%m-%dT%H%M}")

    def receipt(self) -> Path:
        """Named as the task."""
        return self.folder / f"{self.lock()}.json"

    def lock(self) -> str:
        """One run of a task at a time for a view."""
        return str(self.task_family).lower()

    def moment(self) -> dict[str, Any]:
        """The minute."""
        return {"at": f"{self.at:%Y-%m-%dT%H%M}"}

    def check_request(self) -> None:
        """Refuse a minute that has not come, for which the work of now would count, and a view that is unknown."""
        if self.at > now():
            msg = f"--at {self.at:%Y-%m-%dT%H%M} has not come yet: it is {now():%Y-%m-%dT%H%M} (UTC)"
            raise ConfigError(msg)
        super().check_request()


class Compact(UpkeepTask):
    """Merge small files of the offline store, and remove those that were merged or replaced a while ago."""

    def work(self) -> dict[str, Any]:
        """Merge and remove, or find that there is nothing to do."""
        from batch import steps  # noqa: PLC0415 - as in `batch.tasks`

        return steps.compact_view(self.view, self)


class Audit(UpkeepTask):
    """Compare the online value of every key, or of a sample, with its newest offline row.

    Each minute `at` has another sample, the same whoever takes it, and each key the same chance to be in it.
    """

    sample = ShareParameter(default=1.0, description="the share of the keys that is looked at; default: 1, all")

    @property
    def name(self) -> str:
        """`audit`, or `audit-sample-<share>`, which says less."""
        return "audit" if self.sample == 1 else f"audit-sample-{in_short(self.sample)}"

    def lock(self) -> str:
        """Audits change nothing: a sample need not wait for all."""
        return self.name

    def receipt(self) -> Path:
        """`passed.json`, the sign that the stores agree."""
        return self.folder / "passed.json"

    def page(self) -> Path:
        """What was compared, and where it differs."""
        return self.folder / "report.html"

    def work(self) -> dict[str, Any]:
        """Write the report, link it, and fail if a key differs."""
        from batch import audit_report, steps  # noqa: PLC0415 - as in `batch.tasks`

        minute = (self.at - datetime.min) // timedelta(minutes=1)  # noqa: DTZ901 - as Luigi has it
        found = steps.audit_view(self.view, self.folder, self, share=self.sample, seed=minute)
        url = report_url(self.page())
        self.link(url)
        if found.diverged:
            command = audit_report.repair_command(found)
            msg = f"view `{self.view}`: {audit_report.summary(found)}; see {url}; to mend it: {command}"
            raise DivergedError(msg, found.diverged)
        return {
            "report": url,
            "sample": self.sample,
            "keys": found.keys,
            "counts": audit_report.as_json(found.counts),
        }


class Repair(UpkeepTask):
    """Mend just the keys that differ, and audit again."""

    backwards = luigi.BoolParameter(
        description="also take back what only the online store has; values that were never offline are lost by that"
    )
    resources = {"online_store": 1}  # noqa: RUF012 - as Luigi declares it

    @property
    def name(self) -> str:
        """`repair`, or `repair-backwards`, which is more."""
        return "repair-backwards" if self.backwards else "repair"

    def work(self) -> dict[str, Any]:
        """Mend what differs."""
        from batch import steps  # noqa: PLC0415 - as in `batch.tasks`

        return steps.repair_view(self.view, self, backwards=self.backwards)


class Retain(UpkeepTask):
    """Remove rows that are older than the view's tag `retain_days` allows, by whole files."""

    dry_run = luigi.BoolParameter(description="say what would be removed, and remove nothing")

    @property
    def name(self) -> str:
        """`retain`, or `retain-dry-run`."""
        return "retain-dry-run" if self.dry_run else "retain"

    def work(self) -> dict[str, Any]:
        """Remove what is wholly older; its files go with a later `Compact`."""
        from batch import steps  # noqa: PLC0415 - as in `batch.tasks`

        return steps.retain_view(self.view, self.at, self, dry_run=self.dry_run)
