"""NATS JetStream, by nats-py: messages are acknowledged after the states are committed, positions are the stream's sequence numbers.

    keeper      connect ─► heartbeat ─► renew our leases ─► too many: release    too few: take what is free ─► wait
    partition   bind its durable consumer ─► pull what there is room for ─► a batch ─► publish ─► settle (ack)
                 └── a gap in what the consumer delivered, or an ack that is refused: what waits is forgotten, the consumer is made
                     again behind the last settled message, and delivers from there

A partition is one filter of subjects with a durable consumer of its own, read by one replica at a time. Who reads it is agreed on in a
small stream `{group}-leases` whose messages expire: one subject a live replica, one subject a partition, written by compare-and-set.

JetStream delivers what was not acknowledged later than what came after it, and to whoever pulls. Order within a stream rests on positions
that only rise, so nothing of that is used: a consumer numbers its deliveries, each owner holds them against the number it expects, and
an owner that finds deliveries missing, or takes over from one that left some unacknowledged, makes the consumer again. A replica that was
taken for dead and goes on can so neither take messages away from the new owner unnoticed nor write a state that the owner has written.

A connection is used once. The client could come back by itself, and would then send what was left in its buffer to the new connection,
although what it had sent before that was lost with the old one: a stream's fourth result was in the output before its third. So the keeper
makes another client, and what one connection has stored is all that was sent up to some point.

A stream that was deleted and made again counts from 1: the time it was made is part of the partition's identity. One that came back without
its last messages (a power cut, a backup) gives their numbers again: who had them settled sees it, and begins an *incarnation*, kept as the
description of the consumer and part of the identity, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo, DeliverPolicy, DiscardPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from service import tasks
from service.errors import BadSetting, Fenced, StoreUnavailable
from service.events import Published
from service.metrics import Metrics
from service.sources import Batch, Letter, Message, Settlement, address, identity
from service.sources.options import NatsSource, meet
from service.sources.partitions import AHEAD, Partition, Partitions

ANSWER_SECONDS = 5.0
"""Of a request to the servers."""
PULL_SECONDS = 2.0
"""How long a pull waits at the server for messages."""
BACKOFF_SECONDS = 0.5
MOST_REASONS = 8
"""That are told of one outage."""
EXPECTED, MESSAGE_ID = "Nats-Expected-Last-Subject-Sequence", "Nats-Msg-Id"
WRONG_SEQUENCE = 10071
"""JetStream's error code of a compare-and-set that lost."""
HEADER_BYTES = 64
"""Of a message's headers, beside the names and values."""
INCARNATION = "onset-"
"""How one begins."""
SAME_SECONDS = 1e-3
"""Between the times that two answers of the server give for one message."""
PROGRESS, ACK = b"+WPI", b"+ACK"

T = TypeVar("T")

log = structlog.get_logger(__name__)


class _Restart(Exception):
    """The consumer is to be made again behind what is settled."""


