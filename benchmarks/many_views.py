"""A worker with 200 views on 50 topics: what it takes to start, to idle and to serve. Part of `benchmarks.fleet`."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis
from feast import FeatureStore

from benchmarks.drain import (
    CPU,
    DRAIN_TIMEOUT_S,
    LEDGER_PAUSE_S,
    Memory,
    RunningWorker,
    counted,
    declarations,
    store_figures,
    store_yaml,
    worker,
)
from benchmarks.events import DRIVERS
from benchmarks.measure import MEBIBYTE, seconds
from benchmarks.pulses import Waits, pulsing
from benchmarks.stream import Bench
from headrace.chains import StreamLedger
from headrace.repository import contracts, open_store
from tests.servers import Postgres

HEADS = ("200 views on 50 topics in one worker", "measured")

TOPICS, VIEWS, PARTITIONS = 50, 200, 2
RATE, WATCHED = 1_000, 10
WARM_UP_S, IDLE_S, LOADED_S = 10.0, 40.0, 30.0


def views(bench: Bench) -> list[tuple[str, ...]]:
    """A worker with many views: what it takes to start, to idle, and to serve them."""
    topics = [f"views-{number:02d}" for number in range(TOPICS)]
    for topic in topics:
        bench.kafka.create_topic(topic, partitions=PARTITIONS)
    bench.empty_valkey()
    with Postgres({"log_statement": "all"}) as postgres:
        folder = bench.place() / "repo"
        begun = time.perf_counter()
        apply_many(folder, topics, bench.valkey.address, postgres.url)
        bench.say(f"applied {VIEWS} views in {time.perf_counter() - begun:.1f} s")
        rows: list[tuple[str, ...]] = [
            ("start until ready, the first, which makes dead-letter topics and ledgers", _started(bench, folder))
        ]
        rows.append(("start until ready, any other", _started(bench, folder)))
        with worker(bench.kafka.address, folder, bench.place() / "worker.log") as one:
            time.sleep(WARM_UP_S)
            idle = Costs.over(one, bench, postgres, IDLE_S)
            rows += [(f"idle: {what}", value) for what, value in idle.rows().items()]
            rows += _loaded(bench, folder, topics, one, postgres)
    return rows


def _started(bench: Bench, folder: Path) -> str:
    with worker(bench.kafka.address, folder, bench.place() / "worker.log") as one:
        return seconds(time.perf_counter() - one.begun)


def apply_many(folder: Path, topics: Sequence[str], address: str, registry: str) -> None:
    """A feature repository with many views, spread over the topics."""
    folder.mkdir(parents=True)
    (folder / "feature_store.yaml").write_text(store_yaml(folder, address, registry), encoding="utf-8")
    objects: list[Any] = []
    for number in range(VIEWS):
        shape = replace(DRIVERS, name=view_name(number))
        declared = declarations(folder, topics[number % TOPICS], shape, (str(folder / "offline" / shape.name), None))
        objects += declared if not objects else declared[1:]  # the entity once
    FeatureStore(repo_path=str(folder)).apply(objects)


def view_name(number: int) -> str:
    """The name of a view; it is of topic `number % TOPICS`."""
    return f"view_{number:03d}"


@dataclass(frozen=True)
class Costs:
    """What a worker took over a time."""

    cpu_share: float
    rss_bytes: int
    threads: int
    reads_a_minute: float
    commands_a_second: float

    @classmethod
    def over(cls, one: RunningWorker, bench: Bench, postgres: Postgres, length_s: float) -> Costs:
        """Look, wait, and look again."""
        length_s = max(length_s * bench.scale, 15.0)
        memory = Memory()
        with redis.Redis.from_url(f"redis://{bench.valkey.address}") as client:
            before = counted(one.port), statements(postgres), store_figures(client)[1]
            begun = time.perf_counter()
            time.sleep(length_s)
            took_s = time.perf_counter() - begun
            after = counted(one.port), statements(postgres), store_figures(client)[1]
        memory.look(one.process.pid)
        return cls(
            (after[0][CPU] - before[0][CPU]) / took_s,
            memory.samples[-1][1],
            len(list(Path(f"/proc/{one.process.pid}/task").iterdir())),
            (after[1] - before[1]) / took_s * 60,
            (after[2] - before[2]) / took_s,
        )

    def rows(self) -> dict[str, str]:
        """As the table has them."""
        return {
            "CPU": f"{self.cpu_share:.1%} of a core",
            "resident memory, threads": f"{self.rss_bytes / MEBIBYTE:.0f} MiB, {self.threads}",
            "statements a minute to the registry": f"{self.reads_a_minute:.0f}",
            "commands a second to the online store": f"{self.commands_a_second:.0f}",
        }


def statements(postgres: Postgres) -> int:
    """How many statements the server was sent so far."""
    return len(re.findall(r"LOG:  (?:statement|execute)", postgres.log.read_text(errors="replace")))


def _loaded(
    bench: Bench, folder: Path, topics: list[str], one: RunningWorker, postgres: Postgres
) -> list[tuple[str, ...]]:
    """The same under a load over all topics, of which some views are watched; all of it must be stored."""
    load = {"topics": topics, "partitions": PARTITIONS, "rate": RATE, "pulses": 1.0, "hot": 0.0}
    watched = [number * (VIEWS // WATCHED + 1) % VIEWS for number in range(WATCHED)]
    reading = {
        "folder": str(folder),
        "views": [view_name(number) for number in watched for _ in range(PARTITIONS)],
        "places": [number % TOPICS * PARTITIONS + part for number in watched for part in range(PARTITIONS)],
    }
    contract_of = {contract.name: contract for contract in contracts(open_store(folder))}
    with pulsing(bench, load, reading) as stream:
        time.sleep(WARM_UP_S)
        begun = time.monotonic()
        costs = Costs.over(one, bench, postgres, LOADED_S)
        produced = stream.end_producing()
        counts = iter(produced["counts"])
        wanted = {(topic, part): next(counts) for topic in topics for part in range(PARTITIONS)}
        for number in range(VIEWS):
            for part in range(PARTITIONS):
                topic = topics[number % TOPICS]
                ledger = StreamLedger(contract_of[view_name(number)], topic, part)
                while ledger.end().end < wanted[topic, part]:
                    one.is_in_time(DRAIN_TIMEOUT_S)
                    time.sleep(LEDGER_PAUSE_S)
        waits = Waits.of(produced, stream.end_watching())
    found = np.concatenate(waits.between(begun, np.inf))
    p50, p99 = np.quantile(found, (0.5, 0.99)).tolist()
    longest = float(found.max())
    of_load = f"{RATE:,} events/s over all, each in {VIEWS // TOPICS} views"
    return [
        (
            f"{of_load}: until `get_online_features` has it",
            f"p50 {seconds(p50)}, p99 {seconds(p99)}, longest {seconds(longest)}",
        ),
        *((f"{of_load}: {what}", value) for what, value in costs.rows().items()),
    ]
