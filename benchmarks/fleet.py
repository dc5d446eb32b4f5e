"""Many workers, and many views in one: pauses while workers come and go, hot partitions, what an idle worker costs.

    python -m benchmarks.fleet [--only changes hot views] [--scale 1.0] [--write docs/explanation/benchmarks.md]

A reader outside sees, partition by partition, when each pulse of a steady load can be read online. In the end every
event must be stored, once. What an event costs with 1, 2, 4 and 8 workers is in `benchmarks.scale`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from benchmarks import many_views
from benchmarks.command import Asked, command
from benchmarks.drain import (
    DRAIN_TIMEOUT_S,
    LEDGER_PAUSE_S,
    Repository,
    RunningWorker,
    compare,
    is_ready,
    is_spread,
    worker,
)
from benchmarks.events import DRIVERS, Load, Truth
from benchmarks.fleet_operations import PULSE
from benchmarks.measure import (
    Answer,
    MeasureError,
    redis_program,
    seconds,
    table,
)
from benchmarks.pulses import Floats, Waits, pulsing
from benchmarks.stream import PACKAGES, Bench, versions
from benchmarks.stream_operations import PROBE
from tests.servers import Kafka, Valkey

HEADS = ("what", "events/s", "p50", "p99", "longest", "longest, half of the partitions", "rebalances")

WORKERS, PARTITIONS = 4, 16
RATE = 2_000
PULSES = 25.0
"""A second and partition: so fine is what is seen of a pause."""

WARM_UP_S, CALM_S, AFTER_S, LAST_S, HOT_S = 10.0, 15.0, 5.0, 1.0, 20.0
HOT_RATES = (10_000, 50_000)
HOT_SHARE = 0.8

SETTLE_TIMEOUT_S = 120.0


class Fleet:
    """Workers on one repository, started and ended one by one or at once. The context ends those that are left."""

    def __init__(self, bench: Bench, repo: Repository, partitions: int) -> None:
        self._bench = bench
        self._repo = repo
        self._partitions = partitions
        self._ends: dict[int, contextlib.ExitStack] = {}
        self._logs: list[Path] = []
        self.workers: list[RunningWorker] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(self.workers)

    def start(self, count: int = 1) -> None:
        """Start workers, at once, and wait until all are ready."""
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda _: self._start(), range(count)))

    def stop(self, workers: Sequence[RunningWorker]) -> None:
        """End workers by SIGTERM, at once, and wait until they have ended."""
        ending = list(workers)
        self.workers = [one for one in self.workers if one not in ending]
        with ThreadPoolExecutor(max(1, len(ending))) as pool:
            list(pool.map(lambda one: self._ends.pop(one.process.pid).close(), ending))

    def kill(self) -> None:
        """End a worker by SIGKILL."""
        one = self.workers.pop(0)
        os.killpg(one.process.pid, signal.SIGKILL)
        self._ends.pop(one.process.pid).close()

    def replace_one_by_one(self) -> None:
        """End each worker and start another in its place when it has ended; the next when that is ready."""
        for one in list(self.workers):
            self.stop([one])
            self.start()

    def replace_at_once(self) -> None:
        """Start as many workers again, and end the former when the new ones are ready."""
        former = list(self.workers)
        self.start(len(former))
        self.stop(former)

    def settle(self) -> None:
        """Wait until all are ready, and all partitions have been spread over them."""
        begun = time.perf_counter()
        while not self._is_spread():
            for one in self.workers:
                one.is_in_time(DRAIN_TIMEOUT_S)
            if time.perf_counter() - begun > SETTLE_TIMEOUT_S:
                raise MeasureError(f"the partitions were not spread within {SETTLE_TIMEOUT_S:.0f} s")
            time.sleep(LEDGER_PAUSE_S)

    def generation(self) -> int:
        """The group's; each rebalance makes the next."""
        text = "".join(log.read_text(errors="replace") for log in self._logs)
        return max(int(found) for found in re.findall(r"generation (\d+):", text))

    def shares(self) -> list[set[int]]:
        """The partitions of each worker."""
        return [{one["partition"] for one in state(worker.port)["partitions"]} for worker in self.workers]

    def _is_spread(self) -> bool:
        return is_spread(self.workers, self._partitions) and all(is_ready(one.port) for one in self.workers)

    def _start(self) -> None:
        end = contextlib.ExitStack()
        log = self._bench.place() / "worker.log"
        one = end.enter_context(worker(self._bench.kafka.address, self._repo.folder, log))
        self._logs.append(log)
        self._ends[one.process.pid] = end
        self.workers.append(one)


