"""The folder of a view: which of its files count, and where each chain ends. Everything reads through this.

`derive` is the one function from which readers, the ledger, compaction and retention learn the valid files of a chain.
Listings are no snapshots: whoever finds a file gone, a hole or an overlap lists again; what stays is a fault.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.contract import ViewContract
from headrace.errors import LedgerError
from headrace.place import File, ObjectPlace, place_of, readable, stat_of
from headrace.segments import (
    LEVELS,
    DayName,
    Footer,
    SegmentName,
    chain_of,
    parse_name,
    read_footer,
)

log = logging.getLogger(__name__)

_LISTINGS = 5
_LISTING_PAUSE_S = 0.05

Result = TypeVar("Result")


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
class Tip:
    """Where a chain ends; `last` is its newest file and `footer` that file's, None where there is no file."""

    end: int
    last: SegmentName | None
    footer: Footer | None


@dataclass(frozen=True)
class DayFile:
    """The snapshot of an ETL day that counts.

    Attributes:
        read_us: when its rows were read, microseconds; None where that was not said.
    """

    date: date
    snapshot: int
    path: File
    rows: int
    content_hash: str
    read_us: int | None

    def was_read_after(self, read_us: int | None) -> bool:
        """Whether its rows are known to be newer than some that were read then."""
        return self.read_us is not None and read_us is not None and self.read_us > read_us


