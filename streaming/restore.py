"""Restore: segments that are damaged or gone are read again from the topic, and put where they were.

The steps are the stream's, in its order: decode, dead letters, online, and the segment last. What was done before a
kill stays; the next run goes on with the holes that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from confluent_kafka import Message
from feast import FeatureStore

from headrace.damage import Condition, Hole, chains_of, examine, fill, set_aside
from headrace.encode import Origin, stream_tails
from headrace.errors import ConfigError
from headrace.online import server_ids, write_online
from headrace.replays import ReplayLedger
from headrace.repository import open_store
from headrace.segments import Footer, Offsets, new_append_id, parse_stream_chain, time_bounds, writer_id
from streaming.broker import Broker, Log, client_config
from streaming.deadletters import DeadLetterWriter, Letter
from streaming.formats import decoder_of, patiently
from streaming.judgement import judge
from streaming.ranges import records_between
from streaming.settings import StreamConfig, View, schema_registry
from streaming.slices import TopicPartition


@dataclass(frozen=True)
class Reread:
    """A record that was read again, as `streaming.slices.Record` describes it."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]

    @classmethod
    def of(cls, message: Message) -> Reread:
        """A record of the client."""
        headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
        return cls(
            message.offset() or 0, message.timestamp()[1], _bytes(message.key()), _bytes(message.value()), headers
        )


def restore(
    config: StreamConfig,
    topic: str,
    *,
    only: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, object]:
    """Set damaged segments of a topic's ledgers aside, and fill the holes from the topic. May be killed and repeated.

    Runs beside workers, unless the file that ended a chain is damaged: they know where it ended, and would go on behind
    what is missing.

    Args:
        only: the view; None for all of the topic.
        dry_run: examine, and change nothing.
        progress: called with offsets read again and offsets to read, after each segment.

    Returns:
        `ok`: whether every chain is sound now, or in a dry run was; by view and chain what was `damaged`, which offsets
        were `restored`, and which are `lost` since the topic no longer has them.

    Raises:
        ConfigError: no such view or topic; the topic is not that of the chain; it has lost what is missing, without
            HEADRACE_ALLOW_GAPS; workers run that must not.
        TransientError: the broker or a store does not answer; run again.
    """
    views = [view for view in config.views_of(topic) if only in (None, view.contract.name)]
    if not views:
        names = ", ".join(f"`{view.contract.name}`" for view in config.views_of(topic))
        msg = f"no view `{only}` has the topic `{topic}`; those that have it: {names}"
        raise ConfigError(msg)
    broker = Broker(config)
    found: dict[str, dict[str, object]] = {}
    is_sound = True
    for view in views:
        for chain in chains_of(view.contract, topic):
            condition = examine(view.contract, chain)
            if condition.is_sound:
                continue
            restoration = _Restoration(config, broker, view, topic, condition)
            if dry_run:
                is_sound = False
            else:
                restoration.run(progress)
            found.setdefault(view.contract.name, {})[chain] = restoration.as_json()
    return {"ok": is_sound, "topic": topic, "dry_run": dry_run, "views": found}


