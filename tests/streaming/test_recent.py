"""Counts of the last hour, verdicts and the chart: what the status page computes, without servers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from streaming.chart import chart
from streaming.health import FRESHNESS_BOUNDS_S
from streaming.lookups import LookUp
from streaming.pages import visible
from streaming.recent import SLOT_S, SLOTS, Recent, quantile
from streaming.status import judge, seconds_text


class Clock:
    """Seconds that a test sets."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("begin_s", [0.0, 7.0, 123_456.0])
def test_what_was_counted_is_forgotten_by_the_slot(begin_s: float) -> None:
    clock = Clock(begin_s)
    recent = Recent(clock)
    assert recent.now("key") is None
    rng = np.random.default_rng(1)
    counted: list[tuple[int, int]] = []
    for _ in range(600):
        clock.now_s += float(rng.choice([0.1, 1, 7, 16, 61, 200]))
        count = int(rng.integers(1, 9))
        counted.append((int(clock.now_s // SLOT_S), count))
        recent.add("key", np.array([count, 1]))
        slot = counted[-1][0]
        for found, slots in ((recent.now("key"), 5), (recent.hour("key"), SLOTS)):
            assert found is not None
            assert found[0] == sum(n for at, n in counted if at > slot - slots)
        minutes = recent.minutes("key")
        assert minutes is not None
        assert (minutes.shape, minutes[:, 0].sum()) == ((60, 2), sum(n for at, n in counted if at > slot - SLOTS))
        assert minutes[-1, 0] == sum(n for at, n in counted if at > slot - 4)
    clock.now_s += 4000
    hour = recent.hour("key")
    assert hour is not None
    assert hour.sum() == 0


def test_now_is_not_longer_than_the_worker_lives() -> None:
    clock = Clock(1000.0)
    recent = Recent(clock)
    clock.now_s += 10
    assert recent.now_s() == 10
    clock.now_s += 1000
    assert 60 <= recent.now_s() < 60 + SLOT_S


def test_quantiles_are_interpolated_and_know_what_lies_beyond() -> None:
    assert quantile(np.array([0, 0, 0]), (1.0, 2.0), 0.5) is None
    assert quantile(np.array([0, 10, 0]), (1.0, 2.0), 0.5) == pytest.approx(1.5)
    assert quantile(np.array([0, 10, 90]), (1.0, 2.0), 0.5) == float("inf")


@pytest.mark.parametrize(
    ("p99_s", "objective_s", "waiting_s", "verdict"),
    [
        (0.5, None, None, "none"),
        (None, 1.0, None, "idle"),
        (None, 1.0, 0.5, "idle"),
        (1.0, 1.0, 0.5, "met"),
        (1.1, 1.0, None, "missed"),
        (0.5, 1.0, 1.1, "missed"),
        (None, 1.0, 1.1, "missed"),
        (float("inf"), 60.0, None, "missed"),
        (float("inf"), FRESHNESS_BOUNDS_S[-1] + 1, None, "unknown"),
    ],
)
def test_an_objective_is_missed_also_by_what_waits(
    p99_s: float | None, objective_s: float | None, waiting_s: float | None, verdict: str
) -> None:
    assert judge(p99_s, objective_s, waiting_s)[0] == verdict


def test_durations_for_people() -> None:
    given = (None, 0.0, 0.0123, 1.0, 59.95, 119.0, 600.0, 100_000.0, 1e6)
    assert [seconds_text(value) for value in given] == [
        *("", "0 ms", "12.3 ms", "1 s", "60 s", "119 s", "10 min", "27.8 h", "12 days")
    ]


def test_the_chart_leaves_gaps_and_marks_what_missed() -> None:
    minutes = [None, [0.1, 0.2, 5], [0.1, 3.0, 5], None, [0.1, 0.2, 5], *[None] * 55]
    drawn = chart(minutes, 1.0)
    assert drawn is not None
    assert (drawn.p99.count("M"), drawn.p99.count("h4")) == (2, 3)
    assert drawn.over.startswith("M8 ")
    assert drawn.over.count("h4") == 1
    assert (drawn.low_s, drawn.high_s) == (0.1, 3.0)
    assert chart([None] * 60, 1.0) is None
    assert chart([[0.0, 0.0, 1]] * 60, None) is not None


def test_characters_that_show_nothing_are_escaped() -> None:
    assert visible("a\u202eb\x00\x1b\u200f\n ä") == "a\\u202eb\\x00\\x1b\\u200f\\n ä"
    assert visible(5) == 5


def test_a_look_up_that_fails_or_hangs_is_told_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.lookups.LATE_S", 0.2)
    gate, calls = threading.Event(), []

    def ask() -> int:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("gone")
        if len(calls) == 3:
            gate.wait(10)
        return len(calls)

    look_up = LookUp("test", ask, 0.01)
    assert look_up.answer().value is None
    until(look_up, lambda: look_up.answer().value == 1)
    assert look_up.answer().unknown_since_s is None
    first_s = look_up.answer().at_s
    until(look_up, lambda: look_up.answer().why == "OSError: gone")
    assert look_up.answer().unknown_since_s == first_s
    until(look_up, lambda: "no answer for" in str(look_up.answer().why))
    for _ in range(20):
        look_up.refresh()
    assert len(calls) == 3, "while one hangs no other is asked"
    assert (look_up.answer().value, look_up.is_awaited) == (1, False)
    gate.set()
    until(look_up, lambda: look_up.answer().why is None)
    assert look_up.answer().value == 3


def until(look_up: LookUp[int], is_so: object) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline, look_up.answer()
        look_up.refresh()
        time.sleep(0.01)
