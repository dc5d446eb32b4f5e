"""How far a day has drifted from the days before it: the population stability index of each feature.

PSI is the sum over bins of `(p - q) · ln(p / q)`, where `p` is the day's share of its rows in a bin and `q` that of the
rows of the days before. It is 0 for equal shares; by custom it is called stable below 0.1 and shifted from 0.25 on.
Without any drift it is about `(1/n + 1/m) · χ²(bins - 1)` for `n` and `m` rows: so much of it may be chance.

Source: B. Yurdakul, Statistical Properties of Population Stability Index, Western Michigan University, 2018;
J. du Pisanie and others, A critical review of existing and new population stability testing procedures in credit risk
scoring, arXiv:2303.01227.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from batch.profile import Number, Profile

BINS = 10
_TOP_BINS = 20
_SMOOTHING = 0.5
_Z_999 = 3.0902


@dataclass(frozen=True)
class Drift:
    """A feature against the days before.

    Attributes:
        psi: the index.
        chance: what 999 of 1,000 days without any drift stay below, on so few rows.
        rows, reference_rows: of the day, of the days before.
        null_share, reference_null_share: from 0 to 1.
    """

    psi: float
    chance: float
    rows: int
    reference_rows: int
    null_share: float
    reference_null_share: float

    def exceeds(self, bound: float) -> bool:
        """Whether it has drifted by more than a bound, and by more than chance does."""
        return self.psi > bound and self.psi > self.chance


def drift(day: Profile, before: Sequence[Profile]) -> Drift | None:
    """Hold a day's profile against those of the days before; None where either has no rows of this type."""
    before = comparable(day, before)
    if day.rows == 0 or not before:
        return None
    bins = _binned(day, before)
    rows, reference_rows = day.rows, sum(profile.rows for profile in before)
    terms = []
    for found, expected in bins:
        # Half a row more in each bin, so that an empty one is rare rather than impossible.
        p = (found + _SMOOTHING) / (rows + _SMOOTHING * len(bins))
        q = (expected + _SMOOTHING) / (reference_rows + _SMOOTHING * len(bins))
        terms.append((p - q) * math.log(p / q))
    nulls = sum(profile.special.get("null", 0) for profile in before)
    return Drift(
        psi=round(math.fsum(terms), 4),
        chance=round((1 / rows + 1 / reference_rows) * _chi_square_999(len(bins) - 1), 4),
        rows=rows,
        reference_rows=reference_rows,
        null_share=day.special.get("null", 0) / rows,
        reference_null_share=nulls / reference_rows,
    )


def comparable(day: Profile, before: Sequence[Profile]) -> list[Profile]:
    """Those of the days before that have rows, and looked at the same."""
    return [p for p in before if p.rows and (p.type, p.measure) == (day.type, day.measure)]


def edges(before: Sequence[Profile]) -> list[Number]:
    """The upper ends of bins that hold about a tenth each of the numbers of some days; the last is their highest.

    Each is a value that occurs. Fewer than `BINS` where values repeat.
    """
    values = sorted({cut.value for profile in before for cut in profile.cuts})
    total = sum(profile.numbers for profile in before)
    chosen: list[Number] = []
    wanted = 1
    for value in values:
        so_far = sum(profile.at_most(value) for profile in before)
        if so_far * BINS >= wanted * total or value == values[-1]:
            chosen.append(value)
            wanted = math.floor(so_far * BINS / total) + 1
    return chosen


def _binned(day: Profile, before: Sequence[Profile]) -> list[tuple[float, float]]:
    """How many rows of the day and of the days before are in each bin; bins that are empty on both sides left out."""
    names = sorted({*day.special, *(name for profile in before for name in profile.special)})
    bins: list[tuple[float, float]] = [
        (day.special.get(name, 0), sum(profile.special.get(name, 0) for profile in before)) for name in names
    ]
    of_day = (_count_texts([day], before), _count_numbers([day], before))
    of_before = (_count_texts(before, before), _count_numbers(before, before))
    for found, expected in zip(of_day, of_before, strict=True):
        bins += zip(found, expected, strict=True)
    return [counts for counts in bins if any(counts)]


def _count_texts(profiles: Sequence[Profile], before: Sequence[Profile]) -> list[float]:
    """Rows with each of the values that were most frequent before, and with others."""
    known: Counter[str] = Counter()
    for profile in before:
        known.update(dict(profile.tops))
    names = sorted(known, key=lambda text: (-known[text], text))[:_TOP_BINS]
    tops = [dict(profile.tops) for profile in profiles]
    counts = [sum(top.get(name, 0) for top in tops) for name in names]
    whole = sum(profile.others for profile in profiles) + sum(sum(top.values()) for top in tops)
    return [*counts, whole - sum(counts)]


def _count_numbers(profiles: Sequence[Profile], before: Sequence[Profile]) -> list[float]:
    """Rows below all numbers that were there before, in the bins of `edges`, and above them."""
    ends = edges(before)
    whole = sum(profile.numbers for profile in profiles)
    if not ends:
        return [whole]
    lowest = min(profile.cuts[0].value for profile in before if profile.cuts)
    so_far = [sum(profile.below(lowest) for profile in profiles)]
    so_far += [sum(profile.at_most(end) for profile in profiles) for end in ends]
    return [so_far[0], *(b - a for a, b in pairwise(so_far)), whole - so_far[-1]]


def _chi_square_999(freedom: int) -> float:
    """The 99.9 % quantile of χ², to about 1 % (E. Wilson, M. Hilferty, 1931)."""
    if freedom < 1:
        return 0.0
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + _Z_999 * math.sqrt(part)) ** 3)
