"""AMQP 0-9-1 (RabbitMQ): a message is acknowledged only when its event is committed.

    a queue     is a partition: the broker sends it to one replica at a time (an exclusive consumer, or x-single-active-consumer); the
                others wait until that one is gone
    _Reader     connect ─► consume ─► hand out batches, until the connection is lost; then from the start
    settle      dead letters published and confirmed ─► all acknowledged at once ─► the queue's depth asked on the same channel: the answer
                proves that the broker has the acknowledgement, so what may be delivered again is one batch of a queue

AMQP has no offsets: what is delivered again is known by its event's identity (the message_id, unless the payload has one), or by its
time and values. A delivery tag is of one channel and nothing outlives that: the broker puts what was not acknowledged back in its place
and delivers it again. So the connection is a plain one, opened anew here; a "robust" one would acknowledge by tags of another channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Any, TypeGuard, TypeVar
from urllib.parse import unquote, urlsplit

import aio_pika
import structlog
from aio_pika import DeliveryMode, ExchangeType
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import AMQPError, ChannelClosed, ChannelNotFoundEntity
from pamqp import decode

from service import tasks
from service.errors import Fenced, StoreUnavailable
from service.events import Published
from service.metrics import Metrics
from service.sources import Batch, Letter, Message, Settlement, address
from service.sources.options import AmqpSource

ANSWER_SECONDS = 10.0
"""How long the broker may take to answer."""
GOODBYE_SECONDS = 2.0
STEADY_SECONDS = 5.0
"""A connection that lasted so long was a good one: the next is tried at once."""
HEARTBEAT_SECONDS = 10
STANDBY_SECONDS = 1.0
"""A replica asks this often whether a queue is free."""
FIRST_BACKOFF, MAX_BACKOFF = 0.05, 2.0
_ROUTES = ("CC", "BCC")
"""Headers by which RabbitMQ sends a message to further queues, perhaps to the one that it became a dead letter of."""
MAX_KEY_BYTES = 255
"""Of a routing key, and of a message's identity."""
TIMESTAMP_BYTES = 8
_UNAVAILABLE = (AMQPError, OSError, TimeoutError, RuntimeError)
"""What aio-pika raises while the broker does not answer; RuntimeError of a connection that is closed."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Amqp:
    """Implements Source. `clock` gives seconds since 1970."""

    def __init__(self, declared: AmqpSource, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self.name = declared.called
        self.publishes = bool(declared.output)
        self.declared, self.metrics, self.clock = declared, metrics, clock
        self._ready: asyncio.Queue[Batch] = asyncio.Queue()  # holds one batch a queue at most
        self._readers = {queue: _Reader(self, queue) for queue in declared.queues}

    async def open(self) -> None:
        logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # what it complains of is told here once, in a sentence
        decode.METHODS["timestamp"] = decode.TABLE_MAPPING[b"T"] = _timestamp
        self.owned()
        for reader in self._readers.values():
            reader.start()

    async def receive(self) -> Batch:
        return await self._ready.get()

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        await self._readers[batch.partition].publish(results)

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        await self._readers[batch.partition].settle(batch, settlement)

    def abandon(self, batch: Batch) -> None:
        self._readers[batch.partition].abandon()

    async def lag(self) -> int | None:
        depths = [await reader.depth() for reader in self._readers.values()]
        return sum(depth for depth in depths if depth is not None)

    async def close(self) -> None:
        await asyncio.gather(*(reader.stop() for reader in self._readers.values()))

    def hand_out(self, batch: Batch) -> None:
        """Its queue has no other batch under way."""
        self._ready.put_nowait(batch)

    def owned(self) -> None:
        """Some reader begins or ends to consume."""
        self.metrics.source_partitions.labels(self.name).set(sum(reader.consumes for reader in self._readers.values()))


class _Reader:
    """One queue: its messages in order, one batch under way, as many read ahead."""

    def __init__(self, source: Amqp, queue: str) -> None:
        self._source, self._declared, self._queue = source, source.declared, queue
        self._session: _Session | None = None
        self._under_way: tuple[_Session, Sequence[AbstractIncomingMessage]] | None = None
        self._free = asyncio.Event()
        """No batch is under way."""
        self._free.set()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def consumes(self) -> bool:
        return self._session is not None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"amqp-{self._queue}")

    async def stop(self) -> None:
        self._stopping = True
        if self._task is not None:
            if self._session is not None:  # let it say goodbye
                self._session.lose("the service stops")
                await asyncio.wait({self._task}, timeout=GOODBYE_SECONDS)
            await tasks.end(self._task)

    async def publish(self, results: Sequence[Published]) -> None:
        session, _ = self._taken()
        await session.publish_results(results)

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        session, messages = self._taken()
        of_message = {message.id: sent for message, sent in zip(batch.messages, messages, strict=True)}
        await session.publish_letters([(letter, of_message[letter.message.id]) for letter in settlement.letters])
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await messages[-1].ack(multiple=True)
                await session.depth()
        except _UNAVAILABLE as error:
            session.lose(f"{type(error).__name__}: {error}")
            raise Fenced(f"Whether '{self._queue}' has the acknowledgement is not known: it delivers again what it has not.") from error
        self._done()

    def abandon(self) -> None:
        """Where they are still ours they come again from here: the broker delivers them again to another channel only."""
        if self._under_way is not None:
            session, messages = self._under_way
            session.again(messages)
            self._done()

    async def depth(self) -> int | None:
        """Messages that are not acknowledged; None = another replica's. Raises StoreUnavailable."""
        session = self._session
        if session is None:
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                ready = await session.depth()
        except _UNAVAILABLE as error:
            session.lose(f"{type(error).__name__}: {error}")
            raise _unavailable(self._declared.url, error) from error
        return ready + len(session.waiting) + (len(self._under_way[1]) if self._under_way else 0)

    def _taken(self) -> tuple[_Session, Sequence[AbstractIncomingMessage]]:
        """What is under way. Raises Fenced where the broker will deliver it again."""
        if self._under_way is None or self._under_way[0] is not self._session or self._session.lost.done():
            raise Fenced(f"The channel that delivered this batch of '{self._queue}' is lost: the broker delivers it again.")
        return self._under_way

    def _done(self) -> None:
        self._under_way = None
        self._free.set()

    async def _run(self) -> None:
        """Consume whenever the queue lets us, until cancelled."""
        backoff, told = FIRST_BACKOFF, ""
        while not self._stopping:
            since = time.monotonic()
            try:
                async with self._opened() as session:
                    await self._serve(session)
            except _Busy:
                await asyncio.sleep(STANDBY_SECONDS)
            except StoreUnavailable as error:
                if self._stopping:
                    return
                if time.monotonic() - since > STEADY_SECONDS:
                    backoff, told = FIRST_BACKOFF, ""
                if error.detail != told:
                    log.warning("amqp_unavailable", source=self._source.name, queue=self._queue, error=error.detail)
                told = error.detail
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF)
            except Exception as error:  # a bug must not end the queue for good; it is counted and logged
                self._source.metrics.bug(error, source=self._source.name)
                await asyncio.sleep(MAX_BACKOFF)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[_Session]:
        """A consumer of the queue. Raises StoreUnavailable, and _Busy where it is another's."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    connection = await aio_pika.connect(self._declared.url, heartbeat=HEARTBEAT_SECONDS)
                    stack.push_async_callback(_close, connection)
                    session = await _Session.open(connection, self._declared, self._queue)
            except _UNAVAILABLE as error:
                raise _unavailable(self._declared.url, error) from error
            self._session = session
            self._source.owned()
            log.info("amqp_consuming", source=self._source.name, queue=self._queue)
            try:
                yield session
            finally:
                self._session = None
                self._source.owned()

    async def _serve(self, session: _Session) -> None:
        """Hand out what comes until the session is lost. Raises StoreUnavailable."""
        handing = asyncio.create_task(self._hand_out(session))
        try:
            waited: list[asyncio.Future[Any]] = [handing, session.lost]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if handing.done():
                await handing
        finally:
            await tasks.end(handing)
        raise StoreUnavailable(f"The consumer of '{self._queue}' is lost: {session.lost.result()}.")

    async def _hand_out(self, session: _Session) -> None:
        while not session.lost.done():
            await session.arrived()
            await self._free.wait()
            messages = session.take(self._declared.batch)
            self._free.clear()
            self._under_way = (session, messages)
            self._source.hand_out(Batch(self._queue, 0, [_message(message, self._source.clock()) for message in messages]))


class _Busy(Exception):
    """Another replica consumes the queue."""


class _Session:
    """A consumer of one queue and its channels; what came over them and is not acknowledged yet."""

    def __init__(self, declared: AmqpSource, queue: AbstractQueue, letters: AbstractExchange, results: AbstractExchange | None) -> None:
        self._declared, self._queue, self._letters, self._results = declared, queue, letters, results
        self.waiting: deque[AbstractIncomingMessage] = deque()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why."""
        self._there = asyncio.Event()
        self._last_tag = 0

    @classmethod
    async def open(cls, connection: AbstractConnection, declared: AmqpSource, name: str) -> _Session:
        """Raises what aio-pika does, and _Busy."""
        await _made(connection, declared, name)
        publisher = await connection.channel(publisher_confirms=True, on_return_raises=True)
        results = await _exchange(connection, publisher, declared.output) if declared.output else None
        channel = await connection.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=2 * declared.batch)
        queue = await channel.get_queue(name, ensure=False)
        session = cls(declared, queue, publisher.default_exchange, results)
        for part in (channel, publisher, connection):
            part.close_callbacks.add(session._on_close)
        try:
            await queue.consume(session._arrive, exclusive=not declared.single_active_consumer)
        except ChannelClosed as error:
            if "in exclusive use" in str(error):
                raise _Busy from error
            raise
        return session

    async def depth(self) -> int:
        """Messages that wait in the queue; whatever was sent on the channel before, the broker has it. Raises what aio-pika does.

        Who is cancelled waits no longer; the question itself goes on, as aiormq closes the channel of one that is given up.
        """
        return await asyncio.shield(asyncio.ensure_future(self._ask_depth()))

    async def _ask_depth(self) -> int:
        try:
            declared = await (await self._queue.channel.get_underlay_channel()).queue_declare(self._queue.name, passive=True)
        except Exception as error:
            if _is_closing(error):
                raise ConnectionError("the channel was closed") from error
            raise
        return declared.message_count or 0

    async def publish_results(self, results: Sequence[Published]) -> None:
        """Confirmed, whether or not a queue takes them. Raises StoreUnavailable."""
        exchange = self._results
        if exchange is None:
            raise RuntimeError("A source without output was given results: this is a bug.")
        await self._confirmed(
            [exchange.publish(_result(result), _key(self._declared.output_key, result.stream_id), mandatory=False) for result in results]
        )

    async def publish_letters(self, letters: Sequence[tuple[Letter, AbstractIncomingMessage]]) -> None:
        """Confirmed, each taken by the queue of dead letters. Raises StoreUnavailable."""
        to = self._declared.dead_letters
        await self._confirmed([self._letters.publish(_letter(*letter), to, mandatory=True) for letter in letters])

    async def _confirmed(self, publishing: Sequence[Awaitable[Any]]) -> None:
        async def all_() -> list[Any]:
            return await asyncio.gather(*publishing, return_exceptions=True)

        try:
            outcomes = await asyncio.wait_for(all_(), ANSWER_SECONDS)
        except TimeoutError as error:
            raise _unavailable(self._declared.url, error) from error
        for outcome in outcomes:
            if isinstance(outcome, _UNAVAILABLE) or _is_closing(outcome):
                raise _unavailable(self._declared.url, outcome) from outcome
            if isinstance(outcome, BaseException):
                raise outcome

    async def arrived(self) -> None:
        """Returns when there are messages."""
        await self._there.wait()

    def take(self, count: int) -> list[AbstractIncomingMessage]:
        messages = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        self._look()
        return messages

    def again(self, messages: Sequence[AbstractIncomingMessage]) -> None:
        """Before all that came after them."""
        self.waiting.extendleft(reversed(messages))
        self._look()

    def lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    async def _arrive(self, message: AbstractIncomingMessage) -> None:
        tag = message.delivery_tag or 0
        if tag != self._last_tag + 1:  # one that aio-pika could not read: to acknowledge all up to this one would lose it
            self.lose(f"message {self._last_tag + 1} of the channel cannot be read; its properties are malformed")
            return
        self._last_tag = tag
        self.waiting.append(message)
        self._look()

    def _look(self) -> None:
        if self.waiting:
            self._there.set()
        else:
            self._there.clear()

    def _on_close(self, closed: Any, error: BaseException | None) -> None:
        self.lose(f"{type(error).__name__}: {error}" if error else "closed")


