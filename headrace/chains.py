"""How chains grow, and the ledger of the stream, which is one.

A chain grows by compare-and-swap: a file's name is where the chain ended, it is created exclusively, and its footer
says where the chain ends now. There is no other bookkeeping that could disagree with it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.contract import ViewContract
from headrace.days import content_hash, day_files, replace_day
from headrace.errors import ChainClosedError, LedgerError, LostRaceError
from headrace.faults import reached
from headrace.folder import Chain, DayFile, Folder, Tip, derive
from headrace.place import File, readable, stat_now, stat_of, told
from headrace.segments import (
    Footer,
    Offsets,
    SegmentName,
    columns_id,
    create,
    new_append_id,
    parse_stream_chain,
    read_accepted,
    read_footer,
    remove,
    stream_chain,
    time_bounds,
    writer_id,
)

__all__ = [
    "PUSH",
    "Chain",
    "DayFile",
    "Folder",
    "Standing",
    "StreamEnd",
    "StreamLedger",
    "Tip",
    "accepted_offsets",
    "append",
    "content_hash",
    "day_files",
    "derive",
    "files",
    "footer",
    "push",
    "replace_day",
]

PUSH = "push"

accepted_offsets = read_accepted
footer = read_footer


class Standing(StrEnum):
    """What a view has of a record.

    Attributes:
        OPEN: its row is nowhere, and no append will bring it.
        ACCEPTED: the stream has its row.
        REPLAYED: a replay has its row.
        UNCOMMITTED: the stream has not got there yet, or not again.
        RETAINED: retention removed its surroundings, so that nobody can say.
    """

    OPEN = "open"
    ACCEPTED = "accepted"
    REPLAYED = "replayed"
    UNCOMMITTED = "uncommitted"
    RETAINED = "retained"


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
class Witness:
    """A file of level 0 as this process saw it, to tell later whether that very file was there all the time.

    By inode and time; of an object by ETag and time. A segment's content has the id of its append in it, so another
    append's object has another ETag. The same append's could come to its name a second time only by a request that the
    network held back for longer than the grace of compaction, and has a later time then.

    Attributes:
        path: the file, with what was seen of it.
        next: where the chain ended with it.
    """

    path: File
    next: int
    identity: int | str
    mtime_ns: int

    @classmethod
    def of(cls, path: File, next_: int) -> Witness | None:
        """The file as it is now; None where it is gone."""
        stat = stat_now(path)
        return None if stat is None else cls(told(path, stat), next_, stat.identity, stat.mtime_ns)

    def stands(self) -> bool:
        """Whether the file was never removed since."""
        return Witness.of(self.path, self.next) == self


def append(
    folder: Folder,
    chain: str,
    first: int,
    table: pa.Table,
    mark: Footer,
    accepted: Offsets | None = None,
    *,
    witness: Witness | None = None,
) -> File:
    """Extend a chain by `[first, mark.next)` at level 0: the compare-and-swap.

    Atomic and durable. Safe to repeat with the same `mark.append`.

    Args:
        witness: a file of the chain's level 0, as it was seen before. Where it ends at `first` and stands, the append
            goes on from it, and no name behind it was freed, because covered files are removed in ascending order: no
            listing is needed.

    Raises:
        LostRaceError: another writer was first, the position is covered by a higher level, or what ended there was set
            aside because it was damaged. Nothing was appended; but who sleeps between the creation of its file and the
            look at the others, while compaction merges that very file, is told so too. Read the end again: what lies
            below it is stored, once.
        ChainClosedError: the chain was closed at `first`.
        LedgerError: the files that decide it contradict each other or cannot be read.
        ConfigError: the view's folder is a file.
        TransientError: the object store does not answer, or refuses. The append may have been made: read the end again,
            or repeat it with the same `mark.append`.
    """
    segment = SegmentName(chain, 0, first)
    path = folder.path_of(segment)
    if create(path, table, mark, accepted):
        is_sure = witness is not None and witness.next == first and witness.stands()
        if is_sure or stays(folder, segment, "append"):
            return path
    now = folder.tip(chain)
    if now.footer is not None and now.footer.mark == "closed" and now.end <= first:
        msg = f"chain `{chain}` was closed at {now.end}; its successor goes on"
        raise ChainClosedError(msg)
    msg = f"chain `{chain}`: nothing can be appended at {first}, the chain ends at {now.end} now"
    raise LostRaceError(msg, now.end)


def stays(folder: Folder, created: SegmentName, operation: str) -> bool:
    """Whether a file that was just created goes on what is there; one that does not is removed.

    Whoever created a file asks this afterwards. Its name may have been free for having been covered and removed: then
    the file is void, for every reader too. Or what ended where it begins was damaged and is set aside: then it would
    leave a hole, or overlap with what has come in that place. Who sets aside looks afterwards at what is there, so one
    of the two sees the other, whatever the order.
    """
    is_void = folder.end_before(created) != created.first
    reached(f"{operation}.6.others-checked")
    if is_void:
        remove(folder.path_of(created), step=f"{operation}.7.void-removed")
    return not is_void


class StreamLedger:
    """The ledger of one partition of a topic for one view: what the stream has committed.

    Thread-safe in that two instances, here or elsewhere, can only lose the race for an append.
    """

    def __init__(self, contract: ViewContract, topic: str, partition: int) -> None:
        self._contract = contract
        self._topic = topic
        self._partition = partition
        self._folder = Folder.of(contract)
        self._known_ends: dict[int, int] = {}
        self._witnesses: dict[int, Witness | None] = {}

    def end(self) -> StreamEnd:
        """The end of the newest epoch. A closed epoch without a successor is followed by the one it names."""
        found = self._folder.newest_tip(self._prefix, self._epoch_of)
        if found is None:
            return StreamEnd(0, 0, exists=False, closed=False, topic_id=None, servers=())
        chain, tip = found
        epoch = self._epoch_of(chain) or 0
        newest = tip.footer or Footer(next=0)
        if newest.successor is not None:
            topic_id, start = newest.successor
            self._mark_before(epoch + 1, start, topic_id)
            return StreamEnd(epoch + 1, start, exists=True, closed=False, topic_id=topic_id, servers=())
        return StreamEnd(epoch, tip.end, True, newest.mark == "closed", newest.topic_id, newest.servers)

    def other_schema(self, epoch: int) -> pa.Schema | None:
        """The schema of the newest file of an epoch, if it is not the contract's; None also where there is no file."""

        def read() -> pa.Schema | None:
            tip = self._folder.tip(self._name(epoch))
            if tip.last is None or tip.footer is None or tip.footer.columns == columns_id(self._contract.schema):
                return None
            return pq.read_schema(readable(self._folder.path_of(tip.last)))

        return self._folder.settled(read)

    def epochs(self) -> Mapping[str | None, int]:
        """The epoch of each topic id that the partition's chains name; a broker without ids is None."""

        def read() -> dict[str | None, int]:
            found: dict[str | None, int] = {}
            for epoch, chain in self._folder.numbered(self._prefix, self._epoch_of).items():
                newest = self._folder.tip(chain).footer
                if newest is not None:
                    found[newest.topic_id] = epoch
                    if newest.successor is not None:
                        found[newest.successor[0]] = epoch + 1
            return found

        return self._folder.settled(read)

    def standings(self, epoch: int, offsets: Offsets) -> list[Standing]:
        """What the stream has of each of some offsets of an epoch; reads the files alone that cover one of them."""

        def read() -> list[Standing]:
            chain = self._folder.chain(self._name(epoch))
            beyond = Standing.UNCOMMITTED if chain.closed is None else Standing.OPEN
            found = np.full(len(offsets), beyond.value, dtype=object)
            covering = np.searchsorted([segment.first for segment in chain.valid], offsets, side="right") - 1
            for number in np.unique(covering[offsets < chain.end]).tolist():
                rows = np.flatnonzero((covering == number) & (offsets < chain.end))
                path = self._folder.path_of(chain.valid[number])
                if read_footer(path).mark == "retained":
                    found[rows] = Standing.RETAINED.value
                else:
                    is_there = np.isin(offsets[rows], read_accepted(path))
                    found[rows] = np.where(is_there, Standing.ACCEPTED.value, Standing.OPEN.value)
            return [Standing(name) for name in found.tolist()]

        return self._folder.settled(read)

    def recent(self, epoch: int, servers: Sequence[str], within_s: float) -> list[File]:
        """The segments with rows that came within the last seconds and name other online servers than these."""

        def read() -> list[File]:
            found: list[File] = []
            for segment in reversed(self._folder.chain(self._name(epoch)).valid):
                path = self._folder.path_of(segment)
                if stat_of(path).mtime_ns / 1e9 < time.time() - within_s:
                    break
                newest = read_footer(path)
                if newest.min_us is not None and newest.servers != tuple(servers):
                    found.append(path)
            return found

        return self._folder.settled(read)

    def begin(self, start: int, topic_id: str | None) -> StreamEnd:
        """Start a partition that has no chain at `start`: the file `[0, start)` says that what lies before is not ours.

        Idempotent for the same start. A start of 0 needs no file.

        Raises:
            LostRaceError: the chain exists and ends elsewhere, or is of a topic with another id.
        """
        now = self.end()
        if not now.exists:
            if start == 0:
                return replace(now, topic_id=topic_id)
            self._mark_before(now.epoch, start, topic_id)
            now = self.end()
        if None not in (now.topic_id, topic_id) and now.topic_id != topic_id:
            msg = f"chain `{self._name(now.epoch)}` is of the topic with id {now.topic_id}, not {topic_id}"
            raise LostRaceError(msg, now.end)
        if now.end != start:
            msg = f"chain `{self._name(now.epoch)}` exists and ends at {now.end}, not at {start}"
            raise LostRaceError(msg, now.end)
        return now

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
    ) -> File:
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
        path = append(self._folder, self._name(epoch), first, rows, note, accepted, witness=self._witnesses.get(epoch))
        self._known_ends[epoch] = next
        witness = self._witnesses[epoch] = Witness.of(path, next)
        return path if witness is None else witness.path

    def close(self, topic_id: str, start: int) -> StreamEnd:
        """Close the present epoch and open the next, for the topic of another id that begins at `start`.

        Idempotent: where the present epoch is already that topic's, nothing is done. A partition without a chain
        begins at `start`.
        """
        while True:
            now = self.end()
            if not now.exists:
                return self.begin(start, topic_id)
            if now.topic_id == topic_id:  # also after a lost race: another call may have done it meanwhile
                return now
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
                continue
            return self.end()

    def _mark_before(self, epoch: int, start: int, topic_id: str | None) -> None:
        """Create `[0, start)`; whoever made it before did the same."""
        if start <= 0:
            return
        note = Footer(next=start, topic_id=topic_id, writer=writer_id(), append=new_append_id(), mark="before")
        with contextlib.suppress(LostRaceError, ChainClosedError):
            append(self._folder, self._name(epoch), 0, self._contract.schema.empty_table(), note)

    def _refuse_hole(self, epoch: int, first: int) -> None:
        """Chains only grow, so an end that was seen once spares the listing for as long as appends continue it."""
        if first <= self._known_ends.get(epoch, 0):
            return
        end = self._folder.tip(self._name(epoch)).end
        self._known_ends[epoch] = end
        if first > end:
            msg = f"chain `{self._name(epoch)}` ends at {end}; an append at {first} would leave a hole"
            raise LedgerError(msg)

    def _epoch_of(self, chain: str) -> int | None:
        parsed = parse_stream_chain(chain)
        return parsed[2] if parsed is not None and parsed[:2] == (self._topic, self._partition) else None

    @property
    def _prefix(self) -> str:
        """What the names of all epochs' chains begin with."""
        return f"stream-{self._topic}-{self._partition}-"

    def _name(self, epoch: int) -> str:
        return stream_chain(self._topic, self._partition, epoch)


def push(contract: ViewContract, table: pa.Table) -> File | None:
    """Append rows to the view's `push` chain, whose positions count rows. At least once: a repeat doubles them."""
    if table.num_rows == 0:
        return None
    folder = Folder.of(contract)
    low, high = time_bounds(table, contract.timestamp_field)
    end = folder.tip(PUSH).end
    while True:
        note = Footer(next=end + table.num_rows, min_us=low, max_us=high, writer=writer_id(), append=new_append_id())
        try:
            return append(folder, PUSH, end, table, note)
        except LostRaceError as lost:
            end = lost.end


def files(contract: ViewContract) -> list[File]:
    """Every valid file of a view: hand the list to Spark, pandas or DuckDB, and no row is read twice.

    As text each is a path, or the URL of an object.
    """
    return Folder.of(contract).files()
