"""The embedded broker: librdkafka's in-process mock cluster, held by a process of its own.

    python -m demo.broker [--address-file FILE] [--linger SECONDS] [TOPIC ...]

It serves the Kafka protocol on a loopback port that it chooses and writes to FILE. It is for trying Headrace
without a Kafka: one broker, four partitions a topic, a few MB a partition, and everything is forgotten when
it ends. It stays in the foreground until SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient

START_TIMEOUT_S = 10.0
PARTITIONS = 4
"""The mock cluster's own default; it has no request to ask for another number."""


def start(topics: list[str]) -> tuple[Producer, str]:
    """Start the mock cluster and return the client that holds it, and its `host:port`.

    The cluster lives as long as the client: keep it.
    """
    holder = Producer({"bootstrap.servers": "embedded", "test.mock.num.brokers": 1, "log_level": 0})
    broker = next(iter(holder.list_topics(timeout=START_TIMEOUT_S).brokers.values()))
    address = f"{broker.host}:{broker.port}"
    admin = AdminClient({"bootstrap.servers": address, "log_level": 0})
    for topic in topics:
        # The mock knows no CreateTopics; a topic is made by the first request that names it.
        found = admin.list_topics(topic, timeout=START_TIMEOUT_S).topics[topic].partitions
        if len(found) != PARTITIONS:
            raise RuntimeError(f"topic `{topic}`: expected {PARTITIONS} partitions, found {len(found)}")
    return holder, address


def publish(address: str, file: Path) -> None:
    """Write the address to a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.write_text(f"{address}\n", encoding="utf-8")
    draft.replace(file)


def main() -> int:
    """Serve until a signal says to end."""
    parser = argparse.ArgumentParser(prog="python -m demo.broker", description="The embedded broker.")
    parser.add_argument("--address-file", type=Path, help="where to write host:port; removed at the end")
    parser.add_argument("--linger", type=float, default=0.0, help="seconds to go on after the signal, for clients")
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="topics to make at once")
    arguments = parser.parse_args()

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        holder, address = start(arguments.topics)
    except (KafkaException, RuntimeError) as exc:
        sys.stderr.write(f"the embedded broker did not start: {exc}\n")
        return 1
    sys.stdout.write(
        f"embedded broker on {address}: librdkafka's mock cluster, {PARTITIONS} partitions a topic, "
        "a few MB a partition, forgets everything when it ends. For trying, not for production.\n"
    )
    sys.stdout.flush()
    file = arguments.address_file
    if file is not None:
        publish(address, file)
    ended.wait()
    # A Procfile runner ends all at once: a worker that loses its broker first cannot leave its group.
    time.sleep(arguments.linger)
    if file is not None and file.exists() and file.read_text(encoding="utf-8").strip() == address:
        file.unlink()
    del holder
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
