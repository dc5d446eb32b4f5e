"""Dead letters, read back: which there are, why, and from where. Changes nothing; no group commits anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from confluent_kafka import Message

from headrace.errors import ConfigError
from streaming.broker import Broker, parse_time_ms
from streaming.deadletters import PREFIX, topic_of
from streaming.ranges import records_between
from streaming.settings import StreamConfig

CHUNK_RECORDS = 10_000


@dataclass(frozen=True)
class Choice:
    """Which letters are meant. None leaves a part open.

    Attributes:
        since_ms: turned away at or after this time, milliseconds since the epoch.
    """

    topic: str | None = None
    view: str | None = None
    reason: str | None = None
    since_ms: int | None = None


@dataclass(frozen=True)
class StoredLetter:
    """A letter as the broker has it.

    Attributes:
        partition, offset: where the letter lies in the dead-letter topic.
        written_ms: when it was written, milliseconds since the epoch.
        view, reason, field, message: who turned the record away, and why.
        origin_partition, origin_offset, topic_id: the record's own place; the id is None where the broker has none.
        value: the record's bytes.
        size: how many bytes the record had; more than `value` has where the broker refused the whole.
    """

    topic: str
    partition: int
    offset: int
    written_ms: int
    view: str
    reason: str
    field: str
    message: str
    origin_partition: int
    origin_offset: int
    topic_id: str | None
    value: bytes | None
    size: int

    @property
    def is_cut(self) -> bool:
        """Whether the record's bytes are not all there."""
        return self.size > len(self.value or b"")

    def fits(self, choice: Choice) -> bool:
        """Whether it is meant."""
        return choice.view in (None, self.view) and choice.reason in (None, self.reason)


@dataclass
class Group:
    """Letters of one view for one reason about one field."""

    count: int = 0
    first_ms: int = 0
    last_ms: int = 0
    example: str = ""

    def add(self, letter: StoredLetter) -> None:
        """Count one more; the latest message is the example."""
        self.first_ms = min(self.first_ms, letter.written_ms) if self.count else letter.written_ms
        if letter.written_ms >= self.last_ms:
            self.last_ms, self.example = letter.written_ms, letter.message
        self.count += 1


@dataclass
class Survey:
    """What letters there are.

    Attributes:
        groups: by view, reason and field.
        newest: the latest letters, oldest first.
        foreign: records of the dead-letter topics that are no letters of ours.
    """

    groups: dict[tuple[str, str, str], Group] = field(default_factory=dict)
    newest: list[StoredLetter] = field(default_factory=list)
    foreign: int = 0

    @property
    def count(self) -> int:
        """How many letters."""
        return sum(group.count for group in self.groups.values())


def survey(
    config: StreamConfig, choice: Choice, newest: int = 0, progress: Callable[[int, int], None] | None = None
) -> Survey:
    """Count the letters that are there now, and keep some of the newest. Memory is bounded.

    Raises:
        ConfigError: no view has the topic.
        BrokerError: the broker does not answer.
    """
    found = Survey()
    for letters, foreign in read(config, choice, progress):
        found.foreign += foreign
        for letter in letters:
            found.groups.setdefault((letter.view, letter.reason, letter.field), Group()).add(letter)
        if newest:
            found.newest = sorted([*found.newest, *letters], key=lambda letter: letter.written_ms)[-newest:]
    return found


def read(
    config: StreamConfig, choice: Choice, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[list[StoredLetter], int]]:
    """The letters that are there when it is called, topic by topic, in chunks of at most `CHUNK_RECORDS`.

    Yields:
        Those that are meant, and how many records of the chunk are no letters.

    Raises:
        ConfigError: no view has the topic.
        BrokerError: the broker does not answer.
    """
    topics = [choice.topic] if choice.topic is not None else list(config.views)
    for topic in topics:
        config.views_of(topic)
    broker = Broker(config)
    present = broker.partitions()
    wanted = {topic_of(topic): present[topic_of(topic)] for topic in topics if topic_of(topic) in present}
    logs = {(name, n): broker.log(name, n) for name, count in wanted.items() for n in range(count)}
    starts = {place: log.earliest for place, log in logs.items()}
    if choice.since_ms is not None:
        for name, count in wanted.items():
            starts.update({(name, n): at for n, at in broker.offsets_at(name, count, choice.since_ms).items()})
    open_ends = {place: log.latest for place, log in logs.items() if starts[place] < log.latest}
    total, done = sum(open_ends[place] - starts[place] for place in open_ends), 0
    for messages in records_between(config, starts, open_ends, CHUNK_RECORDS):
        done += len(messages)
        letters = [_letter(message) for message in messages]
        known = [letter for letter in letters if letter is not None]
        yield [letter for letter in known if letter.fits(choice)], len(letters) - len(known)
        if progress is not None:
            progress(done, total)


def between(
    config: StreamConfig, starts: Mapping[tuple[str, int], int], ends: Mapping[tuple[str, int], int], *, at_once: int
) -> Iterator[StoredLetter]:
    """The letters of some ranges of dead-letter topics, by topic and partition; what is no letter is passed over.

    Args:
        at_once: how many may be in memory.

    Raises:
        BrokerError: the broker does not answer.
    """
    for messages in records_between(config, starts, ends, at_once):
        yield from (letter for message in messages if (letter := _letter(message)) is not None)


def parse_since(text: str) -> int:
    """A time such as 2026-01-31T12:00:00Z, or a span back from now such as 90m, 6h or 7d, as milliseconds.

    Raises:
        ConfigError: it is neither.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    if text[:-1].isdecimal() and text[-1:] in units:
        return int((time.time() - int(text[:-1]) * units[text[-1]]) * 1000)
    try:
        return parse_time_ms(text)
    except ValueError:
        msg = f"--since {text}: expected a time such as 2026-01-31T12:00:00Z, or a span such as 90m, 6h or 7d"
        raise ConfigError(msg) from None


def _letter(message: Message) -> StoredLetter | None:
    """A record as a letter; None if it has not our headers. Of two the last counts: ours stand behind the record's."""
    found: dict[str, str] = {}
    for name, value in cast("list[tuple[str, bytes | str | None]]", message.headers() or []):
        if name.startswith(PREFIX):
            text = value if isinstance(value, str) else (value or b"").decode("utf-8", "replace")
            found[name.removeprefix(PREFIX)] = text
    value = message.value()
    try:
        return StoredLetter(
            topic=found["topic"],
            partition=int(message.partition() or 0),
            offset=int(message.offset() or 0),
            written_ms=message.timestamp()[1],
            view=found["view"],
            reason=found["reason"],
            field=found["field"],
            message=found["message"],
            origin_partition=int(found["partition"]),
            origin_offset=int(found["offset"]),
            topic_id=found["topic_id"] or None,
            value=value,
            size=int(found.get("size", len(value or b""))),
        )
    except (KeyError, ValueError):
        return None
