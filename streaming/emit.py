"""The stream emitter: made-up events of a view, in its schema and within its rules, some late, doubled or bad."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from confluent_kafka import KafkaError, Producer

from headrace.contract import ViewContract
from headrace.errors import ConfigError, TransientError
from headrace.progress import shown
from headrace.rules import Rule
from streaming.avro_encode import AvroEncoder, registered_schema
from streaming.broker import Broker, client_config
from streaming.security import is_loopback
from streaming.settings import StreamConfig, View, schema_registry

CHUNK = 1000
LONGEST_LATE = timedelta(days=3)
FUTURE = timedelta(days=365)
_ID_S = 0.6
_FLUSH_S = 30.0

Event = dict[str, Any]
Fault = Callable[["Maker", Event], bytes]


@dataclass(frozen=True)
class Encoding:
    """A message format: how an event becomes bytes, and the kinds of fault that an event can have in it."""

    encode: Callable[[Any], bytes]
    faults: Mapping[str, Fault]


@dataclass(frozen=True)
class Plan:
    """What to send.

    Attributes:
        rate: events a second; 0 is as fast as it goes.
        count: events without their doubles; None is until stopped.
        bad_fraction, late_fraction, duplicate_fraction: shares in [0, 1].
        seed: the same seed makes the same events, but for their times.
        keys: how many entities.
    """

    rate: float
    count: int | None
    bad_fraction: float = 0.0
    late_fraction: float = 0.0
    duplicate_fraction: float = 0.0
    seed: int | None = None
    keys: int = 1000


@dataclass(frozen=True)
class Made:
    """One event to send.

    Attributes:
        fault: the kind of fault; None for a good event.
    """

    key: bytes
    value: bytes
    fault: str | None
    is_late: bool
    is_doubled: bool


class Maker:
    """Makes events of the views of one topic. Deterministic by its seed and the clock.

    Raises:
        ConfigError: two views want a field of the same name in different types.
    """

    def __init__(self, contracts: Sequence[ViewContract], plan: Plan, encoding: Encoding | None = None) -> None:
        self.contracts = contracts
        encoding = encoding or Encoding(_json, FAULTS)
        self._plan = plan
        self._random = np.random.default_rng(plan.seed)
        self._columns: dict[str, tuple[pa.Field, Rule]] = {}
        for contract in contracts:
            for field in contract.schema:
                known = self._columns.setdefault(field.name, (field, contract.rule(field.name)))[0]
                if known.type != field.type:
                    types = f"{known.type} in one view, {field.type} in another"
                    msg = f"topic `{contract.topic}`: field `{field.name}` is {types}; name them differently"
                    raise ConfigError(msg)
        self.times = [n for c in contracts for n in (c.timestamp_field, c.created_field) if n is not None]
        self.event_time = contracts[0].timestamp_field
        self._join_keys = list(contracts[0].join_keys)
        self._encode = encoding.encode
        without = set() if self.numeric() else {"wrong_type"}
        without |= set() if self.bounded() else {"out_of_range"}
        self.faults = {kind: fault for kind, fault in encoding.faults.items() if kind not in without}

    def make(self, count: int, now: datetime) -> Iterator[Made]:
        """Make events; time features are at most 60 s before now, those of late events up to three days."""
        random, plan = self._random, self._plan
        keys = random.integers(0, plan.keys, count).tolist()
        bad = (random.random(count) < plan.bad_fraction).tolist()
        late = (random.random(count) < plan.late_fraction).tolist()
        doubled = (random.random(count) < plan.duplicate_fraction).tolist()
        delays = random.random(count).tolist()
        kinds = random.integers(0, len(self.faults), count).tolist()
        names = list(self.faults)
        columns = {
            name: self._values(field, rule, count)
            for name, (field, rule) in self._columns.items()
            if name not in self.times and name not in self._join_keys
        }
        for index in range(count):
            is_late = late[index] and not bad[index]
            delay = LONGEST_LATE * delays[index] if is_late else timedelta(milliseconds=delays[index])
            event: Event = {name: _entity(self._columns[name][0], keys[index]) for name in self._join_keys}
            event.update((name, values[index]) for name, values in columns.items())
            event.update((name, _text(now)) for name in self.times)
            event[self.event_time] = _text(now - delay)
            key = _json([event[name] for name in self._join_keys])
            if bad[index]:
                kind = names[kinds[index]]
                yield Made(key, self.faults[kind](self, event), kind, is_late=False, is_doubled=doubled[index])
            else:
                yield Made(key, self._encode(event), None, is_late=is_late, is_doubled=doubled[index])

    def encode(self, event: Event) -> bytes:
        """An event in the format of the topic."""
        return self._encode(event)

    def required(self) -> list[str]:
        """Fields that must be there."""
        return [name for name, (_, rule) in self._columns.items() if rule.nullable is not True]

    def numeric(self) -> list[str]:
        """Features that are numbers."""
        return [
            name
            for name, (field, _) in self._columns.items()
            if name not in self._join_keys and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type))
        ]

    def bounded(self) -> list[tuple[str, Rule]]:
        """Number features that have a bound."""
        return [
            (name, self._columns[name][1])
            for name in self.numeric()
            if any(bound is not None for bound in _bounds(self._columns[name][1]))
        ]

    def not_null(self) -> list[str]:
        """Fields that must not be null."""
        return [*self._join_keys, self.event_time]

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of several, at random."""
        return choices[int(self._random.integers(0, len(choices)))]

    def _values(self, field: pa.Field, rule: Rule, count: int) -> list[Any]:
        """Values within a rule."""
        kind, random = field.type, self._random
        if rule.isin is not None:
            texts = [rule.isin[i] for i in random.integers(0, len(rule.isin), count)]
            return [_number(text, kind) for text in texts]
        if pa.types.is_list(kind):
            inner = self._values(pa.field(field.name, kind.value_type), Rule(field.name), 3 * count)
            return [inner[3 * i : 3 * i + 3] for i in range(count)]
        low, high = _span(rule, whole=pa.types.is_integer(kind))
        if pa.types.is_floating(kind):
            drawn = low + (high - low) * random.random(count)
            return [round(value, 6) for value in drawn.tolist()]
        if pa.types.is_integer(kind):
            return list(random.integers(math.ceil(low), math.floor(high) + 1, count).tolist())
        if pa.types.is_boolean(kind):
            return list((random.random(count) < 0.5).tolist())
        if pa.types.is_timestamp(kind):
            return [_text(datetime.now(UTC))] * count
        return [f"value-{number}" for number in random.integers(0, 1000, count).tolist()]


