"""Bring to the online store what has arrived offline since the last time: a set difference, never a clock.

Days are compared by content hash, chains by their ends, files of others by size and time. The mark of what is there
lives in the online store itself, so that losing the one loses the other. It is written last and changes only by
compare-and-set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from feast import FeatureStore

from headrace.chains import Folder
from headrace.contract import ViewContract
from headrace.encode import encode
from headrace.errors import TransientError
from headrace.faults import reached
from headrace.online import Mark, NewestWinsStore, expect_applied, online_store, write_online
from headrace.place import File, stat_of
from headrace.scan import Window, newest, reading
from headrace.segments import read_footer

_TRIES = 10
_WRITES = 2
"""Chunks that are written at once: while one's last call is under way the server has the next one's first."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Materialized:
    """What a run did.

    Attributes:
        keys: how many keys were offered to the online store, each with its newest row.
        keys_written: how many it took; the rest was not newer.
        days: the days that were applied, ISO dates.
        chains: the chains that were applied, with the positions `[from, to)`.
        files: the files of others that were applied, by name.
        already: nothing had arrived.
    """

    keys: int
    keys_written: int
    days: list[str]
    chains: dict[str, tuple[int, int]]
    files: list[str]
    already: bool


@dataclass(frozen=True)
class Holdings:
    """What a view has offline at one moment, in the terms of the mark.

    Attributes:
        days: the content hash of each day, by ISO date.
        chains: the end of each chain.
        files: size and time of each file of others, by its path below the folder.
        paths: by the name of a day, chain or file the Parquet files that hold its rows, those without rows left out.
        ends: where each of these files ends in its chain; only of chains.
    """

    days: Mapping[str, str]
    chains: Mapping[str, int]
    files: Mapping[str, str]
    paths: Mapping[str, Sequence[File]]
    ends: Mapping[File, int]

    @property
    def all_paths(self) -> list[File]:
        """Every file with rows."""
        return [path for paths in self.paths.values() for path in paths]

    def arrived(self, contract: ViewContract, mark: Mark | None) -> Arrived:
        """What the mark does not name. Without a mark that holds for the view as it is now, that is everything."""
        valid: Mark = mark if mark is not None and _holds(contract, mark) else {}
        known = {part: valid.get(part, {}) for part in ("days", "chains", "files")}
        days = [day for day, content in self.days.items() if known["days"].get(day) != content]
        files = [name for name, stamp in self.files.items() if known["files"].get(name) != stamp]
        starts = {name: int(known["chains"].get(name, 0)) for name in self.chains}
        chains = {name: (start, self.chains[name]) for name, start in starts.items() if start < self.chains[name]}
        paths = [path for name in (*days, *files) for path in self.paths[name]]
        paths += [path for name, (start, _) in chains.items() for path in self.paths[name] if self.ends[path] > start]
        return Arrived(days, chains, files, paths)

    def as_mark(self, contract: ViewContract, before: Mark | None) -> Mark:
        """The mark that names all of this."""
        return {
            "version": int(before["version"]) + 1 if before else 1,
            "join_keys": list(contract.join_keys),
            "types": _types(contract),
            "days": dict(self.days),
            "chains": dict(self.chains),
            "files": dict(self.files),
        }


@dataclass(frozen=True)
class Arrived:
    """What the mark does not name: days and files by name, chains with `[from, to)`, and the files that hold it."""

    days: list[str]
    chains: dict[str, tuple[int, int]]
    files: list[str]
    paths: list[File]

    def __bool__(self) -> bool:
        return bool(self.days or self.chains or self.files)


def holdings(contract: ViewContract) -> Holdings:
    """List what a view has offline."""
    folder = Folder.of(contract)
    chains, days, foreign = folder.chains(), folder.days(), folder.foreign()
    paths: dict[str, list[File]] = {}
    ends: dict[File, int] = {}
    for name, chain in chains.items():
        segments = [(folder.path_of(segment), read_footer(folder.path_of(segment))) for segment in chain.valid]
        with_rows = {path: footer.next for path, footer in segments if footer.min_us is not None}
        paths[name] = list(with_rows)
        ends.update(with_rows)
    for day in days.values():
        paths[day.date.isoformat()] = [day.path] if day.rows else []
    files: dict[str, str] = {}
    for path in foreign:
        directory: Any = contract.directory  # both are paths of this machine, or both of one object store
        name, stat = path.relative_to(directory).as_posix(), stat_of(path)
        files[name] = f"{stat.size}-{stat.mtime_ns}"
        paths[name] = [path]
    return Holdings(
        days={day.date.isoformat(): day.content_hash for day in days.values()},
        chains={name: chain.end for name, chain in chains.items()},
        files=files,
        paths=paths,
        ends=ends,
    )


