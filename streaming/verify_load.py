"""The load of a verification: events of one view, and an account of all that the broker took."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streaming.emit import CHUNK, Made, Maker, Plan, Sender
from streaming.settings import StreamConfig

Origin = tuple[int, int]
"""Partition and offset."""

_PARTITION_BITS = 48
_ROWS_A_BATCH = 5000


def place_of(partition: int, offset: int) -> int:
    """Partition and offset in one number, which orders as they do."""
    return (partition << _PARTITION_BITS) | offset


def places(partition: int, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same of many offsets."""
    return np.int64(place_of(partition, 0)) | offsets


def origin(place: int) -> Origin:
    """Partition and offset of such a number."""
    return place >> _PARTITION_BITS, place & ((1 << _PARTITION_BITS) - 1)


@dataclass(frozen=True)
class Sent:
    """What the broker took.

    Attributes:
        rows: the good events, in the view's schema; a doubled one is there twice.
        places: of each row, see `places`.
        bad: the payloads of the bad events.
        ends: by partition the offset after the last one taken; 0 where nothing was.
    """

    rows: pa.Table
    places: npt.NDArray[np.int64]
    bad: Mapping[Origin, bytes]
    ends: Mapping[int, int]

    @property
    def count(self) -> int:
        """How many messages."""
        return len(self.places) + len(self.bad)

    def counts(self) -> Mapping[int, int]:
        """How many messages by partition."""
        counted = Counter((self.places >> _PARTITION_BITS).tolist()) + Counter(partition for partition, _ in self.bad)
        return {partition: counted[partition] for partition in self.ends}


class Load:
    """Sends events at a rate and remembers them: decoded, in columns, some 100 bytes each.

    Args:
        config: of a repository with one topic and one view.
    """

    def __init__(self, config: StreamConfig, plan: Plan, partitions: int) -> None:
        topic, (view,) = next(iter(config.views.items()))
        self._schema = view.contract.schema
        self._plan = plan
        self._maker = Maker([view.contract], plan)
        self._sender = Sender(config, topic, self._take)
        self._made = 0
        self._waiting: list[tuple[int, bytes]] = []
        self._batches: list[pa.RecordBatch] = []
        self._places = array("q")
        self._bad: dict[Origin, bytes] = {}
        self.ends = dict.fromkeys(range(partitions), 0)

    @property
    def taken(self) -> int:
        """How many messages the broker has taken so far."""
        return len(self._places) + len(self._waiting) + len(self._bad)

    def send_due(self, elapsed_s: float) -> None:
        """Send what is due after so many seconds."""
        while (due := int(elapsed_s * self._plan.rate) - self._made) > 0:
            size = min(due, CHUNK)
            for made in self._maker.make(size, datetime.now(UTC)):
                self._sender.send(made)
            self._made += size
        self._sender.poll()

    def finish(self) -> Sent:
        """Wait until the broker has everything.

        Raises:
            TransientError: it does not take all.
        """
        self._sender.finish()
        self._settle()
        rows = pa.Table.from_batches(self._batches, self._schema)
        return Sent(rows, np.array(self._places, dtype=np.int64), self._bad, self.ends)

    def _take(self, made: Made, partition: int, offset: int) -> None:
        self.ends[partition] = max(self.ends[partition], offset + 1)
        if made.fault is not None:
            self._bad[partition, offset] = made.value
            return
        self._waiting.append((place_of(partition, offset), made.value))
        if len(self._waiting) == _ROWS_A_BATCH:
            self._settle()

    def _settle(self) -> None:
        """Decode what waits. By the standard library: the worker's own decoding is what is looked at."""
        events = [json.loads(value) for _, value in self._waiting]
        for event in events:
            event.update((name, datetime.fromisoformat(event[name])) for name in self._maker.times)
        self._batches.append(pa.RecordBatch.from_pylist(events, self._schema))
        self._places.extend(place for place, _ in self._waiting)
        self._waiting.clear()
