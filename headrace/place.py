"""Where the files of a view lie: in a folder of this machine, or behind a prefix of an object store.

The ledger needs few things of a place, and says here what: that a file is created exclusively, whole and durably; that
one which is there can have a second name on the next level; that files are removed in an order; and that names can be
listed. Everything else is the same for both.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import pyarrow as pa

from headrace import objects
from headrace.errors import ConfigError, TransientError
from headrace.faults import reached
from headrace.objects import ObjectPath, Stat

File: TypeAlias = Path | ObjectPath
"""A file of a view, or the folder or prefix of all of them. Prints as other programs know it: a path, or a URL."""

Write: TypeAlias = Callable[[IO[bytes]], None]

SUFFIX = ".parquet"

_TRIES = 10
_PAUSE_S = 0.1
_AT_ONCE = 16
"""Requests under way, where many small ones are made: each waits, and hardly works."""


class Place(Protocol):
    """What the ledger needs of where its files lie.

    Attributes:
        begins_anywhere: whether a listing may begin at a name, so that what lies before it costs nothing.
    """

    begins_anywhere: bool

    def prepare(self) -> None:
        """See to it that files can be created.

        Raises:
            ConfigError, OSError: they cannot until somebody changes something.
            TransientError: they cannot now.
        """

    def file(self, name: str) -> File:
        """Where a file lies; with what the last listings said of it, where they did."""

    def names(self, prefix: str = "", after: str = "") -> Iterable[str]:
        """The names right in the place, in no order; none where there is no such place.

        Args:
            prefix, after: names that do not begin with the one, or are not greater than the other, may be left out.
        """

    def foreign(self, is_own: Callable[[str], bool]) -> list[File]:
        """The Parquet files in the place and below it that are not named as ours; hidden ones are left out. Sorted."""

    def temporary(self, is_own: Callable[[str], bool]) -> list[File]:
        """What writers that died left behind."""

    def create(self, name: str, write: Write, is_ours: Callable[[], bool | None], operation: str) -> bool:
        """Create a file exclusively and durably; the name appears with its whole content or not at all.

        Args:
            is_ours: whether the file that has the name now is what we are creating; None where there is none.

        Returns:
            False when the name was taken by another; True when it is ours, also by an earlier try.
        """

    def lift(self, source: str, target: str, is_ours: Callable[[], bool | None]) -> bool:
        """Give a file a second name, exclusively and durably.

        Returns:
            False when the name is taken.

        Raises:
            FileNotFoundError: the source is gone.
        """

    def remove(self, names: Iterable[str], step: str) -> None:
        """Remove files, in the order given, durably; those that are gone already are fine."""

    def set_aside(self, name: str, identity: int | str, below: str) -> None:
        """Move a file to a folder below, durably, where no reader looks; with a number where its name is taken there.

        Args:
            identity: of the file that is meant, as `stat_of` says it. Another one of its name stays.
        """

    def read_ahead(self, work: Callable[[File], object], files: Iterable[File]) -> None:
        """Do for each file what will be done for it anyway, many at a time where each one mostly waits."""


def place_of(folder: File) -> Place:
    """The place of a folder or a prefix."""
    return ObjectPlace(folder) if isinstance(folder, ObjectPath) else LocalPlace(folder)


def stat_of(file: File) -> Stat:
    """What is known of a file: what the listing that it comes from said, else what its place says now.

    Raises:
        FileNotFoundError: it is gone.
    """
    if isinstance(file, ObjectPath):
        return file.told or objects.head(file)
    found = file.stat()
    return Stat(found.st_size, found.st_mtime_ns, found.st_ctime, found.st_ino)


def stat_now(file: File) -> Stat | None:
    """What the place says of a file now; None where it is gone."""
    try:
        return objects.head(file) if isinstance(file, ObjectPath) else stat_of(file)
    except FileNotFoundError:
        return None


def told(file: File, stat: Stat | None) -> File:
    """The file, with what is known of it."""
    return replace(file, told=stat) if isinstance(file, ObjectPath) else file


def readable(file: File) -> Any:
    """What Arrow reads the file from."""
    return pa.PythonFile(objects.ObjectReader(file), mode="r") if isinstance(file, ObjectPath) else file


def whole(file: File) -> Any:
    """The same for who reads all of it: one request."""
    return pa.BufferReader(pa.py_buffer(_content(file))) if isinstance(file, ObjectPath) else file


def stands(file: File) -> bool:
    """Whether a file is there still; an object, as it was when it was listed."""
    stat, told_of = stat_now(file), file.told if isinstance(file, ObjectPath) else None
    return stat is not None and (told_of is None or told_of.identity == stat.identity)


def is_within(file: File, folder: File) -> bool:
    """Whether it is that folder or prefix, or within it."""
    if isinstance(file, ObjectPath):
        return file.is_relative_to(folder)
    return not isinstance(folder, ObjectPath) and file.is_relative_to(folder)


def clear(folder: File) -> None:
    """Remove a folder or a prefix with all that is in it, as far as that goes."""
    if isinstance(folder, ObjectPath):
        with contextlib.suppress(TransientError):
            for name, _ in objects.listing(folder):
                objects.remove(folder / name)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def read_tail(file: File, size: int, count: int) -> bytes | memoryview:
    """The last bytes of a file of a size."""
    if isinstance(file, ObjectPath):
        return objects.read(file, max(0, size - count), size)
    with file.open("rb", buffering=0) as source:
        source.seek(-min(size, count), os.SEEK_END)
        return source.read()


class LocalPlace:
    """A folder of this machine."""

    begins_anywhere = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """See `Place`: makes the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        """See `Place`."""
        return self._folder / name

    def names(self, prefix: str = "", after: str = "") -> list[str]:
        """See `Place`. All names: the folder gives them at once."""
        del prefix, after
        try:
            return os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def foreign(self, is_own: Callable[[str], bool]) -> list[File]:
        """See `Place`. The place itself where it is a file."""
        if self._folder.is_file():
            return [self._folder]
        return sorted(_foreign(self._folder, is_own))

    def temporary(self, is_own: Callable[[str], bool]) -> list[File]:
        """See `Place`."""
        if not self._folder.is_dir():
            return []
        return [path for path in self._folder.iterdir() if is_own(path.name)]

    def create(self, name: str, write: Write, is_ours: Callable[[], bool | None], operation: str) -> bool:
        """See `Place`.

        1. Write to a temporary name that no reader matches. 2. fsync. 3. link to the final name, which fails where it
        is taken. 4. fsync the folder. 5. Remove the temporary name. A crash leaves at most the temporary file.
        """
        make_folder(self._folder)
        temporary = self._folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            if not self._linked(temporary, self._folder / name, write, operation) and not is_ours():
                return False
            sync_folder(self._folder)
            reached(f"{operation}.4.folder-fsynced")
        finally:
            with contextlib.suppress(OSError):  # what stays is removed by the next compaction
                temporary.unlink()
        reached(f"{operation}.5.temporary-removed")
        return True

    def lift(self, source: str, target: str, is_ours: Callable[[], bool | None]) -> bool:
        """See `Place`: a link, what a copy to a higher level would do, without the copy."""
        del is_ours
        try:
            os.link(self._folder / source, self._folder / target)
        except FileExistsError:
            return False
        reached("lift.1.linked")
        sync_folder(self._folder)
        reached("lift.2.folder-fsynced")
        return True

    def remove(self, names: Iterable[str], step: str) -> None:
        """See `Place`."""
        is_changed = False
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
            is_changed = True
            reached(step)
        if is_changed:
            sync_folder(self._folder)

    def set_aside(self, name: str, identity: int | str, below: str) -> None:
        """See `Place`."""
        aside = self._folder / below
        aside.mkdir(exist_ok=True)
        target, number = aside / name, 0
        while target.exists():
            number += 1
            target = aside / f"{name}.{number}"
        found = stat_now(self._folder / name)
        if found is None or found.identity != identity:
            return
        with contextlib.suppress(FileNotFoundError):  # another run was faster
            os.rename(self._folder / name, target)
        reached("set-aside.1.renamed")
        sync_folder(aside)
        sync_folder(self._folder)

    def read_ahead(self, work: Callable[[File], object], files: Iterable[File]) -> None:
        """See `Place`. Nothing: a disk answers at once."""

    @staticmethod
    def _linked(temporary: Path, path: Path, write: Write, operation: str) -> bool:
        """Write the file and link it; False where the name is taken."""
        for _ in range(_TRIES):
            with temporary.open("wb") as sink:
                write(sink)
                sink.flush()
                reached(f"{operation}.1.temporary-written")
                os.fsync(sink.fileno())
            reached(f"{operation}.2.temporary-fsynced")
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except FileNotFoundError:  # this process slept so long that its file was taken for a dead one's
                continue
            reached(f"{operation}.3.linked")
            return True
        msg = (
            f"{temporary} was removed {_TRIES} times while it was being written; is the grace of compaction too short?"
        )
        raise TransientError(msg)


