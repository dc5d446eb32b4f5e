"""A slice of a partition: what one fetch brought, and the check that nothing is missing before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol


class TopicPartition(NamedTuple):
    """A partition of a topic; equal to Faust's and aiokafka's own."""

    topic: str
    partition: int


class Unread(bytes):
    """The value of a record that could not be read: empty, with the reason."""

    reason: str

    @classmethod
    def because(cls, reason: str) -> Unread:
        """A value that was not read for a reason."""
        value = cls()
        value.reason = reason
        return value


class Record(Protocol):
    """What is used of a Kafka record."""

    @property
    def offset(self) -> int:
        """Its offset."""

    @property
    def timestamp(self) -> int:
        """When it was produced, or appended to the log: milliseconds since the epoch."""

    @property
    def key(self) -> bytes | None:
        """Its key, untouched."""

    @property
    def value(self) -> bytes | None:
        """Its value, untouched; None is a tombstone."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """Its headers, in order."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The records of the offsets `[first, next)` of a partition.

    Offsets without a record in that range do not exist in the log (compaction, transaction markers, aborted
    transactions): the fetch that brought the slice began at `first` and ended before `next`.

    Attributes:
        records: ascending by offset; may be empty.
        size: payload bytes, keys and values.
        fetched_s: when it came, on the monotonic clock.
        left: how many offsets the log had behind it then.
    """

    partition: TopicPartition
    first: int
    next: int
    records: Sequence[Record]
    size: int
    fetched_s: float
    left: int = 0

    def from_offset(self, offset: int) -> Slice:
        """The part at and beyond an offset; all of it if the offset lies before, none of it if beyond."""
        if offset <= self.first:
            return self
        first = min(offset, self.next)
        return replace(self, first=first, records=[r for r in self.records if r.offset >= first])


class Position:
    """The offset at which a partition must continue. Belongs to one assignment and is thrown away with it."""

    def __init__(self, start: int) -> None:
        self.expected = start

    def take(self, piece: Slice) -> bool:
        """Whether the slice continues the partition; if so the position moves behind it, else it stays."""
        if piece.first != self.expected or piece.next < piece.first:
            return False
        self.expected = piece.next
        return True
