-- Reserves all holds of a request, or none. See base.py for what the kinds of limits mean.
-- KEYS: the reservation's record, then the account of each hold.
-- ARGV: milliseconds since 1970 (empty: the server's own time), id, lease in milliseconds, then for each hold its kind,
--       amount, limit, and how many places before the latest count as well or the starts of periods, separated by
--       commas. A place is PLACE_MS long.
-- Returns {1, lease's end, used, place, used, place, ...}, {0, position of the hold, wait in ms or -1, used, used, ...},
-- {-1} where a reservation of that id is open, or was cancelled before it was made, or {-2, position of the key} where
-- one holds what no script of ours wrote. Nothing is reserved then, and nothing mended: only an operator knows whether a
-- sum that cannot be read was small. A sum that is wrong, but a number, is believed.
-- Whatever the keys hold, the script ends: it looks at no more places than count.
local now = milliseconds(ARGV[1])
local second, place_now = math.floor(now / 1000), math.floor(now / PLACE_MS)
local this_place = whole(place_now)
local id, lease = ARGV[2], tonumber(ARGV[3])
local record = record_of(KEYS[1])
if record == nil then return {-2, 1} end
if record == 'cancelled' or (record and tonumber(string.match(record, '^%d+')) > now) then return {-1} end

local function amounts_between(key, first, last)
  local places = {}
  for p = first, last do places[#places + 1] = whole(p) end
  return places, redis.call('HMGET', key, unpack(places))
end

local A_DAY = A_DAY_MS / PLACE_MS -- by which a clock may have been set back; what is later is damage
local LOOK = 4 -- places that a refusal looks at first, then twice as many each time: the oldest mostly make room enough
local kinds = {}

-- A hash: o, the oldest place that is kept; n, the latest that was seen; s, the sum; and each place's amount.
-- `at` is false where that is not so, and `wait` nil.
kinds.rolling = {
  at = function(hold)
    local kept = tonumber(hold.extra)
    local head = redis.pcall('HMGET', hold.key, 'o', 'n', 's', this_place)
    if head.err then return false end
    if not (head[1] or head[2] or head[3]) then
      hold.oldest, hold.newest, hold.place, hold.used = place_now, place_now, place_now, 0
      return redis.call('EXISTS', hold.key) == 0
    end
    local oldest, newest, sum = count(head[1]), count(head[2]), count(head[3])
    if not (oldest and newest and sum) then return false end
    if oldest > newest or newest - oldest > kept or newest > place_now + A_DAY then return false end
    local place, there = place_now, head[4]
    if newest > place_now then place, there = newest, redis.call('HGET', hold.key, whole(newest)) end
    hold.there = count(there or 0)
    if not hold.there then return false end
    local first = place - kept
    if oldest < first then
      local places, amounts = amounts_between(hold.key, oldest, math.min(first - 1, newest))
      for i = 1, #places do
        local amount = count(amounts[i] or 0)
        if not amount then return false end
        sum = sum - amount
      end
      if sum < 0 or (first > newest and sum > 0) then return false end
      redis.call('HDEL', hold.key, unpack(places))
      oldest = first
      redis.call('HSET', hold.key, 'o', whole(oldest), 's', whole(sum), 'n', whole(place))
    elseif place > newest then
      redis.call('HSET', hold.key, 'n', whole(place))
    end
    hold.known, hold.oldest, hold.newest, hold.place, hold.used = true, oldest, newest, place, sum
    return true
  end,
  wait = function(hold)
    local excess = hold.used + hold.amount - hold.most
    local first, many = hold.oldest, LOOK
    while first <= hold.newest do
      local places, amounts = amounts_between(hold.key, first, math.min(first + many - 1, hold.newest))
      for i = 1, #places do
        excess = excess - (count(amounts[i] or 0) or 0)
        if excess <= 0 then return (first + i + tonumber(hold.extra)) * PLACE_MS - now end
      end
      first, many = first + many, many * 2
    end
    return nil -- the places hold less than the sum says
  end,
  add = function(hold)
    local place, sum = whole(hold.place), whole(hold.used + hold.amount)
    if hold.known then
      redis.call('HSET', hold.key, place, whole(hold.there + hold.amount), 's', sum)
    else
      redis.call('HSET', hold.key, place, sum, 's', sum, 'o', place, 'n', place)
    end
    redis.call('PEXPIRE', hold.key, whole((hold.place + tonumber(hold.extra)) * PLACE_MS - now + 60000))
  end,
}

-- A hash: p, the start of the latest period; s, its sum.
kinds.period = {
  at = function(hold)
    local start
    hold.starts = {}
    for text in string.gmatch(hold.extra, '[^,]+') do
      local begins = tonumber(text)
      hold.starts[#hold.starts + 1] = begins
      if not start or begins <= second then start = begins end
    end
    local head = redis.pcall('HMGET', hold.key, 'p', 's')
    if head.err then return false end
    local known, sum = count(head[1]), count(head[2])
    if (head[1] or head[2] or redis.call('EXISTS', hold.key) == 1) and not (known and sum) then return false end
    if known and known > hold.starts[#hold.starts] then return false end
    if known and known >= start then
      hold.place, hold.used = known, sum
    else
      hold.place, hold.used = start, 0
    end
    return true
  end,
  wait = function(hold)
    for _, begins in ipairs(hold.starts) do
      if begins > hold.place then return begins * 1000 - now end
    end
    return 86400000
  end,
  add = function(hold)
    redis.call('HSET', hold.key, 'p', whole(hold.place), 's', whole(hold.used + hold.amount))
    local last = hold.starts[#hold.starts]
    redis.call('EXPIRE', hold.key, whole(math.max(last - second, 0) + 86400))
  end,
}

-- A sorted set: the ids, by their leases' ends.
kinds.slots = {
  at = function(hold)
    if type(redis.pcall('ZREMRANGEBYSCORE', hold.key, '-inf', whole(now))) == 'table' then return false end
    hold.place, hold.used = 0, redis.call('ZCARD', hold.key)
    return true
  end,
  wait = function(hold)
    if redis.call('ZCOUNT', hold.key, whole(now + A_DAY_MS), '+inf') > 0 then return nil end -- no lease is so long
    return 1000
  end,
  add = function(hold)
    redis.call('ZADD', hold.key, whole(now + lease), id)
    local kept = lease + 60000
    if redis.call('PTTL', hold.key) < kept then redis.call('PEXPIRE', hold.key, whole(kept)) end
  end,
}

local holds, worst, worst_wait = {}, nil, nil
for i = 2, #KEYS do
  local at = 4 + (i - 2) * 4
  local hold = {
    key = KEYS[i], kind = kinds[ARGV[at]], amount = tonumber(ARGV[at + 1]), most = tonumber(ARGV[at + 2]),
    extra = ARGV[at + 3],
  }
  if not hold.kind.at(hold) then return {-2, i} end
  holds[#holds + 1] = hold
  if hold.used + hold.amount > hold.most and worst_wait ~= -1 then
    local wait = -1
    if hold.amount <= hold.most then wait = hold.kind.wait(hold) end
    if not wait then return {-2, i} end
    if not worst or wait == -1 or wait > worst_wait then worst, worst_wait = #holds, wait end
  end
end

if worst then
  local reply = {0, worst, worst_wait}
  for _, hold in ipairs(holds) do reply[#reply + 1] = hold.used end
  return reply
end
local reply = {1, now + lease}
local places = whole(now + lease) -- and the places, for who knows of no reply: see cancel.lua
for _, hold in ipairs(holds) do
  hold.kind.add(hold)
  reply[#reply + 1] = hold.used + hold.amount
  reply[#reply + 1] = hold.place
  places = places .. ' ' .. whole(hold.place)
end
redis.call('SET', KEYS[1], places, 'PX', whole(lease + 60000))
return reply
