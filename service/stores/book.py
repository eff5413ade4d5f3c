"""The book of alerts, in the state store: what the desk folds the alert log into, and what the doors and the sinks read.

Keys (each name once, here), all in one slot of a cluster:

    onset:{alerts}:lease           who keeps the book, a token that expires; every write but an acknowledgement is made under it
    onset:{alerts}:table           the alerts, a hash id → JSON
    onset:{alerts}:muted           of the open ones the ids of those that a mute holds, a set
    onset:{alerts}:mutes           whose alerts nobody is told of for a while, a hash name → JSON: written by any replica
    onset:{alerts}:acks            who looks after them, a hash id → JSON: written by any replica
    onset:{alerts}:all  :open      their ids, sorted sets without scores: ids sort by when an anomaly began
    onset:{alerts}:streams         the same behind a hash of their stream
    onset:{alerts}:resolved        ids by when they were resolved: what is forgotten first
    onset:{alerts}:cursors         a hash: up to which entry each part of the log is folded, and up to which change each sink has been told
    onset:{alerts}:changes         what sinks are yet to be told, a stream of about CHANGES entries at most
    onset:{alerts}:withheld:SINK   ids of open alerts that a sink was not told of one by one, a set
    onset:{alerts}:dead-letters    what no sink took, a stream of about DEAD_LETTERS entries at most

A part of the log is read from its cursor on; the alerts that follow, what sinks are to be told of it and the new cursor are written in one
step, under the lease. So each transition counts once, whoever dies when.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from service.alerts import Acknowledgement, Alert, Change, Kind, Outcome, Status
from service.errors import Fenced, StoreUnavailable
from service.events import Severity
from service.mutes import Mute
from service.stores.redis import SHARDS, Command, Commands, log_key, state_key

PREFIX = b"onset:{alerts}:"
LEASE, TABLE, ACKS, ALL, OPEN, STREAMS, RESOLVED, CURSORS, CHANGES_KEY, LETTERS, MUTES, MUTED = (
    PREFIX + name for name in b"lease table acks all open streams resolved cursors changes dead-letters mutes muted".split()
)
FENCED_FUNCTION = "onset_fenced_v7"
LEASE_MS = 5000
_RENEW: Command = ("PEXPIRE", LEASE, LEASE_MS)
CHANGES, DEAD_LETTERS = 100_000, 10_000
# Of an alert that has changed since it was read sinks would be told what it no longer is, after what it became.
ACKNOWLEDGE = """if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[6] then return 0 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[2], ARGV[1]) else redis.call('HSET', KEYS[2], ARGV[1], ARGV[3]) end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'change', ARGV[4])
return 1"""
# One that was changed since it was read stays.
UNMUTE = "if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return redis.call('HDEL', KEYS[1], ARGV[1]) end return 0"
SIGN = """if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
return redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])"""
AT_ONCE = 500
"""Alerts loaded in one go."""
SCANNED = 5_000
"""Alerts that one page or count looks at, at most: where few of them are wanted a page may have none, and a cursor."""

_alert, _ack, _change = msgspec.json.Decoder(Alert), msgspec.json.Decoder(Acknowledgement), msgspec.json.Decoder(Change)
_mute = msgspec.json.Decoder(Mute)
_json = msgspec.json.Encoder()


@dataclass(frozen=True)
class Wanted:
    """Which alerts a page has; empty = all."""

    status: frozenset[Status] = frozenset()
    severity: frozenset[Severity] = frozenset()
    kind: Kind | None = None
    model: str | None = None
    stream_id: str | None = None
    holds: str = ""
    """What the name of the stream holds, in upper or lower case."""
    muted: bool | None = None
    """Whether sinks are not told of it for now."""

    def has(self, alert: Alert) -> bool:
        return (
            (not self.status or alert.status in self.status)
            and (not self.severity or alert.severity in self.severity)
            and self.kind in (None, alert.kind)
            and self.model in (None, alert.model)
            and self.stream_id in (None, alert.stream_id)
            and self.holds.casefold() in alert.stream_id.casefold()
            and self.muted in (None, alert.muted is not None)
        )


class Became(NamedTuple):
    """What became of an alert in a call about several, and the alert as it is then."""

    outcome: Outcome
    alert: Alert | None


@dataclass(frozen=True)
class Entry:
    """One of the alert log."""

    shard: int
    id: str
    content: bytes

    @property
    def at(self) -> float:
        """When it was committed, by the store's clock."""
        return _seconds(self.id)