def state(port: int) -> dict[str, Any]:
    """What a ready worker says of itself."""
    with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10.0) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@dataclass(frozen=True)
class Window:
    """A time in which something was done to the fleet."""

    what: str
    begin_s: float
    end_s: float
    rebalances: int


def row(what: str, rate: float, waits: Sequence[Floats], rebalances: str = "") -> tuple[str, ...]:
    """A line of the table, see `HEADS`."""
    p50, p99 = np.quantile(np.concatenate(waits), (0.5, 0.99)).tolist()
    longest = [float(one.max()) for one in waits]
    half = seconds(float(np.median(longest))) if len(longest) > 1 else ""
    return what, f"{rate:,.0f}", seconds(p50), seconds(p99), seconds(max(longest)), half, rebalances


def changes(bench: Bench) -> list[tuple[str, ...]]:
    """Workers come, go, crash and are replaced under a steady load."""
    windows: list[Window] = []
    waits, produced = steady(bench, "changes", rate=RATE, hot=0.0, during=partial(_change, bench, windows))
    bench.say(f"the producer was up to {seconds(produced['latest_s'])} late")
    return [row(one.what, RATE, waits.between(one.begin_s, one.end_s), str(one.rebalances or "")) for one in windows]


def _change(bench: Bench, windows: list[Window], fleet: Fleet) -> None:
    def crash() -> None:
        fleet.kill()
        fleet.start()

    acts: dict[str, Callable[[], None]] = {
        "4 workers, nothing happens": lambda: time.sleep(CALM_S * bench.scale),
        "a fifth worker joins": fleet.start,
        "one leaves, by SIGTERM": lambda: fleet.stop(fleet.workers[:1]),
        "one ends by kill -9, and another is started at once": crash,
        "one ends by kill -9, and none takes its place": fleet.kill,
    }
    rolls: dict[str, Callable[[], None]] = {
        "rolling deploy of 4, one after the other": fleet.replace_one_by_one,
        "rolling deploy of 4, the new ones first (`maxSurge: 100%`)": fleet.replace_at_once,
    }
    for what, act in acts.items():
        windows.append(_window(bench, fleet, what, act))
    fleet.start()
    fleet.settle()
    time.sleep(AFTER_S)
    for what, act in rolls.items():
        windows.append(_window(bench, fleet, what, act))


def _window(bench: Bench, fleet: Fleet, what: str, act: Callable[[], None]) -> Window:
    before, begun = fleet.generation(), time.monotonic()
    act()
    fleet.settle()
    settled = time.monotonic()
    time.sleep(AFTER_S)
    # What is produced in the last moment may be served after the next change has begun.
    window = Window(what, begun, time.monotonic() - LAST_S, fleet.generation() - before)
    bench.say(f"{what}: spread after {settled - begun:.1f} s, {window.rebalances} rebalances")
    return window


