"""How the processes of a command end, and what that leaves: the literal command line, real signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch.ledger import Ledger
from tests.batch.commands import SETTINGS, lives, luigid, recorded, running, started, tries, wait_for
from tests.batch.place import D, Place, good_rides, without_cache, zone_rows

CHAIN = ("Materialize", "--date", str(D))
ZONES = (*CHAIN, "--view", "zones")


def test_a_task_that_takes_too_long_is_ended_counted_once_and_tried_again(place: Place) -> None:
    place.insert("zones", zone_rows(D))
    options = ("--worker-timeout", "4", "--scheduler-retry-count", "2", "--scheduler-retry-delay", "1")
    with started(place, *ZONES, *options, sleep_s=60) as process:
        _, said = process.communicate(timeout=90)
    assert process.returncode == 30, said
    assert len(re.findall(r"^INFO: .* timed out after 4 seconds and was terminated", said, re.M)) == 2
    assert said.count("running   Clean(") == 2
    runs = [run for run in recorded(place) if run.task == "Clean"]
    assert [(run.outcome, run.attempt, run.is_final) for run in runs] == [("killed", 1, False), ("killed", 2, True)]
    assert all(run.error is not None and "timed out" in run.error for run in runs)
    assert without_staging(place) == ["raw.json", "raw.parquet"]
    place.run(*ZONES, "--local-scheduler", **SETTINGS)
    assert not leftovers(place)


def test_a_task_that_is_deaf_to_signals_is_ended_all_the_same(place: Place) -> None:
    """Within a call of a library that never comes back, no handler written in Python would run."""
    (place.repo / "transforms.py").write_text(DEAF, encoding="utf-8")
    place.insert("zones", zone_rows(D))
    with started(place, *ZONES, "--worker-timeout", "4", "--scheduler-retry-count", "1") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 30, said
    assert len(re.findall(r"^INFO: .* timed out after 4 seconds", said, re.M)) == 1
    assert said.endswith(f"\nerror: Clean zones {D}: timed out after 4 seconds and was terminated.\n")


@pytest.mark.parametrize("scheduler", ["local", "luigid"])
def test_what_cannot_be_mended_is_tried_once_and_the_rest_as_luigi_cfg_says(place: Place, scheduler: str) -> None:
    place.insert("zones", zone_rows(D))
    broken = place.root / "data/offline/zones" / f"batch-{D}-{7:020}.parquet"
    broken.parent.mkdir(parents=True)
    broken.write_text("torn", encoding="utf-8")
    options = [*ZONES, "--scheduler-retry-count", "3", "--scheduler-retry-delay", "0"]
    with luigid(place) as server:
        options += ["--local-scheduler"] if scheduler == "local" else server.option
        failed = place.run(*options, expect=30, **SETTINGS)
        assert "expected a segment with a `headrace` footer" in failed.stderr
        assert tries(place, "OfflineStore") == [("failed", True)]
        broken.unlink()
        (place.root / "data/online.db").unlink(missing_ok=True)
        (place.root / "data/online.db").mkdir()
        time.sleep(1.1)  # `disable_persist` of the scheduler below
        place.run(*options, expect=30, **SETTINGS)
        assert tries(place, "Materialize") == [("failed", False), ("failed", False), ("failed", True)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_the_command_ends_it_and_its_children(signum: signal.Signals, place: Place) -> None:
    place.insert("zones", zone_rows(D))
    with started(place, *ZONES, sleep_s=60) as process:
        child = running(place, "Clean")
        process.send_signal(signum)
        _, said = process.communicate(timeout=10)
        assert process.returncode == -signum, said
        assert wait_for(lambda: not lives(child), 5)
    assert "Traceback" not in said
    if signum != signal.SIGKILL:
        assert f"ended by {signum.name}; no task is left running" in said
    assert recorded(place)[-1].outcome == "killed"
    assert without_staging(place) == ["raw.json", "raw.parquet"]
    place.run(*ZONES, "--local-scheduler", **SETTINGS)
    assert not leftovers(place)
    assert place.offline("zones").num_rows == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_a_task_is_a_failure_that_is_tried_again(signum: signal.Signals, place: Place) -> None:
    place.insert("zones", zone_rows(D))
    with started(place, *ZONES, "--scheduler-retry-count", "1", sleep_s=60) as process:
        os.kill(running(place, "Clean"), signum)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 30, said
    assert tries(place, "Clean") == [("killed", True)]
    with started(place, *ZONES, "--scheduler-retry-delay", "0", sleep_s=3) as process:
        os.kill(running(place, "Clean", 2), signum)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert tries(place, "Clean")[1:] == [("killed", False), ("done", False)]


def test_ctrl_c_at_a_terminal_ends_all_quietly(place: Place) -> None:
    """It reaches every process of the group at once."""
    place.insert("zones", zone_rows(D))
    with started(place, *ZONES, sleep_s=60) as process:
        child = running(place, "Clean")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in said
    assert wait_for(lambda: not lives(child), 5)


def test_a_signal_ends_a_command_that_is_held_up(place: Place) -> None:
    """By a luigid that does not answer any more."""
    place.insert("zones", zone_rows(D))
    with luigid(place) as server:
        options = (*server.option, "--worker-ping-interval", "0.2")
        with started(place, *ZONES, *options, local=False, sleep_s=60) as process:
            child = running(place, "Clean")
            server.process.send_signal(signal.SIGSTOP)
            try:
                time.sleep(1)
                process.send_signal(signal.SIGTERM)
                assert process.wait(5) == -signal.SIGTERM
                assert wait_for(lambda: not lives(child), 5)
            finally:
                server.process.send_signal(signal.SIGCONT)


def test_a_signal_ends_a_command_that_is_the_first_process_of_a_container(place: Place) -> None:
    """The kernel keeps signals without a handler from it."""
    if subprocess.run(["unshare", "--pid", "--fork", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no process namespaces for this user")
    place.insert("zones", zone_rows(D))
    before = ("unshare", "--pid", "--fork", "--mount-proc")
    with started(place, *ZONES, sleep_s=60, before=before) as process:
        running(place, "Clean")
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()[0]
        os.kill(int(first), signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM


def test_under_nohup_a_command_outlives_its_terminal(place: Place) -> None:
    place.insert("zones", zone_rows(D))
    with started(place, *ZONES, sleep_s=3, before=("nohup",)) as process:
        child = running(place, "Clean")
        os.kill(child, signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("folders", [("data/batch", "data/batch"), ("data/a", "data/b")])
def test_two_commands_at_once_do_the_work_once_and_harm_nothing(place: Place, folders: tuple[str, str]) -> None:
    """In one work folder, and in two as of two machines that share the stores and no lock."""
    place.insert("rides", good_rides(D))
    place.insert("zones", zone_rows(D))
    place.run("Materialize", "--date", str(D - timedelta(days=1)), "--local-scheduler")
    with (
        started(place, *CHAIN, "--workers", "2", HEADRACE_BATCH_FOLDER=place.root / folders[0]) as one,
        started(place, *CHAIN, "--workers", "2", HEADRACE_BATCH_FOLDER=place.root / folders[1]) as two,
    ):
        said = [process.communicate(timeout=120)[1] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), said
    assert (len(place.day_files("rides")), len(place.day_files("zones"))) == (1, 1)
    assert (place.offline("rides").num_rows, place.offline("zones").num_rows) == (20, 2)
    if folders[0] == folders[1]:
        runs = Ledger(place.root / folders[0] / "history").runs(2, datetime.now(UTC))
        assert len(list(place.root.rglob(f"run={D}/*/offline.json"))) == 2
        assert {run.outcome for run in runs} == {"done"}
    place.run("Audit", "--local-scheduler")


def test_no_client_is_shared_across_a_fork(place: Place) -> None:
    """What the parent holds when a task is forked, as the task finds it when it begins."""
    place.insert("zones", zone_rows(D))
    place.insert("rides", good_rides(D))
    (place.root / "probe.py").write_text(PROBE, encoding="utf-8")
    options = ("--worker-task-process-context", "probe.Probe", "--workers", "2")
    found = place.root / "found"
    found.mkdir()
    with started(place, *CHAIN, *options, path=place.root, PROBE_FOLDER=found) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    reports = [path.read_text(encoding="utf-8").splitlines() for path in found.iterdir()]
    assert len(reports) == 11  # five tasks of two views, and the one that stands for both
    assert {line for lines in reports for line in lines} == {"feast is imported"}


def leftovers(place: Place) -> list[str]:
    """What lies in any staging of the place, and temporary segments."""
    data = place.root / "data"
    return [str(p) for p in [*data.rglob(".staging/*"), *data.rglob(".*.tmp")]]


def without_staging(place: Place) -> list[str]:
    """What a reader sees in the folder of the day."""
    return [name for name in without_cache(place.folder("zones", D)) if not name.startswith(".staging")]


DEAF = """
import ctypes

