"""Restore: segments that are damaged or gone are read again from the topic, and put where they were.

The steps are the stream's, in its order: decode, dead letters, online, and the segment last. What was done before a
kill stays; the next run goes on with the holes that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
from confluent_kafka import Message
from feast import FeatureStore

from headrace.damage import Condition, Damage, Examination, Hole, chains_of, fill, set_aside
from headrace.encode import Origin, stream_tails
from headrace.errors import ConfigError, HeadraceError, TransientError
from headrace.faults import reached
from headrace.online import server_ids, write_online
from headrace.replays import ReplayLedger
from headrace.repository import open_store
from headrace.segments import (
    Footer,
    Offsets,
    SegmentName,
    new_append_id,
    parse_stream_chain,
    time_bounds,
    writer_id,
)
from streaming.broker import Broker, BrokerError, Log, client_config
from streaming.deadletters import DeadLetterWriter, Letter
from streaming.formats import decoder_of, patiently
from streaming.judgement import judge
from streaming.ranges import records_between, short_of
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

    Runs beside workers, compaction and itself: of two that write at one place one is told so, and looks again. A ledger
    that cannot be restored keeps no other from it.

    Args:
        only: the view; None for all of the topic.
        dry_run: examine, and change nothing.
        progress: called with offsets read again and offsets to read of a ledger, after each segment.

    Returns:
        `ok`: whether every chain is sound now, or in a dry run was; by view and chain what was `damaged` and `missing`,
        which offsets were `restored`, which are `lost` since the topic no longer has them, and why it `failed` or in a
        dry run would; None where it did not.

    Raises:
        ConfigError: no such view or topic.
    """
    views = [view for view in config.views_of(topic) if only in (None, view.contract.name)]
    if not views:
        names = ", ".join(f"`{view.contract.name}`" for view in config.views_of(topic))
        msg = f"no view `{only}` has the topic `{topic}`; those that have it: {names}"
        raise ConfigError(msg)
    source = _Source(config, topic)
    looked = [_Restoration(source, view, *chain) for view in views for chain in _chains(view, topic)]
    for one in looked:
        one.look()
    unsound = [one for one in looked if not one.is_sound]
    try:
        present = source.broker.topic_id(topic) if unsound else None
    except BrokerError as error:
        for one in unsound:
            one.fail(error)
    else:
        for one in unsound:
            one.run(present, progress, dry_run=dry_run)
    found: dict[str, dict[str, object]] = {}
    for one in unsound:
        if one.has_news:
            found.setdefault(one.view, {})[one.chain] = one.as_json()
    return {"ok": all(one.is_sound for one in looked), "topic": topic, "dry_run": dry_run, "views": found}


def _chains(view: View, topic: str) -> list[tuple[str, bool]]:
    """The chains of a view, and whether each is the newest epoch of its partition."""
    chains = chains_of(view.contract, topic)
    newest = {_place(chain)[0]: chain for chain in chains}
    return [(chain, chain in newest.values()) for chain in chains]


def _place(chain: str) -> tuple[int, int]:
    """Partition and epoch."""
    parsed = parse_stream_chain(chain)
    assert parsed is not None  # noqa: S101 - `chains_of` gives stream chains alone
    return parsed[1:]


class _Source:
    """Where records come from and go to, for all chains of a topic; opened when it is wanted."""

    def __init__(self, config: StreamConfig, topic: str) -> None:
        self.config, self.topic = config, topic

    @cached_property
    def broker(self) -> Broker:
        return Broker(self.config)

    @cached_property
    def letters(self) -> DeadLetterWriter:
        return DeadLetterWriter(client_config(self.config), self.config.settings.broker_timeout_seconds)

    @cached_property
    def store(self) -> FeatureStore:
        return open_store(self.config.settings.feature_repo)


