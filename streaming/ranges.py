"""Ranges of topics, read once and in chunks. No group commits anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from streaming.broker import BrokerError, client_config
from streaming.settings import StreamConfig

_PAUSE_S = 1.0


def records_between(
    config: StreamConfig,
    starts: Mapping[tuple[str, int], int],
    ends: Mapping[tuple[str, int], int],
    at_once: int,
) -> Iterator[Sequence[Message]]:
    """The committed records between starts and ends, by topic and partition, in chunks of at most `at_once`.

    When it ends, every range was read to its end: an offset that did not come has no committed record.

    Raises:
        BrokerError: the broker does not answer, has no longer what is asked for, or lets nobody read as far as that
            within its time: a transaction is open before the end, or a leader recovers.
    """
    if not ends:
        return
    timeout_s = config.settings.broker_timeout_seconds
    own = {
        "group.id": config.group,
        "enable.auto.commit": False,
        "allow.auto.create.topics": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "error",  # by default what the topic lost is passed over in silence, with all the rest
        "enable.partition.eof": True,
        "queued.max.messages.kbytes": 65_536,
        "fetch.message.max.bytes": 4 << 20,
    }
    consumer = Consumer(client_config(config) | own)
    waiting = dict(ends)
    reached: dict[tuple[str, int], int] = {}
    try:
        consumer.assign([TopicPartition(*place, starts[place]) for place in ends])
        silent_s = 0.0
        while waiting:
            batch = []
            for message in consumer.consume(at_once, timeout=_PAUSE_S):
                error = message.error()
                if error is None:
                    batch.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    reached[place_of(message)] = message.offset() or 0
                else:
                    msg = f"{message.topic()} cannot be read: {error.str()}; run again"
                    raise BrokerError(msg)
            silent_s = 0.0 if batch else silent_s + _PAUSE_S
            if silent_s > timeout_s:
                raise BrokerError(_why_silent(config, waiting, reached))
            inside = [message for message in batch if (message.offset() or 0) < ends[place_of(message)]]
            if inside:
                yield inside
            for place in list(waiting):
                at = consumer.position([TopicPartition(*place)])[0].offset
                if max(at, reached.get(place, 0)) >= waiting[place]:
                    del waiting[place]
                    consumer.incremental_unassign([TopicPartition(*place)])
    except KafkaException as error:
        msg = f"{config.bootstrap} cannot be read: {error.args[0].str()}; run again"
        raise BrokerError(msg) from error
    finally:
        consumer.close()


def _why_silent(
    config: StreamConfig, waiting: Mapping[tuple[str, int], int], reached: Mapping[tuple[str, int], int]
) -> str:
    timeout_s = config.settings.broker_timeout_seconds
    for (topic, partition), end in waiting.items():
        if (topic, partition) in reached:
            return short_of(topic, partition, reached[topic, partition], end)
    return f"broker {config.bootstrap} sent no record for {timeout_s:g} s; check that it runs, run again"


def short_of(topic: str, partition: int, reached: int, end: int) -> str:
    """What to say of a log that cannot be read as far as it should be."""
    return (
        f"{topic}[{partition}] can be read up to offset {reached} now, not up to {end}: a transaction is open there, "
        "or a leader recovers; run again when that is over"
    )


def place_of(message: Message) -> tuple[str, int]:
    """The topic and partition of a record."""
    return str(message.topic()), int(message.partition() or 0)
