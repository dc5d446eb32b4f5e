"""Compaction: nothing changes for a reader but the number of files."""

from __future__ import annotations

import os
import time
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from feast.field import Field
from feast.types import Array, Bytes, Float32, Float64, Int32, String, UnixTimestamp
from hypothesis import given, settings
from hypothesis import strategies as st

import headrace
from headrace import compact as compaction
from headrace import faults
from headrace.chains import Folder, StreamLedger, append, push, replace_day, stays
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.errors import LedgerError, LostRaceError
from headrace.segments import (
    DayName,
    Footer,
    Ranges,
    SegmentName,
    create,
    new_append_id,
    parse_name,
    read_accepted,
    read_footer,
    remove,
)
from tests.headrace.views import config, examples, rows, view

CHAIN = "stream-events-0-0"


@pytest.fixture
def contract(tmp_path: Path) -> ViewContract:
    return ViewContract.from_feast(view()[1], config(tmp_path))


def some(contract: ViewContract, *ids: int) -> pa.Table:
    return rows(contract, [{"id": n, "value": n / 2, "count": n, "at": n, "made": n} for n in ids])


def commit(contract: ViewContract, ledger: StreamLedger, first: int, count: int, **more: object) -> None:
    """Commit `count` records, of which each third is rejected."""
    accepted = np.array([n for n in range(first, first + count) if n % 3], dtype=np.int64)
    table = some(contract, *accepted.tolist())
    rejected = count - len(accepted)
    ledger.append(0, first, first + count, table, accepted=accepted, rejected=rejected, **more)


def fill(contract: ViewContract, files: int, size: int = 5) -> StreamLedger:
    ledger = StreamLedger(contract, "events", 0)
    start = ledger.end().end
    for number in range(files):
        commit(contract, ledger, start + number * size, size, topic_id="t", servers=(f"s{number % 2}",))
    return ledger


def content(contract: ViewContract) -> list[tuple[int, int, int]]:
    """Every row of the stream with its offset and where it lies in the order of the chain."""
    folder = Folder.of(contract)
    found: list[tuple[int, int, int]] = []
    for name in folder.chain(CHAIN).valid:
        path = folder.path_of(name)
        ids = pq.read_table(path).column("id").to_pylist()
        found += [(i, o, name.first) for i, o in zip(ids, read_accepted(path).tolist(), strict=True)]
    return found


def levels(contract: ViewContract, chain: str = CHAIN) -> list[int]:
    """How many valid files each level has."""
    valid = Folder.of(contract).chain(chain).valid
    return [sum(s.level == level for s in valid) for level in range(4)]


def test_small_files_become_one_and_nothing_else_changes(contract: ViewContract) -> None:
    ledger = fill(contract, 12)
    before, end = content(contract), ledger.end()
    done = compact(contract, grace_s=0).chains[CHAIN]
    assert [(i, o) for i, o, _ in content(contract)] == [(i, o) for i, o, _ in before]
    assert ledger.end() == end
    assert levels(contract) == [1, 1, 0, 0]
    assert (done.files_before, done.files_after) == (12, 2)
    assert (done.files_merged, done.files_deleted, done.rows_merged) == (11, 11, len(before) - 4)
    assert done.bytes_after < done.bytes_before
    merged = Folder.of(contract).path_of(SegmentName(CHAIN, 1, 0))
    footer = read_footer(merged)
    assert (footer.next, footer.rejected, footer.topic_id, footer.servers) == (55, 19, "t", ("s0", "s1"))
    metadata = pq.read_metadata(merged)
    assert set(metadata.metadata) == {b"headrace", b"headrace.accepted"}
    assert metadata.row_group(0).column(0).is_stats_set
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert pq.read_table(merged).schema.equals(contract.schema)
    assert compact(contract, grace_s=0).rows_merged == 0
    fill(contract, 1)


def test_too_few_files_stay_as_they_are(contract: ViewContract) -> None:
    fill(contract, 8)
    assert compact(contract, grace_s=0).rows_merged == 0
    assert levels(contract) == [8, 0, 0, 0]


def test_covered_files_stay_for_the_grace(contract: ViewContract) -> None:
    fill(contract, 12)
    compact(contract)
    assert levels(contract) == [1, 1, 0, 0]
    assert len(Folder.of(contract).segments(CHAIN)) == 13
    assert ds.dataset(headrace.files(contract)).count_rows() == len(content(contract))
    assert compact(contract, grace_s=0).chains[CHAIN].files_deleted == 11


