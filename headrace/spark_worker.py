"""What runs in Spark's Python workers: reading files, what breaks ties, and the online write.

Imports no Spark. A worker imports this module first, so Feast in a third of its time (see `headrace.quick_import`): a
cluster starts a few workers for each of its cores, and anew after each failure.
"""

from __future__ import annotations

from headrace.quick_import import leave_feast_unchecked

leave_feast_unchecked()

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from feast.infra.common.serde import SerializedArtifacts

from headrace.contract import ViewContract
from headrace.encode import encode
from headrace.place import File
from headrace.scan import ROWS_A_CHUNK, History, Window, connection, named, parts_of, tails_of

FILE, POSITION, TAIL = "file", "position", "tail"

_MEMORY = "1GB"
"""Of a worker's DuckDB, which streams a file."""
_ROWS_A_WRITE = 100_000


def read(
    contract: ViewContract,
    tasks: Sequence[Sequence[File]],
    window: Window,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """The rows within a window of the files of some tasks, by the numbers of these.

    Args:
        schema: columns `c0`, ... of the contract, then `POSITION` and `FILE`.
    """
    columns = ", ".join(schema.names[:-1])
    for path in (path for batch in batches for task in batch.column(0).to_pylist() for path in tasks[task]):
        with connection(_MEMORY, [path]) as con:
            con.execute("SET threads = 1")  # which a task has
            history = History(con, contract, [path], window)
            rows = con.sql(f"SELECT {columns} FROM history WHERE {window.condition(history.time)}")
            for batch in rows.to_arrow_reader(ROWS_A_CHUNK):
                table = pa.Table.from_batches([batch])
                yield from table.append_column(FILE, pa.repeat(str(path), len(table))).cast(schema).to_batches()


def add_tails(
    contract: ViewContract, files: Mapping[str, File], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Rows with what breaks their ties, see `headrace.encode.Tails`; their place goes.

    Args:
        files: by what is in `FILE`.
    """
    for batch in batches:
        if not batch.num_rows:
            continue
        table = pa.Table.from_batches([batch])
        paths = table.column(FILE).to_pylist()
        parts = parts_of(contract, [files[path] for path in set(paths)], Window())
        number_of = {str(part.path): number for number, part in enumerate(parts)}
        numbers, positions = np.array([number_of[path] for path in paths]), table.column(POSITION).to_numpy()
        tails = tails_of(contract, parts, numbers, positions, named(contract, table))
        texts = pa.array([tail.tobytes() for tail in tails], pa.binary())
        yield from table.drop_columns([FILE, POSITION]).append_column(TAIL, texts).to_batches()


def write(artifacts: SerializedArtifacts, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Write rows with their tails to the online store; what it gives is how many of each chunk it took."""
    view, online_store, _, config = artifacts.unserialize()  # type: ignore[no-untyped-call]
    contract = ViewContract.from_feast(view, config)
    size = min(online_store.rows_a_write(len(contract.schema)) or _ROWS_A_WRITE, _ROWS_A_WRITE)
    for table in _chunks(batches, size):
        tails = np.frombuffer(b"".join(table.column(TAIL).to_pylist()), dtype=np.uint8).reshape(-1, 17)
        written = online_store.write_newest(config, view, encode(contract, named(contract, table), tails))
        yield pa.RecordBatch.from_arrays([pa.array([written], pa.int64())], ["written"])


def _chunks(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Batches gathered to tables of about so many rows; none is empty."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        if batch.num_rows:
            held.append(batch)
        if sum(b.num_rows for b in held) >= rows:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)