def derive(
    name: str,
    segments: Iterable[SegmentName],
    footer_of: Callable[[SegmentName], Footer],
    ahead: Callable[[Sequence[SegmentName]], None] = lambda _: None,
) -> Chain:
    """The valid segments and the end of a chain, from its files.

    A file counts only if its `first` is at or beyond the end of every higher level. Reads one footer a valid file.

    Args:
        ahead: is told of the segments whose footers will be read next.

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
        counting = sorted(s for s in levels[level] if s.first >= end)
        ahead(counting)
        for segment in counting:
            if segment.first != end:
                kind = "a hole" if segment.first > end else "an overlap"
                msg = (
                    f"chain `{name}`: {kind} at position {end}: the next file is {segment}; "
                    "nothing may be removed from the folder by hand; docs/how-to/rebuild.md says how it is restored"
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

    Args:
        path: the folder, or the prefix of an object store. It may be a single Parquet file, as stock repositories have
            it: then that is the one foreign file, and nothing can be appended.
        required: the columns without which a foreign file is of no use; `Folder.of` knows them.
    """

    def __init__(self, path: File, required: Sequence[str] = ()) -> None:
        self.path = path
        self.place = place_of(path)
        self._required = tuple(required)

    @classmethod
    def of(cls, contract: ViewContract) -> Folder:
        """The folder of a view."""
        created = () if contract.created_field is None else (contract.created_field,)
        return cls(contract.directory, (*contract.join_keys, contract.timestamp_field, *created))

    def names(self) -> list[SegmentName | DayName]:
        """All segments and days by name; files that are not ours are not in it. Empty without the folder."""
        return [name for entry in self._entries() if (name := parse_name(entry)) is not None]

    def chain(self, name: str) -> Chain:
        """One chain; of no files and end 0 where there is none."""
        return self.settled(lambda: self.derive(name, self._counting(name)))

    def chains(self) -> dict[str, Chain]:
        """Every chain of the folder, by name."""
        return self.settled(lambda: self._chains(self.names()))

    def tip(self, name: str) -> Tip:
        """Where a chain ends. Reads the last file of each level alone, so the cost is a listing, whatever the history.

        In an object store it lists what is not merged yet. A hole further down is not seen; `chain` sees it.
        """
        return self.settled(lambda: self._tip(name))

    def tip_of(self, newest: Iterable[SegmentName]) -> Tip:
        """Where a chain ends, by the last file of each of its levels. Not settled: a file may be gone meanwhile."""
        tip = Tip(0, None, None)
        for segment in sorted(newest, key=lambda segment: segment.level, reverse=True):
            if segment.first >= tip.end:
                footer = read_footer(self.path_of(segment))
                tip = Tip(max(tip.end, footer.next), segment, footer)
        return tip

    def newest_tip(self, prefix: str, number: Callable[[str], int | None]) -> tuple[str, Tip] | None:
        """The chain of the greatest number among those that begin with a prefix, and its end; None without one.

        Args:
            number: the number of a chain by its name; None for one that does not belong.
        """

        def read() -> tuple[str, Tip] | None:
            if self.place.begins_anywhere:
                found = self.numbered(prefix, number)
                return (found[max(found)], self._tip(found[max(found)])) if found else None
            entries = list(self._entries())
            names = {chain for entry in entries if entry.startswith(prefix) and (chain := chain_of(entry)) is not None}
            numbered = [(n, chain) for chain in names if (n := number(chain)) is not None]
            return (max(numbered)[1], self._tip_among(max(numbered)[1], entries)) if numbered else None

        return self.settled(read)

    def days(self, wanted: Collection[date] | None = None) -> dict[date, DayFile]:
        """The snapshot that counts of each ETL day, or of those wanted alone, by day. Reads one footer a day."""

        def read() -> dict[date, DayFile]:
            prefixes = ["batch-"]
            if wanted is not None and self.place.begins_anywhere:
                prefixes = [f"batch-{day.isoformat()}-" for day in sorted(set(wanted))]
            names = (parse_name(entry) for prefix in prefixes for entry in self._entries(prefix))
            days = [name for name in names if isinstance(name, DayName)]
            return self._days(days if wanted is None else [name for name in days if name.day in wanted])

        return self.settled(read)

    def snapshots(self, day: date) -> list[DayName]:
        """All snapshots of a day, ascending: the last counts."""
        names = map(parse_name, self._entries(f"batch-{day.isoformat()}-"))
        return sorted(name for name in names if isinstance(name, DayName) and name.day == day)

    def files(self) -> list[File]:
        """Every valid file with rows or without: chains, then days, then foreign files. What a reader must open."""

        def read() -> list[File]:
            names = self.names()
            chains = [self.path_of(segment) for chain in self._chains(names).values() for segment in chain.valid]
            return chains + [day.path for day in self._days(names).values()]

        return self.settled(read) + self.foreign()

    def foreign(self) -> list[File]:
        """Parquet files that somebody else wrote, in the folder or below it; hidden ones (`.`, `_`) are not read.

        They are history too. One that cannot be read or lacks a required column is named in a warning and left out.
        """
        return [path for path in self.place.foreign(lambda name: parse_name(name) is not None) if self._is_usable(path)]

    def path_of(self, name: SegmentName | DayName) -> File:
        """Where a segment of this folder lies."""
        return self.place.file(str(name))

    def derive(self, chain: str, segments: Iterable[SegmentName]) -> Chain:
        """`derive` with this folder's footers. Not settled: a file may be gone meanwhile."""
        return derive(chain, segments, lambda segment: read_footer(self.path_of(segment)), self._ahead)

    def settled(self, read: Callable[[], Result]) -> Result:
        """What a reading of the folder says, listing again while files go or come in the middle of it."""
        for attempt in range(_LISTINGS):
            try:
                return read()
            except (FileNotFoundError, LedgerError):
                if attempt == _LISTINGS - 1:
                    raise
                time.sleep(_LISTING_PAUSE_S * attempt)
        raise AssertionError  # the loop returns or raises

    def segments(self, chain: str) -> list[SegmentName]:
        """All files of a chain, valid or not."""
        return _segments(chain, self._entries(f"{chain}-"))

    def above(self, chain: str, level: int) -> list[SegmentName]:
        """The files of a chain on the levels above one."""
        entries = self._entries(f"{chain}-", after=f"{chain}-{level + 1}-")
        return [segment for segment in _segments(chain, entries) if segment.level > level]

    def end_before(self, segment: SegmentName) -> int:
        """Where a chain ends by the levels above a segment's, and by the files of its own level that begin before it.

        Reads the last file of each. One right before the segment that cannot be read is taken to end where that begins:
        it is there.

        Raises:
            LedgerError: the last file of a level above cannot be read.
        """

        def read() -> int:
            entries = self._entries(f"{segment.chain}-", after=f"{segment.chain}-{segment.level}-")
            near = sorted(other for other in _segments(segment.chain, entries) if other.level >= segment.level)
            end = self.tip_of({other.level: other for other in near if other.level > segment.level}.values()).end
            own = [other for other in near if other.level == segment.level and end <= other.first < segment.first]
            if not own:
                return end
            try:
                return read_footer(self.path_of(own[-1])).next
            except LedgerError:
                return segment.first

        return self.settled(read)

    def numbered(self, prefix: str, number: Callable[[str], int | None]) -> dict[int, str]:
        """The chains that begin with a prefix, by their number; those that have none are left out.

        Args:
            number: the number of a chain by its name.
        """
        if isinstance(self.place, ObjectPlace):
            names = set(_chains_behind(self.place, prefix, number))
        else:
            names = {name for entry in self._entries() if (name := chain_of(entry)) is not None}
        return {n: name for name in names if (n := number(name)) is not None}

    def _counting(self, chain: str) -> list[SegmentName]:
        """The files of a chain that may count: all, or where a listing may begin anywhere, those that are not covered.

        What happens between the two listings can at most leave a hole: the newest file of level 0 always stays.
        """
        if not self.place.begins_anywhere:
            return self.segments(chain)
        upper = self.above(chain, 0)
        end = self.derive(chain, upper).end
        return upper + _segments(chain, self._entries(f"{chain}-0-", after=f"{chain}-0-{end:020d}"))

    def _entries(self, prefix: str = "", after: str = "") -> Iterable[str]:
        return self.place.names(prefix, after)

    def _ahead(self, segments: Sequence[SegmentName]) -> None:
        self.place.read_ahead(read_footer, (self.path_of(segment) for segment in segments))

    def _tip(self, chain: str) -> Tip:
        if not self.place.begins_anywhere:
            return self._tip_among(chain, self._entries())
        upper = list(self._entries(f"{chain}-", after=f"{chain}-1-"))
        end = self._tip_among(chain, upper).end
        return self._tip_among(chain, [*upper, *self._entries(f"{chain}-0-", after=f"{chain}-0-{end:020d}")])

    def _tip_among(self, chain: str, entries: Iterable[str]) -> Tip:
        # The positions in names have one width, so the last file of a level is the greatest name.
        newest: dict[str, str] = {}
        for entry in entries:
            if entry.startswith(chain) and chain_of(entry) == chain:
                digit = entry[len(chain) + 1]
                newest[digit] = max(newest.get(digit, ""), entry)
        segments = map(parse_name, newest.values())
        return self.tip_of(segment for segment in segments if isinstance(segment, SegmentName))

    def _chains(self, names: Iterable[SegmentName | DayName]) -> dict[str, Chain]:
        own: dict[str, list[SegmentName]] = {}
        for name in names:
            if isinstance(name, SegmentName):
                own.setdefault(name.chain, []).append(name)
        return {chain: self.derive(chain, own[chain]) for chain in sorted(own)}

    def _days(self, names: Iterable[SegmentName | DayName]) -> dict[date, DayFile]:
        newest: dict[date, DayName] = {}
        for name in names:
            if isinstance(name, DayName) and (name.day not in newest or newest[name.day] < name):
                newest[name.day] = name
        self.place.read_ahead(read_footer, (self.path_of(name) for name in newest.values()))
        return {day: self._day(name) for day, name in sorted(newest.items())}

    def _day(self, name: DayName) -> DayFile:
        path = self.path_of(name)
        mark = read_footer(path)
        content, read_us = str(mark.extra.get("content_hash", "")), mark.extra.get("read_us")
        return DayFile(name.day, name.snapshot, path, mark.next, content, None if read_us is None else int(read_us))

    def _is_usable(self, path: File) -> bool:
        try:
            stat = stat_of(path)
        except FileNotFoundError:
            return False
        return _is_usable(path, self._required, stat.size, stat.mtime_ns)


