"""Profiles and the index of drift, against what a few lines over all the values say."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.columns import look_at
from batch.drift import Drift, drift, edges
from batch.profile import CUTS, Profile, key_of, profile
from headrace.contract import ViewContract
from tests.headrace.views import examples

INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -0.0, 1.5])
TEXTS = st.text(max_size=3) | st.sampled_from(["a", "b", "ü", "\U0001f697", "x" * 200, "x" * 199 + "y"])
KINDS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.int64(), INTEGERS),
    (pa.float64(), FLOATS),
    (pa.float32(), st.floats(width=32, allow_nan=True, allow_infinity=True)),
    (pa.string(), TEXTS),
    (pa.bool_(), st.booleans()),
    (pa.list_(pa.int64()), st.lists(st.integers(0, 1), max_size=4)),
    (pa.binary(), st.binary(max_size=4)),
    (pa.struct([("x", pa.int64())]), st.just({"x": 1})),
]
COLUMNS = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(
        st.just(kind[0]),
        st.lists(st.none() | kind[1], max_size=40),
        st.lists(st.lists(st.none() | kind[1], max_size=30), max_size=4),
    )
)


def profiled(values: Any, kind: pa.DataType) -> Profile:
    column = pa.chunked_array([pa.array(values, kind)])
    return profile(column, pa.chunked_array([pa.nulls(len(values), pa.timestamp("us", "UTC"))]))[0]


def bin_of(value: Any, before: list[Any]) -> Any:
    """The bin of one value, by looking at every value before."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "any"
    if isinstance(value, list | bytes):
        value, before = len(value), [len(v) for v in before if v is not None]
    if isinstance(value, bool | str):
        known = Counter(key_of(str(v).lower() if isinstance(v, bool) else v) for v in before if v is not None)
        name = key_of(str(value).lower() if isinstance(value, bool) else value)
        return name if name in sorted(known, key=lambda k: (-known[k], k))[:20] else "another"
    if not math.isfinite(value):
        return str(value)
    numbers = sorted(v for v in before if v is not None and math.isfinite(v))
    if not numbers:
        return "above"
    ends = sorted({numbers[-(-k * len(numbers) // 10) - 1] for k in range(1, 11)})
    return -1 if value < numbers[0] else next((i for i, end in enumerate(ends) if value <= end), "above")


def psi_of(day: list[Any], before: list[Any]) -> float:
    """The index over all values, one by one."""
    found, expected = (Counter(bin_of(value, before) for value in values) for values in (day, before))
    bins = {*found, *expected}
    total = 0.0
    for name in bins:
        p = (found[name] + 0.5) / (len(day) + 0.5 * len(bins))
        q = (expected[name] + 0.5) / (len(before) + 0.5 * len(bins))
        total += (p - q) * math.log(p / q)
    return total


@pytest.mark.filterwarnings("ignore:overflow")
@settings(max_examples=examples(100), deadline=None)
@given(column=COLUMNS)
def test_the_index_is_that_of_all_the_values(column: tuple[pa.DataType, list[Any], list[list[Any]]]) -> None:
    kind, day, days = column
    before = [value for values in days for value in values]
    # As the column holds them: rounded to its width.
    day, before = (pa.array(values, kind).to_pylist() for values in (day, before))
    found = drift(profiled(day, kind), [profiled(values, kind) for values in days])
    if not day or not before:
        assert found is None
        return
    assert found is not None
    if not pa.types.is_struct(kind):
        assert found.psi == pytest.approx(psi_of(day, before), abs=6e-5)
    assert found.null_share == day.count(None) / len(day)
    assert found.reference_null_share == before.count(None) / len(before)
    assert (found.rows, found.reference_rows) == (len(day), len(before))
    assert 0 <= found.psi < math.inf
    assert 0 <= found.chance < math.inf


@settings(max_examples=examples(100), deadline=None)
@given(column=COLUMNS, seed=st.integers(0, 9))
def test_a_profile_is_the_same_in_any_order_and_after_its_file(
    column: tuple[pa.DataType, list[Any], list[list[Any]]], seed: int
) -> None:
    kind, values, _ = column
    found = profiled(values, kind)
    again = list(values)
    random.Random(seed).shuffle(again)
    assert profiled(again, kind) == found
    assert Profile.from_json(json.loads(json.dumps(found.as_json(), allow_nan=False))) == found
    whole = sum(found.special.values()) + found.numbers + found.others + sum(rows for _, rows in found.tops)
    assert whole == found.rows or found.measure == "presence"


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300), min_size=1, max_size=3_000), INTEGERS)
def test_counts_are_exact_at_cuts_and_near_between(values: list[int], edge: int) -> None:
    found = profiled(values, pa.int64())
    assert len(found.cuts) <= CUTS + 1
    assert (found.cuts[0].value, found.cuts[-1].value) == (min(values), max(values))
    for cut in found.cuts:
        assert found.at_most(cut.value) == sum(value <= cut.value for value in values)
        assert found.below(cut.value) == sum(value < cut.value for value in values)
    for count, truth in ((found.at_most(edge), sum(v <= edge for v in values)), (found.below(edge), 0)):
        assert 0 <= count <= len(values)
        assert truth == 0 or abs(count - truth) <= len(values) / CUTS + 1


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=400), min_size=1, max_size=3))
def test_bins_hold_about_a_tenth_and_reach_to_the_end(days: list[list[float]]) -> None:
    values = sorted(value for day in days for value in day)
    ends = edges([profiled(day, pa.float64()) for day in days])
    assert ends == sorted(set(ends))
    assert ends[-1] == values[-1]
    assert len(ends) <= 10
    assert set(ends) <= set(values)


