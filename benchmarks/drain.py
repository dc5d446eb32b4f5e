"""Our side of the benchmarks of the stream: a feature repository, a worker on it, and what it must have stored."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import redis
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, KafkaSource, ValueType
from feast.data_format import JsonFormat, ParquetFormat
from feast.types import Int64
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.events import CREATED, KEY, TIME, Load, Shape, Truth
from benchmarks.measure import ROOT, MeasureError
from headrace.chains import StreamLedger, files
from headrace.place import readable
from headrace.repository import contracts, open_store
from tests.servers import environment, free_port

START_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 900.0
LEDGER_PAUSE_S = 0.1
MEMORY_PAUSE_S = 0.25

CPU = "process_cpu_seconds_total"

STORE = """\
# Written by `benchmarks.drain`.
project: benchmark
provider: local
registry:
  registry_type: {kind}
  path: {registry}
offline_store:
  type: headrace.offline.HeadraceOfflineStore
online_store:
  type: {online}
batch_engine:
  type: headrace.engine.HeadraceEngine
entity_key_serialization_version: 3
"""


class Repository:
    """A feature repository with one view on a topic, its stores empty.

    Args:
        folder: made here; everything but what is in Redis is in it.
        redis: `host:port`, of a cluster several with commas between; None is SQLite.
        history: the URL of the view's folder in an object store, and its endpoint; None is a folder here.
    """

    def __init__(
        self, folder: Path, topic: str, shape: Shape, redis: str | None, history: tuple[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True)
        (folder / "feature_store.yaml").write_text(store_yaml(folder, redis), encoding="utf-8")
        self.folder = folder
        self.shape = shape
        self._topic = topic
        FeatureStore(repo_path=str(folder)).apply(declarations(folder, topic, shape, history))
        self.store = open_store(folder)
        (self.contract,) = contracts(self.store, [shape.name])

    def end(self, partitions: int) -> int:
        """Where the ledgers of the partitions end, together."""
        return sum(StreamLedger(self.contract, self._topic, number).end().end for number in range(partitions))


def store_yaml(folder: Path, redis: str | None, registry: str | None = None) -> str:
    """A `feature_store.yaml`.

    Args:
        redis: see `Repository`.
        registry: the URL of a database; None is a file in the folder.
    """
    redis_type = "redis" if redis is None or redis.count(":") == 1 else "redis_cluster"
    online = (
        f"headrace.sqlite.HeadraceSqliteOnlineStore\n  path: {folder}/online.db"
        if redis is None
        else f'headrace.redis.HeadraceRedisOnlineStore\n  connection_string: "{redis}"\n  redis_type: {redis_type}'
    )
    kind = "file" if registry is None else "sql"
    return STORE.format(online=online, kind=kind, registry=registry or folder / "registry.db")


def declarations(folder: Path, topic: str, shape: Shape, history: tuple[str, str] | None = None) -> list[Any]:
    """The entity and the view, as a `definitions.py` has them."""
    entity = Entity(name="driver", join_keys=[KEY], value_type=ValueType.INT64)
    features = zip(shape.features, shape.tags, strict=True)
    path, endpoint = history or (str(folder / "offline"), None)
    view = FeatureView(
        name=shape.name,
        entities=[entity],
        ttl=timedelta(0),
        schema=[
            Field(name=KEY, dtype=Int64),
            *(Field(name=name, dtype=dtype, tags=tags) for (name, dtype), tags in features),
        ],
        source=KafkaSource(
            name=f"{shape.name}_events",
            kafka_bootstrap_servers="127.0.0.1:9092",
            topic=topic,
            timestamp_field=TIME,
            created_timestamp_column=CREATED,
            message_format=JsonFormat(schema_json=""),
            batch_source=FileSource(
                name=f"{shape.name}_history",
                path=path,
                s3_endpoint_override=endpoint,
                file_format=ParquetFormat(),
                timestamp_field=TIME,
                created_timestamp_column=CREATED,
            ),
        ),
    )
    return [entity, view]


@dataclass
class Memory:
    """The resident memory of a process: samples of the clock in seconds and of bytes, and its greatest ever."""

    peak_bytes: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list)

    def look(self, pid: int) -> None:
        """Take a sample."""
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        peak, now = (re.search(rf"{name}:\s*(\d+) kB", status) for name in ("VmHWM", "VmRSS"))
        if peak is None or now is None:
            raise MeasureError("expected VmHWM and VmRSS in /proc/<pid>/status; memory can be measured on Linux only")
        self.peak_bytes = int(peak[1]) * 1024
        self.samples.append((time.perf_counter(), int(now[1]) * 1024))

    def growth_bytes(self) -> float:
        """By how much it grew over the second half of the time, by a straight line through the samples."""
        times, sizes = np.array(self.samples, dtype=np.float64).T
        is_late = times >= (times[0] + times[-1]) / 2
        if is_late.sum() < 3:
            return 0.0
        slope = np.polyfit(times[is_late] - times[0], sizes[is_late], 1)[0]
        return float(slope * (times[-1] - times[0]) / 2)


@dataclass(frozen=True)
class Drained:
    """What draining a topic took."""

    seconds: float
    memory: Memory


def drain(broker: str, load: Load, repo: Repository, truth: Truth, log: Path) -> Drained:
    """Drain a topic with one worker, and look at what it stored.

    The clock runs from the moment at which the worker says that it is ready to the end of the ledgers. If something
    is appended by then, from the start of its process, which is against us.

    Raises:
        MeasureError: the worker failed, or the stores do not hold what they should.
    """
    memory = Memory()
    with worker(broker, repo.folder, log) as running_worker:
        begun = running_worker.begun
        ready = time.perf_counter()
        running_worker.is_in_time(DRAIN_TIMEOUT_S)
        if repo.end(load.partitions):
            ready = begun
        looked = 0.0
        while repo.end(load.partitions) < load.count:
            running_worker.is_in_time(DRAIN_TIMEOUT_S)
            if time.perf_counter() - looked > MEMORY_PAUSE_S:
                looked = time.perf_counter()
                memory.look(running_worker.process.pid)
            time.sleep(LEDGER_PAUSE_S)
        ended = time.perf_counter()
        memory.look(running_worker.process.pid)
    compare(repo, load, truth)
    return Drained(ended - ready, memory)


def compare(repo: Repository, load: Load, truth: Truth) -> None:
    """Look whether both stores hold what they should.

    Raises:
        MeasureError: they do not.
    """
    key_sum = time_sum = rows = 0
    for path in files(repo.contract):
        stored = pq.read_table(readable(path), columns=[KEY, TIME])
        rows += stored.num_rows
        key_sum += pc.sum(stored[KEY]).as_py() or 0
        time_sum += pc.sum(stored[TIME].cast(pa.int64())).as_py() or 0
    is_alike = key_sum == truth.key_sum and (time_sum - truth.time_sum_us) % 2**64 == 0  # as Arrow's sums wrap
    if rows != load.count or not is_alike:
        raise MeasureError(f"offline are {rows:,} rows of {load.count:,}, or other rows than were produced")
    kinds = {name: repo.contract.schema.field(name).type for name, _ in repo.shape.features}
    compare_online(repo.store, repo.shape.name, kinds, truth)


def compare_online(store: FeatureStore, view: str, kinds: Mapping[str, pa.DataType], truth: Truth) -> None:
    """Look whether some keys are served with their newest values.

    Args:
        kinds: the features in the order of the events, and as what they are stored.

    Raises:
        MeasureError: they are not.
    """
    keys = list(truth.newest)
    served = store.get_online_features(
        features=[f"{view}:{name}" for name in kinds], entity_rows=[{KEY: key} for key in keys]
    ).to_dict()
    for column, (name, kind) in enumerate(kinds.items()):
        wanted = pa.array([truth.newest[key][column] for key in keys]).cast(kind, safe=False)
        if not pa.array(served[name], kind).equals(wanted):
            raise MeasureError(f"online, `{name}` of {len(keys)} keys is not what was produced last")


class RunningWorker:
    """A Headrace worker's process.

    Attributes:
        port: of its pages.
        begun: when it was started, on the clock of `time.perf_counter`.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, begun: float) -> None:
        self.process = process
        self.port = port
        self.begun = begun
        self._log = log

    def is_in_time(self, timeout_s: float) -> None:
        """See `ensure_running`."""
        ensure_running(self.process, self._log, self.begun, timeout_s)


