"""Everything goes wrong at once, and nothing is lost, doubled or older than before. `make chaos` is the long one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import EnvironmentFactory, RepositoryFactory, TopicFactory
from tests.servers import (
    FaultyNetwork,
    Kafka,
    ObjectStore,
    Postgres,
    Proxy,
    UnavailableError,
    Valkey,
    feast_apply,
    use_valkey,
)
from tests.servers.repository import use_registry
from tests.servers.valkey import ValkeyCluster
from tests.streaming.chaos import Campaign, Load, Place, Reader, say, schedule, table
from tests.streaming.chaos_places import ManyMachines, OneMachine, written_again
from tests.streaming.conftest import QUICK, Network, Stream, StreamFactory
from tests.streaming.oracle import verify

ROUNDS = int(os.environ.get("HEADRACE_TEST_CHAOS_ROUNDS", "1"))
RATE = float(os.environ.get("HEADRACE_TEST_CHAOS_RATE", "300"))
SEED = int(os.environ.get("HEADRACE_TEST_SEED", "7"))
RETRY_S = 120


@pytest.fixture
def one_machine(make_stream: StreamFactory, network: Network, valkey_server: Valkey) -> OneMachine:
    return OneMachine(make_stream(network=network, store_retry_seconds=RETRY_S), network, valkey_server)


@pytest.fixture
def many_machines(
    kafka: str,
    topic: TopicFactory,
    network: Network,
    object_store: ObjectStore,
    feature_repo_copy: RepositoryFactory,
    worker_environment: EnvironmentFactory,
) -> Iterator[ManyMachines]:
    name = topic("drivers", partitions=6)
    object_store.bucket("features")
    try:
        with (
            Postgres() as postgres,
            ValkeyCluster(is_replicated=True) as cluster,
            FaultyNetwork(object_store.port) as way,
        ):
            on_s3 = f'path="s3://features/{name}",\n    s3_endpoint_override="{way.url}"'
            repo = feature_repo_copy(
                replace={'topic="drivers"': f'topic="{name}"', 'path="../data/offline/driver_stats"': on_s3},
                apply=False,
            )
            use_valkey(repo, cluster.address, None, redis_type="redis_cluster")
            use_registry(repo, postgres.url)
            feast_apply(repo)
            settings = {**QUICK, "store_retry_seconds": RETRY_S, "registry_seconds": 1}
            environment = worker_environment(feature_repo=repo, broker=network.broker.address, **settings)
            of_reader = feature_repo_copy()  # with a registry of its own, which stays as it is
            use_valkey(of_reader, cluster.address, None, redis_type="redis_cluster")
            stream = Stream(kafka, name, repo, environment)
            yield ManyMachines(stream, of_reader, object_store, way, cluster, postgres)
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.mark.timeout(300 + 120 * ROUNDS)
@pytest.mark.parametrize("stores", ["one_machine", "many_machines"])
def test_chaos(
    request: pytest.FixtureRequest, stores: str, kafka_proxy: Proxy, kafka_server: Kafka, tmp_path: Path
) -> None:
    place: Place = request.getfixturevalue(stores)
    stream = place.stream
    faults = schedule(SEED, ROUNDS, place)
    reader = Reader(place.reader_repo)
    load = Load(stream, seed=SEED, rate=RATE)
    try:
        with Campaign(place, kafka_server, kafka_proxy, tmp_path) as campaign:
            load.start()
            reader.start()
            try:
                campaign.run(faults)
            finally:
                load.finish()
            campaign.settle()
            reader.finish()
        counts = verify(
            stream.broker, stream.topic, stream.repo, seen=reader.seen, forgotten=place.forgotten(reader.polls)
        )
        assert counts["messages"] > load.sent["taken"] > load.sent["not taken"]
        assert sum(map(len, reader.seen.values())) > counts["keys"]
        place.check()
    except BaseException:
        say(f"HEADRACE_TEST_SEED={SEED} HEADRACE_TEST_CHAOS_ROUNDS={ROUNDS} repeats this schedule:")
        say("\n".join(map(str, faults)))
        say(table({**load.sent, "polls": len(reader.polls)}))
        raise
    say(
        "\n"
        + table(
            {
                **campaign.done,
                **{f"workers that ended by themselves {when}": count for when, count in campaign.ended.items()},
                "events that the broker did not take": load.sent["not taken"],
                "transactions committed": load.sent["transactions"],
                "transactions aborted": load.sent["aborted"],
                "events": counts["messages"],
                "accepted": counts["accepted"],
                "bad": counts["bad"],
                "tombstones": counts["skipped"],
                "lost": 0,
                "doubled": 0,
                "letters": counts["letters"],
                "letters repeated": counts["letters"] - counts["bad"],
                "keys online": counts["keys"],
                "changes seen online": sum(map(len, reader.seen.values())),
                "polls": len(reader.polls),
                "polls that failed": reader.failed,
                "went back": 0,
                "went back with a failover": counts["went back with a failover"],
                **place.figures(),
                "values that were written again": written_again(tmp_path),
                "segments": counts["segments"],
                "seed": SEED,
            }
        )
    )
