"""The history in an object store beside a local folder, in the same run: appends, and a drain of the worker.

    python -m benchmarks.objects [--only appends] [--runs 3] [--scale 1.0] [--write docs/explanation/benchmarks.md]

The server is `versitygw` on the loopback, so what a network adds is not in it: count its round trips, three an append.
`--scale` makes all of it smaller, to try things; the bounds are meant for 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import redis

from benchmarks.command import Asked, command
from benchmarks.drain import Repository, drain
from benchmarks.events import DRIVERS, PARTITIONS, Load, produce, truth
from benchmarks.measure import (
    MILLION,
    milliseconds,
    redis_program,
    redis_version,
    seconds,
    short,
    table,
    words_of,
)
from headrace.chains import Folder, StreamLedger
from headrace.contract import ViewContract
from headrace.segments import Footer, SegmentName, create, new_append_id, stream_chain
from tests.servers import Kafka, ObjectStore, Valkey
from tests.servers.s3 import VERSION

OBJECTS = 100_000
APPENDS = 100
ROWS_AN_APPEND = 1_000
AT_ONCE = 16
BUCKET = "benchmark"
TOPIC = "appends"
HEADS = ("what", "local folder", "object store", "ratio", "bound", "met", "runs")
PACKAGES = ("obstore", "pyarrow", "feast")
FLAT, AS_LOCAL = 1.2, 0.7


@dataclass
class Bench:
    """What the rows share."""

    folder: Path
    store: ObjectStore
    valkey: Valkey
    runs: int
    scale: float


def appends(bench: Bench) -> list[list[str]]:
    """Median of an append, and the first one of a worker: beside many files and beside none, in turn."""
    count = round(OBJECTS * bench.scale)
    first_s: dict[str, list[float]] = {}
    later_s: dict[str, list[float]] = {}
    for side in ("local", "remote"):
        contracts = [_contract(bench, f"{side}-{amount}", is_remote=side == "remote") for amount in ("many", "none")]
        begun = time.monotonic()
        _fill(contracts[0], count)
        print(f"{side}: {count:,} files in {time.monotonic() - begun:.0f} s", flush=True)
        runs = [_append_s(contract, first) for contract, first in zip(contracts, (count, 0), strict=True)]
        took = list(zip(*runs, strict=True))  # one here, one there
        first_s[side] = list(took[0])
        later_s[side] = [median(figures) for figures in zip(*took[1:], strict=True)]
    beside = f"beside {short(count)} files / none"
    ratio = later_s["remote"][0] / later_s["remote"][1]
    return [
        [
            f"append of {ROWS_AN_APPEND:,} rows, {beside}",
            *(" / ".join(map(milliseconds, took)) for took in later_s.values()),
            f"{ratio:.2f}x",
            f"≤ {FLAT}x",
            words_of(ratio <= FLAT),
            str(APPENDS),
        ],
        [
            f"the first one of a worker, nothing merged, {beside}",
            *(" / ".join(map(seconds, took)) for took in first_s.values()),
            *("", "", "", "1"),
        ],
    ]


def drains(bench: Bench) -> list[list[str]]:
    """Events a second that a worker brings to both stores, the history here and there in turn."""
    events = round(MILLION * bench.scale)
    found: dict[str, list[float]] = {"local": [], "remote": []}
    make: dict[str, Callable[[str], tuple[str, str] | None]] = {
        "local": lambda _: None,
        "remote": lambda name: (f"s3://{BUCKET}/{name}", bench.store.url),
    }
    with Kafka(heap="1g") as kafka:
        topic = kafka.create_topic("drain", partitions=PARTITIONS)
        load = Load(topic, DRIVERS.name, events, time.time_ns() // 1000)
        produce(kafka.address, load, range(PARTITIONS))
        expected = truth(load, 1_000)
        for run in range(bench.runs):
            for side, history in make.items():
                name = f"drain-{side}-{run}"
                online = f"{bench.valkey.address},db={run * 2 + (side == 'remote')}"
                repo = Repository(bench.folder / name, topic, DRIVERS, online, history(name))
                done = drain(kafka.address, replace(load), repo, expected, bench.folder / "log")
                found[side].append(events / done.seconds)
                print(f"{name}: {found[side][-1]:,.0f} events/s", flush=True)
    local, remote = (median(figures) for figures in found.values())
    return [
        [
            f"backlog of {short(events)} events, Redis",
            f"{local:,.0f}/s",
            f"{remote:,.0f}/s",
            f"{remote / local:.2f}x",
            f"≥ {AS_LOCAL}x",
            words_of(remote / local >= AS_LOCAL),
            str(bench.runs),
        ]
    ]


ROWS: dict[str, Callable[[Bench], list[list[str]]]] = {"appends": appends, "drain": drains}


def _contract(bench: Bench, name: str, *, is_remote: bool) -> ViewContract:
    """A view of a repository of its own."""
    history = (f"s3://{BUCKET}/{name}", bench.store.url) if is_remote else None
    return Repository(bench.folder / name, TOPIC, DRIVERS, None, history).contract


def _fill(contract: ViewContract, count: int) -> None:
    """Begin a chain with so many segments without rows, many at a time."""
    folder, nothing = Folder.of(contract), contract.schema.empty_table()

    def make(position: int) -> None:
        name = SegmentName(stream_chain(TOPIC, 0, 0), 0, position)
        create(folder.path_of(name), nothing, Footer(next=position + 1, append=new_append_id()))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(make, range(count)):
            pass


def _append_s(contract: ViewContract, first: int) -> Iterator[float]:
    """How long each append of a new worker takes; the first looks for the end, and would refuse to leave a hole."""
    ledger = StreamLedger(contract, TOPIC, 0)
    columns = [pa.array(np.zeros(ROWS_AN_APPEND, dtype=np.int64)).cast(field.type) for field in contract.schema]
    rows = pa.Table.from_arrays(columns, schema=contract.schema)
    for start in range(first, first + (APPENDS + 1) * ROWS_AN_APPEND, ROWS_AN_APPEND):
        accepted = np.arange(start, start + ROWS_AN_APPEND)
        begun = time.perf_counter()
        ledger.append(0, start, start + ROWS_AN_APPEND, rows, accepted=accepted)
        yield time.perf_counter() - begun


def measure(asked: Asked) -> dict[str, str]:
    """The table of the rows asked for."""
    rows: list[list[str]] = []
    with ObjectStore() as store, Valkey(("--databases", "1000"), program=redis_program()) as valkey:
        os.environ.update(store.credentials())
        store.bucket(BUCKET)
        with redis.Redis.from_url(f"redis://{valkey.address}") as client:
            servers = f"versitygw {VERSION}, {redis_version(client.info())}"
        bench = Bench(asked.folder, store, valkey, asked.runs, asked.scale)
        for name in asked.only:
            rows += ROWS[name](bench)
    return {"objects": f"{table(HEADS, rows)}\n\n{asked.measured(servers, PACKAGES)}"}


def main() -> int:
    """See `benchmarks.command`."""
    return command("objects", "The history in an object store beside a local folder.", measure, rows=list(ROWS), runs=3)


if __name__ == "__main__":
    raise SystemExit(main())
