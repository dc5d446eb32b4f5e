"""Files as a source: CSV or Parquet, one or many, matched by a pattern.

With `{date}` in the pattern a day is what was dropped for it. Without, rows are chosen by the window's column as those
of a table are; of Parquet, only the row groups that can hold such rows are read.

All files of a read have the same columns. Whose name begins with `.` or `_` is passed over: it is still being written.
A file that changed while it was read, or ends within a row, is one too: it is worth another try.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from batch.sources.columns import Column, Kind, choose, widest
from batch.sources.odd import ODD, fit, one_chunk
from headrace.conform import parse_timestamps
from headrace.contract import TIMESTAMP, ViewContract
from headrace.errors import ConfigError, SchemaError, TransientError

DATE = "{date}"
_ENDINGS = (".csv", ".csv.gz", ".parquet")
_BLOCK_BYTES = 4 * 2**20
"""Of CSV at once. No row may be longer."""


@dataclass(frozen=True)
class _File:
    """A file as it was when it was looked at."""

    path: Path
    identity: tuple[int, int, int]
    columns: dict[str, Column]

    @property
    def is_parquet(self) -> bool:
        return self.path.suffix == ".parquet"


@dataclass(frozen=True)
class Drops:
    """A view's files, looked at and found fit; a `batch.source.Source`. Holds no open file.

    Attributes:
        window_column: None where the pattern tells the day.
        rows: how many rows of the day each file gave; known once it was read.
        lost: how many rows have no time, by file.
    """

    pattern: str
    repo: Path
    files: tuple[_File, ...]
    columns: dict[str, str]
    schema: pa.Schema
    window_column: str | None
    ignored: tuple[str, ...]
    rows: dict[Path, int] = field(default_factory=dict)
    lost: dict[Path, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The pattern."""
        return self.pattern

    def read(self, day: date, chunk_rows: int) -> Iterator[pa.Table]:
        """As `Source.read`, file by file. Memory: a block of CSV, or `chunk_rows` rows and the pages they are in."""
        for file in self.files:
            self.rows[file.path] = self.lost[file.path] = 0
            with _readable(file.path):
                batches = self._parquet(file, day, chunk_rows) if file.is_parquet else self._csv(file)
                for batch in batches:
                    table = self._of(fit(batch, self.schema), file, day)
                    self.rows[file.path] += table.num_rows
                    for first in range(0, table.num_rows, chunk_rows):
                        yield table.slice(first, chunk_rows)
                if _identity(file.path) != file.identity:
                    msg = f"file {file.path} was changed while it was read; it is tried again"
                    raise TransientError(msg)

    def rows_of_no_day(self) -> int | None:
        """As `Source.rows_of_no_day`: counted while reading. None where the pattern tells the day."""
        return None if self.window_column is None else sum(self.lost.values())

    def describe(self) -> dict[str, Any]:
        """The files that were read: all of a day's, or those that had rows of it."""
        files = [
            {
                "path": os.path.relpath(file.path, self.repo),
                "bytes": file.identity[1],
                "modified": datetime.fromtimestamp(file.identity[2] / 1e9, UTC),
                "rows": self.rows.get(file.path, 0),
            }
            for file in self.files
            if self.window_column is None or self.rows.get(file.path)
        ]
        return {"files": files, "files_matched": len(self.files)}

    def _csv(self, file: _File) -> Iterator[pa.Table]:
        wanted = [name for name in self.schema.names if name != ODD]
        with pa.input_stream(str(file.path)) as stream, _open_csv(stream, wanted) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch])

    def _parquet(self, file: _File, day: date, chunk_rows: int) -> Iterator[pa.Table]:
        wanted = [name for name in self.schema.names if name != ODD]
        with pq.ParquetFile(file.path, pre_buffer=False) as parquet:
            groups = self._groups(parquet, file, day)
            for batch in parquet.iter_batches(chunk_rows, row_groups=groups, columns=wanted, use_threads=False):
                yield pa.Table.from_batches([batch])

    def _groups(self, parquet: pq.ParquetFile, file: _File, day: date) -> list[int]:
        """The row groups that can hold rows of a day, as their statistics say. What the others lack is counted."""
        every = list(range(parquet.num_row_groups))
        if self.window_column is None:
            return every
        kind = parquet.schema_arrow.field(self.window_column).type
        if not pa.types.is_timestamp(kind):
            return every
        lower, upper = (pa.scalar(edge, pa.timestamp("us")).cast(kind) for edge in _edges(day, kind.tz is not None))
        column = ds.field(self.window_column)
        fragment = ds.ParquetFileFormat().make_fragment(str(file.path), filesystem=LocalFileSystem())
        near = fragment.subset((column >= lower) & (column < upper), schema=parquet.schema_arrow)
        kept = {group.id for group in near.row_groups}
        leaves = [parquet.metadata.schema.column(number).path for number in range(parquet.metadata.num_columns)]
        leaf = leaves.index(self.window_column)
        for group in set(every) - kept:
            statistics = parquet.metadata.row_group(group).column(leaf).statistics
            if statistics is None or not statistics.has_null_count:
                kept.add(group)
            else:
                self.lost[file.path] += statistics.null_count
        return sorted(kept)

    def _of(self, table: pa.Table, file: _File, day: date) -> pa.Table:
        """The rows of a day. Text that begins like the day but is no time is of it, so that `Clean` can say so."""
        if self.window_column is None:
            return table
        column = one_chunk(table.column(self.window_column))
        times = column if pa.types.is_timestamp(column.type) else parse_timestamps(column)[0]
        lower, upper = (pa.scalar(edge, TIMESTAMP) for edge in _edges(day, True))
        within = pc.and_(pc.greater_equal(times, lower), pc.less(times, upper)).fill_null(False)
        if times is not column:
            unreadable = pc.and_(times.is_null(), pc.starts_with(column, str(day)).fill_null(False))
            within = pc.or_(within, unreadable)
            dated = pc.match_substring_regex(column, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}").fill_null(False)
            lost = pc.and_(times.is_null(), pc.invert(dated))
        else:
            lost = times.is_null()
        self.lost[file.path] += int(np.count_nonzero(lost.to_numpy(zero_copy_only=False)))
        return table.filter(within)


