"""What a person at a terminal sees of long work, and that a log sees nothing of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.progress import Work
from headrace.terminal import printable
from tests.servers import environment
from tests.terminal import Seen, at_terminal

PROGRAM = """
import logging, os, sys, time
from headrace import progress, terminal
progress.LONG_S = 0.1
progress.install()
logging.basicConfig(format="%(message)s")
forks = ""
for name in ("left", "right") if "forks" in sys.argv else ():
    if not forks and not os.fork():
        forks = name
if not forks and "forks" in sys.argv:
    progress.watch("whole", "parts", lambda: (1, 4))
    for _ in range(2):
        os.wait()
    progress.end()
    sys.exit()
with progress.shown(f"work {forks}\\x1b[2J") as meter:
    meter.say("looking")
    time.sleep(0.5)
    for number in range(1, 9):
        meter.update(number * 1000, 10_000, "keys compared")
        logging.warning("line %d of the log", number)
        time.sleep(0.1)
if forks:
    os._exit(0)
terminal.say_error("expected an apple,\\nfound a pear; pick again")
sys.stdout.write('{"ok": true}\\n')
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM, encoding="utf-8")
    return [sys.executable, str(file)]


def test_at_a_terminal_a_line_below_the_log_which_is_gone_at_the_end(program: list[str]) -> None:
    seen = at_terminal(program, environment=environment())
    assert seen.code == 0
    assert "work ?[2J: looking, 00:00" in seen.first("looking")
    frame = seen.first("% |")
    assert re.search(r"work \?\[2J:  \d0% \|.*\| \d,000 of 10,000 keys compared(, [\d,]+/s, 00:0\d left)?$", frame)
    assert any(re.search(r"compared, [\d,]+/s, 00:0\d left$", frame) for frame in seen.frames)
    log = [f"line {number} of the log" for number in range(1, 9)]
    assert _lines(seen) == [*log, "error: expected an apple, found a pear; pick again"]
    assert "\x1b[31merror:\x1b[0m expected" in seen.raw
    assert seen.stdout == '{"ok": true}\n'


def test_processes_side_by_side_have_a_line_each(program: list[str]) -> None:
    seen = at_terminal([*program, "forks"], environment=environment())
    frame = next(frame for frame in seen.frames if len(re.findall(r"^work (?:left|right).*keys", frame, re.M)) == 2)
    assert "whole:  25% |" in frame
    assert frame.index("whole") < frame.index("work ") < frame.rindex("work ")
    assert sorted(_lines(seen)) == sorted(2 * [f"line {number} of the log" for number in range(1, 9)])


def test_a_log_sees_lines_and_no_control_character(program: list[str]) -> None:
    done = subprocess.run(program, env=environment(), capture_output=True, check=True)
    lines = [
        *(f"line {number} of the log" for number in range(1, 9)),
        "error: expected an apple, found a pear; pick again",
    ]
    assert done.stderr.decode() == "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_person_who_wants_no_colour_gets_none(program: list[str], name: str, value: str) -> None:
    seen = at_terminal(program, environment={**environment(), name: value})
    assert "\x1b[31m" not in seen.raw
    assert "error: expected an apple" in seen.raw
    assert ("\x1b" in seen.raw) == (name == "NO_COLOR"), "a dumb terminal gets no line that moves either"


def test_a_narrow_terminal_has_no_line_that_wraps(program: list[str]) -> None:
    seen = at_terminal(program, environment=environment(), columns=38)
    assert seen.first("% |")
    assert [line for line in _lines(seen) if line.startswith("line")] == [f"line {n} of the log" for n in range(1, 9)]


@pytest.mark.parametrize(
    ("done", "total", "now_s", "expected"),
    [
        (0, 100, 11.0, "w:   0% | | 0 of 100 keys"),
        (50, 100, 15.0, "w:  50% | | 50 of 100 keys, 10/s, 00:05 left"),
        (50, 100, 18.0, "w:  50% | | 50 of 100 keys, 10/s, 00:02 left"),  # it runs down between two counts
        (50, 100, 90.0, "w:  50% | | 50 of 100 keys, 10/s, 00:00 left"),
        (2, 4, 15.0, "w:  50% | | 2 of 4 keys, 2.5 s each, 00:05 left"),
        (50_000, 0, 15.0, "w: 50,000 keys, 10,000/s, 00:15"),
        (150, 100, 15.0, "w: 100% | | 150 of 100 keys, 30/s, 00:00 left"),
    ],
)
def test_a_line_says_how_far_how_fast_and_how_long(done: int, total: int, now_s: float, expected: str) -> None:
    work = Work("w", "", "keys", done, total, 0, begun_s=0.0, counted_s=10.0, updated_s=15.0)
    assert re.sub(r"\|.*\|", "| |", work.line(now_s, 120)) == expected
    assert len(work.line(now_s, 30)) <= 30


def test_text_of_any_origin_is_one_line_without_control_characters() -> None:
    assert printable("a\nb\tc\x1b[31md\u202ee") == "a b c?[31md?e"


def _lines(seen: Seen) -> list[str]:
    return [line for line in seen.screen if line]