def materialize_arrived(
    store: FeatureStore, contract: ViewContract, *, progress: Progress | None = None
) -> Materialized:
    """Apply everything that arrived since the mark, whatever its event time, then move the mark.

    Idempotent; safe beside a running stream and beside itself: newest-wins decides each value, and a run that loses the
    mark starts over. Memory is bounded by DuckDB's limit. A failing write fails the run, and the mark stays.

    An online store that is not ours keeps no mark and takes whatever is written last; it is given the newest row of
    each key, each time.

    Args:
        progress: called with keys done and keys in all, after each chunk.

    Raises:
        TransientError: other runs moved the mark again and again, or the view must not be written yet
            (`headrace.online.unapplied`).
    """
    expect_applied(store, contract)
    target = online_store(store)
    for _ in range(_TRIES):
        mark = target.read_mark(store.config, contract.feature_view) if isinstance(target, NewestWinsStore) else None
        found, arrived, (keys, written) = reading(
            lambda: _arrived(contract, mark),  # noqa: B023 - called in this turn of the loop
            lambda now: now[1].paths,
            lambda now: (*now, apply_newest(store, contract, now[1].paths, progress=progress)),
        )
        outcome = Materialized(keys, written, arrived.days, arrived.chains, arrived.files, already=not arrived)
        if not arrived or not isinstance(target, NewestWinsStore):
            return outcome
        reached("materialize.1.written")
        if target.swap_mark(store.config, contract.feature_view, mark, found.as_mark(contract, mark)):
            reached("materialize.2.marked")
            return outcome
    msg = f"feature view `{contract.name}`: other runs keep moving the mark; let one of them finish, then run again"
    raise TransientError(msg)


def materialize_window(
    store: FeatureStore, contract: ViewContract, window: Window, *, progress: Progress | None = None
) -> tuple[int, int]:
    """Apply the newest row of each key within a window of event times, as `feast materialize` means it.

    The mark stays. Idempotent, safe beside a stream and beside itself.

    Returns:
        How many keys were offered, and how many were written.

    Raises:
        TransientError: the view must not be written yet (`headrace.online.unapplied`).
    """
    expect_applied(store, contract)
    folder = Folder.of(contract)
    return reading(
        folder.files,
        lambda files: files,
        lambda files: apply_newest(store, contract, files, window, progress=progress),
    )


def pending(store: FeatureStore, contract: ViewContract) -> bool:
    """Whether anything has arrived that the mark does not name; without a mark, whether there is anything."""
    target = online_store(store)
    mark = target.read_mark(store.config, contract.feature_view) if isinstance(target, NewestWinsStore) else None
    return bool(holdings(contract).arrived(contract, mark))


def set_back(store: FeatureStore, contract: ViewContract, to: Holdings) -> None:
    """Lower the mark to what `to` holds, so that the next run applies everything that came after it. Idempotent."""
    target: NewestWinsStore = online_store(store)
    while True:
        mark = target.read_mark(store.config, contract.feature_view)
        if mark is None:
            return
        lower = {
            **mark,
            "version": int(mark["version"]) + 1,
            "days": {day: content for day, content in mark["days"].items() if to.days.get(day) == content},
            "chains": {name: min(int(end), to.chains.get(name, 0)) for name, end in mark["chains"].items()},
            "files": {name: stamp for name, stamp in mark["files"].items() if to.files.get(name) == stamp},
        }
        if target.swap_mark(store.config, contract.feature_view, mark, lower):
            return


def apply_newest(
    store: FeatureStore,
    contract: ViewContract,
    files: Sequence[File],
    window: Window | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Offer the newest row of each key of some files to the online store.

    Reading and encoding a chunk overlap with the writing of the ones before it.

    Returns:
        How many keys were offered, and how many were written.
    """
    if not files:
        return 0, 0
    target = online_store(store)
    is_ours = isinstance(target, NewestWinsStore)
    at_once = _WRITES if is_ours else 1  # another store may not be made for threads
    size = target.rows_a_write(len(contract.schema)) if is_ours else None
    done = written = 0
    limit = getattr(store.config.offline_store, "memory_limit", None)
    with (
        newest(contract, files, window or Window(), memory_limit=limit, rows_a_chunk=size) as rows,
        ThreadPoolExecutor(at_once) as pool,
    ):
        writing: deque[tuple[Future[int], int]] = deque()

        def finish() -> None:
            nonlocal done, written
            write, count = writing.popleft()
            written += write.result()
            done += count
            if progress is not None:
                progress(done, rows.keys)

        for table, tails in rows:
            if len(writing) == at_once:
                finish()
            if is_ours:
                encoded = encode(contract, table, tails)
                write = pool.submit(target.write_newest, store.config, contract.feature_view, encoded)
            else:
                write = pool.submit(write_online, store, contract, table)
            writing.append((write, table.num_rows))
        while writing:
            finish()
    return done, written


def _arrived(contract: ViewContract, mark: Mark | None) -> tuple[Holdings, Arrived]:
    now = holdings(contract)
    return now, now.arrived(contract, mark)


def _types(contract: ViewContract) -> dict[str, str]:
    return {name: str(contract.schema.field(name).type) for name in (*contract.join_keys, *contract.features)}


def _holds(contract: ViewContract, mark: Mark) -> bool:
    """Whether a mark speaks of the view as it is now: of the same join keys, and of each feature in its type.

    It does not where a feature was added, as the history may have had values of it all along.
    """
    known = mark.get("types", {})
    same = all(known.get(name) == kind for name, kind in _types(contract).items())
    return same and list(mark["join_keys"]) == list(contract.join_keys)
