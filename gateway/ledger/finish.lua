-- Ends a reservation, once.
-- KEYS: the reservation's record, then the account of each hold.
-- ARGV: milliseconds since 1970 (empty: the server's own time), id, then for each hold its kind, the place or the period
--       that it is booked under, and by how much that changes.
-- Returns 1, or 0 where it had ended before.
local now = milliseconds(ARGV[1])
local record = record_of(KEYS[1])
if record == false or record == 'cancelled' then return 0 end
redis.call('DEL', KEYS[1])
-- Its lease is over, or nobody can tell: what was reserved stays booked.
if not record or tonumber(string.match(record, '^%d+')) <= now then return 0 end

for i = 2, #KEYS do
  local at = 3 + (i - 2) * 3
  change_booked(ARGV[at], KEYS[i], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[2])
end
return 1
