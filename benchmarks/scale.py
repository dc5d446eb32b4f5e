"""What an event costs a worker and the stores, by kind of load and number of workers; a model of it, and a plan by it.

    python -m benchmarks.scale [--scale 1.0] [--write docs/scale.md]

Each point brings events, as they come, from a real Kafka into Redis or Valkey and Parquet, and asks the workers what it
took them: CPU, rows written online, bytes appended. Five points give the model its numbers, the others are foretold by
it. `benchmarks.plan` says what larger loads need.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import redis

from benchmarks import plan
from benchmarks.command import Asked, command
from benchmarks.drain import (
    CPU,
    DRAIN_TIMEOUT_S,
    LEDGER_PAUSE_S,
    START_TIMEOUT_S,
    Repository,
    RunningWorker,
    compare,
    counted,
    is_spread,
    store_figures,
    worker,
)
from benchmarks.events import DRIVERS, MIDDLE, SHAPES, WIDE, truth
from benchmarks.measure import (
    MILLION,
    redis_program,
    short,
    table,
)
from benchmarks.plan import Need
from benchmarks.stream import SAMPLES, Bench, versions
from headrace.chains import files
from tests.servers import Kafka, Valkey

HEADS = (
    "what",
    "events/s",
    "CPU of the workers",
    "foretold",
    "off by",
    "keys online",
    "steps",
    "CPU of the online store",
    "commands",
    "memory a key",
    "offline",
    "files",
)
BOUND = 0.25
"""By how much what the model foretells may be off."""

PACKAGES = ("feast", "faust-streaming", "aiokafka", "pyarrow", "redis", "hiredis")


@dataclass(frozen=True)
class Point:
    """A load.

    Attributes:
        rate: events a second; None is as quickly as producers can, beside the workers.
        is_given: whether the model takes its numbers from it.
    """

    what: str
    events: int
    shape: str = DRIVERS.name
    keys: int = 10_000
    partitions: int = 4
    workers: int = 1
    rate: int | None = None
    is_given: bool = False


POINTS = {
    "base": Point("3 features, 10,000 keys", 2 * MILLION, is_given=True),
    "wide": Point("50 features", 200_000, WIDE.name, is_given=True),
    "keys": Point("3 features, 1,000,000 keys", 2 * MILLION, keys=MILLION, is_given=True),
    "middle": Point("20 features", 500_000, MIDDLE.name),
    "some-keys": Point("3 features, 100,000 keys", 2 * MILLION, keys=100_000),
    "steady-10000": Point("10,000 events/s", 400_000, rate=10_000, is_given=True),
    "steady-50000": Point("50,000 events/s", MILLION, rate=50_000),
    "workers-1": Point("16 partitions, 1 worker", 2 * MILLION, partitions=16, is_given=True),
    "workers-2": Point("16 partitions, 2 workers", 2 * MILLION, partitions=16, workers=2),
    "workers-4": Point("16 partitions, 4 workers", 2 * MILLION, partitions=16, workers=4),
    "workers-8": Point("16 partitions, 8 workers", 2 * MILLION, partitions=16, workers=8),
}


@dataclass(frozen=True)
class Cost:
    """What a load took, by event.

    Attributes:
        event_bytes: of JSON.
        cpu_us: of all workers together, from their being ready on.
        online_keys: keys that were written online: those that a call had, once, unless what is there was newer.
        steps: calls of the steps: a batch is decoded, written online and appended in one each.
        store_cpu_us, commands: of the online store, likewise.
        key_bytes: what a key takes in the online store.
        offline_bytes: appended.
        files: that were appended, in all.
    """

    event_bytes: float
    events_a_second: float
    cpu_us: float
    online_keys: float
    steps: float
    store_cpu_us: float
    commands: float
    key_bytes: float
    offline_bytes: float
    files: int


@dataclass(frozen=True)
class Model:
    """CPU of an event: a part for each byte of it, for what goes online, and its share of the steps.

    Numbers in microseconds, by least squares over the points that are given, of the shares by which it is off.
    """

    byte: float
    online_key: float
    step: float

    @classmethod
    def of(cls, costs: dict[str, Cost]) -> Model:
        """The model that meets the points that are given best."""
        given = [costs[name] for name, point in POINTS.items() if point.is_given]
        terms = np.array([cls._terms(cost) for cost in given]) / np.array([[cost.cpu_us] for cost in given])
        return cls(*np.linalg.lstsq(terms, np.ones(len(given)), rcond=None)[0].tolist())

    def cpu_us(self, cost: Cost) -> float:
        """What an event of such a load takes."""
        return float(np.dot(self._terms(cost), astuple(self)))

    def __str__(self) -> str:
        return (
            f"CPU of the workers, µs an event = {self.byte:.4f} x bytes of JSON + {self.online_key:.2f} x keys online "
            f"+ {self.step:,.0f} x steps"
        )

    @staticmethod
    def _terms(cost: Cost) -> tuple[float, ...]:
        """In the order of the fields."""
        return cost.event_bytes, cost.online_keys, cost.steps


def cost_of(bench: Bench, name: str, point: Point) -> Cost:
    """Produce a load to workers that are there, and ask what it took them.

    Raises:
        MeasureError: a worker failed, or the stores do not hold what they should.
    """
    load = bench.planned(name, point.events, shape=point.shape, keys=point.keys, partitions=point.partitions)
    bench.empty_valkey()
    place = bench.place()
    repo = Repository(place / "repo", load.topic, SHAPES[load.shape], bench.valkey.address)
    with redis.Redis.from_url(f"redis://{bench.valkey.address}") as client:
        before = store_figures(client)
        with contextlib.ExitStack() as stack:
            logs = [place / f"worker-{number}.log" for number in range(point.workers)]
            running = [stack.enter_context(worker(bench.kafka.address, repo.folder, log)) for log in logs]
            _wait_shared(running, load.partitions)
            ready = [counted(one.port)[CPU] for one in running]
            begun = time.perf_counter()
            bench.produce(load, point.rate)
            while repo.end(load.partitions) < load.count:
                for one in running:
                    one.is_in_time(DRAIN_TIMEOUT_S)
                time.sleep(LEDGER_PAUSE_S)
            took_s = time.perf_counter() - begun
            figures = [counted(one.port) for one in running]
        after = store_figures(client)
        key_bytes = float(np.mean([client.memory_usage(client.randomkey()) for _ in range(SAMPLES)]))
    compare(repo, load, truth(load, SAMPLES))
    appended = len(files(repo.contract))
    shutil.rmtree(place)
    cost = Cost(
        event_bytes=bench.bytes[load.topic] / load.count,
        events_a_second=load.count / took_s,
        cpu_us=(sum(one[CPU] for one in figures) - sum(ready)) / load.count * 1e6,
        online_keys=sum(one.get("headrace_online_keys_written_total", 0.0) for one in figures) / load.count,
        steps=sum(one.get("headrace_step_duration_seconds_count", 0.0) for one in figures) / load.count,
        store_cpu_us=(after[0] - before[0]) / load.count * 1e6,
        commands=(after[1] - before[1]) / load.count,
        key_bytes=key_bytes,
        offline_bytes=sum(one.get("headrace_offline_appended_bytes_total", 0.0) for one in figures) / load.count,
        files=appended,
    )
    bench.say(f"{name}: {cost}")
    return cost


def _wait_shared(running: Sequence[RunningWorker], partitions: int) -> None:
    """Wait until each worker has its share of the partitions."""
    while not is_spread(running, partitions):
        for one in running:
            one.is_in_time(START_TIMEOUT_S)
        time.sleep(LEDGER_PAUSE_S)


def rows_of(model: Model, costs: dict[str, Cost]) -> list[tuple[str, ...]]:
    """The table: what was measured, and what the model foretells of the points that did not make it."""
    rows: list[tuple[str, ...]] = []
    for name, cost in costs.items():
        point = POINTS[name]
        foretold = model.cpu_us(cost)
        off = foretold / cost.cpu_us - 1
        rows.append(
            (
                f"{point.what}, {cost.event_bytes:.0f} bytes, {short(point.events)} events",
                f"{float(f'{cost.events_a_second:.3g}'):,.0f}",
                f"{cost.cpu_us:.2f} µs",
                f"{foretold:.2f} µs{', given' if point.is_given else ''}",
                f"{off:+.0%}{'' if abs(off) <= BOUND else ' **more than 25%**'}",
                f"{cost.online_keys:.3f}",
                f"{cost.steps:.6f}",
                f"{cost.store_cpu_us:.2f} µs",
                f"{cost.commands:.4f}",
                f"{cost.key_bytes:.0f} bytes",
                f"{cost.offline_bytes:.1f} bytes",
                f"{cost.files:,}",
            )
        )
    return rows


def needs_of(model: Model, costs: dict[str, Cost]) -> list[Need]:
    """What events of two sizes take a worker that is half busy, each brought online for itself."""
    steps = costs["steady-50000"].steps
    needs = []
    for name in ("keys", "middle"):
        cost = costs[name]
        alone = replace(cost, online_keys=1.0, steps=steps)
        needs.append(
            Need(
                f"{cost.event_bytes:.0f} bytes, {len(SHAPES[POINTS[name].shape].features)} features",
                model.cpu_us(alone),
                cost.store_cpu_us / cost.online_keys,
                cost.commands / cost.online_keys,
                cost.offline_bytes,
                cost.key_bytes,
            )
        )
    return needs


def measure(asked: Asked) -> dict[str, str]:
    """What the points cost, and the plan."""
    with Kafka(heap="1g") as kafka, Valkey(program=redis_program()) as valkey:
        servers = versions(valkey)
        bench = Bench(asked.folder, kafka, valkey, asked.runs, asked.scale)
        costs = {name: cost_of(bench, name, point) for name, point in POINTS.items()}
    model = Model.of(costs)
    shown = table(HEADS, rows_of(model, costs))
    return {
        "scale": f"{shown}\n\n{model}\n\n{asked.measured(servers, PACKAGES)}",
        "plan": plan.report(needs_of(model, costs)),
    }


def main() -> int:
    """See `benchmarks.command`."""
    return command("scale", "What an event costs.", measure)


if __name__ == "__main__":
    raise SystemExit(main())
