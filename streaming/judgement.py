"""What becomes of records: decode, transform, cast, apply the rules. One place, for the stream and for replays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from headrace.conform import Reject, Rows, conform
from streaming.formats import Decoder
from streaming.settings import View


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
