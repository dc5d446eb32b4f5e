"""Redis Cluster: calls of a script, a key each, pipelined to whatever server has the key now.

A slot may be on its way between two servers (`ASK`), or have gone to another (`MOVED`), between any two calls; a server
may be lost, and a replica promoted. What was redirected is sent again, all of it at once: redis-py's own pipeline sends
it call by call, and each of them to a lost server first.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa
from redis import asyncio as redis_asyncio
from redis import exceptions
from redis.cluster import ClusterNode, RedisCluster
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, NoScriptError

from headrace.redis_replicas import NotAcknowledgedError, acknowledge, answer, ask, connection_of, history_of
from headrace.resp import as_bytes, commands
from headrace.values import BINARY, joined

_ASKING = b"*1\r\n$6\r\nASKING\r\n"
_ROUNDS = 16
_PAUSE_S = 0.02  # before it is sent again: servers hear of each other's slots a moment later
_LOST_ROUNDS = 2  # a connection that was closed in between is opened anew; who waits for a failover is the caller
_LOST = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ClusterDownError)


class Cluster(RedisCluster):
    """redis-py's client, which can follow an `ASK` also to a server that has no slot yet."""

    def get_node(self, host: Any = None, port: Any = None, node_name: Any = None) -> Any:
        """Of redis-py, which knows only servers that have slots, and fails on None."""
        node = super().get_node(host, port, node_name)  # type: ignore[no-untyped-call]
        if node is None and node_name is not None:
            name, _, number = node_name.rpartition(":")
            # Until it is asked again who has which slot: then it is there, or its connections are closed.
            node = self.nodes_manager.nodes_cache.setdefault(node_name, ClusterNode(name, int(number)))
        return node

    def primary_of(self, slot: int) -> ClusterNode:
        """Who has a slot, as far as is known."""
        known = self.nodes_manager.slots_cache.get(slot)  # asked for each key: redis-py's own way costs ten times that
        return known[0] if known else self.nodes_manager.get_node_from_slot(slot)

    def primaries(self) -> list[ClusterNode]:
        """Those that have slots, as far as is known."""
        return list(self.get_primaries())  # type: ignore[no-untyped-call]

    def look_again(self, lost: Sequence[ClusterNode] = ()) -> None:
        """Ask who has which slot; those that were lost last.

        Raises:
            RedisClusterException: nobody answers.
        """
        with self.nodes_manager._lock:  # redis-py takes it only where it reads
            for node in lost:
                self.nodes_manager.move_node_to_end_of_cached_nodes(node.name)
        self.nodes_manager.initialize()


class AsyncCluster(redis_asyncio.RedisCluster):
    """The same of redis-py's other client."""

    def get_node(self, host: Any = None, port: Any = None, node_name: Any = None) -> Any:
        """See `Cluster`."""
        node = super().get_node(host, port, node_name)
        if node is None and node_name is not None:
            name, _, number = node_name.rpartition(":")
            options = self.nodes_manager.connection_kwargs
            node = redis_asyncio.cluster.ClusterNode(name, int(number), **options)
            self.nodes_manager.nodes_cache[node_name] = node
        return node


class Answers:
    """Who answered for which slot, and with which history before. Thread-safe.

    Attributes:
        replicas: how many of each server's are waited for; 0: none, and nothing is noted.
    """

    def __init__(self, client: Cluster, replicas: int) -> None:
        self.replicas = replicas
        self._client = client
        self._histories: dict[ClusterNode, bytes] = {}
        self._keys: dict[ClusterNode, tuple[bytes, bool]] = {}
        self._owners: dict[int, ClusterNode] = {}
        self._lock = threading.Lock()

    def before(self, server: ClusterNode, connection: Any) -> None:
        """It will be written to."""
        if self.replicas and server not in self._histories:
            history = history_of(connection)
            with self._lock:
                self._histories.setdefault(server, history)

    def note(self, server: ClusterNode, slot: int, key: bytes, *, is_imported: bool) -> None:
        """It has answered a call."""
        if not self.replicas:
            return
        with self._lock:
            if not is_imported:
                self._owners[slot] = server
            if server not in self._keys or not is_imported:
                self._keys[server] = key, is_imported

    def acknowledge(self) -> None:
        """Return when so many replicas of each server have what is stored of the keys that it answered for.

        Raises:
            NotAcknowledgedError: too few have it in time, or it is not known.
        """
        for server, (key, is_imported) in self._keys.items():
            with connection_of(self._client.get_redis_connection(server)) as connection:
                acknowledge(connection, key, self.replicas, self._histories[server], is_imported=is_imported)
        if any(self._client.primary_of(slot) != server for slot, server in self._owners.items()):
            raise NotAcknowledgedError("slots went to other servers meanwhile")


