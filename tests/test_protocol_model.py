"""The commit protocol, step by step: hypothesis drives two replicas through every crash point, and a model knows what must come of it.

Each call of a replica to the store stops before it is sent and before its answer arrives. There the machine lets it pass, fails it,
kills the replica, lets the client leave, or leaves a commit on its way to be applied at any later time. Every write that the store
accepts is held against the model: which events it may hold, and the state and results of an uninterrupted run of exactly those; and that
it replaces no state of another file that was written since its own was in force.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from msgspec.structs import replace
from structlog.testing import capture_logs

from bench.ledger import Reference
from service.claims import StoredClaim
from service.detector import Detector
from service.errors import OnsetError, StoreUnavailable, Superseded
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.state import SEEN, TOKEN, Loaded, Origin, StateCodec, event_key
from service.stores import LOST, WRITTEN, StateStore, Write
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
from tests.tiny import build_tiny

T = TypeVar("T")

MODEL = "tiny"
TTL = 3600
STREAMS = ["timed", "sequenced", "bare", "bare-single"]
"""How their events are told apart: by id and time, by sequence, by id alone; of the last one each request holds one new event."""
GATES = 8
"""Of most requests: load, claim, trails and commit, twice each."""


class Fate(enum.Enum):
    """What happens to a call at a gate."""

    FAIL = "the store does not answer"
    KILL = "the replica is gone"
    LEAVE = "the client is gone"
    STRAND = "the replica is gone, its commit is applied later"
    CLAIM = "a replica of the other file is started elsewhere"


@dataclass(frozen=True)
class Request:
    """Events of one request, and the time at which it was asked."""

    events: list[Event]
    now: float


@dataclass(frozen=True)
class Stranded:
    model: int
    writes: Sequence[Write]
    request: Request


@dataclass
class Life:
    """What a stream has learned since its last fresh start."""

    model: int = 0
    keys: list[int] = field(default_factory=list)
    token: bytes = b""
    written: int = 0
    """After how many claims."""


class Line:
    """A replica's connection to the store, with a gate on either side of what the protocol asks."""

    def __init__(self, world: World, model: int) -> None:
        self._world, self._model = world, model
        self.request = Request([], 0.0)
        self.gate: asyncio.Future[None] | None = None
        self.sending: Sequence[Write] = ()
        """The commit that stands at its first gate."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.store, name)

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        return await self._through(lambda: self._world.store.load(model, stream_ids))

    async def load_trails(self, model: str, stream_ids: Sequence[str]) -> list[list[bytes]]:
        return await self._through(lambda: self._world.store.load_trails(model, stream_ids))

    async def commit(self, model: str, writes: Sequence[Write]) -> Sequence[int]:
        self.sending = writes
        done, fresh = await self._through(lambda: self._world.apply(self._model, writes, self.request))
        self._world.told.update(fresh)
        return done

    async def claimed(self, model: str) -> bytes:
        return await self._through(lambda: self._world.store.claimed(model))

    async def claim(self, model: str, expected: bytes | None, claim: bytes) -> bytes:
        before = await self._world.store.claim(model, expected, claim)
        if expected in (None, before):
            self._world.came_into_force(self._model)
        return before

    async def _through(self, ask: Callable[[], Awaitable[T]]) -> T:
        await self._stop()
        self.sending = ()
        answer = await ask()
        await self._stop()
        return answer

    async def _stop(self) -> None:
        self.gate = asyncio.get_running_loop().create_future()
        try:
            await self.gate
        finally:
            self.gate = None


class Replica:
    """A scorer on its line."""

    def __init__(self, world: World, model: int) -> None:
        self.model = model
        self.line = Line(world, model)
        store, detector = cast("StateStore", self.line), world.detectors[model]
        self.claim = StoredClaim(detector, store, world.metrics)
        self.scorer = Scorer(detector, Policy(), store, world.metrics, Limits(), lambda: world.now, claim=self.claim)
        self.scorer.start()

    @property
    def busy(self) -> bool:
        return bool(self.scorer._batcher._running) or self.scorer._batcher.queued > 0

    async def kill(self) -> None:
        await self.scorer.drain(0)

    async def beat(self) -> None:
        beat = asyncio.create_task(self.claim.beat())
        while not beat.done():
            if self.line.gate is not None:
                self.line.gate.set_result(None)
            await asyncio.sleep(0)
        await beat


@dataclass
class Run:
    """One request on its way through one replica; `fates` by gate, from 0 on."""

    number: int
    replica: Replica
    task: asyncio.Task[list[Any]]
    fates: dict[int, Fate]
    gates: int = 0

    @property
    def over(self) -> bool:
        return self.task.done() and not self.replica.busy


class World:
    """The store, the replicas, and the model of what the store may hold."""

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self.detectors = detectors
        self.now = 1.7e9
        self.metrics = Metrics()
        self.store: StateStore
        self.replicas: list[Replica]
        self.lives: dict[str, Life] = defaultdict(Life)
        self.results: dict[tuple[str, int], list[Result]] = defaultdict(list)
        """Of each event, one for each life it was stepped in."""
        self.newest: dict[str, int] = defaultdict(lambda: -1)
        """Index of the newest event stepped in the running life."""
        self.indices: dict[tuple[str, int], int] = {}
        self.stranded: list[Stranded] = []
        self.told: Counter[str] = Counter()
        """Fresh starts that a replica was told of."""
        self.claims = 0
        self.in_force = 0
        self.ended = [0, 0]
        """At which claim each file was superseded last."""
        self.refused = 0
        """Requests, because the other file was in force."""
        self._codecs = [StateCodec(detector.features, detector.state_size, detector.fingerprint) for detector in detectors]
        self._references = [Reference(detector) for detector in detectors]

    async def open(self, store: StateStore) -> None:
        self.store = store
        self.replicas = [Replica(self, 0), Replica(self, 0)]
        for replica in self.replicas:
            await replica.claim.take()
        for reference in self._references:
            reference.start()

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.scorer.drain(1)
        for reference in self._references:
            await reference.stop()
        await self.store.close()

    async def restart(self, number: int, model: int) -> None:
        await self.replicas[number].kill()
        self.replicas[number] = Replica(self, model)
        await self.replicas[number].claim.take()

    def came_into_force(self, model: int) -> None:
        self.claims += 1
        self.ended[1 - model] = self.claims if self.in_force != model else self.ended[1 - model]
        self.in_force = model

    async def play(self, requests: dict[int, list[Event]], fates: dict[int, dict[int, Fate]], order: Sequence[int]) -> dict[int, list[Any]]:
        """Requests through their replicas at once, gate by gate, in the given order; the answers of those that were answered."""
        runs = []
        for number, events in requests.items():
            replica = self.replicas[number]
            replica.line.request = Request(events, self.now)
            runs.append(Run(number, replica, asyncio.create_task(replica.scorer.score(events)), dict(fates.get(number, {}))))
        turns = iter(order)
        while waiting := await self._standing(runs):
            await self._pass(waiting[next(turns, 0) % len(waiting)])
        answers = {}
        for run in runs:
            outcome = (await asyncio.gather(run.task, return_exceptions=True))[0]
            self.refused += isinstance(outcome, Superseded)
            if isinstance(outcome, list):
                answers[run.number] = outcome
            elif not isinstance(outcome, OnsetError | asyncio.CancelledError):
                raise outcome
        return answers

    async def _standing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that stand at a gate, once all stand at one or are over."""
        while any(not run.over and run.replica.line.gate is None for run in runs):  # noqa: ASYNC110 - a batch has no event of its end
            await asyncio.sleep(0.0001)  # gives the processor to the worker thread
        return [run for run in runs if run.replica.line.gate is not None]

    async def _pass(self, run: Run) -> None:
        """Let the call at its gate meet its fate."""
        line, fate = run.replica.line, run.fates.pop(run.gates, None)
        gate = line.gate
        assert gate is not None
        run.gates += 1
        if fate is Fate.FAIL:
            gate.set_exception(StoreUnavailable("The store does not answer."))
        elif fate is Fate.STRAND and not line.sending:  # not here: at the next commit
            run.fates[run.gates] = fate
            gate.set_result(None)
        elif fate in (Fate.KILL, Fate.STRAND):
            if fate is Fate.STRAND:
                self.stranded.append(Stranded(run.replica.model, line.sending, line.request))
            await self.restart(run.number, run.replica.model)
        else:
            if fate is Fate.CLAIM:
                other = 1 - run.replica.model
                await StoredClaim(self.detectors[other], cast("StateStore", Line(self, other)), self.metrics).take()
            if fate is Fate.LEAVE:
                run.task.cancel()
            gate.set_result(None)
        while line.gate is gate:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def apply(self, model: int, writes: Sequence[Write], request: Request) -> tuple[Sequence[int], Counter[str]]:
        """What the server does with a commit, checked: what it answers, and the fresh starts it made."""
        stream_ids = [write.stream_id for write in writes]
        before = await self.store.load(MODEL, stream_ids)
        done = await self.store.commit(MODEL, writes)
        after = await self.store.load(MODEL, stream_ids)
        fresh: Counter[str] = Counter()
        for write, was, is_, written in zip(writes, before, after, done, strict=True):
            expected = WRITTEN if (was or b"")[TOKEN] == write.expected else LOST
            assert written == expected, "written if and only if the token is the expected one"
            if written == WRITTEN:
                assert is_ == bytes(write.value)
                fresh.update(await self._judge(model, write.stream_id, was, is_, request))
            else:
                assert is_ == was, "a loser changes nothing"
        return done, fresh

    async def _judge(self, model: int, stream_id: str, was: bytes | None, value: bytes, request: Request) -> list[str]:
        """Hold an accepted value against the model; why its stream started afresh, if it did."""
        life = self.lives[stream_id]
        new = self._decoded(model, value)
        old = self._decoded(model, was)
        assert new.origins[0] == Origin.STORED
        version, ring = int(new.rows["version"][0]), new.rows["seen"][0]
        intact = old.origins[0] == Origin.STORED
        if intact:
            assert int(old.rows["version"][0]) == len(life.keys), "nothing that was committed is lost"
        healed = was is not None and was[TOKEN] == life.token and life.model == model and version > len(life.keys)
        if old.origins[0] == Origin.OTHER_MODEL:
            since = "it was in force after that state was written, or is"
            assert model == self.in_force or self.ended[model] > life.written, since
        events = {event_key(event.event_id, event.sequence): event for event in request.events if event.stream_id == stream_id}
        for base in [len(life.keys)] if intact else [len(life.keys), 0] if healed else [0]:
            keys = [int(ring[i % SEEN]) for i in range(base + 1, version + 1)]
            if 0 < len(keys) <= SEEN and set(keys) <= set(events) and not set(keys) & set(life.keys[:base]):
                steps = [self._timed(events[key], request.now) for key in keys]
                if base == 0:
                    await self._references[model].forget(stream_id)
                    self.newest[stream_id] = -1
                results = await self._references[model].step(steps)
                if not await self._references[model].difference(stream_id, value):
                    self._enter(model, stream_id, value, life.keys[:base] + keys, dict(zip(keys, results, strict=True)))
                    return [Origin(old.origins[0]).name.lower()] if base == 0 and not intact else []
        raise AssertionError(f"{stream_id}: version {version} after {len(life.keys)} is no step of {list(events.values())}")

    def _enter(self, model: int, stream_id: str, value: bytes, keys: list[int], results: dict[int, Result]) -> None:
        self.lives[stream_id] = Life(model, keys, value[TOKEN], self.claims)
        for key, result in results.items():
            self.results[stream_id, key].append(result)
            self.newest[stream_id] = max(self.newest[stream_id], self.indices[stream_id, key])

    def forgotten(self, stream_id: str) -> None:
        """Nothing is left of a stream, results included."""
        self.lives[stream_id] = Life()
        self.newest[stream_id] = -1
        for known in [known for known in self.results if known[0] == stream_id]:
            del self.results[known]

    def check(self, events: Sequence[Event], answers: Sequence[Any]) -> list[Event]:
        """Hold answers against the model; returns the events that were not answered."""
        assert len(events) == len(answers)
        left = []
        for event, answer in zip(events, answers, strict=True):
            if not isinstance(answer, Result):
                left.append(event)
                continue
            assert (answer.stream_id, answer.event_id) == (event.stream_id, event.event_id)
            key = event_key(event.event_id, event.sequence)
            given = self.results.get((answer.stream_id, key), [])
            if answer.expected:
                assert replace(answer, duplicate=False) in [self._echoed(result, event) for result in given], "a result nobody stepped"
                continue
            life = self.lives[answer.stream_id]
            assert key not in life.keys[-1:], "the last event is always answered with its result"
            if answer.late:
                assert given or self.indices[answer.stream_id, key] < self.newest[answer.stream_id], "only an older event is late"
            else:
                assert answer.duplicate, "an event without a result says why"
                assert given, "only what was stepped is a duplicate"
        return left

    def _echoed(self, result: Result, event: Event) -> Result:
        return replace(result, timestamp=event.timestamp if event.timestamp is not None else result.timestamp)

    def _timed(self, event: Event, now: float) -> Event:
        return replace(event, timestamp=event.timestamp if event.timestamp is not None else now)

    def _decoded(self, model: int, value: bytes | None) -> Loaded:
        return self._codecs[model].decode([value])


