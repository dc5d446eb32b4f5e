"""One segment: its name, its footer, and how it comes to be. The format is plain Parquet that any reader opens.

A name is parsed from the right: `<chain>-<level>-<first>.parquet` for a chain, `batch-<YYYY-MM-DD>-<snapshot>.parquet`
for an ETL day; `first` and `snapshot` have 20 digits. Two entries in the footer's key-value metadata, `headrace` (JSON)
and `headrace.accepted`, say where the chain ends now and which offsets the rows came from.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import socket
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import lru_cache, partial
from hashlib import blake2b
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.errors import LedgerError
from headrace.place import SUFFIX, File, place_of, read_tail, readable, stat_now, stat_of, told

FORMAT_VERSION = 1
META = b"headrace"
ACCEPTED = b"headrace.accepted"
_META_KEY = b"\x18\x08headrace\x18"  # as Thrift writes the key, and that a value follows
_TAIL_BYTES = 1 << 16
_CHAIN = re.compile(r"stream-.+-\d+-\d+|push|replay-.+")
_TEMPORARY = re.compile(r"\..+\.parquet\.[0-9a-f]{32}\.tmp")
_DAY_NAME = re.compile(r"batch-(?P<day>\d{4}-\d{2}-\d{2})-(?P<snapshot>\d{20})")
_ENDING = len("-0-") + 20 + len(SUFFIX)

REPLAY = "replay-"
"""How the chain of a topic's dead letters that were accepted later begins; the topic's name follows."""

LEVELS = (0, 1, 2, 3)
"""0 is appended to, 1 and 2 are compaction's, 3 is retention's."""

ROWS_A_GROUP = 131_072
"""Rows of a row group: enough to compress and scan well, few enough that its statistics let a reader skip it."""

DICTIONARY_BYTES = 131_072
"""Where a column's dictionary is given up. A group's numbers never reach Arrow's own 1 MiB, even if all differ: then it
is made in vain, at twice the cost of all the rest."""

Offsets = npt.NDArray[np.int64]


class SegmentName(NamedTuple):
    """The name of a segment of a chain. A tuple, because a folder may hold a hundred thousand."""

    chain: str
    level: int
    first: int

    def __str__(self) -> str:
        return f"{self.chain}-{self.level}-{self.first:020d}{SUFFIX}"


class DayName(NamedTuple):
    """The name of one snapshot of an ETL day. `snapshot` is in microseconds since the epoch."""

    day: date
    snapshot: int

    def __str__(self) -> str:
        return f"batch-{self.day.isoformat()}-{self.snapshot:020d}{SUFFIX}"


@dataclass(frozen=True)
class Footer:
    """What a segment says of itself.

    Attributes:
        next: where the chain ends with this segment; for a day the count of its rows.
        rejected, skipped: how many records between first and next are dead letters, and tombstones or the like.
        min_us, max_us: bounds of the rows' event times, inclusive, microseconds; None without rows.
        topic_id: the id of the topic that the offsets belong to.
        transforms: the hashes of the transformations that made the rows.
        servers: the ids of the online servers that had the rows when the segment was appended.
        writer, append: the process, and the id of this very append; of a day nothing, and its content hash.
        mark: `before` (positions from before Headrace began), `gap` (a head that the topic lost), `closed`,
            `retained` (rows that retention removed).
        successor: for a closed chain, the new topic's id and its start.
        extra: of a day, what the batch chain notes: content hash and the like; of what retention made, its horizon;
            of a replay, `origins`: of each partition in turn the epoch, its number and the ranges of its rows' offsets.
        columns: what `columns_id` says of the file's columns; set when it is written.
    """

    next: int
    rejected: int = 0
    skipped: int = 0
    min_us: int | None = None
    max_us: int | None = None
    topic_id: str | None = None
    transforms: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    writer: str = ""
    append: str = ""
    mark: str | None = None
    successor: tuple[str, int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    columns: str | None = None
    version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The footer's `headrace` entry."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Footer:
        """Read a footer. Entries that a later minor format added are ignored.

        Raises:
            ValueError: no footer, or one of a format that this version cannot read.
        """
        values = json.loads(text)
        if values.get("version") != FORMAT_VERSION:
            msg = f"format version {values.get('version')!r}, expected {FORMAT_VERSION}"
            raise ValueError(msg)
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        known["transforms"] = tuple(known.get("transforms", ()))
        known["servers"] = tuple(known.get("servers", ()))
        if known.get("successor") is not None:
            known["successor"] = (str(known["successor"][0]), int(known["successor"][1]))
        return cls(**known)


@dataclass(frozen=True)
class Rows:
    """Rows that are too many to hold: `chunks` gives them anew each time it is called; a chunk is a row group."""

    schema: pa.Schema
    chunks: Callable[[], Iterable[pa.Table]]


def chain_of(entry: str) -> str | None:
    """The chain that a file name belongs to; None for one that is no segment of a chain."""
    number = entry[-28:-8]
    if entry[-8:] != SUFFIX or entry[-29:-28] != "-" or entry[-31:-30] != "-" or entry[-30:-29] not in "0123":
        return None
    if len(number) != 20 or not number.isdecimal() or not number.isascii():
        return None
    chain = entry[:-_ENDING]
    return chain if _is_chain(chain) else None


def parse_name(name: str) -> SegmentName | DayName | None:
    """The meaning of a file name; None for a file that is not ours."""
    chain = chain_of(name)
    if chain is not None:
        return SegmentName(chain, int(name[-30]), int(name[-28:-8]))
    if name.startswith("batch-") and (match := _DAY_NAME.fullmatch(name.removesuffix(SUFFIX))):
        with contextlib.suppress(ValueError):
            day = DayName(date.fromisoformat(match["day"]), int(match["snapshot"]))
            return day if str(day) == name else None
    return None


def is_temporary(name: str) -> bool:
    """Whether a file name is that of a segment being written."""
    return _TEMPORARY.fullmatch(name) is not None


@lru_cache(maxsize=65_536)
def _is_chain(name: str) -> bool:
    return _CHAIN.fullmatch(name) is not None


def stream_chain(topic: str, partition: int, epoch: int) -> str:
    """The chain of one partition of one topic in one epoch."""
    return f"stream-{topic}-{partition}-{epoch}"


def parse_stream_chain(chain: str) -> tuple[str, int, int] | None:
    """`(topic, partition, epoch)` of a stream chain; None for another."""
    if not chain.startswith("stream-"):
        return None
    topic, partition, epoch = chain.removeprefix("stream-").rsplit("-", 2)
    return topic, int(partition), int(epoch)


def columns_id(schema: pa.Schema) -> str:
    """An id of column names, types and order, 16 hexadecimal digits: files that share it can be read as one table."""
    columns = "\n".join(f"{column.name}:{_type_text(column.type)}" for column in schema)
    return blake2b(columns.encode(), digest_size=8).hexdigest()


def _type_text(kind: pa.DataType) -> str:
    """A type as text; Parquet does not keep what Arrow calls the items of a list."""
    if pa.types.is_list(kind):
        return f"list<{_type_text(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{','.join(f'{part.name}:{_type_text(part.type)}' for part in kind)}>"
    return str(kind)


def new_append_id() -> str:
    """An id for one append and its repetitions."""
    return uuid.uuid4().hex


def writer_id() -> str:
    """This process, for people who read footers."""
    return f"{socket.gethostname()}:{os.getpid()}"


def create(
    path: File,
    rows: pa.Table | Rows,
    footer: Footer,
    accepted: Offsets | Ranges | None = None,
    *,
    operation: str = "append",
) -> bool:
    """Create a segment exclusively and durably; the name appears with its whole content or not at all.

    How is in `headrace.place`.

    Returns:
        False when the name was taken by another append; True when it is ours, also by an earlier try.

    Raises:
        ConfigError: the view's folder is a file.
        LedgerError: the name is taken by a file that cannot be read.
        TransientError: the object store does not answer, or refuses; whether the segment is there is not known.
    """
    return place_of(path.parent).create(
        path.name, partial(_write, rows, footer, accepted), lambda: _has_append(path, footer.append), operation
    )


def lift(source: File, target: File) -> bool:
    """Give a segment a second name, exclusively and durably.

    Returns:
        False when the name is taken.

    Raises:
        FileNotFoundError: the source is gone.
        TransientError: see `create`.
    """
    return place_of(source.parent).lift(
        source.name, target.name, lambda: _has_append(target, read_footer(source).append)
    )


def remove(*paths: File, step: str = "remove.1.removed") -> None:
    """Remove files of one folder, in the order given, durably; those that are gone already are fine."""
    if paths:
        place_of(paths[0].parent).remove([path.name for path in paths], step)


def read_footer(path: File) -> Footer:
    """The footer of a segment, cached by name, inode (of an object its ETag), size and time.

    Raises:
        FileNotFoundError: it is gone.
        LedgerError: it is not a whole segment of ours.
        TransientError: the object store does not answer.
    """
    stat = stat_of(path)
    return _read_footer(told(path, stat), stat.size, stat.mtime_ns, stat.identity)


@lru_cache(maxsize=262_144)
def _read_footer(path: File, size: int, mtime_ns: int, identity: int | str) -> Footer:
    del mtime_ns, identity  # part of the key: where a folder was removed and filled anew, names come again
    try:
        return Footer.from_json(_quick_note(path, size) or _entries(path)[META])
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOENT:
            raise
        msg = (
            f"{path}: expected a segment with a `headrace` footer, found {type(error).__name__}: {error}; "
            "docs/how-to/rebuild.md says how it is restored"
        )
        raise LedgerError(msg) from error


def _quick_note(path: File, size: int) -> bytes | None:
    """The `headrace` entry by its bytes, six times as fast as by Arrow; None where that must look.

    The entries are the last thing in Parquet's metadata that could hold such bytes, and ours holds them not: JSON
    escapes them. So the last place where they are is the entry.
    """
    tail = bytes(read_tail(path, size, _TAIL_BYTES))
    start = tail.rfind(_META_KEY) + len(_META_KEY)
    if not tail.endswith(b"PAR1") or start < len(_META_KEY):
        return None
    length = next(_varints(tail[start : start + 10]))
    start += -(-max(length.bit_length(), 1) // 7)
    return tail[start : start + length] if start + length < len(tail) else None


def read_accepted(path: File) -> Offsets:
    """The offset of each row of a stream segment, in row order, ascending."""
    return decode_ranges(_entries(path).get(ACCEPTED, b""))


def read_origins(footer: Footer) -> list[tuple[int, int, Offsets]]:
    """Epoch, partition and offsets of the rows of a replay's segment, in row order; none for other segments."""
    return [
        (int(epoch), int(partition), decode_ranges(ranges.encode()))
        for epoch, partition, ranges in footer.extra.get("origins", ())
    ]