def horizons(folder: Folder) -> Mapping[str, int]:
    """The horizon of retention that each retained range and emptied day records, by file name, microseconds."""

    def read() -> dict[str, int]:
        retained = [n for n in folder.names() if isinstance(n, SegmentName) and n.level == LEVELS[-1]]
        paths = [*map(folder.path_of, retained), *(day.path for day in folder.days().values() if day.rows == 0)]
        extras = {path.name: read_footer(path).extra for path in paths}
        return {name: int(extra["horizon_us"]) for name, extra in extras.items() if "horizon_us" in extra}

    return folder.settled(read)


def _chains_behind(place: ObjectPlace, prefix: str, number: Callable[[str], int | None]) -> Iterator[str]:
    """The chains whose names begin with a prefix, without a listing of all their files: one request a chain, and one.

    Of a chain that has no number a level at a time is passed by: names of one that has may lie between the levels.
    """
    after = prefix
    while (entry := place.first(prefix, after, lambda entry: chain_of(entry) is not None)) is not None:
        chain = chain_of(entry) or ""
        yield chain
        is_wanted = number(chain) is not None
        # The first digit of a position is 0, always; and `:` follows 9.
        after = f"{chain}-{LEVELS[-1] + 1}" if is_wanted else f"{entry[: len(chain) + 3]}0:"


def _segments(chain: str, entries: Iterable[str]) -> list[SegmentName]:
    own = (parse_name(entry) for entry in entries if entry.startswith(chain) and chain_of(entry) == chain)
    return [name for name in own if isinstance(name, SegmentName)]


@lru_cache(maxsize=65_536)
def _is_usable(path: File, required: tuple[str, ...], size: int, mtime_ns: int) -> bool:
    """Whether a foreign file can be read as history. Cached, so that one that cannot is named once a process."""
    try:
        found = pq.read_schema(readable(path)).names
    except (pa.ArrowException, OSError) as error:
        log.warning("%s is left out: it is not readable Parquet (%s); repair it or move it away", path, error)
        return False
    missing = [name for name in required if name not in found]
    if missing:
        text = "%s is left out: it lacks %s, it has %s; add the columns or move it away"
        log.warning(text, path, ", ".join(missing), ", ".join(found))
    return not missing
