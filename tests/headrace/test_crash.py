"""`kill -9` at every numbered step, and random mixes of processes that are killed, frozen and continued."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace import compact as compaction
from headrace import faults
from headrace.chains import PUSH, Folder, StreamLedger, append, push, replace_day
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.errors import LedgerError, LostRaceError, TransientError
from headrace.retain import retain
from headrace.segments import (
    DayName,
    Footer,
    create,
    new_append_id,
    parse_name,
    read_accepted,
    read_footer,
)
from tests.headrace.crashes import Scenario, explore, forked, in_clean_process, show
from tests.headrace.views import EPOCH_US, config, examples, rows, view

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CHAIN = "stream-events-0-0"
DAY = date(2026, 1, 31)


def contract_of(home: Path) -> ViewContract:
    return ViewContract.from_feast(view()[1], config(home))


def some(contract: ViewContract, *ids: int) -> pa.Table:
    """Rows whose time is their id, in microseconds."""
    return rows(contract, [{"id": n, "value": n / 2, "count": n, "at": n, "made": n} for n in ids])


def at(number: int) -> datetime:
    """The horizon before which the rows below `number` lie."""
    return datetime.fromtimestamp(EPOCH_US // 10**6, UTC) + timedelta(microseconds=number)


def commit(home: Path, until: int, size: int = 5) -> None:
    """Append segments of `size` records, one of which is rejected, until the ledger ends at `until`."""
    contract = contract_of(home)
    ledger = StreamLedger(contract, "events", 0)
    while (end := ledger.end().end) < until:
        accepted = np.arange(end, end + size - 1, dtype=np.int64)
        ledger.append(
            0, end, end + size, some(contract, *accepted.tolist()), accepted=accepted, rejected=1, topic_id="t"
        )


def push_until(home: Path, count: int) -> None:
    contract = contract_of(home)
    while (end := Folder.of(contract).tip(PUSH).end) < count:
        push(contract, some(contract, end))


def content(home: Path) -> dict[str, Any]:
    """What a reader sees: the rows of each span of five offsets, of each push and of each day, and where chains end."""
    contract = contract_of(home)
    folder = Folder.of(contract)
    found: dict[str, Any] = {f"offsets {n}": [] for n in range(0, 100, 5)} | {f"push {n}": [] for n in range(20)}
    chains = folder.chains()
    for chain in chains.values():
        for name in chain.valid:
            ids = pq.read_table(folder.path_of(name)).column("id").to_pylist()
            if chain.name == PUSH:
                for number in ids:
                    found[f"push {number}"].append(number)
            else:
                for number, offset in zip(ids, read_accepted(folder.path_of(name)).tolist(), strict=True):
                    found[f"offsets {offset // 5 * 5}"].append((number, offset))
    for n in range(4):
        day = folder.days().get(DAY + timedelta(n))
        found[f"day {n}"] = None if day is None else pq.read_table(day.path).column("id").to_pylist()
    rejected = sum(read_footer(folder.path_of(name)).rejected for c in chains.values() for name in c.valid)
    assert CHAIN not in chains or rejected == chains[CHAIN].end // 5 or chains[CHAIN].closed
    return found


def names(home: Path) -> list[str]:
    """Every file, snapshots of days without their time; what a dead append left goes with the next compaction."""
    found = [n for n in os.listdir(contract_of(home).directory) if not n.endswith(".tmp")]
    return sorted(n.split("-0000")[0] if n.startswith("batch") else n for n in found)


def several_appends(home: Path) -> None:
    commit(home, 20)


def begun(home: Path) -> None:
    commit(home, 10)


def worn(home: Path) -> None:
    """A chain whose first names are free again: what they held lies on a higher level."""
    commit(home, 50)
    compact(contract_of(home), grace_s=0)


def append_late(home: Path) -> None:
    """What a process does that slept since the chain ended at 10."""
    contract = contract_of(home)
    note = Footer(next=15, append=new_append_id())
    with contextlib.suppress(LostRaceError):
        append(Folder.of(contract), CHAIN, 10, some(contract, 99), note)


def closed(home: Path) -> None:
    StreamLedger(contract_of(home), "events", 0).close("new", 7)


def day_there(home: Path) -> None:
    replace_day(contract_of(home), DAY, some(contract_of(home), 1, 2))


def day_replaced(home: Path) -> None:
    replace_day(contract_of(home), DAY, some(contract_of(home), 1, 3))


def uncompacted(home: Path) -> None:
    """Everything that compaction may meet: small files, files at a cap, marks, a void file, what crashes left."""
    contract = contract_of(home)
    commit(home, 50)
    compact(contract)
    commit(home, 100)
    push_until(home, 20)
    newest = replace_day(contract, DAY, some(contract, 1))
    create(
        contract.directory / str(DayName(DAY, newest.snapshot - 1)),
        some(contract, 9),
        Footer(next=1, append=new_append_id()),
    )
    (contract.directory / f".push-0-{0:020d}.parquet.{new_append_id()}.tmp").write_bytes(b"half a file")


def compacted(home: Path) -> None:
    compact(contract_of(home), grace_s=0)


def compacted_small(home: Path) -> None:
    """With a cap that each merged file passes, so that it goes on by link."""
    compact(contract_of(home), grace_s=0, level_cap_bytes=3000)


def with_old_rows(home: Path) -> None:
    contract = contract_of(home)
    commit(home, 50)
    compact(contract, grace_s=0)
    commit(home, 75)
    push_until(home, 15)
    for n in range(4):
        replace_day(contract, DAY + timedelta(n), some(contract, 10 * n, 10 * n + 5))


def retained_and_cleaned(home: Path) -> None:
    retain(contract_of(home), at(60))
    compact(contract_of(home), grace_s=0)


append_to_a_stream = Scenario(begun, several_appends, content)
append_to_push = Scenario(lambda home: push_until(home, 3), lambda home: push_until(home, 6), content)
append_of_a_sleeper = Scenario(worn, append_late, content)
close_of_an_epoch = Scenario(begun, closed, content)
day_replacement = Scenario(day_there, day_replaced, content, names)
compaction_by_merging = Scenario(uncompacted, compacted, content, names)
compaction_by_linking = Scenario(uncompacted, compacted_small, content, names)
retention = Scenario(with_old_rows, retained_and_cleaned, content)

SCENARIOS = {
    "append_to_a_stream": 5,
    "append_to_push": 5,
    "append_of_a_sleeper": 7,
    "close_of_an_epoch": 6,
    "day_replacement": 6,
    "compaction_by_merging": 10,
    "compaction_by_linking": 6,
    "retention": 16,
}
"""The scenarios, and how many steps each has at least: a step that is lost is a test that is lost."""


def every(home: str) -> dict[str, Any]:
    """Explore all scenarios, in the one process that imported everything."""
    return {name: asdict(explore(globals()[name], Path(home) / name)) for name in SCENARIOS}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What became of each scenario; points, runs and losses are shown at the end."""
    found = in_clean_process(f"{__name__}:every", tmp_path_factory.mktemp("crashes"))
    yield found
    show(request.config, found)