class _Restoration:
    """What is done to one chain."""

    def __init__(self, config: StreamConfig, broker: Broker, view: View, topic: str, condition: Condition) -> None:
        self._config, self._broker, self._view, self._condition = config, broker, view, condition
        parsed = parse_stream_chain(condition.chain)
        assert parsed is not None  # noqa: S101 - `chains_of` gives stream chains alone
        _, self._partition, self._epoch = parsed
        self._topic = topic
        self._restored: list[tuple[int, int]] = []
        self._lost: list[tuple[int, int]] = []

    def as_json(self) -> dict[str, object]:
        """For people and programs."""
        return {
            "damaged": {str(segment): why for segment, why in self._condition.damaged.items()},
            "missing": [[hole.first, hole.next] for hole in self._condition.holes],
            "restored": [list(part) for part in self._restored],
            "lost": [list(part) for part in self._lost],
        }

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Set aside and fill, until nothing is missing."""
        contract = self._view.contract
        condition = self._condition
        self._check(condition)
        set_aside(contract, condition.damaged)
        writer = _Writer(self._config, self._view, self._topic, self._partition, self._epoch, condition.topic_id)
        while not (condition := examine(contract, condition.chain)).is_sound:
            set_aside(contract, condition.damaged)
            total, done = sum(hole.next - hole.first for hole in condition.holes), 0
            for hole in condition.holes:
                for part in self._parts(hole, writer):
                    done += part[1] - part[0]
                    if progress is not None:
                        progress(done, total)

    def _check(self, condition: Condition) -> None:
        """Refuse before anything is changed what could not be carried through."""
        present = self._broker.topic_id(self._topic)
        if condition.topic_id != present and condition.topic_id is not None:
            msg = (
                f"chain `{condition.chain}` is of the topic with id {condition.topic_id}, and `{self._topic}` has "
                f"the id {present} now, so its offsets are others; restore the files from a backup"
            )
            raise ConfigError(msg)
        members = self._broker.group().members if condition.is_end_lost else 0
        if members:
            msg = (
                f"the file that ends chain `{condition.chain}` is damaged, and {members} workers of group "
                f"`{self._config.group}` run, which would go on behind it; stop them, and run this again"
            )
            raise ConfigError(msg)
        log = self._broker.log(self._topic, self._partition)
        for hole in condition.holes:
            self._check_hole(hole, log)

    def _check_hole(self, hole: Hole, log: Log) -> None:
        where = f"{self._topic}[{self._partition}]"
        if log.latest < hole.next:
            msg = f"chain `{hole.chain}` lacks offsets up to {hole.next}, and the log of {where} ends at {log.latest}"
            raise ConfigError(msg)
        if log.earliest > hole.first and not self._config.settings.allow_gaps:
            msg = (
                f"chain `{hole.chain}` lacks the offsets [{hole.first}, {hole.next}), and {where} begins at "
                f"{log.earliest} now; restore the files from a backup, or set HEADRACE_ALLOW_GAPS=true to record the "
                "gap and restore the rest"
            )
            raise ConfigError(msg)

    def _parts(self, hole: Hole, writer: _Writer) -> Iterator[tuple[int, int]]:
        """Fill a hole part by part; stops where somebody else fills it too."""
        log = self._broker.log(self._topic, self._partition)
        self._check_hole(hole, log)
        if log.earliest > hole.first:
            end = min(hole.next, log.earliest)
            if not fill(self._view.contract, hole, end, *writer.gap(end)):
                return
            self._lost.append((hole.first, end))
            yield hole.first, end
            hole = Hole(hole.chain, hole.level, end, hole.next)
        place = (self._topic, self._partition)
        chunks = records_between(
            self._config, {place: hole.first}, {place: hole.next}, self._config.settings.slice_records
        )
        for chunk in chunks if hole.first < hole.next else ():
            records = [Reread.of(message) for message in chunk]
            end = records[-1].offset + 1
            if not fill(self._view.contract, hole, end, *writer.rows(records, end)):
                return
            self._restored.append((hole.first, end))
            yield hole.first, end
            hole = Hole(hole.chain, hole.level, end, hole.next)
        # What is left are offsets without records: markers of transactions, what the log compacted.
        if hole.first < hole.next and fill(self._view.contract, hole, hole.next, *writer.rows([], hole.next)):
            self._restored.append((hole.first, hole.next))
            yield hole.first, hole.next


class _Writer:
    """The steps of the stream for records that were read again."""

    def __init__(
        self, config: StreamConfig, view: View, topic: str, partition: int, epoch: int, topic_id: str | None
    ) -> None:
        self._view, self._place, self._epoch, self._topic_id = view, TopicPartition(topic, partition), epoch, topic_id
        self._max_skew_seconds = config.settings.max_skew_seconds
        self._decoder = patiently(decoder_of(view.contract, schema_registry(config.settings)))
        self._letters = DeadLetterWriter(client_config(config), config.settings.broker_timeout_seconds)
        self._store: FeatureStore = open_store(config.settings.feature_repo)
        replays = ReplayLedger(view.contract, topic)
        replays.catch_up()
        self._replayed = replays.taken(epoch, partition)

    def rows(self, records: Sequence[Reread], next_: int) -> tuple[pa.Table, Footer, Offsets]:
        """Bring records online, what is turned away to the dead letters; the table, footer and offsets of a segment.

        What a replay has already taken of them stays its own.
        """
        contract = self._view.contract
        judged = judge(self._view, self._decoder, [record.value for record in records], self._max_skew_seconds)
        offsets = np.array([record.offset for record in records], dtype=np.int64)
        is_own = ~np.isin(offsets, self._replayed)
        letters = [
            Letter(contract.name, self._place, self._topic_id, records[reject.row], reject)
            for reject in judged.rejects
            if is_own[reject.row]
        ]
        if letters:
            self._letters.write(letters)
        own = np.flatnonzero(is_own[judged.rows])
        table, offsets = judged.table.take(pa.array(own)), offsets[judged.rows[own]]
        servers = server_ids(self._store)
        if table.num_rows:
            origin = Origin(self._epoch, self._place.partition, offsets)
            write_online(self._store, contract, table, tails=stream_tails(origin))
        rejected = len(judged.rejects) + len(judged.rows) - len(own)
        return table, self._footer(next_, table, rejected, judged.skipped, servers), offsets

    def gap(self, next_: int) -> tuple[pa.Table, Footer, Offsets]:
        """The segment for what the topic no longer has."""
        table = self._view.contract.schema.empty_table()
        return table, self._footer(next_, table, 0, 0, (), mark="gap"), np.empty(0, dtype=np.int64)

    def _footer(
        self, next_: int, table: pa.Table, rejected: int, skipped: int, servers: Sequence[str], **more: Any
    ) -> Footer:
        contract, transform = self._view.contract, self._view.transform
        low, high = time_bounds(table, contract.timestamp_field)
        return Footer(
            next=next_,
            rejected=rejected,
            skipped=skipped,
            min_us=low,
            max_us=high,
            topic_id=self._topic_id,
            transforms=() if transform is None else (transform.hash,),
            servers=tuple(servers),
            writer=writer_id(),
            append=new_append_id(),
            **more,
        )


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
