"""Damaged segments of a stream's chain: found, set aside, and the holes that they leave filled again.

A chain cannot be read over a file that is damaged or gone. What it held is in the topic, as far as that reaches back.
Its positions are known by its neighbours, so the rows can be read again and put where they were: under a name that is
created exclusively, like every other.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.chains import covered_end
from headrace.contract import ViewContract
from headrace.errors import LedgerError
from headrace.folder import Folder
from headrace.place import File, stat_of, whole
from headrace.segments import (
    Footer,
    Offsets,
    SegmentName,
    create,
    parse_stream_chain,
    read_accepted,
    read_footer,
    remove,
)

SET_ASIDE = "_damaged"
"""The folder within a view's folder for what was set aside. Readers pass over names that begin so."""

_ROWS = 65_536


@dataclass(frozen=True)
class Hole:
    """Positions `[first, next)` of a chain that no file holds, and the level of the file behind them."""

    chain: str
    level: int
    first: int
    next: int


@dataclass(frozen=True)
class Condition:
    """What a chain is like.

    Attributes:
        damaged: the files that cannot be read as what they are, with the reason.
        holes: what is missing without them, ascending.
        end: where the chain ends without them.
        is_end_lost: whether the file that ended the chain is among them. What it held is not known to be missing: the
            chain ends earlier, and is extended from there.
        topic_id: of the newest whole segment that has one.
    """

    chain: str
    damaged: Mapping[SegmentName, str]
    holes: tuple[Hole, ...]
    end: int
    is_end_lost: bool
    topic_id: str | None

    @property
    def is_sound(self) -> bool:
        """Whether there is nothing to do."""
        return not self.damaged and not self.holes


def chains_of(contract: ViewContract, topic: str) -> list[str]:
    """The chains that a topic has in a view's folder, by partition and epoch."""
    chains = {name.chain for name in Folder.of(contract).names() if isinstance(name, SegmentName)}
    places = {place: chain for chain in chains if (place := parse_stream_chain(chain)) is not None}
    return [places[place] for place in sorted(places) if place[0] == topic]


def examine(contract: ViewContract, chain: str) -> Condition:
    """Read every file of a chain that counts, whole, and tell which are damaged and what is missing.

    Costs the reading of the chain. Safe beside workers and compaction; files that come or go meanwhile are looked at
    again.

    Raises:
        OSError: a file cannot be opened for a reason that is not its own: no right to read it, a share that is away.
    """
    folder = Folder.of(contract)
    sound: set[tuple[SegmentName, int | str]] = set()

    def read() -> Condition:
        damaged: dict[SegmentName, str] = {}
        holes: list[Hole] = []
        end, topic_id, last = 0, None, None
        for segment in sorted(folder.segments(chain), key=lambda s: (-s.level, s.first)):
            if segment.first < end:
                continue
            path = folder.path_of(segment)
            key = (segment, stat_of(path).identity)
            fault = None if key in sound else _fault_of(path, segment)
            last = segment if last is None or segment.first >= last.first else last
            if fault is not None:
                damaged[segment] = fault
                continue
            sound.add(key)
            if segment.first > end:
                holes.append(Hole(chain, segment.level, end, segment.first))
            mark = read_footer(path)
            end, topic_id = max(end, mark.next), mark.topic_id or topic_id
        return Condition(chain, damaged, tuple(holes), end, last in damaged, topic_id)

    return folder.settled(read)


def set_aside(contract: ViewContract, segments: Iterable[SegmentName]) -> list[File]:
    """Move files to the folder `SET_ASIDE` of the view's folder, durably, in the order given. Repeatable.

    Returns:
        Where they are now.
    """
    place = Folder.of(contract).place
    moved = (place.set_aside(str(segment), SET_ASIDE) for segment in segments)
    return [path for path in moved if path is not None]


def fill(contract: ViewContract, hole: Hole, next_: int, table: pa.Table, note: Footer, accepted: Offsets) -> bool:
    """Put rows back into the beginning of a hole: the segment `[hole.first, next_)` at the hole's level.

    Atomic and durable.

    Args:
        table: rows in offset order, in the contract's schema.
        note: the footer; its `next` is `next_`.
        accepted: the offset of each row, ascending, all in the range.

    Returns:
        False where somebody else filled it, or compaction covered it: examine again.
    """
    folder = Folder.of(contract)
    path = folder.path_of(SegmentName(hole.chain, hole.level, hole.first))
    if not hole.first < next_ <= hole.next or note.next != next_:
        msg = f"[{hole.first}, {next_}) is no beginning of {hole}"
        raise ValueError(msg)
    if not create(path, table, note, accepted, operation="restore"):
        return False
    if covered_end(folder, hole.chain, hole.level) > hole.first:
        remove(path, step="restore.6.void-removed")
        return False
    return True


def _fault_of(path: File, segment: SegmentName) -> str | None:
    """Why a file is not the segment that its name says; None if it is, to the last value."""
    try:
        mark = read_footer(path)
        if mark.mark != "closed" and mark.next <= segment.first:
            return f"it ends at {mark.next}, not beyond its start"
        rows = 0
        with pq.ParquetFile(whole(path), page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS):
                batch.validate(full=True)
                rows += batch.num_rows
        accepted = read_accepted(path)
    except LedgerError as error:
        return str(error.__cause__ or error)
    except (pa.ArrowException, ValueError, OSError) as error:
        # What Arrow finds wrong in a file is an OSError without a number; a disk says EIO.
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise
        return f"{type(error).__name__}: {error}"
    if rows != len(accepted) or (rows and not segment.first <= accepted[0] <= accepted[-1] < mark.next):
        return f"it has {rows} rows and {len(accepted)} offsets, which do not belong to [{segment.first}, {mark.next})"
    return None
