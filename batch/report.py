"""What is in a clean day, whether it may pass, and the page that shows both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.folder import DayFolder, read_json, write_json, write_text
from batch.pages import template
from batch.settings import BatchSettings
from headrace.contract import ViewContract

_BINS = 24
_TOP_VALUES = 10
_EXAMPLES = 5
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Check:
    """One condition of the gate. A failed check of severity `error` closes it; a `warning` does not."""

    name: str
    severity: Literal["error", "warning"]
    passed: bool
    found: str
    expected: str


@dataclass(frozen=True)
class Bar:
    """One bar of a plot: its label and how many rows."""

    label: str
    rows: int


@dataclass(frozen=True)
class Column:
    """One column of the clean rows.

    Attributes:
        low, high, mean: of numbers and times; of the lengths, for lists; None where there is no value or no
            order.
        distinct: None where it is not counted (lists).
        plot: bars that cover the column, and what they count: values, a range of them, lengths.
    """

    name: str
    role: Literal["join key", "feature", "event time", "created"]
    type: str
    rows: int
    nulls: int
    distinct: int | None
    low: str | None
    mean: str | None
    high: str | None
    plot: tuple[Bar, ...]
    plot_of: str


@dataclass(frozen=True)
class RuleResult:
    """One rule of the view: how many rows it turned away, and some of them."""

    column: str
    rule: str
    failed: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """All that the report says."""

    view: str
    project: str
    day: date
    window: str
    table: str
    read: datetime
    made: datetime
    counts: dict[str, Any]
    checks: tuple[Check, ...]
    columns: tuple[Column, ...]
    rules: tuple[RuleResult, ...]
    rejects: tuple[dict[str, Any], ...]
    ignored_columns: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the gate is open."""
        return not self.failed("error")

    def failed(self, severity: Literal["error", "warning"]) -> list[Check]:
        """The checks of a severity that did not pass."""
        return [check for check in self.checks if check.severity == severity and not check.passed]


def explore(contract: ViewContract, folder: DayFolder, settings: BatchSettings, day: date) -> Findings:
    """Look at the rows that `Clean` left in a folder, and judge. Reads only."""
    raw = read_json(folder.raw_receipt)
    counts = read_json(folder.clean_receipt)["counts"]
    table = pq.read_table(folder.kept, schema=contract.schema)
    rejects = _sample(folder)
    return Findings(
        view=contract.name,
        project=contract.project,
        day=day,
        window=f"{raw['window']} ({raw['window_column']})",
        table=raw["table"],
        read=datetime.fromtimestamp(raw["read_us"] / 1e6, UTC),
        made=datetime.now(UTC),
        counts=counts,
        checks=tuple(_checks(counts, raw, settings)),
        columns=tuple(_column(contract, table, field) for field in contract.schema),
        rules=tuple(_rules(contract, counts, rejects)),
        rejects=tuple(row for rows in rejects.values() for row in rows),
        ignored_columns=tuple(raw["ignored_columns"]),
    )


def write_report(findings: Findings, folder: DayFolder) -> None:
    """Write the page and, beside it, the same as JSON. Each appears whole."""
    write_json(folder.verdict, {**asdict(findings), "passed": findings.passed})
    write_text(folder.report, template("report.html.j2").render(f=findings, rejects_file=folder.rejects.name))


def _checks(counts: dict[str, Any], raw: dict[str, Any], settings: BatchSettings) -> Iterable[Check]:
    read, kept, rejected = counts["read"], counts["kept"], counts["rejected"]
    accounted = kept + rejected + counts["duplicate_exact"] + counts["duplicate_key_time"] + counts["skipped"]
    yield Check("every row read is accounted for", "error", read == accounted, f"{accounted:,}", f"{read:,}")
    yield Check(
        "the day has rows",
        "warning" if settings.allow_empty_day else "error",
        read > 0,
        f"{read:,} rows",
        "at least 1",
    )
    yield Check(
        "rows survive the rules",
        "error",
        kept > 0 or read == counts["skipped"],
        f"{kept:,} kept",
        "at least 1",
    )
    share = rejected / read if read else 0.0
    yield Check(
        "share of rejected rows",
        "error",
        share <= settings.max_reject_share,
        f"{share:.2%}",
        f"at most {settings.max_reject_share:.2%}",
    )
    lost = raw["rows_of_no_day"]
    yield Check(
        f"every row of the table has a time in {raw['window_column']}",
        "warning",
        lost == 0,
        f"{lost:,} have none",
        "0",
    )


