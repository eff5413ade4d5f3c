-- What only the holder of a lease may do: some commands, in one step.
--
-- KEYS  the lease, then the keys of the commands; in a cluster all of one slot
-- ARGV  the token that the lease must hold, then for each command the number of its words, and these
-- Reply the number of commands; nil, with nothing done, where the lease holds another token or none

local function fenced(keys, args)
  if redis.call('GET', keys[1]) ~= args[1] then
    return nil
  end
  local commands, at = 0, 2
  while at <= #args do
    local words = tonumber(args[at])
    redis.call(unpack(args, at + 1, at + words))
    at = at + 1 + words
    commands = commands + 1
  end
  return commands
end

redis.register_function('onset_fenced_v7', fenced)
