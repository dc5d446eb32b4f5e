"""The replay chain: each letter once, at its own place in the order, through merges, retention, races and crashes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import faults
from headrace.audit import Kind, audit
from headrace.chains import Folder, Standing, StreamLedger
from headrace.compact import compact
from headrace.contract import ViewContract
from headrace.encode import Origin, stream_tails
from headrace.errors import LostRaceError
from headrace.materialize import apply_newest, materialize_arrived
from headrace.online import write_online
from headrace.replays import Origins, ReplayLedger
from headrace.retain import retain
from headrace.scan import newest_rows
from headrace.segments import read_footer, read_origins
from tests.headrace.crashes import Scenario, in_clean_process, show
from tests.headrace.test_crash import at, contract_of, some
from tests.headrace.views import applied, config, examples, rows

TOPIC = "events"


def origins(*places: tuple[int, int, int]) -> Origins:
    """Epoch, partition and offset of each."""
    columns = np.array(places, dtype=np.int64).reshape(-1, 3).T
    return Origins(*columns)


def commit(contract: ViewContract, epoch: int, partition: int, first: int, next_: int, *accepted: int) -> None:
    """The stream accepts some offsets of a range; the id of a row is its offset, and so is its time."""
    StreamLedger(contract, TOPIC, partition).append(
        epoch,
        first,
        next_,
        some(contract, *accepted),
        accepted=np.array(accepted, dtype=np.int64),
        rejected=next_ - first - len(accepted),
        topic_id=f"id-{epoch}",
    )


def test_what_stands_against_a_letter(tmp_path: Path) -> None:
    contract = contract_of(tmp_path)
    commit(contract, 0, 0, 0, 10, 1, 2, 5)
    ledger = ReplayLedger(contract, TOPIC)
    assert ledger.catch_up() == []
    asked = origins((0, 0, 1), (0, 0, 3), (0, 0, 9), (0, 0, 10), (0, 1, 0))
    expected = [Standing.ACCEPTED, Standing.OPEN, Standing.OPEN, Standing.UNCOMMITTED, Standing.UNCOMMITTED]
    assert ledger.standings(asked) == expected
    ledger.append(some(contract, 3), origins((0, 0, 3)))
    assert ledger.standings(asked)[1] is Standing.REPLAYED
    again = ReplayLedger(contract, TOPIC)
    assert [path.name for path in again.catch_up()] == [f"replay-{TOPIC}-0-{0:020d}.parquet"]
    assert again.standings(asked)[1] is Standing.REPLAYED
    assert (again.epoch(0, "id-0"), again.epoch(0, "another"), again.epoch(1, "id-0")) == (0, None, None)


def test_letters_of_a_closed_epoch_are_open_beyond_its_end(tmp_path: Path) -> None:
    contract = contract_of(tmp_path)
    commit(contract, 0, 0, 0, 4, 0, 1, 2)
    StreamLedger(contract, TOPIC, 0).close("id-1", 0)
    ledger = ReplayLedger(contract, TOPIC)
    ledger.catch_up()
    assert ledger.standings(origins((0, 0, 3), (0, 0, 7), (1, 0, 0))) == [
        Standing.OPEN,
        Standing.OPEN,
        Standing.UNCOMMITTED,
    ]
    assert (ledger.epoch(0, "id-0"), ledger.epoch(0, "id-1")) == (0, 1)


def test_of_two_replays_one_loses_and_sees_what_the_other_took(tmp_path: Path) -> None:
    contract = contract_of(tmp_path)
    commit(contract, 0, 0, 0, 10)
    one, other = ReplayLedger(contract, TOPIC), ReplayLedger(contract, TOPIC)
    one.catch_up()
    other.catch_up()
    one.append(some(contract, 3, 4), origins((0, 0, 3), (0, 0, 4)))
    with pytest.raises(LostRaceError):
        other.append(some(contract, 4, 5), origins((0, 0, 4), (0, 0, 5)))
    assert len(other.catch_up()) == 1
    assert other.standings(origins((0, 0, 4), (0, 0, 5))) == [Standing.REPLAYED, Standing.OPEN]


def test_retention_does_not_make_letters_new(tmp_path: Path) -> None:
    contract = contract_of(tmp_path)
    commit(contract, 0, 0, 0, 10, 0)
    commit(contract, 0, 0, 10, 20, 10)
    ledger = ReplayLedger(contract, TOPIC)
    ledger.catch_up()
    ledger.append(some(contract, 3), origins((0, 0, 3)))
    ledger.append(some(contract, 14), origins((0, 0, 14)))
    retain(contract, at(9))
    compact(contract, grace_s=0)
    again = ReplayLedger(contract, TOPIC)
    again.catch_up()
    asked = origins((0, 0, 3), (0, 0, 14), (0, 0, 4), (0, 0, 15))
    assert again.standings(asked) == [Standing.REPLAYED, Standing.REPLAYED, Standing.RETAINED, Standing.OPEN]


@st.composite
def histories(draw: st.DrawFn) -> dict[str, Any]:
    """What a stream and replays made: rows of few keys and times, so that ties are many."""
    records = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
    fates = draw(st.lists(st.sampled_from(["stream", "replay", "never"]), min_size=len(records), max_size=len(records)))
    return {
        "records": [
            {"epoch": i % 2, "partition": i % 3, "offset": i, "id": key, "at": moment, "made": None, "fate": fate}
            for i, ((key, moment), fate) in enumerate(zip(records, fates, strict=True))
        ],
        "per_segment": draw(st.integers(1, 5)),
        "merge": draw(st.booleans()),
        "seed": draw(st.randoms(use_true_random=False)),
    }


@settings(max_examples=examples(25), deadline=None)
@given(histories())
def test_a_row_keeps_the_place_of_its_record_oracle(history: dict[str, Any]) -> None:
    """Newest by (time, epoch, partition, offset), offline and online, whichever way a row came."""
    with tempfile.TemporaryDirectory() as folder:
        store, (contract,) = applied(Path(folder))
        for record in history["records"]:
            record |= {"value": float(record["offset"]), "count": record["offset"]}
        for epoch in (0, 1):
            for partition in (0, 1, 2):
                own = [r for r in history["records"] if (r["epoch"], r["partition"]) == (epoch, partition)]
                accepted = [r for r in own if r["fate"] == "stream"]
                offsets = np.array([r["offset"] for r in accepted], dtype=np.int64)
                table = rows(contract, accepted)
                StreamLedger(contract, TOPIC, partition).append(epoch, 0, 100, table, accepted=offsets)
                write_online(store, contract, table, tails=stream_tails(Origin(epoch, partition, offsets)))
        late = [r for r in history["records"] if r["fate"] == "replay"]
        history["seed"].shuffle(late)
        ledger = ReplayLedger(contract, TOPIC)
        ledger.catch_up()
        for start in range(0, len(late), history["per_segment"]):
            part = late[start : start + history["per_segment"]]
            places = origins(*((r["epoch"], r["partition"], r["offset"]) for r in part))
            order = places.order()
            table = rows(contract, [part[i] for i in order])
            ledger.append(table, places.take(order))
            write_online(store, contract, table, tails=places.take(order).tails())
        if history["merge"]:
            compact(contract, grace_s=0, level_cap_bytes=1)
        taken = [r for r in history["records"] if r["fate"] != "never"]
        expected = {
            key: max((r for r in taken if r["id"] == key), key=_order)["count"] for key in {r["id"] for r in taken}
        }
        found = newest_rows(contract, Folder.of(contract).files()).to_pylist()
        assert {row["id"]: row["count"] for row in found} == expected
        served = store.get_online_features(["stats:count"], [{"id": key} for key in expected] or [{"id": 0}]).to_dict()
        assert dict(zip(served["id"], served["count"], strict=True)) == (expected or {0: None})
        result = audit(store, contract)
        assert result.counts[Kind.EQUAL] == result.keys == len(expected)
        materialize_arrived(store, contract)
        assert audit(store, contract).diverged == 0


def _order(record: dict[str, Any]) -> tuple[int, ...]:
    return record["at"], record["epoch"], record["partition"], record["offset"]


def test_merges_keep_the_origins_in_the_order_of_the_rows(tmp_path: Path) -> None:
    contract = contract_of(tmp_path)
    commit(contract, 0, 0, 0, 100)
    ledger = ReplayLedger(contract, TOPIC)
    ledger.catch_up()
    for start in range(20):
        ledger.append(some(contract, start, 90 - start), origins((0, 0, start), (0, 0, 90 - start)))
    done = compact(contract, grace_s=0)
    assert done.rows_merged > 0
    found: list[tuple[int, int]] = []
    for path in Folder.of(contract).files():
        offsets = [offset for _, _, own in read_origins(read_footer(path)) for offset in own.tolist()]
        if path.name.startswith("replay-"):
            found += zip(pq.read_table(path).column("id").to_pylist(), offsets, strict=True)
    assert sorted(found) == sorted((n, n) for start in range(20) for n in (start, 90 - start))


# -- kill -9 at every step -------------------------------------------------------------------------------------------


def opened(home: Path) -> tuple[FeatureStore, ViewContract]:
    """The store in a folder."""
    store = FeatureStore(config=config(home))
    return store, ViewContract.from_feast(store.get_feature_view("stats"), store.config)


def prepare(home: Path) -> None:
    store, (contract,) = applied(home)
    commit(contract, 0, 0, 0, 10, 0, 1)
    write_online(store, contract, some(contract, 0, 1), tails=stream_tails(Origin(0, 0, np.array([0, 1]))))


def replay(home: Path) -> None:
    """What `streaming.replay` does to the stores: catch up, append what is open, write online."""
    store, contract = opened(home)
    ledger = ReplayLedger(contract, TOPIC)
    apply_newest(store, contract, ledger.catch_up())
    asked = origins((0, 0, 3), (0, 0, 4))
    is_open = [standing is Standing.OPEN for standing in ledger.standings(asked)]
    left = asked.take(np.flatnonzero(is_open))
    if len(left):
        table = some(contract, *left.offsets.tolist())
        ledger.append(table, left)
        faults.reached("replay.1.appended")
        write_online(store, contract, table, tails=left.tails())
        faults.reached("replay.2.online")


def state(home: Path) -> dict[str, Any]:
    """What is offline, and what an audit finds wrong: nothing, whatever was killed."""
    store, contract = opened(home)
    found = newest_rows(contract, Folder.of(contract).files())
    return {"offline": sorted(found.column("id").to_pylist()), "diverged": audit(store, contract).diverged}


def served(home: Path) -> list[int | None]:
    """What is online in the end."""
    keys = [{"id": key} for key in (0, 1, 3, 4)]
    found: list[int | None] = opened(home)[0].get_online_features(["stats:count"], keys).to_dict()["count"]
    return found


SCENARIO = Scenario(prepare, replay, state, served)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_replay_that_is_killed_anywhere_is_completed_by_the_next(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    outcome = in_clean_process(f"{__name__}:SCENARIO", tmp_path)
    show(request.config, {"replay": outcome})
    assert outcome["losses"] == []
    assert len(outcome["points"]) > 5
