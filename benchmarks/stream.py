"""Speed of the stream: a Headrace worker between a real Kafka and both stores, its peers beside it, in the same run.

    python -m benchmarks.stream [--only valkey quix ...] [--runs 3] [--scale 1.0]
        [--write docs/explanation/benchmarks.md]

Everything runs on this machine: Apache Kafka, Valkey or Redis, producers, workers, readers. What is stored is compared
with what was produced: wrong data end the run. `--scale` makes every load smaller, to try things; the bounds are meant
for 1.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import redis

from benchmarks import stream_peers as peers
from benchmarks.command import Asked, command
from benchmarks.drain import Drained, Repository, drain, worker
from benchmarks.events import DRIVERS, PARTITIONS, SHAPES, WIDE, Load, Truth, truth
from benchmarks.measure import (
    MEBIBYTE,
    MILLION,
    Answer,
    MeasureError,
    Worker,
    machine,
    milliseconds,
    redis_program,
    redis_version,
    seconds,
    short,
    table,
    words_of,
)
from headrace.chains import files
from tests.servers import Kafka, Valkey
from tests.servers.brokers import fetch_jars
from tests.servers.valkey import ValkeyCluster

HEADS = ("what", "measured", "ratio", "bound", "met", "memory of the worker", "runs")
PRODUCERS = 2
SAMPLES = 500
LEAST = 10_000
"""The fewest events of a load, at whatever scale."""

WARM_UP_S, STEADY_S = 15.0, 30.0
PROBES_A_SECOND = 20
STEADY_TIMEOUT_S = 120.0
BOUND_RATE, STEADY_BOUND_S = 10_000, 0.1
LATE_S = 0.1
"""A producer that is later than this with its events does not keep its rate."""

MEMORY_BOUND_BYTES = 700 * MEBIBYTE
FLAT = 0.05
"""Memory counts as flat if it grows by no more than this share over the second half."""

PACKAGES = ("feast", "faust-streaming", "aiokafka", "uvloop", "msgspec", "pyarrow", "redis", "hiredis")
PEER_PACKAGES = ("quixstreams", "aiokafka", "orjson", "pyarrow", "confluent-kafka", "redis", "uvloop")


@dataclass(frozen=True)
class Row:
    """One row of the table, formatted; see `HEADS`."""

    what: str
    measured: str
    ratio: str = ""
    bound: str = ""
    met: bool | None = None
    memory: str = ""
    runs: int = 1

    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        return (self.what, self.measured, self.ratio, self.bound, words_of(self.met), self.memory, str(self.runs))


class Bench:
    """The servers, where the data are, how large they are to be, and how often things run.

    Args:
        folder: for everything but Kafka's and Valkey's own; the caller removes it.
        runs: of the rows that have a bound on speed.
        scale: of the loads.
        cluster: None if nothing is measured with it.
    """

    def __init__(
        self, folder: Path, kafka: Kafka, valkey: Valkey, runs: int, scale: float, cluster: ValkeyCluster | None = None
    ) -> None:
        self.folder = folder
        self.kafka = kafka
        self.valkey = valkey
        self._addresses = {"valkey": valkey.address, "cluster": None if cluster is None else cluster.address}
        self.runs = runs
        self.scale = scale
        self._begun = time.monotonic()
        self._places = 0
        self._loads: dict[str, tuple[Load, Truth]] = {}
        self.bytes: dict[str, int] = {}

    def scaled(self, count: int) -> int:
        """A number of events at this scale."""
        return max(int(count * self.scale), LEAST)

    def place(self) -> Path:
        """A new folder."""
        self._places += 1
        path = self.folder / f"{self._places:04d}"
        path.mkdir()
        return path

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"[{time.monotonic() - self._begun:6.0f} s] {text}", flush=True)

    def empty_valkey(self) -> None:
        """Remove everything from the servers."""
        for address in ",".join(filter(None, self._addresses.values())).split(","):
            with redis.Redis.from_url(f"redis://{address}") as client:
                client.flushall()

    def operation(self, name: str, **arguments: Any) -> Worker:
        """A process with an operation prepared."""
        return Worker("benchmarks.stream_operations", name, self.folder / "log.txt", **arguments)

    def load(self, topic: str, events: int, **more: Any) -> tuple[Load, Truth]:
        """A topic with events, produced when it is first asked for, and what must be stored of it."""
        if topic not in self._loads:
            load = self.planned(topic, events, **more)
            self.produce(load)
            self._loads[topic] = load, truth(load, SAMPLES)
        return self._loads[topic]

    def planned(self, topic: str, events: int, **more: Any) -> Load:
        """A topic, made, and the events that it is to have."""
        arguments = {"shape": DRIVERS.name, **more}
        load = Load(topic, count=self.scaled(events), until_us=time.time_ns() // 1_000, **arguments)
        self.kafka.create_topic(topic, partitions=load.partitions)
        return load

    def produce(self, load: Load, rate: float | None = None) -> None:
        """Produce a topic's events at a rate a second; None is as quickly as may be."""
        begun = time.monotonic()
        shares = [list(range(load.partitions))[number::PRODUCERS] for number in range(PRODUCERS)]
        each = None if rate is None else rate / PRODUCERS
        calls = [
            partial(self._produce, address=self.kafka.address, load=asdict(load), partitions=share, rate=each)
            for share in shares
        ]
        size = self.bytes[load.topic] = sum(answer["bytes"] for answer in at_once(calls))
        took_s = time.monotonic() - begun
        self.say(f"produced {load.count:,} events of {size / load.count:.0f} bytes to `{load.topic}`: {took_s:.1f} s")

    def drain(self, name: str, load: Load, expected: Truth, online: str = "valkey") -> Drained:
        """Drain a topic with a Headrace worker into empty stores, SQLite where `online` is no server's name."""
        self.empty_valkey()
        place = self.place()
        repo = Repository(place / "repo", load.topic, SHAPES[load.shape], self._addresses.get(online))
        found = drain(self.kafka.address, load, repo, expected, place / "worker.log")
        shutil.rmtree(place)
        self.say(
            f"{name}: {load.count:,} events in {found.seconds:.1f} s, {load.count / found.seconds:,.0f}/s, "
            f"memory {memory(found)}"
        )
        return found

    def _produce(self, **arguments: Any) -> Answer:
        with self.operation("produce", **arguments) as producer:
            return producer.run()


