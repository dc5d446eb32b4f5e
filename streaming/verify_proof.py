"""The proof of a verification: both stores and the dead letters against what was sent, event by event.

Beside the format of the segments it uses nothing of the stream's own code: what must be there follows from what was
sent, and online values are read as every Feast client reads them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from feast import FeatureStore

from headrace.contract import ViewContract
from headrace.errors import LedgerError
from headrace.folder import Folder
from headrace.place import File, whole
from headrace.segments import Footer, SegmentName, parse_name, parse_stream_chain, read_accepted, read_footer
from streaming.broker import Broker, BrokerError, client_config
from streaming.deadletters import topic_of
from streaming.settings import StreamConfig
from streaming.verify_load import Origin, Sent, origin, place_of, places

EXAMPLES = 5
_KEYS_A_READ = 500
_READ_TIMEOUT_S = 30.0

Places = npt.NDArray[np.int64]


class Fault(StrEnum):
    """What can be wrong."""

    LOST = "lost"
    DOUBLED = "doubled"
    OLDER = "older"
    WRONG = "wrong"


@dataclass
class Proof:
    """What was found.

    Attributes:
        accepted, rejected, skipped: events, as the ledgers say.
        letters: messages in the dead-letter topic, repeats included.
        segments: files of the offline folder.
        keys: keys that were compared online.
        faults: of each kind the events (partition and offset) or keys that it happened to.
        examples: the first of them, in words.
    """

    accepted: int = 0
    rejected: int = 0
    skipped: int = 0
    letters: int = 0
    segments: int = 0
    keys: int = 0
    faults: dict[Fault, set[object]] = field(default_factory=lambda: {kind: set() for kind in Fault})
    examples: dict[Fault, list[str]] = field(default_factory=lambda: {kind: [] for kind in Fault})

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.faults.values())

    def note(self, kind: Fault, whom: object, what: str) -> None:
        """Something is wrong with an event, a key, or a file."""
        known = self.faults[kind]
        if whom not in known and len(known) < EXAMPLES:
            self.examples[kind].append(what)
        known.add(whom)

    def note_event(self, kind: Fault, place: Origin, what: str) -> None:
        """Something is wrong with an event."""
        self.note(kind, place, f"partition {place[0]}, offset {place[1]}: {what}")

    def note_events(self, kind: Fault, events: Places, what: str) -> None:
        """The same of several, see `places`."""
        for place in events.tolist():
            self.note_event(kind, origin(place), what)


def prove(config: StreamConfig, sent: Sent) -> Proof:
    """Compare everything. Changes nothing; no worker may run.

    Args:
        config: of the repository with one view that the events were sent to.

    Raises:
        BrokerError: the broker does not answer.
    """
    topic, (view,) = next(iter(config.views.items()))
    proof = Proof()
    _judge_log(config, topic, sent, proof)
    rows, found = _judge_ledger(view.contract, topic, sent, proof)
    _judge_rows(rows, found, sent, proof)
    _judge_letters(config, topic, sent, proof)
    _judge_online(config.store, view.contract, sent, proof)
    return proof


def _judge_log(config: StreamConfig, topic: str, sent: Sent, proof: Proof) -> None:
    """The logs must hold what was sent and nothing else; if others write there, all that follows is in doubt."""
    broker = Broker(config)
    for partition, count in sent.counts().items():
        log = broker.log(topic, partition)
        if log.latest - log.earliest != count:
            what = f"partition {partition}: its log is {log}, {count} messages were sent; somebody else writes there"
            proof.note(Fault.WRONG, ("log", partition), what)
    broker.close()


def _judge_ledger(contract: ViewContract, topic: str, sent: Sent, proof: Proof) -> tuple[pa.Table, Places]:
    """Every offset of every partition must be covered by one segment.

    Returns:
        The rows of all segments, with their places.
    """
    covered = {partition: np.zeros(end + 1, dtype=np.int64) for partition, end in sent.ends.items()}
    tables: list[pa.Table] = [contract.schema.empty_table()]
    found: list[Places] = [np.empty(0, dtype=np.int64)]
    place = Folder.of(contract).place
    for path in (place.file(name) for name in sorted(place.names()) if not name.startswith(".")):
        segment = _segment(path, topic, sent, proof)
        if segment is None:
            continue
        partition, first, mark, offsets, rows = segment
        proof.segments += 1
        proof.rejected += mark.rejected
        proof.skipped += mark.skipped
        proof.accepted += len(offsets)
        covered[partition] = _cover(covered[partition], first, mark.next)
        if len(offsets) + mark.rejected + mark.skipped != mark.next - first:
            what = f"{path.name}: {len(offsets)} accepted, {mark.rejected} rejected, {mark.skipped} skipped are not"
            proof.note(Fault.WRONG, path.name, f"{what} the {mark.next - first} offsets up to {mark.next}")
        tables.append(rows)
        found.append(places(partition, offsets))
    for partition, changes in covered.items():
        times = np.cumsum(changes)[:-1]
        end = sent.ends[partition]
        proof.note_events(Fault.LOST, places(partition, np.flatnonzero(times[:end] < 1)), "in no segment")
        proof.note_events(Fault.DOUBLED, places(partition, np.flatnonzero(times > 1)), "in several segments")
        beyond = end + np.flatnonzero(times[end:] > 0)
        proof.note_events(Fault.DOUBLED, places(partition, beyond), "in a segment, but beyond what was sent")
    if proof.rejected != len(sent.bad):
        what = f"the segments say that {proof.rejected} were rejected, {len(sent.bad)} bad events were sent"
        proof.note(Fault.WRONG, "rejected", what)
    return pa.concat_tables(tables), np.concatenate(found)


def _segment(path: File, topic: str, sent: Sent, proof: Proof) -> tuple[int, int, Footer, Places, pa.Table] | None:
    """Partition, first offset, footer, accepted offsets and rows of a segment; None, with a note, if it is none."""
    name = parse_name(path.name)
    chain = parse_stream_chain(name.chain) if isinstance(name, SegmentName) else None
    expected = chain is not None and chain[0] == topic and chain[1] in sent.ends and chain[2] == 0
    if chain is None or not isinstance(name, SegmentName) or not expected or name.level != 0:
        proof.note(Fault.WRONG, path.name, f"{path.name}: no worker of this run should have made this file")
        return None
    try:
        mark, offsets, rows = read_footer(path), read_accepted(path), pq.ParquetFile(whole(path)).read()
        rows = rows.select(sent.rows.schema.names).cast(sent.rows.schema)
    except (LedgerError, OSError, KeyError, ValueError, pa.ArrowException) as error:
        proof.note(Fault.WRONG, path.name, f"{path.name}: cannot be read: {error}")
        return None
    if rows.num_rows != len(offsets) or mark.next <= name.first:
        what = f"{path.name}: {rows.num_rows} rows for {len(offsets)} offsets, from {name.first} to {mark.next}"
        proof.note(Fault.WRONG, path.name, what)
        if rows.num_rows != len(offsets):
            return None
    return chain[1], name.first, mark, offsets, rows


def _cover(changes: Places, first: int, end: int) -> Places:
    """Count `[first, end)` as covered; `changes` holds the differences between neighbours, and grows as needed."""
    missing = max(first, end) + 1 - len(changes)
    grown = np.append(changes, np.zeros(missing, dtype=np.int64)) if missing > 0 else changes
    if first < end:
        grown[first] += 1
        grown[end] -= 1
    return grown


def _judge_rows(rows: pa.Table, found: Places, sent: Sent, proof: Proof) -> None:
    """The rows offline must be the good events, each once, with their offsets."""
    proof.note_events(Fault.LOST, np.setdiff1d(sent.places, found), "a good event, and no row offline")
    there, count = np.unique(found, return_counts=True)
    proof.note_events(Fault.DOUBLED, there[count > 1], "several rows offline")
    for place in map(origin, np.setdiff1d(there, sent.places).tolist()):
        if place in sent.bad:
            proof.note_event(Fault.WRONG, place, "a bad event, and a row offline")
        else:
            proof.note_event(Fault.DOUBLED, place, "a row offline that no event accounts for")
    both, ours, theirs = np.intersect1d(sent.places, found, return_indices=True)
    for name in sent.rows.schema.names:
        want, have = sent.rows[name].take(ours), rows[name].take(theirs)
        if want.equals(have):
            continue
        for place, one, other in zip(both.tolist(), want.to_pylist(), have.to_pylist(), strict=True):
            if one != other:
                proof.note_event(Fault.WRONG, origin(place), f"`{name}` offline is {other!r}, sent was {one!r}")


def _judge_letters(config: StreamConfig, topic: str, sent: Sent, proof: Proof) -> None:
    """Each bad event must have a letter with its payload; a good one must have none."""
    written: set[Origin] = set()
    for headers, payload in _letters(config, topic_of(topic)):
        proof.letters += 1
        place = int(headers["headrace.partition"]), int(headers["headrace.offset"])
        written.add(place)
        if place not in sent.bad:
            was = "a good event, and" if np.any(sent.places == place_of(*place)) else "nothing that was sent, and"
            proof.note_event(Fault.WRONG, place, f"{was} a dead letter")
        elif sent.bad[place] != payload:
            proof.note_event(Fault.WRONG, place, "a dead letter of another payload")
    for place in sorted(sent.bad.keys() - written):
        proof.note_event(Fault.LOST, place, "a bad event, and no dead letter")


def _letters(config: StreamConfig, topic: str) -> Iterable[tuple[Mapping[str, bytes], bytes | None]]:
    """Headers and payload of every dead letter."""
    own = {
        "group.id": f"{config.group}-{uuid.uuid4().hex}",  # never joined: partitions are assigned, nothing is committed
        "enable.auto.commit": False,
        "isolation.level": "read_committed",
    }
    consumer = Consumer(client_config(config) | own)
    try:
        partitions = consumer.list_topics(topic, timeout=_READ_TIMEOUT_S).topics[topic].partitions
        for partition in partitions:
            start = TopicPartition(topic, partition, 0)
            _, end = consumer.get_watermark_offsets(start, timeout=_READ_TIMEOUT_S)
            consumer.assign([start])
            for message in _read(consumer, f"{topic}[{partition}]", end):
                headers: Any = message.headers() or []
                yield {name: value or b"" for name, value in headers}, message.value()
    except KafkaException as error:
        msg = f"the dead letters in `{topic}` cannot be read: {error.args[0].str()}"
        raise BrokerError(msg) from error
    finally:
        consumer.close()


def _read(consumer: Consumer, where: str, end: int) -> Iterator[Message]:
    """The messages of the partition that is assigned, from its start to an end."""
    left, deadline = end, time.monotonic() + _READ_TIMEOUT_S
    while left > 0:
        for message in consumer.consume(min(left, 1000), timeout=1.0):  # waits for so many
            if message.error() is not None:
                raise KafkaException(message.error())
            left, deadline = end - 1 - int(message.offset() or 0), time.monotonic() + _READ_TIMEOUT_S
            yield message
        if time.monotonic() > deadline:
            msg = f"{where}: {left} of {end} dead letters did not come within {_READ_TIMEOUT_S:g} s"
            raise BrokerError(msg)


def _judge_online(store: FeatureStore, contract: ViewContract, sent: Sent, proof: Proof) -> None:
    """Each key must have the values of its newest event: by event time, created time, partition, offset."""
    (key,) = contract.join_keys
    keys, happened, created = (
        _integers(sent.rows[name]) for name in (key, contract.timestamp_field, contract.created_field)
    )
    order = np.lexsort((sent.places, created, happened, keys))
    last = order[np.append(np.diff(keys[order]) != 0, np.full(min(1, len(order)), fill_value=True))]
    newest = sent.rows.take(last)
    proof.keys = len(last)
    for start in range(0, len(last), _KEYS_A_READ):
        wanted = newest.slice(start, _KEYS_A_READ).to_pylist()
        served = _served(store, contract, [row[key] for row in wanted])
        for index, (row, values) in enumerate(zip(wanted, served, strict=True), start):
            if values == {name: row[name] for name in contract.features}:
                continue
            kind, what = _unequal(contract, sent.rows.filter(pa.array(keys == row[key])), values)
            partition, offset = origin(int(sent.places[last[index]]))
            newer = f"its newest event is at partition {partition}, offset {offset}"
            proof.note(kind, ("key", row[key]), f"key {row[key]} online: {what}; {newer}")


def _served(store: FeatureStore, contract: ViewContract, keys: Sequence[int]) -> list[dict[str, Any]]:
    """The features that Feast serves for some keys."""
    names = [f"{contract.name}:{name}" for name in contract.features]
    answer = store.get_online_features(names, [{contract.join_keys[0]: key} for key in keys]).to_dict()
    return [{name: answer[name][index] for name in contract.features} for index in range(len(keys))]


def _unequal(contract: ViewContract, events: pa.Table, values: Mapping[str, Any]) -> tuple[Fault, str]:
    """What values that are not the newest are."""
    if all(value is None for value in values.values()):
        return Fault.LOST, "nothing"
    if values in events.select(list(contract.features)).to_pylist():
        return Fault.OLDER, "the values of an older event"
    return Fault.WRONG, "values of none of its events"


def _integers(column: pa.ChunkedArray) -> Places:
    return np.asarray(column.cast(pa.int64()).to_numpy())
