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

from batch.source import ODD
from headrace.conform import Reject, conform
from headrace.contract import Transform, ViewContract

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
    unique = deduplicate(contract, pa.concat_tables(kept), counts)
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
    table = table.take(indices).combine_chunks()
    same = np.ones(max(table.num_rows - 1, 0), dtype=bool)
    for name in identity:
        column = table.column(name).combine_chunks()
        same &= pc.equal(column[:-1], column[1:]).to_numpy(zero_copy_only=False).astype(bool)
    if not same.any():
        return table
    keep = np.ones(table.num_rows, dtype=bool)
    for first, last in _runs(same):
        rows = table.slice(first, last - first + 1).to_pylist()
        texts = [repr(tuple(row.values())) for row in rows]
        newest = rows[-1][contract.created_field] if contract.created_field is not None else None
        candidates = [
            i for i, row in enumerate(rows) if contract.created_field is None or row[contract.created_field] == newest
        ]
        winner = max(candidates, key=lambda i: (texts[i], -i))
        keep[first : last + 1] = False
        keep[first + winner] = True
        distinct = len(set(texts))
        counts.duplicate_exact += len(rows) - distinct
        counts.duplicate_key_time += distinct - 1
    return table.filter(pa.array(keep))


def _runs(same: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The runs of equal neighbours, as (first row, last row), from `same[i]`: row i equals row i + 1."""
    edges = np.diff(np.concatenate(([False], same, [False])).astype(np.int8))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


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
    rows = table.take(pa.array([reject.row for reject in rejected], pa.int64())).to_pylist()
    records = []
    for row in rows:
        odd = row.pop(ODD)
        records.append(json.dumps({**row, **(json.loads(odd) if odd else {})}, default=str))
    return pa.table(
        {
            "row": [first_row + reject.row for reject in rejected],
            "reason": [reject.reason.value for reject in rejected],
            "field": [reject.field for reject in rejected],
            "message": [reject.message for reject in rejected],
            "record": records,
        },
        schema=REJECTS,
    )