@dataclass(frozen=True)
class Ranges:
    """Ascending numbers as ranges `[start, end)`, ascending, none touching the next."""

    starts: Offsets
    ends: Offsets

    @classmethod
    def of(cls, offsets: Offsets) -> Ranges:
        """The ranges of strictly ascending numbers."""
        if len(offsets) == 0:
            return cls(offsets, offsets)
        breaks = np.flatnonzero(np.diff(offsets) != 1)
        return cls(offsets[np.concatenate(([0], breaks + 1))], offsets[np.concatenate((breaks, [-1]))] + 1)

    @classmethod
    def joined(cls, pieces: Sequence[Ranges]) -> Ranges:
        """Several, one behind the other, as one."""
        starts = np.concatenate([piece.starts for piece in pieces])
        ends = np.concatenate([piece.ends for piece in pieces])
        apart = starts[1:] != ends[:-1]
        if len(starts) == 0:
            return cls(starts, ends)
        apart = np.flatnonzero(starts[1:] != ends[:-1])
        return cls(starts[np.concatenate(([0], apart + 1))], ends[np.concatenate((apart, [-1]))])

    @property
    def count(self) -> int:
        """How many numbers."""
        return int((self.ends - self.starts).sum())

    def encode(self) -> bytes:
        """LEB128 varints of (gap since the last range, length), deflated, in base64.

        Base64 because Parquet's metadata are UTF-8 text to many readers.
        """
        if len(self.starts) == 0:
            return b""
        gaps = self.starts - np.concatenate(([0], self.ends[:-1]))
        out = bytearray()
        for value in np.column_stack((gaps, self.ends - self.starts)).ravel().tolist():
            rest = value
            while rest > 0x7F:
                out.append(rest & 0x7F | 0x80)
                rest >>= 7
            out.append(rest)
        return base64.b64encode(zlib.compress(bytes(out), 1))

    @classmethod
    def decode(cls, text: bytes) -> Ranges:
        """The inverse of `encode`."""
        numbers = list(_varints(zlib.decompress(base64.b64decode(text)))) if text else []
        bounds: Offsets = np.cumsum(np.array(numbers, dtype=np.int64))
        return cls(bounds[::2], bounds[1::2])

    def offsets(self) -> Offsets:
        """Every number."""
        lengths = self.ends - self.starts
        before = np.cumsum(lengths) - lengths
        every: Offsets = np.arange(self.count, dtype=np.int64) + np.repeat(self.starts - before, lengths)
        return every