GENERATORS: list[Callable[[np.random.Generator, int], Any]] = [
    lambda rng, n: rng.normal(size=n),
    lambda rng, n: rng.poisson(3, n),
    lambda rng, n: np.array([*"abcdefghijkl"])[rng.zipf(1.7, n).clip(1, 12) - 1].tolist(),
]


@pytest.mark.parametrize("generate", GENERATORS)
@pytest.mark.parametrize("rows", [3, 10, 30, 100, 300])
def test_chance_alone_raises_no_alarm(generate: Callable[[np.random.Generator, int], Any], rows: int) -> None:
    """Of 100 days like those before at most one is called drifted, however few rows they have."""
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(100):
        day, *days = (generate(rng, rows) for _ in range(8))
        found = drift(profiled(day, pa.array(day).type), [profiled(values, pa.array(day).type) for values in days])
        assert found is not None
        alarms += found.exceeds(0.25)
    assert alarms <= 1


@pytest.mark.parametrize(
    ("day", "before", "low", "high"),
    [
        (np.arange(1_000.0), np.arange(1_000.0), 0, 0.001),
        (np.full(500, 5), np.full(500, 5), 0, 0),
        (np.full(500, 5), np.full(500, 6), 5, 20),
        (np.full(500, 5.5), np.repeat([5.0, 6.0], 250), 1, 20),
        (np.full(500, 2**63 - 1), np.full(500, -(2**63)), 5, 20),
        (np.append(np.zeros(300), np.arange(300.0)), np.arange(600.0), 1, 9),
        (["a"] * 500, ["b"] * 500, 5, 20),
        ([f"id {n}" for n in range(5_000)], [f"id {n}" for n in range(5_000, 10_000)], 0, 0.05),
        ([True] * 300, [True, False] * 150, 1, 9),
    ],
)
def test_how_much_is_much(day: Any, before: Any, low: float, high: float) -> None:
    kind = pa.array(day).type
    found = drift(profiled(day, kind), [profiled(before, kind)])
    assert found is not None
    assert low <= found.psi <= high
    assert found.exceeds(0.25) == (low >= 1)


def test_a_normal_distribution_moved_by_a_deviation_is_near_its_integral() -> None:
    """PSI is the symmetrised divergence: for two normal distributions a distance apart, its square; bins lose some."""
    rng = np.random.default_rng(3)
    for distance in (0.2, 0.5, 1.0):
        found = drift(
            profiled(rng.normal(distance, size=40_000), pa.float64()),
            [profiled(rng.normal(size=40_000), pa.float64()) for _ in range(7)],
        )
        assert found is not None
        assert 0.75 * distance**2 < found.psi < 1.05 * distance**2


def test_other_types_and_empty_days_are_no_reference() -> None:
    day = profiled([1, 2], pa.int64())
    assert drift(day, []) is None
    assert drift(day, [profiled(["1"], pa.string()), profiled([], pa.int64())]) is None
    assert drift(profiled([], pa.int64()), [day]) is None


@settings(max_examples=examples(100), deadline=None)
@given(
    st.sampled_from(KINDS).flatmap(lambda k: st.tuples(st.just(k[0]), st.lists(st.none() | k[1], max_size=60))),
    st.integers(0, 30),
)
def test_every_row_is_in_a_bar(column: tuple[pa.DataType, list[Any]], split: int) -> None:
    kind, values = column
    before = [profiled(values[:split], kind)]
    day = pa.chunked_array([pa.array(values[split:], kind)])
    contract = Features()
    found, _ = look_at(contract, "x", day, pa.chunked_array([pa.nulls(len(day), pa.timestamp("us", "UTC"))]), before)
    drawn = sum(bar.rows for bar in found.bars)
    assert drawn == found.rows - found.nulls - sum(found.special.values()) or pa.types.is_struct(kind)
    expected = [bar.expected for bar in found.bars if bar.expected is not None]
    if expected and drawn:
        assert sum(expected) == pytest.approx(drawn, abs=0.01 * len(expected) + 0.01)
    assert all(math.isfinite(value) for value in (found.mean or 0, *(found.percentiles or {"": 0}).values()))


class Features(ViewContract):
    """Of which every column is a feature."""

    def __init__(self) -> None:
        for name, value in {"join_keys": (), "timestamp_field": "at", "created_field": None}.items():
            object.__setattr__(self, name, value)


def test_what_may_be_chance_is_not_held_against_a_day() -> None:
    assert Drift(0.3, 0.1, 1, 1, 0, 0).exceeds(0.25)
    assert not Drift(0.3, 0.4, 1, 1, 0, 0).exceeds(0.25)
    assert not Drift(0.25, 0.1, 1, 1, 0, 0).exceeds(0.25)
