"""What one listing of a folder shows: the same ends as the ledger's own look, and counts that add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.census import census
from headrace.chains import StreamLedger
from headrace.compact import compact
from headrace.contract import ViewContract
from tests.headrace.test_compact import commit, fill
from tests.headrace.views import config, view


@pytest.fixture
def contract(tmp_path: Path) -> ViewContract:
    return ViewContract.from_feast(view()[1], config(tmp_path))


def test_a_folder_that_is_not_there_holds_nothing(contract: ViewContract) -> None:
    found = census(contract)
    assert (dict(found.ends), found.appended, found.merged, found.days, found.merged_s) == ({}, 0, 0, 0, None)


def test_ends_are_those_of_the_ledgers_whatever_was_merged_or_made_anew(contract: ViewContract) -> None:
    fill(contract, 20)
    others = {number: StreamLedger(contract, "events-2", number) for number in (0, 3, 11)}
    for number, ledger in others.items():
        commit(contract, ledger, 0, 5 + number)
    ledgers = {
        ("events", 0): StreamLedger(contract, "events", 0),
        **{("events-2", n): own for n, own in others.items()},
    }

    def check() -> None:
        assert census(contract).ends == {place: ledger.end().end for place, ledger in ledgers.items()}

    check()
    assert (census(contract).appended, census(contract).merged) == (23, 0)
    compact(contract, grace_s=0)
    check()
    found = census(contract)
    files = len(list(contract.directory.glob("*.parquet")))
    assert found.appended + found.merged == files < 23
    assert found.merged > 0
    assert found.merged_s is not None
    fill(contract, 3)
    check()
    ledgers["events", 0].close("another", 7)  # the topic was made anew, and begins at 7
    check()
    assert census(contract).ends["events", 0] == 7
