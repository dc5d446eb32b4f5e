"""What `benchmarks.stores` measures, one operation a process (see `benchmarks.measure`): prepare, then run.

python -m benchmarks.store_operations <operation>       with arguments as a line of JSON on standard input
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FeatureStore

from benchmarks import store_data
from benchmarks.measure import Answer, MeasureError, Operation, serve, timed
from benchmarks.peers import KEY, OURS, SPARK, VIEW, feature_names, open_side
from headrace.audit import audit as audit_view
from headrace.chains import StreamLedger
from headrace.compact import compact as compact_view
from headrace.contract import ViewContract
from headrace.folder import Folder
from headrace.repository import contracts
from headrace.scan import newest as newest_rows
from tests.servers import free_port

_SAMPLE = 200


def make_history(
    *, folder: str, segments: str, file: str, rows: int, keys: int, features: int, pieces: int
) -> Callable[..., Answer]:
    """Make one history in both forms."""
    _, contract = _ours(folder, segments, features)

    def run() -> Answer:
        with _timing() as answer:
            table = store_data.make_rows(contract, rows, keys, seed=rows)
            store_data.write_history(contract, table, Path(file), segments=pieces)
        return answer

    return run


def make_small_appends(*, folder: str, segments: str, features: int, appends: int, rows: int) -> Callable[..., Answer]:
    """Make the history that a stream of small appends leaves: four partitions."""
    _, contract = _ours(folder, segments, features)

    def run() -> Answer:
        with _timing() as answer:
            table = store_data.make_rows(contract, 4 * appends * rows, 10_000, seed=2)
            store_data.write_small_appends(contract, table, partitions=4, appends=appends)
        return answer

    return run


def make_many(*, folder: str, segments: str, features: int, files: int) -> Callable[..., Answer]:
    """Make a folder of very many segments: four partitions."""
    _, contract = _ours(folder, segments, features)

    def run() -> Answer:
        with _timing() as answer:
            store_data.write_many(contract, partitions=4, files=files)
        return answer

    return run


def make_entities(*, file: str, rows: int, keys: int) -> Callable[..., Answer]:
    """Make an entity frame."""

    def run() -> Answer:
        with _timing() as answer:
            pq.write_table(store_data.make_entities(rows, keys, seed=3), file)
        return answer

    return run


def materialize(
    *, side: str, folder: str, history: str, features: int, online: str, truth: str
) -> Callable[..., Answer]:
    """Materialize everything, then compare a sample of what is served with the rows in `truth`: one row a key."""
    store = open_side(side, Path(folder), Path(history), features, online)

    def run() -> Answer:
        with _timing() as answer:
            store.materialize(store_data.START, store_data.END)
        _check_served(store, features, Path(truth))
        return answer

    return run


def retrieve(*, side: str, folder: str, history: str, features: int, entities: str) -> Callable[..., Answer]:
    """Point-in-time features of an entity frame, as Arrow; the answer has a digest of them, whatever their order."""
    store = open_side(side, Path(folder), Path(history), features, f"sqlite:{folder}/online.db")
    frame = pd.read_parquet(entities)
    if side == SPARK:
        # Which starts its session and its workers, as a job of many retrievals has them.
        store.get_historical_features(frame.iloc[:100].copy(), _references(features)).to_arrow()

    def run() -> Answer:
        with _timing() as answer:
            found = store.get_historical_features(frame, _references(features)).to_arrow()
        answer["digest"] = _digest(found, features)
        return answer

    return run


def append(*, side: str, folder: str, history: str, features: int, rows: int) -> Callable[..., Answer]:
    """`write_to_offline_store` of some rows onto a history."""
    store = open_side(side, Path(folder), Path(history), features, f"sqlite:{folder}/online.db")
    (contract,) = contracts(store)
    frame = store_data.make_rows(contract, rows, rows, seed=4).to_pandas()

    def run() -> Answer:
        with _timing() as answer:
            store.write_to_offline_store(VIEW, frame)
        return answer

    return run


def append_ledger(*, folder: str, history: str, features: int, rows: int) -> Callable[..., Answer]:
    """An append of some rows to the ledger of the stream."""
    _, contract = _ours(folder, history, features)
    table = store_data.make_rows(contract, rows, rows, seed=4)
    ledger = StreamLedger(contract, store_data.TOPIC, 0)

    def run() -> Answer:
        first = ledger.end().end
        with _timing() as answer:
            ledger.append(0, first, first + rows, table, accepted=np.arange(first, first + rows))
        return answer

    return run


def serve_online(
    *, side: str, folder: str, history: str, features: int, online: str, truth: str, keys: int
) -> Callable[..., Answer]:
    """Calls of `get_online_features` of some keys; the answer has the seconds of each call."""
    store = open_side(side, Path(folder), Path(history), features, online)
    store.materialize(store_data.START, store_data.END)
    _check_served(store, features, Path(truth))
    references = _references(features)
    random = np.random.default_rng(5)

    def run(*, calls: int, keys_a_call: int) -> Answer:
        asked = [[{KEY: key} for key in random.integers(0, keys, keys_a_call).tolist()] for _ in range(calls)]
        seconds = []
        with _timing() as answer:
            for rows in asked:
                begun = time.perf_counter()
                store.get_online_features(features=references, entity_rows=rows)
                seconds.append(time.perf_counter() - begun)
        answer["calls"] = seconds
        return answer

    return run


def serve_http(
    *, side: str, folder: str, history: str, features: int, online: str, truth: str, keys: int
) -> Callable[..., Answer]:
    """Requests to a `feast serve` from clients that each send the next one when they have the answer.

    The answer has `seconds` of all together, and `calls`, those of each.
    """
    store = open_side(side, Path(folder), Path(history), features, online)
    store.materialize(store_data.START, store_data.END)
    _check_served(store, features, Path(truth))
    url = _start_server(Path(folder))
    references = _references(features)
    random = np.random.default_rng(5)

    def asked(count: int) -> dict[str, Any]:
        return {"features": references, "entities": {KEY: random.integers(0, keys, count).tolist()}}

    def run(*, requests: int, clients: int, keys_a_call: int) -> Answer:
        bodies = [asked(keys_a_call) for _ in range(requests)]
        answer = asyncio.run(_ask(url, bodies, clients))
        if answer.pop("last") != store.get_online_features(references, bodies[-1]["entities"]).to_dict():
            raise MeasureError(f"{side}: HTTP gives other values than the store")
        return answer

    return run


def audit(*, folder: str, history: str, features: int, online: str, keys: int) -> Callable[..., Answer]:
    """The audit of a view; all must be equal."""
    store, contract = _ours(folder, history, features, online)

    def run() -> Answer:
        with _timing() as answer:
            found = audit_view(store, contract)
        if found.diverged or found.keys != keys:
            raise MeasureError(f"the audit found {found.keys:,} keys, {found.diverged:,} of them wrong: {found}")
        return answer

    return run


def read_newest(*, folder: str, history: str, features: int) -> Callable[..., Answer]:
    """The newest row of each key of everything, in chunks."""
    _, contract = _ours(folder, history, features)

    def run() -> Answer:
        with _timing() as answer, newest_rows(contract, Folder(contract.directory).files()) as newest:
            answer["rows"] = sum(table.num_rows for table, _ in newest)
        return answer

    return run


def compact(*, folder: str, history: str, features: int) -> Callable[..., Answer]:
    """Compact a view, and remove at once what was merged."""
    _, contract = _ours(folder, history, features)

    def run() -> Answer:
        with _timing() as answer:
            compact_view(contract, grace_s=0)
        answer["files"] = len(Folder(contract.directory).names())
        return answer

    return run


def list_folder(*, folder: str, history: str, features: int) -> Callable[..., Answer]:
    """The names of all segments of a folder."""
    _, contract = _ours(folder, history, features)

    def run() -> Answer:
        with _timing() as answer:
            answer["files"] = len(Folder(contract.directory).names())
        return answer

    return run


def look_up_ledger(*, folder: str, history: str, features: int) -> Callable[..., Answer]:
    """Where one partition ends, as a worker asks at its start."""
    _, contract = _ours(folder, history, features)

    def run() -> Answer:
        with _timing() as answer:
            answer["end"] = StreamLedger(contract, store_data.TOPIC, 0).end().end
        return answer

    return run


@contextmanager
def _timing() -> Iterator[Answer]:
    answer: Answer = {}
    with timed(answer):
        yield answer


def _ours(folder: str, history: str, features: int, online: str = "") -> tuple[FeatureStore, ViewContract]:
    store = open_side(OURS, Path(folder), Path(history), features, online or f"sqlite:{folder}/online.db")
    (contract,) = contracts(store)
    return store, contract


def _references(features: int) -> list[str]:
    return [f"{VIEW}:{name}" for name in feature_names(features)]


def _check_served(store: FeatureStore, features: int, truth: Path) -> None:
    """Compare what is served of a sample of keys with their rows.

    Raises:
        MeasureError: a value differs.
    """
    rows = pq.read_table(truth)
    random = np.random.default_rng(6)
    sample = rows.take(pa.array(random.choice(rows.num_rows, min(_SAMPLE, rows.num_rows), replace=False)))
    served = store.get_online_features(
        features=_references(features), entity_rows=[{KEY: key} for key in sample.column(KEY).to_pylist()]
    ).to_dict()
    for name in feature_names(features):
        if served[name] != sample.column(name).to_pylist():
            raise MeasureError(f"{store.project}: feature `{name}` is served with other values than it has offline")


def _start_server(repo: Path) -> str:
    """Start `feast serve` of a repository, until this process ends; return the address of online features."""
    port = free_port()
    options = ["--port", str(port), "--no-access-log", "--max-requests", "0"]
    server = subprocess.Popen([sys.executable, "-m", "feast.cli.cli", "-c", str(repo), "serve", *options])

    def end() -> None:
        server.terminate()
        server.wait()

    atexit.register(end)
    while True:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health"):
            return f"http://127.0.0.1:{port}/get-online-features"
        if server.poll() is not None:
            raise MeasureError(f"`feast serve` ended with {server.returncode}")
        time.sleep(0.2)


async def _ask(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Answer:
    """Send requests; `last` of the answer is what came for the last body, by name."""
    waiting = deque(enumerate(bodies))
    calls: list[float] = []
    answer: Answer = {"calls": calls}

    async def client(session: aiohttp.ClientSession) -> None:
        while waiting:
            number, body = waiting.popleft()
            begun = time.perf_counter()
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                found = await response.read()
            calls.append(time.perf_counter() - begun)
            if number == len(bodies) - 1:
                document = json.loads(found)
                columns = [result["values"] for result in document["results"]]
                answer["last"] = dict(zip(document["metadata"]["feature_names"], columns, strict=True))

    async with aiohttp.ClientSession() as session:
        with timed(answer):
            await asyncio.gather(*(client(session) for _ in range(clients)))
    return answer


def _digest(found: pa.Table, features: int) -> str:
    """A hash of keys, times and features that does not depend on the order of rows, nor on how nulls are stored."""
    names = [KEY, "event_timestamp", *feature_names(features)]
    columns: dict[str, Any] = {name: found.column(name).combine_chunks() for name in names}
    columns["event_timestamp"] = columns["event_timestamp"].cast(pa.timestamp("us")).cast(pa.int64())
    ordered = pa.table(columns).sort_by([(KEY, "ascending"), ("event_timestamp", "ascending")])
    digest = hashlib.blake2b(digest_size=16)
    for column in ordered.columns:
        numbers = pc.fill_null(column.cast(pa.float64()), -1.0).to_numpy()
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return digest.hexdigest()


OPERATIONS: dict[str, Operation] = {
    "append": append,
    "append-ledger": append_ledger,
    "audit": audit,
    "compact": compact,
    "list-folder": list_folder,
    "look-up-ledger": look_up_ledger,
    "make-entities": make_entities,
    "make-history": make_history,
    "make-many": make_many,
    "make-small-appends": make_small_appends,
    "materialize": materialize,
    "read-newest": read_newest,
    "retrieve": retrieve,
    "serve-http": serve_http,
    "serve-online": serve_online,
}

if __name__ == "__main__":
    serve(OPERATIONS)