class ObjectPlace:
    """A prefix of an object store.

    A file is created by one conditional PUT. There is no link: who lifts a file reads it and creates it anew, as a copy
    that fails where its target exists is not the same on all stores, and not one request on S3.
    """

    begins_anywhere = True

    def __init__(self, prefix: ObjectPath) -> None:
        self._prefix = prefix
        self._told: deque[dict[str, Stat]] = deque(maxlen=3)

    def prepare(self) -> None:
        """See `Place`."""
        objects.check(self._prefix)
        objects.check_exclusive(self._prefix / ".headrace")

    def file(self, name: str) -> ObjectPath:
        """See `Place`."""
        stat = next((listed[name] for listed in reversed(self._told) if name in listed), None)
        return replace(self._prefix / name, told=stat)

    def names(self, prefix: str = "", after: str = "") -> list[str]:
        """See `Place`. One request for each thousand objects from where it begins."""
        listed: dict[str, Stat] = {}
        for name, stat in objects.listing(self._prefix, max(prefix, after)):
            if not name.startswith(prefix):
                break
            if "/" not in name:
                listed[name] = stat
        self._told.append(listed)
        return list(listed)

    def first(self, prefix: str, after: str, is_wanted: Callable[[str], bool]) -> str | None:
        """The first name with a prefix, greater than another, that is wanted; None without one. It lists no further."""
        for name, _ in objects.listing(self._prefix, max(prefix, after)):
            if not name.startswith(prefix):
                return None
            if is_wanted(name):
                return name
        return None

    def foreign(self, is_own: Callable[[str], bool]) -> list[File]:
        """See `Place`. The place itself where it is the name of a file."""
        if self._prefix.suffix == SUFFIX and stat_now(self._prefix) is not None:
            return [self._prefix]
        found: list[File] = []
        for name, stat in objects.listing(self._prefix):
            *folders, last = name.split("/")
            is_hidden = any(part.startswith((".", "_")) for part in (*folders, last))
            if last.endswith(SUFFIX) and not is_hidden and (folders or not is_own(last)):
                found.append(told(self._prefix / name, stat))
        return found

    def temporary(self, is_own: Callable[[str], bool]) -> list[File]:
        """See `Place`. None: what was not sent whole is not there."""
        del is_own
        return []

    def create(self, name: str, write: Write, is_ours: Callable[[], bool | None], operation: str) -> bool:
        """See `Place`.

        1. Write to memory. 2. PUT where there is nothing of that name. Where the store says that there is, or does not
        answer: look at what is there. A crash leaves nothing, or the file.
        """
        sink = io.BytesIO()
        write(sink)
        reached(f"{operation}.1.written")
        return self._put(name, sink.getbuffer(), is_ours, operation)

    def lift(self, source: str, target: str, is_ours: Callable[[], bool | None]) -> bool:
        """See `Place`. True also where another made it meanwhile of the same file: then it is the same."""
        data = _content(self._prefix / source)
        reached("lift.1.read")
        return self._put(target, data, is_ours, "lift")

    def remove(self, names: Iterable[str], step: str) -> None:
        """See `Place`. One request each: one for many would promise no order."""
        for name in names:
            objects.remove(self._prefix / name)
            reached(step)

    def set_aside(self, name: str, identity: int | str, below: str) -> None:
        """See `Place`. Put there, then removed here: a crash in between leaves it in both, a repeat a second copy."""
        path = self._prefix / name
        found = stat_now(path)
        if found is None or found.identity != identity:
            return
        try:
            data = _content(replace(path, told=found))
        except FileNotFoundError:  # another run was faster
            return
        number = 0
        target = self._prefix / below / name
        while not objects.create(target, data):
            number += 1
            target = self._prefix / below / f"{name}.{number}"
        reached("set-aside.1.copied")
        if stat_now(path) == found:
            objects.remove(path)
        reached("set-aside.2.removed")

    def read_ahead(self, work: Callable[[File], object], files: Iterable[File]) -> None:
        """See `Place`."""
        waiting = list(files)
        if len(waiting) > 1:
            with ThreadPoolExecutor(min(_AT_ONCE, len(waiting)), "headrace-objects") as pool:
                for done in [pool.submit(_attempt, work, file) for file in waiting]:
                    done.result()

    def _put(self, name: str, data: memoryview, is_ours: Callable[[], bool | None], operation: str) -> bool:
        """Whether the file is there by our doing.

        An answer may be lost where the request was not, by the network or by the client's own repetition: what is there
        decides.
        """
        path = self._prefix / name
        for attempt in range(_TRIES):
            failure: TransientError | None = None
            try:
                is_new = objects.create(path, data)
            except TransientError as error:
                is_new, failure = False, error
            if is_new:
                reached(f"{operation}.2.put")
                return True
            found = is_ours()
            if found is not None:
                return found
            if failure is not None:
                raise failure
            time.sleep(_PAUSE_S * attempt)  # 409: somebody else's request for the name is under way
        msg = f"{path}: the store says {_TRIES} times that it exists, and has it not; try again"
        raise TransientError(msg)


