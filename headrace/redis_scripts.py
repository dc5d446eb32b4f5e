"""What Redis or Valkey runs inside itself: scripts in Lua, each of them atomic.

Their arguments are bytes; `headrace.redis` says what is in which field.
"""

from __future__ import annotations

from headrace.encode import ORDER_BYTES

# What scripts share. Lua compares strings by the server's locale, so orders are compared byte by byte; `unpack` takes
# fewer than 8,000 items, so wide rows go in pieces (within a script, which is atomic). `older` is
# `headrace.encode.is_older`.
LIBRARY = """
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
WRITE = (
    LIBRARY
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
READ = (
    LIBRARY
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
HOLDING = """
local holding = {}
for k = 1, #KEYS do
  if redis.call('HEXISTS', KEYS[k], ARGV[1]) == 1 then holding[#holding + 1] = KEYS[k] end
end
return holding
"""

# For each key the order and values that were seen, and the order, `_ts` and values to store; an order of '' is no row.
# Returns for each key whether it was done, 1 or 0.
REPLACE = (
    LIBRARY
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
REMOVE = (
    LIBRARY
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
EMPTY = (
    LIBRARY
    + """
for k = 1, #KEYS do remove(KEYS[k], names(ARGV[4])) end
return 0
"""
)

# KEYS: the mark. ARGV: what was seen ('' is none), what to set. Returns 1 if it was set.
SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