def backlogs(bench: Bench, names: Sequence[str]) -> list[Row]:
    """Drain backlogs, ours and the peers' in turn."""
    sides = [name for name in BACKLOGS if name in names or name == "valkey"]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    ours: dict[str, list[Drained]] = {side: [] for side in sides}
    loads = {side: bench.load(*BACKLOGS[side]) for side in sides}
    for number in range(bench.runs):
        for side in sides:
            load, expected = loads[side]
            name = f"{side}, run {number + 1} of {bench.runs}"
            if side in OURS:
                found = bench.drain(name, load, expected, side)
                ours[side].append(found)
                took_s = found.seconds
            else:
                bench.empty_valkey()
                took_s = PEERS[side](bench, load, expected)
                bench.say(f"{name}: {load.count:,} events in {took_s:.1f} s, {load.count / took_s:,.0f}/s")
            rates[side].append(load.count / took_s)
    rows = []
    reference = median(rates["valkey"])
    for side in sides:
        count, rate = short(loads[side][0].count), median(rates[side])
        what, bound, least = BACKLOG_ROWS[side]
        if side in OURS:
            peak = memory(max(ours[side], key=lambda found: found.memory.peak_bytes))
            ratio = rate / reference
            is_met = (ratio if side == "cluster" else rate) >= least
            beside = f"{ratio:.2f}x" if side == "cluster" else ""
            row = Row(f"{what}, {count} events", per_second(rate), beside, bound, is_met, peak, bench.runs)
        else:
            ratio = reference / rate
            row = Row(
                f"{what}, {count} events", per_second(rate), f"{ratio:.2f}x", bound, ratio >= least, "", bench.runs
            )
        rows.append(row)
    return rows


def steady(bench: Bench, name: str, *, rate: int) -> list[Row]:
    """A steady load, and how long it takes until an event can be read."""
    length_s = WARM_UP_S + max(STEADY_S * bench.scale, 5.0)
    # At random within its share of time, so that probes keep no step with fetches, ticks or appends.
    random = np.random.default_rng(rate)
    number = int((length_s - 1) * PROBES_A_SECOND)
    probes = ((np.arange(number) + random.random(number)) / PROBES_A_SECOND).tolist()
    source, online, offline = observe(bench, name, rate, length_s, probes)
    acked, fresh, durable = (
        latencies(source["made"], probes, seen) for seen in (source["acked"], online["seen"], offline["seen"])
    )
    look, listing = (milliseconds(median(answer["costs"])) for answer in (online, offline))
    late_s = source["latest_s"]
    bench.say(
        f"{name}: {len(fresh)} probes; acknowledged {spread(acked)}, online {spread(fresh)}, "
        f"offline {spread(durable)}; a look online takes {look}, a listing {listing}; "
        f"the producer was up to {milliseconds(late_s)} late"
    )
    behind = "" if late_s <= LATE_S else f" (the producer was up to {seconds(late_s)} late)"
    what = f"{rate:,} events/s for {length_s - WARM_UP_S:.0f} s{behind}, from `produce()` until"
    is_met = float(np.quantile(fresh, 0.99)) < STEADY_BOUND_S
    bound, met = ("p99 < 100 ms", is_met) if rate == BOUND_RATE else ("", None)
    return [
        Row(f"{what} the broker has acknowledged it", spread(acked)),
        Row(f"{what} `get_online_features` has it", spread(fresh), "", bound, met),
        Row(f"{what} a valid file has it", spread(durable)),
    ]