@contextmanager
def acknowledged_by_all(client: Cluster, replicas: int) -> Iterator[Answers]:
    """What is called meanwhile is acknowledged at the end; see `Answers.acknowledge`."""
    answers = Answers(client, replicas)
    yield answers
    if replicas:
        answers.acknowledge()


def call_each(
    client: Cluster,
    script: str,
    keys: Sequence[bytes],
    head: Sequence[bytes],
    columns: Sequence[pa.Array],
    answers: Answers,
) -> list[Any]:
    """Call a script for each key; the replies in their order.

    A call is made again where its server was lost, so it has to be harmless to repeat. A script is loaded wherever it
    is missing.

    Args:
        head: the arguments that all calls share.
        columns: those that follow, of each key; `large_binary` without nulls.

    Raises:
        RedisError, RedisClusterException: a server failed twice, or answered one call with an error; others are done.
    """
    name = hashlib.sha1(script.encode()).hexdigest().encode()  # noqa: S324 - so it is called
    packed = commands([b"EVALSHA", name, b"1", pa.array(keys, BINARY), *head, *columns])
    slots = [key_slot(key) for key in keys]
    replies: list[Any] = [None] * len(keys)
    asked: dict[int, ClusterNode] = {}
    waiting: Sequence[int] = range(len(keys))
    lost_rounds = 0
    for number in range(_ROUNDS):
        if number > 1:  # the first redirection says where
            time.sleep(_PAUSE_S)
        parts = _parts(client, waiting, slots, asked)
        with _Round(parts, answers) as under_way:
            under_way.send(packed)
            found = under_way.replies()
        for part in parts:
            for i in part.calls:
                if not isinstance(found[i], Exception):
                    answers.note(part.server, slots[i], keys[i], is_imported=part.is_asked)
        for i, reply in found.items():
            replies[i] = reply
        asked, waiting = _redirected(client, found)
        lost = [part.server for part in parts if any(isinstance(found[i], _LOST) for i in part.calls)]
        lost_rounds += bool(lost)
        if not waiting or lost_rounds == _LOST_ROUNDS:
            break
        if lost:
            client.look_again(lost)
        for server in {part.server for part in parts if any(isinstance(found[i], NoScriptError) for i in part.calls)}:
            client.get_redis_connection(server).script_load(script)
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def scan(client: Cluster, pattern: bytes, count: int) -> Iterator[bytes]:
    """Every key that stays, also one that is moved to another server meanwhile; a key may come twice.

    A slot that is moved twice within one scan is excepted. A server that had been scanned before a key came to it is
    scanned again at the end.
    """
    client.look_again()
    before = _holdings(client)
    for server in before:
        yield from _scan_one(client, server, pattern, count)
    after = _holdings(client)
    for server, now in after.items():
        former = before.get(server, _Holding())
        if now.own - former.own or now.importing or former.importing:
            yield from _scan_one(client, server, pattern, count)


class _Part:
    """The calls of one round that one server gets.

    Attributes:
        is_asked: whether their slots are only on their way to it.
        calls: by number.
    """

    def __init__(self, client: Cluster, server: ClusterNode, *, is_asked: bool) -> None:
        self.server = server
        self.is_asked = is_asked
        self.calls: list[int] = []
        self._client = client
        self._pool: Any = None
        self._connection: Any = None
        self._lost: Exception | None = None

    def send(self, packed: pa.Array, answers: Answers) -> None:
        """Send its own of all calls, and do not wait for the replies."""
        try:
            self._pool = self._client.get_redis_connection(self.server).connection_pool
            self._connection = self._pool.get_connection()
            answers.before(self.server, self._connection)
            own = packed.take(pa.array(self.calls))
            if self.is_asked:
                own = joined([pa.scalar(_ASKING, BINARY), own])
            self._connection.send_packed_command([as_bytes(own)])
        except _LOST as error:
            self._lose(error)

    def replies(self) -> list[Any]:
        """Replies and errors, of each call."""
        if self._lost is None:
            try:
                every = 1 + self.is_asked
                found = [answer(self._connection) for _ in range(every * len(self.calls))]
            except _LOST as error:
                self._lose(error)
            else:
                self._pool.release(self._connection)
                self._connection = None
                return found[every - 1 :: every]
        return [self._lost] * len(self.calls)

    def close(self) -> None:
        """Let go of the connection, and of replies that were not read."""
        if self._connection is not None:
            self._connection.disconnect()
            self._pool.release(self._connection)
            self._connection = None

    def _lose(self, error: Exception) -> None:
        self._lost = error
        self.close()


