"""The truth by brute force: what a topic's events must have become offline, online, and in the dead letters.

Nothing here uses the stream's own code: JSON by the standard library, rules written out, newest-wins by `max`.
"""

from __future__ import annotations

import json
import math
import struct
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from confluent_kafka import Consumer, TopicPartition
from feast import FeatureStore

from headrace.chains import Folder, accepted_offsets, footer
from headrace.contract import ViewContract
from headrace.place import readable
from headrace.repository import contracts, open_store

Origin = tuple[int, int]
"""Partition and offset."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
KEY = "driver_id"
FEATURES = ("conv_rate", "acc_rate", "avg_daily_trips")
COLUMNS = (KEY, *FEATURES, "datetime", "created")

Features = tuple[Any, ...]
"""The values of `FEATURES`, as they are served."""


@dataclass(frozen=True)
class Message:
    """A record as any consumer sees it."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]
    all_headers: tuple[tuple[str, bytes | None], ...] = ()


@dataclass(frozen=True)
class Seen:
    """The features of a driver that somebody saw, in which poll first."""

    features: Features
    poll: int


@dataclass(frozen=True)
class Forgotten:
    """A server of the online store was lost, and a replica that may have lacked something took its place.

    Attributes:
        keys: whose values it had.
        first, last: the polls, both inclusive, in which older ones may have come to sight.
    """

    keys: frozenset[int]
    first: int
    last: int


@dataclass
class Truth:
    """What must have become of each record."""

    accepted: dict[Origin, tuple[Any, ...]] = field(default_factory=dict)
    bad: set[Origin] = field(default_factory=set)
    skipped: set[Origin] = field(default_factory=set)

    def newest(self) -> dict[int, tuple[Any, ...]]:
        """The newest row of each driver: by event time, created time, partition, offset."""
        best: dict[int, tuple[tuple[Any, ...], tuple[Any, ...]]] = {}
        for origin, row in self.accepted.items():
            order = order_of(origin, row)
            if row[0] not in best or order >= best[row[0]][0]:
                best[row[0]] = (order, row)
        return {key: row for key, (_, row) in best.items()}

    def went_back(
        self, seen: Mapping[int, Sequence[Seen]], forgotten: Sequence[Forgotten] = ()
    ) -> tuple[list[str], int]:
        """Where a driver's features were replaced by older ones, or by some that no event had, or were gone.

        Args:
            seen: what was seen of each driver, one after another.
            forgotten: each accounts for one step back of each of its keys.

        Returns:
            The steps back that nothing accounts for, and how many were accounted for.
        """
        orders: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for origin, row in self.accepted.items():
            orders.setdefault(row[:4], []).append(order_of(origin, row))
        faults: list[str] = []
        accounted = 0
        for key, values in seen.items():
            last: tuple[Any, ...] = ()
            excuses = [loss for loss in forgotten if key in loss.keys]
            for value in values:
                is_gone = all(feature is None for feature in value.features)
                possible = [()] if is_gone else sorted(orders.get((key, *value.features), []))
                order = next((order for order in possible if order >= last), None)
                excuse = next((loss for loss in excuses if loss.first <= value.poll <= loss.last), None)
                if order is None and possible and excuse is not None:
                    excuses.remove(excuse)
                    accounted += 1
                    order = possible[0]
                if order is None:
                    where = f"driver {key}, poll {value.poll}"
                    faults.append(f"{where}: {value.features} of {possible or 'no event'} came after {last}")
                else:
                    last = order
        return faults, accounted


def order_of(origin: Origin, row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where a row is in the order that decides which of a key's rows is the newest."""
    return (row[4], row[5] if row[5] is not None else -math.inf, *origin)


def read_topic(broker: str, topic: str, *, timeout_s: float = 60.0) -> list[Message]:
    """Every committed record of a topic."""
    consumer = Consumer(
        {
            "bootstrap.servers": broker,
            "group.id": f"oracle-{uuid.uuid4().hex}",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": False,
        }
    )
    try:
        found = consumer.list_topics(topic, timeout=timeout_s).topics[topic].partitions
        ends = {n: consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=timeout_s) for n in found}
        wanted = {n: end for n, (start, end) in ends.items() if end > start}
        consumer.assign([TopicPartition(topic, n, ends[n][0]) for n in wanted])
        messages: list[Message] = []
        while wanted:
            batch = consumer.consume(10_000, timeout=0.3)  # waits for so many
            for message in batch:
                assert message.error() is None, message.error()
                messages.append(
                    Message(
                        message.partition() or 0,
                        message.offset() or 0,
                        message.timestamp()[1],
                        message.key(),
                        message.value(),
                        {str(name): bytes(value or b"") for name, value in _headers(message)},
                        tuple(_headers(message)),
                    )
                )
            done = [n for n, end in wanted.items() if consumer.position([TopicPartition(topic, n)])[0].offset >= end]
            for n in done:
                del wanted[n]
        return messages
    finally:
        consumer.close()


