"""Compare the online store with the newest offline row of each key, value by value.

The ends of the chains are taken first and the online store is read afterwards, so what a running stream adds meanwhile
is recognised by its place: at or beyond those ends. Rows of a day, push or file that the mark does not name yet are
pending. Neither is wrong.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from feast import FeatureStore, RepoConfig
from feast.infra.key_encoding_utils import deserialize_entity_key
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.type_map import feast_value_type_to_python_type

from headrace.contract import ViewContract
from headrace.encode import EncodedRows, encode, is_older
from headrace.errors import ConfigError
from headrace.materialize import Holdings, Progress, holdings
from headrace.online import NewestWinsStore, StoredRows, online_store
from headrace.retain import horizon_us
from headrace.sample import Sample
from headrace.scan import connection, newest, reading
from headrace.segments import parse_stream_chain
from headrace.values import to_list

EXAMPLES = 5
KEYS_A_READ = 10_000


class Kind(StrEnum):
    """What a key turned out to be."""

    EQUAL = "equal"
    MISSING = "missing online"
    STALE = "stale"
    DIFFERENT = "different"
    AHEAD = "ahead"
    EXTRA = "missing offline"
    IN_FLIGHT = "in flight"
    PENDING = "pending"
    EXPIRED = "expired"
    RETIRED = "retired"


FORWARD = (Kind.MISSING, Kind.STALE, Kind.DIFFERENT)
"""What repair mends by bringing the newest offline row."""

BACKWARD = (Kind.AHEAD, Kind.EXTRA)
"""What repair mends by taking back a value that nothing offline accounts for."""


@dataclass(frozen=True)
class Example:
    """One key that is not equal.

    Attributes:
        key: the join keys by the view's names.
        offline, online: the feature values by name, as Python values; None where there is no row.
        offline_time, online_time: the event times, UTC.
    """

    key: Mapping[str, Any]
    offline: Mapping[str, Any] | None
    online: Mapping[str, Any] | None
    offline_time: datetime | None
    online_time: datetime | None


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        view: the feature view.
        at: when the ends of the chains were taken; what came later was not looked at.
        sample: which share of the keys was looked at; None: all. What is said of keys is said of those in it.
        keys: how many keys were compared: those with a row offline, and those online without one.
        counts: how many keys of each kind.
            equal: the values and the event time agree.
            missing online, stale, different: online lacks the row, has an older one, has another one of the same place.
            ahead: online has a newer row that nothing offline accounts for. missing offline: the same without any row.
            in flight: newer, from at or beyond the end of its chain: the stream's next append. No fault.
            pending: offline has it in what no Materialize has applied yet. No fault.
            expired: missing online, and old enough for `key_ttl_seconds` to have removed it. No fault.
            retired: online only, and older than the horizon of the retention. No fault.
        examples: a few of each kind but the equal ones.
        seconds: how long it took.
    """

    view: str
    at: datetime
    sample: Sample | None = None
    keys: int = 0
    counts: Counter[Kind] = field(default_factory=Counter)
    examples: dict[Kind, list[Example]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def diverged(self) -> int:
        """How many keys are wrong."""
        return sum(self.counts[kind] for kind in (*FORWARD, *BACKWARD))


@dataclass(frozen=True)
class Verdicts:
    """What some keys turned out to be. All have the same length and order.

    Attributes:
        kinds: of each key.
        stored: what is online.
        latest: the newest offline row of each; None for keys that have none.
    """

    kinds: list[Kind]
    stored: StoredRows
    latest: EncodedRows | None


def auditable_store(store: FeatureStore) -> NewestWinsStore:
    """The online store behind a Feast store.

    Raises:
        ConfigError: it is not one of ours.
    """
    target = online_store(store)
    if not isinstance(target, NewestWinsStore):
        msg = (
            f"the online store {type(target).__name__} keeps no order beside its values, which an audit needs; use "
            "headrace.sqlite.HeadraceSqliteOnlineStore or headrace.redis.HeadraceRedisOnlineStore"
        )
        raise ConfigError(msg)
    return target


class Cut:
    """What a view had offline when an audit began, and what its online values are judged by."""

    def __init__(self, store: FeatureStore, contract: ViewContract) -> None:
        target = auditable_store(store)
        self.at = datetime.now(UTC)
        self.holdings: Holdings = holdings(contract)
        self._store, self._contract, self._target = store, contract, target
        mark = target.read_mark(store.config, contract.feature_view)
        arrived = self.holdings.arrived(contract, mark)
        streams = {name: parse_stream_chain(name) for name in self.holdings.chains}
        self._ends = {at[1:]: self.holdings.chains[name] for name, at in streams.items() if at is not None}
        # What the stream appended is online already, whatever the mark says of it.
        streamed = {path for name, at in streams.items() if at is not None for path in self.holdings.paths[name]}
        self._pending = [path for path in arrived.paths if path not in streamed]
        self._horizon_us = horizon_us(contract)
        ttl_s = getattr(store.config.online_store, "key_ttl_seconds", None)
        expires = self.at - timedelta(seconds=ttl_s) if ttl_s else None
        self._expired_us = None if expires is None else int(expires.timestamp() * 1_000_000)

    def judge(self, *, sample: Sample | None = None, progress: Progress | None = None) -> Iterator[Verdicts]:
        """Every key, or a sample: those with a row offline, then those online alone; in chunks, memory bounded."""
        done = 0
        config, view = self._store.config, self._contract.feature_view
        with connection(self.limit) as known:
            known.execute("CREATE TABLE keys (key BLOB, is_offline BOOLEAN)")
            with newest(self._contract, self.holdings.all_paths, memory_limit=self.limit, sample=sample) as rows:
                for table, tails in rows:
                    latest = encode(self._contract, table, tails)
                    _insert(known, latest.keys, is_offline=True)
                    stored = self._read(latest.keys)
                    yield Verdicts(self._compare(table, latest, stored), stored, latest)
                    done += len(latest)
                    if progress is not None:
                        progress(done, rows.keys)
            chosen = None if sample is None else partial(sample.chosen, known, self._contract)
            for keys in self._target.stored_keys(config, view, chosen):
                _insert(known, keys, is_offline=False)
            alone = known.execute("SELECT key FROM keys GROUP BY key HAVING NOT bool_or(is_offline)")
            while keys := [key for (key,) in alone.fetchmany(KEYS_A_READ)]:
                stored = self._read(keys)
                there = np.array([i for i, order in enumerate(stored.order) if order is not None], dtype=np.int64)
                stored = stored.take(there)
                yield Verdicts([self._without_row(stored, i) for i in range(len(stored.keys))], stored, None)

    @property
    def limit(self) -> str | None:
        """How much memory DuckDB may use."""
        return getattr(self._store.config.offline_store, "memory_limit", None)

    def _read(self, keys: Sequence[bytes]) -> StoredRows:
        return self._target.read_stored(self._store.config, self._contract.feature_view, keys)

    def _compare(self, table: pa.Table, latest: EncodedRows, stored: StoredRows) -> list[Kind]:
        kinds = [Kind.EQUAL] * len(latest)
        columns = [(to_list(values), stored.values[name]) for name, values in latest.values.items()]
        unlike = [ours != theirs for ours, theirs in zip(latest.event_us, stored.event_us, strict=True)]
        for ours, theirs in columns:
            if ours != theirs:
                for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
                    unlike[i] |= own != other
        wrong = [i for i, is_unlike in enumerate(unlike) if is_unlike]
        if not wrong:
            return kinds
        for i in wrong:
            kinds[i] = self._unequal(latest, stored, i)
        for i in self._explained(table, latest, [i for i in wrong if kinds[i] in (Kind.MISSING, Kind.STALE)]):
            kinds[i] = Kind.PENDING
        return kinds

    def _unequal(self, latest: EncodedRows, stored: StoredRows, i: int) -> Kind:
        order = stored.order[i]
        if order is None:
            has_expired = self._expired_us is not None and latest.event_us[i] < self._expired_us
            return Kind.EXPIRED if has_expired else Kind.MISSING
        if is_older(order, latest.order[i]):
            return Kind.STALE
        if not is_older(latest.order[i], order):
            return Kind.DIFFERENT
        return self._newer(stored, i, Kind.AHEAD)

    def _without_row(self, stored: StoredRows, i: int) -> Kind:
        return self._newer(stored, i, Kind.EXTRA)

    def _newer(self, stored: StoredRows, i: int, kind: Kind) -> Kind:
        """What a row online is that offline has nothing as new as."""
        order, event_us = stored.order[i], stored.event_us[i]
        if order is not None and order[16] == 1:
            epoch, partition, offset = struct.unpack(">IIQ", order[17:33])
            if offset >= self._ends.get((partition, epoch), 0):
                return Kind.IN_FLIGHT
        if self._horizon_us is not None and event_us is not None and event_us < self._horizon_us:
            return Kind.RETIRED
        return kind

    def _explained(self, table: pa.Table, latest: EncodedRows, wrong: Sequence[int]) -> set[int]:
        """Those of the rows whose newest is one that no Materialize has applied yet."""
        if not self._pending or not wrong:
            return set()
        keys = table.select(list(self._contract.join_keys)).take(pa.array(wrong))
        waiting: set[tuple[bytes, bytes]] = set()
        with newest(self._contract, self._pending, memory_limit=self.limit, keys=keys) as rows:
            for chunk, tails in rows:
                encoded = encode(self._contract, chunk, tails)
                waiting.update(zip(encoded.keys, encoded.order, strict=True))
        return {i for i in wrong if (latest.keys[i], latest.order[i]) in waiting}


def audit(
    store: FeatureStore,
    contract: ViewContract,
    *,
    sample: Sample | None = None,
    examples: int = EXAMPLES,
    progress: Progress | None = None,
) -> Audit:
    """Compare every key's online value with the newest offline row, as of now. Changes nothing.

    Streaming: memory is bounded by the chunk and by the offline store's `memory_limit`, beyond which DuckDB spills.
    May run beside a stream, materializations and compactions. It starts over where a day is replaced under it.

    Args:
        sample: look at these keys alone, wherever they are, and say of them what a full audit would. All keys are still
            listed on both sides, by name; grouped, read and compared are those of the sample.
        examples: how many examples of each kind to keep.
        progress: called with keys done and keys in all, after each chunk.

    Raises:
        ConfigError: the online store is not one of ours.
    """
    begun = time.monotonic()

    def judged(cut: Cut) -> Audit:
        result = Audit(contract.name, cut.at, sample)
        for verdicts in cut.judge(sample=sample, progress=progress):
            note(result, store.config, contract, verdicts, examples)
        return result

    result = reading(lambda: Cut(store, contract), lambda cut: cut.holdings.all_paths, judged)
    result.seconds = time.monotonic() - begun
    return result


def note(result: Audit, config: RepoConfig, contract: ViewContract, verdicts: Verdicts, examples: int) -> None:
    """Add verdicts to a result, with examples as long as there are not enough."""
    result.keys += len(verdicts.kinds)
    counted = Counter(verdicts.kinds)
    result.counts.update(counted)
    for kind in counted:
        shown = result.examples.setdefault(kind, [])
        if kind is Kind.EQUAL or len(shown) >= examples:
            continue
        those = (i for i, other in enumerate(verdicts.kinds) if other is kind)
        shown += [_example(config, contract, verdicts, i) for i in islice(those, examples - len(shown))]


def _example(config: RepoConfig, contract: ViewContract, verdicts: Verdicts, i: int) -> Example:
    stored, latest = verdicts.stored, verdicts.latest
    key = deserialize_entity_key(stored.keys[i], config.entity_key_serialization_version)
    names = [contract.view_name(name) for name in contract.features]
    here = stored.order[i] is not None
    return Example(
        key={
            name: feast_value_type_to_python_type(value)
            for name, value in zip(key.join_keys, key.entity_values, strict=True)
            if contract.join_keys
        },
        offline=None if latest is None else {name: _python(latest.values[name][i].as_py()) for name in names},
        online={name: _python(stored.values[name][i]) for name in names} if here else None,
        offline_time=None if latest is None else _time(latest.event_us[i]),
        online_time=_time(stored.event_us[i]),
    )


def _python(value: bytes) -> Any:
    return feast_value_type_to_python_type(ValueProto.FromString(value))


def _time(us: int | None) -> datetime | None:
    return None if us is None else datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


def _insert(known: duckdb.DuckDBPyConnection, keys: Sequence[bytes], *, is_offline: bool) -> None:
    known.register("chunk", pa.table({"key": pa.array(keys, pa.binary())}))
    known.execute("INSERT INTO keys SELECT key, ? FROM chunk", [is_offline])
    known.unregister("chunk")