fates = st.dictionaries(st.integers(0, GATES - 1), st.sampled_from(Fate), max_size=1)
replicas = st.integers(0, 1)
orders = st.lists(st.integers(0, 1), max_size=12)
streams = st.lists(st.sampled_from(STREAMS), min_size=1, max_size=3, unique=True)


class Protocol(RuleBasedStateMachine):
    """Senders that keep their streams in order and send again what was not answered."""

    detectors: Sequence[Detector]
    open_store: Callable[[World], Awaitable[StateStore]]
    refused = 0
    """Requests of all examples, because another file was in force."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self.world = World(self.detectors)
        self._do(self._open())
        self._made: dict[str, list[Event]] = {stream_id: [] for stream_id in STREAMS}
        self._pending: dict[str, list[Event]] = {stream_id: [] for stream_id in STREAMS}
        """Sent, not answered: sent again before anything newer of the stream."""

    async def _open(self) -> None:
        await self.world.open(await type(self).open_store(self.world))

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(what)

    def teardown(self) -> None:
        self._do(self._settle())
        self._do(self.world.close())
        type(self).refused += self.world.refused
        self._runner.close()

    async def _settle(self) -> None:
        """In the end everything is answered."""
        await self.world.restart(0, self.world.replicas[0].model)
        for stream_id in STREAMS:
            if self._pending[stream_id]:
                await self._send({0: self._pending[stream_id]}, {}, [])
            assert not self._pending[stream_id]
        counted = {reason: self.world.metrics.fresh.labels(reason)._value.get() for reason in ("new", "corrupt", "other_model")}
        assert counted == {reason: self.world.told[reason] for reason in counted}, "each fresh start is counted"

    @rule(replica=replicas, stream_ids=streams, count=st.integers(1, 4), fates=fates)
    def send(self, replica: int, stream_ids: list[str], count: int, fates: dict[int, Fate]) -> None:
        events = [event for stream_id in stream_ids for event in self._next(stream_id, count)]
        self._do(self._send({replica: events}, {replica: fates}, []))

    @rule(stream_ids=streams, count=st.integers(1, 3), first=fates, second=fates, order=orders)
    def race(self, stream_ids: list[str], count: int, first: dict[int, Fate], second: dict[int, Fate], order: list[int]) -> None:
        """The same new events through both replicas at once."""
        events = [event for stream_id in stream_ids for event in self._next(stream_id, count)]
        self._do(self._send({0: events, 1: list(events)}, {0: first, 1: second}, order))

    @rule(data=st.data(), replica=replicas, stream_ids=streams, new=st.booleans(), fates=fates)
    def send_again(self, data: st.DataObject, replica: int, stream_ids: list[str], new: bool, fates: dict[int, Fate]) -> None:
        """Old events, shuffled, events that were held back among them; perhaps before new ones."""
        events: list[Event] = []
        for stream_id in stream_ids:
            known = self._made[stream_id]
            if stream_id.startswith("bare"):  # known among the SEEN events stepped last alone, in whatever order a fresh start met them
                known = known[-4:]
            events += data.draw(st.lists(st.sampled_from(known), max_size=4)) if known else []
        pending = {id(event) for stream_id in stream_ids for event in self._pending[stream_id]}
        events = [event for event in events if id(event) not in pending]
        if new:
            events += [event for stream_id in stream_ids for event in self._next(stream_id, 2)]
        self._do(self._send({replica: events}, {replica: fates}, []))

    @rule(stream_id=st.sampled_from(["timed", "sequenced"]))
    def hold_back(self, stream_id: str) -> None:
        """An event that will come after later ones."""
        if not self._pending[stream_id]:
            self._make(stream_id)

    @rule(stream_id=st.sampled_from(STREAMS), place=st.integers(0, 2**16), replica=replicas, fates=fates)
    def flip(self, stream_id: str, place: int, replica: int, fates: dict[int, Fate]) -> None:
        """A bit of the stored value, whichever, then an event."""

        async def flip() -> None:
            [value] = await self.world.store.load(MODEL, [stream_id])
            if value is not None:
                damaged = bytearray(value)
                bit = place * 2654435761 % (8 * len(value))  # spread: small numbers are drawn often
                damaged[bit // 8] ^= 1 << bit % 8
                assert list(await self.world.store.commit(MODEL, [Write(stream_id, value[TOKEN], bytes(damaged))])) == [WRITTEN]

        self._do(flip())
        self._do(self._send({replica: self._next(stream_id, 1)}, {replica: fates}, []))

    @rule(stream_id=st.sampled_from(STREAMS), replica=replicas, asked=replicas)
    def delete(self, stream_id: str, replica: int, asked: int) -> None:
        """By one replica; the other may hold a copy, which must not answer for it when an old event comes again."""
        self._do(self.world.replicas[replica].scorer.streams.forget(stream_id))
        self.world.forgotten(stream_id)
        if not self._pending[stream_id]:
            self._do(self._send({asked: self._made[stream_id][-1:]}, {}, []))

    @rule(seconds=st.sampled_from([1, 700, TTL + 1]))
    def elapse(self, seconds: int) -> None:
        """Results (after 600 s) and states are gone by then, where the store's time can be moved."""
        self.world.now += seconds

    @rule(replica=replicas, model=st.integers(0, 1))
    def start_anew(self, replica: int, model: int) -> None:
        """A replica is killed and started, with the same model or the other one."""
        self._do(self.world.restart(replica, model))

    @rule(replica=replicas)
    def beat(self, replica: int) -> None:
        """A replica learns whether its file is in force, or not in time."""
        self._do(self.world.replicas[replica].beat())

    @rule()
    def land(self) -> None:
        """A commit whose replica is long gone reaches the server."""
        if self.world.stranded:
            stranded = self.world.stranded.pop(0)
            self._do(self.world.apply(stranded.model, stranded.writes, stranded.request))

    async def _send(self, requests: dict[int, list[Event]], fates: dict[int, dict[int, Fate]], order: list[int]) -> None:
        requests = {number: events for number, events in requests.items() if events}
        answers = await self.world.play(requests, fates, order)
        for number, answered in answers.items():
            left = {id(event) for event in self.world.check(requests[number], answered)}
            done = {id(event) for event in requests[number]} - left
            for stream_id in STREAMS:
                self._pending[stream_id] = [event for event in self._pending[stream_id] if id(event) not in done]

    def _next(self, stream_id: str, count: int) -> list[Event]:
        """What the sender of a stream sends next."""
        if not self._pending[stream_id]:
            self._pending[stream_id] = [self._make(stream_id) for _ in range(1 if stream_id == "bare-single" else count)]
        return list(self._pending[stream_id])

    def _make(self, stream_id: str) -> Event:
        i = len(self._made[stream_id])
        event = Event(
            stream_id=stream_id,
            values={"value": float((7 * i + len(stream_id)) % 11) + (40.0 if i % 9 == 8 else 0.0)},
            timestamp=1e9 + i if stream_id == "timed" else None,
            event_id=None if stream_id == "sequenced" else f"{stream_id}-{i}",
            sequence=i if stream_id == "sequenced" else None,
        )
        self._made[stream_id].append(event)
        self.world.indices[stream_id, event_key(event.event_id, event.sequence)] = i
        return event


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Detector]:
    """Two versions of one model."""
    folder = tmp_path_factory.mktemp("models")
    return [Detector.load(build_tiny(folder, version=version)) for version in ("1", "2")]


def play(name: str, detectors: Sequence[Detector], open_store: Callable[[World], Awaitable[StateStore]], examples: int, steps: int) -> None:
    machine = type(name, (Protocol,), {"detectors": detectors, "open_store": staticmethod(open_store)})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    asked = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=checks,
        derandomize=True,
        phases=[Phase.generate],  # shrinking takes minutes; add Phase.shrink to look into a failure
    )
    with capture_logs():
        run_state_machine_as_test(machine, settings=asked)
    assert cast("type[Protocol]", machine).refused > 0


def test_whatever_crashes_when_nothing_is_lost_or_stepped_twice(models: list[Detector]) -> None:
    async def memory(world: World) -> StateStore:
        return MemoryStore(state_ttl=TTL, result_ttl=600, clock=lambda: world.now)

    play("InMemory", models, memory, examples=80, steps=30)


def test_the_same_on_a_real_server(models: list[Detector], empty_server: str) -> None:
    async def real(world: World) -> StateStore:
        store = RedisStore(empty_server, state_ttl=TTL, result_ttl=600)
        await store.open()
        for stream_id in STREAMS:
            await store.delete(MODEL, stream_id)
        return store

    play("OnServer", models, real, examples=10, steps=20)
