"""Compaction: merge small segments into the next level, and remove what is covered once no reader can need it.

Purely physical: no row, column or order changes. Level 1 and 2 are extended from their own end by whole files of the
level below, by the same compare-and-swap as an append, so any number of compactors may run, sleep and die.
"""

from __future__ import annotations

import bisect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.chains import stays
from headrace.contract import ViewContract
from headrace.errors import LedgerError
from headrace.faults import reached
from headrace.folder import Chain, Folder
from headrace.place import File, readable, stat_of, whole
from headrace.segments import (
    ACCEPTED,
    ROWS_A_GROUP,
    DayName,
    Footer,
    Ranges,
    Rows,
    SegmentName,
    create,
    is_temporary,
    lift,
    new_append_id,
    read_footer,
    remove,
    writer_id,
)

GRACE_S = 3600.0
"""How long a covered file stays for those who listed it before: longer than the longest read."""

LEVEL_CAP_BYTES = 256 << 20
"""A merged file's size at most: large enough for any scan, small enough to merge in a minute and to prune by."""

FILES_A_MERGE = {1: 8, 2: 64}
"""How many files of the level below make a merge worth its writing; a row is written at most twice more."""

ACCEPTED_CAP_BYTES = 1 << 20
"""Of accepted ranges, or of notes, in a footer: readers load the whole of it to learn anything of the file."""

_GROUP_BYTES = 64 << 20
_TRIES = 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ChainCompaction:
    """What a compaction did to one chain. Files and bytes are of everything in the folder, covered files included."""

    files_before: int
    bytes_before: int
    files_after: int
    bytes_after: int
    rows_merged: int
    files_merged: int
    files_linked: int
    files_deleted: int


@dataclass(frozen=True)
class Compaction:
    """What a compaction did.

    Attributes:
        chains: by name.
        days_deleted: snapshots of days that a newer one had replaced.
        temporary_deleted: files of appends that died.
        seconds: how long it took.
    """

    chains: dict[str, ChainCompaction]
    days_deleted: int
    temporary_deleted: int
    seconds: float

    @property
    def rows_merged(self) -> int:
        """Of all chains."""
        return sum(chain.rows_merged for chain in self.chains.values())


@dataclass(frozen=True)
class Cleaning:
    """What was removed: the segments of each chain, and how many snapshots of days and temporary files."""

    segments: dict[str, int] = field(default_factory=dict)
    days: int = 0
    temporary: int = 0


def compact(
    contract: ViewContract,
    *,
    grace_s: float = GRACE_S,
    level_cap_bytes: int = LEVEL_CAP_BYTES,
    progress: Progress | None = None,
) -> Compaction:
    """Merge what may be merged in every chain of a view, then remove what is covered for longer than the grace.

    Safe beside appends, readers, retention and other compactions; after a crash the next run goes on. Memory is bounded
    by a row group; in an object store by a merged file, which is sent as a whole, and a file that it is merged of.

    Args:
        grace_s: seconds that a covered file, a replaced snapshot or a dead append's file stays; longer than a read.
        level_cap_bytes: the size of a merged file at most, by the sizes of its sources.
        progress: called with rows merged and rows to merge as far as known, after each row group.

    Raises:
        LedgerError: a chain has a hole, an overlap, or a file that cannot be read. The chains before it are done.
    """
    start = time.monotonic()
    folder = Folder.of(contract)
    before = _sizes(folder)
    work = {chain: _Work() for chain in before}
    for chain, own in work.items():
        for level in FILES_A_MERGE:
            _extend(folder, chain, level, level_cap_bytes, own, progress)
    cleaning = clean(folder, grace_s)
    after = _sizes(folder)
    chains = {
        chain: ChainCompaction(
            *before[chain],
            *after.get(chain, (0, 0)),
            own.rows,
            own.merged,
            own.linked,
            cleaning.segments.get(chain, 0),
        )
        for chain, own in work.items()
    }
    return Compaction(chains, cleaning.days, cleaning.temporary, time.monotonic() - start)


def clean(folder: Folder, grace_s: float = GRACE_S) -> Cleaning:
    """Remove covered segments, replaced snapshots of days and the files of dead appends, once older than the grace.

    A file's grace begins when what covers it came, by the clock of the file system or the object store; a clock that
    steps back prolongs it.
    """
    now_s = time.time()
    segments = {}
    for chain, state in folder.chains().items():
        due = _due(folder, state, now_s - grace_s)
        remove(*due, step="compact.8.covered-removed")
        segments[chain] = len(due)
    days = _superseded(folder, now_s - grace_s)
    remove(*days, step="compact.9.snapshot-removed")
    temporary = _dead(folder, now_s - grace_s)
    remove(*temporary, step="compact.10.temporary-removed")
    return Cleaning(segments, len(days), len(temporary))


