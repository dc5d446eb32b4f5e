"""Records of Kafka as aiokafka reads them, but as they were parsed, and also where a header's name is no UTF-8.

Kafka and its C clients take any bytes for a name. aiokafka fails on them, and would fail again after each start: one
record would stop its partition for good. And it makes a second object of each record, which nothing here needs and
which costs more than all else of a fetch. Replaced here are `MemoryRecords` and `PartitionRecords` of aiokafka 0.14's
fetcher; `tests/streaming/test_transport.py` holds them to what is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record import default_records, memory_records

_LENGTH = struct.Struct(">8xi")
_OVERHEAD = _LENGTH.size


class ParsedRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of a fetch as they were parsed: they are all that `streaming.slices.Record` asks for."""

    def _consumer_record(self, tp: Any, record: Any) -> Any:
        return record


class Records:
    """The batches of a fetch."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._batches = memory_records.MemoryRecords(data)
        self._place = 0

    def size_in_bytes(self) -> int:
        """Of the fetch, in bytes."""
        return len(self._data)

    def has_next(self) -> bool:
        """Whether a whole batch is left."""
        return bool(self._batches.has_next())

    def next_batch(self) -> Batch | None:
        """The next batch; None where no whole one is left."""
        batch = self._batches.next_batch()
        start = self._place
        if batch is None:
            return None
        self._place += _OVERHEAD + _LENGTH.unpack_from(self._data, start)[0]
        return Batch(batch, memoryview(self._data)[start : self._place])


class Batch:
    """A batch of aiokafka's, with its bytes at hand."""

    def __init__(self, batch: Any, data: memoryview) -> None:
        self._batch = batch
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        """Its records; those before the faulty one may come twice, and the fetcher leaves them out."""
        try:
            yield from self._batch
        except UnicodeDecodeError:
            again: Any = default_records._DefaultRecordBatchPy(self._data)
            again._maybe_uncompress()
            again._buffer = _Lenient(again._buffer)
            yield from again


class _Lenient(bytearray):
    """Bytes whose pieces can be decoded: what is no UTF-8 in them becomes U+FFFD."""

    def __getitem__(self, place: Any) -> Any:
        piece = super().__getitem__(place)
        return _Lenient(piece) if isinstance(place, slice) else piece

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, "replace" if errors == "strict" else errors)
