#!lua name=onset_streams_v3
-- Who owns which partition, and what only its owner may do with it. A lease is a key that holds its owner's token and expires; every
-- function but `attend` takes the partition's stream and its lease as the first two keys, in a cluster of one slot, and the token as
-- its first argument, and replies nil, with nothing done, where the lease no longer holds that token.
--
-- attend  KEYS members, changes            ARGV member, TTL (ms)
--         This member lives for another TTL. Reply {live members, its rank among them from 0, last id of `changes`}, to which an entry
--         is added whenever members come or go: who waits for it learns of it at once.
-- hold    KEYS stream, lease               ARGV token, TTL, group, 1 to take it where it is free
--         Renew the lease, or take it; the group is made where it is missing. Reply 1 ours, 0 not, 2 ours, and its group was gone.
-- release KEYS stream, lease               ARGV token
--         Give the lease up. Reply 1.
-- read    KEYS stream, lease               ARGV token, TTL, group, member, count
--         New entries; renews the lease. Reply {entries, id of the last entry that was ever delivered, number of entries that were
--         deleted before the group had read them}, each of these once.
-- claim   KEYS stream, lease               ARGV token, TTL, group, member, count, cursor
--         Entries that any member has read and not acknowledged, from the cursor on, by id. Reply {next cursor, entries}; at the end,
--         members that have none are struck off the group.
-- settle  KEYS stream, lease, dead letters ARGV token, group, 1 to keep acknowledged entries, length of the dead letters (about),
--         number of ids, the ids, then for each dead letter the number of its fields and values, and these
--         Append the dead letters and acknowledge the entries, in one step. Reply the number of entries acknowledged.

local function ours(keys, args)
  return redis.call('GET', keys[2]) == args[1]
end

local function attend(keys, args)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local gone = redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', now)
  local come = redis.call('ZADD', keys[1], now + args[2], args[1])
  if gone + come > 0 then
    redis.call('XADD', keys[2], 'MAXLEN', 1, '*', 'member', args[1])
  end
  local members, rank = redis.call('ZRANGE', keys[1], 0, -1), 0
  for _, member in ipairs(members) do
    if member < args[1] then
      rank = rank + 1
    end
  end
  local last = redis.call('XREVRANGE', keys[2], '+', '-', 'COUNT', 1)
  return { #members, rank, last[1] and last[1][1] or '0-0' }
end

local function hold(keys, args)
  local mine = ours(keys, args)
  if not mine and (args[4] ~= '1' or redis.call('EXISTS', keys[2]) == 1) then
    return 0
  end
  -- Asked for first: a group that is there would be an error in the server's statistics at every renewal.
  if mine and not redis.pcall('XINFO', 'CONSUMERS', keys[1], args[3]).err then
    redis.call('PEXPIRE', keys[2], args[2])
    return 1
  end
  local made = redis.pcall('XGROUP', 'CREATE', keys[1], args[3], '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then
    return made
  end
  redis.call('SET', keys[2], args[1], 'PX', args[2])
  return mine and not made.err and 2 or 1
end

local function release(keys, args)
  if not ours(keys, args) then
    return nil
  end
  return redis.call('DEL', keys[2])
end

local function fields(flat)
  local about = {}
  for i = 1, #flat, 2 do
    about[flat[i]] = flat[i + 1]
  end
  return about
end

local function group_of(key, name)
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local about = fields(group)
    if about['name'] == name then
      return about
    end
  end
end

-- Of the entries that there ever were, those that are gone and the group has not read: they were trimmed at the stream's head. The server
-- does not always know how many it has read; then 0.
local function lost(key, name)
  local group = group_of(key, name)
  if not group or not group['entries-read'] then
    return 0
  end
  local stream = fields(redis.call('XINFO', 'STREAM', key))
  local gone = stream['entries-added'] - stream['length']
  if gone <= group['entries-read'] then
    return 0
  end
  redis.call('XGROUP', 'SETID', key, name, group['last-delivered-id'], 'ENTRIESREAD', gone)
  return gone - group['entries-read']
end

local function read(keys, args)
  if not ours(keys, args) then
    return nil
  end
  redis.call('PEXPIRE', keys[2], args[2])
  local missed = lost(keys[1], args[3])
  local found = redis.call('XREADGROUP', 'GROUP', args[3], args[4], 'COUNT', args[5], 'STREAMS', keys[1], '>')
  local entries = found and found[1] and found[1][2] or {}
  if #entries > 0 then
    return { entries, entries[#entries][1], missed }
  end
  local group = group_of(keys[1], args[3])
  return group and { entries, group['last-delivered-id'], missed }
end

local function claim(keys, args)
  if not ours(keys, args) then
    return nil
  end
  redis.call('PEXPIRE', keys[2], args[2])
  local found = redis.call('XAUTOCLAIM', keys[1], args[3], args[4], 0, args[6], 'COUNT', args[5])
  if found[1] == '0-0' then
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', keys[1], args[3])) do
      local about = fields(consumer)
      if about['pending'] == 0 and about['name'] ~= args[4] then
        redis.call('XGROUP', 'DELCONSUMER', keys[1], args[3], about['name'])
      end
    end
  end
  return { found[1], found[2] }
end

local function settle(keys, args)
  if not ours(keys, args) then
    return nil
  end
  local kind = redis.call('TYPE', keys[3]).ok
  if kind ~= 'none' and kind ~= 'stream' then
    return redis.error_reply('WRONGTYPE ' .. keys[3] .. ' holds a ' .. kind) -- asked first: nothing is undone here
  end
  local ids, acknowledged = tonumber(args[5]), 0
  local at = 6 + ids
  while at <= #args do
    local size = tonumber(args[at])
    redis.call('XADD', keys[3], 'MAXLEN', '~', args[4], '*', unpack(args, at + 1, at + size))
    at = at + 1 + size
  end
  for i = 6, 5 + ids do
    acknowledged = acknowledged + redis.call('XACK', keys[1], args[2], args[i])
    if args[3] == '0' then
      redis.call('XDEL', keys[1], args[i])
    end
  end
  return acknowledged
end

redis.register_function('onset_attend_v3', attend)
redis.register_function('onset_hold_v3', hold)
redis.register_function('onset_release_v3', release)
redis.register_function('onset_read_v3', read)
redis.register_function('onset_claim_v3', claim)
redis.register_function('onset_settle_v3', settle)
