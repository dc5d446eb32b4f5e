"""The report and the gate: what they say, on whatever data."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pytest
from feast import Field
from feast.types import Array, Bool, Bytes, Float32, Float64, Int64, Json, String, Struct, UnixTimestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.coverage import coverage
from batch.explore import Findings
from tests.batch.days import D, Days
from tests.headrace.views import config, examples, view

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</svg></title>&amp;",
    "'onload=alert(1) x='",
    "{{ 7 * 7 }}{% raw %}",
    "\u202eright to left\u0000",
    "javascript:alert(1)",
]
START = datetime(2026, 3, 10, tzinfo=UTC)
MIXED = [
    Field(name="number", dtype=Float64, tags={"le": "100"}),
    Field(name="whole", dtype=Int64),
    Field(name="text", dtype=String),
    Field(name="is_so", dtype=Bool),
    Field(name="many", dtype=Array(String)),
    Field(name="raw", dtype=Bytes),
    Field(name="since", dtype=UnixTimestamp),
    Field(name="parts", dtype=Struct({"a": Int64})),
    Field(name="document", dtype=Json),
]


class Page(HTMLParser):
    """A page as a browser's parser sees it: elements, addresses, and whether it closes what it opens."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "rect", "path", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.attributes: Counter[str] = Counter()
        self.ids: list[str] = []
        self.headers_without_scope = 0
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in self.VOID:
            self._open.append(tag)
        values = dict(attrs)
        self.attributes.update(values.keys())
        self.links += [value for name, value in attrs if name in {"href", "src"} and value]
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.headers_without_scope += tag == "th" and "scope" not in values

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag


