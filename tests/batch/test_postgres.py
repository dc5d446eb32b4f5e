"""A real PostgreSQL as the source: every type exactly, one snapshot, bounded, and never changed."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import psycopg
import pyarrow as pa
import pytest
import sqlalchemy as sa
from feast import Field
from feast.types import (
    Array,
    Bool,
    Bytes,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    Json,
    Map,
    String,
    Struct,
    UnixTimestamp,
    Uuid,
)
from feast.types import Decimal as FeastDecimal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luigi.execution_summary import LuigiStatusCode

from batch import Materialize
from batch.sources import postgres
from batch.sources.odd import ODD, to_arrow
from batch.sources.postgres import PostgresTable, open_postgres
from headrace.contract import ViewContract
from headrace.errors import ConfigError, SchemaError, TransientError
from tests.batch.place import D, Place, build, good_rides
from tests.headrace.views import applied, examples, view
from tests.servers import free_port

AT = "'2026-03-10 12:00:00+00'"
INT64 = 2**63


class Odd(str):
    """The text of a value that does not fit."""

    __slots__ = ()


CASES: list[tuple[str, FeastType, list[tuple[str, Any]]]] = [
    ("smallint", Int32, [("-32768", -32768), ("NULL", None)]),
    ("integer", Float32, [("16777217", 16777217.0)]),
    ("bigint", Int64, [("9007199254740993", 9007199254740993), ("-9223372036854775808", -INT64)]),
    ("bigint", Float64, [("9007199254740993", 9007199254740992.0)]),
    ("bigint", FeastDecimal, [("9007199254740993", 9007199254740993)]),
    ("oid", Int64, [("4294967295", 4294967295)]),
    ("real", Float32, [("1.1", 1.100000023841858), ("'-Infinity'", -math.inf), ("'NaN'", math.nan)]),
    ("double precision", Float64, [("0.1", 0.1), ("5e-324", 5e-324), ("'Infinity'", math.inf)]),
    (
        "double precision",
        Int64,
        [("3", 3), ("3.5", Odd("3.5")), ("9.3e18", Odd("9.3e+18")), ("'NaN'", Odd("nan")), ("2^63", Odd(str(2.0**63)))],
    ),
    (
        "numeric",
        Float64,
        [
            ("1.10", 1.1),
            ("1e400", Odd("1" + "0" * 400)),
            ("1e-400", 0.0),
            ("4.9e-324", 5e-324),
            ("'NaN'", math.nan),
            ("'-Infinity'", -math.inf),
            ("123456789012345678901234567890.123", 123456789012345678901234567890.123),
        ],
    ),
    (
        "numeric",
        Int64,
        [
            ("9007199254740993", 9007199254740993),
            ("9223372036854775807", INT64 - 1),
            ("9223372036854775808", Odd("9223372036854775808")),
            ("5.00", 5),
            ("5.01", Odd("5.01")),
            ("'NaN'", Odd("NaN")),
            ("'Infinity'", Odd("Infinity")),
            ("1e300", Odd("1" + "0" * 300)),
        ],
    ),
    ("numeric(20,2)", FeastDecimal, [("12345678901234567.10", "12345678901234567.10")]),
    ("boolean", Bool, [("true", True), ("false", False), ("NULL", None)]),
    ("integer", Bool, [("1", True), ("0", False), ("2", Odd("2"))]),
    ("text", String, [("'Zoë'", "Zoë"), ("''", ""), ("repeat('x', 100000)", "x" * 100000)]),
    ("varchar(5)", String, [("'ab'", "ab")]),
    ("char(3)", String, [("'a'", "a  ")]),
    ("uuid", Uuid, [("'F47AC10B-58CC-4372-A567-0E02B2C3D479'", "f47ac10b-58cc-4372-a567-0e02b2c3d479")]),
    ("mood", String, [("'sad'", "sad")]),
    ("years", Int64, [("77", 77)]),
    ("inet", String, [("'10.0.0.1'", "10.0.0.1/32")]),
    ("date", String, [("'2026-01-02'", "2026-01-02")]),
    ("bytea", Bytes, [(r"'\x00ff'", b"\x00\xff")]),
    ("json", Json, [("""'{"a": 1}'""", '{"a": 1}')]),
    ("jsonb", Map, [("""'{"b": [1, null]}'""", '{"b": [1, null]}')]),
    ("integer[]", Json, [("'{1,2}'", "[1,2]")]),
    ("jsonb", Struct({"a": Int64, "b": String}), [("""'{"a": 1, "c": 2}'""", {"a": 1, "b": None}), ("'5'", Odd("5"))]),
    ("pair", Struct({"a": Int64, "b": String}), [("ROW(7, 'x')", {"a": 7, "b": "x"})]),
    (
        "integer[]",
        Array(Int64),
        [("'{1,NULL,3}'", [1, None, 3]), ("'{}'", []), ("NULL", None), ("'{{1,2},{3,4}}'", Odd("[[1,2],[3,4]]"))],
    ),
    ("real[]", Array(Float32), [("'{1.5,NaN}'", [1.5, math.nan])]),
    ("numeric[]", Array(Int64), [("'{9007199254740993}'", [9007199254740993]), ("'{1.5}'", Odd("['1.5']"))]),
    ("uuid[]", Array(String), [("'{F47AC10B-58CC-4372-A567-0E02B2C3D479}'", ["f47ac10b-58cc-4372-a567-0e02b2c3d479"])]),
    ("text[]", Array(String), [("""'{a,"b c",NULL}'""", ["a", "b c", None])]),
    ("integer[]", Array(Array(Int64)), [("'{{1,2},{3,4}}'", [[1, 2], [3, 4]]), ("'{1}'", Odd("[1]"))]),
    (
        "timestamptz[]",
        Array(UnixTimestamp),
        [("ARRAY['2026-01-01 01:00:00.5+01'::timestamptz]", ["2026-01-01T00:00:00.5+00:00"])],
    ),
    ("jsonb", Array(Float64), [("'[1, 2.5]'", [1.0, 2.5]), ("""'{"a": 1}'""", Odd('{"a": 1}'))]),
    (
        "timestamptz",
        UnixTimestamp,
        [
            ("'2026-01-01 01:00:00.123456+01'", datetime(2026, 1, 1, 0, 0, 0, 123456, UTC)),
            ("'infinity'", Odd("infinity")),
            ("'-infinity'", Odd("-infinity")),
            ("'294276-12-31 23:59:59+00'", Odd("294276-12-31 23:59:59.000000")),
            ("NULL", None),
        ],
    ),
    ("timestamp", UnixTimestamp, [("'2026-01-01 01:00:00'", datetime(2026, 1, 1, 1, tzinfo=UTC))]),
]


@pytest.mark.parametrize(("kind", "dtype", "values"), CASES, ids=[f"{kind} as {dtype}" for kind, dtype, _ in CASES])
def test_every_type_is_read_exactly_or_is_odd(
    kind: str, dtype: FeastType, values: list[tuple[str, Any]], make: Callable[..., PostgresTable]
) -> None:
    prepare = (
        "CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE DOMAIN years AS int4; CREATE TYPE pair AS (a int, b text)"
    )
    rows = ", ".join(f"({number}, {text}, {AT}, {AT})" for number, (text, _) in enumerate(values))
    source = make(
        {"v": dtype},
        f"{prepare}; SET TimeZone = 'America/New_York'; CREATE TABLE t (id int, v {kind}, at timestamptz, "
        f"made timestamptz); INSERT INTO t VALUES {rows}",
    )
    found = _sorted(source)
    for (_, expected), row in zip(values, found.to_pylist(), strict=True):
        odd = json.loads(row[ODD] or "{}")
        if isinstance(expected, Odd):
            assert (row["v"], odd) == (None, {"v": str(expected)})
        else:
            assert odd == {}
            assert _shown(row["v"]) == _shown(expected)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("text", Int64),
        ("bytea", Float32),
        ("jsonb", Int32),
        ("boolean", Int64),
        ("integer", String),
        ("timestamp", String),
        ("integer", UnixTimestamp),
        ("text", UnixTimestamp),
        ("date", UnixTimestamp),
        ("text", Bytes),
        ("bytea", String),
        ("double precision", Array(Float64)),
        ("text", Bool),
    ],
)
def test_a_column_of_another_kind_is_refused_before_anything_is_read(
    kind: str, dtype: FeastType, make: Callable[..., PostgresTable]
) -> None:
    with pytest.raises(SchemaError, match=rf"column `v` is {kind}.* \(.*\) there and .* in the view; nothing was read"):
        make({"v": dtype}, f"CREATE TABLE t (id int, v {kind}, at timestamp, made timestamp)")


_DECIMALS = st.one_of(
    st.decimals(allow_nan=False), st.sampled_from([Decimal("NaN"), Decimal("Infinity"), Decimal("-Infinity")])
)
_ROWS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(-INT64, INT64 - 1)),
        st.one_of(st.none(), st.floats()),
        st.one_of(st.none(), _DECIMALS, st.integers(-(10**20), 10**20).map(Decimal)),
        st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))),
        st.one_of(st.none(), st.datetimes(timezones=st.just(UTC))),
        st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1)), max_size=3)),
    ),
    max_size=20,
)


@settings(
    deadline=None,
    max_examples=examples(30),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=_ROWS)
def test_any_rows_are_read_as_one_would_by_hand(rows: list[tuple[Any, ...]], any_table: _AnyTable) -> None:
    kept = any_table.replace(rows)
    by_hand = to_arrow(kept, any_table.source.schema) if kept else any_table.source.schema.empty_table()
    found = _sorted(any_table.source)
    assert found.schema.equals(by_hand.schema)
    for name in found.schema.names:
        if name != ODD:
            assert repr(found.column(name).to_pylist()) == repr(by_hand.column(name).to_pylist()), name
    assert [_keys(note) for note in found.column(ODD).to_pylist()] == [
        _keys(note) for note in by_hand.column(ODD).to_pylist()
    ]


@pytest.mark.parametrize("streams", [1, 3])
def test_a_day_is_of_one_state_whoever_writes_meanwhile(
    streams: int, make: Callable[..., PostgresTable], postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch.sources.postgres._LARGE", 1)
    source = replace(make({"v": Int64}, _many(40_000)), streams=streams)
    reading = source.read(D, 1000)
    first = next(reading)
    with _connect(postgres) as connection:
        connection.execute("UPDATE t SET v = -1")
        connection.execute("DELETE FROM t WHERE id % 2 = 0")
        connection.execute(f"INSERT INTO t VALUES (-5, -5, {AT}, {AT})")
    table = pa.concat_tables([first, *reading])
    assert sorted(table.column("id").to_pylist()) == list(range(40_000))
    assert table.column("v").to_pylist() == table.column("id").to_pylist()


def test_a_large_day_is_read_in_ranges_only_where_an_index_finds_them(
    make: Callable[..., PostgresTable], monkeypatch: pytest.MonkeyPatch, postgres: str
) -> None:
    source = replace(make({"v": Int64}, _many(40_000)), streams=3)
    assert _ranges_of(source) == 1
    monkeypatch.setattr("batch.sources.postgres._LARGE", 1)
    assert _ranges_of(source) == 12
    with _connect(postgres) as connection:
        connection.execute("DROP INDEX t_made")
    assert _ranges_of(source) == 1


def test_a_table_that_is_emptied_and_filled_meanwhile_is_not_found_empty(
    make: Callable[..., PostgresTable], postgres: str
) -> None:
    source = make({"v": Int64}, _many(10))
    read: list[int] = []
    with _connect(postgres) as connection:
        connection.autocommit = False
        connection.execute("TRUNCATE t")
        connection.execute(f"INSERT INTO t VALUES (1, 1, {AT}, {AT}), (2, 2, {AT}, {AT})")
        reader = threading.Thread(target=lambda: read.extend(_sorted(source).column("id").to_pylist()))
        reader.start()
        _wait_for_lock(postgres)
        connection.commit()
        reader.join(30)
    assert read == [1, 2]


def test_a_table_that_is_altered_meanwhile_is_looked_at_again(
    make: Callable[..., PostgresTable], postgres: str
) -> None:
    source = make({"v": Int64}, _many(10))
    with _connect(postgres) as connection:
        connection.execute("ALTER TABLE t ALTER COLUMN v TYPE text")
    with pytest.raises(TransientError, match="table `t` was altered while it was looked at"):
        next(source.read(D, 10))


@pytest.mark.parametrize("streams", [1, 3])
def test_a_server_that_ends_the_read_is_worth_another_try(
    streams: int, make: Callable[..., PostgresTable], postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch.sources.postgres._LARGE", 1)
    wide = _many(4_000).replace("AS v,", "AS v, repeat('x', 30000) AS pad,")
    source = replace(make({"v": Int64, "pad": String}, wide), streams=streams)
    reading = source.read(D, 1000)
    next(reading)
    with _connect(postgres) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
    with pytest.raises(TransientError, match=r"could not be read: .*; it is tried again"):
        list(reading)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("headrace-read")]


def test_a_read_that_is_given_up_leaves_no_thread_and_no_connection(
    make: Callable[..., PostgresTable], postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch.sources.postgres._LARGE", 1)
    reading = replace(make({"v": Int64}, _many(40_000)), streams=3).read(D, 100)
    next(reading)
    cast("Any", reading).close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("headrace-read")]
    with _connect(postgres) as connection:
        left = connection.execute(
            "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = relation AND relname = 't'"
        )
        assert left.fetchall() == [(0,)]


def test_the_source_cannot_be_written(make: Callable[..., PostgresTable]) -> None:
    source = make({"v": Int64}, _many(10))
    with (
        pytest.raises(TransientError, match="cannot execute DELETE in a read-only transaction"),
        postgres._transaction(source.login) as cursor,
    ):
        cursor.execute("DELETE FROM t")


@pytest.mark.parametrize("is_indexed", [True, False])
def test_rows_without_a_time_are_counted(is_indexed: bool, make: Callable[..., PostgresTable]) -> None:
    lost = ", ".join(f"({n}, {n}, {AT}, {when})" for n, when in enumerate(("NULL", "NULL", "'infinity'", AT)))
    index = "CREATE INDEX t_made ON t (made);" if is_indexed else ""
    source = make({"v": Int64}, f"CREATE TABLE t (id int, v int, at timestamptz, made timestamptz);{index}"
                  f"INSERT INTO t VALUES {lost}")  # fmt: skip
    assert source.fields["made"].is_indexed == is_indexed
    assert source.rows_of_no_day() == 3


def test_rows_without_a_time_are_not_looked_for_all_over_a_large_table(
    make: Callable[..., PostgresTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make({"v": Int64}, _many(100).replace("CREATE INDEX", "--"))
    monkeypatch.setattr("batch.sources.postgres.LOOKED_AT", 99)
    assert source.rows_of_no_day() is None
    monkeypatch.setattr("batch.sources.postgres.LOOKED_AT", 100)
    assert source.rows_of_no_day() == 0


def test_a_day_of_times_without_a_zone_is_utc(make: Callable[..., PostgresTable]) -> None:
    source = make(
        {"v": Int64},
        "CREATE TABLE t (id int, v int, at timestamp, made timestamp); SET TimeZone = 'Asia/Tokyo';"
        "INSERT INTO t SELECT n, n, '2026-03-10', made::timestamp FROM (VALUES (1, '2026-03-10'), "
        "(2, '2026-03-10 23:59:59.9'), (3, '2026-03-11'), (4, '2026-03-09 23:59:59.999999')) AS v (n, made)",
    )
    assert _sorted(source).column("id").to_pylist() == [1, 2]


def test_names_of_any_kind_are_quoted(make: Callable[..., PostgresTable]) -> None:
    source = make(
        {"a \"b\" 'c' \\d": Array(Int64)},
        'CREATE SCHEMA "Odd"; CREATE TABLE "Odd"."T\'s" (id int, "a ""b"" \'c\' \\d" int[], at timestamptz, '
        f'made timestamptz); INSERT INTO "Odd"."T\'s" VALUES (1, \'{{{{1}}}}\', {AT}, {AT})',
        table="Odd.T's",
    )
    row = _sorted(source).to_pylist()[0]
    assert json.loads(row[ODD]) == {"a \"b\" 'c' \\d": "[[1]]"}


def test_a_view_and_a_partitioned_table_are_read_too(make: Callable[..., PostgresTable]) -> None:
    statements = (
        "CREATE TABLE p (id int, v int, at timestamptz, made timestamptz) PARTITION BY RANGE (made);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM ('2026-03-01') TO ('2026-04-01');"
        f"INSERT INTO p VALUES (1, 5, {AT}, {AT}); CREATE VIEW t AS SELECT id, v * 2 AS v, at, made FROM p;"
        "CREATE MATERIALIZED VIEW m AS SELECT * FROM p"
    )
    assert _sorted(make({"v": Int64}, statements)).column("v").to_pylist() == [10]
    assert _sorted(make({"v": Int64}, "", table="p")).column("v").to_pylist() == [5]
    assert _sorted(make({"v": Int64}, "", table="m")).column("v").to_pylist() == [5]


def test_a_transformation_gets_every_column_in_a_wide_type(make: Callable[..., PostgresTable]) -> None:
    source = make(
        {"v": Int64},
        "CREATE TABLE t (id int, big numeric(30, 0), price numeric(10, 2), tags text[], flags bool[], extra jsonb, "
        "at timestamptz, made timestamptz);"
        f"INSERT INTO t VALUES (1, 9007199254740993, 1.25, '{{a}}', '{{t}}', '{{}}', {AT}, {AT})",
        transform="module:function",
    )
    row = _sorted(source).to_pylist()[0]
    assert (row["big"], row["price"], row["tags"], row["flags"], row["extra"], row[ODD]) == (
        9007199254740993,
        1.25,
        ["a"],
        [True],
        "{}",
        None,
    )


def test_a_table_that_is_not_there_is_named_with_those_that_are(make: Callable[..., PostgresTable]) -> None:
    with pytest.raises(ConfigError, match=r"reads table `nope`, .* it has: t; correct"):
        make({"v": Int64}, _many(1), table="nope")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("postgresql://u:s3cret@127.0.0.1:{port}/x", TransientError, "Connection refused"),
        ("postgresql://u:s3cret@/x?host=/nowhere", TransientError, "No such file or directory"),
        ("postgresql://postgres:s3cret@127.0.0.1:{server_port}/x", TransientError, "password authentication failed"),
        ("{server}&bogus=1", ConfigError, r"libpq says: invalid connection option \"bogus\"; correct the URL"),
        ("{server}&sslmode=bogus", TransientError, 'invalid sslmode value: "bogus"'),
        ("{server}&dbname=nope", TransientError, 'database "nope" does not exist'),
    ],
)
def test_a_server_that_cannot_be_reached_is_told_in_one_line(
    url: str, error: type[Exception], message: str, contract: Callable[..., ViewContract], postgres: str
) -> None:
    server = sa.make_url(postgres)
    chosen = url.format(port=free_port(), server=postgres, server_port=server.port)
    with pytest.raises(error, match=message) as raised:
        open_postgres(sa.make_url(chosen), contract({"v": Int64}, "t"), "t", "made")
    assert "s3cret" not in str(raised.value)
    assert str(server.password) not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "conninfo"),
    [
        ("postgresql://u:p%40%27%5C@h:5433/d?sslmode=require", r"host='h' port='5433' user='u' password='p@\'\\' "
         "dbname='d' sslmode='require'"),
        ("postgresql+psycopg://u@/d?host=/run/x", "host='/run/x' user='u' dbname='d'"),
        ("postgresql:///d", "dbname='d'"),
        ("postgresql://u@/d?host=a:1&host=b:2", "host='a,b' port='1,2' user='u' dbname='d'"),
        ("postgresql://u@/d?host=a,b&port=5,6", "host='a,b' port='5,6' user='u' dbname='d'"),
        ("postgresql+psycopg2://h/d?service=x", "host='h' dbname='d' service='x'"),
        ("postgresql://u@[::1]:5/d", "host='::1' port='5' user='u' dbname='d'"),
    ],
)  # fmt: skip
def test_a_url_is_put_in_the_words_of_libpq(url: str, conninfo: str) -> None:
    assert postgres._conninfo(sa.make_url(url)) == conninfo


def test_the_whole_chain_reads_from_postgresql(place: Place, configure: Callable[..., None], postgres: str) -> None:
    configure(source_url=postgres)
    with _connect(postgres) as connection:
        connection.execute(
            "CREATE TABLE rides (rider text, city_id int, distance_km real, stops int, streets text[], "
            "is_shared boolean, grade text, happened timestamptz, made timestamptz, remark text)"
        )
        for row in good_rides(D):
            chosen = {**row, "streets": json.loads(row["streets"]), "is_shared": bool(row["is_shared"])}
            chosen |= {name: chosen[name] + "+00" for name in ("happened", "made")}
            names, marks = ", ".join(chosen), ", ".join(["%s"] * len(chosen))
            connection.execute((f"INSERT INTO rides ({names}) VALUES ({marks})"), list(chosen.values()))
        connection.execute("UPDATE rides SET happened = 'infinity' WHERE rider = 'rider 19'")
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    rows = place.offline("rides").to_pylist()
    assert len(rows) == 19
    assert rows[0]["streets"] == ["High St", "Low St"]
    rejected = place.receipt("rides", D, "clean.json")["counts"]["reasons"]
    assert rejected == [{"reason": "bad_timestamp", "field": "happened", "rows": 1}]


class _AnyTable:
    """A table of many types whose rows are replaced, and what psycopg reads of it."""

    def __init__(self, url: str, source: PostgresTable) -> None:
        self.source = source
        self._url = url

    def replace(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Put rows there; they come back as a client has them, in the order of the schema."""
        names = ", ".join(f'"{name}"' for name in self.source.schema.names[:-1])
        with _connect(self._url) as connection:
            connection.execute("TRUNCATE t")
            with connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO t SELECT %s, b, f, n, n, x, w, l, "
                    f"{AT}, {AT} FROM (VALUES (%s::int8, %s::float8, %s::numeric, %s::text, "
                    "%s::timestamptz, %s::int[])) AS v (b, f, n, x, w, l)",
                    [(number, *row) for number, row in enumerate(rows)],
                )
            return connection.execute(f"SELECT {names} FROM t ORDER BY id").fetchall()


