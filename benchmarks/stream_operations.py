"""What the benchmark of the stream does in processes of its own: producing, and looking from outside at what is stored.

Clocks are the machine's monotonic one, which all its processes share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.events import DRIVERS, KEY, PARTITIONS, STEADY_LINGER_MS, Load, produce, producer, send
from benchmarks.measure import Answer, serve, timed
from headrace.chains import files
from headrace.repository import contracts, open_store

PROBE = 1_000_000_000
"""The key of the first probe; the others follow. No other event has such a key."""

PROBE_COUNT = "avg_daily_trips"
"""The feature in which a probe carries its number, to be compared."""

TICK_S = 0.002
ONLINE_PAUSE_S, OFFLINE_PAUSE_S = 0.0005, 0.05


def produce_share(
    address: str, load: dict[str, Any], partitions: list[int], rate: float | None = None
) -> Callable[[], Answer]:
    """Produce some partitions of a load; see `benchmarks.events.produce`."""

    def run() -> Answer:
        answer: Answer = {}
        with timed(answer):
            answer["bytes"] = produce(address, Load(**load), partitions, rate)
        return answer

    return run


def produce_steadily(address: str, topic: str, rate: int, seconds: float) -> Callable[..., Answer]:
    """Produce events at a rate, and probes among them at times told beforehand."""
    random = np.random.default_rng(rate)
    stock = 100_000
    drivers = random.integers(1, 10_001, stock).tolist()
    shares = random.random((2, stock)).round(6).tolist()
    trips = random.integers(0, 1_000, stock).tolist()
    template = DRIVERS.template()

    def run(start: float, probes: list[float]) -> Answer:
        target = producer(address, linger_ms=STEADY_LINGER_MS)
        target.list_topics(topic, timeout=10.0)  # so that the first event finds the connection open
        made: list[float] = []
        acked: list[float | None] = [None] * len(probes)

        def note(error: object, message: object, *, probe: int) -> None:
            acked[probe] = time.monotonic() if error is None else None

        sent = probed = 0
        latest_s = 0.0
        time.sleep(max(0.0, start - time.monotonic()))
        while (passed := time.monotonic() - start) < seconds:
            stamp = time_text()
            due = min(int(passed * rate), int(seconds * rate))
            latest_s = max(latest_s, (due - sent) / rate)
            while sent < due:
                at = sent % stock
                driver = drivers[at]
                value = template % (driver, shares[0][at], shares[1][at], trips[at], stamp, stamp)
                send(target, topic, value.encode(), str(driver).encode(), driver % PARTITIONS)
                sent += 1
            while probed < len(probes) and probes[probed] <= passed:
                key = PROBE + probed
                stamp = time_text()
                value = template % (key, 0.5, 0.5, probed, stamp, stamp)
                made.append(time.monotonic())
                send(
                    target,
                    topic,
                    value.encode(),
                    str(key).encode(),
                    key % PARTITIONS,
                    on_delivery=partial(note, probe=probed),
                )
                probed += 1
            target.poll(0)
            time.sleep(TICK_S)
        left = target.flush(60.0)
        return {"sent": sent + probed, "left": left, "made": made, "acked": acked, "latest_s": latest_s}

    return run


def watch_online(folder: str, view: str) -> Callable[..., Answer]:
    """Call `get_online_features` for the probes that are due until each has been seen."""
    store = open_store(Path(folder))
    feature = f"{view}:{PROBE_COUNT}"

    def look(probes: list[int]) -> list[int | None]:
        rows = [{KEY: PROBE + probe} for probe in probes]
        found: list[int | None] = store.get_online_features(features=[feature], entity_rows=rows).to_dict()[PROBE_COUNT]
        return found

    look([0])  # opens what stays open

    def run(start: float, probes: list[float], timeout_s: float) -> Answer:
        seen: list[float | None] = [None] * len(probes)
        costs: list[float] = []
        wrong: list[int] = []
        waiting: list[int] = []
        following = 0
        while following < len(probes) or waiting:
            now = time.monotonic() - start
            if now > timeout_s:
                break
            while following < len(probes) and probes[following] <= now:
                waiting.append(following)
                following += 1
            if not waiting:
                time.sleep(max(0.0, probes[following] - now))
                continue
            asked = time.monotonic()
            found = look(waiting)
            answered = time.monotonic()
            costs.append(answered - asked)
            for probe, value in zip(waiting, found, strict=True):
                if value is not None:
                    seen[probe] = answered
                    wrong += [probe] if value != probe else []
            waiting = [probe for probe in waiting if seen[probe] is None]
            time.sleep(ONLINE_PAUSE_S)
        return {"seen": seen, "costs": costs, "wrong": wrong}

    return run


def watch_offline(folder: str, view: str) -> Callable[..., Answer]:
    """List the view's valid files again and again, and look for the probes in new ones, until each has been seen."""
    (contract,) = contracts(open_store(Path(folder)), [view])

    def run(start: float, probes: list[float], timeout_s: float) -> Answer:
        seen: list[float | None] = [None] * len(probes)
        costs: list[float] = []
        wrong: list[int] = []
        known: set[Path] = set()
        while None in seen and time.monotonic() - start < timeout_s:
            asked = time.monotonic()
            valid = files(contract)
            listed = time.monotonic()
            costs.append(listed - asked)
            for path in set(valid) - known:
                rows = pq.read_table(path, columns=[KEY, PROBE_COUNT], filters=[(KEY, ">=", PROBE)]).to_pylist()
                for row in rows:
                    probe = row[KEY] - PROBE
                    wrong += [probe] if row[PROBE_COUNT] != probe or seen[probe] is not None else []
                    seen[probe] = listed
            known.update(valid)
            time.sleep(OFFLINE_PAUSE_S)
        return {"seen": seen, "costs": costs, "wrong": wrong}

    return run


def time_text(at_ms: int | None = None) -> str:
    """A time as the events have it, milliseconds since the epoch; now if there is none."""
    return str(np.datetime64(time.time_ns() // 1_000_000 if at_ms is None else at_ms, "ms")).replace("T", " ")


if __name__ == "__main__":
    serve(
        {
            "produce": produce_share,
            "produce-steadily": produce_steadily,
            "watch-online": watch_online,
            "watch-offline": watch_offline,
        }
    )
