"""Feast's Redis online store, with newest-wins decided inside Redis or Valkey by a script.

The layout is Feast's: one hash an entity, a field a feature, `_ts:<view>` the event time. One more field a view,
`_hr:<view>`, holds the order of the stored row followed by the very bytes of `_ts` that were written with it; where
`_ts` is not those bytes any more, a stock client wrote later, and its time counts. It is at most 64 bytes long: beyond
that Redis would store the whole hash in another way, several times as large.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.helpers import _mmh3, _redis_key_prefix
from feast.infra.online_stores.redis import (
    RedisOnlineStore,
    RedisOnlineStoreConfig,
    RedisType,
    _versioned_fv_name,
)
from google.protobuf.timestamp_pb2 import Timestamp
from redis.exceptions import NoScriptError, RedisError

from headrace import registry as _registry  # noqa: F401 - resolves relative registries
from headrace.encode import ORDER_BYTES, EncodedRows, encode_timestamps
from headrace.errors import TransientError
from headrace.online import FeastRow, Mark, StoredRows, encode_feast_rows, event_times, feature_types, stock_order

_CALLS_AT_ONCE = 2  # the server works on one while the next is packed
_ARGUMENTS_A_CALL = 4_000
_BYTES_A_CALL = 1_000_000
_KEYS_A_SCAN = 2_000

# What scripts share. Lua compares strings by the server's locale, so orders are compared byte by byte; `unpack` takes
# fewer than 8,000 items, so wide rows go in pieces (within a script, which is atomic). `older` is
# `headrace.encode.is_older`.
_LIBRARY = """
local call, sub, byte, unpack_numbers, PIECE = redis.call, string.sub, string.byte, struct.unpack, 6000
local function older(a, b)
  local a1, a2 = unpack_numbers('>I4I4', a)  -- the event time decides most
  local b1, b2 = unpack_numbers('>I4I4', b)
  if a1 ~= b1 then return a1 < b1 end
  if a2 ~= b2 then return a2 < b2 end
  for i = 9, ORDER_BYTES do
    local x, y = byte(a, i), byte(b, i)
    if x ~= y then
      if i > 17 and i < 22 and byte(a, 17) == 0 then return false end  -- of another schema
      return x < y
    end
  end
  return false
end
-- A varint, as its lowest 28 bits and the rest, because a number here has 53; and where it ends.
local function varint(s, at)
  local low, rest = 0, 0
  for place = 0, 9 do
    local bits = byte(s, at + place)
    if place < 4 then low = low + bits % 128 * 128 ^ place else rest = rest + bits % 128 * 128 ^ (place - 4) end
    if bits < 128 then return low, rest, at + place + 1 end
  end
end
-- The order of a row of which only its protobuf Timestamp is known: no created time, the lowest of its microsecond.
local function stock_order(ts)
  local seconds, nanos, at = 0, 0, 1
  while at <= #ts do
    local tag = byte(ts, at)
    local low, rest
    low, rest, at = varint(ts, at + 1)
    if rest >= 2 ^ 35 then rest = rest - 2 ^ 36 end
    if tag == 8 then seconds = rest * 2 ^ 28 + low else nanos = low + rest * 2 ^ 28 end
  end
  local lower = seconds % 65536 * 1000000 + math.floor(nanos / 1000)
  local upper = math.floor(seconds / 65536) * 1000000 + math.floor(lower / 65536)
  local high = math.floor(upper / 65536) + 2147483648
  return struct.pack('>I4I4', high, upper % 65536 * 65536 + lower % 65536) .. string.rep('\\0', 25)
end
-- The order of what is stored, or longer bytes that begin with it; '' for nothing.
local function present(own, ts)
  if not ts then return '' end
  if own and #own == ORDER_BYTES + #ts and sub(own, ORDER_BYTES + 1) == ts then return own end
  return stock_order(ts)
end
local function names(fields)
  local list = {}
  for at = 1, #fields, 4 do list[#list + 1] = sub(fields, at, at + 3) end
  return list