def _rules(
    contract: ViewContract,
    counts: dict[str, Any],
    rejects: dict[tuple[str, str | None], list[dict[str, Any]]],
) -> Iterable[RuleResult]:
    """A line for each type and rule, in the order of the columns; then what concerns whole rows."""
    failed = {(entry["reason"], entry["field"]): entry["rows"] for entry in counts["reasons"]}
    wanted: list[tuple[str, str | None, str]] = []
    for field in contract.schema:
        rule = contract.rule(field.name)
        required = field.name in (*contract.join_keys, contract.timestamp_field) or rule.nullable is False
        is_time = pa.types.is_timestamp(field.type)
        wanted.append(
            ("bad_timestamp", field.name, "is a time") if is_time else ("wrong_type", field.name, f"is {field.type}")
        )
        if required:
            wanted.append(("null", field.name, "is not null"))
        if str(rule):
            wanted.append(("out_of_range", field.name, str(rule)))
        if field.name == contract.timestamp_field:
            wanted.append(("future_event", field.name, "is not in the future"))
    listed = {(reason, name) for reason, name, _ in wanted}
    wanted += [(reason, name, reason.replace("_", " ")) for reason, name in failed if (reason, name) not in listed]
    for reason, name, text in wanted:
        examples = tuple(_shorten(row["message"]) for row in rejects.get((reason, name), []))
        yield RuleResult(name or "(row)", text, failed.get((reason, name), 0), examples)


def _sample(folder: DayFolder) -> dict[tuple[str, str | None], list[dict[str, Any]]]:
    """The first rejected rows of each reason and field."""
    found: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    with pq.ParquetFile(folder.rejects) as file:
        for batch in file.iter_batches():
            keys = batch.select(["reason", "field"]).to_pylist()
            for index, key in enumerate(keys):
                rows = found.setdefault((key["reason"], key["field"]), [])
                if len(rows) < _EXAMPLES:
                    rows.append(batch.slice(index, 1).to_pylist()[0])
    return found


def _column(contract: ViewContract, table: pa.Table, field: pa.Field) -> Column:
    values = table.column(field.name)
    present = values.drop_null()
    kind = field.type
    low = mean = high = None
    distinct: int | None = None
    plot: tuple[Bar, ...] = ()
    plot_of = ""
    if pa.types.is_list(kind):
        lengths = pc.list_value_length(present)
        low, mean, high = _range(lengths)
        plot, plot_of = _histogram(lengths), "length"
    else:
        distinct = pc.count_distinct(values).as_py() if not pa.types.is_nested(kind) else None
        if pa.types.is_timestamp(kind):
            bounds = pc.min_max(present).as_py()
            low, high = (_moment(bounds["min"]), _moment(bounds["max"]))
            plot, plot_of = _histogram(present.cast(pa.int64()), times=True), "time"
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            low, mean, high = _range(present)
            plot, plot_of = _histogram(present), "value"
        elif pa.types.is_string(kind) or pa.types.is_boolean(kind):
            plot, plot_of = _top(present), "value"
    return Column(
        name=field.name,
        role=_role(contract, field.name),
        type=str(kind),
        rows=table.num_rows,
        nulls=values.null_count,
        distinct=distinct,
        low=low,
        mean=mean,
        high=high,
        plot=plot,
        plot_of=plot_of,
    )


def _role(contract: ViewContract, name: str) -> Literal["join key", "feature", "event time", "created"]:
    if name in contract.join_keys:
        return "join key"
    if name == contract.timestamp_field:
        return "event time"
    return "created" if name == contract.created_field else "feature"


def _range(values: pa.ChunkedArray) -> tuple[str | None, str | None, str | None]:
    bounds = pc.min_max(values).as_py()
    mean = pc.mean(values).as_py()
    return _number(bounds["min"]), _number(mean), _number(bounds["max"])


def _histogram(values: pa.ChunkedArray, *, times: bool = False) -> tuple[Bar, ...]:
    """Equal bins over the finite values, half-open but for the last. Few whole numbers get a bar each."""
    numbers = values.to_numpy()
    if not times:
        numbers = numbers[np.isfinite(numbers)]
    if len(numbers) == 0:
        return ()
    low, high = numbers.min().item(), numbers.max().item()
    label = _instant if times else _number
    if low == high:
        return (Bar(str(label(low)), len(numbers)),)
    if isinstance(low, int) and not times and high - low < _BINS:
        rows = np.bincount((numbers - low).astype(np.int64))
        return tuple(Bar(f"{low + step:,}", int(n)) for step, n in enumerate(rows))
    if not math.isfinite(float(high) - float(low)):
        return ()
    # From the lowest on, since neighbouring microseconds since the epoch are no longer distinct as doubles.
    rows, edges = np.histogram((numbers - low).astype(np.float64), bins=_BINS)
    texts = [label(low + (round(edge) if times else float(edge))) for edge in edges]
    return tuple(Bar(f"{texts[i]} to {texts[i + 1]}", int(n)) for i, n in enumerate(rows))


def _top(values: pa.ChunkedArray) -> tuple[Bar, ...]:
    counted = sorted(values.value_counts().to_pylist(), key=lambda entry: (-entry["counts"], str(entry["values"])))
    bars = [Bar(_shorten(str(entry["values"])), entry["counts"]) for entry in counted[:_TOP_VALUES]]
    rest = sum(entry["counts"] for entry in counted[_TOP_VALUES:])
    if rest:
        bars.append(Bar(f"{len(counted) - _TOP_VALUES:,} others", rest))
    return tuple(bars)


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if not math.isfinite(value) else f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _moment(value: datetime | None) -> str | None:
    return None if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def _instant(time_us: float) -> str | None:
    return _moment(datetime.fromtimestamp(time_us / 1e6, UTC))


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
