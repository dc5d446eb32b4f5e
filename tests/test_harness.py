"""The fixtures themselves: servers that start, keep their place, and end; skips that count as failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer

from demo.place import answers
from demo.processes import Children, DemoError
from tests.servers import Kafka, MockBroker, ServerError, Valkey, free_port
from tests.servers.process import is_listening

ROOT = Path(__file__).parents[1]
SUITE = """
import pytest

def test_skips():
    pytest.skip("something is not installed")

@pytest.mark.xfail(reason="known")
def test_fails_as_expected():
    raise AssertionError
"""


def produce_and_consume(address: str, topic: str) -> bytes | None:
    producer = Producer({"bootstrap.servers": address})
    producer.produce(topic, b"one")
    assert producer.flush(10.0) == 0
    consumer = Consumer({"bootstrap.servers": address, "group.id": "test", "auto.offset.reset": "earliest"})
    try:
        consumer.subscribe([topic])
        message = consumer.poll(30.0)
        return None if message is None else message.value()
    finally:
        consumer.close()


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 failed, 1 xfailed"), ("0", "1 skipped, 1 xfailed")])
def test_where_all_is_required_a_skip_is_a_failure(tmp_path: Path, required: str, outcome: str) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:randomly",
        str(tmp_path),
    ]
    environment = {**os.environ, "HEADRACE_REQUIRE_ALL": required, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcome in done.stdout
    assert done.returncode == int(required)


def test_kafka_takes_and_gives_events(kafka: str, kafka_server: Kafka) -> None:
    topic = kafka_server.create_topic("harness", partitions=2)
    assert produce_and_consume(kafka, topic) == b"one"


def test_kafka_creates_no_topic_by_being_asked_and_no_topic_twice(kafka_server: Kafka) -> None:
    topic = kafka_server.create_topic("harness-once")
    with pytest.raises(ServerError, match=f"topic `{topic}` was not created"):
        kafka_server.create_topic(topic)


def test_mock_broker_takes_and_gives_events(mock_broker: str) -> None:
    assert produce_and_consume(mock_broker, "harness") == b"one"


def test_mock_broker_takes_its_address_back_when_it_ends() -> None:
    with MockBroker(["a", "b"]) as broker:
        port = int(broker.address.rpartition(":")[2])
        assert is_listening(port)
        broker.stop()
        assert not broker.is_ready()
        assert not is_listening(port)


def test_server_keeps_its_port_over_a_crash_and_goes_with_its_folder() -> None:
    with Valkey() as server:
        port, pid = server.port, server.pid
        server.kill()
        assert not is_listening(port)
        server.start()
        assert server.port == port
        assert server.pid != pid
        assert server.is_ready()
    assert not server.folder.exists()
    assert not is_listening(port)


def test_server_that_cannot_start_says_why() -> None:
    with pytest.raises(ServerError, match="no-such-option"), Valkey(("--no-such-option", "1")):
        pass


def test_children_of_the_demonstration_end_with_their_own_children(tmp_path: Path) -> None:
    port = free_port()
    serve = f"{sys.executable} -m http.server --bind 127.0.0.1 {port} & wait"
    with Children(tmp_path, os.environ, tmp_path) as children:
        children.start("family", ["bash", "-c", serve])
        children.wait("family", lambda: answers(f"http://127.0.0.1:{port}/"), timeout_s=20)
    assert not is_listening(port)


def test_a_child_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    with (
        Children(tmp_path, os.environ, tmp_path) as children,
        pytest.raises(DemoError, match=r"(?s)`it` .* 7.*why"),
    ):
        children.run("it", ["bash", "-c", "echo why; exit 7"])