def double(table):
    ctypes.PyDLL(None).sleep(600)
    ctypes.PyDLL(None).sleep(600)
"""
"""A call that keeps the interpreter's lock, again when it is interrupted."""

PROBE = """
import gc, os, sys, threading
from pathlib import Path

class Probe:
    '''Luigi makes it in the task's process, with the fork just done.'''

    def __init__(self, process):
        self.process = process

    def __enter__(self):
        lines = ["feast is imported" if "batch.steps" in sys.modules else "feast is not imported"]
        for number in os.listdir("/proc/self/fd"):
            try:
                name = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if name.startswith(("socket:", os.getcwd())):
                lines.append(f"open: {name}")
        import duckdb, feast, redis, sqlalchemy
        clients = (feast.FeatureStore, duckdb.DuckDBPyConnection, redis.client.Redis, redis.ConnectionPool,
                   sqlalchemy.engine.Connection, sqlalchemy.engine.Engine)
        lines += [f"object: {type(o)}" for o in gc.get_objects() if type(o) in clients]
        threads = os.listdir(f"/proc/{os.getppid()}/task")
        if len(threads) > 3:
            lines.append(f"{len(threads)} threads in the parent")
        folder = Path(os.environ["PROBE_FOLDER"])
        (folder / str(os.getpid())).write_text("\\n".join(lines))

    def __exit__(self, *_):
        return False
"""
