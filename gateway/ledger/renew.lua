-- Lets a reservation that is open last longer.
-- KEYS: the reservation's record, then the account of each slot that it holds.
-- ARGV: milliseconds since 1970 (empty: the server's own time), id, lease in milliseconds from now.
-- Returns 1, or 0 where it had ended before.
local now = milliseconds(ARGV[1])
local lease = tonumber(ARGV[3])
local record = record_of(KEYS[1])
if record == false or record == 'cancelled' then return 0 end
local open_until = record and tonumber(string.match(record, '^%d+')) or now + 1 -- damaged: its slots are kept all the same
if open_until <= now then return 0 end
local ends = math.max(math.min(open_until, now + A_DAY_MS), now + lease)
local kept = ends - now + 60000
if record then redis.call('SET', KEYS[1], whole(ends) .. string.match(record, '^%d+(.*)'), 'PX', whole(kept)) end
for i = 2, #KEYS do
  local added = redis.pcall('ZADD', KEYS[i], 'XX', whole(ends), ARGV[2])
  if type(added) == 'number' and redis.call('PTTL', KEYS[i]) < kept then redis.call('PEXPIRE', KEYS[i], whole(kept)) end
end
return 1
