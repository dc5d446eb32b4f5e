"""What was fetched of a partition, and the columns that it became."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.conform import Reject
from streaming.deadletters import Letter
from streaming.judgement import Judged
from streaming.slices import Record, Slice, TopicPartition

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fetched:
    """Slices of a partition that follow each other, for a view.

    Attributes:
        epoch, topic_id: of the assignment.
        records: of all slices.
    """

    view: str
    partition: TopicPartition
    epoch: int
    topic_id: str | None
    pieces: Sequence[Slice]
    records: Sequence[Record]


@dataclass
class Batch:
    """Records of `[first, next)` of a partition on their way."""

    epoch: int
    partition: int
    first: int
    next: int
    table: pa.Table
    offsets: Int64s
    produced_ms: Int64s
    letters: list[Letter]
    skipped: int
    size: int
    fetched_s: float
    rejected: int = 0
    servers: tuple[str, ...] = ()
    left: int = 0

    @classmethod
    def merge(cls, batches: Sequence[Batch]) -> Batch:
        """Several batches that follow each other, as one. The oldest server ids stay, which is the safe choice."""
        if len(batches) == 1:
            return batches[0]
        return cls(
            epoch=batches[0].epoch,
            partition=batches[0].partition,
            first=batches[0].first,
            next=batches[-1].next,
            table=pa.concat_tables([b.table for b in batches]),
            offsets=np.concatenate([b.offsets for b in batches]),
            produced_ms=np.concatenate([b.produced_ms for b in batches]),
            letters=[],
            skipped=sum(b.skipped for b in batches),
            size=sum(b.size for b in batches),
            fetched_s=batches[0].fetched_s,
            rejected=sum(b.rejected for b in batches),
            servers=batches[0].servers,
            left=batches[-1].left,
        )


@dataclass
class Gathering:
    """Batches that are online and wait to be appended together."""

    batches: list[Batch] = field(default_factory=list)
    rows: int = 0
    size: int = 0

    def add(self, batch: Batch) -> None:
        """Add the batch that follows."""
        if self.batches and self.batches[-1].next != batch.first:
            msg = f"batch {batch.first} does not follow {self.batches[-1].next}"
            raise AssertionError(msg)
        self.batches.append(batch)
        self.rows += batch.table.num_rows
        self.size += batch.size

    def wait_s(self, now_s: float, append_seconds: float) -> float | None:
        """How long the append may wait; None for ever."""
        if not self.batches:
            return None
        return max(0.0, self.batches[0].fetched_s + append_seconds - now_s)


def batches_of(fetched: Sequence[Fetched], judged: Judged) -> list[Batch]:
    """What was judged together, a batch for each partition.

    Args:
        judged: of the records of all, one after the other.
    """
    batches = []
    first = 0
    reject_rows = [reject.row for reject in judged.rejects]
    for one in fetched:
        last = first + len(one.records)
        rejects = judged.rejects[bisect_left(reject_rows, first) : bisect_left(reject_rows, last)]
        batches.append(_batch_of(one, judged, first, last, rejects, is_alone=len(fetched) == 1))
        first = last
    return batches


def _batch_of(
    fetched: Fetched, judged: Judged, first: int, last: int, rejects: Sequence[Reject], *, is_alone: bool
) -> Batch:
    """The batch of the records `[first, last)` of those that were judged, `rejects` being theirs."""
    begin, end = np.searchsorted(judged.rows, (first, last)).tolist()
    rows = judged.rows[begin:end] - first
    # A slice would keep the columns of all in memory for as long as it waits.
    table = judged.table if is_alone else judged.table.take(pa.array(np.arange(begin, end)))
    records, pieces = fetched.records, fetched.pieces
    offsets = np.fromiter((record.offset for record in records), np.int64, len(records))
    produced = np.fromiter((record.timestamp or 0 for record in records), np.int64, len(records))
    origin = (fetched.view, fetched.partition, fetched.topic_id)
    return Batch(
        epoch=fetched.epoch,
        partition=fetched.partition.partition,
        first=pieces[0].first,
        next=pieces[-1].next,
        table=table,
        offsets=offsets[rows],
        produced_ms=produced[rows],
        letters=[Letter(*origin, records[reject.row - first], reject) for reject in rejects],
        skipped=len(records) - len(rows) - len(rejects),
        size=sum(piece.size for piece in pieces),
        fetched_s=pieces[0].fetched_s,
        rejected=len(rejects),
        left=pieces[-1].left,
    )