def open_drops(repo: Path, contract: ViewContract, pattern: str, window_column: str, day: date | None) -> Drops:
    """Look at a view's files before anything is read.

    Args:
        repo: the feature repository, in which a relative pattern begins.
        day: whose drop it is; None for the look before any day. Without a day or a file of it nothing is judged.

    Raises:
        ConfigError: a pattern that cannot be one, no file matches one without `{date}`, or no column tells the day.
        SchemaError: as `choose`, or the files are not all alike.
        TransientError: a file cannot be read.
    """
    if not pattern.endswith(_ENDINGS):
        msg = (
            f"feature view `{contract.name}`: tag source_files={pattern!r} must end in one of {', '.join(_ENDINGS)}, "
            'as in {"source_files": "../drops/{date}/*.parquet"}'
        )
        raise ConfigError(msg)
    by_drop = DATE in pattern
    paths = _find(repo, pattern.replace(DATE, str(day))) if day is not None or not by_drop else []
    if not paths and not by_drop:
        msg = (
            f"feature view `{contract.name}`: no file matches its tag source_files={pattern!r} in {repo.resolve()}; "
            "correct the tag, or put the files there"
        )
        raise ConfigError(msg)
    files = tuple(_look(path) for path in paths)
    window = None if by_drop else window_column
    what = f"source `{pattern}`"
    if not files:
        fields = [pa.field(column.name, widest(column.type)) for column in contract.schema]
        return Drops(pattern, repo, files, {}, pa.schema([*fields, pa.field(ODD, pa.string())]), window, ())
    columns = _merged(files, what)
    chosen = choose(contract, what, columns, window, times_are_text=True)
    kinds = {column.name: str(column.kind or column.declared) for column in columns}
    return Drops(pattern, repo, files, kinds, chosen.schema, window, chosen.ignored)


def _find(repo: Path, pattern: str) -> list[Path]:
    fixed = set(Path(pattern).parts)
    found = sorted(glob.glob(pattern, root_dir=repo, recursive=True))
    hidden = {
        name for name in found if any(part.startswith((".", "_")) for part in Path(name).parts if part not in fixed)
    }
    return [path for name in found if name not in hidden and (path := (repo / name).resolve()).is_file()]


