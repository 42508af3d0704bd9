-- Ends a reservation, once.
-- KEYS: the reservation's record, then the account of each hold.
-- ARGV: milliseconds since 1970 (empty: the server's own time), id, then for each hold its kind, the second or period
--       that it is booked under, and by how much that changes.
-- Returns 1, or 0 where it had ended before.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local open_until = redis.call('GET', KEYS[1])
if not open_until or open_until == 'cancelled' then return 0 end
redis.call('DEL', KEYS[1])
if tonumber(string.match(open_until, '^%d+')) <= now then return 0 end -- its lease is over: what was reserved stays booked

for i = 2, #KEYS do
  local at = 3 + (i - 2) * 3
  local kind, place, change = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  if kind == 'slots' then
    redis.call('ZREM', KEYS[i], ARGV[2])
  elseif kind == 'period' then
    if redis.call('HGET', KEYS[i], 'p') == place then redis.call('HINCRBY', KEYS[i], 's', change) end
  elseif redis.call('HEXISTS', KEYS[i], place) == 1 then
    redis.call('HINCRBY', KEYS[i], place, change)
    redis.call('HINCRBY', KEYS[i], 's', change)
  end
end
return 1