# ── what is made where it is missing ────────────────────────────────────────────────────────────────────────────────────────────────


async def _made(connection: AbstractConnection, declared: AmqpSource, name: str) -> None:
    """The queue, its binding, and the queue of dead letters: as they are where they are there."""
    arguments: dict[str, Any] = {"x-single-active-consumer": True} if declared.single_active_consumer else {}
    if await _missing(connection, lambda channel: channel.declare_queue(name, passive=True)):
        async with connection.channel() as channel:
            if declared.exchange:  # before the queue is made: one without its binding would be taken as it is the next time
                await channel.declare_exchange(declared.exchange, passive=True)
            queue = await channel.declare_queue(name, durable=True, arguments=arguments)
            try:
                for key in declared.binding_keys if declared.exchange else []:
                    await queue.bind(declared.exchange, key)
            except AMQPError:  # no right to, for one, which has closed the channel
                async with connection.channel() as another:
                    await (await another.get_queue(name, ensure=False)).delete()
                raise
    if await _missing(connection, lambda channel: channel.declare_queue(declared.dead_letters, passive=True)):
        async with connection.channel() as channel:
            await channel.declare_queue(declared.dead_letters, durable=True)


async def _exchange(connection: AbstractConnection, publisher: AbstractChannel, name: str) -> AbstractExchange:
    """A topic exchange where there is none."""
    if await _missing(connection, lambda channel: channel.declare_exchange(name, passive=True)):
        async with connection.channel() as channel:
            await channel.declare_exchange(name, ExchangeType.TOPIC, durable=True)
    return await publisher.get_exchange(name, ensure=False)