def encode_ranges(offsets: Offsets) -> bytes:
    """Strictly ascending offsets as the text of a footer."""
    return Ranges.of(offsets).encode()


def decode_ranges(text: bytes) -> Offsets:
    """The inverse of `encode_ranges`."""
    return Ranges.decode(text).offsets()


def _entries(path: File) -> Mapping[bytes, bytes]:
    return pq.read_metadata(readable(path)).metadata or {}


def _varints(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value = shift = 0


def time_bounds(table: pa.Table, column: str) -> tuple[int | None, int | None]:
    """The least and greatest time of a column, inclusive, in microseconds; None without rows."""
    bounds = pc.min_max(table.column(column).cast(pa.int64()))
    return bounds["min"].as_py(), bounds["max"].as_py()


def _has_append(path: File, append: str) -> bool | None:
    """Whether what has a name now is of an append; None where nothing has it."""
    stat = stat_now(path)
    try:
        return None if stat is None else read_footer(told(path, stat)).append == append
    except FileNotFoundError:
        return None


def _write(rows: pa.Table | Rows, footer: Footer, accepted: Offsets | Ranges | None, sink: IO[bytes]) -> None:
    chunks = rows.chunks() if isinstance(rows, Rows) else (rows,)
    # Without Arrow's own schema entry the footer has ours alone; the types survive, being Parquet's.
    with pq.ParquetWriter(
        sink,
        rows.schema,
        compression="zstd",
        dictionary_pagesize_limit=DICTIONARY_BYTES,
        store_schema=False,
        write_page_checksum=True,  # so that `headrace.damage` finds a flipped bit
    ) as writer:
        for chunk in chunks:
            writer.write_table(chunk, row_group_size=ROWS_A_GROUP)
        entries = {META.decode(): replace(footer, columns=columns_id(rows.schema)).to_json()}
        ranges = accepted if isinstance(accepted, Ranges) or accepted is None else Ranges.of(accepted)
        if ranges is not None and ranges.count:
            entries[ACCEPTED.decode()] = ranges.encode().decode()
        writer.add_key_value_metadata(entries)