def observe(bench: Bench, name: str, rate: int, length_s: float, probes: list[float]) -> list[Answer]:
    """What producer, online reader and offline reader tell of a load of so many seconds, all of it checked.

    Raises:
        MeasureError: something was not stored, or wrongly.
    """
    topic = bench.kafka.create_topic(name, partitions=PARTITIONS)
    bench.empty_valkey()
    place = bench.place()
    repo = Repository(place / "repo", topic, DRIVERS, bench.valkey.address)
    load = {"address": bench.kafka.address, "topic": topic, "rate": rate, "seconds": length_s}
    reading = {"folder": str(repo.folder), "view": DRIVERS.name}
    with (
        bench.operation("produce-steadily", **load) as producer,
        bench.operation("watch-online", **reading) as online,
        bench.operation("watch-offline", **reading) as offline,
        worker(bench.kafka.address, repo.folder, place / "worker.log") as ours,
    ):
        watched: dict[str, Any] = {"start": time.monotonic() + 1.0, "probes": probes}
        looking = {**watched, "timeout_s": length_s + STEADY_TIMEOUT_S}
        answers = at_once(
            [partial(producer.run, **watched), partial(online.run, **looking), partial(offline.run, **looking)]
        )
        sent = answers[0]["sent"]
        while (stored := sum(pq.read_metadata(path).num_rows for path in files(repo.contract))) < sent:
            ours.is_in_time(length_s + 2 * STEADY_TIMEOUT_S)
            time.sleep(0.2)
    if answers[0]["left"] or None in answers[0]["acked"]:
        raise MeasureError(f"{name}: the broker did not acknowledge every event")
    if stored != sent:
        raise MeasureError(f"{name}: offline are {stored:,} rows of {sent:,}")
    for store, answer in zip(("online", "offline"), answers[1:], strict=True):
        if answer["wrong"] or None in answer["seen"]:
            missing = answer["seen"].count(None)
            raise MeasureError(f"{name}: {store}, {missing} probes never came, {answer['wrong']} came wrong")
    shutil.rmtree(place)
    return answers


def resident(bench: Bench, name: str) -> list[Row]:
    """The memory of a worker that drains five million events."""
    load, expected = bench.load("memory", 5 * MILLION)
    found = bench.drain(name, load, expected)
    growth = found.memory.growth_bytes()
    peak = found.memory.peak_bytes
    return [
        Row(
            f"memory of the worker while it drains {short(load.count)} events",
            f"{peak / MEBIBYTE:.0f} MiB at most, {growth / MEBIBYTE:+.0f} MiB over the second half",
            "",
            "< 700 MiB, flat (5 %)",
            peak < MEMORY_BOUND_BYTES and growth <= FLAT * peak,
            memory(found),
        )
    ]


def reported(bench: Bench, name: str, *, what: str, events: int, **more: Any) -> list[Row]:
    """A backlog of another kind, without a bound."""
    load, expected = bench.load(name, events, **more)
    found = bench.drain(name, load, expected)
    return [
        Row(f"{what}, {short(load.count)} events", per_second(load.count / found.seconds), memory=memory(found)),
    ]


def run_quix(bench: Bench, load: Load, expected: Truth) -> float:
    """Seconds of Quix Streams."""
    return peers.quix(bench.kafka.address, bench.valkey, load, expected, bench.place())


def run_stock(bench: Bench, load: Load, expected: Truth) -> float:
    """Seconds of the stock agent."""
    return peers.stock(bench.kafka.address, bench.valkey, load, expected, bench.place())


def run_bare(bench: Bench, load: Load, expected: Truth) -> float:
    """Seconds of aiokafka alone."""
    return peers.bare(bench.kafka.address, load, expected, bench.place())