def check_page(path: Path, limit: int = 200_000) -> str:
    """It is well made, harmless, of its own, and its links lead to what is there; return it."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "link", "form"} & page.tags.keys()
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (path.parent / unquote(link)).is_file(), link
    assert len(page.ids) == len(set(page.ids))
    assert page.headers_without_scope == 0
    assert page.tags["main"] == page.tags["header"] == page.tags["h1"] == page.tags["title"] - page.tags["g"] == 1
    assert len(text.encode()) < limit
    return text


def read_strictly(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def mixed_rows(count: int, seed: int = 1, day: date = D) -> list[dict[str, Any]]:
    rnd = random.Random(seed)
    at = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return [
        {
            "id": number,
            "number": rnd.choice([rnd.random(), rnd.gauss(50, 9), None, 0.0]),
            "whole": rnd.choice([rnd.randrange(9), None]),
            "text": rnd.choice([*"abc", None]),
            "is_so": rnd.choice([True, False, None]),
            "many": rnd.choice([None, [], ["x"], ["x", "y"]]),
            "raw": rnd.choice([None, b"", b"\xff"]),
            "since": at - timedelta(days=rnd.randrange(900)),
            "parts": rnd.choice([None, {"a": 1}]),
            "document": rnd.choice([None, "{}", "[1]"]),
            "at": at + timedelta(seconds=rnd.randrange(86_400)),
            "made": at + timedelta(seconds=rnd.randrange(86_400)),
        }
        for number in range(count)
    ]


def column(findings: Findings, name: str) -> Any:
    return next(column for column in findings.columns if column.name == name)


def failed(findings: Findings) -> list[tuple[str, str | None, str]]:
    return [(check.kind, check.column, check.severity.value) for check in findings.checks if not check.passed]


def test_the_page_is_whole_and_harmless_whatever_the_data_say(tmp_path: Path) -> None:
    days = Days.of(tmp_path, MIXED)
    rows = mixed_rows(40)
    for number, text in enumerate(HOSTILE):
        rows += [{**rows[number], "id": 100 + n, "text": text, "number": number} for n in range(3)]
        rows += [{**rows[number], "text": text, "number": 1e9}]
        rows += [{**rows[number], "text": text, "many": [text], "document": text}]
    day = D - timedelta(days=1)
    days.look_at(rows, day)
    days.publish(day)
    findings = days.look_at(rows, max_reject_share=1)
    assert findings.rejects
    for path in (days.folder(D).report, days.folder(D).rejects_page):
        text = check_page(path)
        assert "&lt;script&gt;alert(1)" in text
        assert "{{ 7 * 7 }}" in text
    verdict = read_strictly(days.folder(D).verdict)
    assert verdict["before"] == [
        {"day": str(day), "rows": findings.counts["kept"], "report": verdict["before"][0]["report"]}
    ]
    assert {c["name"]: c["drift"]["psi"] for c in verdict["columns"] if c["drift"]} == dict.fromkeys(
        days.contract.features, 0.0
    )


@pytest.mark.parametrize("created", [True, False])
def test_a_day_without_rows_has_its_page(created: bool, tmp_path: Path) -> None:
    days = Days.of(tmp_path, MIXED, created=created)
    findings = days.look_at([])
    assert findings.passed
    assert failed(findings) == [("has_rows", None, "warning")]
    check_page(days.folder(D).report)
    assert not days.look_at([], allow_empty_day=False).passed


def test_values_at_every_end_are_told(tmp_path: Path) -> None:
    days = Days.of(
        tmp_path, [Field(name="x", dtype=Float64), Field(name="n", dtype=Int64), Field(name="s", dtype=String)]
    )
    floats = [float("nan"), float("inf"), float("-inf"), 1.7e308, -1.7e308, 0.0, None, 5e-324]
    whole = [2**63 - 1, -(2**63), 0, None, 1, 2, 3, 4]
    texts = ["", "x" * 100_000, "y" * 100_000, "\U0001f697", None, "null", "NaN", "a"]
    rows = [
        {"id": n, "x": x, "n": i, "s": s, "at": START, "made": START}
        for n, (x, i, s) in enumerate(zip(floats, whole, texts, strict=True))
    ]
    for day in (D - timedelta(days=1), D):
        findings = days.look_at(rows, day)
        days.publish(day)
    x, n, s = (column(findings, name) for name in "xns")
    assert (x.nulls, x.special) == (1, {"NaN": 1, "inf": 1, "-inf": 1})
    assert (x.low, x.high, x.distinct) == (-1.7e308, 1.7e308, 4)
    assert (n.low, n.high, n.nulls) == (-(2**63), 2**63 - 1, 1)
    assert (s.distinct, s.nulls) == (7, 1)
    assert [c.drift.psi for c in (x, n, s)] == [0, 0, 0]
    verdict = read_strictly(days.folder(D).verdict)
    assert verdict["columns"][2]["low"] == -(2**63)
    check_page(days.folder(D).report, limit=60_000)


def test_a_constant_or_empty_feature_is_drawn(tmp_path: Path) -> None:
    days = Days.of(tmp_path, MIXED)
    nothing = dict.fromkeys(days.contract.features)
    rows = [{"id": n, **nothing, "whole": 7, "at": START, "made": START} for n in range(5)]
    findings = days.look_at(pa.Table.from_pylist(rows, days.contract.schema))
    assert [(bar.label, bar.rows) for bar in column(findings, "whole").bars] == [("7", 5)]
    assert all(c.nulls == 5 for c in findings.columns if c.role == "feature" and c.name != "whole")
    check_page(days.folder(D).report)


def test_a_wide_view_has_a_page_of_bounded_size(tmp_path: Path) -> None:
    names = [f"feature_{number}" for number in range(60)]
    days = Days.of(tmp_path, [Field(name=name, dtype=Float32) for name in names])
    rnd = random.Random(1)
    for day in (D - timedelta(days=1), D):
        rows = [{"id": n, "at": START, "made": START, **{name: rnd.random() for name in names}} for n in range(300)]
        days.look_at(rows, day)
        days.publish(day)
    check_page(days.folder(D).report, limit=350_000)


@pytest.mark.parametrize(
    ("field_tags", "view_tags", "expected"),
    [
        ({}, {}, []),
        ({"le": "10"}, {}, []),  # then the row is rejected
        ({"le": "10", "severity": "warning"}, {}, [("rule", "x", "warning")]),
        ({"le": "10", "nullable": "false", "severity": "warning"}, {}, [("rule", "x", "warning")] * 2),
        ({"max_null_share": "0.25"}, {}, [("max_null_share", "x", "error")]),
        ({"max_null_share": "0.25 warning"}, {}, [("max_null_share", "x", "warning")]),
        ({"max_null_share": "0.3"}, {}, []),
        ({}, {"min_rows": "10"}, []),
        ({}, {"min_rows": "11"}, [("min_rows", None, "error")]),
        ({}, {"min_rows": "11", "severity": "warning"}, [("min_rows", None, "warning")]),
        ({}, {"max_age_hours": "12"}, []),
        ({}, {"max_age_hours": "11.9"}, [("max_age_hours", None, "error")]),
        ({}, {"max_age_hours": "11.9 warning"}, [("max_age_hours", None, "warning")]),
    ],
)
def test_the_gate_closes_for_errors_alone(
    field_tags: dict[str, str], view_tags: dict[str, str], expected: list[tuple[str, str | None, str]], tmp_path: Path
) -> None:
    days = Days.of(tmp_path, [Field(name="x", dtype=Int64, tags=field_tags)], view_tags)
    values = [None, None, None, 11, 1, 2, 3, 4, 5, 6]
    at = START + timedelta(hours=12)
    findings = days.look_at([{"id": n, "x": x, "at": at, "made": at} for n, x in enumerate(values)])
    assert failed(findings) == expected
    assert findings.passed == all(severity == "warning" for _, _, severity in expected)
    if expected and expected[0][0] == "rule":
        warned = {rule.rule: rule for rule in findings.rules if not rule.rejected}
        assert (warned["<= 10"].failed, warned["<= 10"].examples) == (1, ("x 11, id 3, at 2026-03-10 12:00:00+00:00",))
        assert findings.counts["rejected"] == 0
    page = check_page(days.folder(D).report)
    assert ("gate closed" in page) == (not findings.passed)


@pytest.mark.parametrize("severity", ["warning", "error"])
def test_a_day_that_drifts_is_told_or_stopped(severity: str, tmp_path: Path) -> None:
    tags = {"max_psi": f"0.2 {severity}"}
    days = Days.of(tmp_path, [Field(name="x", dtype=Float64, tags=tags), Field(name="y", dtype=Int64)])
    rnd = random.Random(4)

    def rows(middle: float) -> list[dict[str, Any]]:
        return [{"id": n, "x": rnd.gauss(middle, 1), "y": n % 5, "at": START, "made": START} for n in range(500)]

    first = days.look_at(rows(0), D - timedelta(days=2))
    assert first.before == ()
    assert column(first, "x").drift is None
    assert "No reference yet" in days.folder(D - timedelta(days=2)).report.read_text(encoding="utf-8")
    days.publish(D - timedelta(days=2))
    assert failed(days.look_at(rows(0.02), D - timedelta(days=1))) == []
    days.publish(D - timedelta(days=1))
    findings = days.look_at(rows(2))
    assert failed(findings) == [("max_psi", "x", severity)]
    assert [day.day for day in findings.before] == [D - timedelta(days=1), D - timedelta(days=2)]
    found = column(findings, "x").drift
    assert (found.rows, found.reference_rows) == (500, 1000)
    assert found.psi > 1
    assert column(findings, "y").drift.psi < 0.01
    bars = column(findings, "x").bars
    assert sum(bar.expected for bar in bars) == pytest.approx(500, abs=1)


def test_only_the_published_rows_of_seven_days_are_the_reference(tmp_path: Path) -> None:
    days = Days.of(tmp_path, MIXED)
    for back in range(10, 0, -1):
        day = D - timedelta(days=back)
        days.look_at(mixed_rows(30, back, day), day)
        if back != 3:  # whose gate was closed, say
            days.publish(day)
    findings = days.look_at(mixed_rows(30))
    assert [(D - day.day).days for day in findings.before] == [1, 2, 4, 5, 6, 7]
    # What was read later, and not published, does not change it; nor do profiles that are missing or damaged.
    days.look_at(mixed_rows(5, 77, D - timedelta(days=1)), D - timedelta(days=1))
    profiles = days.view.path / "profiles"
    (profiles / f"{D - timedelta(days=2)}.json").unlink()
    (profiles / f"{D - timedelta(days=4)}.json").write_text('{"format": 1', encoding="utf-8")
    (profiles / f"{D - timedelta(days=5)}.json").write_text('{"format": 0}', encoding="utf-8")
    again = days.again()
    assert asdict(replace(again, made=findings.made)) == asdict(findings)
    before = {path.name: path.read_bytes() for path in profiles.glob("*.json")}
    days.again()
    assert {path.name: path.read_bytes() for path in profiles.glob("*.json")} == before


def test_a_feature_that_came_later_or_changed_its_type_has_no_reference(tmp_path: Path) -> None:
    day = D - timedelta(days=1)
    days = Days.of(tmp_path, [Field(name="x", dtype=String), Field(name="y", dtype=Int64)])
    days.look_at([{"id": n, "x": "a", "y": n, "at": START, "made": START} for n in range(9)], day)
    days.publish(day)
    fields = [Field(name="x", dtype=Int64), Field(name="y", dtype=Int64), Field(name="z", dtype=Int64)]
    changed = Days(tmp_path, type(days.contract).from_feast(view(features=fields)[1], config(tmp_path)))
    findings = changed.look_at([{"id": n, "x": n, "y": n, "z": n, "at": START, "made": START} for n in range(9)])
    assert [column(findings, name).drift is None for name in "xyz"] == [True, False, True]


def test_rejected_rows_are_shown_by_kind_and_the_first_of_all(tmp_path: Path) -> None:
    days = Days.of(tmp_path, [Field(name="x", dtype=Int64, tags={"ge": "0", "nullable": "false"})])
    rows = [{"id": n, "x": -n if n % 2 else None, "at": START, "made": START} for n in range(1_000)]
    rows += [{"id": None, "x": 1, "at": START, "made": START}]
    findings = days.look_at(rows, max_reject_share=1)
    kinds = Counter((row["reason"], row["field"]) for row in findings.rejects)
    assert kinds == {("null", "x"): 5, ("out_of_range", "x"): 5, ("null", "id"): 1}
    assert [row["row"] for row in findings.rejects if row["reason"] == "out_of_range"] == [1, 3, 5, 7, 9]
    text = check_page(days.folder(D).rejects_page)
    assert text.count("<tr>") == 201
    assert "The first 200 of 1,001" in text
    # No row is kept, and nearly all are rejected.
    assert failed(findings) == [("rows_survive", None, "error")]


def test_the_json_has_the_keys_of_the_documentation(tmp_path: Path) -> None:
    days = Days.of(tmp_path, MIXED)
    for day in (D - timedelta(days=1), D):
        days.look_at(mixed_rows(50, day=day), day)
        days.publish(day)
    documented = (Path(__file__).parents[2] / "docs" / "how-to" / "gate.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+)`", documented.partition("## For machines")[2]))
    missing = _keys(read_strictly(days.folder(D).verdict)) - names
    assert not missing


def _keys(content: Any) -> set[str]:
    """The keys of objects at any depth, but for those that are data: names of columns, reasons, and the like."""
    if isinstance(content, list):
        return set().union(*map(_keys, content))
    if not isinstance(content, dict):
        return set()
    free = {"special", "percentiles", "delay_s"}
    return set(content).union(*(_keys(value) for key, value in content.items() if key not in free))


TIMES = st.lists(st.integers(-40 * 3600, 60 * 3600), max_size=30)


@settings(max_examples=examples(100), deadline=None)
@given(seconds=TIMES)
def test_hours_gaps_and_pauses(seconds: Sequence[int]) -> None:
    times = [START + timedelta(seconds=second) for second in seconds]
    column = pa.chunked_array([pa.array(times, pa.timestamp("us", "UTC"))])
    found = coverage(D, column, column)
    assert found.events == found.arrivals
    assert sum(bar.rows for bar in found.events) == len(times)
    for bar in found.events:
        if bar.label not in {"earlier", "later"}:
            hour = datetime.fromisoformat(bar.label).replace(tzinfo=UTC)
            assert bar.rows == sum(hour <= time < hour + timedelta(hours=1) for time in times)
    inside = sorted(time for time in times if START <= time < START + timedelta(days=1))
    empty = set(range(24)) - {time.hour for time in inside}
    assert found.empty_hours_total == len(empty)
    assert {hour for gap in found.empty_hours for hour in _hours(gap.start, gap.stop)} == empty or len(empty) > 12
    pauses = [b - a for a, b in pairwise(inside)]
    assert (found.longest_pause and found.longest_pause.duration) == (max(pauses) if pauses else None)


def _hours(start: datetime, stop: datetime) -> list[int]:
    return [(start + timedelta(hours=hour)).hour for hour in range(int((stop - start) / timedelta(hours=1)))]


def test_ages_and_delays(tmp_path: Path) -> None:
    days = Days.of(tmp_path, [Field(name="x", dtype=Int64)])
    delays = [-5, 0, 0.5, 3, 3_000, 100_000]
    at = START + timedelta(hours=6)
    rows = [{"id": n, "x": 1, "at": at, "made": at + timedelta(seconds=delay)} for n, delay in enumerate(delays)]
    fresh = days.look_at(rows).freshness
    assert fresh.newest_event == at
    assert fresh.age_at_day_end_s == 18 * 3600
    assert fresh.delay_s == {"p0": -5, "p50": 0.5, "p90": 3_000, "p99": 3_000, "p100": 100_000}
    assert [bar.rows for bar in fresh.delays] == [1, 2, 1, 0, 0, 1, 0, 0, 1]
