"""What the replicas of a Redis server have: waited for, of the very server that was written to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis.exceptions import AskError, RedisError, ResponseError

_ACKNOWLEDGED_WITHIN_S = 2.0
_NO_FIELD = b"_hr"  # no view has it
_HISTORY = ("INFO", "replication")


class NotAcknowledgedError(RedisError):
    """Fewer replicas than `replicas_to_wait` have what was written, or it is not known. Cause of a `TransientError`."""


@contextmanager
def connection_of(client: Any) -> Iterator[Any]:
    """A connection of a client's own; closed where it is left in the midst of a reply."""
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def ask(connection: Any, *command: Any) -> Any:
    """The reply to one command; an error is raised."""
    connection.send_command(*command)
    return connection.read_response()


@contextmanager
def acknowledged(connection: Any, key: bytes, replicas: int) -> Iterator[None]:
    """At the end so many replicas of the server have all that it had done until then, for whichever client.

    Args:
        connection: to the server that is written to meanwhile, over this connection or others.
        key: one that the server is responsible for; it is touched.

    Raises:
        NotAcknowledgedError: see `acknowledge`.
    """
    if not replicas:
        yield
        return
    before = history_of(connection)
    yield
    acknowledge(connection, key, replicas, before)


def acknowledge(connection: Any, key: bytes, replicas: int, before: bytes, *, is_imported: bool = False) -> None:
    """Wait until so many replicas of the server have all that it has done until now, for whichever client.

    `WAIT` alone is about what its own connection wrote: nothing, where all rows were turned away by newer ones, and
    whether anybody waits for those is not known. So it follows a write that changes nothing, and since replicas take
    all writes in one order, who has that one has those before it.

    Args:
        key: one that the server is responsible for; it is touched.
        before: `history_of` the server before it was written to.
        is_imported: whether the slot of the key is only on its way to this server.

    Raises:
        NotAcknowledgedError: too few have it in time; or the connection leads to another server now, or to one that
            was a replica in between: it may have lost what was written first; or the key went to another server.
    """
    timeout_s = min(_ACKNOWLEDGED_WITHIN_S, (connection.socket_timeout or math.inf) / 2)
    write = ("MULTI",), ("HSET", key, _NO_FIELD, b""), ("HDEL", key, _NO_FIELD), ("EXEC",)
    before_it = [("ASKING",)] if is_imported else []
    asked = [*before_it, *write, ("WAIT", replicas, max(1, int(timeout_s * 1000))), _HISTORY]
    connection.send_packed_command(connection.pack_commands(asked))
    replies = [answer(connection) for _ in asked]
    *_, written, count, after = replies
    server = f"{connection.host}:{connection.port}"
    if any(isinstance(reply, AskError) for reply in replies):  # of which `MovedError` is one
        msg = f"slots went from {server} to another server meanwhile"
        raise NotAcknowledgedError(msg)
    for reply in (*replies, *written):
        if isinstance(reply, Exception):
            raise reply
    if _history_id(after) != before:
        msg = f"{server} is not the primary that was written to first: there was a failover or a restart"
        raise NotAcknowledgedError(msg)
    if count < replicas:
        msg = (
            f"{count} of {replicas} replicas of {server} acknowledged within {timeout_s:g} s what was written; connect "
            "the missing ones, or lower `replicas_to_wait` in feature_store.yaml"
        )
        raise NotAcknowledgedError(msg)


def history_of(connection: Any) -> bytes:
    """The id of a server's replication history: another after each start and each promotion."""
    return _history_id(ask(connection, *_HISTORY))


def _history_id(info: bytes) -> bytes:
    found = re.search(rb"^master_replid:(\w+)", info, re.MULTILINE)
    if found is None:
        raise NotAcknowledgedError("the server does not tell its `master_replid`, and so not whether it was replaced")
    return found[1]


def answer(connection: Any) -> Any:
    """The next reply; an error that is the server's own answer is one, too."""
    try:
        return connection.read_response()
    except ResponseError as error:
        return error
