"""The floor: aiokafka alone, with uvloop, each value decoded by orjson, nothing written.

    python benchmarks/bare_consumer.py <broker> <topic> <events> <partitions>

Run by `benchmarks.stream_peers`, in the environment of the peers. It prints one JSON line: the seconds from before the
first fetch to the last event, how many there were, and a sum over all of them.
"""

from __future__ import annotations

import json
import sys
import time

import orjson
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition

FETCH_BYTES = 1 << 20
RECORDS = 20_000


async def drain(broker: str, topic: str, events: int, partitions: int) -> dict[str, float]:
    """Read and decode all events."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=broker, max_partition_fetch_bytes=FETCH_BYTES, auto_offset_reset="earliest"
    )
    await consumer.start()
    consumer.assign([TopicPartition(topic, number) for number in range(partitions)])
    seen = key_sum = 0
    begun = time.perf_counter()
    while seen < events:
        for records in (await consumer.getmany(timeout_ms=1_000, max_records=RECORDS)).values():
            for record in records:
                key_sum += orjson.loads(record.value)["driver_id"]
            seen += len(records)
    seconds = time.perf_counter() - begun
    await consumer.stop()
    return {"seconds": seconds, "events": seen, "key_sum": key_sum}


def main() -> None:
    """Drain the topic."""
    broker, topic, events, partitions = sys.argv[1:]
    answer = uvloop.run(drain(broker, topic, int(events), int(partitions)))
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
