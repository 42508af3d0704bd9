-- Lets a reservation that is open last longer.
-- KEYS: the reservation's record, then the account of each slot that it holds.
-- ARGV: milliseconds since 1970 (empty: the server's own time), id, lease in milliseconds from now.
-- Returns 1, or 0 where it had ended before.
local function whole(number) return string.format('%d', number) end

local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local lease = tonumber(ARGV[3])
local record = redis.call('GET', KEYS[1]) or '0'
local open_until = tonumber(string.match(record, '^%d+') or '0')
if open_until <= now then return 0 end
local ends = math.max(open_until, now + lease)
redis.call('SET', KEYS[1], whole(ends) .. string.match(record, '^%d+(.*)'), 'PX', whole(ends - now + 60000))
for i = 2, #KEYS do
  redis.call('ZADD', KEYS[i], 'XX', whole(ends), ARGV[2])
  local kept = ends - now + 60000
  if redis.call('PTTL', KEYS[i]) < kept then redis.call('PEXPIRE', KEYS[i], whole(kept)) end
end
return 1
