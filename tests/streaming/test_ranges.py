"""Ranges of topics are read to their ends, or it is said that they are not. Real Kafka."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from streaming.broker import Broker, BrokerError, Log
from streaming.ranges import records_between
from streaming.settings import StreamConfig
from tests.streaming.conftest import Stream, StreamFactory
from tests.streaming.process import config_of


@pytest.fixture
def stream(make_stream: StreamFactory) -> Stream:
    """A stream whose worker never runs."""
    return make_stream("sqlite", broker_timeout_seconds=2)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def offsets(config: StreamConfig, topic: str, start: int, end: int) -> list[int]:
    chunks = records_between(config, {(topic, 0): start}, {(topic, 0): end}, 100)
    return [message.offset() or 0 for chunk in chunks for message in chunk]


def test_a_range_behind_which_a_transaction_is_open_is_not_taken_for_read(stream: Stream) -> None:
    """Offsets without records are passed over; those that may still get some are waited for, and then told of."""
    config, topic = config_of(stream.environment), stream.topic
    broker = Broker(config)
    plain = Producer({"bootstrap.servers": stream.broker, "log_level": 0})
    sure = Producer({"bootstrap.servers": stream.broker, "log_level": 0, "transactional.id": topic})
    sure.init_transactions(10)
    plain.produce(topic, b"0", partition=0)
    assert plain.flush(10) == 0
    sure.begin_transaction()
    sure.produce(topic, b"1", partition=0)
    sure.commit_transaction(10)  # its marker is offset 2
    sure.begin_transaction()
    sure.produce(topic, b"3", partition=0)
    assert sure.flush(10) == 0
    sure.abort_transaction(10)
    wait_for(lambda: broker.log(topic, 0) == Log(0, 5))  # markers come after the answer
    assert offsets(config, topic, 0, 5) == [0, 1]
    assert offsets(config, topic, 2, 5) == []
    assert offsets(config, topic, 2, 3) == []

    sure.begin_transaction()
    sure.produce(topic, b"5", partition=0)
    assert sure.flush(10) == 0
    plain.produce(topic, b"6", partition=0)
    assert plain.flush(10) == 0
    assert broker.log(topic, 0) == broker.logs({topic: 1})[topic, 0] == Log(0, 5)
    assert offsets(config, topic, 0, 5) == [0, 1]
    chunks = records_between(config, {(topic, 0): 0}, {(topic, 0): 7}, 100)
    assert [message.offset() for message in next(iter(chunks))] == [0, 1]
    with pytest.raises(BrokerError, match=r"\[0\] can be read up to offset 5 now, not up to 7: a transaction is open"):
        list(chunks)
    sure.commit_transaction(10)
    wait_for(lambda: broker.log(topic, 0) == Log(0, 8))
    assert offsets(config, topic, 0, 7) == [0, 1, 5, 6]


def test_what_the_topic_lost_meanwhile_is_not_passed_over(stream: Stream) -> None:
    config, topic = config_of(stream.environment), stream.topic
    producer = Producer({"bootstrap.servers": stream.broker, "log_level": 0})
    for number in range(10):
        producer.produce(topic, str(number).encode(), partition=0)
    assert producer.flush(10) == 0
    admin = AdminClient({"bootstrap.servers": stream.broker})
    admin.delete_records([TopicPartition(topic, 0, 4)])[TopicPartition(topic, 0)].result(10)
    with pytest.raises(BrokerError, match="out of range"):
        offsets(config, topic, 0, 10)
    assert offsets(config, topic, 4, 10) == list(range(4, 10))