def test_a_clock_that_steps_back_deletes_nothing_early(contract: ViewContract, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(contract, 12)
    compact(contract)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86_400)
    assert compact(contract, grace_s=10).chains[CHAIN].files_deleted == 0
    before = replace_day(contract, date(2026, 1, 1), some(contract, 1))
    after = replace_day(contract, date(2026, 1, 1), some(contract, 2))
    assert after.snapshot > before.snapshot
    monkeypatch.setattr(time, "time", lambda: real() + 86_400)
    assert replace_day(contract, date(2026, 1, 1), some(contract, 3)).snapshot > after.snapshot
    monkeypatch.setattr(time, "time", real)
    assert replace_day(contract, date(2026, 1, 1), some(contract, 4)).rows == 1
    assert 4 in ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist()


def test_the_second_level_takes_many_files(contract: ViewContract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "FILES_A_MERGE", {1: 3, 2: 4})
    ledger = StreamLedger(contract, "events", 0)
    for _ in range(6):
        fill(contract, 4, size=2)
        compact(contract, grace_s=0)
    assert levels(contract) == [1, 2, 1, 0]
    assert [o for _, o, _ in content(contract)] == [n for n in range(ledger.end().end) if n % 3]


def test_files_at_the_cap_go_up_by_link(contract: ViewContract) -> None:
    fill(contract, 4)
    before = content(contract)
    sizes = [p.stat().st_ino for p in headrace.files(contract)]
    done = compact(contract, grace_s=0, level_cap_bytes=10).chains[CHAIN]
    assert (done.files_linked, done.files_merged, done.files_deleted) == (5, 0, 5)
    assert levels(contract) == [1, 1, 2, 0]
    assert content(contract) == before
    assert sorted(p.stat().st_ino for p in headrace.files(contract)) == sorted(sizes)


