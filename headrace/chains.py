"""Chains of segments: which files are valid, where a chain ends, and how it grows. The ledger of the stream is one.

A chain grows by compare-and-swap: a file's name is where the chain ended, it is created exclusively, and its footer
says where the chain ends now. `derive` is the one function from which readers, the ledger and everything else learn
the valid files and the end. There is no other bookkeeping that could disagree.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.contract import ViewContract
from headrace.errors import ChainClosedError, LedgerError, LostRaceError
from headrace.faults import reached
from headrace.segments import (
    SUFFIX,
    DayName,
    Footer,
    Offsets,
    SegmentName,
    create,
    new_append_id,
    parse_name,
    parse_stream_chain,
    read_accepted,
    read_footer,
    remove,
    stream_chain,
    time_bounds,
    writer_id,
)

log = logging.getLogger(__name__)

PUSH = "push"
_LISTINGS = 5
_LISTING_PAUSE_S = 0.05

Result = TypeVar("Result")

accepted_offsets = read_accepted
footer = read_footer


@dataclass(frozen=True)
class Chain:
    """A chain as one listing shows it.

    Attributes:
        name: as in the file names.
        valid: the valid segments, ascending; together they span `[0, end)` without hole or overlap.
        end: the position where the next segment will start.
        closed: the footer of the closing file; None while the chain is open.
    """

    name: str
    valid: tuple[SegmentName, ...]
    end: int
    closed: Footer | None


@dataclass(frozen=True)
class StreamEnd:
    """Where the newest epoch of a partition's chain ends.

    Attributes:
        exists: whether a file says so; without one the epoch is 0 and the end is 0.
        topic_id: of the newest segment; None where it has none.
        servers: the online servers that the newest segment names.
    """

    epoch: int
    end: int
    exists: bool
    closed: bool
    topic_id: str | None
    servers: tuple[str, ...]


@dataclass(frozen=True)
class DayFile:
    """The snapshot of an ETL day that counts."""

    date: date
    snapshot: int
    path: Path
    rows: int
    content_hash: str


def derive(name: str, segments: Iterable[SegmentName], footer_of: Callable[[SegmentName], Footer]) -> Chain:
    """The valid segments and the end of a chain, from its files.

    A file counts only if its `first` is at or beyond the end of every higher level. Reads one footer a valid file.

    Raises:
        LedgerError: the valid files leave a hole or overlap.
    """
    levels: dict[int, list[SegmentName]] = {}
    for segment in segments:
        levels.setdefault(segment.level, []).append(segment)
    valid: list[SegmentName] = []
    end = 0
    closed: Footer | None = None
    for level in sorted(levels, reverse=True):
        for segment in sorted(s for s in levels[level] if s.first >= end):
            if segment.first != end:
                kind = "a hole" if segment.first > end else "an overlap"
                msg = (
                    f"chain `{name}`: {kind} at position {end}: the next file is {segment}; "
                    "nothing may be removed from the folder by hand; restore the missing file"
                )
                raise LedgerError(msg)
            mark = footer_of(segment)
            if mark.mark == "closed":
                closed = mark
            elif mark.next <= segment.first:
                msg = f"chain `{name}`: {segment} ends at {mark.next}, not beyond its start; move the file away"
                raise LedgerError(msg)
            end = max(end, mark.next)
            valid.append(segment)
    return Chain(name, tuple(valid), end, closed)


class Folder:
    """The segments of one view in one folder.

    Listings are no snapshots: whoever finds a file gone, a hole or an overlap lists again; what stays is a fault.

    Args:
        path: the folder. It may be a single Parquet file, as stock repositories have it: then that is the one foreign
            file, and nothing can be appended.
        required: the columns without which a foreign file is of no use; `Folder.of` knows them.
    """

    def __init__(self, path: Path, required: Sequence[str] = ()) -> None:
        self.path = path
        self._required = tuple(required)

    @classmethod
    def of(cls, contract: ViewContract) -> Folder:
        """The folder of a view."""
        created = () if contract.created_field is None else (contract.created_field,)
        return cls(contract.directory, (*contract.join_keys, contract.timestamp_field, *created))

    def names(self) -> list[SegmentName | DayName]:
        """All segments and days by name; files that are not ours are not in it. Empty without the folder."""
        try:
            entries = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [name for entry in entries if (name := parse_name(entry)) is not None]

    def chain(self, name: str) -> Chain:
        """One chain; of no files and end 0 where there is none."""
        return self._settled(lambda: self._derive(name, self.names()))

    def chains(self) -> dict[str, Chain]:
        """Every chain of the folder, by name."""

        def read() -> dict[str, Chain]:
            names = self.names()
            found = sorted({n.chain for n in names if isinstance(n, SegmentName)})
            return {chain: self._derive(chain, names) for chain in found}

        return self._settled(read)

    def days(self) -> dict[date, DayFile]:
        """The snapshot that counts of each ETL day, by day."""

        def read() -> dict[date, DayFile]:
            newest: dict[date, DayName] = {}
            for name in self.names():
                if isinstance(name, DayName) and (name.day not in newest or newest[name.day] < name):
                    newest[name.day] = name
            return {day: self._day(name) for day, name in sorted(newest.items())}

        return self._settled(read)

    def files(self) -> list[Path]:
        """Every valid file with rows or without: chains, then days, then foreign files. What a reader must open."""
        chains = [self.path / str(s) for chain in self.chains().values() for s in chain.valid]
        return chains + [day.path for day in self.days().values()] + self.foreign()

    def foreign(self) -> list[Path]:
        """Parquet files that somebody else wrote, in the folder or below it; hidden ones (`.`, `_`) are not read.

        They are history too. One that cannot be read or lacks a required column is named in a warning and left out.
        """
        if self.path.is_file():
            found = [self.path]
        else:
            found = sorted(path for path in self.path.rglob(f"*{SUFFIX}") if self._is_foreign(path))
        return [path for path in found if self._is_usable(path)]

    def _is_foreign(self, path: Path) -> bool:
        parts = path.relative_to(self.path).parts
        ours = len(parts) == 1 and parse_name(parts[0]) is not None
        return not ours and not any(part.startswith((".", "_")) for part in parts) and path.is_file()

    def _is_usable(self, path: Path) -> bool:
        try:
            found = set(pq.read_schema(path).names)
        except FileNotFoundError:
            return False
        except (pa.ArrowException, OSError) as error:
            log.warning("%s is left out: it is not readable Parquet (%s); repair it or move it away", path, error)
            return False
        missing = [name for name in self._required if name not in found]
        if missing:
            log.warning(
                "%s is left out: it lacks %s, it has %s; add the columns or move it away",
                path,
                ", ".join(missing),
                ", ".join(sorted(found)),
            )
        return not missing

    def path_of(self, name: SegmentName | DayName) -> Path:
        """Where a segment of this folder lies."""
        return self.path / str(name)

    def _derive(self, chain: str, names: list[SegmentName | DayName]) -> Chain:
        own = [n for n in names if isinstance(n, SegmentName) and n.chain == chain]
        return derive(chain, own, lambda segment: read_footer(self.path_of(segment)))

    def _day(self, name: DayName) -> DayFile:
        path = self.path_of(name)
        mark = read_footer(path)
        return DayFile(name.day, name.snapshot, path, mark.next, str(mark.extra.get("content_hash", "")))

    def _settled(self, read: Callable[[], Result]) -> Result:
        for attempt in range(_LISTINGS):
            try:
                return read()
            except (FileNotFoundError, LedgerError):
                if attempt == _LISTINGS - 1:
                    raise
                time.sleep(_LISTING_PAUSE_S * attempt)
        raise AssertionError  # the loop returns or raises


def append(
    folder: Folder, chain: str, first: int, table: pa.Table, mark: Footer, accepted: Offsets | None = None
) -> Path:
    """Extend a chain by `[first, mark.next)` at level 0: the compare-and-swap.

    Atomic and durable. Safe to repeat with the same `mark.append`.

    Raises:
        LostRaceError: another writer was first, or the position is covered by a higher level. Nothing was appended.
        ChainClosedError: the chain was closed at `first`.
    """
    name = SegmentName(chain, 0, first)
    path = folder.path_of(name)
    created = create(path, table, mark, accepted)
    if created:
        covered = [n for n in folder.names() if isinstance(n, SegmentName) and n.chain == chain and n.level > 0]
        reached("append.6.higher-levels-checked")
        if not covered or derive(chain, covered, lambda s: read_footer(folder.path_of(s))).end <= first:
            return path
        remove(path)
        reached("append.7.void-removed")
    now = folder.chain(chain)
    if now.closed is not None and now.end <= first:
        msg = f"chain `{chain}` was closed at {now.end}; its successor goes on"
        raise ChainClosedError(msg)
    msg = f"chain `{chain}`: position {first} is taken, the chain ends at {now.end} now"
    raise LostRaceError(msg, now.end)


class StreamLedger:
    """The ledger of one partition of a topic for one view: what the stream has committed.

    Thread-safe in that two instances, here or elsewhere, can only lose the race for an append.
    """

    def __init__(self, contract: ViewContract, topic: str, partition: int) -> None:
        self._contract = contract
        self._topic = topic
        self._partition = partition
        self._folder = Folder(contract.directory)
        self._known_ends: dict[int, int] = {}

    def end(self) -> StreamEnd:
        """The end of the newest epoch. A closed epoch without a successor is followed by the one it names."""
        epoch = self._newest_epoch()
        if epoch is None:
            return StreamEnd(0, 0, exists=False, closed=False, topic_id=None, servers=())
        chain = self._folder.chain(self._name(epoch))
        if chain.closed is not None and chain.closed.successor is not None:
            topic_id, start = chain.closed.successor
            self._mark_before(epoch + 1, start, topic_id)
            return StreamEnd(epoch + 1, start, exists=True, closed=False, topic_id=topic_id, servers=())
        newest = read_footer(self._folder.path_of(chain.valid[-1])) if chain.valid else Footer(next=0)
        return StreamEnd(epoch, chain.end, True, chain.closed is not None, newest.topic_id, newest.servers)

    def begin(self, start: int, topic_id: str | None) -> StreamEnd:
        """Start a partition that has no chain at `start`: the file `[0, start)` says that what lies before is not ours.

        Idempotent for the same start. A start of 0 needs no file.

        Raises:
            LostRaceError: the chain exists and ends elsewhere.
        """
        now = self.end()
        if now.exists:
            if now.end != start:
                msg = f"chain `{self._name(now.epoch)}` exists and ends at {now.end}, not at {start}"
                raise LostRaceError(msg, now.end)
            return now
        self._mark_before(now.epoch, start, topic_id)
        return StreamEnd(now.epoch, start, start > 0, closed=False, topic_id=topic_id, servers=())

    def append(
        self,
        epoch: int,
        first: int,
        next: int,  # noqa: A002 - the field's own word
        table: pa.Table | None,
        *,
        accepted: Offsets,
        rejected: int = 0,
        skipped: int = 0,
        topic_id: str | None = None,
        servers: Sequence[str] = (),
        transform_hash: str | None = None,
        mark: str | None = None,
    ) -> Path:
        """Commit the offsets `[first, next)`: the append is the commit.

        Args:
            table: the accepted rows in offset order, in the contract's schema; None or empty moves the end alone.
            accepted: the offset of each row, strictly ascending, all in `[first, next)`.
            mark: `gap` for a head that the topic lost.

        Raises:
            ValueError: the arguments contradict each other.
            LedgerError: the chain ends before `first`; the segment would leave a hole.
            LostRaceError, ChainClosedError: see `append`.
        """
        rows = self._contract.schema.empty_table() if table is None else table
        if not first < next:
            msg = f"expected first < next, found [{first}, {next})"
            raise ValueError(msg)
        inside = len(accepted) == 0 or bool(
            accepted[0] >= first and accepted[-1] < next and (np.diff(accepted) > 0).all()
        )
        if rows.num_rows != len(accepted) or not inside:
            msg = f"{rows.num_rows} rows and {len(accepted)} accepted offsets do not belong to [{first}, {next})"
            raise ValueError(msg)
        self._refuse_hole(epoch, first)
        low, high = time_bounds(rows, self._contract.timestamp_field)
        note = Footer(
            next=next,
            rejected=rejected,
            skipped=skipped,
            min_us=low,
            max_us=high,
            topic_id=topic_id,
            transforms=() if transform_hash is None else (transform_hash,),
            servers=tuple(servers),
            writer=writer_id(),
            append=new_append_id(),
            mark=mark,
        )
        path = append(self._folder, self._name(epoch), first, rows, note, accepted)
        self._known_ends[epoch] = next
        return path

    def close(self, topic_id: str, start: int) -> StreamEnd:
        """Close the present epoch and open the next, for the topic of another id that begins at `start`.

        Idempotent: where the present epoch is already that topic's, nothing is done. A partition without a chain
        begins at `start`.
        """
        now = self.end()
        if not now.exists:
            return self.begin(start, topic_id)
        if now.topic_id == topic_id:
            return now
        while True:
            note = Footer(
                next=now.end,
                topic_id=now.topic_id,
                writer=writer_id(),
                append=new_append_id(),
                mark="closed",
                successor=(topic_id, start),
            )
            try:
                append(self._folder, self._name(now.epoch), now.end, self._contract.schema.empty_table(), note)
            except ChainClosedError:
                return self.end()
            except LostRaceError:
                now = self.end()
                continue
            return self.end()

    def _mark_before(self, epoch: int, start: int, topic_id: str | None) -> None:
        """Create `[0, start)`; whoever made it before did the same."""
        if start <= 0:
            return
        note = Footer(next=start, topic_id=topic_id, writer=writer_id(), append=new_append_id(), mark="before")
        path = self._folder.path_of(SegmentName(self._name(epoch), 0, 0))
        if not path.exists():
            create(path, self._contract.schema.empty_table(), note)

    def _refuse_hole(self, epoch: int, first: int) -> None:
        """Chains only grow, so an end that was seen once spares the listing for as long as appends continue it."""
        if first <= self._known_ends.get(epoch, 0):
            return
        end = self._folder.chain(self._name(epoch)).end
        self._known_ends[epoch] = end
        if first > end:
            msg = f"chain `{self._name(epoch)}` ends at {end}; an append at {first} would leave a hole"
            raise LedgerError(msg)

    def _newest_epoch(self) -> int | None:
        epochs = [
            parsed[2]
            for name in self._folder.names()
            if isinstance(name, SegmentName)
            and (parsed := parse_stream_chain(name.chain)) is not None
            and parsed[:2] == (self._topic, self._partition)
        ]
        return max(epochs, default=None)

    def _name(self, epoch: int) -> str:
        return stream_chain(self._topic, self._partition, epoch)


def push(contract: ViewContract, table: pa.Table) -> Path | None:
    """Append rows to the view's `push` chain, whose positions count rows. At least once: a repeat doubles them."""
    if table.num_rows == 0:
        return None
    folder = Folder(contract.directory)
    low, high = time_bounds(table, contract.timestamp_field)
    end = folder.chain(PUSH).end
    while True:
        note = Footer(next=end + table.num_rows, min_us=low, max_us=high, writer=writer_id(), append=new_append_id())
        try:
            return append(folder, PUSH, end, table, note)
        except LostRaceError as lost:
            end = lost.end


