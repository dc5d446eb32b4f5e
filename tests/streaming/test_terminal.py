"""What a person at a terminal sees of `faust` and `feast` commands, and what a log does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from confluent_kafka.admin import AdminClient

from tests.conftest import RepositoryFactory
from tests.servers import environment
from tests.streaming.process import FAUST, run
from tests.terminal import at_terminal

FEAST = [str(Path(sys.executable).with_name("feast"))]


def test_emit_shows_how_far_it_is_and_prints_json(mock_broker: str, feature_repo_copy: RepositoryFactory) -> None:
    AdminClient({"bootstrap.servers": mock_broker}).list_topics("drivers", timeout=10)
    settings = environment(feature_repo=feature_repo_copy(), broker=mock_broker)
    seen = at_terminal([*FAUST, "emit", "--rate", "200", "--count", "700"], environment=settings)
    assert seen.code == 0, seen.raw
    assert re.search(r"emit to drivers:  \d\d% \|.*\| \d+ of 700 events, \d+/s, 00:0\d left", seen.first("% |"))
    assert not "".join(seen.screen).strip()
    assert json.loads(seen.stdout)["sent"] == 700

    logged = run(settings, "emit", "--rate", "0", "--count", "10")
    assert logged.stderr == ""
    assert json.loads(logged.stdout)["sent"] == 10


def test_errors_are_one_line_on_stderr_red_at_a_terminal(tmp_path: Path) -> None:
    """Of a command, of what keeps the app from being made."""
    nowhere = environment(feature_repo=tmp_path)
    logged = run(nowhere, "dead-letters")
    expected = (
        f"expected a feature repository at {tmp_path}, found no feature_store.yaml there; "
        "set HEADRACE_FEATURE_REPO to the folder that has it"
    )
    assert (logged.returncode, logged.stdout, logged.stderr) == (1, "", f"error: {expected}\n")
    seen = at_terminal([*FAUST, "dead-letters"], environment=nowhere, columns=1000)
    assert seen.code == 1
    assert seen.raw == f"\x1b[31merror:\x1b[0m {expected}\r\n"


def test_help_and_a_wrong_option_say_nothing_else(feature_repo_copy: RepositoryFactory) -> None:
    settings = environment(feature_repo=feature_repo_copy())
    helped, wrong = run(settings, "emit", "--help"), run(settings, "emit", "--nope")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert (wrong.returncode, wrong.stderr.splitlines()[-1]) == (2, "Error: No such option: --nope")


def test_feast_says_our_errors_in_one_line_and_its_own_as_ever(feature_repo_copy: RepositoryFactory) -> None:
    repo = feature_repo_copy(replace={'"ge": "0", "le": "1"': '"ge": "zero", "le": "1"'})
    window = ("2026-01-01T00:00:00", "2026-02-01T00:00:00")

    def feast(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*FEAST, "-c", str(repo), *arguments]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)

    ours = feast("materialize", *window)
    assert ours.returncode == 1
    assert ours.stderr.splitlines()[-1] == (
        "error: feature view `driver_stats`: field `conv_rate`: tag ge='zero' is no number; "
        "write it as in {'ge': '0.5'}"
    )
    assert "Traceback" not in ours.stderr
    theirs = feast("materialize", *window, "--views", "nope")
    assert theirs.returncode == 1
    assert "Traceback" in theirs.stderr
