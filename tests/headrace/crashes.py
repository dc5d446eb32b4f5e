"""End a process at every step of what it does to a store, and see what is left.

A scenario is run once to learn the steps it passes (`headrace.faults`), then once for each step, in a process that
kills itself there with SIGKILL. Afterwards each unit of the state must be as before the operation or as after it, and
the operation again, undisturbed, must complete it. Hundreds of runs are cheap because a run is a fork of a process that
has imported everything and holds no thread, connection or server.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headrace import faults
from tests.reporting import tables

LONGEST_S = 14_400
"""Of a campaign; pytest's own time-out is shorter where it matters."""

PASSES = 3
"""A step that is passed often is an end at its first passes, and at its last."""


@dataclass(frozen=True)
class Scenario:
    """An operation on a store, and what must hold of it. All functions take the folder that the store is in.

    Attributes:
        prepare: make the store as it is before.
        run: the operation, in a process of its own; run again it completes what was broken off.
        state: what a reader sees, by unit; each unit changes as a whole or not at all.
        layout: what must be equal after completion, beyond the state; None for nothing.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    state: Callable[[Path], Mapping[str, Any]]
    layout: Callable[[Path], Any] | None = None


@dataclass
class Outcome:
    """What the runs of a scenario came to.

    Attributes:
        points: the steps at which a process was ended.
        runs: how many processes were ended.
        losses: what did not hold, in words.
    """

    points: list[str] = field(default_factory=list)
    runs: int = 0
    losses: list[str] = field(default_factory=list)


def explore(scenario: Scenario, home: Path) -> Outcome:
    """Every run of a scenario, in copies of one prepared store."""
    prepared, done = home / "prepared", home / "done"
    prepared.mkdir(parents=True)
    scenario.prepare(prepared)
    before = scenario.state(prepared)
    steps = _recorded(scenario, prepared, done)
    after = scenario.state(done)
    layout = scenario.layout(done) if scenario.layout is not None else None
    outcome = Outcome(points=list(dict.fromkeys(steps)))
    for step, passes in Counter(steps).items():
        for number in sorted({*range(1, min(passes, PASSES) + 1), passes}):
            copy = home / f"run-{outcome.runs}"
            shutil.copytree(prepared, copy)
            outcome.runs += 1
            try:
                _ended(scenario, copy, step, number, before, after, layout)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a loss
                outcome.losses.append(f"{step}, pass {number}: {type(error).__name__}: {error}")
            shutil.rmtree(copy)
    return outcome


def forked(work: Callable[[], None]) -> int:
    """Start a function in a fork of this process; its id. It exits with 0, or with 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:  # noqa: BLE001 - it must not go on as the parent does
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_clean_process(target: str, *arguments: object) -> dict[str, Any]:
    """Call `module:name`, a scenario or a function, in a Python process of its own; its result.

    The process that runs pytest has threads and connections, which a fork would inherit broken.
    """
    command = [sys.executable, "-m", __name__, target, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(config: pytest.Config, found: Mapping[str, Any]) -> None:
    """Have points, runs and losses of each scenario and of all printed at the end; steps that all share count once."""
    lines = [(name, len(one["points"]), one["runs"], len(one["losses"])) for name, one in found.items()]
    points = len({point for one in found.values() for point in one["points"]})
    lines.append(("all", points, sum(line[2] for line in lines), sum(line[3] for line in lines)))
    head = f"{'killed in':<28}{'points':>8}{'runs':>8}{'losses':>8}"
    tables(config).append("\n".join([head, *("{:<28}{:>8}{:>8}{:>8}".format(*line) for line in lines)]))


def _recorded(scenario: Scenario, prepared: Path, done: Path) -> list[str]:
    """The steps of an undisturbed run, which leaves its store in `done`."""
    shutil.copytree(prepared, done)
    record = done.with_suffix(".steps")

    def work() -> None:
        with record.open("w") as sink:
            faults.hook = lambda step: print(step, file=sink)
            scenario.run(done)

    _expect(forked(work), 0)
    return record.read_text().splitlines()


def _ended(
    scenario: Scenario,
    home: Path,
    step: str,
    number: int,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    layout: Any,
) -> None:
    """One run that ends at a pass of a step, what is left, and the run that completes it."""

    def work() -> None:
        passed = 0

        def hook(reached: str) -> None:
            nonlocal passed
            passed += reached == step
            if passed == number:
                os.kill(os.getpid(), signal.SIGKILL)

        faults.hook = hook
        scenario.run(home)

    _expect(forked(work), -signal.SIGKILL)
    for unit, found in scenario.state(home).items():
        if found not in (before[unit], after[unit]):
            msg = f"{unit} is {found}, neither {before[unit]} as before nor {after[unit]} as after"
            raise AssertionError(msg)
    _expect(forked(lambda: scenario.run(home)), 0)
    completed = scenario.state(home)
    if completed != after:
        msg = f"completed it is {completed}, expected {after}"
        raise AssertionError(msg)
    if scenario.layout is not None and scenario.layout(home) != layout:
        msg = f"completed it lies as {scenario.layout(home)}, expected {layout}"
        raise AssertionError(msg)


def _expect(pid: int, code: int) -> None:
    found = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if found != code:
        msg = f"expected the process to end with {code}, it ended with {found}"
        raise AssertionError(msg)


def main() -> None:
    """`python -m tests.headrace.crashes module:name arguments...`: print the result as the last line, in JSON."""
    module, _, name = sys.argv[1].partition(":")
    target = getattr(importlib.import_module(module), name)
    arguments = sys.argv[2:]
    result = asdict(explore(target, Path(arguments[0]))) if isinstance(target, Scenario) else target(*arguments)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":  # by its own name, so that its classes are those that scenarios are made of
    importlib.import_module("tests.headrace.crashes").main()
