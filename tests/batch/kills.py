"""End a `luigi` command with SIGKILL at every step of what its tasks do to files, and see what the next makes of it.

A run is the command in a fork of this process, which has imported what every command imports, and then does what the
`luigi` script does. Its tasks tell each step before they take it: what Python opens to write, renames, links and
removes within the place, what it syncs, and the numbered steps of the stores (`headrace.faults`). The clock that says
when a day was read stands still, so that everything must come out byte for byte as without the kill.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
from luigi.cmdline import luigi_run

import batch.steps  # noqa: F401 - as the parent of tasks has it
import headrace
from batch import command_line
from headrace import faults
from headrace.repository import contracts, open_store
from tests.batch.place import D, Place, apply_template, good_rides, place_in
from tests.batch.upkeep import History
from tests.headrace.crashes import forked

WAYS = ("task", "all", "command")
"""Who is killed: the task's process, all of the command, or the `luigi` process alone, whose tasks must end with it."""

NEXT = D + timedelta(days=1)
FIRST_READ_NS = 1_790_000_000 * 10**9
READ_NS = FIRST_READ_NS + 10**12
AT = "2026-03-20T0815"
RANGE = ("Backfill", "--start", str(D), "--stop", str(NEXT + timedelta(days=1)))
FIRST = {"Ingest", "BackfillDay", "Compact", "Audit", "Repair", "Retain"}
"""Of each command the task that comes first."""

HOW = [
    *("keys", "keys_written", "days", "already", "moved", "mended", "before", "chains", "keys_materialized"),
    *("duration_s", "finished", "made", "ends_taken", "audit_s", "seconds", "temporary_deleted"),
    *("changed", "report", "checks", "columns", "keys_taken_back", "files", "bytes", "pruned"),
]
"""What receipts and reports say of how it went: how much was left to do, where, how long it took, and how the day
compares with those before: a report may be made before or after another day of its run is published anew."""

SHARED = ("profiles/", "withdrawn/.staging/")
"""Caches; and where many write at once: what a kill leaves there goes when it is a day old."""

CHANGING = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"}


@dataclass(frozen=True)
class Case:
    """A command, on a place that is prepared for it.

    Attributes:
        again: what completes it after a kill; the same, where there is nothing.
    """

    command: tuple[str, ...]
    prepare: Callable[[Place], None]
    view: str = "rides"
    settings: dict[str, Any] = field(default_factory=dict)
    again: tuple[str, ...] = ()


def every_day_anew(place: Place) -> None:
    """Two days are done; of the second one row is late, one corrected, one gone, and the third day is new."""
    place.insert("rides", [*good_rides(D - timedelta(days=1), 5), *good_rides(D, 8)])
    for day in (D - timedelta(days=1), D):
        _expect(_luigi(place, ("Materialize", "--view", "rides", "--date", str(day)), FIRST_READ_NS), 0)
    place.insert("rides", [{**good_rides(D, 1)[0], "rider": "late"}, *good_rides(NEXT, 6)])
    place.execute("UPDATE rides SET distance_km = 77 WHERE rider = 'rider 6'")
    place.execute(f"DELETE FROM rides WHERE rider = 'rider 7' AND happened < '{NEXT}'")


def streamed(place: Place) -> None:
    """A view of the stream in some files, in which both stores differ at one key."""
    history = History.of(place, "notes")
    for key in range(6):
        history.stream((key, key, key))
    history.force((1, 1, 99))


CASES = {
    "Materialize": Case(("Materialize", "--date", str(NEXT)), every_day_anew, settings={"reread_days": 1}),
    "Backfill": Case(RANGE, every_day_anew),
    "Backfill by force": Case((*RANGE, "--force-from", "Clean"), every_day_anew, again=RANGE),
    "Compact": Case(("Compact", "--at", AT), streamed, "notes", {"compact_grace_s": 0}),
    "Compact of the work folder": Case(("Compact", "--at", AT), every_day_anew, settings={"batch_keep_days": 0}),
    "Audit": Case(("Audit", "--at", AT), every_day_anew),
    "Repair": Case(("Repair", "--at", AT), streamed, "notes"),
    "Retain": Case(("Retain", "--at", AT), streamed, "notes"),
}


def explore(name: str, home: str, every: str, ways: str) -> dict[str, Any]:
    """Kill a case's command at each n-th of its steps, in each way, and say what did not hold."""
    case = CASES[name]
    folder = Path(home)
    prepared = place_in(folder / "prepared", apply_template(folder / "template"))
    _expect(forked(lambda: case.prepare(prepared)), 0)
    done = _copy(prepared, folder / "done")
    _expect(_luigi(done, _words(case), READ_NS, record=folder / "steps", **case.settings), 0)
    steps = (folder / "steps").read_text(encoding="utf-8").splitlines()
    wanted = _state(done, case.view)
    losses, runs = [], 0
    chosen = list(enumerate(steps))[:: int(every)]
    for number, step in chosen:
        for way in ways.split(","):
            runs += 1
            copy = _copy(prepared, folder / f"run-{runs}")
            try:
                _killed(case, copy, step, way)
                found = _state(copy, case.view)
                losses += [f"{step} ({way}): {what}" for what in _differences(wanted, found)]
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a loss
                losses.append(f"{number} {step} ({way}): {type(error).__name__}: {error}")
            shutil.rmtree(copy.root)
    return {"points": [step for _, step in chosen], "runs": runs, "losses": losses}