async def _missing(connection: AbstractConnection, ask: Callable[[AbstractChannel], Awaitable[Any]]) -> bool:
    channel = await connection.channel()
    try:
        await ask(channel)
    except ChannelNotFoundEntity:  # the broker has closed the channel
        return True
    await channel.close()
    return False


async def _close(connection: AbstractConnection) -> None:
    with contextlib.suppress(*_UNAVAILABLE):
        async with asyncio.timeout(ANSWER_SECONDS):
            await connection.close()


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _message(message: AbstractIncomingMessage, now: float) -> Message:
    headers = {name.encode(): _bytes(value) for name, value in (message.headers or {}).items()}
    if message.content_type:
        headers[b"content-type"] = message.content_type.encode()
    arrived = message.timestamp.timestamp() if isinstance(message.timestamp, datetime) else now
    return Message(
        b"%d" % (message.delivery_tag or 0),
        0,
        arrived,
        message.body,
        headers,
        event_id=message.message_id or None,
        topic=message.routing_key or "",
    )


def _timestamp(content: bytes) -> tuple[int, datetime | None]:
    """Length and value of a time as pamqp reads it; None = no calendar shows it: microseconds, for one. For that aiormq would end the
    connection, and each one after it: one message would stop its queue for good.
    """
    try:
        return decode.timestamp(content)
    except (ValueError, OverflowError, OSError):
        if len(content) < TIMESTAMP_BYTES:
            raise
        return TIMESTAMP_BYTES, None


