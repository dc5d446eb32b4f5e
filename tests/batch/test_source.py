"""Reading the source: values of any kind, days, and a database that is never changed."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from batch.settings import settings
from batch.source import ODD, Source, open_source, to_arrow
from headrace.contract import ViewContract
from headrace.errors import TransientError
from headrace.repository import contracts, open_store
from tests.batch.place import GOOD, D, Place, good_rides


@pytest.mark.parametrize(
    ("kind", "values", "fitting", "odd"),
    [
        (pa.int64(), [1, 2.0, Decimal(3), None], [1, 2, 3, None], {}),
        (pa.int64(), [1.5, "x", 10**30, math.inf, 4], [None, None, None, None, 4], {0, 1, 2, 3}),
        (pa.float64(), [1, 0.5, Decimal("0.25"), None], [1.0, 0.5, 0.25, None], {}),
        (pa.float64(), [True, "0.5"], [None, None], {0, 1}),
        (pa.bool_(), [0, 1, True, None], [False, True, True, None], {}),
        (pa.bool_(), [2, "yes"], [None, None], {0, 1}),
        (pa.string(), ["a", None], ["a", None], {}),
        (pa.string(), [5, b"\xff", "ok"], [None, None, "ok"], {0, 1}),
        (pa.list_(pa.int64()), ["[1, 2]", [3], None, "[]"], [[1, 2], [3], None, []], {}),
        (pa.list_(pa.int64()), ["[1.5]", "[1,", '{"a": 1}', 7], [None, None, None, None], {0, 1, 2, 3}),
    ],
)
def test_a_value_fits_its_column_or_is_odd(
    kind: pa.DataType, values: list[Any], fitting: list[Any], odd: set[int]
) -> None:
    table = to_arrow([(value,) for value in values], pa.schema([("c", kind), (ODD, pa.string())]))
    assert table.column("c").to_pylist() == fitting
    notes = table.column(ODD).to_pylist()
    assert {row for row, note in enumerate(notes) if note is not None} == set(odd)


@given(
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(max_size=4))
    )
)
def test_no_value_is_lost_whatever_a_column_holds(values: list[Any]) -> None:
    kinds = (pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.list_(pa.int64()), pa.list_(pa.string()))
    for kind in kinds:
        schema = pa.schema([("c", kind), (ODD, pa.string())])
        table = to_arrow([(value,) for value in values], schema) if values else schema.empty_table()
        for value, found, note in zip(
            values, table.column("c").to_pylist(), table.column(ODD).to_pylist(), strict=True
        ):
            if value is None:
                assert (found, note) == (None, None)
            else:
                assert (found is None) != (note is None)
                assert found is not None or isinstance(json.loads(note)["c"], str)


def test_each_row_is_of_exactly_one_day(place: Place, contract: ViewContract) -> None:
    days = [date(2026, 3, 28), date(2026, 3, 29), date(2026, 3, 30)]
    texts = [
        f"{day}{t}{time}{fraction}{zone}"
        for day in days
        for t in " T"
        for time in ("00:00:00", "01:30:00", "12:00:00", "23:30:00", "23:59:59")
        for fraction in ("", ".5", ".999")
        for zone in ("", "Z", "+05:30", "-11:00")
    ]
    place.insert("rides", ({**GOOD, "rider": str(n), "made": text} for n, text in enumerate(texts)))
    source = open_source(settings(), contract)
    read: list[str] = []
    for back in range(-2, 5):
        for chunk in source.read(days[0] + timedelta(days=back), 7):
            read += chunk.column("rider").to_pylist()
    assert sorted(read, key=int) == [str(number) for number in range(len(texts))]


def test_chunks_are_no_larger_than_asked(place: Place, contract: ViewContract) -> None:
    place.insert("rides", good_rides(D, 20))
    chunks = list(open_source(settings(), contract).read(D, 8))
    assert [chunk.num_rows for chunk in chunks] == [8, 8, 4]


def test_the_source_cannot_be_written(place: Place, contract: ViewContract) -> None:
    assert place.repo.is_dir()
    engine = open_source(settings(), contract).engine
    with engine.connect() as connection, pytest.raises(sa.exc.OperationalError, match="readonly"):
        connection.execute(sa.text("DELETE FROM rides"))


def test_a_database_that_fails_is_worth_another_try(place: Place, contract: ViewContract) -> None:
    source = open_source(settings(), contract)
    lock = sqlite3.connect(place.database)
    lock.execute("DROP TABLE rides")
    lock.commit()
    lock.close()
    with pytest.raises(TransientError, match=r"could not be read: no such table: rides"):
        next(source.read(D, 10))


@pytest.fixture
def contract(place: Place, configure: Callable[..., None]) -> ViewContract:
    configure()
    return contracts(open_store(place.repo), ["rides"])[0]


def test_a_source_says_what_it_leaves_out(contract: ViewContract) -> None:
    source: Source = open_source(settings(), contract)
    assert source.ignored == ("remark",)
    assert source.schema.names == [*contract.schema.names, ODD]