@dataclass(frozen=True)
class Told:
    """A change as sinks are told of it."""

    id: str
    change: Change

    @property
    def at(self) -> float:
        return _seconds(self.id)


class Book:
    """Raises StoreUnavailable wherever the server does not answer."""

    def __init__(self, store: Commands | None = None) -> None:
        """`store` may come later, by `connect`."""
        self._connected = store

    def connect(self, store: Commands) -> None:
        """Where the book lies."""
        self._connected = store

    @property
    def _store(self) -> Commands:
        if self._connected is None:
            raise StoreUnavailable("The state store has not been opened yet.")
        return self._connected

    # ── for everyone ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def alerts(self, ids: Sequence[str]) -> list[Alert | None]:
        """With their acknowledgements."""
        found: list[Alert | None] = []
        for i in range(0, len(ids), AT_ONCE):
            some = ids[i : i + AT_ONCE]
            table, acks = await self._store.pipe([("HMGET", TABLE, *some), ("HMGET", ACKS, *some)])
            found += [_read(alert, ack) for alert, ack in zip(table, acks, strict=True)]
        return found

    async def page(self, wanted: Wanted, cursor: str, limit: int) -> tuple[list[Alert], str]:
        """At most `limit` alerts, the latest first, from those before the id `cursor` on ("" = all), and the next cursor ("" = the end)."""
        found: list[Alert] = []
        looked, count = 0, min(limit, AT_ONCE)
        while looked < SCANNED:
            ids = await self._ids(wanted, cursor, count)
            for alert in await self.alerts(ids):
                if alert is not None and wanted.has(alert):
                    found.append(alert)
                    if len(found) == limit:
                        return found, alert.id
            if len(ids) < count:
                return found, ""
            cursor = ids[-1]
            looked, count = looked + count, min(2 * count, AT_ONCE)
        return found, cursor

    async def count(self, wanted: Wanted, limit: int = SCANNED) -> tuple[Counter[Severity], bool]:
        """How many alerts there are by severity, about `limit` at most, and whether these are all: of more than SCANNED the latest are
        looked at.
        """
        counted: Counter[Severity] = Counter()
        cursor = ""
        for _ in range(0, SCANNED, AT_ONCE):
            ids = await self._ids(wanted, cursor, AT_ONCE)
            counted.update(alert.severity for alert in await self.alerts(ids) if alert is not None and wanted.has(alert))
            if len(ids) < AT_ONCE:
                return counted, True
            if counted.total() >= limit:
                break
            cursor = ids[-1]
        return counted, False

    async def open_ids(self) -> list[str]:
        return [id_.decode() for id_ in (await self._store.pipe([("ZRANGE", OPEN, 0, -1)]))[0]]

    async def set_aside(self) -> tuple[set[str], set[str]]:
        """Ids of the open alerts that someone looks after, and of those that are muted."""
        acks, muted, still = await self._store.pipe([("HKEYS", ACKS), ("SMEMBERS", MUTED), ("ZRANGE", OPEN, 0, -1)])
        attended, kept = ({id_.decode() for id_ in {*some} & {*still}} for some in (acks, muted))
        return attended, kept

    async def there(self, model: str, stream_ids: Sequence[str]) -> list[bool]:
        """Whether these streams have a state, of a model that need not be loaded."""
        return [bool(found) for found in await self._store.pipe([("EXISTS", state_key(model, stream_id)) for stream_id in stream_ids])]

    async def resolved_since(self, at: float) -> list[str]:
        """Ids of alerts that were resolved after this time."""
        return [id_.decode() for id_ in (await self._store.pipe([("ZRANGEBYSCORE", RESOLVED, at, "+inf")]))[0]]

    async def latest_of(self, stream_id: str, most: int) -> list[str]:
        """Ids of a stream's latest alerts, of all models."""
        return await self._ids(Wanted(stream_id=stream_id), "", most)

    async def acknowledge(self, id_: str, acknowledgement: Acknowledgement | None) -> Alert | None:
        """None = nobody looks after it any more. Returns the alert as it is then, of which sinks are told; as it was, where it is resolved
        or nobody did; None where it is not known.
        """
        while True:
            [table], [ack] = await self._store.pipe([("HMGET", TABLE, id_), ("HMGET", ACKS, id_)])
            alert = _read(table, ack)
            if alert is None or not alert.open or acknowledgement is alert.acknowledgement is None:
                return alert
            known, command = _acknowledging(alert, acknowledgement, table, ack)
            if (await self._store.pipe([command]))[0]:
                return known

    async def acknowledge_open(self, ids: Sequence[str], acknowledgement: Acknowledgement) -> dict[str, Became]:
        """Someone looks after those of these alerts that nobody does yet; what became of each."""
        became: dict[str, Became] = {}
        left = list(dict.fromkeys(ids))
        while left:
            some = left[:AT_ONCE]
            table, acks = await self._store.pipe([("HMGET", TABLE, *some), ("HMGET", ACKS, *some)])
            trying: list[tuple[Alert, Command]] = []
            for id_, kept, ack in zip(some, table, acks, strict=True):
                alert = _read(kept, ack)
                if alert is None or not alert.open:
                    became[id_] = Became("unknown" if alert is None else "resolved", alert)
                elif alert.acknowledgement is not None:
                    became[id_] = Became("already_acknowledged", alert)
                else:
                    trying.append(_acknowledging(alert, acknowledgement, kept, ack))
            done = await self._store.pipe([command for _, command in trying]) if trying else []
            became |= {known.id: Became("acknowledged", known) for (known, _), one in zip(trying, done, strict=True) if one}
            left = [id_ for id_ in left if id_ not in became]  # with those that have changed since they were read
        return {id_: became[id_] for id_ in ids}

    async def mutes(self) -> list[Mute]:
        """The one that ends first first; those that are over among them."""
        found = [_mute.decode(kept) for kept in (await self._store.pipe([("HVALS", MUTES)]))[0]]
        return sorted(found, key=lambda mute: (mute.ends_at, mute.name))

    async def mute(self, mute: Mute) -> None:
        """In place of the one that has its name."""
        await self._store.pipe([("HSET", MUTES, mute.name, _json.encode(mute))])

    async def unmute(self, name: str) -> bool:
        """Whether there was one."""
        return bool((await self._store.pipe([("HDEL", MUTES, name)]))[0])

    async def forget_mutes(self, before: float) -> None:
        """Those that were over by then."""
        kept = (await self._store.pipe([("HVALS", MUTES)]))[0]
        over = [(mute.name, one) for one in kept if (mute := _mute.decode(one)).ends_at < before]
        if over:
            await self._store.pipe([("EVAL", UNMUTE, 1, MUTES, name, one) for name, one in over])

    async def sign(self, ids: Sequence[str], acknowledgement: Acknowledgement) -> None:
        """Alerts that are over keep who has accepted them, where nobody had looked after them. Nobody is told."""
        signed = _json.encode(acknowledgement)
        await self._store.pipe([("EVAL", SIGN, 2, TABLE, ACKS, id_, signed) for id_ in ids])

    # ── for whoever keeps it ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def take(self, token: str) -> bool:
        """Take the lease where it is free, for LEASE_MS; whether it is ours."""
        return bool((await self._store.pipe([("SET", LEASE, token, "NX", "PX", LEASE_MS)]))[0])

    async def renew(self, token: str) -> None:
        """As every write under it does. Raises Fenced."""
        await self._under(token, [])

    async def release(self, token: str) -> None:
        """Raises Fenced."""
        await self._under(token, [("DEL", LEASE)])

    async def cursors(self) -> dict[str, str]:
        """Of log:SHARD and sink:NAME the last entry that is done with."""
        fields = (await self._store.pipe([("HGETALL", CURSORS)]))[0]
        pairs = fields.items() if isinstance(fields, Mapping) else zip(fields[::2], fields[1::2], strict=True)
        return {name.decode(): value.decode() for name, value in pairs}

    async def read(self, cursors: Mapping[str, str], limit: int) -> list[Entry]:
        """Entries of the log that come after the cursors, each part's in its order, at most `limit` of each."""
        parts = await self._store.read_log([cursors.get(f"log:{shard}", "0-0") for shard in range(SHARDS)], limit)
        return [Entry(shard, id_, content) for shard, part in parts for id_, content in _entries(part)]

    async def write(
        self, token: str, alerts: Sequence[Alert], changes: Sequence[Change], folded: Mapping[int, str], again: Sequence[str] = ()
    ) -> None:
        """Put these alerts into the book and tell sinks of the changes; the log is `folded` up to these entries by that, and those `again`
        open have nobody who looks after them. Raises Fenced.
        """
        commands = [command for alert in alerts for command in _kept(alert)]
        commands += [("HDEL", ACKS, id_) for id_ in again]
        commands += map(_added, changes)
        commands += [("HSET", CURSORS, f"log:{shard}", id_) for shard, id_ in folded.items()]
        await self._under(token, commands)
        if folded:
            await self._store.pipe([("XTRIM", log_key(shard), "MINID", _following(id_)) for shard, id_ in folded.items()])

    async def open_count(self) -> int:
        return int((await self._store.pipe([("ZCARD", OPEN)]))[0])

    async def forget(self, token: str, before: float, most: int) -> int:
        """Forget alerts resolved before this time, and the oldest of those beyond `most`; how many. Raises Fenced."""
        old, count = await self._store.pipe([("ZRANGEBYSCORE", RESOLVED, "-inf", before, "LIMIT", 0, AT_ONCE), ("ZCARD", RESOLVED)])
        beyond = (await self._store.pipe([("ZRANGE", RESOLVED, 0, min(count - most, AT_ONCE) - 1)]))[0] if count > most else []
        ids = [id_.decode() for id_ in {*old, *beyond}]
        commands: list[Command] = []
        for id_, alert in zip(ids, await self.alerts(ids), strict=True):
            commands += [("HDEL", TABLE, id_), ("HDEL", ACKS, id_), ("ZREM", ALL, id_), ("ZREM", RESOLVED, id_), ("SREM", MUTED, id_)]
            commands += [("ZREM", STREAMS, _behind(alert.stream_id) + id_)] if alert else []
        if commands:
            await self._under(token, commands)
        return len(ids)

    async def trim(self, token: str, sinks: Collection[str], since: float) -> None:
        """Take out the changes that all `sinks` have been told of; for others, that may be told elsewhere, those of before `since`, too.

        Raises Fenced.
        """
        places = {name.removeprefix("sink:"): _order(id_) for name, id_ in (await self.cursors()).items() if name.startswith("sink:")}
        earliest = (round(1000 * max(since, 0)), 0)
        told = [place if name in sinks else max(place, earliest) for name, place in places.items()]
        ms, number = min(told, default=_order(await self.last_change()))
        await self._under(token, [("XTRIM", CHANGES_KEY, "MINID", f"{ms}-{number + 1}")])

    async def changes(self, cursor: str | None, limit: int) -> list[Told]:
        """What a sink is to be told after its cursor, in order."""
        entries = (await self._store.pipe([("XRANGE", CHANGES_KEY, _after(cursor), "+", "COUNT", limit)]))[0]
        return [Told(id_, _change.decode(content)) for id_, content in _entries(entries)]

    async def last_change(self) -> str:
        """Id of the last one; "0-0" = there was none."""
        entries = (await self._store.pipe([("XREVRANGE", CHANGES_KEY, "+", "-", "COUNT", 1)]))[0]
        return next((id_ for id_, _ in _entries(entries)), "0-0")

    async def withheld(self, sink: str, ids: Sequence[str]) -> set[str]:
        """Which of these alerts the sink has not been told of one by one."""
        known = await self._store.pipe([("SISMEMBER", _withheld(sink), id_) for id_ in ids]) if ids else []
        return {id_ for id_, member in zip(ids, known, strict=True) if member}

    async def delivered(
        self, token: str, sink: str, cursor: str, *, withhold: Sequence[str] = (), over: Sequence[str] = (), letters: Sequence[bytes] = ()
    ) -> None:
        """The sink has been told up to this change; it was not told of the alerts `withhold`, and those `over` are. Raises Fenced."""
        commands: list[Command] = [("SADD", _withheld(sink), id_) for id_ in withhold]
        commands += [("SREM", _withheld(sink), id_) for id_ in over]
        commands += [("XADD", LETTERS, "MAXLEN", "~", DEAD_LETTERS, "*", "letter", letter) for letter in letters]
        await self._under(token, [*commands, ("HSET", CURSORS, f"sink:{sink}", cursor)], _withheld(sink))

    async def letters(self, limit: int) -> list[bytes]:
        """The latest dead letters."""
        entries = (await self._store.pipe([("XREVRANGE", LETTERS, "+", "-", "COUNT", limit)]))[0]
        return [content for _, content in _entries(entries)]

    async def _ids(self, wanted: Wanted, cursor: str, limit: int) -> list[str]:
        """The latest ids before the cursor; more than the wanted ones, but all of those."""
        key, behind = (OPEN if wanted.status and "resolved" not in wanted.status else ALL), ""
        if wanted.stream_id is not None:
            key, behind = STREAMS, _behind(wanted.stream_id)
        most = f"({behind}{cursor}" if cursor else f"({behind}g"  # g comes after all digits of an id
        found = (await self._store.pipe([("ZREVRANGEBYLEX", key, most, f"[{behind}", "LIMIT", 0, limit)]))[0]
        return [id_.decode()[len(behind) :] for id_ in found]

    async def _under(self, token: str, commands: Sequence[Command], *more: bytes) -> None:
        """These commands in one step, under the lease, which is renewed. Raises Fenced."""
        keys = [LEASE, TABLE, ACKS, ALL, OPEN, STREAMS, RESOLVED, CURSORS, CHANGES_KEY, LETTERS, MUTED, *more]
        words = [word for command in (_RENEW, *commands) for word in (len(command), *command)]
        if await self._store.call(FENCED_FUNCTION, keys, [token, *words]) is None:
            raise Fenced("The lease of the book of alerts is no longer this replica's.")


