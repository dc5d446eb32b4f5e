"""Events for the benchmarks of the stream: seeded, all valid, dated shortly before now and in order.

A partition's events are made by themselves, from the seed and its number alone: several processes produce side by
side, and what must be stored can be made again to compare. A key belongs to one partition, and no two events of a
partition have the same time, so there is no doubt which event of a key is the newest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer
from feast.types import Bool, FeastType, Float32, Float64, Int32, Int64, String

from benchmarks.peers import FEATURE_TYPES, feature_names

PARTITIONS = 4
BLOCK = 10_000
STEADY_TICK_S, STEADY_LINGER_MS = 0.005, 1.0
KEY, TIME, CREATED = "driver_id", "datetime", "created"
WORDS, WORD_LETTERS = 1_000, 130

Int64s = npt.NDArray[np.int64]
Values = npt.NDArray[Any]
Random = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """What a benchmark's events look like; events have the key and two times besides.

    Attributes:
        features: name and type, in the order of the JSON.
        tags: the value rules of each feature, as in a feature repository.
    """

    name: str
    features: tuple[tuple[str, FeastType], ...]
    tags: tuple[dict[str, str], ...]

    def template(self) -> str:
        """The JSON of an event, to be filled by key, features and twice the time."""
        forms = ['"%s"' if dtype == String else "%s" for _, dtype in self.features]
        fields = [f'"{name}": {form}' for (name, _), form in zip(self.features, forms, strict=True)]
        return "{" + ", ".join([f'"{KEY}": %d', *fields, f'"{TIME}": "%s"', f'"{CREATED}": "%s"']) + "}"


_SHARE = {"ge": "0", "le": "1", "nullable": "false"}
DRIVERS = Shape(
    "driver_stats",
    (("conv_rate", Float32), ("acc_rate", Float32), ("avg_daily_trips", Int32)),
    (_SHARE, _SHARE, {"ge": "0", "nullable": "false"}),
)
"""The view of the example, about 150 bytes an event."""


def _mixed(name: str, features: int) -> Shape:
    """Features of six types in turn, without rules."""
    types = (FEATURE_TYPES[index % len(FEATURE_TYPES)] for index in range(features))
    return Shape(name, tuple(zip(feature_names(features), types, strict=True)), ({},) * features)


WIDE = _mixed("wide", 50)
"""50 features of six types, about 2,000 bytes an event."""

MIDDLE = _mixed("middle", 20)
"""20 features of six types."""

SHAPES = {shape.name: shape for shape in (DRIVERS, WIDE, MIDDLE)}


@dataclass(frozen=True)
class Load:
    """A topic's events. All of it goes through JSON, to be handed to a process.

    Attributes:
        count: events of all partitions together.
        keys: how many there are to choose from.
        until_us: the time of the newest event; they are a millisecond apart, over all partitions.
    """

    topic: str
    shape: str
    count: int
    until_us: int
    keys: int = 10_000
    partitions: int = PARTITIONS
    seed: int = 7

    def size_of(self, partition: int) -> int:
        """How many events a partition has."""
        return (self.count - partition - 1) // self.partitions + 1


@dataclass(frozen=True)
class Block:
    """Events of a partition that follow each other, as columns; times are microseconds since the epoch."""

    keys: Int64s
    times: Int64s
    features: Sequence[Values]


def blocks(load: Load, partition: int) -> Iterator[Block]:
    """The events of a partition, in order."""
    shape = SHAPES[load.shape]
    random = np.random.default_rng((load.seed, partition))
    words = np.array([random.bytes(WORD_LETTERS // 2).hex() for _ in range(WORDS)])
    size = load.size_of(partition)
    step_us = 1_000 * load.partitions
    start_us = load.until_us // 1_000 * 1_000 - size * step_us
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        keys = random.integers(0, load.keys // load.partitions, count) * load.partitions + partition + 1
        times = start_us + (start + 1 + np.arange(count)) * step_us
        features = [_values(random, dtype, count, words) for _, dtype in shape.features]
        yield Block(keys, times, features)


def encode(shape: Shape, block: Block) -> Iterator[tuple[int, bytes]]:
    """The events of a block as (key, JSON)."""
    template = shape.template()
    stamps = [stamp.replace("T", " ") for stamp in np.datetime_as_string(block.times.astype("M8[us]"), "ms").tolist()]
    keys = block.keys.tolist()
    columns = [_json(values) for values in block.features]
    for key, row in zip(keys, zip(keys, *columns, stamps, stamps, strict=True), strict=True):
        yield key, (template % row).encode()


def producer(address: str, *, linger_ms: float = 20) -> Producer:
    """A producer as in production: acknowledged, lz4."""
    return Producer(
        {
            "bootstrap.servers": address,
            "linger.ms": linger_ms,
            "batch.num.messages": 10_000,
            "queue.buffering.max.messages": 500_000,
            "compression.type": "lz4",
            "acks": "all",
            "log_level": 0,
        }
    )


def produce(address: str, load: Load, partitions: Sequence[int], rate: float | None = None) -> int:
    """Produce the events of some partitions in turn, and return their bytes when all are acknowledged.

    Args:
        rate: events a second, of these partitions together; None is as quickly as may be.

    Raises:
        RuntimeError: the broker did not take them all.
    """
    shape = SHAPES[load.shape]
    target = producer(address) if rate is None else producer(address, linger_ms=STEADY_LINGER_MS)
    share = BLOCK if rate is None else max(1, round(rate * STEADY_TICK_S / len(partitions)))
    waiting = {
        partition: chain.from_iterable(encode(shape, block) for block in blocks(load, partition))
        for partition in partitions
    }
    begun = time.monotonic()
    size = sent = 0
    while waiting:
        for partition, source in list(waiting.items()):
            events = list(islice(source, share))
            if not events:
                del waiting[partition]
            for key, value in events:
                size += len(value)
                send(target, load.topic, value, str(key).encode(), partition)
            sent += len(events)
        target.poll(0)
        if rate is not None:
            time.sleep(max(0.0, begun + sent / rate - time.monotonic()))
    left = target.flush(120.0)
    if left:
        raise RuntimeError(f"{left:,} events of `{load.topic}` were not acknowledged by {address}")
    return size


def send(target: Producer, topic: str, value: bytes, key: bytes, partition: int, **more: Any) -> None:
    """Produce one event, waiting while the producer's queue is full."""
    while True:
        try:
            target.produce(topic, value, key=key, partition=partition, **more)
        except BufferError:
            target.poll(0.1)
        else:
            return