def day_files(contract: ViewContract) -> dict[date, DayFile]:
    """The snapshot that counts of each ETL day, by day."""
    return Folder(contract.directory).days()


def replace_day(
    contract: ViewContract, day: date, table: pa.Table, *, footer: Mapping[str, Any] | None = None
) -> DayFile:
    """Publish a snapshot of an ETL day; the newest counts, older ones are removed at once.

    Atomic, durable, idempotent: the same content again writes nothing.

    Args:
        table: the whole day in the contract's schema; empty is an empty day.
        footer: what else the footer shall say, as JSON.
    """
    folder = Folder(contract.directory)
    digest = content_hash(table)
    present = folder.days().get(day)
    if present is None or present.content_hash != digest:
        low, high = time_bounds(table, contract.timestamp_field)
        snapshot = time.time_ns() // 1000
        if present is not None:
            snapshot = max(snapshot, present.snapshot + 1)
        note = Footer(
            next=table.num_rows,
            min_us=low,
            max_us=high,
            writer=writer_id(),
            append=new_append_id(),
            extra={**(footer or {}), "content_hash": digest},
        )
        while not create(folder.path_of(DayName(day, snapshot)), table, note, operation="day"):
            snapshot += 1
    newest = folder.days()[day]
    for name in folder.names():
        if isinstance(name, DayName) and name.day == day and name.snapshot < newest.snapshot:
            remove(folder.path_of(name))
            reached("day.6.old-removed")
    return newest


def files(contract: ViewContract) -> list[Path]:
    """Every valid file of a view: hand the list to Spark, pandas or DuckDB, and no row is read twice."""
    return Folder.of(contract).files()


def content_hash(table: pa.Table) -> str:
    """A hash of the values of a table in row order, whatever its chunks and padding. 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for column, field in zip(table.columns, table.schema, strict=True):
        digest.update(f"{field.name}:{field.type};".encode())
        combined = column.combine_chunks()
        _feed(digest, combined.chunk(0) if isinstance(combined, pa.ChunkedArray) and combined.num_chunks else combined)
    return digest.hexdigest()


def _feed(digest: Any, values: pa.Array | pa.ChunkedArray) -> None:
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
    else:
        for value in values.to_pylist():
            piece = repr(value).encode()
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
