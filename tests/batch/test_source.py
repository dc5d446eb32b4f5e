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
from batch.source import Source, open_source
from batch.sources.odd import ODD, to_arrow
from batch.sources.table import Table
from headrace.contract import ViewContract
from headrace.errors import SchemaError, TransientError
from headrace.repository import contracts, open_store
from tests.batch.place import GOOD, D, Place, good_rides


@pytest.mark.parametrize(
    ("kind", "values", "fitting", "odd"),
    [
        (pa.int64(), [1, 2.0, Decimal(3), None], [1, 2, 3, None], {}),
        (pa.int64(), [1.5, "x", 10**30, math.inf, 4], [None, None, None, None, 4], {0, 1, 2, 3}),
        (pa.float64(), [1, 0.5, Decimal("0.25"), None], [1.0, 0.5, 0.25, None], {}),
        (pa.float64(), [True, "0.5"], [None, None], {0, 1}),
        (pa.float64(), [Decimal("1e400"), 10**400, Decimal("Infinity")], [None, None, math.inf], {0, 1}),
        (pa.string(), [Decimal("1.10"), {"a": [1]}, None], ["1.10", '{"a": [1]}', None], {}),
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
    source = open_source(settings(), contract)
    assert isinstance(source, Table)
    with source._connected() as connection, pytest.raises(sa.exc.OperationalError, match="readonly"):
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


def test_a_text_that_is_no_utf8_costs_its_row(place: Place, contract: ViewContract) -> None:
    place.insert("rides", good_rides(D, 2))
    place.execute("UPDATE rides SET grade = CAST(x'ff41' AS TEXT) WHERE rider = 'rider 1'")
    (table,) = open_source(settings(), contract).read(D, 10)
    assert table.column("grade").to_pylist() == ["a", None]
    assert json.loads(table.column(ODD)[1].as_py()) == {"grade": "b'\\xffA'"}


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("stops", "TEXT", r"column `stops` is TEXT \(a text\) there and Int32 in the view"),
        ("distance_km", "BLOB", r"column `distance_km` is BLOB \(bytes\) there and Float32 in the view"),
        ("grade", "INTEGER", r"column `grade` is INTEGER \(a number\) there and String in the view"),
        ("happened", "INTEGER", r"column `happened` is INTEGER \(a number\) there and UnixTimestamp in the view"),
    ],
)
def test_a_column_of_another_kind_is_refused(
    column: str, kind: str, message: str, place: Place, contract: ViewContract
) -> None:
    _retype(place, column, kind)
    with pytest.raises(SchemaError, match=rf"table `rides` does not fit feature view `rides`: {message}; nothing was"):
        open_source(settings(), contract)


@pytest.mark.parametrize("kind", ["", "STRING", "NUMERIC", "DATETIME"])
def test_what_a_type_of_sqlite_does_not_say_is_not_judged(kind: str, place: Place, contract: ViewContract) -> None:
    _retype(place, "grade" if kind != "DATETIME" else "happened", kind)
    place.insert("rides", good_rides(D, 1))
    (table,) = open_source(settings(), contract).read(D, 10)
    assert table.column(ODD).to_pylist() == [None]


def test_rows_of_no_day_are_looked_for_only_so_far(
    place: Place, contract: ViewContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [None, 1_700_000_000, 5.5, b"2026-03-10", "yesterday", "", "2026-03-10 12:00:00"]
    place.insert("rides", ({**GOOD, "made": made} for made in bad))
    assert open_source(settings(), contract).rows_of_no_day() == 6
    monkeypatch.setattr("batch.sources.table.LOOKED_AT", 6)
    assert open_source(settings(), contract).rows_of_no_day() is None
    place.execute("CREATE INDEX made_first ON rides (made, rider)")
    assert open_source(settings(), contract).rows_of_no_day() == 6


def test_names_of_any_kind_are_quoted(place: Place, contract: ViewContract) -> None:
    place.execute("""ALTER TABLE zones ADD COLUMN "a ""b"" %s :c ? [d]" TEXT""")
    zones = contracts(open_store(place.repo), ["zones"])[0]
    place.insert("zones", [{"zone": "z", "level": 1, "happened": f"{D} 01:00:00", "made": f"{D} 01:00:00"}])
    place.execute("""UPDATE zones SET "a ""b"" %s :c ? [d]" = 'x'""")
    (table,) = open_source(settings(), zones).read(D, 10)
    assert table.column('a "b" %s :c ? [d]').to_pylist() == ["x"]


def _retype(place: Place, column: str, kind: str) -> None:
    place.execute(f"ALTER TABLE rides DROP COLUMN {column}")
    place.execute(f"ALTER TABLE rides ADD COLUMN {column} {kind}")
