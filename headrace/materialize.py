"""Bring to the online store what has arrived offline since the last time: a set difference, never a clock.

Days are compared by content hash, chains by their ends. The mark of what is there lives in the online store itself, so
that losing the one loses the other. It is written last and changes only by compare-and-set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore

from headrace.chains import Chain, DayFile, Folder
from headrace.contract import ViewContract
from headrace.errors import TransientError
from headrace.offline import latest
from headrace.online import Mark, NewestWinsStore, online_store, write_online
from headrace.segments import SegmentName, parse_stream_chain, read_accepted, read_footer

ROWS_A_CHUNK = 100_000
_TRIES = 10


@dataclass(frozen=True)
class Materialized:
    """What a run did.

    Attributes:
        rows: how many rows were read and offered to the online store.
        keys_written: how many keys it took; the rest was not newer.
        days: the days that were applied, ISO dates.
        chains: the chains that were applied, with the positions `[from, to)`.
        already: nothing had arrived.
    """

    rows: int
    keys_written: int
    days: list[str]
    chains: dict[str, tuple[int, int]]
    already: bool


@dataclass(frozen=True)
class _Arrived:
    days: list[DayFile]
    chains: list[tuple[Chain, int]]
    mark: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.days or self.chains)


def materialize_arrived(
    store: FeatureStore, contract: ViewContract, *, progress: Callable[[int, int], None] | None = None
) -> Materialized:
    """Apply everything that arrived since the mark, whatever its event time, then move the mark.

    Idempotent; safe beside a running stream and beside itself: newest-wins decides each value, and a run that loses the
    mark starts over. Memory is bounded by the chunk. A failing write fails the run, and the mark stays.

    An online store that is not ours keeps no mark and takes whatever is written last; it is given the newest row of
    each key, each time.

    Args:
        progress: called with rows done and rows in all, after each chunk.

    Raises:
        TransientError: other runs moved the mark again and again.
    """
    target = online_store(store)
    if not isinstance(target, NewestWinsStore):
        rows = latest(store, contract)
        return Materialized(rows.num_rows, write_online(store, contract, rows), [], {}, already=rows.num_rows == 0)
    folder = Folder(contract.directory)
    for _ in range(_TRIES):
        mark = target.read_mark(store.config, contract.feature_view)
        arrived = _difference(contract, folder, mark)
        if not arrived:
            return Materialized(0, 0, [], {}, already=True)
        done, written = _apply(store, contract, folder, arrived, progress)
        if target.swap_mark(store.config, contract.feature_view, mark, arrived.mark):
            chains = {chain.name: (start, chain.end) for chain, start in arrived.chains}
            return Materialized(done, written, [d.date.isoformat() for d in arrived.days], chains, already=False)
    msg = f"feature view `{contract.name}`: other runs keep moving the mark; let one of them finish, then run again"
    raise TransientError(msg)


def pending(store: FeatureStore, contract: ViewContract) -> bool:
    """Whether anything has arrived that the mark does not name; without a mark, whether there is anything."""
    target = online_store(store)
    mark = target.read_mark(store.config, contract.feature_view) if isinstance(target, NewestWinsStore) else None
    return bool(_difference(contract, Folder(contract.directory), mark))


def _difference(contract: ViewContract, folder: Folder, mark: Mark | None) -> _Arrived:
    # A mark of other join keys is void: the values it speaks of are under other keys.
    valid = mark if mark is not None and list(mark["join_keys"]) == list(contract.join_keys) else None
    known_days: Mapping[str, str] = valid["days"] if valid else {}
    known_chains: Mapping[str, int] = valid["chains"] if valid else {}
    days, chains = folder.days(), folder.chains()
    new_days = [day for day in days.values() if known_days.get(day.date.isoformat()) != day.content_hash]
    new_chains = [
        (chain, int(known_chains.get(chain.name, 0)))
        for chain in chains.values()
        if chain.end > int(known_chains.get(chain.name, 0))
    ]
    after = {
        "version": int(mark["version"]) + 1 if mark else 1,
        "join_keys": list(contract.join_keys),
        "days": {day.date.isoformat(): day.content_hash for day in days.values()},
        "chains": {chain.name: chain.end for chain in chains.values()},
    }
    return _Arrived(new_days, new_chains, after)


def _apply(
    store: FeatureStore,
    contract: ViewContract,
    folder: Folder,
    arrived: _Arrived,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, int]:
    pieces: list[tuple[SegmentName | None, Any]] = [(None, day.path) for day in arrived.days]
    for chain, start in arrived.chains:
        pieces += [
            (name, folder.path_of(name)) for name in chain.valid if read_footer(folder.path_of(name)).next > start
        ]
    total = sum(pq.read_metadata(path).num_rows for _, path in pieces)
    done = written = 0
    for name, path in pieces:
        stream = parse_stream_chain(name.chain) if name is not None else None
        offsets = read_accepted(path) if stream is not None else None
        for chunk, first in _chunks(contract, path):
            if stream is not None and offsets is not None:
                own = offsets[first : first + chunk.num_rows]
                written += write_online(store, contract, chunk, epoch=stream[2], partition=stream[1], offsets=own)
            else:
                written += write_online(store, contract, chunk)
            done += chunk.num_rows
            if progress is not None:
                progress(done, total)
    return done, written


def _chunks(contract: ViewContract, path: Any) -> Iterator[tuple[pa.Table, int]]:
    """A segment's rows in the present schema, in chunks, each with the number of its first row."""
    first = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_A_CHUNK):
            table = pa.Table.from_batches([batch])
            columns = [
                table.column(field.name).cast(field.type)
                if field.name in table.column_names
                else pa.nulls(table.num_rows, field.type)
                for field in contract.schema
            ]
            yield pa.Table.from_arrays(columns, schema=contract.schema), first
            first += batch.num_rows
