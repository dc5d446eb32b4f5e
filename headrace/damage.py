"""Damaged segments of a stream's chain: found, set aside, and the holes that they leave filled again.

A chain cannot be read over a file that is damaged or gone. What it held is in the topic, as far as that reaches back.
Its positions are known by its neighbours, so the rows can be read again and put where they were: under a name that is
created exclusively, like every other.

Where the end of a chain is damaged, one worker may know where it was, and another may start and see an earlier one.
Both may: an append that does not go on what is there is void (`headrace.chains.stays`).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.chains import stays
from headrace.contract import ViewContract
from headrace.errors import LedgerError
from headrace.folder import Folder
from headrace.place import SUFFIX, File, place_of, stat_of, whole
from headrace.segments import (
    Footer,
    Offsets,
    SegmentName,
    create,
    parse_name,
    parse_stream_chain,
    read_accepted,
    read_footer,
)

SET_ASIDE = "_damaged"
"""The folder within a view's folder for what was set aside. Readers pass over names that begin so."""

_ROWS = 65_536


@dataclass(frozen=True)
class Hole:
    """Positions `[first, next)` of a chain that no file holds, and the level that they belong to."""

    chain: str
    level: int
    first: int
    next: int


@dataclass(frozen=True)
class Damage:
    """Why a file does not count, and which file it is: its name may be another's soon."""

    why: str
    identity: int | str


@dataclass(frozen=True)
class Condition:
    """What a chain is like.

    Attributes:
        damaged: the files that cannot be read as what they are, or overlap with those before them.
        holes: what is missing without them, ascending; the last may be the end of the chain, where what is left of the
            file says how far that went.
        end: where the whole files end.
        is_end_lost: whether the chain went on from `end`, or from behind the last hole, in a file that says no longer
            how far.
        topic_id: of the newest segment that has one.
    """

    chain: str
    damaged: Mapping[SegmentName, Damage]
    holes: tuple[Hole, ...]
    end: int
    is_end_lost: bool
    topic_id: str | None


def chains_of(contract: ViewContract, topic: str) -> list[str]:
    """The chains that a topic has in a view's folder, by partition and epoch."""
    chains = {name.chain for name in Folder.of(contract).names() if isinstance(name, SegmentName)}
    places = {place: chain for chain in chains if (place := parse_stream_chain(chain)) is not None}
    return [places[place] for place in sorted(places) if place[0] == topic]


class Examination:
    """Of one chain, as often as it is wanted: a file that was whole is not read again.

    Memory holds the names of the files. Safe beside workers and compaction.
    """

    def __init__(self, contract: ViewContract, chain: str) -> None:
        self._folder = Folder.of(contract)
        self._aside = place_of(self._folder.path / SET_ASIDE)
        self._chain = chain
        self._whole: set[tuple[SegmentName, int | str]] = set()

    def __call__(self) -> Condition:
        """Read every file of the chain that counts, whole, and tell which are damaged and what is missing.

        Costs the reading of the chain, the first time. Files that come or go meanwhile are looked at again.

        Raises:
            OSError: a file cannot be opened for a reason that is not its own: no right to read it, a share that is
                away.
        """
        found = self._folder.settled(self._read)
        while found.damaged or found.holes:  # a listing is no snapshot
            former, found = found, self._folder.settled(self._read)
            if (former.damaged, former.holes) == (found.damaged, found.holes):
                break
        return found

    def _read(self) -> Condition:
        damaged: dict[SegmentName, Damage] = {}
        holes: list[Hole] = []
        broken: list[tuple[int, Footer | None]] = self._set_aside()
        end = covered = 0
        level, topic_id = -1, None
        for segment in sorted(self._folder.segments(self._chain), key=lambda s: (-s.level, s.first)):
            if segment.level != level:
                level, covered = segment.level, end
            if segment.first < covered:
                continue
            path = self._folder.path_of(segment)
            why = self._fault(path, segment)
            if why is None and segment.first < end:
                why = f"it begins at {segment.first}, and what lies before it goes up to {end}"
            if why is not None:
                damaged[segment] = Damage(why, stat_of(path).identity)
                broken.append((segment.first, _legible(path)))
                continue
            if segment.first > end:
                holes.append(Hole(self._chain, segment.level, end, segment.first))
            mark = read_footer(path)
            end, topic_id = max(end, mark.next), mark.topic_id or topic_id
        legible = [mark for _, mark in broken if mark is not None]
        topic_id = topic_id or next((mark.topic_id for mark in legible if mark.topic_id is not None), None)
        known = max((mark.next for mark in legible if mark.topic_id == topic_id), default=0)
        if known > end:
            holes.append(Hole(self._chain, 0, end, known))
        is_end_lost = any(mark is None and first >= max(end, known) for first, mark in broken)
        return Condition(self._chain, damaged, tuple(holes), end, is_end_lost, topic_id)

    def _fault(self, path: File, segment: SegmentName) -> str | None:
        key = (segment, stat_of(path).identity)
        if key in self._whole:
            return None
        why = _fault_of(path, segment)
        if why is None:
            self._whole.add(key)
        return why

    def _set_aside(self) -> list[tuple[int, Footer | None]]:
        """Where each file of the chain that was set aside began, and its footer if that can be read."""
        found = []
        for entry in self._aside.names(f"{self._chain}-"):
            name = parse_name(entry.partition(SUFFIX)[0] + SUFFIX)  # a number may follow
            if isinstance(name, SegmentName) and name.chain == self._chain:
                found.append((name.first, _legible(self._aside.file(entry))))
        return found


def set_aside(contract: ViewContract, damaged: Mapping[SegmentName, Damage]) -> None:
    """Move these very files to the folder `SET_ASIDE` of the view's folder, durably, in the order given. Repeatable.

    Look at the chain again afterwards: a worker may have gone on from one of them until then.
    """
    place = Folder.of(contract).place
    for segment, damage in damaged.items():
        place.set_aside(str(segment), damage.identity, SET_ASIDE)


def fill(contract: ViewContract, hole: Hole, table: pa.Table, note: Footer, accepted: Offsets) -> bool:
    """Put rows back into the beginning of a hole: the segment `[hole.first, note.next)` at the hole's level.

    Atomic and durable.

    Args:
        table: rows in offset order, in the contract's schema.
        accepted: the offset of each row, ascending, all in the range.

    Returns:
        False where somebody else filled it, or compaction covered it: examine again.
    """
    folder = Folder.of(contract)
    segment = SegmentName(hole.chain, hole.level, hole.first)
    if not hole.first < note.next <= hole.next:
        msg = f"[{hole.first}, {note.next}) is no beginning of {hole}"
        raise ValueError(msg)
    return create(folder.path_of(segment), table, note, accepted, operation="restore") and stays(
        folder, segment, "restore"
    )


def _legible(path: File) -> Footer | None:
    try:
        return read_footer(path)
    except LedgerError:
        return None


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
