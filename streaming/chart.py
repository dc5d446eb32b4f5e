"""A small chart of an hour of freshness, as paths of an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 240, 48
"""Of the chart's own coordinates; 4 for each minute."""


@dataclass(frozen=True)
class Chart:
    """Lines over the minutes of an hour, on a logarithmic scale; a minute without events leaves a gap.

    Attributes:
        p50, p99: paths.
        over: the path of those minutes whose p99 misses the objective.
        objective_y: where the objective lies; None without one.
        low_s, high_s: the span of what is drawn.
    """

    p50: str
    p99: str
    over: str
    objective_y: float | None
    low_s: float
    high_s: float


def chart(minutes: Sequence[Sequence[Any] | None], objective_s: float | None) -> Chart | None:
    """Draw the minutes of a freshness of `streaming.status`; None if there is nothing to draw."""
    values = [value for minute in minutes if minute for value in minute[:2]]
    if not values:
        return None
    low_s, high_s = min(values), max(values)
    floor = math.log(max(1e-4, min(low_s, objective_s or low_s) / 1.3))
    span = math.log(max(1e-4, high_s, objective_s or high_s) * 1.3) - floor

    def y(value_s: float) -> float:
        return round(HEIGHT * (1 - (math.log(max(value_s, 1e-4)) - floor) / span), 1)

    heights = [(number, y(minute[0]), y(minute[1])) for number, minute in enumerate(minutes) if minute]
    missed = {n for n, minute in enumerate(minutes) if minute and objective_s is not None and minute[1] > objective_s}
    return Chart(
        p50=_steps((number, low) for number, low, _ in heights),
        p99=_steps((number, high) for number, _, high in heights),
        over=_steps((number, high) for number, _, high in heights if number in missed),
        objective_y=None if objective_s is None else y(objective_s),
        low_s=low_s,
        high_s=high_s,
    )


def _steps(points: Iterable[tuple[int, float]]) -> str:
    """A level line for each minute, joined to that of the minute before it."""
    parts: list[str] = []
    former = -2
    for number, height in points:
        x = number * WIDTH // 60
        parts.append(f"{f'V{height}' if number == former + 1 else f'M{x} {height}'}h{WIDTH // 60}")
        former = number
    return "".join(parts)