def lift_segment(folder: Folder, name: SegmentName) -> bool:
    """Give a segment its name on the next level, the end of which must be its `first`.

    Returns:
        False when the name is taken or void: somebody else extended the level.
    """
    target = name._replace(level=name.level + 1)
    if not lift(folder.path_of(name), folder.path_of(target)):
        return False
    return stays(folder, target, "lift")


@dataclass
class _Work:
    """What has been done to a chain so far."""

    rows: int = 0
    merged: int = 0
    linked: int = 0


@dataclass(frozen=True)
class _Source:
    """A file to go up. `limits` are the things that files must share to be merged."""

    name: SegmentName
    path: File
    footer: Footer
    schema: pa.Schema
    limits: tuple[Any, ...]
    accepted: bytes
    rows: int
    bytes: int

    @property
    def note_bytes(self) -> int:
        """What it adds to the footer of a merged file."""
        return len(self.accepted) + len(json.dumps(self.footer.extra))

    @classmethod
    def read(cls, folder: Folder, name: SegmentName) -> _Source:
        path = folder.path_of(name)
        footer = read_footer(path)
        metadata = pq.read_metadata(readable(path))
        accepted = (metadata.metadata or {}).get(ACCEPTED, b"")
        schema = metadata.schema.to_arrow_schema().remove_metadata()
        # What cannot be joined without a loss keeps a file alone: a mark, or a note that is no list.
        notes = {key: type(value) for key, value in sorted(footer.extra.items())}
        is_alone = footer.mark is not None or any(kind is not list for kind in notes.values())
        limits = (name if is_alone else None, schema, footer.topic_id, tuple(notes))
        return cls(name, path, footer, schema, limits, accepted, metadata.num_rows, stat_of(path).size)


def _extend(folder: Folder, chain: str, level: int, cap_bytes: int, work: _Work, progress: Progress | None) -> None:
    """Extend a level as far as it goes. Whoever finds that another was faster plans again."""
    for _ in range(_TRIES):
        try:
            for run in _runs(folder, chain, level, cap_bytes):
                if not _go_up(folder, run, work, progress):
                    break
            else:
                return
        except FileNotFoundError:  # a source went up and was removed
            continue


def _runs(folder: Folder, chain: str, level: int, cap_bytes: int) -> list[list[_Source]]:
    """What extends a level, in order: each run is one new file.

    The newest file below stays, and so does a last run that is still too small to be worth it.
    """
    below = [s for s in folder.chain(chain).valid if s.level == level - 1][:-1]
    runs: list[list[_Source]] = []
    size = note_size = 0
    for name in below:
        source = _Source.read(folder, name)
        size, note_size = size + source.bytes, note_size + source.note_bytes
        is_joined = runs and runs[-1][0].limits == source.limits
        if is_joined and size <= cap_bytes and note_size <= ACCEPTED_CAP_BYTES:
            runs[-1].append(source)
        else:
            runs.append([source])
            size, note_size = source.bytes, source.note_bytes
    if runs and len(runs[-1]) < FILES_A_MERGE[level] and size < cap_bytes:
        runs.pop()
    return runs


def _go_up(folder: Folder, run: list[_Source], work: _Work, progress: Progress | None) -> bool:
    """Create the file of a run on the next level: by link where it is one file, else merged."""
    if len(run) == 1:
        is_up = lift_segment(folder, run[0].name)
        work.linked += is_up
        return is_up
    rows = sum(source.rows for source in run)
    name = run[0].name._replace(level=run[0].name.level + 1)

    def chunks() -> Iterator[pa.Table]:
        done = 0
        for chunk in _row_groups(run):
            yield chunk
            done += chunk.num_rows
            if progress is not None:
                progress(work.rows + done, work.rows + rows)
        reached("compact.0.sources-read")

    accepted = Ranges.joined([Ranges.decode(source.accepted) for source in run])
    if accepted.count not in (0, rows):
        msg = (
            f"{run[0].path} and the {len(run) - 1} files behind it hold {rows} rows and {accepted.count} offsets; "
            "they were not written by Headrace alone: restore them"
        )
        raise LedgerError(msg)
    if not create(folder.path_of(name), Rows(run[0].schema, chunks), _merged(run), accepted, operation="compact"):
        return False
    if not stays(folder, name, "compact"):
        return False
    work.rows += rows
    work.merged += len(run)
    return True


