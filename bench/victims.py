"""The processes that a soak kills: one valkey-server and the replicas of the service on it, each restarted at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from bench.nursery import Born, Nursery
from bench.servers import NONE, free_port
from service.embedded import find_server, server_options

READY_SECONDS = 180.0
POLL_SECONDS = 0.05
SHARE_OF_SERVERS = 0.25
"""Of the kills."""
SHARE_OF_ANY = 0.1
"""Of the kills that hit a process whatever it is doing, starting perhaps; others wait for one at work."""
SAMPLED = ("onset_state_conflicts_total", "onset_fresh_states_total", "onset_events_total")


class Child:
    """One process, its output in a log."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ONSET_")}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, env={**inherited, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and what it asks for."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


class Victim(ABC):
    """What is killed and started again. `url` is where it listens now."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.url = ""
        self.folder = folder
        self.log = folder / f"{name.replace(' ', '-')}.log"
        self.starts = 0

    @abstractmethod
    def start(self) -> None:
        """Returns at once."""

    @abstractmethod
    def kill(self) -> None:
        """Kill -9 of the process at work."""

    @abstractmethod
    def stop(self) -> None:
        """End everything."""

    @abstractmethod
    async def ready(self) -> bool: ...

    async def expendable(self) -> bool:
        """Whether it is at work and would be again at once."""
        return await self.ready()

    async def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not await self.ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} is not ready; its log ends with:\n{self.log.read_text(errors='replace')[-3000:]}")
            await asyncio.sleep(POLL_SECONDS)


class Server(Victim):
    """One process."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self._child: Child | None = None

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """That starts it."""

    def start(self) -> None:
        self._child = Child(self._command(), {}, self.log)
        self.starts += 1

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()


class Store(Server):
    """A valkey-server configured as the service's embedded one."""

    def __init__(self, folder: Path) -> None:
        super().__init__("store", folder)
        self._socket = folder / "store.sock"
        self.url = f"unix://{self._socket}"
        self.client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=2.0)

    def _command(self) -> Sequence[str]:
        options = server_options(self.folder, self._socket)
        return [find_server(), *(part for name, value in options.items() for part in (f"--{name}", value))]

    async def ready(self) -> bool:
        try:
            await self.client.ping()
        except (RedisError, OSError):
            return False
        return True


@dataclass(frozen=True)
class Serving:
    child: Born
    url: str


class Replica(Victim):
    """`python -m service serve`, and beside it one more that is started and takes no events: the next in its place, so that starting,
    which takes longer than is to be between two kills, leaves no gap.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        store: Store,
        model: Path,
        client: httpx.AsyncClient,
        nursery: Nursery,
        settings: Mapping[str, str] = NONE,
    ) -> None:
        """`settings` are further ONSET_… variables, without the prefix."""
        super().__init__(f"replica {number}", folder)
        self._store, self._model, self._client, self._nursery = store, model, client, nursery
        self._settings = settings
        self._active: Serving | None = None
        self._next = self.another()
        self.counters: dict[str, dict[str, float]] = {}
        """The last sample of each process's counters, by its address."""

    def start(self) -> None:
        self._active, self._next = self._next, self.another()
        self.url = self._active.url
        self.starts += 1

    def kill(self) -> None:
        if self._active is not None:
            self._active.child.kill()

    def stop(self) -> None:
        for serving in (self._active, self._next):
            if serving is not None:
                serving.child.stop()

    def replace(self, model: Path) -> None:
        """Start it anew with another model."""
        self._model = model
        self.stop()
        self._next = self.another()
        self.start()

    async def ready(self) -> bool:
        return await self._ready(self.url)

    async def expendable(self) -> bool:
        return await self._ready(self.url) and await self._ready(self._next.url)

    async def _ready(self, url: str) -> bool:
        try:
            return (await self._client.get(f"{url}/health/ready")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def answers(self, serving: Serving) -> bool:
        """Whether one of its processes is ready."""
        return await self._ready(serving.url)

    async def sample(self) -> None:
        """Keep its counters as they are now; those of a process that is killed are lost from the last sample on."""
        await self._sample(self.url)
        with contextlib.suppress(httpx.HTTPError):  # it may be starting
            await self._sample(self._next.url)

    async def _sample(self, url: str) -> None:
        lines = [line.rpartition(" ") for line in (await self._client.get(f"{url}/metrics")).text.splitlines()]
        self.counters[url] = {name: float(value) for name, _, value in lines if name.startswith(SAMPLED)}

    def total(self, counter: str) -> float:
        return sum(counters.get(counter, 0.0) for counters in self.counters.values())

    def another(self) -> Serving:
        """One more process like it, which is the caller's to end."""
        port = free_port()
        settings = {"PORT": str(port), "REDIS_URL": self._store.url, "MODEL": str(self._model), "LOG_LEVEL": "warning", **self._settings}
        environment = {f"ONSET_{name}": value for name, value in settings.items()}
        return Serving(self._nursery.serve(environment, self.log), f"http://127.0.0.1:{port}")


async def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


class Killer:
    """Kills one of the processes at random moments, about `rate` a second, and starts it again at once."""

    def __init__(
        self,
        servers: Sequence[Victim],
        replicas: Sequence[Replica],
        rng: random.Random,
        rate: float,
        done: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`servers` are the store, and a broker where there is one. `done` rises with what the replicas do: most kills wait for that."""
        self._servers, self._replicas, self._rng, self._rate, self._done = servers, replicas, rng, rate, done
        self._first: list[Victim] = [*servers, *replicas[:1]]
        """Killed before any other, from the last on, so that also a short soak has had one of each kind."""
        self.kills: Counter[str] = Counter()

    async def run(self, kills: int, seconds: float) -> float:
        """So many kills, or as many as the seconds are enough for; returns once all are at work again, with how long the kills took."""
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._kill(kills), seconds)
        took = time.monotonic() - began
        for victim in (*self._servers, *self._replicas):
            await victim.wait_ready()
        return took

    async def _kill(self, kills: int) -> None:
        due, before, anyhow = time.monotonic(), 0, False
        while self.kills.total() < kills:
            due = max(due + self._rng.expovariate(self._rate), time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            while self._done() <= before and not anyhow:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
            victim = await self._victim()
            before, anyhow = self._done(), self._rng.random() < SHARE_OF_ANY
            victim.kill()
            victim.start()
            self.kills[victim.name] += 1

    async def _victim(self) -> Victim:
        """Mostly one that is at work, so that kills meet events and not each other."""
        if self._first:
            while not await self._first[-1].expendable():  # noqa: ASYNC110 - it is asked over the network, nothing tells
                await asyncio.sleep(POLL_SECONDS)
            return self._first.pop()
        wanted: Victim = self._rng.choice(self._servers if self._rng.random() < SHARE_OF_SERVERS else self._replicas)
        if self._rng.random() < SHARE_OF_ANY:
            return wanted
        while True:
            for victim in (wanted, *self._rng.sample(self._replicas, len(self._replicas))):
                if await victim.expendable():
                    return victim
            await asyncio.sleep(POLL_SECONDS)
