"""What becomes of records: decode, transform, cast, apply the rules. One place, for the stream and for replays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from headrace.conform import Reason, Reject, Rows, conform
from streaming.formats import Decoder
from streaming.settings import View
from streaming.slices import Unread


@dataclass(frozen=True)
class Judged:
    """Every record is accepted, rejected or skipped.

    Attributes:
        table: the accepted rows in the contract's schema, in record order.
        rows: the index of the record of each row, ascending.
        rejects: one per bad record, `row` being its index. Ascending.
        skipped: how many were tombstones, or left out by the transformation.
    """

    table: pa.Table
    rows: Rows
    rejects: list[Reject]
    skipped: int


def judge(view: View, decoder: Decoder, values: Sequence[bytes | None], max_skew_seconds: float) -> Judged:
    """Judge the values of records. Pure but for the clock and what the decoder asks; never raises for what they hold.

    Raises:
        TransientError: as the decoder raises it.
    """
    if any(isinstance(value, Unread) for value in values):
        return _without_unread(view, decoder, values, max_skew_seconds)
    decoded = decoder(values)
    conformed = conform(
        view.contract,
        decoded.table,
        now_us=time.time_ns() // 1000,
        max_future_us=int(max_skew_seconds * 1e6),
        transform=view.transform,
    )
    found = [Reject(int(decoded.rows[r.row]), r.reason, r.field, r.message) for r in conformed.rejects]
    return Judged(
        conformed.table,
        decoded.rows[conformed.rows],
        sorted([*decoded.rejects, *found], key=lambda reject: reject.row),
        len(decoded.skipped) + len(conformed.skipped),
    )


def _without_unread(view: View, decoder: Decoder, values: Sequence[bytes | None], max_skew_seconds: float) -> Judged:
    """The same where some values could not be read: those are bad."""
    unread = {row: value for row, value in enumerate(values) if isinstance(value, Unread)}
    read = [row for row in range(len(values)) if row not in unread]
    judged = judge(view, decoder, [values[row] for row in read], max_skew_seconds)
    found = [replace(reject, row=read[reject.row]) for reject in judged.rejects]
    found += [Reject(row, Reason.UNDECODABLE, None, value.reason) for row, value in unread.items()]
    rows = np.array(read, dtype=np.int64)[judged.rows]
    return Judged(judged.table, rows, sorted(found, key=lambda reject: reject.row), judged.skipped)