class _Round:
    """All calls at once, to all servers; then their replies."""

    def __init__(self, parts: Sequence[_Part], answers: Answers) -> None:
        self._parts = parts
        self._answers = answers

    def send(self, packed: pa.Array) -> None:
        for part in self._parts:
            part.send(packed, self._answers)

    def replies(self) -> dict[int, Any]:
        return {i: reply for part in self._parts for i, reply in zip(part.calls, part.replies(), strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self._parts:
            part.close()


def _parts(
    client: Cluster, waiting: Sequence[int], slots: Sequence[int], asked: Mapping[int, ClusterNode]
) -> list[_Part]:
    """Who gets which call."""
    parts: dict[tuple[str, bool], _Part] = {}
    for i in waiting:
        server, is_asked = asked.get(i) or client.primary_of(slots[i]), i in asked
        part = parts.setdefault((server.name, is_asked), _Part(client, server, is_asked=is_asked))
        part.calls.append(i)
    return list(parts.values())


def _redirected(client: Cluster, found: Mapping[int, Any]) -> tuple[dict[int, ClusterNode], list[int]]:
    """Of some replies those servers that are to be asked instead, this once; and which calls are to be made again."""
    asked: dict[int, ClusterNode] = {}
    again: list[int] = []
    moved: dict[int, MovedError] = {}
    for i, reply in found.items():
        if isinstance(reply, MovedError):
            moved[reply.slot_id] = reply
        elif isinstance(reply, AskError):
            asked[i] = client.get_node(node_name=f"{reply.host}:{reply.port}")
        if isinstance(reply, (AskError, NoScriptError, *_LOST)):
            again.append(i)
    for redirection in moved.values():
        client.nodes_manager.move_slot(redirection)
    return asked, again


@dataclass
class _Holding:
    """The slots that a server has, and those that are on their way to it."""

    own: set[int] = field(default_factory=set)
    importing: set[int] = field(default_factory=set)


def _holdings(client: Cluster) -> dict[ClusterNode, _Holding]:
    """What each server says of itself, also one that has no slot yet."""
    lines = {node: _nodes(client, node) for node in client.primaries()}
    newcomers = {address for nodes in lines.values() for address in _without_slots(nodes)}
    for server in (client.get_node(node_name=address) for address in sorted(newcomers)):
        lines.setdefault(server, _nodes(client, server))
    return {server: _holding(nodes) for server, nodes in lines.items()}


def _nodes(client: Cluster, server: ClusterNode) -> list[list[str]]:
    """What a server knows of all, a list of words each.

    Source: https://valkey.io/commands/cluster-nodes/, "Serialization format".
    """
    with connection_of(client.get_redis_connection(server)) as connection:
        return [line.split(" ") for line in ask(connection, "CLUSTER", "NODES").decode().splitlines()]


def _without_slots(nodes: Sequence[Sequence[str]]) -> Iterator[str]:
    """The addresses of primaries that could get their first slots."""
    for _, address, flags, _, _, _, _, state, *slots in nodes:
        if not slots and state == "connected" and "master" in flags.split(",") and "fail" not in flags:
            yield address.partition("@")[0]


def _holding(nodes: Sequence[Sequence[str]]) -> _Holding:
    """Of the server that tells it."""
    holding = _Holding()
    for word in next(words[8:] for words in nodes if "myself" in words[2]):
        if word.startswith("["):
            slot, sign, _ = word[1:].partition("-<-")
            holding.importing |= {int(slot)} if sign else set()
        else:
            first, _, last = word.partition("-")
            holding.own.update(range(int(first), int(last or first) + 1))
    return holding


def _scan_one(client: Cluster, server: ClusterNode, pattern: bytes, count: int) -> Iterator[bytes]:
    yield from client.get_redis_connection(server).scan_iter(pattern, count=count)
