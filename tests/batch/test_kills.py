"""`kill -9` at the steps of every task, then the same command: the stores are as without it, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.headrace.crashes import in_clean_process, show

EVERY = int(os.environ.get("HEADRACE_TEST_KILL_EVERY", "0"))
"""Which of the steps: each n-th; 0 for a few."""

FEW = {
    "Materialize": 67,
    "Backfill": 67,
    "Backfill by force": 71,
    "Compact": 29,
    "Compact of the work folder": 17,
    "Audit": 29,
    "Repair": 31,
    "Retain": 61,
}


@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("case", list(FEW))
def test_a_command_that_was_killed_is_completed_by_the_same_command(
    case: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    few = "task" if list(FEW).index(case) % 2 else "command"
    ways = "task,all,command" if EVERY else few
    found = in_clean_process("tests.batch.kills:explore", case, tmp_path, EVERY or FEW[case], ways)
    show(pytestconfig, {case: found})
    assert not found["losses"]
    assert found["runs"] >= 2
