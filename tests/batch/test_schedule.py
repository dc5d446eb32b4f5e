"""The schedules that the project ships: valid, the same everywhere; what is promised of overlaps and missed runs."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from batch.ledger import Ledger
from tests.batch.place import D, Place, good_rides, place_in, zone_rows
from tests.servers.luigi import Luigid
from tests.servers.repository import ROOT

CRONTAB = ROOT / "deploy" / "crontab"
UNITS = ROOT / "deploy" / "systemd"
JOBS = sorted(path.stem for path in UNITS.glob("*.timer"))
EXPOSURE = "25"
"""Tenths; systemd calls below 2 safe, and 9.6 is a service without any of it."""

WEEKDAYS = {"0": "Sun"}


@pytest.fixture(scope="module")
def luigid() -> Iterator[Luigid]:
    with Luigid() as server:
        yield server


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine on which the units are installed, as far as systemd's tools look."""
    for program in ("srv/headrace/.venv/bin/luigi", "srv/headrace/.venv/bin/luigid", "usr/bin/caddy"):
        file = tmp_path / program
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o755)
    shutil.copytree(UNITS, tmp_path / "etc" / "systemd" / "system")
    shutil.copytree(systemds_own(), tmp_path / "usr" / "lib" / "systemd" / "system", symlinks=True)
    return tmp_path


def cron() -> dict[str, str]:
    """The crontab: by command the schedule."""
    lines = [line for line in CRONTAB.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {" ".join(line.split()[5:]): " ".join(line.split()[:5]) for line in lines}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS / name)
    return parser


def timers() -> dict[str, str]:
    """The timers: by command of their services the schedule."""
    return {unit(f"{job}.service")["Service"]["ExecStart"]: unit(f"{job}.timer")["Timer"]["OnCalendar"] for job in JOBS}


def calendar(schedule: str) -> str:
    """A line of cron as systemd writes it."""
    minute, hour, *_, weekday = schedule.split()
    days = f"{WEEKDAYS[weekday]} " if weekday != "*" else ""
    return f"{days}*-*-* {hour.zfill(2) if hour != '*' else hour}:{minute.zfill(2)}:00 UTC"


def test_cron_and_systemd_have_the_same_schedule() -> None:
    by_cron = {
        command.replace("luigi ", "/srv/headrace/.venv/bin/luigi ").replace(" --scheduler-host luigid", ""): calendar(
            at
        )
        for command, at in cron().items()
    }
    assert by_cron == timers()
    assert len(by_cron) == 6
    documented = (ROOT / "docs" / "how-to" / "schedule.md").read_text(encoding="utf-8")
    for command, at in cron().items():
        assert f"{at} " in documented
        assert command.replace(" --scheduler-host luigid", "") in documented


def test_supercronic_takes_the_crontab(tmp_path: Path) -> None:
    assert tool("supercronic", "-test", str(CRONTAB)).returncode == 0
    broken = tmp_path / "crontab"
    broken.write_text(CRONTAB.read_text(encoding="utf-8").replace("40 * * * *", "99 * * * *"), encoding="utf-8")
    assert tool("supercronic", "-test", str(broken)).returncode != 0


def test_systemd_takes_the_units(root: Path) -> None:
    names = sorted(path.name for path in UNITS.iterdir() if path.is_file())
    checked = tool("systemd-analyze", f"--root={root}", "--man=no", "verify", *names)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    (root / "etc/systemd/system/headrace-broken.service").write_text("[Service]\nExecStart=/nope\nUsre=x\n")
    broken = tool("systemd-analyze", f"--root={root}", "--man=no", "verify", "headrace-broken.service")
    assert "Usre" in broken.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in UNITS.glob("*.service")))
def test_the_services_are_confined(name: str, root: Path) -> None:
    found = tool("systemd-analyze", f"--root={root}", "--offline=true", f"--threshold={EXPOSURE}", "security", name)
    assert found.returncode == 0, found.stdout[-300:]
    (root / "etc/systemd/system/headrace-.service.d/common.conf").unlink()
    assert tool(
        "systemd-analyze", f"--root={root}", "--offline=true", f"--threshold={EXPOSURE}", "security", name
    ).returncode


def test_the_timers_fire_when_the_page_says() -> None:
    """In UTC, whatever the zone of the machine."""
    for at in timers().values():
        said = tool("systemd-analyze", "calendar", "--iterations=2", "--base-time=2026-03-28 12:00:00 UTC", at)
        assert said.returncode == 0, said.stderr
        fires = re.findall(r"(?:Next elapse|Iter\. #2): \w+ (\S+ \S+) UTC", said.stdout)
        assert len(fires) == 2
        first, second = (datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC) for text in fires)
        usual = timedelta(days=7) if at.startswith("Sun") else timedelta(hours=1) if " *:" in at else timedelta(days=1)
        assert second - first == usual


