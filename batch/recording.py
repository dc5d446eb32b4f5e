"""Record every run of a task: in the ledger, in the metrics, and, when it failed for good, at the webhook.

Luigi's events are what tells. A start is written before the task does anything, so that nothing which ends
the process later can hide it. Start, success and failure happen in the task's own process; that a task died or
took too long is noticed by the `luigi` process; and if that was killed as well, by the next try.

Recording never makes a task fail: what cannot be written is logged.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

import msgspec
from luigi import Event
from luigi.scheduler import scheduler

from batch import metrics, notice
from batch.folder import read_json
from batch.ledger import Entry, Ledger
from batch.settings import settings
from batch.tasks import ViewTask, report_url
from batch.upkeep import DivergedError
from headrace import __version__
from headrace.errors import ConfigError, HeadraceError, TerminalError
from headrace.runs import HISTORY, Run

logger = logging.getLogger("luigi-interface")

_LONGEST_ERROR = 500
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""Of a URL that is in no setting of ours, as the scheduler's."""
_entries: dict[str, Entry] = {}


def record(tasks: type[ViewTask]) -> None:
    """Record the runs of these tasks from now on."""
    for event, handler in (
        (Event.START, started),
        (Event.SUCCESS, succeeded),
        (Event.FAILURE, failed),
        (Event.PROCESS_FAILURE, lost),
        (Event.TIMEOUT, lost),
        (Event.DEPENDENCY_MISSING, refused),
        (Event.BROKEN_TASK, refused),
    ):
        tasks.event_handler(event)(handler)  # type: ignore[no-untyped-call]


def ledger() -> Ledger:
    """The ledger of this process's work folder."""
    return Ledger(settings().folder / HISTORY)


def started(task: ViewTask) -> None:
    """Write that a task runs. One without a view does nothing itself, and is not recorded."""
    if task.view and task.is_recorded:
        entry = _entries[task.task_id] = ledger().entry(_run(task))
        with _not_fatal():
            entry.open()


def succeeded(task: ViewTask) -> None:
    """Write that it is done, with the rows of its receipt."""
    if task.view and task.is_recorded:
        _end(task, _entry(task), outcome="done", rows=_rows(read_json(task.receipt())))


def failed(task: ViewTask, error: BaseException) -> None:
    """Write why it failed, and tell if it is not tried again."""
    if task.view and task.is_recorded:
        entry = _entry(task)
        is_final = isinstance(error, TerminalError) or _is_last(task, entry.run)
        diverged = error.keys if isinstance(error, DivergedError) else None
        _tell(_end(task, entry, diverged, outcome="failed", error=in_one_line(error), is_final=is_final))


def lost(task: ViewTask, message: str) -> None:
    """In the `luigi` process: write what became of a task whose process ended without a word."""
    if task.view and task.is_recorded:
        entry = ledger().newest(task.task_id, datetime.now(UTC))
        if entry is None or not entry.is_abandoned or entry.run.parent_pid != os.getpid():
            entry = ledger().entry(_run(task))
        is_final = _is_last(task, entry.run)
        _tell(_end(task, entry, outcome="killed", error=message, is_final=is_final))


def refused(task: ViewTask, *_: object) -> None:
    """In the `luigi` process: tell that nothing was started, because what was asked for cannot be done.

    Luigi hands on no reason, so it is asked for again.
    """
    try:
        settings()
    except ConfigError:  # the webhook's address is one of them
        return
    reason = "the log of the luigi command says why"
    try:
        task.complete()
    except HeadraceError as error:
        reason = in_one_line(error)
    _tell(msgspec.structs.replace(_run(task), error=reason, is_final=True))


def in_one_line(error: BaseException) -> str:
    """An error's type and the first line of its message, printable, not long, without secrets of settings or URLs."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    for secret in settings().secrets:
        text = text.replace(secret, "***")
    text = _LOGIN.sub("***", text)
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 1] + "…"


def _run(task: ViewTask) -> Run:
    """A run that starts now."""
    now = datetime.now(UTC)
    return Run(
        task=task.task_family,
        task_id=task.task_id,
        parameters=task.to_str_params(only_public=True),  # type: ignore[no-untyped-call]
        start=now,
        host=socket.gethostname(),
        pid=os.getpid(),
        parent_pid=os.getppid(),
        attempt=_attempt(task, now),
        versions={"headrace": __version__, **{name: version(name) for name in ("feast", "luigi")}},
    )


def _attempt(task: ViewTask, now: datetime) -> int:
    """Which try it is, counted as the scheduler does: failures within `disable_window`, anew after a final one."""
    before = ledger().newest(task.task_id, now)
    if before is None:
        return 1
    run = before.run
    if before.is_abandoned:
        run = _end(task, before, outcome="killed", end=None, error="ended without a word; the next try noticed")
    is_retry = run.outcome in {"failed", "killed"} and not run.is_final
    return run.attempt + 1 if is_retry and now - run.start < timedelta(seconds=scheduler().disable_window) else 1


def _is_last(task: ViewTask, run: Run) -> bool:
    return run.attempt >= (task.retry_count or scheduler().retry_count)


def _entry(task: ViewTask) -> Entry:
    """The entry of `started`, or a new one: a task whose upstream is not complete fails before its start."""
    return _entries.pop(task.task_id, None) or ledger().entry(_run(task))


def _end(task: ViewTask, entry: Entry, diverged: int | None = None, **changes: Any) -> Run:
    report = task.page()
    if report is not None and report.exists():
        changes["report"] = report.relative_to(settings().folder).as_posix()
    run = msgspec.structs.replace(entry.run, **{"end": datetime.now(UTC), **changes})
    with _not_fatal():
        entry.close(run)
    with _not_fatal():
        metrics.count(ledger().folder / metrics.FILE, run, diverged=diverged)
    return run


def _rows(receipt: dict[str, Any]) -> int | None:
    """The rows a receipt tells of: read, kept, published, or keys written or compared."""
    numbers = (receipt.get(name) for name in ("rows", "keys_written", "keys"))
    rows: int | None = next((rows for rows in numbers if rows is not None), receipt.get("counts", {}).get("kept"))
    return rows


def _tell(run: Run) -> None:
    """Send the notice, if it failed for good and there is a webhook."""
    url = settings().batch_webhook_url
    if url is None or not run.is_final:
        return
    report = None if run.report is None else report_url(settings().folder / run.report)
    content = {
        "task": run.task,
        "view": run.view,
        "date": run.parameters.get("date"),
        "outcome": run.outcome or "refused",
        "error": run.error,
        "attempt": run.attempt,
        "start": run.start.isoformat(),
        "host": run.host,
        "report": report,
    }
    notice.post(url.get_secret_value(), content)


@contextmanager
def _not_fatal() -> Iterator[None]:
    """A full disk, say, is the task's to complain of."""
    try:
        yield
    except OSError as error:
        logger.warning("the run ledger in %s cannot be written: %s", ledger().folder, error.strerror)
