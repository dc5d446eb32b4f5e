"""Retention: remove rows older than a horizon, by whole files. By command only; nothing else ever removes a row.

A chain's retained range is a file of level 3 without rows, so that positions, counts and the ledger go on; a day is
replaced by an empty snapshot. Both record the horizon. What they cover is removed by compaction's cleaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow.parquet as pq

from headrace.chains import stays
from headrace.compact import lift_segment
from headrace.contract import ViewContract
from headrace.days import content_hash, remove_superseded
from headrace.errors import ConfigError, TransientError
from headrace.folder import Chain, DayFile, Folder, horizons
from headrace.place import readable, stat_of
from headrace.segments import DayName, Footer, SegmentName, create, new_append_id, read_footer, writer_id

RETAINED = "retained"

_MERGED = 2
_RETAINED = 3
_TRIES = 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Retention:
    """What retention removed, or would remove.

    Attributes:
        horizon: events before it are old.
        chains: by chain the positions `[from, to)` whose rows are gone.
        days: the days that are empty now.
        files, rows, bytes: how many in all.
    """

    horizon: datetime
    chains: dict[str, tuple[int, int]]
    days: list[date]
    files: int
    rows: int
    bytes: int


@dataclass(frozen=True)
class _Old:
    """The files that go: of a chain, or of a day."""

    names: list[SegmentName]
    next: int
    rows: int
    bytes: int


def retain(
    contract: ViewContract,
    horizon: datetime,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Retention:
    """Remove what is wholly older than a horizon: of each chain the longest such beginning, and each such day.

    It goes by whole files: a row stays while its file has an event at or after the horizon, or an earlier file has; the
    newest segment of a chain stays in any case. Safe beside everything else; a run that was killed is continued by the
    next. The files themselves are removed by compaction, after its grace.

    Args:
        horizon: a naive time is UTC.
        dry_run: report, but touch nothing.
        progress: called with chains and days done and in all, after each.

    Raises:
        ConfigError: the horizon lies in the future.
        LedgerError: a chain or a day cannot be read; what came before it is done.
        TransientError: other runs were faster again and again.
    """
    aware = horizon.replace(tzinfo=UTC) if horizon.tzinfo is None else horizon.astimezone(UTC)
    if aware > datetime.now(UTC):
        msg = (
            f"the horizon {aware.isoformat()} lies in the future and would remove what is yet to come; pass a past time"
        )
        raise ConfigError(msg)
    bound_us = (aware - _EPOCH) // timedelta(microseconds=1)
    folder = Folder.of(contract)
    chains, days = folder.chains(), folder.days()
    gone: dict[str, tuple[int, int]] = {}
    emptied: list[date] = []
    found: list[_Old] = []
    for done, (name, chain) in enumerate(chains.items(), start=1):
        old = _old(folder, chain, bound_us) if dry_run else _retain_chain(contract, folder, name, bound_us)
        if old is not None:
            gone[name] = (old.names[0].first, old.next)
            found.append(old)
        if progress is not None:
            progress(done, len(chains) + len(days))
    for done, day in enumerate(days, start=len(chains) + 1):
        old = _retain_day(contract, folder, day, bound_us, dry_run=dry_run)
        if old is not None:
            emptied.append(day)
            found.append(old)
        if progress is not None:
            progress(done, len(chains) + len(days))
    return Retention(
        aware,
        gone,
        emptied,
        files=sum(max(len(old.names), 1) for old in found),
        rows=sum(old.rows for old in found),
        bytes=sum(old.bytes for old in found),
    )


def horizon_us(contract: ViewContract) -> int | None:
    """The greatest horizon that retention has been run with, microseconds; None where nothing was ever removed."""
    return max(horizons(Folder.of(contract)).values(), default=None)


def _old(folder: Folder, chain: Chain, bound_us: int) -> _Old | None:
    """The longest run of wholly older files behind the retained range; None where it has no row.

    A file without rows counts as older. The newest of level 0 stays, so that a listing that lacks a file shows a hole;
    on the levels above nothing hangs on the newest.
    """
    newest = max((s for s in chain.valid if s.level == 0), default=None)
    names: list[SegmentName] = []
    for name in chain.valid:
        footer = read_footer(folder.path_of(name))
        if name.level == _RETAINED:
            continue
        if name == newest or footer.mark == "closed" or (footer.max_us is not None and footer.max_us >= bound_us):
            break
        names.append(name)
    if not names:
        return None
    paths = [folder.path_of(name) for name in names]
    rows = sum(pq.read_metadata(readable(path)).num_rows for path in paths)
    if rows == 0:
        return None
    return _Old(names, read_footer(paths[-1]).next, rows, sum(stat_of(path).size for path in paths))


def _retain_chain(contract: ViewContract, folder: Folder, chain: str, bound_us: int) -> _Old | None:
    """Extend level 3 over the old files. Whoever finds that another was faster looks again."""
    for _ in range(_TRIES):
        try:
            old = _old(folder, folder.chain(chain), bound_us)
            if old is None or (_are_up(folder, old.names) and _extended(contract, folder, old, bound_us)):
                return old
        except FileNotFoundError:  # a file went up and was removed
            continue
    msg = f"chain `{chain}`: other runs of compaction or retention were faster {_TRIES} times; run again"
    raise TransientError(msg)


def _are_up(folder: Folder, names: list[SegmentName]) -> bool:
    """Bring the files to level 2, from which level 3 is fed, by links: to merge what goes would be wasted."""
    for name in names:
        for level in range(name.level, _MERGED):
            if not lift_segment(folder, name._replace(level=level)):
                return False
    return True


def _extended(contract: ViewContract, folder: Folder, old: _Old, bound_us: int) -> bool:
    footers = [read_footer(folder.path_of(name._replace(level=_MERGED))) for name in old.names]
    note = Footer(
        next=old.next,
        rejected=sum(f.rejected for f in footers),
        skipped=sum(f.skipped for f in footers),
        topic_id=footers[-1].topic_id,
        writer=writer_id(),
        append=new_append_id(),
        mark=RETAINED,
        # Letters whose rows are gone were taken all the same.
        extra={"horizon_us": bound_us, "rows": old.rows, **_joined_origins(footers)},
    )
    name = old.names[0]._replace(level=_RETAINED)
    is_new = create(folder.path_of(name), contract.schema.empty_table(), note, operation="retain")
    return is_new and stays(folder, name, "retain")


def _joined_origins(footers: list[Footer]) -> dict[str, list[Any]]:
    found = [origin for footer in footers for origin in footer.extra.get("origins", ())]
    return {"origins": found} if found else {}


def _retain_day(contract: ViewContract, folder: Folder, day: date, bound_us: int, *, dry_run: bool) -> _Old | None:
    """Replace a day that is wholly older by an empty snapshot; None where it is not, or has no row."""
    for _ in range(_TRIES):
        present = folder.days([day])[day]
        old = _old_day(present, bound_us)
        if old is None or dry_run:
            return old
        empty = contract.schema.empty_table()
        note = Footer(
            next=0,
            writer=writer_id(),
            append=new_append_id(),
            extra={"content_hash": content_hash(empty), RETAINED: True, "horizon_us": bound_us, "rows": old.rows},
        )
        # One above the snapshot that was judged: whatever is published meanwhile is newer still, and counts.
        path = folder.path_of(DayName(day, present.snapshot + 1))
        if create(path, empty, note, operation="retain-day") and folder.days([day])[day].path == path:
            remove_superseded(folder, day)
            return old
    msg = f"day {day}: other runs published it {_TRIES} times meanwhile; run again"
    raise TransientError(msg)


def _old_day(day: DayFile, bound_us: int) -> _Old | None:
    newest_us = read_footer(day.path).max_us
    if day.rows == 0 or newest_us is None or newest_us >= bound_us:
        return None
    return _Old([], day.rows, day.rows, stat_of(day.path).size)
