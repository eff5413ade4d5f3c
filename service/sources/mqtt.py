"""MQTT 5: QoS 1, each message acknowledged (PUBACK) only when its event is committed.

    a session   lives at the broker under a client id (`session`), subscriptions and unacknowledged messages with it; one replica at a
                time is connected to it, under a lease in the state store. The others wait for the lease
    _keep       take the lease ─► connect to the session ─► read the notes beside the lease ─► subscribe ─► hand out batches, until the
                connection or the lease is lost; then from the start
    a note      of every batch, before anything of it is scored: which packet ids it has, with what contents, and their positions

MQTT has no offsets. But whatever is not acknowledged the broker sends again to the same session, flagged as such, in its order and
under the same packet id (MQTT-4.4.0-1). So positions are our own, times of arrival that rise, and the notes tell the position that
a message had before a crash: which of them were scored is exact, also of numbers without identity and time. Where a broker gives a
packet id to the next message at once, it would tell nothing: then only the events' own identities are left, and the log says so.

Back-pressure is not to acknowledge: the broker sends `receive_maximum` messages ahead at most and keeps the others. One that sends more
(mosquitto 2.0.11) is not read from for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
import struct
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import structlog
from paho.mqtt.client import MQTT_ERR_SUCCESS, Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from service import tasks
from service.errors import Fenced, StoreUnavailable
from service.events import Published
from service.metrics import Metrics
from service.sources import Batch, Letter, Message, Settlement, address, identity, printable
from service.sources.options import MqttSource

ANSWER_SECONDS = 5.0
"""How long the broker may take to answer."""
GOODBYE_SECONDS = 2.0
BRIEF_SECONDS, CONTESTED = 10.0, 5
"""So many connections lost within so long, one after another: most likely another client has our client id, for which a broker ends the
connection of who had it before, and not each says why (mosquitto 2.0.11).
"""
STEADY_SECONDS = 5.0
"""A connection that lasted so long was a good one: the next is tried at once."""
TICK_SECONDS = 1.0
FIRST_BACKOFF, MAX_BACKOFF = 0.05, 2.0
AT_ONCE = 64
"""Messages given to paho at once: on each answer it walks through all that are not answered yet."""
HEAD_BYTES = 16
"""Of a packet, beside its topic, properties and content."""
REMEMBERED = 4
"""Times `receive_maximum` messages are in the notes: more than the broker can still take for unacknowledged."""
_PLACE = struct.Struct("<H8sQ")
"""In a note, of each message: packet id, digest of topic and payload, position."""
_REUSED = _PLACE.pack(0, bytes(8), 0)
"""In a note: the broker gives packet ids again at once."""

log = structlog.get_logger(__name__)


class Leases(Protocol):
    """What is needed of the state store, see StateStore."""

    async def hold(self, name: str, holder: str, seconds: float) -> bool: ...
    async def release(self, name: str, holder: str) -> None: ...
    async def note(self, name: str, holder: str, note: bytes, keep: int) -> bool: ...
    async def notes(self, name: str) -> list[bytes]: ...


class _Arrival(NamedTuple):
    """A message that is not acknowledged yet."""

    message: MQTTMessage
    position: int
    """0 = it has not been handed out yet."""


class Mqtt:
    """Implements Source: one session. `clock` gives seconds since 1970, on all replicas the same."""

    def __init__(self, declared: MqttSource, leases: Leases, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self.name = declared.called
        self.publishes = bool(declared.output)
        self._declared, self._leases, self._metrics, self._clock = declared, leases, metrics, clock
        self.partition = f"{declared.session}@{address(declared.url)}"
        self._lease = f"mqtt/{self.partition}"
        self._identity = identity(self._lease)
        self._member = uuid.uuid4().hex[:16]
        self._last = 0  # position
        self._notes: deque[int] = deque()  # messages in each of the last notes, and in all of them
        self._noted = 0
        self._session: _Session | None = None
        self._publisher: _Link | None = None  # by itself: nothing that waits to be read holds its answers up
        self._under_way: tuple[_Session, Sequence[_Arrival]] | None = None
        self._free = asyncio.Event()
        """No batch is under way."""
        self._free.set()
        self._ready: asyncio.Queue[Batch] = asyncio.Queue()  # holds one at most
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False
        self._brief = 0
        """Connections in a row that were lost within BRIEF_SECONDS."""

    async def open(self) -> None:
        self._metrics.source_partitions.labels(self.name).set(0)
        self._keeper = asyncio.create_task(self._keep(), name=f"mqtt-{self.name}")

    async def receive(self) -> Batch:
        return await self._ready.get()

    async def publish(self, batch: Batch, results: Sequence[Published]) -> None:
        self._taken(batch)
        topics = [self._declared.output.replace("{stream_id}", _level(result.stream_id)) for result in results]
        about = [{"id": printable(result.id), "stream_id": printable(result.stream_id)} for result in results]
        sent = zip(topics, results, about, strict=True)
        await self._send([_Outgoing(topic, result.content, "application/json", names) for topic, result, names in sent])

    async def settle(self, batch: Batch, settlement: Settlement) -> None:
        session, arrivals = self._taken(batch)
        of_message = {message.id: arrival.message for message, arrival in zip(batch.messages, arrivals, strict=True)}
        letters = [_letter(self._declared.dead_letters, letter, of_message[letter.message.id]) for letter in settlement.letters]
        await self._send(letters)
        session.link.acknowledge([arrival.message for arrival in arrivals])
        self._done()

    def abandon(self, batch: Batch) -> None:
        """Where they are still ours they come again from here: the broker sends them again to another connection only."""
        if self._under_way is not None:
            session, arrivals = self._under_way
            session.again(arrivals)
            self._done()

    async def lag(self) -> int | None:
        """MQTT does not tell what the broker holds for a session."""
        return None

    async def close(self) -> None:
        self._closing = True
        if self._keeper is not None:
            if self._session is not None:  # let it say goodbye
                self._session.link.lose("the service stops")
                await asyncio.wait({self._keeper}, timeout=GOODBYE_SECONDS)
            await tasks.end(self._keeper)
        if self._publisher is not None:
            await self._publisher.close()
        with contextlib.suppress(StoreUnavailable):  # then it expires
            await self._leases.release(self._lease, self._member)

    def _taken(self, batch: Batch) -> tuple[_Session, Sequence[_Arrival]]:
        """What is under way. Raises Fenced where the broker will send it again to somebody."""
        if self._under_way is None or self._under_way[0] is not self._session or self._session.link.lost.done():
            raise Fenced(f"The connection that delivered this batch of '{batch.partition}' is lost: the broker delivers it again.")
        return self._under_way

    async def _send(self, messages: Sequence[_Outgoing]) -> None:
        """Returns when the broker has taken all of them. Raises StoreUnavailable."""
        if not messages:
            return
        if self._publisher is None or self._publisher.lost.done():
            publisher = _Link(self._declared, f"{self._declared.session}-{self._member}")
            await publisher.open()
            self._publisher = publisher
        for start in range(0, len(messages), AT_ONCE):
            await self._publisher.publish(messages[start : start + AT_ONCE])

    def _done(self) -> None:
        self._under_way = None
        self._free.set()

    # ── the keeper ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        """Be connected whenever the lease is ours, until cancelled."""
        backoff, told, since = FIRST_BACKOFF, "", 0.0
        while not self._closing:
            try:
                if await self._hold():
                    since = time.monotonic()
                    async with self._connected() as session:
                        await self._serve(session)
                await asyncio.sleep(self._declared.lease_seconds / 3)
            except (StoreUnavailable, Fenced) as error:
                if self._closing:
                    return
                if isinstance(error, Fenced):
                    self._metrics.source_fenced.labels(self.name).inc()
                if since and time.monotonic() - since > STEADY_SECONDS:
                    backoff, told = FIRST_BACKOFF, ""
                since = 0.0
                if error.detail != told:
                    log.warning("mqtt_unavailable", source=self.name, error=error.detail)
                told = error.detail
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF)
            except Exception as error:  # a bug must not end the source for good; it is counted and logged
                self._metrics.bug(error, source=self.name)
                await asyncio.sleep(MAX_BACKOFF)

    async def _hold(self) -> bool:
        return await self._leases.hold(self._lease, self._member, self._declared.lease_seconds)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Session]:
        """A connection to the session, subscribed. Raises StoreUnavailable."""
        notes = await self._leases.notes(self._lease)
        places = {mid: (digest, position) for note in notes for mid, digest, position in _PLACE.iter_unpack(note)}
        self._last = max([self._last, *(position for _, position in places.values())])
        self._notes = deque(len(note) // _PLACE.size for note in notes)
        self._noted = sum(self._notes)
        link = _Link(self._declared, self._declared.session, keep=self._declared.session_expiry_seconds)
        link.on_subscribed = partial(self._subscribed, link)
        session = _Session(link, places, self._declared.receive_maximum)  # before what was not acknowledged comes again
        try:
            await link.open()
            link.subscribe(self._declared.topics)
            self._session = session
            yield session
        finally:
            self._session = None
            self._metrics.source_partitions.labels(self.name).set(0)
            await link.close()

    def _subscribed(self, link: _Link) -> None:
        self._metrics.source_partitions.labels(self.name).set(1)
        log.info("mqtt_subscribed", source=self.name, session=self.partition, resumed=link.resumed)

    async def _serve(self, session: _Session) -> None:
        """Hand out what comes until the connection or the lease is lost. Raises StoreUnavailable, Fenced."""
        began = time.monotonic()
        running = [asyncio.create_task(self._renew()), asyncio.create_task(self._hand_out(session))]
        try:
            waited: list[asyncio.Future[Any]] = [*running, session.link.lost]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for task in running:
                if task.done():
                    await task  # raises what ended it
        finally:
            for task in running:
                await tasks.end(task)
        self._brief = self._brief + 1 if time.monotonic() - began < BRIEF_SECONDS else 0
        if self._brief == CONTESTED:
            log.error("mqtt_session_contested", source=self.name, session=self.partition, connections=self._brief)
        raise StoreUnavailable(f"The connection to {self.partition} is lost: {session.link.lost.result()}.")

    async def _renew(self) -> None:
        """Raises Fenced."""
        while True:
            await asyncio.sleep(self._declared.lease_seconds / 3)
            with contextlib.suppress(StoreUnavailable):  # nothing can be committed, and nobody else can take the lease
                if not await self._hold():
                    raise Fenced(f"The session '{self.partition}' is another replica's by now.")

    async def _hand_out(self, session: _Session) -> None:
        """Raises Fenced."""
        while not session.link.lost.done():
            await session.arrived()
            await self._free.wait()
            arrivals = session.take(self._declared.batch, self._place)
            try:
                await self._note(session, arrivals)
            except BaseException:
                session.again(arrivals)
                raise
            self._free.clear()
            self._under_way = (session, arrivals)
            source = 0 if session.reused else self._identity
            self._ready.put_nowait(Batch(self.partition, source, [_message(arrival) for arrival in arrivals]))

    def _place(self) -> int:
        """The next position: the time in microseconds, or a little later."""
        self._last = max(self._last + 1, round(1e6 * self._clock()))
        return self._last

    async def _note(self, session: _Session, arrivals: Sequence[_Arrival]) -> None:
        """Until the store has it. Raises Fenced."""
        places = [_PLACE.pack(a.message.mid, _digest(a.message), a.position) for a in arrivals if a.message.qos]
        if not places:
            return None
        if session.reused:
            places.append(_REUSED)
        self._notes.append(len(places))
        self._noted += len(places)
        while self._noted - self._notes[0] >= REMEMBERED * self._declared.receive_maximum:
            self._noted -= self._notes.popleft()
        backoff = FIRST_BACKOFF
        while True:
            try:
                if await self._leases.note(self._lease, self._member, b"".join(places), len(self._notes)):
                    return session.noted(arrivals)
            except StoreUnavailable:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF)
            else:
                raise Fenced(f"The session '{self.partition}' is another replica's by now.")


class _Session:
    """What came over one connection and is not acknowledged yet."""

    def __init__(self, link: _Link, places: dict[int, tuple[bytes, int]], most: int) -> None:
        """`places`: what was noted of packet ids; with `most` messages waiting no more are read."""
        self.link = link
        self.reused = 0 in places
        """Whether the broker gives packet ids again at once."""
        self._places = {} if self.reused else places
        self._most = most
        self._waiting: deque[_Arrival] = deque()
        self._there = asyncio.Event()
        link.on_open, link.on_message = self._begin, self._arrive

    async def arrived(self) -> None:
        """Returns when there are messages."""
        await self._there.wait()

    def take(self, count: int, place: Callable[[], int]) -> list[_Arrival]:
        """At most `count` in their order, each with its position: the one it had, or else the next."""
        arrivals = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        self._look()
        return [arrival if arrival.position else arrival._replace(position=place()) for arrival in arrivals]

    def again(self, arrivals: Sequence[_Arrival]) -> None:
        """Before all that came after them."""
        self._waiting.extendleft(reversed(arrivals))
        self._look()

    def _begin(self) -> None:
        if not self.link.resumed:  # the broker begins anew with packet ids
            self._places.clear()

    def noted(self, arrivals: Sequence[_Arrival]) -> None:
        """As the notes have it by now."""
        for message, position in ((message, position) for message, position in arrivals if message.qos):
            self._places.pop(message.mid, None)
            self._places[message.mid] = (_digest(message), position)
        for mid in list(islice(self._places, max(0, len(self._places) - REMEMBERED * self._most))):
            del self._places[mid]

    def _arrive(self, message: MQTTMessage) -> None:
        digest, position = self._places.get(message.mid, (b"", 0))
        if message.qos and position and not message.dup and not self.reused:
            self.reused = True
            log.warning("mqtt_packet_ids_reused", detail="What this broker delivers again is only known by its event's identity or time.")
        known = message.dup and not self.reused and digest == _digest(message)
        self._waiting.append(_Arrival(message, position if known else 0))
        self._look()

    def _look(self) -> None:
        self.link.read(on=len(self._waiting) < self._most)
        if self._waiting:
            self._there.set()
        else:
            self._there.clear()


# ── the connection ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Outgoing:
    topic: str
    content: bytes
    content_type: str
    names: Mapping[str, str]
    """User properties."""


class Written(Properties):
    """Properties of a PUBLISH, ready to be sent: to make its own takes the client longer than scoring an event takes."""

    _written: bytes

    def __init__(self, content_type: str, names: Mapping[str, str]) -> None:
        """Without what the client's own have: it asks for nothing but `pack`."""
        written = b"\x03" + _utf8(content_type) if content_type else b""
        written += b"".join([b"\x26" + _utf8(name) + _utf8(value) for name, value in names.items()])
        size: bytes = VariableByteIntegers.encode(len(written))  # type: ignore[no-untyped-call]
        object.__setattr__(self, "_written", size + written)

    def pack(self) -> bytes:
        return self._written


