"""What a report tells of a column: its nulls, range and distribution, and how it has drifted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch.drift import Drift, comparable, drift
from batch.profile import CUTS, Measure, Number, Profile, Sorted, profile
from headrace.contract import ViewContract

_BARS = 24
_SHOWN_VALUES = 10
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_LONG_TAIL = 0.25

Role = Literal["join key", "feature", "event time", "created"]


@dataclass(frozen=True)
class Bar:
    """One bar of a plot.

    Attributes:
        rows: how many rows it stands for.
        expected: how many it would, had the day been as those before; None without a reference.
    """

    label: str
    rows: int
    expected: float | None = None


@dataclass(frozen=True)
class Column:
    """One column of the kept rows.

    Attributes:
        measure: what the numbers, the plot and the drift are of; see `Profile`.
        special: how many values are NaN or infinite; they are left out of the numbers.
        distinct: distinct values, or distinct lengths and so on; None where nothing is told apart.
        low, mean, high, percentiles: of what is measured; times as text. Percentiles are values that occur, by rank.
        bars: they cover the column; empty where there is nothing to draw, for join keys and for times.
        drift: None without a reference, and for all but features.
    """

    name: str
    role: Role
    type: str
    measure: Measure
    rows: int
    nulls: int
    special: Mapping[str, int]
    distinct: int | None
    low: Number | str | None
    mean: float | None
    high: Number | str | None
    percentiles: Mapping[str, Number]
    bars: tuple[Bar, ...]
    is_category: bool
    drift: Drift | None

    @property
    def null_share(self) -> float:
        """From 0 to 1."""
        return self.nulls / self.rows if self.rows else 0.0


def look_at(
    contract: ViewContract, name: str, values: pa.ChunkedArray, times: pa.ChunkedArray, before: Sequence[Profile]
) -> tuple[Column, Profile]:
    """A column of the kept rows, and its profile.

    Args:
        times: the rows' event times.
        before: the column's profiles on the days before.
    """
    role = role_of(contract, name)
    if role in {"event time", "created"}:
        return _time_column(name, role, values), Profile(str(values.type), "value", len(values), {})
    found, array = profile(values, times)
    before = comparable(found, before)
    is_category = bool(found.tops)
    column = Column(
        name=name,
        role=role,
        type=found.type,
        measure=found.measure,
        rows=found.rows,
        nulls=found.special.get("null", 0),
        special={key: rows for key, rows in found.special.items() if key != "null"},
        distinct=found.distinct,
        low=array[0].item() if len(array) else None,
        mean=_mean(array),
        high=array[-1].item() if len(array) else None,
        percentiles=_percentiles(array),
        bars=() if role == "join key" else _values(found, before) if is_category else _histogram(array, before),
        is_category=is_category,
        drift=drift(found, before) if role == "feature" else None,
    )
    return column, found


def role_of(contract: ViewContract, name: str) -> Role:
    """What a column is for."""
    if name in contract.join_keys:
        return "join key"
    if name == contract.timestamp_field:
        return "event time"
    return "created" if name == contract.created_field else "feature"


def number_text(value: Number | None) -> str:
    """A number as a person reads it: six digits at most, whole ones whole."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:,.4g}"


def _time_column(name: str, role: Role, values: pa.ChunkedArray) -> Column:
    """An event or created time: what its values look like is told by `coverage`."""
    bounds, nulls = pc.min_max(values).as_py(), values.null_count
    low, high = _moment(bounds["min"]), _moment(bounds["max"])
    return Column(
        name, role, str(values.type), "value", len(values), nulls, {}, None, low, None, high, {}, (), False, None
    )


