"""Retention: whole files past the horizon go, by command only, and positions go on."""

from __future__ import annotations

import os
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import headrace
from headrace.chains import Folder, StreamLedger, push, replace_day
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.errors import ConfigError, LedgerError, LostRaceError
from headrace.retain import horizon_us, retain
from headrace.segments import SegmentName, read_footer
from tests.headrace.views import EPOCH_US, config, rows, view

CHAIN = "stream-events-0-0"


@pytest.fixture
def contract(tmp_path: Path) -> ViewContract:
    return ViewContract.from_feast(view()[1], config(tmp_path))


def some(contract: ViewContract, *ids: int) -> pa.Table:
    """Rows whose time is their id, in microseconds."""
    return rows(contract, [{"id": n, "value": n / 2, "count": n, "at": n, "made": n} for n in ids])


def at(number: int) -> datetime:
    """The horizon before which the rows below `number` lie."""
    return datetime.fromtimestamp(EPOCH_US // 10**6, UTC) + timedelta(microseconds=number)


def commit(contract: ViewContract, *groups: tuple[int, ...]) -> StreamLedger:
    """A segment a group; the offsets go on."""
    ledger = StreamLedger(contract, "events", 0)
    for group in groups:
        end = ledger.end().end
        accepted = np.arange(end, end + len(group), dtype=np.int64)
        table = some(contract, *group)
        ledger.append(0, end, end + len(group) + 1, table, accepted=accepted, rejected=1, topic_id="t")
    return ledger


def ids(contract: ViewContract) -> list[int]:
    found: list[int] = ds.dataset(headrace.files(contract)).to_table().column("id").to_pylist()
    return found


def test_the_longest_old_beginning_goes(contract: ViewContract) -> None:
    ledger = commit(contract, (1, 2), (3,), (), (9, 4), (5,), (6,))
    end = ledger.end()
    told: list[tuple[int, int]] = []
    done = retain(contract, at(6), progress=lambda *counts: told.append(counts))
    assert ids(contract) == [9, 4, 5, 6]  # 4 and 5 are old, but 9 holds their place
    assert (done.chains, done.files, done.rows, done.days) == ({CHAIN: (0, 6)}, 3, 3, [])
    assert told == [(1, 1)]
    assert ledger.end() == end
    footer = read_footer(Folder.of(contract).path_of(SegmentName(CHAIN, 3, 0)))
    assert (footer.mark, footer.next, footer.rejected, footer.topic_id) == ("retained", 6, 3, "t")
    assert footer.extra == {"horizon_us": EPOCH_US + 6, "rows": 3}
    assert horizon_us(contract) == EPOCH_US + 6
    compact(contract, grace_s=0)
    assert len(os.listdir(contract.directory)) == 4
    commit(contract, (10,))
    assert ids(contract) == [9, 4, 5, 6, 10]


def test_the_horizon_itself_stays_and_the_newest_segment_too(contract: ViewContract) -> None:
    commit(contract, (1,), (2,), (3,))
    assert retain(contract, at(2)).rows == 1
    assert ids(contract) == [2, 3]
    assert retain(contract, at(100)).chains == {CHAIN: (2, 4)}
    assert ids(contract) == [3]
    assert retain(contract, at(100)).rows == 0
    assert horizon_us(contract) == EPOCH_US + 100
    assert sum(name.startswith(f"{CHAIN}-3") for name in os.listdir(contract.directory)) == 2


def test_a_dry_run_touches_nothing_and_says_the_same(contract: ViewContract) -> None:
    commit(contract, *((n,) for n in range(12)))
    push(contract, some(contract, 1))
    push(contract, some(contract, 50))
    replace_day(contract, date(2026, 1, 1), some(contract, 1, 2))
    replace_day(contract, date(2026, 1, 2), some(contract, 1, 20))
    compact(contract, grace_s=0)
    before = sorted(os.listdir(contract.directory))
    would = retain(contract, at(15), dry_run=True)
    assert sorted(os.listdir(contract.directory)) == before
    assert horizon_us(contract) is None
    assert would == retain(contract, at(15))
    assert would.days == [date(2026, 1, 1)]
    assert would.chains == {CHAIN: (0, 22), "push": (0, 1)}
    assert would.rows == 14
    assert sorted(ids(contract)) == [1, 11, 20, 50]


def test_what_was_merged_goes_too(contract: ViewContract) -> None:
    commit(contract, *((n,) for n in range(30)))
    compact(contract, grace_s=0)
    commit(contract, *((n,) for n in range(30, 60)))
    compact(contract, grace_s=0, level_cap_bytes=6000)
    assert retain(contract, at(10**6)).rows == 59
    assert ids(contract) == [59]
    compact(contract, grace_s=0)
    assert ids(contract) == [59]
    assert len(os.listdir(contract.directory)) == 2


def test_an_old_day_becomes_empty(contract: ViewContract) -> None:
    day = date(2026, 1, 1)
    replace_day(contract, day, some(contract, 1, 2))
    retain(contract, at(3))
    assert Folder.of(contract).days()[day].rows == 0
    assert len(os.listdir(contract.directory)) == 1
    assert horizon_us(contract) == EPOCH_US + 3
    assert retain(contract, at(4)).days == []
    replace_day(contract, day, some(contract, 1, 2))  # read again on purpose
    assert ids(contract) == [1, 2]


def test_a_closed_epoch_goes_but_for_its_end(contract: ViewContract) -> None:
    ledger = commit(contract, (1,), (2,))
    ledger.close("new", 7)
    assert retain(contract, at(100)).rows == 2
    assert (ledger.end().epoch, ledger.end().end) == (1, 7)
    assert ids(contract) == []


def test_a_sleeping_writer_cannot_write_into_what_is_gone(contract: ViewContract) -> None:
    commit(contract, (1,), (2,), (3,))
    late = StreamLedger(contract, "events", 0)
    retain(contract, at(3))
    compact(contract, grace_s=0)
    with pytest.raises(LostRaceError) as lost:
        late.append(0, 2, 3, some(contract, 77), accepted=np.array([2], dtype=np.int64))
    assert lost.value.end == 6
    assert ids(contract) == [3]


def test_a_horizon_is_utc_and_past(contract: ViewContract) -> None:
    commit(contract, (1,), (2,), (3,))
    naive = at(3).replace(tzinfo=None)
    assert retain(contract, naive, dry_run=True) == retain(contract, at(3), dry_run=True)
    elsewhere = at(3).astimezone(timezone(timedelta(hours=5)))
    assert retain(contract, elsewhere, dry_run=True).rows == 2
    with pytest.raises(ConfigError, match="in the future"):
        retain(contract, datetime.now(UTC) + timedelta(minutes=1))
    assert retain(contract, datetime(1960, 1, 1)).rows == 0  # noqa: DTZ001 - naive on purpose


def test_a_damaged_file_stops_it(contract: ViewContract) -> None:
    commit(contract, (1,), (2,), (3,))
    path = headrace.files(contract)[1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LedgerError, match=path.name):
        retain(contract, at(3))
    assert len(os.listdir(contract.directory)) == 3
