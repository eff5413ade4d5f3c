#!lua name=onset_v3
-- The commit of a batch: for each stream, write its new value if the stored one still carries the expected token.
--
-- KEYS  state key of each stream, then trail key of each stream that has results to keep, then watch key of each stream whose watch
--       changes; in a cluster all of one slot
-- ARGV  state TTL (s), result TTL (s), trail length, number of streams, frames, values, number of trails, then a blob for each trail
--       key and each watch key
--       frames: for each stream 24 bytes, little-endian: length of the token u4, token padded to 16 bytes, length of the value u4
--       values: the new values, one after the other
--       trail blobs: position of the stream from 1 u4, then the results
--       watch blobs: position of the stream from 1 u4, time f8 (0 = no longer watched), then the stream's id
-- Reply one integer for each stream: 1 written, 0 lost to another writer
--
-- A function runs alone on the server, so the compare and the writes of a stream are one step. Each stream stands for itself:
-- a loser leaves the others written. Bytes 8 to 23 of a value are its token (service/state.py). Few long arguments instead of many
-- short ones: packing an argument costs the client more than cutting a string here.

local function commit(keys, args)
  local state_ttl, result_ttl, length, streams = args[1], args[2], tonumber(args[3]), tonumber(args[4])
  local frames, values, trails = args[5], args[6], tonumber(args[7])
  local outcome, start = {}, 1
  for i = 1, streams do
    local size, token, bytes = struct.unpack('<I4c16I4', frames, 24 * i - 23)
    if redis.call('GETRANGE', keys[i], 8, 23) == string.sub(token, 1, size) then
      redis.call('SET', keys[i], string.sub(values, start, start + bytes - 1), 'EX', state_ttl)
      outcome[i] = 1
    else
      outcome[i] = 0
    end
    start = start + bytes
  end
  for i = streams + 1, streams + trails do
    local blob = args[7 + i - streams]
    if outcome[struct.unpack('<I4', blob)] == 1 then
      redis.call('RPUSH', keys[i], string.sub(blob, 5))
      redis.call('LTRIM', keys[i], -length, -1)
      redis.call('EXPIRE', keys[i], result_ttl)
    end
  end
  for i = streams + trails + 1, #keys do
    local blob = args[7 + i - streams]
    local position, time = struct.unpack('<I4d', blob)
    if outcome[position] == 1 and time > 0 then
      redis.call('ZADD', keys[i], string.format('%.17g', time), string.sub(blob, 13))
    elseif outcome[position] == 1 then
      redis.call('ZREM', keys[i], string.sub(blob, 13))
    end
  end
  return outcome
end

redis.register_function('onset_commit_v3', commit)