def make_folder(folder: Path) -> None:
    """Make a folder durably.

    Raises:
        ConfigError: it is a file.
        TransientError: it is a link to nowhere.
    """
    if folder.is_dir():
        return
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(exist_ok=True)
            sync_folder(missing.parent)
        folder.mkdir(exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        if folder.is_symlink():
            msg = f"{folder} is a link that leads to no folder now; is what it leads to mounted?"
            raise TransientError(msg) from error
        msg = (
            f"{folder} is a file, and rows are appended to a folder of segments; "
            "make a folder of that name and move the file into it: its rows stay history"
        )
        raise ConfigError(msg) from error


def _content(path: ObjectPath) -> memoryview:
    """All of an object, and not of two that have its name after each other."""
    stat = stat_of(path)
    return objects.read(replace(path, told=stat), 0, stat.size)


def _attempt(work: Callable[[File], object], file: File) -> None:
    with contextlib.suppress(Exception):  # it comes again where the work is done
        work(file)


def sync_folder(folder: Path) -> None:
    """Make the names of a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _foreign(folder: Path, is_own: Callable[[str], bool] | None) -> Iterator[Path]:
    """The files of others in a folder and below it, where nothing is ours."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            if entry.name.startswith((".", "_")):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _foreign(Path(entry.path), None)
            elif entry.name.endswith(SUFFIX) and not (is_own is not None and is_own(entry.name)):
                yield Path(entry.path)
