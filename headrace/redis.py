"""Feast's Redis online store, with newest-wins: no row is written but over what it was compared with.

The layout is Feast's: one hash an entity, a field a feature, `_ts:<view>` the event time. One more field a view,
`_hr:<view>`, holds the order of the stored row followed by the very bytes of `_ts` that were written with it; where
`_ts` is not those bytes any more, a stock client wrote later, and its time counts. It is at most 64 bytes long: beyond
that Redis would store the whole hash in another way, several times as large.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.helpers import _mmh3, _redis_key_prefix
from feast.infra.online_stores.redis import (
    RedisOnlineStore,
    RedisOnlineStoreConfig,
    RedisType,
    _versioned_fv_name,
)
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import NonNegativeInt, field_validator
from redis.asyncio.cluster import ClusterNode as AsyncClusterNode
from redis.cluster import ClusterNode
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from headrace import redis_scripts as scripts
from headrace import registry as _registry  # noqa: F401 - resolves relative registries
from headrace.encode import ORDER_BYTES, EncodedRows, Int64s, encode_timestamps, is_older
from headrace.errors import TransientError
from headrace.faults import reached
from headrace.online import (
    FeastRow,
    Mark,
    StoredRows,
    encode_feast_rows,
    event_times,
    feature_types,
    has_features,
    stock_order,
)
from headrace.redis_cluster import Answers, AsyncCluster, Cluster, acknowledged_by_all, call_each, scan
from headrace.redis_replicas import acknowledged, ask, connection_of
from headrace.resp import as_bytes, commands
from headrace.secret_files import filled
from headrace.values import BINARY, joined, to_list

_CALLS_AT_ONCE = 3  # the server works on one while the next is packed
_KEYS_A_TRANSACTION = 200  # a server looks a watched key up among all those that are watched already
_ROWS_A_BLOCK, _BYTES_A_BLOCK = 5_000, 16_000_000  # are packed at once
_ARGUMENTS_A_CALL = 4_000
_BYTES_A_CALL = 1_000_000
_KEYS_A_SCAN = 2_000
_TIME_LIMITS = {"socket_timeout": 5.0, "socket_connect_timeout": 2.0}  # a server that hangs or is lost refuses nothing

Result = TypeVar("Result")


class HeadraceRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """Configuration of `HeadraceRedisOnlineStore`: Feast's fields and one more. `skip_dedup` has no meaning here.

    Attributes:
        replicas_to_wait: how many replicas of each server must have a write of rows before it counts as done; 0: none.
            See `HeadraceRedisOnlineStore.write_newest`.
    """

    type: Literal["headrace.redis.HeadraceRedisOnlineStore"] = "headrace.redis.HeadraceRedisOnlineStore"  # type: ignore[assignment]
    replicas_to_wait: NonNegativeInt = 0

    @field_validator("connection_string")
    @classmethod
    def _fill_in_secrets(cls, text: str) -> str:
        return filled(text, "online_store.connection_string")


class HeadraceRedisOnlineStore(RedisOnlineStore):
    """Redis or Valkey with newest-wins: no row of an entity is written but over what it was compared with.

    Standalone and Sentinel: a transaction a chunk of rows, which the server refuses where another changed one of them
    since it was read; then a script, which cannot be refused, does it. Cluster: the script, a call a row, because it
    may touch one slot only; the calls of a chunk are pipelined.

    What an entity holds of a view is always one row: a write removes what an earlier row left in fields that the view
    has no more. A feature added or of another type since the last `feast apply` has no value until it is written;
    `full_scan_for_deletion: false` leaves that out, as it leaves out the deletion of views.
    """

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's own write, newest-wins as every write here."""
        self.write_newest(config, table, encode_feast_rows(config, table, data))
        if progress:
            progress(len(data))

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """The same, in a thread."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    def rows_a_write(self, columns: int) -> int | None:
        """See `NewestWinsStore`. Any number."""
        del columns
        return None

    def write_newest(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> int:
        """See `NewestWinsStore`. Atomic by row; a failure in between leaves whole rows, and a repeat is harmless.

        `key_ttl_seconds` begins anew with a newer row, not with the same one again.

        With `replicas_to_wait`, so many replicas of each server that was written to have acknowledged at the end what
        is stored of these keys: these rows, and where they were turned away the newer ones, whoever wrote those. In
        memory, that is. On a cluster this does not hold for keys whose slots are moved to another server meanwhile.

        Raises:
            TransientError: the server failed, or too few replicas acknowledged within 2 seconds; rows may be written.
        """
        columns = [pa.array(rows.order, BINARY), encode_timestamps(rows.event_us), *rows.values.values()]
        features, hashes = list(rows.values), _hashes(config, rows.keys)
        replicas = config.online_store.replicas_to_wait
        with _naming(config, view):
            client = self._get_client(config.online_store)
            if isinstance(client, Cluster):
                with acknowledged_by_all(client, replicas) as answers:
                    return sum(self._run(config, view, scripts.WRITE, features, hashes, columns, answers=answers))
            head = self._head(config, view, features)
            blocks = _chunks(_sizes(len(rows), columns), _ROWS_A_BLOCK, _BYTES_A_BLOCK)
            return sum(
                _at_once(
                    lambda one: _write_block(client, head, hashes[one], [c[one] for c in columns], replicas), blocks
                )
            )

    def read_stored(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> StoredRows:
        """See `NewestWinsStore`."""
        features = [feature.name for feature in view.features]
        flat: list[bytes | None] = []
        stride = 2 + len(features)
        for reply in self._run(config, view, scripts.READ, features, _hashes(config, keys), width=stride):
            flat += reply
        order = [_present(ts, own) for ts, own in zip(flat[0::stride], flat[1::stride], strict=True)]
        values = {
            feature: [value or b"" for value in flat[2 + place :: stride]] for place, feature in enumerate(features)
        }
        return StoredRows(list(keys), order, event_times(order), values)

    def stored_keys(
        self, config: RepoConfig, view: FeatureView, chosen: Callable[[list[bytes]], list[bytes]] | None = None
    ) -> Iterator[list[bytes]]:
        """See `NewestWinsStore`. By SCAN, so a key may come twice, and what comes meanwhile may be left out."""
        project = config.project.encode()
        for hashes in self._scan(config, view):
            keys = hashes if chosen is None else _hashes(config, chosen([key.removesuffix(project) for key in hashes]))
            holding = [key for reply in self._run(config, view, scripts.HOLDING, [], keys) for key in reply]
            if holding:
                yield [key.removesuffix(project) for key in holding]

    def replace_exact(
        self, config: RepoConfig, view: FeatureView, seen: StoredRows, new: EncodedRows | None
    ) -> list[bool]:
        """See `NewestWinsStore`. Atomic by row. After a lost reply what was done may be reported as not done."""
        orders = [order or b"" for order in seen.order]
        columns = [pa.array(column, BINARY) for column in (orders, *seen.values.values())]
        if new is None:
            columns += [pa.array([b""] * len(seen), BINARY)] * (2 + len(seen.values))
        else:
            columns += [pa.array(new.order, BINARY), encode_timestamps(new.event_us)]
            columns += [new.values[name] for name in seen.values]
        replies = self._run(config, view, scripts.REPLACE, list(seen.values), _hashes(config, seen.keys), columns)
        return [bool(done) for reply in replies for done in reply]

    def server_ids(self, config: RepoConfig) -> tuple[str, ...]:
        """The id of every master's replication history: a restarted or promoted server has another.

        Also a server that was a master once and does not say so tells the history of the one that took its place.
        """
        with _naming(config):
            client = self._get_client(config.online_store)
            is_cluster = isinstance(client, Cluster)
            infos = client.info(target_nodes="primaries").values() if is_cluster else [client.info()]
            return tuple(sorted({str(info.get("master_replid") or info["run_id"]) for info in infos}))

    def is_applied(self, config: RepoConfig, view: FeatureView) -> bool:
        """See `NewestWinsStore`."""
        if not config.online_store.full_scan_for_deletion:
            return True
        with _naming(config, view):
            return has_features(self._known_types(config, view), view)

    def read_mark(self, config: RepoConfig, view: FeatureView) -> Mark | None:
        """See `NewestWinsStore`."""
        with _naming(config, view):
            text = self._get_client(config.online_store).get(_own_key("mark", config, view))
        return None if text is None else json.loads(text)

    def swap_mark(self, config: RepoConfig, view: FeatureView, seen: Mark | None, mark: Mark) -> bool:
        """See `NewestWinsStore`."""
        arguments = ["" if seen is None else _text(seen), _text(mark)]
        key = _own_key("mark", config, view).encode()
        with _naming(config, view):
            client = self._get_client(config.online_store)
            if isinstance(client, Cluster):
                head = [argument.encode() for argument in arguments]
                (is_done,) = call_each(client, scripts.SWAP, [key], head, [], Answers(client, 0))
            else:
                is_done = client.register_script(scripts.SWAP)(keys=[key], args=arguments)
            return bool(is_done)

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Delete views, and empty the features that are new or of another type than when last applied."""
        with _naming(config):
            super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)
        if not config.online_store.full_scan_for_deletion:
            return
        for view in tables_to_keep:
            with _naming(config, view):
                self._take_types(config, view)

    @staticmethod
    def _parse_connection_string(connection_string: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Of Feast: the servers, and the options of the client. With time limits where it has none."""
        nodes, options = RedisOnlineStore._parse_connection_string(connection_string)
        return nodes, _TIME_LIMITS | options

    def _get_client(self, online_store_config: Any) -> Any:
        """Of Feast, with our client where it is a cluster."""
        if not self._client and online_store_config.redis_type == RedisType.redis_cluster:
            nodes, options = self._parse_connection_string(online_store_config.connection_string)
            options["startup_nodes"] = [ClusterNode(**node) for node in nodes]
            self._client = Cluster(**options)
        return super()._get_client(online_store_config)

    async def _get_client_async(self, online_store_config: Any) -> Any:
        """The same."""
        if not self._client_async and online_store_config.redis_type == RedisType.redis_cluster:
            nodes, options = self._parse_connection_string(online_store_config.connection_string)
            options["startup_nodes"] = [AsyncClusterNode(**node) for node in nodes]
            self._client_async = AsyncCluster(**options)
        return await super()._get_client_async(online_store_config)

    def _take_types(self, config: RepoConfig, view: FeatureView) -> None:
        """Empty the features that are new or of another type, and remember the types."""
        known, types = self._known_types(config, view), feature_types(view)
        changed = [name for name, kind in types.items() if known and known.get(name) != kind]
        if changed:
            for keys in self._scan(config, view):
                list(self._run(config, view, scripts.EMPTY, changed, keys))
        self._get_client(config.online_store).set(_own_key("types", config, view), _text(dict.fromkeys(known) | types))

    def delete_table(self, config: RepoConfig, table: FeatureView) -> None:
        """Delete a view's values, orders and mark. Other fields of the same hashes stay."""
        features = [feature.name for feature in table.features]
        for keys in self._scan(config, table):
            list(self._run(config, table, scripts.REMOVE, features, keys))
        with _naming(config, table):
            for kind in ("mark", "types"):
                self._get_client(config.online_store).delete(_own_key(kind, config, table))

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Delete these views; what else is in the database stays."""
        for table in tables:
            self.delete_table(config, table)
        super().teardown(config, [], [])

    def _known_types(self, config: RepoConfig, view: FeatureView) -> dict[str, str | None]:
        """The type of every feature that the view has had, as last applied; None: it has it no more."""
        text = self._get_client(config.online_store).get(_own_key("types", config, view))
        return {} if text is None else json.loads(text)

    def _scan(self, config: RepoConfig, view: FeatureView) -> Iterator[list[bytes]]:
        """The hashes of the view's entities in this project, in chunks."""
        client = self._get_client(config.online_store)
        join_keys, project = view.join_keys, config.project.encode()  # Feast computes them at each look
        prefix = _redis_key_prefix(join_keys)
        pattern = re.sub(rb"([\\*?\[\]])", rb"\\\1", prefix) + b"*"
        chunk: list[bytes] = []
        with _naming(config, view):
            is_cluster = isinstance(client, Cluster)
            found = scan(client, pattern, _KEYS_A_SCAN) if is_cluster else client.scan_iter(pattern, count=_KEYS_A_SCAN)
            for key in found:
                if _is_of_project(key, len(prefix), len(join_keys), project):
                    chunk.append(key)
                if len(chunk) == _KEYS_A_SCAN:
                    yield chunk
                    chunk = []
            if chunk:
                yield chunk

    def _run(
        self,
        config: RepoConfig,
        view: FeatureView,
        script: str,
        features: Sequence[str],
        keys: Sequence[bytes],
        columns: Sequence[pa.Array] = (),
        width: int = 1,
        answers: Answers | None = None,
    ) -> Iterator[Any]:
        """Call a script on these keys, in chunks; yields the replies.

        Args:
            features: whose fields the script is given.
            columns: what the script is given for each key, aligned with the keys; `large_binary`.
            width: how many values a key has in the reply.
            answers: of a cluster, notes who answered; None: nobody is waited for.
        """
        with _naming(config, view):
            client, head = self._get_client(config.online_store), self._head(config, view, features)
            noted = answers or Answers(client, 0)

            def call(one: slice) -> list[Any]:
                of_rows = [column[one] for column in columns]
                if not isinstance(client, Cluster):
                    return [client.register_script(script)(keys=keys[one], args=_arguments(head, of_rows))]
                return call_each(client, script, keys[one], head, of_rows, noted)

            for replies in _at_once(call, _calls(_sizes(len(keys), columns), max(len(columns), width))):
                yield from replies

    def _head(self, config: RepoConfig, view: FeatureView, features: Sequence[str]) -> list[bytes]:
        """The arguments that are the same for all keys; `headrace.redis_scripts` says what they are."""
        name, own = _versioned_fv_name(view, config), {feature.name for feature in view.features}
        retired = [feature for feature in self._known_types(config, view) if feature not in own]
        fields, others = (b"".join(_mmh3(f"{name}:{one}") for one in some) for some in (features, retired))
        ttl = config.online_store.key_ttl_seconds or 0
        return [f"_ts:{name}".encode(), f"_hr:{name}".encode(), str(ttl).encode(), fields, others]


def _at_once(do: Callable[[slice], Result], chunks: Iterable[slice]) -> Iterator[Result]:
    """The results, in order; the server works on one chunk while the next is packed."""
    waiting = list(chunks)
    if len(waiting) < 2:
        yield from map(do, waiting)
        return
    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
        yield from pool.map(do, waiting)


def _write_block(
    client: Any, head: Sequence[bytes], keys: Sequence[bytes], columns: Sequence[pa.Array], replicas: int
) -> int:
    """Transaction by transaction; where one comes to nothing, whatever the reason, by a call of the script instead.

    All over one connection, so that it is the server written to whose replicas are waited for.

    Returns:
        How many rows were written.
    """
    packed, written = _PackedWrites.of(head, keys, columns), 0
    chunks = list(_calls(_sizes(len(keys), columns), len(columns), _KEYS_A_TRANSACTION))
    with connection_of(client) as connection, acknowledged(connection, keys[0], replicas):
        transactions = _Transactions(connection, packed, keys, columns[0])
        for chunk, following in zip_longest(chunks, chunks[1:]):
            done = transactions.write(chunk, following)
            if done is None:
                arguments = _arguments(head, [column[chunk] for column in columns])
                done = _call_over(connection, scripts.WRITE, keys[chunk], arguments)
            written += done
    return written


@dataclass(frozen=True)
class _PackedWrites:
    """The commands that write some rows, packed for each row: what is stored, the new row, what goes, its time to live.

    Attributes:
        reads: its `_ts` and `_hr`.
        writes: the new row.
        removes: the fields that the view has no more go; None if there are none.
        expires: its time to live begins; None if it lives for ever.
    """

    reads: pa.Array
    writes: pa.Array
    removes: pa.Array | None
    expires: pa.Array | None

    @classmethod
    def of(cls, head: Sequence[bytes], keys: Sequence[bytes], columns: Sequence[pa.Array]) -> _PackedWrites:
        """Pack them; see `_run` for the arguments."""
        ts_field, own_field, ttl, fields, retired = head
        key, (order, ts, *values) = pa.array(keys, BINARY), columns
        pairs = [ts_field, ts, own_field, joined([order, ts])]
        for field, column in zip(_names(fields), values, strict=True):
            pairs += [field, column]
        return cls(
            reads=commands([b"HMGET", key, ts_field, own_field]),
            writes=commands([b"HSET", key, *pairs]),
            removes=commands([b"HDEL", key, *_names(retired)]) if retired else None,
            expires=commands([b"EXPIRE", key, ttl]) if ttl != b"0" else None,
        )


class _Transactions:
    """What the script `WRITE` does, by commands of the server's own: at half the cost, and all rows of a chunk or none.

    A chunk costs one round trip: with its transaction is sent what looks at the chunk that follows.

    Args:
        connection: used by nobody else meanwhile.
        packed, keys, orders: of all chunks.
    """

    def __init__(self, connection: Any, packed: _PackedWrites, keys: Sequence[bytes], orders: pa.Array) -> None:
        self._connection = connection
        self._packed = packed
        self._keys = keys
        self._orders = orders
        self._is_filling = False
        self._seen: list[Any] = []

    def write(self, chunk: slice, following: slice | None) -> int | None:
        """Write a chunk.

        Args:
            following: the chunk that is written next.

        Returns:
            How many rows were written; None where another changed one of the keys meanwhile and none was, and where the
            server failed and it is not known.
        """
        pack = self._connection.pack_command
        try:
            _, *seen = self._seen or self._replies(self._look(chunk, []))
            changes = self._changes(chunk, self._stored(chunk, seen))
            reached("write.1.compared")
            packets = [*pack("MULTI"), *map(as_bytes, changes), *pack("EXEC")]
            coming = 0
            if following is None:
                self._send(packets)
            else:
                coming = self._look(following, packets)
            *_, done = self._replies(1 + sum(map(len, changes)) + 1)
            self._seen = self._replies(coming)
            reached("write.2.written")
        except RedisError:
            self._connection.disconnect()  # with what it watches, and the replies that were not read
            self._seen = []
            return None
        return None if done is None or any(isinstance(reply, Exception) for reply in done) else len(changes[0])

    def _look(self, chunk: slice, packets: list[Any]) -> int:
        """Send these, watch a chunk, and ask what is stored: or if anything is, where nothing was of the one before.

        Returns:
            How many replies to that come after those to the packets.
        """
        pack, keys = self._connection.pack_command, self._keys[chunk]
        question = pack("EXISTS", *keys) if self._is_filling else [as_bytes(self._packed.reads[chunk])]
        self._send([*packets, *pack("WATCH", *keys), *question])
        return 1 + (1 if self._is_filling else len(keys))

    def _stored(self, chunk: slice, seen: list[Any]) -> list[Any]:
        """What is stored of a chunk, row by row; nothing if nothing is."""
        if self._is_filling:
            if seen == [0]:
                return []
            self._send([as_bytes(self._packed.reads[chunk])])
            seen = self._replies(len(self._keys[chunk]))
        self._is_filling = not any(ts is not None for ts, _ in seen)
        return seen

    def _changes(self, chunk: slice, stored: list[Any]) -> list[pa.Array]:
        """The commands of a chunk, of the rows that are written; the first are the rows themselves."""
        writing = renewing = [True] * len(self._keys[chunk])
        if stored:
            fates = map(_fate, stored, self._orders[chunk].to_pylist())
            writing, renewing = map(list, zip(*fates, strict=True))
        packed = self._packed
        parts = ((packed.writes, writing), (packed.removes, writing), (packed.expires, renewing))
        return [commands_of[chunk].filter(pa.array(rows)) for commands_of, rows in parts if commands_of is not None]

    def _send(self, packets: list[Any]) -> None:
        """At once, as each piece would be a system call, and wake the server.

        Unchecked: a check that failed would open the connection anew, and what is watched would be forgotten.
        """
        self._connection.send_packed_command([b"".join(packets)], check_health=False)

    def _replies(self, count: int) -> list[Any]:
        """The replies that come next; the first that is an error is raised."""
        return [self._connection.read_response() for _ in range(count)]


def _fate(stored: Sequence[bytes | None], order: bytes) -> tuple[bool, bool]:
    """Whether a row is to be written over the stored `_ts` and `_hr`, and whether its time to live begins anew then."""
    has = _present(*stored)
    if has is None:
        return True, True
    if has == order:
        return True, False
    return not is_older(order, has), is_older(has, order)


def _call_over(connection: Any, script: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
    """One call for all keys, over a connection of one's own. The script is loaded where the server does not have it."""
    call = ("EVALSHA", hashlib.sha1(script.encode()).hexdigest(), len(keys), *keys, *arguments)  # noqa: S324 - its name
    try:
        return ask(connection, *call)
    except NoScriptError:
        ask(connection, "SCRIPT LOAD", script)
        return ask(connection, *call)


def _arguments(head: Sequence[Any], columns: Sequence[pa.Array]) -> list[Any]:
    """Of a script: what is the same for all keys, then row by row."""
    return [*head, *(value for row in zip(*map(to_list, columns), strict=True) for value in row)]


def _names(fields: bytes) -> list[bytes]:
    """The fields in a row of them; each is four bytes long."""
    return [fields[at : at + 4] for at in range(0, len(fields), 4)]


def _sizes(rows: int, columns: Sequence[pa.Array]) -> Int64s:
    """How many bytes each row has."""
    return sum((pc.binary_length(column).to_numpy() for column in columns), start=np.zeros(rows, dtype=np.int64))


def _calls(sizes: Int64s, width: int, most: int = _ARGUMENTS_A_CALL) -> Iterator[slice]:
    """Slices of rows that are worth a call each: bounded, so that readers need not wait."""
    return _chunks(sizes, max(1, min(most, _ARGUMENTS_A_CALL // (1 + width))), _BYTES_A_CALL)


def _chunks(sizes: Int64s, most: int, most_bytes: int) -> Iterator[slice]:
    """Slices of rows of these sizes, bounded in rows and in bytes, but of at least one row each."""
    ends = np.cumsum(sizes)
    start, rows = 0, len(sizes)
    while start < rows:
        full = int(np.searchsorted(ends, ends[start] - sizes[start] + most_bytes, side="right"))
        stop = max(start + 1, min(full, start + most, rows))
        yield slice(start, stop)
        start = stop


def _is_of_project(key: bytes, at: int, values: int, project: bytes) -> bool:
    """Whether a hash is an entity of this project: after `values` join key values comes just the project's name."""
    for _ in range(values):
        if len(key) < at + 8:
            return False
        at += 8 + int(struct.unpack_from("<I", key, at + 4)[0])
    return key[at:] == project


def _present(ts: bytes | None, own: bytes | None) -> bytes | None:
    """The order of what is stored; see the script's `present`."""
    if ts is None:
        return None
    if own is not None and own[ORDER_BYTES:] == ts:
        return own[:ORDER_BYTES]
    time = Timestamp.FromString(ts)
    return stock_order(time.seconds * 1_000_000 + time.nanos // 1000)


@contextmanager
def _naming(config: RepoConfig, view: FeatureView | None = None) -> Iterator[None]:
    """Say where it failed, and what that leaves behind. Never the connection string: it holds the password."""
    try:
        yield
    except (RedisError, RedisClusterException) as error:
        nodes, _ = RedisOnlineStore._parse_connection_string(config.online_store.connection_string)
        where = ", ".join(f"{node.get('host')}:{node.get('port')}" for node in nodes)
        what = "" if view is None else f"feature view `{view.name}`: "
        msg = (
            f"{what}Redis at {where} failed: {type(error).__name__}: {str(error).rstrip('.')}. See to the server, then "
            "repeat. How many rows a write had written before is not known; each is whole, and to write them again "
            "does no harm"
        )
        raise TransientError(msg) from error


def _hashes(config: RepoConfig, keys: Sequence[bytes]) -> list[bytes]:
    project = config.project.encode()
    return [key + project for key in keys]


def _own_key(kind: str, config: RepoConfig, view: FeatureView) -> str:
    return f"headrace:{kind}:{config.project}:{_versioned_fv_name(view, config)}"


def _text(thing: Mapping[str, Any]) -> str:
    return json.dumps(thing, sort_keys=True, separators=(",", ":"))