class _Restoration:
    """What is done to one chain."""

    def __init__(self, source: _Source, view: View, chain: str, is_newest: bool) -> None:
        self._source, self._view, self.chain, self._is_newest = source, view, chain, is_newest
        self.view = view.contract.name
        self._partition, self._epoch = _place(chain)
        self._examine = Examination(view.contract, chain)
        self._damaged: dict[SegmentName, Damage] = {}
        self._missing: Sequence[Hole] = ()
        self._restored: list[tuple[int, int]] = []
        self._lost: list[tuple[int, int]] = []
        self._failed: str | None = None
        self.is_sound = False

    @property
    def has_news(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._damaged or self._missing or self._failed)

    def as_json(self) -> dict[str, object]:
        """For people and programs."""
        return {
            "damaged": {str(segment): damage.why for segment, damage in self._damaged.items()},
            "missing": [[hole.first, hole.next] for hole in self._missing],
            "restored": [list(part) for part in self._restored],
            "lost": [list(part) for part in self._lost],
            "failed": self._failed,
        }

    def look(self) -> None:
        """See whether there is anything to do. Asks no broker."""
        with self._failing():
            condition = self._examine()
            self._damaged, self._missing = dict(condition.damaged), condition.holes
            self.is_sound = not (condition.damaged or condition.holes or condition.is_end_lost)

    def run(self, present: str | None, progress: Callable[[int, int], None] | None, *, dry_run: bool) -> None:
        """Set aside and fill, until nothing is missing.

        Args:
            present: the id of the topic as it is now.
        """
        self._failed = None
        with self._failing():
            condition = self._examine()
            self._check_topic(condition, present)
            self._missing = holes = self._holes(condition)
            if dry_run:
                self._check(holes)
                self.is_sound = not condition.damaged and not holes
                return
            writer = _Writer(self._source, self._view, self._partition, self._epoch, condition.topic_id or present)
            while condition.damaged or holes:
                self._check(holes)
                set_aside(self._view.contract, condition.damaged)
                self._damaged |= condition.damaged
                if not condition.damaged:  # else look first: a worker may have gone on from what was damaged
                    writer.catch_up()
                    self._fill(holes, writer, progress)
                condition = self._examine()
                holes = self._holes(condition)
            self.is_sound = True

    def fail(self, error: Exception) -> None:
        """Leave the chain as it is."""
        self.is_sound = False
        self._failed = str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the other chains are restored
            self.fail(error)

    def _holes(self, condition: Condition) -> list[Hole]:
        """What is missing. Of an end of which nobody says where it was, all that the log has."""
        holes = list(condition.holes)
        if condition.is_end_lost:
            start = holes[-1].next if holes and holes[-1].first == condition.end else condition.end
            latest = self._source.broker.log(self._source.topic, self._partition).latest
            holes += [Hole(self.chain, 0, start, latest)] if start < latest else []
        return holes

    def _check_topic(self, condition: Condition, present: str | None) -> None:
        own, topic = condition.topic_id, self._source.topic
        if None not in (own, present) and own != present:
            msg = (
                f"chain `{self.chain}` is of the topic with id {own}, and `{topic}` has the id {present} now, so its "
                "offsets are others; restore the files from a backup"
            )
            raise ConfigError(msg)
        if None in (own, present) and not self._is_newest:
            msg = (
                f"chain `{self.chain}` is of an earlier topic `{topic}`, as a later epoch says, so its offsets are "
                "others; restore the files from a backup"
            )
            raise ConfigError(msg)

    def _check(self, holes: Sequence[Hole]) -> None:
        """Refuse before anything is changed what could not be carried through."""
        for hole in holes:
            self._check_hole(hole, self._source.broker.log(self._source.topic, self._partition))

    def _check_hole(self, hole: Hole, log: Log) -> None:
        if log.latest < hole.next:
            msg = f"chain `{hole.chain}` lacks the offsets [{hole.first}, {hole.next}), and "
            raise TransientError(msg + short_of(self._source.topic, self._partition, log.latest, hole.next))
        if log.earliest > hole.first and not self._source.config.settings.allow_gaps:
            msg = (
                f"chain `{hole.chain}` lacks the offsets [{hole.first}, {hole.next}), and {self._source.topic}"
                f"[{self._partition}] begins at {log.earliest} now; restore the files from a backup, or set "
                "HEADRACE_ALLOW_GAPS=true to record the gap and restore the rest"
            )
            raise ConfigError(msg)

    def _fill(self, holes: Sequence[Hole], writer: _Writer, progress: Callable[[int, int], None] | None) -> None:
        total, done = sum(hole.next - hole.first for hole in holes), 0
        for hole in holes:
            for first, end in self._parts(hole, writer):
                done += end - first
                if progress is not None:
                    progress(done, total)

    def _parts(self, hole: Hole, writer: _Writer) -> Iterator[tuple[int, int]]:
        """Fill a hole part by part; stops where somebody else fills it too."""
        contract, config, place = self._view.contract, self._source.config, (self._source.topic, self._partition)
        log = self._source.broker.log(*place)
        self._check_hole(hole, log)
        if log.earliest > hole.first:
            end = min(hole.next, log.earliest)
            if not fill(contract, hole, *writer.gap(end)):
                return
            self._lost.append((hole.first, end))
            yield hole.first, end
            hole = replace(hole, first=end)
        if hole.first == hole.next:
            return
        for chunk in records_between(config, {place: hole.first}, {place: hole.next}, config.settings.slice_records):
            records = [Reread.of(message) for message in chunk]
            end = records[-1].offset + 1
            if not fill(contract, hole, *writer.rows(records, end)):
                return
            self._restored.append((hole.first, end))
            yield hole.first, end
            hole = replace(hole, first=end)
        # The log was read to the end of the hole: what is left has no record, but markers, or what the log compacted.
        if hole.first < hole.next and fill(contract, hole, *writer.rows([], hole.next)):
            self._restored.append((hole.first, hole.next))
            yield hole.first, hole.next


class _Writer:
    """The steps of the stream for records that were read again."""

    def __init__(self, source: _Source, view: View, partition: int, epoch: int, topic_id: str | None) -> None:
        self._view, self._epoch, self._topic_id = view, epoch, topic_id
        self._place = TopicPartition(source.topic, partition)
        settings = source.config.settings
        self._max_skew_seconds = settings.max_skew_seconds
        self._decoder = patiently(decoder_of(view.contract, schema_registry(settings)))
        self._letters, self._store = source.letters, source.store
        self._replays = ReplayLedger(view.contract, source.topic)

    def catch_up(self) -> None:
        """Read what replays have taken: it stays theirs. They take nothing of what lies in a hole."""
        self._replays.catch_up()

    def rows(self, records: Sequence[Reread], next_: int) -> tuple[pa.Table, Footer, Offsets]:
        """Bring records online, what is turned away to the dead letters; the table, footer and offsets of a segment."""
        contract = self._view.contract
        judged = judge(self._view, self._decoder, [record.value for record in records], self._max_skew_seconds)
        offsets = np.array([record.offset for record in records], dtype=np.int64)
        is_own = ~np.isin(offsets, self._replays.taken(self._epoch, self._place.partition))
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
            reached("restore.0.online")
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
