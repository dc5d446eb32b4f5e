"""The whole worker on a Redis Cluster: slots are moved, a master is lost and another takes its place, or none does."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from headrace.audit import audit
from headrace.repository import open_store
from tests.servers import use_valkey
from tests.servers.valkey import ValkeyCluster
from tests.streaming.chaos import Load
from tests.streaming.conftest import Stream, StreamFactory, read_from
from tests.streaming.oracle import contract_of, verify
from tests.streaming.process import Worker, emit

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster(is_replicated=True) as servers:
        yield servers


@pytest.fixture
def stream(make_stream: StreamFactory, cluster: ValkeyCluster) -> Stream:
    """A stream whose online store is the cluster."""
    made = make_stream("sqlite", store_retry_seconds=60)
    use_valkey(made.repo, cluster.address, None, redis_type="redis_cluster")
    read_from(made.repo, made.broker, made.topic)
    return made


def test_two_workers_while_slots_move_and_masters_are_lost(
    stream: Stream, cluster: ValkeyCluster, tmp_path: Path
) -> None:
    load = Load(stream, seed=11, rate=400)
    first, second = (Worker(stream.environment, tmp_path / f"log{n}") for n in range(2))
    with first, second:
        for worker in (first, second):
            worker.start()
        for worker in (first, second):
            worker.wait_ready()
        load.start()
        try:
            chance = random.Random(1)
            first.wait(lambda: len(slots_with_keys(cluster)) > 8, 30, "serving")
            for slot in chance.sample(sorted(slots_with_keys(cluster)), 8):
                target = chance.choice([node for node in cluster.nodes if node is not cluster.owner(slot)])
                cluster.move_slot(slot, target, pause_s=0.05)
            cluster.lose(1)
            time.sleep(1)
        finally:
            load.finish()
        settle(stream, first, second)
        assert whole(stream)["messages"] > 500

        # The master has no replica any more, and nobody takes its place.
        cluster.replicas[1].kill()
        first.wait(lambda: not_ready(first), 30, "not ready")
        before = ends(first, second)
        emit(stream.environment, count=400, seed=12, keys=100)
        second.wait(lambda: not_ready(second), 30, "not ready")
        time.sleep(1)
        assert ends(first, second) == before
        cluster.replicas[1].start()  # it has forgotten everything
        settle(stream, first, second)
        for worker in (first, second):
            assert worker.stop()[0] == 0
    whole(stream)


def slots_with_keys(cluster: ValkeyCluster) -> set[int]:
    found: set[int] = set()
    for node in cluster.nodes:
        client: Any = Redis(port=node.port)
        found |= {client.execute_command("CLUSTER KEYSLOT", key) for key in client.keys("*driver_id*")}
    return found


def not_ready(worker: Worker) -> bool:
    return any("step online fails" in fault for fault in worker.state().get("faults", []))


def ends(*workers: Worker) -> dict[int, int]:
    """Where the ledgers end, as those say whose partitions they are."""
    return {part["partition"]: part["ledger_end"] for worker in workers for part in worker.state()["partitions"]}


def settle(stream: Stream, first: Worker, second: Worker) -> None:
    """Wait until the workers have all that was sent, and are ready."""
    wanted = stream.ends()
    first.wait(lambda: ends(first, second) == wanted, 60, f"drained to {wanted}")
    for worker in (first, second):
        worker.wait_ready()


def whole(stream: Stream) -> dict[str, int]:
    """Exactly once offline, the newest online."""
    counts = verify(stream.broker, stream.topic, stream.repo)
    assert audit(open_store(stream.repo), contract_of(stream.repo)).diverged == 0
    return counts