def _moment(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _mean(array: Sorted) -> float | None:
    if len(array) == 0:
        return None
    # Divided first, since a sum of large doubles may be infinite.
    return float(np.sum(array.astype(np.float64) / len(array)))


def _percentiles(array: Sorted) -> dict[str, Number]:
    if len(array) == 0:
        return {}
    return {f"p{percent}": array[(len(array) - 1) * percent // 100].item() for percent in _PERCENTILES}


def _values(day: Profile, before: Sequence[Profile]) -> tuple[Bar, ...]:
    """A bar for each of the values that are the most frequent now or were before, and one for the others."""
    known: Counter[str] = Counter()
    for found in before:
        known.update(dict(found.tops))
    reference_rows = sum(found.others + sum(rows for _, rows in found.tops) for found in before)
    today = dict(day.tops)
    rows = day.others + sum(today.values())
    names = dict.fromkeys([*list(today)[:_SHOWN_VALUES], *(name for name, _ in _most(known)[: _SHOWN_VALUES // 2])])
    counts = {name: (today.get(name, 0), known[name]) for name in names}
    left = (rows - sum(a for a, _ in counts.values()), reference_rows - sum(b for _, b in counts.values()))
    if any(left):
        counts[f"{max((day.distinct or 0) - sum(name in today for name in names), 0):,} other values"] = left
    scale = rows / reference_rows if reference_rows else None
    return tuple(Bar(name, a, None if scale is None else round(b * scale, 2)) for name, (a, b) in counts.items())


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _histogram(array: Sorted, before: Sequence[Profile]) -> tuple[Bar, ...]:
    """Bars of equal width over the day's numbers and those before; few whole numbers have a bar each.

    A long thin tail is one bar.
    """
    if len(array) == 0:
        return ()
    low, high = _span(array, before)
    ends, labels = _bins(low, high, is_whole=bool(np.issubdtype(array.dtype, np.integer)))
    least = int(np.searchsorted(array, np.array([low], array.dtype), "left")[0])
    places = [0, least, *np.searchsorted(array, np.array(ends, array.dtype), "right").tolist(), len(array)]
    labels = [f"below {number_text(low)}", *labels, f"above {number_text(high)}"]
    shares: Sequence[float | None] = _shares([low, *ends], before) or [None] * len(labels)
    bars = [
        Bar(label, b - a, None if share is None else round(share * len(array), 2))
        for label, (a, b), share in zip(labels, pairwise(places), shares, strict=True)
    ]
    tails = {0, len(bars) - 1}
    return tuple(bar for index, bar in enumerate(bars) if index not in tails or bar.rows or bar.expected)


def _bins(low: Number, high: Number, *, is_whole: bool) -> tuple[list[Number], list[str]]:
    """The upper ends of the bars from the lowest to the highest value drawn, both inclusive, and what to call them."""
    if is_whole and high - low < _BARS:
        values: list[Number] = list(range(int(low), int(high) + 1))
        return values, [number_text(value) for value in values]
    if low == high:
        return [high], [number_text(high)]
    ends: list[Number]
    if is_whole:
        ends = [low + (int(high) - int(low)) * step // _BARS for step in range(1, _BARS + 1)]
    else:  # not by adding steps: the difference of two doubles may be infinite
        ends = [low * (1 - step / _BARS) + high * (step / _BARS) for step in range(1, _BARS)] + [high]
    return ends, [f"{number_text(a)} to {number_text(b)}" for a, b in pairwise([low, *ends])]


def _shares(ends: Sequence[Number], before: Sequence[Profile]) -> list[float] | None:
    """The share of the numbers before that lie below the first end, between each two, and above the last."""
    total = sum(found.numbers for found in before)
    if total == 0:
        return None
    below = sum(found.below(ends[0]) for found in before)
    at_most = [below, *(sum(found.at_most(end) for found in before) for end in ends[1:])]
    return [below / total, *((b - a) / total for a, b in pairwise(at_most)), (total - at_most[-1]) / total]


def _span(array: Sorted, before: Sequence[Profile]) -> tuple[Number, Number]:
    """From where to where to draw: everything, but for tails that would take more than a quarter of the width."""
    rank = len(array) // 100
    spans = [tuple(array[[0, rank, -1 - rank, -1]].tolist())]
    for found in before:
        if found.cuts:
            inner = int(len(found.cuts) > CUTS)  # then the second cut lies at the first percentile
            spans.append(tuple(found.cuts[place].value for place in (0, inner, -1 - inner, -1)))
    least, low = min(span[0] for span in spans), min(span[1] for span in spans)
    high, most = max(span[2] for span in spans), max(span[3] for span in spans)
    room = (high / 2 - low / 2) * (2 * _LONG_TAIL)
    return least if low - least <= room else low, most if most - high <= room else high