@pytest.mark.slow
def test_every_line_of_the_schedule_runs(place: Place, luigid: Luigid) -> None:
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    place.insert("rides", good_rides(yesterday))
    place.insert("zones", zone_rows(yesterday))
    for command in cron():
        program, *arguments = shlex.split(command.replace("--scheduler-host luigid", f"--scheduler-port {luigid.port}"))
        assert (program, *arguments[:2]) == ("luigi", "--module", "batch")
        place.run(*arguments[2:], timeout_s=200)
    batch = place.root / "data" / "batch"
    assert (batch / "history.html").exists()
    for view in ("rides", "zones"):
        left = {path.name.partition("=")[0] for path in (batch / view).iterdir()}
        assert left >= {"run", "audit", "audit-sample-0.01", "compact", "retain"}


def test_the_same_command_twice_at_once_works_once(place: Place, template: Path, tmp_path: Path) -> None:
    """The second is refused with 10. A deployment in another folder is none of its business."""
    other = place_in(tmp_path / "other", template)
    for one in (place, other):
        one.insert("zones", zone_rows(D))
    command = ("OfflineStore", "--view", "zones", "--date", str(D), "--local-scheduler")
    first = start(place, command)
    wait_for((place.folder("zones", D) / "raw.json").exists)
    first.send_signal(signal.SIGSTOP)  # however slow the others start
    try:
        second = place.run(*command, expect=10)
        assert "already running" in second.stdout
        other.run(*command)
    finally:
        first.send_signal(signal.SIGCONT)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 0, said
    assert len(place.day_files("zones")) == 1
    place.run(*command)


def test_two_jobs_that_want_the_same_day_do_it_once(place: Place, luigid: Luigid) -> None:
    """Whatever their exit codes are, who asks again is told that all is done."""
    place.insert("zones", zone_rows(D))
    at = ("--scheduler-port", str(luigid.port))
    first = start(place, (*at, "Materialize", "--view", "zones", "--date", str(D)))
    wait_for((place.folder("zones", D) / "raw.json").exists)
    stop = str(D + timedelta(days=1))
    second = start(place, (*at, "Backfill", "--view", "zones", "--start", str(D), "--stop", stop))
    for process in (first, second):
        process.communicate(timeout=120)
        assert process.returncode in {0, 10, 25}
    ledger = Ledger(place.root / "data" / "batch" / "history")
    runs = [run for run in ledger.runs(2, datetime.now(UTC)) if run.parameters.get("date") == str(D)]
    assert Counter(run.task for run in runs)["Ingest"] == Counter(run.task for run in runs)["OfflineStore"] == 1
    assert len([path for path in place.day_files("zones") if str(D) in path.name]) == 1
    place.run(*at, "Materialize", "--view", "zones", "--date", str(D))


def test_supercronic_skips_a_run_while_the_last_is_on(tmp_path: Path) -> None:
    """Of the same line; another line runs beside it. SIGTERM lets the jobs that run come to their end."""
    crontab = tmp_path / "crontab"
    crontab.write_text("* * * * * * * echo begin; sleep 2.5; echo end\n* * * * * * * echo beside\n", encoding="utf-8")
    program = shutil.which("supercronic") or pytest.skip("no supercronic")
    process = subprocess.Popen(
        [program, "-passthrough-logs", str(crontab)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(4.5)
    process.terminate()
    said, log = process.communicate(timeout=30)
    lines = said.split()
    assert "not starting: job is still running" in log
    assert lines.count("beside") > lines.count("begin") >= 1
    assert lines.count("begin") == lines.count("end")
    inner = [line for line in lines if line != "beside"]
    assert inner == ["begin", "end"] * (len(inner) // 2)


@pytest.mark.slow
def test_a_missed_day_is_made_good_while_it_is_recent_and_not_beyond(place: Place) -> None:
    """Nothing ran for a week. The next run does its day and reads two before it; earlier ones are for `Backfill`."""
    days = [D - timedelta(days=back) for back in range(7)]
    for day in days:
        place.insert("zones", zone_rows(day))
    place.run("Materialize", "--view", "zones", "--date", str(D), "--local-scheduler")
    assert published(place) == set(days[:3])
    first = days[6]
    backfill = ("Backfill", "--view", "zones", "--start", str(first), "--stop", str(D), "--local-scheduler")
    place.run(*backfill)
    assert published(place) == set(days)
    assert {folder.name for folder in (place.root / "data/batch/zones").glob("run=*")} == {
        f"run={day}" for day in (D, *days[3:])
    }


def test_nothing_before_the_start_date_is_caught_up(place: Place) -> None:
    for back in range(3):
        place.insert("zones", zone_rows(D - timedelta(days=back)))
    start_date = D - timedelta(days=1)
    place.run("Materialize", "--view", "zones", "--date", str(D), "--local-scheduler", start_date=start_date)
    assert published(place) == {D, start_date}


def published(place: Place) -> set[date]:
    return {date.fromisoformat(path.name.removeprefix("batch-")[:10]) for path in place.day_files("zones")}


def start(place: Place, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """A command whose `Clean` takes some seconds."""
    return subprocess.Popen(
        place.command(*arguments),
        cwd=place.root,
        env=place.environment() | {"TRANSFORM_SLEEP_S": "5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=False, timeout=60)


def systemds_own() -> Path:
    """The units of systemd itself, which ours name."""
    for folder in (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system")):
        if (folder / "network-online.target").exists():
            return folder
    pytest.skip("no units of systemd")
