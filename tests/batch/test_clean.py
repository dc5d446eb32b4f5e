"""Duplicates: which row stays, whatever the order. Rejects: the row as it was read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from batch.clean import REJECTS, Counts, clean, deduplicate
from batch.sources.odd import ODD
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


VALUES = st.sampled_from([None, 0.0, -0.0, 1.5, float("nan"), float("inf")])
LISTS = st.sampled_from([None, [], [None], ["x"]])


@pytest.mark.parametrize("created", [True, False])
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.none() | st.integers(0, 1), VALUES, LISTS), max_size=20),
    seed=st.integers(0, 99),
)
def test_what_is_equally_new_is_decided_by_its_values(
    created: bool, rows: list[tuple[Any, ...]], seed: int, contract: ViewContract
) -> None:
    """Against the same by Python, row by row; -0.0 is another value than 0.0, and NaN one."""
    if not created:
        contract = replace(contract, created_field=None)
    records = [_record("ann", 1, minute, made, value, streets) for minute, made, value, streets in rows]
    groups: dict[datetime, list[dict[str, Any]]] = {}
    for record in pa.Table.from_pylist(records, contract.schema).to_pylist():
        groups.setdefault(record["happened"], []).append(record)
    expected = []
    distinct = 0
    for _, group in sorted(groups.items()):
        newest = max(_rank(record["made"]) for record in group)
        candidates = [record for record in group if not created or _rank(record["made"]) == newest]
        expected.append(max(repr(tuple(record.values())) for record in candidates))
        distinct += len({repr(record) for record in group})
    random.Random(seed).shuffle(records)
    counts = Counts()
    kept = deduplicate(contract, pa.Table.from_pylist(records, contract.schema), counts)
    assert [repr(tuple(record.values())) for record in kept.to_pylist()] == expected
    assert counts.duplicate_exact == len(records) - distinct
    assert counts.duplicate_key_time == distinct - len(groups)


ODD_VALUES = st.none() | st.dictionaries(st.sampled_from(["n", "x", "s"]), st.text(max_size=4), min_size=1)
RAW = pa.schema(
    [
        *(("n", pa.int64()), ("x", pa.float64()), ("s", pa.string()), ("b", pa.bool_())),
        *(("t", pa.timestamp("us", "UTC")), ("l", pa.list_(pa.string())), ("y", pa.binary())),
        (ODD, pa.string()),
    ]
)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "n": st.none() | st.integers(-(2**63), 2**63 - 1),
                "x": st.none() | st.floats(),
                "s": st.none() | st.text() | st.sampled_from(['"', "\\", "\n", "\x7f", "ü", "plain"]),
                "b": st.none() | st.booleans(),
                "t": st.none() | st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)),  # noqa: DTZ001
                "l": st.none() | st.lists(st.none() | st.text(max_size=2), max_size=2),
                "y": st.none() | st.binary(max_size=2),
                ODD: ODD_VALUES,
            }
        ),
        min_size=1,
        max_size=8,
    )
)
def test_a_rejected_row_is_kept_as_it_was_read(
    rows: list[dict[str, Any]], contract: ViewContract, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No row has the columns that the view wants, so all are rejected."""
    folder = tmp_path_factory.mktemp("raw")
    for row in rows:
        for name in row[ODD] or {}:
            row[name] = None
    raw = [{**row, ODD: None if row[ODD] is None else json.dumps(row[ODD])} for row in rows]
    pq.write_table(pa.Table.from_pylist(raw, RAW), folder / "raw", row_group_size=5)
    kept, counts = clean(contract, folder / "raw", folder / "rejects", now_us=0, max_future_us=0, transform=None)
    assert (kept.num_rows, counts.rejected) == (0, len(rows))
    rejects = pq.read_table(folder / "rejects")
    assert rejects.schema == REJECTS
    assert rejects.column("row").to_pylist() == list(range(len(rows)))
    for text, row in zip(rejects.column("record").to_pylist(), rows, strict=True):
        record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert list(record) == RAW.names[:-1]
        odd = row.pop(ODD) or {}
        for name, value in row.items():
            found = record[name]
            if name in odd:
                assert found == odd[name]
            elif isinstance(value, float) and not math.isfinite(value):
                assert isinstance(found, str)
                assert str(float(found)) == str(value)
            elif isinstance(value, datetime):
                assert datetime.fromisoformat(found) == value
            elif isinstance(value, bytes):
                assert found == str(value)
            else:
                assert found == value


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
