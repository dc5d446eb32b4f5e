"""Records of Kafka as aiokafka reads them, but for three things.

- It makes a second object of each record, which nothing here needs and which costs more than all else of a fetch.
- Kafka and its C clients take any bytes for the name of a header. aiokafka fails on what is no UTF-8, and would fail
  again after each start: one record would stop its partition for good.
- It unpacks a compressed batch whatever its size: a megabyte may hold gigabytes.

Replaced here are `MemoryRecords` and `PartitionRecords` of aiokafka 0.14's fetcher, and the decoders of its compiled
batches; `tests/streaming/test_transport.py` holds them to what is used.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cramjam
import numpy as np
from aiokafka.consumer import fetcher
from aiokafka.record import default_records, memory_records

from streaming.slices import Unread

_LENGTH = struct.Struct(">8xi")
_OVERHEAD = _LENGTH.size
_HEAD = struct.Struct(">q15xi8xq14xi")
"""Of a batch of format 2: the first offset, the last one's distance, the last timestamp, how many records."""

_USUAL_RATIO = 16
_LEAST_ROOM = 1 << 16


def install(most_unpacked_bytes: int) -> None:
    """Let aiokafka read by what is here, in this process, and unpack no batch to more bytes than this."""
    fetcher.MemoryRecords = Records
    fetcher.PartitionRecords = ParsedRecords
    module = importlib.import_module(default_records.DefaultRecordBatch.__module__)
    for name in ("gzip", "lz4", "zstd"):  # snappy's ratio is small
        setattr(module, f"{name}_decode", Unpacker(getattr(cramjam, name), most_unpacked_bytes))


class TooLargeError(Exception):
    """A batch would unpack to more than may be."""


@dataclass(frozen=True)
class Unpacker:
    """Unpacks a batch into bounded memory."""

    codec: Any
    most: int

    def __call__(self, packed: bytes) -> bytes:
        """The bytes that were packed.

        Raises:
            TooLargeError: they are more than may be.
        """
        for room in (min(self.most, max(_USUAL_RATIO * len(packed), _LEAST_ROOM)), self.most):
            target = np.empty(room, np.uint8)
            try:
                return target[: self.codec.decompress_into(packed, target)].tobytes()
            except cramjam.DecompressionError as error:
                if "whole buffer" not in str(error):
                    raise
        msg = f"its batch of {len(packed)} bytes unpacks to more than {self.most} (HEADRACE_IN_FLIGHT_BYTES)"
        raise TooLargeError(msg)


@dataclass(frozen=True)
class UnreadRecord:
    """A record of which no more is known than that it is there."""

    offset: int
    timestamp: int
    value: Unread
    key: None = None
    headers: tuple[()] = ()


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
        except TooLargeError as error:
            first, distance, timestamp, count = _HEAD.unpack_from(self._data)
            for offset in range(first, first + min(count, distance + 1)):
                yield UnreadRecord(offset, timestamp, Unread.because(str(error)))
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
