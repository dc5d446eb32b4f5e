"""The worker with its history in an object store: every event once, whatever happens to the worker and the network."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from feast import FileSource

from headrace import objects
from headrace.compact import compact
from headrace.folder import Folder
from headrace.materialize import materialize_arrived
from headrace.objects import ObjectPath
from headrace.place import clear
from headrace.repository import open_store
from streaming.restore import restore
from tests.servers import Fault, FaultyNetwork, ObjectStore
from tests.streaming.conftest import Stream, StreamFactory
from tests.streaming.oracle import contract_of, verify
from tests.streaming.process import Worker, config_of, emit, run

KILLS = int(os.environ.get("HEADRACE_TEST_KILLS", "1"))
EVENTS = int(os.environ.get("HEADRACE_TEST_EVENTS", "6000"))
FAULTS = (Fault.SLOW_DOWN, Fault.ERROR_AFTER, Fault.CUT_AFTER, Fault.CUT_BEFORE)


@pytest.fixture
def network(object_store: ObjectStore) -> Iterator[FaultyNetwork]:
    with FaultyNetwork(object_store.port) as between:
        yield between


@pytest.fixture
def on_objects(make_stream: StreamFactory, object_store: ObjectStore, network: FaultyNetwork) -> Stream:
    """A stream whose view has its folder in a bucket, behind the network."""
    stream = make_stream()
    object_store.bucket("features")
    store = open_store(stream.repo)
    view = store.get_feature_view("driver_stats")
    source = view.batch_source
    assert isinstance(source, FileSource)
    source.file_options.uri = f"s3://features/{stream.topic}"
    source.file_options.s3_endpoint_override = network.url
    store.apply([view])
    return stream


@pytest.mark.slow
def test_kill_9_and_lost_answers(on_objects: Stream, network: FaultyNetwork, tmp_path: Path) -> None:
    """Each sixth request or so fails, before or after it was done, in the store or on the way."""
    chance = random.Random(7)
    log = tmp_path / "worker.log"
    sent = emit(on_objects.environment, count=EVENTS, seed=3, bad_fraction=0.05, late_fraction=0.1)

    def judge(method: str, path: str) -> Fault | None:
        del path
        return chance.choice(FAULTS) if method in {"PUT", "GET", "HEAD"} and chance.random() < 0.15 else None

    for _ in range(KILLS):
        with Worker(on_objects.environment, log) as worker:
            worker.start().wait_ready()
            network.judge = judge
            time.sleep(chance.uniform(0.2, 1.5))
            worker.kill()
            network.judge = None
        emit(on_objects.environment, count=EVENTS // 4, seed=chance.randrange(1000))
    with Worker(on_objects.environment, log) as worker:
        network.judge = judge
        worker.start().wait_ready()
        worker.wait_drained(on_objects.ends())
        network.judge = None
        code, _ = worker.stop()
    assert code == 0
    assert "not-a-secret" not in log.read_text()
    counts = verify(on_objects.broker, on_objects.topic, on_objects.repo)
    assert counts["messages"] == sent["sent"] + KILLS * (EVENTS // 4)
    _goes_on_after_a_merge(on_objects, counts["accepted"])


def _goes_on_after_a_merge(stream: Stream, accepted: int) -> None:
    """Compaction, materialization, retrieval by Feast, and the audit, on what the worker left."""
    store, contract = open_store(stream.repo), contract_of(stream.repo)
    compact(contract, grace_s=0)
    materialize_arrived(store, contract)
    assert verify(stream.broker, stream.topic, stream.repo)["accepted"] == accepted
    entities = pd.DataFrame({"driver_id": [1001, 1002], "event_timestamp": [pd.Timestamp.now(tz="UTC")] * 2})
    job = store.get_historical_features(entities, ["driver_stats:conv_rate", "driver_stats:avg_daily_trips"])
    assert job.to_df()["conv_rate"].notna().all()
    _goes_on_after_damage(stream)
    clear(contract.directory)


def _goes_on_after_damage(stream: Stream) -> None:
    """A bit of the first file of each ledger, and its end, of which nothing can be read."""
    folder = Folder.of(contract_of(stream.repo))
    for chain in folder.chains().values():
        first, last = (folder.path_of(chain.valid[index]) for index in (0, -1))
        assert isinstance(first, ObjectPath)
        assert isinstance(last, ObjectPath)
        content = bytearray(objects.read(first, 0, objects.head(first).size))
        content[10] ^= 1
        objects.write(first, bytes(content))
        objects.write(last, b"garbage")
    told = restore(config_of(stream.environment), stream.topic)
    assert told["ok"], told
    verify(stream.broker, stream.topic, stream.repo)


def test_a_worker_whose_bucket_is_not_there_says_so_at_once(
    on_objects: Stream, object_store: ObjectStore, tmp_path: Path
) -> None:
    (object_store.data / "features").rename(object_store.data / "elsewhere")
    try:
        done = run(on_objects.environment, "worker", timeout_s=60)
    finally:
        (object_store.data / "elsewhere").rename(object_store.data / "features")
    assert done.returncode != 0
    assert "there is no bucket `features` at http://127.0.0.1:" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