end
local function remove(key, list)
  for from = 1, #list, PIECE do
    call('HDEL', key, unpack(list, from, math.min(from + PIECE - 1, #list)))
  end
end
local function set(key, pairs, count)
  if count <= PIECE then return call('HSET', key, unpack(pairs, 1, count)) end
  for from = 1, count, PIECE do
    call('HSET', key, unpack(pairs, from, math.min(from + PIECE - 1, count)))
  end
end
""".replace("ORDER_BYTES", str(ORDER_BYTES))

# ARGV of all that follow: `_ts` field, `_hr` field, seconds to live (0 is for ever), the fields of the view's features
# and of those that it has no more, four bytes each, joined; then for each of KEYS what the script says.

# For each key its order, its `_ts`, its values. Returns how many were written.
_WRITE = (
    _LIBRARY
    + """
local ts_field, own_field, ttl, fields, retired = ARGV[1], ARGV[2], tonumber(ARGV[3]), names(ARGV[4]), names(ARGV[5])
local features, pairs = #fields, {ts_field, '', own_field, ''}
for f = 1, features do pairs[3 + 2 * f] = fields[f] end
local at, written = 6, 0
for k = 1, #KEYS do
  local key, order, ts = KEYS[k], ARGV[at], ARGV[at + 1]
  local mine = order .. ts
  local stored_ts = call('HGET', key, ts_field)  -- two calls, the second seldom, beat the table of one
  local own = stored_ts and call('HGET', key, own_field)
  local is_same = own == mine and stored_ts == ts
  local has = is_same and own or present(own, stored_ts)
  if is_same or has == '' or not older(order, has) then
    pairs[2], pairs[4] = ts, mine
    for f = 1, features do pairs[4 + 2 * f] = ARGV[at + 1 + f] end
    set(key, pairs, 4 + 2 * features)
    remove(key, retired)
    if ttl > 0 and not is_same and (has == '' or older(has, order)) then call('EXPIRE', key, ttl) end
    written = written + 1
  end
  at = at + 2 + features
end
return written
"""
)

# Nothing more for each key. Returns the `_ts`, `_hr` and values of each key in turn.
_READ = (
    _LIBRARY
    + """
local wanted, reply, count = names(ARGV[4]), {}, 0
table.insert(wanted, 1, ARGV[1])
table.insert(wanted, 2, ARGV[2])
for k = 1, #KEYS do
  for from = 1, #wanted, PIECE do
    local found = call('HMGET', KEYS[k], unpack(wanted, from, math.min(from + PIECE - 1, #wanted)))
    for i = 1, #found do reply[count + i] = found[i] end
    count = count + #found
  end
end
return reply
"""
)

# Nothing more for each key. Returns the keys that hold the view.
_HOLDING = """
local holding = {}
for k = 1, #KEYS do
  if redis.call('HEXISTS', KEYS[k], ARGV[1]) == 1 then holding[#holding + 1] = KEYS[k] end
end
return holding
"""

# For each key the order and values that were seen, and the order, `_ts` and values to store; an order of '' is no row.
# Returns for each key whether it was done, 1 or 0.
_REPLACE = (
    _LIBRARY
    + """
local ts_field, own_field, ttl, fields, retired = ARGV[1], ARGV[2], tonumber(ARGV[3]), names(ARGV[4]), names(ARGV[5])
local features, done = #fields, {}
local function is_as_seen(key, at)
  local stored = call('HMGET', key, ts_field, own_field)
  if sub(present(stored[2], stored[1]), 1, ORDER_BYTES) ~= ARGV[at] then return false end
  for f = 1, features do
    if (call('HGET', key, fields[f]) or '') ~= ARGV[at + f] then return false end
  end
  return true
end
local at = 6
for k = 1, #KEYS do
  local key, order, ts = KEYS[k], ARGV[at + 1 + features], ARGV[at + 2 + features]
  done[k] = 0
  if is_as_seen(key, at) then
    done[k] = 1
    remove(key, retired)
    if order == '' then
      remove(key, fields)
      remove(key, {ts_field, own_field})
    else
      local pairs = {ts_field, ts, own_field, order .. ts}
      for f = 1, features do pairs[3 + 2 * f], pairs[4 + 2 * f] = fields[f], ARGV[at + 2 + features + f] end
      set(key, pairs, 4 + 2 * features)
      if ttl > 0 then call('EXPIRE', key, ttl) end
    end
  end
  at = at + 3 + 2 * features
end
return done
"""
).replace("ORDER_BYTES", str(ORDER_BYTES))

# Nothing more for each key. Removes the view's row.
_REMOVE = (
    _LIBRARY
    + """
for k = 1, #KEYS do
  remove(KEYS[k], names(ARGV[4]))
  remove(KEYS[k], names(ARGV[5]))
  remove(KEYS[k], {ARGV[1], ARGV[2]})
end
return 0
"""
)

# Nothing more for each key. Removes the values of the features.
_EMPTY = (
    _LIBRARY
    + """
for k = 1, #KEYS do remove(KEYS[k], names(ARGV[4])) end
return 0
"""
)

# KEYS: the mark. ARGV: what was seen ('' is none), what to set. Returns 1 if it was set.
_SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class HeadraceRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """Configuration of `HeadraceRedisOnlineStore`; the fields are Feast's. `skip_dedup` has no meaning here."""

    type: Literal["headrace.redis.HeadraceRedisOnlineStore"] = "headrace.redis.HeadraceRedisOnlineStore"  # type: ignore[assignment]


class HeadraceRedisOnlineStore(RedisOnlineStore):
    """Redis or Valkey with newest-wins: each entity's row is compared and written by one atomic script call.

    Standalone and Sentinel: one call a chunk of rows. Cluster: one call a row, because a script may touch one slot
    only; the calls of a chunk are pipelined.

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

    def write_newest(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> int:
        """See `NewestWinsStore`. Atomic by row; a failure in between leaves whole rows, and a repeat is harmless.

        `key_ttl_seconds` begins anew with a newer row, not with the same one again.
        """
        columns = [rows.order, encode_timestamps(rows.event_us), *rows.values.values()]
        return sum(self._run(config, view, _WRITE, list(rows.values), _hashes(config, rows.keys), columns))

    def read_stored(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> StoredRows:
        """See `NewestWinsStore`."""
        features = [feature.name for feature in view.features]
        flat: list[bytes | None] = []
        stride = 2 + len(features)
        for reply in self._run(config, view, _READ, features, _hashes(config, keys), width=stride):
            flat += reply
        order = [_present(ts, own) for ts, own in zip(flat[0::stride], flat[1::stride], strict=True)]
        values = {
            feature: [value or b"" for value in flat[2 + place :: stride]] for place, feature in enumerate(features)
        }
        return StoredRows(list(keys), order, event_times(order), values)

    def stored_keys(self, config: RepoConfig, view: FeatureView) -> Iterator[list[bytes]]:
        """See `NewestWinsStore`. By SCAN, so a key may come twice, and what comes meanwhile may be left out."""
        for keys in self._scan(config, view):
            holding = [key for reply in self._run(config, view, _HOLDING, [], keys) for key in reply]
            if holding:
                yield [key[: len(key) - len(config.project.encode())] for key in holding]

    def replace_exact(
        self, config: RepoConfig, view: FeatureView, seen: StoredRows, new: EncodedRows | None
    ) -> list[bool]:
        """See `NewestWinsStore`. Atomic by row. After a lost reply what was done may be reported as not done."""
        nothing = [b""] * len(seen)
        columns = [[order or b"" for order in seen.order], *seen.values.values()]
        if new is None:
            columns += [nothing] * (2 + len(seen.values))
        else:
            columns += [new.order, encode_timestamps(new.event_us), *(new.values[name] for name in seen.values)]
        replies = self._run(config, view, _REPLACE, list(seen.values), _hashes(config, seen.keys), columns)
        return [bool(done) for reply in replies for done in reply]

    def server_ids(self, config: RepoConfig) -> tuple[str, ...]:
        """The run id of every master: a restarted or promoted server has another."""
        client = self._get_client(config.online_store)
        if config.online_store.redis_type == RedisType.redis_cluster:
            infos = client.info("server", target_nodes="primaries")
            return tuple(sorted(str(info["run_id"]) for info in infos.values()))
        return (str(client.info("server")["run_id"]),)

    def read_mark(self, config: RepoConfig, view: FeatureView) -> Mark | None:
        """See `NewestWinsStore`."""
        text = self._get_client(config.online_store).get(_own_key("mark", config, view))
        return None if text is None else json.loads(text)

    def swap_mark(self, config: RepoConfig, view: FeatureView, seen: Mark | None, mark: Mark) -> bool:
        """See `NewestWinsStore`."""
        script = self._get_client(config.online_store).register_script(_SWAP)
        before = "" if seen is None else _text(seen)
        return bool(script(keys=[_own_key("mark", config, view)], args=[before, _text(mark)]))

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
        super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)
        if not config.online_store.full_scan_for_deletion:
            return
        client = self._get_client(config.online_store)
        for view in tables_to_keep:
            known, types = self._known_types(config, view), feature_types(view)
            changed = [name for name, kind in types.items() if known and known.get(name) != kind]
            if changed:
                for keys in self._scan(config, view):
                    list(self._run(config, view, _EMPTY, changed, keys))
            client.set(_own_key("types", config, view), _text(dict.fromkeys(known) | types))

    def delete_table(self, config: RepoConfig, table: FeatureView) -> None:
        """Delete a view's values, orders and mark. Other fields of the same hashes stay."""
        features = [feature.name for feature in table.features]
        for keys in self._scan(config, table):
            list(self._run(config, table, _REMOVE, features, keys))
        client = self._get_client(config.online_store)
        for kind in ("mark", "types"):
            client.delete(_own_key(kind, config, table))

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
        prefix, project = _redis_key_prefix(view.join_keys), config.project.encode()
        pattern = re.sub(rb"([\\*?\[\]])", rb"\\\1", prefix) + b"*"
        chunk: list[bytes] = []
        with _naming(config, view):
            for key in client.scan_iter(pattern, count=_KEYS_A_SCAN):
                if _is_of_project(key, len(prefix), len(view.join_keys), project):
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
        columns: Sequence[Sequence[bytes]] = (),
        width: int = 1,
    ) -> Iterator[Any]:
        """Call a script on these keys, in chunks; yields the replies.

        Args:
            features: whose fields the script is given.
            columns: what the script is given for each key, aligned with the keys.
            width: how many values a key has in the reply.
        """
        name = _versioned_fv_name(view, config)
        own = {feature.name for feature in view.features}
        client = self._get_client(config.online_store)
        is_cluster = config.online_store.redis_type == RedisType.redis_cluster
        call = _call_each if is_cluster else _call_chunk
        with _naming(config, view):
            retired = [feature for feature in self._known_types(config, view) if feature not in own]
            fields, others = (b"".join(_mmh3(f"{name}:{one}") for one in some) for some in (features, retired))
            head = [f"_ts:{name}", f"_hr:{name}", config.online_store.key_ttl_seconds or 0, fields, others]
            chunks = list(_chunks(len(keys), columns, 1 + max(len(columns), width)))

            def reply(chunk: slice) -> list[Any]:
                return call(client, script, head, keys[chunk], [column[chunk] for column in columns])

            if len(chunks) == 1:
                yield from reply(chunks[0])
                return
            with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
                for replies in pool.map(reply, chunks):
                    yield from replies


def _call_chunk(
    client: Any, script: str, head: Sequence[Any], keys: Sequence[bytes], columns: Sequence[Sequence[bytes]]
) -> list[Any]:
    """One call for all keys. The script is loaded where the server does not have it."""
    arguments = [value for row in zip(*columns, strict=True) for value in row]
    return [client.register_script(script)(keys=keys, args=[*head, *arguments])]


def _call_each(
    client: Any, script: str, head: Sequence[Any], keys: Sequence[bytes], columns: Sequence[Sequence[bytes]]
) -> list[Any]:
    """A call a key, pipelined. Only those that found no script are called again, once it is loaded everywhere."""
    rows = list(zip(*columns, strict=True)) if columns else [()] * len(keys)
    sha = client.register_script(script).sha
    replies: list[Any] = [None] * len(keys)
    waiting: Sequence[int] = range(len(keys))
    for is_last in (False, True):
        pipeline = client.pipeline(transaction=False)
        for i in waiting:
            pipeline.execute_command("EVALSHA", sha, 1, keys[i], *head, *rows[i])
        for i, reply in zip(waiting, pipeline.execute(raise_on_error=False), strict=True):
            replies[i] = reply
        waiting = [i for i in waiting if isinstance(replies[i], NoScriptError)]
        if not waiting or is_last:
            break
        client.execute_command("SCRIPT LOAD", script, target_nodes="primaries")
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _chunks(rows: int, columns: Sequence[Sequence[bytes]], width: int) -> Iterator[slice]:
    """Slices of rows that are worth a call each: bounded in arguments, so that readers need not wait, and in bytes."""
    most = max(1, _ARGUMENTS_A_CALL // width)
    sizes = np.zeros(rows, dtype=np.int64)
    for column in columns:
        sizes += np.fromiter(map(len, column), np.int64, rows)
    ends = np.cumsum(sizes)
    start = 0
    while start < rows:
        full = int(np.searchsorted(ends, ends[start] - sizes[start] + _BYTES_A_CALL, side="right"))
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
def _naming(config: RepoConfig, view: FeatureView) -> Iterator[None]:
    """Say where it failed, and what that leaves behind. Never the connection string: it holds the password."""
    try:
        yield
    except RedisError as error:
        nodes, _ = RedisOnlineStore._parse_connection_string(config.online_store.connection_string)
        where = ", ".join(f"{node.get('host')}:{node.get('port')}" for node in nodes)
        msg = (
            f"feature view `{view.name}`: Redis at {where} failed: {type(error).__name__}: {error}. How many rows were "
            "written before that is not known; each is whole, and to write them again does no harm. See to the server, "
            "then repeat"
        )
        raise TransientError(msg) from error


def _hashes(config: RepoConfig, keys: Sequence[bytes]) -> list[bytes]:
    project = config.project.encode()
    return [key + project for key in keys]


def _own_key(kind: str, config: RepoConfig, view: FeatureView) -> str:
    return f"headrace:{kind}:{config.project}:{_versioned_fv_name(view, config)}"


def _text(thing: Mapping[str, Any]) -> str:
    return json.dumps(thing, sort_keys=True, separators=(",", ":"))
