"""Everything goes wrong at once, and nothing is lost, doubled or older than before. `make chaos` is the long one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from feast import FileSource, KafkaSource

from headrace.repository import open_store
from tests.conftest import EnvironmentFactory, RepositoryFactory, TopicFactory
from tests.servers import (
    FaultyNetwork,
    Kafka,
    ObjectStore,
    Postgres,
    Proxy,
    UnavailableError,
    Valkey,
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
            of_reader = feature_repo_copy()  # with a registry of its own, which stays as it is
            repo = feature_repo_copy(apply=False)
            use_registry(repo, postgres.url)
            for one in (repo, of_reader):
                use_valkey(one, cluster.address, None, redis_type="redis_cluster")
            move_view(of_reader, repo, topic=name, history=f"s3://features/{name}", endpoint=way.url)
            settings = {**QUICK, "store_retry_seconds": RETRY_S, "registry_seconds": 1}
            environment = worker_environment(feature_repo=repo, broker=network.broker.address, **settings)
            stream = Stream(kafka, name, repo, environment)
            yield ManyMachines(stream, of_reader, object_store, way, cluster, postgres)
    except UnavailableError as exc:
        pytest.skip(str(exc))


def move_view(former: Path, repo: Path, *, topic: str, history: str, endpoint: str) -> None:
    """Declare the view in a repository as it is in another that was applied, but for where its data are; apply it.

    Quicker than a `feast apply` of the file, which declares it so, too.
    """
    definitions = repo / "definitions.py"
    text = definitions.read_text(encoding="utf-8")
    on_s3 = f'path="{history}",\n    s3_endpoint_override="{endpoint}"'
    for old, new in (('topic="drivers"', f'topic="{topic}"'), ('path="../data/offline/driver_stats"', on_s3)):
        assert old in text
        text = text.replace(old, new)
    definitions.write_text(text, encoding="utf-8")
    store = open_store(former)
    view = store.get_feature_view("driver_stats")
    source, files = view.stream_source, view.batch_source
    assert isinstance(source, KafkaSource)
    assert isinstance(files, FileSource)
    source.kafka_options.topic = topic
    files.file_options.uri, files.file_options.s3_endpoint_override = history, endpoint
    open_store(repo).apply([*(store.get_entity(entity) for entity in view.entities), view])


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
    finally:
        reader.finish()
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
                "values that workers wrote again": written_again(tmp_path),
                "segments": counts["segments"],
                "seed": SEED,
            }
        )
    )
