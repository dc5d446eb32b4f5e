"""What the benchmark of the fleet does in processes of its own: a load with pulses, and a reader who sees them online.

A pulse is an event of a key that its partition alone has, and carries its number. What is served of a partition is its
newest pulse, so one look tells of all events of the partition that came before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.events import DRIVERS, KEY, STEADY_LINGER_MS, producer, send
from benchmarks.measure import Answer, serve
from benchmarks.stream_operations import PROBE, PROBE_COUNT, TICK_S, time_text
from headrace.repository import open_store

PULSE = (0.5, 0.5)
"""The features of a pulse before its number."""

STOCK = 100_000
KEYS = 10_000
LOOK_PAUSE_S = 0.01
FLUSH_S = 60.0


def produce(
    address: str, topics: list[str], partitions: int, rate: int, pulses: float, hot: float
) -> Callable[..., Answer]:
    """Produce events, over all partitions of some topics alike, and pulses among them.

    Args:
        rate: events a second, pulses included.
        pulses: a second and partition.
        hot: the share of the other events that goes to the first partition, beside its part of the rest.
    """
    places = [(topic, number) for topic in topics for number in range(partitions)]
    random = np.random.default_rng(rate)
    where = np.where(random.random(STOCK) < hot, 0, random.integers(0, len(places), STOCK)).tolist()
    drivers = random.integers(0, KEYS // partitions, STOCK).tolist()
    shares = random.random((2, STOCK)).round(6).tolist()
    trips = random.integers(0, 1_000, STOCK).tolist()
    template = DRIVERS.template()

    def run(stop: str) -> Answer:
        target = producer(address, linger_ms=STEADY_LINGER_MS)
        target.list_topics(topics[0], timeout=10.0)  # so that the first event finds the connection open
        made: list[list[float]] = [[] for _ in places]
        counts = [0] * len(places)
        failed: list[str] = []
        sent = key_sum = time_sum_us = pulsed = 0
        latest_s = 0.0

        def put(place: int, key: int, values: tuple[Any, ...]) -> None:
            nonlocal sent, key_sum, time_sum_us
            topic, partition = places[place]
            value = template % (key, *values, stamp, stamp)
            send(target, topic, value.encode(), str(key).encode(), partition, on_delivery=note)
            sent += 1
            counts[place] += 1
            key_sum += key
            time_sum_us += stamp_ms * 1_000

        def note(error: object, _: object) -> None:
            if error is not None:
                failed.append(str(error))

        start = time.monotonic()
        while not Path(stop).exists():
            passed = time.monotonic() - start
            stamp_ms = time.time_ns() // 1_000_000
            stamp = time_text(stamp_ms)
            while pulsed < int(passed * pulses * len(places)):
                place = pulsed % len(places)
                made[place].append(time.monotonic())
                put(place, PROBE + place, (*PULSE, len(made[place]) - 1))
                pulsed += 1
            due = int(passed * rate)
            latest_s = max(latest_s, (due - sent) / rate)
            while sent < due:
                at = sent % STOCK
                place = where[at]
                key = drivers[at] * partitions + places[place][1] + 1
                put(place, key, (shares[0][at], shares[1][at], trips[at]))
            target.poll(0)
            time.sleep(TICK_S)
        left = target.flush(FLUSH_S)
        return {
            "sent": sent,
            "counts": counts,
            "left": left + len(failed),
            "made": made,
            "key_sum": key_sum,
            "time_sum_us": time_sum_us,
            "latest_s": latest_s,
        }

    return run


def watch(folder: str, views: list[str], places: list[int]) -> Callable[..., Answer]:
    """Call `get_online_features` for the newest pulse of some places, until told to stop.

    Args:
        views: one for each place.
    """
    store = open_store(Path(folder))
    by_view: dict[str, list[int]] = {}
    for view, place in zip(views, places, strict=True):
        by_view.setdefault(view, []).append(place)
    questions = [([f"{view}:{PROBE_COUNT}"], [{KEY: PROBE + one} for one in own], own) for view, own in by_view.items()]

    def look() -> list[tuple[int, int | None]]:
        found: list[tuple[int, int | None]] = []
        for features, rows, own in questions:
            values = store.get_online_features(features=features, entity_rows=rows).to_dict()[PROBE_COUNT]
            found += zip(own, values, strict=True)
        return found

    look()  # opens what stays open

    def run(stop: str) -> Answer:
        seen: dict[int, list[tuple[float, int]]] = {place: [] for place in places}
        last: dict[int, int] = dict.fromkeys(places, -1)
        costs: list[float] = []
        backwards: list[int] = []
        while not Path(stop).exists():
            asked = time.monotonic()
            found = look()
            answered = time.monotonic()
            costs.append(answered - asked)
            for place, number in found:
                if number is None or number == last[place]:
                    continue
                backwards += [place] if number < last[place] else []
                last[place] = number
                seen[place].append((answered, number))
            time.sleep(LOOK_PAUSE_S)
        return {"seen": list(seen.items()), "costs": costs, "backwards": backwards}

    return run


if __name__ == "__main__":
    serve({"produce": produce, "watch": watch})