@pytest.fixture
def any_table(postgres: str, make: Callable[..., PostgresTable]) -> _AnyTable:
    columns = {"b": Float64, "f": Int64, "n": Int64, "m": Float64, "x": String, "w": UnixTimestamp, "l": Array(Int64)}
    source = make(
        columns,
        "CREATE TABLE t (id int8, b int8, f float8, n numeric, m numeric, x text, w timestamptz, l int[], "
        "at timestamptz, made timestamptz)",
    )
    return _AnyTable(postgres, source)


@pytest.fixture
def contract(tmp_path: Path) -> Callable[..., ViewContract]:
    def made(features: dict[str, FeastType], table: str = "t", transform: str | None = None) -> ViewContract:
        tags = {"source_table": table} | ({"transform": transform} if transform is not None else {})
        fields = [Field(name=name, dtype=dtype) for name, dtype in features.items()]
        _, (found,) = applied(tmp_path, None, view(features=fields, tags=tags))
        return found

    return made


@pytest.fixture
def make(postgres: str, contract: Callable[..., ViewContract]) -> Callable[..., PostgresTable]:
    """Run statements, and look at a table as the source of a view of these features."""

    def made(
        features: dict[str, FeastType], statements: str, table: str = "t", transform: str | None = None
    ) -> PostgresTable:
        with _connect(postgres) as connection:
            if statements:
                connection.execute(statements.encode())
        return open_postgres(sa.make_url(postgres), contract(features, table, transform), table, "made")

    return made