def at_once(calls: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """The answers of several processes that work side by side."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


def latencies(made: Sequence[float], planned: Sequence[float], seen: Sequence[float]) -> list[float]:
    """Seconds from production to sight of each probe after the warm-up."""
    return [end - start for start, plan, end in zip(made, planned, seen, strict=True) if plan >= WARM_UP_S]


def spread(values: Sequence[float]) -> str:
    """The median and the 99th percentile."""
    half, most = np.quantile(values, (0.5, 0.99)).tolist()
    return f"p50 {seconds(half)}, p99 {seconds(most)}"


def memory(found: Drained) -> str:
    """The greatest resident memory."""
    return f"{found.memory.peak_bytes / MEBIBYTE:.0f} MiB"


def per_second(rate: float) -> str:
    """A rate, to three figures."""
    return f"{float(f'{rate:.3g}'):,.0f}/s"


OURS = ("valkey", "cluster", "sqlite")

BACKLOGS: dict[str, tuple[str, int]] = {
    "valkey": ("drivers", 2 * MILLION),
    "cluster": ("drivers", 2 * MILLION),
    "sqlite": ("drivers", 2 * MILLION),
    "quix": ("drivers-quix", 300_000),
    "stock": ("drivers-stock", 50_000),
    "bare": ("drivers", 2 * MILLION),
}
"""The topic and the events of each side."""

BACKLOG_ROWS: dict[str, tuple[str, str, float]] = {
    "valkey": ("Headrace: backlog to Redis and Parquet", "≥ 130,000/s", 130_000),
    "cluster": ("Headrace: backlog to a Redis Cluster of three masters and Parquet", "≥ 0.7x", 0.7),
    "sqlite": ("Headrace: backlog to SQLite and Parquet", "≥ 60,000/s", 60_000),
    "quix": ("Quix Streams: Redis sink and Parquet file sink", "≥ 3x", 3),
    "stock": ("stock Faust agent: Feast's push to Redis and Parquet", "≥ 20x", 20),
    "bare": ("aiokafka and orjson: decode, write nothing", "≥ 0.25x", 0.25),
}

PEERS: Mapping[str, Callable[[Bench, Load, Truth], float]] = {"quix": run_quix, "stock": run_stock, "bare": run_bare}

OTHERS: dict[str, Callable[[Bench, str], list[Row]]] = {
    "steady-1000": partial(steady, rate=1_000),
    "steady-10000": partial(steady, rate=10_000),
    "steady-50000": partial(steady, rate=50_000),
    "memory": resident,
    "wide": partial(
        reported, what="Headrace: backlog of 50 features and 2 kB an event, Redis", events=200_000, shape=WIDE.name
    ),
    "partitions": partial(reported, what="Headrace: backlog in 64 partitions, Redis", events=MILLION, partitions=64),
    "keys": partial(reported, what="Headrace: backlog over 1,000,000 keys, Redis", events=2 * MILLION, keys=MILLION),
}

NAMES = [*BACKLOGS, *OTHERS]


def peers_versions() -> str:
    """What the peers' environment has."""
    return peers.peers_versions(PEER_PACKAGES)


def kafka_version() -> str:
    """The version of the broker's jars."""
    (jar,) = fetch_jars().glob("kafka-clients-*.jar")
    return jar.stem.removeprefix("kafka-clients-")


def measure(asked: Asked) -> dict[str, str]:
    """The table of the rows asked for."""
    rows: list[Row] = []
    if has_peers(asked):
        peers.peers_python()
    with ExitStack() as stack:
        kafka = stack.enter_context(Kafka(heap="1g"))
        valkey = stack.enter_context(Valkey(program=redis_program()))
        cluster = ValkeyCluster(program=redis_program()) if "cluster" in asked.only else None
        if cluster is not None:
            stack.enter_context(cluster)
        servers = versions(valkey)
        bench = Bench(asked.folder, kafka, valkey, asked.runs, asked.scale, cluster)
        if any(name in asked.only for name in BACKLOGS):
            rows += backlogs(bench, asked.only)
        for name in asked.only:
            if name in OTHERS:
                rows += OTHERS[name](bench, name)
    beside = ""
    if has_peers(asked):
        beside = f" Quix Streams and aiokafka alone have an environment of their own: {peers_versions()}."
    return {"stream": f"{table(HEADS, [row.cells() for row in rows])}\n\n{asked.measured(servers, PACKAGES)}{beside}"}


def has_peers(asked: Asked) -> bool:
    """Whether it takes the peers' environment."""
    return any(name in asked.only for name in ("quix", "bare"))


def versions(valkey: Valkey) -> str:
    """What the stream runs on; said, too."""
    with redis.Redis.from_url(f"redis://{valkey.address}") as client:
        servers = f"Apache Kafka {kafka_version()}, {redis_version(client.info())}"
    print(f"{machine()}; {servers}", flush=True)
    return servers


def main() -> int:
    """See `benchmarks.command`."""
    return command("stream", "Speed of the stream.", measure, rows=NAMES, runs=3)


if __name__ == "__main__":
    raise SystemExit(main())