def _killed(case: Case, place: Place, step: str, way: str) -> None:
    """The command that is killed at a step, then the command."""
    code = _luigi(place, _words(case), READ_NS, end_at=step, way=way, **case.settings)
    if code != (30 if way == "task" else -signal.SIGKILL):
        msg = f"ended with {code} where it was to be killed"
        raise AssertionError(msg)
    _expect(_luigi(place, (*(case.again or case.command), "--view", case.view), READ_NS, **case.settings), 0)


def _words(case: Case) -> tuple[str, ...]:
    return *case.command, "--view", case.view


def _luigi(
    place: Place,
    words: Sequence[str],
    read_ns: int,
    *,
    record: Path | None = None,
    end_at: str | None = None,
    way: str = "",
    **settings: object,
) -> int:
    """Run a command; its exit code, or minus the signal that ended it. All of it is gone when this returns."""

    def work() -> None:
        os.setsid()
        os.chdir(place.root)
        for name, value in place.settings(**{"reread_days": 0, **settings}).items():
            os.environ[name] = value
        log = os.open(place.root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        time.time_ns = lambda: read_ns
        _watch(place.root / "data", record, end_at, way)
        sys.argv = ["luigi", "--module", "batch", *words]
        sys.argv += ["--local-scheduler", "--no-lock", "--scheduler-retry-count", "1"]
        sys.argv += ["--worker-wait-interval", "0.05", "--worker-wait-jitter", "0"]
        command_line.prepare()
        luigi_run(sys.argv[1:])

    pid = os.fork()
    if pid == 0:
        try:
            work()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:  # noqa: BLE001 - it must not go on as this process does
            import traceback  # noqa: PLC0415

            traceback.print_exc()
        os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _wait_for_the_rest(pid)
    return code


def _wait_for_the_rest(session: int) -> None:
    """Until every task of the command is gone, as the kernel promised; they are few milliseconds behind."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)
    msg = "a task outlives its command"
    raise AssertionError(msg)


def _watch(data: Path, record: Path | None, end_at: str | None, way: str) -> None:
    """Tell the steps of tasks, or end at one."""
    counts: dict[str, int] = {}

    def passed(what: str) -> None:
        task = getattr(multiprocessing.current_process(), "task", None)
        # The history is written alike by every task: one will do.
        if task is None or not task.view or (what.endswith("in history") and task.task_family not in FIRST):
            return
        name = f"{task.task_family} {getattr(task, 'date', None) or ''} {what}"
        counts[name] = counts.get(name, 0) + 1
        step = f"{name} {counts[name]}"
        if record is not None:
            with real_open(record, "a") as file:
                file.write(step + "\n")
        elif step == end_at:
            if way == "task":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getppid() if way == "command" else 0, signal.SIGKILL)

    real_open, root = open, str(data)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and path.startswith(root) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                passed(f"open {_plain(path)}")
        elif event == "os.mkdir" and Path(arguments[0]).exists():
            return
        elif event in CHANGING and str(arguments[0]).startswith(root):
            passed(f"{event} {_plain(str(arguments[0]))}")

    def fsync(descriptor: int) -> None:
        passed(f"fsync {_plain(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        real_fsync(descriptor)

    real_fsync = os.fsync
    if record is not None or end_at is not None:
        os.fsync = fsync  # type: ignore[assignment]
        faults.hook = passed
        sys.addaudithook(audit)


def _plain(path: str) -> str:
    """A file's name without what is different in each run."""
    name = Path(path).name
    if "/history" in path:
        return "in history"
    for end in (".parquet", ".json", ".html", ".prom"):
        if end in name:
            return name[: name.index(end)] + end
    return name


def _state(place: Place, view: str) -> dict[str, Any]:
    """Everything that counts, as it must be whatever happened."""
    state: dict[str, Any] = {}
    data = place.root / "data"
    for path in sorted((data / "offline" / view).glob("batch-*")):
        state[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    work = data / "batch" / view
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if not path.is_file() or ".locks" in name or path.name == "forced.json":
            continue
        if name.startswith(SHARED):
            continue
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            for changing in [*HOW, *(["rows"] if path.name == "retain.json" else [])]:
                content.pop(changing, None)
            state[name] = json.dumps(content).replace(str(place.root), "")
        else:
            state[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".parquet" else "there"
    with sqlite3.connect(data / "online.db") as online:
        tables = [name for (name,) in online.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            found = sorted(map(repr, online.execute(f'SELECT * FROM "{table}"')))
            state[f"online {table}"] = found if "marks" not in table else len(found)
    online.close()

    def rows() -> None:
        contract = contracts(open_store(place.repo), [view])[0]
        table = ds.dataset(headrace.files(contract), schema=contract.schema).to_table()
        (place.root / "rows").write_text("\n".join(sorted(map(repr, table.to_pylist()))), encoding="utf-8")

    _expect(forked(rows), 0)
    state["rows"] = (place.root / "rows").read_text(encoding="utf-8")
    return state


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {str(found.get(name))[:300]}, expected {str(wanted.get(name))[:300]}"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]


def _copy(place: Place, root: Path) -> Place:
    """A copy, and the source where the command looks for it."""
    shutil.copytree(place.root, root)
    return Place(root)


def _expect(pid_or_code: int, code: int) -> None:
    found = os.waitstatus_to_exitcode(os.waitpid(pid_or_code, 0)[1]) if pid_or_code > 255 else pid_or_code
    if found != code:
        msg = f"expected the process to end with {code}, it ended with {found}"
        raise AssertionError(msg)
