#!lua name=onset_v7
-- The commit of a batch: for each stream, write its new value if the stored one still carries the expected token, append its results
-- to the output stream, and acknowledge the entries of the input stream that they are of.
--
-- KEYS  state key of each stream, then trail key of each stream that has results to keep, then watch key of each stream whose watch
--       changes, then the alert log of each entry for it, then the output stream if there are results for it, then for each lease the input stream and the lease's key; in a
--       cluster all of one slot
-- ARGV  1 state TTL (s), 2 result TTL (s), 3 trail length, 4 length of an alert log (about), 5 number of streams, 6 frames, 7 values,
--       8 number of trails, 9 of watches, 10 of log entries, 11 length of the output stream (about), 12 results, 13 acks, then a blob for
--       each trail key, each watch key and each log key, then for each lease its token, the consumer group, and 1 where acknowledged
--       entries stay in the stream (else 0)
--       frames: for each stream 28 bytes, little-endian: length of the token u4, token padded to 16 bytes, length of the value u4
--               (0 = the value stays as it is, whatever it is), a TTL of its own in s u4 (0 = the state TTL)
--       values: the new values, one after the other
--       results: for each one position of the stream from 1 u4, its length u4, the result
--       acks: for each one position of the stream u4, position of the lease from 1 u4, length of the id u1, the entry's id; an empty
--             id acknowledges nothing, but the stream is written under that lease
--       trail blobs: position of the stream u4, then the results
--       watch blobs: position of the stream u4, time f8 (0 = no longer watched), then the stream's id
--       log blobs: position of the stream u4, then the entry
-- Reply one integer for each stream: 1 written, 0 lost to another writer, 2 fenced: a lease it is written under is no longer ours;
--       of no stream the server's time: s, and us beyond them
--
-- A function runs alone on the server, so all that is done for a stream is one step. Each stream stands for itself: a loser leaves
-- the others written. Bytes 8 to 23 of a value are its token (service/state.py). Few long arguments instead of many short ones:
-- packing an argument costs the client more than cutting a string here.

local HEAD = 13
local IDS = 1000 -- of one XACK: Lua unpacks 8,000 values at most