def _utf8(text: str) -> bytes:
    content = text.encode()
    return len(content).to_bytes(2, "big") + content


class _Link:
    """One connection, driven by the event loop; what is lost is not opened again."""

    def __init__(self, declared: MqttSource, client_id: str, *, keep: int = 0) -> None:
        """`keep` = seconds that the broker keeps the session without a connection."""
        self._declared, self._keep = declared, keep
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        """Why."""
        self.resumed = False
        """Whether the broker still had the session."""
        self.on_open: Callable[[], None] = lambda: None
        self.on_subscribed: Callable[[], None] = lambda: None
        self.on_message: Callable[[MQTTMessage], None] = lambda message: None
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[ReasonCode]] = {}
        self._most = 0
        """Bytes of a packet that the broker takes: it ends the connection of who sends more; 0 = it did not say."""
        self._reading = False
        self._ticks: asyncio.TimerHandle | None = None
        client = self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.connect_timeout = ANSWER_SECONDS
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_message, client.on_publish, client.on_subscribe = self._on_message, self._on_publish, self._on_subscribe

    async def open(self) -> None:
        """Raises StoreUnavailable."""
        connecting = asyncio.ensure_future(asyncio.to_thread(self._connect))
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(self._given_up)
            raise
        except (OSError, ValueError) as error:
            raise StoreUnavailable(f"{address(self._declared.url)} does not answer ({type(error).__name__}: {error}).") from error
        try:
            self._drive()
            await self._answered(self._accepted, "CONNECT")
        except BaseException:
            await self.close()
            raise

    def _given_up(self, connecting: asyncio.Future[None]) -> None:
        """A connection that nobody waits for any more has come about, or has not."""
        if not connecting.cancelled():
            connecting.exception()  # taken note of: asyncio would log it as forgotten
        self._hang_up()

    def _connect(self) -> None:
        """Blocks; in a thread. Sends the CONNECT, its answer comes with the first reading."""
        url, client = urlsplit(self._declared.url), self._client
        if url.username:
            client.username_pw_set(unquote(url.username), unquote(url.password or ""))
        if url.scheme == "mqtts":
            client.tls_set_context(ssl.create_default_context(cafile=self._declared.tls_ca or None))
        about = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        about.SessionExpiryInterval = self._keep
        about.ReceiveMaximum = self._declared.receive_maximum
        port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        client.connect(url.hostname or "", port, self._declared.keepalive_seconds, clean_start=not self._keep, properties=about)

    def _drive(self) -> None:
        """From now on in the event loop."""
        client = self._client
        client.on_socket_register_write, client.on_socket_unregister_write = self._on_write, self._on_written
        client.on_socket_close = self._on_close
        if isinstance(sock := client.socket(), socket.socket):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is written is small, and answered
        self.read(on=True)
        self._tick()

    def read(self, *, on: bool) -> None:
        """Whether what comes is read."""
        sock = self._client.socket()
        if sock is None or on == self._reading:
            return
        self._reading = on
        if on:
            self._watch(self._loop.add_reader, sock.fileno(), self._readable)
        else:
            self._unwatch(self._loop.remove_reader, sock.fileno())

    def subscribe(self, topics: Sequence[str]) -> None:
        """Where the broker refuses one, the connection counts as lost. Its answer comes behind all that it sends again."""
        # Retained messages are of any age: they are no events.
        options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        self._client.subscribe([(topic, options) for topic in topics])

    async def publish(self, messages: Sequence[_Outgoing]) -> None:
        """Returns when the broker has taken all of them. Raises StoreUnavailable."""
        sent = []
        for message in messages:
            content, about = message.content, Written(message.content_type, message.names)
            if self._most and len(content) + len(about.pack()) + len(message.topic.encode()) + HEAD_BYTES > self._most:
                about = Written(message.content_type, {**message.names, "onset_omitted_bytes": str(len(content))})
                content = b""
            info = self._client.publish(message.topic, content, qos=1, properties=about)
            if info.rc != MQTT_ERR_SUCCESS:
                raise StoreUnavailable(f"The connection is lost ({info.rc.name}).")
            sent.append((message.topic, self._answers.setdefault(info.mid, self._loop.create_future())))
        for topic, answer in reversed(sent):  # after the last answer the others are there
            code = await self._answered(answer, "PUBLISH")
            if code.is_failure:
                raise StoreUnavailable(f"{address(self._declared.url)} refuses a message to '{topic}': {code}.")

    def acknowledge(self, messages: Sequence[MQTTMessage]) -> None:
        for message in messages:
            if message.qos:
                self._client.ack(message.mid, message.qos)

    async def close(self) -> None:
        """Say goodbye, after what is still to be written. The session stays at the broker."""
        try:
            if self._client.socket() is not None:
                self.read(on=True)
                self._client.disconnect()
                await asyncio.wait([self._gone], timeout=GOODBYE_SECONDS)
        finally:
            self._hang_up()

    def lose(self, reason: str) -> None:
        """It is of no more use."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def _hang_up(self) -> None:
        if isinstance(sock := self._client.socket(), socket.socket):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            self._client.loop_read()  # notices, and closes
        if self._ticks is not None:
            self._ticks.cancel()
        self.lose("closed")

    # ── what paho calls, always in the event loop ───────────────────────────────────────────────────────────────────────────────

    def _on_connect(self, client: Client, data: Any, flags: ConnectFlags, code: ReasonCode, about: Properties | None) -> None:
        self.resumed = flags.session_present
        self._most = getattr(about, "MaximumPacketSize", 0)
        if code.is_failure:
            self.lose(f"refused: {code}")
        elif not self._accepted.done():
            self.on_open()
            self._accepted.set_result(None)

    def _on_disconnect(self, client: Client, data: Any, flags: DisconnectFlags, code: ReasonCode, about: Properties | None) -> None:
        self.lose(str(code))
        if not self._gone.done():
            self._gone.set_result(None)

    def _on_message(self, client: Client, data: Any, message: MQTTMessage) -> None:
        self.on_message(message)

    def _on_publish(self, client: Client, data: Any, mid: int, code: ReasonCode, about: Properties) -> None:
        if (waiting := self._answers.pop(mid, None)) is not None and not waiting.done():
            waiting.set_result(code)

    def _on_subscribe(self, client: Client, data: Any, mid: int, codes: list[ReasonCode], about: Properties | None) -> None:
        for topic, code in zip(self._declared.topics, codes, strict=False):
            if code.is_failure:
                self.lose(f"the subscription to '{topic}' is refused: {code}")
        if not self.lost.done():
            self.on_subscribed()

    def _on_write(self, client: Client, data: Any, sock: Any) -> None:
        self._watch(self._loop.add_writer, sock.fileno(), self._client.loop_write)

    def _on_written(self, client: Client, data: Any, sock: Any) -> None:
        self._unwatch(self._loop.remove_writer, sock.fileno())

    def _on_close(self, client: Client, data: Any, sock: Any) -> None:
        self._unwatch(self._loop.remove_reader, sock.fileno())
        self._unwatch(self._loop.remove_writer, sock.fileno())
        self._reading = False

    def _watch(self, add: Callable[..., None], fd: int, call: Callable[[], Any]) -> None:
        try:
            add(fd, call)
        except RuntimeError as error:  # uvloop has closed its handle of a socket that failed, before anybody has read that it did
            self.lose(str(error))

    def _unwatch(self, remove: Callable[[int], bool], fd: int) -> None:
        with contextlib.suppress(RuntimeError):  # likewise
            remove(fd)

    def _readable(self) -> None:
        try:
            self._client.loop_read()
            while isinstance(sock := self._client.socket(), ssl.SSLSocket) and sock.pending():
                self._client.loop_read()
        except Exception as error:  # what the broker sent is no MQTT: the connection is of no use
            self.lose(f"{type(error).__name__}: {error}")

    def _tick(self) -> None:
        """Keep the connection alive, and find out when it is not."""
        self._client.loop_misc()
        if not self.lost.done():
            self._ticks = self._loop.call_later(TICK_SECONDS, self._tick)

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _answered(self, answer: asyncio.Future[Any], to: str) -> Any:
        """Raises StoreUnavailable."""
        if not answer.done():
            await asyncio.wait([answer, self.lost], timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        reason = self.lost.result() if self.lost.done() else f"no answer to {to} within {ANSWER_SECONDS:g} seconds"
        raise StoreUnavailable(f"{address(self._declared.url)} does not answer ({reason}).")


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _message(arrival: _Arrival) -> Message:
    message = arrival.message
    about = message.properties
    headers = {name.encode(): value.encode() for name, value in getattr(about, "UserProperty", [])}
    if kind := getattr(about, "ContentType", ""):
        headers[b"content-type"] = kind.encode()
    id_ = b"%d" % arrival.position
    return Message(id_, arrival.position, arrival.position / 1e6, bytes(message.payload), headers, key=message.topic, topic=message.topic)


def _letter(topic: str, letter: Letter, message: MQTTMessage) -> _Outgoing:
    """The message as it was, and why it could not be used."""
    about = message.properties
    names = dict(getattr(about, "UserProperty", []))
    names |= {f"onset_{name}": value for name, value in letter.about.items()} | {"onset_topic": message.topic}
    return _Outgoing(topic, bytes(message.payload), getattr(about, "ContentType", ""), names)


def _digest(message: MQTTMessage) -> bytes:
    return hashlib.blake2b(message.topic.encode() + b"\0" + message.payload, digest_size=8).digest()


def _level(stream_id: str) -> str:
    """As a part of a topic to publish to, which must hold no wildcards and no control characters."""
    return printable(stream_id).replace("+", "_").replace("#", "_")