def _look(path: Path) -> _File:
    with _readable(path):
        identity = _identity(path)
        if path.suffix == ".parquet":
            columns = [_column(one) for one in pq.read_schema(path)]
        else:
            with pa.input_stream(str(path)) as stream, pc_csv.open_csv(stream) as reader:
                columns = [Column(name, "text", None, pa.string()) for name in reader.schema.names]
    by_name = {column.name: column for column in columns}
    if len(by_name) < len(columns):
        names = [column.name for column in columns]
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
        msg = f"file {path} has a column of one name more than once: {twice}; nothing was read: name each once"
        raise SchemaError(msg)
    return _File(path, identity, by_name)


def _merged(files: Sequence[_File], what: str) -> list[Column]:
    """The columns of all files, which must be alike.

    Raises:
        SchemaError: names the files and how they differ.
    """
    first = files[0]
    merged = dict(first.columns)
    for file in files[1:]:
        differences = [f"lacks `{name}`" for name in first.columns if name not in file.columns]
        for name, column in file.columns.items():
            known = merged.get(name)
            if known is None:
                differences.append(f"has `{name}` more")
            elif known.kind is None and known.declared == "null":
                merged[name] = column
            elif column.kind != known.kind and column.declared != "null":
                differences.append(f"has `{name}` as {column.kind}, not as {known.kind}")
            elif pa.types.is_floating(column.wide):
                merged[name] = column
        if differences:
            msg = (
                f"the files of {what} are not alike: {file.path.name} {', '.join(differences)} "
                f"(beside {first.path.name}, both in {_folder(first, file)}); nothing was read: "
                "write all files of a drop alike"
            )
            raise SchemaError(msg)
    return list(merged.values())


def _folder(one: _File, other: _File) -> str:
    return os.path.commonpath([one.path.parent, other.path.parent])


def _column(found: pa.Field) -> Column:
    """What a column of a Parquet file is meant to hold."""
    kind = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    means, wide = _meaning(kind)
    return Column(found.name, str(kind), means, wide)


def _meaning(kind: pa.DataType) -> tuple[Kind | None, pa.DataType]:
    is_decimal = pa.types.is_decimal(kind)
    if pa.types.is_integer(kind) or (is_decimal and kind.scale == 0):
        return Kind.NUMBER, pa.int64()
    if pa.types.is_floating(kind) or is_decimal:
        return Kind.NUMBER, pa.float64()
    if pa.types.is_boolean(kind):
        return Kind.BOOLEAN, pa.bool_()
    if pa.types.is_timestamp(kind):
        return Kind.TIME, TIMESTAMP
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return Kind.LIST, pa.list_(_meaning(kind.value_type)[1])
    if pa.types.is_struct(kind):
        return Kind.OTHER, kind
    if pa.types.is_null(kind):
        return None, pa.string()
    if isinstance(kind, pa.BaseExtensionType):
        return Kind.JSON if isinstance(kind, pa.JsonType) else Kind.TEXT, pa.string()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return Kind.TEXT, pa.string()
    if pa.types.is_temporal(kind) or pa.types.is_map(kind):
        return Kind.OTHER, pa.string()
    return Kind.BINARY, pa.binary()


def _open_csv(stream: pa.NativeFile, wanted: list[str]) -> pc_csv.CSVStreamingReader:
    """Every value as its bytes; an empty one is null, a quoted empty one is not."""
    return pc_csv.open_csv(
        stream,
        read_options=pc_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pc_csv.ParseOptions(newlines_in_values=True),
        convert_options=pc_csv.ConvertOptions(
            check_utf8=False,
            column_types=dict.fromkeys(wanted, pa.binary()),
            include_columns=wanted,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong with a file becomes ours, in one line."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        msg = f"file {path} could not be read: {reason}; it is tried again"
        raise TransientError(msg) from None


def _identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file does: its number, size in bytes, and time of change in nanoseconds."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _edges(day: date, has_zone: bool) -> tuple[datetime, datetime]:
    lower = datetime(day.year, day.month, day.day, tzinfo=UTC if has_zone else None)
    return lower, lower + timedelta(days=1)