@dataclass(frozen=True)
class Truth:
    """What must be stored of a load.

    Attributes:
        key_sum, time_sum_us: over all events; sums of what is stored must be the same.
        newest: the features of the newest event of some keys.
    """

    key_sum: int
    time_sum_us: int
    newest: dict[int, tuple[Any, ...]]


def truth(load: Load, samples: int) -> Truth:
    """Make the events again, and keep what a check wants: of each partition, a share of `samples` keys."""
    key_sum = time_sum_us = 0
    newest: dict[int, tuple[Any, ...]] = {}
    for partition in range(load.partitions):
        chosen: Int64s | None = None
        for block in blocks(load, partition):
            key_sum += int(block.keys.sum())
            time_sum_us += int(block.times.sum())
            if chosen is None:
                chosen = np.unique(block.keys)[: max(1, samples // load.partitions)]
            hits = np.flatnonzero(np.isin(block.keys, chosen))
            for row in hits.tolist():
                newest[int(block.keys[row])] = tuple(values[row].item() for values in block.features)
    return Truth(key_sum, time_sum_us, newest)


def _values(random: Random, dtype: FeastType, count: int, words: Values) -> Values:
    makers: dict[FeastType, Callable[[], Values]] = {
        Float32: lambda: random.random(count).round(6),
        Float64: lambda: random.random(count),
        Int32: lambda: random.integers(0, 1_000, count),
        Int64: lambda: random.integers(0, 10**12, count),
        String: lambda: words[random.integers(0, len(words), count)],
        Bool: lambda: random.random(count) < 0.5,
    }
    return makers[dtype]()


def _json(values: Values) -> list[Any]:
    return np.where(values, "true", "false").tolist() if values.dtype == bool else values.tolist()  # type: ignore[no-any-return]