@contextlib.contextmanager
def worker(broker: str, repo: Path, log: Path) -> Iterator[RunningWorker]:
    """Start a worker on a feature repository with its defaults, and wait until it is ready; the context ends it.

    Raises:
        MeasureError: it did not become ready.
    """
    port = free_port()
    env = environment(feature_repo=repo, broker=broker, web_port=port)
    begun = time.perf_counter()
    with running([sys.executable, "-m", "faust", "-A", "streaming", "worker", "-l", "info"], env, log) as process:
        while not is_ready(port):
            ensure_running(process, log, begun, START_TIMEOUT_S)
            time.sleep(0.01)
        yield RunningWorker(process, port, log, begun)


@contextlib.contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process and end it, and what it started, with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
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


def ensure_running(process: subprocess.Popen[bytes], log: Path, begun: float, timeout_s: float) -> None:
    """Look whether a process lives and is in time.

    Raises:
        MeasureError: it is not; the message has the end of its log.
    """
    if process.poll() is not None:
        raise MeasureError(f"the process ended with {process.returncode}:\n{tail(log)}")
    if time.perf_counter() - begun > timeout_s:
        raise MeasureError(f"the process took longer than {timeout_s:.0f} s:\n{tail(log)}")


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-3_000:]


def counted(port: int) -> dict[str, float]:
    """What a worker counts, all labels of a metric together."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def is_spread(workers: Sequence[RunningWorker], partitions: int) -> bool:
    """Return whether the workers have all partitions, and none more than one more than another."""
    shares = [counted(one.port)["headrace_assigned_partitions"] for one in workers]
    return sum(shares) == partitions and max(shares) - min(shares) <= 1


def store_figures(client: redis.Redis) -> tuple[float, int]:
    """CPU seconds of the online store's server, and the commands that it has processed."""
    info: dict[str, Any] = client.info()  # type: ignore[assignment]
    return float(info["used_cpu_user"] + info["used_cpu_sys"]), int(info["total_commands_processed"])


def is_ready(port: int) -> bool:
    """Return whether a worker says that it serves."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2.0) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
