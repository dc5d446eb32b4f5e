"""What a view's folder holds, counted from one listing: for those who look on, not for those who append."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from headrace.contract import ViewContract
from headrace.folder import Folder
from headrace.place import stat_of
from headrace.segments import DayName, SegmentName, parse_stream_chain

_MERGED = (1, 2)
"""The levels that compaction makes."""


@dataclass(frozen=True)
class Census:
    """What one listing showed. Files that are merged and wait out their grace are counted with the others.

    Attributes:
        ends: where the newest epoch of the chain of each topic and partition ends.
        appended: files as they were appended, of streams, pushes and replays.
        merged: files that compaction made.
        retained: files that retention made.
        days: files of days of the batch chain.
        merged_s: when the newest merged file was made, seconds since the epoch; None without one.
    """

    ends: Mapping[tuple[str, int], int]
    appended: int
    merged: int
    retained: int
    days: int
    merged_s: float | None


def census(contract: ViewContract) -> Census:
    """Look at a view's folder. Costs a listing, and a footer or two a chain, whatever the history.

    Raises:
        LedgerError: a file that decides where a chain ends cannot be read.
        OSError, TransientError: the folder, or the object store, cannot be listed.
    """
    folder = Folder.of(contract)
    return folder.settled(lambda: _census(folder))


def _census(folder: Folder) -> Census:
    names = folder.names()
    newest: dict[str, dict[int, SegmentName]] = {}
    levels: dict[int, int] = {}
    for name in names:
        if isinstance(name, SegmentName):
            levels[name.level] = levels.get(name.level, 0) + 1
            of_chain = newest.setdefault(name.chain, {})
            of_chain[name.level] = max(name, of_chain.get(name.level, name))
    merged = [segment for of_chain in newest.values() for level, segment in of_chain.items() if level in _MERGED]
    made_s = []
    for segment in merged:
        with suppress(FileNotFoundError):  # merged on meanwhile
            made_s.append(stat_of(folder.path_of(segment)).mtime_ns / 1e9)
    return Census(
        ends=_ends(folder, newest),
        appended=levels.get(0, 0),
        merged=sum(levels.get(level, 0) for level in _MERGED),
        retained=levels.get(3, 0),
        days=sum(isinstance(name, DayName) for name in names),
        merged_s=max(made_s, default=None),
    )


def _ends(folder: Folder, newest: Mapping[str, Mapping[int, SegmentName]]) -> dict[tuple[str, int], int]:
    epochs: dict[tuple[str, int], tuple[int, str]] = {}
    for chain in newest:
        if (parsed := parse_stream_chain(chain)) is not None:
            topic, partition, epoch = parsed
            epochs[topic, partition] = max((epoch, chain), epochs.get((topic, partition), (epoch, chain)))
    return {place: _end(folder, newest[chain]) for place, (_, chain) in epochs.items()}


def _end(folder: Folder, levels: Mapping[int, SegmentName]) -> int:
    """Where the chain ends; of one that is closed, where the next one begins."""
    tip = folder.tip_of(levels.values())
    successor = None if tip.footer is None else tip.footer.successor
    return tip.end if successor is None else successor[1]