def _headers(message: Any) -> list[tuple[Any, Any]]:
    return list(message.headers() or [])


Decode = Callable[[bytes], Any]
"""A record's value to the event in it, as JSON has it; raises ValueError if it is none."""


def judge(
    messages: list[Message], *, now: datetime | None = None, max_skew_s: float = 300.0, decode: Decode = json.loads
) -> Truth:
    """Decide on each record by the rules of `driver_stats`, written out."""
    truth = Truth()
    latest = (now or datetime.now(UTC)).timestamp() + max_skew_s
    for message in messages:
        origin = (message.partition, message.offset)
        if message.value is None:
            truth.skipped.add(origin)
            continue
        row = _row(message.value, latest, decode)
        if row is None:
            truth.bad.add(origin)
        else:
            truth.accepted[origin] = row
    return truth


def _row(value: bytes, latest_s: float, decode: Decode) -> tuple[Any, ...] | None:
    try:
        event = decode(value)
        if not isinstance(event, dict):
            return None
        trips, key = event["avg_daily_trips"], event[KEY]
        rates = [event["conv_rate"], event["acc_rate"]]
        moment, created = _moment(event["datetime"]), event["created"]
        good = (
            type(key) is int
            and type(trips) is int
            and 0 <= trips < 2**31
            and all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in rates)
            and moment.timestamp() <= latest_s
        )
        if not good:
            return None
        made = None if created is None else _us(_moment(created))
        return (key, _float32(rates[0]), _float32(rates[1]), trips, _us(moment), made)
    except (ValueError, KeyError, TypeError):
        return None


def _moment(text: Any) -> datetime:
    if not isinstance(text, str) or len(text) < len("2021-01-01 00:00:00"):
        raise ValueError(text)
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _us(moment: datetime) -> int:
    delta = moment - EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def contract_of(repo: Path) -> ViewContract:
    """The one view of a test's repository."""
    return contracts(open_store(repo))[0]


@dataclass(frozen=True)
class Offline:
    """What the offline store has.

    Attributes:
        rows: the values of `COLUMNS`.
        more: those of the columns that a view has beside them, where a row's file has them.
    """

    rows: dict[Origin, tuple[Any, ...]]
    more: dict[Origin, dict[str, Any]]
    rejected: int
    skipped: int
    ends: dict[int, int]
    doubled: list[Origin]


def read_offline(contract: ViewContract, topic: str, epoch: int = 0) -> Offline:
    """Every row of the stream's chains with its origin, from the footers. Chains are derived, so holes are found."""
    folder = Folder(contract.directory)
    rows: dict[Origin, tuple[Any, ...]] = {}
    more: dict[Origin, dict[str, Any]] = {}
    rejected = skipped = 0
    ends: dict[int, int] = {}
    doubled: list[Origin] = []
    for name, chain in folder.chains().items():
        stem, _, number = name.rpartition("-")
        if number != str(epoch) or not stem.startswith(f"stream-{topic}-"):
            continue
        partition = int(stem.rpartition("-")[2])
        ends[partition] = chain.end
        for segment in chain.valid:
            path = folder.path_of(segment)
            mark = footer(path)
            rejected += mark.rejected
            skipped += mark.skipped
            offsets = accepted_offsets(path).tolist()
            table = pq.read_table(readable(path))
            assert table.num_rows == len(offsets), path
            # In the view's order; a file of before the view had a column lacks it.
            assert table.column_names == [name for name in contract.schema.names if name in table.column_names], path
            columns = [
                column.cast("int64").to_pylist() if "timestamp" in str(column.type) else column.to_pylist()
                for column in (table.column(name) for name in COLUMNS)
            ]
            for offset, row in zip(offsets, zip(*columns, strict=True), strict=True):
                if (partition, offset) in rows:
                    doubled.append((partition, offset))
                rows[partition, offset] = row
            others = [name for name in table.column_names if name not in COLUMNS]
            if others:
                values = table.select(others).to_pylist()
                more |= {(partition, offset): row for offset, row in zip(offsets, values, strict=True)}
    return Offline(rows, more, rejected, skipped, ends, doubled)