def _merged(run: Sequence[_Source]) -> Footer:
    """The footer of a merged file."""
    footers = [source.footer for source in run]
    lows = [f.min_us for f in footers if f.min_us is not None]
    highs = [f.max_us for f in footers if f.max_us is not None]
    return Footer(
        next=footers[-1].next,
        rejected=sum(f.rejected for f in footers),
        skipped=sum(f.skipped for f in footers),
        min_us=min(lows, default=None),
        max_us=max(highs, default=None),
        topic_id=footers[0].topic_id,
        transforms=tuple(dict.fromkeys(t for f in footers for t in f.transforms)),
        servers=tuple(dict.fromkeys(s for f in footers for s in f.servers)),
        writer=writer_id(),
        append=new_append_id(),
        extra={key: [note for f in footers for note in f.extra[key]] for key in footers[0].extra},
    )


def _row_groups(run: Sequence[_Source]) -> Iterator[pa.Table]:
    """The rows of several files as tables of one row group each: bounded in rows and in bytes."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for source in run:
        for batch in _batches(source.path):
            held.append(batch)
            rows += batch.num_rows
            size += batch.nbytes
            if rows >= ROWS_A_GROUP or size >= _GROUP_BYTES:
                yield pa.Table.from_batches(held, run[0].schema)
                held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held, run[0].schema)


def _batches(path: File) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(whole(path)) as file:
            yield from file.iter_batches(batch_size=ROWS_A_GROUP // 8)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        msg = f"{path}: expected a whole segment, its rows cannot be read: {error}; restore the file"
        raise LedgerError(msg) from error


def _sizes(folder: Folder) -> dict[str, tuple[int, int]]:
    """By chain: how many files there are, and how many bytes; a file under two names is counted once."""
    files: dict[str, dict[int | str, int]] = {}
    for name in folder.names():
        if isinstance(name, SegmentName):
            try:
                stat = stat_of(folder.path_of(name))
            except FileNotFoundError:
                continue
            is_object = folder.place.begins_anywhere  # there a file lifted is a copy
            files.setdefault(name.chain, {})[str(name) if is_object else stat.identity] = stat.size
    return {chain: (len(sizes), sum(sizes.values())) for chain, sizes in sorted(files.items())}


def _due(folder: Folder, chain: Chain, before_s: float) -> list[File]:
    """The files of a chain that no reader can need, in the order in which they must go.

    On each level ascending without a gap: who finds an earlier file in place knows that no later name was freed.
    """
    firsts = [segment.first for segment in chain.valid]
    valid = set(chain.valid)
    due: list[File] = []
    waiting: set[int] = set()
    for segment in sorted(folder.segments(chain.name)):
        place = bisect.bisect_right(firsts, segment.first) - 1
        if segment.first >= chain.end:
            continue  # it came after the chain was looked at
        if segment in valid or segment.level in waiting or place < 0 or chain.valid[place].level <= segment.level:
            continue
        path, cover = folder.path_of(segment), folder.path_of(chain.valid[place])
        if _is_older(before_s, path, cover):
            due.append(path)
        else:
            waiting.add(segment.level)
    return due


def _superseded(folder: Folder, before_s: float) -> list[File]:
    own: dict[Any, list[DayName]] = {}
    for name in sorted(n for n in folder.names() if isinstance(n, DayName)):
        own.setdefault(name.day, []).append(name)
    return [
        folder.path_of(name)
        for names in own.values()
        for name in names[:-1]
        if _is_older(before_s, folder.path_of(name), folder.path_of(names[-1]))
    ]


def _dead(folder: Folder, before_s: float) -> list[File]:
    return [path for path in folder.place.temporary(is_temporary) if _is_older(before_s, path)]


def _is_older(before_s: float, *paths: File) -> bool:
    """Whether all files came before a time; one that is gone did not, and who removed it goes on.

    The time of the last change of the inode: no tool sets it back, and a link counts as a change. A covered file's own
    is asked too: where the clock stepped back in between, what covers it seems older than it is.
    """
    try:
        return max(stat_of(path).changed_s for path in paths) <= before_s
    except FileNotFoundError:
        return False
