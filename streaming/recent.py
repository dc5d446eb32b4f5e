"""Counts of the last hour, in slots of some seconds: what a page needs to tell now from a while ago.

A row of counts a key, in a ring of slots. Memory is bounded by the number of keys, which are names of views, steps and
stores; a batch costs one addition of a row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt

SLOT_S = 15
SLOTS = 3600 // SLOT_S
NOW_S = 60
"""What counts as now: the slot that runs, and those of a minute before it."""

Counts = npt.NDArray[np.int64]


class Recent:
    """See the module. Thread-safe.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s = clock()
        self._lock = threading.Lock()
        self._rings: dict[Hashable, npt.NDArray[np.uint32]] = {}
        self._slots: dict[Hashable, int] = {}

    def add(self, key: Hashable, counts: Counts) -> None:
        """Count now. Every call for a key brings as many counts as the first."""
        slot = self._slot()
        with self._lock:
            ring = self._rings.get(key)
            if ring is None:
                ring = self._rings[key] = np.zeros((SLOTS, len(counts)), dtype=np.uint32)
                self._slots[key] = slot
            self._forget(key, ring, slot)
            ring[slot % SLOTS] += counts.astype(np.uint32)

    def now(self, key: Hashable) -> Counts | None:
        """The sum of the last minute; None where nothing was ever counted."""
        slots = self._ordered(key)
        return None if slots is None else slots[-1 - NOW_S // SLOT_S :].sum(axis=0)

    def hour(self, key: Hashable) -> Counts | None:
        """The sum of the last hour."""
        slots = self._ordered(key)
        return None if slots is None else slots.sum(axis=0)

    def minutes(self, key: Hashable) -> Counts | None:
        """60 rows of counts, the oldest minute first."""
        slots = self._ordered(key)
        return None if slots is None else slots.reshape(60, SLOTS // 60, -1).sum(axis=1)

    def now_s(self) -> float:
        """How many seconds `now` covers: not those before this object was."""
        now_s = self._clock()
        begin_s = (self._slot() - NOW_S // SLOT_S) * SLOT_S
        return max(1.0, now_s - max(begin_s, self._begun_s))

    def _ordered(self, key: Hashable) -> Counts | None:
        """The slots of an hour, the oldest first."""
        slot = self._slot()
        with self._lock:
            ring = self._rings.get(key)
            if ring is None:
                return None
            self._forget(key, ring, slot)
            return np.roll(ring, -1 - slot % SLOTS, axis=0).astype(np.int64)

    def _forget(self, key: Hashable, ring: npt.NDArray[np.uint32], slot: int) -> None:
        """Empty the slots that are an hour old."""
        gone = slot - self._slots[key]
        if gone > 0:
            ring[[(slot - back) % SLOTS for back in range(min(gone, SLOTS))]] = 0
            self._slots[key] = slot

    def _slot(self) -> int:
        return int(self._clock() // SLOT_S)


def quantile(counts: Counts, bounds: Sequence[float], share: float) -> float | None:
    """A quantile of values that were counted in buckets, interpolated in its bucket.

    Args:
        counts: one for each bound, values up to and with it, and one for what lies beyond the last.

    Returns:
        None without values, infinity for what lies beyond the last bound.
    """
    return quantiles(counts[np.newaxis], bounds, share)[0]


def quantiles(counts: Counts, bounds: Sequence[float], share: float) -> list[float | None]:
    """`quantile` of each row of counts."""
    edges = np.array([0.0, *bounds, np.inf])
    reached = np.cumsum(counts, axis=1)
    wanted = share * reached[:, -1]
    bucket = (reached < wanted[:, np.newaxis]).sum(axis=1)
    row = np.arange(len(counts))
    inside = np.maximum(counts[row, bucket], 1)
    low, high = edges[bucket], edges[bucket + 1]
    part = (wanted - (reached[row, bucket] - counts[row, bucket])) / inside
    found = np.where(np.isinf(high), np.inf, low + part * (np.where(np.isinf(high), low, high) - low))
    return [value if total else None for value, total in zip(found.tolist(), reached[:, -1].tolist(), strict=True)]
