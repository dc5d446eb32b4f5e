"""Data for the benchmarks of the stores: seeded, columnar, the same rows for both sides."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peers import CREATED, KEY, TIME
from headrace.chains import StreamLedger
from headrace.contract import ViewContract
from headrace.segments import Footer, SegmentName, columns_id, encode_ranges, stream_chain, time_bounds

TOPIC = "events"
END = datetime(2026, 1, 1, tzinfo=UTC)
START = END - timedelta(days=30)
_SPAN_US = (END - START) // timedelta(microseconds=1)
_WORDS = 1_000
_FIRST_OF_MANY = 10**9
"""Where the chains of `write_many` go on, so that every position has ten digits."""


def make_rows(contract: ViewContract, count: int, keys: int, *, seed: int) -> pa.Table:
    """Rows in the contract's schema, ascending in time over `START` to `END`.

    As many keys as rows: each key once. Else keys at random.
    """
    random = np.random.default_rng(seed)
    times = np.sort(random.integers(0, _SPAN_US, count)) + int(START.timestamp()) * 1_000_000
    columns = {
        KEY: pa.array(random.permutation(keys) if keys == count else random.integers(0, keys, count)),
        TIME: pa.array(times, pa.timestamp("us", tz="UTC")),
        CREATED: pa.array(times + 1_000_000, pa.timestamp("us", tz="UTC")),
    }
    for name in contract.features:
        columns[name] = _values(random, contract.schema.field(name).type, count)
    return pa.table({field.name: columns[field.name].cast(field.type) for field in contract.schema})


def make_entities(count: int, keys: int, *, seed: int) -> pa.Table:
    """Rows of an entity frame: keys and times at random over the same span."""
    random = np.random.default_rng(seed)
    times = random.integers(0, _SPAN_US, count) + int(START.timestamp()) * 1_000_000
    return pa.table(
        {
            KEY: pa.array(random.integers(0, keys, count)),
            "event_timestamp": pa.array(times, pa.timestamp("us", tz="UTC")),
        }
    )


def write_history(contract: ViewContract, rows: pa.Table, file: Path, *, segments: int) -> None:
    """Write the same rows as segments of one partition, appended as the stream does, and as one file for stock."""
    ledger = StreamLedger(contract, TOPIC, 0)
    for first, piece in _pieces(rows, segments):
        next_first = first + piece.num_rows
        ledger.append(0, first, next_first, piece, accepted=np.arange(first, next_first))
    pq.write_table(rows, file)


def write_small_appends(contract: ViewContract, rows: pa.Table, *, partitions: int, appends: int) -> None:
    """Write rows as a stream of small appends leaves them, the partitions in turn; without fsync, to be quick."""
    contract.directory.mkdir(parents=True, exist_ok=True)
    ends = [0] * partitions
    for number, (_, piece) in enumerate(_pieces(rows, partitions * appends)):
        partition = number % partitions
        first = ends[partition]
        ends[partition] = first + piece.num_rows
        name = SegmentName(stream_chain(TOPIC, partition, 0), 0, first)
        offsets = np.arange(first, ends[partition])
        (contract.directory / str(name)).write_bytes(_segment(contract, piece, ends[partition], offsets)[0])


def write_many(contract: ViewContract, *, partitions: int, files: int) -> None:
    """Write chains of very many segments of one row. All are one file but for the footer, which has one length."""
    row = make_rows(contract, 1, 1, seed=1)
    contract.directory.mkdir(parents=True, exist_ok=True)
    origin = np.array([_FIRST_OF_MANY])
    template, mark, accepted = _segment(contract, row, _FIRST_OF_MANY + 1, origin)
    for partition in range(partitions):
        chain = stream_chain(TOPIC, partition, 0)
        before, _, _ = _segment(contract, row.slice(0, 0), _FIRST_OF_MANY, origin[:0], mark="before")
        (contract.directory / str(SegmentName(chain, 0, 0))).write_bytes(before)
        for number in range(1, files // partitions):
            first = _FIRST_OF_MANY + number - 1
            ranges = encode_ranges(np.array([first]))
            content = template.replace(mark, mark.replace(b"%d" % (_FIRST_OF_MANY + 1), b"%d" % (first + 1)))
            content = content.replace(accepted, ranges)
            if len(content) != len(template):
                raise AssertionError(f"the footer of {first} has another length")
            (contract.directory / str(SegmentName(chain, 0, first))).write_bytes(content)


def _pieces(rows: pa.Table, count: int) -> Iterator[tuple[int, pa.Table]]:
    """Cut a table into pieces of nearly one size, each with the number of its first row."""
    bounds = np.linspace(0, rows.num_rows, count + 1).astype(np.int64).tolist()
    for low, high in pairwise(bounds):
        yield low, rows.slice(low, high - low)


def _segment(
    contract: ViewContract, rows: pa.Table, end: int, offsets: npt.NDArray[np.int64], *, mark: str | None = None
) -> tuple[bytes, bytes, bytes]:
    """The bytes of a segment, and of the two entries in its footer."""
    low, high = time_bounds(rows, contract.timestamp_field)
    columns = columns_id(rows.schema)
    footer = Footer(next=end, min_us=low, max_us=high, writer="benchmark", append="0" * 32, mark=mark, columns=columns)
    note = footer.to_json()
    ranges = encode_ranges(offsets)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, rows.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(rows)
        writer.add_key_value_metadata({"headrace": note, "headrace.accepted": ranges.decode()})
    return sink.getvalue().to_pybytes(), note.encode(), ranges


def _values(random: np.random.Generator, kind: pa.DataType, count: int) -> pa.Array:
    if pa.types.is_boolean(kind):
        return pa.array(random.random(count) < 0.5)
    if pa.types.is_string(kind):
        words = pa.array([f"word-{number}" for number in range(_WORDS)])
        return words.take(pa.array(random.integers(0, _WORDS, count)))
    if pa.types.is_integer(kind):
        return pa.array(random.integers(0, 100_000, count))
    return pa.array(random.random(count))