def _many(count: int) -> str:
    """A table whose rows are of one day, evenly, with an index."""
    return (
        f"CREATE TABLE t AS SELECT i AS id, i AS v, timestamptz {AT} AS at, "
        f"timestamptz '2026-03-10 00:00+00' + i * interval '1 day' / {count} AS made "
        f"FROM generate_series(0, {count} - 1) AS i;\nCREATE INDEX t_made ON t (made);\nANALYZE t"
    )


def _sorted(source: PostgresTable) -> pa.Table:
    chunks = list(source.read(D, 7))
    table = pa.concat_tables(chunks) if chunks else source.schema.empty_table()
    return table.sort_by("id")


def _shown(value: Any) -> str:
    """A value such that NaN is itself, and 0 is neither 0.0 nor -0.0."""
    return repr(value.astimezone(UTC) if isinstance(value, datetime) else value)


def _keys(note: str | None) -> list[str]:
    return sorted(json.loads(note)) if note is not None else []


def _ranges_of(source: PostgresTable) -> int:
    start = datetime(D.year, D.month, D.day, tzinfo=UTC)
    with postgres._transaction(source.login) as cursor:
        return len(source._ranges(cursor, start, start + timedelta(days=1)))


def _connect(url: str) -> psycopg.Connection[Any]:
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def _wait_for_lock(url: str) -> None:
    with _connect(url) as connection:
        for _ in _tries():
            waiting = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
            if waiting is not None and waiting[0]:
                return
    raise AssertionError("nobody waits for the lock")


def _tries() -> Iterator[int]:
    pause = threading.Event()
    for number in range(200):
        yield number
        pause.wait(0.05)
