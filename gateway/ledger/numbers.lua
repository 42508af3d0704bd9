-- Stands in front of each script, behind PLACE_MS: numbers in keys that anything may have damaged (another program, a
-- restored dump, an operator's hand).
local A_DAY_MS = 86400000
local MOST = 2^53

local function whole(number) return string.format('%d', number) end -- Lua would write 1.7e15

-- A whole number from 0, which Lua can count on with; nil for anything else. (Redis itself counts with fewer forms of
-- one, so sums are set, not incremented: a script that fails half-way has reserved the half.)
local function count(text)
  local number = tonumber(text or nil)
  if number and number >= 0 and number <= MOST and number % 1 == 0 then return number end
end

local function milliseconds(given) -- empty: the server's own time
  if given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The record of a reservation: the end of its lease and the places of its holds, or `cancelled`; false where there is
-- none, and nil where it is not one.
local function record_of(key)
  local record = redis.pcall('GET', key)
  if type(record) == 'table' then return nil end
  if not record or record == 'cancelled' or count(string.match(record, '^(%d+)')) then return record end
end

-- Ends a hold by changing what is booked of it, but never to less than nothing: what was booked may be gone. What is
-- damaged stays as it is, and the next reservation tells.
local function change_booked(kind, key, place, change, id)
  if kind == 'slots' then
    redis.pcall('ZREM', key, id)
    return
  end
  if change == 0 then return end -- such as of requests
  local head = redis.pcall('HMGET', key, kind == 'period' and 'p' or place, 's')
  if head.err then return end
  local found, sum = head[1], count(head[2])
  if not sum then return end
  change = math.max(math.min(change, MOST - sum), -sum)
  if kind == 'rolling' then
    local there = count(found)
    if not there then return end
    change = math.max(change, -there)
    redis.call('HSET', key, place, whole(there + change), 's', whole(sum + change))
  elseif found == place then
    redis.call('HSET', key, 's', whole(sum + change))
  end
end