def _kept(alert: Alert) -> Iterator[Command]:
    yield "HSET", TABLE, alert.id, _json.encode(replace(alert, acknowledgement=None, status="open" if alert.open else "resolved"))
    yield "ZADD", ALL, 0, alert.id
    yield "ZADD", STREAMS, 0, _behind(alert.stream_id) + alert.id
    yield "SADD" if alert.open and alert.muted is not None else "SREM", MUTED, alert.id
    if alert.resolved_at is None:
        yield "ZADD", OPEN, 0, alert.id
        yield "ZREM", RESOLVED, alert.id
    else:
        yield "ZREM", OPEN, alert.id
        yield "ZADD", RESOLVED, alert.resolved_at, alert.id


def _acknowledging(alert: Alert, by: Acknowledgement | None, table: bytes, ack: bytes | None) -> tuple[Alert, Command]:
    """The open alert as it will be, and what makes it so unless it has changed since it was read as `table` and `ack`."""
    known = replace(alert, acknowledgement=by, status="acknowledged" if by else "open")
    change = _json.encode(Change("acknowledged" if by else "unacknowledged", known))
    keys = (TABLE, ACKS, CHANGES_KEY)
    return known, ("EVAL", ACKNOWLEDGE, len(keys), *keys, alert.id, table, _json.encode(by) if by else b"", change, CHANGES, ack or b"")