def hot(bench: Bench) -> list[tuple[str, ...]]:
    """One partition has most of the events."""
    rows: list[tuple[str, ...]] = []
    for rate in HOT_RATES:
        found: list[tuple[float, list[set[int]]]] = []

        def during(fleet: Fleet, found: list[tuple[float, list[set[int]]]] = found) -> None:
            found.append((time.monotonic(), fleet.shares()))
            time.sleep(max(HOT_S * bench.scale, 5.0))

        waits, produced = steady(bench, f"hot-{rate}", rate=rate, hot=HOT_SHARE, during=during)
        begun, shares = found[0]
        (own,) = [share for share in shares if 0 in share]
        own_s = max(times[-1] for times in produced["made"]) - min(times[0] for times in produced["made"])
        is_late = f" (the producer was up to {seconds(produced['latest_s'])} late)" * (produced["latest_s"] > 0.5)
        what = f"80 % of {rate:,} events/s in 1 of {PARTITIONS} partitions{is_late}"
        counts = np.array(produced["counts"]) / own_s
        parts = {
            "the hot one": [0],
            "the others of its worker": sorted(own - {0}),
            "those of the other workers": [place for place in range(PARTITIONS) if place not in own],
        }
        for part, places in parts.items():
            rows.append(row(f"{what}: {part}", counts[places].sum(), waits.between(begun, np.inf, places)))
    return rows


def steady(bench: Bench, name: str, *, rate: int, hot: float, during: Callable[[Fleet], None]) -> tuple[Waits, Answer]:
    """A steady load on a fleet, all of it checked.

    Args:
        during: done when the fleet has been warmed up.

    Raises:
        MeasureError: something was lost, doubled, or served wrongly.
    """
    topic = bench.kafka.create_topic(name, partitions=PARTITIONS)
    bench.empty_valkey()
    repo = Repository(bench.place() / "repo", topic, DRIVERS, bench.valkey.address)
    load = {"topics": [topic], "partitions": PARTITIONS, "rate": rate, "pulses": PULSES, "hot": hot}
    places = list(range(PARTITIONS))
    reading = {"folder": str(repo.folder), "views": [DRIVERS.name] * PARTITIONS, "places": places}
    with Fleet(bench, repo, PARTITIONS) as fleet:
        fleet.start(WORKERS)
        fleet.settle()
        with pulsing(bench, load, reading) as stream:
            time.sleep(WARM_UP_S)
            during(fleet)
            produced = stream.end_producing()
            begun = time.perf_counter()
            while repo.end(PARTITIONS) < produced["sent"]:
                if time.perf_counter() - begun > DRAIN_TIMEOUT_S:
                    raise MeasureError(f"{name}: {repo.end(PARTITIONS):,} of {produced['sent']:,} events were stored")
                time.sleep(LEDGER_PAUSE_S)
            watched = stream.end_watching()
    bench.say(f"{name}: {produced['sent']:,} events; a look takes {seconds(float(np.median(watched['costs'])))}")
    stored = Load(topic, DRIVERS.name, produced["sent"], 0, partitions=PARTITIONS)
    newest = {PROBE + place: (*PULSE, len(made) - 1) for place, made in enumerate(produced["made"])}
    compare(repo, stored, Truth(produced["key_sum"], produced["time_sum_us"], newest))
    return Waits.of(produced, watched), produced


PARTS: dict[str, Callable[[Bench], list[tuple[str, ...]]]] = {"changes": changes, "hot": hot, "views": many_views.views}


def measure(asked: Asked) -> dict[str, str]:
    """The tables of the parts asked for."""
    with Kafka(heap="1g") as kafka, Valkey(program=redis_program()) as valkey:
        servers = versions(valkey)
        bench = Bench(asked.folder, kafka, valkey, asked.runs, asked.scale)
        rows = {name: PARTS[name](bench) for name in asked.only}
    fleet = [line for name in ("changes", "hot") for line in rows.get(name, [])]
    tables = [table(HEADS, fleet)] if fleet else []
    tables += [table(many_views.HEADS, rows["views"])] if "views" in rows else []
    return {"fleet": "\n\n".join([*tables, asked.measured(servers, PACKAGES)])}


def main() -> int:
    """See `benchmarks.command`."""
    return command("fleet", "Many workers, many views.", measure, rows=list(PARTS))


if __name__ == "__main__":
    raise SystemExit(main())
