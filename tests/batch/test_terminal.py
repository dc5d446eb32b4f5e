"""What a person at a terminal sees of `luigi` commands, and what a log does."""

from __future__ import annotations

import re
from datetime import timedelta

from tests.batch.commands import SETTINGS
from tests.batch.place import GOOD, D, Place, zone_rows
from tests.terminal import at_terminal

LOCAL = "--local-scheduler"
OF_TERMINALS = re.compile(r"[\x00-\x09\x0b-\x1f]")


def test_a_backfill_side_by_side_and_what_is_left_of_it_on_the_screen(place: Place) -> None:
    """A line for the whole and one a task; log lines whole above; then nothing but the log."""
    days = [D + timedelta(number) for number in range(4)]
    for day in days:
        place.insert("zones", zone_rows(day))
    backfill = ("Backfill", "--view", "zones", "--start", str(D), "--stop", str(days[-1] + timedelta(1)))
    seen = at_terminal(
        place.command(*backfill, "--workers", "2", LOCAL),
        environment=place.environment(**SETTINGS) | {"TRANSFORM_SLEEP_S": "2.6"},
        cwd=place.root,
        columns=140,
    )
    assert seen.code == 0, seen.raw
    assert any(len(re.findall(r"^Clean zones 2026-03-1\d: works, 00:0\d$", frame, re.M)) == 2 for frame in seen.frames)
    assert any(
        re.search(r"Backfill zones 2026-03-10\.\.2026-03-14:  50% \|.*\| 2 of 4 days, .* each, 00:0\d left", frame)
        for frame in seen.frames
    )
    assert "works" not in "\n".join(seen.screen)
    assert "% |" not in "\n".join(seen.screen)
    running = [line for line in seen.screen if "running   Clean(" in line]
    assert len(running) == 4
    assert all(re.fullmatch(r"INFO: \[pid \d+\] running   Clean\(.*\)", line) for line in running)
    assert "Informed scheduler" not in seen.raw


def test_it_ends_with_a_line_of_what_failed_and_why(place: Place) -> None:
    """In red at a terminal; in a log the same line, and no control character anywhere."""
    place.insert("rides", [{**GOOD, "stops": -1}])
    command = ("Materialize", "--view", "rides", "--date", str(D), LOCAL)
    seen = at_terminal(place.command(*command), environment=place.environment(**SETTINGS), cwd=place.root, columns=1000)
    assert seen.code == 30
    last = [line for line in seen.screen if line][-1]
    start = f"error: ExploreAndValidate rides {D}: the gate is closed for view `rides`, {D}: "
    assert last.startswith(start)
    assert re.search(r"; what to do: file://\S+report\.html$", last)
    assert f"\x1b[31merror:\x1b[0m{start.removeprefix('error:')}" in seen.raw

    logged = place.run(*command, expect=30, **SETTINGS)
    assert logged.stderr.splitlines()[-1] == last
    assert logged.stderr.count("error: ") == 1
    assert not OF_TERMINALS.search(logged.stderr)
    assert "Informed scheduler that task" in logged.stderr, "a log is Luigi's own"


def test_what_could_not_be_started_is_said_in_one_line(place: Place) -> None:
    wrong = place.run("Audit", "--view", "nope", LOCAL, expect=35)
    assert wrong.stderr.splitlines()[-1] == (
        "error: Audit nope: unknown feature view `nope`; the registry has: notes, rides, zones"
    )
    unread = place.run("Materialize", "--date", "yesterday", LOCAL, expect=40)
    assert unread.stderr == "error: --date 'yesterday': expected a day such as 2026-01-31\n"


def test_ctrl_c_takes_the_lines_away(place: Place) -> None:
    place.insert("zones", zone_rows(D))
    seen = at_terminal(
        place.command("Clean", "--view", "zones", "--date", str(D), LOCAL),
        environment=place.environment(**SETTINGS) | {"TRANSFORM_SLEEP_S": "60"},
        cwd=place.root,
        kill_at="works, 00:0",
    )
    assert seen.code == -2
    assert [line for line in seen.screen if line][-1] == "ended by SIGINT; no task is left running"