def emit(config: StreamConfig, plan: Plan, *, view: str | None, anywhere: bool) -> Mapping[str, object]:
    """Send events and wait until the broker has them all.

    Returns:
        Counts: messages sent, bad ones by kind, late ones, doubles (each double is one message more).

    Raises:
        ConfigError: no such view, no such topic, or a broker elsewhere without `anywhere`.
        TransientError: the broker did not take all of them.
    """
    topic, views = _chosen(config, view)
    require_near(config, topic, anywhere=anywhere)
    if topic not in Broker(config).partitions():
        msg = f"broker {config.bootstrap} has no topic `{topic}`; create it first"
        raise ConfigError(msg)
    maker = Maker([v.contract for v in views], plan, _encoding(config, topic, views))
    sender = Sender(config, topic)
    bad: Counter[str] = Counter()
    late = doubled = 0
    begun_s = time.monotonic()
    with shown(f"emit to {topic}") as meter:
        try:
            for number, made in enumerate(_paced(maker, plan), 1):
                sender.send(made)
                late += made.is_late
                doubled += made.is_doubled
                if made.fault is not None:
                    bad[made.fault] += 1 + made.is_doubled
                meter.update(number, plan.count, "events")
        except KeyboardInterrupt:
            pass  # as asked: what was sent is counted below
        meter.say("waiting for the broker to take all")
        sender.finish()
    return {
        "topic": topic,
        "sent": sender.sent,
        "bad": dict(sorted(bad.items())),
        "late": late,
        "doubled": doubled,
        "seconds": round(time.monotonic() - begun_s, 3),
    }


