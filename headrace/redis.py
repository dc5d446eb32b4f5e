"""Feast's Redis online store, with newest-wins decided inside Redis or Valkey by a script.

The layout is Feast's: one hash an entity, a field a feature, `_ts:<view>` the event time. One more field a view,
`_hr:<view>`, holds the order of the stored row followed by the very bytes of `_ts` that were written with it; where
`_ts` is not those bytes any more, a stock client wrote later, and its time counts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from feast import FeatureView, RepoConfig
from feast.infra.online_stores.helpers import _mmh3, _redis_key_prefix
from feast.infra.online_stores.redis import (
    RedisOnlineStore,
    RedisOnlineStoreConfig,
    RedisType,
    _versioned_fv_name,
)

from headrace import registry as _registry  # noqa: F401 - resolves relative registries
from headrace.encode import ORDER_BYTES, EncodedRows, encode_timestamps
from headrace.online import FeastRow, Mark, encode_feast_rows

_ROWS_A_CALL = 500

# Lua compares strings by the server's locale, so orders are compared as numbers, four bytes each.
# KEYS: entities. ARGV: `_ts` field, `_hr` field, seconds to live (0 is for ever), number of features, their fields;
# then for each entity its order, its `_ts`, its values. Returns how many were written.
_WRITE = """
local FORMAT = '>I4I4I4I4I4I4I4I4B'
local function older(a, b)
  local x = {struct.unpack(FORMAT, a)}
  local y = {struct.unpack(FORMAT, b)}
  for i = 1, 9 do
    if x[i] ~= y[i] then return x[i] < y[i] end
  end
  return false
end
local function varint(s, at)
  local value, scale = 0, 1
  while true do
    local byte = string.byte(s, at)
    at = at + 1
    value = value + (byte % 128) * scale
    if byte < 128 then return value, at end
    scale = scale * 128
  end
end
-- The order of a row of which only its protobuf Timestamp is known: no created time, the lowest of its microsecond.
local function stock_order(ts)
  local seconds, nanos, at = 0, 0, 1
  while at <= #ts do
    local tag = string.byte(ts, at)
    local value
    value, at = varint(ts, at + 1)
    if tag == 8 then seconds = value else nanos = value end
  end
  if seconds >= 9223372036854775808 then seconds = seconds - 18446744073709551616 end
  local us = seconds * 1000000 + math.floor(nanos / 1000)
  local high = math.floor(us / 4294967296)
  return struct.pack('>I4I4', high + 2147483648, us - high * 4294967296) .. string.rep('\\0', 25)
end
local ts_field, own_field, ttl, features = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local at, written = 5 + features, 0
for k = 1, #KEYS do
  local order, ts = ARGV[at], ARGV[at + 1]
  local stored = redis.call('HMGET', KEYS[k], own_field, ts_field)
  local own, stored_ts = stored[1], stored[2]
  local present = nil
  if stored_ts then
    if own and string.sub(own, ORDER_BYTES + 1) == stored_ts then
      present = string.sub(own, 1, ORDER_BYTES)
    else
      present = stock_order(stored_ts)
    end
  end
  if not present or not older(order, present) then
    local fields = {ts_field, ts, own_field, order .. ts}
    for f = 1, features do
      fields[#fields + 1] = ARGV[4 + f]
      fields[#fields + 1] = ARGV[at + 1 + f]
    end
    redis.call('HSET', KEYS[k], unpack(fields))
    if ttl > 0 then redis.call('EXPIRE', KEYS[k], ttl) end
    written = written + 1
  end
  at = at + 2 + features
end
return written
""".replace("ORDER_BYTES", str(ORDER_BYTES))

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

    Standalone: one call a chunk of rows. Cluster: one call a row, because a script may touch one slot only.
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
        """See `NewestWinsStore`. Atomic by row; a failure in between leaves whole rows, and a repeat is harmless."""
        client = self._get_client(config.online_store)
        script = client.register_script(_WRITE)
        name = _versioned_fv_name(view, config)
        head: list[Any] = [f"_ts:{name}", f"_hr:{name}", config.online_store.key_ttl_seconds or 0, len(rows.values)]
        head += [_mmh3(f"{name}:{feature}") for feature in rows.values]
        project = config.project.encode()
        keys = [key + project for key in rows.keys]
        each = list(zip(rows.order, encode_timestamps(rows.event_us), *rows.values.values(), strict=True))
        size = 1 if config.online_store.redis_type == RedisType.redis_cluster else _ROWS_A_CALL
        written = 0
        for start in range(0, len(keys), size):
            arguments = [value for row in each[start : start + size] for value in row]
            written += int(script(keys=keys[start : start + size], args=head + arguments))
        return written

    def server_ids(self, config: RepoConfig) -> tuple[str, ...]:
        """The run id of every master: a restarted or promoted server has another."""
        client = self._get_client(config.online_store)
        if config.online_store.redis_type == RedisType.redis_cluster:
            infos = client.info("server", target_nodes="primaries")
            return tuple(sorted(str(info["run_id"]) for info in infos.values()))
        return (str(client.info("server")["run_id"]),)

    def read_mark(self, config: RepoConfig, view: FeatureView) -> Mark | None:
        """See `NewestWinsStore`."""
        text = self._get_client(config.online_store).get(_mark_key(config, view))
        return None if text is None else json.loads(text)

    def swap_mark(self, config: RepoConfig, view: FeatureView, seen: Mark | None, mark: Mark) -> bool:
        """See `NewestWinsStore`."""
        script = self._get_client(config.online_store).register_script(_SWAP)
        before = "" if seen is None else _mark_text(seen)
        return bool(script(keys=[_mark_key(config, view)], args=[before, _mark_text(mark)]))

    def delete_table(self, config: RepoConfig, table: FeatureView) -> None:
        """Delete a view's values, orders and mark. Entities shared with other views keep theirs."""
        super().delete_table(config, table)
        client = self._get_client(config.online_store)
        own_field = f"_hr:{_versioned_fv_name(table, config)}"
        pattern = b"".join([_redis_key_prefix(table.join_keys), b"*", config.project.encode()])
        for key in client.scan_iter(pattern):
            client.hdel(key, own_field)
        client.delete(_mark_key(config, table))

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Any]) -> None:
        """Delete the entities of these views, and the marks."""
        super().teardown(config, tables, entities)
        client = self._get_client(config.online_store)
        for table in tables:
            client.delete(_mark_key(config, table))


def _mark_key(config: RepoConfig, view: FeatureView) -> str:
    return f"headrace:mark:{config.project}:{_versioned_fv_name(view, config)}"


def _mark_text(mark: Mark) -> str:
    return json.dumps(mark, sort_keys=True, separators=(",", ":"))
