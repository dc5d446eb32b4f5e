"""Chains, days and the ledger: what is valid, where a chain ends, and who may extend it."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import headrace
from headrace import faults
from headrace.chains import (
    Chain,
    Folder,
    StreamLedger,
    accepted_offsets,
    content_hash,
    day_files,
    derive,
    push,
    replace_day,
)
from headrace.contract import ViewContract
from headrace.errors import ChainClosedError, ConfigError, LedgerError, LostRaceError
from headrace.segments import (
    DayName,
    Footer,
    SegmentName,
    columns_id,
    create,
    new_append_id,
    parse_name,
    parse_stream_chain,
    read_footer,
)
from tests.headrace.views import config, rows, view

DAY = date(2026, 1, 31)


@pytest.fixture
def contract(tmp_path: Path) -> ViewContract:
    return ViewContract.from_feast(view()[1], config(tmp_path))


def some(contract: ViewContract, *ids: int) -> pa.Table:
    return rows(contract, [{"id": n, "value": n / 2, "count": n, "at": n, "made": n} for n in ids])


def offsets(*numbers: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("stream-a-b.c-12-3-0-00000000000000000007.parquet", SegmentName("stream-a-b.c-12-3", 0, 7)),
        ("push-0-00000000000000000000.parquet", SegmentName("push", 0, 0)),
        ("replay-a-1-2-00000000000000000009.parquet", SegmentName("replay-a-1", 2, 9)),
        ("batch-2026-01-31-00001795478885877800.parquet", DayName(DAY, 1795478885877800)),
        ("batch-2026-02-31-00001795478885877800.parquet", None),
        ("part-0.parquet", None),
        (".push-0-00000000000000000000.parquet.x.tmp", None),
        ("stream-a-1-1-7-00000000000000000000.parquet", None),
    ],
)
def test_names_are_read_from_the_right(name: str, meaning: SegmentName | DayName | None) -> None:
    assert parse_name(name) == meaning
    if meaning is not None:
        assert str(meaning) == name
    if isinstance(meaning, SegmentName) and name.startswith("stream"):
        assert parse_stream_chain(meaning.chain) == ("a-b.c", 12, 3)


def chain_of(*files: tuple[int, int, int]) -> Chain:
    """Files as (level, first, next)."""
    footers = {SegmentName("push", level, first): Footer(next=end) for level, first, end in files}
    return derive("push", footers, footers.__getitem__)


@pytest.mark.parametrize(
    ("files", "valid", "end"),
    [
        ([], [], 0),
        ([(0, 0, 5), (0, 5, 9)], [(0, 0), (0, 5)], 9),
        ([(0, 0, 5), (0, 5, 9), (1, 0, 5)], [(1, 0), (0, 5)], 9),
        ([(0, 5, 9), (1, 0, 5)], [(1, 0), (0, 5)], 9),
        ([(0, 9, 12), (1, 0, 5), (1, 5, 9), (2, 0, 5)], [(2, 0), (1, 5), (0, 9)], 12),
        ([(0, 3, 4), (0, 9, 12), (1, 0, 9)], [(1, 0), (0, 9)], 12),  # a frozen writer's, void
        ([(0, 9, 12), (2, 0, 9), (3, 0, 9)], [(3, 0), (0, 9)], 12),
    ],
)
def test_covered_files_do_not_count(files: list[tuple[int, int, int]], valid: list[tuple[int, int]], end: int) -> None:
    chain = chain_of(*files)
    assert [(s.level, s.first) for s in chain.valid] == valid
    assert chain.end == end


@pytest.mark.parametrize(
    ("files", "message"),
    [([(0, 0, 5), (0, 6, 9)], "a hole"), ([(0, 0, 5), (0, 4, 9)], "an overlap"), ([(0, 0, 0)], "not beyond")],
)
def test_a_fault_is_named(files: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        chain_of(*files)


def test_an_append_is_the_commit(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 0)
    assert not ledger.end().exists
    path = ledger.append(
        0, 0, 10, some(contract, 1, 2, 3), accepted=offsets(0, 4, 9), rejected=6, skipped=1, topic_id="t", servers=["s"]
    )
    end = ledger.end()
    assert (end.epoch, end.end, end.topic_id, end.servers) == (0, 10, "t", ("s",))
    assert accepted_offsets(path).tolist() == [0, 4, 9]
    footer = read_footer(path)
    assert (footer.rejected, footer.skipped, footer.max_us - footer.min_us) == (6, 1, 2)  # type: ignore[operator]
    ledger.append(0, 10, 12, None, accepted=offsets(), rejected=2)
    assert ledger.end().end == 12


def test_a_segment_is_plain_parquet_of_exactly_the_views_columns(contract: ViewContract) -> None:
    path = push(contract, some(contract, 1, 2))
    assert path is not None
    assert pq.read_table(path).schema.equals(contract.schema)
    assert set(pq.read_metadata(path).metadata) == {b"headrace"}
    assert ds.dataset(contract.directory).to_table().num_rows == 2


def test_of_two_writers_one_loses(contract: ViewContract) -> None:
    first, second = StreamLedger(contract, "events", 0), StreamLedger(contract, "events", 0)
    first.append(0, 0, 4, some(contract, 1), accepted=offsets(3))
    with pytest.raises(LostRaceError) as lost:
        second.append(0, 0, 9, some(contract, 1), accepted=offsets(3))
    assert lost.value.end == 4
    assert ds.dataset(headrace.files(contract)).to_table().num_rows == 1


def test_racing_writers_lose_no_row_and_double_none(contract: ViewContract) -> None:
    def write(base: int) -> None:
        for number in range(20):
            push(contract, some(contract, base + number))

    threads = [threading.Thread(target=write, args=(base,)) for base in (0, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist())
    assert found == sorted(base + n for base in (0, 100, 200, 300) for n in range(20))
    assert Folder(contract.directory).chain("push").end == 80


def test_an_append_below_a_higher_level_is_void(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 0)
    ledger.append(0, 0, 4, some(contract, 1), accepted=offsets(0))
    ledger.append(0, 4, 8, some(contract, 2), accepted=offsets(5))
    folder = Folder(contract.directory)
    merged = SegmentName("stream-events-0-0", 1, 0)
    create(folder.path_of(merged), some(contract, 1), Footer(next=4, append=new_append_id()), offsets(0))
    folder.path_of(SegmentName("stream-events-0-0", 0, 0)).unlink()  # covered, and its grace is over
    with pytest.raises(LostRaceError) as lost:  # a writer that slept since before all this
        ledger.append(0, 0, 3, some(contract, 9), accepted=offsets(1))
    assert lost.value.end == 8
    assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [1, 2]


def test_a_repeated_append_of_the_same_id_is_a_success(contract: ViewContract, tmp_path: Path) -> None:
    note = Footer(next=1, append=new_append_id())
    assert create(tmp_path / "push-0-00000000000000000000.parquet", some(contract, 1), note)
    assert create(tmp_path / "push-0-00000000000000000000.parquet", some(contract, 1), note)
    other = Footer(next=1, append=new_append_id())
    assert not create(tmp_path / "push-0-00000000000000000000.parquet", some(contract, 1), other)


def test_an_append_that_would_leave_a_hole_is_refused(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "t", 0)
    with pytest.raises(LedgerError, match="ends at 0; an append at 3 would leave a hole"):
        ledger.append(0, 3, 5, None, accepted=offsets())
    ledger.append(0, 0, 3, None, accepted=offsets())
    StreamLedger(contract, "t", 0).append(0, 3, 5, None, accepted=offsets())
    ledger.append(0, 5, 6, None, accepted=offsets())  # it follows what another wrote
    with pytest.raises(LedgerError, match="ends at 6"):
        ledger.append(0, 7, 8, None, accepted=offsets())
    assert ledger.end().end == 6


def test_the_arguments_of_an_append_must_agree(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 0)
    for first, end, accepted in ((0, 0, offsets()), (0, 5, offsets(5)), (2, 5, offsets(1)), (0, 5, offsets())):
        with pytest.raises(ValueError, match=r"expected first < next|do not belong"):
            ledger.append(0, first, end, some(contract, 1), accepted=accepted)


def test_beginning_in_the_middle(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 1)
    assert ledger.begin(0, "t").end == 0
    assert ledger.begin(70, "t").end == ledger.begin(70, "t").end == ledger.end().end == 70
    assert read_footer(headrace.files(contract)[0]).mark == "before"
    with pytest.raises(LostRaceError, match="ends at 70, not at 80"):
        ledger.begin(80, "t")


@pytest.mark.parametrize("start", [0, 7])
def test_a_closed_epoch_is_followed_by_the_next(contract: ViewContract, start: int) -> None:
    ledger = StreamLedger(contract, "events", 0)
    ledger.append(0, 0, 4, some(contract, 1), accepted=offsets(0), topic_id="old")
    for _ in range(2):
        end = ledger.close("new", start)
        assert (end.epoch, end.end, end.topic_id) == (1, start, "new")
    with pytest.raises(ChainClosedError, match="closed at 4"):
        ledger.append(0, 4, 5, None, accepted=offsets())
    ledger.append(1, start, start + 2, some(contract, 2), accepted=offsets(start), topic_id="new")
    assert (ledger.end().epoch, ledger.end().end) == (1, start + 2)
    assert ledger.close("new", 0).epoch == 1
    assert ledger.close("newer", 0).epoch == 2


def test_the_successor_of_a_closed_epoch_is_made_by_whoever_finds_it(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 0)
    ledger.append(0, 0, 4, some(contract, 1), accepted=offsets(0), topic_id="old")
    ledger.close("new", 7)
    folder = Folder(contract.directory)
    folder.path_of(SegmentName("stream-events-0-1", 0, 0)).unlink()  # as if the closer had died in between
    assert (ledger.end().epoch, ledger.end().end) == (1, 7)
    assert folder.chain("stream-events-0-1").end == 7


def test_a_day_is_replaced_at_once(contract: ViewContract) -> None:
    first = replace_day(contract, DAY, some(contract, 1, 2), footer={"note": "first"})
    assert replace_day(contract, DAY, some(contract, 1, 2)) == first
    second = replace_day(contract, DAY, some(contract, 1, 3))
    assert second.snapshot > first.snapshot
    assert [path.name for path in sorted(contract.directory.iterdir())] == [second.path.name]
    assert day_files(contract)[DAY] == second
    assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [1, 3]
    assert replace_day(contract, DAY, some(contract)).rows == 0


def test_the_rows_that_were_read_last_count_whoever_comes_last(contract: ViewContract) -> None:
    later = replace_day(contract, DAY, some(contract, 2), read_us=20)
    assert replace_day(contract, DAY, some(contract, 1), read_us=10) == later
    forced = replace_day(contract, DAY, some(contract, 3), read_us=20)  # the same read, cleaned anew
    assert (forced.snapshot, forced.read_us) == (21, 20)
    assert replace_day(contract, DAY, some(contract, 4), read_us=21).snapshot == 22
    assert replace_day(contract, DAY, some(contract, 5)).rows == 1  # no word of when: they replace
    assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [5]


def test_of_many_who_publish_a_day_at_once_the_last_read_counts(contract: ViewContract) -> None:
    for start in range(0, 200, 10):
        reads = [start + number for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda us: replace_day(contract, DAY, some(contract, us), read_us=us), reads))
        assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [reads[-1]]
        assert len(list(contract.directory.iterdir())) == 1


def test_the_same_rows_of_the_same_moment_are_the_same_bytes(contract: ViewContract) -> None:
    made = []
    for _ in range(2):
        path = replace_day(contract, DAY, some(contract, 1, 2), read_us=7, footer={"note": 1}).path
        made.append((path.name, path.read_bytes()))
        path.unlink()
    assert made[0] == made[1]


def test_an_older_snapshot_that_outlived_a_crash_does_not_count(contract: ViewContract) -> None:
    newest = replace_day(contract, DAY, some(contract, 1))
    stale = contract.directory / str(DayName(DAY, newest.snapshot - 1))
    create(stale, some(contract, 9), Footer(next=1, append=new_append_id(), extra={"content_hash": "x"}))
    assert headrace.files(contract) == [newest.path]
    replace_day(contract, DAY, some(contract, 1))
    assert not stale.exists()


def test_the_content_hash_is_of_values_in_order(contract: ViewContract) -> None:
    table = some(contract, 1, 2, 3)
    assert content_hash(table) == content_hash(pa.concat_tables([table[:1], table[1:]]))
    assert content_hash(table) != content_hash(table.take([2, 1, 0]))
    assert content_hash(table) != content_hash(rows(contract, [{"id": 1}, {"id": 2}, {"id": 3}]))


def test_the_content_hash_tells_texts_apart_however_they_lie() -> None:
    def of(values: list[str | None]) -> str:
        return content_hash(pa.table({"x": pa.array(values, pa.string())}))

    texts: list[str | None] = ["ab", "c", None, "", "ü"]
    assert of(texts) == content_hash(pa.table({"x": pa.array(["zz", *texts, None], pa.string())})[1:6])
    unlike: list[list[str | None]] = [
        texts,
        ["a", "bc", None, "", "ü"],
        ["ab", "c", "", "", "ü"],
        ["ab", "c", "", None, "ü"],
        texts[::-1],
        [],
    ]
    assert len({of(values) for values in unlike}) == len(unlike)


def test_files_of_others_are_history_too(contract: ViewContract) -> None:
    push(contract, some(contract, 1))
    below = contract.directory / "2025" / "old.parquet"
    below.mkdir(parents=True)
    for path, number in ((contract.directory / "mine.parquet", 2), (below / "part-0.parquet", 3)):
        pq.write_table(some(contract, number), path)
    hidden = contract.directory / "_temporary"
    hidden.mkdir()
    for path in (hidden / "x.parquet", contract.directory / "_x.parquet", contract.directory / ".x.parquet"):
        pq.write_table(some(contract, 9), path)
    (contract.directory / "README").write_text("mine")
    assert [name.chain for name in Folder.of(contract).names() if isinstance(name, SegmentName)] == ["push"]
    assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [1, 3, 2]


def test_files_of_others_that_cannot_be_read_are_named_once_and_left_out(
    contract: ViewContract, caplog: pytest.LogCaptureFixture
) -> None:
    push(contract, some(contract, 1))
    garbled, lacking = contract.directory / "notes.parquet", contract.directory / "other.parquet"
    garbled.write_bytes(b"not parquet at all")
    pq.write_table(some(contract, 2).drop_columns(["at"]), lacking)
    for _ in range(2):
        assert len(headrace.files(contract)) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"{garbled} is left out: it is not readable Parquet" in caplog.text
    assert f"{lacking} is left out: it lacks at, it has id, value, count, made" in caplog.text
    pq.write_table(some(contract, 2), lacking)
    assert len(headrace.files(contract)) == 2


def test_a_view_whose_path_is_one_file_is_read_and_not_appended_to(contract: ViewContract) -> None:
    contract.directory.parent.mkdir(exist_ok=True)
    pq.write_table(some(contract, 1), contract.directory)
    assert headrace.files(contract) == [contract.directory]
    assert StreamLedger(contract, "events", 0).end().end == 0
    for write in (
        lambda: push(contract, some(contract, 2)),
        lambda: replace_day(contract, DAY, some(contract, 2)),
        lambda: StreamLedger(contract, "events", 0).append(0, 0, 1, None, accepted=offsets()),
    ):
        with pytest.raises(ConfigError, match="make a folder of that name and move the file into it"):
            write()
    moved = contract.directory.rename(contract.directory.with_name("moved.parquet"))
    contract.directory.mkdir()
    moved.rename(contract.directory / "moved.parquet")
    push(contract, some(contract, 2))
    assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [2, 1]


def test_a_truncated_segment_is_named(contract: ViewContract) -> None:
    path = push(contract, some(contract, 1))
    assert path is not None
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LedgerError, match=path.name):
        headrace.files(contract)


def test_a_truncated_file_is_fatal_only_where_it_is_needed(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 0)
    for number in range(4):
        ledger.append(0, number, number + 1, some(contract, number), accepted=offsets(number))
    folder = Folder.of(contract)
    merged = folder.path_of(SegmentName("stream-events-0-0", 1, 0))
    create(merged, some(contract, 0, 1), Footer(next=2, append=new_append_id()), offsets(0, 1))
    paths = [folder.path_of(SegmentName("stream-events-0-0", 0, n)) for n in range(4)]
    paths[1].write_bytes(b"")  # covered: nobody reads it
    assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [0, 1, 2, 3]
    paths[2].write_bytes(b"")  # a reader needs it; the end does not hang on it
    with pytest.raises(LedgerError, match=paths[2].name):
        headrace.files(contract)
    assert StreamLedger(contract, "events", 0).end().end == 4
    ledger.append(0, 4, 5, some(contract, 4), accepted=offsets(4))
    folder.path_of(SegmentName("stream-events-0-0", 0, 4)).write_bytes(b"")
    with pytest.raises(LedgerError, match=r"0{19}4\.parquet"):
        StreamLedger(contract, "events", 0).end()
    with pytest.raises(LedgerError, match=r"0{19}4\.parquet"):
        StreamLedger(contract, "events", 0).append(0, 4, 5, None, accepted=offsets())
    StreamLedger(contract, "events", 1).append(0, 0, 1, None, accepted=offsets())  # another partition goes on


@contextlib.contextmanager
def little_space(folder: Path, size: int) -> Iterator[None]:
    """A file system with little space where that may be mounted, else a limit to the size of a file."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0:
        try:
            yield
        finally:
            for left in range(50, -1, -1):  # Arrow's threads close what they read a moment later
                if subprocess.run(["umount", str(folder)], check=left == 0, stderr=subprocess.DEVNULL).returncode == 0:
                    break
                time.sleep(0.1)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_of_an_append(contract: ViewContract) -> None:
    random = np.random.default_rng(1)
    noise = pa.chunked_array([random.integers(0, 2**60, 160_000)])
    table = some(contract, *([1] * 160_000)).set_column(0, contract.schema.field(0), noise)
    with little_space(contract.directory, 1 << 20):
        ledger = StreamLedger(contract, "events", 0)
        ledger.append(0, 0, 1, some(contract, 1), accepted=offsets(0))
        before = sorted(os.listdir(contract.directory))
        for write in (
            lambda: ledger.append(0, 1, 160_001, table, accepted=np.arange(1, 160_001)),
            lambda: push(contract, table),
            lambda: replace_day(contract, DAY, table),
        ):
            with pytest.raises(OSError, match=r"No space left|File too large"):
                write()
            assert sorted(os.listdir(contract.directory)) == before
        ledger.append(0, 1, 2, some(contract, 2), accepted=offsets(1))
        assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [1, 2]