@pytest.mark.parametrize("name", SCENARIOS)
def test_kill_minus_nine_at_every_step(name: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[name]["losses"] == []
    assert len(outcomes[name]["points"]) >= SCENARIOS[name], outcomes[name]["points"]


@dataclass
class Player:
    """A process of a mix: what it does, and since when it is frozen."""

    work: Callable[[], None]
    pid: int
    frozen_until_s: float | None = None


def mix(home: str, seed: str, seconds: str) -> dict[str, int]:
    """Appenders, compactors, retention and a cleaner on one folder; at any step each may die or freeze.

    Each appender notes what it is about to append and what it was told of it. At the end everything that it was told is
    done must be there once, everything else once or not at all, and only what is before a horizon may be gone.
    """
    chance, root = random.Random(int(seed)), Path(home)
    contract = contract_of(root)
    compaction.FILES_A_MERGE.update({1: 3, 2: 3})
    works = [lambda: _appender(contract, root)] * 3 + [lambda: _compactor(contract)] * 2
    works += [lambda: _retainer(contract, root), lambda: _pusher(contract, root)]
    players = [Player(work, _play(work, chance.random())) for work in works]
    kills = freezes = 0
    end_s = time.monotonic() + float(seconds)
    while time.monotonic() < end_s:
        for player in players:
            pid, status = os.waitpid(player.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                freezes += 1
                player.frozen_until_s = time.monotonic() + chance.choice((0.01, 0.1, 1.0))
            elif pid:
                if os.WIFEXITED(status):
                    msg = f"a process ended with {os.WEXITSTATUS(status)}"
                    raise AssertionError(msg)
                kills += 1
                player.pid, player.frozen_until_s = _play(player.work, chance.random()), None
            elif player.frozen_until_s is not None and time.monotonic() > player.frozen_until_s:
                os.kill(player.pid, signal.SIGCONT)
                player.frozen_until_s = None
        time.sleep(0.001)
    for player in players:
        os.kill(player.pid, signal.SIGKILL)
        os.waitpid(player.pid, 0)
    return {"kills": kills, "freezes": freezes, **_judged(contract, root)}


def _play(work: Callable[[], None], seed: float) -> int:
    """Start a player that dies or freezes at one step of a hundred each."""

    def play() -> None:
        chance = random.Random(seed)

        def hook(_: str) -> None:
            draw = chance.random()
            if draw < 0.02:
                os.kill(os.getpid(), signal.SIGKILL if draw < 0.01 else signal.SIGSTOP)

        faults.hook = hook
        work()

    return forked(play)


def _note(root: Path, line: str) -> None:
    """One line, whole, in a file that all processes share."""
    handle = os.open(root / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def _appender(contract: ViewContract, root: Path) -> None:
    ledger = StreamLedger(contract, "events", 0)
    chance = random.Random()
    while True:
        with contextlib.suppress(LostRaceError):
            end = ledger.end().end
            while True:
                stop = end + chance.randrange(1, 6)
                accepted = np.array([n for n in range(end, stop) if n % 3], dtype=np.int64)
                _note(root, f"try {end} {stop}")
                rejected = stop - end - len(accepted)
                table = some(contract, *accepted.tolist())
                ledger.append(0, end, stop, table, accepted=accepted, rejected=rejected)
                _note(root, f"ok {end} {stop}")
                end = stop


def _pusher(contract: ViewContract, root: Path) -> None:
    while True:
        number = 10**9 + random.randrange(10**12)
        _note(root, f"try-push {number} 0")
        push(contract, some(contract, number))
        _note(root, f"ok-push {number} 0")
        time.sleep(0.01)


def _compactor(contract: ViewContract) -> None:
    while True:
        with contextlib.suppress(FileNotFoundError, LedgerError):  # others delete without a grace: list again
            compact(contract, grace_s=0.02, level_cap_bytes=random.choice((4_000, 20_000, 1 << 20)))


def _retainer(contract: ViewContract, root: Path) -> None:
    while True:
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError, LedgerError, TransientError):
            horizon = Folder.of(contract).tip(CHAIN).end - 60
            if horizon > 0:
                _note(root, f"horizon {horizon} 0")
                retain(contract, at(horizon))


def _judged(contract: ViewContract, root: Path) -> dict[str, int]:
    """Compare what is there with what the processes noted."""
    folder = Folder.of(contract)
    noted = [line.split() for line in (root / "notes").read_text().splitlines()]
    horizon = max((int(a) for kind, a, _ in noted if kind == "horizon"), default=0)
    before = _found(folder)
    for _ in range(3):  # to remove one name of a file makes its other names younger
        compact(contract, grace_s=0)
    assert _found(folder) == before
    offsets, pushed = before
    assert not [n for n in os.listdir(folder.path) if n.endswith(".tmp")]
    assert {s for c in folder.chains().values() for s in c.valid} == {parse_name(n) for n in os.listdir(folder.path)}
    chain = folder.chain(CHAIN)
    gone = max((read_footer(folder.path_of(s)).next for s in chain.valid if s.level == 3), default=0)
    assert not [n for n in range(horizon, gone) if n % 3], "a row at or after the horizon is gone"
    expected = [n for n in range(gone, chain.end) if n % 3]
    assert offsets == [(n, n) for n in expected]
    done = [(int(a), int(b)) for kind, a, b in noted if kind == "ok"]
    assert len({n for a, b in done for n in range(a, b)}) == sum(b - a for a, b in done), "two were told of one offset"
    assert max(b for _, b in done) <= chain.end
    tried = {(int(a), int(b)) for kind, a, b in noted if kind == "try"}
    ends = {b for _, b in tried} | {0}
    assert chain.end in ends
    assert len(pushed) == len(set(pushed))
    assert {int(a) for kind, a, _ in noted if kind == "ok-push"} <= set(pushed)
    assert set(pushed) <= {int(a) for kind, a, _ in noted if kind == "try-push"}
    assert sum(read_footer(folder.path_of(s)).rejected for s in chain.valid) == len(range(0, chain.end, 3))
    return {"offsets": chain.end, "appends": len(done), "retained": gone, "pushed": len(pushed)}


def _found(folder: Folder) -> tuple[list[tuple[int, int]], list[int]]:
    offsets, pushed = [], []
    for name in folder.chain(CHAIN).valid:
        ids = pq.read_table(folder.path_of(name)).column("id").to_pylist()
        offsets += list(zip(ids, read_accepted(folder.path_of(name)).tolist(), strict=True))
    for name in folder.chain(PUSH).valid:
        pushed += pq.read_table(folder.path_of(name)).column("id").to_pylist()
    return offsets, pushed


def test_random_mixes(tmp_path: Path) -> None:
    for number in range(max(1, examples(1) // 40)):
        home = tmp_path / str(number)
        home.mkdir()
        seed = random.randrange(2**32)
        try:
            done = in_clean_process(f"{__name__}:mix", home, seed, 5)
        except AssertionError as error:
            error.add_note(f"seed {seed}, folder {home}")
            raise
        assert done["appends"] > 0
        assert done["kills"] > 0