def require_near(config: StreamConfig, topic: str, *, anywhere: bool) -> None:
    """Check that made-up events stay on this machine, or may go elsewhere.

    Raises:
        ConfigError: the broker is elsewhere, without `anywhere`.
    """
    far = [server for server in config.servers if not is_loopback(server.rpartition(":")[0])]
    if far and not anywhere:
        msg = f"{', '.join(far)} is not on this machine; add --yes to send made-up events to `{topic}` there"
        raise ConfigError(msg)


class Sender:
    """A producer that keeps the order of a key and misses nothing.

    Args:
        taken: called with each event that the broker has, its partition and its offset, from within these methods.
    """

    def __init__(self, config: StreamConfig, topic: str, taken: Callable[[Made, int, int], None] | None = None) -> None:
        own = {
            "enable.idempotence": True,
            "linger.ms": 5,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 200_000,
        }
        self._producer = Producer(client_config(config) | own)
        # Until it has its id the first events would wait in it, half a second, and count as so much less fresh.
        self._producer.poll(_ID_S)
        self._topic = topic
        self._taken = taken
        self._failed: KafkaError | None = None
        self.sent = 0

    def send(self, made: Made) -> None:
        """Send an event, and again if it is doubled."""
        for _ in range(2 if made.is_doubled else 1):
            while True:
                try:
                    self._producer.produce(
                        self._topic, made.value, made.key, on_delivery=functools.partial(self._settle, made)
                    )
                    break
                except BufferError:
                    self._producer.poll(0.1)
            self.sent += 1
            if self.sent % CHUNK == 0:
                self.poll()
        if self._failed is not None:
            self.finish()

    def poll(self) -> None:
        """Hear what the broker has taken meanwhile."""
        self._producer.poll(0)

    def finish(self) -> None:
        """Wait for the broker's word on everything.

        Raises:
            TransientError: it did not take all.
        """
        left = self._producer.flush(_FLUSH_S)
        if left or self._failed is not None:
            why = self._failed.str() if self._failed is not None else f"no answer within {_FLUSH_S:g} s"
            msg = f"topic `{self._topic}`: {left or 'some'} of {self.sent} events were not taken: {why}"
            raise TransientError(msg)

    def _settle(self, made: Made, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self._failed = error
        elif self._taken is not None:
            self._taken(made, message.partition(), message.offset())


def _paced(maker: Maker, plan: Plan) -> Iterator[Made]:
    """Events at the plan's rate, each dated when it is due."""
    if plan.rate == 0:
        left = plan.count
        while left is None or left > 0:
            size = CHUNK if left is None else min(CHUNK, left)
            yield from maker.make(size, datetime.now(UTC))
            left = None if left is None else left - size
        return
    begun_s = time.monotonic()
    size = max(1, min(CHUNK, int(plan.rate / 20)))
    done = 0
    for _ in itertools.count():
        if plan.count is not None:
            size = min(size, plan.count - done)
            if size == 0:
                return
        pause_s = begun_s + done / plan.rate - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        yield from maker.make(size, datetime.now(UTC))
        done += size


def _chosen(config: StreamConfig, view: str | None) -> tuple[str, tuple[View, ...]]:
    """The topic to send to, and the views that read it."""
    if view is not None:
        for topic, views in config.views.items():
            if any(v.contract.name == view for v in views):
                return topic, views
        known = ", ".join(v.contract.name for views in config.views.values() for v in views)
        msg = f"unknown feature view `{view}`; those with a topic: {known}"
        raise ConfigError(msg)
    if len(config.views) > 1:
        msg = f"the views have several topics ({', '.join(config.views)}); choose one of their views with --view"
        raise ConfigError(msg)
    return next(iter(config.views.items()))


def _encoding(config: StreamConfig, topic: str, views: tuple[View, ...]) -> Encoding:
    """The format of a topic's records; with a schema registry, the latest schema of its subject there."""
    contract = views[0].contract
    if contract.message_format != "avro":
        return Encoding(_json, FAULTS)
    registry = schema_registry(config.settings)
    if registry is None:
        where = f"feature view `{contract.name}`: the schema_json of its AvroFormat"
        encoder = AvroEncoder(where, contract.message_schema or "")
    else:
        found = registered_schema(registry, topic)
        where = f"{registry.url}, schema id {found.id}"
        encoder = AvroEncoder(where, found.text, found.references, found.id)
    faults = dict(AVRO_FAULTS)
    needed = [*contract.join_keys, contract.timestamp_field]
    if encoder.nullable().issuperset(needed):
        faults["null"] = _null
    if encoder.is_framed:
        faults["unknown_schema"] = _unknown_schema
    return Encoding(encoder, faults)


def _entity(field: pa.Field, number: int) -> Any:
    """The number-th entity, as a value of a join key."""
    if pa.types.is_integer(field.type):
        return 1001 + number
    if pa.types.is_floating(field.type):
        return float(1001 + number)
    return f"{field.name}-{number}"


def _bounds(rule: Rule) -> tuple[float | None, ...]:
    return (rule.ge, rule.le, rule.gt, rule.lt)


def _span(rule: Rule, *, whole: bool) -> tuple[float, float]:
    """A closed interval within a rule; a thousand wide where one side is open."""
    step = 1.0 if whole else 1e-6
    low = rule.ge if rule.ge is not None else (rule.gt + step if rule.gt is not None else None)
    high = rule.le if rule.le is not None else (rule.lt - step if rule.lt is not None else None)
    if low is None:
        low = 0.0 if high is None else high - 1000.0
    return low, low + 1000.0 if high is None else high


def _number(text: str, kind: pa.DataType) -> Any:
    if pa.types.is_integer(kind):
        return int(text)
    return float(text) if pa.types.is_floating(kind) else text


_json = msgspec.json.Encoder().encode


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def _not_json(maker: Maker, event: Event) -> bytes:
    return maker.encode(event)[:-1] + b"\xff"


def _not_an_object(maker: Maker, event: Event) -> bytes:
    return maker.encode(list(event.values()))  # type: ignore[arg-type]


def _wrong_type(maker: Maker, event: Event) -> bytes:
    return maker.encode(event | dict.fromkeys(maker.numeric()[:1], "many"))


def _missing_field(maker: Maker, event: Event) -> bytes:
    gone = maker.pick(maker.required())
    return maker.encode({name: value for name, value in event.items() if name != gone})


def _null(maker: Maker, event: Event) -> bytes:
    return maker.encode(event | {maker.pick(maker.not_null()): None})


def _out_of_range(maker: Maker, event: Event) -> bytes:
    name, rule = maker.pick(maker.bounded())
    top = next((b for b in (rule.le, rule.lt) if b is not None), None)
    bottom = next((b for b in (rule.ge, rule.gt) if b is not None), None)
    value = int(top) + 2 if top is not None else int(bottom or 0) - 2
    return maker.encode(event | {name: value})


def _bad_timestamp(maker: Maker, event: Event) -> bytes:
    return maker.encode(event | {maker.event_time: "2021-02-30 25:61:00"})


def _epoch_seconds(maker: Maker, event: Event) -> bytes:
    return maker.encode(event | {maker.event_time: int(time.time())})


def _epoch_milliseconds(maker: Maker, event: Event) -> bytes:
    return maker.encode(event | {maker.event_time: int(time.time() * 1000)})


def _future(maker: Maker, event: Event) -> bytes:
    return maker.encode(event | {maker.event_time: _text(datetime.now(UTC) + FUTURE)})


FAULTS: Mapping[str, Fault] = {
    "not_json": _not_json,
    "not_an_object": _not_an_object,
    "wrong_type": _wrong_type,
    "missing_field": _missing_field,
    "null": _null,
    "out_of_range": _out_of_range,
    "bad_timestamp": _bad_timestamp,
    "epoch_seconds": _epoch_seconds,
    "epoch_milliseconds": _epoch_milliseconds,
    "future": _future,
}
"""Every kind of bad event in JSON, by name."""


def _cut(maker: Maker, event: Event) -> bytes:
    return maker.encode(event)[:-1]


def _more_bytes(maker: Maker, event: Event) -> bytes:
    return maker.encode(event) + b"\0"


def _unknown_schema(maker: Maker, event: Event) -> bytes:
    return b"\0\xff\xff\xff\xff" + maker.encode(event)[5:]


AVRO_FAULTS: Mapping[str, Fault] = {
    "cut": _cut,
    "more_bytes": _more_bytes,
    "out_of_range": _out_of_range,
    "future": _future,
}
"""The kinds of bad event that any Avro schema allows; `null` and `unknown_schema` are where they can be."""
