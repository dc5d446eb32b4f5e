"""Duplicates: which row stays, whatever the order."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from batch.clean import Counts, deduplicate
from headrace.contract import ViewContract
from headrace.repository import contracts, open_store
from tests.batch.place import Place

ROWS = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob"]),
        st.integers(0, 1),
        st.integers(0, 2),
        st.none() | st.integers(0, 2),
        st.sampled_from([None, 1.0, 2.0]),
        st.sampled_from([None, [], ["x"], ["y"]]),
    ),
    max_size=25,
)


@pytest.fixture
def contract(place: Place, configure: Callable[..., None]) -> ViewContract:
    configure()
    return contracts(open_store(place.repo), ["rides"])[0]


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_the_newest_created_stays_in_any_order(rows: list[tuple[Any, ...]], seed: int, contract: ViewContract) -> None:
    records = [_record(*row) for row in rows]
    counts = Counts(read=len(records))
    kept = deduplicate(contract, pa.Table.from_pylist(records, contract.schema), counts)
    counts.kept = kept.num_rows
    assert counts.reconciled
    expected: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for record in records:
        key = (record["happened"], record["rider"], record["city_id"])
        created = _rank(record["made"])
        expected[key] = max(expected.get(key, (-1,)), (created,))
    assert [(r["happened"], r["rider"], r["city_id"]) for r in kept.to_pylist()] == sorted(expected)
    assert all(_rank(r["made"]) == expected[r["happened"], r["rider"], r["city_id"]][0] for r in kept.to_pylist())
    assert counts.duplicate_exact == len(records) - len({repr(record) for record in records})
    random.Random(seed).shuffle(records)
    again = deduplicate(contract, pa.Table.from_pylist(records, contract.schema), Counts())
    assert again.equals(kept)


def _rank(made: datetime | None) -> float:
    return 0 if made is None else made.timestamp()


def _record(
    rider: str, city: int, minute: int, created: int | None, distance: float | None, streets: list[str] | None
) -> dict[str, Any]:
    return {
        "rider": rider,
        "city_id": city,
        "distance_km": distance,
        "stops": 1,
        "streets": streets,
        "is_shared": None,
        "grade": "a",
        "happened": datetime(2026, 3, 10, 8, minute, tzinfo=UTC),
        "made": None if created is None else datetime(2026, 3, 10, 9, created, tzinfo=UTC),
    }