def test_a_merge_ends_at_the_cap(contract: ViewContract) -> None:
    fill(contract, 30)
    size = headrace.files(contract)[0].stat().st_size
    compact(contract, grace_s=0, level_cap_bytes=4 * size + size // 2)
    assert levels(contract)[0] <= 5
    assert max(path.stat().st_size for path in headrace.files(contract)) < 4 * size + size // 2
    assert [o for _, o, _ in content(contract)] == [n for n in range(150) if n % 3]


def test_marked_files_and_other_topics_go_up_alone(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 0)
    ledger.begin(10, "t")
    for number in range(9):
        commit(contract, ledger, 10 + number, 1, topic_id="t")
    ledger.append(0, 19, 30, None, accepted=np.empty(0, dtype=np.int64), topic_id="t", mark="gap")
    for number in range(3):
        commit(contract, ledger, 30 + number, 1, topic_id="other")
    for number in range(9):
        commit(contract, ledger, 33 + number, 1, topic_id="t")
    ledger.close("new", 0)
    before = content(contract)
    compact(contract, grace_s=0)
    assert [(i, o) for i, o, _ in content(contract)] == [(i, o) for i, o, _ in before]
    folder = Folder.of(contract)
    valid = folder.chain(CHAIN).valid
    assert [(s.level, s.first, read_footer(folder.path_of(s)).mark) for s in valid] == [
        (2, 0, "before"),
        (2, 10, None),
        (2, 19, "gap"),
        (1, 30, None),
        (1, 33, None),
        (0, 42, "closed"),
    ]
    assert ledger.end().epoch == 1


def test_files_of_another_schema_are_not_merged(tmp_path: Path) -> None:
    old = ViewContract.from_feast(view()[1], config(tmp_path))
    new = ViewContract.from_feast(
        view(features=[Field(name="value", dtype=Float32), Field(name="more", dtype=String)])[1], config(tmp_path)
    )
    for number in range(9):
        push(old, some(old, number))
    for number in range(9, 18):
        push(new, rows(new, [{"id": number, "value": 1.0, "more": "x", "at": 1}]))
    push(old, some(old, 18))
    files = [pq.read_table(path) for path in headrace.files(new)]
    compact(new, grace_s=0)
    merged = [pq.read_table(path) for path in headrace.files(new)]
    assert len(merged) == 3
    assert merged[0].equals(pa.concat_tables(files[:9]))
    assert merged[1].equals(pa.concat_tables(files[9:18]))


def test_values_of_every_shape_survive(tmp_path: Path) -> None:
    features = [
        Field(name="text", dtype=String),
        Field(name="small", dtype=Int32),
        Field(name="raw", dtype=Bytes),
        Field(name="floats", dtype=Array(Float64)),
        Field(name="texts", dtype=Array(String)),
        Field(name="when", dtype=UnixTimestamp),
    ]
    contract = ViewContract.from_feast(view(features=features)[1], config(tmp_path))
    for n in range(10):
        values = {"text": "ü" * n, "small": n, "raw": b"\0" * n, "floats": [float("nan"), None], "texts": ["", "a"]}
        push(contract, rows(contract, [{"id": n, "at": n, "when": n, **(values if n % 2 else {})}]))
    before = pa.concat_tables([pq.read_table(path) for path in headrace.files(contract)])
    compact(contract, grace_s=0)
    found = [pq.read_table(path) for path in headrace.files(contract)]
    assert len(found) == 2
    assert found[0].schema.equals(contract.schema)
    assert repr(pa.concat_tables(found).to_pylist()) == repr(before.to_pylist())


def test_notes_that_are_lists_are_joined_and_others_keep_a_file_alone(contract: ViewContract) -> None:
    folder = Folder.of(contract)
    for number in range(10):
        note = Footer(next=number + 1, append=new_append_id(), extra={"origins": [[0, number]]})
        append(folder, "replay-events", number, some(contract, number), note)
    compact(contract, grace_s=0)
    assert levels(contract, "replay-events") == [1, 1, 0, 0]
    footer = read_footer(folder.path_of(SegmentName("replay-events", 1, 0)))
    assert footer.extra["origins"] == [[0, n] for n in range(9)]
    for number in range(10, 14):
        note = Footer(next=number + 1, append=new_append_id(), extra={"origins": number})
        append(folder, "replay-events", number, some(contract, number), note)
    compact(contract, grace_s=0)
    assert [n["id"] for f in headrace.files(contract) for n in pq.read_table(f).to_pylist()] == list(range(14))


def test_a_merge_ends_rather_than_hold_too_many_ranges(contract: ViewContract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "ACCEPTED_CAP_BYTES", 100)
    fill(contract, 20, size=30)
    compact(contract, grace_s=0)
    assert levels(contract)[1] + levels(contract)[2] > 3
    assert [o for _, o, _ in content(contract)] == [n for n in range(600) if n % 3]


@given(st.sets(st.integers(0, 300)).map(sorted), st.integers(0, 300))
@settings(max_examples=examples(50), deadline=None)
def test_ranges_are_the_numbers(numbers: list[int], cut: int) -> None:
    every = np.array(numbers, dtype=np.int64)
    pieces = [Ranges.of(every[every < cut]), Ranges.of(every[every >= cut])]
    for ranges in (Ranges.of(every), Ranges.joined(pieces), Ranges.decode(Ranges.of(every).encode())):
        assert ranges.offsets().tolist() == numbers
        assert ranges.count == len(numbers)
        assert (ranges.starts[1:] > ranges.ends[:-1]).all()


def test_what_crashes_left_is_removed_after_the_grace(contract: ViewContract) -> None:
    newest = replace_day(contract, date(2026, 1, 1), some(contract, 1))
    stale = contract.directory / str(DayName(date(2026, 1, 1), newest.snapshot - 1))
    create(stale, some(contract, 9), Footer(next=1, append=new_append_id()))
    dead = contract.directory / f".push-0-{0:020d}.parquet.{new_append_id()}.tmp"
    dead.write_bytes(b"half a file")
    mine = contract.directory / ".notes.tmp"
    mine.write_text("mine")
    assert (compact(contract).days_deleted, compact(contract).temporary_deleted) == (0, 0)
    done = compact(contract, grace_s=0)
    assert (done.days_deleted, done.temporary_deleted) == (1, 1)
    assert not stale.exists()
    assert not dead.exists()
    assert mine.exists()
    assert newest.path.exists()


def test_a_void_file_is_removed_and_never_read(contract: ViewContract) -> None:
    fill(contract, 12)
    compact(contract, grace_s=0)
    void = Folder.of(contract).path_of(SegmentName(CHAIN, 0, 5))
    void.write_bytes(b"not even Parquet")
    before = content(contract)
    assert len(headrace.files(contract)) == 2
    assert StreamLedger(contract, "events", 0).end().end == 60
    with pytest.raises(LostRaceError):
        append(Folder.of(contract), CHAIN, 10, some(contract, 1), Footer(next=11, append=new_append_id()))
    assert compact(contract, grace_s=0).chains[CHAIN].files_deleted == 1
    assert content(contract) == before


def test_a_damaged_source_is_named_and_nothing_is_merged(contract: ViewContract) -> None:
    fill(contract, 12)
    path = headrace.files(contract)[5]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LedgerError, match=path.name):
        compact(contract)
    assert StreamLedger(contract, "events", 0).end().end == 60  # the end is not in doubt, and the stream goes on
    fill(contract, 1)