def _added(change: Change) -> Command:
    return "XADD", CHANGES_KEY, "MAXLEN", "~", CHANGES, "*", "change", _json.encode(change)


def _read(alert: bytes | None, ack: bytes | None) -> Alert | None:
    if alert is None:
        return None
    read = _alert.decode(alert)
    if ack is None:
        return read
    return replace(read, acknowledgement=_ack.decode(ack), status="acknowledged" if read.open else read.status)


def _entries(entries: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
    """Ids and the value of the one field, as either client answers XRANGE."""
    for id_, fields in entries:
        [value] = fields.values() if isinstance(fields, Mapping) else fields[1:]
        yield id_.decode(), value


def _after(cursor: str | None) -> str:
    return f"({cursor}" if cursor else "-"


def _order(id_: str) -> tuple[int, int]:
    """By which ids of entries are in their order."""
    ms, _, number = id_.partition("-")
    return int(ms), int(number)


def _following(id_: str) -> str:
    ms, number = _order(id_)
    return f"{ms}-{number + 1}"


def _seconds(id_: str) -> float:
    return int(id_.partition("-")[0]) / 1000


def _behind(stream_id: str) -> str:
    return hashlib.blake2b(stream_id.encode(), digest_size=8).hexdigest()


def _withheld(sink: str) -> bytes:
    return PREFIX + b"withheld:" + sink.encode()
