"""Remove from the work folder what has served: rows that were published, and upkeep's files, after a while.

The stores have the rows, so the copies of `Ingest` and `Clean` are for looking at, and for redoing a day from the
middle. What says that a day is done, and how it was, stays: receipts, reports and rejected rows.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from batch.folder import DayFolder, ViewFolder, locked


@dataclass(frozen=True)
class Pruned:
    """What was removed.

    Attributes:
        files: files of rows, `raw.parquet` and `kept.parquet`.
        bytes: their size.
        runs: folders of upkeep tasks.
    """

    files: int
    bytes: int
    runs: int


def prune(folder: ViewFolder, before_s: float, waiting: Callable[[], None]) -> Pruned:
    """Remove the rows of days, and the folders of upkeep runs, that are older than a time.

    Of a day: what was read and cleaned before it, once any run has published the day before it. A day whose gate never
    opened keeps its rows. Idempotent, and harmless beside any task of the chain. One scan of the folder's names.

    Args:
        before_s: seconds since the epoch.
        waiting: called if another run works on a day whose rows are to go.
    """
    runs: dict[str, list[DayFolder]] = defaultdict(list)
    for path in folder.path.glob("run=*/day=*"):
        runs[path.name].append(DayFolder(path))
    files = size = 0
    for day, found in sorted(runs.items()):
        if any(path.exists() for path in _rows(found)):
            with locked(folder.lock(day), waiting):
                for path in _served(found, before_s):
                    size += path.stat().st_size
                    path.unlink()
                    files += 1
    return Pruned(files, size, _prune_upkeep(folder, before_s))


def _rows(runs: Iterable[DayFolder]) -> list[Path]:
    return [path for run in runs for path in (run.raw, run.kept)]


def _served(runs: list[DayFolder], before_s: float) -> list[Path]:
    """The files of rows that nobody needs any more; decided under the day's lock."""
    if not any(_is_older(run.offline_receipt, before_s) for run in runs):
        return []
    return [path for path in _rows(runs) if _is_older(path, before_s)]


def _prune_upkeep(folder: ViewFolder, before_s: float) -> int:
    """Remove folders of upkeep tasks by the time of their newest file."""
    count = 0
    for path in folder.path.glob("*=????-??-??T????"):
        if all(_is_older(inner, before_s) for inner in [path, *path.iterdir()]):
            shutil.rmtree(path)
            count += 1
    return count


def _is_older(path: Path, before_s: float) -> bool:
    try:
        return path.stat().st_mtime < before_s
    except FileNotFoundError:
        return False
