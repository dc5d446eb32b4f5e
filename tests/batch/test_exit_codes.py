"""Each exit code of `luigi.cfg`, by the literal command line, as docs/reference/exit-codes.md lists them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.batch.commands import SETTINGS, luigid, recorded, running, started
from tests.batch.place import GOOD, D, Place, good_rides, zone_rows
from tests.servers import free_port

LOCAL = ("--local-scheduler",)
RIDES = ("Materialize", "--view", "rides", "--date", str(D))
ZONES = ("Materialize", "--view", "zones", "--date", str(D))

NIGHTLY = """
import datetime
import luigi
from batch import Materialize

class Export(luigi.ExternalTask):
    def output(self):
        return luigi.LocalTarget("data/export.done")

class Nightly(luigi.WrapperTask):
    date = luigi.DateParameter()
    def requires(self):
        return [Export(), Materialize(view="zones", date=self.date)]
"""
"""A pipeline of somebody who waits for a file before the chain, in Luigi's way."""


def run(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    return place.run(*arguments, expect=None, **SETTINGS)


def test_0_it_is_done_and_0_it_was_done_before(place: Place) -> None:
    place.insert("rides", good_rides(D))
    assert run(place, *RIDES, *LOCAL).returncode == 0
    again = run(place, *RIDES, *LOCAL)
    assert again.returncode == 0
    assert "running   " not in again.stderr


def test_10_the_same_command_is_running_here(place: Place) -> None:
    place.insert("zones", zone_rows(D))
    with started(place, *ZONES, sleep_s=60, lock=True) as process:
        running(place, "Clean")
        second = run(place, *ZONES, *LOCAL)
        assert process.poll() is None
    assert second.returncode == 10
    assert re.search(r"Pid\(s\) \{\d+\} already running", second.stdout)


def test_10_another_worker_of_luigid_does_it(place: Place) -> None:
    place.insert("zones", zone_rows(D))
    clean = ("Clean", *ZONES[1:])
    with luigid(place) as server, started(place, *clean, *server.option, sleep_s=20, local=False) as process:
        running(place, "Clean")
        second = run(place, *clean, *server.option, "--no-lock")
        process.communicate(timeout=60)
    assert (process.returncode, second.returncode) == (0, 10), second.stderr
    assert "running   " not in second.stderr


def test_20_what_a_pipeline_waits_for_is_not_there(place: Place) -> None:
    place.insert("zones", zone_rows(D))
    (place.root / "nightly.py").write_text(NIGHTLY, encoding="utf-8")
    command = [*place.command()[:1], "--module", "nightly", "Nightly", "--date", str(D), *LOCAL]
    command += ["--worker-max-keep-alive-idle-duration", "1 second"]
    environment = place.environment(**SETTINGS)
    environment["PYTHONPATH"] += f":{place.root}"

    def nightly() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=place.root, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    waits = nightly()
    assert waits.returncode == 20, waits.stderr
    assert place.offline("zones").num_rows == 2, "the chain itself waits for nothing"
    (place.root / "data" / "export.done").touch()
    assert nightly().returncode == 0


def test_25_luigid_does_not_let_it_run_as_it_failed_too_often(place: Place) -> None:
    place.insert("rides", [{**GOOD, "stops": -1}])
    with luigid(place, forgets_after_s=600) as server:
        options = (*RIDES, *server.option, "--no-lock")
        assert run(place, *options).returncode == 30
        refused = run(place, *options)
    assert refused.returncode == 25, refused.stderr
    assert "were not granted run permission by the scheduler" in refused.stderr
    assert "running   ExploreAndValidate(" not in refused.stderr


def test_30_a_task_failed(place: Place) -> None:
    place.insert("rides", [{**GOOD, "stops": -1}])
    failed = run(place, *RIDES, *LOCAL)
    assert failed.returncode == 30
    assert "the gate is closed for view `rides`" in failed.stderr
    # What its last line says to do leads on.
    page = Path(unquote(failed.stderr.strip().rpartition("what to do: file://")[2])).read_text(encoding="utf-8")
    (command,) = re.findall(r"<code>luigi --module batch ([^<]+ Ingest)</code>", page)
    place.execute("UPDATE rides SET stops = 1")
    assert run(place, *RIDES, *LOCAL).returncode == 30, "what was read once is not read again unasked"
    again = run(place, *shlex.split(unescape(command)), *LOCAL)
    assert again.returncode == 0, again.stderr
    assert run(place, *RIDES, *LOCAL).returncode == 0
    assert place.offline("rides").num_rows == 1


def test_35_what_was_asked_for_cannot_be_done(place: Place) -> None:
    refused = run(place, "Materialize", "--view", "nope", "--date", str(D), *LOCAL)
    assert refused.returncode == 35
    assert "unknown feature view `nope`; the registry has: notes, rides, zones" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((*RIDES, "--scheduler-port", "{free}"), 40, "Failed connecting to remote scheduler"),
        (("Materialize", "--date", "yesterday", *LOCAL), 40, "expected a day such as 2026-01-31"),
        (("Backfill", "--start", "2026-01-01", *LOCAL), 40, "requires the 'stop' parameter to be set"),
        (("Materialise", *LOCAL), 1, "No task materialise"),
        (("Materialize", "--day", "2026-01-01", *LOCAL), 2, "unrecognized arguments: --day"),
    ],
)
def test_40_1_and_2_nothing_could_be_started(place: Place, arguments: Sequence[str], code: int, says: str) -> None:
    words = [word.format(free=free_port()) for word in arguments]
    done = run(place, *words)
    assert done.returncode == code, done.stderr
    assert says.lower() in done.stderr.lower()


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129), ("KILL", 137)])
def test_128_and_a_signal_as_a_shell_sees_it(place: Place, name: str, code: int) -> None:
    place.insert("zones", zone_rows(D))
    with started(place, *ZONES, sleep_s=60, before=("bash", "-c", '"$@"; exit $?', "-")) as shell:
        running(place, "Clean")
        os.kill(recorded(place)[-1].parent_pid, signal.Signals[f"SIG{name}"])
        shell.communicate(timeout=10)
    assert shell.returncode == code
