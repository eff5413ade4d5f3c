"""Real valkey-servers for tests, one or a cluster of them: started on entering, ended by their pids on leaving."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.retry import Retry

from service.embedded import find_server

START_SECONDS = 20
NODES = 3
BOUNDS = [i * REDIS_CLUSTER_HASH_SLOTS // NODES for i in range(NODES + 1)]


class Valkey:
    """A server with its data in `folder`. `kill` and `start` again keep address and data."""

    def __init__(self, folder: Path, **options: str) -> None:
        """`options` of the server, `_` for `-`; it listens on a unix socket in the folder unless they name a port."""
        self.folder = folder
        self.socket = Path(options.get("unixsocket", folder / "v.sock"))
        self._options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(folder),
            "save": "",
            "logfile": str(folder / "log"),
        } | options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        port = self._options["port"]
        return f"unix://{self.socket}" if port == "0" else f"redis://127.0.0.1:{port}"

    def __enter__(self) -> Valkey:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self, *, loaded: bool = True) -> None:
        """Returns when it answers; `loaded` = and has its data in memory."""
        arguments = [part for name, value in self._options.items() for part in (f"--{name.replace('_', '-')}", *value.split(" "))]
        self._process = subprocess.Popen([find_server(), *arguments], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        try:
            while not self._answers(loaded):
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> redis.Redis:
        """To be closed by the caller. It does not retry: what the server says is what the test sees."""
        return redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0))

    def _answers(self, loaded: bool) -> bool:
        with self.client() as client:
            try:
                client.ping()
            except redis.BusyLoadingError:
                return not loaded
            except redis.ConnectionError:
                return False
        return True


class ValkeyCluster:
    """Three primaries on loopback that share all slots, without replicas."""

    def __init__(self, folder: Path, **options: str) -> None:
        """`options` of every server."""
        self._buses = [_free_port() for _ in range(NODES)]
        fixed = {"cluster_enabled": "yes", "cluster_config_file": "nodes.conf", "cluster_node_timeout": "1000"}
        self.nodes = [
            Valkey(folder / str(i), port=str(_free_port()), cluster_port=str(bus), **fixed, **options) for i, bus in enumerate(self._buses)
        ]

    @property
    def url(self) -> str:
        """Of all nodes."""
        return ",".join(node.url for node in self.nodes)

    def __enter__(self) -> ValkeyCluster:
        try:
            for node in self.nodes:
                node.__enter__()
            self._form()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    @contextlib.contextmanager
    def clients(self) -> Iterator[Sequence[Any]]:
        """To each node, and to it alone; their replies are what they are."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(node.client()) for node in self.nodes]

    def empty(self) -> None:
        with self.clients() as clients:
            for client in clients:
                client.flushall()

    def first_owner(self, slot: int) -> int:
        """Index of the node that had the slot when the cluster was formed."""
        return next(i for i in range(NODES) if slot < BOUNDS[i + 1])

    def wait(self) -> None:
        """Until every node knows all others and takes commands."""
        deadline = time.monotonic() + START_SECONDS
        while not self._whole():
            assert time.monotonic() < deadline, [(node.folder / "log").read_text()[-1000:] for node in self.nodes]
            time.sleep(0.02)

    def _form(self) -> None:
        with self.clients() as clients:
            for i, client in enumerate(clients):
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", BOUNDS[i], BOUNDS[i + 1] - 1)
            for node, bus in zip(self.nodes[1:], self._buses[1:], strict=True):
                clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.url.rpartition(":")[2], bus)
        self.wait()

    def _whole(self) -> bool:
        with self.clients() as clients:
            infos = [client.execute_command("CLUSTER", "INFO") for client in clients]
            slots = [client.execute_command("CLUSTER", "SLOTS") for client in clients]
        return all(b"cluster_state:ok" in info for info in infos) and all(len(some) >= NODES for some in slots)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
