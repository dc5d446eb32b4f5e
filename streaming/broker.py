"""What is asked of the broker beside fetching: topics, their ids, the ends of their logs. By librdkafka, in threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from headrace.errors import TransientError
from streaming.security import librdkafka_settings, token_source
from streaming.settings import StreamConfig

_EMBEDDED = "mockCluster"
"""How the cluster id of librdkafka's mock cluster begins: it has no topic ids, and cannot create topics on request."""

_REFUSALS = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
_ADVICE = {
    KafkaError._AUTHENTICATION: "check HEADRACE_SASL_MECHANISM, its user and its password",
    KafkaError._SSL: "check HEADRACE_TLS_CA_FILE, and that the broker's certificate names the host of HEADRACE_BROKER",
    KafkaError._TRANSPORT: (
        "check that it runs, HEADRACE_BROKER, and that HEADRACE_SECURITY_PROTOCOL is that of its listener"
    ),
}
"""What to do, by what was heard; the first that fits, or the last."""

Result = TypeVar("Result")


class BrokerError(TransientError):
    """The broker did not answer, or answered that it cannot now."""


@dataclass(frozen=True)
class Log:
    """The offsets that a partition's log lets everybody read now: `[earliest, latest)`.

    Records of a transaction that is open, and what came after its first one, lie behind `latest`.
    """

    earliest: int
    latest: int


@dataclass(frozen=True)
class Group:
    """The workers of the group, as the broker knows them.

    Attributes:
        state: Kafka's own word: `stable`, `preparing_rebalancing` and so on.
        members: how many workers.
        owners: who has each partition, its host and the end of its member id; nobody has what is not in it.
    """

    state: str
    members: int
    owners: Mapping[tuple[str, int], str]


def client_config(config: StreamConfig) -> dict[str, Any]:
    """The settings of a librdkafka client. Holds the secrets: never log it."""
    return {
        "bootstrap.servers": config.bootstrap,
        "client.id": config.group,
        "log_level": 0,
        **librdkafka_settings(config.settings),
    }


def parse_time_ms(text: str) -> int:
    """A time in ISO 8601, UTC where it names no zone, as the broker counts it: milliseconds since the epoch.

    Raises:
        ValueError: it is none.
    """
    moment = datetime.fromisoformat(text)
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return int(aware.timestamp() * 1000)


