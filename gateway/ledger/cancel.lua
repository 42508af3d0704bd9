-- Undoes a reservation of which nobody knows whether it was made, and keeps it from being made later: the command that
-- makes it may still be on its way.
-- KEYS: the reservation's record, then the account of each hold.
-- ARGV: id, milliseconds for which it is kept from being made, then for each hold its kind and amount.
-- Returns 1 where it had been made, else 0.
local record = record_of(KEYS[1])
redis.call('SET', KEYS[1], 'cancelled', 'PX', ARGV[2])
local parts = {}
for part in string.gmatch(record or '', '%S+') do parts[#parts + 1] = part end
if #parts ~= #KEYS then return 0 end

for i = 2, #KEYS do
  local at = 3 + (i - 2) * 2
  change_booked(ARGV[at], KEYS[i], parts[i], -tonumber(ARGV[at + 1]), ARGV[1])
end
return 1
