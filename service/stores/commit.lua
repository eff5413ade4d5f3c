#!lua name=onset_v1
-- The commit of a batch: for each stream, write its new value if the stored one still carries the expected token.
--
-- KEYS  state key and trail key of each stream, alternating; in a cluster all of one slot
-- ARGV  state TTL (s), result TTL (s), trail length, then for each stream: expected token, value, trail blob ('' = none)
-- Reply one integer for each stream: 1 written, 0 lost to another writer
--
-- A function runs alone on the server, so the compare and the writes of a stream are one step. Each stream stands for itself:
-- a loser leaves the others written. Bytes 8 to 23 of a value are its token (service/state.py).

local function commit(keys, args)
  local state_ttl, result_ttl, length = args[1], args[2], tonumber(args[3])
  local outcome = {}
  for i = 1, #keys / 2 do
    local state, trail = keys[2 * i - 1], keys[2 * i]
    local expected, value, results = args[3 * i + 1], args[3 * i + 2], args[3 * i + 3]
    if redis.call('GETRANGE', state, 8, 23) == expected then
      redis.call('SET', state, value, 'EX', state_ttl)
      if results ~= '' then
        redis.call('RPUSH', trail, results)
        redis.call('LTRIM', trail, -length, -1)
        redis.call('EXPIRE', trail, result_ttl)
      end
      outcome[i] = 1
    else
      outcome[i] = 0
    end
  end
  return outcome
end

redis.register_function('onset_commit_v1', commit)