def read_online(repo: Path, keys: list[int]) -> dict[int, Features]:
    """The features that Feast serves, by driver."""
    return served_by(open_store(repo), keys)


def served_by(store: FeatureStore, keys: list[int]) -> dict[int, Features]:
    """The same of a store that is open."""
    view = contracts(store)[0]
    names = [f"{view.name}:{feature}" for feature in FEATURES]
    served: dict[int, Features] = {}
    for start in range(0, len(keys), 1000):
        part = keys[start : start + 1000]
        answer = store.get_online_features(names, [{KEY: key} for key in part]).to_dict()
        for index, key in enumerate(answer[KEY]):
            served[key] = tuple(answer[feature][index] for feature in FEATURES)
    return served


def verify(
    broker: str,
    topic: str,
    repo: Path,
    *,
    seen: Mapping[int, Sequence[Seen]] | None = None,
    forgotten: Sequence[Forgotten] = (),
    decode: Decode = json.loads,
) -> dict[str, int]:
    """Compare both stores and the dead letters with the truth, and return counts.

    Args:
        seen, forgotten: what was online while events came; see `Truth.went_back`.

    Raises:
        AssertionError: an event is lost, doubled, wrong, or not newest.
    """
    messages = read_topic(broker, topic)
    truth = judge(messages, decode=decode)
    offline = read_offline(contract_of(repo), topic)
    assert not offline.doubled, f"doubled offline: {offline.doubled[:5]}"
    lost = truth.accepted.keys() - offline.rows.keys()
    assert not lost, f"{len(lost)} lost offline: {sorted(lost)[:5]}"
    extra = offline.rows.keys() - truth.accepted.keys()
    assert not extra, f"{len(extra)} in the store that should not be: {sorted(extra)[:5]}"
    wrong = [origin for origin, row in truth.accepted.items() if offline.rows[origin] != row]
    assert not wrong, f"{wrong[0]}: expected {truth.accepted[wrong[0]]}, found {offline.rows[wrong[0]]}"
    events = {(m.partition, m.offset): m.value or b"" for m in messages}
    for origin, others in offline.more.items():
        event = decode(events[origin])
        assert others == {name: event.get(name) for name in others}, origin
    assert offline.rejected == len(truth.bad)
    assert offline.skipped == len(truth.skipped)
    letters = read_topic(broker, f"{topic}.dlq")
    origins = Counter((int(m.headers["headrace.partition"]), int(m.headers["headrace.offset"])) for m in letters)
    assert set(origins) == truth.bad, f"letters: {set(origins) ^ truth.bad}"
    by_origin = {(m.partition, m.offset): m for m in messages}
    for letter in letters:
        source = by_origin[int(letter.headers["headrace.partition"]), int(letter.headers["headrace.offset"])]
        assert letter.headers["headrace.reason"]
        assert letter.headers["headrace.topic"].decode() == topic
        assert (letter.key, letter.value) == (source.key, source.value)
    newest = truth.newest()
    served = read_online(repo, sorted(newest))
    behind = {key for key, row in newest.items() if served[key] != (row[1], row[2], row[3])}
    assert not behind, f"{len(behind)} keys online are not the newest: {sorted(behind)[:5]}"
    back, accounted = truth.went_back(seen or {}, forgotten)
    assert not back, f"{len(back)} times older values online: {back[:5]}"
    return {
        "messages": len(messages),
        "accepted": len(truth.accepted),
        "bad": len(truth.bad),
        "skipped": len(truth.skipped),
        "letters": len(letters),
        "keys": len(newest),
        "went back with a failover": accounted,
        "segments": len(Folder.of(contract_of(repo)).names()),
    }
