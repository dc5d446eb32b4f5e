"""A chain whose files are damaged, while workers begin, go on and die: every offset is there once, whoever came when.

In a folder and in an object store.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import headrace
from headrace import faults, folder, objects
from headrace.chains import Folder, StreamLedger, accepted_offsets
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.damage import Condition, Examination, Hole, chains_of, fill, set_aside
from headrace.errors import LedgerError, LostRaceError
from headrace.objects import ObjectPath
from headrace.place import File, clear, readable, stat_of
from headrace.segments import Footer, SegmentName, create, new_append_id
from tests.headrace.test_chains import offsets, some
from tests.headrace.views import EPOCH_US, config, view
from tests.servers import ObjectStore

CHAIN = "stream-events-0-0"
LOG_END = 20
"""Where the topic's log ends; each offset has a record, and each record is good."""


@pytest.fixture(params=["folder", "objects"])
def contract(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ViewContract:
    monkeypatch.setattr(folder, "_LISTING_PAUSE_S", 0.0)
    if request.param == "folder":
        return ViewContract.from_feast(view()[1], config(tmp_path))
    store: ObjectStore = request.getfixturevalue("object_store")
    store.bucket("views")
    url = f"s3://views/{uuid.uuid4().hex}/stats"
    return ViewContract.from_feast(view(path=url, endpoint=store.url)[1], config(tmp_path))


class Worker:
    """Appends five records a time; begins anew when it is told that the ledger ends elsewhere."""

    def __init__(self, contract: ViewContract) -> None:
        self._contract = contract
        self._end = 0
        self._begin()

    def go(self) -> None:
        """One append, or the attempt."""
        start, end = self._end, min(self._end + 5, LOG_END)
        if start == end:
            return
        try:
            table = some(self._contract, *range(start, end))
            self._ledger.append(0, start, end, table, accepted=offsets(*range(start, end)), topic_id="t")
            self._end = end
        except LostRaceError:
            self._begin()

    def _begin(self) -> None:
        self._ledger = StreamLedger(self._contract, "events", 0)
        self._end = self._ledger.end().end


def restore(contract: ViewContract, piece: int = 7) -> None:
    """What `streaming.restore` does, with rows that are known."""
    examine = Examination(contract, CHAIN)
    while (condition := examine()).damaged or missing(condition):
        set_aside(contract, condition.damaged)
        for hole in missing(condition) if not condition.damaged else ():
            for first in range(hole.first, hole.next, piece):
                end = min(first + piece, hole.next)
                note = Footer(
                    next=end,
                    min_us=EPOCH_US + first,
                    max_us=EPOCH_US + end - 1,
                    topic_id="t",
                    append=new_append_id(),
                )
                part = Hole(CHAIN, hole.level, first, hole.next)
                if not fill(contract, part, some(contract, *range(first, end)), note, offsets(*range(first, end))):
                    break


def missing(condition: Condition) -> list[Hole]:
    is_end = condition.is_end_lost and not condition.holes and condition.end < LOG_END
    return [*condition.holes, *([Hole(CHAIN, 0, condition.end, LOG_END)] if is_end else [])]


def path_of(contract: ViewContract, first: int, level: int = 0) -> File:
    return Folder.of(contract).path_of(SegmentName(CHAIN, level, first))


def write(path: File, content: bytes) -> None:
    """As what damages a file does: under its name."""
    if isinstance(path, ObjectPath):
        objects.write(path, content)
    else:
        path.write_bytes(content)


def garble(path: File) -> None:
    """Nothing of it can be read."""
    write(path, b"garbage")


def flip(path: File) -> None:
    """The last bit of its first column; the footer says where it ends."""
    metadata = pq.read_metadata(readable(path)).row_group(0).column(0)
    place = (metadata.dictionary_page_offset or metadata.data_page_offset) + metadata.total_compressed_size - 1
    size = stat_of(path).size
    content = bytearray(objects.read(path, 0, size)) if isinstance(path, ObjectPath) else bytearray(path.read_bytes())
    content[place] ^= 1
    write(path, bytes(content))


DAMAGES: dict[str, Callable[[File], None]] = {"garbage": garble, "a bit": flip}


def found(contract: ViewContract) -> list[int]:
    """The accepted offsets of the valid files, in their order; each has its row."""
    accepted: list[int] = []
    for path in headrace.files(contract):
        numbers = accepted_offsets(path).tolist()
        assert pq.read_table(readable(path)).column("id").to_pylist() == numbers
        accepted += numbers
    return accepted


def filled(contract: ViewContract, until: int = 15) -> Worker:
    worker = Worker(contract)
    while Folder.of(contract).tip(CHAIN).end < until:
        worker.go()
    return worker


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_worker_that_knows_a_lost_end_does_not_go_on_behind_it(
    contract: ViewContract, damage: Callable[[File], None]
) -> None:
    """Neither at once, nor where another has gone on from the end that is left, in other steps."""
    ledger = StreamLedger(contract, "events", 0)
    for start in (0, 5, 10):
        table = some(contract, *range(start, start + 5))
        ledger.append(0, start, start + 5, table, accepted=offsets(*range(start, start + 5)), topic_id="t")
    damage(path_of(contract, 10))
    set_aside(contract, Examination(contract, CHAIN)().damaged)
    with pytest.raises(LostRaceError) as lost:
        ledger.append(0, 15, 17, some(contract, 15), accepted=offsets(15), topic_id="t")
    assert lost.value.end == 10
    other = StreamLedger(contract, "events", 0)
    for start, end in ((10, 13), (13, 18)):
        table = some(contract, *range(start, end))
        other.append(0, start, end, table, accepted=offsets(*range(start, end)), topic_id="t")
    with pytest.raises(LostRaceError) as lost:
        ledger.append(0, 15, 17, some(contract, 15), accepted=offsets(15), topic_id="t")
    assert lost.value.end == 18
    assert found(contract) == list(range(18))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("acts", ["known", "new known"])
def test_workers_may_go_on_or_begin_at_any_step_of_a_restoration(
    contract: ViewContract, damage: Callable[[File], None], acts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that knows where the end was goes on, or one that knows nothing begins."""

    def act() -> None:
        for who in acts.split():
            with contextlib.suppress(LedgerError):  # none begins while the damaged file is in its place
                (known if who == "known" else Worker(contract)).go()

    passed = number = 0
    while passed >= number - 1:
        clear(contract.directory)
        known = filled(contract)
        damage(path_of(contract, 10))
        passed = at_step(number, act, lambda: restore(contract), monkeypatch)
        _goes_on(contract, known)
        number += 1
    assert number > 5


def at_step(number: int, act: Callable[[], None], work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """Do something at one step of some work; the number of the last step."""
    passed = -1

    def hook(_: str) -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            with monkeypatch.context() as patch:
                patch.setattr(faults, "hook", None)
                act()

    with monkeypatch.context() as patch:
        patch.setattr(faults, "hook", hook)
        work()
    return passed


def _goes_on(contract: ViewContract, *workers: Worker) -> None:
    """Everything that was there is there once, and workers bring the rest."""
    assert found(contract) == list(range(len(found(contract)))), "restored at once"
    assert len(found(contract)) >= 15
    for worker in (*workers, Worker(contract)):
        for _ in range(4):
            worker.go()
    assert found(contract) == list(range(LOG_END))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_restoration_may_happen_at_any_step_of_an_append(
    contract: ViewContract, damage: Callable[[File], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a worker that goes on from the file which is set aside meanwhile; a second run settles what is left."""
    passed = number = 0
    while passed >= number - 1:
        clear(contract.directory)
        known = filled(contract)
        damage(path_of(contract, 10))
        passed = at_step(number, lambda: restore(contract), known.go, monkeypatch)
        restore(contract)
        _goes_on(contract, known)
        number += 1
    assert number > 2


def test_what_a_worker_left_that_died_before_it_looked_is_settled(contract: ViewContract) -> None:
    """Its file begins within what came in the place of the damaged one."""
    filled(contract)
    note = Footer(next=17, topic_id="t", append=new_append_id())
    assert create(path_of(contract, 13), some(contract, *range(13, 17)), note, offsets(*range(13, 17)))
    with pytest.raises(LedgerError, match="an overlap at position 15"):
        headrace.files(contract)
    condition = Examination(contract, CHAIN)()
    assert {name.first: damage.why for name, damage in condition.damaged.items()} == {
        13: "it begins at 13, and what lies before it goes up to 15"
    }
    assert condition.holes == (Hole(CHAIN, 0, 15, 17),)
    restore(contract)
    assert found(contract) == list(range(17))


def test_a_restoration_that_was_killed_in_a_lost_end_is_gone_on_with(
    contract: ViewContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies aside says how far the chain went."""
    filled(contract)
    flip(path_of(contract, 10))

    class KilledError(BaseException): ...

    def hook(step: str) -> None:
        if step == "restore.6.others-checked":
            raise KilledError

    monkeypatch.setattr(faults, "hook", hook)
    for end in (14, 15):
        with pytest.raises(KilledError):
            restore(contract, piece=4)
        assert found(contract) == list(range(end))
    monkeypatch.setattr(faults, "hook", None)
    restore(contract)
    assert found(contract) == list(range(15))
    assert not Examination(contract, CHAIN)().is_end_lost


def test_several_lost_files_at_the_end(contract: ViewContract) -> None:
    filled(contract, 20)
    flip(path_of(contract, 10))
    garble(path_of(contract, 15))
    condition = Examination(contract, CHAIN)()
    assert (condition.end, condition.holes, condition.is_end_lost) == (10, (Hole(CHAIN, 0, 10, 15),), True)
    restore(contract)
    assert found(contract) == list(range(LOG_END))


def test_a_merged_file_is_put_back_on_its_level(contract: ViewContract) -> None:
    worker = Worker(contract)
    for start in range(0, 20, 2):
        table = some(contract, start, start + 1)
        StreamLedger(contract, "events", 0).append(
            0, start, start + 2, table, accepted=offsets(start, start + 1), topic_id="t"
        )
    compact(contract, grace_s=0)
    assert [(name.level, name.first) for name in Folder.of(contract).chain(CHAIN).valid] == [(1, 0), (0, 18)]
    flip(path_of(contract, 0, level=1))
    set_aside(contract, Examination(contract, CHAIN)().damaged)
    assert Examination(contract, CHAIN)().holes == (Hole(CHAIN, 0, 0, 18),)
    restore(contract)
    assert chains_of(contract, "events") == [CHAIN]
    assert found(contract) == list(range(20))
    worker.go()
    _goes_on(contract, worker)


def test_another_file_of_the_name_is_not_set_aside(contract: ViewContract) -> None:
    """Of two restorations one may be late: what the other has put there stays."""
    filled(contract)
    garble(path_of(contract, 5))
    late = Examination(contract, CHAIN)()
    restore(contract)
    before = sorted(Folder.of(contract).place.names())
    set_aside(contract, late.damaged)
    assert sorted(Folder.of(contract).place.names()) == before
    assert found(contract) == list(range(15))
