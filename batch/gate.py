"""Whether a day may pass: the checks of the day, and the rules of its rows. docs/how-to/gate.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.columns import Column
from batch.coverage import Freshness
from batch.folder import DayFolder
from batch.settings import BatchSettings
from headrace.conform import broken, must_not_be_null
from headrace.contract import ViewContract
from headrace.rules import Rule, Severity

EXAMPLES = 5
_SHOWN_CHARACTERS = 80

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Check:
    """One condition of the gate. A failed check of severity `error` closes it; a `warning` does not.

    Attributes:
        kind: which check it is, for machines.
        column: what it is about; None where it is the whole day.
        name, found, expected: for people.
    """

    kind: str
    column: str | None
    name: str
    severity: Severity
    passed: bool
    found: str
    expected: str


@dataclass(frozen=True)
class RuleResult:
    """One rule for rows: how many broke it, and some of them.

    Attributes:
        column: None for what concerns whole rows.
        rejected: whether rows that break it were rejected; else they were kept, and warned of.
        failed: rows that broke it; a rejected row counts for the first rule that it broke.
        examples: what was found, each text once.
    """

    column: str | None
    rule: str
    rejected: bool
    failed: int
    examples: tuple[str, ...]


def checks(
    contract: ViewContract,
    settings: BatchSettings,
    counts: Mapping[str, Any],
    lost_rows: int | None,
    window_column: str | None,
    columns: Sequence[Column],
    fresh: Freshness,
    rules: Sequence[RuleResult],
) -> Iterable[Check]:
    """Every check of a day: those of its counts, those of the view's tags, and the rules whose severity is a warning.

    Args:
        lost_rows: rows of the source without a time in the window's column, which no day reads; None if not known.
    """
    yield from _count_checks(settings, counts)
    if lost_rows is not None:
        name = f"every row of the table has a time in {window_column}"
        yield Check("dated", None, name, Severity.WARNING, lost_rows == 0, f"{lost_rows:,} have none", "0")
    yield from _day_checks(contract, counts["kept"], fresh)
    for column in columns:
        yield from _column_checks(contract.rule(column.name), column)
    for rule in rules:
        if not rule.rejected:
            name = f"{rule.column} {rule.rule}"
            yield Check("rule", rule.column, name, Severity.WARNING, not rule.failed, f"{rule.failed:,} rows", "0")


def _count_checks(settings: BatchSettings, counts: Mapping[str, Any]) -> Iterable[Check]:
    read, kept, rejected, skipped = counts["read"], counts["kept"], counts["rejected"], counts["skipped"]
    accounted = kept + rejected + counts["duplicate_exact"] + counts["duplicate_key_time"] + skipped
    error, is_empty = Severity.ERROR, Severity.WARNING if settings.allow_empty_day else Severity.ERROR
    share = rejected / read if read else 0.0
    is_low = share <= settings.max_reject_share
    most = f"at most {settings.max_reject_share:.2%}"
    name = "every row read is accounted for"
    yield Check("reconciled", None, name, error, read == accounted, f"{accounted:,}", f"{read:,}")
    yield Check("has_rows", None, "the day has rows", is_empty, read > 0, f"{read:,} rows", "at least 1")
    is_left = kept > 0 or read == skipped
    yield Check("rows_survive", None, "rows survive the rules", error, is_left, f"{kept:,} kept", "at least 1")
    yield Check("reject_share", None, "share of rejected rows", error, is_low, f"{share:.2%}", most)


def _day_checks(contract: ViewContract, kept: int, fresh: Freshness) -> Iterable[Check]:
    rows, hours = contract.day_rules.min_rows, contract.day_rules.max_age_hours
    if rows is not None:
        least = f"at least {rows.bound:,.0f}"
        yield Check("min_rows", None, "rows kept", rows.severity, kept >= rows.bound, f"{kept:,}", least)
    if hours is not None:
        age_s = fresh.age_at_day_end_s
        yield Check(
            "max_age_hours",
            None,
            "newest event before the day's end",
            hours.severity,
            age_s is not None and age_s <= hours.bound * 3600,
            "no event" if age_s is None else f"{age_s / 3600:,.2f} h",
            f"at most {hours.bound:g} h",
        )


def _column_checks(rule: Rule, column: Column) -> Iterable[Check]:
    nulls, psi, drift = rule.max_null_share, rule.max_psi, column.drift
    if nulls is not None:
        yield Check(
            "max_null_share",
            column.name,
            f"null in {column.name}",
            nulls.severity,
            column.null_share <= nulls.bound,
            f"{100 * column.null_share:.4g}%",
            f"at most {100 * nulls.bound:g}%",
        )
    if psi is not None and drift is not None:
        found = f"PSI {drift.psi:.3f}"
        if drift.psi > psi.bound and drift.psi <= drift.chance:
            found += f", but up to {drift.chance:.3f} may be chance on {drift.rows:,} rows"
        yield Check(
            "max_psi",
            column.name,
            f"{column.name} is as on the days before",
            psi.severity,
            not drift.exceeds(psi.bound),
            found,
            f"at most {psi.bound:g}",
        )


def rule_results(
    contract: ViewContract,
    counts: Mapping[str, Any],
    rejects: Mapping[tuple[str, str | None], Sequence[Mapping[str, Any]]],
    column: Callable[[str], pa.ChunkedArray],
) -> Iterable[RuleResult]:
    """A line for each type and rule, in the order of the columns; then what concerns whole rows.

    Args:
        rejects: the first rejected rows of each reason and field.
        column: gives a column of the kept rows.
    """
    failed = {(entry["reason"], entry["field"]): entry["rows"] for entry in counts["reasons"]}
    wanted = list(_rejecting(contract))
    listed = {(reason, name) for reason, name, _ in wanted}
    wanted += [(reason, name, reason.replace("_", " ")) for reason, name in failed if (reason, name) not in listed]
    for reason, name, text in wanted:
        examples = tuple(dict.fromkeys(shorten(row["message"]) for row in rejects.get((reason, name), [])))
        yield RuleResult(name, text, True, failed.get((reason, name), 0), examples)
    for field in contract.schema:
        rule = contract.rule(field.name)
        if rule.severity is Severity.WARNING:
            yield from _warnings(contract, rule, column)


def first_rejects(folder: DayFolder) -> dict[tuple[str, str | None], list[dict[str, Any]]]:
    """The first `EXAMPLES` rejected rows of each reason and field. Memory: some columns of one row group."""
    found: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    with pq.ParquetFile(folder.rejects) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["reason", "field"])
            kinds = table.group_by(["reason", "field"]).aggregate([]).to_pylist()
            wanted: list[int] = []
            for kind in kinds:
                key = (kind["reason"], kind["field"])
                lacking = EXAMPLES - len(found.setdefault(key, []))
                same = pc.and_(
                    pc.equal(table["reason"], key[0]), pc.equal(pc.fill_null(table["field"], ""), key[1] or "")
                )
                wanted += np.flatnonzero(same.to_numpy())[:lacking].tolist()
            if wanted:
                for row in file.read_row_group(group).take(sorted(wanted)).to_pylist():
                    found[row["reason"], row["field"]].append(row)
    return found


def shorten(text: str, characters: int = _SHOWN_CHARACTERS) -> str:
    """A text for a page, cut where it is too long."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _rejecting(contract: ViewContract) -> Iterable[tuple[str, str | None, str]]:
    """Reason, column and text of each rule whose breach rejects a row."""
    for field in contract.schema:
        rule, name = contract.rule(field.name), field.name
        is_error = rule.severity is Severity.ERROR
        is_time = pa.types.is_timestamp(field.type)
        yield ("bad_timestamp", name, "is a time") if is_time else ("wrong_type", name, f"is {field.type}")
        if must_not_be_null(contract, name) or (rule.nullable is False and is_error):
            yield "null", name, "is not null"
        if str(rule) and is_error:
            yield "out_of_range", name, str(rule)
        if name == contract.timestamp_field:
            yield "future_event", name, "is not in the future"


def _warnings(contract: ViewContract, rule: Rule, column: Callable[[str], pa.ChunkedArray]) -> Iterable[RuleResult]:
    """What the kept rows break of a rule whose severity is a warning."""
    values = column(rule.column).combine_chunks()
    if rule.nullable is False and not must_not_be_null(contract, rule.column):
        yield _warned(contract, rule.column, "is not null", values.is_null().to_numpy(zero_copy_only=False), column)
    bad = broken(values, rule)
    if bad is not None:
        yield _warned(contract, rule.column, str(rule), bad, column)


def _warned(
    contract: ViewContract, name: str, text: str, bad: Mask, column: Callable[[str], pa.ChunkedArray]
) -> RuleResult:
    rows = np.flatnonzero(bad)[:EXAMPLES].tolist()
    shown = (name, *contract.join_keys, contract.timestamp_field)
    values = {key: column(key).take(rows).to_pylist() for key in dict.fromkeys(shown)} if rows else {}
    examples = tuple(
        ", ".join(f"{key} {shorten(str(values[key][index]), 40)}" for key in values) for index in range(len(rows))
    )
    return RuleResult(name, text, False, int(np.count_nonzero(bad)), examples)
