"""What the values of a column look like: small, exact where it matters, and the same for the same rows in any order.

A profile of some kilobytes a column is kept of each day, so that a day can be held against those before it at a cost
that depends neither on their rows nor on the length of the history.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

CUTS = 100
TOP_VALUES = 50
_LONGEST_TEXT = 60

Number = int | float
Sorted = npt.NDArray[Any]
Measure = Literal["value", "length", "seconds before the event", "presence"]


@dataclass(frozen=True)
class Cut:
    """A value that occurs, and how many values lie below it, and below or at it."""

    value: Number
    below: int
    at_most: int


@dataclass(frozen=True)
class Profile:
    """The values of a column.

    Attributes:
        type: the column's Arrow type; profiles of different types cannot be compared.
        measure: what was looked at: values, the lengths of lists and of bytes, the seconds by which a time precedes the
            row's event, or nothing but whether there is a value.
        special: how many are `null`, `NaN`, `inf`, `-inf`; only those that occur.
        cuts: of numbers, ascending. There are `CUTS + 1` at most, the lowest and the highest value among them, and
            between two neighbours lie fewer than 1 in `CUTS` of the values. Up to `CUTS` distinct values are all there.
        tops: of texts and booleans the most frequent, at most `TOP_VALUES`, by frequency, then by text.
        others: values that are not among `tops`.
        distinct: distinct values, the special ones left out; None where nothing is told apart.
    """

    type: str
    measure: Measure
    rows: int
    special: Mapping[str, int]
    cuts: tuple[Cut, ...] = ()
    tops: tuple[tuple[str, int], ...] = ()
    others: int = 0
    distinct: int | None = None

    @property
    def numbers(self) -> int:
        """How many finite numbers there are."""
        return self.cuts[-1].at_most if self.cuts else 0

    def at_most(self, edge: Number) -> float:
        """How many numbers are not greater than `edge`: exact at a cut, in between by a straight line."""
        index = bisect_right(self.cuts, edge, key=lambda cut: cut.value) - 1
        if index < 0:
            return 0
        cut = self.cuts[index]
        if cut.value == edge or index == len(self.cuts) - 1:
            return cut.at_most
        following = self.cuts[index + 1]
        # Halves, since the difference of two doubles may be infinite.
        part = (edge / 2 - cut.value / 2) / (following.value / 2 - cut.value / 2)
        return cut.at_most + part * (following.below - cut.at_most)

    def below(self, edge: Number) -> float:
        """How many numbers are less than `edge`, as `at_most`."""
        index = bisect_left(self.cuts, edge, key=lambda cut: cut.value)
        if index < len(self.cuts) and self.cuts[index].value == edge:
            return self.cuts[index].below
        return self.at_most(edge)

    def as_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it."""
        return {
            "type": self.type,
            "measure": self.measure,
            "rows": self.rows,
            "special": dict(self.special),
            "cuts": [[cut.value, cut.below, cut.at_most] for cut in self.cuts],
            "tops": [list(top) for top in self.tops],
            "others": self.others,
            "distinct": self.distinct,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Profile:
        """What `as_json` wrote."""
        return cls(
            content["type"],
            content["measure"],
            content["rows"],
            content["special"],
            tuple(Cut(*cut) for cut in content["cuts"]),
            tuple((text, rows) for text, rows in content["tops"]),
            content["others"],
            content["distinct"],
        )


def profile(values: pa.ChunkedArray, event_times: pa.ChunkedArray) -> tuple[Profile, Sorted]:
    """The profile of a column, and its finite numbers in ascending order.

    Args:
        event_times: the rows' event times, in the same order.
    """
    kind, special = values.type, {}
    if values.null_count:
        special["null"] = values.null_count
    if pa.types.is_string(kind) or pa.types.is_boolean(kind):
        tops, others, distinct = _tops(values.drop_null())
        found = Profile(str(kind), "value", len(values), special, (), tops, others, distinct)
        return found, np.empty(0)
    measure, numbers = _numbers(values, event_times)
    if numbers is None:
        return Profile(str(kind), measure, len(values), special), np.empty(0)
    array = numbers.drop_null().to_numpy()
    if pa.types.is_floating(numbers.type):
        array = _finite(array, special)
    array = np.sort(array)
    distinct = int(np.count_nonzero(array[1:] != array[:-1])) + 1 if len(array) else 0
    return Profile(str(kind), measure, len(values), special, _cuts(array, distinct), distinct=distinct), array


def _numbers(values: pa.ChunkedArray, event_times: pa.ChunkedArray) -> tuple[Measure, pa.ChunkedArray | None]:
    """The numbers that stand for a column's values, null where they are."""
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "value", values
    if pa.types.is_list(kind):
        return "length", pc.list_value_length(values)
    if pa.types.is_binary(kind):
        return "length", pc.binary_length(values)
    if pa.types.is_timestamp(kind):
        age_us = pc.subtract(event_times.cast(pa.int64()), values.cast(pa.int64()))
        return "seconds before the event", pc.divide(age_us.cast(pa.float64(), safe=False), 1e6)
    return "presence", None


def _finite(array: Sorted, special: dict[str, int]) -> Sorted:
    """The finite numbers; the others are counted in `special`."""
    is_finite = np.isfinite(array)
    if is_finite.all():
        return array
    odd = array[~is_finite]
    for name, count in (("NaN", np.isnan(odd)), ("inf", odd == np.inf), ("-inf", odd == -np.inf)):
        if count.any():
            special[name] = int(np.count_nonzero(count))
    return array[is_finite]


def _cuts(array: Sorted, distinct: int) -> tuple[Cut, ...]:
    if len(array) == 0:
        return ()
    if distinct <= CUTS:
        values = array[np.concatenate(([True], array[1:] != array[:-1]))]
    else:
        # The least ranks of which no two neighbours are further apart than 1 in `CUTS`; computed as whole numbers.
        ranks = [rank * (len(array) - 1) // CUTS for rank in range(CUTS + 1)]
        values = np.unique(array[ranks])
    below, at_most = np.searchsorted(array, values, "left"), np.searchsorted(array, values, "right")
    return tuple(map(Cut, values.tolist(), below.tolist(), at_most.tolist()))


def _tops(present: pa.ChunkedArray) -> tuple[tuple[tuple[str, int], ...], int, int]:
    """The most frequent values, how many rows have others, and how many distinct values there are."""
    counted = present.value_counts()
    table = pa.table({"value": counted.field("values").cast(pa.string()), "rows": counted.field("counts")})
    order = pc.select_k_unstable(table, TOP_VALUES, sort_keys=[("rows", "descending"), ("value", "ascending")])
    found = table.take(order).to_pylist()
    tops = tuple((key_of(row["value"]), row["rows"]) for row in found)
    return tops, len(present) - sum(rows for _, rows in tops), table.num_rows


def key_of(text: str) -> str:
    """A text by which a value is known again: itself, or its beginning and a hash if it is long."""
    if len(text) <= _LONGEST_TEXT:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{text[: _LONGEST_TEXT - 20]}… #{digest}"
