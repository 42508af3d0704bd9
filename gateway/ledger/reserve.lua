-- Reserves all holds of a request, or none. See base.py for what the kinds of limits mean.
-- KEYS: the reservation's record, then the account of each hold.
-- ARGV: milliseconds since 1970 (empty: the server's own time), id, lease in milliseconds, then for each hold its kind,
--       amount, limit, and the window in seconds or the starts of periods, separated by commas.
-- Returns {1, lease's end, used, place, used, place, ...}, {0, position of the hold, wait in ms or -1, used, used, ...},
-- or {-1} where a reservation of that id is open, or was cancelled before it was made.
local function whole(number) return string.format('%d', number) end -- Lua would write 1.7e15

local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local second = math.floor(now / 1000)
local id, lease = ARGV[2], tonumber(ARGV[3])
local record = redis.call('GET', KEYS[1]) or '0'
if record == 'cancelled' or tonumber(string.match(record, '^%d+')) > now then return {-1} end

local function amounts_between(key, first, last)
  local seconds = {}
  for s = first, last do seconds[#seconds + 1] = whole(s) end
  return seconds, redis.call('HMGET', key, unpack(seconds))
end

local kinds = {}

-- A hash: o, the oldest second that is kept; n, the latest that was seen; s, the sum; and each second's amount.
kinds.rolling = {
  at = function(hold)
    local head = redis.call('HMGET', hold.key, 'o', 'n', 's')
    if not head[1] then
      hold.oldest, hold.place, hold.used = second, second, 0
      hold.newest = second
      return
    end
    local oldest, newest, sum = tonumber(head[1]), tonumber(head[2]), tonumber(head[3])
    local place = newest
    if second > newest then
      place = second
      redis.call('HSET', hold.key, 'n', whole(place))
    end
    local first = place - tonumber(hold.extra)
    if oldest < first then
      local seconds, amounts = amounts_between(hold.key, oldest, math.min(first - 1, newest))
      for i = 1, #seconds do sum = sum - tonumber(amounts[i] or '0') end
      redis.call('HDEL', hold.key, unpack(seconds))
      oldest = first
      redis.call('HSET', hold.key, 'o', whole(oldest), 's', whole(sum))
    end
    hold.known, hold.oldest, hold.newest, hold.place, hold.used = true, oldest, newest, place, sum
  end,
  wait = function(hold)
    local excess = hold.used + hold.amount - hold.most
    local seconds, amounts = amounts_between(hold.key, hold.oldest, hold.newest)
    for i = 1, #seconds do
      excess = excess - tonumber(amounts[i] or '0')
      if excess <= 0 then return (tonumber(seconds[i]) + tonumber(hold.extra) + 1) * 1000 - now end
    end
    return 0
  end,
  add = function(hold)
    if not hold.known then redis.call('HSET', hold.key, 'o', whole(hold.place), 'n', whole(hold.place)) end
    redis.call('HINCRBY', hold.key, whole(hold.place), whole(hold.amount))
    redis.call('HINCRBY', hold.key, 's', whole(hold.amount))
    redis.call('EXPIRE', hold.key, whole(hold.place - second + tonumber(hold.extra) + 60))
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
    local head = redis.call('HMGET', hold.key, 'p', 's')
    local known = tonumber(head[1] or nil)
    if known and known >= start then
      hold.place, hold.used = known, tonumber(head[2])
    else
      hold.place, hold.used, hold.new = start, 0, true
    end
  end,
  wait = function(hold)
    for _, begins in ipairs(hold.starts) do
      if begins > hold.place then return begins * 1000 - now end
    end
    return 86400000
  end,
  add = function(hold)
    if hold.new then redis.call('HSET', hold.key, 'p', whole(hold.place), 's', '0') end
    redis.call('HINCRBY', hold.key, 's', whole(hold.amount))
    local last = hold.starts[#hold.starts]
    redis.call('EXPIRE', hold.key, whole(math.max(last - second, 0) + 86400))
  end,
}

-- A sorted set: the ids, by their leases' ends.
kinds.slots = {
  at = function(hold)
    redis.call('ZREMRANGEBYSCORE', hold.key, '-inf', whole(now))
    hold.place, hold.used = 0, redis.call('ZCARD', hold.key)
  end,
  wait = function() return 1000 end,
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
  hold.kind.at(hold)
  holds[#holds + 1] = hold
  if hold.used + hold.amount > hold.most and worst_wait ~= -1 then
    local wait = -1
    if hold.amount <= hold.most then wait = hold.kind.wait(hold) end
    if not worst or wait == -1 or wait > worst_wait then worst, worst_wait = #holds, wait end
  end
end

if worst then
  local reply = {0, worst, worst_wait}
  for _, hold in ipairs(holds) do reply[#reply + 1] = hold.used end
  return reply
end
local reply = {1, now + lease}
record = whole(now + lease) -- and the places, for who knows of no reply: see cancel.lua
for _, hold in ipairs(holds) do
  hold.kind.add(hold)
  reply[#reply + 1] = hold.used + hold.amount
  reply[#reply + 1] = hold.place
  record = record .. ' ' .. whole(hold.place)
end
redis.call('SET', KEYS[1], record, 'PX', whole(lease + 60000))
return reply
