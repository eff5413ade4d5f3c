-- Members of some sorted sets by their scores: what the sweeps ask every second, of every shard's watches at once.
--
-- KEYS  sorted sets
-- ARGV  how many members at most, then the least and the greatest score of each range
-- Reply members, set by set and range by range

local function watched(keys, args)
  local found, limit = {}, tonumber(args[1])
  for _, key in ipairs(keys) do
    for i = 2, #args, 2 do
      if #found >= limit then
        return found
      end
      for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, args[i], args[i + 1], 'LIMIT', 0, limit - #found)) do
        found[#found + 1] = member
      end
    end
  end
  return found
end

redis.register_function{function_name = 'onset_watched_v7', callback = watched, flags = {'no-writes'}}
