"""Files as the source: any value, any day, files that are not whole, and files that are not alike."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Field
from feast.types import Array, Bool, Bytes, FeastType, Float64, Int32, Int64, String, UnixTimestamp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from luigi.execution_summary import LuigiStatusCode

from batch import Ingest, Materialize, OfflineStore
from batch.sources.drops import Drops, open_drops
from batch.sources.odd import ODD
from headrace.contract import ViewContract
from headrace.errors import ConfigError, SchemaError, TransientError
from tests.batch.conftest import forget
from tests.batch.place import D, Place, build, good_rides
from tests.headrace.views import applied, examples, view
from tests.servers import feast_apply

FEATURES: dict[str, FeastType] = {"n": Int64, "x": Float64, "ok": Bool, "word": String, "tags": Array(Int64)}
HEADER = "id,n,x,ok,word,tags,at,made"
AT = "2026-03-10 12:00:00"


class Shop:
    """A feature repository, and a folder of drops beside it."""

    contracts: ClassVar[dict[str, ViewContract]] = {}

    def __init__(self, root: Path) -> None:
        self.repo = root / "repo"
        self.drops = root / "drops"
        self.repo.mkdir()
        self.drops.mkdir()
        self._root = root

    def open(
        self,
        pattern: str = "../drops/*.csv",
        day: date | None = D,
        features: dict[str, FeastType] | None = None,
        transform: str | None = None,
    ) -> Drops:
        key = repr((pattern, features, transform))
        if key not in self.contracts:
            fields = [Field(name=name, dtype=dtype) for name, dtype in (features or FEATURES).items()]
            tags = {"source_files": pattern} | ({"transform": transform} if transform is not None else {})
            home = self._root / f"home{len(self.contracts)}"
            home.mkdir()
            self.contracts[key] = applied(home, None, view(features=fields, tags=tags))[1][0]
        return open_drops(self.repo, self.contracts[key], pattern, "made", day)

    def write(self, name: str, content: str | bytes | pa.Table) -> Path:
        path = self.drops / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def rows_of(source: Drops, day: date = D, chunk_rows: int = 3) -> list[dict[str, Any]]:
    chunks = list(source.read(day, chunk_rows))
    assert all(chunk.num_rows <= chunk_rows for chunk in chunks)
    return [row for chunk in chunks for row in chunk.to_pylist()]


def parquet_rows(count: int, day: date = D, **columns: Any) -> pa.Table:
    at = [datetime(day.year, day.month, day.day, 12, tzinfo=UTC) + timedelta(seconds=n) for n in range(count)]
    times = pa.array(at, pa.timestamp("us", "UTC"))
    known = {
        "id": pa.array(range(count), pa.int64()),
        "n": pa.array(range(count), pa.int64()),
        "x": pa.array([0.5] * count),
        "ok": pa.array([True] * count),
        "word": pa.array(["w"] * count),
        "tags": pa.array([[1]] * count, pa.list_(pa.int64())),
        "at": times,
        "made": times,
    }
    return pa.table({**known, **columns})


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        ("n", "5", 5),
        ("n", "-9223372036854775808", -(2**63)),
        ("n", "9007199254740993", 9007199254740993),
        ("n", "9007199254740993.0", 9007199254740993),
        ("n", "+7", 7),
        ("n", "1e3", 1000),
        ("n", "", None),
        ("x", "0.1", 0.1),
        ("x", "-1.5E-3", -0.0015),
        ("x", "1e-999", 0.0),
        ("x", "9007199254740993", 9007199254740992.0),
        ("x", "Infinity", float("inf")),
        ("ok", "true", True),
        ("ok", "F", False),
        ("ok", "0", False),
        ("word", "", None),
        ("word", '""', ""),
        ("word", '"a ""b"",\r\nc"', 'a "b",\r\nc'),
        ("word", " x ", " x "),
        ("word", "NULL", "NULL"),
        ("word", "日本", "日本"),
        ("tags", '"[1, 2]"', [1, 2]),
        ("at", "2026-03-10T12:00:00.5+01:00", "2026-03-10T12:00:00.5+01:00"),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_value_of_csv_is_what_it_reads_as(
    column: str, text: str, value: Any, ending: str, start: str, shop: Shop
) -> None:
    cells = [text if name == column else AT if name in ("at", "made") else "1" for name in HEADER.split(",")]
    shop.write("a.csv", start + HEADER + ending + ",".join(cells) + ending)
    (row,) = rows_of(shop.open())
    assert row[ODD] is None or "tags" in row[ODD]
    assert repr(row[column]) == repr(value)


@pytest.mark.parametrize(
    ("column", "text", "odd"),
    [
        ("n", b"1.5", "1.5"),
        ("n", b"0x1F", "0x1F"),
        ("n", b"1,5", None),
        ("n", b'"1,5"', "1,5"),
        ("n", b"9223372036854775808", "9223372036854775808"),
        ("n", b'""', ""),
        ("n", b" 5", " 5"),
        ("n", b"1e999999", "1e999999"),
        ("x", b"1e400", "1e400"),
        ("x", b'"1.000,5"', "1.000,5"),
        ("x", b"\xff", "b'\\xff'"),
        ("ok", b"yes", "yes"),
        ("word", b"caf\xe9", "b'caf\\xe9'"),
        ("tags", b'"[1, x]"', "[1, x]"),
    ],
)
def test_a_value_of_csv_that_does_not_fit_is_odd(column: str, text: bytes, odd: str | None, shop: Shop) -> None:
    cells = [AT.encode() if name in ("at", "made") else b"[]" if name == "tags" else b"1" for name in HEADER.split(",")]
    good = b",".join(cells)
    cells[HEADER.split(",").index(column)] = text
    content = b"\n".join([HEADER.encode(), *[good] * 100, b",".join(cells), *[good] * 100, b""])
    shop.write("a.csv", content)
    if odd is None:
        with pytest.raises(TransientError, match=r"a\.csv could not be read: .*Expected 8 columns, got 9"):
            rows_of(shop.open())
        return
    rows = rows_of(shop.open(), chunk_rows=1000)
    assert len(rows) == 201
    assert [row[ODD] for row in rows].count(None) == 200
    assert rows[100][column] is None
    assert json.loads(rows[100][ODD]) == {column: odd}


_CELLS = st.one_of(
    st.none(),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.decimals(allow_nan=False, allow_infinity=False).map(str),
    st.sampled_from(["true", "F", "1", "[1]", "[1.5]", "[null, 2]", "-0", "1.", ".5", "\u0661", "1e-9", "0" * 30]),
)


@settings(deadline=None, max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_CELLS, _CELLS, _CELLS, _CELLS, _CELLS), min_size=1, max_size=200))
@example(rows=[("1", "1", "1", "1", "1")] * 200 + [("x", "x", "x", "x", "x")])
def test_any_csv_is_read_as_one_would_by_hand(rows: list[tuple[str | None, ...]], shop: Shop) -> None:
    lines = [HEADER]
    for number, cells in enumerate(rows):
        quoted = ["" if cell is None else '"' + cell.replace('"', '""') + '"' for cell in cells]
        lines.append(",".join([str(number), *quoted, AT, AT]))
    shop.write("a.csv", "\n".join([*lines, ""]))
    found = rows_of(shop.open(), chunk_rows=1000)
    by_hand: list[Callable[[str], Any]] = [_integer, _double, _boolean, str, _integers]
    assert [row["id"] for row in found] == list(range(len(rows)))
    for cells, row in zip(rows, found, strict=True):
        odd = json.loads(row[ODD] or "{}")
        for name, cell, read in zip(FEATURES, cells, by_hand, strict=True):
            if cell is None:
                assert (row[name], name in odd) == (None, False)
                continue
            value = read(cell)
            assert repr(row[name]) == repr(value)
            assert odd.get(name) == (cell if value is None else None)


def _integer(cell: str) -> int | None:
    value = _number(cell)
    whole = value is not None and value.is_finite() and value.adjusted() < 20 and value == int(value)
    return int(value) if value is not None and whole and -(2**63) <= value < 2**63 else None


def _double(cell: str) -> float | None:
    if cell.lower().lstrip("+-") in ("nan", "inf", "infinity") and cell[:2] not in ("++", "--", "+-", "-+"):
        return float(cell)
    value = _number(cell)
    return None if value is None or abs(float(value)) == float("inf") else float(value)


def _number(cell: str) -> Decimal | None:
    if not cell.isascii() or "_" in cell or cell != cell.strip() or "nan" in cell.lower() or "inf" in cell.lower():
        return None
    try:
        return Decimal(cell)
    except ArithmeticError:
        return None


def _boolean(cell: str) -> bool | None:
    return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}.get(cell.lower())


def _integers(cell: str) -> list[int | None] | None:
    try:
        value = json.loads(cell)
    except ValueError:
        return None
    fits = isinstance(value, list) and all(item is None or (type(item) is int) for item in value)
    return value if fits else None


@pytest.mark.parametrize(
    ("kind", "values", "feature", "expected", "odd"),
    [
        (pa.int8(), [1, None], Int32, [1, None], set()),
        (pa.uint64(), [1, 2**64 - 1], Int64, [1, None], {1}),
        (pa.float32(), [1.0, 1.5], Int64, [1, None], {1}),
        (pa.decimal128(30, 2), [Decimal("9007199254740993.00"), Decimal("1.50")], Int64, [2**53 + 1, None], {1}),
        (pa.decimal128(30, 2), [Decimal("1.10")], Float64, [1.1], set()),
        (pa.float16(), [0.5], Float64, [0.5], set()),
        (pa.int64(), [0, 1, 2], Bool, [False, True, None], {2}),
        (pa.large_string(), ["a"], String, ["a"], set()),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"], String, ["a", "b", "a"], set()),
        (pa.date32(), [date(2026, 1, 2)], String, ["2026-01-02"], set()),
        (pa.large_binary(), [b"\xff"], Bytes, [b"\xff"], set()),
        (pa.list_(pa.int32()), [[1, None], None, []], Array(Int64), [[1, None], None, []], set()),
        (pa.timestamp("s"), [1_773_144_000], UnixTimestamp, [datetime(2026, 3, 10, 12, tzinfo=UTC)], set()),
        (pa.timestamp("ms"), [2**60, 0], UnixTimestamp, [None, datetime(1970, 1, 1, tzinfo=UTC)], {0}),
        (pa.null(), [None], Int64, [None], set()),
    ],
)
def test_a_value_of_parquet_fits_or_is_odd(
    kind: pa.DataType, values: list[Any], feature: FeastType, expected: list[Any], odd: set[int], shop: Shop
) -> None:
    shop.write("a.parquet", parquet_rows(len(values), v=pa.array(values, kind)))
    rows = rows_of(shop.open("../drops/*.parquet", features={"v": feature}))
    assert [row["v"] for row in rows] == expected
    assert {number for number, row in enumerate(rows) if row[ODD] is not None} == odd


def test_a_column_of_another_kind_is_refused(shop: Shop) -> None:
    shop.write("a.parquet", parquet_rows(1, n=pa.array(["1"])))
    with pytest.raises(SchemaError, match=r"source `\.\./drops/\*\.parquet` does not fit .*`n` is string \(a text\)"):
        shop.open("../drops/*.parquet")


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_each_row_is_of_exactly_one_day(name: str, shop: Shop) -> None:
    days = [D + timedelta(days=back) for back in range(-3, 4)]
    if name == "csv":
        zones = ("", "Z", "+05:30", "-11:00")
        moments = [f"{day} {t}{z}" for day in days[2:5] for t in ("00:00:00", "23:59:59.999999") for z in zones]
        moments.append(f"{D} is no time")
        lines = [f"{number},1,1,1,w,[],{AT},{moment}" for number, moment in enumerate(moments)]
        shop.write("a.csv", "\n".join([HEADER, *lines, ""]))
    else:
        times = [datetime(d.year, d.month, d.day, tzinfo=UTC) - timedelta(microseconds=n) for d in days for n in (0, 1)]
        moments = [str(moment) for moment in times]
        table = parquet_rows(len(times), made=pa.array(times, pa.timestamp("us", "UTC")))
        pq.write_table(table, shop.drops / "a.parquet", row_group_size=2)
    source = shop.open(f"../drops/*.{name}")
    read = [row["id"] for back in range(-5, 6) for row in rows_of(source, D + timedelta(days=back))]
    assert sorted(read) == list(range(len(moments)))
    assert source.rows_of_no_day() == 0


def test_rows_without_a_time_are_counted_also_where_nothing_else_is_read(shop: Shop) -> None:
    times = [datetime(2026, 3, 10, tzinfo=UTC), None, datetime(2026, 3, 20, tzinfo=UTC), None, None, None]
    table = parquet_rows(6, made=pa.array(times, pa.timestamp("ns")))
    pq.write_table(table, shop.drops / "a.parquet", row_group_size=2)
    source = shop.open("../drops/*.parquet")
    assert [row["id"] for row in rows_of(source)] == [0]
    assert source.rows_of_no_day() == 4
    shop.write("b.csv", f"{HEADER}\n1,1,1,1,w,[],{AT},\n2,1,1,1,w,[],{AT},soon\n3,1,1,1,w,[],{AT},{AT}\n")
    text = shop.open()
    assert [row["id"] for row in rows_of(text)] == [3]
    assert text.rows_of_no_day() == 2


def test_of_parquet_only_the_row_groups_of_the_day_are_read(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [parquet_rows(10, D + timedelta(days=n)) for n in range(-5, 5)]
    pq.write_table(pa.concat_tables(tables), shop.drops / "a.parquet", row_group_size=10)
    asked: list[list[int]] = []
    real = pq.ParquetFile.iter_batches

    def iter_batches(parquet: Any, *arguments: Any, row_groups: list[int], **options: Any) -> Any:
        asked.append(row_groups)
        return real(parquet, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert len(rows_of(shop.open("../drops/*.parquet"))) == 10
    assert asked == [[5]]


def test_a_drop_is_the_day_of_its_name_whatever_its_rows_say(shop: Shop) -> None:
    shop.write(f"{D}/one.parquet", parquet_rows(2, D - timedelta(days=9)))
    shop.write(f"{D}/two.parquet", parquet_rows(3, D + timedelta(days=9)))
    shop.write(f"{D + timedelta(days=1)}/one.parquet", parquet_rows(7))
    for name in ("_half.parquet", ".half.parquet", "_temporary/half.parquet"):
        shop.write(f"{D}/{name}", b"half")
    source = shop.open("../drops/{date}/**/*.parquet")
    assert len(rows_of(source)) == 5
    assert source.rows_of_no_day() is None
    files = source.describe()["files"]
    assert [(file["path"], file["rows"]) for file in files] == [
        (f"../drops/{D}/one.parquet", 2),
        (f"../drops/{D}/two.parquet", 3),
    ]
    assert files[0]["bytes"] == (shop.drops / str(D) / "one.parquet").stat().st_size


def test_a_day_without_a_drop_is_empty_and_says_so(shop: Shop) -> None:
    source = shop.open("../drops/{date}/*.csv")
    assert rows_of(source) == []
    assert source.describe() == {"files": [], "files_matched": 0}
    shop.write(f"{D}/a.csv", HEADER + "\n")
    source = shop.open("../drops/{date}/*.csv")
    assert rows_of(source) == []
    assert [file["rows"] for file in source.describe()["files"]] == [0]


def test_a_compressed_file_is_read_too(shop: Shop) -> None:
    shop.write("a.csv.gz", gzip.compress(f"{HEADER}\n1,1,1,1,w,[],{AT},{AT}\n".encode()))
    assert [row["id"] for row in rows_of(shop.open("../drops/*.csv.gz"))] == [1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", f"{HEADER}\n1,1,1,1,w,[],{AT},{AT}\n2,1,1,1,w"),
        ("a.csv", f'{HEADER}\n1,1,1,1,w,[],{AT},{AT}\n2,1,1,1,"w'),
        ("a.csv", ""),
        ("a.csv.gz", gzip.compress(f"{HEADER}\n{f'1,1,1,1,w,[],{AT},{AT}' * 99}\n".encode(), mtime=0)[:-20]),
        ("a.parquet", b"PAR1 and then nothing"),
        ("a.parquet", b""),
    ],
    ids=["short row", "open quote", "no header", "cut gzip", "no parquet", "empty parquet"],
)
def test_a_file_that_is_not_whole_is_tried_again(name: str, content: str | bytes, shop: Shop) -> None:
    shop.write(name, content)
    with pytest.raises(TransientError, match=rf"file .*{name} could not be read: .*; it is tried again") as raised:
        rows_of(shop.open(f"../drops/*{name[1:]}"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", ["grow", "replace", "remove"])
def test_a_file_that_changes_while_it_is_read_is_tried_again(change: str, shop: Shop) -> None:
    path = shop.write("a.csv", "\n".join([HEADER, *[f"1,1,1,1,w,[],{AT},{AT}"] * 20, ""]))
    reading = shop.open().read(D, 5)
    next(reading)
    if change == "grow":
        with path.open("a") as file:
            file.write(f"2,1,1,1,w,[],{AT},{AT}\n")
    elif change == "replace":
        other = shop.write("other.txt", path.read_bytes())
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        other.rename(path)
    else:
        path.unlink()
    with pytest.raises(TransientError, match=r"a\.csv (was changed while it was read|could not be read).*tried again"):
        list(reading)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (HEADER + ",more", r"b\.csv has `more` more \(beside a\.csv, both in .*drops\)"),
        (HEADER.replace(",word", ""), r"b\.csv lacks `word`"),
    ],
)
def test_files_that_are_not_alike_are_named(header: str, message: str, shop: Shop) -> None:
    shop.write("a.csv", HEADER + "\n")
    shop.write("b.csv", header + "\n")
    with pytest.raises(SchemaError, match=message):
        shop.open()


def test_parquet_files_may_differ_in_how_they_write_a_kind_but_not_in_the_kind(shop: Shop) -> None:
    shop.write("a.parquet", parquet_rows(1))
    shop.write("b.parquet", parquet_rows(1, n=pa.array([2.0]), word=pa.array(["v"]).dictionary_encode()))
    shop.write("c.parquet", parquet_rows(1, n=pa.nulls(1)))
    assert sorted(str(row["n"]) for row in rows_of(shop.open("../drops/*.parquet"))) == ["0", "2", "None"]
    shop.write("d.parquet", parquet_rows(1, n=pa.array(["2"])))
    with pytest.raises(SchemaError, match=r"d\.parquet has `n` as a text, not as a number"):
        shop.open("../drops/*.parquet")


def test_a_name_twice_is_refused(shop: Shop) -> None:
    shop.write("a.csv", HEADER + ",n\n")
    with pytest.raises(SchemaError, match=r"a\.csv has a column of one name more than once: n;"):
        shop.open()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("../drops/*.json", r"tag source_files='\.\./drops/\*\.json' must end in one of \.csv, \.csv\.gz, \.parquet"),
        ("../drops/*.csv", r"no file matches its tag source_files='\.\./drops/\*\.csv' in .*repo; correct the tag"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern: str, message: str, shop: Shop) -> None:
    with pytest.raises(ConfigError, match=message):
        shop.open(pattern)


def test_a_view_has_a_table_or_files_and_not_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source_table='t' and source_files='x\.csv'; .* remove the other"):
        applied(tmp_path, None, view(tags={"source_table": "t", "source_files": "x.csv"}))


def test_a_transformation_gets_every_column_of_a_file(shop: Shop) -> None:
    shop.write("a.parquet", parquet_rows(1, more=pa.array([Decimal("1.25")]), big=pa.array([Decimal(2**60)])))
    (row,) = rows_of(shop.open("../drops/*.parquet", transform="module:function"))
    assert (row["more"], row["big"], row["tags"]) == (1.25, 2**60, [1])


def test_the_whole_chain_reads_drops(place: Place, configure: Callable[..., None]) -> None:
    definitions = place.repo / "definitions.py"
    text = definitions.read_text("utf-8")
    pattern = "../drops/{date}/*.csv"
    definitions.write_text(
        text.replace('{"source_table": "rides"}', f'{{"source_files": "{pattern}"}}'), encoding="utf-8"
    )
    feast_apply(place.repo)
    configure()
    day_before = D - timedelta(days=1)
    for day, number in ((D, 20), (day_before, 5)):
        rows = good_rides(day, number)
        target = place.root / "drops" / str(day) / "rides.csv"
        target.parent.mkdir(parents=True)
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    assert build(Materialize(view="rides", date=D)) == LuigiStatusCode.SUCCESS
    assert place.offline("rides").num_rows == 25
    raw = place.receipt("rides", D, "raw.json")
    assert (raw["table"], raw["window"], raw["window_column"], raw["rows_of_no_day"]) == (pattern, "drop", None, None)
    assert [file["rows"] for file in raw["files"]] == [20]
    assert place.receipt("rides", D - timedelta(days=2), "raw.json", D)["files"] == []
    assert "drop" in (place.folder("rides", D) / "report.html").read_text("utf-8")
    late = place.root / "drops" / str(D) / "late.csv"
    late.write_text((place.root / "drops" / str(D) / "rides.csv").read_text("utf-8").replace("rider ", "late "))
    next_day = D + timedelta(days=1)
    assert build(Materialize(view="rides", date=next_day)) == LuigiStatusCode.SUCCESS
    assert place.offline("rides").num_rows == 45
    more = place.root / "drops" / str(next_day) / "rides.csv"
    more.parent.mkdir()
    more.write_text("rider,city_id,distance_km,stops,streets,is_shared,grade,happened,made,extra\n", encoding="utf-8")
    forget()
    task = Ingest(view="rides", date=next_day, run_date=next_day + timedelta(days=1))
    assert build(task) == LuigiStatusCode.FAILED
    accepted = Ingest(view="rides", date=next_day, run_date=next_day + timedelta(days=1), accept_schema=True)
    assert build(accepted) == LuigiStatusCode.SUCCESS
    assert build(OfflineStore(view="rides", date=next_day + timedelta(days=1))) == LuigiStatusCode.SUCCESS