def test_a_folder_that_is_not_there_is_empty(contract: ViewContract) -> None:
    assert compact(contract).chains == {}


def test_progress_is_told(contract: ViewContract) -> None:
    told: list[tuple[int, int]] = []
    fill(contract, 12)
    compact(contract, progress=lambda done, total: told.append((done, total)))
    assert told == [(len(read_accepted(Folder.of(contract).path_of(SegmentName(CHAIN, 1, 0)))),) * 2]


def test_a_frozen_compactor_harms_nothing(contract: ViewContract) -> None:
    """It planned when level 0 had these files; what it links now was merged, covered and removed long ago."""
    fill(contract, 12)
    folder = Folder.of(contract)
    plan = compaction._runs(folder, CHAIN, 1, compaction.LEVEL_CAP_BYTES)
    held = [pq.read_table(source.path) for source in plan[0]]
    for _ in range(3):
        compact(contract, grace_s=0, level_cap_bytes=10)  # everything goes to level 2, and names become free
        fill(contract, 9)
    before = content(contract)
    late = SegmentName(CHAIN, 1, 0)
    assert create(folder.path_of(late), pa.concat_tables(held[:3]), Footer(next=15, append=new_append_id()))
    assert content(contract) == before
    assert not stays(folder, late, "compact")
    assert not folder.path_of(late).exists()
    assert {parse_name(entry) for entry in os.listdir(contract.directory)} >= set(folder.chain(CHAIN).valid)


@pytest.mark.parametrize("grace_s", [0.0, 3600.0])
def test_an_appender_that_sleeps_before_its_link_loses(
    contract: ViewContract, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    """It saw its last segment as the newest; when it wakes, what others appended behind it may be merged and gone."""
    sleeper = fill(contract, 3)

    def sleep(step: str) -> None:
        if step == "append.2.temporary-fsynced":
            monkeypatch.setattr(faults, "hook", None)
            fill(contract, 12)
            compact(contract, grace_s=grace_s)
            fill(contract, 12)
            compact(contract, grace_s=grace_s)

    monkeypatch.setattr(faults, "hook", sleep)
    with pytest.raises(LostRaceError) as lost:
        commit(contract, sleeper, 15, 5, topic_id="t")
    assert lost.value.end == 135
    assert [o for _, o, _ in content(contract)] == [n for n in range(135) if n % 3]
    commit(contract, sleeper, 135, 5, topic_id="t")


def test_covered_files_go_in_ascending_order(contract: ViewContract, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a writer that finds its last segment in place would not know that no later name was freed."""
    fill(contract, 12)
    compact(contract)
    folder = Folder.of(contract)
    covered = sorted(s for s in folder.segments(CHAIN) if s.level == 0)[:-1]
    time.sleep(0.05)
    now_s = time.time()
    time.sleep(0.05)
    folder.path_of(covered[4]).touch()
    monkeypatch.setattr(time, "time", lambda: now_s)
    assert compact(contract, grace_s=0).chains[CHAIN].files_deleted == 4
    assert sorted(s for s in folder.segments(CHAIN) if s.level == 0)[:-1] == covered[4:]


def test_rows_that_cannot_be_read_are_named(contract: ViewContract) -> None:
    fill(contract, 12, size=300)
    path = headrace.files(contract)[5]
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(LedgerError, match=path.name):
        compact(contract)
    assert levels(contract) == [12, 0, 0, 0]
    assert not list(contract.directory.glob(".*"))


def test_what_came_after_the_look_is_not_covered(contract: ViewContract) -> None:
    """Where the newest segment was set aside a merged file ends the chain, and is followed by what comes next."""
    ledger = fill(contract, 12)
    compact(contract)
    remove(Folder.of(contract).path_of(SegmentName(CHAIN, 0, 55)))
    folder = Folder.of(contract)
    seen = folder.chain(CHAIN)
    commit(contract, StreamLedger(contract, "events", 0), 55, 5)
    assert ledger.end().end == 60
    due = compaction._due(folder, seen, time.time() + 60)
    assert [path.name for path in due] == [str(SegmentName(CHAIN, 0, first)) for first in range(0, 55, 5)]