local function fence(keys, args, first_key, first_arg, outcome)
  local held, acks, at = {}, args[13], 1
  for i = 0, (#keys - first_key) / 2 - 1 do
    held[i + 1] = redis.call('GET', keys[first_key + 2 * i + 2]) == args[first_arg + 3 * i]
  end
  while at <= #acks do
    local position, lease, size = struct.unpack('<I4I4B', acks, at)
    if not held[lease] then
      outcome[position] = 2
    end
    at = at + 9 + size
  end
end

local function acknowledge(keys, args, first_key, first_arg, outcome)
  local ids, acks, at = {}, args[13], 1
  local function flush(lease)
    local stream, arg = keys[first_key + 2 * lease - 1], first_arg + 3 * lease - 3
    redis.call('XACK', stream, args[arg + 1], unpack(ids[lease]))
    if args[arg + 2] == '0' then
      redis.call('XDEL', stream, unpack(ids[lease]))
    end
    ids[lease] = {}
  end
  while at <= #acks do
    local position, lease, size = struct.unpack('<I4I4B', acks, at)
    if size > 0 and outcome[position] == 1 then
      ids[lease] = ids[lease] or {}
      table.insert(ids[lease], string.sub(acks, at + 9, at + 8 + size))
      if #ids[lease] == IDS then
        flush(lease)
      end
    end
    at = at + 9 + size
  end
  for lease, some in pairs(ids) do
    if #some > 0 then
      flush(lease)
    end
  end
end

local function publish(output, most, results, outcome)
  local at = 1
  while at <= #results do
    local position, size = struct.unpack('<I4I4', results, at)
    if outcome[position] == 1 then
      redis.call('XADD', output, 'MAXLEN', '~', most, '*', 'result', string.sub(results, at + 8, at + 7 + size))
    end
    at = at + 8 + size
  end
end

local function held(key)
  local token = redis.pcall('GETRANGE', key, 8, 23)
  return type(token) == 'string' and token or '' -- what is no value of ours was loaded as none, and is replaced
end

local function compare(keys, args, streams, outcome)
  local written, start = {}, 1 -- tokens of what this call writes, by key
  for i = 1, streams do
    local size, token, bytes = struct.unpack('<I4c16I4', args[6], 28 * i - 27)
    if outcome[i] == nil then
      outcome[i] = (bytes == 0 or (written[keys[i]] or held(keys[i])) == string.sub(token, 1, size)) and 1 or 0
    end
    if outcome[i] == 1 and bytes > 0 then
      written[keys[i]] = string.sub(args[7], start + 8, start + 23)
    end
    start = start + bytes
  end
end

local function write(keys, args, streams, outcome)
  local start = 1
  for i = 1, streams do
    local _, _, bytes, ttl = struct.unpack('<I4c16I4I4', args[6], 28 * i - 27)
    if outcome[i] == 1 and bytes > 0 then
      redis.call('SET', keys[i], string.sub(args[7], start, start + bytes - 1), 'EX', ttl > 0 and ttl or args[1])
    end
    start = start + bytes
  end
end

-- A command that fails in the middle leaves what was written before it: what can be wrong with a key is asked first, and the values come
-- after all that goes with them. So where a right is missing an event is not known before its alert is in the log.
local function misused(keys, last_key, output)
  for i = last_key + 1, #keys do
    local kind = redis.call('TYPE', keys[i]).ok
    local lease = i > last_key + output and (i - last_key - output) % 2 == 0
    if kind ~= 'none' and kind ~= (lease and 'string' or 'stream') then
      return redis.error_reply('WRONGTYPE ' .. keys[i] .. ' holds a ' .. kind)
    end
  end
end

local function commit(keys, args)
  local streams, trails, watches, logged = tonumber(args[5]), tonumber(args[8]), tonumber(args[9]), tonumber(args[10])
  local result_ttl, length, outcome = args[2], args[3], {}
  local last_watch, last_key = streams + trails + watches, streams + trails + watches + logged
  local first_lease, output = HEAD + last_key - streams + 1, #args[12] > 0 and 1 or 0
  local wrong = misused(keys, last_key, output)
  if wrong then
    return wrong
  elseif streams == 0 then
    return redis.call('TIME')
  end
  fence(keys, args, last_key + output, first_lease, outcome)
  compare(keys, args, streams, outcome)
  for i = streams + 1, streams + trails do
    local blob = args[HEAD + i - streams]
    if outcome[struct.unpack('<I4', blob)] == 1 then
      redis.call('RPUSH', keys[i], string.sub(blob, 5))
      redis.call('LTRIM', keys[i], -length, -1)
      redis.call('EXPIRE', keys[i], result_ttl)
    end
  end
  for i = streams + trails + 1, last_watch do
    local blob = args[HEAD + i - streams]
    local position, time = struct.unpack('<I4d', blob)
    if outcome[position] == 1 and time > 0 then
      redis.call('ZADD', keys[i], string.format('%.17g', time), string.sub(blob, 13))
    elseif outcome[position] == 1 then
      redis.call('ZREM', keys[i], string.sub(blob, 13))
    end
  end
  for i = last_watch + 1, last_key do
    local blob = args[HEAD + i - streams]
    if outcome[struct.unpack('<I4', blob)] == 1 then
      redis.call('XADD', keys[i], 'MAXLEN', '~', args[4], '*', 'transition', string.sub(blob, 5))
    end
  end
  publish(keys[last_key + 1], args[11], args[12], outcome)
  write(keys, args, streams, outcome)
  acknowledge(keys, args, last_key + output, first_lease, outcome)
  return outcome
end

redis.register_function('onset_commit_v7', commit)
