"""Turn raw rows into rows of the view: `conform`, then no key twice at the same time.

The counts always reconcile: read = kept + rejected + duplicate + skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.sources.odd import ODD
from headrace.conform import Reject, conform
from headrace.contract import Transform, ViewContract

Mask = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]

REJECTS = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("field", pa.string()),
        pa.field("message", pa.string()),
        pa.field("record", pa.string()),
    ]
)
"""Rejected rows: the index in the raw file, why, and the whole raw row as JSON."""


@dataclass
class Counts:
    """What became of the rows read.

    Attributes:
        duplicate_exact: rows equal to one that is kept or to another that is not.
        duplicate_key_time: rows that lost to another with the same key and event time.
        reasons: rejected rows by (reason, field); the field is empty where it is the whole row.
    """

    read: int = 0
    kept: int = 0
    rejected: int = 0
    duplicate_exact: int = 0
    duplicate_key_time: int = 0
    skipped: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def reconciled(self) -> bool:
        """Whether every row read is accounted for exactly once."""
        duplicate = self.duplicate_exact + self.duplicate_key_time
        return self.read == self.kept + self.rejected + duplicate + self.skipped

    def as_json(self) -> dict[str, Any]:
        """For receipts."""
        return {
            "read": self.read,
            "kept": self.kept,
            "rejected": self.rejected,
            "duplicate_exact": self.duplicate_exact,
            "duplicate_key_time": self.duplicate_key_time,
            "skipped": self.skipped,
            "reasons": [
                {"reason": reason, "field": name or None, "rows": rows}
                for (reason, name), rows in self.reasons.most_common()
            ],
        }


def clean(
    contract: ViewContract,
    raw: Path,
    rejects: Path,
    *,
    now_us: int,
    max_future_us: int,
    transform: Transform | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[pa.Table, Counts]:
    """Read a raw file group by group; return the clean rows and write the rejected ones to `rejects`.

    Deterministic: the same rows in any order give the same table, sorted by event time and key. Memory: the
    kept rows of the day, and one row group.

    `now_us` is when the rows were read, `max_future_us` how far ahead of it an event may be dated; `progress`
    is called with rows done and rows in all.
    """
    counts = Counts()
    kept = [contract.schema.empty_table()]
    with pq.ParquetFile(raw) as file, pq.ParquetWriter(rejects, REJECTS, compression="zstd") as writer:
        total = file.metadata.num_rows
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            accepted, rejected, skipped = _conform(contract, table, now_us, max_future_us, transform)
            kept.extend(accepted)
            if rejected:
                writer.write_table(_reject_table(table, rejected, counts.read))
            counts.read += table.num_rows
            counts.rejected += len(rejected)
            counts.skipped += skipped
            counts.reasons.update((reject.reason.value, reject.field or "") for reject in rejected)
            progress(counts.read, total)
    table = pa.concat_tables(kept).combine_chunks()  # in one piece it is sorted and taken in half the time
    kept.clear()
    unique = deduplicate(contract, table, counts)
    counts.kept = unique.num_rows
    return unique, counts


def deduplicate(contract: ViewContract, table: pa.Table, counts: Counts) -> pa.Table:
    """Of the rows with the same key and event time keep the newest created; count the others.

    A missing created time is the lowest. What is still equal is decided by the values themselves, so that
    the order of the input never matters.

    Returns:
        The rows left, sorted by event time, then key.
    """
    if table.num_rows == 0:
        return table
    identity = [contract.timestamp_field, *contract.join_keys]
    order = [*identity, *([contract.created_field] if contract.created_field is not None else [])]
    indices = pc.sort_indices(table, sort_keys=[(name, "ascending", "at_start") for name in order])
    table = table.take(indices)
    same = np.ones(max(table.num_rows - 1, 0), dtype=bool)
    for name in identity:
        column = table.column(name)
        same &= pc.equal(column[:-1], column[1:]).to_numpy()
    if not same.any():
        return table
    alike = np.flatnonzero(np.concatenate(([False], same)) | np.concatenate((same, [False])))
    # The number of the run of equal neighbours that a row belongs to; a run starts where a row differs from the last.
    runs = np.cumsum(np.concatenate(([True], ~same)))[alike]
    is_kept, distinct = _winners(contract, table.take(alike), runs)
    keep = np.ones(table.num_rows, dtype=bool)
    keep[alike] = is_kept
    counts.duplicate_exact += len(alike) - distinct
    counts.duplicate_key_time += distinct - int(np.count_nonzero(is_kept))
    return table.filter(pa.array(keep))


def _winners(contract: ViewContract, rows: pa.Table, runs: Int64s) -> tuple[Mask, int]:
    """Which row of each run stays, and how many distinct rows there are.

    Args:
        rows: those of runs of the same key and time, a run's rows together, by ascending created time.
        runs: the number of each row's run.
    """
    codes = {name: _codes(rows.column(name)) for name in rows.column_names}
    every = [runs, *(part for parts in codes.values() for part in parts)]
    order = np.lexsort(every[::-1])
    is_new = np.append(True, np.logical_or.reduce([part[order][1:] != part[order][:-1] for part in every]))
    numbers = np.empty(len(runs), dtype=np.int64)
    numbers[order] = np.cumsum(is_new)  # rows have the same number if they are equal
    is_last = np.append(runs[1:] != runs[:-1], True)
    last = np.flatnonzero(is_last)[np.cumsum(is_last) - is_last]
    created = codes[contract.created_field] if contract.created_field is not None else []
    is_newest = np.logical_and.reduce([part == part[last] for part in created], initial=True)
    is_tied = np.isin(runs, runs[is_newest & (numbers != numbers[last])]) & is_newest
    is_kept = is_last & ~np.isin(runs, runs[is_tied])
    is_kept[_greatest(rows, runs, np.flatnonzero(is_tied))] = True
    return is_kept, int(np.count_nonzero(is_new))


def _greatest(rows: pa.Table, runs: Int64s, tied: Int64s) -> list[int]:
    """Of the rows that are equally new the one of each run whose values, written out, are the greatest."""
    best: dict[int, tuple[str, int]] = {}
    for row, values in zip(tied.tolist(), rows.take(tied).to_pylist(), strict=True):
        run, text = int(runs[row]), repr(tuple(values.values()))
        if run not in best or text > best[run][0]:
            best[run] = (text, row)
    return [row for _, row in best.values()]


def _codes(column: pa.ChunkedArray) -> list[Int64s]:
    """One or two numbers for each value, the same for equal ones alone; NaN equals NaN, and null null."""
    kind = column.type
    if pa.types.is_floating(kind):
        numbers = column.cast(pa.float64()).fill_null(0.0).to_numpy()
        codes = np.where(np.isnan(numbers), np.nan, numbers).view(np.int64)
    elif pa.types.is_integer(kind) or pa.types.is_timestamp(kind) or pa.types.is_boolean(kind):
        codes = column.cast(pa.int64()).fill_null(0).to_numpy()
    else:
        is_text = pa.types.is_string(kind) or pa.types.is_binary(kind)
        texts = column if is_text else pa.chunked_array([[repr(value) for value in column.to_pylist()]])
        codes = texts.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    return [codes, column.is_valid().to_numpy().astype(np.int64)] if column.null_count else [codes]


def _conform(
    contract: ViewContract, table: pa.Table, now_us: int, max_future_us: int, transform: Transform | None
) -> tuple[list[pa.Table], list[Reject], int]:
    """Conform the rows of a group; those with odd values apart, grouped by which columns are odd."""
    odd = table.column(ODD).combine_chunks()
    table = table.drop_columns([ODD])
    groups: dict[tuple[str, ...], list[int]] = {}
    values: dict[int, dict[str, str]] = {}
    for row in np.flatnonzero(odd.is_valid().to_numpy(zero_copy_only=False)).tolist():
        values[row] = json.loads(odd[row].as_py())
        groups.setdefault(tuple(sorted(values[row])), []).append(row)
    if not groups:
        plain = conform(contract, table, now_us=now_us, max_future_us=max_future_us, transform=transform)
        return [plain.table], plain.rejects, len(plain.skipped)
    parts = [((), np.flatnonzero(odd.is_null().to_numpy(zero_copy_only=False)).tolist()), *groups.items()]
    accepted: list[pa.Table] = []
    rejected: list[Reject] = []
    skipped = 0
    for columns, rows in parts:
        part = table.take(pa.array(rows, pa.int64()))
        for name in columns:
            index = part.schema.get_field_index(name)
            part = part.set_column(index, name, _as_found(part.schema.field(index), [values[r][name] for r in rows]))
        result = conform(contract, part, now_us=now_us, max_future_us=max_future_us, transform=transform)
        accepted.append(result.table)
        rejected += [Reject(rows[r.row], r.reason, r.field, r.message) for r in result.rejects]
        skipped += len(result.skipped)
    return accepted, sorted(rejected, key=lambda reject: reject.row), skipped


def _as_found(column: pa.Field, texts: list[str]) -> pa.Array:
    """Odd values as a column that `conform` takes for none: text, or bytes where text is expected.

    Where a time is expected text is what `conform` reads, and judges.
    """
    if pa.types.is_string(column.type):
        return pa.array([text.encode() for text in texts], pa.binary())
    return pa.array(texts, pa.string())


def _reject_table(table: pa.Table, rejected: list[Reject], first_row: int) -> pa.Table:
    rows = table.take(pa.array([reject.row for reject in rejected], pa.int64()))
    return pa.table(
        {
            "row": [first_row + reject.row for reject in rejected],
            "reason": [reject.reason.value for reject in rejected],
            "field": [reject.field for reject in rejected],
            "message": [reject.message for reject in rejected],
            "record": _records(rows),
        },
        schema=REJECTS,
    )


def _records(rows: pa.Table) -> pa.Array:
    """Each row as a JSON object, with its odd values in their columns. What JSON does not have is text."""
    names = [name for name in rows.column_names if name != ODD]
    odd = rows.column(ODD).combine_chunks()
    notes = {row: json.loads(odd[row].as_py()) for row in np.flatnonzero(odd.is_valid().to_numpy(zero_copy_only=False))}
    parts: list[pa.Array | str] = []
    for name in names:
        values = _as_json(rows.column(name).combine_chunks())
        found = {row: json.dumps(note[name]) for row, note in notes.items() if name in note}
        if found:
            mask = np.zeros(len(values), dtype=bool)
            mask[list(found)] = True
            values = pc.replace_with_mask(values, mask, pa.array([found[row] for row in sorted(found)], pa.string()))
        parts += [("{" if not parts else ", ") + json.dumps(name) + ": ", values]
    return pc.binary_join_element_wise(*parts, "}", "")


def _as_json(values: pa.Array) -> pa.Array:
    """The JSON of each value."""
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        texts = values.cast(pa.string())
    elif pa.types.is_floating(kind):
        texts = values.cast(pa.string())
        texts = pc.if_else(pc.is_finite(values), texts, _quoted(texts))
    elif pa.types.is_timestamp(kind):
        texts = _quoted(values.cast(pa.string()))
    elif pa.types.is_string(kind) and not pc.any(pc.match_substring_regex(values, _NEEDS_ESCAPE)).as_py():
        texts = _quoted(values)
    else:
        texts = pa.array([json.dumps(value, default=str) for value in values.to_pylist()], pa.string())
    return texts.fill_null("null")


_NEEDS_ESCAPE = r"[^ !#-\[\]-~]"


def _quoted(texts: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise('"', texts, '"', "")
