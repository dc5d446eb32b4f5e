"""What Luigi leaves to its user: an orderly end, true exit codes, and errors in one line."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

from luigi.configuration import get_config
from luigi.parameter import UnconsumedParameterWarning

from batch import failures, processes
from headrace import progress
from headrace.errors import HeadraceError
from headrace.quick_import import leave_feast_unchecked

DEFAULTS = {
    "retcode": {
        "already_running": "10",
        "missing_data": "20",
        "not_run": "25",
        "task_failed": "30",
        "scheduling_error": "35",
        "unhandled_exception": "40",
    },
    "worker": {"check_complete_on_run": "true", "force_multiprocessing": "true", "keep_alive": "true"},
    "scheduler": {"prune_on_get_work": "true", "retry_count": "3", "retry_delay": "60"},
    "core": {
        "log_level": "INFO",
        "rpc_retry_attempts": "3",
        "rpc_retry_wait": "2",
        "lock_pid_dir": str(Path(tempfile.gettempdir()) / f"luigi-{os.getuid()}"),
    },
}
"""What the chain cannot do without, for a folder that has no `luigi.cfg`; a `luigi.cfg` wins. With Luigi's
own defaults a failed task exits 0, and with `keep_alive` it is tried again for ever; a scheduler that is down is told
after a minute and a half; and the folder of locks belongs to whoever of the machine's users came first."""

_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n.*", re.DOTALL)
_WORKER = re.compile(r"\bWorker Worker\(.*?\) +(?=(running|done|failed|new requirements) )")


def prepare() -> None:
    """Set up this process if it is a `luigi` command, and leave any other alone."""
    if not {"luigi", "luigi.py"} & set(Path(sys.argv[0]).parts[-2:]):
        return
    config = get_config()
    for section, options in DEFAULTS.items():
        for option, value in options.items():
            if not config.has_option(section, option):
                config.set(section, option, value)
    # It is raised for options of [core] that Luigi itself documents.
    warnings.simplefilter("ignore", UnconsumedParameterWarning)
    logging.getLogger("luigi-interface").addFilter(one_line)
    processes.guard()
    if multiprocessing.parent_process() is None:
        atexit.register(failures.tell)
    progress.install()
    if progress.is_installed():
        logging.getLogger("luigi-interface").addFilter(in_short)
    leave_feast_unchecked()


def one_line(record: logging.LogRecord) -> bool:
    """Replace the traceback of an error that Headrace raised on purpose by its message."""
    error = record.exc_info[1] if record.exc_info is not None else None
    if isinstance(error, HeadraceError):
        if record.getMessage().startswith("Uncaught exception"):  # the end of the command, which says it then
            failures.note_of_all(str(error))
            return False
        record.msg = f"{record.getMessage()}: {error}"
        record.args = None
        record.exc_info = None
        record.exc_text = None
        return True
    text = record.getMessage()
    found = failures.OURS.search(text)
    if found is not None and _TRACEBACK.search(text):
        record.msg = _TRACEBACK.sub("", text).rstrip() + " " + found["message"].strip()
        record.args = None
    return True


def in_short(record: logging.LogRecord) -> bool:
    """At a terminal leave out what Luigi tells the scheduler, and the worker's name, but for those who debug."""
    if logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
        return True
    text = record.getMessage()
    if "Worker Worker(" in text:
        record.msg, record.args = _WORKER.sub("", text), None
    return not text.startswith("Informed scheduler that task ") and not text.endswith("Shutting down Keep-Alive thread")
