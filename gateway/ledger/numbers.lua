-- Stands in front of each script: numbers in keys that anything may have damaged (another program, a restored dump, an
-- operator's hand).
local A_DAY_MS = 86400000
local MOST = 2^53

local function whole(number) return string.format('%d', number) end -- Lua would write 1.7e15

-- A whole number from 0, in the only form that Redis itself counts on with; nil for anything else.
local function count(text)
  if type(text) == 'string' and #text <= 18 and (text == '0' or string.find(text, '^[1-9]%d*$')) then
    return tonumber(text)
  end
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
  change = math.min(change, MOST)
  local head = redis.pcall('HMGET', key, kind == 'period' and 'p' or place, 's')
  if head.err then return end
  local found, sum = head[1], count(head[2])
  if kind == 'rolling' then
    found = count(found)
    if not found or not sum then return end
    change = math.max(change, -found, -sum)
    redis.call('HINCRBY', key, place, whole(change))
  elseif found ~= place or not sum then
    return
  end
  redis.call('HINCRBY', key, 's', whole(math.max(change, -sum)))
end