class Nats:
    """Implements Source. Raises BadSetting where the credentials cannot be used."""

    def __init__(self, options: NatsSource, metrics: Metrics) -> None:
        self.name = options.called
        self.publishes = bool(options.output)
        self.member = uuid.uuid4().hex[:16]
        self._options, self._metrics = options, metrics
        self._partitions: Partitions[_Subject] = Partitions(self.name, metrics, options.batch)
        self._client: Client | None = None
        self._ended = asyncio.Event()
        """The connection is gone; before the first there is none."""
        self._js: JetStreamContext | None = None
        self._leases: _Leases | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._releases: set[asyncio.Task[None]] = set()
        self._shares_from = 0.0
        """When partitions change hands again. After an outage they stay with who had them: the leases end with the server, and who had
        acknowledged what it does not know any more must see that.
        """
        self._told: set[str] = set()
        """Of the outage that there is: what was said of it."""
        if options.credentials:
            _check_credentials(options)

    async def open(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name=f"{self.name}-keeper")

    async def receive(self) -> Batch:
        return await self._partitions.receive()

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        self._partitions.ours(batch)
        await self._send([(self._options.output, result.content, {MESSAGE_ID: result.id}) for result in results])

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        partition = self._partitions.ours(batch)
        if settlement.letters:
            await self._send([(self._options.dead_letters, *_letter(batch, letter)) for letter in settlement.letters])
        await self._ask(lambda: self._acknowledge(partition, batch))
        self._partitions.settle(batch)
        partition.settled_at = batch.messages[-1].arrived
        partition.wake.set()

    def abandon(self, batch: Batch) -> None:
        self._partitions.abandon(batch)

    async def lag(self) -> int | None:
        infos = [await self._ask(partition.info) for partition in self._partitions.owned]
        return sum((info.num_pending or 0) + (info.num_ack_pending or 0) for info in infos)

    async def close(self) -> None:
        if self._keeper is not None:
            await tasks.end(self._keeper)
        releases = [asyncio.create_task(self._release(partition)) for partition in self._partitions.owned if not partition.leaving]
        if releases or self._releases:
            await asyncio.wait([*releases, *self._releases])
        if self._leases is not None:
            with contextlib.suppress(StoreUnavailable):
                await self._ask(lambda: self._need_leases().drop(f"member.{self.member}"))
        await self._disconnect()

    # ── the keeper ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        """Connection, heartbeat, and our share of the partitions, until cancelled."""
        while True:
            try:
                await self._connect()
                await self._ask(self._share)
                self._recovered()
            except StoreUnavailable as error:
                await self._on_error(error)
            except Exception as error:  # a bug must not end the heartbeat for good; it is counted and logged
                self.bug(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.lease_seconds / 4):
                    await self._ended.wait()
                    await asyncio.sleep(BACKOFF_SECONDS)

    async def _connect(self) -> None:
        """Unless it is. Raises StoreUnavailable."""
        if self._leases is not None and self.client.is_connected:
            return
        await self._disconnect()
        options, client, ended = self._options, Client(), asyncio.Event()
        again = self._js is not None
        self._client, self._ended = client, ended

        async def gone() -> None:
            """Returns only where the client is closed: it comes back by itself after this."""
            ended.set()
            if not client.is_closed:
                await self._on_error(client.last_error or ConnectionError("The connection is gone."))
                await asyncio.Event().wait()  # until closing cancels it

        try:
            await client.connect(
                servers=list(options.servers),
                name=self.name,
                pending_size=0,
                max_reconnect_attempts=1,
                reconnect_time_wait=1,
                connect_timeout=round(ANSWER_SECONDS),
                ping_interval=max(1, round(options.lease_seconds)),  # the client's own two minutes leave a dead connection for six
                error_cb=self._on_error,
                disconnected_cb=gone,
                **_login(options),
            )
            url = client.connected_url
            if (options.tls_ca or (url and url.scheme == "tls")) and not client._server_info.get("tls_required"):
                raise ConnectionError("TLS is declared and the server does not ask for it: the client goes on without")
            self._js = client.jetstream(timeout=ANSWER_SECONDS)
            self._leases = await _Leases.of(self._js, f"{options.group}-leases", options.lease_seconds)
        except (NatsError, OSError, TimeoutError) as error:
            await self._disconnect()
            ended.clear()  # there is nothing to hurry for
            raise _unavailable(error) from error
        if again:
            self._shares_from = time.monotonic() + options.lease_seconds
        for partition in self._partitions.owned:
            partition.wake.set()

    async def _disconnect(self) -> None:
        client, self._client, self._leases = self._client, None, None
        if client is None:
            return
        if not client.is_connected:
            client._pending_data_size = 0  # or closing writes that to a closed transport, raises, and leaves the client's tasks behind
        closing = asyncio.create_task(client.close())  # by itself: of a dead connection it ends in errors of all kinds, or not at all
        try:
            await asyncio.wait({closing}, timeout=ANSWER_SECONDS)
        finally:
            await tasks.end(closing)

    async def _on_error(self, error: Exception) -> None:
        """We go on for ever; each reason is told once: a server that comes back may refuse the login."""
        reason = repr(error)
        if reason not in self._told and len(self._told) < MOST_REASONS:
            self._told.add(reason)
            log.warning("nats_unavailable", source=self.name, error=reason)

    def _recovered(self) -> None:
        if self._told:
            self._told.clear()
            url = self.client.connected_url
            log.info("nats_connected", source=self.name, server=address(url.geturl()) if url else "")

    async def _share(self) -> None:
        """Renew, release or take, so that every live member has the same number of partitions, give or take one."""
        leases = self._need_leases()
        members = await leases.attend(self.member)
        rank, count = members.index(self.member), len(self._options.subjects)
        target = count // len(members) + (rank < count % len(members))
        for partition in self._partitions.owned:
            if not await leases.hold(partition.lease, self.member) and not partition.leaving:
                partition.stop()
                self._partitions.lose([partition])
        if time.monotonic() < self._shares_from:
            return
        staying = [partition for partition in self._partitions.owned if not partition.leaving]
        for partition in staying[target:]:
            partition.leaving = True
            task = asyncio.create_task(self._release(partition), name=f"release-{partition.name}")
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)
        wanted = target - len(staying)
        for i in range(count):
            if wanted <= 0:
                break
            wanted -= await self._take((rank * count // len(members) + i) % count)

    async def _take(self, index: int) -> bool:
        partition = _Subject(self, self._options, index)
        if partition.name in self._partitions.names or not await self._need_leases().hold(partition.lease, self.member):
            return False
        self._partitions.own([partition])
        partition.start()
        return True

    async def _release(self, partition: _Subject) -> None:
        partition.leaving = True
        await partition.end()
        await self._partitions.release([partition])
        with contextlib.suppress(StoreUnavailable):  # then it expires
            await self._ask(lambda: self._need_leases().drop(partition.lease))

    # ── what partitions use ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def js(self) -> JetStreamContext:
        if self._js is None:
            raise RuntimeError("NATS is used before it is connected: this is a bug.")
        return self._js

    @property
    def client(self) -> Client:
        if self._client is None:
            raise StoreUnavailable("NATS has not been reached yet.")
        return self._client

    def arrived(self, partition: _Subject) -> None:
        self._partitions.offer(partition)

    def message(self, sent: Msg) -> Message:
        metadata = sent.metadata
        headers = {name.encode(): value.encode() for name, value in (sent.headers or {}).items()}
        return Message(
            sent.reply.encode(), metadata.sequence.stream, metadata.timestamp.timestamp(), sent.data, headers, None, sent.subject
        )

    def bug(self, error: Exception) -> None:
        self._metrics.bug(error, source=self.name)

    async def _acknowledge(self, partition: _Subject, batch: Batch) -> None:
        """All of them; the last one's ack is confirmed, those before it went the same way. Raises Fenced where it is refused."""
        *before, last = batch.messages
        for message in before:
            await self.client.publish(message.id.decode(), ACK)
        try:
            await self.client.request(last.id.decode(), ACK, timeout=ANSWER_SECONDS)
        except (NoRespondersError, TimeoutError) as error:
            if not self.client.is_connected:
                raise
            partition.restart()  # the consumer was deleted or made again, or the answer was lost with a connection
            raise Fenced(f"The server did not confirm what was acknowledged of '{batch.partition}'.") from error

    async def _send(self, records: Sequence[tuple[str, bytes, dict[str, str]]]) -> None:
        """All of them are in their stream when it returns. Raises StoreUnavailable: some may be."""

        async def send() -> None:
            js = self.js  # one connection for all of them: of two, the second could store what follows something that the first has lost
            async with asyncio.timeout(2 * ANSWER_SECONDS):
                sent = [
                    await js.publish_async(subject, payload, wait_stall=ANSWER_SECONDS, headers=about)
                    for subject, content, headers in records
                    for payload, about in [_fitting(content, headers, self.client.max_payload)]
                ]
                try:
                    await asyncio.gather(*sent)
                except NoStreamResponseError as error:
                    detail = f"No JetStream stream takes '{records[0][0]}' now: make one that does, if there is none."
                    raise StoreUnavailable(detail) from error

        await self._ask(send)

    def _need_leases(self) -> _Leases:
        if self._leases is None:
            raise StoreUnavailable("NATS has not been reached yet.")
        return self._leases

    async def _ask(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Raises StoreUnavailable, as soon as the connection is gone: what it has not answered it will not answer."""
        asking, gone = asyncio.create_task(ask()), asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait((asking, gone), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise ConnectionError("The connection is gone.")
            return asking.result()
        except (NatsError, OSError, TimeoutError) as error:
            raise _unavailable(error) from error
        finally:
            gone.cancel()
            await tasks.end(asking)


class _Leases:
    """Who is there and who reads what: subjects of a small stream whose messages expire."""

    def __init__(self, js: JetStreamContext, stream: str) -> None:
        self._js, self._stream = js, stream
        self._held: dict[str, int] = {}  # ours: sequence of the last renewal

    @classmethod
    async def of(cls, js: JetStreamContext, stream: str, seconds: float) -> _Leases:
        """Makes the stream where it is missing."""
        config = StreamConfig(
            name=stream,
            subjects=[f"{stream}.>"],
            max_age=seconds,
            max_msgs_per_subject=1,
            storage=StorageType.MEMORY,
            discard=DiscardPolicy.OLD,
            duplicate_window=min(seconds, 120),
        )
        try:
            await js.stream_info(stream)
        except NotFoundError:
            await js.add_stream(config)
        return cls(js, stream)

    async def attend(self, member: str) -> list[str]:
        """Say that we are there; who is."""
        await self._js.publish(f"{self._stream}.member.{member}", member.encode())
        info = await self._js.stream_info(self._stream, subjects_filter=f"{self._stream}.member.*")
        names = {subject.rpartition(".")[2] for subject in info.state.subjects or {}}
        return sorted(names | {member})

    async def hold(self, name: str, member: str) -> bool:
        """Renew the lease, or take it where it is free; whether it is ours."""
        subject = f"{self._stream}.{name}"
        if await self._write(name, member, self._held.get(name, 0)):
            return True
        try:  # what was written may be ours all the same, by a renewal whose answer was lost; or it has expired
            last = await self._js.get_last_msg(self._stream, subject)
        except NotFoundError:
            return await self._write(name, member, 0)
        if last.data != member.encode() or last.seq is None:
            self._held.pop(name, None)
            return False
        return await self._write(name, member, last.seq)

    async def drop(self, name: str) -> None:
        """Ours alone."""
        if name.startswith("member.") or self._held.pop(name, None) is not None:
            await self._js.purge_stream(self._stream, subject=f"{self._stream}.{name}")

    async def _write(self, name: str, member: str, expected: int) -> bool:
        """Compare-and-set."""
        try:
            sent = await self._js.publish(f"{self._stream}.{name}", member.encode(), headers={EXPECTED: str(expected)})
        except APIError as error:
            if error.err_code == WRONG_SEQUENCE:
                return False
            raise
        self._held[name] = sent.seq
        return True


class _Subject(Partition):
    """One filter of subjects while it is ours."""

    def __init__(self, source: Nats, options: NatsSource, index: int) -> None:
        self.subject = options.subjects[index]
        super().__init__(self.subject, 0, 0)
        self.consumer = options.group if len(options.subjects) == 1 else f"{options.group}-{index}"
        self._mark = f"{self.consumer}-at"
        self.lease = f"lease.{index}"
        self.wake = asyncio.Event()
        """There may be room again, or something came."""
        self._source, self._options = source, options
        self._stream = options.stream
        self._pulled = 0
        """Messages asked for and not there yet."""
        self._pulled_at = 0.0
        self._next = 0
        """The number of the delivery that is expected."""
        self._seen = 0
        """Position of the last message."""
        self.settled_at = math.nan
        """When the message at `settled` came to the stream."""
        self._created = ""
        self._incarnation = ""
        self._broken = False
        self._refused = ""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._run(), name=f"partition-{self.name}"),
            asyncio.create_task(self._keep_alive(), name=f"progress-{self.name}"),
        ]

    def stop(self) -> None:
        """Pull no more."""
        for task in self._tasks:
            task.cancel()

    async def end(self) -> None:
        for task in self._tasks:
            await tasks.end(task)

    def restart(self) -> None:
        """What waits is to be delivered again, by a consumer that is made again."""
        self._broken = True
        self.wake.set()

    async def info(self) -> ConsumerInfo:
        if not self._stream:
            raise StoreUnavailable(f"No consumer of '{self.subject}' is bound yet.")
        info: ConsumerInfo = await _whole(self._source.js.consumer_info(self._stream, self.consumer))
        return info

    def give_back(self, messages: Sequence[Message]) -> None:
        if not self._broken:  # or they are delivered again
            super().give_back(messages)

    async def _run(self) -> None:
        again = False
        while True:
            try:
                await self._bind(again)
                again = True
                await self._pull()
            except _Restart:
                pass
            except (NatsError, OSError, TimeoutError, StoreUnavailable) as error:
                log.debug("nats_unavailable", source=self._source.name, partition=self.name, error=repr(error))
                await asyncio.sleep(BACKOFF_SECONDS)
            except BadSetting as error:
                if error.detail != self._refused:
                    self._refused = error.detail
                    log.error("source_refused", source=self._source.name, partition=self.name, reason=error.detail)
                await asyncio.sleep(10 * BACKOFF_SECONDS)
            except Exception as error:  # a bug must not end the partition for good; it is counted and logged
                self._source.bug(error)
                await asyncio.sleep(10 * BACKOFF_SECONDS)
            self._broken = True  # what waits is delivered again
            self.forget()
            await self.free.wait()

    async def _bind(self, again: bool) -> None:
        """The consumer is there and delivers next what follows the last settled message."""
        js = self._source.js
        try:
            self._stream = self._stream or await js.find_stream_name_by_subject(self.subject)
            stream = await js.stream_info(self._stream)
        except NotFoundError as error:
            about = f"is called '{self._stream}'" if self._stream else f"takes '{self.subject}'"
            raise BadSetting(f"No JetStream stream {about}: make it first.") from error
        taken = subjects_of(stream.config)
        if taken and not any(meet(one, self.subject) for one in taken):
            raise BadSetting(f"JetStream stream '{self._stream}' takes {', '.join(taken)}, and so nothing of '{self.subject}'.")
        created, before = str(stream.created), self._created
        self._created = created
        if before not in ("", created):
            self._is_another(f"It was deleted and made again ({before}, now {created}).", 0, "")
        try:
            info = await _whole(js.consumer_info(self._stream, self.consumer))
            done = _done(info)
        except NotFoundError:
            done = 0 if before else await self._begin(stream.state.last_seq)
            info = await self._make(max(self.settled, done) + 1)
        self._check(info.config)
        self._incarnation = _incarnation(info.config)
        if done > self.settled:
            self.settled, self.settled_at = done, math.nan
        if went_back := await self._went_back():
            self._is_another(went_back, min(done, stream.state.last_seq), f"{INCARNATION}{time.time_ns():x}")
        self._seen = self.settled
        self.identity = identity("\0".join(["nats", self._stream, created, *filter(None, [self._incarnation])]))
        if again or went_back or info.num_ack_pending:
            info = await self._make_again()
        self._next = (info.delivered.consumer_seq if info.delivered is not None else 0) + 1
        self._broken, self._pulled = False, 0

    async def _went_back(self) -> str:
        """Why what is settled is not in the stream any more; empty = nothing speaks for that."""
        js = self._source.js
        if self.settled > (last := (await js.stream_info(self._stream)).state.last_seq):
            return f"It ends at {last}, and {self.settled} was acknowledged."
        if math.isnan(self.settled_at):
            return ""
        try:
            found = await js.get_msg(self._stream, self.settled)
        except (NatsError, TimeoutError):
            return ""  # it was deleted since, or we may not read it
        if found.time is None or abs(found.time.timestamp() - self.settled_at) < SAME_SECONDS:
            return ""
        return f"Message {self.settled} is another one than was acknowledged."

    def _is_another(self, why: str, settled: int, incarnation: str) -> None:
        """What was settled of the stream says nothing of it any more."""
        self.settled, self.settled_at, self._incarnation = settled, math.nan, incarnation
        log.error("nats_stream_replaced", source=self._source.name, partition=self.name, reason=why, reads_on_at=settled + 1)

    async def _begin(self, last: int) -> int:
        """Behind which message a consumer begins that is not there: was one deleted to be made again, where its mark is."""
        try:
            mark = await _whole(self._source.js.consumer_info(self._stream, self._mark))
        except NotFoundError:
            return 0 if self._options.start == "earliest" else last
        self._incarnation = _incarnation(mark.config)
        return (mark.config.opt_start_seq or last + 1) - 1

    async def _make_again(self) -> ConsumerInfo:
        """Behind the last settled message. Who is killed before it is made would leave a group that begins at the end without what waits,
        or without its incarnation: so a consumer that nobody reads marks the place meanwhile.
        """
        if self._marks:
            await self._delete(self._mark)
            place = ConsumerConfig(
                durable_name=self._mark,
                description=self._incarnation or None,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self.settled + 1,
                ack_policy=AckPolicy.NONE,
                filter_subject=self.subject,
            )
            with contextlib.suppress(APIError):  # a stream with the retention of a work queue has no second consumer of a subject
                await self._source.js.add_consumer(self._stream, place)
        await self._delete(self.consumer)
        return await self._make(self.settled + 1)

    @property
    def _marks(self) -> bool:
        return self._options.start == "latest" or bool(self._incarnation)

    async def _delete(self, consumer: str) -> None:
        with contextlib.suppress(NotFoundError):
            await self._source.js.delete_consumer(self._stream, consumer)

    async def _make(self, first: int) -> ConsumerInfo:
        options = self._options
        config = ConsumerConfig(
            durable_name=self.consumer,
            description=self._incarnation or None,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=first,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=options.ack_seconds,
            max_ack_pending=2 * (AHEAD + 1) * options.batch,
            filter_subject=self.subject,
        )
        info = await self._source.js.add_consumer(self._stream, config)
        if self._marks:
            await self._delete(self._mark)
        return info

    def _check(self, config: ConsumerConfig) -> None:
        """Raises BadSetting where the consumer is of something else."""
        for field, wanted, found in (
            ("filter_subject", self.subject, config.filter_subject),
            ("ack_policy", AckPolicy.EXPLICIT, config.ack_policy),
            ("deliver_subject", None, config.deliver_subject or None),
        ):
            if wanted != found:
                raise BadSetting(
                    f"Consumer '{self.consumer}' of stream '{self._stream}' has {field} '{found}' and not '{wanted}': "
                    f"give the source another group, or delete the consumer."
                )

    async def _pull(self) -> None:
        """Ask for what there is room for, until cancelled. Raises _Restart."""
        client = self._source.client
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox, cb=self._on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
        try:
            while True:
                self.wake.clear()
                if self._broken or client is not self._source.client:
                    raise _Restart
                await self._ask_more(inbox)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PULL_SECONDS):
                        await self.wake.wait()
        finally:
            await _end(subscription)

    async def _ask_more(self, inbox: str) -> None:
        now = time.monotonic()
        if now - self._pulled_at > PULL_SECONDS + BACKOFF_SECONDS:
            self._pulled = 0  # its end was not told: the connection is another one, or the server
        if self._pulled or not self.low(self._options.batch):
            return
        self._pulled, self._pulled_at = AHEAD * self._options.batch - len(self.waiting), now
        request = json.dumps({"batch": self._pulled, "expires": round(1e9 * PULL_SECONDS)}).encode()
        await self._source.client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self.consumer}", request, inbox)

    async def _on_message(self, sent: Msg) -> None:
        if not sent.reply:  # no message but the end of a pull
            status = (sent.headers or {}).get("Status", "")
            self._pulled = 0
            if status == "503" or (status == "409" and "Consumer" in (sent.headers or {}).get("Description", "")):
                self._broken = True  # it was deleted
            self.wake.set()
            return
        sequence = sent.metadata.sequence
        if self._broken or sequence.consumer != self._next:
            self.restart()
            return
        self._next += 1
        self._pulled -= 1
        if sequence.stream > self._seen:
            self._seen = sequence.stream
            self.add(self._source.message(sent))
            self._source.arrived(self)
        elif sequence.stream <= self.settled:  # an ack of it was lost
            await self._source.client.publish(sent.reply, ACK)
        if self._pulled <= 0:
            self.wake.set()

    async def _keep_alive(self) -> None:
        """Tell the server that what is here is being worked on."""
        while True:
            await asyncio.sleep(self._options.ack_seconds / 3)
            messages = [*(self.batch.messages if self.batch is not None else ()), *self.waiting]
            with contextlib.suppress(NatsError, OSError, StoreUnavailable):
                for message in messages:
                    await self._source.client.publish(message.id.decode(), PROGRESS)


def subjects_of(config: StreamConfig) -> Sequence[str]:
    """Filters of all that a stream's messages may be called; none = it is not known: it has those of other streams, or renames its own."""
    elsewhere = config.mirror or config.sources or config.subject_transform
    return [] if elsewhere else config.subjects or []


def _done(info: ConsumerInfo) -> int:
    """Up to where the server has all as done: acknowledged, or before what the consumer began with, of which an unused one's floor is 0."""
    return max(info.ack_floor.stream_seq if info.ack_floor is not None else 0, (info.config.opt_start_seq or 1) - 1)


def _incarnation(config: ConsumerConfig) -> str:
    description = config.description or ""
    return description if description.startswith(INCARNATION) else ""


async def _whole(answer: Awaitable[T]) -> T:
    """Raises NatsError where the answer is empty: so the server speaks of a consumer that it is just deleting."""
    try:
        return await answer
    except TypeError as error:
        raise NatsError(f"The answer lacks what it should tell: {error}") from error


async def _end(subscription: Subscription) -> None:
    with contextlib.suppress(NatsError, OSError):
        await subscription.unsubscribe()


def _check_credentials(options: NatsSource) -> None:
    """Raises BadSetting, and ImportError where what signs with them is not installed."""
    importlib.import_module("nkeys")
    about = f"Source '{options.called}': credentials '{options.credentials}'"
    try:
        content = Path(options.credentials).read_bytes()
    except OSError as error:
        raise BadSetting(f"{about} cannot be read ({error.strerror}).") from error
    if b"BEGIN NATS USER JWT" not in content or b"BEGIN USER NKEY SEED" not in content:
        raise BadSetting(f"{about} are not what nsc writes: a user's JWT and seed.")


def _login(options: NatsSource) -> dict[str, Any]:
    """How the connection says who it is. Raises BadSetting."""
    given: dict[str, Any] = {
        "user": options.user,
        "password": options.password,
        "token": options.token,
        "user_credentials": options.credentials,
    }
    if options.tls_ca:
        import ssl  # noqa: PLC0415

        given["tls"] = ssl.create_default_context(cafile=options.tls_ca)
    return {name: value for name, value in given.items() if value}


def _letter(batch: Batch, letter: Letter) -> tuple[bytes, dict[str, str]]:
    message = letter.message
    about = letter.about | {"subject": message.topic, "sequence": str(message.position)}
    # What the publisher asked of the server (Nats-Expected-Stream, Nats-Rollup, ...) would be asked of it again.
    names = [(name.decode(), value.decode(errors="replace")) for name, value in message.headers.items()]
    sent = {f"onset_{name}" if name.lower().startswith("nats-") else name: value for name, value in names}
    # The server drops a letter that is written again: the same message, the same identity.
    identity = f"{batch.source}/{message.position}/{'' if letter.index is None else letter.index}"
    return message.payload or b"", sent | {MESSAGE_ID: identity} | {f"onset_{name}": value for name, value in about.items()}


def _fitting(content: bytes, headers: dict[str, str], most: int) -> tuple[bytes, dict[str, str]]:
    """A message of `most` bytes at most, headers included: the server ends the connection of who sends more."""
    size = len(content) + sum(len(name.encode()) + len(value.encode()) + 4 for name, value in headers.items()) + HEADER_BYTES
    return (content, headers) if size <= most else (b"", headers | {"onset_omitted_bytes": str(len(content))})


def _unavailable(error: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"NATS does not answer ({type(error).__name__}: {error}).")
