"""When a day's events happened and arrived, where there are none, and how fresh they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch.columns import Bar

_HOUR_US = 3_600_000_000
_DAY_US = 24 * _HOUR_US
_SHOWN_GAPS = 12
_DELAYS = (
    ("before the event", 0),
    ("under 1 s", 1),
    ("1 to 10 s", 10),
    ("10 s to 1 min", 60),
    ("1 to 10 min", 600),
    ("10 min to 1 h", 3_600),
    ("1 to 6 h", 21_600),
    ("6 h to 1 day", 86_400),
)

Times = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gap:
    """A time within the day, UTC, without any event."""

    start: datetime
    stop: datetime

    @property
    def duration(self) -> timedelta:
        """How long it is."""
        return self.stop - self.start


@dataclass(frozen=True)
class Coverage:
    """Where in time the rows lie. Hours are UTC; `Bar.label` is the hour's beginning.

    Attributes:
        events, arrivals: rows by the hour of their event time and of their created time, from a day before the day to
            a day after it at most; what lies outside is in a bar of its own. Empty where there are no such times.
        empty_hours: runs of whole hours of the day without an event, at most 12, and how many hours in all.
        longest_pause: between two successive events of the day; None with fewer than two.
    """

    first_event: datetime | None
    last_event: datetime | None
    events: tuple[Bar, ...]
    arrivals: tuple[Bar, ...]
    empty_hours: tuple[Gap, ...]
    empty_hours_total: int
    longest_pause: Gap | None


@dataclass(frozen=True)
class Freshness:
    """How old the rows were. Durations in seconds.

    Attributes:
        age_at_day_end_s: from the newest event to the end of the day; negative if it is dated later.
        newest_created: None without a created time.
        read_after_day_end_s: how long after the day's end the source was read.
        delay_s: percentiles of created minus event time over the rows that have both.
        delays: rows by that delay.
    """

    newest_event: datetime | None
    age_at_day_end_s: float | None
    newest_created: datetime | None
    read_after_day_end_s: float
    delay_s: Mapping[str, float]
    delays: tuple[Bar, ...]


def coverage(day: date, times: pa.ChunkedArray, created: pa.ChunkedArray | None) -> Coverage:
    """Where the rows lie, from their event and created times."""
    events = np.sort(_microseconds(times))
    start = _start_us(day)
    hours = np.zeros(24, dtype=np.int64)
    inside = events[np.searchsorted(events, start) : np.searchsorted(events, start + _DAY_US)]
    np.add.at(hours, (inside - start) // _HOUR_US, 1)
    gaps = list(_runs_of_zero(hours, start))
    return Coverage(
        first_event=_moment(events[0]) if len(events) else None,
        last_event=_moment(events[-1]) if len(events) else None,
        events=_by_hour(events, start),
        arrivals=_by_hour(np.sort(_microseconds(created)), start) if created is not None else (),
        empty_hours=tuple(gaps[:_SHOWN_GAPS]),
        empty_hours_total=int(np.count_nonzero(hours == 0)),
        longest_pause=_longest_pause(inside),
    )


def freshness(day: date, read: datetime, times: pa.ChunkedArray, created: pa.ChunkedArray | None) -> Freshness:
    """How old the rows were when the day ended, and how long after their events they were created."""
    end = _start_us(day) + _DAY_US
    events = _microseconds(times)
    arrivals = _microseconds(created) if created is not None else np.empty(0, np.int64)
    delays = np.empty(0)
    if created is not None:
        is_there = created.is_valid().to_numpy()
        delays = np.sort((arrivals - events[is_there]) / 1e6)
    newest = int(events.max()) if len(events) else None
    return Freshness(
        newest_event=None if newest is None else _moment(newest),
        age_at_day_end_s=None if newest is None else (end - newest) / 1e6,
        newest_created=_moment(arrivals.max()) if len(arrivals) else None,
        read_after_day_end_s=round(read.timestamp() - end / 1e6, 3),
        delay_s={
            f"p{percent}": round(float(delays[(len(delays) - 1) * percent // 100]), 6)
            for percent in (0, 50, 90, 99, 100)
            if len(delays)
        },
        delays=_delay_bars(delays),
    )


def _microseconds(times: pa.ChunkedArray) -> Times:
    """Those that are there, since the epoch."""
    array: Times = times.drop_null().cast(pa.int64()).to_numpy()
    return array


def _by_hour(times: Times, start: int) -> tuple[Bar, ...]:
    """From the first to the last hour with a row, the whole day in any case, at most a day more on both sides."""
    if len(times) == 0:
        return ()
    first = min(start, max(int(times[0]) // _HOUR_US * _HOUR_US, start - _DAY_US))
    last = max(start + _DAY_US, min((int(times[-1]) // _HOUR_US + 1) * _HOUR_US, start + 2 * _DAY_US))
    edges = np.arange(first, last + 1, _HOUR_US)
    places = np.searchsorted(times, edges, "left").tolist()
    bars = [
        Bar(f"{_moment(edge):%Y-%m-%d %H:%M}", b - a)
        for edge, (a, b) in zip(edges.tolist(), pairwise(places), strict=False)
    ]
    earlier = [Bar("earlier", places[0])] if places[0] else []
    later = [Bar("later", len(times) - places[-1])] if places[-1] < len(times) else []
    return (*earlier, *bars, *later)


def _runs_of_zero(hours: Times, start: int) -> list[Gap]:
    edges = np.diff(np.concatenate(([False], hours == 0, [False])).astype(np.int8))
    firsts, stops = np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()
    return [
        Gap(_moment(start + first * _HOUR_US), _moment(start + stop * _HOUR_US))
        for first, stop in zip(firsts, stops, strict=True)
    ]


def _longest_pause(events: Times) -> Gap | None:
    if len(events) < 2:
        return None
    longest = int(np.argmax(np.diff(events)))
    return Gap(_moment(events[longest]), _moment(events[longest + 1]))


def _delay_bars(delays: npt.NDArray[np.float64]) -> tuple[Bar, ...]:
    if len(delays) == 0:
        return ()
    places = [0, *np.searchsorted(delays, [bound for _, bound in _DELAYS], "left").tolist(), len(delays)]
    labels = [*(label for label, _ in _DELAYS), "over 1 day"]
    return tuple(Bar(label, b - a) for label, (a, b) in zip(labels, pairwise(places), strict=True))


def _start_us(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1_000_000


def _moment(time_us: int | np.int64) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(time_us))
