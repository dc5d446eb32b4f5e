"""`kill -9` at every numbered step, on an object store: the scenarios of a folder, on the prefixes of a bucket."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from headrace.chains import PUSH, Folder, replace_day
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.place import readable
from headrace.segments import read_accepted
from tests.headrace import crashes, test_crash
from tests.headrace.crashes import Scenario, explore, forked, in_clean_process, show
from tests.headrace.test_crash import DAY, commit, push_until, some
from tests.headrace.views import config, view
from tests.servers import ObjectStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

BUCKET = "crashes"

SCENARIOS = {
    "append_to_a_stream": 2,
    "append_of_a_sleeper": 3,
    "day_replacement": 3,
    "compaction": 8,
    "retention": 10,
}
"""The scenarios, and how many steps each has at least."""


def in_fork(work: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The same work in a process of its own: who has asked an object store cannot start others that do."""

    def run(home: Path) -> Any:
        reader, writer = os.pipe()

        def tell() -> None:
            with os.fdopen(writer, "wb") as sink:
                sink.write(pickle.dumps(work(home)))

        pid = forked(tell)
        os.close(writer)
        with os.fdopen(reader, "rb") as source:
            told = source.read()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return pickle.loads(told)  # noqa: S301 - our own child's

    return run


def contract_at(data: Path, endpoint: str, home: Path) -> ViewContract:
    """The view whose objects are the files of a folder of the server's."""
    url = f"s3://{BUCKET}/{home.relative_to(data / BUCKET)}/stats"
    return ViewContract.from_feast(view(path=url, endpoint=endpoint)[1], config(data.parent / "repository"))


def content(home: Path) -> dict[str, Any]:
    """What a reader sees: the rows of each span of five offsets, of each push and of each day."""
    folder = Folder.of(test_crash.contract_of(home))
    found: dict[str, Any] = {f"offsets {n}": [] for n in range(0, 100, 5)} | {f"push {n}": [] for n in range(20)}
    for chain in folder.chains().values():
        for path in map(folder.path_of, chain.valid):
            ids = pq.read_table(readable(path)).column("id").to_pylist()
            places = ids if chain.name == PUSH else read_accepted(path).tolist()
            for number, place in zip(ids, places, strict=True):
                found[f"push {place}" if chain.name == PUSH else f"offsets {place // 5 * 5}"].append((number, place))
    days = folder.days()
    found["day"] = pq.read_table(readable(days[DAY].path)).column("id").to_pylist() if DAY in days else None
    return found


def layout(home: Path) -> list[str]:
    """Every object, snapshots of days without their time."""
    names = map(str, Folder.of(test_crash.contract_of(home)).names())
    return sorted(name.split("-0000")[0] if name.startswith("batch") else name for name in names)


def uncompacted(home: Path) -> None:
    commit(home, 60)
    push_until(home, 3)


def compacted(home: Path) -> None:
    """Merges, and then sends each file up as it is."""
    contract = test_crash.contract_of(home)
    compact(contract, grace_s=0)
    compact(contract, grace_s=0, level_cap_bytes=10)


def with_old_rows(home: Path) -> None:
    contract = test_crash.contract_of(home)
    commit(home, 50)
    compact(contract, grace_s=0)
    commit(home, 65)
    replace_day(contract, DAY, some(contract, 1, 2))


def every(home: str, endpoint: str) -> dict[str, Any]:
    """Explore all scenarios, in the one process that imported everything."""
    crashes.PASSES = 3 if os.environ.get("HEADRACE_TEST_EXAMPLES") else 0  # none but the last
    data = Path(home)
    test_crash.contract_of = partial(contract_at, data, endpoint)
    test_crash.contract_of(data / BUCKET / "none")  # imports Feast's pieces: once, not in each fork
    for name in ("obstore", "obstore.store", "obstore.exceptions"):
        importlib.import_module(name)
    made = {
        "append_to_a_stream": Scenario(test_crash.begun, test_crash.several_appends, content),
        "append_of_a_sleeper": Scenario(test_crash.worn, test_crash.append_late, content),
        "day_replacement": Scenario(test_crash.day_there, test_crash.day_replaced, content, layout),
        "compaction": Scenario(uncompacted, compacted, content, layout),
        "retention": Scenario(with_old_rows, test_crash.retained_and_cleaned, content),
    }
    found = {}
    for name, one in made.items():
        forking = Scenario(
            in_fork(one.prepare), one.run, in_fork(one.state), None if one.layout is None else in_fork(one.layout)
        )
        found[name] = asdict(explore(forking, data / BUCKET / name))
    return found


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, object_store: ObjectStore) -> dict[str, Any]:
    """What became of each scenario; points, runs and losses are shown at the end."""
    object_store.bucket(BUCKET)
    found = in_clean_process(f"{__name__}:every", object_store.data, object_store.url)
    show(request.config, {f"{name}, objects": one for name, one in found.items()})
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_kill_minus_nine_at_every_step(name: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[name]["losses"] == []
    assert len(outcomes[name]["points"]) >= SCENARIOS[name], outcomes[name]["points"]
