"""Throughput of the stream to both stores: the Headrace worker, and a stock Faust agent with Feast's push.

    python -m benchmarks.stream [--events 1000000] [--peer-events 50000]

Both drain a topic of four partitions from a real Apache Kafka to Valkey and to Parquet on this machine, one
after the other, in the same run. The peer gets fewer events, because Feast's own offline store rewrites its
whole file at each push: more events would make it slower still. Clocks: Headrace from the moment at which
its worker is ready (if it had appended by then, from the start of its process, which is against us) to the
end of the ledger; the peer from its first batch to the end of its last. The result is printed only if what
was stored is right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.events import DRIVERS, PARTITIONS, produce
from headrace.chains import StreamLedger, files
from headrace.offline import latest
from headrace.repository import contracts, open_store
from tests.servers import Kafka, Valkey, copy_repository, environment, feast_apply, free_port, use_valkey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[1]
TOPIC, PEER_TOPIC = "drivers", "drivers-stock"
SEED = 7
START_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 600.0


class BenchmarkError(Exception):
    """A run did not end, or ended with wrong data; no figure is worth printing."""


@dataclass(frozen=True)
class Result:
    """What one side did."""

    name: str
    events: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Events a second."""
        return self.events / self.seconds


@contextlib.contextmanager
def running(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process and end it, and what it started, with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=dict(env),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def headrace(kafka: Kafka, valkey: Valkey, folder: Path, events: int) -> Result:
    """Drain the topic with a Headrace worker.

    Raises:
        BenchmarkError: The worker failed, or the stores do not hold what they should.
    """
    repo = folder / "feature_repo"
    copy_repository(repo)
    use_valkey(repo, valkey.address)
    feast_apply(repo)
    store = open_store(repo)
    (contract,) = contracts(store, ["driver_stats"])
    ledgers = [StreamLedger(contract, TOPIC, partition) for partition in range(PARTITIONS)]
    port = free_port()
    env = environment(feature_repo=repo, broker=kafka.address, web_port=port)
    log = folder / "worker.log"
    begun = time.perf_counter()
    with running([sys.executable, "-m", "faust", "-A", "streaming", "worker", "-l", "info"], env, log) as worker:
        while not is_ready(port):
            ensure_running(worker, log, begun, START_TIMEOUT_S)
            time.sleep(0.01)
        ready = time.perf_counter()
        if any(ledger.end().end for ledger in ledgers):
            ready = begun
        while sum(ledger.end().end for ledger in ledgers) < events:
            ensure_running(worker, log, begun, DRAIN_TIMEOUT_S)
            time.sleep(0.05)
        ended = time.perf_counter()
    rows = sum(pq.read_metadata(path).num_rows for path in files(contract))
    if rows != events:
        raise BenchmarkError(f"Headrace stored {rows:,} of {events:,} rows offline")
    newest = latest(store, contract).slice(0, 500).to_pylist()
    served = store.get_online_features(
        features=[f"{contract.name}:{feature}" for feature in contract.features],
        entity_rows=[{"driver_id": row["driver_id"]} for row in newest],
    ).to_dict()
    for index, row in enumerate(newest):
        if any(served[feature][index] != row[feature] for feature in contract.features):
            raise BenchmarkError(f"online differs from the latest offline for {row}")
    return Result("Headrace worker", events, ended - ready)


def stock(kafka: Kafka, valkey: Valkey, folder: Path, events: int) -> Result:
    """Drain the peer's topic with a stock agent.

    Raises:
        BenchmarkError: The agent failed, or its offline store does not hold what it should.
    """
    repo = folder / "stock_repo"
    shutil.copytree(ROOT / "benchmarks" / "stock_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    time_type = pa.timestamp("us", tz="UTC")
    columns = {
        "driver_id": pa.int64(),
        "conv_rate": pa.float32(),
        "acc_rate": pa.float32(),
        "avg_daily_trips": pa.int32(),
        "datetime": time_type,
        "created": time_type,
    }
    file = repo / "driver_stats.parquet"
    pq.write_table(pa.schema(list(columns.items())).empty_table(), file)
    env = {
        **environment(),
        "STOCK_REDIS": f"{valkey.address},db=1",
        "STOCK_REPO": str(repo),
        "STOCK_BROKER": kafka.address,
        "STOCK_TOPIC": PEER_TOPIC,
        "STOCK_EVENTS": str(events),
    }
    # Feast's DuckDB store resolves the path against the working directory: both steps work in the repository.
    apply = [sys.executable, "-m", "feast.cli.cli", "-c", str(repo), "apply"]
    done = subprocess.run(apply, cwd=repo, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"`feast apply` of the peer failed:\n{done.stdout}{done.stderr}")
    log = folder / "stock.log"
    begun = time.perf_counter()
    agent = [sys.executable, "-m", "faust", "-A", "benchmarks.stock_agent", "--workdir", str(repo)]
    with running([*agent, "worker", "-l", "warn"], env, log) as worker:
        while (found := re.search(r'\{"events".*\}', log.read_text(errors="replace"))) is None:
            ensure_running(worker, log, begun, DRAIN_TIMEOUT_S)
            time.sleep(0.1)
    answer = json.loads(found[0])
    rows = pq.read_metadata(file).num_rows
    if rows != events or answer["events"] != events:
        raise BenchmarkError(f"the peer stored {rows:,} of {events:,} rows offline")
    return Result("stock Faust agent + push", events, answer["seconds"])


def is_ready(port: int) -> bool:
    """Return whether the worker says that it serves."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2.0) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def ensure_running(worker: subprocess.Popen[bytes], log: Path, begun: float, timeout_s: float) -> None:
    """Look whether the worker lives and is in time.

    Raises:
        BenchmarkError: It is not; the message has the end of its log.
    """
    tail = log.read_text(errors="replace")[-3_000:]
    if worker.poll() is not None:
        raise BenchmarkError(f"the worker ended with {worker.returncode}:\n{tail}")
    if time.perf_counter() - begun > timeout_s:
        raise BenchmarkError(f"the worker took longer than {timeout_s:.0f} s:\n{tail}")


def machine() -> str:
    """Describe the machine."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        cpu = found[1] if found else cpu
    return f"{os.cpu_count()} cores of {cpu}, {platform.system()}, Python {platform.python_version()}"


def main() -> int:
    """Run both sides and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description="Throughput of the stream.")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--peer-events", type=int, default=50_000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headrace-benchmark-"))
    try:
        with Kafka() as kafka, Valkey() as valkey:
            until_us = int(time.time() * 1e6)
            for topic, count in ((TOPIC, arguments.events), (PEER_TOPIC, arguments.peer_events)):
                kafka.create_topic(topic, partitions=PARTITIONS)
                size = produce(kafka.address, topic, count, seed=SEED, until_us=until_us)
                print(f"produced {count:,} events of {size / count:.0f} bytes to `{topic}`", flush=True)
            ours = headrace(kafka, valkey, folder, arguments.events)
            print(f"{ours.name}: drained in {ours.seconds:.1f} s", flush=True)
            peer = stock(kafka, valkey, folder, arguments.peer_events)
            print(f"{peer.name}: drained in {peer.seconds:.1f} s", flush=True)
    except BenchmarkError as exc:
        print(f"benchmarks.stream: {exc}\n(kept: {folder})", file=sys.stderr)
        return 1
    shutil.rmtree(folder)

    print(f"\nDraining {PARTITIONS} partitions, {DRIVERS:,} drivers, to Valkey and Parquet")
    print("-" * 78)
    for result in (ours, peer):
        rate = f"{result.events:>12,} events {result.seconds:>9.1f} s {result.per_second:>12,.0f}/s"
        print(f"{result.name:<28}{rate}")
    print(f"{'ratio':<28}{'':>12}        {'':>9}   {ours.per_second / peer.per_second:>12.1f}x")
    packages = ("feast", "faust-streaming", "aiokafka", "pyarrow", "duckdb", "redis")
    print(f"\n{machine()}")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
