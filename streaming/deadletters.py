"""Dead letters: what was turned away goes to `<topic>.dlq`, untouched, with why and from where.

Headers, after the record's own, are those of `HEADERS`. A payload that the broker refuses for its size is cut to its
first 64 kB; a record that could not be unpacked is empty.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from headrace import __version__
from headrace.conform import Reject
from headrace.errors import TransientError
from streaming.slices import Record, TopicPartition, Unread

SUFFIX = ".dlq"
KEPT_BYTES = 64 * 1024
PREFIX = "headrace."
HEADERS = {
    "view": "the feature view that turned it away; a record that two views turn away is two letters",
    "reason": "why, one of the words below",
    "field": "the field at fault; empty where it is the whole record",
    "message": "what was expected and found, the value shortened",
    "topic": "the topic that it comes from",
    "topic_id": "that topic's id; empty where the broker has none",
    "partition": "the partition there",
    "offset": "the offset there",
    "timestamp_ms": "its Kafka timestamp, milliseconds since the epoch",
    "writer": "`headrace` and the version",
    "size": "bytes of the whole value, where this one is cut to its first 64 kB; `1` where it could not be unpacked",
    "sha256": "of the whole value, hexadecimal, where this one is cut",
}
"""What each header holds, by its name behind the prefix."""

Headers = list[tuple[str, str | bytes | None]]


def topic_of(topic: str) -> str:
    """The dead-letter topic of a topic."""
    return topic + SUFFIX


@dataclass(frozen=True)
class Letter:
    """A record that was turned away."""

    view: str
    origin: TopicPartition
    topic_id: str | None
    record: Record
    reject: Reject

    def headers(self) -> Headers:
        """The record's own headers, then ours."""
        ours = {
            "view": self.view,
            "reason": self.reject.reason.value,
            "field": self.reject.field or "",
            "message": self.reject.message,
            "topic": self.origin.topic,
            "topic_id": self.topic_id or "",
            "partition": str(self.origin.partition),
            "offset": str(self.record.offset),
            "timestamp_ms": str(self.record.timestamp),
            "writer": f"headrace {__version__}",
        }
        if isinstance(self.record.value, Unread):
            ours["size"] = "1"  # more than is here; nobody knows how much
        own: Headers = [(str(key), value) for key, value in self.record.headers]
        return own + [(PREFIX + key, text.encode("utf-8", "replace")) for key, text in ours.items()]


class DeadLetterError(TransientError):
    """The broker did not acknowledge every dead letter."""


class DeadLetterWriter:
    """Writes dead letters and waits for the broker's word. Blocking; one thread at a time.

    At least once: a repeat writes again.
    """

    def __init__(self, client_config: dict[str, Any], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # Nothing is refused here for its size: the broker decides, and its word is acted upon.
        own = {
            "enable.idempotence": True,
            "linger.ms": 5,
            "message.max.bytes": 1_000_000_000,
            "batch.size": 500_000,
            "message.timeout.ms": int(timeout_s * 1000),
            "queue.buffering.max.messages": 1_000_000,
            "compression.type": "zstd",
        }
        self._producer = Producer(client_config | own)

    def write(self, letters: Sequence[Letter]) -> None:
        """Write letters to the topics they belong to; return when the broker has all of them.

        Raises:
            DeadLetterError: it does not have all of them within the time; some may be written.
        """
        refused = self._send([(letter, letter.record.value, letter.headers()) for letter in letters])
        if refused:
            # The broker refuses whole batches: small ones go again as they are, each by itself.
            again = [one for letter in refused for one in self._send([self._cut(letter)])]
            if again:
                msg = f"{topic_of(letters[0].origin.topic)}: the broker refuses {len(again)} letters even when cut"
                raise DeadLetterError(msg)

    def close(self) -> None:
        """Let go of the connections."""
        self._producer.flush(0)

    def _send(self, messages: list[tuple[Letter, bytes | None, Headers]]) -> list[Letter]:
        """Send and wait; the letters that are too large for the broker."""
        open_count = len(messages)
        too_large: list[Letter] = []
        failed: list[KafkaError] = []

        def settle(letter: Letter, error: KafkaError | None) -> None:
            nonlocal open_count
            open_count -= 1
            if error is not None and error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                too_large.append(letter)
            elif error is not None:
                failed.append(error)

        deadline = time.monotonic() + self._timeout_s
        for letter, value, headers in messages:
            try:
                self._produce(letter, value, headers, settle, deadline)
            except KafkaException as error:
                settle(letter, error.args[0])
        while open_count and time.monotonic() < deadline + 1:
            self._producer.poll(0.05)
        if open_count or failed:
            why = failed[0].str() if failed else f"no answer within {self._timeout_s:g} s"
            topic = topic_of(messages[0][0].origin.topic)
            msg = f"{topic}: {open_count + len(failed)} of {len(messages)} letters were not acknowledged: {why}"
            raise DeadLetterError(msg)
        return too_large

    def _produce(self, letter: Letter, value: bytes | None, headers: Headers, settle: Any, deadline: float) -> None:
        while True:
            try:
                self._producer.produce(
                    topic_of(letter.origin.topic),
                    value=value,
                    key=letter.record.key,
                    headers=headers,
                    on_delivery=lambda error, _: settle(letter, error),
                )
            except BufferError:
                if time.monotonic() > deadline:
                    msg = f"{topic_of(letter.origin.topic)}: the client's buffer stays full"
                    raise DeadLetterError(msg) from None
                self._producer.poll(0.05)
            else:
                self._producer.poll(0)
                return

    @staticmethod
    def _cut(letter: Letter) -> tuple[Letter, bytes | None, Headers]:
        value, headers = letter.record.value, letter.headers()
        if value is not None and len(value) > KEPT_BYTES:
            headers.append((PREFIX + "sha256", hashlib.sha256(value).hexdigest().encode()))
            headers.append((PREFIX + "size", str(len(value)).encode()))
            value = value[:KEPT_BYTES]
        return letter, value, headers