def test_a_folder_that_turns_read_only_is_read_and_not_harmed() -> None:
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        contract = ViewContract.from_feast(view()[1], config(Path(home)))
        ledger = StreamLedger(contract, "events", 0)
        ledger.append(0, 0, 1, some(contract, 1), accepted=offsets(0))
        contract.directory.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65_534)  # root may write whatever the mode says
            for write in (
                lambda: ledger.append(0, 1, 2, some(contract, 2), accepted=offsets(1)),
                lambda: push(contract, some(contract, 2)),
                lambda: replace_day(contract, DAY, some(contract, 2)),
            ):
                with pytest.raises(PermissionError, match="Permission denied"):
                    write()
            assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [1]
        finally:
            os.seteuid(user)
            contract.directory.chmod(0o755)
        ledger.append(0, 1, 2, some(contract, 2), accepted=offsets(1))
        assert ledger.end().end == 2


def test_an_append_whose_file_was_taken_for_a_dead_ones_is_written_again(
    contract: ViewContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    stolen: list[str] = []

    def steal(step: str) -> None:
        if step == "append.2.temporary-fsynced" and not stolen:
            (path,) = contract.directory.glob(".*.tmp")
            path.unlink()
            stolen.append(path.name)

    monkeypatch.setattr(faults, "hook", steal)
    push(contract, some(contract, 1))
    assert stolen
    assert ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist() == [1]


def test_the_end_needs_no_more_than_the_last_file_of_each_level(contract: ViewContract) -> None:
    ledger = StreamLedger(contract, "events", 0)
    for number in range(6):
        ledger.append(0, number, number + 1, some(contract, number), accepted=offsets(number), topic_id=f"t{number}")
    folder = Folder.of(contract)
    chain = folder.chain("stream-events-0-0")
    tip = folder.tip("stream-events-0-0")
    assert (tip.end, tip.last) == (chain.end, chain.valid[-1]) == (6, SegmentName("stream-events-0-0", 0, 5))
    StreamLedger(contract, "events-0", 5).append(0, 0, 70, None, accepted=offsets())  # a name that begins alike
    (contract.directory / "stream-events-0-0-0-0000000000000000000x.parquet").write_bytes(b"")
    assert folder.tip("stream-events-0-0") == tip
    assert (ledger.end().end, ledger.end().topic_id) == (6, "t5")


@pytest.mark.parametrize("length", [0, 1, 40, 50_000, 70_000, 300_000])
def test_a_footer_of_any_length_is_read_whatever_the_rows_say(contract: ViewContract, length: int) -> None:
    trap = contract.schema.append(pa.field("text", pa.string()))
    text = "\x18\x08headrace\x18\x02{}"
    table = some(contract, 1, 2).append_column(trap.field("text"), [[text, text + "PAR1"]])
    note = Footer(next=2, append=new_append_id(), extra={"note": text + "x" * length})
    path = contract.directory / str(SegmentName("push", 0, 0))
    create(path, table, note)
    note = replace(note, columns=columns_id(table.schema))
    assert read_footer(path) == note
    assert pq.read_metadata(path).metadata[b"headrace"].decode() == note.to_json()


def test_a_close_that_loses_to_another_of_the_same_topic_opens_no_second_epoch(
    contract: ViewContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, other = (StreamLedger(contract, "events", 0) for _ in range(2))
    ledger.append(0, 0, 1, some(contract, 0), accepted=offsets(0), topic_id="old")

    def overtake(step: str) -> None:
        if step == "append.2.temporary-fsynced":
            monkeypatch.setattr(faults, "hook", None)
            other.append(0, 1, 2, some(contract, 1), accepted=offsets(1), topic_id="old")
            other.close("new", 0)
            other.append(1, 0, 1, some(contract, 2), accepted=offsets(0), topic_id="new")

    monkeypatch.setattr(faults, "hook", overtake)
    end = ledger.close("new", 0)
    assert (end.epoch, end.end) == (1, 1)


def test_who_begins_a_chain_that_is_another_topic_s_by_then_does_not_go_on_in_it(
    contract: ViewContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtake(step: str) -> None:
        if step == "append.5.temporary-removed":
            monkeypatch.setattr(faults, "hook", None)
            StreamLedger(contract, "events", 0).close("new", 5)

    monkeypatch.setattr(faults, "hook", overtake)
    with pytest.raises(LostRaceError, match="id new, not old"):
        StreamLedger(contract, "events", 0).begin(5, "old")