class Broker:
    """The broker, asked. Blocking, thread-safe; every call ends within the timeout or raises `BrokerError`.

    What only a real broker answers is not asked of an embedded one.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._config = config
        self._timeout_s = config.settings.broker_timeout_seconds
        self._heard: dict[int, str] = {}
        self._admin = AdminClient(client_config(config) | {"error_cb": self._hear})
        self._watcher: Consumer | None = None
        self._lock = threading.Lock()
        self._topic_ids: dict[str, tuple[float, str | None]] = {}
        self._embedded: bool | None = None

    def partitions(self) -> Mapping[str, int]:
        """The topics that the broker has, with the number of their partitions. Creates none."""
        cluster = self._ask(lambda: self._admin.list_topics(timeout=self._timeout_s))
        self._embedded = str(cluster.cluster_id).startswith(_EMBEDDED)
        return {name: len(topic.partitions) for name, topic in cluster.topics.items() if topic.error is None}

    def create_topic(self, topic: str, partitions: int) -> None:
        """Create a topic with the broker's own replication; fine if another was first."""
        if self.is_embedded():
            self._ask(lambda: self._admin.list_topics(topic, timeout=self._timeout_s))
            return
        creation = self._admin.create_topics([NewTopic(topic, partitions)])[topic]
        self._ask_unless(KafkaError.TOPIC_ALREADY_EXISTS, lambda: creation.result(self._timeout_s))

    def delete_topic(self, topic: str) -> None:
        """Delete a topic; fine if there is none."""
        deletion = self._admin.delete_topics([topic])[topic]
        self._ask_unless(KafkaError.UNKNOWN_TOPIC_OR_PART, lambda: deletion.result(self._timeout_s))

    def groups(self) -> set[str]:
        """The consumer groups that the broker shows us."""
        listing = self._ask(lambda: self._admin.list_consumer_groups(request_timeout=self._timeout_s).result())
        return {group.group_id for group in listing.valid}

    def delete_group(self, group: str) -> None:
        """Delete a group and what it committed; fine if there is none.

        Raises:
            BrokerError: also while it has members.
        """
        deletion = self._admin.delete_consumer_groups([group], request_timeout=self._timeout_s)[group]
        self._ask_unless(KafkaError.GROUP_ID_NOT_FOUND, lambda: deletion.result(self._timeout_s))

    def topic_id(self, topic: str, not_before_s: float = 0.0) -> str | None:
        """The id of a topic, as heard after a moment of the monotonic clock; None where the broker has no ids.

        Raises:
            BrokerError: also when there is no such topic now.
        """
        with self._lock:
            heard = self._topic_ids.get(topic)
        if heard is not None and heard[0] >= not_before_s > 0:
            return heard[1]
        if self.is_embedded():
            return None
        asked_s = time.monotonic()
        try:
            description = self._ask(
                lambda: self._admin.describe_topics(TopicCollection([topic]), request_timeout=self._timeout_s)[
                    topic
                ].result(self._timeout_s)
            )
        except BrokerError:
            # It asks the controller. Of one that took over from another it hears by itself only within five minutes.
            self.partitions()
            raise
        topic_id = None if description.topic_id is None else str(description.topic_id)
        with self._lock:
            self._topic_ids[topic] = (asked_s, topic_id)
        return topic_id

    def log(self, topic: str, partition: int) -> Log:
        """The ends of a partition's log."""
        return self._ask(lambda: self._ends(topic, partition))

    def logs(self, partitions: Mapping[str, int]) -> Mapping[tuple[str, int], Log]:
        """The ends of the logs of whole topics, in two questions; partitions that have no leader now are left out.

        Args:
            partitions: how many each topic has.
        """
        places = [TopicPartition(topic, number) for topic, count in partitions.items() for number in range(count)]
        if not places:
            return {}
        earliest = self._ask(lambda: self._offsets(places, OffsetSpec.earliest()))  # type: ignore[no-untyped-call]
        latest = self._ask(lambda: self._offsets(places, OffsetSpec.latest()))  # type: ignore[no-untyped-call]
        return {place: Log(earliest[place], latest[place]) for place in latest if place in earliest}

    def _offsets(self, places: Sequence[TopicPartition], which: OffsetSpec) -> dict[tuple[str, int], int]:
        asked = self._admin.list_offsets(
            dict.fromkeys(places, which),
            isolation_level=IsolationLevel.READ_COMMITTED,
            request_timeout=self._timeout_s,
        )
        found: dict[tuple[str, int], int] = {}
        fault: KafkaException | None = None
        for place, answer in asked.items():
            try:
                found[place.topic, place.partition] = answer.result(self._timeout_s).offset
            except KafkaException as error:
                fault = error
        if fault is not None and not found:
            raise fault
        return found

    def group(self) -> Group:
        """Who is in the group now, and has which partition."""
        group = self._config.group
        asked = self._admin.describe_consumer_groups([group], request_timeout=self._timeout_s)[group]
        found = self._ask(lambda: asked.result(self._timeout_s))
        owners = {
            (place.topic, place.partition): f"{member.host.lstrip('/')} …{member.member_id[-6:]}"
            for member in found.members
            for place in (member.assignment.topic_partitions if member.assignment is not None else ())
        }
        return Group(found.state.name.lower(), len(found.members), owners)

    def offsets_at(self, topic: str, partitions: int, time_ms: int) -> Mapping[int, int]:
        """For each partition the first offset produced at or after a time; the log's end if there is none."""
        wanted = [TopicPartition(topic, number, time_ms) for number in range(partitions)]
        found = self._ask(lambda: self._consumer().offsets_for_times(wanted, timeout=self._timeout_s))
        return {
            item.partition: item.offset if item.offset >= 0 else self.log(topic, item.partition).latest
            for item in found
        }

    def group_offsets(self, topic: str, partitions: int) -> Mapping[int, int]:
        """What the group committed, by partition; partitions without a commit are left out."""
        wanted = [TopicPartition(topic, number) for number in range(partitions)]
        found = self._ask(lambda: self._consumer().committed(wanted, timeout=self._timeout_s))
        return {item.partition: item.offset for item in found if item.offset >= 0}

    def close(self) -> None:
        """Let go of the connections."""
        if self._watcher is not None:
            self._watcher.close()

    def _ends(self, topic: str, partition: int) -> Log:
        consumer = self._consumer()
        where = TopicPartition(topic, partition)
        try:
            return Log(*consumer.get_watermark_offsets(where, timeout=self._timeout_s, cached=False))
        except KafkaException as error:
            if error.args[0].code() != KafkaError._UNKNOWN_PARTITION:
                raise
            # By itself the client hears of a partition that was added only within five minutes.
            consumer.list_topics(topic, timeout=self._timeout_s)
            return Log(*consumer.get_watermark_offsets(where, timeout=self._timeout_s, cached=False))

    def is_embedded(self) -> bool:
        """Whether it is librdkafka's mock cluster."""
        if self._embedded is None:
            self.partitions()
        return bool(self._embedded)

    def _consumer(self) -> Consumer:
        with self._lock:
            if self._watcher is None:
                group = {
                    "group.id": self._config.group,
                    "enable.auto.commit": False,
                    "allow.auto.create.topics": False,
                    "isolation.level": "read_committed",
                }
                self._watcher = Consumer(client_config(self._config) | group)
            return self._watcher

    def _ask_unless(self, fine: int, question: Callable[[], object]) -> None:
        """Ask for something to be done; an answer with one code means that it was done before."""
        try:
            self._ask(question)
        except BrokerError as error:
            cause = error.__cause__
            if not (isinstance(cause, KafkaException) and cause.args[0].code() == fine):
                raise

    def _ask(self, question: Callable[[], Result]) -> Result:
        self._admin.poll(0)  # what waits to be heard would pile up
        self._heard.clear()
        try:
            return question()
        except KafkaException as error:
            fault: KafkaError = error.args[0]
            if fault.code() >= 0:
                advice = "; docs/how-to/security.md names the rights that it needs" * (fault.code() in _REFUSALS)
                raise BrokerError(f"broker {self._config.bootstrap} answered: {fault.str()}{advice}") from error
            raise BrokerError(self._why(fault.str())) from error
        except TimeoutError as error:
            raise BrokerError(self._why("timed out")) from error

    def _hear(self, error: KafkaError) -> None:
        """What a client says of its connections, in `poll`."""
        self._heard[error.code()] = error.str()

    def _why(self, reason: str) -> str:
        """Why there was no answer.

        Raises:
            TokenError: because there is no token.
        """
        settings = self._config.settings
        if settings.uses_token:
            token_source(settings, self._timeout_s).fetch()
        self._admin.poll(0)
        code = next((code for code in _ADVICE if code in self._heard), KafkaError._TRANSPORT)
        reason = self._heard.get(code, reason)
        return (
            f"broker {self._config.bootstrap} did not answer within {self._timeout_s:g} s ({reason}); {_ADVICE[code]}"
        )
