"""What the tests of the stream share: a repository of its own on a topic of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition
from feast import KafkaSource
from feast.data_format import StreamFormat

from headrace.repository import open_store
from tests.conftest import RepositoryFactory, TopicFactory
from tests.servers import Mode, Proxy, Valkey
from tests.servers.repository import use_valkey

QUICK = {
    "session_seconds": 2,
    "append_seconds": 0.5,
    "store_retry_seconds": 30,
    "broker_timeout_seconds": 5,
    "dead_letter_share": 1,
}
"""Settings that make failover quick."""


@dataclass(frozen=True)
class Stream:
    """A repository of its own on a topic of its own."""

    broker: str
    topic: str
    repo: Path
    environment: dict[str, str] = field(repr=False)

    def ends(self) -> dict[int, int]:
        """Where the logs end."""
        consumer = Consumer({"bootstrap.servers": self.broker, "group.id": "ends"})
        try:
            count = len(consumer.list_topics(self.topic, timeout=10).topics[self.topic].partitions)
            return {
                n: consumer.get_watermark_offsets(TopicPartition(self.topic, n), timeout=10)[1] for n in range(count)
            }
        finally:
            consumer.close()


StreamFactory = Callable[..., Stream]


@dataclass(frozen=True)
class Network:
    """The worker's ways to broker and store, which a test may break."""

    broker: Proxy
    store: Proxy


@pytest.fixture
def network(kafka_proxy: Proxy, valkey_proxy: Proxy) -> Iterator[Network]:
    """Ways to the shared Kafka and Valkey; open again after the test."""
    yield Network(kafka_proxy, valkey_proxy)
    kafka_proxy.set(Mode.OPEN)
    valkey_proxy.set(Mode.OPEN)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a campaign runs."""
    if os.environ.get("HEADRACE_TEST_CAMPAIGN") == "1":
        return
    left = [item for item in items if item.get_closest_marker("campaign") is not None]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def read_from(repo: Path, broker: str, topic: str) -> None:
    """Let the views of an applied repository read another topic. Quicker than a `feast apply` of their file."""
    store = open_store(repo)
    view = store.get_feature_view("driver_stats")
    assert isinstance(view.stream_source, KafkaSource)
    view.stream_source.kafka_options.topic = topic
    view.stream_source.kafka_options.kafka_bootstrap_servers = broker
    store.apply([view])


def set_format(repo: Path, message_format: StreamFormat) -> None:
    """Let the view of an applied repository have another message format."""
    store = open_store(repo)
    view = store.get_feature_view("driver_stats")
    assert isinstance(view.stream_source, KafkaSource)
    view.stream_source.kafka_options.message_format = message_format
    store.apply([view])


@pytest.fixture
def make_stream(
    request: pytest.FixtureRequest,
    kafka: str,
    topic: TopicFactory,
    feature_repo_copy: RepositoryFactory,
    worker_environment: Callable[..., dict[str, str]],
) -> StreamFactory:
    """A function that makes a stream on the real Kafka; settings are given by keyword.

    With a network its worker goes through it.
    """

    def make(online: str = "valkey", /, *, network: Network | None = None, **settings: object) -> Stream:
        name = topic("drivers", partitions=4)
        repo = feature_repo_copy()
        if online == "valkey":
            server: Valkey = request.getfixturevalue("valkey_server").start()
            store = server.address if network is None else network.store.address
            use_valkey(repo, store, next(request.getfixturevalue("valkey_databases")))
        read_from(repo, kafka, name)
        way = {} if network is None else {"broker": network.broker.address}
        environment = worker_environment(**{"feature_repo": repo, **way, **QUICK, **settings})
        return Stream(kafka, name, repo, environment)

    return make


@pytest.fixture
def stream(make_stream: StreamFactory) -> Stream:
    """A stream with Valkey online."""
    return make_stream()
