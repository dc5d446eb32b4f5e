"""What the stream is compared with: Quix Streams, a stock Faust agent with Feast's push, and aiokafka alone.

Each drains a topic in a process of its own and tells its seconds itself; they count only if what it stored is right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import redis
from feast import FeatureStore

from benchmarks.drain import compare_online, running, tail
from benchmarks.events import CREATED, DRIVERS, KEY, TIME, Load, Truth
from benchmarks.measure import ROOT, MeasureError
from tests.servers import Valkey, environment

FOLDER = ROOT / "benchmarks"
ENVIRONMENTS = ROOT / ".cache" / "benchmark-peers"
TIMEOUT_S = 900.0
QUIX_DATABASE, STOCK_DATABASE = 2, 1
ANSWER = re.compile(r'\{"(?:seconds|events)".*\}')
"""Within a line: Faust turns what an agent prints into a line of its log."""


def peers_python() -> Path:
    """The Python of the environment of the peers, built when it is not there yet; needs a package index then.

    Raises:
        MeasureError: pip could not install it.
    """
    # As in our own environment, so that the same is compared.
    ours = [f"aiokafka[lz4]=={version('aiokafka')}", f"uvloop=={version('uvloop')}"]
    requirements = FOLDER / "peers.txt"
    name = hashlib.sha256("\n".join([requirements.read_text(encoding="utf-8"), *ours]).encode()).hexdigest()[:16]
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*install, *ours]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MeasureError(f"the environment of the peers was not built:\n{done.stdout}{done.stderr}")
    (folder / "complete").touch()
    return python


def peers_versions(names: Sequence[str]) -> str:
    """The versions of packages in the environment of the peers."""
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([peers_python(), "-c", program, *names], capture_output=True, text=True, check=True)
    return ", ".join(f"{name} {number}" for name, number in zip(names, done.stdout.split(), strict=True))


def quix(broker: str, valkey: Valkey, load: Load, truth: Truth, folder: Path) -> float:
    """Drain with Quix Streams; the seconds.

    Raises:
        MeasureError: it failed, or stored something else.
    """
    history = folder / "history"
    command = [peers_python(), FOLDER / "quix_app.py", broker, load.topic, load.count, history.name, valkey.port]
    answer = _run([*command, QUIX_DATABASE], dict(os.environ), folder / "quix.log", folder)
    stored = pa.concat_tables(
        [pq.read_table(path, columns=[KEY], partitioning=None) for path in sorted(history.rglob("*.parquet"))]
    )
    _compare("Quix Streams", load, truth, stored)
    with redis.Redis(port=valkey.port, db=QUIX_DATABASE) as client:
        values = client.mget([str(key) for key in truth.newest])
    for wanted, value in zip(truth.newest.values(), values, strict=True):
        found = json.loads(value or "{}")
        if tuple(found.get(name) for name, _ in DRIVERS.features) != wanted:
            raise MeasureError(f"Quix Streams serves {found}, produced last was {wanted}")
    return float(answer["seconds"])


def stock(broker: str, valkey: Valkey, load: Load, truth: Truth, folder: Path) -> float:
    """Drain with a stock Faust agent that pushes batches of events; the seconds.

    Raises:
        MeasureError: it failed, or stored something else.
    """
    repo = folder / "stock_repo"
    shutil.copytree(FOLDER / "stock_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    file = repo / "driver_stats.parquet"
    times = {TIME: pa.timestamp("us", tz="UTC"), CREATED: pa.timestamp("us", tz="UTC")}
    kinds = {"conv_rate": pa.float32(), "acc_rate": pa.float32(), "avg_daily_trips": pa.int32()}
    pq.write_table(pa.schema(list({KEY: pa.int64(), **kinds, **times}.items())).empty_table(), file)
    settings = repo / "feature_store.yaml"
    address = f"{valkey.address},db={STOCK_DATABASE}"
    settings.write_text(settings.read_text(encoding="utf-8").replace("${STOCK_REDIS}", address), encoding="utf-8")
    env = {
        **environment(),
        "STOCK_REPO": str(repo),
        "STOCK_BROKER": broker,
        "STOCK_TOPIC": load.topic,
        "STOCK_EVENTS": str(load.count),
    }
    # Feast's DuckDB store resolves the path against the working directory: both steps work in the repository.
    apply = [sys.executable, "-m", "feast.cli.cli", "-c", str(repo), "apply"]
    done = subprocess.run(apply, cwd=repo, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MeasureError(f"`feast apply` of the stock agent failed:\n{done.stdout}{done.stderr}")
    agent = [sys.executable, "-m", "faust", "-A", "benchmarks.stock_agent", "--workdir", repo, "worker", "-l", "warn"]
    answer = _run(agent, env, folder / "stock.log", ROOT)
    _compare("the stock agent", load, truth, pq.read_table(file, columns=[KEY]))
    compare_online(FeatureStore(repo_path=str(repo)), "driver_stats", kinds, truth)
    return float(answer["seconds"])


def bare(broker: str, load: Load, truth: Truth, folder: Path) -> float:
    """Drain with aiokafka alone; the seconds.

    Raises:
        MeasureError: it failed, or read something else.
    """
    command = [peers_python(), FOLDER / "bare_consumer.py", broker, load.topic, load.count, load.partitions]
    answer = _run(command, dict(os.environ), folder / "bare.log", folder)
    if (answer["events"], answer["key_sum"]) != (load.count, truth.key_sum):
        raise MeasureError(f"aiokafka read {answer['events']:,} events of {load.count:,}, or other ones")
    return float(answer["seconds"])


def _run(command: Sequence[object], env: Mapping[str, str], log: Path, cwd: Path) -> dict[str, Any]:
    """Start a peer, wait for the line that it prints at its end, and end it."""
    begun = time.perf_counter()
    with running([str(word) for word in command], env, log, cwd) as process:
        while True:
            has_ended = process.poll() is not None
            found = ANSWER.search(log.read_text(errors="replace"))
            if found is not None:
                break
            if has_ended or time.perf_counter() - begun > TIMEOUT_S:
                raise MeasureError(f"a peer told no result within {time.perf_counter() - begun:.0f} s:\n{tail(log)}")
            time.sleep(0.1)
    answer: dict[str, Any] = json.loads(found[0])
    return answer


def _compare(name: str, load: Load, truth: Truth, stored: pa.Table) -> None:
    if (stored.num_rows, pc.sum(stored[KEY]).as_py()) != (load.count, truth.key_sum):
        raise MeasureError(f"{name} stored {stored.num_rows:,} rows of {load.count:,}, or other ones")