def _bytes(value: Any) -> bytes:
    """A header's value as text."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    return (value.isoformat() if isinstance(value, datetime) else str(value)).encode()


def _result(result: Published) -> aio_pika.Message:
    return aio_pika.Message(
        result.content,
        headers={"stream_id": result.stream_id},
        content_type="application/json",
        message_id=_identity(result.id),
        delivery_mode=DeliveryMode.PERSISTENT,
    )


def _letter(letter: Letter, message: AbstractIncomingMessage) -> aio_pika.Message:
    """The message as it was, and why it could not be used."""
    about: dict[str, Any] = {f"onset_{name}": value for name, value in letter.about.items()}
    about |= {"onset_exchange": message.exchange or "", "onset_routing_key": message.routing_key or ""}
    about |= {} if letter.index is None else {"onset_index": letter.index}
    return aio_pika.Message(
        message.body,
        headers={f"onset_{name}" if name in _ROUTES else name: value for name, value in (message.headers or {}).items()} | about,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        message_id=message.message_id,
        timestamp=message.timestamp,
        delivery_mode=DeliveryMode.PERSISTENT,
    )


def _identity(name: str) -> str:
    """Of a result, in as many bytes as a message's has: of a longer one the beginning, and a hash."""
    content = name.encode()
    if len(content) <= MAX_KEY_BYTES:
        return name
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return f"{content[: MAX_KEY_BYTES - len(digest) - 1].decode(errors='ignore')}~{digest}"


def _key(template: str, stream_id: str) -> str:
    """A routing key; a stream id that is too long for one loses its end."""
    return template.replace("{stream_id}", stream_id).encode()[:MAX_KEY_BYTES].decode(errors="ignore")


def _is_closing(outcome: object) -> TypeGuard[Exception]:
    """Whether it is what aiormq raises of what waits for an answer on a channel that is closed without a reason."""
    return type(outcome) is Exception


def _unavailable(url: str, error: BaseException) -> StoreUnavailable:
    if "Connection.OpenOk" in str(error):  # what came in its place, the client keeps to itself
        host = unquote(urlsplit(url).path[1:]) or "/"
        return StoreUnavailable(f"{address(url)} refuses the virtual host '{host}': there is none, or not for this user.")
    return StoreUnavailable(f"{address(url)} does not answer ({type(error).__name__}: {error}).")
