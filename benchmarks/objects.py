"""The history in an object store beside a local folder, in the same run: an append, and a drain of the worker.

    python -m benchmarks.objects [--objects 100000] [--appends 100] [--events 1000000] [--runs 3]

The server is `versitygw` on the loopback, so what a network adds is not in it: count its round trips, three an append.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from benchmarks.drain import Repository, drain
from benchmarks.events import DRIVERS, PARTITIONS, Load, produce, truth
from benchmarks.measure import table
from headrace.chains import Folder, StreamLedger
from headrace.contract import ViewContract
from headrace.segments import Footer, SegmentName, create, new_append_id, stream_chain
from tests.servers import Kafka, ObjectStore, Valkey

ROWS_AN_APPEND = 1_000
BUCKET = "benchmark"
TOPIC = "appends"


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--appends", type=int, default=100)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    with ObjectStore() as store, tempfile.TemporaryDirectory() as home:
        os.environ.update(store.credentials())
        store.bucket(BUCKET)
        rows = _appends(Path(home), store, chosen.objects, chosen.appends)
        rows += _drains(Path(home), store, chosen.events, chosen.runs)
    print(table(["", "local folder", "object store"], rows))


def _appends(home: Path, store: ObjectStore, objects: int, appends: int) -> list[list[str]]:
    """Median of an append of some rows, beside nothing and beside many."""
    local = Repository(home / "local", TOPIC, DRIVERS, None).contract
    remote = Repository(home / "remote", TOPIC, DRIVERS, None, (f"s3://{BUCKET}/appends", store.url)).contract
    rows = []
    for count in (0, objects):
        found = []
        for contract in (local, remote):
            _fill(contract, count)
            found.append(f"{_append_s(contract, appends) * 1000:.1f} ms")
        rows.append([f"append of {ROWS_AN_APPEND:,} rows beside {count:,} files", *found])
    return rows


def _fill(contract: ViewContract, count: int) -> None:
    """Extend the chain by so many segments without rows, many at a time."""
    folder, nothing = Folder.of(contract), contract.schema.empty_table()
    start = StreamLedger(contract, TOPIC, 0).end().end

    def make(number: int) -> None:
        name = SegmentName(stream_chain(TOPIC, 0, 0), 0, start + number)
        create(folder.path_of(name), nothing, Footer(next=start + number + 1, append=new_append_id()))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(make, range(count)))


def _append_s(contract: ViewContract, appends: int) -> float:
    ledger = StreamLedger(contract, TOPIC, 0)
    first = ledger.end().end
    columns = [pa.array(np.zeros(ROWS_AN_APPEND, dtype=np.int64)).cast(field.type) for field in contract.schema]
    rows = pa.Table.from_arrays(columns, schema=contract.schema)
    took = []
    for number in range(appends + 1):
        start = first + number * ROWS_AN_APPEND
        accepted = np.arange(start, start + ROWS_AN_APPEND)
        begun = time.perf_counter()
        ledger.append(0, start, start + ROWS_AN_APPEND, rows, accepted=accepted)
        took.append(time.perf_counter() - begun)
    return median(took[1:])  # the first looks for the end


def _drains(home: Path, store: ObjectStore, events: int, runs: int) -> list[list[str]]:
    """Events a second that a worker brings to both stores, the history here and there in turn."""
    with Kafka() as kafka, Valkey(("--databases", "1000")) as valkey:
        topic = kafka.create_topic("drain", partitions=PARTITIONS)
        load = Load(topic, DRIVERS.name, events, time.time_ns() // 1000)
        produce(kafka.address, load, range(PARTITIONS))
        expected = truth(load, 1_000)
        found: dict[str, list[float]] = {"local": [], "remote": []}
        make: dict[str, Callable[[str], tuple[str, str] | None]] = {
            "local": lambda _: None,
            "remote": lambda name: (f"s3://{BUCKET}/{name}", store.url),
        }
        for run in range(runs):
            for side, history in make.items():
                name = f"drain-{side}-{run}"
                online = f"{valkey.address},db={run * 2 + (side == 'remote')}"
                repo = Repository(home / name, topic, DRIVERS, online, history(name))
                found[side].append(events / drain(kafka.address, replace(load), repo, expected, home / "log").seconds)
    return [["worker, events/s", *(f"{median(figures):,.0f}" for figures in found.values())]]


if __name__ == "__main__":
    main()
