"""Driver events for benchmarks: seeded, all valid, dated shortly before now and in order."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from confluent_kafka import Producer

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVERS = 10_000
PARTITIONS = 4
BLOCK = 10_000


def events(count: int, *, seed: int, until_us: int) -> Iterator[tuple[int, bytes]]:
    """Yield `count` events as (driver, JSON), one a millisecond up to a time."""
    random = np.random.default_rng(seed)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        drivers = random.integers(1, DRIVERS + 1, size).tolist()
        rates = random.random((size, 2)).round(6).tolist()
        trips = random.integers(0, 1_000, size).tolist()
        for index in range(size):
            moment = datetime.fromtimestamp((until_us - (count - start - index) * 1_000) / 1e6, UTC)
            stamp = moment.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
            driver, (conversion, acceptance) = drivers[index], rates[index]
            yield (
                driver,
                (
                    f'{{"driver_id": {driver}, "conv_rate": {conversion}, "acc_rate": {acceptance}, '
                    f'"avg_daily_trips": {trips[index]}, "datetime": "{stamp}", "created": "{stamp}"}}'
                ).encode(),
            )


def produce(address: str, topic: str, count: int, *, seed: int, until_us: int) -> int:
    """Produce events keyed by driver and return their bytes when all are acknowledged.

    A driver goes to a fixed partition.

    Raises:
        RuntimeError: The broker did not take them all.
    """
    producer = Producer(
        {
            "bootstrap.servers": address,
            "linger.ms": 20,
            "batch.num.messages": 10_000,
            "queue.buffering.max.messages": 1_000_000,
            "acks": "all",
            "log_level": 0,
        }
    )
    size = 0
    for number, (driver, value) in enumerate(events(count, seed=seed, until_us=until_us)):
        while True:
            try:
                producer.produce(topic, value, key=str(driver).encode(), partition=driver % PARTITIONS)
                break
            except BufferError:
                producer.poll(0.1)
        size += len(value)
        if number % 1_000 == 0:
            producer.poll(0)
    left = producer.flush(60.0)
    if left:
        raise RuntimeError(f"{left:,} of {count:,} events were not acknowledged by {address}")
    return size
