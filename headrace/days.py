"""Days of the batch chain: one file a snapshot, the newest counts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract import ViewContract
from headrace.folder import DayFile, Folder
from headrace.segments import DayName, Footer, create, remove, time_bounds
from headrace.values import one_array


def day_files(contract: ViewContract, wanted: Collection[date] | None = None) -> dict[date, DayFile]:
    """The snapshot that counts of each ETL day, or of those wanted alone, by day."""
    return Folder.of(contract).days(wanted)


def replace_day(
    contract: ViewContract,
    day: date,
    table: pa.Table,
    *,
    read_us: int | None = None,
    footer: Mapping[str, Any] | None = None,
) -> DayFile:
    """Publish a snapshot of an ETL day; the newest counts, older ones are removed at once.

    Atomic, durable, idempotent: the same content again writes nothing. Safe beside others who publish the day, on
    whatever machine: a snapshot is named by when its rows were read, so those that were read last count, whoever comes
    last. The file depends on nothing else: the same rows of the same moment are the same bytes.

    Args:
        table: the whole day in the contract's schema; empty is an empty day.
        read_us: when the rows were read, microseconds since the epoch; None: they replace what is there in any case.
        footer: what else the footer shall say, as JSON.

    Returns:
        The snapshot that counts: another's, if its rows were read later.
    """
    folder = Folder.of(contract)
    digest = content_hash(table)
    low, high = time_bounds(table, contract.timestamp_field)
    extra = {**(footer or {}), "content_hash": digest, **({} if read_us is None else {"read_us": read_us})}
    # No time and no process of this writing; a file of that name with that content is as good as ours.
    note = Footer(next=table.num_rows, min_us=low, max_us=high, append=digest, extra=extra)
    while True:
        present = folder.days([day]).get(day)
        if present is not None and (present.content_hash == digest or present.was_read_after(read_us)):
            break
        moment = time.time_ns() // 1000 if read_us is None else read_us
        snapshot = moment if present is None else max(moment, present.snapshot + 1)
        if create(folder.path_of(DayName(day, snapshot)), table, note, operation="day"):
            break
    remove_superseded(folder, day)
    return folder.days([day])[day]


def remove_superseded(folder: Folder, day: date) -> None:
    """Remove the snapshots of a day that a newer one replaced."""
    remove(*map(folder.path_of, folder.snapshots(day)[:-1]), step="day.6.old-removed")


def content_hash(table: pa.Table) -> str:
    """A hash of the values of a table in row order, whatever its chunks and padding. 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for column, field in zip(table.columns, table.schema, strict=True):
        digest.update(f"{field.name}:{field.type};".encode())
        _feed(digest, one_array(column))
    return digest.hexdigest()


def _feed(digest: Any, values: pa.Array) -> None:
    kind = values.type
    digest.update(np.packbits(np.asarray(values.is_valid().to_numpy(zero_copy_only=False), dtype=bool)).tobytes())
    if pa.types.is_timestamp(kind):
        values = values.cast(pa.int64())
        kind = values.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        filled = values.fill_null(pa.scalar(0).cast(kind)) if values.null_count else values
        digest.update(np.ascontiguousarray(filled.to_numpy(zero_copy_only=False)).tobytes())
    elif pa.types.is_list(kind):
        digest.update(pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False).tobytes())
        _feed(digest, values.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        _feed_bytes(digest, values.fill_null(pa.scalar(b"").cast(kind)) if values.null_count else values)
    else:
        for value in values.to_pylist():
            piece = repr(value).encode()
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)


def _feed_bytes(digest: Any, values: pa.Array) -> None:
    """The lengths, then the bytes one after the other."""
    digest.update(pc.binary_length(values).cast(pa.int64()).to_numpy().tobytes())
    _, offsets, data = values.buffers()
    if len(values) and data is not None:
        ends = np.frombuffer(offsets, dtype=np.int32)[[values.offset, values.offset + len(values)]]
        digest.update(memoryview(data)[ends[0] : ends[1]])
